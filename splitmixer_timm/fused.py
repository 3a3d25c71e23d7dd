""" What the fused forms of a SplitMixer for inference share: a model taken apart into plain tensors."""
import copy
from dataclasses import dataclass
from typing import List, Tuple

import torch
from timm.layers import GELU
from torch import nn

from .splitmixer import (
    RowConv2d,
    SegmentMixing,
    SeparateSegmentMixing,
    SharedSegmentMixing,
    SlidingSegmentMixing,
    SplitMixer,
)

__all__ = ['FusedModel', 'Product', 'Unsupported', 'activation', 'check_supported', 'fold_affine', 'segments']

CONVOLUTIONS = (nn.Conv2d, RowConv2d)


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
    return Product(start, stop, out, conv.weight.detach().flatten(1), conv.bias.detach())


def segments(mixer: nn.Module) -> List[List[Product]]:
    """ What a channel mixer does: stages one after the other, the products of a stage all read the stage's input.

    Channels that no product of a stage writes pass unchanged. Types I, II and full have one product, III and IV one
    for each segment (of III with the same tensors), V two stages of one product, 3D one product for each position.

    Args:
        mixer: `blocks[i].channel_mixing.mixer` of a `SplitMixer`.
    """
    if isinstance(mixer, nn.Sequential):
        return [stage for child in mixer for stage in segments(child)]
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
    if type(act) in (nn.GELU, GELU) and getattr(act, 'approximate', 'none') == 'none':
        return 'gelu'
    if type(act) is nn.ReLU:
        return 'relu'
    raise Unsupported(f'activation {type(act).__name__}')


def check_supported(model: SplitMixer) -> None:
    """ Check that a model is made of what `fold_affine`, `activation` and `segments` understand.

    Raises:
        Unsupported: If it is not.
    """
    for name, module in model.named_modules():
        leaf = name.rpartition('.')[2]
        if module._forward_hooks or module._forward_pre_hooks:
            raise Unsupported(f'a forward hook on {name or "the model"}')
        if leaf.startswith('act') or name == 'stem.1':
            activation(module)
        elif leaf.startswith('norm') or name == 'stem.2':
            if type(module) is not nn.BatchNorm2d or module.running_var is None:
                raise Unsupported(f'norm {type(module).__name__} without the running statistics of a BatchNorm2d')
        elif name.startswith(('stem', 'blocks')) and module._parameters and type(module) not in CONVOLUTIONS:
            raise Unsupported(f'{type(module).__name__} at {name}')


class FusedModel(nn.Module):
    """ A `SplitMixer` in eval mode for inference only: what its fused forms have in common.

    Args:
        model: The model, which stays as it is.
        dtype: Data type of weights, features and logits.
    """

    def __init__(self, model: SplitMixer, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        for name in ('in_chans', 'num_classes', 'num_features', 'head_hidden_size', 'patch_size'):
            setattr(self, name, getattr(model, name))
        for name in ('pretrained_cfg', 'default_cfg'):
            if hasattr(model, name):
                setattr(self, name, copy.deepcopy(getattr(model, name)))
        self.global_pool = copy.deepcopy(model.global_pool)
        self.head_drop = copy.deepcopy(model.head_drop)
        self.head = copy.deepcopy(model.head).to(dtype).requires_grad_(False)
        super().train(False)

    forward_head = SplitMixer.forward_head

    def _check_input(self, x: torch.Tensor) -> None:
        SplitMixer._check_input(self, x)
        device = next(self.buffers()).device
        if not x.is_floating_point() or x.device != device:
            raise ValueError(f'Input must be floating point on {device}, got {x.dtype} on {x.device}.')

    def train(self, mode: bool = True) -> 'FusedModel':
        if mode:
            raise RuntimeError(f'{type(self).__name__} is for inference only, got train mode.')
        return super().train(mode)
