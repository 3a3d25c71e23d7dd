""" Training on CUDA with spatial mixing, activations and norms as Triton kernels that store little for the backward."""
import math
from itertools import chain
from typing import Any, Callable, Dict, Iterable, List, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .fused import (
    BLOCKS,
    SEQUENCES,
    STEMS,
    Unsupported,
    activation,
    check_channel,
    check_mixer,
    check_spatial,
    check_stem,
    check_supported,
    products,
)
from .layers import is_watched
from .splitmixer import INDEPENDENT, SplitMixer, SplitMixerBlock
from .training_graphs import Graphs, state_of

try:
    from . import kernels, training_kernels
except ImportError:  # torch for another platform comes without Triton
    kernels = None

__all__ = ['fuse_for_training']

# Up to this many channels a product of half precision waits for memory, however many of its weights are zero.
MAX_DENSE = 512
_INTERPRETED = kernels is not None and bool(kernels.INTERPRETED)


def _cdiv(size: int, block: int) -> int:
    """ Blocks of a size. triton.cdiv is made for kernels and slow outside of them, and a step has hundreds of these."""
    return -(-size // block)


class _Launch:
    """ Launches of the training kernels for features (N, H, W, C), in buffers as precise as their arithmetic."""

    def __init__(self, x: torch.Tensor, act: str):
        self.shape = x.shape
        self.channels = x.shape[-1]
        self.count = x.numel() // self.channels
        self.options = dict(dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        self.common = dict(ACT=kernels._act(act, x.dtype), ACC=kernels._accumulator(x.dtype))

    def empty(self, *rows: int) -> torch.Tensor:
        return torch.empty(*rows, self.channels, **self.options)

    def spatial(self, kernel: Any, sums: int, kernel_size: int, *args: Any, **kwargs: Any) -> Optional[torch.Tensor]:
        """ Launch a spatial kernel; its sums (places, `sums`, C) if it has any."""
        is_backward = kernel is training_kernels.spatial_grad_kernel
        blocks = training_kernels.BACKWARD if is_backward else training_kernels.FORWARD
        N, H, W, C = self.shape
        places = N * _cdiv(H, blocks['BH']) * _cdiv(W, blocks['BW'])
        if sums:
            out = self.empty(places, sums)
            args = (*args, out)
        kernel[(places * _cdiv(C, blocks['BC']),)](
            *args, N, H, W, C, K=kernel_size, **kwargs, ALIGN=math.gcd(C, 4), **blocks, num_stages=1,
            enable_fp_fusion=True)
        return out if sums else None

    def pointwise(
            self,
            step: str,
            u: torch.Tensor,
            other: Optional[torch.Tensor] = None,
            out: Optional[torch.Tensor] = None,
            params: Optional[torch.Tensor] = None,
    ) -> Optional[torch.Tensor]:
        """ Launch a step of the pointwise kernel; its sums (places, 1 or 2, C) if it has any."""
        blocks = dict(training_kernels.POINTWISE[step])
        columns = _cdiv(self.channels, blocks['BC'])
        rows = _cdiv(self.count, blocks['BM'])
        while blocks['TILES'] > 1 and _cdiv(rows, blocks['TILES']) * columns < training_kernels.PROGRAMS:
            blocks['TILES'] //= 2
        places = _cdiv(rows, blocks['TILES'])
        sums = None if step == 'norm' else self.empty(places, 1 if step == 'grad' else 2)
        training_kernels.pointwise_kernel[(places * columns,)](
            u, other, out, params, sums, self.count, self.channels, STEP=step, **self.common, **blocks, num_stages=1,
            enable_fp_fusion=True)
        return sums

    def norm(
            self,
            sums: torch.Tensor,
            norm: nn.BatchNorm2d,
            weight: torch.Tensor,
            bias: torch.Tensor,
            affine: torch.Tensor,
    ) -> torch.Tensor:
        """ Fill in the affine that a norm is for this batch, update its running statistics; mean and 1 / deviation."""
        if self.count == 1:
            raise ValueError(f'Expected more than 1 value per channel when training, got features {tuple(self.shape)}.')
        momentum = norm.momentum if norm.momentum is not None else 1 / (float(norm.num_batches_tracked) + 1)
        moments = self.empty(2)
        blocks = training_kernels.NORM
        training_kernels.norm_kernel[(_cdiv(self.channels, blocks['BC']),)](
            sums, weight, bias, norm.running_mean, norm.running_var, norm.num_batches_tracked, affine, moments,
            len(sums), self.count, self.channels, momentum, norm.eps, **blocks, num_warps=8, enable_fp_fusion=True)
        return moments

    def norm_grad(
            self,
            sums: torch.Tensor,
            row: int,
            weight: torch.Tensor,
            moments: torch.Tensor,
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """ Gradients of a norm's weight and bias, and the coefficients of its input's, from two rows of sums."""
        weight_grad = torch.empty_like(weight)
        bias_grad = torch.empty_like(weight)
        coefficients = self.empty(3)
        blocks = training_kernels.NORM
        training_kernels.norm_grad_kernel[(_cdiv(self.channels, blocks['BC']),)](
            sums, weight, moments, weight_grad, bias_grad, coefficients, len(sums), self.count, self.channels,
            ROW=row, ROWS=sums.shape[1], **blocks, num_warps=8, enable_fp_fusion=True)
        return weight_grad, bias_grad, coefficients

    def act_norm(
            self,
            u: torch.Tensor,
            norm: nn.BatchNorm2d,
            weight: torch.Tensor,
            bias: torch.Tensor,
            residual: Optional[torch.Tensor] = None,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """ Activation, norm and residual of features; mean and 1 / deviation of the norm."""
        affine = self.empty(2)
        moments = self.norm(self.pointwise('sums', u), norm, weight, bias, affine)
        y = torch.empty_like(u)
        self.pointwise('norm', u, residual, y, affine)
        return y, moments

    def act_norm_grad(
            self,
            u: torch.Tensor,
            y_grad: torch.Tensor,
            weight: torch.Tensor,
            moments: torch.Tensor,
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """ Gradients of the features, of weight and bias of the norm, and sums (places, 1, C) of the first."""
        weight_grad, bias_grad, coefficients = self.norm_grad(
            self.pointwise('grad sums', u, y_grad), 0, weight, moments)
        u_grad = torch.empty_like(u)
        sums = self.pointwise('grad', u, y_grad, u_grad, coefficients)
        return u_grad, weight_grad, bias_grad, sums


class ActNorm(Function):
    """ Activation and norm of features (N, H, W, C), of which only the input is stored."""

    @staticmethod
    def forward(ctx, u, weight, bias, norm: nn.BatchNorm2d, act: str):
        y, moments = _Launch(u, act).act_norm(u, norm, weight, bias)
        ctx.save_for_backward(u, weight, moments)
        ctx.act = act
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, y_grad):
        u, weight, moments = ctx.saved_tensors
        u_grad, weight_grad, bias_grad, _ = _Launch(u, ctx.act).act_norm_grad(
            u, y_grad.contiguous(), weight, moments)
        return u_grad, weight_grad, bias_grad, None, None


class SpatialMixing(Function):
    """ Spatial mixing of features (N, H, W, C) and its residual, of which the input and the output of the second
    convolution are stored."""

    @staticmethod
    def forward(
            ctx, x, conv1, bias1, weight1, shift1, conv2, bias2, weight2, shift2, mixing: nn.Sequential, act: str,
            residual: bool):
        K = conv1.shape[-1]
        launch = _Launch(x, act)
        # as `kernels.spatial_mixing` has them, the norms' rows follow
        rows = launch.empty(2)
        params = torch.cat([
            row.to(rows.dtype) for row in (conv1.flatten(1).T, bias1[None], rows, conv2.flatten(1).T, bias2[None], rows)
        ])
        sums = launch.spatial(training_kernels.row_sums_kernel, 2, K, x, params, **launch.common)
        moments1 = launch.norm(sums, mixing.norm1, weight1, shift1, params[K + 1:K + 3])
        u = torch.empty_like(x)
        sums = launch.spatial(
            kernels.spatial_kernel.fn, 2, K, x, u, params, RESIDUAL=False, TRAINING=True, COLS=1, **launch.common)
        affine = params[2 * K + 4:]
        moments2 = launch.norm(sums, mixing.norm2, weight2, shift2, affine)
        y = torch.empty_like(x)
        launch.pointwise('norm', u, x if residual else None, y, affine)
        ctx.save_for_backward(x, u, params, conv1, conv2, weight1, moments1, weight2, moments2)
        ctx.act = act
        ctx.residual = residual
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, y_grad):
        x, u, params, conv1, conv2, weight1, moments1, weight2, moments2 = ctx.saved_tensors
        K = conv1.shape[-1]
        y_grad = y_grad.contiguous()
        launch = _Launch(x, ctx.act)

        u_grad, weight2_grad, shift2_grad, sums = launch.act_norm_grad(u, y_grad, weight2, moments2)
        bias2_grad = sums.sum((0, 1)).to(conv2.dtype)
        kernel = training_kernels.spatial_grad_kernel
        sums = launch.spatial(kernel, K + 2, K, x, u_grad, None, params, None, FIRST=True, **launch.common)
        conv2_grad = sums[:, :K].sum(0).T.reshape(conv2.shape).to(conv2.dtype)
        weight1_grad, shift1_grad, coefficients = launch.norm_grad(sums, K, weight1, moments1)
        row_grad = torch.empty_like(x)
        sums = launch.spatial(
            kernel, K + 1, K, x, u_grad, row_grad, params, coefficients, FIRST=False, **launch.common)
        sums = sums.sum(0).to(conv1.dtype)
        conv1_grad = sums[:K].T.reshape(conv1.shape)
        bias1_grad = sums[K]

        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = u_grad  # no longer needed
            launch.spatial(
                training_kernels.row_grad_kernel, 0, K, row_grad, y_grad, x_grad, params, RESIDUAL=ctx.residual,
                ACC=launch.common['ACC'])
        return (
            x_grad, conv1_grad, bias1_grad, weight1_grad, shift1_grad, conv2_grad, bias2_grad, weight2_grad,
            shift2_grad, None, None, None)


class ChannelMixing(Function):
    """ Channel mixing of features (N, H, W, C) as one product over all channels, its activation, norm and residual, of
    which the input and the product are stored."""

    @staticmethod
    def forward(ctx, x, matrix, bias, weight, shift, norm: nn.BatchNorm2d, act: str, residual: bool):
        matrix = matrix.to(x.dtype)
        u = torch.addmm(bias.to(x.dtype), x.flatten(0, 2), matrix.T).view(x.shape)
        y, moments = _Launch(u, act).act_norm(u, norm, weight, shift, x if residual else None)
        ctx.save_for_backward(x, u, matrix, weight, moments)
        ctx.dtype = bias.dtype
        ctx.act = act
        ctx.residual = residual
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, y_grad):
        x, u, matrix, weight, moments = ctx.saved_tensors
        y_grad = y_grad.contiguous()
        u_grad, weight_grad, shift_grad, sums = _Launch(u, ctx.act).act_norm_grad(u, y_grad, weight, moments)
        bias_grad = sums.sum((0, 1)).to(ctx.dtype)
        u_grad = u_grad.flatten(0, 2)
        matrix_grad = (u_grad.T @ x.flatten(0, 2)).to(ctx.dtype)
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = torch.addmm(y_grad.flatten(0, 2), u_grad, matrix) if ctx.residual else u_grad @ matrix
            x_grad = x_grad.view(x.shape)
        return x_grad, matrix_grad, bias_grad, weight_grad, shift_grad, None, None, None


def _dense(mixer: nn.Module, dim: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """ Channel mixing as one matrix (dim, dim) and bias (dim,), differentiable in its parameters."""
    matrix = bias = None
    for stage in products(mixer):
        rows, shifts = zip(*((F.pad(p.weight, (p.start, dim - p.stop)), p.bias) for p in stage))
        first, last = stage[0].out.start, stage[-1].out.stop
        if last is None:  # the products' outputs take turns
            step, shift = torch.stack(rows, dim=1).flatten(0, 1), torch.stack(shifts, dim=1).flatten()
        else:  # they lie one after the other
            unchanged = torch.eye(dim, dtype=rows[0].dtype, device=rows[0].device)
            step = torch.cat([unchanged[:first], *rows, unchanged[last:]])
            shift = F.pad(torch.cat(shifts), (first, dim - last))
        matrix, bias = (step, shift) if matrix is None else (step @ matrix, step @ bias + shift)
    return matrix, bias


def _to_nhwc(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


def _act_norm(u: torch.Tensor, act: nn.Module, norm: nn.BatchNorm2d) -> torch.Tensor:
    """ Activation and norm of features (N, C, H, W)."""
    return ActNorm.apply(_to_nhwc(u), norm.weight, norm.bias, norm, activation(act)).permute(0, 3, 1, 2)


def _has_kernels(x: torch.Tensor, layers: Iterable[nn.Module]) -> bool:
    """ Whether the kernels can be run on features in place of layers, whose norms may have been set to another mode."""
    if kernels is None or not (x.is_cuda or _INTERPRETED) or not x.numel():
        return False
    for layer in layers:
        if is_watched(layer) or isinstance(layer, nn.BatchNorm2d) and not (
                layer.training and layer.track_running_stats and layer.num_batches_tracked is not None
                and layer.weight is not None and layer.bias is not None):
            return False
    return True


def _passes(check: Callable[[str, nn.Module], None], module: nn.Module) -> bool:
    """ Whether layers, that may have been replaced (as by SyncBatchNorm), are still what the kernels compute."""
    try:
        check('', module)
    except Unsupported:
        return False
    return True


class FusedStem(nn.Sequential):
    """ Stem of a `SplitMixer`: convolution, activation, norm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._embed(x) if _has_kernels(x, list(self)[1:]) and _passes(check_stem, self) else super().forward(x)

    @torch.compiler.disable
    def _embed(self, x: torch.Tensor) -> torch.Tensor:
        conv, act, norm = self
        with torch.cuda.device_of(x):
            return _act_norm(conv(x.contiguous(memory_format=torch.channels_last)), act, norm)


class FusedBlock(SplitMixerBlock):
    """ Block of a `SplitMixer`.

    The product of channel mixing is torch's. In half precision it is one over all channels, if these are not too many:
    the GPU's tensor cores make it while the features are read and written once, where segments are copied out and in.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._mix(x) if self.is_covered(x) else super().forward(x)

    def is_covered(self, x: torch.Tensor) -> bool:
        """ Whether the kernels run on these features."""
        layers = chain(self.spatial_mixing.modules(), (
            module for name, module in self.channel_mixing.named_modules() if not name.startswith('mixer')))
        return _has_kernels(x, layers) and _passes(check_spatial, self) and _passes(check_channel, self) and (
            isinstance(self.spatial_mixing, nn.Identity) or hasattr(self.spatial_mixing, 'conv2'))

    @torch.compiler.disable
    def _mix(self, x: torch.Tensor) -> torch.Tensor:
        with torch.cuda.device_of(x):
            return self._mix_channels(self._mix_positions(x))

    def _mix_positions(self, x: torch.Tensor) -> torch.Tensor:
        mixing = self.spatial_mixing
        if isinstance(mixing, nn.Identity):
            return x
        x = _to_nhwc(x)
        is_dropped = not isinstance(self.drop_path, nn.Identity)
        y = SpatialMixing.apply(
            x, mixing.conv1.weight, mixing.conv1.bias, mixing.norm1.weight, mixing.norm1.bias,
            mixing.conv2.weight, mixing.conv2.bias, mixing.norm2.weight, mixing.norm2.bias,
            mixing, activation(mixing.act1), self.spatial_residual and not is_dropped)
        if self.spatial_residual and is_dropped:
            y = x + self.drop_path(y)
        return y.permute(0, 3, 1, 2)

    def _mix_channels(self, x: torch.Tensor) -> torch.Tensor:
        mixing = self.channel_mixing
        if isinstance(mixing, nn.Identity):
            return x
        is_dropped = not isinstance(self.drop_path, nn.Identity)
        residual = self.channel_residual and not is_dropped
        norm = mixing.norm
        if x.dtype.itemsize == 2 and norm.num_features <= MAX_DENSE and _passes(check_mixer, mixing.mixer) and \
                not any(map(is_watched, mixing.mixer.modules())):
            with torch.autocast(x.device.type, enabled=False):
                matrix, bias = _dense(mixing.mixer, norm.num_features)
            y = ChannelMixing.apply(
                _to_nhwc(x), matrix, bias, norm.weight, norm.bias, norm, activation(mixing.act), residual)
            y = y.permute(0, 3, 1, 2)
        else:
            y = _act_norm(mixing.mixer(x), mixing.act, norm)
            if residual:
                y = x + y
        return x + self.drop_path(y) if self.channel_residual and is_dropped else y


class FusedBlocks(nn.Sequential):
    """ Blocks of a `SplitMixer` as CUDA graphs, from the second step in a row with features of a size on.

    Features of other sizes, and blocks that graphs cannot have or that were changed since, go through the blocks one by
    one. There is one pair of graphs at a time, for each keeps the memory of a step.
    """
    _graphs: Optional[Graphs] = None
    _captured: Optional[List[Any]] = None  # what they were captured with, or could not be
    _seen: Optional[List[Any]] = None  # what the last step would have been captured with

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return self._replay(x)
        return super().forward(x)

    @property
    def has_graphs(self) -> bool:
        return self._graphs is not None

    def __getstate__(self) -> Dict[str, Any]:
        graphs = ('_graphs', '_captured', '_seen')
        return {name: value for name, value in super().__getstate__().items() if name not in graphs}

    def _replay(self, x: torch.Tensor) -> torch.Tensor:
        seen, self._seen = self._seen, self._state(x)
        if self._seen is not None and self._seen == seen != self._captured:
            self._graphs, self._captured = None, self._seen  # the memory of the old ones is free for the new ones
            if self._can_be_captured(x):
                with torch.cuda.device_of(x):
                    self._graphs = Graphs(self, x)
        if self._graphs is None or self._captured != self._seen or self._graphs.is_pending():
            return super().forward(x)
        with torch.cuda.device_of(x):
            return self._graphs(x)

    def _state(self, x: torch.Tensor) -> Optional[List[Any]]:
        """ What graphs for these features would be captured with; None where there cannot be any."""
        is_possible = x.is_cuda and not torch.cuda.is_current_stream_capturing() or _INTERPRETED
        if not is_possible or getattr(self, '_is_replica', False):
            return None
        state = state_of(self)
        return state and [
            *state, x.shape, x.stride(), x.dtype, x.device, x.requires_grad, torch.is_autocast_enabled(x.device.type),
            torch.get_autocast_dtype(x.device.type)]

    def _can_be_captured(self, x: torch.Tensor) -> bool:
        """ Whether all of it are kernels that draw no random numbers and do not wait for the GPU."""
        params = list(self.parameters())
        if len({param.dtype for param in params}) != 1 or not any(tensor.requires_grad for tensor in (x, *params)):
            return False
        for module in self.modules():
            is_norm = isinstance(module, nn.BatchNorm2d)
            # a parameter that somebody put elsewhere may be unused, and have no gradient
            if is_norm and module.momentum is None or module._parameters and not (
                    is_norm or isinstance(module, nn.Conv2d)):
                return False
        return all(
            type(block) is FusedBlock and type(block.drop_path) is nn.Identity and block.is_covered(x)
            and (type(block.channel_mixing) is nn.Identity or _passes(check_mixer, block.channel_mixing.mixer))
            for block in self)


# in eval mode they compute what their base classes do
STEMS.append(FusedStem)
SEQUENCES.append(FusedBlocks)
BLOCKS.append(FusedBlock)
INDEPENDENT.extend([FusedBlock, FusedBlocks])


def _check_trained(model: nn.Module, device: Optional[Union[str, torch.device]]) -> None:
    if kernels is None:
        raise Unsupported('torch without Triton')
    if not isinstance(model, SplitMixer):
        raise Unsupported(f'model {type(model).__name__}')
    check_supported(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d) and (module.weight is None or module.bias is None):
            raise Unsupported(f'a norm without weight or bias at {name}')
    if any(hasattr(block.spatial_mixing, 'conv1') and not hasattr(block.spatial_mixing, 'conv2')
           for block in model.blocks):
        raise Unsupported("spatial_mixing='2d'")
    device = torch.device(device or model.stem[0].weight.device)
    if device.type == 'cuda' or _INTERPRETED:
        kernels.check_launches(device)


def fuse_for_training(
        model: nn.Module,
        device: Optional[Union[str, torch.device]] = None,
        cuda_graphs: bool = False,
) -> SplitMixer:
    """ Have a model train on CUDA by Triton kernels, which keep half of what the plain layers keep, or less.

    With ReLU, where the plain layers keep less, it is two thirds.

    The model is changed in place; its parameters, buffers and the names of both stay. The kernels run in train mode on
    CUDA, with norms in fp32 and features in fp32 or, under autocast, half precision. Elsewhere, and in a stem or
    block in which a norm is set to eval mode, or a layer was replaced (as by SyncBatchNorm) or has hooks (as of
    pruning), the plain layers run. The stem's convolution is called as usual, with its hooks; so are those of channel
    mixing, but in half precision with up to 512 channels only where they were replaced or have hooks.
    `torch.compile` leaves stem and blocks to the kernels. The model cannot be scripted, and has no second derivatives.
    A variance is mean(x^2) - mean(x)^2, which loses digits where a channel's mean is many times its deviation.

    Args:
        model: The `SplitMixer`.
        device: Where it will be trained, its own device if None.
        cuda_graphs: Whether the blocks become two CUDA graphs, one forward and one backward, at the second step in a
            row with images of a size and number. They save the time that Python takes to launch each kernel, and
            keep the memory of a step between steps. Steps that they are not for go without: other sizes, gradient
            checkpointing, stochastic depth, hooks within the blocks, a second forward pass before the backward pass,
            `torch.compile`, anomaly mode. Under DistributedDataParallel the blocks' gradients come all at once. A
            backward pass with `retain_graph` cannot be repeated.

    Returns:
        The model.

    Raises:
        Unsupported: If the kernels do not cover the model, which then stays as it is; the message says why.
    """
    try:
        _check_trained(model, device)
    except Unsupported as e:
        raise Unsupported(f'fuse_for_training has no kernels for {e}.') from e
    if type(model.stem) is nn.Sequential:
        model.stem.__class__ = FusedStem
    for block in model.blocks:
        block.__class__ = FusedBlock
    if cuda_graphs:
        model.blocks.__class__ = FusedBlocks
    return model
