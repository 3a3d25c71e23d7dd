""" Training with the blocks as CUDA graphs, against the same blocks without.

On a CPU what stands for CUDA's graphs runs the captured functions again, into the same memory; and outside of Triton's
interpreter, which is slow, the plain layers stand for the kernels.
"""
import contextlib
import copy
import gc
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch
from timm.utils import freeze
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from triton_device import DEVICE, HAS_CUDA, INTERPRETED, cuda, not_interpreted, run_interpreted, runs_kernels

from splitmixer_timm import SplitMixer, fused_training, optimize_for_inference, training_graphs
from splitmixer_timm.fused_training import FusedBlock, FusedBlocks, FusedStem, fuse_for_training
from splitmixer_timm.splitmixer import SplitMixerBlock
from splitmixer_timm.training_graphs import Graphs, state_of

runs_once = pytest.mark.cuda if HAS_CUDA else not_interpreted
# of what only differs by rounding
OPTIONS = dict(device=DEVICE, dtype=torch.float32 if HAS_CUDA or INTERPRETED else torch.float64)

def _models(dim=10, depth=2, kernel_size=3, patch_size=2, num_classes=5, **kwargs):
    """ The same model with graphs and without."""
    model = SplitMixer(dim, depth, kernel_size, patch_size, num_classes=num_classes, **OPTIONS, **kwargs).train()
    return [fuse_for_training(copy.deepcopy(model), cuda_graphs=cuda_graphs) for cuda_graphs in (True, False)]


class Captures(list):
    """ Features that graphs were captured for, and how many steps the graphs made."""
    steps = 0


@pytest.fixture
def captures(monkeypatch):
    """ On a CPU, with graphs that are none."""
    captured, recorded = Captures(), []

    def capture(function, stream, pool):
        buffers = list(recorded[-1].buffers())
        before = [buffer.clone() for buffer in buffers]
        outputs = function()
        for buffer, value in zip(buffers, before):
            buffer.data.copy_(value)  # CUDA's capture runs nothing

        def replay():
            with torch.no_grad():
                for output, value in zip(tree_leaves(outputs), tree_leaves(function())):
                    output.detach().copy_(value)

        return SimpleNamespace(replay=replay), outputs

    class Recorded(Graphs):
        def __init__(self, blocks, x):
            recorded.append(blocks)
            super().__init__(blocks, x)
            captured.append(x)

        def forward(self, step, x):
            captured.steps += 1
            return super().forward(step, x)

    if not HAS_CUDA:
        monkeypatch.setattr(training_graphs, 'warm_up', lambda function, stream: function())
        monkeypatch.setattr(training_graphs, 'capture', capture)
        monkeypatch.setattr(torch.cuda, 'Stream', lambda: None)
        monkeypatch.setattr(torch.cuda, 'graph_pool_handle', lambda: None)
    if not HAS_CUDA and not INTERPRETED:
        monkeypatch.setattr(fused_training, '_INTERPRETED', True)
        monkeypatch.setattr(fused_training.kernels, 'check_launches', lambda device: None)
        monkeypatch.setattr(FusedStem, '_embed', nn.Sequential.forward)
        monkeypatch.setattr(FusedBlock, '_mix', SplitMixerBlock.forward)
    monkeypatch.setattr('splitmixer_timm.fused_training.Graphs', Recorded)
    return captured


def _images(batch=2, size=6):
    return torch.randn(batch, 3, size, size, **OPTIONS)


def _step(model, x, dtype=None):
    """ Logits, gradients and buffers after a step of training, which changes the weights."""
    model.zero_grad()
    with torch.autocast(DEVICE, dtype, enabled=dtype is not None):
        y = model(x)
    (y.float() * torch.linspace(-1, 1, y.numel(), device=DEVICE).reshape(y.shape)).sum().backward()
    grads = [param.grad for param in model.parameters()]
    with torch.no_grad():
        for param in model.parameters():
            if param.grad is not None:
                param -= 0.1 * param.grad
    return [y.detach(), *grads, *(buffer.clone() for buffer in model.buffers())]


def _assert_same(graphed, plain):
    for ours, theirs in zip(graphed, plain, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            # torch's own layers choose how they compute by the memory format of the gradient
            tolerance = 0 if INTERPRETED else 1e-4 if HAS_CUDA else 1e-10
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@not_interpreted
def test_interpreted():
    run_interpreted(__file__)


@runs_kernels
@pytest.mark.parametrize(('dtype', 'kwargs'), [
    (None, dict()),
    (torch.bfloat16, dict(channel_mixing='iii', channel_residual=True)),
    (torch.bfloat16, dict(channel_mixing='v', spatial_residual=False)),
], ids=str)
def test_steps_by_kernels(captures, dtype, kwargs):
    """ The first without graphs, then one capture for all; weights change in between."""
    graphed, plain = _models(**kwargs)
    for n in range(3):
        x = _images()
        _assert_same(_step(graphed, x, dtype), _step(plain, x, dtype))
        assert (len(captures), captures.steps) == (min(n, 1), n)


@runs_once
@pytest.mark.parametrize('kwargs', [
    dict(),
    dict(channel_mixing='ii', num_segments=3),
    dict(channel_mixing='iii', channel_residual=True),
    dict(channel_mixing='iv'),
    dict(channel_mixing='v', spatial_residual=False),
    dict(channel_mixing='full', act_layer='relu'),
    dict(spatial_mixing='none', channel_mixing='3d', channel_kernel_size=6, channel_stride=4),
    dict(channel_mixing='none'),
], ids=str)
def test_steps(captures, kwargs):
    graphed, plain = _models(**kwargs)
    assert list(graphed.state_dict()) == list(plain.state_dict())
    for n in range(5):
        x = _images()
        _assert_same(_step(graphed, x), _step(plain, x))
        assert len(captures) == min(n, 1)


@runs_once
def test_what_is_returned_stays(captures):
    """ Features, logits and gradients are the caller's, also where gradients accumulate over steps."""
    graphed, plain = _models()
    kept = []
    for _ in range(4):
        x = _images().requires_grad_()
        kept.append([])
        for model in (graphed, plain):
            features = model.forward_features(x)
            grads = torch.autograd.grad(features.square().sum(), [x, *model.blocks.parameters()])
            kept[-1].append([features.detach(), *grads])
    for pair in kept:
        _assert_same(*pair)
    for model in (graphed, plain):
        model.zero_grad()
        torch.manual_seed(0)
        for _ in range(3):
            model(_images()).square().sum().backward()
    _assert_same([param.grad for param in graphed.parameters()], [param.grad for param in plain.parameters()])
    assert len(captures) == 1


@runs_once
def test_two_passes_before_the_backward(captures):
    """ The second forward pass, whose features the graphs have no place for, goes without them."""
    graphed, plain = _models()
    for _ in range(3):
        x, other = _images(), _images()
        for model in (graphed, plain):
            model.zero_grad()
            (model(x).square().sum() - model(other).square().sum()).backward()
        _assert_same([param.grad for param in graphed.parameters()], [param.grad for param in plain.parameters()])
    assert len(captures) == 1
    for model in (graphed, plain):
        unused = model(x)
        model(other)
        del unused
    _assert_same(_step(graphed, x), _step(plain, x))


@runs_once
def test_backward_twice(captures):
    graphed, _ = _models()
    for _ in range(3):
        loss = graphed(_images()).square().sum()
        loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='runs backward once, before the next forward pass'):
        loss.backward()
    assert len(captures) == 1


@runs_once
def test_sizes(captures):
    """ A last batch of another size leaves the graphs as they are, two such steps in a row replace them."""
    graphed, plain = _models()
    for size in (6, 6, 8, 6, 8, 8, 8, 6):
        x = _images(size=size)
        _assert_same(_step(graphed, x), _step(plain, x))
    assert [x.shape[-1] for x in captures] == [3, 4]
    x = _images(batch=3, size=8)
    for dtype in (torch.bfloat16, torch.bfloat16, None, torch.bfloat16):
        _assert_same(_step(graphed, x, dtype), _step(plain, x, dtype))
    assert [x.shape[0] for x in captures] == [2, 2, 3]


def _set(module, model, **values):
    for name, value in values.items():
        setattr(module, name, value)
    return model


def _load(model):
    model.load_state_dict({name: value + 0.5 for name, value in model.state_dict().items()}, assign=True)
    return model


@runs_once
@pytest.mark.parametrize(('change', 'again'), [
    (lambda model: (freeze(model, ['stem', 'blocks.0']), model)[1], 0),
    (lambda model: (model.stem.requires_grad_(False), model)[1], 1),
    (lambda model: (model.blocks.requires_grad_(False), model)[1], 1),
    (lambda model: (model.requires_grad_(False).head.requires_grad_(), model)[1], 0),
    (lambda model: _set(model.blocks[0].spatial_mixing.norm1, model, momentum=0.9), 1),
    (lambda model: _set(model.blocks[0].spatial_mixing.norm1, model, momentum=None), 0),
    (lambda model: _set(model.blocks[0].spatial_mixing.conv2, model, padding_mode='circular'), 0),
    (lambda model: _set(model.blocks[0].channel_mixing.act, model, approximate='tanh'), 0),
    (lambda model: (model.blocks[1].register_forward_hook(lambda *args: args[2] * 2), model)[1], 0),
    (lambda model: (model.set_grad_checkpointing(), model)[1], 0),
    (lambda model: _set(model.blocks[0].channel_mixing, model, mixer=nn.MaxPool2d(3, 1, 1)), 0),
    (lambda model: _set(model.blocks[0], model, unused=nn.Parameter(torch.ones(3, **OPTIONS))), 0),
    (lambda model: _set(model.blocks[0].channel_mixing, model, norm=nn.BatchNorm2d(10, **OPTIONS)), 1),
    (lambda model: _load(model), 1),
    (lambda model: model.to(torch.bfloat16).to(**OPTIONS), 1),
    (lambda model: _set(model, model, blocks=model.blocks[:1]), 1),
], ids=['frozen', 'frozen stem', 'frozen blocks', 'head alone', 'momentum', 'cumulative', 'circular', 'activation',
        'hook', 'checkpointing', 'mixer', 'unused', 'norm', 'loaded', 'moved', 'pruned'])
def test_blocks_changed_later(captures, change, again):
    """ Graphs of what the blocks were are not used; there are new ones where they can be."""
    graphed, plain = _models()
    for n in range(6):
        if n == 3:
            assert (len(captures), captures.steps) == (1, 2)
            graphed, plain = change(graphed), change(plain)
        x = _images()
        _assert_same(_step(graphed, x), _step(plain, x))
    assert (len(captures), captures.steps) == (1 + again, 2 + 2 * again)


@runs_once
def test_stochastic_depth(captures):
    graphed, plain = _models(drop_path_rate=0.5)
    for _ in range(3):
        x = _images()
        steps = []
        for model in (graphed, plain):
            torch.manual_seed(0)
            steps.append(_step(model, x))
        _assert_same(*steps)
    assert not captures


@runs_once
def test_copies(captures):
    """ They capture graphs of their own, and have none in a file."""
    graphed, _ = _models()
    for _ in range(2):
        _step(graphed, _images())
    for make in (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))):
        other = make(graphed)
        assert type(other.blocks) is FusedBlocks
        for _ in range(3):
            x = _images()
            _assert_same(_step(other, x), _step(graphed, x))
    assert len(captures) == 3


@runs_once
def test_eval(captures):
    """ The plain layers, which can be made ready for inference."""
    graphed, plain = _models()
    x = _images()
    for model in (graphed, plain):
        for _ in range(2):
            _step(model, x)
        model.eval()
    with torch.no_grad():
        expected = plain(x)
        torch.testing.assert_close(graphed(x), expected, rtol=1e-5, atol=1e-5)
        ready = optimize_for_inference(copy.deepcopy(graphed).float())
        torch.testing.assert_close(ready(x.float()), expected.float(), rtol=1e-4, atol=1e-4)
        assert graphed._piece_size(graphed.stem(x)) == plain._piece_size(plain.stem(x))
    assert fuse_for_training(graphed, DEVICE) is graphed
    with torch.no_grad():  # statistics alone
        graphed.train()(x), plain.train()(x)
    _assert_same(graphed.buffers(), plain.buffers())
    assert len(captures) == 1


@runs_once
def test_compiled(captures):
    """ The compiler leaves the blocks to the kernels, without graphs."""
    graphed, plain = _models()
    compiled = torch.compile(graphed, backend='eager')
    for _ in range(3):
        x = _images()
        for model, run in ((graphed, compiled), (plain, plain)):
            model.zero_grad()
            run(x).square().sum().backward()
        _assert_same([param.grad for param in graphed.parameters()], [param.grad for param in plain.parameters()])
    assert not captures


@runs_once
@pytest.mark.parametrize('part', ['warm_up', 'capture'][:1 if HAS_CUDA else 2])
def test_capture_that_fails(captures, monkeypatch, part):
    """ An error that leaves the statistics as they were, and after which training goes on without graphs."""
    def fail(function, *args):
        function()
        raise RuntimeError('out of memory')

    graphed, plain = _models()
    x = _images()
    for model in (graphed, plain):
        _step(model, x)
    before = [buffer.clone() for buffer in graphed.blocks.buffers()]
    with monkeypatch.context() as patch:
        patch.setattr(training_graphs, part, fail)
        with pytest.raises(RuntimeError, match='out of memory'):
            graphed(x)
    if part == 'warm_up':  # what stands for a capture on a CPU runs
        _assert_same(graphed.blocks.buffers(), before)
    graphed.load_state_dict(plain.state_dict())
    for _ in range(3):
        x = _images()
        _assert_same(_step(graphed, x), _step(plain, x))
    assert not captures


@runs_once
def test_hooks_on_parameters(captures):
    """ They are called once for a gradient, and not by the capture."""
    graphed, plain = _models()
    calls = []
    for model in (graphed, plain):
        for param in model.parameters():
            param.register_hook(lambda grad: calls.append(1) or 0.5 * grad)
    for _ in range(4):
        x = _images()
        counts = []
        for model in (graphed, plain):
            calls.clear()
            counts.append((_step(model, x), len(calls)))
        assert counts[0][1] == counts[1][1]
        _assert_same(counts[0][0], counts[1][0])
    assert (len(captures), captures.steps) == (1, 3)


@runs_once
def test_parameters_changed_before_the_backward_pass(captures):
    """ An error, as from the plain layers."""
    graphed, plain = _models()
    for model in (plain, graphed):
        for _ in range(3):
            loss = model(_images()).square().sum()
            loss.backward()
        loss = model(_images()).square().sum()
        with torch.no_grad():
            model.blocks[0].spatial_mixing.conv1.weight += 1
        with pytest.raises(RuntimeError, match='modified by an inplace operation'):
            loss.backward()
    assert (len(captures), captures.steps) == (1, 3)


@runs_once
@pytest.mark.parametrize('context', [
    lambda: torch.autograd.detect_anomaly(check_nan=False),
    lambda: torch.autograd.graph.save_on_cpu(),
    contextlib.nullcontext,
], ids=['anomaly', 'saved elsewhere', 'checkpoint'])
@pytest.mark.filterwarnings('ignore:Anomaly Detection')
def test_watched_by_autograd(captures, context):
    """ Where more is done with what a step stores than to store it, there are no graphs."""
    graphed, plain = _models()
    for _ in range(3):
        x = _images()
        for model in (graphed, plain):
            model.zero_grad()
            with context():
                y = checkpoint(model, x, use_reentrant=False) if context is contextlib.nullcontext else model(x)
                y.square().sum().backward()
        _assert_same([param.grad for param in graphed.parameters()], [param.grad for param in plain.parameters()])
    assert not captures


@runs_once
def test_memory_of_the_last_graphs(captures):
    """ It is free once there are others, though the loss of a step of theirs is kept."""
    graphed, _ = _models()
    losses, kept = [], []
    for size in (6, 6, 8, 8):
        losses.append(graphed(_images(size=size)).square().sum())
        losses[-1].backward()
        kept.append(graphed.blocks._graphs and weakref.ref(graphed.blocks._graphs))
    gc.collect()
    assert [graphs and graphs() is not None for graphs in kept] == [None, False, False, True]


@runs_once
def test_distributed(captures, tmp_path):
    """ In DistributedDataParallel, which keeps nodes of the parameters."""
    distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/rendezvous', rank=0, world_size=1)
    try:
        graphed, plain = _models()
        parallel = DistributedDataParallel(graphed)
        for _ in range(4):
            x = _images()
            _assert_same(_step(parallel, x), _step(plain, x))
    finally:
        distributed.destroy_process_group()
    assert (len(captures), captures.steps) == (1, 3)


@not_interpreted
def test_on_cpu():
    """ The plain layers run, and nothing is captured."""
    model = SplitMixer(10, 1, 3, 2, num_classes=5).train()
    graphed = fuse_for_training(copy.deepcopy(model), 'cpu', cuda_graphs=True)
    assert type(graphed.blocks) is FusedBlocks
    x = torch.randn(2, 3, 6, 6)
    for _ in range(3):
        _assert_same(_step(graphed, x), _step(model, x))
    assert state_of(graphed.blocks) == state_of(graphed.blocks)
    graphed.blocks.compile(backend='eager')  # which no file has
    assert type(pickle.loads(pickle.dumps(graphed)).blocks) is FusedBlocks


@not_interpreted
@pytest.mark.parametrize('part', [torch.backends.cuda.matmul, torch.backends.cudnn.conv])
def test_how_exact_products_are(part):
    """ Graphs are captured anew where it changed."""
    blocks = SplitMixer(10, 1, 3, 2).blocks
    before, was = state_of(blocks), part.fp32_precision
    try:
        part.fp32_precision = 'ieee' if was == 'tf32' else 'tf32'
        assert state_of(blocks) != before
    finally:
        part.fp32_precision = was
    assert state_of(blocks) == before


@pytest.mark.parametrize('variant', [pytest.param('splitmixer_i_256_8', marks=cuda)])
def test_real_size_on_gpu(captures, variant):
    """ As in training by train.py: fp16, scaled gradients, a fused optimizer, channels_last images."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(variant).cuda().to(memory_format=torch.channels_last).train()
    losses = []
    for cuda_graphs in (True, False):
        fused = fuse_for_training(copy.deepcopy(model), cuda_graphs=cuda_graphs)
        optimizer = torch.optim.AdamW(fused.parameters(), lr=1e-3, fused=True)
        scaler = torch.amp.GradScaler()
        generator = torch.Generator('cuda').manual_seed(0)
        losses.append([])
        for _ in range(20):
            x = torch.randn(64, 3, 32, 32, device='cuda', generator=generator).to(memory_format=torch.channels_last)
            with torch.autocast('cuda', torch.float16):
                loss = nn.functional.cross_entropy(fused(x), torch.arange(64, device='cuda') % 10)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(fused.parameters(), 1.)
            scaler.step(optimizer)
            scaler.update()
            losses[-1].append(loss.detach())
    torch.testing.assert_close(*map(torch.stack, losses), rtol=2e-2, atol=2e-2)
    assert (len(captures), captures.steps) == (1, 19)
