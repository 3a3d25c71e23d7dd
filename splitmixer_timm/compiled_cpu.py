""" What lies between the products of a SplitMixer on a CPU: in torch's operations, and as kernels in C++.

cpu_kernels.cpp is compiled by what `torch.compile` has for its own kernels, for the processor at hand, and is kept in
its cache. Features are (N, H, W, C); arithmetic is in fp32.
"""
import ctypes
from functools import cache
from pathlib import Path
from typing import Any, Callable, Tuple

import torch
import torch.nn.functional as F

__all__ = [
    'act_affine', 'act_affine_kernel', 'act_affine_mean_kernel', 'library', 'spatial_mixing', 'spatial_mixing_kernel']

SOURCE = Path(__file__).with_name('cpu_kernels.cpp')


def _activate(x: torch.Tensor, act: str) -> torch.Tensor:
    return F.gelu(x) if act == 'gelu' else x.relu()


def _depthwise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dim: int) -> torch.Tensor:
    """ Depthwise convolution of features (N, H, W, C) along a dimension, by weights (k, C) and biases (C,)."""
    k, C = weight.shape
    before = (k - 1) // 2
    x = F.pad(x, [0, 0] * (3 - dim) + [before, k - 1 - before])
    weight = weight.T.reshape((C, 1, k, 1) if dim == 1 else (C, 1, 1, k))
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, groups=C).permute(0, 2, 3, 1)


def act_affine(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, act: str) -> torch.Tensor:
    """ Activation and norm of features (N, H, W, C), by scale and shift (C,) in fp32."""
    return (_activate(x.float(), act) * scale + shift).to(x.dtype)


def spatial_mixing(
        x: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        act: str,
        weight1: torch.Tensor,
        bias1: torch.Tensor,
        scale1: torch.Tensor,
        shift1: torch.Tensor,
        act1: str,
        weight2: torch.Tensor,
        bias2: torch.Tensor,
        scale2: torch.Tensor,
        shift2: torch.Tensor,
        act2: str,
        is_residual: bool,
) -> torch.Tensor:
    """ `act_affine`, then spatial mixing by 1 x k and k x 1 kernels.

    Args:
        x: Features (N, H, W, C) that lack activation and norm.
        scale: Scale (C,) of that norm.
        shift: Its shift (C,).
        act: The activation, as `fused.activation` names it.
        weight1: Weights (k, C) of the 1 x k convolution.
        bias1: Its biases (C,).
        scale1: Scale (C,) of its norm.
        shift1: Shift (C,) of its norm.
        act1: Its activation.
        weight2: Weights (k, C) of the k x 1 convolution.
        bias2: Its biases (C,).
        scale2: Scale (C,) of its norm.
        shift2: Shift (C,) of its norm.
        act2: Its activation.
        is_residual: Whether the result is added to what precedes the convolutions.
    """
    features = act_affine(x.float(), scale, shift, act)
    y = _activate(_depthwise(features, weight1, bias1, 2), act1) * scale1 + shift1
    y = _activate(_depthwise(y, weight2, bias2, 1), act2) * scale2 + shift2
    return (features + y if is_residual else y).to(x.dtype)


@cache
def library() -> ctypes.CDLL:
    """ The kernels, which are compiled if they are not in the cache.

    Raises:
        Exception: What torch raises without a compiler that works.
    """
    # torch.utils.cpp_extension would need ninja, and does not compile for the processor's vectors
    from torch._inductor.codecache import CppCodeCache

    # the version, as torch's headers are compiled too
    kernels = CppCodeCache.load(f'// torch {torch.__version__}\n{SOURCE.read_text(encoding="utf-8")}')
    common = [ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 4, ctypes.c_void_p]
    for dtype in ('float', 'bfloat16'):
        for name, settings in (
                ('act_affine', [ctypes.c_bool]),
                ('act_affine_mean', [ctypes.c_bool]),
                ('spatial_mixing', [*[ctypes.c_int64] * 2, *[ctypes.c_bool] * 4])):
            function = getattr(kernels, f'{name}_{dtype}')
            function.argtypes, function.restype = [*common, *settings, ctypes.c_int], None
    kernels.channels.argtypes, kernels.channels.restype = [], ctypes.c_int64
    return kernels


def _kernel(
        name: str,
        dtype: torch.dtype,
        rows: Tuple[torch.Tensor, ...],
        settings: Tuple[Any, ...],
        is_pooled: bool = False,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """ A kernel of features of a data type.

    Args:
        name: Its name.
        dtype: The data type, fp32 or bf16.
        rows: Vectors (C,) and weights (k, C), in the order of its parts.
        settings: What else it takes.
        is_pooled: Whether its output is (N, C) in fp32, not like the features.

    Returns:
        The kernel, which raises a RuntimeError for features of another data type or number of channels.
    """
    function = getattr(library(), f'{name}_{"float" if dtype == torch.float32 else "bfloat16"}')
    chunk, channels = library().channels(), rows[0].shape[-1]
    parts = torch.cat([row.reshape(-1, channels) for row in rows]).to('cpu', torch.float32)
    parts = F.pad(parts, (0, -parts.shape[1] % chunk)).unflatten(1, (-1, chunk)).transpose(0, 1).contiguous()

    def kernel(x: torch.Tensor) -> torch.Tensor:
        if x.dtype != dtype or x.shape[-1] != channels:
            raise RuntimeError(f'{name}: features must be of {dtype} with {channels} channels, '
                               f'got {x.dtype} with {x.shape[-1]}.')
        x = x.contiguous()
        if is_pooled:
            out = torch.empty(x.shape[0], channels, dtype=torch.float32, device='cpu')
        else:
            out = torch.empty(x.shape, dtype=dtype, device='cpu')
        function(x.data_ptr(), out.data_ptr(), *x.shape, parts.data_ptr(), *settings, torch.get_num_threads())
        return out

    return kernel


def act_affine_kernel(
        dtype: torch.dtype,
        scale: torch.Tensor,
        shift: torch.Tensor,
        act: str,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """ `act_affine` of features of a data type, fp32 or bf16."""
    return _kernel('act_affine', dtype, (scale, shift), (act == 'gelu',))


def act_affine_mean_kernel(
        dtype: torch.dtype,
        scale: torch.Tensor,
        shift: torch.Tensor,
        act: str,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """ The mean (N, C) over each image in fp32 of what `act_affine` makes of features of a data type, fp32 or bf16."""
    return _kernel('act_affine_mean', dtype, (scale, shift), (act == 'gelu',), is_pooled=True)


def spatial_mixing_kernel(dtype: torch.dtype, *parts: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """ `spatial_mixing` of features of a data type.

    Args:
        dtype: The data type, fp32 or bf16.
        parts: All that `spatial_mixing` takes after the features.
    """
    scale, shift, act, *of_convs, is_residual = parts
    (weight1, *vectors1, act1), (weight2, *vectors2, act2) = of_convs[:5], of_convs[5:]
    are_gelu = (a == 'gelu' for a in (act, act1, act2))
    return _kernel(
        'spatial_mixing', dtype, (scale, shift, *vectors1, *vectors2, weight1, weight2),
        (len(weight1), len(weight2), *are_gelu, is_residual))
