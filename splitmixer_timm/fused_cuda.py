""" A SplitMixer for inference on CUDA: Triton kernels, and a CUDA graph around them."""
import threading
from collections import OrderedDict
from itertools import chain
from operator import is_
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from .cuda_graphs import capture, warm_up
from .fused import FusedModel, Unsupported, activation, check_supported, fold_affine, segments
from .splitmixer import SplitMixer, SplitMixerBlock

try:
    from . import kernels
except ImportError:  # torch for another platform comes without Triton
    kernels = None

__all__ = ['FusedSplitMixer', 'build']

MAX_GRAPHS = 8

_launching = threading.RLock()  # Triton's autotuner is not made for several threads


def _stack(*rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([row.detach().float().reshape(-1, row.shape[-1]) for row in rows])


class FusedPatchEmbedding(nn.Module):
    """ The stem: images (N, in_chans, H, W) to features (N, H', W', C)."""

    def __init__(self, stem: nn.Sequential, dtype: torch.dtype, precision: str):
        super().__init__()
        conv, act, norm = stem
        self.patch_size = conv.kernel_size[0]
        self.stride = conv.stride[0]
        self.act = activation(act)
        self.precision = precision
        self.register_buffer('weight', kernels.pack_patches(conv, dtype))
        self.register_buffer('params', _stack(conv.bias, *fold_affine(norm)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return kernels.patch_embedding(
            x, self.weight, self.params, self.patch_size, self.stride, self.act, self.precision)


class FusedSpatialMixing(nn.Module):
    """ Spatial mixing of a block and its residual, on features (N, H, W, C)."""

    def __init__(self, block: SplitMixerBlock):
        super().__init__()
        mixing = block.spatial_mixing
        if not hasattr(mixing, 'conv2'):
            raise Unsupported("spatial_mixing='2d' on CUDA")
        self.kernel_size = mixing.conv2.kernel_size[0]
        self.act = activation(mixing.act1)
        self.residual = block.spatial_residual
        params = _stack(
            mixing.conv1.weight.flatten(1).T, mixing.conv1.bias, *fold_affine(mixing.norm1),
            mixing.conv2.weight.flatten(1).T, mixing.conv2.bias, *fold_affine(mixing.norm2))
        self.register_buffer('params', params)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return kernels.spatial_mixing(x, self.params, self.kernel_size, self.act, self.residual)


class FusedChannelMixing(nn.Module):
    """ Channel mixing of a block, of any type, on features (N, H, W, C)."""

    def __init__(self, block: SplitMixerBlock, dtype: torch.dtype, precision: str):
        super().__init__()
        mixing = block.channel_mixing
        self.act = activation(mixing.act)
        self.residual = block.channel_residual
        self.precision = precision
        scale, shift = fold_affine(mixing.norm)
        weight, tiles, bias = kernels.pack_channels(segments(mixing.mixer), len(scale), dtype)
        self.register_buffer('weight', weight)
        self.register_buffer('tiles', tiles)
        self.register_buffer('params', _stack(bias, scale, shift))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return kernels.channel_mixing(
            x, self.weight, self.tiles, self.params, self.act, self.residual, self.precision)


class FusedSplitMixer(FusedModel):
    """ A `SplitMixer` in eval mode as Triton kernels; `build` makes it.

    `forward` is captured in a CUDA graph at the first call with new sizes of images, and replayed after it; the last
    `MAX_GRAPHS` are kept. The graphs share their memory: threads, and streams, take turns. While one is captured other
    threads must not draw random numbers on the GPU. Within the capture of another graph (which must not be the first
    call with these sizes), in a replica of `nn.DataParallel`, and by `forward_features` or `forward_intermediates`
    alone, the kernels are launched one by one.

    Args:
        model: The model.
        dtype: Data type of weights, features and logits: fp32, fp16 or bf16.

    Raises:
        Unsupported: If the kernels do not cover the model.
    """

    def __init__(self, model: SplitMixer, dtype: torch.dtype):
        super().__init__(model, dtype)
        # fp32 products keep fp32's accuracy on tensor cores by three products in TF32, unless torch is told otherwise
        precision = 'tf32' if torch.backends.cuda.matmul.fp32_precision == 'tf32' else 'tf32x3'
        self.stem = FusedPatchEmbedding(model.stem, dtype, precision)
        self.blocks = nn.Sequential()
        for block in model.blocks:
            mixing = nn.Sequential()
            if not isinstance(block.spatial_mixing, nn.Identity):
                mixing.append(FusedSpatialMixing(block))
            if not isinstance(block.channel_mixing, nn.Identity):
                mixing.append(FusedChannelMixing(block, dtype, precision))
            self.blocks.append(mixing)
        self._forget_graphs()
        self.eval()

    def _forget_graphs(self) -> None:
        self._graphs: OrderedDict = OrderedDict()
        self._known: set = set()
        self._members: List[Dict[str, Any]] = []  # of all modules: parameters, buffers and modules, by name
        self._held: List[Any] = []  # what those were
        self._addresses: List[Tuple[nn.Parameter, int]] = []  # which `Module.to` changes, and no parameter with it
        self._pool = None
        self._stream = None
        self._done = None
        self._replaying = threading.Lock()

    def _apply(self, fn, recurse: bool = True):
        if self._done is not None:
            self._done.synchronize()  # what still runs reads what this may free
        super()._apply(fn, recurse)
        self._forget_graphs()
        return self

    def __getstate__(self) -> Dict[str, Any]:
        graphs = (
            '_graphs', '_known', '_members', '_held', '_addresses', '_pool', '_stream', '_done', '_replaying')
        return {name: value for name, value in super().__getstate__().items() if name not in graphs}

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_graphs()

    def _features(self, x: torch.Tensor, taken: Sequence[int] = (), depth: Optional[int] = None) -> List[torch.Tensor]:
        self._check_input(x)
        features = []
        with _launching, torch.cuda.device_of(x):
            x = self.stem(x)
            for i, block in enumerate(list(self.blocks)[:depth]):
                x = block(x)
                if i in taken:
                    features.append(x)
        return [x.permute(0, 3, 1, 2) for x in (*features, x)]

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.forward_features(x)
        with torch.autocast(features.device.type, enabled=False):
            return self.forward_head(features)

    # a tensor of inference mode could not be filled outside of it
    @torch.inference_mode(False)
    @torch.no_grad()
    def _capture(self, x: torch.Tensor) -> Tuple[torch.cuda.CUDAGraph, torch.Tensor, Any]:
        """ Graph of `forward` for images like `x`, with its input and its output."""
        self._check_input(x)  # before anything is made for a device that is not the model's
        static_x = x.detach().clone(memory_format=torch.contiguous_format)
        if self._stream is None:
            self._stream = torch.cuda.Stream()  # one for all: each has a workspace, and torch's own is of one device
            self._done = torch.cuda.Event()
        if not self._graphs:  # a pool that was given up could not be taken again while a tensor in it lives
            self._pool = torch.cuda.graph_pool_handle()
        y = warm_up(lambda: self._forward(static_x), self._stream)
        for part in tree_leaves(y):
            if not isinstance(part, torch.Tensor):  # what is in it would be overwritten by the next call
                raise TypeError(
                    'The classifier of a model in a CUDA graph must give tensors, or tuples, lists or dicts of them, '
                    f'got {type(part).__name__}.')
        graph, y = capture(lambda: self._forward(static_x), self._stream, self._pool)
        return graph, static_x, y

    def _check_state(self) -> None:
        """ Drop the graphs if a tensor or a module was replaced, or converted: they read the memory of the old one."""
        # at each call, so without a loop in Python over all of them
        is_same = sum(map(len, self._members)) == len(self._held) and all(
            map(is_, chain.from_iterable(map(dict.values, self._members)), self._held))
        if not is_same or any(param.data_ptr() != address for param, address in self._addresses):
            if self._done is not None:
                self._done.synchronize()  # what still runs reads it
            self._graphs.clear()
            self._members = []
        if not self._members:
            self._members = [
                members for module in self.modules()
                for members in (module._parameters, module._buffers, module._modules)]
            self._held = [value for members in self._members for value in members.values()]
            self._addresses = [(param, param.data_ptr()) for param in self.parameters()]

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_cuda or getattr(self, '_is_replica', False):
            return self._forward(x)
        key = (x.shape, x.dtype, x.device)
        if torch.cuda.is_current_stream_capturing():
            if key not in self._known:  # to measure configurations waits for the GPU, which a capture must not
                raise RuntimeError(
                    f'{type(self).__name__} must be called once with images {tuple(x.shape)} before it is captured.')
            # as in that call: with other strides, or another alignment, a kernel would be compiled now
            return self._forward(x.clone(memory_format=torch.contiguous_format))
        with self._replaying, torch.cuda.device_of(x):
            self._check_state()
            if key not in self._graphs:
                if len(self._graphs) == MAX_GRAPHS:
                    self._done.synchronize()
                    self._graphs.popitem(last=False)
                with _launching:
                    self._graphs[key] = self._capture(x)
                self._known.add(key)
            self._graphs.move_to_end(key)
            graph, static_x, y = self._graphs[key]
            self._done.wait()  # for the last call, which may have been on another stream
            static_x.copy_(x)
            graph.replay()
            y = tree_map_only(torch.Tensor, torch.clone, y)  # of a classifier of the user's it may be several
            self._done.record()
            return y


@torch.inference_mode(False)  # tensors of inference mode could not be loaded into outside of it
def build(model: SplitMixer, dtype: torch.dtype) -> FusedSplitMixer:
    """ Fused form of a model in eval mode on a CUDA device; the model stays as it is.

    Args:
        model: The model.
        dtype: Data type of weights, features and logits: fp32, fp16 or bf16.

    Raises:
        Unsupported: If the kernels do not cover the model, its device or `dtype`; the message says why.
    """
    if kernels is None:
        raise Unsupported('torch without Triton')
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise Unsupported(f'{dtype} on CUDA')
    check_supported(model)
    device = model.stem[0].weight.device
    if device.type == 'cuda':
        if torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
            raise Unsupported(f'{torch.cuda.get_device_name(device)}, a GPU without NVIDIA compute capability 8.0')
    elif device.type != 'cpu' or not kernels.INTERPRETED:
        raise Unsupported(f'a model on {device}')
    kernels.check_launches(device)
    return FusedSplitMixer(model, dtype)
