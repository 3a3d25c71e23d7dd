""" Throughput: the protocols, what is kept of a run, the command, the tables and pictures. """
import csv
import io
import json
import multiprocessing
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import types
import weakref
from contextlib import nullcontext
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from conftest import ROOT

from splitmixer_timm import benchmark, benchmark_report, cli, machine, manifest, paper
from splitmixer_timm.benchmark import Results, Settings, Subject, backend_flags, check_models, make_images, run

SCRIPTS = os.environ.get('SPLITMIXER_TIMM_SCRIPTS')
TINY = Settings(batch_size=2, img_size=28, batches=2, repeats=3)
ROWS = [('convmixer_256_8_ks7_p7', ''), ('splitmixer_ii_256_8_ks7_p7', 'num_segments=3')]


@pytest.fixture(scope='module', autouse=True)
def _one_thread():
    """ Threads that wait for one another take most of the time where other work runs beside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Probe(torch.nn.Module):
    """ Keeps how it was called."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.calls = []

    def forward(self, x):
        self.calls.append((self.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), x))
        return x


@pytest.fixture
def probe(monkeypatch):
    probe = Probe()
    monkeypatch.setattr(timm, 'create_model', lambda *args, **kwargs: probe)
    return probe


@pytest.fixture
def clock(monkeypatch):
    """ Have `seconds` do the work and answer these times, the last one for ever."""
    def set_times(*times):
        times = list(times)

        def seconds(work, device):
            work()
            return times.pop(0) if len(times) > 1 else times[0]

        monkeypatch.setattr(benchmark, 'seconds', seconds)

    return set_times


@pytest.mark.skipif(not shutil.which('git'), reason='no git')
def test_commit(tmp_path, monkeypatch):
    """ Marked where the package, or a script that measures, is not as it was committed; other files do not matter."""
    def git(*args):
        subprocess.run(['git', '-C', tmp_path, '-c', 'user.name=a', '-c', 'user.email=a@b', *args], check=True)

    script, other = tmp_path / 'benchmarks' / 'plain.py', tmp_path / 'README.md'
    (tmp_path / 'splitmixer_timm').mkdir()
    script.parent.mkdir()
    for file in (script, other, tmp_path / 'splitmixer_timm' / 'a.py'):
        file.write_text('1')
    monkeypatch.setattr(benchmark, 'CHECKOUT', tmp_path)
    assert benchmark.commit() == ''
    git('init', '-q')
    git('add', '.')
    git('commit', '-q', '-m', 'first')
    clean = benchmark.commit()
    assert re.fullmatch('[0-9a-f]{12}', clean)
    other.write_text('2')
    assert benchmark.commit() == clean
    new = tmp_path / 'splitmixer_timm' / 'b.py'
    new.write_text('1')
    assert benchmark.commit() == f'{clean}+changes'
    new.unlink()
    script.write_text('2')
    assert benchmark.commit() == f'{clean}+changes'
    monkeypatch.setenv('PATH', str(tmp_path))  # where there is no git
    assert benchmark.commit() == ''


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, 'commit', lambda: 'a')  # of a checkout without changes
    return Results(tmp_path / 'results.csv')


@pytest.fixture
def measured(monkeypatch):
    """ Rows in the order in which they are measured."""
    order = []
    measure = Subject.measure

    def counting(self):
        order.append(self.params)
        return measure(self)

    monkeypatch.setattr(Subject, 'measure', counting)
    return order


def rows_of(results):
    return list(Results(results.path).rows.values())


@pytest.mark.parametrize(('cuda', 'mps', 'expected'), [
    (True, True, 'cuda'), (True, False, 'cuda'), (False, True, 'mps'), (False, False, 'cpu')])
def test_default_device(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: mps)
    assert benchmark.default_device() == expected


class TestTable3:
    def test_rows(self):
        assert len(paper.TABLE3) == 18
        assert check_models(['table3']) == list(paper.TABLE3)
        assert next(iter(paper.TABLE3)) == paper.BASELINE
        defaults = {'I': Fraction(2, 3), 'II': Fraction(2), 'III': Fraction(2), 'IV': Fraction(2)}
        for (model, arguments), (label, rate) in paper.TABLE3.items():
            if model.startswith('splitmixer'):
                kind, _, value = label.partition(', ')
                assert model == f'splitmixer_{kind.lower()}_256_8_ks7_p7'
                name, _, given = arguments.partition('=')
                assert name == ('' if not arguments else 'overlap_ratio' if kind == 'I' else 'num_segments')
                assert Fraction(value.partition('= ')[2]) == (Fraction(given) if given else defaults[kind])
                assert 2 < rate / 815.84 < 3.1

    @pytest.mark.parametrize(('row', 'params'), [
        (0, 701_542), (1, 342_230), (5, 265_350), (6, 241_766), (10, 124_474), (13, 118_118), (17, 216_582)])
    def test_networks(self, row, params):
        model = benchmark.build_model(list(paper.TABLE3)[row], 224, device='meta')
        assert sum(p.numel() for p in model.parameters()) == params
        assert model.num_classes == 102

    def test_peers(self):
        assert check_models(['resnet18', 'table3', 'resnet18']) == [('resnet18', ''), *paper.TABLE3]
        # a model whose weights depend on the size of the image is built for it
        model = benchmark.build_model(('vit_tiny_patch16_224', ''), 32, device='meta')
        assert model(torch.empty(1, 3, 32, 32, device='meta')).shape == (1, 102)


class TestPaperProtocol:
    def test_to_the_letter(self, probe, clock):
        """ The same batch 100 times, in training mode, under no_grad, each timed by itself, without warm-up."""
        clock(*(0.001 * n for n in range(1, 101)))
        settings = replace(TINY, protocol='paper', batches=100)
        rate, details = Subject(ROWS[0], settings, make_images(settings)).measure()
        assert len(probe.calls) == 100
        assert {call[:3] for call in probe.calls} == {(True, False, False)}
        assert len({id(call[3]) for call in probe.calls}) == 1
        assert rate == pytest.approx(100 * 2 / sum(0.001 * n for n in range(1, 101)))
        assert (details['warm_up'], details['stable']) == ('0', '')

    def test_6400_images(self, probe, clock):
        clock(0.08)
        settings = Settings('paper')
        images = make_images(settings)
        assert (images.shape, images.dtype) == ((64, 3, 224, 224), torch.float32)
        assert Subject(ROWS[0], settings, images).measure()[0] == pytest.approx(6400 / (100 * 0.08))
        assert len(probe.calls) == 100

    def test_cuda_events(self, monkeypatch):
        """ Which calls are made around the work on a GPU; stand-ins for the events record them."""
        calls = []

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing
                self.name = f'event {sum(call == "event" for call in calls)}'
                calls.append('event')

            def record(self):
                calls.append(f'{self.name} recorded')

            def elapsed_time(self, end):
                calls.append(f'{self.name} to {end.name}')
                return 250.

        monkeypatch.setattr(torch.cuda, 'Event', Event)
        monkeypatch.setattr(torch.cuda, 'synchronize', lambda device: calls.append('synchronised'))
        assert benchmark.seconds(lambda: calls.append('work'), torch.device('cuda')) == 0.25
        assert calls == [
            'event', 'event', 'event 0 recorded', 'work', 'event 1 recorded', 'synchronised', 'event 0 to event 1']

    def test_mps(self, monkeypatch):
        """ It works on after a call returns: the clock is read when it has done all."""
        calls = []
        monkeypatch.setattr(torch.mps, 'synchronize', lambda: calls.append('synchronised'))
        monkeypatch.setattr(
            benchmark, 'time', types.SimpleNamespace(perf_counter=lambda: calls.append('clock') or len(calls)))
        benchmark.seconds(lambda: calls.append('work'), torch.device('mps'))
        assert calls == ['synchronised', 'clock', 'work', 'synchronised', 'clock']

    @pytest.mark.parametrize(('change', 'words'), [
        (dict(precision='bf16'), "precision at 'fp32', got 'bf16'"), (dict(batch_size=8), 'batch_size at 64, got 8'),
        (dict(memory_format='channels_last'), 'memory_format'), (dict(compile=True), 'compile'),
        (dict(mode='train'), "mode at 'infer', got 'train'"), (dict(img_size=32), 'img_size at 224, got 32'),
    ])
    def test_is_fixed(self, change, words):
        benchmark.check_settings(Settings('paper', batches=3))
        benchmark.check_settings(Settings('steady', **change))
        with pytest.raises(ValueError, match=words):
            benchmark.check_settings(Settings('paper', **change))

    def test_in_a_process_of_its_own(self, results, measured):
        """ A failing model, too, is one row of the results."""
        rows = [ROWS[0], (ROWS[1][0], 'num_segments=1'), ROWS[1]]
        settings = replace(TINY, protocol='paper')
        assert run(rows, settings, results) == 1
        assert measured == []  # nothing here
        first, failed, last = rows_of(results)
        assert first['params'] == '701542'
        assert float(first['img_per_s']) > 0
        assert len(last['rates'].split()) == 1
        assert (first['timer'], first['warm_up'], first['batches']) == ('wall clock', '0', '2')
        assert failed['img_per_s'] == ''
        assert failed['error'].startswith('ValueError: num_segments must be')

    def test_as_many_threads(self, monkeypatch):
        """ In that process as in this one, whose number the results have."""
        class InThisProcess:
            def __init__(self, target, args, daemon):
                self.start = partial(target, *args)

            def join(self):
                pass

            kill = join

        set_to = []
        monkeypatch.setattr(torch, 'get_num_threads', lambda: 3)
        monkeypatch.setattr(torch, 'set_num_threads', set_to.append)
        handled = []
        monkeypatch.setattr(benchmark.signal, 'signal', lambda *args: handled.append(args))
        monkeypatch.setattr(benchmark, 'Subject', lambda *args: types.SimpleNamespace(measure=lambda: (1., {})))
        context = types.SimpleNamespace(Pipe=multiprocessing.Pipe, Process=InThisProcess)
        monkeypatch.setattr(multiprocessing, 'get_context', lambda kind: context)
        assert benchmark.measure_alone(ROWS[0], TINY) == (1., {})
        assert set_to == [3]
        assert handled == [(signal.SIGINT, signal.SIG_IGN)]  # Ctrl-C is for the parent

    def test_interrupt_ends_the_process(self, monkeypatch):
        """ Which would measure to its end, and be waited for."""
        def interrupt():
            raise KeyboardInterrupt

        done = []
        child = types.SimpleNamespace(
            start=lambda: None, kill=lambda: done.append('killed'), join=lambda: done.append('joined'))
        pipe = types.SimpleNamespace(recv=interrupt), types.SimpleNamespace(close=lambda: None)
        context = types.SimpleNamespace(Pipe=lambda duplex: pipe, Process=lambda **kwargs: child)
        monkeypatch.setattr(multiprocessing, 'get_context', lambda kind: context)
        with pytest.raises(KeyboardInterrupt):
            benchmark.measure_alone(ROWS[0], TINY)
        assert done == ['killed', 'joined']

    def test_process_that_dies(self, monkeypatch):
        monkeypatch.setattr(benchmark, '_measure_in_child', die)
        with pytest.raises(RuntimeError, match='died with exit code 9'):
            benchmark.measure_alone(ROWS[0], TINY)


def die(*args):
    os._exit(9)


class TestFlags:
    @pytest.mark.parametrize(('protocol', 'precision', 'tf32'), [
        ('paper', 'fp32', False), ('steady', 'fp32', False), ('steady', 'tf32', True), ('steady', 'bf16', False)])
    def test_tf32_only_where_asked_for(self, protocol, precision, tf32):
        def state():
            cudnn = torch.backends.cudnn
            return torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark, cudnn.enabled

        before = state()
        with backend_flags(Settings(protocol, precision=precision)):
            assert state() == ('high' if tf32 else 'highest', tf32, protocol == 'steady', True)
        assert state() == before

    def test_on_the_device_asked_for(self, monkeypatch):
        """ Events are of the current device, which is the first one where none is made so."""
        current = []
        monkeypatch.setattr(torch.cuda, 'device', lambda name: current.append(name) or nullcontext())
        with backend_flags(Settings(device='cuda:1')), backend_flags(TINY):
            assert current == ['cuda:1']

    @pytest.mark.compile
    def test_every_model_is_compiled(self, monkeypatch):
        """ More models of one class than torch's limit of compilations of the same code, which it would pass over."""
        compiled = []

        def backend(graph, inputs):
            compiled.append(graph)
            return graph

        torch.compiler.reset()
        compile = torch.compile
        monkeypatch.setattr(torch, 'compile', lambda model: compile(model, backend=backend))
        settings = replace(TINY, compile=True)
        images = make_images(settings)
        rows = list(paper.TABLE3)[1:6]
        with torch._dynamo.config.patch(recompile_limit=3), backend_flags(settings), torch.inference_mode():
            for n, row in enumerate(rows, start=1):
                Subject(row, settings, images).step()
                assert len(compiled) == n


class TestSteady:
    def test_modes(self, probe, clock):
        clock(0.5)
        rate, details = Subject(ROWS[0], TINY, make_images(TINY)).measure()
        assert {call[:3] for call in probe.calls} == {(False, False, True)}
        assert len(probe.calls) == 2 + TINY.batches
        assert rate == TINY.batches * TINY.batch_size / 0.5
        assert (details['warm_up'], details['stable']) == ('2', 'yes')

    def test_warm_up_until_stable(self, probe, clock):
        """ Once, whatever is measured then."""
        subject = Subject(ROWS[0], TINY, make_images(TINY))
        clock(9., 5., 3., 2.12, 2., 1.95, 1.)
        for n in (1, 2):
            subject.measure()
            assert (subject.is_stable, subject.warm_up_batches) == (True, 6)
            assert len(probe.calls) == 6 + n * TINY.batches

    @pytest.mark.parametrize(('batches', 'window'), [(40, 4), (2, 1)])
    def test_warm_up_of_a_gpu(self, probe, clock, batches, window):
        """ Until three windows take the same; a batch before each repeat, for other models ran since."""
        settings = replace(TINY, batches=batches)
        subject = Subject(ROWS[0], settings, make_images(settings))
        subject.device = torch.device('cuda')
        clock(9., 5., 2., 2., 3., 2.9, 2.95, 1.)
        subject.warm_up()
        assert (subject.is_stable, subject.warm_up_batches) == (True, 7 * window)
        clock(1.)
        probe.calls.clear()
        assert subject.rate() == batches * TINY.batch_size
        assert len(probe.calls) == 1 + batches

    def test_memory_of_a_gpu(self, probe, monkeypatch):
        """ The peak of this model alone, whatever others hold; the processes beside it before or after."""
        images = make_images(TINY)
        subject = Subject(ROWS[0], TINY, images)
        assert subject.own_memory == images.nbytes
        subject.device, subject.is_stable, subject.own_memory = torch.device('cuda'), True, 30 * 2**20
        reset = []
        monkeypatch.setattr(torch.cuda, 'memory_allocated', lambda device: (105 if reset else 100) * 2**20)
        monkeypatch.setattr(torch.cuda, 'reset_peak_memory_stats', reset.append)
        monkeypatch.setattr(torch.cuda, 'max_memory_allocated', lambda device: (110 if reset else 500) * 2**20)
        monkeypatch.setattr(subject, 'rate', lambda: 1.)
        for others in (('0', '2'), ('2', '0')):
            states = iter([dict(other_processes=count, sm_mhz='1500', sm_mhz_max='1980') for count in others])
            monkeypatch.setattr(benchmark, 'gpu_state', lambda device, states=states: next(states))
            details = subject.measure()[1]
            assert (details['peak_memory_mib'], details['other_processes']) == ('40.0', '2')
            assert subject.own_memory == 35 * 2**20  # with what came to it
            reset.clear()
            subject.own_memory = 30 * 2**20

    def test_never_stable(self, probe, clock):
        subject = Subject(ROWS[0], TINY, make_images(TINY))
        clock(*(1.5**n for n in range(40)))
        _, details = subject.measure()
        assert (details['stable'], details['warm_up']) == ('no', str(benchmark.MAX_WINDOWS))
        assert len(probe.calls) == benchmark.MAX_WINDOWS + TINY.batches

    def test_models_in_turn(self, results, measured):
        assert run(ROWS, TINY, results) == 0
        assert measured == [701_542, 168_494] * 3
        for row in rows_of(results):
            rates = sorted(map(float, row['rates'].split()))
            assert len(rates) == 3
            assert float(row['img_per_s']) == rates[1]

    @pytest.mark.parametrize('change', [
        dict(precision='bf16'), dict(memory_format='channels_last'), dict(mode='train'),
        dict(mode='train', precision='bf16'), dict(img_size=35, batch_size=3),
        pytest.param(dict(compile=True), marks=pytest.mark.compile),
    ])
    def test_axes(self, results, change):
        settings = replace(TINY, repeats=1, **change)
        assert run([(ROWS[1][0], 'depth=1')], settings, results) == 0, rows_of(results)
        row, = rows_of(results)
        assert float(row['img_per_s']) > 0
        for name, value in change.items():
            assert row[name] == {True: 'yes'}.get(value, str(value))

    def test_precision_is_that_of_the_network(self, probe):
        images = make_images(replace(TINY, precision='fp16', memory_format='channels_last'))
        assert images.dtype == torch.float16
        assert images.is_contiguous(memory_format=torch.channels_last)
        Subject(ROWS[0], replace(TINY, precision='fp16'), images)
        assert probe.weight.dtype == torch.float16
        assert make_images(replace(TINY, precision='fp16', mode='train')).dtype == torch.float32

    def test_memory_format_is_that_of_the_network(self):
        settings = replace(TINY, memory_format='channels_last')
        weight = Subject(ROWS[0], settings, make_images(settings)).step.func.stem[0].weight
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()

    def test_images_are_those_of_other_processes(self):
        assert torch.equal(make_images(TINY), make_images(TINY))

    def test_a_training_step_trains(self):
        settings = replace(TINY, mode='train')
        subject = Subject(ROWS[0], settings, make_images(settings))
        model, optimizer = subject.step.args[:2]
        assert model.training
        before = [p.clone() for p in model.parameters()]
        subject.measure()
        assert all(not p.equal(b) for p, b in zip(model.parameters(), before) if p.grad.any())
        assert sum(bool(p.grad.any()) for p in model.parameters()) > 10

    @pytest.mark.parametrize('precision', ['fp32', 'bf16'])
    def test_a_training_step_is_as_asked(self, monkeypatch, precision):
        """ In its precision and memory format, with the gradients of one batch."""
        class Learner(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = torch.nn.Parameter(torch.ones(1))

            def forward(self, x):
                seen.append((torch.is_autocast_enabled('cpu') and torch.get_autocast_dtype('cpu'), x))
                return x.flatten(1)[:, :benchmark.NUM_CLASSES] * self.weight

        seen, gradients = [], []
        monkeypatch.setattr(timm, 'create_model', lambda *args, **kwargs: Learner())
        settings = replace(TINY, mode='train', precision=precision, memory_format='channels_last')
        subject = Subject(ROWS[0], settings, make_images(settings))
        assert type(subject.step.args[1]) is torch.optim.SGD
        for _ in range(3):
            subject.step()
            gradients.append(subject.step.args[0].weight.grad.item())
        assert [kind for kind, _ in seen] == [torch.bfloat16 if precision == 'bf16' else False] * 3
        assert all(x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous() for _, x in seen)
        assert gradients[0] != 0
        assert gradients[1:] == pytest.approx(gradients[:1] * 2, rel=0.01)  # steps are small

    @pytest.mark.parametrize(('can_keep', 'memory'), [(True, 'kept'), (False, '')])
    def test_memory_is_kept_where_it_says_so(self, probe, monkeypatch, can_keep, memory):
        asked = []
        monkeypatch.setattr(benchmark, 'keep_memory', lambda: asked.append(probe) or can_keep)
        assert Subject(ROWS[0], TINY, make_images(TINY)).memory == memory
        assert asked == [probe]


class TestResume:
    def test_skips_what_is_there(self, results, measured):
        run(ROWS[:1], TINY, results)
        before = rows_of(results)
        run(ROWS, TINY, Results(results.path))
        assert measured == [701_542] * 3 + [168_494] * 3
        assert rows_of(results)[:1] == before

    def test_more_repeats(self, results, measured):
        run(ROWS[:1], TINY, results)
        first = rows_of(results)[0]['rates']
        run(ROWS[:1], replace(TINY, repeats=5), results)
        assert len(measured) == 5
        assert rows_of(results)[0]['rates'].startswith(f'{first} ')

    @pytest.mark.parametrize(('before', 'now'), [('a', 'b'), ('a', 'a+changes'), ('a+changes', 'a+changes')])
    def test_part_of_a_row_by_other_code(self, results, measured, monkeypatch, before, now):
        """ A row is of one commit, changes to which may be others by now; a whole one stays as it is."""
        monkeypatch.setattr(benchmark, 'commit', lambda: before)
        run(ROWS[:1], replace(TINY, repeats=2), results)
        monkeypatch.setattr(benchmark, 'commit', lambda: now)
        run(ROWS[:1], replace(TINY, repeats=2), results)
        assert len(measured) == 2
        run(ROWS[:1], TINY, results)
        assert len(measured) == 5
        assert rows_of(results)[0]['commit'] == now
        assert len(rows_of(results)[0]['rates'].split()) == 3
        monkeypatch.setattr(benchmark, 'commit', lambda: 'c')
        run(ROWS[:1], replace(TINY, repeats=2), results)  # fewer than there are
        assert len(measured) == 5

    @pytest.mark.parametrize(('change', 'overwrite'), [(dict(), True), (dict(batches=1), False)])
    def test_replaces(self, results, measured, change, overwrite):
        run(ROWS, TINY, results)
        run(ROWS, replace(TINY, **change), results, overwrite=overwrite)
        assert len(measured) == 12
        assert len(rows_of(results)) == 2
        assert all(len(row['rates'].split()) == 3 for row in rows_of(results))

    @pytest.mark.parametrize('change', [dict(img_size=35), dict(batch_size=1), dict(mode='train')])
    def test_other_settings_stand_beside(self, results, change):
        run(ROWS[:1], TINY, results)
        run(ROWS[:1], replace(TINY, **change), results)
        assert len(rows_of(results)) == 2

    def test_interrupt_keeps_what_was_measured(self, results, measured, monkeypatch):
        rate = Subject.rate

        def interrupted(self):
            if len(measured) == 4:
                raise KeyboardInterrupt
            return rate(self)

        monkeypatch.setattr(Subject, 'rate', interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(ROWS, TINY, results)
        kept = [row['rates'].split() for row in rows_of(results)]
        assert [len(rates) for rates in kept] == [2, 1]
        monkeypatch.setattr(Subject, 'rate', rate)
        run(ROWS, TINY, Results(results.path))
        assert measured == [701_542, 168_494] * 2 + [168_494, 701_542, 168_494]
        for row, rates in zip(rows_of(results), kept):
            assert row['rates'].split()[:len(rates)] == rates

    def test_part_of_a_row_by_other_versions_is_dropped(self, results, measured, monkeypatch):
        run(ROWS[:1], replace(TINY, repeats=2), results)
        monkeypatch.setattr(torch, '__version__', '1.0')
        run(ROWS[:1], TINY, results)
        row, = rows_of(results)
        assert (len(measured), len(row['rates'].split()), row['torch']) == (5, 3, '1.0')

    def test_by_other_threads(self, results, measured, monkeypatch):
        """ What one thread did is no answer for two."""
        run(ROWS[:1], TINY, results)
        threads = torch.get_num_threads()
        monkeypatch.setattr(torch, 'get_num_threads', lambda: threads + 1)
        run(ROWS[:1], TINY, results)
        row, = rows_of(results)
        assert (len(measured), len(row['rates'].split()), row['threads']) == (6, 3, str(threads + 1))

    def test_failing_row(self, results, measured, monkeypatch):
        """ It is recorded, the others go on with the memory that it took, and the next run tries it again."""
        rate, subjects, kept = Subject.rate, [], []

        def exhausted(self):
            kept.append(any(subject() for subject in subjects))
            if self.params == 701_542 and len(measured) > 1:
                subjects.append(weakref.ref(self))
                raise torch.OutOfMemoryError('tried to allocate 9 GiB of /opt/someone/device')
            return rate(self)

        monkeypatch.setattr(Subject, 'rate', exhausted)
        assert run(ROWS, TINY, results) == 1
        failed, other = rows_of(results)
        assert failed['error'] == 'out of memory: tried to allocate 9 GiB of <path>'
        assert (len(failed['rates'].split()), failed['params'], failed['timer']) == (1, '701542', 'wall clock')
        assert (other['error'], len(other['rates'].split())) == ('', 3)
        assert (len(subjects), any(kept)) == (1, False)
        monkeypatch.setattr(Subject, 'rate', rate)
        assert run(ROWS, TINY, results) == 0
        assert [(row['error'], len(row['rates'].split())) for row in rows_of(results)] == [('', 3)] * 2

    def test_fewer_repeats_than_a_failed_row_has(self, results, measured, monkeypatch):
        """ It is tried again: it would else stay as failed, and the run answer that none is."""
        rate = Subject.rate

        def exhausted(self):
            if len(measured) > 2:
                raise torch.OutOfMemoryError
            return rate(self)

        monkeypatch.setattr(Subject, 'rate', exhausted)
        assert run(ROWS[:1], TINY, results) == 1
        fewer = replace(TINY, repeats=2)
        assert run(ROWS[:1], fewer, results) == 1
        monkeypatch.setattr(Subject, 'rate', rate)
        assert run(ROWS[:1], fewer, results) == 0
        row, = rows_of(results)
        assert (len(measured), row['error'], len(row['rates'].split())) == (5, '', 2)

    def test_one_file_of_several(self, results):
        """ Each process keeps what the others have put since it read the file."""
        others = [Results(results.path) for _ in range(4)]

        def put(n):
            for batch_size in range(10):
                others[n].put({**dict.fromkeys(benchmark.COLUMNS, str(n)), 'batch_size': str(batch_size)})

        threads = [threading.Thread(target=put, args=(n,)) for n in range(len(others))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {(row['model'], row['batch_size']) for row in rows_of(results)} == {
            (str(n), str(batch_size)) for n in range(4) for batch_size in range(10)}

    def test_rows_taken_out(self, results):
        """ They are gone from the file, but for those that another process has measured anew."""
        rows = {name: dict.fromkeys(benchmark.COLUMNS, name) for name in 'abc'}
        for name in 'ab':
            results.put(rows[name])
        other = Results(results.path)
        other.rows = {}
        results.put({**rows['b'], 'img_per_s': '7'})
        other.put(rows['c'])
        assert [(row['model'], row['img_per_s']) for row in rows_of(results)] == [('b', '7'), ('c', 'c')]
        assert [*other.rows.values()] == rows_of(results)
        other.rows = {}
        other.put(rows['a'])
        assert rows_of(results) == [rows['a']]

    @pytest.mark.parametrize('content', [b'', b'a,b\n1,2\n', b'\xff\xfe', None])
    def test_damaged_file(self, tmp_path, content):
        path = tmp_path / 'results.csv'
        if content is None:
            path.write_text(','.join(benchmark.COLUMNS) + '\nsteady,short\n')
        else:
            path.write_bytes(content)
        with pytest.raises(ValueError, match='results file'):
            Results(path)

    def test_what_is_recorded(self, results):
        run(ROWS[:1], TINY, results)
        row, = rows_of(results)
        assert (row['torch'], row['timm']) == (torch.__version__, timm.__version__)
        assert row['threads'] == str(torch.get_num_threads())
        assert row['device'].startswith('CPU')
        assert row['timer'] == 'wall clock'
        assert len(row['date']) == 10
        text = results.path.read_text()
        assert not any(place in text for place in (str(ROOT), str(Path.home()), str(results.path.parent)))
        assert platform.node() not in text or len(platform.node()) < 4
        with open(results.path, newline='') as f:
            assert next(csv.reader(f)) == list(benchmark.COLUMNS)


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='not glibc')
def test_keep_memory():
    """ What is freed is not fetched from the system again."""
    code = (
        'import resource, torch\n'
        'from splitmixer_timm.benchmark import keep_memory\n'
        'def faults():\n'
        '    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n'
        '    for _ in range(4): torch.ones(2**24)\n'
        '    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n'
        'print(faults(), keep_memory(), faults(), faults())')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    returned, done, _, kept = done.stdout.split()
    assert done == 'True'
    assert int(kept) < int(returned) / 10


class TestNvml:
    """ What NVML says, by a stand-in for its module."""

    @pytest.fixture
    def nvml(self, monkeypatch):
        nvml = types.SimpleNamespace(
            NVMLError=RuntimeError, NVML_CLOCK_SM=1, nvmlInit=lambda: None, pids=[os.getpid()],
            nvmlSystemGetDriverVersion=lambda: '580.1', nvmlDeviceGetHandleByUUID={'GPU-1234': 'gpu'}.__getitem__,
            nvmlDeviceGetClockInfo=lambda gpu, clock: 1500, nvmlDeviceGetMaxClockInfo=lambda gpu, clock: 1980,
            drawing=[])
        for kind, name in (('Compute', 'pids'), ('Graphics', 'drawing')):
            setattr(nvml, f'nvmlDeviceGet{kind}RunningProcesses', lambda gpu, name=name: [
                types.SimpleNamespace(pid=pid) for pid in getattr(nvml, name)])
        monkeypatch.setitem(sys.modules, 'pynvml', nvml)
        monkeypatch.setattr(
            torch.cuda, 'get_device_properties', lambda device: types.SimpleNamespace(uuid='1234'))
        return nvml

    @pytest.mark.parametrize(('pids', 'others'), [
        ([os.getpid()], '0'), ([os.getpid(), 10**9, 10**9 + 1], '2'), ([os.getpid(), os.getppid()], '0'),
        ([7], '0'), ([7, 8], '1'), ([], 'unknown')])
    def test_processes(self, nvml, pids, others):
        nvml.pids = pids
        assert benchmark.gpu_state(torch.device('cuda')) == dict(
            driver='580.1', other_processes=others, sm_mhz='1500', sm_mhz_max='1980')

    def test_processes_that_draw(self, nvml):
        nvml.drawing = [7, os.getpid()]
        assert benchmark.gpu_state(torch.device('cuda'))['other_processes'] == '1'

    @pytest.mark.parametrize(('cuda', 'hip'), [('13.0', None), (None, '7.1')])
    def test_versions(self, nvml, monkeypatch, cuda, hip):
        """ The number of threads is that of a CPU, the libraries' versions those of a GPU."""
        monkeypatch.setattr(torch.version, 'cuda', cuda)
        monkeypatch.setattr(torch.version, 'hip', hip)
        monkeypatch.setattr(torch.backends.cudnn, 'version', lambda: 92000)
        on_gpu, on_cpu = (benchmark.describe_versions(torch.device(name)) for name in ('cuda', 'cpu'))
        names = 'threads', 'driver', 'cuda', 'cudnn'
        assert [on_gpu[name] for name in names] == ['', '580.1', cuda or hip, '92000']
        assert [on_cpu[name] for name in names] == [str(torch.get_num_threads()), '', '', '']

    def test_what_it_does_not_tell(self, nvml, monkeypatch):
        def refuse(*args):
            raise nvml.NVMLError('not supported')

        nvml.nvmlDeviceGetClockInfo = refuse
        state = benchmark.gpu_state(torch.device('cuda'))
        assert (state['driver'], state['sm_mhz'], state['other_processes']) == ('580.1', 'unknown', 'unknown')
        monkeypatch.setitem(sys.modules, 'pynvml', None)
        assert set(benchmark.gpu_state(torch.device('cuda')).values()) == {'unknown'}
        assert set(benchmark.gpu_state(torch.device('cpu')).values()) == {''}


class TestCommand:
    ARGS = ['benchmark', '--device', 'cpu', '--batch-size', '2', '--img-size', '28', '--batches', '1', '--repeats', '2']

    def test_table_and_picture(self, tmp_path, capsys, monkeypatch):
        folder = tmp_path / 'new' / 'results'
        models = ['--models', 'splitmixer_i_256_8_ks7_p7', 'convmixer_256_8_ks7_p7', 'resnet18']
        assert cli.main([*self.ARGS, *models, '--results', str(folder)]) == 0
        out = capsys.readouterr().out
        lines = [[cell.strip() for cell in line.split('|')[1:-1]] for line in out.splitlines() if line.startswith('|')]
        assert lines[0] == ['model', 'parameters', "paper's V100", 'ratio', 'steady', 'spread', 'ratio']
        assert [line[:4] for line in lines[2:]] == [
            ['ConvMixer', '701,542', '815.8', '1.00'], ['I, α = 2/3', '342,230', '2,098', '2.57'],
            ['resnet18', '11,228,838', '-', '-']]
        assert lines[2][6] == '1.00'
        assert 'wall clock' in out
        name = benchmark.results_name('cpu')
        rows = list(Results(folder / f'{name}.csv').rows.values())
        assert lines[3][6] == f'{float(rows[0]["img_per_s"]) / float(rows[1]["img_per_s"]):.2f}'
        picture = folder / f'{name}.fp32-contiguous-eager-infer-2-28.png'
        assert benchmark_report.is_drawn(benchmark_report.group(rows)[0], picture)
        assert {path.name for path in folder.iterdir()} == {f'{name}.csv', picture.name}

        # again, of what is kept, on a terminal whose encoding has no alpha
        monkeypatch.setattr('sys.stdout', io.TextIOWrapper(io.BytesIO(), 'ascii', write_through=True))
        assert cli.main([*self.ARGS, *models, '--results', str(folder)]) == 0
        assert '| I, \\u03b1 = 2/3 |' in sys.stdout.buffer.getvalue().decode('ascii')

    def test_failures(self, tmp_path, capsys):
        args = [*self.ARGS, '--img-size', '5', '--models', 'convmixer_256_8_ks7_p7', 'mobilenetv3_small_100']
        assert cli.main([*args, '--results', str(tmp_path)]) == 1
        assert 'ConvMixer failed (steady): ' in capsys.readouterr().out

    @pytest.mark.parametrize('has_precision', [True, False])
    def test_precision_that_the_processor_lacks(self, tmp_path, capsys, monkeypatch, has_precision):
        monkeypatch.setattr(machine, 'has_precision', lambda name: has_precision)
        monkeypatch.setattr(benchmark, 'run', lambda *args: 0)
        assert cli.main([*self.ARGS, '--precision', 'fp16', '--results', str(tmp_path)]) == 0
        assert ('does not compute in fp16: it takes many times' in capsys.readouterr().err) != has_precision

    def test_interrupt(self, tmp_path, capsys, monkeypatch):
        def interrupt(self):
            raise KeyboardInterrupt

        monkeypatch.setattr(Subject, 'measure', interrupt)
        assert cli.main([*self.ARGS, '--results', str(tmp_path)]) == 130
        assert 'goes on' in capsys.readouterr().err

    @pytest.mark.parametrize(('args', 'words'), [
        (['--device', 'warp'], "got 'warp'"),
        (['--device', 'meta'], "got 'meta'"),
        (['--models', 'table3', 'nonesuch'], "unknown model 'nonesuch'"),
        (['--models', 'splitmixer_iv_256'], "unknown model 'splitmixer_iv_256'"),
        (['--batches', '0'], 'at least 1'),
        (['--batch-size', '-3'], 'at least 1'),
        (['--repeats', 'many'], 'at least 1'),
        (['--precision', 'fp8'], 'fp8'),
        (['--precision', 'tf32'], 'needs a CUDA device'),
        (['--protocol', 'paper', 'steady'], "'paper' fixes batch_size at 64, got 2"),
        (['--results', __file__], 'results cannot be written to'),
        (['--results', os.path.join(__file__, 'below')], 'results cannot be written to'),
        pytest.param(['--device', 'cuda'], 'no CUDA', marks=pytest.mark.skipif(
            torch.cuda.is_available(), reason='there is CUDA')),
        pytest.param(['--device', 'cuda:99'], 'CUDA devices', marks=[pytest.mark.cuda, pytest.mark.skipif(
            not torch.cuda.is_available(), reason='no CUDA')]),
    ])
    def test_bad_requests(self, args, words, tmp_path, capsys, monkeypatch):
        """ Told in words before any work."""
        monkeypatch.setattr(benchmark, 'run', lambda *args: pytest.fail('work was started'))
        try:
            status = cli.main([*self.ARGS, '--results', str(tmp_path), *args])
        except SystemExit as e:
            status = e.code
        out, err = capsys.readouterr()
        assert (status, out) == (2, '')
        assert words in err
        assert not list(tmp_path.iterdir())

    @pytest.mark.skipif(os.name != 'posix' or os.getuid() == 0, reason='root may write anywhere')
    def test_folder_without_permission(self, tmp_path, capsys):
        tmp_path.chmod(0o500)
        assert cli.main([*self.ARGS, '--results', str(tmp_path)]) == 2
        assert 'Permission denied' in capsys.readouterr().err

    def test_without_matplotlib(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
        args = [*self.ARGS, '--models', 'convmixer_256_8_ks7_p7', '--results', str(tmp_path)]
        assert cli.main([*args, '--plot']) == 2
        assert 'splitmixer-timm[bench]' in capsys.readouterr().err
        assert not list(tmp_path.iterdir())
        assert cli.main(args) == 0
        assert [path.suffix for path in tmp_path.iterdir()] == ['.csv']

    @pytest.mark.parametrize('text', ['mine\n', ','.join(benchmark.COLUMNS) + '\n' + ',' * len(benchmark.COLUMNS)])
    def test_file_of_something_else(self, tmp_path, capsys, text):
        path = tmp_path / f'{benchmark.results_name("cpu")}.csv'
        path.write_text(text)
        assert cli.main([*self.ARGS, '--results', str(tmp_path)]) == 2
        assert 'not a results file' in capsys.readouterr().err
        assert path.read_text() == text

    def test_script(self, tmp_path):
        """ From a checkout the same by benchmarks/throughput.py, the paper's protocol's processes included."""
        done = subprocess.run([
            sys.executable, ROOT / 'benchmarks' / 'throughput.py', *self.ARGS[1:], '--models', 'splitmixer_i_256_8',
            '--results', tmp_path, '--no-plot'], capture_output=True, text=True,
            env={**os.environ, 'PYTHONPATH': str(ROOT)})
        assert done.returncode == 0, done.stderr
        assert 'splitmixer_i_256_8' in done.stdout
        assert [path.suffix for path in tmp_path.iterdir()] == ['.csv']


@pytest.fixture(scope='module')
def rows(tmp_path_factory):
    """ As if measured on a GPU, by both protocols."""
    results = Results(tmp_path_factory.mktemp('results') / 'results.csv')
    run(ROWS, TINY, results)
    gpu = dict(
        device='A GPU', timer='CUDA events', batches='100', other_processes='0', peak_memory_mib='1234.5',
        stable='yes')
    steady = [{**row, **gpu} for row in rows_of(results)]
    return [*steady, *({**row, 'protocol': 'paper', 'rates': row['img_per_s']} for row in steady)]


@pytest.fixture
def drawn(monkeypatch):
    """ Points by the axes on which they are drawn."""
    from matplotlib.axes import Axes

    points = {}
    plot = Axes.plot

    def recording(self, x, y, *args, **kwargs):
        points.setdefault(self, []).append((x, y))
        return plot(self, x, y, *args, **kwargs)

    monkeypatch.setattr(Axes, 'plot', recording)
    return points


class TestReport:
    def test_both_protocols_side_by_side(self, rows):
        group, = benchmark_report.group(rows)
        table = benchmark_report.throughput_table(group).splitlines()
        assert table[0] == (
            "| model | parameters | paper's V100 | ratio | paper protocol | ratio | steady | spread | ratio | "
            "peak memory |")
        assert len(table) == 4
        cells = [cell.strip() for cell in table[3].split('|')[1:-1]]
        assert cells[:4] == ['II, s = 3', '168,494', '2,291', '2.81']
        assert cells[5] == cells[8]
        assert cells[9] == '1,234 MiB'

    def test_spread(self, rows):
        """ Of one repeat there is none, which is not one of nothing."""
        rates = ('2 3 4', '3')
        group = [{**row, 'rates': rate, 'img_per_s': '3'} for row, rate in zip(rows, rates)]
        table = benchmark_report.throughput_table(group).splitlines()
        assert table[0].split('|')[6].strip() == 'spread'
        assert [line.split('|')[6].strip() for line in table[2:]] == ['66.7%', '-']

    def test_says_what_it_is(self, rows):
        text = benchmark_report.describe(rows)
        assert 'not the paper' not in text
        assert 'Only process on the GPU: yes' in text
        for change, words in ((dict(timer='wall clock'), 'a wall clock, not CUDA events'),
                              (dict(batches='9'), 'fed 9 times, not 100')):
            text = benchmark_report.describe([{**row, **change} for row in rows])
            assert "**not the paper's protocol** here: " in text
            assert words in text
        text = benchmark_report.describe([{**rows[0], 'other_processes': '2'}, {**rows[1], 'stable': 'no'}])
        assert 'Only process on the GPU: for 1 of 2 rows' in text
        assert 'Not yet stable when warm-up ended: II, s = 3' in text
        for others, answer in (('2', 'no'), ('unknown', 'unknown')):
            text = benchmark_report.describe([{**row, 'other_processes': others} for row in rows])
            assert f'Only process on the GPU: {answer}.' in text
        assert 'MHz' not in benchmark_report.source([{**row, 'sm_mhz_max': 'unknown'} for row in rows])
        assert ', at most 1980 MHz, ' in benchmark_report.source([{**row, 'sm_mhz_max': '1980'} for row in rows])

    def test_says_what_is_missing(self, rows):
        assert 'Not measured by it' not in benchmark_report.describe(rows)
        without = [row for row in rows if (row['protocol'], row['model']) != ('paper', rows[-1]['model'])]
        assert len(without) == len(rows) - 1
        assert 'Not measured by it: II, s = 3.' in benchmark_report.describe(without)

    @pytest.mark.parametrize('column', ['torch', 'threads', 'commit', 'date'])
    def test_ratio_is_within_one_run(self, rows, column):
        table = benchmark_report.throughput_table([{**row, column: str(i)} for i, row in enumerate(rows)])
        assert [line.split('|')[9].strip() for line in table.splitlines()[2:]] == ['1.00', '-']

    def test_training_has_no_figures_of_the_paper(self, rows):
        table = benchmark_report.throughput_table([{**row, 'mode': 'train'} for row in rows])
        assert "paper's V100" not in table
        assert '2,291' not in table

    @pytest.mark.parametrize(('change', 'is_told'), [
        (dict(memory_format='channels_last'), False), (dict(batch_size='1'), True), (dict(img_size='32'), True),
        (dict(img_size='32', mode='train'), False)])
    def test_tells_where_the_papers_figures_are_of_other_work(self, rows, tmp_path, monkeypatch, change, is_told):
        from matplotlib.figure import Figure

        titles = []
        monkeypatch.setattr(Figure, 'suptitle', lambda self, title: titles.append(title))
        rows = [{**row, **Settings().columns(), **change} for row in rows]
        benchmark_report.draw(rows, tmp_path / 'picture.png')
        setting = 'inference, fp32, batch 64, 224 x 224'
        assert (f"The paper's V100 is another setting: {setting}. " in benchmark_report.describe(rows)) == is_told
        assert [title.endswith(f"; the paper's V100: {setting}") for title in titles] == [is_told]

    def test_groups(self, rows):
        papers = [{**row, **Settings().columns()} for row in rows]
        groups = benchmark_report.group([*rows, *papers])
        assert [benchmark_report.is_papers(group) for group in groups] == [True, False]
        assert benchmark_report.picture_name('x', groups[0]) == 'x.png'
        assert benchmark_report.picture_name('x', groups[1]) == 'x.fp32-contiguous-eager-infer-2-28.png'

    @pytest.mark.parametrize('change', [dict(), dict(mode='train'), dict(model='resnet18')])
    def test_picture(self, rows, tmp_path, change):
        rows = [{**row, **change} for row in rows]
        path = tmp_path / 'picture.png'
        assert not benchmark_report.is_drawn(rows, path)
        benchmark_report.draw(rows, path)
        assert benchmark_report.is_drawn(rows, path)
        assert not benchmark_report.is_drawn([{**rows[0], 'img_per_s': '1'}, *rows[1:]], path)
        assert [p.name for p in tmp_path.iterdir() if p.suffix == '.png' or p.suffix == '.tmp'] == ['picture.png']

    def test_points(self, rows, tmp_path, drawn):
        """ Of parameters and images a second, of ratios, of accuracy and images a second: the paper's, and ours."""
        benchmark_report.draw(rows, tmp_path / 'picture.png')
        convmixer, other = (float(row['img_per_s']) for row in rows[:2])
        top1 = manifest.entries()['convmixer_256_8_ks7_p7.flowers102']['metrics']['top1']
        left, middle, right = drawn.values()
        assert left == [(701_542, 815.84), (168_494, 2291.44), (701_542, convmixer), (168_494, other)]
        ratio = other / convmixer  # by each protocol
        assert middle == [(2291.44 / 815.84, 0), (ratio, 0), (ratio, 0), (1, 1), (1, 1), (1, 1)]
        assert right == [
            (60.47, 815.84), (62.03, 2097.55), (59.33, 2322.02), (59., 2112.29), (61.51, 2110.92), (top1, convmixer)]

    @pytest.mark.parametrize('table', ['TABLE3', 'TOP1'])
    def test_papers_figures_that_changed(self, rows, tmp_path, monkeypatch, table):
        path = tmp_path / 'picture.png'
        benchmark_report.draw(rows, path)
        figures = dict(getattr(paper, table))
        if table == 'TABLE3':
            figures[paper.BASELINE] = 'ConvMixer', 1815.84
        else:
            figures['flowers102'] = {**figures['flowers102'], 'i': 72.03}
        monkeypatch.setattr(benchmark_report, table, figures)
        assert not benchmark_report.is_drawn(rows, path)


class TestDocuments:
    """ What benchmarks/report.py makes of results files."""

    @pytest.fixture
    def run_report(self, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(str(ROOT / 'benchmarks'))
        import report
        monkeypatch.setattr(report, 'ROOT', tmp_path)
        monkeypatch.setattr(report, 'RESULTS_DIR', tmp_path / 'benchmarks' / 'results')
        report.RESULTS_DIR.mkdir(parents=True)
        for document in [*report.DOCUMENTS, 'benchmarks/results/complexity.csv', 'benchmarks/results/accuracy.png']:
            (tmp_path / document).write_bytes((ROOT / document).read_bytes())

        def run_report(*args):
            monkeypatch.setattr(sys, 'argv', ['report.py', *args])
            return report.main()

        return run_report

    @pytest.fixture
    def device(self, rows, tmp_path, run_report):
        """ Results of a device in the paper's setting."""
        results = Results(tmp_path / 'benchmarks' / 'results' / 'a-gpu.csv')
        for row in rows:
            results.put({**row, **Settings().columns()})
        return results

    def test_without_results(self, run_report, tmp_path):
        assert run_report() == 0
        assert 'None of ours is measured yet.' in (tmp_path / 'README.md').read_text()
        assert (tmp_path / 'benchmarks' / 'README.md').read_text().count('No results file is in') == 3
        assert run_report('--check') == 0

    def test_with_results(self, run_report, device, tmp_path, capsys):
        assert run_report('--check') == 1
        assert capsys.readouterr().out == 'stale: README.md, benchmarks/README.md, a-gpu.png\n'
        assert run_report() == 0
        assert run_report('--check') == 0
        readme = (tmp_path / 'README.md').read_text()
        assert "| model | parameters | paper's V100 | ratio | A GPU | spread | ratio |\n" in readme
        assert '| II, s = 2 | 241,766 | 2,322 | 2.85 | - | - | - |' in readme
        assert f'A GPU, {torch.get_num_threads()} threads, torch {torch.__version__}' in readme
        long = (tmp_path / 'benchmarks' / 'README.md').read_text()
        assert '### A GPU: inference, fp32, batch 64, 224 x 224' in long
        assert '![A GPU beside the paper](results/a-gpu.png)' in long
        row = next(iter(device.rows.values()))
        device.put({**row, 'img_per_s': '1.5'})
        assert run_report('--check') == 1

    def test_same_memory_format(self, run_report, device, tmp_path):
        """ Beside the ratio stands that with all models in one memory format, where it was measured."""
        row = next(row for row in device.rows.values() if row['protocol'] == 'steady')
        for memory_format, rates in (('contiguous', ('2', '3')), ('channels_last', ('2', '8'))):
            for (model, arguments), rate in zip(list(paper.TABLE3)[:2], rates):
                device.put({**row, 'model': model, 'arguments': arguments, 'img_per_s': rate, 'rates': f'{rate} {rate}',
                            'memory_format': memory_format})
        assert run_report() == 0
        lines = [line for line in (tmp_path / 'README.md').read_text().splitlines() if line.startswith('| ')]
        header, = (line for line in lines if 'A GPU' in line)
        assert header.endswith('| A GPU | spread | ratio | ratio, all in channels_last |')
        row, = (line for line in lines if line.startswith('| I, α = 2/3 |'))
        assert row.endswith(' | 2.57 | 3 | 0.0% | 1.50 | 4.00 |')

    def test_accuracy_picture(self, run_report, tmp_path, monkeypatch, drawn):
        """ Drawn from the manifest and the paper's tables, and stale when a model of the zoo has another accuracy."""
        import report
        picture = tmp_path / 'benchmarks' / 'results' / 'accuracy.png'
        rows = report.accuracies()
        assert benchmark_report.is_drawn(rows, picture)
        assert dict(dataset='cifar10', model='I', params='275834', source='paper', top1='93.91') in rows
        zoo = {name: entry for name, entry in report.manifest.entries().items() if 'cifar' in name}
        assert sorted(row['top1'] for row in rows if row['source'] == 'ours') == sorted(
            f'{entry["metrics"]["top1"]:.2f}' for entry in zoo.values())
        name, entry = next(iter(zoo.items()))
        monkeypatch.setattr(report.manifest, 'entries', lambda: {name: {**entry, 'metrics': {'top1': 12.3}}})
        changed = report.accuracies()
        assert [row['recipe'] for row in changed if row['source'] == 'ours'] == ['']
        assert not benchmark_report.is_drawn(changed, picture)
        report.draw_accuracies(changed, picture)
        assert benchmark_report.is_drawn(changed, picture)
        assert [*drawn.values()] == [
            [(float(row['params']), float(row['top1'])) for row in changed if row['dataset'] == dataset]
            for dataset in ('cifar10', 'cifar100')]

    def test_picture_without_matplotlib(self, run_report, device, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr('report.find_spec', lambda name: None)
        assert run_report() == 1
        assert "needs matplotlib: pip install -e '.[bench]'" in capsys.readouterr().err
        assert not (tmp_path / 'benchmarks' / 'results' / 'a-gpu.png').exists()


@pytest.mark.skipif(
    not SCRIPTS or not os.path.isfile(os.path.join(SCRIPTS, 'benchmark.py')),
    reason="SPLITMIXER_TIMM_SCRIPTS does not name a folder with timm's benchmark.py")
def test_agrees_with_timms_benchmark(tmp_path):
    """ timm's script and ours, in turn, same network, batch and one thread: the best of each differ by less than 40 %.

    So wide because other work on the machine can slow either at any time; it still tells a wrong count of images, a
    training step or another network from noise.
    """
    row, settings = ('splitmixer_i_256_8', ''), Settings(batch_size=8, img_size=32, batches=10, repeats=1)
    theirs, ours = [], []
    for attempt in range(3):
        file = tmp_path / f'{attempt}.json'
        subprocess.run([
            sys.executable, '-m', 'splitmixer_timm.run', os.path.join(SCRIPTS, 'benchmark.py'), '--model', row[0],
            '--bench', 'inference', '--device', 'cpu', '--batch-size', '8', '--num-classes', '102',
            '--num-warm-iter', '3', '--num-bench-iter', '10', '--results-format', 'json', '--results-file', file,
        ], check=True, capture_output=True, env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'})
        result = json.loads(file.read_text())
        assert (result['infer_batch_size'], result['infer_img_size']) == (8, 32)
        theirs.append(result['infer_samples_per_sec'])
        ours.append(Subject(row, settings, make_images(settings)).measure()[0])
        if 1 / 1.4 < max(ours) / max(theirs) < 1.4:
            return
    pytest.fail(f'images a second: ours {ours}, theirs {theirs}')


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA')
class TestCuda:
    @pytest.mark.parametrize('protocol', ['paper', 'steady'])
    def test_rows(self, results, protocol):
        settings = replace(TINY, protocol=protocol, device='cuda')
        assert run(ROWS, settings, results) == 0, rows_of(results)
        for row in rows_of(results):
            assert row['timer'] == 'CUDA events'
            assert float(row['img_per_s']) > 0
            assert float(row['peak_memory_mib']) >= int(row['params']) * 4 / 2**20
            assert row['device'] == torch.cuda.get_device_name()

    def test_out_of_memory_is_a_row(self, results):
        settings = replace(TINY, device='cuda', batch_size=2**16, img_size=1024, repeats=1)
        assert run(ROWS[:1], settings, results) == 1
        assert rows_of(results)[0]['error'].startswith('out of memory')

    @pytest.mark.parametrize('change', [
        dict(precision='tf32'), dict(precision='fp16'), dict(precision='fp16', mode='train'), dict(mode='train')])
    def test_axes(self, results, change):
        assert run(ROWS, replace(TINY, device='cuda', **change), results) == 0, rows_of(results)
