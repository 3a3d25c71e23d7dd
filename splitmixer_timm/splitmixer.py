""" SplitMixer

A ConvMixer made slim: the depthwise k x k kernel becomes two 1D depthwise kernels (spatial mixing), and the pointwise
h x h convolution becomes pointwise convolutions over segments of the channels (channel mixing).

Paper: `SplitMixer: Fat Trimmed From MLP-like Models` - https://arxiv.org/abs/2207.10255

Written from the paper. The one departure from its wording is the 3D channel mixing: a 3D convolution whose kernel
spans only channels is a pointwise convolution shared by the segments it slides over, and is computed as one.
"""
import copy
import inspect
import math
import operator
from collections import OrderedDict
from functools import partial
from types import FunctionType
from typing import Any, Callable, Dict, List, Optional, Tuple, Type, Union

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    GELU,
    DropPath,
    SelectAdaptivePool2d,
    _assert,
    calculate_drop_path_rates,
    get_act_layer,
    get_device_dtype,
    get_norm_layer,
    register_notrace_module,
    unfreeze_batch_norm_2d,
)
from timm.models import (
    ConvMixer,
    build_model_with_cfg,
    checkpoint,
    checkpoint_seq,
    clean_state_dict,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models._features import feature_take_indices
from torchvision.ops.misc import FrozenBatchNorm2d

from . import layers, manifest

__all__ = ['SplitMixer', 'checkpoint_filter_fn']

CHANNEL_MIXING = ('i', 'ii', 'iii', 'iv', 'v', '3d', 'full', 'none')
SPATIAL_MIXING = ('1d', '2d', 'none')

_NORM_LAYERS = {
    name: get_norm_layer(name)
    for name in (
        'batchnorm2d', 'layernorm2d', 'layernorm2dfp32', 'rmsnorm2d', 'rmsnorm2dfp32', 'groupnorm', 'groupnorm1')
}
# Norms over the last dimension: of features as wide as `dim` they would normalise the wrong axis, without an error.
_LAST_DIM_NORMS = {
    nn.LayerNorm, nn.RMSNorm,
    *(get_norm_layer(name) for name in (
        'layernorm', 'layernormfp32', 'rmsnorm', 'rmsnormfp32', 'simplenorm', 'simplenormfp32')),
}


def _integer(name: str, value: Any, low: int) -> int:
    """ Integer of at least `low` from an int or its decimal string, never from a bool or a float."""
    try:
        number = int(value) if isinstance(value, str) else operator.index(value)
    except (TypeError, ValueError):
        number = None
    if number is None or isinstance(value, bool) or number < low:
        raise ValueError(f'{name} must be an integer of at least {low}, got {value!r}.')
    return number


def _number(name: str, value: Any, allowed: str, is_allowed: Callable[[float], bool]) -> float:
    """ Float from a number, its string, or a fraction as a string ('6/11' is exactly 6 / 11 in double precision)."""
    number = math.nan
    if not isinstance(value, bool):
        try:
            if isinstance(value, str) and '/' in value:
                numerator, denominator = value.split('/')
                number = float(numerator) / float(denominator)
            else:
                number = float(value)
        except (TypeError, ValueError, ZeroDivisionError):
            pass
    if math.isnan(number) or not is_allowed(number):
        raise ValueError(f'{name} must be {allowed}, got {value!r}.')
    return number


def _rate(name: str, value: Any) -> float:
    return _number(name, value, 'a number in [0, 1)', lambda v: 0. <= v < 1.)


def _flag(name: str, value: Any) -> bool:
    """ Bool from a bool or from 'true' / 'false' (any case), as model kwargs on a command line and in YAML come."""
    if isinstance(value, str) and value.lower() in ('true', 'false'):
        return value.lower() == 'true'
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False (or 'true' or 'false'), got {value!r}.")
    return value


def _choice(name: str, value: Any, choices: Tuple[str, ...]) -> str:
    if not isinstance(value, str) or value.lower() not in choices:
        raise ValueError(f'{name} must be one of {", ".join(map(repr, choices))}, got {value!r}.')
    return value.lower()


def resolve_act_layer(act_layer: Union[str, Callable[..., nn.Module]]) -> Callable[..., nn.Module]:
    """ Activation of that name, or the one that is given; a ValueError if it is neither."""
    try:
        layer = get_act_layer(act_layer)
    except KeyError:
        layer = None
    if not callable(layer) or isinstance(layer, nn.Module):
        raise ValueError(
            f"act_layer must be a module class or the name of one of timm's activations ('gelu', 'relu', 'silu', "
            f"'hard_swish', ...), got {act_layer!r}.")
    return layer


def _resolve_norm_layer(norm_layer: Union[str, Callable[..., nn.Module]]) -> Callable[..., nn.Module]:
    if not isinstance(norm_layer, str):
        if not isinstance(norm_layer, (type, FunctionType, partial)):  # as timm has it
            raise ValueError(f'norm_layer must be a module class or a name, got {norm_layer!r}.')
        layer = norm_layer
        while isinstance(layer, partial):
            layer = layer.func
        if layer in _LAST_DIM_NORMS:
            raise ValueError(
                f"norm_layer must be a norm over the channels of (N, C, H, W), as 'layernorm2d' and 'rmsnorm2d' are, "
                f'got {norm_layer!r}, which is one over the last dimension.')
        return get_norm_layer(norm_layer)
    name = norm_layer.replace('_', '').lower()
    # features are NCHW: of the norms of a name, the one over channels is timm's '2d' layer
    layer = _NORM_LAYERS.get(name, _NORM_LAYERS.get(name + '2d'))
    if layer is None:
        raise ValueError(f'norm_layer must be a module class or one of {", ".join(map(repr, _NORM_LAYERS))} '
                         f"(the '2d' may be left out), got {norm_layer!r}.")
    return layer


def copy_model(model: nn.Module) -> nn.Module:
    """ Deep copy of a model, weights that hooks compute from others (pruning, weight norm) as they are now."""
    computed = [
        tensor for module in model.modules() for tensor in vars(module).values()
        if isinstance(tensor, torch.Tensor) and not tensor.is_leaf]
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in computed})


def thawed(model: nn.Module) -> nn.Module:
    """ The model, or where timm's `freeze` replaced norms, a copy that has them as BatchNorm2d again."""
    frozen = [module for module in model.modules() if type(module) is FrozenBatchNorm2d]
    if frozen and not any(map(layers.is_watched, frozen)):  # whose hooks would be lost
        return unfreeze_batch_norm_2d(copy_model(model)).train(model.training)
    return model


class SegmentMixing(nn.Module):
    """ Pointwise convolution of the channels [start, stop), the others pass unchanged (types I, II and, over all
    channels, full)."""

    def __init__(self, dim: int, start: int, stop: int, device=None, dtype=None):
        super().__init__()
        self.sizes = [start, stop - start, dim - stop]
        self.is_first = start == 0
        self.is_last = stop == dim
        self.conv = nn.Conv2d(stop - start, stop - start, kernel_size=1, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # split, not slices: its backward is one concatenation where each slice would fill and add a whole tensor
        if self.is_first and self.is_last:
            return self.conv(x)
        if self.is_first:
            segment, after = x.split_with_sizes(self.sizes[1:], dim=1)
            return torch.cat((self.conv(segment), after), dim=1)
        if self.is_last:
            before, segment = x.split_with_sizes(self.sizes[:2], dim=1)
            return torch.cat((before, self.conv(segment)), dim=1)
        before, segment, after = x.split_with_sizes(self.sizes, dim=1)
        return torch.cat((before, self.conv(segment), after), dim=1)

    def update(self, x: torch.Tensor) -> torch.Tensor:
        """ `forward` that may overwrite its input, of which the other channels are then not even read."""
        if self.is_first and self.is_last:
            return self.conv(x)
        segment = x.narrow(1, self.sizes[0], self.sizes[1])
        y = self.conv(segment)
        if y.shape != segment.shape or torch.promote_types(x.dtype, y.dtype) != x.dtype:  # of a conv put in its place
            return self(x)
        segment.copy_(y)
        return x


class SharedSegmentMixing(nn.Module):
    """ One pointwise convolution shared by all `num_segments` equal segments (type III)."""

    def __init__(self, dim: int, num_segments: int, device=None, dtype=None):
        super().__init__()
        self.num_segments = num_segments
        self.segment_dim = dim // num_segments
        self.conv = nn.Conv2d(self.segment_dim, self.segment_dim, kernel_size=1, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            # who looks on, or traces, would see all segments as a batch of more, or of wider, images
            is_alone = layers.is_pointwise(self.conv, self.segment_dim) and not layers.is_everything_watched()
            if is_alone and not layers.is_symbolic(x) and layers.has_known_size(x):
                return layers.unpack_segments(self.conv(layers.pack_segments(x, self.num_segments)), x)
        segments = x.chunk(self.num_segments, dim=1)
        return torch.cat([self.conv(segments[i]) for i in range(self.num_segments)], dim=1)


class SeparateSegmentMixing(nn.Module):
    """ A pointwise convolution for each segment, the last segment takes the remainder (type IV)."""

    def __init__(self, dim: int, num_segments: int, device=None, dtype=None):
        super().__init__()
        size = dim // num_segments
        self.sizes = [size] * (num_segments - 1) + [dim - size * (num_segments - 1)]
        self.convs = nn.ModuleList([nn.Conv2d(s, s, kernel_size=1, device=device, dtype=dtype) for s in self.sizes])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            # on a CPU one grouped convolution, unless somebody would see that none of theirs is called
            if (
                    not layers.is_symbolic(x) and x.is_cpu and self.sizes[0] == self.sizes[-1]
                    and all(map(layers.is_pointwise, self.convs, self.sizes)) and not layers.is_everything_watched()
            ):
                weight = torch.cat([conv.weight for conv in self.convs])
                bias = torch.cat([conv.bias for conv in self.convs])
                return nn.functional.conv2d(x, weight, bias, groups=len(self.convs))
        segments = x.split_with_sizes(self.sizes, dim=1)
        maps = [segments[i] for i in range(len(self.sizes))]
        for conv in self.convs:  # in turn: a list of convolutions TorchScript would fuse to what inference mode refuses
            maps = maps[1:] + [conv(maps[0])]
        return torch.cat(maps, dim=1)


@register_notrace_module  # a node of timm's feature graphs, which train by it as fast as the model
class SlidingSegmentMixing(nn.Module):
    """ One pointwise convolution slid over overlapping segments, `dim / n` maps from each of the n segments (type 3D).

    Equal to a 3D convolution with kernel (kernel_size, 1, 1) and stride (stride, 1, 1) over the channel axis whose
    (maps, segments) output is flattened to channels in that order.
    """

    def __init__(self, dim: int, kernel_size: int, stride: int, device=None, dtype=None):
        super().__init__()
        self.kernel_size = kernel_size
        self.starts = list(range(0, dim - kernel_size + 1, stride))
        self.conv = nn.Conv2d(kernel_size, dim // len(self.starts), kernel_size=1, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and not layers.is_symbolic(x):
            maps = [self.conv(layers.take_segment(x, start, self.kernel_size)) for start in self.starts]
            return layers.interleave(maps)
        return layers.interleave([self.conv(x.narrow(1, start, self.kernel_size)) for start in self.starts])


def _create_mixer(
        dim: int,
        index: int,
        channel_mixing: str,
        overlap_ratio: float,
        num_segments: int,
        alternate_segments: bool,
        channel_kernel_size: int,
        channel_stride: int,
        **dd,
) -> nn.Module:
    """ The channel convolution(s) of block `index`, arguments as checked by `SplitMixer`."""
    turn = index if alternate_segments else 0
    if channel_mixing == 'i':
        size = int(dim * overlap_ratio)
        start = dim - size if turn % 2 else 0
        return SegmentMixing(dim, start, start + size, **dd)
    if channel_mixing == 'ii':
        size = dim // num_segments
        segment = turn % num_segments
        return SegmentMixing(dim, segment * size, dim if segment == num_segments - 1 else (segment + 1) * size, **dd)
    if channel_mixing == 'iii':
        return SharedSegmentMixing(dim, num_segments, **dd)
    if channel_mixing == 'iv':
        return SeparateSegmentMixing(dim, num_segments, **dd)
    if channel_mixing == 'v':
        size = int(dim * overlap_ratio)
        return nn.Sequential(SegmentMixing(dim, 0, size, **dd), SegmentMixing(dim, dim - size, dim, **dd))
    if channel_mixing == '3d':
        return SlidingSegmentMixing(dim, channel_kernel_size, channel_stride, **dd)
    return SegmentMixing(dim, 0, dim, **dd)


def _check_mixer_args(
        dim: int,
        channel_mixing: str,
        overlap_ratio: Union[float, str],
        num_segments: int,
        alternate_segments: bool,
        channel_kernel_size: Optional[int],
        channel_stride: Optional[int],
) -> Dict[str, Any]:
    """ Parsed arguments of `_create_mixer`, or a ValueError."""
    kind = _choice('channel_mixing', channel_mixing, CHANNEL_MIXING)
    ratio = _number('overlap_ratio', overlap_ratio, 'a number between 1/2 and 1', lambda v: 0.5 < v < 1.)
    segments = _integer('num_segments', num_segments, low=2)
    alternate = _flag('alternate_segments', alternate_segments)

    # refuse an argument that this type of mixing would ignore
    for name, is_given, kinds in (
            ('overlap_ratio', ratio != 2 / 3, ('i', 'v')),
            ('num_segments', segments != 2, ('ii', 'iii', 'iv')),
            ('alternate_segments', not alternate, ('i', 'ii')),
            ('channel_kernel_size', channel_kernel_size is not None, ('3d',)),
            ('channel_stride', channel_stride is not None, ('3d',)),
    ):
        if is_given and kind not in kinds:
            raise ValueError(
                f'{name} applies to channel_mixing {", ".join(map(repr, kinds))} only, got channel_mixing={kind!r}.')

    if kind in ('i', 'v') and int(dim * ratio) < 1:
        raise ValueError(f'dim * overlap_ratio must be at least 1 channel, got dim={dim}, overlap_ratio={ratio}.')
    if kind in ('ii', 'iii', 'iv') and segments > dim:
        raise ValueError(f'num_segments must be an integer from 2 to dim={dim}, got {num_segments!r}.')
    if kind == 'iii' and dim % segments:
        raise ValueError(
            f"num_segments must divide dim={dim} for channel_mixing='iii' (its segments share a convolution), "
            f'got {num_segments!r}.')
    kernel_size = stride = 0
    if kind == '3d':
        kernel_size = int(2 * dim / 3) if channel_kernel_size is None else \
            _integer('channel_kernel_size', channel_kernel_size, low=1)
        if not 1 <= kernel_size <= dim:
            raise ValueError(f'channel_kernel_size must be an integer from 1 to dim={dim}, got {kernel_size}.')
        # a kernel over all channels has one position, whatever the stride
        stride = max(dim - kernel_size, 1) if channel_stride is None else \
            _integer('channel_stride', channel_stride, low=1)
        if (dim - kernel_size) % stride:
            raise ValueError(
                f'channel_stride must divide dim - channel_kernel_size = {dim - kernel_size}, got {stride}.')
        positions = (dim - kernel_size) // stride + 1
        if dim % positions:
            raise ValueError(
                f'channel_kernel_size and channel_stride must give a number of segments that divides dim={dim}, '
                f'got {positions} from channel_kernel_size={kernel_size}, channel_stride={stride}.')
    return dict(
        channel_mixing=kind,
        overlap_ratio=ratio,
        num_segments=segments,
        alternate_segments=alternate,
        channel_kernel_size=kernel_size,
        channel_stride=stride,
    )


class SplitMixerBlock(nn.Module):
    """ Spatial mixing, then channel mixing, each with an optional residual.

    Args:
        spatial_mixing: Module that mixes positions, identity for none.
        channel_mixing: Module that mixes channels, identity for none.
        spatial_residual: Add the block's input to the output of spatial mixing.
        channel_residual: Add the input of channel mixing to its output.
        drop_path: Probability to drop a residual branch in training.
    """

    def __init__(
            self,
            spatial_mixing: nn.Module,
            channel_mixing: nn.Module,
            spatial_residual: bool = True,
            channel_residual: bool = False,
            drop_path: float = 0.,
    ):
        super().__init__()
        self.spatial_residual = spatial_residual
        self.channel_residual = channel_residual
        self.spatial_mixing = spatial_mixing
        self.channel_mixing = channel_mixing
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # x is rebound: a second name would keep the previous tensor alive
        if self.spatial_residual:
            x = x + self.drop_path(self.spatial_mixing(x))
        else:
            x = self.spatial_mixing(x)
        if self.channel_residual:
            return x + self.drop_path(self.channel_mixing(x))
        return self.channel_mixing(x)

    def infer(self, x: torch.Tensor) -> torch.Tensor:
        """ `forward` in eval mode, without gradients, where nobody sees the features in between: in a sum that is its
        own, it has segments overwritten."""
        if not self.spatial_residual or self.channel_residual:
            return self(x)
        x = x + self.drop_path(self.spatial_mixing(x))
        for step in _steps(self.channel_mixing):
            x = step.update(x) if type(step) is SegmentMixing else step(x)
        return x


def _steps(module: nn.Module) -> List[nn.Module]:
    """ What a module calls in turn."""
    return [step for child in module for step in _steps(child)] if type(module) is nn.Sequential else [module]


# Modules that treat every image of a batch by itself in eval mode, BatchNorm where it has running statistics
INDEPENDENT = [
    SplitMixerBlock, SegmentMixing, SharedSegmentMixing, SeparateSegmentMixing, SlidingSegmentMixing,
    layers.AxisConv2d, layers.ChannelsLastGELU, nn.Sequential, nn.ModuleList, nn.Conv2d, nn.Identity, DropPath,
    nn.BatchNorm2d, FrozenBatchNorm2d, nn.GELU, GELU, nn.ReLU]
PIECE_BYTES = 2**20  # of features per core and piece: more leaves the cache, less leaves cores idle


class SplitMixer(nn.Module):
    """ SplitMixer-A-h/b: `depth` (b) isotropic blocks of width `dim` (h) with channel mixing of type A.

    Paper: https://arxiv.org/abs/2207.10255, section 3. `spatial_mixing='2d', channel_mixing='full'` is ConvMixer.

    Numbers and flags may be given as strings, as timm's `--model-kwargs` and YAML files pass them, ratios as
    fractions too ('6/11').

    Input is (N, in_chans, H, W) with H and W of at least `patch_size`, output (N, num_classes).

    Args:
        dim: Number of channels of every block (h).
        depth: Number of blocks (b).
        kernel_size: Size of the depthwise kernels (k), zero padded to keep the resolution.
        patch_size: Kernel size of the patch embedding (p).
        patch_stride: Stride of the patch embedding, `patch_size` if None; less makes the patches overlap.
        channel_mixing: 'i', 'ii', 'iii', 'iv', 'v' or '3d' of the paper, 'full' (one dim x dim convolution) or
            'none' (no channel mixing at all).
        overlap_ratio: Segment size as a share of `dim` (alpha), 1/2 < overlap_ratio < 1, for 'i' and 'v'.
        num_segments: Number of segments (s), for 'ii', 'iii' and 'iv'.
        alternate_segments: Move on to the next segment in the next block, for 'i' and 'ii'; the first one in every
            block if False.
        channel_kernel_size: Number of channels that the kernel of '3d' spans, int(2 * dim / 3) if None.
        channel_stride: Number of channels from one position of the kernel of '3d' to the next,
            dim - channel_kernel_size if None.
        spatial_mixing: '1d' (1 x k, then k x 1), '2d' (k x k, as in ConvMixer) or 'none'.
        spatial_residual: Add the input of spatial mixing to its output.
        channel_residual: Add the input of channel mixing to its output.
        in_chans: Number of input channels.
        num_classes: Number of classes, 0 for no classifier.
        global_pool: Type of global pooling: 'avg', 'max', 'avgmax', 'catavgmax', or '' for none.
        drop_rate: Dropout rate before the classifier.
        drop_path_rate: Stochastic depth rate of the residual branches, growing linearly over the blocks to this.
        act_layer: Activation, a module class or timm's name for one.
        norm_layer: Norm over channels, a module class or timm's name for one ('layernorm2d', ...).
        device: Device to create parameters on.
        dtype: Data type of the parameters.

    Raises:
        ValueError: If an argument is out of range or of the wrong kind, is one that the type of channel mixing does not
            have, or asks for a residual branch, or stochastic depth of one, that the blocks do not have.
    """

    def __init__(
            self,
            dim: int,
            depth: int,
            kernel_size: int = 5,
            patch_size: int = 2,
            patch_stride: Optional[int] = None,
            channel_mixing: str = 'i',
            overlap_ratio: Union[float, str] = 2 / 3,
            num_segments: int = 2,
            alternate_segments: bool = True,
            channel_kernel_size: Optional[int] = None,
            channel_stride: Optional[int] = None,
            spatial_mixing: str = '1d',
            spatial_residual: bool = True,
            channel_residual: bool = False,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            act_layer: Union[str, Type[nn.Module]] = nn.GELU,
            norm_layer: Union[str, Type[nn.Module]] = nn.BatchNorm2d,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        dim = _integer('dim', dim, low=1)
        depth = _integer('depth', depth, low=1)
        kernel_size = _integer('kernel_size', kernel_size, low=1)
        patch_size = _integer('patch_size', patch_size, low=1)
        patch_stride = patch_size if patch_stride is None else _integer('patch_stride', patch_stride, low=1)
        in_chans = _integer('in_chans', in_chans, low=1)
        num_classes = _integer('num_classes', num_classes, low=0)
        drop_rate = _rate('drop_rate', drop_rate)
        drop_path_rate = _rate('drop_path_rate', drop_path_rate)
        spatial_mixing = _choice('spatial_mixing', spatial_mixing, SPATIAL_MIXING)
        has_spatial = spatial_mixing != 'none'
        spatial_residual = _flag('spatial_residual', spatial_residual) and has_spatial
        channel_residual = _flag('channel_residual', channel_residual)
        act_layer = resolve_act_layer(act_layer)
        if act_layer in (nn.GELU, GELU):
            act_layer = layers.ChannelsLastGELU
        norm_layer = _resolve_norm_layer(norm_layer)
        mixer_args = _check_mixer_args(
            dim, channel_mixing, overlap_ratio, num_segments, alternate_segments, channel_kernel_size, channel_stride)
        has_channel = mixer_args['channel_mixing'] != 'none'
        if not has_spatial and not has_channel:
            raise ValueError("spatial_mixing and channel_mixing must not both be 'none'.")
        if channel_residual and not has_channel:
            raise ValueError("channel_residual must be False where channel_mixing is 'none'.")
        if drop_path_rate > 0. and not (spatial_residual or channel_residual):
            raise ValueError(
                f'drop_path_rate must be 0 where a block has no residual branch to drop, got {drop_path_rate!r}.')

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.patch_size = patch_size
        self.kernel_size = kernel_size if has_spatial else 0
        self.num_features = dim
        self.grad_checkpointing = False

        def act_norm() -> Tuple[nn.Module, nn.Module]:
            return act_layer().to(**dd), norm_layer(dim, **dd)

        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_stride, **dd),
            *act_norm(),
        )
        convs = {
            '1d': ((layers.AxisConv2d, (1, kernel_size)), (layers.AxisConv2d, (kernel_size, 1))),
            '2d': ((nn.Conv2d, (kernel_size, kernel_size)),),
            'none': (),
        }[spatial_mixing]
        blocks = []
        for i, drop_path in enumerate(calculate_drop_path_rates(drop_path_rate, depth)):
            spatial = OrderedDict()
            for n, (conv, kernel) in enumerate(convs, start=1):
                spatial[f'conv{n}'] = conv(dim, dim, kernel, groups=dim, padding='same', **dd)
                spatial[f'act{n}'], spatial[f'norm{n}'] = act_norm()
            channel = OrderedDict()
            if has_channel:
                channel['mixer'] = _create_mixer(dim, i, **mixer_args, **dd)
                channel['act'], channel['norm'] = act_norm()
            blocks.append(SplitMixerBlock(
                nn.Sequential(spatial) if spatial else nn.Identity(),
                nn.Sequential(channel) if channel else nn.Identity(),
                spatial_residual=spatial_residual,
                channel_residual=channel_residual,
                drop_path=drop_path,
            ))
        self.blocks = nn.Sequential(*blocks)
        self.ends_in_sum = channel_residual or spatial_residual and not has_channel
        self.feature_info = [dict(num_chs=dim, reduction=patch_stride, module=f'blocks.{i}') for i in range(depth)]

        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(self.head_hidden_size, num_classes, **dd) if num_classes > 0 else nn.Identity()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """ Regular expressions that group parameters by depth, for layer-wise learning rates."""
        return dict(stem=r'^stem', blocks=r'^blocks\.(\d+)')

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """ Recompute the blocks' activations in the backward pass instead of storing them."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """ The classifier, identity for `num_classes=0`."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """ Replace the classifier and, if given, the pooling.

        Args:
            num_classes: Number of classes, 0 for no classifier.
            global_pool: Type of global pooling, '' for none; None leaves it as it is.
        """
        dd = get_device_dtype(self)
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
            self.global_pool.train(self.training)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.head = nn.Linear(self.head_hidden_size, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)

    def _has_own_stem(self) -> bool:
        """ Whether the patch embedding is the original: one in its place checks its own input."""
        conv = self.stem[0] if isinstance(self.stem, nn.Sequential) and len(self.stem) else None
        return type(conv) is nn.Conv2d and (conv.in_channels, conv.kernel_size, conv.padding) == (
            self.in_chans, (self.patch_size, self.patch_size), (0, 0))

    def _check_input(self, x: torch.Tensor) -> None:
        _assert(x.dim() == 4, f'Input must have 4 dimensions (N, in_chans, H, W), got {x.dim()}.')
        channels, height, width, patch = x.shape[1], x.shape[2], x.shape[3], self.patch_size
        if not torch.jit.is_scripting():  # cannot tell whether the convolution is another by now, which says it itself
            _assert(channels == self.in_chans, f'Input must have in_chans={self.in_chans} channels, got {channels}.')
        got_height, got_width = '', ''
        if torch.jit.is_scripting():
            got_height, got_width = f', got {height}', f', got {width}'
        elif not torch.compiler.is_compiling():  # a message with a size would specialise the graph to it
            got_height, got_width = f', got {height}', f', got {width}'
        _assert(height >= patch, f'Input height must be at least patch_size={patch}{got_height}.')
        _assert(width >= patch, f'Input width must be at least patch_size={patch}{got_width}.')

    def _embed(self, x: torch.Tensor) -> torch.Tensor:
        """ Images to the input of the first block."""
        if torch.jit.is_scripting():
            self._check_input(x)
        elif self._has_own_stem() and not torch.jit.is_tracing():  # sizes are tensors there, and checked but once
            self._check_input(x)
        x = self.stem(layers.to_fast_format(x))
        x = layers.to_fast_format(x)  # an image of one channel does not tell its format
        return layers.to_square_format(x, self.kernel_size) if self.kernel_size > 1 else x

    @torch.jit.ignore
    def _piece_size(self, x: torch.Tensor) -> int:
        """ Images that the blocks take at a time in inference on a CPU, 0 for all at once, by `forward`.

        A few stay in its cache, where a whole batch is fetched from memory by each layer. Only where nothing can tell
        the difference.
        """
        if (
                torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()
                or type(x) is not torch.Tensor or x.device.type != 'cpu' or layers.is_everything_watched()
                or layers.has_modes() or layers.is_transformed(x)
        ):
            return 0
        for module in self.blocks.modules():
            if (
                    type(module) not in INDEPENDENT or module.training
                    or layers.is_watched(module)
                    or isinstance(module, nn.BatchNorm2d) and module.running_mean is None
            ):
                return 0
        return max(1, PIECE_BYTES * torch.get_num_threads() * len(x) // max(1, x.nbytes))

    @torch.jit.ignore
    def _infer(self, x: torch.Tensor, size: int) -> torch.Tensor:
        """ Features through all blocks, `size` images at a time."""
        blocks, pieces = _steps(self.blocks), []
        for piece in x.split(size):
            for block in blocks:
                piece = block.infer(piece) if type(block) is SplitMixerBlock else block(piece)
            pieces.append(piece)
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """ Forward features that returns intermediates.

        Args:
            x: Images (N, in_chans, H, W).
            indices: Take last n blocks if int, all if None, select matching indices if sequence.
            norm: Apply norm layer to compatible intermediates (unused, no final norm).
            stop_early: Stop iterating over blocks when last desired intermediate hit.
            output_fmt: Shape of intermediate feature outputs, must be 'NCHW'.
            intermediates_only: Only return intermediate features.

        Returns:
            Features (N, dim, H / stride, W / stride) and list of intermediate features or just the latter.

        Raises:
            AssertionError: If `output_fmt` is another.
        """
        assert output_fmt in ('NCHW',), 'Output shape must be NCHW.'
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)

        x = self._embed(x)
        if torch.jit.is_scripting() or not stop_early:  # can't slice blocks in torchscript
            blocks = self.blocks
        else:
            blocks = self.blocks[:max_index + 1]
        for i, blk in enumerate(blocks):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(blk, x)
            else:
                x = blk(x)
            if i in take_indices:
                intermediates.append(x)

        if intermediates_only:
            return intermediates

        return x, intermediates

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """ Prune layers not required for specified intermediates.

        Args:
            indices: Indices of intermediate layers to keep.
            prune_norm: Whether to prune normalization layers (unused, no final norm).
            prune_head: Whether to prune the classifier head.

        Returns:
            List of indices that were kept.
        """
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[:max_index + 1]
        if prune_head:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """ Images (N, in_chans, H, W) to features (N, dim, H / stride, W / stride), in channels_last on a CPU and, with
        kernels that are fast there, in half precision on CUDA."""
        x = self._embed(x)
        if torch.jit.is_scripting():
            return self.blocks(x)
        size = self._piece_size(x)
        if size > 0:
            return self._infer(x, size)
        x = checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)
        return layers.hold_format(x, self.ends_in_sum)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """ Features (N, dim, H, W) to logits (N, num_classes), or to what enters the classifier."""
        x = self.global_pool(x)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.forward_features(x)
        x = self.forward_head(x)
        return x


# How public checkpoints name the modules: n is a module's place in its sequence, i the block, even = 2 i,
# odd = 2 i + 1, flat = i + 3, end = depth + 5; mixer is 'mixer', 'mixer.<segment>' (IV), or 'mixer1', 'mixer2' (V).
_LAYOUTS = {
    'SplitMixer package': dict(
        stem='patch_emb.{n}', spatial='mixer_blocks.{even}.fn.{n}', mixer='mixer_blocks.{odd}.0.{mixer}',
        full='mixer_blocks.{odd}.0', norm='mixer_blocks.{odd}.2', head='head'),
    'SplitMixer package (3D)': dict(
        stem='patch_emb.{n}', spatial='spatial_mixer.{i}.fn.{n}', mixer='channel_mixer.{i}.0',
        full='channel_mixer.{i}.0', norm='channel_mixer.{i}.3', head='head.2'),
    'flat sequence': dict(
        stem='{n}', spatial='{flat}.0.fn.{n}', mixer='{flat}.1.{mixer}',
        full='{flat}.1', norm='{flat}.3', head='{end}'),
    'timm ConvMixer': dict(
        stem='stem.{n}', spatial='blocks.{i}.0.fn.{n}', mixer='blocks.{i}.1',
        full='blocks.{i}.1', norm='blocks.{i}.3', head='head'),
}
_SPATIAL_ORDER = {'conv1': 0, 'norm1': 2, 'conv2': 3, 'norm2': 5}


def _module_in_layout(name: str, layout: Dict[str, str], depth: int, is_full: bool) -> str:
    """ Name in a layout of `_LAYOUTS` of the module that a `SplitMixer` calls `name`."""
    part, *path = name.split('.')
    if part == 'stem':
        return layout['stem'].format(n=path[0])
    if part == 'head':
        return layout['head'].format(end=depth + 5)
    i, mixing, module, *path = int(path[0]), *path[1:]
    if module.startswith('act'):
        return name  # no public checkpoint has an activation with weights
    fields = dict(i=i, even=2 * i, odd=2 * i + 1, flat=i + 3)
    if mixing == 'spatial_mixing':
        return layout['spatial'].format(n=_SPATIAL_ORDER[module], **fields)
    if module == 'norm':
        return layout['norm'].format(**fields)
    if path[0] == 'convs':
        return layout['mixer'].format(mixer=f'mixer.{path[1]}', **fields)
    if path[0] != 'conv':
        return layout['mixer'].format(mixer=f'mixer{int(path[0]) + 1}', **fields)
    return layout['full' if is_full else 'mixer'].format(mixer='mixer', **fields)


def checkpoint_filter_fn(
        state_dict: Dict[str, Any],
        model: nn.Module,
        strict: bool = False,
) -> Dict[str, torch.Tensor]:
    """ Rename the weights of a public SplitMixer or ConvMixer checkpoint to those of `model`.

    Takes this package's own names, the published package's (types I to V, 3D and the ConvMixer baselines), the flat
    sequence of the paper's slides and timm's ConvMixer, with or without a `module.` prefix, bare or inside a training
    checkpoint (`state_dict_ema` is preferred to `state_dict`). With two segments, types II and III have the same names
    and shapes: a checkpoint does not tell them apart.

    Args:
        state_dict: Checkpoint.
        model: `SplitMixer`, or timm's `ConvMixer`, of the same architecture.
        strict: Also refuse a checkpoint with this package's own names if modules other than the classifier are missing
            or left over; if False, `load_state_dict` decides.

    Returns:
        State dict for `model.load_state_dict`.

    Raises:
        RuntimeError: If the names fit no known layout; the message lists those that did not fit the nearest one.
    """
    for key in ('state_dict_ema', 'model_ema', 'state_dict', 'model'):
        if isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
            break
    state_dict = clean_state_dict(state_dict)

    depth = len(model.blocks)
    modules = list(dict.fromkeys([*(key.rpartition('.')[0] for key in model.state_dict()), 'head']))
    if isinstance(model, ConvMixer):
        is_full = True
        parts = ('spatial_mixing.conv1', 'spatial_mixing.norm1', 'channel_mixing.mixer.conv', 'channel_mixing.norm')
        names = ['stem.0', 'stem.2', *(f'blocks.{i}.{part}' for i in range(depth) for part in parts), 'head']
        own = {name: _module_in_layout(name, _LAYOUTS['timm ConvMixer'], depth, is_full) for name in names}
    else:
        mixer = getattr(model.blocks[0].channel_mixing, 'mixer', None)
        is_full = isinstance(mixer, SegmentMixing) and mixer.is_first and mixer.is_last
        names = modules
        own = {name: name for name in names}
    candidates = [{name: name for name in modules}, own]
    candidates += [{_module_in_layout(name, layout, depth, is_full): own[name] for name in names}
                   for layout in _LAYOUTS.values()]
    given = {key.rpartition('.')[0] or key for key in state_dict}
    renames = max(candidates, key=lambda candidate: len(given & candidate.keys()))

    # the classifier may differ, timm drops it where the number of classes does
    missing = [theirs for theirs, ours in renames.items() if theirs not in given and ours != 'head']
    unexpected = sorted(name for name in given - renames.keys() if name.split('.')[0] != 'head')
    is_own = renames is candidates[0] and any(name.startswith('blocks.') for name in given & renames.keys())
    if (missing or unexpected) and (strict or not is_own):
        def some(keys: List[str]) -> str:
            return ', '.join(keys[:8]) + (f', ... ({len(keys)} in all)' if len(keys) > 8 else '') or 'none'

        raise RuntimeError(
            f'Checkpoint does not fit {type(model).__name__}: modules not recognised: {some(unexpected)}; modules '
            f'without weights: {some(missing)}. Known layouts: this package, {", ".join(_LAYOUTS)}.')

    out_dict = {}
    for key, value in state_dict.items():
        module, _, leaf = key.rpartition('.')
        if value.ndim == 5:
            value = value.flatten(1, 2)  # Conv3d over channels (maps, 1, m, 1, 1)
        out_dict[f'{renames.get(module, module)}.{leaf}'] = value
    return out_dict


# Input and classes of each data set: normalisation of the paper's recipe (Food101: ImageNet's), no test crop at 32,
# the paper's 224 sets squashed to size, ImageNet as timm's ConvMixer. Class names are in labels/.
_DATASETS = {
    'cifar10': dict(
        num_classes=10, input_size=(3, 32, 32), crop_pct=1., interpolation='bicubic',
        mean=(.4914, .4822, .4465), std=(.2023, .1994, .2010)),
    'cifar100': dict(
        num_classes=100, input_size=(3, 32, 32), crop_pct=1., interpolation='bicubic',
        mean=(.5071, .4867, .4408), std=(.2675, .2565, .2761)),
    'flowers102': dict(
        num_classes=102, input_size=(3, 224, 224), crop_pct=1., crop_mode='squash', interpolation='bilinear',
        mean=(.507, .487, .441), std=(.267, .256, .276)),
    'food101': dict(
        num_classes=101, input_size=(3, 224, 224), crop_pct=1., crop_mode='squash', interpolation='bilinear',
        mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD),
    'in1k': dict(
        num_classes=1000, input_size=(3, 224, 224), crop_pct=.96, interpolation='bicubic',
        mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD),
}


def _cfg(name: str, dataset: str, patch_size: int, **kwargs) -> Dict[str, Any]:
    """ Default cfg of 'arch.tag' trained on a data set."""
    cfg = _DATASETS[dataset]
    return {
        **cfg,
        'pool_size': tuple(size // patch_size for size in cfg['input_size'][1:]),
        'label_names': manifest.label_names(dataset), 'label_descriptions': manifest.label_descriptions(dataset),
        'first_conv': 'stem.0', 'classifier': 'head',
        'license': manifest.entries().get(name, {}).get('license', 'apache-2.0'),
        'paper_ids': 'arXiv:2207.10255', 'paper_name': 'SplitMixer: Fat Trimmed From MLP-like Models',
        'origin_url': 'https://arxiv.org/abs/2207.10255',
        **manifest.source_cfg(name),
        **kwargs,
    }


def generate_variant_cfgs(variants: Dict[str, Tuple[Dict[str, Any], Tuple[str, ...]]], **kwargs) -> Dict[str, Any]:
    """ Default cfgs of a table of variants: its tags, and those that only the manifest has."""
    cfgs = {}
    for variant, (model_args, datasets) in variants.items():
        tags = dict(zip(datasets, datasets))
        for name, entry in manifest.entries().items():
            arch, _, tag = name.partition('.')
            if arch == variant:
                tags.setdefault(tag, entry['dataset'])
        default, *others = tags
        # timm makes the first tag with weights the default unless one is marked, and goes by the last that qualifies:
        # marked and last, the default stays what it is whichever weights come and go
        for tag, mark in [(tag, '') for tag in others] + [(default, '*')]:
            name = f'{variant}.{tag}'
            cfgs[name + mark] = _cfg(name, tags[tag], model_args['patch_size'], **kwargs)
    return generate_default_cfgs(cfgs)


def create_variant(model_cls: Type[nn.Module], variant: str, pretrained: bool = False, **kwargs) -> nn.Module:
    """ Build a registered variant by timm's builder, with the zoo's weights only after they passed their check.

    Args:
        model_cls: Class of the model.
        variant: Registered name.
        pretrained: Load the weights of the (default or given) tag.
        **kwargs: Arguments of `timm.create_model` and of the class.

    Raises:
        RuntimeError: If there are no weights, or the file is not the one in the manifest.
    """
    out_indices = kwargs.pop('out_indices', 3)
    if kwargs.get('in_chans') is not None:  # timm computes with it where it adapts weights
        kwargs['in_chans'] = _integer('in_chans', kwargs['in_chans'], 1)
    # with another number of classes timm loads what fits and drops the rest
    filter_fn = partial(checkpoint_filter_fn, strict=kwargs.get('pretrained_strict', True))
    if pretrained:
        from .pretrained import checked_overlay  # knows the Hub, of which the architecture knows nothing

        pretrained_cfg, overlay = kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay')
        overlay = checked_overlay(variant, pretrained_cfg, overlay, kwargs.get('cache_dir'))
        if (overlay.get('num_classes') or 0) < 0:
            # train.py's --pretrained-path: a head of its own, whatever the file's; a model's default is ImageNet's 1000
            kwargs.setdefault('num_classes', resolve_pretrained_cfg(variant, pretrained_cfg).num_classes)
        kwargs['pretrained_cfg_overlay'] = overlay
    model = build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_filter_fn=filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls='getter'),
        **kwargs,
    )
    if isinstance(model, model_cls):
        # timm adds what its create_model was given; this is what makes the variant, for a model that is published
        names = inspect.signature(model_cls).parameters.keys() - {'device', 'dtype'}
        model._model_args = {name: value for name, value in kwargs.items() if name in names}
        if model.num_classes not in (0, len(model.pretrained_cfg.get('label_names') or ())):
            for key in ('label_names', 'label_descriptions'):  # of other classes than the model's
                model.pretrained_cfg.pop(key, None)
    return model


def _register_variant(variant: str, model_args: Dict[str, Any]) -> Callable[..., SplitMixer]:
    """ Entry point of a variant of the table, as timm's registry wants it: a function of this module by that name."""
    def entrypoint(pretrained: bool = False, **kwargs) -> SplitMixer:
        # looked up at each call: `train_fused` puts its own in its place
        return create_variant(SplitMixer, variant, pretrained, **{**model_args, **kwargs})

    entrypoint.__name__ = entrypoint.__qualname__ = variant
    entrypoint.__doc__ = f' SplitMixer with {", ".join(f"{k}={v!r}" for k, v in model_args.items())}.'
    return register_model(entrypoint)


CIFAR = ('cifar10', 'cifar100')
SQUASHED = ('flowers102', 'food101')
IN1K = ('in1k',)


def _args(channel_mixing: str, dim: int, depth: int, kernel_size: int, patch_size: int, **kwargs) -> Dict[str, Any]:
    return dict(
        dim=dim, depth=depth, kernel_size=kernel_size, patch_size=patch_size, channel_mixing=channel_mixing, **kwargs)


# Every variant: its arguments, and the data sets that are its tags, the default first.
VARIANTS = {
    'splitmixer_i_256_8': (_args('i', 256, 8, 5, 2), CIFAR),
    'splitmixer_ii_256_8': (_args('ii', 256, 8, 5, 2), CIFAR),
    'splitmixer_iii_256_8': (_args('iii', 256, 8, 5, 2), CIFAR),
    'splitmixer_iv_256_8': (_args('iv', 256, 8, 5, 2), CIFAR),
    'splitmixer_v_256_8': (_args('v', 256, 8, 5, 2), CIFAR),
    'splitmixer_3d_256_8': (_args('3d', 256, 8, 5, 2), CIFAR),

    'splitmixer_i_256_8_ks7_p7': (_args('i', 256, 8, 7, 7), SQUASHED),
    'splitmixer_ii_256_8_ks7_p7': (_args('ii', 256, 8, 7, 7), SQUASHED),
    'splitmixer_iii_256_8_ks7_p7': (_args('iii', 256, 8, 7, 7), SQUASHED),
    'splitmixer_iv_256_8_ks7_p7': (_args('iv', 256, 8, 7, 7), SQUASHED),
    'splitmixer_v_256_8_ks7_p7': (_args('v', 256, 8, 7, 7), SQUASHED),
    'splitmixer_3d_256_8_ks7_p7': (_args('3d', 256, 8, 7, 7), SQUASHED),

    'splitmixer_i_1536_20': (_args('i', 1536, 20, 9, 7), IN1K),
    'splitmixer_ii_1536_20': (_args('ii', 1536, 20, 9, 7), IN1K),
    'splitmixer_iii_1536_20': (_args('iii', 1536, 20, 9, 7), IN1K),
    'splitmixer_iv_1536_20': (_args('iv', 1536, 20, 9, 7), IN1K),

    'splitmixer_i_768_32': (_args('i', 768, 32, 7, 7, act_layer='relu'), IN1K),
    'splitmixer_ii_768_32': (_args('ii', 768, 32, 7, 7, act_layer='relu'), IN1K),
    'splitmixer_iii_768_32': (_args('iii', 768, 32, 7, 7, act_layer='relu'), IN1K),
    'splitmixer_iv_768_32': (_args('iv', 768, 32, 7, 7, act_layer='relu'), IN1K),

    'splitmixer_i_1024_20_ks9_p14': (_args('i', 1024, 20, 9, 14), IN1K),
    'splitmixer_ii_1024_20_ks9_p14': (_args('ii', 1024, 20, 9, 14), IN1K),
    'splitmixer_iii_1024_20_ks9_p14': (_args('iii', 1024, 20, 9, 14), IN1K),
    'splitmixer_iv_1024_20_ks9_p14': (_args('iv', 1024, 20, 9, 14), IN1K),
}

default_cfgs = generate_variant_cfgs(VARIANTS)

for _variant, (_model_args, _) in VARIANTS.items():
    globals()[_variant] = _register_variant(_variant, _model_args)
