""" The architecture: against the paper's networks transcribed, the paper's figures, its ablations, and bad input."""
import copy
import math
import warnings
from functools import partial

import pytest
import reference
import timm
import torch
from conftest import KINDS
from reference import randomize
from timm.layers import RmsNorm
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from splitmixer_timm import SplitMixer, checkpoint_filter_fn, layers, splitmixer
from splitmixer_timm.complexity import measure_activation_bytes, measure_complexity


def assert_same(model, expected, images):
    model.load_state_dict(checkpoint_filter_fn(expected.state_dict(), model), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), expected(images), rtol=1e-5, atol=1e-5)


class TestTorchFunc:
    @pytest.mark.parametrize('kind', KINDS)
    def test_gradient_of_each_sample(self, kind):
        model = randomize(SplitMixer(24, 2, channel_mixing=kind, num_classes=5))
        params = {name: p.detach() for name, p in model.named_parameters()}
        images, targets = torch.randn(3, 3, 8, 8), torch.tensor([0, 3, 4])

        def loss(params, image, target):
            return F.cross_entropy(torch.func.functional_call(model, params, (image[None],)), target[None])

        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(params, images, targets)
        whole = torch.autograd.grad(F.cross_entropy(model(images), targets), list(model.parameters()))
        for grads, grad in zip(each.values(), whole):
            torch.testing.assert_close(grads.mean(0), grad, rtol=1e-4, atol=1e-5)

    def test_vmap(self):
        model = randomize(SplitMixer(24, 2, num_classes=5))
        images = torch.randn(3, 2, 3, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(torch.func.vmap(model)(images), torch.stack([model(x) for x in images]))


class TestCustomisedConvolutions:
    """ Those of type IV are called one by one as soon as they are more than their weights."""

    def model(self):
        return randomize(SplitMixer(24, 2, channel_mixing='iv', num_classes=5))

    def test_hooks(self, images):
        model, seen = self.model(), []
        expected = model(images)
        for conv in model.blocks[0].channel_mixing.mixer.convs:
            conv.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
        torch.testing.assert_close(model(images), expected)
        assert seen == [12, 12]

    @pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
    def test_hooks_on_a_shared_convolution(self, memory_format):
        """ It sees each segment as it is, not all as a batch of more images."""
        mixer, seen = randomize(SplitMixer(24, 2, channel_mixing='iii')).blocks[0].channel_mixing.mixer, []
        x = torch.randn(2, 24, 5, 6).contiguous(memory_format=memory_format)
        expected = mixer(x)
        mixer.conv.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
        torch.testing.assert_close(mixer(x), expected)
        assert seen == [(2, 12, 5, 6)] * 2

    @pytest.mark.parametrize('kind', ['iii', 'iv'])
    def test_hooks_on_all_modules(self, kind, images):
        """ As profilers hook on: every convolution is called."""
        model, seen = SplitMixer(24, 2, channel_mixing=kind).eval(), []
        everywhere = torch.nn.modules.module.register_module_forward_hook(lambda module, *args: seen.append(module))
        model(images)
        everywhere.remove()
        assert {m for m in model.modules() if isinstance(m, nn.Conv2d)} <= set(seen)

    @pytest.mark.parametrize('other', [
        lambda: nn.Conv2d(12, 12, 3, padding=1), lambda: nn.Conv2d(12, 12, 1, bias=False),
        lambda: nn.Conv2d(12, 12, 1, groups=2), lambda: nn.Conv2d(12, 16, 1),
    ], ids=['3x3', 'no bias', 'groups', 'wider'])
    @pytest.mark.parametrize('kind', ['iii', 'iv'])
    def test_replaced_convolutions(self, kind, other):
        """ Others that are put in place of type III's and IV's are called as they are."""
        mixer = SplitMixer(24, 2, channel_mixing=kind).eval().blocks[1].channel_mixing.mixer
        if kind == 'iii':
            mixer.conv = other()
            convs = [mixer.conv, mixer.conv]
        else:
            mixer.convs[1] = other()
            convs = mixer.convs
        x = torch.randn(2, 24, 5, 6)
        expected = torch.cat([convs[0](x[:, :12]), convs[1](x[:, 12:])], dim=1)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            torch.testing.assert_close(mixer(x.contiguous(memory_format=memory_format)), expected)

    @pytest.mark.parametrize('kwargs', [dict(stride=2), dict(padding=1)], ids=['stride', 'padding'])
    def test_shared_convolution_to_another_size(self, kwargs):
        mixer = SplitMixer(24, 2, channel_mixing='iii').eval().blocks[1].channel_mixing.mixer
        mixer.conv = nn.Conv2d(12, 12, 1, **kwargs)
        x = torch.randn(2, 24, 5, 6).contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(mixer(x), torch.cat([mixer.conv(x[:, :12]), mixer.conv(x[:, 12:])], dim=1))

    def test_backward_hooks_and_own_forwards(self, images):
        model, seen = self.model(), []
        convs = model.blocks[0].channel_mixing.mixer.convs
        convs[0].register_full_backward_hook(lambda *args: seen.append('backward'))
        forward = convs[1].forward
        convs[1].forward = lambda x: seen.append('forward') or forward(x)
        model(images).sum().backward()
        assert seen == ['forward', 'backward']

    def test_backward_pre_hook(self, images):
        model, seen = self.model(), []
        conv = model.blocks[0].channel_mixing.mixer.convs[0]
        conv.register_full_backward_pre_hook(lambda module, grads: seen.append(grads[0].shape[1]))
        model(images).sum().backward()
        assert seen == [12]

    def test_fx(self, images):
        model = self.model()
        model.blocks[0].channel_mixing.mixer.convs[0].register_forward_hook(lambda *args: None)
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(images), model(images))

    def test_pruning(self, images):
        model = self.model().train()
        conv = model.blocks[1].channel_mixing.mixer.convs[0]
        prune.l1_unstructured(conv, 'weight', 0.5)
        for _ in range(2):
            model(images).sum().backward()
        assert (conv.weight == 0).sum() == conv.weight.numel() // 2
        assert conv.weight_orig.grad.abs().sum() > 0

    def test_adapter(self, images):
        model = self.model()
        convs = model.blocks[0].channel_mixing.mixer.convs
        expected = model(images)
        convs[0] = torch.nn.Sequential(convs[0], torch.nn.Conv2d(12, 12, 1))
        assert not torch.allclose(model(images), expected)


class TestAgainstPaper:
    """ Outputs equal those of the networks as the paper describes them."""

    @pytest.mark.parametrize('dim', [24, 30])
    @pytest.mark.parametrize(('kind', 'model_args', 'reference_args'), [
        ('i', {}, {}),
        ('i', dict(overlap_ratio='6/11'), dict(alpha=6 / 11)),
        ('ii', {}, {}),
        ('ii', dict(num_segments=5), dict(s=5)),
        ('iii', {}, {}),
        ('iii', dict(num_segments=6), dict(s=6)),
        ('iv', {}, {}),
        ('iv', dict(num_segments=4), dict(s=4)),
        ('iv', dict(num_segments=5), dict(s=5)),
        ('v', {}, {}),
        ('v', dict(overlap_ratio=5 / 9), dict(alpha=5 / 9)),
    ])
    def test_types(self, dim, kind, model_args, reference_args, images):
        expected = randomize(reference.Package(kind, dim, 5, k=5, p=2, **reference_args))
        assert_same(SplitMixer(dim, 5, channel_mixing=kind, num_classes=10, **model_args), expected, images)

    @pytest.mark.parametrize(('m', 't'), [(None, None), (12, 12), (16, 8), (12, 4), (24, 1), (21, 1)])
    def test_3d(self, m, t, images):
        expected = randomize(reference.Package3d(24, 3, m=m, t=t))
        model = SplitMixer(24, 3, channel_mixing='3d', channel_kernel_size=m, channel_stride=t, num_classes=10)
        assert_same(model, expected, images)

    def test_3d_without_overlap_is_iii_interleaved(self):
        """ m = t = h / s: type III, its outputs map-major."""
        sliding = SplitMixer(24, 1, channel_mixing='3d', channel_kernel_size=12, channel_stride=12).eval()
        shared = SplitMixer(24, 1, channel_mixing='iii').eval()
        x = torch.randn(2, 24, 4, 5)
        mixer = sliding.blocks[0].channel_mixing.mixer
        shared.blocks[0].channel_mixing.mixer.conv.load_state_dict(mixer.conv.state_dict())
        expected = shared.blocks[0].channel_mixing.mixer(x)
        torch.testing.assert_close(mixer(x), expected.unflatten(1, (2, 12)).transpose(1, 2).flatten(1, 2))

    def test_baseline_is_timm_convmixer(self, images):
        """ 2D kernels and full channel mixing are ConvMixer: timm's, weights mapped over."""
        expected = randomize(timm.models.ConvMixer(24, 3, kernel_size=5, patch_size=2, num_classes=10))
        model = SplitMixer(24, 3, spatial_mixing='2d', channel_mixing='full', num_classes=10)
        assert_same(model, expected, images)

    def test_relu(self, images):
        expected = randomize(reference.Package('i', 24, 2, act=nn.ReLU))
        assert_same(SplitMixer(24, 2, act_layer='relu', num_classes=10), expected, images)

    def test_kernel_and_patch(self):
        expected = randomize(reference.Package('i', 24, 2, k=9, p=7))
        assert_same(SplitMixer(24, 2, kernel_size=9, patch_size=7, num_classes=10), expected, torch.randn(1, 3, 37, 52))

    @pytest.mark.parametrize(('dim', 'size'), [(256, 170), (30, 20), (1536, 1024), (768, 512), (1024, 682)])
    def test_segment_size_in_double_precision(self, dim, size):
        block = SplitMixer(dim, 1, device='meta').blocks[0]
        assert block.channel_mixing.mixer.conv.out_channels == size

    def test_gelu_is_exact(self):
        act = SplitMixer(8, 1).blocks[0].spatial_mixing.act1
        x = torch.linspace(-4, 4, 101)
        torch.testing.assert_close(act(x), 0.5 * x * (1 + torch.erf(x / math.sqrt(2))))


# paper.md's tables: arguments, parameters, MACs in millions
CIFAR = [
    (dict(spatial_mixing='2d', channel_mixing='full'), 594_186, 148.114, 617_316),
    (dict(channel_mixing='i'), 275_834, 65.219, 298_964),
    (dict(channel_mixing='ii'), 175_370, 39.586, 198_500),
    (dict(channel_mixing='iii'), 175_370, 73.141, 198_500),
    (dict(channel_mixing='iv'), 307_466, 73.141, 330_596),
    (dict(channel_mixing='v'), 508_394, 124.406, 531_524),
    (dict(channel_mixing='3d'), 218_378, 95.161, 241_508),
]
FLOWERS = [
    (dict(spatial_mixing='2d', channel_mixing='full'), 701_542, 678.193),
    (dict(channel_mixing='i'), 342_230, 304.670),
    (dict(channel_mixing='ii'), 241_766, 202.139),
    (dict(channel_mixing='iii'), 241_766, 336.357),
    (dict(channel_mixing='iv'), 373_862, 336.357),
    (dict(channel_mixing='v'), 574_790, 541.419),
    (dict(channel_mixing='3d'), 284_774, 424.437),
    (dict(channel_mixing='i', overlap_ratio=3 / 5), 298_166, 259.688),
    (dict(channel_mixing='i', overlap_ratio='4/7'), 281_366, 242.542),
    (dict(channel_mixing='i', overlap_ratio=5 / 9), 272_118, 233.105),
    (dict(channel_mixing='i', overlap_ratio='6/11'), 265_350, 226.199),
    (dict(channel_mixing='ii', num_segments=3), 168_494, 127.459),
    (dict(channel_mixing='ii', num_segments=4), 142_950, 101.476),
    (dict(channel_mixing='ii', num_segments=5), 130_990, 89.334),
    (dict(channel_mixing='ii', num_segments=6), 124_474, 82.733),
    (dict(channel_mixing='iii', num_segments=4), 142_950, 202.139),
    (dict(channel_mixing='iii', num_segments=8), 118_118, 135.030),
    (dict(channel_mixing='iv', num_segments=3), 286_486, 246.884),
    (dict(channel_mixing='iv', num_segments=4), 242_790, 202.139),
    (dict(channel_mixing='iv', num_segments=5), 216_582, 175.302),
]
PAPER_FLOPS = [  # channel mixing, 32 x 32, 224 x 224, in millions
    ('full', 152.6, 696), ('i', 71.8, 331), ('ii', 46.2, 229), ('iii', 79.8, 363), ('iv', 79.8, 363),
]


class TestPaperFigures:
    """ Parameters and MACs are the paper's to the last digit, its FLOPS follow by its rule."""

    @staticmethod
    def measure(size, **kwargs):
        return measure_complexity(SplitMixer(256, 8, device='meta', **kwargs), (3, size, size))

    @pytest.mark.parametrize(('kwargs', 'params10', 'macs', 'params100'), CIFAR)
    def test_cifar(self, kwargs, params10, macs, params100):
        counts = self.measure(32, num_classes=10, **kwargs)
        assert counts.params == params10
        assert round(counts.macs / 1e6, 3) == macs
        assert self.measure(32, num_classes=100, **kwargs).params == params100

    @pytest.mark.parametrize(('kwargs', 'params', 'macs'), FLOWERS)
    def test_flowers(self, kwargs, params, macs):
        counts = self.measure(224, num_classes=102, kernel_size=7, patch_size=7, **kwargs)
        assert counts.params == params
        assert round(counts.macs / 1e6, 3) == macs

    @pytest.mark.parametrize(('kind', 'at_32', 'at_224'), PAPER_FLOPS)
    def test_paper_flops(self, kind, at_32, at_224):
        kwargs = dict(channel_mixing=kind, spatial_mixing='2d' if kind == 'full' else '1d')
        assert round(self.measure(32, num_classes=10, **kwargs).paper_flops / 1e6, 1) == at_32
        counts = self.measure(224, num_classes=102, kernel_size=7, patch_size=7, **kwargs)
        assert round(counts.paper_flops / 1e6) == at_224

    @pytest.mark.parametrize(('name', 'millions'), [('splitmixer_i_1536_20', 23.56), ('splitmixer_i_768_32', 9.83)])
    def test_imagenet(self, name, millions):
        model = timm.create_model(name, device='meta')
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions

    def test_no_pooling(self):
        pooled, plain = (self.measure(32, num_classes=0, global_pool=kind).paper_flops for kind in ('avg', ''))
        assert pooled - plain == 256 * 16 * 16

    def test_of_any_type_and_frozen(self):
        model = SplitMixer(16, 1)
        expected = measure_complexity(model, (3, 8, 8))
        assert measure_complexity(model.half(), (3, 8, 8)) == expected
        assert measure_complexity(model.requires_grad_(False), (3, 8, 8)) == expected

    def test_counting_leaves_the_model_alone(self):
        model = SplitMixer(16, 1).train()
        measure_complexity(model, (3, 8, 8))
        assert model.training
        assert next(model.parameters()).device.type == 'cpu'
        assert not any(m._forward_hooks for m in model.modules())

    def test_pruned(self):
        """ Weights that a hook makes of others at each call are no leaves, and cannot be copied as they are."""
        model = SplitMixer(16, 1)
        before = measure_complexity(model, (3, 8, 8)), measure_activation_bytes(model, (3, 8, 8))
        prune.l1_unstructured(model.blocks[0].channel_mixing.mixer.conv, 'weight', 0.5)
        model(torch.randn(2, 3, 8, 8))
        assert not model.blocks[0].channel_mixing.mixer.conv.weight.is_leaf
        assert measure_complexity(model, (3, 8, 8)) == before[0]
        assert measure_activation_bytes(model, (3, 8, 8)) >= before[1]


class TestOptions:
    """ What the paper ablates and what it leaves open."""

    def test_spatial_mixing_none(self):
        """ Channel mixing only: a 1 x 1 patch changes only its own position."""
        model = SplitMixer(12, 3, spatial_mixing='none', patch_size=1, num_classes=0, global_pool='').eval()
        x = torch.randn(1, 3, 6, 6)
        y = x.clone()
        y[..., 2, 3] += 1
        changed = (model(x) != model(y)).any(1)[0].nonzero().tolist()
        assert changed == [[2, 3]]

    def test_channel_mixing_none(self):
        """ Spatial mixing only: a channel of the stem's output reaches only itself."""
        model = SplitMixer(12, 3, channel_mixing='none').eval()
        x = torch.randn(1, 12, 6, 6)
        y = x.clone()
        y[:, 5] += 1
        changed = (model.blocks(x) != model.blocks(y)).flatten(2).any(-1)[0].nonzero().flatten().tolist()
        assert changed == [5]

    def test_spatial_residual(self):
        x = torch.randn(2, 12, 6, 6)
        with_residual = SplitMixer(12, 1, channel_mixing='none').eval()
        without = SplitMixer(12, 1, channel_mixing='none', spatial_residual=False).eval()
        without.load_state_dict(with_residual.state_dict())
        torch.testing.assert_close(with_residual.blocks(x), x + without.blocks(x))

    def test_channel_residual(self):
        x = torch.randn(2, 12, 6, 6)
        with_residual = SplitMixer(12, 1, spatial_mixing='none', channel_residual=True).eval()
        without = SplitMixer(12, 1, spatial_mixing='none').eval()
        without.load_state_dict(with_residual.state_dict())
        torch.testing.assert_close(with_residual.blocks(x), x + without.blocks(x))

    @pytest.mark.parametrize(('kind', 'bounds'), [('i', (0, 8)), ('ii', (0, 6))])
    def test_one_fixed_segment(self, kind, bounds):
        model = SplitMixer(12, 3, channel_mixing=kind, alternate_segments=False).eval()
        x = torch.randn(1, 12, 2, 2)
        for block in model.blocks:
            same = (block.channel_mixing.mixer(x) == x).flatten(2).all(-1)[0].tolist()
            assert same == [not bounds[0] <= c < bounds[1] for c in range(12)]

    @pytest.mark.parametrize('name', ['layernorm', 'LayerNorm2d', 'layer_norm_2d', 'rmsnorm2d'])
    def test_norm_over_channels_by_name(self, name, images):
        model = SplitMixer(12, 2, norm_layer=name).eval()
        assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        norm = model.blocks[0].channel_mixing.norm
        x = torch.randn(1, 12, 3, 3)
        y = x.clone()
        y[..., 0, 0] += torch.randn(12)
        changed = (norm(x) != norm(y)).any(1)[0].nonzero().tolist()
        assert changed == [[0, 0]]  # statistics of one position, over its channels
        assert model(images).shape == (2, 1000)

    @pytest.mark.parametrize(('act_layer', 'expected'), [
        ('relu', nn.ReLU), ('ReLU', nn.ReLU), (nn.SiLU, nn.SiLU), ('silu', nn.SiLU), ('hard_swish', nn.Hardswish),
    ])
    def test_act_layer(self, act_layer, expected):
        with timm.layers.set_layer_config(scriptable=True):
            model = SplitMixer(12, 2, act_layer=act_layer)
        acts = [m for name, m in model.named_modules() if name.rpartition('.')[2].startswith('act')] + [model.stem[1]]
        assert len(acts) == 7
        assert all(isinstance(m, expected) for m in acts)

    def test_act_layer_with_parameters(self):
        model = SplitMixer(12, 2, act_layer='prelu', device='meta', dtype=torch.bfloat16)
        assert {p.device.type for p in model.parameters()} == {'meta'}
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}

    def test_overlapping_patches(self, images):
        model = SplitMixer(12, 4, patch_size=4, patch_stride=2).eval()
        assert [info['reduction'] for info in model.feature_info] == [2] * 4
        assert model.forward_features(images).shape == (2, 12, 6, 8)

    def test_even_kernel_keeps_resolution(self, images):
        assert SplitMixer(12, 2, kernel_size=4).eval().forward_features(images).shape == (2, 12, 7, 9)

    def test_stochastic_depth(self):
        model = SplitMixer(12, 4, drop_path_rate=0.3, channel_residual=True)
        rates = [getattr(block.drop_path, 'drop_prob', 0.) for block in model.blocks]
        assert rates == pytest.approx([0, 0.1, 0.2, 0.3])
        x = torch.randn(64, 3, 4, 4)
        assert not torch.equal(model.train()(x), model(x))
        model.eval()
        assert torch.equal(model(x), model(x))

    def test_dropped_branch_leaves_the_input(self):
        block = SplitMixer(12, 2, drop_path_rate=0.9999, channel_mixing='none').blocks[1].train()
        x = torch.randn(8, 12, 4, 4)
        torch.testing.assert_close(block(x), x)

    def test_drop_rate(self):
        model = SplitMixer(12, 1, drop_rate=0.5)
        features = torch.ones(1, 12, 2, 2)
        assert set(model.train().forward_head(features, pre_logits=True).unique().tolist()) == {0., 2.}

    @pytest.mark.parametrize('size', [(2, 2), (2, 31), (33, 7), (40, 40)])
    @pytest.mark.parametrize('kind', KINDS)
    def test_any_size(self, kind, size):
        features = SplitMixer(12, 2, channel_mixing=kind).eval().forward_features(torch.randn(1, 3, *size))
        assert features.shape == (1, 12, size[0] // 2, size[1] // 2)

    @pytest.mark.parametrize('kind', ['ii', 'iii', 'iv'])
    def test_segments_of_one_channel(self, kind):
        model = SplitMixer(12, 2, channel_mixing=kind, num_segments=12, num_classes=5)
        assert model.eval()(torch.ones(1, 3, 4, 4)).shape == (1, 5)

    def test_fixed_by_seed(self):
        states = []
        for _ in range(2):
            torch.manual_seed(3)
            states.append(SplitMixer(12, 2).state_dict())
        assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values()))


def is_channels_last(x):
    return x.is_contiguous(memory_format=torch.channels_last)


class TestMemoryFormat:
    """ On a CPU the features are channels_last whatever the images are, and nothing but speed depends on it."""

    @pytest.mark.parametrize('kind', KINDS)
    def test_every_block_keeps_it(self, kind, images):
        model = randomize(SplitMixer(24, 3, channel_mixing=kind))
        seen = []
        for module in model.modules():
            if not isinstance(module, (SplitMixer, nn.Linear)) and not list(module.children()):
                module.register_forward_hook(lambda module, args, out: seen.append((out.dim(), is_channels_last(out))))
        for x in (images, images.contiguous(memory_format=torch.channels_last), images[:1], images[:, :, :2, :2]):
            seen.clear()
            with torch.no_grad():
                features = model.forward_features(x)
            assert is_channels_last(features)
            assert all(is_last for dim, is_last in seen if dim == 4)
            assert len(seen) > 12

    @pytest.mark.parametrize('precision', ['fp32', 'bf16'])
    @pytest.mark.parametrize('kwargs', [
        *(dict(channel_mixing=kind) for kind in KINDS),
        dict(channel_mixing='3d', channel_kernel_size=6, channel_stride=6),
        dict(channel_mixing='iv', num_segments=5),
        dict(channel_mixing='none'),
        dict(channel_residual=True),
    ])
    def test_gradients_keep_it(self, kwargs, precision, images):
        """ All but what pooling gives the last norm: the norms' backward takes many times as long with others."""
        model = randomize(SplitMixer(24, 3, num_classes=10, **kwargs)).train()
        seen = {}

        def watch(name, module, args, out):
            out.register_hook(lambda grad: seen.update({name: is_channels_last(grad)}))

        norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
        for name, module in norms.items():
            module.register_forward_hook(partial(watch, name))
        with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bf16'):
            loss = model(images).float().logsumexp(1).sum()
        loss.backward()
        assert seen.keys() == norms.keys()
        assert all(is_last for name, is_last in seen.items() if name != list(norms)[-1])

    @pytest.mark.parametrize('act_layer', [nn.GELU, 'gelu'])
    @pytest.mark.parametrize('kind', KINDS)
    def test_gelu_is_of_contiguous_memory(self, kind, act_layer, images):
        """ As torch calls oneDNN's, in the forward and in the backward pass; by timm's name too, as on the Hub."""
        contiguous = []

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if func.overloadpacket in (torch.ops.aten.gelu, torch.ops.aten.gelu_backward):
                    contiguous.append(all(x.is_contiguous() for x in args if isinstance(x, torch.Tensor)))
                return func(*args, **(kwargs or {}))

        model = randomize(SplitMixer(24, 2, channel_mixing=kind, num_classes=10, act_layer=act_layer)).train()
        with Watch():
            model(images).logsumexp(1).sum().backward()
            model.eval()(images)
        assert contiguous == [True] * 3 * (1 + 2 * 3)

    @pytest.mark.parametrize('shape', [(2, 24, 5, 6), (2, 24, 1, 1), (2, 1, 5, 6), (24, 5)])
    @pytest.mark.parametrize('approximate', ['none', 'tanh'])
    def test_gelu_is_the_same_in_any_format(self, approximate, shape):
        gelu = layers.ChannelsLastGELU(approximate)
        given = torch.randn(shape, requires_grad=True)
        formats = [given, given.mT.contiguous().mT]
        if given.dim() == 4:
            formats.append(given.contiguous(memory_format=torch.channels_last))
        for x in formats:
            out, expected = gelu(x), F.gelu(x, approximate=approximate)
            torch.testing.assert_close(out, expected)
            assert is_channels_last(out) == is_channels_last(expected)
            assert out.is_contiguous() == expected.is_contiguous()
            grads = [torch.autograd.grad(y.square().sum(), given, retain_graph=True)[0] for y in (out, expected)]
            torch.testing.assert_close(*grads)

    def test_recorded_graphs_have_no_permutations(self, images):
        """ Of the types that need none."""
        model = SplitMixer(24, 2, channel_mixing='i').eval()
        exported = torch.export.export(model, (images,))
        assert not [node for node in exported.graph.nodes if 'permute' in str(node.target)]
        with torch.no_grad():
            assert 'permute' not in str(torch.jit.trace(model, images).inlined_graph)

    @pytest.mark.parametrize('kind', KINDS)
    def test_blocks_take_any_format(self, kind):
        model = randomize(SplitMixer(24, 2, channel_mixing=kind)).train()
        x = torch.randn(2, 24, 5, 6)
        expected = model.blocks(x.contiguous(memory_format=torch.channels_last))
        for given in (x, x.mT.contiguous().mT, torch.cat([x, x], 1)[:, :24]):
            torch.testing.assert_close(model.blocks(given), expected)

    def test_one_channel_does_not_tell(self):
        """ Images of one channel are both formats at once."""
        assert is_channels_last(SplitMixer(24, 1, in_chans=1).eval().forward_features(torch.randn(2, 1, 8, 9)))

    def test_images_are_left_alone(self, images):
        before = images.clone()
        for mode in (True, False):
            SplitMixer(24, 2).train(mode)(images)
        assert torch.equal(images, before)
        assert images.is_contiguous()

    @pytest.mark.parametrize('batch', [1, 3, 4, 7])
    @pytest.mark.parametrize('kind', KINDS)
    def test_pieces(self, kind, batch, monkeypatch):
        """ Inference takes a few images at a time."""
        monkeypatch.setattr(splitmixer, 'PIECE_BYTES', -(-3 * 24 * 5 * 6 * 4 // torch.get_num_threads()))
        model = randomize(SplitMixer(24, 2, channel_mixing=kind))
        images = torch.randn(batch, 3, 10, 12)
        expected = model.forward_features(images)
        with torch.no_grad():
            assert model._piece_size(expected) == 3
            features = model.forward_features(images)
        assert is_channels_last(features)
        torch.testing.assert_close(features, expected)

    @pytest.mark.parametrize('kwargs', [
        dict(spatial_residual=False), dict(channel_residual=True), dict(spatial_mixing='none', depth=3),
        dict(num_segments=3, depth=3), dict(drop_path_rate=0.1), dict(act_layer=nn.Identity)], ids=str)
    def test_segments_in_place(self, kwargs):
        """ Inference overwrites segments where nothing else has them: the stem's features are what they were."""
        kind = 'ii' if 'num_segments' in kwargs else 'i'
        model = randomize(SplitMixer(**{'dim': 24, 'depth': 2, 'channel_mixing': kind, **kwargs})).eval()
        x = torch.randn(2, 24, 5, 6).contiguous(memory_format=torch.channels_last)
        before, expected = x.clone(), model.blocks(x)
        with torch.inference_mode():
            torch.testing.assert_close(model._infer(x, 1), expected)
        assert torch.equal(x, before)

    @pytest.mark.parametrize('change', [
        lambda blocks: nn.Identity(), lambda blocks: blocks[0], lambda blocks: nn.Sequential(blocks[:1], blocks[1:])])
    def test_other_blocks(self, change, images):
        model = SplitMixer(24, 3).eval()
        model.blocks = change(model.blocks)
        expected = model(images)
        with torch.no_grad():
            torch.testing.assert_close(model(images), expected)

    def test_segments_in_place_after_a_change(self):
        """ Of a convolution that was put there the output may have other channels, or another type."""
        for channels, dtype in ((16, torch.double), (1, torch.float), (17, torch.float)):
            model = SplitMixer(24, 1).eval()
            mixer = model.blocks[0].channel_mixing.mixer
            mixer.conv = nn.Conv2d(16, channels, 1)
            mixer.conv.forward = lambda x, conv=mixer.conv, dtype=dtype: nn.Conv2d.forward(conv, x).to(dtype)
            x = torch.randn(2, 24, 5, 6)
            with torch.no_grad():
                y = mixer(x)
                updated = mixer.update(x)
            assert (updated.shape, updated.dtype) == (y.shape, y.dtype)
            assert torch.equal(updated, y)

    def test_pieces_only_where_nothing_can_tell(self, monkeypatch):
        monkeypatch.setattr(splitmixer, 'PIECE_BYTES', 1)
        features = torch.randn(2, 24, 3, 3)

        def size(model=None, **kwargs):
            return (model or SplitMixer(24, 2, **kwargs).eval())._piece_size(features)

        assert size() == 0
        with torch.no_grad():
            assert size() == 1
            assert size(norm_layer='layernorm2d') == size(act_layer=nn.Softmax2d) == 0
            assert size(norm_layer=lambda dim, **dd: nn.BatchNorm2d(dim, track_running_stats=False)) == 0
            assert size(SplitMixer(24, 2)) == 0
            model = SplitMixer(24, 2).eval()
            timm.utils.freeze(model)
            assert size(model.eval()) == 1
            model = SplitMixer(24, 2).eval()
            model.blocks[1].channel_mixing.norm.train()
            assert size(model) == 0
            model.eval().blocks[0].spatial_mixing.act1.register_forward_hook(lambda *args: None)
            assert size(model) == 0
            model = SplitMixer(24, 2).eval()
            model.blocks[0].forward = lambda x: x
            assert size(model) == 0
            everywhere = torch.nn.modules.module.register_module_forward_hook(lambda *args: None)
            assert size() == 0
            everywhere.remove()
            everywhere = torch.nn.modules.module.register_module_forward_pre_hook(lambda *args: None)
            assert size() == 0
            everywhere.remove()
            assert size() == 1
            with FlopCounterMode(display=False):
                assert size() == 0
            with BaseTorchFunctionMode():
                assert size() == 0
            with torch.device('cpu'):
                assert size() == 1
            features = features.as_subclass(type('Logged', (torch.Tensor,), {}))
            assert size() == 0
            features = features.as_subclass(torch.Tensor)
            model = SplitMixer(24, 2).eval()
            model.blocks[1].compile(backend='eager')
            assert size(model) == 0
            model = SplitMixer(24, 2).eval()
            images = torch.randn(4, 3, 6, 6)
            traced = make_fx(model, tracing_mode='symbolic', _allow_non_fake_inputs=True)(images[:2])
            torch.testing.assert_close(traced(images), model(images))
            for same in (torch.jit.trace(model, images[:2]), torch.fx.symbolic_trace(model), torch.jit.script(model)):
                torch.testing.assert_close(same(images), model(images))

    @pytest.mark.parametrize('name', [
        f'splitmixer_{kind}_256_8' for kind in ('i', 'ii', 'iii', 'iv', 'v', '3d')])
    def test_gradients_are_the_plain_models(self, name):
        """ In double precision, in train mode: where the convolutions of rows go another way."""
        model = randomize(timm.create_model(name, depth=2, dim=24)).double().train()
        plain = reference.plain_model(model).double()
        images = torch.randn(2, 3, 9, 12, dtype=torch.double, requires_grad=True)
        gradients = []
        for m in (model, plain):
            images.grad = None
            m(images).square().sum().backward()
            gradients.append(({n: p.grad for n, p in m.named_parameters()}, images.grad))
        (ours, of_images), (theirs, of_plain_images) = gradients
        torch.testing.assert_close(of_images, of_plain_images)
        buffers = dict(model.named_buffers())
        theirs = checkpoint_filter_fn({**plain.state_dict(), **theirs}, model)
        for name, gradient in ours.items():
            torch.testing.assert_close(gradient, theirs[name])
        for name, buffer in buffers.items():
            torch.testing.assert_close(buffer, theirs[name])

    @pytest.mark.parametrize('kind', ['iii', 'iv'])
    def test_replaced_in_script(self, kind):
        """ Segments that are convolved as one are so only by what they were made with."""
        model = SplitMixer(24, 1, channel_mixing=kind).eval()
        mixer = model.blocks[0].channel_mixing.mixer
        for n in range(2):
            conv = nn.Conv2d(12, 12, 3, padding=1, padding_mode='reflect')
            if kind == 'iii':
                mixer.conv = conv
            else:
                mixer.convs[n] = conv
        images = torch.randn(2, 3, 16, 16)
        torch.testing.assert_close(torch.jit.script(model)(images), model(images))

    @pytest.mark.parametrize('change', [dict(padding_mode='circular'), dict(dilation=(1, 2)), dict(padding=(0, 1))])
    def test_changed_rows_in_train_mode(self, change):
        """ A convolution that was changed in place is what it was changed to in train mode as well."""
        x, conv = torch.randn(2, 6, 5, 9), layers.AxisConv2d(6, 6, (1, 3), groups=6, padding='same')
        for name, value in change.items():
            setattr(conv, name, value)
        plain = nn.Conv2d(6, 6, (1, 3), groups=6, **{'padding': 'same', **change})
        plain.load_state_dict(conv.state_dict())
        conv._reversed_padding_repeated_twice = plain._reversed_padding_repeated_twice
        torch.testing.assert_close(conv(x), plain(x))
        torch.testing.assert_close(torch.jit.script(conv)(x), plain(x))
        torch.testing.assert_close(conv.eval()(x), plain(x))
        torch.testing.assert_close(torch.jit.script(conv)(x), plain(x))

    @pytest.mark.parametrize('kernel_size', [1, 4, 5])
    def test_rows_in_train_mode(self, kernel_size):
        conv = SplitMixer(6, 1, kernel_size=kernel_size, dtype=torch.double).blocks[0].spatial_mixing.conv1
        x = torch.randn(2, 6, 4, 7, dtype=torch.double, requires_grad=True)
        torch.testing.assert_close(conv.train()(x), conv.eval()(x))
        assert torch.autograd.gradcheck(conv.train(), x)

    def test_rows_in_train_mode_are_counted(self):
        """ Counters that read traces, as fvcore's, know no convolution whose padding is a word."""
        conv = layers.AxisConv2d(6, 6, (1, 5), groups=6, padding='same')
        graph = str(torch.jit.trace(conv.train(), torch.randn(2, 6, 4, 7)).inlined_graph)
        assert graph.count('aten::_convolution(') == 1
        assert 'aten::_convolution_mode' not in graph

    @pytest.mark.parametrize('kwargs', [
        dict(), dict(channel_residual=True), dict(channel_mixing='iii'), dict(channel_mixing='iv'),
        dict(channel_mixing='3d'), dict(dtype=torch.bfloat16)], ids=str)
    def test_vectorized_jacobians(self, kwargs):
        """ torch.autograd's own batches, which do not tell their memory format, in reverse and in forward mode."""
        model = SplitMixer(12, 2, kernel_size=3, num_classes=3, **kwargs).eval()
        x = torch.randn(2, 3, 6, 6, dtype=model.head.weight.dtype)
        one_by_one = torch.autograd.functional.jacobian(model, x)
        tolerance = dict(rtol=0.1, atol=0.02) if x.dtype == torch.bfloat16 else {}
        for strategy in ('reverse-mode', 'forward-mode'):
            jacobian = torch.autograd.functional.jacobian(model, x, vectorize=True, strategy=strategy)
            torch.testing.assert_close(jacobian, one_by_one, **tolerance)

    @pytest.mark.parametrize('kwargs', [dict(channel_residual=True), dict(channel_mixing='none')], ids=str)
    def test_gradient_that_is_none(self, kwargs):
        """ As gradcheck gives it, and a function of the user's may."""
        model = SplitMixer(4, 1, kernel_size=3, num_classes=2, dtype=torch.double, **kwargs).eval()
        x = torch.randn(1, 3, 4, 4, dtype=torch.double, requires_grad=True)
        assert torch.autograd.gradcheck(model, x)

    def test_features_with_gradients_are_saved_in_silence(self, tmp_path):
        features = SplitMixer(4, 1, channel_residual=True).forward_features(torch.randn(1, 3, 4, 4))
        assert features.requires_grad
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            torch.save(features, tmp_path / 'features.pt')

    @pytest.mark.parametrize('training', [True, False])
    def test_square_kernels(self, training, images, monkeypatch):
        """ Kernels with zeros around them, as on CUDA in half precision: the same outputs and gradients."""
        model = SplitMixer(12, 2, kernel_size=5, patch_size=2).double().train(training)
        shapes = []
        conv2d = F.conv2d

        def recorded(x, weight, *args, **kwargs):
            shapes.append(tuple(weight.shape[2:]))
            return conv2d(x, weight, *args, **kwargs)

        def results(has_square_kernels):
            monkeypatch.setattr(layers, '_has_square_kernels', has_square_kernels)
            model.zero_grad()
            y = model(images.double())
            y.square().sum().backward()
            return y, [p.grad for p in model.parameters()]

        expected = results(lambda x, size: False)
        monkeypatch.setattr(layers, '_row_conv', lambda x, weight, bias: layers._axis_conv(
            x, weight, bias, (1, weight.shape[3]), len(weight)))
        monkeypatch.setattr(F, 'conv2d', recorded)
        torch.testing.assert_close(results(lambda x, size: size == 5), expected)
        assert shapes.count((5, 5)) == 4
        assert not {(1, 5), (5, 1)} & set(shapes)

    @pytest.mark.cuda
    @pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA')
    @pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize('kernel_size', [3, 5, 7, 9])
    def test_half_precision_on_gpu(self, dtype, kernel_size):
        """ Under autocast the gradients are as near to those in fp64 as the plain network's."""
        model = timm.create_model('splitmixer_i_256_8', dim=32, depth=2, kernel_size=kernel_size).cuda()
        plain = reference.plain_model(model)
        images = torch.randn(8, 3, 32, 32, device='cuda')

        def gradients(m, images, dtype=None):
            with torch.autocast('cuda', dtype, enabled=dtype is not None):
                m(images).square().sum().backward()
            return {name: p.grad for name, p in m.named_parameters()}

        ours, of_plain = gradients(model, images, dtype), gradients(plain, images, dtype)
        theirs = checkpoint_filter_fn({**plain.state_dict(), **of_plain}, model)
        exact = gradients(copy.deepcopy(model).double(), images.double())
        errors = [
            sum(((grads[name] - grad).norm() / grad.norm()).item() for name, grad in exact.items() if grad.ndim == 4)
            for grads in (ours, theirs)]
        assert errors[0] < 1.5 * errors[1]

    @pytest.mark.parametrize('kind', KINDS)
    def test_scripted_in_train_mode(self, kind, images):
        model = SplitMixer(24, 2, channel_mixing=kind)
        torch.testing.assert_close(torch.jit.script(model)(images), model(images))

    @pytest.mark.parametrize('kind', KINDS)
    def test_traced_by_fx_in_train_mode(self, kind, images):
        model = SplitMixer(24, 2, channel_mixing=kind)
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(images), model(images))


class TestStrings:
    """ Arguments come as strings from timm's --model-kwargs and from YAML."""

    @pytest.mark.parametrize(('given', 'meant'), [
        (dict(overlap_ratio='6/11'), dict(overlap_ratio=6 / 11)),
        (dict(overlap_ratio='0.6'), dict(overlap_ratio=0.6)),
        (dict(spatial_residual='false'), dict(spatial_residual=False)),
        (dict(channel_residual='True'), dict(channel_residual=True)),
        (dict(channel_mixing='IV', num_segments='3'), dict(channel_mixing='iv', num_segments=3)),
        (dict(channel_mixing='3D', channel_kernel_size='12', channel_stride='6'),
         dict(channel_mixing='3d', channel_kernel_size=12, channel_stride=6)),
        (dict(alternate_segments='FALSE'), dict(alternate_segments=False)),
        (dict(kernel_size='3', patch_size='4', patch_stride='2'), dict(kernel_size=3, patch_size=4, patch_stride=2)),
        (dict(spatial_mixing='2D'), dict(spatial_mixing='2d')),
        (dict(drop_path_rate='0.1', drop_rate='0.2'), dict(drop_path_rate=0.1, drop_rate=0.2)),
        (dict(num_classes='7', in_chans='3'), dict(num_classes=7, in_chans=3)),
    ])
    def test_parsed(self, given, meant):
        assert repr(SplitMixer('18', '3', **given)) == repr(SplitMixer(18, 3, **meant))
        torch.manual_seed(1)
        parsed = SplitMixer(18, 3, **given).eval()
        torch.manual_seed(1)
        direct = SplitMixer(18, 3, **meant).eval()
        x = torch.randn(1, 3, 9, 9)
        assert torch.equal(parsed(x), direct(x))

    def test_fraction_is_the_published_double(self):
        for j in range(2, 7):
            model = SplitMixer(256, 1, overlap_ratio=f'{j}/{2 * j - 1}', device='meta')
            assert model.blocks[0].channel_mixing.mixer.conv.out_channels == int(256 * (j / (2 * j - 1)))


class TestBadInput:
    @pytest.mark.parametrize(('kwargs', 'words'), [
        (dict(overlap_ratio=0.5), ('overlap_ratio', '0.5', 'between 1/2 and 1')),
        (dict(overlap_ratio=1.0), ('overlap_ratio', '1.0')),
        (dict(overlap_ratio=float('nan')), ('overlap_ratio', 'nan')),
        (dict(overlap_ratio='2/0'), ('overlap_ratio', '2/0')),
        (dict(overlap_ratio='two thirds'), ('overlap_ratio', 'two thirds')),
        (dict(overlap_ratio=True), ('overlap_ratio', 'True')),
        (dict(channel_mixing='ii', num_segments=1), ('num_segments', '1', 'at least 2')),
        (dict(channel_mixing='ii', num_segments=25), ('num_segments', '25', 'dim=24')),
        (dict(channel_mixing='iv', num_segments=25), ('num_segments', '25', 'dim=24')),
        (dict(channel_mixing='iii', num_segments=5), ('num_segments', '5', 'divide', 'dim=24')),
        (dict(channel_mixing='ii', num_segments=2.5), ('num_segments', '2.5')),
        (dict(channel_mixing='3d', channel_kernel_size=16, channel_stride=5), ('channel_stride', '5', 'divide')),
        (dict(channel_mixing='3d', channel_kernel_size=16, channel_stride=2), ('channel_stride', 'divides dim=24')),
        (dict(channel_mixing='3d', channel_kernel_size=25), ('channel_kernel_size', '25', 'dim=24')),
        (dict(channel_mixing='vi'), ('channel_mixing', "'vi'", "'iii'")),
        (dict(channel_mixing=3), ('channel_mixing', '3')),
        (dict(spatial_mixing='4d'), ('spatial_mixing', "'4d'", "'2d'")),
        (dict(norm_layer='nonorm'), ('norm_layer', "'nonorm'", "'layernorm2d'")),
        (dict(norm_layer=7), ('norm_layer', '7')),
        (dict(norm_layer=nn.LayerNorm), ('norm_layer', 'LayerNorm', "'layernorm2d'", 'last dimension')),
        (dict(norm_layer=partial(RmsNorm, eps=1e-5)), ('norm_layer', 'RmsNorm', "'rmsnorm2d'")),
        (dict(act_layer='nonact'), ('act_layer', "'nonact'", "'gelu'")),
        (dict(act_layer=7), ('act_layer', '7')),
        (dict(act_layer=nn.SiLU()), ('act_layer', 'SiLU()')),
        (dict(norm_layer=nn.Identity()), ('norm_layer', 'Identity()')),
        (dict(depth=0), ('depth', '0', 'at least 1')),
        (dict(dim=0), ('dim', '0', 'at least 1')),
        (dict(dim=-3), ('dim', '-3')),
        (dict(dim='wide'), ('dim', "'wide'")),
        (dict(dim=1), ('dim', 'overlap_ratio', '1')),
        (dict(dim=16.5), ('dim', '16.5')),
        (dict(depth=True), ('depth', 'True')),
        (dict(kernel_size=0), ('kernel_size', '0')),
        (dict(patch_size=0), ('patch_size', '0')),
        (dict(patch_stride=0), ('patch_stride', '0')),
        (dict(in_chans=0), ('in_chans', '0')),
        (dict(num_classes=-1), ('num_classes', '-1')),
        (dict(spatial_residual='maybe'), ('spatial_residual', "'maybe'")),
        (dict(spatial_residual=1), ('spatial_residual', '1')),
        (dict(drop_rate=1.), ('drop_rate', '1.0')),
        (dict(drop_path_rate=-0.1), ('drop_path_rate', '-0.1')),
        (dict(drop_path_rate=0.1, spatial_residual=False), ('drop_path_rate', '0.1')),
        (dict(spatial_mixing='none', channel_mixing='none'), ('spatial_mixing', 'channel_mixing')),
        (dict(channel_mixing='none', channel_residual=True), ('channel_residual', 'channel_mixing')),
        # an argument of another type of mixing is refused, not passed over
        (dict(channel_mixing='ii', overlap_ratio=0.6), ('overlap_ratio', "'i'", "'ii'")),
        (dict(channel_mixing='i', num_segments=4), ('num_segments', "'iv'", "'i'")),
        (dict(channel_mixing='iii', alternate_segments=False), ('alternate_segments', "'iii'")),
        (dict(channel_mixing='i', channel_stride=4), ('channel_stride', "'3d'")),
    ])
    def test_refused_by_name(self, kwargs, words):
        with pytest.raises(ValueError, match='.') as error:
            SplitMixer(**{'dim': 24, 'depth': 2, **kwargs})
        for word in words:
            assert word in str(error.value)

    def test_unknown_argument(self):
        with pytest.raises(TypeError, match='overlap'):
            timm.create_model('splitmixer_i_256_8', overlap=0.6)

    def test_unknown_tag(self):
        with pytest.raises(RuntimeError, match='in22k'):
            timm.create_model('splitmixer_i_256_8.in22k')

    def test_image_smaller_than_patch(self):
        model = SplitMixer(12, 1, patch_size=7)
        with pytest.raises(AssertionError, match='height must be at least patch_size=7, got 6'):
            model(torch.randn(1, 3, 6, 9))
        with pytest.raises(AssertionError, match='width must be at least patch_size=7, got 6'):
            model.forward_intermediates(torch.randn(1, 3, 9, 6))

    @pytest.mark.compile
    @pytest.mark.parametrize('kind', ['i', 'iii', 'iv'])
    def test_compiled_for_any_size(self, kind):
        """ No size is compiled anew once torch knows that it varies, and it stays in the exported graph."""
        model = SplitMixer(24, 1, channel_mixing=kind).eval()
        torch.compiler.reset()
        counter = CompileCounter()
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        with torch.no_grad():
            for size in range(16, 40, 2):
                images = torch.randn(2, 3, size, size + 2)
                torch.testing.assert_close(compiled(images), model(images))
        assert counter.frame_count <= 3
        dims = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
        exported = torch.export.export(model, (images,), dynamic_shapes=(dims,), strict=True).module()
        images = torch.randn(3, 3, 10, 14)
        torch.testing.assert_close(exported(images), model(images))

    def test_image_smaller_than_patch_in_script(self):
        with pytest.raises(torch.jit.Error, match='height must be at least patch_size=7, got 6'):
            torch.jit.script(SplitMixer(12, 1, patch_size=7))(torch.randn(1, 3, 6, 9))

    def test_replaced_stem(self):
        """ Another patch embedding says itself what it takes."""
        model = SplitMixer(12, 1)
        model.stem[0] = nn.Conv2d(4, 12, 3, stride=2, padding=1)
        assert model(torch.randn(1, 4, 1, 8)).shape == (1, 1000)
        with pytest.raises(RuntimeError, match='4 channels, but got 3'):
            model(torch.randn(1, 3, 8, 8))
        for stem in (nn.Conv2d(4, 12, 2, 2), nn.Sequential(), torch.jit.trace(model.stem, torch.randn(1, 4, 8, 8))):
            model.stem = stem
            assert model(torch.randn(1, 12 if isinstance(stem, nn.Sequential) else 4, 8, 8)).shape == (1, 1000)

    def test_replaced_stem_in_script(self):
        model = SplitMixer(12, 1)
        model.stem[0] = nn.Conv2d(4, 12, 2, 2)
        scripted = torch.jit.script(model)
        assert scripted(torch.randn(1, 4, 8, 8)).shape == (1, 1000)
        with pytest.raises(RuntimeError, match='4 channels, but got 3'):
            scripted(torch.randn(1, 3, 8, 8))

    def test_wrong_channel_count(self):
        with pytest.raises(AssertionError, match='in_chans=3 channels, got 1'):
            SplitMixer(12, 1)(torch.randn(1, 1, 8, 8))
