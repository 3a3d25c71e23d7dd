""" optimize_for_inference: outputs of the model on every variant and input, the model left alone, what it refuses. """
import copy
import io
import math
import os
import platform
import re
import subprocess
import sys
import textwrap
import threading
import warnings
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import timm
import torch
from conftest import INDUCTOR, KINDS, SPLITMIXERS
from reference import randomize
from timm.utils import freeze
from torch import nn
from torch.nn.utils import prune

from splitmixer_timm import SplitMixer, compiled_cpu, fused_cpu, optimize_for_inference
from splitmixer_timm.fused_cpu import CompiledSplitMixer, FusedSplitMixer

# one of each way that a block can be built
OPTIONS = {
    'relu': dict(act_layer='relu'),
    'iv, unequal': dict(channel_mixing='iv', num_segments=5),
    'ii, middle': dict(channel_mixing='ii', num_segments=5),
    '3d, three positions': dict(channel_mixing='3d', channel_kernel_size=12, channel_stride=6),
    '2d': dict(spatial_mixing='2d'),
    'even kernel': dict(kernel_size=4),
    'no spatial mixing': dict(spatial_mixing='none'),
    'no channel mixing': dict(channel_mixing='none'),
    'no residual': dict(spatial_residual=False),
    'channel residual': dict(channel_residual=True),
    'overlapping patches': dict(patch_size=4, patch_stride=2),
    'one channel in': dict(in_chans=1),
    'stochastic depth': dict(drop_path_rate=0.2, drop_rate=0.1),
    'no classifier': dict(num_classes=0),
    'no pooling': dict(num_classes=0, global_pool=''),
    'max pooling': dict(global_pool='catavgmax'),
}


def build(dim=24, depth=3, **kwargs):
    return randomize(SplitMixer(dim, depth, **{'num_classes': 10, **kwargs}))


@torch.no_grad()
def difference(model, expected, images):
    """ Greatest absolute difference of the outputs, as a share of the greatest output."""
    y, out = expected(images), model(images)
    assert out.shape == y.shape
    return ((out.float() - y).abs().max() / y.abs().max()).item()


@pytest.fixture
def bfloat16(monkeypatch):
    """ Computed in it on any processor, by what torch has where oneDNN has nothing: else fp32 would be compared."""
    if not fused_cpu.has_bfloat16():
        monkeypatch.setattr(fused_cpu, '_has_onednn', lambda dtype: dtype == torch.float32)
        monkeypatch.setattr(fused_cpu, 'has_bfloat16', lambda: True)


class TestSameOutputs:
    @pytest.mark.parametrize('name', SPLITMIXERS)
    def test_registered(self, name, bfloat16):
        model = randomize(timm.create_model(name, depth=3, num_classes=11))
        fused = optimize_for_inference(model)
        assert isinstance(fused, FusedSplitMixer)
        images = torch.randn(2, 3, 45, 31)
        assert difference(fused, model, images) < 1e-5
        assert 1e-5 < difference(optimize_for_inference(model, dtype=torch.bfloat16), model, images) < 0.015

    @pytest.mark.parametrize('option', OPTIONS)
    def test_options(self, option, bfloat16):
        model = build(**OPTIONS[option])
        fused = optimize_for_inference(model)
        assert isinstance(fused, FusedSplitMixer)
        images = torch.randn(3, model.in_chans, 15, 18)
        assert difference(fused, model, images) < 1e-5
        assert difference(fused.forward_features, model.forward_features, images) < 1e-5
        fused = optimize_for_inference(model, dtype=torch.bfloat16)
        assert fused.compute_dtype == torch.bfloat16
        assert 1e-5 < difference(fused, model, images) < 0.015
        assert difference(fused.forward_features, model.forward_features, images) < 0.035

    @pytest.mark.parametrize('size', [(2, 2), (2, 31), (33, 7), (40, 40)])
    @pytest.mark.parametrize('kind', KINDS)
    def test_any_size(self, kind, size):
        model = build(channel_mixing=kind)
        assert difference(optimize_for_inference(model), model, torch.randn(2, 3, *size)) < 1e-5

    @pytest.mark.parametrize('height', [1, 2, 3, 4, 5, 9, 10])
    @pytest.mark.parametrize('kernel_size', [1, 2, 3, 4, 9])
    def test_borders(self, kernel_size, height):
        """ What is folded into the second convolution comes before its padding."""
        model = build(kernel_size=kernel_size, patch_size=1)
        assert difference(optimize_for_inference(model), model, torch.randn(1, 3, height, 6)) < 1e-5

    def test_channel_residual_around_groups(self, images):
        """ The convolution in groups takes no shift over, which the residual needs."""
        for kind in ('iii', 'iv'):
            model = build(channel_mixing=kind, channel_residual=True)
            assert difference(optimize_for_inference(model), model, images) < 1e-5

    def test_images_larger_than_a_piece(self, images, monkeypatch):
        monkeypatch.setattr(fused_cpu, 'PIECE_BYTES', 1)
        model = build()
        assert difference(optimize_for_inference(model), model, images) < 1e-5

    @pytest.mark.parametrize('batch', [1, 2, 3, 4, 7])
    def test_any_batch(self, batch, monkeypatch):
        """ Whole pieces, a rest, less than a piece."""
        monkeypatch.setattr(fused_cpu, 'PIECE_BYTES', -(-3 * 24 * 8 * 8 * 4 // torch.get_num_threads()))
        model = build()
        fused = optimize_for_inference(model)
        images = torch.randn(batch, 3, 16, 16)
        with torch.no_grad():
            sizes = [len(piece) for piece, in fused._pieces(images)]
        assert sizes == [3] * (batch // 3) + [batch % 3] * (batch % 3 > 0)
        assert difference(fused, model, images) < 1e-5
        assert difference(fused.forward_features, model.forward_features, images) < 1e-5

    @pytest.mark.parametrize('options', [
        {}, dict(indices=1), dict(indices=[2, 0]), dict(indices=[-1]), dict(indices=[0], stop_early=True),
        dict(indices=[1], stop_early=True, intermediates_only=True)], ids=str)
    @pytest.mark.parametrize('batch', [1, 4])
    @pytest.mark.parametrize('kind', ['i', 'iv'])
    def test_intermediates(self, kind, batch, options, monkeypatch):
        """ Of one piece, and of several; a block that overwrites its input does not reach those before it."""
        monkeypatch.setattr(fused_cpu, 'PIECE_BYTES', -(-3 * 24 * 8 * 8 * 4 // torch.get_num_threads()))
        model = build(channel_mixing=kind, spatial_mixing='none' if kind == 'i' else '1d')
        fused = optimize_for_inference(model)
        images = torch.randn(batch, 3, 16, 16)
        with torch.no_grad():
            ours, expected = (m.forward_intermediates(images, **options) for m in (fused, model))
        if not options.get('intermediates_only'):
            (features, ours), (expected_features, expected) = ours, expected
            torch.testing.assert_close(features, expected_features)
        assert len(ours) == len(expected) > 0
        for feature, expected_feature in zip(ours, expected):
            torch.testing.assert_close(feature, expected_feature)

    @pytest.mark.parametrize('submodules', [[], ['stem', 'blocks.0']])
    def test_frozen_norms(self, submodules, images):
        """ timm's freeze makes other modules of them, which fold as well. The model is left frozen."""
        model = build()
        expected = model(images)
        freeze(model, submodules)
        names = set(model.eval().state_dict())
        fused = optimize_for_inference(model)
        assert isinstance(fused, FusedSplitMixer)
        torch.testing.assert_close(fused(images), expected)
        assert set(model.state_dict()) == names
        model.stem[2].register_forward_hook(lambda module, args, output: output * 2)
        with pytest.warns(UserWarning, match='FrozenBatchNorm2d|hook'):
            hooked = optimize_for_inference(model)
        torch.testing.assert_close(hooked(images), model(images))

    def test_intermediates_of_another_layout(self, images):
        with pytest.raises(AssertionError, match='NCHW'):
            optimize_for_inference(build()).forward_intermediates(images, output_fmt='NLC')

    @pytest.mark.parametrize(('patch_size', 'patch_stride'), [(34, 1), (40, None)])
    def test_large_patches(self, patch_size, patch_stride):
        model = build(patch_size=patch_size, patch_stride=patch_stride)
        assert difference(optimize_for_inference(model), model, torch.randn(2, 3, 90, 80)) < 1e-5

    def test_no_images(self):
        model = build()
        images = torch.randn(0, 3, 16, 16)
        fused = optimize_for_inference(model)
        with torch.no_grad():
            assert fused(images).shape == model(images).shape == (0, 10)
            assert fused.forward_features(images).shape == model.forward_features(images).shape

    def test_memory_formats(self, images):
        model = build()
        fused = optimize_for_inference(model)
        expected = fused(images)
        for same in (images.contiguous(memory_format=torch.channels_last), images.mT.contiguous().mT,
                     torch.cat([images, images], 1)[:, :3]):
            torch.testing.assert_close(fused(same), expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize('kind', KINDS)
    def test_without_onednn(self, kind, images, monkeypatch):
        monkeypatch.setattr(fused_cpu.platform, 'machine', lambda: 'riscv64')
        monkeypatch.setattr(fused_cpu.torch.ops.mkldnn, '_reorder_convolution_weight', None)
        monkeypatch.setattr(fused_cpu.torch.ops.mkldnn, '_reorder_linear_weight', None)
        model = build(channel_mixing=kind)
        assert difference(optimize_for_inference(model), model, images) < 1e-5

    @pytest.mark.skipif(not torch.backends.mkl.is_available(), reason='needs MKL')
    @pytest.mark.skipif(not fused_cpu._has_onednn(torch.float32), reason='needs oneDNN on x86')
    @pytest.mark.parametrize('processor', ['AVX2', 'AVX512'])
    @pytest.mark.parametrize('kind', KINDS)
    def test_products_of_each_processor(self, kind, processor, images, monkeypatch):
        """ Of MKL, where the channels lie, and of oneDNN."""
        monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: processor)
        model = build(50, channel_mixing=kind)
        assert difference(optimize_for_inference(model), model, images) < 1e-5

    def test_model_in_bfloat16(self, images, bfloat16):
        model = build()
        fused = optimize_for_inference(copy.deepcopy(model).to(torch.bfloat16))
        assert fused(images).dtype == torch.bfloat16
        assert 1e-5 < difference(fused, model, images) < 0.02

    def test_processor_without_bfloat16(self, images, monkeypatch):
        """ Computed in fp32, as fast as that is; what goes in and comes out is as asked for."""
        monkeypatch.setattr(fused_cpu, 'has_bfloat16', lambda: False)
        model = build()
        with pytest.warns(UserWarning, match='does not compute in torch.bfloat16') as caught:
            fused = optimize_for_inference(model, dtype=torch.bfloat16)
        assert len(caught) == 1
        assert caught[0].filename == __file__
        assert isinstance(fused, FusedSplitMixer)
        assert {buffer.dtype for part in (fused.stem, fused.blocks) for buffer in part.buffers()} == {torch.float32}
        features = fused.forward_features(images.bfloat16())
        assert features.dtype == fused(images).dtype == fused.head.weight.dtype == torch.bfloat16
        assert torch.equal(fused.forward_head(fused.forward_features(images)), fused(images))
        expected = optimize_for_inference(model).forward_features(images)
        assert torch.equal(fused.forward_features(images), expected.bfloat16())
        assert torch.equal(fused.to(torch.bfloat16).forward_features(images), expected.bfloat16())
        assert torch.equal(copy.deepcopy(fused)(images), fused(images))
        monkeypatch.setattr(fused_cpu, 'PIECE_BYTES', 1)  # an image at a time
        assert torch.equal(fused.forward_features(images), expected.bfloat16())

    def test_norm_without_affine(self, images):
        model = randomize(SplitMixer(24, 2, norm_layer=lambda dim, **dd: nn.BatchNorm2d(dim, affine=False, **dd)))
        fused = optimize_for_inference(model)
        assert isinstance(fused, FusedSplitMixer)
        assert difference(fused, model, images) < 1e-5


# what has no compiled kernels
NOT_COMPILED = ('2d', 'no spatial mixing', 'no channel mixing', 'channel residual')


@pytest.fixture(params=[pytest.param('kernels', marks=[INDUCTOR, pytest.mark.compile]), 'torch'])
def between(request, monkeypatch):
    """ What lies between the products by the kernels, and in torch's operations, as where there is no compiler."""
    if request.param == 'torch':
        monkeypatch.setattr(fused_cpu, '_missing_kernels', lambda: None)
        monkeypatch.setattr(fused_cpu, '_has_kernels', lambda: False)


class TestCompile:
    """ `compile=True`: kernels in C++ between the products. """

    @pytest.mark.parametrize('name', SPLITMIXERS)
    def test_registered(self, name, between, bfloat16):
        model = randomize(timm.create_model(name, depth=3, num_classes=11))
        fused = optimize_for_inference(model, compile=True)
        assert isinstance(fused, CompiledSplitMixer)
        images = torch.randn(2, 3, 45, 31)
        assert difference(fused, model, images) < 1e-5
        half = optimize_for_inference(model, dtype=torch.bfloat16, compile=True)
        assert 1e-5 < difference(half, model, images) < 0.015

    @pytest.mark.parametrize('option', [option for option in OPTIONS if option not in NOT_COMPILED])
    def test_options(self, option, between, bfloat16):
        model = build(**OPTIONS[option])
        fused = optimize_for_inference(model, compile=True)
        assert isinstance(fused, CompiledSplitMixer)
        images = torch.randn(3, model.in_chans, 15, 18)
        assert difference(fused, model, images) < 1e-5
        assert difference(fused.forward_features, model.forward_features, images) < 1e-5
        half = optimize_for_inference(model, dtype=torch.bfloat16, compile=True)
        assert half.compute_dtype == torch.bfloat16
        assert 1e-5 < difference(half, model, images) < 0.015

    @pytest.mark.parametrize('option', NOT_COMPILED)
    def test_not_compiled(self, option, images):
        model = build(**OPTIONS[option])
        with pytest.warns(UserWarning, match='compiles nothing for (spatial mixing other|blocks without channel)'):
            fused = optimize_for_inference(model, compile=True)
        assert type(fused) is FusedSplitMixer
        assert difference(fused, model, images) < 1e-5

    def test_no_faster_form(self):
        model = build(act_layer='silu')
        with pytest.warns(UserWarning, match='no faster form for activation SiLU'):
            assert type(optimize_for_inference(model, compile=True)) is SplitMixer

    @pytest.mark.parametrize('height', [1, 2, 3, 5, 10])
    @pytest.mark.parametrize('kernel_size', [1, 2, 3, 4, 9])
    def test_borders(self, kernel_size, height, between):
        model = build(kernel_size=kernel_size, patch_size=1)
        images = torch.randn(1, 3, height, 6)
        assert difference(optimize_for_inference(model, compile=True), model, images) < 1e-5
        assert difference(optimize_for_inference(model, compile=True), model, images.mT.contiguous()) < 1e-5

    @pytest.mark.parametrize('kind', ['i', 'iv', 'v'])
    def test_intermediates(self, kind, between, images, monkeypatch):
        """ Completed for whoever takes them, while the next block goes on with what is not; in pieces of an image."""
        monkeypatch.setattr(fused_cpu, 'PIECE_BYTES', 1)
        model = build(channel_mixing=kind)
        fused = optimize_for_inference(model, compile=True)
        with torch.no_grad():
            for indices, stop_early in (([0, 1, 2], False), ([0], True), (2, False)):
                expected = model.forward_intermediates(images, indices, stop_early=stop_early)
                actual = fused.forward_intermediates(images, indices, stop_early=stop_early)
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(fused.forward_head(actual[0]), model.forward_head(expected[0]))

    @INDUCTOR
    @pytest.mark.compile
    def test_features_are_completed_for_others_alone(self, images, monkeypatch):
        """ Not for an average, and the last ones once."""
        calls, make = [], fused_cpu.act_affine_kernel
        monkeypatch.setattr(
            fused_cpu, 'act_affine_kernel', lambda *args: lambda x: [calls.append(x), make(*args)(x)][1])
        fused = optimize_for_inference(build(), compile=True)
        fused(images)
        assert not calls
        features, intermediates = fused.forward_intermediates(images)
        assert len(calls) == len(intermediates) == 3
        assert torch.equal(features, intermediates[-1])

    @pytest.mark.parametrize('kind', ['i', 'iv'])
    def test_loads_weights(self, kind, between, images):
        one, other = (
            optimize_for_inference(randomize(build(channel_mixing=kind), seed=seed), compile=True) for seed in (1, 2))
        assert not torch.equal(one(images), other(images))
        one.load_state_dict(other.state_dict())
        assert torch.equal(one(images), other(images))
        assert torch.equal(copy.deepcopy(one)(images), one(images))

    @pytest.mark.parametrize('changes', [{}, dict(kernel_size=1), dict(dim=1)])
    def test_model_is_left_alone(self, between, images, changes):
        model = build(channel_mixing='full', **changes)
        state = copy.deepcopy(model.state_dict())
        fused = optimize_for_inference(model, compile=True)
        fused(images)
        for tensor in (*fused.parameters(), *fused.buffers()):
            tensor.zero_()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

    @pytest.mark.parametrize('kind', ['i', 'iii', 'iv'])
    def test_traced_and_exported(self, kind, between, images):
        fused = optimize_for_inference(build(channel_mixing=kind), compile=True)
        dims = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
        exported = torch.export.export(fused, (images,), dynamic_shapes=(dims,)).module()
        traced = torch.jit.trace(fused, images[:1])
        for same in (traced, exported):
            for other in (images, torch.randn(5, 3, 22, 20)):
                torch.testing.assert_close(same(other), fused(other), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize('pool', ['', 'avg', 'fastavg', 'max', 'catavgmax'])
    def test_pooling(self, pool, between, images):
        model = build(num_classes=0, global_pool=pool)
        fused = optimize_for_inference(model, compile=True)
        assert difference(fused, model, images) < 1e-5
        torch.testing.assert_close(fused(images), fused.forward_head(fused.forward_features(images)))

    def test_replaced_pooling(self, between, images):
        """ Pooling and head that were replaced are what counts."""
        fused = optimize_for_inference(build(num_classes=0), compile=True)
        features = fused.forward_features(images)
        pool = fused.global_pool = timm.layers.SelectAdaptivePool2d(pool_type='avg')
        assert fused(images).shape == (2, 24, 1, 1)
        pool.flatten = nn.Flatten(1)
        for part in (nn.AdaptiveMaxPool2d(1), nn.AdaptiveAvgPool2d((1, 1)), nn.AdaptiveAvgPool2d(2), nn.Identity()):
            pool.pool = part
            torch.testing.assert_close(fused(images), part(features).flatten(1))
        pool.pool = nn.AdaptiveAvgPool2d(1)
        torch.testing.assert_close(fused(images), features.mean((2, 3)))
        fused.forward_head = lambda x: x
        torch.testing.assert_close(fused(images), features)

    def test_saved(self, between, images):
        fused, file = optimize_for_inference(build(), compile=True), io.BytesIO()
        torch.save(fused, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(images), fused(images))

    def test_without_kernels(self, images, monkeypatch):
        """ A model whose kernels cannot be compiled where it was loaded still runs, and says so."""
        def no_compiler():
            raise RuntimeError('no compiler')

        with monkeypatch.context() as patch:
            patch.setattr(fused_cpu, '_missing_kernels', lambda: None)
            patch.setattr(fused_cpu, '_has_kernels', lambda: False)
            fused = optimize_for_inference(build(), compile=True)
        monkeypatch.setattr(fused_cpu, 'library', no_compiler)
        with pytest.warns(UserWarning, match='without kernels for want of .* works .RuntimeError: no compiler.'):
            assert difference(copy.deepcopy(fused), build(), images) < 1e-5
        with pytest.warns(UserWarning, match='compiles nothing for spatial mixing other'):  # the real reason
            optimize_for_inference(build(spatial_mixing='2d'), compile=True)

    @INDUCTOR
    @pytest.mark.compile
    def test_inference_mode_and_sizes(self):
        """ The same kernels for all batches and sizes, also of tensors without versions."""
        model = build()
        fused = optimize_for_inference(model, compile=True)
        for size in ((2, 3, 16, 16), (4, 3, 16, 16), (1, 3, 16, 16), (3, 3, 6, 30), (1, 3, 40, 4)):
            with torch.inference_mode():
                assert difference(fused, model, torch.randn(size)) < 1e-5

    @INDUCTOR
    @pytest.mark.compile
    def test_other_dtypes_and_widths(self, images):
        """ Weights that came in another data type are used all the same; features that do not fit are refused."""
        fused = optimize_for_inference(build(), compile=True)
        expected = fused(images)
        for buffer in ('scale1', 'weight2'):
            setattr(fused.blocks[0], buffer, getattr(fused.blocks[0], buffer).double())
        torch.testing.assert_close(fused(images), expected)
        fused.stem = optimize_for_inference(build(dim=32), compile=True).stem
        with pytest.raises(RuntimeError, match='must be of torch.float32 with 24 channels, got torch.float32 with 32'):
            fused(images)
        kernel = compiled_cpu.act_affine_kernel(torch.float32, *_norm(8), 'gelu')
        with pytest.raises(RuntimeError, match='must be of torch.float32 with 8 channels, got torch.bfloat16 with 8'):
            kernel(torch.zeros(1, 2, 2, 8, dtype=torch.bfloat16))

    def test_arithmetic_without_kernels(self):
        """ It is fp32, rounded once."""
        x, parts = torch.randn(2, 5, 4, 8).bfloat16(), [*_parts(8, (3, 3), ['gelu'] * 3), True]
        for function, args in ((compiled_cpu.act_affine, parts[:3]), (compiled_cpu.spatial_mixing, parts)):
            assert torch.equal(function(x, *args), function(x.float(), *args).bfloat16())

    def test_empty_batch(self, between):
        assert optimize_for_inference(build(), compile=True)(torch.empty(0, 3, 16, 16)).shape == (0, 10)

    @pytest.mark.package
    def test_no_compiler(self, tmp_path):
        """ Said when the model is made, and nothing is compiled."""
        code = textwrap.dedent("""
            import torch, warnings
            from splitmixer_timm import SplitMixer, optimize_for_inference
            model, images = SplitMixer(8, 1, num_classes=2).eval(), torch.randn(1, 3, 8, 8)
            with warnings.catch_warnings(record=True) as caught, torch.no_grad():
                fused = optimize_for_inference(model, compile=True)
                torch.testing.assert_close(fused(images), model(images))
            print(type(fused).__name__, *(w.message for w in caught))
        """)
        environment = dict(os.environ, CXX=str(tmp_path / 'none'), TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
        out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env=environment)
        assert out.stdout.startswith(
            'FusedSplitMixer optimize_for_inference compiles nothing for want of a C++ compiler that works (')
        assert str(tmp_path / 'none') in out.stdout


def _norm(channels):
    return torch.rand(channels) + 0.5, torch.randn(channels)


def _parts(channels, kernel_sizes, acts):
    """ What `spatial_mixing` takes between features and `is_residual`."""
    parts = [*_norm(channels), acts[0]]
    for size, act in zip(kernel_sizes, acts[1:]):
        parts += [torch.randn(size, channels) / size**0.5, torch.randn(channels), *_norm(channels), act]
    return parts


@INDUCTOR
@pytest.mark.compile
class TestKernels:
    """ The kernels of cpu_kernels.cpp against what they stand for in torch's operations. """

    def compare(self, kernel, function, parts, shape):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(shape).to(dtype)
            before = x.clone()
            expected = function(x.float(), *parts)
            actual = kernel(dtype, *parts)(x)
            assert actual.shape == expected.shape
            assert actual.dtype == (torch.float32 if kernel is compiled_cpu.act_affine_mean_kernel else dtype)
            error = 1e-5 if actual.dtype == dtype == torch.float32 else 2e-4
            torch.testing.assert_close(
                actual.float(), expected, atol=error, rtol=1e-5 if actual.dtype == torch.float32 else 2**-8)
            assert torch.equal(x, before)

    @pytest.mark.parametrize('channels', [1, 8, 20, 32, 40, 256])
    @pytest.mark.parametrize('size', [(1, 1), (5, 3), (8, 16), (2, 33)])
    def test_channels_and_sizes(self, channels, size):
        for batch in (1, 3):
            parts = _parts(channels, (5, 5), ['gelu'] * 3)
            shape = (batch, *size, channels)
            self.compare(compiled_cpu.spatial_mixing_kernel, compiled_cpu.spatial_mixing, [*parts, True], shape)
            self.compare(compiled_cpu.act_affine_kernel, compiled_cpu.act_affine, parts[:3], shape)
            self.compare(
                compiled_cpu.act_affine_mean_kernel, lambda x, *norm: compiled_cpu.act_affine(x, *norm).mean((1, 2)),
                parts[:3], shape)

    @pytest.mark.parametrize('threads', [1, 2, 3, 16])
    @pytest.mark.parametrize('kernel_sizes', [(1, 1), (2, 2), (7, 7), (4, 9), (9, 3)])
    def test_kernel_sizes_and_threads(self, kernel_sizes, threads, monkeypatch):
        """ With more threads than images times channels, images are cut in bands of rows."""
        monkeypatch.setattr(torch, 'get_num_threads', lambda: threads)
        for height in (1, 2, 6, 13, 40):
            for batch, channels in ((1, 40), (2, 8)):
                parts = [*_parts(channels, kernel_sizes, ['gelu'] * 3), True]
                self.compare(
                    compiled_cpu.spatial_mixing_kernel, compiled_cpu.spatial_mixing, parts,
                    (batch, height, 9, channels))

    @pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize('channels', [1, 20, 37, 64])
    def test_stays_within_bounds(self, channels, dtype):
        """ Nothing is written beyond the features, and no feature is made of what lies beyond them."""
        shape, margin = (2, 3, 5, channels), 1000
        size = math.prod(shape)
        parts = _parts(channels, (3, 3), ['gelu'] * 3)
        for kernel in (
                compiled_cpu.spatial_mixing_kernel(dtype, *parts, True),
                compiled_cpu.act_affine_kernel(dtype, *parts[:3]),
                compiled_cpu.act_affine_mean_kernel(dtype, *parts[:3])):
            memory = torch.full((size + 2 * margin,), torch.nan, dtype=dtype)
            x = memory[margin:-margin].view(shape)
            x.copy_(torch.randn(shape))
            expected = kernel(x.clone())
            around = torch.full((expected.numel() + 2 * margin,), torch.nan, dtype=expected.dtype)
            out = around[margin:-margin].view(expected.shape)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch, 'empty', lambda *args, out=out, **kwargs: out)
                assert kernel(x) is out
            assert torch.equal(out, expected)
            assert not out.isnan().any()
            assert around[:margin].isnan().all()
            assert around[-margin:].isnan().all()

    @pytest.mark.parametrize('is_residual', [False, True])
    @pytest.mark.parametrize('acts', [('gelu', 'relu', 'relu'), ('relu', 'gelu', 'relu'), ('relu', 'relu', 'gelu')])
    def test_activations(self, acts, is_residual):
        parts = [*_parts(24, (3, 5), acts), is_residual]
        self.compare(compiled_cpu.spatial_mixing_kernel, compiled_cpu.spatial_mixing, parts, (2, 6, 7, 24))

    def test_gelu(self):
        """ In fp32 nearly as exact as it can be, in bf16 rounded rightly but for the error of the fit."""
        none = torch.ones(1), torch.zeros(1), 'gelu'
        x = torch.linspace(-40, 40, 800_001)
        out = compiled_cpu.act_affine_kernel(torch.float32, *none)(x.view(1, 1, -1, 1)).flatten()
        assert ((out - nn.functional.gelu(x.double())).abs() <= 2.5e-7 * x.abs().clamp(min=1)).all()
        assert compiled_cpu.act_affine_kernel(torch.float32, *none)(torch.full((1, 1, 1, 1), -1e6)) == 0
        x = torch.arange(-2**15, 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
        x = x[x.isfinite()]
        out = compiled_cpu.act_affine_kernel(torch.bfloat16, *none)(x.view(1, 1, -1, 1)).flatten()
        exact = nn.functional.gelu(x.double())
        assert ((out - exact).abs() <= (2**-8 + 3e-5) * exact.abs() + 7e-5 + 1e-9 * x.abs()).all()
        for dtype in (torch.float32, torch.bfloat16):
            special = torch.tensor([-0., torch.nan, torch.inf], dtype=dtype).view(1, 1, 3, 1)
            for act in ('gelu', 'relu'):
                out = compiled_cpu.act_affine_kernel(dtype, *none[:2], act)(special).flatten().tolist()
                assert out[0] == 0
                assert out[1] != out[1]
                assert out[2] == torch.inf

    def test_fits(self):
        """ Half of erf, as the source has it: by the coefficients that it computes with, in fp64."""
        def evaluate(name, square):
            coefficients = torch.tensor([float(c) for c in values[name].replace('f', '').split(',')])
            return sum(c.double() * square**i for i, c in enumerate(coefficients))

        source = compiled_cpu.SOURCE.read_text(encoding='utf-8')
        for dtype, error in (('float', 1.6e-8), ('BFloat16', 1.4e-5)):
            body = re.search(rf'inline Vec gelu<{dtype}>.*?\n}}\n', source, re.DOTALL)[0]
            values = dict(re.findall(r'([PQ])\[\] = {(.*?)}', body, re.DOTALL))
            bound = torch.tensor(float(re.search(r'BOUND = ([\d.]+)f', body)[1])).item()
            x = torch.linspace(0, bound, 100_001, dtype=torch.float64)
            fit = x * evaluate('P', x**2) / (evaluate('Q', x**2) if 'Q' in values else 1)
            assert (fit - torch.erf(x / 2**0.5) / 2).abs().max() < error
            assert 0.5 - math.erf(bound / 2**0.5) / 2 < error

    @pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ('AVX2', 'AVX512'), reason='needs AVX2')
    @pytest.mark.parametrize('capability', ['avx2', 'default'])
    def test_other_processors(self, capability):
        """ With shorter vectors, and without any that torch knows."""
        tests = 'test_channels_and_sizes' + (' or test_gelu' if capability == 'avx2' else '')
        out = subprocess.run(
            [sys.executable, '-m', 'pytest', __file__, '-k', tests, '-q', '-p', 'no:cacheprovider'],
            capture_output=True, text=True, env=dict(os.environ, ATEN_CPU_CAPABILITY=capability))
        assert out.returncode == 0, out.stdout
        assert f'{24 + (capability == "avx2")} passed' in out.stdout

    def test_memory_formats(self):
        """ Features that are not contiguous are read rightly."""
        parts = [*_parts(24, (3, 3), ['gelu'] * 3), True]
        x = torch.randn(2, 24, 6, 5).permute(0, 2, 3, 1)
        torch.testing.assert_close(
            compiled_cpu.spatial_mixing_kernel(torch.float32, *parts)(x), compiled_cpu.spatial_mixing(x, *parts),
            rtol=1e-5, atol=1e-5)

    def test_default_device(self):
        """ They write to the CPU's memory, whatever device new tensors are made on."""
        for make in (compiled_cpu.act_affine_kernel, compiled_cpu.act_affine_mean_kernel):
            kernel = make(torch.float32, *_norm(8), 'gelu')
            with torch.device('meta'):
                assert kernel(torch.empty(0, 2, 2, 8, device='cpu')).is_cpu

    def test_threads(self, monkeypatch):
        """ As many as torch has when a kernel is called."""
        threads = []
        monkeypatch.setattr(compiled_cpu, 'library', lambda: SimpleNamespace(
            channels=lambda: 32, act_affine_float=lambda *args: threads.append(args[-1])))
        kernel = compiled_cpu.act_affine_kernel(torch.float32, *_norm(8), 'gelu')
        monkeypatch.setattr(torch, 'get_num_threads', lambda: 5)
        kernel(torch.zeros(1, 2, 2, 8))
        assert threads == [5]

    def test_mean(self):
        """ Summed row by row: of a million pixels it is still exact."""
        x = torch.rand(1, 1000, 1000, 1)
        mean = compiled_cpu.act_affine_mean_kernel(torch.float32, torch.ones(1), torch.zeros(1), 'relu')(x)
        assert abs(mean.item() - x.double().mean().item()) < 2e-6


class TestInterface:
    def test_model_is_left_alone(self, images):
        model = build()
        state, before = copy.deepcopy(model.state_dict()), copy.deepcopy(images)
        for dtype in (None, torch.bfloat16):
            fused = optimize_for_inference(model, dtype=dtype)
            fused(images)
            for tensor in (*fused.parameters(), *fused.buffers()):
                tensor.zero_()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
        assert torch.equal(images, before)

    def test_later_training_does_not_reach_it(self, images):
        model = build()
        fused = optimize_for_inference(model)
        expected = fused(images)
        randomize(model, seed=1)
        assert torch.equal(fused(images), expected)

    def test_attributes(self, images):
        model = timm.create_model('splitmixer_i_256_8', depth=1).eval()
        fused = optimize_for_inference(model)
        for name in (
                'num_classes', 'num_features', 'head_hidden_size', 'in_chans', 'feature_info', 'pretrained_cfg',
                'default_cfg'):
            assert getattr(fused, name) == getattr(model, name)
        assert fused.get_classifier() is fused.head
        assert timm.data.resolve_model_data_config(fused) == timm.data.resolve_model_data_config(model)
        features = fused.forward_features(images)
        torch.testing.assert_close(fused.forward_head(features), fused(images))
        assert fused.forward_head(features, pre_logits=True).shape == (2, 256)

    def test_frozen(self, images):
        fused = optimize_for_inference(build())
        assert not fused.training
        assert not any(p.requires_grad for p in fused.parameters())
        assert not fused(images.clone().requires_grad_()).requires_grad
        assert not fused.forward_features(images.clone().requires_grad_()).requires_grad
        assert fused.eval() is fused
        with pytest.raises(RuntimeError, match='inference only'):
            fused.train()

    def test_copies(self, images):
        """ Weights in oneDNN's layout have no copies and are made anew."""
        fused = optimize_for_inference(build())
        expected = fused(images)
        file = io.BytesIO()
        torch.save(fused, file)
        file.seek(0)
        for same in (copy.deepcopy(fused), torch.load(file, weights_only=False)):
            assert torch.equal(same(images), expected)
        fused.compile(backend='eager')  # which no file has
        torch.save(fused, file := io.BytesIO())
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(images), expected)

    @pytest.mark.parametrize('kind', ['i', 'iv'])
    def test_loads_weights(self, kind, images):
        """ However weights get in, the functions made of those before are not used any more."""
        def fused(seed):
            return optimize_for_inference(randomize(build(channel_mixing=kind), seed=seed))

        state, expected, other = fused(2).state_dict(), fused(2)(images), fused(1)(images)
        assert not torch.equal(expected, other)
        alone, part, changed, swapped = (fused(1) for _ in range(4))
        alone.load_state_dict(state)
        nn.Sequential(part).load_state_dict({f'0.{name}': tensor for name, tensor in state.items()}, assign=True)
        for name, tensor in changed.state_dict().items():
            tensor.copy_(state[name])
        for same in (alone, part, changed):
            assert torch.equal(same(images), expected)
        assert torch.equal(torch.func.functional_call(swapped, state, images), expected)
        assert torch.equal(swapped(images), other)

    def test_made_in_inference_mode(self, images):
        """ What is made and loaded there has no versions of its own, and the new weights count all the same."""
        with torch.inference_mode():
            made, other = (optimize_for_inference(build()) for _ in range(2))
            for buffer in other.buffers():
                buffer.mul_(1.5)
            for fused in (copy.deepcopy(made), made):
                fused(images)
                fused.load_state_dict(other.state_dict())
                assert torch.equal(fused(images), copy.deepcopy(fused)(images))
                assert difference(fused, other, images) == 0

    def test_replaced_modules(self, images):
        fused, other = (optimize_for_inference(build()) for _ in range(2))
        before = fused(images)
        fused.blocks[0] = other.blocks[1]
        assert torch.equal(fused(images), copy.deepcopy(fused)(images))
        assert not torch.equal(fused(images), before)
        fused.blocks = fused.blocks[:1]
        assert torch.equal(fused(images), copy.deepcopy(fused)(images))
        fused.blocks.append(other.blocks[0])
        assert torch.equal(fused(images), copy.deepcopy(fused)(images))

    @pytest.mark.skipif(not fused_cpu._has_onednn(torch.float32), reason='needs oneDNN on x86')
    @pytest.mark.parametrize('processor', ['AVX2', 'AVX512'])
    @pytest.mark.parametrize(('kind', 'linears', 'convs'), [('i', 1, 2), ('iii', 0, 3), ('iv', 0, 3), ('v', 2, 2)])
    def test_prepared(self, kind, linears, convs, processor, images, monkeypatch):
        """ oneDNN's operations, on weights that no call lays out again; types III and IV are one convolution each. With
        AVX2 products are MKL's, where there is one."""
        monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: processor)
        fused = optimize_for_inference(build(channel_mixing=kind))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            fused(images)
        names = [event.name for event in profile.events()]
        assert names.count('mkldnn::_convolution_pointwise') == 1 + 3 * convs
        of_mkl = processor == 'AVX2' and torch.backends.mkl.is_available()
        assert names.count('mkldnn::_linear_pointwise') == (0 if of_mkl else 3 * linears)
        assert names.count('aten::addmm') == 1 + (3 * linears if of_mkl else 0)  # and the classifier
        assert not any('reorder' in name for name in names)

    @pytest.mark.parametrize('kind', ['i', 'iii', 'iv'])
    def test_traced_and_exported(self, kind, images):
        """ For other sizes of batch and images, too."""
        fused = optimize_for_inference(build(channel_mixing=kind))
        traced, file = torch.jit.trace(fused, images[:1]), io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        dims = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
        exported = torch.export.export(fused, (images,), dynamic_shapes=(dims,)).module()
        for same in (torch.jit.load(file), exported):
            torch.testing.assert_close(same(images), fused(images), rtol=1e-5, atol=1e-6)
            more = torch.randn(5, 3, 22, 20)
            torch.testing.assert_close(same(more), fused(more), rtol=1e-5, atol=1e-6)

    @pytest.mark.compile
    def test_compiled(self, images):
        fused = optimize_for_inference(build(channel_mixing='iv'))
        torch.compiler.reset()
        compiled = torch.compile(fused, backend='aot_eager', fullgraph=True)
        for size in (2, 1):
            torch.testing.assert_close(compiled(images[:size]), fused(images[:size]), rtol=1e-5, atol=1e-6)
        for size in range(16, 40, 2):
            images = torch.randn(2, 3, size, size)
            torch.testing.assert_close(compiled(images), fused(images), rtol=1e-5, atol=1e-6)

    @pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='about the memory allocator of glibc')
    def test_memory_is_kept(self):
        """ Memory that goes back to the system at every call makes the next one slower."""
        code = textwrap.dedent("""
            import resource, torch
            from splitmixer_timm import SplitMixer, optimize_for_inference
            fused, images = optimize_for_inference(SplitMixer(256, 4, patch_size=7).eval()), torch.randn(8, 3, 224, 224)
            faults = []
            for _ in range(8):
                fused(images)
                faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
            print((faults[-1] - faults[3]) / 4)
        """)
        environment = {name: value for name, value in os.environ.items() if not name.startswith('MALLOC_')}
        out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env=environment)
        assert float(out.stdout) < 500  # pages; thousands otherwise

    @pytest.mark.parametrize('move', [lambda m: m.half(), lambda m: m.to('meta')])
    def test_keeps_dtype_and_device(self, move):
        with pytest.raises(RuntimeError, match='keeps the kind of device and the dtype'):
            move(optimize_for_inference(build()))

    @pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
    def test_moves_that_change_nothing(self, images, dtype):
        fused = optimize_for_inference(build(), dtype=dtype)
        expected = fused(images)
        types = [buffer.dtype for buffer in fused.buffers()]
        for same in (fused.to(dtype), fused.to('cpu'), fused.share_memory()):
            assert torch.equal(same(images), expected)
            assert [buffer.dtype for buffer in same.buffers()] == types
        other = torch.bfloat16 if dtype == torch.float32 else torch.float32
        with pytest.raises(RuntimeError, match='keeps the kind of device and the dtype'):
            fused.to(other)

    def test_bad_images(self):
        fused = optimize_for_inference(build(patch_size=7))
        with pytest.raises(AssertionError, match='in_chans=3 channels, got 1'):
            fused(torch.randn(1, 1, 8, 8))
        with pytest.raises(AssertionError, match='height must be at least patch_size=7, got 6'):
            fused(torch.randn(1, 3, 6, 9))
        with pytest.raises(ValueError, match='floating point on cpu, got torch.uint8 on cpu'):
            fused(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
        with pytest.raises(ValueError, match='on cpu, got torch.float32 on meta'):
            fused(torch.zeros(1, 3, 8, 8, device='meta'))

    def test_keeps_dtype_under_autocast(self, images):
        fused = optimize_for_inference(build())
        expected = fused(images)
        with torch.autocast('cpu', torch.bfloat16):
            assert torch.equal(fused(images), expected)

    def test_autocast_of_another_thread(self, images):
        """ Threads that run one model at a time each keep their own."""
        fused, both = optimize_for_inference(build()), threading.Barrier(2, timeout=20)
        fused.head.register_forward_hook(lambda *args: (both.wait(), None)[1])  # each is inside before either leaves

        def run(enabled):
            with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
                fused(images)
                return torch.is_autocast_enabled('cpu')

        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(run, (False, True))) == [False, True]


class TestRefused:
    def test_train_mode(self):
        with pytest.raises(ValueError, match=r'train mode: call model\.eval\(\)'):
            optimize_for_inference(SplitMixer(24, 1))
        model = SplitMixer(24, 2).eval()
        model.blocks[1].channel_mixing.norm.train()
        with pytest.raises(ValueError, match='train mode'):
            optimize_for_inference(model)

    @pytest.mark.parametrize('model', [nn.Linear(2, 2), 'splitmixer_i_256_8', timm.models.ConvMixer(8, 1)])
    def test_other_models(self, model):
        with pytest.raises(TypeError, match=rf'SplitMixer, got {type(model).__name__}'):
            optimize_for_inference(model)

    @pytest.mark.parametrize('dtype', ['bf16', torch.int8])
    def test_dtype(self, dtype):
        with pytest.raises(TypeError, match='floating point torch.dtype or None'):
            optimize_for_inference(build(), dtype=dtype)


def hooked():
    model = build()
    model.blocks[0].register_forward_hook(lambda module, args, output: output * 2)
    return model


def pruned():
    model = build()
    prune.l1_unstructured(model.blocks[0].channel_mixing.mixer.conv, 'weight', 0.5)
    assert not model.blocks[0].channel_mixing.mixer.conv.weight.is_leaf
    return model


def without(part, **kwargs):
    """ A mixing is taken out, its residual stays."""
    model = build(**kwargs)
    setattr(model.blocks[1], part, nn.Identity())
    return model.eval()


def other_spatial(**parts):
    model = randomize(SplitMixer(24, 2, num_classes=10))
    for name, part in parts.items():
        setattr(model.blocks[1].spatial_mixing, name, part)
    return model.eval()


class Adapted(nn.Module):
    """ A convolution with a low-rank adapter beside it, which shows the convolution's weight as its own."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv
        self.adapter = nn.Conv2d(conv.in_channels, conv.out_channels, 1)

    @property
    def weight(self):
        return self.conv.weight

    @property
    def bias(self):
        return self.conv.bias

    def forward(self, x):
        return self.conv(x) + self.adapter(x)


class Gate(nn.Module):
    def __init__(self, dim=24):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 1)

    def forward(self, x):
        return x * self.conv(x.mean((2, 3), keepdim=True)).sigmoid()


class Similarities(nn.Module):
    def forward(self, x):
        return x @ x.T, x.norm(dim=1)


class PowerMean(nn.Module):
    def __init__(self):
        super().__init__()
        self.power = nn.Parameter(torch.tensor(3.))

    def forward(self, x):
        return x.clamp(min=0.01).pow(self.power).mean((2, 3)).pow(1 / self.power)


class OwnHead(SplitMixer):
    def forward_head(self, x, pre_logits=False):
        return super().forward_head(x, pre_logits) * 2


def adapted(kind):
    model = build(channel_mixing=kind)
    mixer = model.blocks[1].channel_mixing.mixer
    if kind == 'iv':
        mixer.convs[1] = Adapted(mixer.convs[1])
    else:
        mixer.conv = Adapted(mixer.conv)
    return model.eval()


def gated_mixing():
    model = build()
    model.blocks[0].spatial_mixing.add_module('gate', Gate())
    return model.eval()


def gated_block():
    model = build()
    model.blocks[0] = nn.Sequential(model.blocks[0], Gate())
    return model.eval()


def gate_at_the_end():
    model = build()
    model.blocks.append(Gate())
    return model.eval()


def circular():
    model = randomize(SplitMixer(24, 2, num_classes=10))
    conv = model.blocks[0].spatial_mixing.conv2
    circular = nn.Conv2d(24, 24, (5, 1), padding='same', groups=24, padding_mode='circular')
    circular.load_state_dict(conv.state_dict())
    model.blocks[0].spatial_mixing.conv2 = circular
    return model.eval()


def no_mixer():
    model = build()
    model.blocks[0].channel_mixing.mixer = nn.Sequential()
    return model.eval()


def own_drop_path():
    model = build()
    model.blocks[0].drop_path = Gate()
    return model.eval()


def replaced(part):
    model = build()
    if part == 'stem':
        model.stem[0] = nn.Sequential(model.stem[0])
    else:
        mixing = model.blocks[0].spatial_mixing
        mixing.conv1 = nn.Sequential(mixing.conv1)
    return model.eval()


def patched():
    model = build()
    block = model.blocks[0]
    forward = block.forward
    block.forward = lambda x: forward(x) * 2
    return model


class TestCustomised:
    """ What computes something else than its architecture says is never taken for it."""

    @pytest.mark.parametrize('make', [
        lambda: randomize(OwnHead(24, 2, num_classes=10)), lambda: adapted('i'), lambda: adapted('iii'),
        lambda: adapted('iv'), gated_mixing, gated_block, gate_at_the_end, circular, patched,
        own_drop_path, no_mixer, lambda: replaced('stem'), lambda: replaced('conv'),
        lambda: without('spatial_mixing'), lambda: without('channel_mixing', channel_residual=True),
        lambda: other_spatial(conv2=nn.Conv2d(24, 24, 3, groups=24, padding='same')),
        lambda: other_spatial(conv2=nn.Conv2d(24, 24, (1, 5), groups=24, padding='same')),
        lambda: other_spatial(conv1=nn.Conv2d(24, 24, (1, 3), groups=24, padding='same')),
        lambda: other_spatial(conv1=nn.Conv2d(24, 24, (1, 5), groups=12, padding='same')),
        lambda: other_spatial(act2=nn.ReLU()),
    ])
    def test_falls_back(self, make, images):
        model = make()
        with pytest.warns(UserWarning, match='no faster form for'):
            fallback = optimize_for_inference(model)
        assert difference(fallback, model, images) < 1e-6

    def test_own_classifier(self, images):
        """ The classifier is the model's own, whatever it is."""
        model = build()
        model.head = nn.Sequential(OrderedDict(fc=nn.Linear(24, 10), act=nn.SiLU(), norm=nn.LayerNorm(10)))
        fused = optimize_for_inference(model.eval())
        assert isinstance(fused, FusedSplitMixer)
        assert difference(fused, model, images) < 1e-5

    def test_classifier_that_sees_the_batch(self, images, monkeypatch):
        """ And gives no tensor; what hooks on to it sees the batch as well, not the pieces that blocks take."""
        monkeypatch.setattr(fused_cpu, 'PIECE_BYTES', 1)
        model = build()
        fused, seen = optimize_for_inference(model), []
        fused.global_pool.register_forward_hook(lambda module, args, output: seen.append(len(output)))
        assert difference(fused, model, images) < 1e-5
        assert len(list(fused._pieces(images))) == len(images) == seen[0] > 1
        fused, seen = optimize_for_inference(model), []
        fused.global_pool.pool.register_forward_hook(lambda module, args, output: seen.append(len(output)))
        fused(images)
        assert seen == [len(images)]
        model.head = Similarities().eval()
        similarities, norms = optimize_for_inference(model)(images)
        torch.testing.assert_close((similarities, norms), model(images), rtol=1e-4, atol=1e-5)

    def test_own_pooling(self, images, bfloat16):
        """ Its parameters are frozen and cast as all others."""
        model = build()
        model.global_pool = PowerMean()
        fused = optimize_for_inference(model.eval())
        assert isinstance(fused, FusedSplitMixer)
        assert difference(fused, model, images) < 1e-5
        assert not any(p.requires_grad for p in fused.parameters())
        half = optimize_for_inference(model, dtype=torch.bfloat16)
        assert half.global_pool.power.dtype == torch.bfloat16
        assert difference(half, model, images) < 0.05


class TestFallback:
    @pytest.mark.parametrize(('make', 'dtype', 'reason'), [
        (lambda: build(norm_layer='layernorm2d'), None, 'norm LayerNorm2d'),
        (lambda: build(norm_layer=lambda dim, **dd: nn.BatchNorm2d(dim, track_running_stats=False)), None, 'norm B'),
        (lambda: build(act_layer='silu'), None, 'activation SiLU'),
        (lambda: build(act_layer=lambda: nn.GELU(approximate='tanh')), None, 'activation GELU'),
        (build, torch.float64, 'torch.float64 on a CPU'),
        (hooked, None, r'a forward hook on blocks\.0'),
        (pruned, None, r'a forward hook on blocks\.0\.channel_mixing\.mixer\.conv'),
    ])
    def test_plain_copy_and_one_warning(self, make, dtype, reason, images):
        model = make()
        with pytest.warns(UserWarning, match=reason) as caught:
            fallback = optimize_for_inference(model, dtype=dtype)
        assert len(caught) == 1
        assert caught[0].filename == __file__
        assert type(fallback) is SplitMixer
        assert fallback is not model
        assert not fallback.training
        assert not any(p.requires_grad for p in fallback.parameters())
        assert difference(lambda x: fallback(x).float(), model, images) < 1e-6
        for given in (torch.bfloat16, torch.float64):
            assert fallback(images.to(given)).dtype == (dtype or torch.float32)
        assert torch.equal(fallback(x=images), fallback(images))
        assert fallback.forward_features(images).dtype == (dtype or torch.float32)
        assert torch.equal(copy.deepcopy(fallback)(images), fallback(images))

    @pytest.mark.parametrize('stem', [lambda: nn.Conv2d(3, 24, 2, 2), lambda: nn.AvgPool2d(2)])
    def test_another_stem(self, stem):
        model = build()
        model.stem = stem().eval()
        with pytest.warns(UserWarning, match='no faster form for'):
            fallback = optimize_for_inference(model)
        images = torch.randn(1, 3 if isinstance(model.stem, nn.Conv2d) else 24, 8, 8)
        assert torch.equal(fallback(images), model(images))

    def test_scripted(self, images):
        with pytest.warns(UserWarning, match='no faster form'):
            fallback = optimize_for_inference(build(norm_layer='layernorm2d'))
        torch.testing.assert_close(torch.jit.script(fallback)(images), fallback(images))

    def test_no_kernels_for_the_device(self):
        with pytest.warns(UserWarning, match='a model on meta'):
            assert next(optimize_for_inference(SplitMixer(24, 1, device='meta').eval()).parameters()).is_meta

    def test_silent_where_supported(self):
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            optimize_for_inference(build())
