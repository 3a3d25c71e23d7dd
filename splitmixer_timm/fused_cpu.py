""" A SplitMixer for inference on a CPU: a few images at a time through all blocks, updated in place in the cache.

Every operation is one of torch's own on NHWC memory. Compiled into one loop, activation and affine took longer than the
two passes here: torch's GELU is faster than the compiler's, and the passes over what is in the cache cost little.
"""
from typing import Iterator, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import nn

from .fused import FusedModel, Unsupported, activation, check_supported, fold_affine, segments
from .splitmixer import PIECE_BYTES, SplitMixer, SplitMixerBlock

__all__ = ['FusedSplitMixer', 'build']

# MKL's matrix product reaches half of oneDNN's speed on processors that are not Intel's
_onednn_linear = getattr(torch.ops.mkldnn, '_linear_pointwise', None) if torch.backends.mkldnn.is_available() else None

_IN_PLACE = {'gelu': torch.ops.aten.gelu_, 'relu': torch.relu_}


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    if _onednn_linear is not None and x.dtype == torch.float32:
        return _onednn_linear(x, weight, bias, 'none', [], '')
    return F.linear(x, weight, bias)


class Affine(nn.Module):
    """ Scale and shift of each channel of rows (M, C), in fp32 and where possible in place."""

    def __init__(self, scale: torch.Tensor, shift: torch.Tensor):
        super().__init__()
        self.register_buffer('scale', scale)
        self.register_buffer('shift', shift)
        self.register_buffer('zero', torch.zeros_like(scale))
        self.register_buffer('one', torch.ones_like(scale))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float32:
            return torch.addcmul(self.shift, x, self.scale, out=x)
        return F.batch_norm(x, self.zero, self.one, self.scale, self.shift, eps=1e-12)  # of mixed types


class Convolution(nn.Module):
    """ A convolution and activation: images (N, C, H, W) in channels_last to rows (N * H * W, C).

    Args:
        conv: The convolution.
        act: The activation.
        dtype: Data type of the weights.
        scale: Scale of each input channel of a depthwise k x 1 convolution, folded into the weights.
        shift: Its shift, folded into the bias; zero padding comes after it, so that rows at the border lack a part.
    """

    def __init__(
            self,
            conv: nn.Conv2d,
            act: nn.Module,
            dtype: torch.dtype,
            scale: Optional[torch.Tensor] = None,
            shift: Optional[torch.Tensor] = None,
    ):
        super().__init__()
        self.stride, self.padding, self.groups = conv.stride, conv.padding, conv.groups
        self.act = activation(act)
        self.above = self.below = 0
        weight, bias = conv.weight.detach(), conv.bias.detach()
        if scale is not None:
            parts = weight[:, 0, :, 0].T.float() * shift  # (k, C)
            weight = weight.float() * scale.view(-1, 1, 1, 1)
            bias = bias.float() + parts.sum(0)
            self.above = (len(parts) - 1) // 2
            self.below = len(parts) - 1 - self.above
            # what the rows of the kernel beyond the border would add, for each of the rows that has such
            top = [parts[:self.above - h].sum(0) for h in range(self.above)]
            bottom = [parts[len(parts) - 1 - h:].sum(0) for h in range(self.below)]
            for name, rows in (('top', top), ('bottom', bottom)):
                if rows:
                    self.register_buffer(name, torch.stack(rows)[:, None].to(dtype))
        self.register_buffer('weight', weight.to(dtype, copy=True))
        self.register_buffer('bias', bias.to(dtype, copy=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, 1, self.groups)
        x = x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        height = x.shape[1]
        if self.above:
            x[:, :self.above].sub_(self.top[:height])
        if self.below:
            x[:, max(0, height - self.below):].sub_(self.bottom[max(0, self.below - height):])
        rows = x.reshape(-1, x.shape[-1])
        _IN_PLACE[self.act](rows)
        return rows


def _spatial(mixing: nn.Module, dtype: torch.dtype) -> Tuple[nn.ModuleList, Optional[Affine]]:
    """ Convolutions of spatial mixing and the affine after the last one; that of the first goes into the second."""
    convs, affine = nn.ModuleList(), ()
    if isinstance(mixing, nn.Identity):
        return convs, None
    for n in range(1, 3):
        if hasattr(mixing, f'conv{n}'):
            conv, act, norm = (getattr(mixing, f'{name}{n}') for name in ('conv', 'act', 'norm'))
            convs.append(Convolution(conv, act, dtype, *affine))
            affine = fold_affine(norm)
    return convs, Affine(*affine)


def _images(rows: torch.Tensor, shape: Tuple[int, ...]) -> torch.Tensor:
    """ Rows as images (N, C, H, W) in channels_last of another's shape, but for the number of channels."""
    N, _, H, W = shape
    return rows.view(N, H, W, rows.shape[1]).permute(0, 3, 1, 2)


class Stage(nn.Module):
    """ Pointwise convolutions that read the same rows (M, C) and write them.

    Args:
        products: As `segments` describes them.
        dim: Number of channels.
        dtype: Data type of the weights.
    """

    def __init__(self, products, dim: int, dtype: torch.dtype):
        super().__init__()
        size = products[0].stop
        # type III, or one product of all channels: rows of a segment each
        self.is_shared = dim % size == 0 and all(
            p.start == n * size and p.out == slice(p.start, p.stop) and p.weight is products[0].weight
            for n, p in enumerate(products)) and len(products) * size == dim
        self.parts = [(p.start, p.stop, p.out) for p in products]
        for n, p in enumerate(products[:1] if self.is_shared else products):
            self.register_buffer(f'weight{n}', p.weight.to(dtype, copy=True))
            self.register_buffer(f'bias{n}', p.bias.to(dtype, copy=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_shared:
            return _linear(x.view(-1, self.weight0.shape[0]), self.weight0, self.bias0).view(x.shape)
        outs = [
            _linear(x[:, start:stop], getattr(self, f'weight{n}'), getattr(self, f'bias{n}'))
            for n, (start, stop, _) in enumerate(self.parts)]
        for out, (_, _, where) in zip(outs, self.parts):
            x[:, where] = out
        return x


class Block(nn.Module):
    """ A block on images (N, C, H, W) in channels_last, which it may overwrite."""

    def __init__(self, block: SplitMixerBlock, dtype: torch.dtype):
        super().__init__()
        self.spatial_residual = block.spatial_residual
        self.channel_residual = block.channel_residual
        self.convs, self.spatial_affine = _spatial(block.spatial_mixing, dtype)
        channel = block.channel_mixing
        self.has_channel = not isinstance(channel, nn.Identity)
        if self.has_channel:
            dim = channel.norm.num_features
            self.stages = nn.Sequential(*(Stage(products, dim, dtype) for products in segments(channel.mixer)))
            self.act = activation(channel.act)
            self.channel_affine = Affine(*fold_affine(channel.norm))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.permute(0, 2, 3, 1).view(-1, x.shape[1])
        if self.spatial_affine is not None:
            y = x
            for conv in self.convs:
                out = conv(y)
                y = _images(out, x.shape)
            out = self.spatial_affine(out)
            rows = rows.add_(out) if self.spatial_residual else out
        if self.has_channel:
            out = self.stages(rows.clone() if self.channel_residual else rows)
            _IN_PLACE[self.act](out)
            out = self.channel_affine(out)
            rows = rows.add_(out) if self.channel_residual else out
        return _images(rows, x.shape)


class FusedSplitMixer(FusedModel):
    """ A `SplitMixer` in eval mode for a CPU; `build` makes it.

    Args:
        model: The model.
        dtype: Data type of weights, features and logits: fp32 or bf16. Affines stay in fp32.
    """

    def __init__(self, model: SplitMixer, dtype: torch.dtype):
        super().__init__(model, dtype)
        conv, act, norm = model.stem
        self.stem = Convolution(conv, act, dtype)
        self.affine = Affine(*fold_affine(norm))
        self.blocks = nn.Sequential(*(Block(block, dtype) for block in model.blocks))
        self.eval()

    def _pieces(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """ Features of the batch in pieces that fit the cache."""
        self._check_input(x)
        (kernel, _), (stride, _) = self.stem.weight.shape[2:], self.stem.stride
        H, W = ((size - kernel) // stride + 1 for size in x.shape[2:])
        size = PIECE_BYTES * torch.get_num_threads() // (H * W * self.num_features * self.dtype.itemsize)
        for piece in x.split(max(1, size)):
            rows = self.affine(self.stem(piece.to(self.dtype, memory_format=torch.channels_last)))
            yield self.blocks(_images(rows, (len(piece), 0, H, W)))

    @torch.no_grad()
    @torch.autocast('cpu', enabled=False)
    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """ Images (N, in_chans, H, W) to features (N, dim, H / stride, W / stride), in channels_last."""
        return torch.cat(list(self._pieces(x)))

    @torch.no_grad()
    @torch.autocast('cpu', enabled=False)
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.forward_head(features) for features in self._pieces(x)])


def build(model: SplitMixer, dtype: torch.dtype) -> FusedSplitMixer:
    """ Fused form of a model in eval mode on a CPU; the model stays as it is.

    Args:
        model: The model.
        dtype: Data type of weights, features and logits: fp32 or bf16.

    Raises:
        Unsupported: If the model or `dtype` is not covered; the message says why.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise Unsupported(f'{dtype} on a CPU')
    check_supported(model)
    return FusedSplitMixer(model, dtype)
