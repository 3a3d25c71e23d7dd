""" What timm asks of a model, on every variant.

Structure is tested on the variants as registered, on the meta device; numbers on the same variants cut to four blocks;
compilers and exporters on a narrow model of each type of channel mixing. timm's own suite, which does the rest, is run
by test_timm_suite.py. Its tests of intermediates go by a list of timm's modules, so they are written again here.
"""
import copy
import io
import typing
import warnings

import pytest
import timm
import torch
from conftest import BASELINES, INDUCTOR, KINDS, SPLITMIXERS
from timm.models import FeatureInfo, group_parameters
from timm.models._features import FeatureGetterNet
from timm.models._features_fx import FeatureGraphNet
from timm.optim import create_optimizer_v2
from torchvision.models.feature_extraction import create_feature_extractor

import splitmixer_timm
from splitmixer_timm import SplitMixer
from splitmixer_timm.complexity import measure_activation_bytes

ALL_MODELS = [*SPLITMIXERS, *BASELINES]
ALL_DIMS = {name: int(name.split('_')[1 if name.startswith('conv') else 2]) for name in ALL_MODELS}


def small(name, **kwargs):
    """ The variant with four of its blocks, its images cut to 4 x 5 patches and a remainder."""
    model = timm.create_model(name, **{'depth': 4, **kwargs})
    patch = timm.get_pretrained_cfg(name).input_size[1] // timm.get_pretrained_cfg(name).pool_size[0]
    return model, torch.randn(2, getattr(model, 'in_chans', 3), 4 * patch, 5 * patch + 1)


def tiny(kind, depth=4):
    return SplitMixer(18, depth, channel_mixing=kind, kernel_size=3, num_classes=7).eval()


@pytest.mark.parametrize('name', ALL_MODELS)
class TestStructure:
    """ As registered, nothing computed."""

    def test_attributes(self, name):
        model = timm.create_model(name, device='meta')
        assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {'meta'}
        assert model.num_features == model.head_hidden_size == ALL_DIMS[name]
        assert len(model.feature_info) == len(model.blocks)
        assert model.get_classifier() is model.head
        assert model.num_classes == model.default_cfg['num_classes']

    def test_dtype(self, name):
        model = timm.create_model(name, device='meta', dtype=torch.bfloat16)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}

    def test_group_matcher(self, name):
        """ The stem, each block and the head are groups of their own, in this order, and hold every parameter."""
        model = timm.create_model(name, device='meta')
        groups = group_parameters(model, model.group_matcher(), reverse=True)
        assert groups.keys() == dict(model.named_parameters()).keys()
        assert groups['stem.0.weight'] == 0
        assert [groups[n] for n in groups if n.startswith('blocks.2.')] == \
            [3] * sum(n.startswith('blocks.2.') for n in groups)
        assert groups['head.bias'] == len(model.blocks) + 1
        optimizer = create_optimizer_v2(model, 'adamw', lr=1e-3, weight_decay=0.05, layer_decay=0.7)
        assert sum(len(g['params']) for g in optimizer.param_groups) == len(list(model.parameters()))

    def test_unknown_argument(self, name):
        with pytest.raises(TypeError, match='not_an_argument'):
            timm.create_model(name, device='meta', not_an_argument=1)


@pytest.mark.parametrize('name', SPLITMIXERS)
class TestContract:
    def test_forward_and_head(self, name):
        model, x = small(name)
        model.eval()
        with torch.no_grad():
            features = model.forward_features(x)
            assert features.shape == (2, ALL_DIMS[name], 4, 5)
            pre_logits = model.forward_head(features, pre_logits=True)
            torch.testing.assert_close(pre_logits, features.mean((2, 3)), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(model(x), model.head(pre_logits))
            assert model(x).shape == (2, model.num_classes)

    def test_features_only(self, name):
        model, x = small(name, features_only=True, out_indices=(0, 2, 3))
        assert model.feature_info.channels() == [ALL_DIMS[name]] * 3
        with torch.no_grad():
            features = model.eval()(x)
        assert [f.shape for f in features] == [(2, ALL_DIMS[name], 4, 5)] * 3
        assert model.feature_info.reduction() == [x.shape[2] // 4] * 3

    def test_features_only_default(self, name):
        """ The last three blocks, as timm's ConvMixer."""
        model = timm.create_model(name, features_only=True, device='meta')
        depth = int(name.split('_')[3])
        assert model.feature_info.module_name() == [f'blocks.{i}' for i in range(depth - 3, depth)]

    def test_forward_intermediates(self, name):
        model, x = small(name)
        model.eval()
        info = FeatureInfo(model.feature_info, len(model.feature_info))
        with torch.no_grad():
            final, intermediates = model.forward_intermediates(x)
            assert [f.shape[1] for f in intermediates] == info.channels()
            torch.testing.assert_close(final, model.forward_features(x), rtol=1e-5, atol=1e-8)
            torch.testing.assert_close(intermediates[-1], final)
            y = model.stem(x)
            for block, intermediate in zip(model.blocks, intermediates):
                y = block(y)
                torch.testing.assert_close(intermediate, y)
            some = model.forward_intermediates(x, indices=[0, 2], intermediates_only=True, stop_early=True)
            torch.testing.assert_close(some, [intermediates[0], intermediates[2]])
            called = []
            hook = model.blocks[3].register_forward_hook(lambda *args: called.append(True))
            model.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
            assert called
            called.clear()
            model.forward_intermediates(x, indices=[0, 2], intermediates_only=True, stop_early=True)
            assert not called
            hook.remove()
            last = model.forward_intermediates(x, indices=2, intermediates_only=True)
            torch.testing.assert_close(last, intermediates[-2:])
            with pytest.raises(AssertionError, match='NCHW'):
                model.forward_intermediates(x, output_fmt='NLC')

    def test_grad_checkpointing(self, name):
        """ The same outputs and gradients, for whole forwards and for intermediates."""
        model, x = small(name, num_classes=3, depth=2)
        grads = []
        for enable in (False, True):
            model.set_grad_checkpointing(enable)
            for forward in (model, lambda x: model.forward_intermediates(x, intermediates_only=True)[1]):
                model.zero_grad()
                forward(x).square().mean().backward()
                grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        for plain, checkpointed in zip(grads[:2], grads[2:]):
            assert len(plain) == len(checkpointed)
            torch.testing.assert_close(plain, checkpointed)
        kept = []
        for enable in (False, True):
            model.set_grad_checkpointing(enable)
            kept.append(measure_activation_bytes(model, tuple(x.shape[1:])))
        assert kept[1] < kept[0] / 2
        calls = []
        for block in model.blocks:
            block.register_forward_pre_hook(lambda *args: calls.append(args[0]))
        for forward in (model, lambda x: model.forward_intermediates(x, intermediates_only=True)[1]):
            calls.clear()
            forward(x).sum().backward()
            assert [calls.count(block) for block in model.blocks] == [2, 2]

    def test_prune_intermediate_layers(self, name):
        model, x = small(name)
        model.eval()
        with torch.no_grad():
            expected = model.forward_intermediates(x, indices=[1], intermediates_only=True)
            assert model.prune_intermediate_layers([1]) == [1]
            assert len(model.blocks) == 2
            torch.testing.assert_close(model.forward_intermediates(x, [1], intermediates_only=True), expected)
            assert isinstance(model.head, torch.nn.Identity)
            torch.testing.assert_close(model(x), expected[0])
        model.train()
        model.forward_intermediates(x, [1], intermediates_only=True)[0].sum().backward()
        assert not [n for n, p in model.named_parameters() if p.grad is None]

    def test_reset_classifier(self, name):
        model = timm.create_model(name, depth=2, device='meta', dtype=torch.float64).eval()
        model.reset_classifier(5)
        assert (model.head.weight.device.type, model.head.weight.dtype) == ('meta', torch.float64)
        assert (model.head.training, model.num_classes, model.head.out_features) == (False, 5, 5)
        model.reset_classifier(5, 'catavgmax')
        assert model.head_hidden_size == 2 * model.num_features == model.head.in_features
        assert not model.global_pool.training
        model.train().reset_classifier(0, '')
        assert model.global_pool.training
        assert model.head.training
        x = torch.empty(1, 3, 56, 56, device='meta', dtype=torch.float64)
        assert model(x).shape == model.forward_features(x).shape

    def test_no_classifier(self, name):
        model, x = small(name, num_classes=0)
        with torch.no_grad():
            assert model.eval()(x).shape == (2, ALL_DIMS[name])
            model, _ = small(name, num_classes=0, global_pool='')
            assert model.eval()(x).shape == (2, ALL_DIMS[name], 4, 5)

    def test_pooling(self, name):
        model, x = small(name, global_pool='catavgmax', num_classes=3)
        assert model.head_hidden_size == 2 * ALL_DIMS[name]
        assert model.eval()(x).shape == (2, 3)

    def test_in_chans_of_pretrained_weights(self, name):
        """ Weights for 3 channels serve 1 (summed) and 4 (repeated, scaled), by timm's rules."""
        source, _ = small(name, depth=1)
        for in_chans in (1, 3, 4):
            model, x = small(name, depth=1, in_chans=in_chans, pretrained=True,
                             pretrained_cfg_overlay=dict(state_dict=source.state_dict()))
            weight = source.stem[0].weight
            expected = {1: weight.sum(1, keepdim=True), 3: weight, 4: weight[:, [0, 1, 2, 0]] * 0.75}[in_chans]
            torch.testing.assert_close(model.stem[0].weight, expected)
            torch.testing.assert_close(model.blocks.state_dict(), source.blocks.state_dict())
            assert model.eval()(x).shape == (2, model.num_classes)

    def test_bfloat16(self, name):
        model, x = small(name)
        model.eval()
        with torch.no_grad():
            expected = model(x)
            actual = model.bfloat16()(x.bfloat16())
        assert actual.dtype == torch.bfloat16
        assert (actual.float() - expected).norm() < 0.05 * expected.norm()

    def test_trains(self, name):
        """ A step of AdamW on two images lowers their loss; every parameter has a gradient."""
        model, x = small(name, num_classes=2, depth=2)
        target = torch.tensor([0, 1])
        optimizer = create_optimizer_v2(model, 'adamw', lr=1e-3)
        losses = []
        for _ in range(3):
            loss = torch.nn.functional.cross_entropy(model(x), target)
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            assert not [n for n, p in model.named_parameters() if p.grad is None]
            optimizer.step()
        assert losses[-1] < losses[0]


@pytest.mark.script
@pytest.mark.parametrize('kind', KINDS)
class TestScript:
    def test_torchscript(self, kind, images):
        model = tiny(kind)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', FutureWarning)
            scripted = torch.jit.script(model)
            buffer = io.BytesIO()
            torch.jit.save(scripted, buffer)
            buffer.seek(0)
            loaded = torch.jit.load(buffer)
        with torch.no_grad():
            torch.testing.assert_close(scripted(images), model(images))
            torch.testing.assert_close(loaded(images[:1, :, :9]), model(images[:1, :, :9]))

    def test_torchscript_features(self, kind, images):
        getter = FeatureGetterNet(tiny(kind), out_indices=(1, 2)).eval()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter('ignore', FutureWarning)
            torch.testing.assert_close(torch.jit.script(getter)(images), getter(images))

    def test_trace(self, kind, images):
        """ Without a warning that a size has become a constant, and for other sizes."""
        model = tiny(kind)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', FutureWarning)
            warnings.simplefilter('error', torch.jit.TracerWarning)
            traced = torch.jit.trace(model, images)
        with torch.no_grad():
            for x in (images, torch.randn(5, 3, 21, 16)):
                torch.testing.assert_close(traced(x), model(x))

    def test_fx(self, kind, images):
        model = tiny(kind)
        traced = torch.fx.symbolic_trace(model)
        with torch.no_grad():
            torch.testing.assert_close(traced(images), model(images))
            torch.testing.assert_close(traced(images[:, :, :7]), model(images[:, :, :7]))

    def test_feature_graph(self, kind, images):
        """ timm's extractor by torch.fx, which warns where training has other nodes than inference."""
        model = tiny(kind)
        with warnings.catch_warnings():
            warnings.simplefilter('error', UserWarning)
            features = FeatureGraphNet(copy.deepcopy(model), out_indices=(0, 2))
        expected = model.forward_intermediates(images, indices=[0, 2], intermediates_only=True)
        for actual, wanted in zip(features.eval()(images), expected, strict=True):
            torch.testing.assert_close(actual, wanted)
        expected = model.train().forward_intermediates(images, indices=[0, 2], intermediates_only=True)
        for actual, wanted in zip(features.train()(images), expected, strict=True):
            torch.testing.assert_close(actual, wanted)

    def test_torchvision_extractor(self, kind, images):
        """ torchvision's, which warns where training has other nodes than inference."""
        model = tiny(kind, depth=2)
        with warnings.catch_warnings():
            warnings.simplefilter('error', UserWarning)
            extractor = create_feature_extractor(model, ['blocks.0', 'blocks.1'])
        for training in (False, True):
            expected = model.train(training).forward_intermediates(images, intermediates_only=True)
            actual = extractor.train(training)(images)
            torch.testing.assert_close(list(actual.values()), expected)

    def test_fx_shows_every_convolution(self, kind, images):
        """ As they are called in eager mode: feature extractors and quantisation look for them in the graph."""
        model = tiny(kind)
        traced = torch.fx.symbolic_trace(model)
        calls = []
        for path, module in model.named_modules():
            if type(module) is torch.nn.Conv2d:
                module.register_forward_hook(lambda module, args, y, path=path: calls.append((path, y.shape)))
        model(images)
        expected = calls.copy()
        calls.clear()
        traced(images)  # its modules are the same
        assert calls == expected != []

    def test_script_in_inference_mode(self, kind, images):
        """ As train.py --torchscript goes on to validate: what was profiled with gradients runs without."""
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', FutureWarning)
            scripted = torch.jit.script(tiny(kind))
        for training in (True, False):
            for _ in range(3):
                scripted.train(training)(images).sum().backward()
            with torch.inference_mode():
                scripted.eval()(images)


@pytest.mark.compile
@pytest.mark.parametrize('kind', KINDS)
class TestCompile:
    def test_fullgraph(self, kind, images):
        """ One graph without a break, forward and backward."""
        model = tiny(kind).train()
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
        expected = torch.autograd.grad(model(images).square().sum(), list(model.parameters()))
        actual = torch.autograd.grad(compiled(images).square().sum(), list(model.parameters()))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)

    @INDUCTOR
    def test_inductor(self, kind, images):
        model = tiny(kind)
        torch._dynamo.reset()
        with torch.no_grad():
            compiled = torch.compile(model, fullgraph=True)
            torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.compile
@INDUCTOR
def test_inductor_trains_at_another_size():
    """ Compiled anew for any size; type III in train mode has all the views that are for known sizes alone."""
    model = tiny('iii', depth=1).train()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    for size in (12, 18):
        x = torch.randn(2, 3, size, size)
        expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        actual = torch.autograd.grad(compiled(x).square().sum(), list(model.parameters()))
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.export
@pytest.mark.parametrize('kind', KINDS)
class TestExport:
    def test_torch_export(self, kind, images):
        """ Batch, height and width stay free."""
        model = tiny(kind)
        dims = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
        program = torch.export.export(model, (images,), dynamic_shapes=(dims,))
        with torch.no_grad():
            for x in (images, torch.randn(5, 3, 21, 16)):
                torch.testing.assert_close(program.module()(x), model(x))

    @pytest.mark.parametrize('limits', [dict(min=8), dict(min=8, max=512)], ids=['open', 'bounded'])
    @pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
    def test_named_sizes(self, kind, images, limits, training):
        """ Batch, height and width as named dimensions, which torch may not narrow by a condition of its own."""
        model = tiny(kind).train(training)
        dims = {0: torch.export.Dim('N'), 2: torch.export.Dim('H', **limits), 3: torch.export.Dim('W', **limits)}
        program = torch.export.export(model, (images,), dynamic_shapes=(dims,))
        with torch.no_grad():
            for x in (images, torch.randn(5, 3, 21, 16)):
                torch.testing.assert_close(program.module()(x), model(x))

    def test_memory_of_a_fixed_size(self, kind, images):
        """ Features of a known size are in channels_last in the graph as well."""
        program = torch.export.export(tiny(kind), (images,), dynamic_shapes=({0: torch.export.Dim('N')},))
        formats = [node.kwargs.get('memory_format') for node in program.graph.nodes]
        assert torch.channels_last in formats

    def test_onnx(self, kind, images, tmp_path):
        """ Opset 18, dynamic batch, outputs equal under onnxruntime."""
        onnx = pytest.importorskip('onnx', reason='needs the extra export')
        onnxruntime = pytest.importorskip('onnxruntime', reason='needs the extra export')
        model = tiny(kind)
        path = tmp_path / 'model.onnx'
        torch.onnx.export(
            model, (images,), path, opset_version=18, dynamo=True, external_data=False, verbose=False,
            input_names=['input'], output_names=['output'], dynamic_shapes=({0: torch.export.Dim('batch')},))
        exported = onnx.load(path)
        onnx.checker.check_model(exported, full_check=True)
        assert exported.opset_import[0].version == 18
        session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
        for batch in (1, 2, 5):
            x = torch.randn(batch, *images.shape[1:])
            actual = session.run(None, {'input': x.numpy()})[0]
            torch.testing.assert_close(torch.from_numpy(actual), model(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['fuse_for_training', 'optimize_for_inference', 'push_to_hub'])
def test_type_hints(name):
    """ To a type checker, functions that take a model take what `timm.create_model` says that it returns."""
    created = typing.get_type_hints(timm.create_model)['return']
    assert issubclass(created, typing.get_type_hints(getattr(splitmixer_timm, name))['model'])
