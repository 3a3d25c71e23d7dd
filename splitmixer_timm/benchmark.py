""" Throughput on any device, by the paper's protocol or by a steady one, into results that a second run resumes.

`paper` is Table 3 of the paper to the letter: fp32 without TF32, one batch of 64 random images fed 100 times under
`no_grad`, a pair of CUDA events around each forward and a synchronisation after it, no eval mode and no warm-up. Each
model is measured in a process of its own, so that the start of the GPU's libraries falls on all alike.

`steady` measures what a user gets: eval and inference mode, warm-up until stable, then several repeats of many batches,
the models in turn so that drift hits all alike; the result is the median.

Where there are no CUDA events, a wall clock times the same code. On a CPU with glibc the allocator is told to keep what
is freed, see `keep_memory`.
"""
import ast
import csv
import ctypes
import datetime
import functools
import io
import multiprocessing
import os
import re
import signal
import statistics
import subprocess
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import timm
import torch
from timm.models import get_pretrained_cfg, is_model
from timm.optim import create_optimizer_v2
from torch import nn
from torch._dynamo import config as dynamo_config
from tqdm import tqdm

from . import __version__
from .files import replace_file
from .machine import check_device, device_name
from .paper import TABLE3

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ['Results', 'Row', 'Settings', 'build_model', 'run']

Row = Tuple[str, str]  # name for timm.create_model, arguments as text ('overlap_ratio=3/5')

_ROOT = Path(__file__).resolve().parents[1]
CHECKOUT = _ROOT if (_ROOT / 'benchmarks' / 'throughput.py').is_file() else None
RESULTS_DIR = (CHECKOUT or Path()) / 'benchmarks' / 'results'

NUM_CLASSES = 102  # of Flowers102, as in the paper
HALF = {'fp16': torch.float16, 'bf16': torch.bfloat16}
STABLE = 0.05  # the last windows of warm-up differ by no more than this share
MAX_WINDOWS = 10

SETTING = ('precision', 'memory_format', 'compile', 'mode', 'batch_size', 'img_size', 'device')
KEY = ('protocol', 'model', 'arguments', *SETTING)
VERSIONS = ('threads', 'driver', 'cuda', 'cudnn', 'torch', 'timm', 'splitmixer_timm')
GPU_LOAD = ('other_processes', 'sm_mhz', 'sm_mhz_max')
COLUMNS = (
    *KEY, 'params', 'img_per_s', 'rates', 'batches', 'warm_up', 'stable', 'timer', 'peak_memory_mib',
    'memory', *GPU_LOAD, 'error', 'date', 'commit', *VERSIONS)


@dataclass(frozen=True)
class Settings:
    """ How a row is measured.

    Attributes:
        protocol: 'paper' or 'steady'.
        device: Device for torch.
        precision: 'fp32' (without TF32), 'tf32', 'fp16' or 'bf16'. To infer, the whole model is of that type; to train
            it is under autocast.
        memory_format: 'contiguous' or 'channels_last'.
        compile: Compile the model.
        mode: 'infer', or 'train' for forward, cross-entropy, backward and a step of SGD.
        batch_size: Images a batch.
        img_size: Height and width of an image.
        batches: Batches timed, in each repeat.
        repeats: How many times they are timed.
    """
    protocol: str = 'steady'
    device: str = 'cpu'
    precision: str = 'fp32'
    memory_format: str = 'contiguous'
    compile: bool = False
    mode: str = 'infer'
    batch_size: int = 64
    img_size: int = 224
    batches: int = 100
    repeats: int = 5

    def key(self, row: Row) -> Tuple[str, ...]:
        """ What a row of the results is known by, in the order of `KEY`."""
        return self.protocol, *row, *self.columns().values(), device_name(self.device)

    def columns(self) -> Dict[str, str]:
        """ What the results say of these settings in the columns of `SETTING`, all but the device."""
        return dict(
            precision=self.precision, memory_format=self.memory_format, compile='yes' if self.compile else 'no',
            mode=self.mode, batch_size=str(self.batch_size), img_size=str(self.img_size))


def default_device() -> str:
    """ The fastest kind of device that is there."""
    return 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'


def check_settings(settings: Settings) -> None:
    """ Check settings for what cannot be measured, or is not the protocol that it is called.

    Raises:
        ValueError: If there is such.
    """
    device = check_device(settings.device)
    if settings.precision == 'tf32' and device.type != 'cuda':
        raise ValueError(f"precision 'tf32' needs a CUDA device, got device {settings.device!r}")
    if settings.protocol == 'paper':
        for name in SETTING[:-1]:
            value, fixed = getattr(settings, name), getattr(Settings, name)
            if value != fixed:
                raise ValueError(f"protocol 'paper' fixes {name} at {fixed!r}, got {value!r}")


def check_models(names: Sequence[str]) -> List[Row]:
    """ Rows to measure: 'table3' stands for all of the paper's Table 3.

    Raises:
        ValueError: If a name is not a model of timm's or ours.
    """
    unknown = [name for name in names if name != 'table3' and not is_model(name)]
    if unknown:
        raise ValueError(f"unknown model {', '.join(map(repr, unknown))}; `splitmixer-timm list` names ours, "
                         "timm.list_models() in Python all, and 'table3' stands for the rows of the paper's Table 3")
    return list(dict.fromkeys(row for name in names for row in (TABLE3 if name == 'table3' else [(name, '')])))


def results_name(device: str) -> str:
    """ Name of a device for its results files."""
    return re.sub(r'[^a-z0-9]+', '-', device_name(device).lower()).strip('-')


def commit() -> str:
    """ Commit of the checkout that this package is in, marked if its code was changed since; empty if in none."""
    if CHECKOUT is None:
        return ''
    git = ['git', '-C', str(CHECKOUT)]
    try:
        done = subprocess.run([*git, 'rev-parse', '--short=12', 'HEAD'], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, 'status', '--porcelain', '--', 'splitmixer_timm', 'benchmarks/*.py'],
            capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ''
    return done.stdout.strip() + ('+changes' if changed.stdout else '')


def gpu_state(device: torch.device) -> Dict[str, str]:
    """ What NVML knows of a CUDA device: driver, processes beside this one, clock now and at most.

    Each is 'unknown' where NVML (package nvidia-ml-py) is missing or does not tell; empty on other devices.
    """
    names = ('driver', *GPU_LOAD)
    if device.type != 'cuda':
        return dict.fromkeys(names, '')
    state = dict.fromkeys(names, 'unknown')
    try:
        import pynvml
    except ImportError:
        return state
    try:
        pynvml.nvmlInit()
        state['driver'] = pynvml.nvmlSystemGetDriverVersion()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f'GPU-{torch.cuda.get_device_properties(device).uuid}')
        state['sm_mhz'] = str(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM))
        state['sm_mhz_max'] = str(pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM))
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        processes += pynvml.nvmlDeviceGetGraphicsRunningProcesses(handle)
        pids = {process.pid for process in processes}
        # a container may hide its processes' real ids, or all processes: this one is always among them
        if os.getpid() in pids:
            state['other_processes'] = str(len(pids - {os.getpid(), os.getppid()}))
        elif pids:
            state['other_processes'] = str(len(pids) - 1)
    except pynvml.NVMLError:
        pass
    return state


@contextmanager
def gpu_load(device: torch.device) -> Iterator[Dict[str, str]]:
    """ What else a CUDA device did during a measurement, by the names of `GPU_LOAD`; known once it is over.

    Of the processes beside this one the larger number counts, of those at the start and at the end.
    """
    before, load = gpu_state(device)['other_processes'], {}
    yield load
    state = gpu_state(device)
    load.update({name: state[name] for name in GPU_LOAD})
    if before.isdecimal() and load['other_processes'].isdecimal():
        load['other_processes'] = str(max(int(before), int(load['other_processes'])))


def describe_versions(device: torch.device) -> Dict[str, str]:
    """ Versions that a measurement depends on, by the names of `VERSIONS`."""
    cuda = device.type == 'cuda'
    return dict(
        threads=str(torch.get_num_threads()) if device.type == 'cpu' else '',
        driver=gpu_state(device)['driver'],
        cuda=str(torch.version.cuda or torch.version.hip) if cuda else '',
        cudnn=str(torch.backends.cudnn.version()) if cuda else '',
        torch=torch.__version__,
        timm=timm.__version__,
        splitmixer_timm=__version__,
    )


def build_model(row: Row, img_size: int, num_classes: int = NUM_CLASSES, **kwargs) -> nn.Module:
    """ Model of a row, for images of that size.

    Args:
        row: Name and arguments.
        img_size: Height and width; given to the models whose weights depend on it.
        num_classes: Number of classes.
        **kwargs: Arguments of `timm.create_model`.
    """
    name, arguments = row
    for pair in filter(None, arguments.split(',')):
        key, _, value = pair.partition('=')
        try:
            kwargs[key] = ast.literal_eval(value)
        except ValueError:
            kwargs[key] = value
    if getattr(get_pretrained_cfg(name), 'fixed_input_size', False):
        kwargs['img_size'] = img_size
    return timm.create_model(name, num_classes=num_classes, **kwargs)


def make_images(settings: Settings) -> torch.Tensor:
    """ The one batch of random images that every model is fed."""
    torch.manual_seed(0)
    images = torch.randn(
        settings.batch_size, 3, settings.img_size, settings.img_size, device=settings.device,
        dtype=HALF.get(settings.precision) if settings.mode == 'infer' else None)
    return images.contiguous(memory_format=_memory_format(settings))


def _memory_format(settings: Settings) -> torch.memory_format:
    return torch.channels_last if settings.memory_format == 'channels_last' else torch.contiguous_format


@contextmanager
def backend_flags(settings: Settings) -> Iterator[None]:
    """ TF32 only where asked for, cuDNN's search for the fastest kernels in `steady` only."""
    tf32 = settings.precision == 'tf32'
    with ExitStack() as stack:
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision('high' if tf32 else 'highest')
        stack.enter_context(torch.backends.cudnn.flags(
            enabled=True, benchmark=settings.protocol == 'steady', allow_tf32=tf32))
        if settings.device.startswith('cuda'):
            stack.enter_context(torch.cuda.device(settings.device))
        if settings.compile:
            # models of one class share their code: beyond this limit they would run uncompiled, and say nothing
            stack.enter_context(dynamo_config.patch(recompile_limit=10_000, accumulated_recompile_limit=10_000))
        yield


def keep_memory() -> bool:
    """ Have the allocator of a CPU keep what is freed, as jemalloc and tcmalloc do; whether it can (glibc's).

    It returns large tensors to the system and fetches them anew, page by page, which can take most of the time of a
    forward and differs widely from one to the next.
    """
    try:
        mallopt = ctypes.CDLL('libc.so.6').mallopt
    except (OSError, AttributeError):
        return False
    no_mmap, no_trim, top_pad = (-4, 0), (-1, -1), (-2, 2**28)  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
    return all(mallopt(*option) for option in (no_mmap, no_trim, top_pad))


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """ Time that work takes: by a pair of CUDA events, synchronised after it, or else by the wall clock."""
    if device.type == 'cuda':
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1000
    synchronize = torch.mps.synchronize if device.type == 'mps' else lambda: None
    synchronize()
    start_time = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start_time


class Subject:
    """ A model on its device, ready to be timed.

    Args:
        row: Name and arguments.
        settings: How to measure it.
        images: The batch to feed.
    """

    def __init__(self, row: Row, settings: Settings, images: torch.Tensor):
        self.settings = settings
        self.device = images.device
        self.warm_up_batches = 0
        self.is_stable: Optional[bool] = None
        if self.device.type == 'cuda':
            # takes the workspace of cuBLAS, which stays, and belongs to no model
            nn.functional.linear(*(torch.ones(8, 8, device=self.device, dtype=images.dtype) for _ in range(2)))
        allocated = self._allocated()
        training = settings.mode == 'train'
        model = build_model(row, settings.img_size)
        model = model.to(self.device, images.dtype, memory_format=_memory_format(settings))
        model.train(training or settings.protocol == 'paper')
        self.params = sum(p.numel() for p in model.parameters())
        optimizer = create_optimizer_v2(model, opt='sgd', lr=1e-4) if training else None
        if settings.compile:
            model = torch.compile(model)
        if training:
            self.grad_mode = torch.enable_grad
            self.step = functools.partial(train_step, model, optimizer, images, settings)
        else:
            self.grad_mode = torch.no_grad if settings.protocol == 'paper' else torch.inference_mode
            self.step = functools.partial(model, images)
        self.own_memory = self._allocated() - allocated + images.nbytes
        self.memory = 'kept' if self.device.type == 'cpu' and keep_memory() else ''

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == 'cuda' else 0

    def _steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def warm_up(self) -> None:
        """ Run until two successive windows, on the GPU three, take the same time."""
        # a window is long enough to be compared: on a GPU a batch takes milliseconds, on a CPU seconds
        window, alike = (1, 2) if self.device.type == 'cpu' else (max(1, self.settings.batches // 10), 3)
        times: List[float] = []
        self.is_stable = False
        with self.grad_mode():
            while not self.is_stable and len(times) < MAX_WINDOWS:
                times.append(seconds(lambda: self._steps(window), self.device))
                last = times[-alike:]
                self.is_stable = len(last) == alike and max(last) <= min(last) * (1 + STABLE)
        self.warm_up_batches = window * len(times)

    def rate(self) -> float:
        """ Images a second over the batches of one repeat."""
        batches = self.settings.batches
        with self.grad_mode():
            if self.settings.protocol == 'paper':
                total = sum(seconds(self.step, self.device) for _ in range(batches))
            else:
                if self.device.type != 'cpu':
                    self.step()  # other models ran since: caches and clock
                total = seconds(lambda: self._steps(batches), self.device)
        return batches * self.settings.batch_size / total

    def measure(self) -> Tuple[float, Dict[str, str]]:
        """ Rate of one repeat, and what is recorded beside it."""
        cuda = self.device.type == 'cuda'
        others_hold = self._allocated() - self.own_memory
        with gpu_load(self.device) as load:
            if self.settings.protocol == 'steady' and self.is_stable is None:
                self.warm_up()
            if cuda:
                torch.cuda.reset_peak_memory_stats(self.device)
            rate = self.rate()
        peak = f'{(torch.cuda.max_memory_allocated(self.device) - others_hold) / 2**20:.1f}' if cuda else ''
        self.own_memory = self._allocated() - others_hold  # gradients and the optimizer's state came to it
        return rate, dict(
            params=str(self.params),
            warm_up=str(self.warm_up_batches),
            stable={None: '', True: 'yes', False: 'no'}[self.is_stable],
            timer='CUDA events' if cuda else 'wall clock',
            peak_memory_mib=peak,
            memory=self.memory,
            **load,
        )


def train_step(
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        images: torch.Tensor,
        settings: Settings,
) -> None:
    half = HALF.get(settings.precision)
    target = torch.arange(len(images), device=images.device) % NUM_CLASSES
    with torch.autocast(images.device.type, half, enabled=half is not None):
        loss = nn.functional.cross_entropy(model(images), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def describe_error(error: BaseException) -> str:
    """ One line without a machine's paths."""
    kind = 'out of memory' if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
    text = re.sub(r'(?<![\w.])/[\w.+-]+(/[\w.+-]+)+', '<path>', ' '.join(str(error).split()))
    return f'{kind}: {text}'[:200]


def _measure_in_child(connection, row: Row, settings: Settings, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    torch.set_num_threads(threads)
    try:
        with backend_flags(settings):
            connection.send(Subject(row, settings, make_images(settings)).measure())
    except Exception as e:
        connection.send(describe_error(e))


def measure_alone(row: Row, settings: Settings) -> Tuple[float, Dict[str, str]]:
    """ Measure a row once, in a process of its own.

    Raises:
        RuntimeError: If it failed, or the process died.
    """
    context = multiprocessing.get_context('spawn')
    receiver, sender = context.Pipe(duplex=False)
    args = sender, row, settings, torch.get_num_threads()
    child = context.Process(target=_measure_in_child, args=args, daemon=True)
    child.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        child.join()
        result = f'the process died with exit code {child.exitcode}'
    finally:
        child.kill()
        child.join()
    if isinstance(result, str):
        raise RuntimeError(result)
    return result


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """ Nobody else has the lock of a folder meanwhile, where the system and the file system can lock one."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if fcntl is not None:
            with suppress(OSError):
                # the folder itself: a file to lock would have to stay among the results
                descriptor = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


class Results:
    """ Rows of a results file, by their key; whatever is put is on disk at once.

    Several processes may put rows into one file. Rows that are taken out of `rows` are gone from the file with the next
    that is put.

    Args:
        path: CSV file, read if it is there.

    Raises:
        ValueError: If it is not a results file.
    """
    columns, key = COLUMNS, KEY

    def __init__(self, path: Path):
        self.path = path
        self.rows = self.read()
        self._known = dict(self.rows)  # what was in the file when it was last read or written

    def read(self) -> Dict[Tuple[str, ...], Dict[str, str]]:
        """ Rows that are on disk."""
        path = self.path
        if not path.exists():
            return {}
        try:
            reader = csv.DictReader(io.StringIO(path.read_text(encoding='utf-8')), strict=True)
            rows = list(reader)
        except (OSError, ValueError, csv.Error) as e:
            raise ValueError(f'{path} is not a readable results file: {e}') from e
        if tuple(reader.fieldnames or ()) != self.columns or any(None in r or None in r.values() for r in rows):
            raise ValueError(f'{path} is not a results file of this version; move it away, or name another folder')
        return {tuple(row[name] for name in self.key): row for row in rows}

    def put(self, row: Dict[str, str]) -> None:
        """ Add a row, or replace the one with its key; other processes may have put theirs meanwhile."""
        with _locked(self.path.parent):
            self.rows = {
                key: on_disk for key, on_disk in self.read().items()
                if key in self.rows or self._known.get(key) != on_disk}
            self.rows[tuple(row[name] for name in self.key)] = row
            text = io.StringIO()
            writer = csv.DictWriter(text, self.columns, lineterminator='\n')
            writer.writeheader()
            writer.writerows(self.rows.values())
            replace_file(self.path, text.getvalue().encode())
        self._known = dict(self.rows)


def _rates_to_keep(old: Optional[Dict[str, str]], settings: Settings, origin: Dict[str, str]) -> List[float]:
    """ Repeats of an earlier run, by as many threads, that count: of a whole row always, of part of one if nothing
    changed since. A row that failed is never whole."""
    if old is None or old['batches'] != str(settings.batches) or old['threads'] != origin['threads']:
        return []
    rates = [float(rate) for rate in old['rates'].split()]
    is_whole = len(rates) >= settings.repeats and not old['error']
    is_known = not origin['commit'].endswith('+changes')  # else the code may be another with each call
    is_same = is_known and all(old[name] == origin[name] for name in ('commit', *VERSIONS))
    if is_whole:
        return rates
    return rates[:settings.repeats - 1] if is_same else []


def run(rows: Sequence[Row], settings: Settings, results: Results, overwrite: bool = False) -> int:
    """ Measure rows, each repeat kept on disk as soon as it is measured.

    Rows that the results have are skipped, those they have in part or as failed are completed. A row that fails is
    recorded so, and the others go on.

    Args:
        rows: What to measure.
        settings: How to measure.
        results: Where from and to.
        overwrite: Measure all anew.

    Returns:
        Number of rows that failed.
    """
    if settings.protocol == 'paper':
        settings = replace(settings, repeats=1)
    device = torch.device(settings.device)
    origin = dict(date=datetime.date.today().isoformat(), commit=commit(), **describe_versions(device))
    rates = {}
    for row in rows:
        kept = [] if overwrite else _rates_to_keep(results.rows.get(settings.key(row)), settings, origin)
        if len(kept) < settings.repeats:
            rates[row] = kept
    subjects: Dict[Row, Subject] = {}
    failed: List[Row] = []
    images = None
    turns = [(n, row) for n in range(settings.repeats) for row in rates if len(rates[row]) <= n]
    with backend_flags(settings), tqdm(turns, desc=settings.protocol, unit='measurement', disable=None) as progress:
        for _, row in progress:
            if row in failed:
                continue
            progress.set_postfix_str(' '.join(filter(None, row)))
            details, error = {}, ''
            try:
                if settings.protocol == 'paper':
                    rate, details = measure_alone(row, settings)
                else:
                    images = make_images(settings) if images is None else images
                    subjects[row] = subjects.get(row) or Subject(row, settings, images)
                    rate, details = subjects[row].measure()
                rates[row].append(rate)
            except Exception as e:
                error = str(e) if settings.protocol == 'paper' else describe_error(e)
            if error:
                failed.append(row)
                subjects.pop(row, None)
                if device.type == 'cuda':
                    torch.cuda.empty_cache()
            kept = rates[row]
            results.put({
                **dict.fromkeys(COLUMNS, ''),
                **(results.rows.get(settings.key(row), {}) if kept else {}),
                **dict(zip(KEY, settings.key(row))),
                **details,
                'batches': str(settings.batches),
                'img_per_s': f'{statistics.median(kept):.6g}' if kept else '',
                'rates': ' '.join(f'{rate:.6g}' for rate in kept),
                'error': error,
                **origin,
            })
    return len(failed)
