""" Training images augmented a batch at a time, for timm's train.py where augmentation on the CPU holds up a GPU.

`--device-modules splitmixer_timm splitmixer_timm.randaugment splitmixer_timm.batch_augment`: for images of one size
(CIFAR, or folders of images that were resized beforehand) crops, flips and torchvision's RandAugment then work on the
uint8 tensor of a batch, in a data loader's process. The distribution of images stays what it was; single pixels may
differ, as they do between torchvision's operations on tensors and on PIL images. Other transforms are applied to each
image as ever. Image folders are decoded once and stay in memory, where that takes at most 1 GiB and data loaders are
forked: others would each keep their own.

Evaluation, images of several sizes, and loaders without timm's prefetcher, go as if this were not there.
"""
import logging
import mmap
import random
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, dataset_factory
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.transforms import MaybePILToTensor, RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import datasets, transforms
from torchvision.transforms.functional import InterpolationMode, pil_to_tensor, resize, to_pil_image

from .randaugment import RandAugment

__all__ = ['BatchCIFAR10', 'BatchCIFAR100', 'BatchImageDataset', 'augment']

KEPT_BYTES = 2**30  # of decoded images, at most
FLIPS = {transforms.RandomHorizontalFlip: -1, transforms.RandomVerticalFlip: -2}  # the dimension that each reverses
# interpolations that torchvision has for tensors
MODES = {InterpolationMode.NEAREST, InterpolationMode.BILINEAR, InterpolationMode.BICUBIC}

_logger = logging.getLogger(__name__)


def _one_by_one(images: Tensor, steps: Sequence[Any]) -> Tensor:
    if not steps:
        return images
    return torch.stack([pil_to_tensor(transforms.Compose(steps)(to_pil_image(image))) for image in images])


def augment(images: Tensor, steps: Sequence[Any]) -> Tensor:
    """ Apply transforms of PIL images to a batch.

    Args:
        images: Images (B, C, H, W) in uint8, of 1 or 3 channels.
        steps: The transforms, one after the other, which make PIL images of one size.

    Returns:
        Images (B, C, H', W') in uint8.
    """
    waiting: List[Any] = []  # for all images to be taken apart
    for step in steps:
        in_batch = _in_batch(step)
        if in_batch is None:
            waiting.append(step)
        else:
            images, waiting = in_batch(_one_by_one(images, waiting)), []
    return _one_by_one(images, waiting)


def _in_batch(step: Any) -> Optional[Callable[[Tensor], Tensor]]:
    """ The form of a transform for batches, if it has one."""
    if type(step) is RandAugment:
        return step.batch
    if type(step) in FLIPS:
        return partial(_flip, step)
    if type(step) is RandomResizedCropAndInterpolation and set(_modes(step)) <= MODES:
        return partial(_crop, step)
    return None


def _flip(step: Any, images: Tensor) -> Tensor:
    is_flipped = torch.rand(len(images)) < step.p
    return torch.where(is_flipped[:, None, None, None], images.flip(FLIPS[type(step)]), images)


def _modes(step: RandomResizedCropAndInterpolation) -> Sequence[InterpolationMode]:
    return step.interpolation if isinstance(step.interpolation, (tuple, list)) else [step.interpolation]


def _crop(step: RandomResizedCropAndInterpolation, images: Tensor) -> Tensor:
    """ Crop each image as the transform draws it, those of the same size together."""
    modes = _modes(step)
    alike: Dict[Any, List[Tuple[int, int, int]]] = {}  # places of the crops of each size and interpolation
    for n in range(len(images)):
        top, left, height, width = step.get_params(images, step.scale, step.ratio)
        mode = random.choice(modes) if len(modes) > 1 else modes[0]
        alike.setdefault((height, width, mode), []).append((n, top, left))
    made = images.new_empty(*images.shape[:2], *step.size)
    for (height, width, mode), places in alike.items():
        crops = torch.stack([images[n, :, top:top + height, left:left + width] for n, top, left in places])
        if (height, width) != step.size:
            # of tensors, that is what PIL has by the name of nearest
            mode = InterpolationMode.NEAREST_EXACT if mode == InterpolationMode.NEAREST else mode
            crops = resize(crops, step.size, mode, antialias=True)
        made[[n for n, *_ in places]] = crops
    return made


class _Batches:
    """ A data set of which torch's data loaders ask for a whole batch."""

    transform: Any
    target_transform: Any
    # images (B, H, W, C) in uint8 and their targets, before transforms; None where they have no one size
    _batch: Callable[[List[int]], Optional[Tuple[np.ndarray, List[Any]]]]

    def __getitems__(self, indices: List[int]) -> List[Tuple[Any, Any]]:
        *steps, last = getattr(self.transform, 'transforms', [None])
        is_augmented = any(map(_in_batch, steps))
        batch = self._batch(indices) if is_augmented and type(last) is MaybePILToTensor else None
        if batch is None:
            return [self[index] for index in indices]
        pixels, targets = batch
        if self.target_transform is not None:
            targets = [self.target_transform(target) for target in targets]
        return list(zip(augment(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), steps), targets))


class BatchImageDataset(_Batches, ImageDataset):
    """ timm's image data set, that keeps decoded images and augments batches.

    They are kept in memory that the processes of a data loader share, where these are forked.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._keep()

    def _keep(self) -> None:
        self._pixels = self._is_kept = None
        # other readers keep a file open, which the processes of a data loader must not share
        self._is_one_size = type(self.reader) is ReaderImageFolder and self.input_img_mode in ('L', 'RGB') and (
            not self.load_bytes and self.additional_features is None)
        if self._is_one_size:
            try:
                pixels = self._decode(0)
            except OSError:  # timm takes the next image that can be read
                return
            if len(self) * pixels.nbytes <= KEPT_BYTES:
                # anonymous, not torch's shared memory, of which containers may have little
                self._pixels = np.frombuffer(mmap.mmap(-1, len(self) * pixels.nbytes), np.uint8).reshape(
                    len(self), *pixels.shape)
                self._is_kept = np.frombuffer(mmap.mmap(-1, len(self)), np.bool_)

    def __getstate__(self) -> Dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ('_pixels', '_is_kept')}

    def __setstate__(self, state: Dict[str, Any]) -> None:
        self.__dict__.update(state, _pixels=None, _is_kept=None)

    def _decode(self, index: int) -> np.ndarray:
        with Image.open(self.reader.samples[index][0]) as image:
            pixels = np.asarray(image.convert(self.input_img_mode))
        return pixels.reshape(*pixels.shape[:2], -1)

    def _batch(self, indices: List[int]) -> Optional[Tuple[np.ndarray, List[Any]]]:
        if not self._is_one_size:
            return None
        try:
            decoded = {
                index: self._decode(index) for index in indices if self._is_kept is None or not self._is_kept[index]}
        except OSError:  # told by timm, which takes another image
            return None
        shapes = {pixels.shape for pixels in decoded.values()}
        if len(shapes) > 1 or self._pixels is not None and not shapes <= {self._pixels.shape[1:]}:
            _logger.warning('Images are of several sizes: they are augmented one by one.')
            self._is_one_size = False
            return None
        targets = [self.reader.samples[index][1] for index in indices]
        targets = [-1 if target is None else target for target in targets]  # as timm has them
        if self._pixels is None:
            return np.stack([decoded[index] for index in indices]), targets
        for index, pixels in decoded.items():
            self._pixels[index], self._is_kept[index] = pixels, True
        return self._pixels[indices], targets


class _BatchCIFAR(_Batches):
    data: np.ndarray
    targets: List[int]

    def _batch(self, indices: List[int]) -> Tuple[np.ndarray, List[Any]]:
        return self.data[indices], [self.targets[index] for index in indices]


class BatchCIFAR10(_BatchCIFAR, datasets.CIFAR10):
    """ torchvision's CIFAR-10, that augments batches."""


class BatchCIFAR100(_BatchCIFAR, datasets.CIFAR100):
    """ torchvision's CIFAR-100, that augments batches."""


# where timm's create_dataset looks them up
dataset_factory.ImageDataset = BatchImageDataset
dataset_factory._TORCH_BASIC_DS.update(cifar10=BatchCIFAR10, cifar100=BatchCIFAR100)
