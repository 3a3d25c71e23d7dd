""" What makes a SplitMixer fast without another result: layers and functions that choose how features lie in memory.

Branches on where and how a tensor lies are functions that torch.fx takes as a whole, or that are not called while it
traces: call them by this module's name (`layers.interleave`), for torch.fx does not know a function that was imported
from it.
"""
from typing import List, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch.utils._device import DeviceContext

__all__ = [
    'AxisConv2d', 'ChannelsLastGELU', 'count_dispatch_modes', 'has_known_size', 'has_modes', 'hold_format',
    'interleave', 'is_everything_watched', 'is_pointwise', 'is_symbolic', 'is_transformed', 'is_watched',
    'pack_segments', 'take_segment', 'to_fast_format', 'to_square_format', 'unpack_segments',
]

# torch has no public way to ask this; without the answer vmap fails where the memory format is asked for
_transform_stack = getattr(torch._C._functorch, 'peek_interpreter_stack', lambda: None)
_is_batched = getattr(torch._C._functorch, 'is_legacy_batchedtensor', lambda x: False)  # torch.autograd's own vmap
count_dispatch_modes = getattr(torch._C, '_len_torch_dispatch_stack', lambda: 0)  # make_fx, counters of operations
_function_modes = getattr(torch.overrides, '_get_current_function_mode_stack', lambda: [])


@torch.jit.ignore
def is_transformed(x: torch.Tensor) -> bool:
    """ Whether this runs under a transform of torch.func, on a batch of torch.autograd's (`is_grads_batched`), or in
    forward mode, where tangents may be such a batch: these do not tell how they lie in memory."""
    if torch.compiler.is_compiling():
        return False
    in_forward_mode = getattr(torch.autograd.forward_ad, '_current_level', -1) >= 0
    return in_forward_mode or _transform_stack() is not None or _is_batched(x)


def is_symbolic(x: torch.Tensor) -> bool:
    """ Whether torch.fx traces: a graph of training should have the nodes of one of inference."""
    if not torch.jit.is_scripting():
        return isinstance(x, torch.fx.Proxy)
    return False


def has_modes() -> bool:
    """ Whether a mode of torch sees all operations, other than the one that stands for a default device."""
    return count_dispatch_modes() > 0 or any(not isinstance(mode, DeviceContext) for mode in _function_modes())


def is_everything_watched() -> bool:
    """ Whether somebody hooked on to the calls of all modules."""
    return bool(
        torch.nn.modules.module._global_forward_hooks or torch.nn.modules.module._global_forward_pre_hooks
        or torch.nn.modules.module._global_backward_hooks or torch.nn.modules.module._global_backward_pre_hooks)


def is_watched(module: nn.Module) -> bool:
    """ Whether somebody hooked on to a module, gave it a forward of its own, or compiled it."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        or 'forward' in module.__dict__ or getattr(module, '_compiled_call_impl', None))


def is_pointwise(conv: nn.Module, size: int) -> bool:
    """ Whether a module is a plain pointwise convolution of as many channels, that nobody hooked on to."""
    return (
        type(conv) is nn.Conv2d and conv.bias is not None and conv.in_channels == conv.out_channels == size
        and conv.kernel_size == conv.stride == (1, 1) and conv.padding == (0, 0) and conv.groups == 1
        and not is_watched(conv))


def _is_channels_last(x: torch.Tensor) -> bool:
    if not torch.jit.is_scripting():
        if is_transformed(x):
            return False
    return x.is_contiguous(memory_format=torch.channels_last)


def has_known_size(x: torch.Tensor) -> bool:
    """ Whether height and width of features are numbers, not symbols that stand for any size.

    Those have no bound under `torch.compile`, where inductor cannot order the strides of views by them. In
    `torch.export` they may have one, but a named `Dim` fails where torch asks how features lie in memory.
    """
    if not torch.jit.is_scripting():
        if torch.compiler.is_exporting():
            is_number = torch.fx.experimental.symbolic_shapes.has_static_value
            return is_number(x.shape[2]) and is_number(x.shape[3])
        if torch.compiler.is_compiling():
            known = torch.fx.experimental.symbolic_shapes.statically_known_true
            return known(x.shape[2] < 2**62) and known(x.shape[3] < 2**62)
    return True


@torch.fx.wrap
def to_fast_format(x: torch.Tensor) -> torch.Tensor:
    """ On a CPU channels_last, which its convolutions of few channels at a time want.

    As given elsewhere, and in a graph that is exported for any size.
    """
    if not torch.jit.is_scripting():
        if is_transformed(x) or torch.compiler.is_exporting() and not has_known_size(x):
            return x
    if x.device.type == 'cpu':
        return x.contiguous(memory_format=torch.channels_last)
    return x


@torch.utils.hooks.unserializable_hook  # no warning where features are saved: a copy of them has no use for it
def _gradient_to_fast_format(grad: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
    return None if grad is None else to_fast_format(grad)


@torch.fx.wrap
def hold_format(x: torch.Tensor, is_sum: bool) -> torch.Tensor:
    """ Features whose gradient is put in channels_last, since pooling gives it in another format.

    The copy is made when memory use is at its peak. In half precision the norm would make it anyway; in fp32 it pays
    only where the features are a sum, whose gradient reaches every block.
    """
    if not torch.jit.is_scripting():
        is_wanted = is_sum or x.dtype in (torch.bfloat16, torch.float16)
        if is_wanted and x.requires_grad and x.device.type == 'cpu' and not torch.compiler.is_compiling():
            x.register_hook(_gradient_to_fast_format)
    return x


@torch.fx.wrap
def _gelu(x: torch.Tensor, approximate: str) -> torch.Tensor:
    """ GELU, on a CPU by oneDNN, which torch calls for contiguous memory only."""
    if x.is_cpu and not torch.jit.is_scripting():
        # graphs that are recorded would keep the permutations
        if not (torch.compiler.is_compiling() or torch.jit.is_tracing()) and _is_channels_last(x):
            return F.gelu(x.permute(0, 2, 3, 1), approximate=approximate).permute(0, 3, 1, 2)
    return F.gelu(x, approximate=approximate)


def _has_square_kernels(x: torch.Tensor, size: int) -> bool:
    """ Whether in channels_last cuDNN has fast depthwise kernels for such features, which are square and small."""
    return x.is_cuda and (x.dtype == torch.float16 or x.dtype == torch.bfloat16) and size % 2 == 1 and size <= 7


@torch.fx.wrap
def to_square_format(x: torch.Tensor, size: int) -> torch.Tensor:
    """ Where square kernels are fast, channels_last; elsewhere as given."""
    if not torch.jit.is_scripting():
        if is_transformed(x):
            return x
    if _has_square_kernels(x, size):
        return x.contiguous(memory_format=torch.channels_last)
    return x


@torch.fx.wrap
def _axis_conv(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        kernel_size: Tuple[int, int],
        groups: int,
) -> torch.Tensor:
    """ Depthwise 1 x k or k x 1 convolution; where square kernels are fast, with zeros around the kernels.

    One image on a GPU waits for Python: what costs least to ask comes first, and padding is given in numbers.
    """
    height, width = kernel_size
    size = height * width  # one of them is 1
    if _has_square_kernels(x, size) and _is_channels_last(x):
        above, before = (size - height) // 2, (size - width) // 2
        weight = F.pad(weight, [before, before, above, above])
        height, width = size, size
    if size % 2 == 0:  # asymmetric
        return F.conv2d(x, weight, bias, padding='same', groups=groups)
    return F.conv2d(x, weight, bias, (1, 1), (height // 2, width // 2), (1, 1), groups)


@torch.fx.wrap
def _row_conv(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
    """ Depthwise 1 x k convolution with a gradient that is fast on a CPU too.

    There the gradient of 1 x k weights is much slower than that of k x 1 ones: every row becomes an image of width 1.
    """
    N, C, H, W = x.shape
    if x.device.type != 'cpu' or not has_known_size(x):
        return _axis_conv(x, weight, bias, (1, weight.shape[3]), C)
    x = x.permute(0, 2, 3, 1).reshape(N * H, W, 1, C).permute(0, 3, 1, 2)
    x = _axis_conv(x, weight.transpose(2, 3), bias, (weight.shape[3], 1), C)
    return x.permute(0, 2, 3, 1).reshape(N, H, W, C).permute(0, 3, 1, 2)


def pack_segments(x: torch.Tensor, num_segments: int) -> torch.Tensor:
    """ Images of one segment's channels without a copy: N x s images, or in channels_last s times as wide."""
    N, C, H, W = x.shape
    if _is_channels_last(x):
        return x.permute(0, 2, 3, 1).reshape(N, H, W * num_segments, C // num_segments).permute(0, 3, 1, 2)
    return x.reshape(N * num_segments, C // num_segments, H, W)


def unpack_segments(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """ What was made of the segments of `like` by `pack_segments`, as images of all channels again."""
    N, C, H, W = like.shape
    if _is_channels_last(like):
        return x.permute(0, 2, 3, 1).reshape(N, H, W, C).permute(0, 3, 1, 2)
    return x.reshape(N, C, H, W)


@torch.fx.wrap
def take_segment(x: torch.Tensor, start: int, size: int) -> torch.Tensor:
    """ Channels from `start` on, their gradient in channels_last if they are: that of `narrow` alone never is."""
    if _is_channels_last(x):
        return x.permute(0, 2, 3, 1).narrow(3, start, size).permute(0, 3, 1, 2)
    return x.narrow(1, start, size)


@torch.fx.wrap
def interleave(maps: List[torch.Tensor]) -> torch.Tensor:
    """ Channels of several tensors in turn: the first of each, the second of each, ..."""
    if _is_channels_last(maps[0]):
        return torch.stack([m.permute(0, 2, 3, 1) for m in maps], dim=4).flatten(3).permute(0, 3, 1, 2)
    return torch.stack(maps, dim=2).flatten(1, 2)


@register_notrace_module
class ChannelsLastGELU(nn.GELU):
    """ GELU, on a CPU as fast in channels_last memory as in contiguous."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _gelu(x, self.approximate)


@register_notrace_module  # a node of timm's feature graphs, as the convolution it is, in training and inference alike
class AxisConv2d(nn.Conv2d):
    """ Depthwise 1 x k or k x 1 convolution, by whatever is fast for it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        is_as_made = (
            str(self.padding) == 'same' and self.padding_mode == 'zeros' and self.stride == (1, 1)
            and self.dilation == (1, 1) and self.groups == self.in_channels == self.out_channels)
        if not is_as_made:
            return self._conv_forward(x, self.weight, self.bias)
        if self.training and self.kernel_size[0] == 1 and not is_symbolic(x):
            return _row_conv(x, self.weight, self.bias)
        return _axis_conv(x, self.weight, self.bias, self.kernel_size, self.groups)
