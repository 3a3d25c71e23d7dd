""" What the fused forms of a SplitMixer for inference share: a model taken apart into plain tensors."""
import copy
from dataclasses import dataclass, replace
from typing import Any, Callable, List, Optional, Sequence, Tuple, Union

import torch
from timm.layers import GELU, DropPath
from timm.models._features import feature_take_indices
from torch import nn

from .layers import AxisConv2d, ChannelsLastGELU
from .splitmixer import (
    SegmentMixing,
    SeparateSegmentMixing,
    SharedSegmentMixing,
    SlidingSegmentMixing,
    SplitMixer,
    SplitMixerBlock,
)

__all__ = [
    'FusedModel', 'Product', 'Unsupported', 'activation', 'check_channel', 'check_mixer', 'check_spatial', 'check_stem',
    'check_supported', 'fold_affine', 'products', 'segments',
]

# Types of the parts that the fused forms know; what is of another type may compute something else.
STEMS = [nn.Sequential]
SEQUENCES = [nn.Sequential]  # of blocks
BLOCKS = [SplitMixerBlock]
MIXERS = [SegmentMixing, SharedSegmentMixing, SeparateSegmentMixing, SlidingSegmentMixing]


class Unsupported(RuntimeError):
    """ A model, or a device, that a fused form does not cover; the message says why."""


@dataclass
class Product:
    """ A pointwise convolution of the channels [start, stop) into the channels `out` of the output.

    Attributes:
        start: First input channel.
        stop: One past the last input channel.
        out: Output channels; `slice(segment, None, segments)` for type 3D, otherwise [start, stop).
        weight: Weights (outputs, stop - start).
        bias: Biases (outputs,).
    """
    start: int
    stop: int
    out: slice
    weight: torch.Tensor
    bias: torch.Tensor


def _product(conv: nn.Conv2d, start: int, stop: int, out: slice) -> Product:
    return Product(start, stop, out, conv.weight.flatten(1), conv.bias)


def products(mixer: nn.Module) -> List[List[Product]]:
    """ What a channel mixer does: stages one after the other, the products of a stage all read the stage's input.

    Channels that no product of a stage writes pass unchanged. Types I, II and full have one product, III and IV one
    for each segment (of III with the same weights), V two stages of one product, 3D one product for each position.
    Gradients of weights and biases are those of the parameters.

    Args:
        mixer: `blocks[i].channel_mixing.mixer` of a `SplitMixer`.
    """
    if isinstance(mixer, nn.Sequential):
        return [stage for child in mixer for stage in products(child)]
    if isinstance(mixer, SegmentMixing):
        start = mixer.sizes[0]
        stop = start + mixer.sizes[1]
        return [[_product(mixer.conv, start, stop, slice(start, stop))]]
    if isinstance(mixer, SharedSegmentMixing):
        size = mixer.segment_dim
        starts = range(0, size * mixer.num_segments, size)
        return [[_product(mixer.conv, start, start + size, slice(start, start + size)) for start in starts]]
    if isinstance(mixer, SeparateSegmentMixing):
        stage, start = [], 0
        for size, conv in zip(mixer.sizes, mixer.convs):
            stage.append(_product(conv, start, start + size, slice(start, start + size)))
            start += size
        return [stage]
    if isinstance(mixer, SlidingSegmentMixing):
        count = len(mixer.starts)
        return [[_product(mixer.conv, start, start + mixer.kernel_size, slice(n, None, count))
                 for n, start in enumerate(mixer.starts)]]
    raise Unsupported(f'channel mixing by {type(mixer).__name__}')


def segments(mixer: nn.Module) -> List[List[Product]]:
    """ `products` for inference, without gradients."""
    return [
        [replace(product, weight=product.weight.detach(), bias=product.bias.detach()) for product in stage]
        for stage in products(mixer)]


def fold_affine(norm: nn.BatchNorm2d) -> Tuple[torch.Tensor, torch.Tensor]:
    """ Scale and shift of each channel, in fp32, that a BatchNorm in eval mode amounts to."""
    scale = torch.rsqrt(norm.running_var.detach().double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach()
    shift = -norm.running_mean.detach() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach()
    return scale.float(), shift.float()


def activation(act: nn.Module) -> str:
    """ Name of an activation that the fused forms have: 'gelu' (exact) or 'relu'."""
    if type(act) in (nn.GELU, GELU, ChannelsLastGELU) and getattr(act, 'approximate', 'none') == 'none':
        return 'gelu'
    if type(act) is nn.ReLU:
        return 'relu'
    raise Unsupported(f'activation {type(act).__name__}')


def _check_type(name: str, module: nn.Module, types: Sequence[type]) -> None:
    if type(module) not in types:
        raise Unsupported(f'{type(module).__name__} at {name}')


def _check_children(name: str, module: nn.Module, *allowed: Sequence[str]) -> None:
    children = [child for child, _ in module.named_children()]
    if children not in [list(names) for names in allowed]:
        raise Unsupported(f'{type(module).__name__} of {", ".join(children)} at {name}')


def _check_conv(name: str, conv: nn.Module, is_depthwise: bool = False, **expected: Any) -> None:
    _check_type(name, conv, (nn.Conv2d, AxisConv2d))
    groups = conv.out_channels if is_depthwise else 1
    expected = dict(expected, groups=groups, dilation=(1, 1), padding_mode='zeros')
    if conv.bias is None or any(getattr(conv, key) != value for key, value in expected.items()):
        raise Unsupported(f'{conv} at {name}')


def _check_act_norm(name: str, act: nn.Module, norm: nn.Module) -> None:
    activation(act)
    if type(norm) is not nn.BatchNorm2d:
        raise Unsupported(f'norm {type(norm).__name__} at {name}')
    if norm.running_var is None:
        raise Unsupported(f'norm {type(norm).__name__} without running statistics at {name}')


# Parts of a model that are checked here raise Unsupported if they are not what is known of them.

def check_stem(name: str, stem: nn.Module) -> None:
    _check_type(name, stem, STEMS)
    _check_children(name, stem, '012')
    conv, act, norm = stem
    _check_type(f'{name}.0', conv, [nn.Conv2d])
    _check_conv(f'{name}.0', conv, padding=(0, 0), kernel_size=conv.kernel_size[:1] * 2, stride=conv.stride[:1] * 2)
    _check_act_norm(name, act, norm)


def _has_mixing(name: str, mixing: nn.Module, residual: bool, *allowed: Sequence[str]) -> bool:
    """ Whether a block mixes at all; if it does, by these children."""
    if type(mixing) is nn.Identity:
        # a block adds its input to that of a mixing that was taken out, where a model made without one does not
        if residual:
            raise Unsupported(f'a residual around nothing at {name}')
        return False
    _check_type(name, mixing, [nn.Sequential])
    _check_children(name, mixing, *allowed)
    return True


def check_spatial(name: str, block: SplitMixerBlock) -> None:
    mixing, place = block.spatial_mixing, f'{name}.spatial_mixing'
    first, second = ['conv1', 'act1', 'norm1'], ['conv2', 'act2', 'norm2']
    if not _has_mixing(place, mixing, block.spatial_residual, first, [*first, *second]):
        return
    for n in range(1, len(mixing) // 3 + 1):
        conv, act, norm = (getattr(mixing, f'{part}{n}') for part in ('conv', 'act', 'norm'))
        _check_conv(place, conv, is_depthwise=True, stride=(1, 1), padding='same')
        _check_act_norm(place, act, norm)
    if hasattr(mixing, 'conv2'):
        size = mixing.conv1.kernel_size[1]
        if (mixing.conv1.kernel_size, mixing.conv2.kernel_size) != ((1, size), (size, 1)):
            raise Unsupported(f'kernels other than 1 x k and k x 1 at {place}')
        if activation(mixing.act1) != activation(mixing.act2):
            raise Unsupported(f'two activations at {place}')


def check_channel(name: str, block: SplitMixerBlock) -> None:
    """ All of channel mixing but for the mixer, which is for `check_mixer`."""
    mixing, place = block.channel_mixing, f'{name}.channel_mixing'
    if _has_mixing(place, mixing, block.channel_residual, ['mixer', 'act', 'norm']):
        _check_act_norm(place, mixing.act, mixing.norm)


def check_mixer(name: str, mixer: nn.Module) -> None:
    if type(mixer) is nn.Sequential and len(mixer):
        for child, part in mixer.named_children():
            check_mixer(f'{name}.{child}', part)
        return
    _check_type(name, mixer, MIXERS)
    _check_children(name, mixer, ['convs'] if type(mixer) is SeparateSegmentMixing else ['conv'])
    for conv in getattr(mixer, 'convs', None) or [mixer.conv]:
        _check_conv(name, conv, kernel_size=(1, 1), stride=(1, 1), padding=(0, 0))


def check_supported(model: SplitMixer) -> None:
    """ Check that stem and blocks of a model are what `fold_affine`, `activation` and `segments` understand.

    Raises:
        Unsupported: If they are not.
    """
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise Unsupported(f'a forward hook on {name or "the model"}')
        if 'forward' in module.__dict__:
            raise Unsupported(f'a forward of its own on {name or "the model"}')
    check_stem('stem', model.stem)
    _check_type('blocks', model.blocks, SEQUENCES)
    for i, block in enumerate(model.blocks):
        name = f'blocks.{i}'
        _check_type(name, block, BLOCKS)
        _check_children(name, block, ['spatial_mixing', 'channel_mixing', 'drop_path'])
        _check_type(f'{name}.drop_path', block.drop_path, [nn.Identity, DropPath])
        check_spatial(name, block)
        check_channel(name, block)
        if type(block.channel_mixing) is not nn.Identity:
            check_mixer(f'{name}.channel_mixing.mixer', block.channel_mixing.mixer)


class FusedModel(nn.Module):
    """ A `SplitMixer` in eval mode for inference only: what its fused forms have in common.

    A form has `blocks`, and `_features(x, taken, depth)`: features (N, dim, H / stride, W / stride) of images after
    each of the blocks `taken` (none if left out), then after the first `depth` of all blocks (all if None).

    Args:
        model: The model, which stays as it is.
        dtype: Data type of features, classifier and logits.
        compute_dtype: Data type that stem and blocks compute in, `dtype` if None.

    Raises:
        Unsupported: If the model has a forward of its own.
    """

    def __init__(self, model: SplitMixer, dtype: torch.dtype, compute_dtype: Optional[torch.dtype] = None):
        super().__init__()
        own = [name for name in ('forward_features', 'forward_intermediates', 'forward_head') if name in model.__dict__]
        if type(model) is not SplitMixer or own:
            raise Unsupported(f'model {type(model).__name__} with {" and ".join(own) or "code"} of its own')
        self.dtype = dtype
        self.compute_dtype = compute_dtype or dtype
        for name in ('num_classes', 'num_features', 'head_hidden_size', 'feature_info'):
            setattr(self, name, copy.deepcopy(getattr(model, name)))
        conv = model.stem[0]
        self.in_chans, self.patch_size = conv.in_channels, conv.kernel_size[0]
        for name in ('pretrained_cfg', 'default_cfg'):
            if hasattr(model, name):
                setattr(self, name, copy.deepcopy(getattr(model, name)))
        for name in ('global_pool', 'head_drop', 'head'):
            setattr(self, name, copy.deepcopy(getattr(model, name)).to(dtype).requires_grad_(False))

    forward_head = SplitMixer.forward_head
    get_classifier = SplitMixer.get_classifier

    @torch.no_grad()
    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """ Images (N, in_chans, H, W) to features (N, dim, H / stride, W / stride), in channels_last memory."""
        return self._features(x)[0]

    @torch.no_grad()
    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """ Features and intermediate ones, as `SplitMixer.forward_intermediates` has them."""
        assert output_fmt in ('NCHW',), 'Output shape must be NCHW.'
        taken, last = feature_take_indices(len(self.blocks), indices)
        *intermediates, features = self._features(x, taken, last + 1 if stop_early else None)
        return intermediates if intermediates_only else (features, intermediates)

    def _check_input(self, x: torch.Tensor) -> None:
        SplitMixer._check_input(self, x)
        device = next(self.buffers()).device
        if not x.is_floating_point() or x.device != device:
            raise ValueError(f'Input must be floating point on {device}, got {x.dtype} on {x.device}.')

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> 'FusedModel':
        device = next(self.buffers()).device
        sample = fn(torch.empty(0, dtype=self.dtype, device=device))
        if sample.dtype != self.dtype or sample.device.type != device.type:
            raise RuntimeError(
                f'{type(self).__name__} keeps the kind of device and the dtype it was made for, {device.type} and '
                f'{self.dtype}: make another from the model.')

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            # what is kept in fp32 beside weights of half precision stays so
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def train(self, mode: bool = True) -> 'FusedModel':
        if mode:
            raise RuntimeError(f'{type(self).__name__} is for inference only, got train mode.')
        return super().train(mode)
