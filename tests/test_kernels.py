""" The fused form for inference on CUDA, and its Triton kernels."""
import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from conftest import KINDS, SPLITMIXERS
from torch.utils.flop_counter import FlopCounterMode
from triton_device import (
    DEVICE,
    HAS_CUDA,
    INTERPRETED,
    TOLERANCE,
    compile_kernel,
    cuda,
    not_interpreted,
    run_interpreted,
    runs_kernels,
    triton,
)

from splitmixer_timm import SplitMixer, fused_cuda, kernels, optimize_for_inference, training_kernels
from splitmixer_timm.fused import Product, Unsupported
from splitmixer_timm.splitmixer import VARIANTS

tl = triton.language


def _randomize(model):
    """ The model in eval mode, its norms as far from the identity as trained ones."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.5)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.5)
    return model.eval().requires_grad_(False)


def _model(dim=24, depth=2, kernel_size=3, patch_size=3, num_classes=7, **kwargs):
    model = SplitMixer(dim, depth, kernel_size, patch_size, num_classes=num_classes, **kwargs)
    return _randomize(model).to(DEVICE)


def _assert_close(ours, reference, tolerance):
    error = (ours.float() - reference.float()).abs().max() / reference.abs().max()
    assert ours.shape == reference.shape
    assert error <= tolerance, f'relative error {error:.2e}'


def _assert_equal_to_eager(model, x, dtype=torch.float32, tolerance=TOLERANCE):
    fused = fused_cuda.build(model, dtype)
    features = fused.forward_features(x)
    _assert_close(features, model.forward_features(x), tolerance)
    _assert_close(fused.forward_head(features), model(x), tolerance)
    assert features.dtype == dtype
    intermediates = fused.forward_intermediates(x, intermediates_only=True)
    for ours, reference in zip(intermediates, model.forward_intermediates(x, intermediates_only=True), strict=True):
        _assert_close(ours, reference, tolerance)


@not_interpreted
def test_interpreted():
    run_interpreted(__file__)


@runs_kernels
@pytest.mark.parametrize('kind', KINDS)
def test_channel_mixing(kind):
    _assert_equal_to_eager(_model(channel_mixing=kind), torch.randn(3, 3, 14, 17, device=DEVICE))


@runs_kernels
@pytest.mark.parametrize('kwargs', [
    dict(channel_mixing='i', dim=27, overlap_ratio='6/11'),
    dict(channel_mixing='ii', dim=23, num_segments=3, depth=4),
    dict(channel_mixing='ii', num_segments=4, alternate_segments=False),
    dict(channel_mixing='iii', num_segments=4),
    dict(channel_mixing='iv', dim=23, num_segments=5),
    dict(channel_mixing='3d', channel_kernel_size=6, channel_stride=6),
    dict(channel_mixing='v', dim=150, depth=1),
    dict(channel_mixing='i', dim=150),
    dict(channel_residual=True),
    dict(spatial_residual=False),
    dict(channel_mixing='none'),
    dict(spatial_mixing='none'),
    dict(act_layer='relu', patch_size=3, patch_stride=2, in_chans=1),
    dict(num_classes=0, global_pool='avgmax', drop_rate=0.1, drop_path_rate=0.1),
], ids=lambda kwargs: '-'.join(f'{name}={value}' for name, value in kwargs.items()))
def test_variations(kwargs):
    x = torch.randn(1, kwargs.get('in_chans', 3), 10, 8, device=DEVICE)
    _assert_equal_to_eager(_model(**kwargs), x)


@runs_kernels
@pytest.mark.parametrize('kernel_size', [1, 3, 4, 5, 7, 9])
@pytest.mark.parametrize(('height', 'width', 'dim'), [(6, 9, 18), (3, 2, 17)])
def test_spatial_mixing(kernel_size, height, width, dim):
    block = _model(dim=dim, depth=1, kernel_size=kernel_size).blocks[0]
    x = torch.randn(2, dim, height, width, device=DEVICE)
    ours = fused_cuda.FusedSpatialMixing(block)(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)
    _assert_close(ours, x + block.spatial_mixing(x), TOLERANCE)


@triton.jit
def _offset_kernel(y_ptr, H, W, C, h):
    """ How far the rows of images, each of which is one program's, are from the first one."""
    _, _, top, image, place = kernels._place(H, W, C, 2048, 2048, 2048)
    row_ptr = kernels._row(y_ptr, image, top + h, W, C, 1)
    tl.store(y_ptr + place, (row_ptr.to(tl.int64) - y_ptr.to(tl.int64)) // 8)


@runs_kernels
def test_large_images():
    """ Of more than 2^31 features."""
    y = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    _offset_kernel[(2,)](y, 1500, 1500, 1536, 1450)
    assert y.tolist() == [(image * 1500 + 1450) * 1500 * 1536 for image in range(2)]


@pytest.mark.skipif(not INTERPRETED, reason='takes memory that it does not touch, which a GPU has not')
def test_large_batches():
    """ Of more than 2^31 features: the last row of the first program is that far from the first one."""
    C, ones = 150_000_000, torch.ones(16, 128, dtype=torch.float16)
    try:
        memory, params = torch.empty(15 * C + 128, dtype=torch.float16), torch.empty(3, C)
    except RuntimeError:
        pytest.skip('this system gives no 6.3 GB, not even of memory that is not touched')
    params[:, :128] = torch.tensor([[0.], [1.], [2.]])  # bias, scale and shift
    last = memory[15 * C:]
    last[:] = 3
    images = memory.as_strided((16, 1, 1, 1), (C, 1, 1, 1))
    unit = params[:, :16].contiguous()
    assert (kernels.patch_embedding(images, ones[:1, :16], unit, 1, 1, 'relu', 'tf32x3')[-1] == 3 + 2).all()
    common = dict(ACT='relu', ACC=tl.float32, BM=16)
    tiles = torch.tensor([[0, 32, 0]], dtype=torch.int32)
    kernels.channel_kernel.fn[(1,)](
        memory, memory, ones.repeat(2, 1), params, tiles, 1, 16, C, RESIDUAL=True, PRECISION='tf32x3', BN=128, BK=32,
        **common)
    assert (last == 32 * 3 + 2 + 3).all()
    training_kernels.pointwise_kernel[(1,)](
        memory, memory, memory, params[1:], None, 16, C, STEP='norm', BC=16, TILES=1, **common)
    assert (last[:16] == 101 + 2 + 101).all()


@runs_kernels
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_arithmetic_of_half_precision(dtype):
    """ It is fp32: what half precision would round off is still there when a large bias is taken away again."""
    x = (torch.arange(96, device=DEVICE) / 128).to(dtype).reshape(1, 2, 3, 16)
    params, one = torch.tensor([[4096.], [1.], [-4096.]], device=DEVICE).repeat(1, 16), torch.ones(1, 16, device=DEVICE)
    unit = Product(0, 16, slice(0, 16), torch.eye(16, device=DEVICE), torch.zeros(16, device=DEVICE))
    weight, tiles, _ = kernels.pack_channels([[unit]], 16, dtype)
    for y in (
            kernels.spatial_mixing(x, torch.cat((one, params, one, params)), 1, 'relu', False),
            kernels.channel_mixing(x, weight, tiles, params, 'relu', False, 'tf32x3'),
            kernels.patch_embedding(x.permute(0, 3, 1, 2), unit.weight.to(dtype), params, 1, 1, 'relu', 'tf32x3')):
        assert torch.equal(y, x)


@runs_kernels
@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize('kind', ['i', '3d'])
def test_half_precision(kind, dtype, tolerance):
    x = torch.randn(1, 3, 11, 13, device=DEVICE).to(memory_format=torch.channels_last)
    _assert_equal_to_eager(_model(channel_mixing=kind), x, dtype, tolerance)


@runs_kernels
@pytest.mark.parametrize(('dtype', 'tolerance', 'rounding'), [
    (torch.float16, 3e-5, 2**-11), (torch.float32, 0, 2**-21)])
def test_gelu(dtype, tolerance, rounding):
    """ What the data type rounds off is more than what its GELU is wrong by, of large values as well."""
    x = torch.cat((torch.linspace(-12, 12, 2**15 - 4), torch.tensor([-1e4, -300., 300., 1e4])))
    x = x.to(DEVICE, dtype).reshape(1, 128, 16, 16)
    unit = torch.stack((torch.zeros(16), torch.ones(16), torch.zeros(16))).to(DEVICE)
    identity = Product(0, 16, slice(0, 16), torch.eye(16, device=DEVICE), torch.zeros(16, device=DEVICE))
    weight, tiles, _ = kernels.pack_channels([[identity]], 16, x.dtype)
    y = kernels.channel_mixing(x, weight, tiles, unit, 'gelu', False, 'tf32x3')
    error = (y.double() - torch.nn.functional.gelu(x.double())).abs()
    assert (error <= tolerance + rounding * x.double().abs()).all()


@runs_kernels
def test_fp32_products():
    """ From three in TF32, of which none is cut off: they are too small as often as too large."""
    generator = torch.Generator().manual_seed(0)
    x, matrix = (torch.rand(size, generator=generator).to(DEVICE) for size in ((1, 64, 8, 64), (64, 64)))
    unit = torch.stack((torch.zeros(64), torch.ones(64), torch.zeros(64))).to(DEVICE)
    product = Product(0, 64, slice(0, 64), matrix, torch.zeros(64, device=DEVICE))
    weight, tiles, _ = kernels.pack_channels([[product]], 64, x.dtype)
    y = kernels.channel_mixing(x, weight, tiles, unit, 'relu', False, 'tf32x3')
    error = y.double() / (x.double() @ matrix.double().T) - 1
    assert error.abs().max() < 1e-6
    assert HAS_CUDA or error.mean().abs() < 1e-8  # the sums of tensor cores are cut off as well


@runs_kernels
def test_packing():
    """ What passes unchanged is not multiplied by more than its tile, and a shared convolution is kept once."""
    def mixing(**kwargs):
        model = _model(dim=256, depth=2, **kwargs)
        return [channel for _, channel in fused_cuda.build(model, torch.float32).blocks]

    first, second = mixing(channel_mixing='i')
    assert first.tiles.tolist() == [[0, 192, 0], [0, 192, 192], [0, 192, 384], [192, 256, 576]]
    assert second.tiles.tolist() == [[0, 64, 0], [64, 256, 64], [64, 256, 256], [64, 256, 448]]
    assert mixing(channel_mixing='iii')[0].weight.shape == (256, 64)
    assert mixing(channel_mixing='iv')[0].weight.shape == (512, 64)


@runs_kernels
def test_weights_are_copies():
    """ Of a patch of one pixel and channel as well, whose weights lie as the kernel wants them."""
    model = _model(patch_size=1, in_chans=1)
    fused = fused_cuda.build(model, torch.float32)
    ours, theirs = ({t.data_ptr() for t in (*m.parameters(), *m.buffers())} for m in (fused, model))
    assert not ours & theirs


@runs_kernels
def test_made_in_inference_mode():
    """ Weights can be loaded into it outside."""
    with torch.inference_mode():
        fused = fused_cuda.build(_model(), torch.float32)
    other = fused_cuda.build(_model(), torch.float32)
    fused.load_state_dict(other.state_dict())
    x = torch.randn(1, 3, 6, 7, device=DEVICE)
    assert torch.equal(fused(x), other(x))


@runs_kernels
def test_copies():
    """ The model stays as it is, its fused form can be copied, pickled and moved, but neither cast nor trained."""
    model, x = _model(), torch.randn(1, 3, 6, 7, device=DEVICE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fused = fused_cuda.build(model, torch.float32)
    logits = fused(x)
    assert not logits.requires_grad
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), fused.to(DEVICE)):
        assert torch.equal(other(x), logits)
    compiled = copy.deepcopy(fused)
    compiled.compile(backend='eager')  # which no file has
    assert torch.equal(pickle.loads(pickle.dumps(compiled))(x), logits)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match=r'the dtype it was made for, c(pu|uda) and torch\.float32'):
        fused.half()
    with pytest.raises(RuntimeError, match='for inference only'):
        fused.train()
    with pytest.raises(ValueError, match='got torch.int64 on'):
        fused(x.long())
    with pytest.raises(AssertionError, match='in_chans=3 channels, got 1'):
        fused(x[:, :1])


@runs_kernels
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('act', ['gelu', 'relu'])
def test_nan(act, dtype):
    """ What is wrong with the images of one is seen in its logits, and not in those of the other."""
    x = torch.randn(2, 3, 9, 9, device=DEVICE)
    x[1, 0, 4, 4] = torch.nan
    logits = fused_cuda.build(_model(act_layer=act), dtype)(x)
    assert logits[0].isfinite().all()
    assert logits[1].isnan().all()


@runs_kernels
def test_autocast():
    """ Logits are of the form's own dtype, whatever surrounds it."""
    fused = fused_cuda.build(_model(), torch.float32)
    x = torch.randn(1, 3, 6, 7, device=DEVICE)
    for enabled in (True, False):  # on a GPU the first call captures
        with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
            logits = fused(x)
        assert logits.dtype == torch.float32
    assert torch.equal(logits, fused.forward_head(fused.forward_features(x)))


@runs_kernels
def test_precision():
    """ TF32 where torch is told to use it, by either of its ways."""
    asked = torch.backends.cuda.matmul.fp32_precision
    try:
        for told, expected in (('ieee', 'tf32x3'), ('tf32', 'tf32')):
            torch.backends.cuda.matmul.fp32_precision = told
            assert fused_cuda.build(_model(), torch.float32).stem.precision == expected
    finally:
        torch.backends.cuda.matmul.fp32_precision = asked
    asked = torch.get_float32_matmul_precision()
    try:
        for told, expected in (('highest', 'tf32x3'), ('high', 'tf32')):
            torch.set_float32_matmul_precision(told)
            assert fused_cuda.build(_model(), torch.float32).stem.precision == expected
    finally:
        torch.set_float32_matmul_precision(asked)


@runs_kernels
def test_kernels_that_cannot_be_launched(monkeypatch):
    """ Triton compiles its launcher at the first launch: without a C compiler there is a reason, not a crash later."""
    from splitmixer_timm import kernels
    from splitmixer_timm.fused_training import fuse_for_training

    class Broken:
        def __getitem__(self, grid):
            raise RuntimeError('Failed to find C compiler.')

    model = _model()
    monkeypatch.setattr(kernels, '_store_one_kernel', Broken())
    for make in (lambda: fused_cuda.build(model, torch.float32), lambda: fuse_for_training(model)):
        with pytest.raises(Unsupported, match=r'cannot launch kernels \(RuntimeError: Failed to find C compiler\.\)'):
            make()
    assert type(model.stem) is torch.nn.Sequential


@runs_kernels
def test_roofline():
    """ What each kernel must move, and multiply and add, is counted; all that the model multiplies is."""
    import roofline

    model = _model(channel_mixing='iii')
    x = torch.randn(2, 3, 12, 9, device=DEVICE)
    operations = roofline.record_kernels(model, fused_cuda.build(model, torch.float32), x)
    assert [operation.kind for operation in operations] == [
        'patches', *['spatial mixing', 'channel mixing'] * 2, 'head']
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert sum(operation.operations for operation in operations) == counter.get_total_flops()
    features = 2 * 4 * 3 * 24 * 4
    spatial = 2 * features + 4 * 24 * (2 * 3 + 6)
    channel = 2 * features + 4 * 24 * 3 + 4 * 32 * 64 + 4 * 3
    assert [operation.bytes for operation in operations] == [
        x.nbytes + features + 4 * 24 * (3 * 3 * 3 + 3), spatial, channel, spatial, channel,
        features + 4 * 7 * (24 + 1 + 2)]
    assert operations[-1].operations == 2 * 2 * 24 * 7
    assert all(operation.seconds > 0 for operation in operations)


@runs_kernels
@pytest.mark.parametrize('change', [
    lambda fused: fused.load_state_dict({k: v.clone() for k, v in fused.state_dict().items()}, assign=True),
    lambda fused: setattr(fused, 'head', torch.nn.Identity()),
    lambda fused: setattr(fused.stem, 'weight', fused.stem.weight + 1),
    lambda fused: fused.blocks.append(torch.nn.Identity()),
    lambda fused: fused.head.double(),
], ids=['assigned', 'module', 'tensor', 'added', 'converted'])
def test_graphs_of_what_was_replaced(change):
    """ They read the memory of the old tensors, and are dropped; what is changed in place they see."""
    fused = fused_cuda.build(_model(), torch.float32)
    fused._check_state()
    fused._graphs['size'] = 'graph'
    fused.load_state_dict(fused.state_dict())
    fused._check_state()
    assert fused._graphs
    change(fused)
    fused._check_state()
    assert not fused._graphs


@runs_kernels
@pytest.mark.parametrize(('kwargs', 'dtype', 'reason'), [
    (dict(spatial_mixing='2d'), torch.float32, "spatial_mixing='2d'"),
    (dict(norm_layer='layernorm2d'), torch.float32, 'norm LayerNorm2d'),
    (dict(act_layer='silu'), torch.float32, 'activation SiLU'),
    (dict(), torch.float64, r'torch\.float64 on CUDA'),
])
def test_unsupported(kwargs, dtype, reason):
    with pytest.raises(Unsupported, match=reason):
        fused_cuda.build(_model(**kwargs), dtype)


@not_interpreted
def test_unsupported_stem():
    model = _randomize(SplitMixer(8, 1))
    model.stem = torch.nn.Conv2d(3, 8, 2, 2)
    with pytest.raises(Unsupported, match='Conv2d at stem'):
        fused_cuda.build(model, torch.float32)


@not_interpreted
def test_unsupported_device(monkeypatch):
    model = _randomize(SplitMixer(8, 1))
    with pytest.raises(Unsupported, match='a model on cpu'):
        fused_cuda.build(model, torch.float32)
    monkeypatch.setattr(fused_cuda, 'kernels', None)
    with pytest.raises(Unsupported, match='torch without Triton'):
        fused_cuda.build(model, torch.float32)


@pytest.mark.parametrize('dtype', [
    pytest.param(dtype, marks=cuda, id=str(dtype)) for dtype in (torch.float32, torch.float16, torch.bfloat16)])
@pytest.mark.parametrize('variant', SPLITMIXERS)
def test_variants_on_gpu(variant, dtype):
    model = _randomize(timm.create_model(variant)).cuda()
    size = model.default_cfg['input_size'][-1]
    x = torch.randn(2, 3, size, size, device='cuda')
    reference = model.double()(x.double())
    fused = optimize_for_inference(model.float(), dtype=dtype)
    assert isinstance(fused, fused_cuda.FusedSplitMixer)
    _assert_close(fused(x), reference, {torch.float32: TOLERANCE, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype])


@pytest.mark.parametrize('dtype', [
    pytest.param(dtype, marks=cuda, id=str(dtype)) for dtype in (torch.float32, torch.bfloat16)])
def test_graphs_on_gpu(dtype):
    """ A graph for each size of images, replayed with new images, the oldest dropped; outputs are the caller's."""
    fused = fused_cuda.build(_model(dim=64), dtype)
    for batch in [*range(1, fused_cuda.MAX_GRAPHS + 3), 1]:
        images = torch.randn(2, batch, 3, 14, 17, device='cuda')
        logits = [fused(x) for x in images]
        for x, y in zip(images, logits):
            assert torch.equal(y, fused.forward_head(fused.forward_features(x)))
    assert len(fused._graphs) == fused_cuda.MAX_GRAPHS
    assert not fused.to('cuda')._graphs


@pytest.mark.parametrize('dim', [pytest.param(256, marks=cuda)])
def test_dropped_graph_on_gpu(dim):
    """ The graphs that are left own all that they write to, the workspace of cuBLAS too."""
    fused = fused_cuda.build(_model(dim=dim, num_classes=1000), torch.float32)
    images = [torch.randn(batch, 3, 64, 64, device='cuda') for batch in range(1, fused_cuda.MAX_GRAPHS + 2)]
    for x in images:
        fused(x)
    others = torch.full((64, 2**23), 7., device='cuda').unbind()  # 2 GiB, to fill what was freed
    others += tuple(torch.full((2**23,), 7., device='cuda') for _ in range(16))
    for x in images[1:]:
        torch.testing.assert_close(fused(x), fused.forward_head(fused.forward_features(x)))
    assert all((other == 7).all() for other in others)


@pytest.mark.parametrize('kept', [pytest.param(True, marks=cuda)])
def test_kept_features_on_gpu(kept):
    """ A classifier that keeps a tensor of the graphs' memory does not stop new graphs."""
    class Keeping(torch.nn.Linear):
        def forward(self, x):
            self.last = x
            return super().forward(x)

    model = _model()
    model.head = Keeping(model.num_features, 5).cuda()
    fused = fused_cuda.build(model.eval(), torch.float32)
    x = torch.randn(2, 3, 12, 15, device='cuda')
    expected = fused(x)
    fused.load_state_dict({name: value.clone() for name, value in fused.state_dict().items()}, assign=True)
    torch.testing.assert_close(fused(x), expected)


@pytest.mark.parametrize('dim', [pytest.param(40, marks=cuda)])
def test_batches_share_a_configuration_on_gpu(dim):
    """ Up to a power of two, so that the last batch of a data set is not waited for."""
    fused = fused_cuda.build(_model(dim=dim), torch.float32)
    tuned = kernels.spatial_kernel, kernels.channel_kernel, kernels.patch_kernel
    before = [len(kernel.cache) for kernel in tuned]
    for batch in (8, 5, 7):
        fused(torch.randn(batch, 3, 12, 15, device='cuda'))
    assert [len(kernel.cache) for kernel in tuned] == [count + 1 for count in before]


@pytest.mark.parametrize('assign', [pytest.param(assign, marks=cuda) for assign in (True, False)])
def test_new_weights_on_gpu(assign):
    """ Weights that are loaded, and parts that are replaced, are those of the next call."""
    fused, other = (fused_cuda.build(_model(), torch.float32) for _ in range(2))
    x = torch.randn(1, 3, 12, 12, device='cuda')
    fused(x)
    fused.load_state_dict({name: value.clone() for name, value in other.state_dict().items()}, assign=assign)
    assert torch.equal(fused(x), other(x))
    fused.head = torch.nn.Linear(24, 3, device='cuda')
    assert fused(x).shape == (1, 3)


@pytest.mark.parametrize('classes', [pytest.param(3, marks=cuda)])
def test_classifier_of_several_outputs_on_gpu(classes):
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = (torch.nn.Linear(24, classes) for _ in range(2))

        def forward(self, x):
            return dict(one=self.one(x), other=self.other(x))

    model = _model()
    model.head = Two().to('cuda').eval()
    fused = fused_cuda.build(model, torch.float32)
    images = torch.randn(2, 1, 3, 12, 12, device='cuda')
    for y, x in zip([fused(x) for x in images], images):
        assert y.keys() == {'one', 'other'}
        _assert_close(y['other'], model(x)['other'], TOLERANCE)
    fused.head.forward = lambda x: {x}
    with pytest.raises(TypeError, match='lists or dicts of them, got set'):
        fused(images[0, :, :, :9])


@pytest.mark.parametrize('streams', [pytest.param(2, marks=cuda)])
def test_streams_on_gpu(streams):
    """ One after the other on the GPU, whatever streams they are called on."""
    fused = fused_cuda.build(_model(dim=256, depth=8), torch.float32)
    images = torch.randn(streams, 16, 3, 96, 96, device='cuda')
    expected = [fused(x) for x in images]
    torch.cuda.synchronize()
    lanes = [torch.cuda.Stream() for _ in images]
    logits = []
    for _ in range(20):
        for lane, x in zip(lanes, images):
            with torch.cuda.stream(lane):
                logits.append(fused(x))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected[n % streams]) for n, y in enumerate(logits))


@pytest.mark.parametrize('size', [pytest.param(15, marks=cuda)])
def test_captured_by_the_caller_on_gpu(size):
    """ As part of a larger graph, once its kernels are compiled and their configurations measured."""
    fused = fused_cuda.build(_model(), torch.float32)
    x = torch.randn(1, 3, size, size, device='cuda')
    with pytest.raises(RuntimeError, match=r'must be called once with images \(1, 3, 15, 15\) before'):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            fused(x)
    expected, graph = fused(x), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fused(x)
    graph.replay()
    torch.testing.assert_close(y, expected)
    x, graph = x.to(memory_format=torch.channels_last), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fused(x)
    graph.replay()
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize('size', [pytest.param(12, marks=cuda)])
def test_grad_modes_on_gpu(size):
    """ Captured in any mode, a graph serves in all."""
    x = torch.randn(1, 3, size, size, device='cuda', requires_grad=True)
    for modes in ((torch.inference_mode, torch.no_grad, torch.enable_grad), (torch.enable_grad, torch.inference_mode)):
        fused = fused_cuda.build(_model(), torch.float32)
        logits = []
        for mode in modes:
            with mode():
                logits.append(fused(x).clone())
        assert len(fused._graphs) == 1
        assert all(torch.equal(y, logits[0]) for y in logits)


@pytest.mark.parametrize('threads', [pytest.param(4, marks=cuda)])
def test_threads_on_gpu(threads):
    """ Each gets the logits of its own images."""
    fused = fused_cuda.build(_model(), torch.float32)
    images = torch.randn(threads, 2, 3, 12, 12, device='cuda')
    expected = [fused.forward_head(fused.forward_features(x)) for x in images]

    def call(n):
        for _ in range(50):
            eager = fused.forward_head(fused.forward_features(images[n]))
            for logits in (fused(images[n]), eager):
                torch.testing.assert_close(logits, expected[n], rtol=1e-5, atol=1e-5)
        return True

    with ThreadPoolExecutor(threads) as pool:
        assert all(pool.map(call, range(threads)))


def _compilations():
    """ What the registered variants launch: kernel, configuration, arguments, constants, compute capability."""
    specialisations = sorted({
        (args['kernel_size'], args['patch_size'], args.get('act_layer', 'gelu')) for args, _ in VARIANTS.values()})
    for dtype, name in ((torch.float32, 'fp32'), (torch.float16, 'fp16'), (torch.bfloat16, 'bf16')):
        arguments = dict(
            x_ptr=f'*{name}', y_ptr=f'*{name}', weight_ptr=f'*{name}', params_ptr='*fp32', tiles_ptr='*i32')
        product = dict(BN=kernels.BLOCK_N[dtype], BK=kernels.BLOCK_K)
        for kernel_size, patch_size, act in specialisations:
            common = dict(ACT=kernels._act(act, dtype), RESIDUAL=True, ACC=kernels._accumulator(dtype))
            uses = [(kernels.spatial_kernel, dict(K=kernel_size, TRAINING=False, sums_ptr=None, ALIGN=4))]
            for precision in ('tf32x3', 'tf32') if dtype == torch.float32 else ('tf32x3',):
                taps = dict(TAPS=3 * patch_size ** 2, P=patch_size, STRIDE=patch_size, stride_w=1)
                uses += [(kernels.channel_kernel, dict(product, PRECISION=precision)),
                         (kernels.patch_kernel, dict(product, PRECISION=precision, **taps))]
            for kernel, constants in uses:
                for config in kernel.configs:
                    for capability in (80, 90):
                        yield kernel, config, arguments, {**common, **constants, **config.kwargs}, capability


@not_interpreted
def test_compilation():
    """ What the registered variants launch compiles for Ampere and Hopper, without spilling a register.

    One in 17 of all compilations, in steps that meet every kernel and configuration, is what a test has time for.
    """
    compiled = set()
    for kernel, config, arguments, constants, capability in list(_compilations())[::17]:
        # the spatial kernel does not want to know what divides C
        aligned = [*arguments, 'M', 'C'] if 'BM' in constants else arguments
        shared, stack = compile_kernel(
            kernel.fn, arguments, constants, aligned, capability, config.num_warps, config.num_stages)
        assert shared <= 99 * 1024  # of compute capability 8.6, less than that of 8.0 and 9.0
        assert stack == 0
        compiled.add((kernel, str(config)))
    assert compiled == {(kernel, str(config)) for kernel, config, *_ in _compilations()}
