""" A SplitMixer for inference on a CPU: a few images at a time through all blocks, updated in place in the cache.

Operations are torch's own on NHWC memory, and the kernels of compiled_cpu.py where they are asked for. The modules here
hold weights only. What runs are functions that `prepare` makes of them, with all done beforehand that does not depend
on the images: no call lays out weights for oneDNN, looks up buffers, or calls modules.
"""
import platform
import warnings
from functools import wraps
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d
from torch import nn

from .compiled_cpu import (
    act_affine,
    act_affine_kernel,
    act_affine_mean_kernel,
    library,
    spatial_mixing,
    spatial_mixing_kernel,
)
from .fused import FusedModel, Product, Unsupported, activation, check_supported, fold_affine, segments
from .layers import count_dispatch_modes, is_everything_watched, is_watched
from .machine import has_bfloat16
from .splitmixer import PIECE_BYTES, SplitMixer, SplitMixerBlock

__all__ = ['CompiledSplitMixer', 'FusedSplitMixer', 'NotCompiled', 'build']

Function = Callable[[torch.Tensor], torch.Tensor]


class Step(NamedTuple):
    """ What stem or block does to images (N, H, W, C).

    Args:
        function: The features that the next one takes.
        complete: What completes them for others, if anything.
        pool: The mean (N, C) over each image, in fp32, of what is complete, if there is a function of its own for that.
    """
    function: Function
    complete: Optional[Function] = None
    pool: Optional[Function] = None


# types of pooling, dropout and classifier that take each image for itself
ROW_WISE = (SelectAdaptivePool2d, nn.Dropout, nn.Linear, nn.Identity)
_IN_PLACE = {None: lambda x: x, 'gelu': torch.ops.aten.gelu_.default, 'relu': torch.ops.aten.relu_.default}
# attributes of oneDNN's operations for what they do last
_LAST = {None: ('none', (), ''), 'gelu': ('gelu', (), 'none'), 'relu': ('relu', (), '')}


def _has_onednn(dtype: torch.dtype) -> bool:
    """ Whether oneDNN computes in this data type and takes weights in a layout of its own."""
    if platform.machine() not in ('x86_64', 'AMD64') or not torch.backends.mkldnn.is_available():
        return False  # on other processors it was not tried
    return dtype == torch.float32 or has_bfloat16()


def _multiplies_in_place(dtype: torch.dtype) -> bool:
    """ Whether MKL multiplies channels where they lie among others, which oneDNN would copy together first."""
    is_avx2 = torch.backends.cpu.get_cpu_capability() == 'AVX2'  # with AVX-512 that is no faster
    return is_avx2 and dtype == torch.float32 and torch.backends.mkl.is_available()


def _is_recorded() -> bool:
    """ Whether operations are recorded: compiled, traced, counted or run on fake tensors, which know no such layout."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or count_dispatch_modes() > 0


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """ A function that computes in the types of what it is given, whatever autocast would have."""
    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        # one for each call: torch.autocast keeps in itself what is to be restored, and threads would share it
        with torch.autocast('cpu', enabled=False):
            return function(*args, **kwargs)

    return wrapped


class NotCompiled(Unsupported):
    """ A model that the fused form covers, but not the compiled one; the message says why."""


_kept = 0  # bytes


def _keep_memory(size: int) -> None:
    """ Have the C library keep memory of this size (bytes), not get it from the system and return it at every call.

    glibc maps large chunks apart. Once such a chunk is freed, chunks up to its size come from the heap, and twice its
    size of free heap stays with the process; this holds for chunks of up to 32 MiB, where nothing else was set. One
    that nothing is written to takes no time.
    """
    global _kept
    if size > _kept:
        _kept = size
        torch.empty(min(size, 2**25 - 2**16), dtype=torch.uint8, device='cpu')


class Affine(nn.Module):
    """ Scale and shift of each channel of images (N, H, W, C), in fp32 and where possible in place.

    Args:
        scale: Scale (C,).
        shift: Shift (C,), or None where what follows has it.
        is_residual: Whether the result is added to the input of what precedes.
    """

    def __init__(self, scale: torch.Tensor, shift: Optional[torch.Tensor], is_residual: bool = False):
        super().__init__()
        self.is_residual = is_residual
        self.register_buffer('scale', scale)
        self.register_buffer('shift', shift)
        self.register_buffer('zero', torch.zeros_like(scale))
        self.register_buffer('one', torch.ones_like(scale))

    def prepare(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        scale, shift, zero, one, is_residual = self.scale, self.shift, self.zero, self.one, self.is_residual

        def affine(x: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
            if x.dtype != torch.float32:
                rows = x.view(-1, x.shape[-1])  # of mixed types
                x = F.batch_norm(rows, zero, one, scale, zero if shift is None else shift, eps=1e-12).view(x.shape)
            elif shift is not None:
                x = torch.addcmul(shift, x, scale, out=x)
            elif is_residual:
                return shortcut.addcmul_(x, scale)
            else:
                x = x.mul_(scale)
            return shortcut.add_(x) if is_residual else x

        return affine


class Pointwise(nn.Module):
    """ A pointwise convolution of some channels of images (N, H, W, C)."""

    def __init__(self, product: Product, dtype: torch.dtype):
        super().__init__()
        self.start, self.stop, self.out = product.start, product.stop, product.out
        self.register_buffer('weight', product.weight.to(dtype, copy=True))
        self.register_buffer('bias', product.bias.to(dtype, copy=True))

    def prepare(self, onednn: bool) -> Function:
        weight, bias, start, stop = self.weight, self.bias, self.start, self.stop
        if not onednn:
            return lambda x: F.linear(x[..., start:stop], weight, bias)
        if _multiplies_in_place(weight.dtype):
            weight = weight.T.contiguous()
            return lambda x: torch.addmm(bias, x.flatten(0, -2)[:, start:stop], weight).view(*x.shape[:-1], len(bias))
        linear = torch.ops.mkldnn._linear_pointwise.default
        weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        return lambda x: linear(x[..., start:stop], weight, bias, *_LAST[None])


class Convolution(nn.Module):
    """ A convolution of images (N, H, W, C).

    Args:
        weight: Weights (outputs, inputs / groups, kh, kw), from then on its own.
        bias: Biases (outputs,), likewise.
        dtype: Data type of images, weights and biases.
        stride: Stride.
        padding: Zero padding, or 'same'.
        groups: Number of groups.
        act: Activation of the output, as `activation` names it.
    """

    def __init__(
            self,
            weight: torch.Tensor,
            bias: torch.Tensor,
            dtype: torch.dtype,
            stride: Tuple[int, int] = (1, 1),
            padding: Union[str, Tuple[int, int]] = (0, 0),
            groups: int = 1,
            act: Optional[str] = None,
    ):
        super().__init__()
        kernel = weight.shape[2:]
        if padding == 'same' and all(size % 2 for size in kernel):
            padding = (kernel[0] // 2, kernel[1] // 2)
        self.stride, self.padding, self.groups, self.act = stride, padding, groups, act
        self.register_buffer('weight', weight.detach().to(dtype, copy=True))
        self.register_buffer('bias', bias.detach().to(dtype, copy=True))

    def _convolve(self, onednn: bool, act: Optional[str]) -> Function:
        weight, bias, stride, padding, groups = self.weight, self.bias, self.stride, self.padding, self.groups
        dilation, last = (1, 1), _LAST[act]
        if onednn and padding != 'same':
            convolution = torch.ops.mkldnn._convolution_pointwise.default
            # without a size of images it takes a slower layout; which size makes no difference, if the kernel fits
            size = (1, weight.shape[1] * groups, *(k + 31 * s for k, s in zip(weight.shape[2:], stride)))
            weight = torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, groups, size)

            def convolve(x: torch.Tensor) -> torch.Tensor:
                x = convolution(x.permute(0, 3, 1, 2), weight, bias, padding, stride, dilation, groups, *last)
                return x.permute(0, 2, 3, 1).contiguous()
        else:
            in_place = _IN_PLACE[act]

            def convolve(x: torch.Tensor) -> torch.Tensor:
                x = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride, padding, dilation, groups)
                return in_place(x.permute(0, 2, 3, 1).contiguous())

        return convolve

    def prepare(self, onednn: bool) -> Function:
        return self._convolve(onednn, self.act)


class AffineConvolution(Convolution):
    """ A depthwise k x 1 convolution after an affine, which is folded into it, with activation.

    Zero padding comes after the affine: rows at the border lack a part of the shift, which goes into the bias.

    Args:
        weight: Weights (C, 1, k, 1).
        bias: Biases (C,).
        scale: Scale of each channel.
        shift: Its shift.
        dtype: Data type of images, weights and biases.
        act: Activation, as `activation` names it.
    """

    def __init__(
            self,
            weight: torch.Tensor,
            bias: torch.Tensor,
            scale: torch.Tensor,
            shift: torch.Tensor,
            dtype: torch.dtype,
            act: str,
    ):
        parts = weight[:, 0, :, 0].T.float() * shift  # (k, C)
        super().__init__(
            weight.float() * scale.view(-1, 1, 1, 1), bias.float() + parts.sum(0), dtype, padding='same',
            groups=len(weight), act=act)
        self.above = (len(parts) - 1) // 2
        self.below = len(parts) - 1 - self.above
        # what the rows of the kernel beyond the border would add, for each of the rows that has such
        top = [parts[:self.above - h].sum(0) for h in range(self.above)]
        bottom = [parts[len(parts) - 1 - h:].sum(0) for h in range(self.below)]
        for name, rows in (('top', top), ('bottom', bottom)):
            self.register_buffer(name, torch.stack(rows)[:, None].to(dtype) if rows else None)

    def prepare(self, onednn: bool) -> Function:
        above, below, top, bottom = self.above, self.below, self.top, self.bottom
        convolve, in_place = self._convolve(onednn, None), _IN_PLACE[self.act]

        def affine_convolution(x: torch.Tensor) -> torch.Tensor:
            x = convolve(x)
            height = x.shape[1]
            if above:
                x[:, :above].sub_(top if height >= above else top[:height])
            if below:
                x[:, max(0, height - below):].sub_(bottom if height >= below else bottom[below - height:])
            return in_place(x)

        return affine_convolution


class Stage(nn.Module):
    """ Pointwise convolutions of images (N, H, W, C), which they overwrite, then activation.

    Args:
        products: As `segments` describes them.
        dtype: Data type of the weights.
        act: Activation of the output, as `activation` names it.
    """

    def __init__(self, products: List[Product], dtype: torch.dtype, act: Optional[str] = None):
        super().__init__()
        self.products = nn.ModuleList(Pointwise(product, dtype) for product in products)
        self.act = act

    def prepare(self, onednn: bool) -> Function:
        in_place = _IN_PLACE[self.act]
        products = [(product.prepare(onednn), product.out) for product in self.products]

        def stage(x: torch.Tensor) -> torch.Tensor:
            for out, where in [(product(x), where) for product, where in products]:
                x[..., where] = out
            return in_place(x)

        return stage


def _spatial(mixing: nn.Module, dtype: torch.dtype) -> Tuple[List[Convolution], Tuple[torch.Tensor, torch.Tensor]]:
    """ Convolutions of spatial mixing and the affine after the last one; that of the first goes into the second."""
    convs, affine = [], None
    for n in range(1, 3):
        if hasattr(mixing, f'conv{n}'):
            conv, act, norm = (getattr(mixing, f'{name}{n}') for name in ('conv', 'act', 'norm'))
            weight, bias, act = conv.weight.detach(), conv.bias.detach(), activation(act)
            if affine is None:
                convs.append(Convolution(weight, bias, dtype, padding='same', groups=conv.groups, act=act))
            else:
                convs.append(AffineConvolution(weight, bias, *affine, dtype, act))
            affine = fold_affine(norm)
    return convs, affine


def _are_groups(products: List[Product], dim: int) -> bool:
    """ Whether products are a convolution in groups, as those of types III and IV with equal segments."""
    size = products[0].stop
    groups = [(start, start + size, slice(start, start + size)) for start in range(0, dim, size)]
    return [(p.start, p.stop, p.out) for p in products] == groups


def _group(
        products: List[Product],
        dtype: torch.dtype,
        act: Optional[str],
        shift: Optional[torch.Tensor] = None,
) -> Convolution:
    """ Products as a convolution in groups, of what lacks a shift (C,) if given."""
    weight, bias = (torch.cat([getattr(p, name) for p in products]) for name in ('weight', 'bias'))
    if shift is not None:
        bias = bias + torch.cat([p.weight.float() @ shift[p.start:p.stop] for p in products])
    return Convolution(weight[..., None, None], bias, dtype, groups=len(products), act=act)


class Block(nn.Module):
    """ A block on images (N, H, W, C), which it may overwrite."""

    def __init__(self, block: SplitMixerBlock, dtype: torch.dtype):
        super().__init__()
        spatial, channel = block.spatial_mixing, block.channel_mixing
        self.spatial, self.channel = nn.ModuleList(), nn.ModuleList()
        self.spatial_affine = self.channel_affine = shift = None
        if not isinstance(spatial, nn.Identity):
            convs, (scale, shift) = _spatial(spatial, dtype)
            self.spatial.extend(convs)
        if not isinstance(channel, nn.Identity):
            stages, dim = segments(channel.mixer), channel.norm.num_features
            acts = [None] * (len(stages) - 1) + [activation(channel.act)]
            for products, act in zip(stages, acts):
                if not _are_groups(products, dim):
                    self.channel.append(Stage(products, dtype, act))
                elif len(self.channel) or block.channel_residual:
                    self.channel.append(_group(products, dtype, act))
                else:  # all channels go through it and none past it: its bias has the shift of spatial mixing
                    self.channel.append(_group(products, dtype, act, shift))
                    shift = None
            self.channel_affine = Affine(*fold_affine(channel.norm), block.channel_residual)
        if len(self.spatial):
            self.spatial_affine = Affine(scale, shift, block.spatial_residual)

    def prepare(self, onednn: bool) -> Function:
        mixings = []
        for parts, affine in ((self.spatial, self.spatial_affine), (self.channel, self.channel_affine)):
            if affine is not None:
                overwritten = affine.is_residual and any(isinstance(part, Stage) for part in parts)
                mixings.append(([part.prepare(onednn) for part in parts], affine.prepare(), overwritten))

        def block(x: torch.Tensor) -> torch.Tensor:
            for functions, affine, overwritten in mixings:
                out = x.clone() if overwritten else x
                for function in functions:
                    out = function(out)
                x = affine(out, x)
            return x

        return block


def _versioned(members: Dict[str, Any], name: str) -> Tuple[Any, Optional[int]]:
    """ A module or tensor of a module, and of a tensor the version, which an inference tensor comes to have by this."""
    member = members[name]
    if not isinstance(member, torch.Tensor):
        return member, None
    if member.is_inference():
        with torch.inference_mode(False):
            member = members[name] = member.clone()
    return member, member._version


class CompiledBlock(nn.Module):
    """ A block on images (N, H, W, C) by compiled kernels. What comes in and goes out lacks activation and norm."""

    def __init__(self, block: SplitMixerBlock, dtype: torch.dtype):
        super().__init__()
        spatial, channel = block.spatial_mixing, block.channel_mixing
        if not hasattr(spatial, 'conv2'):
            raise NotCompiled('spatial mixing other than by 1 x k and k x 1 kernels')
        if isinstance(channel, nn.Identity) or block.channel_residual:
            raise NotCompiled('blocks without channel mixing, or with a residual around it')
        self.dtype, self.spatial_residual = dtype, block.spatial_residual
        self.act1, self.act2, self.act = (activation(act) for act in (spatial.act1, spatial.act2, channel.act))
        for n, conv, norm in ((1, spatial.conv1, spatial.norm1), (2, spatial.conv2, spatial.norm2)):
            weight = conv.weight.detach().to(torch.float32, copy=True)
            self.register_buffer(f'weight{n}', weight.flatten(1).T.contiguous())
            self.register_buffer(f'bias{n}', conv.bias.detach().to(torch.float32, copy=True))
            scale, shift = fold_affine(norm)
            self.register_buffer(f'scale{n}', scale)
            self.register_buffer(f'shift{n}', shift)
        scale, shift = fold_affine(channel.norm)
        self.register_buffer('scale', scale)
        self.register_buffer('shift', shift)
        dim = channel.norm.num_features
        self.channel = nn.ModuleList(
            _group(products, dtype, None) if _are_groups(products, dim) else Stage(products, dtype)
            for products in segments(channel.mixer))

    def prepare(self, onednn: bool, has_kernels: bool, last: Tuple[torch.Tensor, torch.Tensor, str]) -> Function:
        """ The block.

        Args:
            onednn: Whether oneDNN computes the products.
            has_kernels: Whether compiled kernels do what lies between them.
            last: What the input lacks: scale and shift of a norm, and the activation before it.
        """
        stages = [stage.prepare(onednn) for stage in self.channel]
        parts = (
            *last, self.weight1, self.bias1, self.scale1, self.shift1, self.act1,
            self.weight2, self.bias2, self.scale2, self.shift2, self.act2, self.spatial_residual)
        mix = spatial_mixing_kernel(self.dtype, *parts) if has_kernels else lambda x: spatial_mixing(x, *parts)

        def block(x: torch.Tensor) -> torch.Tensor:
            x = mix(x)
            for stage in stages:
                x = stage(x)
            return x

        return block


class FusedSplitMixer(FusedModel):
    """ A `SplitMixer` in eval mode for a CPU; `build` makes it.

    Args:
        model: The model.
        dtype: Data type of features and logits: fp32 or bf16.
        compute_dtype: Data type that stem and blocks compute in and have their weights in. Affines stay in fp32.
    """
    block_type = Block

    def __init__(self, model: SplitMixer, dtype: torch.dtype, compute_dtype: torch.dtype):
        super().__init__(model, dtype, compute_dtype)
        conv, act, norm = model.stem
        self.stem = Convolution(conv.weight, conv.bias, compute_dtype, stride=conv.stride, act=activation(act))
        self.affine = Affine(*fold_affine(norm))
        self.blocks = nn.Sequential(*(self.block_type(block, compute_dtype) for block in model.blocks))
        self._prepared: Optional[Tuple[List[Step], List[Tuple[Any, ...]]]] = None
        self.eval()

    def _prepare(self, is_recorded: bool) -> List[Step]:
        """ What stem and blocks do."""
        onednn = not is_recorded and _has_onednn(self.compute_dtype)
        stem, affine = self.stem.prepare(onednn), self.affine.prepare()

        def embed(x: torch.Tensor) -> torch.Tensor:
            x = stem(x)
            return affine(x, x)

        return [Step(function) for function in (embed, *(block.prepare(onednn) for block in self.blocks))]

    def _functions(self) -> List[Step]:
        """ What runs, made anew where a tensor was changed, or a tensor or a module replaced."""
        prepared = self._prepared  # as other threads may replace it
        if prepared is None or any(
                members.get(name) is not member or len(members) != count
                or version is not None and member._version != version
                for members, count, name, member, version in prepared[1]):
            parts = {name: self._modules[name] for name in ('stem', 'affine', 'blocks')}
            state = [(self._modules, len(self._modules), name, part, None) for name, part in parts.items()]
            for module in (module for part in parts.values() for module in part.modules()):
                for members in (module._modules, module._buffers):
                    state += [(members, len(members), name, *_versioned(members, name)) for name in list(members)]
            self._prepared = prepared = self._prepare(is_recorded=False), state
        return prepared[0]

    def __getstate__(self) -> Dict[str, Any]:
        # a tensor in oneDNN's layout can be neither copied nor saved
        return {**super().__getstate__(), '_prepared': None}

    def _split(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """ A batch in pieces whose features fit the cache."""
        (kernel, _), (stride, _) = self.stem.weight.shape[2:], self.stem.stride
        H, W = ((size - kernel) // stride + 1 for size in x.shape[2:])
        image = H * W * self.num_features * self.compute_dtype.itemsize
        count = max(1, PIECE_BYTES * torch.get_num_threads() // image)
        _keep_memory(4 * min(count, len(x)) * image)  # what a block takes at most
        return x.split(count)

    def _pieces(
            self,
            x: torch.Tensor,
            taken: Sequence[int] = (),
            depth: Optional[int] = None,
            is_pooled: bool = False,
    ) -> Iterator[List[torch.Tensor]]:
        """ `_features` of the batch, a few images at a time, or only what `global_pool` makes of the last ones."""
        self._check_input(x)
        is_recorded = _is_recorded()
        step, *blocks = self._prepare(is_recorded) if is_recorded else self._functions()
        for piece in (x,) if is_recorded else self._split(x):
            piece, features = step.function(piece.to(self.compute_dtype).permute(0, 2, 3, 1)), []
            last = step
            for i, last in enumerate(blocks[:depth]):
                piece = last.function(piece)
                if i in taken:
                    # the next block may overwrite it
                    features.append(piece.clone() if last.complete is None else last.complete(piece))
            if is_pooled and last.pool is not None:
                yield [last.pool(piece).to(self.dtype)]
                continue
            if len(blocks[:depth]) - 1 in taken:
                features.append(features[-1])
            else:
                features.append(piece if last.complete is None else last.complete(piece))
            features = [x.permute(0, 3, 1, 2).to(self.dtype) for x in features]
            yield [self.global_pool(features[-1])] if is_pooled else features

    @_without_autocast
    def _features(self, x: torch.Tensor, taken: Sequence[int] = (), depth: Optional[int] = None) -> List[torch.Tensor]:
        batch, start = [], 0
        for pieces in self._pieces(x, taken, depth):
            if len(pieces[0]) == len(x):
                return pieces
            batch = batch or [
                torch.empty(
                    (len(x), *piece.shape[1:]), dtype=self.dtype, device='cpu', memory_format=torch.channels_last)
                for piece in pieces]
            for features, piece in zip(batch, pieces):
                features[start:start + len(piece)] = piece
            start += len(pieces[0])
        return batch

    @torch.no_grad()
    @_without_autocast
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = (self.global_pool, self.head_drop, self.head)
        if is_everything_watched() or any(
                type(part) not in ROW_WISE or any(map(is_watched, part.modules())) for part in parts):
            # who looks on, or is not known, is to have the whole batch
            return self.forward_head(self.forward_features(x))
        # forward_head, but for features that need not be made to be averaged
        pool = self.global_pool
        if (
                type(pool) is SelectAdaptivePool2d and type(pool.flatten) is nn.Flatten
                and type(pool.pool) is nn.AdaptiveAvgPool2d and pool.pool.output_size == 1
                and 'forward_head' not in self.__dict__
        ):
            logits = [self.head(self.head_drop(pooled)) for pooled, in self._pieces(x, is_pooled=True)]
        else:
            logits = [self.forward_head(features) for features, in self._pieces(x)]
        return logits[0] if len(logits) == 1 else torch.cat(logits)


def _missing_kernels() -> Optional[str]:
    """ Why there are no compiled kernels, None if there are."""
    try:
        library()
    except Exception as e:
        # of a compiler's error the command comes first, which is long, and the reason last
        return f'want of a C++ compiler that works ({type(e).__name__}: {str(e).strip()[-400:]})'
    return None


def _has_kernels() -> bool:
    """ Whether there are compiled kernels; if not, a warning says why."""
    missing = _missing_kernels()
    if missing:
        warnings.warn(f'A model optimized with compile=True runs without kernels for {missing}.', stacklevel=1)
    return not missing


class CompiledSplitMixer(FusedSplitMixer):
    """ The form with compiled kernels between the products. A block's activation and norm are done by the next one.

    Where one that was saved is loaded and there is no compiler, torch's operations do what the kernels would.
    """
    block_type = CompiledBlock

    def __init__(self, model: SplitMixer, dtype: torch.dtype, compute_dtype: torch.dtype):
        super().__init__(model, dtype, compute_dtype)
        self.act, self.stem.act = self.stem.act, None

    def _prepare(self, is_recorded: bool) -> List[Step]:
        onednn = not is_recorded and _has_onednn(self.compute_dtype)
        has_kernels = not is_recorded and _has_kernels()

        def step(function: Function, *last: Any) -> Step:
            if has_kernels:
                return Step(function, act_affine_kernel(self.compute_dtype, *last))
            return Step(function, lambda x: act_affine(x, *last))

        last = self.affine.scale, self.affine.shift, self.act
        steps = [step(self.stem.prepare(onednn), *last)]
        for block in self.blocks:
            function = block.prepare(onednn, has_kernels, last)
            last = block.scale, block.shift, block.act
            steps.append(step(function, *last))
        if has_kernels:
            steps[-1] = steps[-1]._replace(pool=act_affine_mean_kernel(self.compute_dtype, *last))
        return steps


@torch.inference_mode(False)  # tensors of inference mode do not tell that they were changed
def build(model: SplitMixer, dtype: torch.dtype, compile: bool = False) -> FusedSplitMixer:
    """ Fused form of a model in eval mode on a CPU; the model stays as it is.

    Args:
        model: The model.
        dtype: Data type of features and logits: fp32, or bf16, which is also what it computes in where the processor
            has that.
        compile: Whether what lies between the products is done by compiled kernels.

    Raises:
        Unsupported: If the model or `dtype` is not covered, `NotCompiled` if it is without `compile`; the message says
            why.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise Unsupported(f'{dtype} on a CPU')
    check_supported(model)
    form = CompiledSplitMixer if compile else FusedSplitMixer
    fused = form(model, dtype, dtype if has_bfloat16() else torch.float32)
    if compile and (missing := _missing_kernels()):
        raise NotCompiled(missing)
    fused._functions()  # now, not at the first call
    return fused
