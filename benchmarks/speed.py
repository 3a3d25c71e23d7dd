#!/usr/bin/env python3
""" What the fast forms of a model gain: plain, as created, compiled, optimized, and by other runtimes, side by side.

    python benchmarks/speed.py --help

`plain` is benchmarks/plain.py (on CUDA in bf16 too), `created` the registered model, `compiled` that by torch.compile,
`optimized` by `optimize_for_inference`, on a CPU `optimized compiled` with its compiled kernels, on CUDA `fused` by
`fuse_for_training`, `fused graphs` with its CUDA graphs; ONNX Runtime and OpenVINO (extra `export`) run the plain
model's graph. All have the same weights and images, take turns in one process, in turns of about a tenth of a second or
more, and the median counts. Each model and task has a process of its own. On a CPU the memory that torch frees is
`returned` to the system, as glibc does by itself, or `kept`, as under jemalloc: a form that needs less memory gains
more by the first. bf16 is left out on a processor without instructions for it.
"""
import argparse
import copy
import datetime
import io
import statistics
import sys
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import torch
from plain import plain_model
from timm.models import get_pretrained_cfg
from timm.optim import create_optimizer_v2
from torch import nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from splitmixer_timm import SplitMixer, benchmark, fuse_for_training, optimize_for_inference
from splitmixer_timm.benchmark import GPU_LOAD, VERSIONS, Results, Settings, build_model, make_images, seconds
from splitmixer_timm.cli import positive
from splitmixer_timm.files import check_folder
from splitmixer_timm.machine import has_bfloat16

MODELS = [f'{name}_256_8_ks7_p7' for name in (
    'splitmixer_i', 'splitmixer_ii', 'splitmixer_iii', 'splitmixer_iv', 'convmixer')]
INFERENCE = (
    'plain', 'plain bf16', 'created', 'compiled', 'optimized', 'optimized bf16', 'optimized compiled',
    'optimized compiled bf16', 'ONNX Runtime', 'OpenVINO', 'OpenVINO bf16')
TRAINING = ('plain', 'created', 'compiled', 'fused', 'fused graphs')
PACKAGES = ('onnxruntime', 'openvino')
TURN = 0.1  # seconds


@dataclass(frozen=True)
class Task:
    """ What is timed: inference or a step of training, on a batch of a size."""
    mode: str
    precision: str
    batch_size: int


class SpeedResults(Results):
    """ Results of this script."""
    key = ('model', 'mode', 'precision', 'batch_size', 'img_size', 'memory', 'device', 'threads', 'form')
    columns = (
        *(name for name in key if name not in VERSIONS), 'seconds', 'fastest', 'slowest', 'turns', 'peak_memory_mib',
        'difference', *GPU_LOAD, 'error', 'date', 'commit', *VERSIONS, *PACKAGES)


def task_settings(task: Task, device: str, img_size: int) -> Settings:
    return Settings(
        device=device, mode=task.mode, precision=task.precision, batch_size=task.batch_size, img_size=img_size)


def _session(model: nn.Module, images: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(_onnx(model, images), options, providers=['CPUExecutionProvider'])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def _onnx(model: nn.Module, images: torch.Tensor) -> bytes:
    file = io.BytesIO()
    torch.onnx.export(model, (images,), dynamo=True, verbose=False).save(file)
    return file.getvalue()


def _openvino(model: nn.Module, images: torch.Tensor, precision: str) -> Callable[[torch.Tensor], torch.Tensor]:
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'model.onnx'
        path.write_bytes(_onnx(model, images))
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(path), 'CPU', {
            'INFERENCE_PRECISION_HINT': precision, 'INFERENCE_NUM_THREADS': torch.get_num_threads(),
            'PERFORMANCE_HINT': 'LATENCY'})
    return lambda x: torch.from_numpy(compiled(x.numpy())[0])


def optimize(model: nn.Module, **kwargs: Any) -> nn.Module:
    """ `optimize_for_inference`; an error where it would only warn that it has no faster form, or compiles nothing."""
    with warnings.catch_warnings():
        warnings.filterwarnings('error', 'optimize_for_inference')
        return optimize_for_inference(model, **kwargs)


def computes_bfloat16(device: torch.device) -> bool:
    return device.type != 'cpu' or has_bfloat16()


def inference_forms(
        model: nn.Module,
        images: torch.Tensor,
) -> Iterator[Tuple[str, Callable[[], Callable[[torch.Tensor], torch.Tensor]]]]:
    """ Name and maker of every form that this model, device and environment have."""
    plain = plain_model(model)
    yield 'plain', lambda: plain
    if images.is_cuda:
        half = copy.deepcopy(plain).bfloat16()
        yield 'plain bf16', lambda: lambda x: half(x.bfloat16())
    if isinstance(model, SplitMixer):
        yield 'created', lambda: model
    yield 'compiled', lambda: torch.compile(model, dynamic=False)
    if isinstance(model, SplitMixer):
        yield 'optimized', lambda: optimize(model)
        if computes_bfloat16(images.device):
            yield 'optimized bf16', lambda: optimize(model, dtype=torch.bfloat16)
        if images.device.type == 'cpu':  # on CUDA it has kernels in any case
            yield 'optimized compiled', lambda: optimize(model, compile=True)
            if computes_bfloat16(images.device):
                yield 'optimized compiled bf16', lambda: optimize(model, compile=True, dtype=torch.bfloat16)
    if images.device.type == 'cpu' and find_spec('onnxscript'):
        if find_spec('onnxruntime'):
            yield 'ONNX Runtime', lambda: _session(plain, images)
        if find_spec('openvino'):
            yield 'OpenVINO', lambda: _openvino(plain, images, 'f32')
            if computes_bfloat16(images.device):  # elsewhere this would be fp32 as well
                yield 'OpenVINO bf16', lambda: _openvino(plain, images, 'bf16')


def training_forms(model: nn.Module) -> Iterator[Tuple[str, Callable[[], nn.Module]]]:
    plain = plain_model(model)
    yield 'plain', lambda: plain
    if isinstance(model, SplitMixer):
        yield 'created', lambda: model
    yield 'compiled', lambda: torch.compile(model, dynamic=False)
    if isinstance(model, SplitMixer) and next(model.parameters()).is_cuda:
        yield 'fused', lambda: fuse_for_training(copy.deepcopy(model))
        yield 'fused graphs', lambda: fuse_for_training(copy.deepcopy(model), cuda_graphs=True)


def peak_memory(work: Callable[[], Any], device: torch.device) -> int:
    """ Greatest number of bytes that torch holds during work beyond what it held before."""
    if device.type == 'cuda':
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    held = most = 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == '[memory]':
            held += event.nbytes()
            most = max(most, held)
    return most


def several(step: Callable[[], Any], calls: int) -> None:
    for _ in range(calls):
        step()


def measure(name: str, task: Task, memory: str, device: str, turns: int, threads: int) -> List[Dict[str, str]]:
    """ A row for each form of a model."""
    if torch.device(device).type == 'cpu':
        torch.set_num_threads(threads)
    if memory == 'kept' and not benchmark.keep_memory():
        return [dict(form='plain', error='the allocator of this system cannot be told to keep memory')]
    img_size = get_pretrained_cfg(name).input_size[-1]
    settings = task_settings(task, device, img_size)
    training = task.mode == 'train'
    with benchmark.backend_flags(settings), torch.set_grad_enabled(training):
        torch.manual_seed(0)
        model = build_model((name, ''), img_size).to(device).train(training)
        images = make_images(settings)
        work, rows = {}, []
        expected = None
        for form, make in training_forms(model) if training else inference_forms(model, images):
            row = dict(form=form)
            rows.append(row)
            try:
                run = make()
                if training:
                    optimizer = create_optimizer_v2(run, opt='sgd', lr=1e-4)
                    step = partial(benchmark.train_step, run, optimizer, images, settings)
                else:
                    step = partial(run, images)
                    logits = step().float()
                    expected = logits if expected is None else expected
                    row['difference'] = f'{((logits - expected).abs().max() / expected.abs().max()).item():.2g}'
                first_steps = partial(several, step, 3)
                if form == 'fused graphs':  # take their memory when they are captured, in the second
                    row['peak_memory_mib'] = f'{peak_memory(first_steps, images.device) / 2**20:.1f}'
                    if not run.blocks.has_graphs:
                        raise RuntimeError('no CUDA graphs were captured')
                else:
                    first_steps()
                if form not in ('ONNX Runtime', 'OpenVINO', 'OpenVINO bf16', 'fused graphs'):
                    # what a CUDA graph needs was taken at its capture: the same kernels without one show it
                    once = partial(run._forward, images) if hasattr(run, '_forward') else step
                    row['peak_memory_mib'] = f'{peak_memory(once, images.device) / 2**20:.1f}'
                calls = max(1, round(TURN / seconds(step, images.device)))
                work[form] = partial(several, step, calls), calls, []
            except Exception as e:
                row['error'] = benchmark.describe_error(e)
        with benchmark.gpu_load(images.device) as load:
            for _ in range(turns):
                for turn, calls, samples in work.values():
                    samples.append(seconds(turn, images.device) / calls)
    for row in rows:
        if row['form'] in work:
            times = work[row['form']][2]
            row.update(
                seconds=f'{statistics.median(times):.6g}', fastest=f'{min(times):.6g}', slowest=f'{max(times):.6g}',
                turns=str(turns), **load)
    return rows


def package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ''


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=MODELS, metavar='MODEL', help='default: I to IV and ConvMixer')
    parser.add_argument('--tasks', nargs='+', choices=('infer', 'train'), default=['infer', 'train'])
    parser.add_argument('--device', help='cuda, cuda:N, mps or cpu (default: the first of these that is there)')
    parser.add_argument(
        '--threads', type=positive, default=torch.get_num_threads(), help='on a CPU (default: %(default)s)')
    parser.add_argument(
        '--memory', nargs='+', choices=('returned', 'kept'), default=['returned'], help='on a CPU (default: returned)')
    parser.add_argument('--batch-size', type=positive, default=8, metavar='N', help='beside 1 (default: %(default)s)')
    parser.add_argument('--turns', type=positive, default=15, metavar='N', help='default: %(default)s')
    parser.add_argument('--results', type=Path, default=benchmark.RESULTS_DIR, metavar='DIR')
    args = parser.parse_args(argv)
    try:
        device = benchmark.check_device(args.device or benchmark.default_device())
        if 'table3' in args.models:  # rows of it differ in arguments, which these results have no column for
            raise ValueError("'table3' is for throughput and roofline; models are measured here without arguments")
        models = [name for name, _ in benchmark.check_models(args.models)]
        check_folder(args.results, 'results')
        results = SpeedResults(args.results / f'{benchmark.results_name(str(device))}.speed.csv')
    except ValueError as e:
        parser.error(str(e))
    for package in () if device.type == 'cuda' else ('onnxscript', *PACKAGES):
        if find_spec(package) is None:
            print(f"{package} is not installed, its rows are left out: pip install 'splitmixer-timm[export]'",
                  file=sys.stderr)
    if not computes_bfloat16(device):
        print('This processor has no instructions for bf16, its rows are left out.', file=sys.stderr)

    tasks = []
    if 'infer' in args.tasks:
        tasks += [Task('infer', 'fp32', size) for size in dict.fromkeys((args.batch_size, 1))]
    if 'train' in args.tasks:
        precisions = ('fp32', 'bf16') if computes_bfloat16(device) else ('fp32',)
        tasks += [Task('train', precision, args.batch_size) for precision in precisions]
    common = dict(
        device=benchmark.device_name(str(device)), date=datetime.date.today().isoformat(), commit=benchmark.commit(),
        **benchmark.describe_versions(device), **{package: package_version(package) for package in PACKAGES})
    if device.type == 'cpu':
        common['threads'] = str(args.threads)
    failures = 0
    memories = dict.fromkeys(args.memory) if device.type == 'cpu' else ['']
    turns = [(name, task, memory) for memory in memories for name in models for task in tasks]
    for name, task, memory in tqdm(turns, unit='task', disable=None):
        # one process each: what the memory allocator makes of it is not what another task left behind
        with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool:
            try:
                rows = pool.submit(measure, name, task, memory, str(device), args.turns, args.threads).result()
            except Exception as e:  # an error of the GPU's takes the whole process with it
                rows = [dict(form='plain', error=benchmark.describe_error(e))]
        setting = dict(
            common, model=name, mode=task.mode, precision=task.precision, batch_size=str(task.batch_size),
            img_size=str(get_pretrained_cfg(name).input_size[-1]), memory=memory)
        if any(row['form'] == 'plain' and 'error' not in row for row in rows):
            # what an earlier run measured of forms that are gone: rows are compared with the plain one of their own run
            key = tuple(setting[column] for column in results.key[:-1])
            results.rows = {old: row for old, row in results.rows.items() if old[:-1] != key}
        for row in rows:
            failures += 'error' in row
            results.put({**dict.fromkeys(results.columns, ''), **setting, **row})
            print(name, *vars(task).values(), row['form'], row.get('error') or f'{float(row["seconds"]) * 1e3:.2f} ms')
    print(results.path)
    return 1 if failures else 0


if __name__ == '__main__':
    sys.exit(main())
