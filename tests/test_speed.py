""" benchmarks/speed.py and benchmarks/plain.py: every form is measured, and all compute the same. """
import csv
import re
import subprocess
import sys
from functools import partial
from importlib.util import find_spec

import pytest
import report
import roofline
import speed
import timm
import torch
from conftest import BF16, ROOT
from reference import plain_model, randomize

from splitmixer_timm import fused_cpu
from splitmixer_timm.machine import has_bfloat16

OTHERS = ('ONNX Runtime', 'OpenVINO', 'OpenVINO bf16')


class InThisProcess:
    """ Stands for a pool of one process; `torch.compile` is left out, which takes long."""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    def submit(self, function, *args):
        self.rows = function(*args)
        return self

    def result(self):
        return self.rows


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, 'ProcessPoolExecutor', InThisProcess)
    # two models of OpenVINO, released in the order they were made, leave the process the alternate signal stack of the
    # first, which is unmapped by then: the next signal with a handler (a child that ends) would kill it
    monkeypatch.setattr(speed, 'find_spec', lambda name: None if name == 'openvino' else find_spec(name))
    monkeypatch.setattr(speed, 'TURN', 0.)
    monkeypatch.setattr(torch, 'compile', lambda model, **kwargs: model)
    monkeypatch.setattr(report, 'RESULTS_DIR', tmp_path)
    threads = torch.get_num_threads()

    def run(*args):
        few = ['--device', 'cpu', '--threads', '1', '--turns', '2', '--batch-size', '2']
        status = speed.main([*few, '--results', str(tmp_path), *args])
        path, = tmp_path.glob('*.speed.csv')
        with open(path, encoding='utf-8', newline='') as f:
            return status, list(csv.DictReader(f))

    yield run
    torch.set_num_threads(threads)


@pytest.mark.parametrize('name', [
    *(f'splitmixer_{kind}_256_8' for kind in ('i', 'ii', 'iii', 'iv', 'v', '3d')), 'splitmixer_i_768_32',
    'convmixer_256_8'])
def test_plain_model(name):
    model = randomize(timm.create_model(name, depth=2, num_classes=5))
    plain = plain_model(model)
    images = torch.randn(2, 3, 21, 28)
    assert not plain.training
    assert not {p.data_ptr() for p in plain.parameters()} & {p.data_ptr() for p in model.parameters()}
    with torch.no_grad():
        torch.testing.assert_close(plain(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', ['splitmixer_i_256_8', 'splitmixer_3d_256_8', 'convmixer_256_8'])
def test_plain_model_is_of_the_models_type(name):
    plain = plain_model(timm.create_model(name).bfloat16())
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}


def test_plain_model_with_arguments():
    for kwargs in (dict(overlap_ratio='6/11'), dict(channel_mixing='iv', num_segments=5),
                   dict(channel_mixing='3d', channel_kernel_size=16, channel_stride=8)):
        model = randomize(timm.create_model('splitmixer_i_256_8', depth=2, dim=24, **kwargs))
        with torch.no_grad():
            torch.testing.assert_close(plain_model(model)(torch.ones(1, 3, 8, 8)), model(torch.ones(1, 3, 8, 8)))
    with pytest.raises(ValueError, match='channel_residual'):
        plain_model(timm.create_model('splitmixer_i_256_8', depth=1, channel_residual=True))


@pytest.mark.parametrize('precision', ['fp32', BF16])
@pytest.mark.parametrize('kind', ['i', 'ii', 'iii', 'iv'])
def test_training_takes_no_more_memory(kind, precision):
    """ Than the plain network, but for the copies of the images and of small weights."""
    model = timm.create_model(f'splitmixer_{kind}_256_8', depth=3).train()
    images = torch.randn(8, 3, 32, 32)

    def step(model):
        with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bf16'):
            loss = model(images).float().logsumexp(1).sum()
        loss.backward()
        model.zero_grad()

    peaks = []
    for m in (plain_model(model), model):
        step(m)
        peaks.append(speed.peak_memory(lambda m=m: step(m), torch.device('cpu')))
    assert peaks[1] < 1.01 * peaks[0]


@pytest.mark.export
@pytest.mark.parametrize('has_bfloat16', [True, False])
def test_inference(results, monkeypatch, capsys, has_bfloat16):
    monkeypatch.setattr(speed, 'has_bfloat16', lambda: has_bfloat16)
    status, rows = results('--models', 'splitmixer_i_256_8', '--tasks', 'infer')
    assert status == 0
    assert ('no instructions for bf16' in capsys.readouterr().err) != has_bfloat16
    onnx = find_spec('onnxscript') and find_spec('onnxruntime')
    absent = ['plain bf16', *(('OpenVINO', 'OpenVINO bf16') if onnx else OTHERS)]
    absent += [] if has_bfloat16 else ['optimized bf16', 'optimized compiled bf16']
    forms = [form for form in speed.INFERENCE if form not in absent]
    assert [(row['batch_size'], row['form']) for row in rows] == [(size, form) for size in '21' for form in forms]
    for row in rows:
        assert float(row['difference']) < (0.05 if 'bf16' in row['form'] else 1e-4)
        assert float(row['fastest']) <= float(row['seconds']) <= float(row['slowest'])
        assert (row['threads'], row['turns'], row['img_size']) == ('1', '2', '32')
    text = report.forms_tables()
    assert 'inference, fp32 but where said otherwise, batch 2, memory returned' in text
    assert text.count('| `splitmixer_i_256_8` |') == 2
    assert ('optimized bf16' in text) == ('optimized compiled bf16' in text) == has_bfloat16


def test_no_kernels(monkeypatch):
    """ Without a compiler there is an error, not the time of another form."""
    def no_compiler():
        raise RuntimeError('no compiler')

    monkeypatch.setattr(fused_cpu, 'library', no_compiler)
    model = timm.create_model('splitmixer_i_256_8', depth=1).eval()
    with pytest.raises(UserWarning, match='compiles nothing for want of a C.. compiler .*no compiler'):
        speed.optimize(model, compile=True)
    with pytest.raises(UserWarning, match='no compiler'):
        roofline.FORMS['optimized compiled'](model)


def test_no_faster_form():
    """ Without one there is an error, not the time of a copy of the model."""
    model = timm.create_model('splitmixer_i_256_8', depth=1).eval().half()
    forms = dict(speed.inference_forms(model, torch.ones(1, 3, 32, 32)))
    for optimize in (forms['optimized'], lambda: roofline.FORMS['optimized'](model)):
        with pytest.raises(UserWarning, match='optimize_for_inference has no faster form'):
            optimize()


@pytest.mark.parametrize('memory', ['returned', 'kept'])
def test_measure(monkeypatch, memory):
    """ Forms in turn, each of as many calls as fill a turn; what counts is the median time of a call."""
    states, work_done, kept = set(), [], []
    loads = [dict(other_processes=others, sm_mhz='1500', sm_mhz_max='1980') for others in '20']
    monkeypatch.setattr(speed.benchmark, 'gpu_state', lambda device: dict(loads[bool(work_done[2:])]))

    def form(name):
        def run(images):
            states.add((torch.is_grad_enabled(), torch.get_num_threads()))
            called.append(name)
            return torch.ones(len(images), 10)

        return run

    def seconds(work, device):
        called.clear()
        work()
        work_done.append((called[0], len(called)))
        return next(times[called[0]])

    called = []
    times = {'plain': iter([0.05, 0.4, 0.1, 0.12]), 'created': iter([0.02, 5., 0.5, 1.])}
    monkeypatch.setattr(speed, 'seconds', seconds)
    monkeypatch.setattr(speed, 'inference_forms', lambda *args: [(name, partial(form, name)) for name in times])
    monkeypatch.setattr(speed.benchmark, 'keep_memory', lambda: kept.append(memory) or True)
    threads = torch.get_num_threads()
    try:
        rows = speed.measure(
            'splitmixer_i_256_8', speed.Task('infer', 'fp32', 2), memory, 'cpu', turns=3, threads=threads + 1)
    finally:
        torch.set_num_threads(threads)
    assert work_done == [('plain', 1), ('created', 1), *[('plain', 2), ('created', 5)] * 3]
    assert [[row[name] for name in ('form', 'seconds', 'fastest', 'slowest', 'turns')] for row in rows] == [
        ['plain', '0.06', '0.05', '0.2', '3'], ['created', '0.2', '0.1', '1', '3']]
    assert states == {(False, threads + 1)}
    assert kept == ['kept'] * (memory == 'kept')
    assert [[row[name] for name in speed.GPU_LOAD] for row in rows] == [['2', '1500', '1980']] * 2


@pytest.mark.skipif(not find_spec('onnxscript') or not find_spec('openvino'), reason='needs onnxscript and openvino')
def test_openvino():
    """ The precisions that the processor has compute the model, in a process of their own (see `results`)."""
    code = (
        'import timm, torch, speed; torch.manual_seed(0); '
        'model, x = timm.create_model("splitmixer_i_256_8").eval(), torch.randn(2, 3, 32, 32); '
        'forms = dict(speed.inference_forms(model, x)); expected = forms["plain"]()(x).detach(); '
        'print(*[((forms[name]()(x) - expected).abs().max() / expected.abs().max()).item() '
        'for name in ("OpenVINO", "OpenVINO bf16") if name in forms])')
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT / 'benchmarks', capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fp32, *bf16 = map(float, done.stdout.split())
    assert 0 < fp32 < 1e-4
    assert len(bf16) == has_bfloat16()
    assert all(fp32 < difference < 0.05 for difference in bf16)


def test_memory(results, monkeypatch):
    """ Both are kept apart; the gains of both stand in one cell."""
    monkeypatch.setattr(speed, 'find_spec', lambda name: None)
    models = ['--models', 'splitmixer_i_256_8', '--tasks', 'infer']
    monkeypatch.setattr(speed.benchmark, 'keep_memory', lambda: True)
    status, rows = results(*models, '--memory', 'returned', 'kept')
    assert status == 0
    assert [row['memory'] for row in rows] == ['returned'] * len(rows[::2]) + ['kept'] * len(rows[::2])
    table = [line.split('|')[1:-1] for line in report.gains_tables().splitlines() if line.startswith('|')]
    assert table[0][0].strip().endswith('batch 2, memory returned / kept')
    half = has_bfloat16()
    forms = ['plain (img/s)', 'created', 'compiled', 'optimized', *(['optimized bf16'] if half else [])]
    forms += ['optimized compiled', *(['optimized compiled bf16'] if half else [])]
    assert [cell.strip() for cell in table[0][1:]] == forms
    by_key = {(row['memory'], row['form']): float(row['seconds']) for row in rows if row['batch_size'] == '2'}
    expected = ' / '.join(
        f'{by_key[memory, "plain"] / by_key[memory, "optimized"]:.1f}' for memory in ('returned', 'kept'))
    assert table[2][4].strip() == expected
    rates = [report.reports.number(2 / by_key[memory, 'plain']) for memory in ('returned', 'kept')]
    assert table[2][1].strip() == ' / '.join(rates)
    # with single images the least and the most
    single = {(row['memory'], row['form']): float(row['seconds']) for row in rows if row['batch_size'] == '1'}
    gains = sorted(single[memory, 'plain'] / single[memory, 'optimized'] for memory in ('returned', 'kept'))
    header, _, line, _, source = (line.split(' | ') for line in report.ranges_tables().splitlines())
    assert f'torch {torch.__version__}' in source[0]
    assert header[0] == '| single images'
    assert line[header.index('optimized')] == ' to '.join(dict.fromkeys(map(report.two_digits, gains)))
    # where it cannot be kept, that is said
    monkeypatch.setattr(speed.benchmark, 'keep_memory', lambda: False)
    status, rows = results(*models, '--memory', 'kept')
    assert status == 1
    assert {row['error'] for row in rows if row['memory'] == 'kept' and row['form'] == 'plain'} == {
        'the allocator of this system cannot be told to keep memory'}


def test_forms_that_are_gone(results, monkeypatch):
    """ Rows are compared with the plain network of their own run, never with that of a later one."""
    monkeypatch.setattr(speed, 'find_spec', lambda name: None)
    rows = [dict(form=form, seconds='1') for form in ('plain', 'created')]
    monkeypatch.setattr(speed, 'measure', lambda *args: rows)
    args = ('--models', 'splitmixer_i_256_8', '--tasks', 'infer')
    results(*args, '--memory', 'returned', 'kept')
    monkeypatch.setattr(speed, 'measure', lambda *args: [dict(form='plain', seconds='10')])
    _, rows = results(*args)
    assert [(row['memory'], row['batch_size'], row['form'], row['seconds']) for row in rows] == [
        *[('kept', size, form, '1') for size in '21' for form in ('plain', 'created')],
        *[('returned', size, 'plain', '10') for size in '21']]
    # a run that fails takes nothing else away
    monkeypatch.setattr(speed, 'measure', lambda *args: [dict(form='plain', error='no memory')])
    _, rows = results(*args, '--memory', 'kept')
    assert [(row['form'], row['seconds'], row['error']) for row in rows if row['memory'] == 'kept'] == [
        ('plain', '', 'no memory'), ('created', '1', '')] * 2


def test_batches_have_tables_of_their_own(results, monkeypatch):
    monkeypatch.setattr(speed, 'find_spec', lambda name: None)
    for size in ('2', '3'):
        assert results('--models', 'splitmixer_i_256_8', '--tasks', 'infer', '--batch-size', size)[0] == 0
    headers = [line for line in report.gains_tables().splitlines() if line.startswith('|') and 'optimized' in line]
    assert [header.split('|')[1].split()[-3] for header in headers] == ['2,', '3,']


def test_threads_have_tables_of_their_own(results, monkeypatch):
    """ Of some models more threads than of others would make one table of two machines."""
    times = dict.fromkeys(('seconds', 'fastest', 'slowest'), '1')
    monkeypatch.setattr(speed, 'measure', lambda *args: [dict(times, form=form) for form in ('plain', 'created')])
    args = ('--models', 'splitmixer_i_256_8', '--tasks', 'infer')
    for threads in ('1', '2'):
        _, rows = results(*args, '--threads', threads)
        headers = [line.split('|')[1] for line in report.gains_tables().splitlines() if 'created' in line]
        assert [f', {threads} threads' in header for header in headers] == [[False], [False, True]][int(threads) - 1]
    assert [row['threads'] for row in rows] == ['1'] * 4 + ['2'] * 4
    for threads in ('1', '2'):
        assert re.search(f'batch 2, memory returned, {threads} threads', report.forms_tables())


@pytest.mark.parametrize('other', ['fp32', BF16])
def test_training(results, monkeypatch, other):
    monkeypatch.setattr(speed, 'has_bfloat16', lambda: other == 'bf16')
    models = ['splitmixer_ii_256_8', 'convmixer_256_8']
    status, rows = results('--models', *models, '--tasks', 'train')
    assert status == 0
    forms = [('splitmixer_ii_256_8', form) for form in speed.TRAINING if not form.startswith('fused')] + [
        ('convmixer_256_8', form) for form in ('plain', 'compiled')]
    assert [(row['model'], row['form']) for row in rows if row['precision'] == 'fp32'] == forms
    assert {row['precision'] for row in rows} == {'fp32', other}
    assert all(float(row['peak_memory_mib']) > 1 for row in rows)
    assert 'of its memory' in report.forms_tables()
    assert report.gains_tables() == report.NOTHING
    # of the SplitMixer alone
    seconds = {(row['model'], row['form']): float(row['seconds']) for row in rows if row['precision'] == 'fp32'}
    gains = [
        report.two_digits(seconds[models[0], 'plain'] / seconds[models[0], form]) for form in ('created', 'compiled')]
    lines = [line.split(' | ') for line in report.ranges_tables().splitlines() if line.startswith('|')]
    assert lines[0] == ['| a step of training', 'created', 'compiled |']
    assert [line[0].rpartition(': ')[2] for line in lines[2:]] == [
        f'{kind}, batch 2' for kind in dict.fromkeys(('fp32', other))]
    assert lines[2][1:] == [gains[0], f'{gains[1]} |']


def test_a_process_that_dies_is_recorded(results, monkeypatch):
    def die(*args):
        raise RuntimeError('CUDA error: an illegal memory access was encountered')

    monkeypatch.setattr(speed, 'measure', die)
    status, rows = results('--models', 'splitmixer_i_256_8', 'splitmixer_ii_256_8', '--tasks', 'infer')
    assert status == 1
    assert [row['model'] for row in rows] == ['splitmixer_i_256_8'] * 2 + ['splitmixer_ii_256_8'] * 2
    assert {row['error'] for row in rows} == {'RuntimeError: CUDA error: an illegal memory access was encountered'}


def test_a_form_that_fails_is_recorded(results, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError('no such form')

    monkeypatch.setattr(speed, 'optimize_for_inference', fail)
    monkeypatch.setattr(speed, 'find_spec', lambda name: None)  # no other runtimes, which take long
    status, rows = results('--models', 'splitmixer_i_256_8', '--tasks', 'infer')
    assert status == 1
    failed = [row for row in rows if row['error']]
    assert {row['form'] for row in failed} == {
        form for form in speed.INFERENCE if form.startswith('optimized') and (has_bfloat16() or 'bf16' not in form)}
    assert failed[0]['error'] == 'RuntimeError: no such form'
    assert 'failed' in report.forms_tables()


@pytest.mark.parametrize(('args', 'words'), [
    (['--turns', '0'], '--turns: must be an integer of at least 1'),
    (['--batch-size', '-1'], '--batch-size: must be an integer of at least 1'),
    (['--models', 'nomodel'], "unknown model 'nomodel'"),
    (['--models', 'convmixer_256_8', 'table3'], "'table3' is for throughput"),
    (['--device', 'tpu'], "got 'tpu'"),
])
def test_bad_arguments(args, words, capsys, monkeypatch):
    monkeypatch.setattr(speed, 'ProcessPoolExecutor', lambda *args, **kwargs: pytest.fail('work was started'))
    with pytest.raises(SystemExit):
        speed.main(args)
    assert words in capsys.readouterr().err
