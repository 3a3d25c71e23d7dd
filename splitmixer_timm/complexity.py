""" Parameters and operations of a model, counted the paper's way. """
import copy
from dataclasses import dataclass
from typing import Tuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ['Complexity', 'measure_complexity']


@dataclass(frozen=True)
class Complexity:
    """ Size of a model and work for one image.

    Attributes:
        params: Number of learnable parameters.
        macs: Multiply-accumulates of convolutions and linear layers.
        paper_flops: What the paper calls FLOPS: the MACs, 4 operations per element that a BatchNorm puts out, and one
            per element that enters the pooling.
    """
    params: int
    macs: int
    paper_flops: int


def measure_complexity(model: nn.Module, input_size: Tuple[int, int, int]) -> Complexity:
    """ Count a model's parameters and operations without computing anything.

    Args:
        model: Model with a `global_pool`, on any device; it is not changed.
        input_size: Channels, height and width of the image.

    Returns:
        Counts for one image.
    """
    model = copy.deepcopy(model).to('meta').eval()
    other = 0

    def count_norm(module: nn.Module, args: Tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal other
        other += 4 * output.numel()

    def count_pool(module: nn.Module, args: Tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal other
        other += args[0].numel()

    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_hook(count_norm)
    model.global_pool.register_forward_hook(count_pool)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(torch.empty(1, *input_size, device='meta', dtype=next(model.parameters()).dtype))
    macs = counter.get_total_flops() // 2
    return Complexity(
        params=sum(p.numel() for p in model.parameters()),
        macs=macs,
        paper_flops=macs + other,
    )
