""" Parameters and operations of a model, counted the paper's way, and the memory its activations take. """
from dataclasses import dataclass
from typing import Dict, Tuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .splitmixer import copy_model

__all__ = ['Complexity', 'measure_activation_bytes', 'measure_complexity']


@dataclass(frozen=True)
class Complexity:
    """ Size of a model and work for one image.

    Attributes:
        params: Number of learnable parameters.
        macs: Multiply-accumulates of convolutions, linear layers and attention.
        paper_flops: What the paper calls FLOPS: the MACs, 4 operations per element that a BatchNorm puts out, and one
            per element that enters the pooling.
    """
    params: int
    macs: int
    paper_flops: int


def measure_complexity(model: nn.Module, input_size: Tuple[int, int, int]) -> Complexity:
    """ Count a model's parameters and operations without computing anything.

    Args:
        model: Model on any device; it is not changed. Pooling is not counted if its `global_pool` is not a
            module.
        input_size: Channels, height and width of the image.

    Returns:
        Counts for one image.
    """
    model = copy_model(model).to('meta').eval()
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
            module.forward = nn.Identity().forward  # only its shape is asked for, and the norm itself takes long
    pool = getattr(model, 'global_pool', None)
    if isinstance(pool, nn.Module) and getattr(pool, 'pool_type', 'avg'):  # '' for none
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


def measure_activation_bytes(model: nn.Module, input_size: Tuple[int, int, int]) -> int:
    """ Bytes that a step of training keeps from the forward pass for the backward pass, of each image of the batch.

    Args:
        model: Model on any device, in the data type to count in; it is not changed and nothing is computed.
        input_size: Channels, height and width of the image.
    """
    model = copy_model(model).to('meta').train()
    images = 1_000_003  # a prime: what grows with the batch is a multiple of it, weights and statistics are not
    storages: Dict[int, torch.UntypedStorage] = {}  # a tensor is often kept by two operations, in memory once

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.empty(images, *input_size, device='meta', dtype=next(model.parameters()).dtype))
    sizes = [storage.nbytes() for storage in storages.values()]
    return sum(size // images for size in sizes if size % images == 0)
