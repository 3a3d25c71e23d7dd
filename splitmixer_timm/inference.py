""" A model made ready for deployment. """
import warnings
from typing import Optional, Tuple

import torch
from torch import nn

from . import fused_cpu
from .fused import Unsupported
from .splitmixer import SplitMixer, copy_model, thawed

__all__ = ['optimize_for_inference']


def _build(model: SplitMixer, dtype: torch.dtype, compile: bool) -> nn.Module:
    device = next(model.parameters()).device
    if device.type == 'cpu':
        return fused_cpu.build(model, dtype, compile)
    if device.type == 'cuda':
        from . import fused_cuda  # Triton takes its time to import

        return fused_cuda.build(model, dtype)
    raise Unsupported(f'a model on {device}')


def _cast_images(stem: nn.Module, args: Tuple[torch.Tensor]) -> Tuple[torch.Tensor]:
    """ Images in the weights' data type, as the faster forms take them, but in TorchScript."""
    if not torch.jit.is_scripting():
        for parameter in stem.parameters():
            return (args[0].to(parameter.dtype),)
    return args


def optimize_for_inference(
        model: nn.Module,
        *,
        dtype: Optional[torch.dtype] = None,
        compile: bool = False,
) -> nn.Module:
    """ Faster form of a model in eval mode, with the same outputs.

    On a CPU the batch goes through the blocks a few images at a time, in memory that stays in the cache, updated in
    place; nothing is compiled. Weights are held twice, as they are and as oneDNN wants them. So that memory is not
    fetched from the system anew at each call, glibc is made to keep more of what is freed, up to 64 MiB in the process,
    as after any large array. On CUDA (NVIDIA, of compute capability 8.0 or more) Triton kernels replace the layers; the
    first call with a new size of images or batch compiles them, measures how to run them (for batches up to a power of
    two alike) and captures a CUDA graph, which takes up to seconds, then replays it.

    With `compile`, on a CPU, kernels in C++ do what lies between the products: all of spatial mixing is one that reads
    the features once and writes them once. They are compiled for the processor when the first such model is made, or
    first runs where it was loaded, which takes seconds and a C++ compiler, and are kept on disk with what
    `torch.compile` makes (`TORCHINDUCTOR_CACHE_DIR`). In bf16 their GELU is an approximation, within 7e-5 beside the
    rounding. This covers spatial mixing by 1 x k and k x 1 kernels and channel mixing without a residual; otherwise, or
    without a compiler, a warning says that it is left out.

    The new module takes images as the model does and has its `forward`, `forward_features`, `forward_intermediates`,
    `forward_head`, `get_classifier`, `num_classes`, `num_features`, `feature_info`, `pretrained_cfg` and `default_cfg`.
    It has no gradients and no train mode, and keeps its device and data type. On a CPU the modules of stem and blocks
    hold weights and are not called, nor are hooks on them; on CUDA no hook runs once a graph is replayed. Weights that
    are loaded into it count from the next call, but not changes made through `tensor.data`.
    `torch.func.vmap` does not take it.

    Where there is no such form (a norm other than BatchNorm2d, an activation other than exact GELU and ReLU, a data
    type or device without kernels, a part that was replaced or hooked on to, a subclass) a warning says why and a plain
    copy of the model in eval mode is returned, which casts images to `dtype` as well. On a processor without
    instructions for bf16 the fast form computes in fp32 and gives bf16, and a warning says so.

    Args:
        model: The `SplitMixer`, in eval mode; it stays as it is, and changes to it later do not reach the new one.
        dtype: Data type of weights and features, `torch.float32`, `torch.bfloat16` or, on CUDA, `torch.float16`; that
            of the model's stem if None.
        compile: Whether kernels are compiled on a CPU. On CUDA there are kernels in any case.

    Returns:
        Frozen module in eval mode on the model's device.

    Raises:
        TypeError: If `model` is not a `SplitMixer`, or `dtype` not a floating point type.
        ValueError: If the model is in train mode.
    """
    if not isinstance(model, SplitMixer):
        raise TypeError(f'model must be a splitmixer_timm.SplitMixer, got {type(model).__name__}.')
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f'dtype must be a floating point torch.dtype or None, got {dtype!r}.')
    if any(module.training for module in model.modules()):
        raise ValueError('model must be in eval mode, got one in train mode: call model.eval() first.')
    dtype = dtype or next(model.parameters()).dtype
    try:
        thawed_model = thawed(model)
        try:
            fused = _build(thawed_model, dtype, compile)
        except fused_cpu.NotCompiled as e:
            warnings.warn(f'optimize_for_inference compiles nothing for {e}.', stacklevel=2)
            fused = _build(thawed_model, dtype, compile=False)
        if fused.compute_dtype != dtype:
            warnings.warn(
                f'This processor does not compute in {dtype}: the optimized model computes in {fused.compute_dtype} '
                f'and gives features and logits in {dtype}.', stacklevel=2)
        return fused
    except Unsupported as e:
        warnings.warn(f'optimize_for_inference has no faster form for {e}: the model is copied as it is.', stacklevel=2)
    fallback = copy_model(model).to(dtype).requires_grad_(False)
    fallback.stem.register_forward_pre_hook(_cast_images)
    return fallback
