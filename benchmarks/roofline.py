#!/usr/bin/env python3
""" Where the time of a forward goes, and how far it is from what the device allows.

    python benchmarks/roofline.py --help

Every operation of a forward in eval mode must read its inputs and weights and write its output once, and a convolution
or matrix product must multiply and add. Two ceilings are measured on the same device: the bytes a second of a large
copy and the operations a second of a large matrix product. The limit of an operation is the longer of the times that
its bytes and its operations take at these. The limit of a forward is the sum of its operations' limits; were all but
convolutions and matrix products fused into these, the sum of theirs. `--forms plain created optimized` records before
and after: the network of benchmarks/plain.py, the registered model, and that by `optimize_for_inference`. The last is
on CUDA a kernel for each spatial and each channel mixing, which must read and write the features once; on a CPU that is
so for spatial mixing in the form `optimized compiled`, by `compile=True`. Operations are those that run: in half
precision on CUDA a registered model's 1D kernels are square, and their zeros are counted.
"""
import argparse
import datetime
import functools
import statistics
import sys
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple
from unittest import mock

import torch
from plain import plain_model
from speed import optimize
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

from splitmixer_timm import SplitMixer, benchmark, fused, fused_cpu, splitmixer
from splitmixer_timm.benchmark import GPU_LOAD, SETTING, VERSIONS, Results, Row, Settings, Subject, make_images, seconds
from splitmixer_timm.cli import positive
from splitmixer_timm.files import check_folder

KINDS = {
    'activation': ('gelu', 'gelu_', 'relu', 'relu_', 'silu', 'silu_', 'hardswish', 'hardswish_', 'hardtanh'),
    'norm': ('native_batch_norm', 'cudnn_batch_norm', 'miopen_batch_norm', 'native_layer_norm', 'addcmul', 'addcmul_'),
    'sum': ('add', 'add_'),
    'copy': ('cat', 'stack', 'clone', 'copy_', '_to_copy'),
}
# torch 2.11 has no formula for the attention of CPUs; it is the same work as the GPUs'
FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        flop_registry[torch.ops.aten._scaled_dot_product_flash_attention],
    **flop_registry,
}
if hasattr(torch.ops.mkldnn, '_linear_pointwise'):
    FORMULAS[torch.ops.mkldnn._linear_pointwise] = FORMULAS[torch.ops.mkldnn._convolution_pointwise] = \
        lambda x, weight, *args, out_val, **kwargs: 2 * out_val.numel() * weight.shape[1:].numel()
# what gets memory, or looks at it otherwise, and moves nothing
ALLOCATIONS = {
    getattr(torch.ops.aten, name) for name in ('empty', 'empty_like', 'empty_strided', 'new_empty', 'as_strided_')}
FORMS = {
    'plain': plain_model,
    'created': lambda model: model,
    'optimized': optimize,
    'optimized compiled': functools.partial(optimize, compile=True),  # on a CPU
}
FORWARD, FUSED = 'forward', 'forward, fused'


class RooflineResults(Results):
    """ Results of this script."""
    key = ('model', 'arguments', 'form', *SETTING, 'kind')
    columns = (
        *key, 'calls', 'bytes', 'operations', 'seconds', 'limit_seconds', 'copy_bytes_per_s', 'operations_per_s',
        *GPU_LOAD, 'error', 'date', 'commit', *VERSIONS)


@dataclass
class Operation:
    """ One call: its kind, the bytes it must move, the operations it must do, the seconds it took."""
    kind: str
    bytes: int
    operations: int
    seconds: float

    def limit(self, copy_rate: float, operation_rate: float) -> float:
        return max(self.bytes / copy_rate, self.operations / operation_rate)


def kind_of(func: Any, args: Any) -> str:
    """ Kind of layer that an operation stands for."""
    name = func.overloadpacket.__name__
    if name in ('convolution', '_convolution_pointwise'):
        weight, groups = args[1], args[8 if name == 'convolution' else 6]
        return 'pointwise' if weight.shape[2:].numel() == 1 else 'depthwise' if groups > 1 else 'convolution'
    if func.overloadpacket in FORMULAS:
        return 'product'
    return next((kind for kind, names in KINDS.items() if name in names), 'other')


class Timer:
    """ Times calls of a device, one after the other."""

    def __init__(self, device: torch.device):
        self.device = device
        self.operations: List[Operation] = []
        self.events: List[Any] = []

    def call(self, work: Callable[[], Any]) -> Tuple[Any, float, Any]:
        """ What a call returns, the seconds it took or, where they are not known yet, the events around it."""
        if self.device.type == 'cuda':
            # read when all is done: to wait for each would time the launches
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            out = work()
            events[1].record()
            return out, 0., events
        out = None

        def keep() -> None:
            nonlocal out
            out = work()

        elapsed = seconds(keep, self.device)
        return out, elapsed, None

    def add(self, operation: Operation, events: Any) -> None:
        self.operations.append(operation)
        self.events.append(events)

    def finish(self) -> List[Operation]:
        """ The operations, once the device is done with them."""
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)
            for operation, (start, end) in zip(self.operations, self.events):
                operation.seconds = start.elapsed_time(end) / 1000
        return self.operations


class Recorder(TorchDispatchMode):
    """ Records every operation under it that makes or changes data; views are free."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.timer = Timer(device)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out, elapsed, events = self.timer.call(lambda: func(*args, **kwargs))
        inputs = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}.values()
        outputs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        storages = {t.untyped_storage().data_ptr() for t in inputs if not t.is_mkldnn}  # which cannot tell
        is_view = not func._schema.is_mutable and all(t.untyped_storage().data_ptr() in storages for t in outputs)
        moved = 0 if is_view else sum(t.nbytes for t in (*inputs, *outputs))
        if func.overloadpacket is torch.ops.aten.copy_:
            moved -= args[0].nbytes  # written, not read
        elif func.overloadpacket in ALLOCATIONS:
            moved = 0
        if moved:
            count = FORMULAS.get(func.overloadpacket)
            operations = count(*args, **kwargs, out_val=out) if count else 0
            self.timer.add(Operation(kind_of(func, args), moved, operations, elapsed), events)
        return out


def _keep_busy(device: torch.device) -> None:
    """ While the GPU is kept busy the operations queue up: between the events there is no launch then."""
    if device.type == 'cuda':
        torch.cuda._sleep(500_000_000)


@contextmanager
def cpu_kernels_recorded(model: nn.Module, timer: Timer) -> Iterator[None]:
    """ The kernels of a model's compiled form for a CPU, which are no operations of torch's, are recorded as well."""
    def recorded(name: str, kind: str) -> Any:
        make = getattr(fused_cpu, name)

        def make_recorded(dtype: torch.dtype, *parts: Any) -> Callable[[torch.Tensor], torch.Tensor]:
            kernel, tensors = make(dtype, *parts), [part for part in parts if isinstance(part, torch.Tensor)]
            multiplied = sum(tensor.numel() for tensor in tensors if tensor.ndim == 2)  # weights (k, C)

            def run(x: torch.Tensor) -> torch.Tensor:
                y, elapsed, events = timer.call(functools.partial(kernel, x))
                moved = sum(tensor.nbytes for tensor in (x, y, *tensors))
                timer.add(Operation(kind, moved, 2 * multiplied * x[..., 0].numel(), elapsed), events)
                return y

            return run

        return mock.patch.object(fused_cpu, name, make_recorded)

    with (
            recorded('spatial_mixing_kernel', 'spatial mixing'),
            recorded('act_affine_kernel', 'norm'),
            recorded('act_affine_mean_kernel', 'pooling'),
    ):
        model._prepared = None  # made with kernels that are not recorded
        model._functions()
        yield
    model._prepared = None


def record(step: Any, device: torch.device, compiled: Optional[nn.Module] = None) -> List[Operation]:
    """ The operations of a step, of a model in its compiled form for a CPU if given."""
    recorder = Recorder(device)
    kernels = nullcontext() if compiled is None else cpu_kernels_recorded(compiled, recorder.timer)
    # not inference mode, under which a composite operation comes as one
    with torch.no_grad(), kernels:
        _keep_busy(device)
        # what really runs: to those who record it, the fused form shows its operations with plain weights
        with mock.patch.object(fused_cpu, '_is_recorded', return_value=False), recorder:
            step()
    return recorder.timer.finish()


def record_kernels(model: SplitMixer, kernels: nn.Module, images: torch.Tensor) -> List[Operation]:
    """ The kernels of a model's fused form for CUDA, each with the operations of what it stands for in the model."""
    work = [('patches', 2 * model.stem[0].weight.numel())]
    for block in model.blocks:
        if not isinstance(block.spatial_mixing, nn.Identity):
            weights = [block.spatial_mixing.conv1.weight, block.spatial_mixing.conv2.weight]
            work.append(('spatial mixing', 2 * sum(weight.numel() for weight in weights)))
        if not isinstance(block.channel_mixing, nn.Identity):
            products = [product for stage in fused.segments(block.channel_mixing.mixer) for product in stage]
            work.append(('channel mixing', 2 * sum(product.weight.numel() for product in products)))
    timer, x = Timer(images.device), images
    with torch.no_grad():
        _keep_busy(images.device)
        for (kind, operations), kernel in zip(work, [kernels.stem, *chain.from_iterable(kernels.blocks)]):
            y, elapsed, events = timer.call(functools.partial(kernel, x))
            moved = x.nbytes + y.nbytes + sum(buffer.nbytes for buffer in kernel.buffers())
            timer.add(Operation(kind, moved, operations * y[..., 0].numel(), elapsed), events)
            x = y
        x = x.permute(0, 3, 1, 2)
        y, elapsed, events = timer.call(functools.partial(kernels.forward_head, x))
        weights = list(kernels.head.parameters())
        moved = x.nbytes + y.nbytes + sum(weight.nbytes for weight in weights)
        multiplied = sum(weight.numel() for weight in weights if weight.ndim == 2)  # not the biases
        timer.add(Operation('head', moved, 2 * len(x) * multiplied, elapsed), events)
    return timer.finish()


def measure_ceilings(device: torch.device, dtype: Optional[torch.dtype], repeats: int = 10) -> Dict[str, float]:
    """ Bytes a second of a large copy, operations a second of a large matrix product, each the best of some repeats."""
    is_cpu = device.type == 'cpu'
    # random: of equal numbers a GPU multiplies more a second, as they take less of its power
    source = torch.randn(2**26 if is_cpu else 2**28, device=device)
    target = torch.empty_like(source)
    size = 2048 if is_cpu else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    copy = min(seconds(lambda: target.copy_(source), device) for _ in range(repeats + 1))
    product = min(seconds(lambda: a @ b, device) for _ in range(repeats + 1))
    return dict(copy=2 * source.nbytes / copy, operations=2 * size**3 / product)


def measure(
        row: Row,
        settings: Settings,
        images: torch.Tensor,
        ceilings: Dict[str, float],
        passes: int,
        form: str = 'created',
) -> List[Dict[str, str]]:
    """ Results of a model: a row for the forward as it runs, for its fused limit, and for each kind of operation."""
    subject = Subject(row, settings, images)
    model = subject.step.func
    made = FORMS[form](model)
    subject.step = functools.partial(made, images)
    subject.warm_up()
    is_graph = images.device.type == 'cuda' and isinstance(made, fused.FusedModel)
    times = []
    with torch.inference_mode():
        for _ in range(passes):
            if is_graph:  # the Python before its one launch can take as long as the graph
                _keep_busy(images.device)
            times.append(seconds(subject.step, images.device))
    forward = statistics.median(times)
    if is_graph:
        recorded = [record_kernels(model, made, images) for _ in range(passes)]
    else:
        compiled = made if isinstance(made, fused_cpu.CompiledSplitMixer) else None
        recorded = [record(subject.step, images.device, compiled) for _ in range(passes)]
    rates = ceilings['copy'], ceilings['operations']

    def line(kind: str, operations: List[Operation], took: Optional[float]) -> Dict[str, str]:
        return dict(
            kind=kind, calls=str(len(operations)), bytes=str(sum(o.bytes for o in operations)),
            operations=str(sum(o.operations for o in operations)), seconds='' if took is None else f'{took:.6g}',
            limit_seconds=f'{sum(o.limit(*rates) for o in operations):.6g}')

    kinds: Dict[str, List[int]] = defaultdict(list)
    for i, operation in enumerate(recorded[0]):
        kinds[operation.kind].append(i)
    lines = [line(FORWARD, recorded[0], forward)]
    lines.append(line(FUSED, [o for o in recorded[0] if o.operations], None))
    for kind, indices in kinds.items():
        took = statistics.median(sum(operations[i].seconds for i in indices) for operations in recorded)
        lines.append(line(kind, [recorded[0][i] for i in indices], took))
    return lines


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=['table3'], help="default: table3, the paper's Table 3")
    parser.add_argument(
        '--forms', nargs='+', choices=FORMS, default=['created'], help='of SplitMixers (default: created)')
    parser.add_argument('--device', help='cuda, cuda:N, mps or cpu (default: the first of these that is there)')
    parser.add_argument('--precision', choices=('fp32', 'tf32', 'fp16', 'bf16'), default='fp32')
    parser.add_argument('--memory-format', choices=('contiguous', 'channels_last'), default='contiguous')
    parser.add_argument('--batch-size', type=positive, default=64)
    parser.add_argument('--img-size', type=positive, default=224)
    parser.add_argument(
        '--passes', type=positive, help='forwards recorded, the median counts (default: 10, on a CPU 2)')
    parser.add_argument('--results', type=Path, default=benchmark.RESULTS_DIR, metavar='DIR')
    args = parser.parse_args(argv)
    try:
        device = benchmark.check_device(args.device or benchmark.default_device())
        settings = Settings(
            device=str(device), precision=args.precision, memory_format=args.memory_format, batch_size=args.batch_size,
            img_size=args.img_size, batches=1)
        benchmark.check_settings(settings)
        if 'optimized' in args.forms and device.type not in ('cpu', 'cuda'):
            raise ValueError(f'form optimized is there on a CPU and on CUDA, not on {device}')
        if 'optimized compiled' in args.forms and device.type != 'cpu':
            raise ValueError(f'form optimized compiled is there on a CPU, not on {device}')
        rows = benchmark.check_models(args.models)
        turns = [(row, form) for row in rows for form in dict.fromkeys(args.forms)
                 if form == 'created' or row[0].partition('.')[0] in splitmixer.VARIANTS]
        if not turns:
            raise ValueError(f'forms {", ".join(args.forms)} are of SplitMixers, got models {", ".join(args.models)}')
        check_folder(args.results, 'results')
        results = RooflineResults(args.results / f'{benchmark.results_name(str(device))}.roofline.csv')
    except ValueError as e:
        parser.error(str(e))

    common = dict(
        **settings.columns(), device=benchmark.device_name(str(device)), date=datetime.date.today().isoformat(),
        commit=benchmark.commit(), **benchmark.describe_versions(device))
    failures = 0
    with benchmark.backend_flags(settings):
        images = make_images(settings)
        ceilings = measure_ceilings(device, images.dtype)
        common.update(
            copy_bytes_per_s=f'{ceilings["copy"]:.6g}', operations_per_s=f'{ceilings["operations"]:.6g}')
        passes = args.passes or (2 if device.type == 'cpu' else 10)
        for row, form in tqdm(turns, unit='model', disable=None):
            try:
                with benchmark.gpu_load(device) as load:
                    lines = measure(row, settings, images, ceilings, passes, form)
            except Exception as e:
                load, lines = {}, [dict(kind=FORWARD, error=benchmark.describe_error(e))]
                failures += 1
                print(f'{" ".join(row)}: {lines[0]["error"]}', file=sys.stderr)
            setting = (*row, form, *(common[name] for name in SETTING))
            results.rows = {key: old for key, old in results.rows.items() if key[:-1] != setting}
            for line in lines:
                results.put({
                    **dict.fromkeys(results.columns, ''), **common,
                    **dict(model=row[0], arguments=row[1], form=form), **load, **line})
    print(results.path)
    return 1 if failures else 0


if __name__ == '__main__':
    sys.exit(main())
