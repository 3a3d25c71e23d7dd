""" The paper's networks transcribed step by step: the yardstick of speed, and what the tests compare outputs with.

NCHW in memory, a module for each step, segments put together by `torch.cat`, with the module names of the public
checkpoints. Independent of the package but for the renaming of weights in `plain_model`.
"""
import copy
from fractions import Fraction

import torch
from timm.models import get_model_args
from torch import nn

from splitmixer_timm import SplitMixer, checkpoint_filter_fn


class Residual(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return x + self.fn(x)


class OneSegment(nn.Module):
    """ I and II: block i convolves one of the segments."""

    def __init__(self, start, stop):
        super().__init__()
        self.start, self.stop = start, stop
        self.mixer = nn.Conv2d(stop - start, stop - start, 1)

    def forward(self, x):
        return torch.cat([x[:, :self.start], self.mixer(x[:, self.start:self.stop]), x[:, self.stop:]], 1)


class SharedConvolution(nn.Module):
    """ III: the same convolution for every segment."""

    def __init__(self, h, s):
        super().__init__()
        self.s = s
        self.mixer = nn.Conv2d(h // s, h // s, 1)

    def forward(self, x):
        return torch.cat([self.mixer(segment) for segment in x.chunk(self.s, 1)], 1)


class OwnConvolutions(nn.Module):
    """ IV: a convolution for each segment, the last one takes the remainder."""

    def __init__(self, h, s):
        super().__init__()
        self.bounds = [j * (h // s) for j in range(s)] + [h]
        self.mixer = nn.ModuleList(nn.Conv2d(b - a, b - a, 1) for a, b in zip(self.bounds, self.bounds[1:]))

    def forward(self, x):
        return torch.cat([conv(x[:, a:b]) for conv, a, b in zip(self.mixer, self.bounds, self.bounds[1:])], 1)


class BothSegments(nn.Module):
    """ V: first [0, m), then [h - m, h) on the result."""

    def __init__(self, h, m):
        super().__init__()
        self.h, self.m = h, m
        self.mixer1, self.mixer2 = nn.Conv2d(m, m, 1), nn.Conv2d(m, m, 1)

    def forward(self, x):
        x = torch.cat([self.mixer1(x[:, :self.m]), x[:, self.m:]], 1)
        return torch.cat([x[:, :self.h - self.m], self.mixer2(x[:, self.h - self.m:])], 1)


def mixer(kind, h, i, alpha, s):
    m = int(alpha * h)
    if kind == 'i':
        return OneSegment(h - m, h) if i % 2 else OneSegment(0, m)
    if kind == 'ii':
        j, size = i % s, h // s
        return OneSegment(j * size, h if j == s - 1 else (j + 1) * size)
    return {
        'iii': lambda: SharedConvolution(h, s),
        'iv': lambda: OwnConvolutions(h, s),
        'v': lambda: BothSegments(h, m),
        'full': lambda: nn.Conv2d(h, h, 1),
    }[kind]()


def spatial(h, k, act, two_d):
    if two_d:
        return Residual(nn.Sequential(nn.Conv2d(h, h, k, groups=h, padding='same'), act(), nn.BatchNorm2d(h)))
    return Residual(nn.Sequential(
        nn.Conv2d(h, h, (1, k), groups=h, padding=(0, k // 2)), act(), nn.BatchNorm2d(h),
        nn.Conv2d(h, h, (k, 1), groups=h, padding=(k // 2, 0)), act(), nn.BatchNorm2d(h)))


class Package(nn.Module):
    """ The published package's names, types I to V; with `two_d` and `kind='full'` its ConvMixer."""

    def __init__(self, kind, h, b, k=5, p=2, classes=10, alpha=2 / 3, s=2, act=nn.GELU, two_d=False):
        super().__init__()
        self.patch_emb = nn.Sequential(nn.Conv2d(3, h, p, p), act(), nn.BatchNorm2d(h))
        self.mixer_blocks = nn.ModuleList()
        for i in range(b):
            self.mixer_blocks.append(spatial(h, k, act, two_d))
            self.mixer_blocks.append(nn.Sequential(mixer(kind, h, i, alpha, s), act(), nn.BatchNorm2d(h)))
        self.head = nn.Linear(h, classes)

    def forward(self, x):
        x = self.patch_emb(x)
        for block in self.mixer_blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Package3d(nn.Module):
    """ The published 3D model's names."""

    def __init__(self, h, b, k=5, p=2, classes=10, m=None, t=None):
        super().__init__()
        m = int(2 * h / 3) if m is None else m
        t = h - m if t is None else t
        n = (h - m) // t + 1
        self.patch_emb = nn.Sequential(nn.Conv2d(3, h, p, p), nn.GELU(), nn.BatchNorm2d(h))
        self.spatial_mixer = nn.ModuleList(spatial(h, k, nn.GELU, False) for _ in range(b))
        self.channel_mixer = nn.ModuleList(
            nn.Sequential(nn.Conv3d(1, h // n, (m, 1, 1), (t, 1, 1)), nn.GELU(), nn.Flatten(1, 2), nn.BatchNorm2d(h))
            for _ in range(b))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(h, classes))

    def forward(self, x):
        x = self.patch_emb(x)
        for spatial_mixer, channel_mixer in zip(self.spatial_mixer, self.channel_mixer):
            x = channel_mixer(spatial_mixer(x)[:, None])
        return self.head(x)


def flat(kind, h, b, k=5, p=2, classes=10, alpha=2 / 3, s=2):
    """ The slides' one flat sequence."""
    return nn.Sequential(
        nn.Conv2d(3, h, p, p), nn.GELU(), nn.BatchNorm2d(h),
        *[nn.Sequential(spatial(h, k, nn.GELU, False), mixer(kind, h, i, alpha, s), nn.GELU(), nn.BatchNorm2d(h))
          for i in range(b)],
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(h, classes))


PLAIN_ARGS = {
    'dim', 'depth', 'kernel_size', 'patch_size', 'channel_mixing', 'overlap_ratio', 'num_segments',
    'channel_kernel_size', 'channel_stride', 'act_layer'}


@torch.no_grad()
def plain_model(model):
    """ The plain form, with its weights, mode, device and dtype, of a model that `timm.create_model` built.

    timm's ConvMixer is one already and is copied.

    Raises:
        ValueError: If the model has arguments that the paper's code does not have.
    """
    if not isinstance(model, SplitMixer):
        return copy.deepcopy(model)
    defaults = dict(in_chans=3, num_classes=model.num_classes, global_pool='avg')
    args = {name: value for name, value in get_model_args(model).items() if value != defaults.get(name)}
    if unknown := args.keys() - PLAIN_ARGS:
        raise ValueError(f'model must have arguments of {", ".join(sorted(PLAIN_ARGS))} only, got {sorted(unknown)}.')
    common = dict(
        k=args['kernel_size'], p=args['patch_size'], classes=model.num_classes)
    if args['channel_mixing'] == '3d':
        plain = Package3d(
            args['dim'], args['depth'], m=args.get('channel_kernel_size'), t=args.get('channel_stride'), **common)
    else:
        ratio = args.get('overlap_ratio', 2 / 3)
        plain = Package(
            args['channel_mixing'], args['dim'], args['depth'], alpha=float(Fraction(ratio)),
            s=args.get('num_segments', 2), act=nn.ReLU if args.get('act_layer') == 'relu' else nn.GELU, **common)
    weights = model.state_dict()
    for name, tensor in checkpoint_filter_fn(plain.state_dict(), model).items():
        tensor.copy_(weights[name])  # both are the plain model's own memory
    return plain.to(model.stem[0].weight).train(model.training)
