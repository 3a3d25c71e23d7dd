""" Passes over the features of a SplitMixer on a CPU that `torch.compile` makes kernels of.

Given the layers themselves, the compiler leaves each depthwise convolution to a library. Written as sums they become
loops of its own, if it is told what to keep in memory, for whatever is read at k places it would compute k times.
Features are (N, H, W, C); arithmetic is in fp32.
"""
from functools import cache
from types import FunctionType
from typing import Any, Callable, Tuple

import torch
import torch.nn.functional as F

__all__ = ['act_affine', 'compiled', 'spatial_mixing']

OPTIONS = {
    'cpp.dynamic_threads': True,  # torch 2.11 takes kernels from its cache that were made for more or fewer threads
    'cpp.enable_floating_point_contract_flag': 'fast',  # multiplies and adds in one instruction
}

# erf(x / sqrt(2)) = x P(x * x) / Q(x * x) up to BOUND, from where it is 1 in fp32: a minimax fit of degree 5 over 5,
# within 1.8e-8, with less arithmetic than torch's.
BOUND = 3.92 * 2**0.5
P = (0.797884458, 0.0681526419, 0.00937987411, 0.000341918009, 1.27049667e-05, 4.49617059e-08)
Q = (1., 0.252082503, 0.0287712306, 0.00189654506, 7.42577586e-05, 1.18970938e-06)


def _activate(x: torch.Tensor, act: str) -> torch.Tensor:
    if act == 'relu':
        return x.relu()
    bounded, half = x.clamp(-BOUND, BOUND), x * 0.5
    square = bounded * bounded
    p, q = P[-1], Q[-1]
    for a, b in zip(P[-2::-1], Q[-2::-1]):
        p, q = p * square + a, q * square + b
    return half * (bounded * p / q) + half


def _in_memory(x: torch.Tensor) -> torch.Tensor:
    """ The same, which the compiler writes to memory: nothing else has strides."""
    # a trace would keep them as numbers, which are wrong for another size
    return x.as_strided(x.shape, x.stride()) if torch.compiler.is_dynamo_compiling() else x


def _depthwise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dim: int) -> torch.Tensor:
    """ Depthwise convolution of features (N, H, W, C) along a dimension, by weights (k, C) and biases (C,)."""
    size, weights, out = x.shape[dim], weight.unbind(), bias
    before = (len(weights) - 1) // 2
    x = F.pad(x, [0, 0] * (3 - dim) + [before, len(weights) - 1 - before]).float()
    for i, row in enumerate(weights):
        out = out + x.narrow(dim, i, size) * row
    return _in_memory(out)


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
    x = _in_memory(act_affine(x, scale, shift, act))
    y = _activate(_depthwise(x, weight1, bias1, 2), act1) * scale1 + shift1
    y = _in_memory(y.to(x.dtype))
    y = _activate(_depthwise(y, weight2, bias2, 1), act2) * scale2 + shift2
    return (x + y if is_residual else y).to(x.dtype)


@cache
def _copy(function: Callable[..., torch.Tensor], key: Tuple[Any, ...]) -> Callable[..., torch.Tensor]:
    code = function.__code__.replace(co_name=f'{function.__name__}{key}')
    return FunctionType(code, function.__globals__)


def compiled(function: Callable[..., torch.Tensor], *key: Any) -> Callable[..., torch.Tensor]:
    """ One of the passes as a kernel, which all models share that have the same key.

    It is made at the first call, and made again for any number of images when that changes, for one image, for any size
    when that changes, in inference mode, and for another number of threads.

    Args:
        function: The pass.
        key: What beside the size of batch and images makes another kernel. Of one code, torch makes eight kernels at
            most, and makes variables of what differs between models, their width for one.
    """
    passes = [torch.compile(_copy(function, (*key, is_inference)), options=OPTIONS) for is_inference in (False, True)]
    return lambda *args: passes[torch.is_inference_mode_enabled()](*args)
