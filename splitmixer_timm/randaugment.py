""" torchvision's RandAugment, which the paper trains with, for timm's train.py.

`--device-modules splitmixer_timm splitmixer_timm.randaugment --aa torchvision-m12-n2`: two operations, each at bin 12
of the 31 from 0 to 30. timm's own at that strength, `rand-m4-n2-p1.0-mstd0-inc1`, draws Invert and SolarizeAdd besides,
does not draw Identity, posterizes to 3 bits in place of 6, and fills empty corners with the mean colour in place of
black.
"""
import re
from typing import Any, Callable, Dict, Optional, Tuple

import torch
from timm.data import auto_augment, transforms_factory
from torchvision import transforms
from torchvision.transforms.autoaugment import _apply_op

__all__ = ['BINS', 'RandAugment', 'torchvision_rand_augment']

BINS = 31  # magnitudes, torchvision's default


class RandAugment(transforms.RandAugment):
    """ torchvision's, that keeps its table of magnitudes, which is made anew there for each image."""

    _space: Tuple[Any, Dict[str, Any]] = (None, {})  # that of the last size of image: timm crops all to one

    def _augmentation_space(self, *args: Any) -> Dict[str, Any]:
        if self._space[0] != args:
            self._space = args, super()._augmentation_space(*args)
        return self._space[1]

    def batch(self, images: torch.Tensor) -> torch.Tensor:
        """ Augment the images of a batch, each by operations of its own, those of the same operation together.

        Args:
            images: Images (B, C, H, W) in uint8, of 1 or 3 channels.

        Returns:
            Images of the same shape.
        """
        images = images.clone()
        space = self._augmentation_space(self.num_magnitude_bins, tuple(images.shape[-2:]))
        for _ in range(self.num_ops):
            drawn = torch.randint(len(space), (len(images),))
            is_negative = torch.randint(2, (len(images),)).bool()
            for n, (name, (magnitudes, is_signed)) in enumerate(space.items()):
                magnitude = float(magnitudes[self.magnitude]) if magnitudes.ndim else 0.
                parts = ((magnitude, ~is_negative), (-magnitude, is_negative)) if is_signed else ((magnitude, True),)
                for amount, is_part in parts:
                    index = ((drawn == n) & is_part).nonzero().flatten()
                    if len(index):
                        images[index] = _apply_op(
                            images[index], name, amount, interpolation=self.interpolation, fill=self.fill)
        return images


def torchvision_rand_augment(config: str) -> RandAugment:
    """ torchvision's RandAugment of a policy as train.py's `--aa` has it.

    Args:
        config: 'torchvision-m12-n2': the magnitude, a bin from 0 to 30, and the operations on an image.

    Raises:
        ValueError: If it is anything else.
    """
    match = re.fullmatch(r'torchvision-m([0-9]+)-n([0-9]+)', config)
    if not match or int(match[1]) >= BINS or int(match[2]) < 1:
        raise ValueError(
            f"aa must be 'torchvision-mM-nN', M from 0 to {BINS - 1} and N at least 1, got {config!r}")
    return RandAugment(num_ops=int(match[2]), magnitude=int(match[1]), num_magnitude_bins=BINS)


def _auto_augment_transform(config_str: str, hparams: Optional[Dict[str, Any]] = None) -> Callable:
    if config_str.startswith('torchvision'):
        return torchvision_rand_augment(config_str)
    return auto_augment.auto_augment_transform(config_str, hparams)


# where timm's pipeline of training images looks it up
transforms_factory.auto_augment_transform = _auto_augment_transform
