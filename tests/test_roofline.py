""" benchmarks/roofline.py: the least work of each operation, and where the time goes. """
from functools import partial

import pytest
import report
import roofline
import timm
import torch
from conftest import INDUCTOR
from torch import nn

from splitmixer_timm import fused_cpu
from splitmixer_timm.benchmark import Settings, build_model, make_images
from splitmixer_timm.complexity import measure_complexity

CPU = torch.device('cpu')
FORMS = 'plain', 'created', 'optimized'
TINY = Settings(batch_size=2, img_size=28, batches=1)
CEILINGS = dict(copy=1e9, operations=1e10)


def record(module, *inputs):
    return roofline.record(lambda: module(*inputs), CPU)


class TestOperations:
    @pytest.mark.parametrize(('conv', 'kind', 'operations'), [
        (nn.Conv2d(8, 8, 1), 'pointwise', 2 * 8 * 8 * 36),
        (nn.Conv2d(8, 8, (1, 3), groups=8, padding='same'), 'depthwise', 2 * 8 * 3 * 36),
        (nn.Conv2d(8, 8, 2, 2), 'convolution', 2 * 8 * 8 * 4 * 9),
    ])
    def test_convolution(self, conv, kind, operations):
        x = torch.randn(1, 8, 6, 6)
        operation, = record(conv, x)
        assert (operation.kind, operation.operations) == (kind, operations)
        assert operation.bytes == 4 * (x.numel() + conv.weight.numel() + conv.bias.numel() + conv(x).numel())
        assert operation.seconds > 0

    def test_views_are_free_and_copies_are_not(self):
        x = torch.randn(4, 8, 3, 3)
        assert record(lambda x: x.split([5, 3], dim=1)[0].transpose(0, 1), x) == []
        copy, = record(lambda x: torch.cat((x[:, 4:], x[:, :4]), dim=1), x)
        assert (copy.kind, copy.bytes, copy.operations) == ('copy', 2 * x.nbytes, 0)

    @pytest.mark.parametrize(('work', 'kind', 'tensors'), [
        (lambda x: x + x, 'sum', 2), (nn.functional.gelu, 'activation', 2), (lambda x: x.relu_(), 'activation', 2),
        (nn.functional.silu, 'activation', 2), (lambda x: nn.functional.layer_norm(x, (2,)), 'norm', 3),
        (torch.clone, 'copy', 2), (lambda x: torch.stack((x, x)), 'copy', 3), (lambda x: x.bfloat16(), 'copy', 1.5),
        (lambda x: x.mean((2, 3), keepdim=True).expand_as(x), 'other', 1.25)])
    def test_elementwise(self, work, kind, tensors):
        x = torch.randn(2, 3, 2, 2)
        operation, = record(work, x)
        assert (operation.kind, operation.bytes, operation.operations) == (kind, tensors * x.nbytes, 0)

    def test_what_is_written_is_not_read(self):
        x, y = torch.randn(2, 1000)
        copy, = record(lambda y: y.copy_(x), y)
        assert (copy.kind, copy.bytes) == ('copy', 2 * x.nbytes)
        assert record(lambda x: (torch.empty_like(x), x.new_empty(9)), x) == []

    def test_limit(self):
        assert roofline.Operation('x', 100, 10, 0.).limit(50., 100.) == 2.
        assert roofline.Operation('x', 100, 1000, 0.).limit(50., 100.) == 10.

    @pytest.mark.parametrize('row', [
        ('convmixer_256_8_ks7_p7', ''), ('splitmixer_i_256_8_ks7_p7', ''), ('splitmixer_iii_256_8_ks7_p7', ''),
        ('splitmixer_iv_256_8_ks7_p7', 'num_segments=3'), ('splitmixer_3d_256_8_ks7_p7', ''),
        ('vit_tiny_patch16_224', '')])
    def test_operations_are_those_counted(self, row):
        """ Two for each MAC of each image, and none is left out."""
        settings = Settings(batch_size=2, img_size=32)
        operations = record(build_model(row, 32).eval(), make_images(settings))
        macs = measure_complexity(build_model(row, 32), (3, 32, 32)).macs
        assert sum(operation.operations for operation in operations) == 2 * 2 * macs
        if row[0].startswith('splitmixer'):
            counts = {kind: sum(o.kind == kind for o in operations) for kind in ('depthwise', 'activation', 'norm')}
            assert counts == {'depthwise': 16, 'activation': 25, 'norm': 25}


def test_ceilings():
    """ Of the right unit: this machine copies more than 100 MB/s and less than 10 TB/s."""
    ceilings = roofline.measure_ceilings(CPU, torch.float32, repeats=1)
    assert 1e8 < ceilings['copy'] < 1e13
    assert 1e8 < ceilings['operations'] < 1e15


def test_ceilings_are_the_best_of_their_repeats(monkeypatch):
    """ A copy reads and writes each of its bytes, a product multiplies and adds."""
    times = iter([9., 2., 4., 8., 5., 3.])
    monkeypatch.setattr(roofline, 'seconds', lambda work, device: next(times))
    made, empty = [], torch.empty  # takes no time, and no memory as nothing is done with it
    monkeypatch.setattr(torch, 'randn', lambda *args, **kwargs: made.append(empty(*args, **kwargs)) or made[-1])
    assert roofline.measure_ceilings(CPU, torch.bfloat16, repeats=2) == dict(
        copy=2 * 4 * 2**26 / 2, operations=2 * 2048**3 / 3)
    assert [tensor.dtype for tensor in made] == [torch.float32, torch.bfloat16, torch.bfloat16]


def test_measure(monkeypatch):
    done, times, of_operations, took = [], iter([5., 1., 2.]), iter([1., 0.125, 0.25]), None
    warm_up, record = roofline.Subject.warm_up, roofline.record

    def record_another(*args):
        nonlocal took
        took = next(of_operations)
        return record(*args)

    def seconds(work, device):
        work()
        if not isinstance(work, partial):  # an operation
            return took
        done.append('forward')
        return next(times)

    monkeypatch.setattr(roofline.Subject, 'warm_up', lambda subject: done.append('warm-up') or warm_up(subject))
    monkeypatch.setattr(roofline, 'seconds', seconds)
    monkeypatch.setattr(roofline, 'record', record_another)
    lines = roofline.measure(('splitmixer_i_256_8_ks7_p7', ''), TINY, make_images(TINY), CEILINGS, passes=3)
    assert done == ['warm-up', 'forward', 'forward', 'forward']
    by_kind = {line['kind']: line for line in lines}
    assert [*by_kind][:2] == [roofline.FORWARD, roofline.FUSED]
    kinds = [line for line in lines[2:]]
    assert {line['kind'] for line in kinds} == {
        'convolution', 'depthwise', 'pointwise', 'activation', 'norm', 'sum', 'copy', 'product', 'other'}
    forward = by_kind[roofline.FORWARD]
    for name in ('calls', 'bytes', 'operations'):
        assert sum(int(line[name]) for line in kinds) == int(forward[name])
    assert sum(float(line['limit_seconds']) for line in kinds) == pytest.approx(
        float(forward['limit_seconds']), rel=1e-4)
    assert float(by_kind[roofline.FUSED]['limit_seconds']) < float(forward['limit_seconds'])
    assert forward['seconds'] == '2'
    for line in kinds:
        assert float(line['seconds']) == 0.25 * int(line['calls'])
    # the one moves bytes alone, the other's products take longer than its bytes
    activation, pointwise = by_kind['activation'], by_kind['pointwise']
    assert float(activation['limit_seconds']) == pytest.approx(int(activation['bytes']) / CEILINGS['copy'], rel=1e-5)
    assert float(pointwise['limit_seconds']) == pytest.approx(
        int(pointwise['operations']) / CEILINGS['operations'], rel=1e-5)


def test_forms(run, tmp_path, monkeypatch):
    """ Before and after: the same products, fewer passes over the features."""
    models = ['--models', 'splitmixer_iv_256_8_ks7_p7', 'splitmixer_i_256_8_ks7_p7', 'convmixer_256_8_ks7_p7']
    assert run(*models, '--forms', 'plain', 'created', 'optimized')[0] == 0
    path, = tmp_path.iterdir()
    rows = roofline.RooflineResults(path).rows.values()
    for kind in ('i', 'iv'):
        by_kind = {(row['kind'], row['form']): row for row in rows if row['model'].startswith(f'splitmixer_{kind}_')}
        assert len({by_kind[roofline.FORWARD, form]['operations'] for form in FORMS}) == 1
        assert [by_kind['norm', form]['calls'] for form in FORMS] == ['25', '25', '17']
    if fused_cpu._has_onednn(torch.float32):  # convolutions of type IV have the activation in them but where k x 1
        assert by_kind['activation', 'optimized']['calls'] == '8'
    assert {row['form'] for row in rows if row['model'].startswith('convmixer')} == {'created'}
    monkeypatch.setattr(report, 'RESULTS_DIR', tmp_path)
    names = [line.split('|')[1].strip() for line in report.roofline_tables().splitlines() if line.startswith('|')]
    kinds = ('I, α = 2/3', 'IV, s = 2')
    assert names[2:] == ['ConvMixer', *(f'{kind}{form}' for kind in kinds for form in (', plain', '', ', optimized'))]


@INDUCTOR
@pytest.mark.compile
def test_compiled_form(run, tmp_path):
    """ Spatial mixing is a kernel for each block, which reads and writes the features: with the same operations."""
    model = 'splitmixer_i_256_8_ks7_p7'
    assert run('--models', model, '--forms', 'plain', 'optimized compiled')[0] == 0
    path, = tmp_path.iterdir()
    by_kind = {(row['kind'], row['form']): row for row in roofline.RooflineResults(path).rows.values()}
    kinds = {kind for kind, form in by_kind if form == 'optimized compiled'}
    assert {'spatial mixing', 'pooling', 'product'} < kinds
    assert not kinds & {'depthwise', 'activation', 'norm', 'sum'}
    kernels = by_kind['spatial mixing', 'optimized compiled']
    assert (kernels['calls'], by_kind['pooling', 'optimized compiled']['calls']) == ('8', '1')
    features = 2 * 4 * 4 * 256
    assert int(kernels['operations']) == 8 * 2 * 14 * features == int(by_kind['depthwise', 'plain']['operations'])
    assert int(kernels['bytes']) == 8 * 4 * (2 * features + (8 + 14) * 256)
    assert float(kernels['seconds']) > 0
    forwards = [by_kind[roofline.FORWARD, form] for form in ('plain', 'optimized compiled')]
    assert forwards[0]['operations'] == forwards[1]['operations']
    assert int(forwards[1]['bytes']) < int(forwards[0]['bytes'])


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(roofline, 'measure_ceilings', lambda device, dtype: CEILINGS)

    def run(*args):
        try:
            status = roofline.main([
                '--device', 'cpu', '--batch-size', '2', '--img-size', '28', '--results', str(tmp_path), *args])
        except SystemExit as e:
            status = e.code
        return status, *capsys.readouterr()

    return run


def test_script_and_table(run, tmp_path, monkeypatch):
    models = ['--models', 'splitmixer_ii_256_8_ks7_p7', 'convmixer_256_8_ks7_p7']
    assert run(*models)[0] == 0
    path, = tmp_path.iterdir()
    assert path.name.endswith('.roofline.csv')
    rows = roofline.RooflineResults(path).rows
    assert run(*models)[0] == 0
    assert roofline.RooflineResults(path).rows.keys() == rows.keys()  # replaced, not doubled

    monkeypatch.setattr(report, 'RESULTS_DIR', tmp_path)
    text = report.roofline_tables()
    assert 'inference, fp32, batch 2, 28 x 28' in text
    assert f'torch {torch.__version__}' in text
    table = [line.split('|') for line in text.splitlines() if line.startswith('|')]
    assert [line[1].strip() for line in table[2:]] == ['ConvMixer', 'II, s = 2']
    assert any('copy' in cell for cell in table[0])
    assert table[2][[i for i, cell in enumerate(table[0]) if 'copy' in cell][0]].strip() == '-'


def test_ceilings_of_another_day(run, tmp_path, monkeypatch):
    """ A limit stands beside the ceilings that it was made of."""
    assert run('--models', 'splitmixer_ii_256_8_ks7_p7', 'convmixer_256_8_ks7_p7')[0] == 0
    monkeypatch.setattr(roofline, 'measure_ceilings', lambda device, dtype: dict(copy=1e10, operations=5e10))
    assert run('--models', 'splitmixer_ii_256_8_ks7_p7')[0] == 0
    monkeypatch.setattr(report, 'RESULTS_DIR', tmp_path)
    one, other = 'Copy 1.0 GB/s, matrix product 10 GFLOP/s', 'Copy 10.0 GB/s, matrix product 50 GFLOP/s'
    text = report.roofline_tables()
    assert f'{one} / {other}. ' in text or f'{other} / {one}. ' in text


def test_other_processes(run, tmp_path, monkeypatch):
    """ Each model is told to have been alone on the GPU or not, and those that failed nothing of it."""
    def measure(row, *args):
        if row[0].startswith('convmixer'):
            raise RuntimeError('no luck')
        return [dict(kind=roofline.FORWARD, seconds='1')]

    states = [dict(driver='', other_processes=others, sm_mhz='1500', sm_mhz_max='1980') for others in '02000']
    monkeypatch.setattr(roofline.benchmark, 'gpu_state', lambda device: states.pop(0))
    monkeypatch.setattr(roofline.benchmark, 'describe_versions', lambda device: {})
    monkeypatch.setattr(roofline, 'measure', measure)
    names = [f'{name}_256_8' for name in ('splitmixer_i', 'splitmixer_ii', 'convmixer')]
    assert run('--models', *names)[0] == 1
    path, = tmp_path.iterdir()
    rows = roofline.RooflineResults(path).rows.values()
    assert [[row[name] for name in roofline.GPU_LOAD] for row in rows] == [
        ['2', '1500', '1980'], ['0', '1500', '1980'], [''] * 3]
    assert report.reports.source([*rows]).endswith('. Only process on the GPU: for 1 of 2 rows')


def test_forms_of_a_model_with_its_tag(run, monkeypatch):
    measured = []
    monkeypatch.setattr(roofline, 'measure', lambda row, *args: measured.append((row[0], args[-1])) or [])
    models = ['splitmixer_i_256_8.cifar10', 'splitmixer_i_256_8', 'convmixer_256_8.cifar10']
    assert run('--models', *models, '--forms', 'created', 'optimized')[0] == 0
    expected = [(name, form) for name in models for form in ('created', 'optimized')]
    assert measured == expected[:-1]  # which is of ConvMixer


def test_request(run, monkeypatch):
    """ It is what is measured, and what the ceilings are of."""
    measured, dtypes = [], []
    monkeypatch.setattr(roofline, 'measure', lambda row, *args: measured.append(args) or [])
    monkeypatch.setattr(roofline, 'measure_ceilings', lambda device, dtype: dtypes.append(dtype) or CEILINGS)
    for args in ([], ['--precision', 'bf16', '--memory-format', 'channels_last', '--passes', '3']):
        assert run('--models', 'splitmixer_i_256_8', *args)[0] == 0
    assert [(args[0].precision, args[0].memory_format, args[3]) for args in measured] == [
        ('fp32', 'contiguous', 2), ('bf16', 'channels_last', 3)]
    assert dtypes == [torch.float32, torch.bfloat16] == [args[1].dtype for args in measured]
    assert measured[1][1].is_contiguous(memory_format=torch.channels_last)


def test_failing_model(run, tmp_path, monkeypatch):
    models = ['--models', 'convmixer_256_8_ks7_p7', 'splitmixer_i_256_8_ks7_p7']
    assert run(*models)[0] == 0
    build = roofline.Subject

    def fail(row, *args):
        if row[0].startswith('convmixer'):
            raise RuntimeError('no luck')
        return build(row, *args)

    monkeypatch.setattr(roofline, 'Subject', fail)
    status, _, err = run(*models)
    assert (status, err) == (1, 'convmixer_256_8_ks7_p7 : RuntimeError: no luck\n')
    path, = tmp_path.iterdir()
    rows = list(roofline.RooflineResults(path).rows.values())
    assert [row['kind'] for row in rows if row['model'].startswith('convmixer')] == [roofline.FORWARD]
    monkeypatch.setattr(report, 'RESULTS_DIR', tmp_path)
    assert '| ConvMixer | failed | - |' in report.roofline_tables()


@pytest.mark.parametrize(('args', 'words'), [
    (['--device', 'warp'], "got 'warp'"), (['--models', 'nonesuch'], "unknown model 'nonesuch'"),
    (['--batch-size', '0'], "--batch-size: must be an integer of at least 1, got '0'"),
    (['--passes', '-1'], '--passes: must be'),
    (['--precision', 'tf32'], 'needs a CUDA device'), (['--results', __file__], 'results cannot be written'),
    (['--models', 'convmixer_256_8', '--forms', 'plain', 'optimized'],
     'forms plain, optimized are of SplitMixers, got models convmixer_256_8'),
])
def test_bad_requests(run, args, words, tmp_path, monkeypatch):
    monkeypatch.setattr(roofline, 'measure', lambda *args: pytest.fail('work was started'))
    status, out, err = run(*args)
    assert (status, out) == (2, '')
    assert words in err
    assert not list(tmp_path.iterdir())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA')
def test_cuda():
    """ Timed within one stream, the operations take about as long as the forward that they make up."""
    device = torch.device('cuda')
    settings = Settings(device='cuda', batch_size=32)
    images = make_images(settings)
    ceilings = roofline.measure_ceilings(device, torch.float32)
    forward, _, *kinds = roofline.measure(('splitmixer_i_256_8_ks7_p7', ''), settings, images, ceilings, passes=5)
    assert sum(float(line['seconds']) for line in kinds) == pytest.approx(float(forward['seconds']), rel=0.3)
    assert float(forward['seconds']) > float(forward['limit_seconds']) / 2


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA')
@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_kernels_on_cuda(precision):
    """ The fused form's kernels take about as long as the graph that they make up, and no less than their limit."""
    settings = Settings(device='cuda', batch_size=32, precision=precision)
    images = make_images(settings)
    ceilings = roofline.measure_ceilings(torch.device('cuda'), images.dtype)
    forward, fused, *kinds = roofline.measure(
        ('splitmixer_i_256_8_ks7_p7', ''), settings, images, ceilings, 5, 'optimized')
    assert {line['kind']: line['calls'] for line in kinds} == {
        'patches': '1', 'spatial mixing': '8', 'channel mixing': '8', 'head': '1'}
    assert fused['limit_seconds'] == forward['limit_seconds']
    assert sum(float(line['seconds']) for line in kinds) == pytest.approx(float(forward['seconds']), rel=0.3)
    assert float(forward['seconds']) > float(forward['limit_seconds']) / 2


def test_peers_run():
    """ A model of timm's has no operation that breaks the recording."""
    operations = record(timm.create_model('mobilenetv3_small_100').eval(), torch.randn(1, 3, 32, 32))
    assert {'depthwise', 'pointwise', 'norm', 'activation'} <= {operation.kind for operation in operations}
