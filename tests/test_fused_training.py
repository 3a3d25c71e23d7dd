""" Training by Triton kernels, against the plain layers."""
import copy
import pickle
import subprocess
import sys

import pytest
import timm
import torch
from timm.layers import convert_splitbn_model
from timm.utils import freeze
from torch import nn
from torch.autograd import gradcheck
from torch.nn.utils import prune
from triton_device import DEVICE, TOLERANCE, compile_kernel, cuda, not_interpreted, run_interpreted, runs_kernels

from splitmixer_timm import SplitMixer, fused_training, optimize_for_inference, training_kernels
from splitmixer_timm.fused import Unsupported
from splitmixer_timm.fused_training import (
    ActNorm,
    ChannelMixing,
    FusedBlock,
    FusedStem,
    SpatialMixing,
    _dense,
    _Launch,
    fuse_for_training,
)
from splitmixer_timm.run import environment


def _model(dim=10, depth=1, kernel_size=3, patch_size=2, num_classes=5, **kwargs):
    model = SplitMixer(dim, depth, kernel_size, patch_size, num_classes=num_classes, **kwargs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
            module.eps = 0.01
    return model.to(DEVICE).train()


def _step(model, x, dtype=None):
    """ Logits and gradients of a training step, the same for any two models with the same parameters."""
    torch.manual_seed(1)
    model.zero_grad()
    with torch.autocast(DEVICE, dtype, enabled=dtype is not None):
        y = model(x)
    weight = torch.linspace(-1, 1, y.numel(), device=y.device).reshape(y.shape)
    (y.float() * weight).sum().backward()
    return y.detach().float(), [p.grad for p in model.parameters()]


def _errors(ours, reference):
    """ Greatest relative error of each tensor."""
    errors = [((a - b).norm() / b.norm().clamp(min=1e-3)).item() for a, b in zip(ours, reference)]
    assert len(errors) == len(reference) == len(ours)
    return torch.tensor(errors)


@not_interpreted
def test_interpreted():
    run_interpreted(__file__)


def _gradient(u, act):
    grad = torch.empty_like(u)
    # of a norm that is the identity: the output's gradient as it is
    coefficients = torch.tensor([1., 0., 0.], device=DEVICE)[:, None].repeat(1, u.shape[-1])
    _Launch(u, act).pointwise('grad', u, torch.ones_like(u), grad, coefficients)
    return grad


@runs_kernels
def test_gradient_of_gelu_of_half_precision():
    """ What half precision rounds off is more than what the gradient is wrong by."""
    u = torch.linspace(-12, 12, 2**14, device=DEVICE).half().reshape(1, 128, 16, 8)
    grad, x = _gradient(u, 'gelu'), u.double()
    expected = 0.5 * (1 + torch.erf(x / 2**0.5)) + x * torch.exp(-x * x / 2) / (2 * torch.pi)**0.5
    assert ((grad - expected).abs() <= 1e-4 + 2**-11 * expected.abs()).all()


@runs_kernels
def test_gradient_of_relu():
    """ Where it bends it is 0, as torch's."""
    u = torch.tensor([-1., -0., 0., 1.], device=DEVICE)
    assert _gradient(u.reshape(1, 4, 1, 1), 'relu').flatten().tolist() == [0, 0, 0, 1]


@runs_kernels
@pytest.mark.parametrize(('act', 'kernel_size', 'residual', 'width'), [
    ('gelu', 3, True, 4), ('gelu', 4, False, 9), ('relu', 3, True, 4)])
def test_gradients_of_spatial_mixing(act, kernel_size, residual, width):
    """ Of images as high as more than one program, and as wide."""
    options = dict(dtype=torch.float64, device=DEVICE)
    mixing = SplitMixer(3, 1, kernel_size, act_layer=act, **options).blocks[0].spatial_mixing
    x = torch.randn(1, 5, width, 3, **options, requires_grad=True)
    shapes = [mixing.conv1.weight.shape, (3,), (3,), (3,), mixing.conv2.weight.shape, (3,), (3,), (3,)]
    params = [torch.randn(shape, **options, requires_grad=True) for shape in shapes]

    def mix(*args):
        return SpatialMixing.apply(*args, mixing, act, residual)

    def plain(x, conv1, bias1, weight1, shift1, conv2, bias2, weight2, shift2):
        y = x.permute(0, 3, 1, 2)
        for conv, bias, weight, shift in ((conv1, bias1, weight1, shift1), (conv2, bias2, weight2, shift2)):
            y = nn.functional.conv2d(y, conv, bias, padding='same', groups=3)
            y = nn.functional.batch_norm(mixing.act1(y), None, None, weight, shift, training=True)
        return y.permute(0, 2, 3, 1) + (x if residual else 0)

    inputs = (x, *params)
    assert gradcheck(mix, inputs, fast_mode=True)
    y, expected = mix(*inputs), plain(*inputs)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)  # eps is in fp32
    weight = torch.randn_like(y)
    for ours, theirs in zip(*(torch.autograd.grad(out, inputs, weight) for out in (y, expected))):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@runs_kernels
@pytest.mark.parametrize('act', ['gelu', 'relu'])
@pytest.mark.parametrize('programs', [1, 1000])
def test_gradients_of_act_norm(act, programs, monkeypatch):
    """ With few programs of several tiles, and with many of one, whose sums are not added up all at once."""
    monkeypatch.setattr(training_kernels, 'PROGRAMS', programs)
    monkeypatch.setitem(training_kernels.NORM, 'BP', 1)
    options = dict(dtype=torch.float64, device=DEVICE)
    u = torch.randn(1, 17, 1, 2, **options, requires_grad=True)  # more positions than a tile has in the interpreter
    params = [torch.randn(2, **options, requires_grad=True) for _ in range(2)]
    # not in fast mode, whose directions are nearly constant: a norm's gradient along those is nearly zero
    assert gradcheck(lambda *args: ActNorm.apply(*args, nn.BatchNorm2d(2, **options), act), (u, *params))


@runs_kernels
def test_constant_channels():
    """ Of some the variance is less than 0 by rounding."""
    u = torch.linspace(1e4, 1e5, 16, device=DEVICE).expand(2, 3, 5, 16).contiguous()
    norm = nn.BatchNorm2d(16, device=DEVICE)
    assert ActNorm.apply(u, norm.weight, norm.bias, norm, 'relu').isfinite().all()


@runs_kernels
@pytest.mark.parametrize(('act', 'residual'), [('gelu', True), ('relu', False)])
def test_gradients_of_channel_mixing(act, residual):
    options = dict(dtype=torch.float64, device=DEVICE)
    x = torch.randn(1, 5, 4, 3, **options, requires_grad=True)
    params = [torch.randn(shape, **options, requires_grad=True) for shape in ((3, 3), (3,), (3,), (3,))]
    norm = nn.BatchNorm2d(3, **options)
    assert gradcheck(lambda *args: ChannelMixing.apply(*args, norm, act, residual), (x, *params), fast_mode=True)


@not_interpreted
@pytest.mark.parametrize('kwargs', [
    dict(channel_mixing='i', dim=17, overlap_ratio='4/7'),
    dict(channel_mixing='ii', dim=17, num_segments=3),
    dict(channel_mixing='iii', dim=18, num_segments=3),
    dict(channel_mixing='iv', dim=17, num_segments=3),
    dict(channel_mixing='v', dim=17),
    dict(channel_mixing='3d', dim=10, channel_kernel_size=6, channel_stride=4),
    dict(channel_mixing='full', dim=17),
], ids=lambda kwargs: kwargs['channel_mixing'])
def test_channel_mixing_as_one_matrix(kwargs):
    """ Of every block, values and gradients."""
    for block in SplitMixer(depth=3, **kwargs).double().blocks:
        mixer = block.channel_mixing.mixer
        x = torch.randn(2, kwargs['dim'], 3, 4, dtype=torch.float64)
        expected = mixer(x)
        matrix, bias = _dense(mixer, kwargs['dim'])
        y = torch.einsum('nihw,oi->nohw', x, matrix) + bias[:, None, None]
        torch.testing.assert_close(y, expected)
        weight = torch.randn_like(y)
        grads, expected_grads = (
            torch.autograd.grad((out * weight).sum(), list(mixer.parameters())) for out in (y, expected))
        torch.testing.assert_close(grads, expected_grads)
    with pytest.raises(Unsupported, match='channel mixing by Identity'):
        _dense(nn.Sequential(mixer, nn.Identity()), kwargs['dim'])


@runs_kernels
@pytest.mark.parametrize('kwargs', [
    dict(channel_mixing='i', dim=17, kernel_size=5),
    dict(channel_mixing='iii', act_layer='relu', kernel_size=4),
    dict(channel_mixing='v', channel_residual=True, drop_path_rate=0.4, drop_rate=0.2, depth=2),
    dict(channel_mixing='3d', spatial_residual=False, channel_kernel_size=6, channel_stride=4),
    dict(channel_mixing='none'),
    dict(spatial_mixing='none', channel_mixing='iv'),
], ids=lambda kwargs: '-'.join(f'{name}={value}' for name, value in kwargs.items()))
def test_step(kwargs):
    """ Logits, gradients and running statistics over two steps."""
    model = _model(**kwargs)
    for module in model.blocks[-1].modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # cumulative average
    fused = fuse_for_training(copy.deepcopy(model))
    for _ in range(2):
        x = torch.randn(2, 3, 7, 10, device=DEVICE)
        (y, grads), (reference, reference_grads) = _step(fused, x), _step(model, x)
        torch.testing.assert_close(y, reference, rtol=TOLERANCE, atol=TOLERANCE)
        assert _errors(grads, reference_grads).max() < 10 * TOLERANCE
    for (name, ours), (reference_name, buffer) in zip(fused.named_buffers(), model.named_buffers()):
        assert name == reference_name
        torch.testing.assert_close(ours, buffer, rtol=TOLERANCE, atol=TOLERANCE)


@runs_kernels
@pytest.mark.parametrize(('max_dense', 'kwargs'), [
    (15, dict(channel_mixing='iv', channel_residual=True)),
    (16, dict(channel_mixing='iv', channel_residual=True)),
    (16, dict(channel_mixing='v', channel_residual=True, drop_path_rate=0.2)),
    (16, dict(channel_mixing='3d')),
    (16, dict()),
], ids=str)
def test_half_precision(max_dense, kwargs, monkeypatch):
    """ Under autocast the gradients are as near to those in fp32 as the plain layers' are."""
    monkeypatch.setattr(fused_training, 'MAX_DENSE', max_dense)
    model = _model(dim=16, **kwargs)
    fused = fuse_for_training(copy.deepcopy(model))
    x = torch.randn(4, 3, 8, 10, device=DEVICE)
    _, reference = _step(model, x)
    ours, plain = (_errors(_step(m, x, torch.bfloat16)[1], reference) for m in (fused, model))
    assert ours.max() < 0.1
    assert ours.mean() < 1.3 * plain.mean()


def _stored(model, x):
    """ Bytes that a forward pass stores for the backward pass."""
    sizes, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(sizes.values())


@runs_kernels
@pytest.mark.parametrize(('act_layer', 'least', 'most'), [('gelu', 0., 0.5), ('relu', 0.6, 0.75)])
def test_stored_for_backward(act_layer, least, most):
    """ Less than half of what the same layers unfused store for the backward, whatever the device; with ReLU, whose
    output they share with the norm, about two thirds."""
    x = torch.randn(2, 3, 16, 16, device=DEVICE)
    model = _model(depth=3, act_layer=act_layer)
    assert least < _stored(fuse_for_training(copy.deepcopy(model)), x) / _stored(model, x) < most


@runs_kernels
def test_interface():
    """ Names stay, copies are independent, the plain layers run in eval mode and with norms set to it."""
    model = _model()
    fused = fuse_for_training(copy.deepcopy(model))
    assert fuse_for_training(fused, DEVICE) is fused
    assert isinstance(fused.stem, FusedStem)
    assert all(isinstance(block, FusedBlock) for block in fused.blocks)
    assert list(fused.state_dict()) == list(model.state_dict())
    x = torch.randn(2, 3, 6, 6, device=DEVICE, requires_grad=True)
    fused(x).sum().backward()
    assert x.grad.abs().sum() > 0
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        before = other.stem[2].num_batches_tracked.item()
        other(x)
        assert other.stem[2].num_batches_tracked.item() == before + 1
    assert fused.stem[2].num_batches_tracked.item() == before
    model.load_state_dict(fused.state_dict())
    assert torch.equal(fused.eval()(x), model.eval()(x))
    for norms in (fused, model):
        norms.train()
        for module in norms.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    assert torch.equal(fused(x), model(x))
    with pytest.raises(ValueError, match='Expected more than 1 value per channel'):
        fuse_for_training(_model())(x[:1, :, :2, :2])


def _set_norms(model, **values):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            vars(module).update(values)
    return model


def _set(module, model, **values):
    for name, value in values.items():
        setattr(module, name, value)
    return model


@runs_kernels
@pytest.mark.parametrize('change', [
    lambda model: convert_splitbn_model(model, 2),
    lambda model: (freeze(model, ['stem', 'blocks.0']), model)[1],
    lambda model: _set_norms(model, track_running_stats=False),
    lambda model: (prune.l1_unstructured(model.blocks[0].spatial_mixing.conv1, 'weight', .5), model)[1],
    lambda model: _set(model.blocks[0].spatial_mixing.conv2, model, padding_mode='circular'),
    lambda model: _set(model.blocks[0].spatial_mixing.conv1, model, bias=None),
    lambda model: _set(model.blocks[1].spatial_mixing, model, act2=nn.ReLU()),
    lambda model: _set(model.stem, model, **{'1': nn.SiLU()}),
    lambda model: _set(model.stem, model, **{'3': nn.Sigmoid()}),
    lambda model: _set(model.blocks[0].spatial_mixing, model, gate=nn.Sigmoid()),
    lambda model: _set(model.blocks[0].channel_mixing, model, norm=nn.BatchNorm2d(10, affine=False, device=DEVICE)),
    lambda model: _set(model.blocks[0].channel_mixing.norm, model, bias=None),
    # not AvgPool2d: its gradient in channels_last was wrong on CUDA (pytorch issue 188344)
    lambda model: _set(model.blocks[0].channel_mixing, model, mixer=nn.MaxPool2d(3, 1, 1)),
    lambda model: (model.blocks[0].channel_mixing.act.register_forward_hook(lambda *args: args[2] * 2), model)[1],
], ids=['split', 'frozen', 'untracked', 'pruned', 'circular', 'no bias', 'two activations', 'activation', 'longer stem',
        'gate', 'no parameters', 'no shift', 'mixer', 'hook'])
def test_layers_changed_later(change):
    """ As train.py and users change them after the model was made: the kernels have none such, the plain layers run."""
    model = _model(depth=2)
    fused = change(fuse_for_training(copy.deepcopy(model)))
    model = change(model)
    x = torch.randn(4, 3, 6, 6, device=DEVICE)
    for _ in range(2):
        (y, grads), (expected, expected_grads) = _step(fused, x), _step(model, x)
    torch.testing.assert_close(y, expected, rtol=TOLERANCE, atol=TOLERANCE)
    for ours, plain in zip(grads, expected_grads):
        assert (ours is None) == (plain is None)
        if plain is not None:
            torch.testing.assert_close(ours, plain, rtol=10 * TOLERANCE, atol=10 * TOLERANCE)
    for (name, ours), (_, plain) in zip(fused.named_buffers(), model.named_buffers()):
        torch.testing.assert_close(ours, plain, rtol=TOLERANCE, atol=TOLERANCE, msg=name)


@runs_kernels
def test_no_images():
    """ They leave the running statistics as they are."""
    fused = fuse_for_training(_model())
    before = copy.deepcopy(fused.state_dict())
    _step(fused, torch.empty(0, 3, 6, 6, device=DEVICE))
    for name, value in fused.state_dict().items():
        assert name.endswith('num_batches_tracked') or torch.equal(value, before[name])


class Adapted(nn.Module):
    """ A convolution with an adapter beside it."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv
        self.adapter = nn.Conv2d(conv.in_channels, conv.out_channels, 1, device=conv.weight.device)
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, x):
        return self.conv(x) + self.adapter(x)


@runs_kernels
def test_convolution_replaced_later():
    """ In half precision too it is called."""
    fused = fuse_for_training(_model())
    mixer = fused.blocks[0].channel_mixing.mixer
    mixer.conv = Adapted(mixer.conv)
    x = torch.randn(2, 3, 6, 6, device=DEVICE)
    _step(fused, x, torch.bfloat16)
    assert mixer.conv.adapter.weight.grad.abs().sum() > 0
    mixer.conv = nn.Conv2d(*mixer.conv.weight.shape[:2], 1, bias=False, device=DEVICE)
    _step(fused, x, torch.bfloat16)
    assert mixer.conv.weight.grad.abs().sum() > 0
    mixer = fused.blocks[0].channel_mixing.mixer = nn.Conv2d(10, 10, 1, device=DEVICE)
    _step(fused, x, torch.bfloat16)
    assert mixer.weight.grad.abs().sum() > 0


@runs_kernels
def test_eval():
    """ The plain layers, that take a few images at a time on a CPU and compile as one graph."""
    model = _model(dim=256).eval()
    fused = fuse_for_training(copy.deepcopy(model))
    x = torch.randn(512, 3, 32, 32, device=DEVICE)
    with torch.no_grad():
        features = model.stem(x)
        assert fused._piece_size(features) == model._piece_size(features)
    x = x[:2]
    compiled = torch.compile(fused, backend='eager', fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=TOLERANCE, atol=TOLERANCE)


@not_interpreted
def test_without_triton():
    """ Where a fused model was brought to, the plain layers run."""
    script = """
import sys
sys.modules['triton'] = None
import torch
from splitmixer_timm import SplitMixer, fuse_for_training, fused_training
from splitmixer_timm.fused import Unsupported
from splitmixer_timm.fused_training import FusedBlock, FusedStem
model = SplitMixer(8, 1)
try:
    fuse_for_training(model)
except Unsupported as e:
    assert 'Triton' in str(e)
else:
    raise AssertionError
x = torch.randn(2, 3, 8, 8)
y = model(x)
model.stem.__class__, model.blocks[0].__class__ = FusedStem, FusedBlock
fused_training._INTERPRETED = True  # on a GPU too
assert torch.equal(model(x), y)
"""
    run = subprocess.run([sys.executable, '-c', script], env=environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@runs_kernels
def test_checkpointing():
    model = _model()
    fused = fuse_for_training(copy.deepcopy(model))
    x = torch.randn(2, 3, 6, 6, device=DEVICE)
    _, grads = _step(fused, x)
    fused.set_grad_checkpointing()
    _, checkpointed = _step(fused, x)
    assert all(torch.equal(a, b) for a, b in zip(grads, checkpointed))
    kept = {}
    for enable in (False, True):
        fused.set_grad_checkpointing(enable)
        kept[enable] = _stored(fused, x)
    assert kept[True] < kept[False] / 2


@pytest.mark.parametrize(('create', 'reason'), [
    (lambda: timm.create_model('convmixer_256_8'), 'model ConvMixer'),
    (lambda: SplitMixer(8, 1, spatial_mixing='2d'), "spatial_mixing='2d'"),
    (lambda: SplitMixer(8, 1, norm_layer='layernorm2d'), 'norm LayerNorm2d'),
    (lambda: SplitMixer(8, 1, act_layer='silu'), 'activation SiLU'),
    (lambda: nn.SyncBatchNorm.convert_sync_batchnorm(SplitMixer(8, 1)), 'norm SyncBatchNorm'),
    (lambda: SplitMixer(8, 1, norm_layer=lambda dim, **dd: nn.BatchNorm2d(dim, affine=False, **dd)), 'weight or bias'),
    (lambda: _set_norms(SplitMixer(8, 1), _parameters=dict(weight=nn.Parameter(torch.ones(8)), bias=None)),
     'weight or bias at stem.2'),
])
def test_unsupported(create, reason):
    model = create()
    with pytest.raises(Unsupported, match=f'^fuse_for_training has no kernels for .*{reason}.*\\.$'):
        fuse_for_training(model)
    assert not any(isinstance(module, (FusedStem, FusedBlock)) for module in model.modules())


@not_interpreted
def test_plain_on_cpu():
    """ Without a GPU the fused model is the plain one, and either can be made ready for inference."""
    model = _model().cpu()
    fused = fuse_for_training(copy.deepcopy(model))
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(fused(x), model(x))
    assert torch.equal(optimize_for_inference(fused.eval())(x), optimize_for_inference(model.eval())(x))


@not_interpreted
@pytest.mark.parametrize(('module', 'blocks'), [('train_fused', 'Sequential'), ('train_graphs', 'FusedBlocks')])
def test_all_that_are_created(module, blocks):
    """ By the module that train.py imports; what it cannot fuse stays plain, with a warning."""
    script = f"""
import timm, splitmixer_timm.{module}
for name in ('splitmixer_i_256_8', 'splitmixer_iii_256_8.cifar100'):
    model = timm.create_model(name, depth=1)
    assert type(model.blocks[0]).__name__ == 'FusedBlock' and type(model.stem).__name__ == 'FusedStem'
    assert type(model.blocks).__name__ == {blocks!r}
assert type(timm.create_model('splitmixer_i_256_8', depth=1, norm_layer='layernorm2d').stem).__name__ == 'Sequential'
assert type(timm.create_model('convmixer_256_8', depth=1)).__name__ == 'ConvMixer'
"""
    run = subprocess.run([sys.executable, '-c', script], env=environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count('The plain layers are trained: fuse_for_training has no kernels for norm LayerNorm2d') == 1


@not_interpreted
def test_compilation():
    from splitmixer_timm import kernels, training_kernels

    features = ('x_ptr', 'y_ptr', 'grad_ptr', 'out_ptr', 'y_grad_ptr', 'x_grad_ptr', 'u_ptr', 'other_ptr')
    others = (
        'params_ptr', 'coefficients_ptr', 'sums_ptr', 'weight_ptr', 'bias_ptr', 'mean_ptr', 'var_ptr', 'affine_ptr',
        'moments_ptr', 'weight_grad_ptr', 'bias_grad_ptr')
    without = {
        'sums': ('other_ptr', 'out_ptr', 'params_ptr'), 'norm': ('other_ptr', 'sums_ptr'), 'grad sums': ('out_ptr',),
        'grad': ()}
    for capability, name, kernel_size, act in (
            (80, 'bf16', 9, 'gelu'), (90, 'fp16', 5, 'gelu'), (90, 'fp32', 7, 'relu')):
        pointers = {**dict.fromkeys(features, f'*{name}'), **dict.fromkeys(others, '*fp32'), 'batches_ptr': '*i64'}
        act = kernels._act(act, dict(fp32=torch.float32).get(name, torch.float16))
        common = dict(ACT=act, ACC=kernels._accumulator(torch.float32), K=kernel_size, ALIGN=4, RESIDUAL=True)
        spatial = {**common, **training_kernels.FORWARD}
        backward = {**common, **training_kernels.BACKWARD}
        uses = [
            (kernels.spatial_kernel.fn, dict(spatial, TRAINING=True, COLS=1)),
            (training_kernels.row_sums_kernel, spatial),
            (training_kernels.spatial_grad_kernel, dict(backward, FIRST=True, out_ptr=None, coefficients_ptr=None)),
            (training_kernels.spatial_grad_kernel, dict(backward, FIRST=False)),
            (training_kernels.row_grad_kernel, spatial),
            (training_kernels.norm_kernel, training_kernels.NORM),
            (training_kernels.norm_grad_kernel, dict(training_kernels.NORM, ROW=kernel_size, ROWS=kernel_size + 2)),
        ]
        uses += [(training_kernels.pointwise_kernel,
                  {**common, **training_kernels.POINTWISE[step], 'STEP': step, **dict.fromkeys(names)})
                 for step, names in without.items()]
        for kernel, constants in uses:
            arguments = dict(pointers, momentum='fp32', eps='fp32')
            warps = constants.get('num_warps', 8)
            shared, stack = compile_kernel(kernel, arguments, constants, pointers, capability, warps, 1)
            assert shared <= 48 * 1024
            assert stack <= 16


@pytest.mark.parametrize('variant', [
    pytest.param(name, marks=cuda) for name in ('splitmixer_i_256_8', 'splitmixer_iii_256_8_ks7_p7')])
def test_real_size_on_gpu(variant):
    """ Under autocast at real sizes: gradients as near to fp64's as the plain layers', at most 0.6 of their memory."""
    model = timm.create_model(variant).cuda().train()
    size = model.default_cfg['input_size'][-1]
    x = torch.randn(64, 3, size, size, device='cuda')
    fused = fuse_for_training(copy.deepcopy(model))
    _, reference = _step(copy.deepcopy(model).double(), x.double())
    errors, peaks = [], []
    for m in (fused, model):
        _step(m, x, torch.bfloat16)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        errors.append(_errors(_step(m, x, torch.bfloat16)[1], reference).mean())
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert errors[0] < 1.2 * errors[1]
    assert peaks[0] < 0.6 * peaks[1]
