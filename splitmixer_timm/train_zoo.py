""" Train the zoo: a queue of runs of timm's train.py, every finished model added to `weights/` by `add_run`.

    python -m splitmixer_timm.train_zoo --scripts TIMM_CHECKOUT --data-dir DATA --output RUNS --device cuda --jobs 4

Without names it trains all of the queue file (`weights/queue.yaml`), which says for each 'arch.tag' the recipe, what
differs from it (`args`) and the seeds, the first of which is published. `DATA/cifar10` and so on hold `train/CLASS` and
`validation/CLASS`. The same command again resumes what was cut off and trains nothing twice. Mixed precision is fp16 on
a GPU, bf16 on a CPU that has it, none on others, but where the queue says otherwise. Needs the `bench` extra.

On a GPU, `--fused` trains SplitMixers by the kernels of `fuse_for_training`, and all by torch's fused AdamW;
`--cuda-graphs` launches the kernels as CUDA graphs. Where augmentation on the CPU holds runs up, `--batch-augment` has
it done a batch at a time.

`--held-out CSV` compares settings instead: it trains on four fifths of the training images of each class, writes what
the runs measure on the rest to a file, and adds nothing to the zoo.
"""
import argparse
import csv
import datetime
import hashlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import monotonic, sleep, time
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, TextIO, Tuple

import torch
import yaml
from tqdm import tqdm

from . import manifest, splitmixer
from .add_run import (
    ELAPSED,
    SEEN,
    add_runs,
    changed_from_registered,
    check_dataset,
    check_images,
    checked_name,
    count_images,
    latest_part,
    measuring,
    need_matplotlib,
    planned_epochs,
    read_weights,
    timm_version,
    weights_content,
)
from .cli import ended_tidily, positive
from .files import check_folder, replace_file
from .held_out import SPLITS, HeldOutResults, describe, hold_out
from .image_folders import SOURCES
from .machine import device_name, has_bfloat16
from .run import environment
from .runs import (
    BATCHES,
    FIRST_ARGS,
    FUSED,
    GRAPHS,
    KERNELS,
    MADE_ON,
    RECIPES_DIR,
    checkpoint_epoch,
    comparable_args,
    finished_epochs,
    read_args,
    read_made_on,
    read_summary,
)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

KEYS = {'recipe', 'args', 'seeds'}
# arguments of train.py that this sets itself
OWN_ARGS = {
    'config', 'model', 'model_kwargs', 'dataset', 'dataset_download', 'data', 'data_dir', 'output', 'experiment',
    'resume', 'seed', 'device', 'workers'}
POLL_SECONDS = 2.
REPORT_SECONDS = 60.  # where there is no terminal for a progress bar
# else glibc returns large tensors to the system and fetches them anew, page by page, at each step on a CPU
KEEP_MEMORY = {'MALLOC_MMAP_MAX_': '0', 'MALLOC_TRIM_THRESHOLD_': str(sys.maxsize)}
RECIPES_PRECISION = 'amp_dtype float16'  # where nothing is said of it
LOCK_SECONDS = 10.  # data loaders outlive a train.py that was killed by up to this long


@dataclass(frozen=True)
class Run:
    """ One seed of one model: its output folder, and the arguments of train.py that make it."""
    name: str
    folder: Path
    config: Dict[str, Any]

    def done(self) -> int:
        """ Epochs that are finished, 0 where nothing tells of them."""
        try:
            return finished_epochs(read_summary(self.folder))
        except (OSError, ValueError, csv.Error):  # damaged: who goes on with the run will say so
            return 0

    def is_finished(self, epochs: int) -> bool:
        """ Whether the last checkpoint is that of the last epoch: train.py logs an epoch before it saves it."""
        try:
            return self.done() >= epochs and checkpoint_epoch(self.folder / 'last.pth.tar') == epochs - 1
        except Exception:  # a file that is missing or damaged: train.py will say so
            return False


@dataclass(frozen=True)
class Model:
    """ A model to train: 'arch.tag', its data set, one line on how, and a run for each seed."""
    name: str
    dataset: str
    recipe: str
    runs: List[Run]


def read_queue(
        path: Path,
        patterns: List[str],
        output: Path,
        script: Path,
        modules: Sequence[str] = (),
        **train_args,
) -> List[Model]:
    """ Models of a queue file that fit one of the patterns, all of them where there is none.

    Args:
        path: Queue file.
        patterns: Names or patterns of names.
        output: Folder of the runs.
        script: timm's train.py.
        modules: Modules for train.py to import beside the recipe's, `KERNELS` for SplitMixers only.
        **train_args: Arguments of train.py for all runs.

    Raises:
        ValueError: If the file is not a queue, or no model fits.
    """
    try:
        queue = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (OSError, yaml.YAMLError) as e:
        raise ValueError(f'queue {path} cannot be read: {e}') from e
    if not isinstance(queue, dict):
        raise ValueError(f"queue {path} must map each 'arch.tag' to a recipe")
    queue = {str(name): item for name, item in queue.items()}
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in queue):
            raise ValueError(f'{pattern!r} is not in the queue {path}; it has {", ".join(queue)}')
    # train.py takes what it does not know from a configuration in silence; of an argument's names the first long one is
    # its key, or the one it says
    names = re.findall(
        r"""(?:add_argument\(\s*(?:['"]-\w+['"],\s*)?['"]--|dest=['"])([\w-]+)""", script.read_text(encoding='utf-8'))
    options = {name.replace('-', '_') for name in names}
    return [
        _read_model(path, name, item, output, modules, train_args, options) for name, item in queue.items()
        if not patterns or any(fnmatch(name, pattern) for pattern in patterns)
    ]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read_model(
        path: Path,
        name: str,
        item: Any,
        output: Path,
        modules: Sequence[str],
        train_args: Dict[str, Any],
        options: Set[str],
) -> Model:
    if not isinstance(item, dict) or not {'recipe'} <= item.keys() <= KEYS:
        raise ValueError(f'{name} in {path} must have a recipe, may have args and seeds, and nothing else')
    arch, tag = checked_name(name)
    recipe = RECIPES_DIR / f'{item["recipe"]}.yaml'
    if not recipe.is_file():
        raise ValueError(f"recipe of {name} in {path} must be one of splitmixer_timm/recipes, got {item['recipe']!r}")
    base, args = yaml.safe_load(recipe.read_text(encoding='utf-8')), item.get('args', {})
    dataset = base['model'].partition('.')[2]
    if tag != dataset and not tag.startswith(f'{dataset}_'):
        raise ValueError(
            f'recipe of {name} in {path} must be for its data set: {item["recipe"]} is for the tag {dataset}, and '
            f'those that begin with {dataset}_')
    check_dataset(arch, dataset)
    seeds = item.get('seeds', [base['seed']])
    if not isinstance(args, dict):
        raise ValueError(f'args of {name} in {path} must map arguments of train.py to values, got {args!r}')
    if own := sorted(OWN_ARGS & args.keys()):
        raise ValueError(f'args of {name} in {path} must not have {", ".join(own)}, which the queue itself sets')
    if unknown := sorted(map(str, args.keys() - base.keys() - options)):
        raise ValueError(f'args of {name} in {path} must be arguments of train.py, got {", ".join(unknown)}')
    for key, value in args.items():
        if isinstance(value, str) and _is_number(value):
            raise ValueError(
                f'{key} of {name} in {path} must be a number, got the text {value!r}: YAML wants a point in it, as in '
                '1.0e-3')
    for key, kind, what in (('device_modules', list, 'a list'), ('opt_kwargs', dict, 'a mapping')):
        if not isinstance(args.get(key, kind()), kind):
            raise ValueError(f'{key} of {name} in {path} must be {what}, got {args[key]!r}')
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds) or \
            len(set(seeds)) != len(seeds):
        raise ValueError(f'seeds of {name} in {path} must be a list of different integers, got {seeds!r}')
    if 'amp_dtype' in args:
        args = {'amp': True, **args}  # asked for, whatever the device's own would be
    own_modules = [module for module in modules if module not in KERNELS or arch in splitmixer.VARIANTS]
    runs = []
    for seed in seeds:
        config = {
            **base, 'model': f'{arch}.{dataset}', 'dataset': '', 'dataset_download': False, 'seed': seed, **train_args,
            'data_dir': str(train_args['data_dir'] / dataset), 'output': str(output), 'experiment': f'{name}-{seed}',
            **args,
        }
        if changes := changed_from_registered(config):
            raise ValueError(f'{name} in {path} must be as it is registered, its args make it {", ".join(changes)}')
        config['device_modules'] = list(dict.fromkeys(
            [*base['device_modules'], *config['device_modules'], *own_modules]))  # the models stay registered
        if KERNELS & {*modules} and config.get('opt') in ('adam', 'adamw'):
            config['opt_kwargs'] = {**(config.get('opt_kwargs') or {}), 'fused': True}
        runs.append(Run(name, output / f'{name}-{seed}', config))
    # where a warm-up comes first, train.py's `epochs` are those after it
    said = {key: value for key, value in args.items() if key not in ('amp', 'amp_dtype', 'val_interval')}
    if 'epochs' in said and {**base, **args}.get('warmup_prefix'):
        said['epochs'] = f'{said["epochs"]} after {said.pop("warmup_epochs", base["warmup_epochs"])} of warm-up'
    recipe = [item['recipe'], *(f'{key} {value}' for key, value in said.items())]
    return Model(name, dataset, '; '.join(recipe), runs)


def mixed_precision(device: str) -> Dict[str, Any]:
    """ Arguments of train.py for the mixed precision that is fast on a device, where it is not train.py's own, fp16."""
    if not device.startswith('cpu'):
        return {}
    return {'amp_dtype': 'bfloat16'} if has_bfloat16() else {'amp': False}


def precision(run_args: Dict[str, Any]) -> str:
    """ What a run computes in, and by what, of its arguments of train.py."""
    modules = run_args.get('device_modules') or []
    is_fused = KERNELS & {*modules} and str(run_args.get('device') or 'cuda').startswith('cuda')
    return '; '.join([
        f'amp_dtype {run_args.get("amp_dtype", "float16")}' if run_args.get('amp') else 'amp False',
        *(['fused kernels'] if is_fused else []),
        *(['images augmented in batches'] if BATCHES in modules else []),
    ])


def trained_in(folder: Path) -> List[str]:
    """ What each part of a run was computed in, in the terms of `precision`."""
    # a run begun by hand, or by a version that kept less, tells of its last part alone
    return [part.get('precision') or precision(read_args(folder)) for part in read_made_on(folder) or [{}]]


def recipe_line(model: Model, runs: List[Run]) -> str:
    """ How some runs of a model were trained: its recipe, and what the runs' folders tell beside it."""
    seeds: Dict[str, List[str]] = {}
    for run in runs:
        seeds.setdefault(', then '.join(dict.fromkeys(trained_in(run.folder))), []).append(str(run.config['seed']))
    precisions = [*seeds] if len(seeds) == 1 else [
        f'{"seed" if len(of) == 1 else "seeds"} {" and ".join(of)}: {parts}' for parts, of in seeds.items()]
    # of the first run, as it was last; the queue's may have changed since
    interval = read_args(runs[0].folder).get('val_interval', 1)
    return '; '.join([
        model.recipe, *([f'val_interval {interval}'] if interval != 1 else []),
        *([', '.join(precisions)] if precisions != [RECIPES_PRECISION] else [])])


def last_checkpoint(folder: Path) -> Optional[Path]:
    """ The latest checkpoint of a run, as its last.pth.tar; None if it has none at all.

    train.py removes the old last.pth.tar before it renames the new one: cut off between the two, or in the middle of
    writing, another file has the latest that can be read. Cut off in the middle of the very first, nothing
    is lost by beginning anew.

    Raises:
        RuntimeError: If there are checkpoints, and none can be read.
    """
    last = folder / 'last.pth.tar'
    files = [last, folder / 'tmp.pth.tar', *sorted(folder.glob('checkpoint-*.pth.tar'))]
    readable = {}
    for file in filter(Path.is_file, files):
        try:
            readable[file] = int(checkpoint_epoch(file))
        except Exception:  # of many kinds, by where it was cut off
            continue
    if not readable:
        if any(file.is_file() for file in files if file.name != 'tmp.pth.tar'):
            raise RuntimeError(f'no checkpoint can be read: remove {folder} to begin it anew')
        return None
    latest = max(readable, key=readable.get)
    if readable.get(last) != readable[latest]:
        if last.is_file():
            os.replace(last, folder / 'damaged.pth.tar')
        copy = folder / 'copy.pth.tar'
        shutil.copy2(latest, copy)  # with its time
        os.replace(copy, last)
    return last


def lock(folder: Path) -> Optional[TextIO]:
    """ An open file that locks a run's folder, for its train.py to hold: whoever else trains there holds it too.

    Raises:
        RuntimeError: If a run that an earlier driver left behind, or another driver's, is under way there.
    """
    if fcntl is None:
        return None
    file = open(folder / 'lock', 'w')
    for _ in range(int(LOCK_SECONDS / 0.1)):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            sleep(0.1)
    file.close()
    raise RuntimeError(f'another train.py is at work in {folder}')


def check_args(run: Run) -> None:
    """ Check that what a run's folder holds was trained with this run's arguments.

    Raises:
        ValueError: If it was not.
    """
    trained, config = comparable_args(read_args(run.folder)), comparable_args(run.config)
    file = run.folder / 'config.yaml'  # of the last start: where the queue has fewer arguments now, it tells of them
    asked = comparable_args((yaml.safe_load(file.read_text(encoding='utf-8')) or {}) if file.is_file() else {})
    changes = [
        f'{key} {trained[key]!r}, not {config[key]!r}' for key in config
        if key in trained and trained[key] != config[key]
    ] + [
        f"{key} {trained.get(key, asked[key])!r}, not train.py's default" for key in asked
        if key != 'resume' and key not in config
    ]
    if changes:
        raise ValueError(
            f'{run.folder} was trained with {", ".join(sorted(changes))}: give another --output, or remove it')


def note_machine(folder: Path, **part: Any) -> None:
    """ Keep in a run's folder what this part is made on (machine, runs, torch, timm, precision), for `add_run`."""
    parts = read_made_on(folder)
    if part not in parts:
        replace_file(folder / MADE_ON, yaml.safe_dump([*parts, part]).encode())


def note_seconds(folder: Path, began: float) -> None:
    """ Keep in a run's folder how long this part of it took to its last checkpoint, for `add_run`.

    Args:
        folder: Folder of the run.
        began: When this part began, in seconds since the epoch.
    """
    with suppress(OSError):  # no checkpoint yet, or train.py is replacing it; no space, which it will tell of
        saved = (folder / 'last.pth.tar').stat().st_mtime
        line = f'{saved - began:.0f} {datetime.date.fromtimestamp(saved).isoformat()}\n'
        file = folder / SEEN
        if saved > began and not (file.is_file() and file.read_text() == line):
            replace_file(file, line.encode())


def start(run: Run, scripts: Path, machine: str, runs: int) -> subprocess.Popen:
    """ Begin a run, or go on after its last checkpoint; what it prints is kept in its folder.

    Args:
        run: What to train.
        scripts: Folder with timm's train.py.
        machine: What it is trained on, as its model's entry will name it.
        runs: How many share the machine at most, this one included.

    Raises:
        RuntimeError: If the folder is in use, or its checkpoints cannot be read.
        ValueError: If the run began with other arguments.
    """
    config = run.config
    run.folder.mkdir(parents=True, exist_ok=True)
    held = lock(run.folder)
    try:
        checkpoint = last_checkpoint(run.folder)
        if checkpoint:
            check_args(run)
            if not (run.folder / MADE_ON).is_file():  # begun by hand, or by a version that kept nothing
                note_machine(
                    run.folder, machine='an unknown machine', runs=1, torch='unknown', timm='unknown',
                    precision=precision(read_args(run.folder)))
            # train.py writes args.yaml anew, and with it the time that this part began; cut off before, it adds none
            args = run.folder / 'args.yaml'
            if not (run.folder / FIRST_ARGS).is_file():
                replace_file(run.folder / FIRST_ARGS, args.read_bytes())
            finished, seconds = checkpoint.stat().st_mtime, latest_part(run.folder)[0]
            (run.folder / SEEN).unlink(missing_ok=True)
            with open(run.folder / ELAPSED, 'a', encoding='utf-8') as f:
                f.write(f'{seconds:.0f}\n')
            os.utime(args, (finished, finished))  # at once: until then the part would count again
            # with the same seed train.py would draw the same images and augmentations as in its first epochs
            epochs = checkpoint_epoch(checkpoint) + 1
            config = {**config, 'resume': str(checkpoint), 'seed': config['seed'] + 1000 * epochs}
        else:
            for name in ('summary.csv', FIRST_ARGS, ELAPSED, SEEN, MADE_ON):
                (run.folder / name).unlink(missing_ok=True)
        note_machine(
            run.folder, machine=machine, runs=runs, torch=str(torch.__version__), timm=timm_version(scripts),
            precision=precision(config))
        replace_file(run.folder / 'config.yaml', yaml.safe_dump(config).encode())
        with open(run.folder / 'train.log', 'ab') as log:
            allocator = KEEP_MEMORY if config['device'].startswith('cpu') else {}
            return subprocess.Popen(
                [sys.executable, str((scripts / 'train.py').absolute()), '--config', str(run.folder / 'config.yaml')],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env={**allocator, **environment()},
                pass_fds=[held.fileno()] if held else ())
    finally:
        if held:
            held.close()  # it is train.py's now


def is_added(model: Model) -> bool:
    """ Whether the zoo has these very weights already, measured over these seeds."""
    entry = manifest.entries().get(model.name)
    if entry is None or set(entry['metrics'].get('seeds', [str(entry['training']['seed'])])) != {
            str(run.config['seed']) for run in model.runs}:
        return False
    content = weights_content(read_weights(model.runs[0].folder))
    file = manifest.WEIGHTS_DIR / entry['file']
    return entry['sha256'] == hashlib.sha256(content).hexdigest() and file.is_file() and file.read_bytes() == content


def add(model: Model, scripts: Path, data_dir: Path, device: str) -> Optional[Dict[str, Any]]:
    """ Add a model whose runs are finished; its entry, None if the zoo has it already."""
    for run in model.runs:
        check_args(run)
    if is_added(model):
        return None
    return add_runs(
        model.name, [run.folder for run in model.runs], model.dataset, data_dir / model.dataset, scripts,
        recipe_line(model, model.runs), device=device)


def add_and_tell(model: Model, scripts: Path, data_dir: Path, device: str) -> Optional[str]:
    """ Add a model; what it measured, None if the zoo has it already."""
    entry = add(model, scripts, data_dir, device)
    return f'top-1 {entry["metrics"]["top1"]:.2f} %' if entry else None


def compare(results: HeldOutResults, model: Model, scripts: Path, data_dir: Path, device: str) -> str:
    """ Put what a model's finished runs measured on images held out into the results, and tell it."""
    rows = []
    for run in model.runs:
        check_args(run)
        rows.append(describe(run.folder, recipe_line(model, [run]), data_dir / model.dataset, scripts))
        results.put(rows[-1])
    return f'top-1 {", ".join(row["top1"] for row in rows)} % of the images held out'


def train(
        models: List[Model],
        scripts: Path,
        data_dir: Path,
        device: str,
        machine: str,
        jobs: int,
        finish: Callable[[Model, Path, Path, str], Optional[str]] = add_and_tell,
) -> List[str]:
    """ Train the models, `jobs` runs at once, and add each to the zoo when its last run is finished.

    Models are measured one at a time while others train. What fails is told at once, and the others go on.

    Args:
        models: What to train.
        scripts: Folder with timm's scripts.
        data_dir: Folder with a folder for each data set.
        device: Device to train on.
        machine: What that is, as entries will name it.
        jobs: Runs at once.
        finish: What is done with a model whose runs are finished; it returns what there is to tell of it.

    Returns:
        What went wrong, a line for each run or model that failed.
    """
    runs = [run for model in models for run in model.runs]
    trained_on = {run.folder: Path(run.config['data_dir'], run.config.get('train_split', 'train')) for run in runs}
    images = {folder: count_images(folder) for folder in set(trained_on.values())}
    planned = {run.folder: planned_epochs(run.config, images[trained_on[run.folder]]) for run in runs}
    waiting = [run for run in runs if not run.is_finished(planned[run.folder])]
    running: Dict[Path, Tuple[Run, subprocess.Popen, float]] = {}
    models, failures = list(models), []
    adding: Dict[str, Future] = {}
    executor = ThreadPoolExecutor(1)
    at_once = min(jobs, len(waiting))
    progress = tqdm(total=sum(planned.values()), unit='epoch', disable=None)
    reported = monotonic()

    def tell(line: str, file: TextIO = sys.stdout) -> None:
        with suppress(OSError):  # a reader that went away is no reason to end the runs
            tqdm.write(line, file=file)
            file.flush()  # whoever ends this process hard has what it told

    def fail(failure: str) -> None:
        failures.append(failure)
        tell(f'splitmixer_timm.train_zoo: {failure}', sys.stderr)

    try:
        while models or adding:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                if run.is_finished(planned[run.folder]):  # by somebody else since
                    continue
                try:
                    began = time()
                    running[run.folder] = run, start(run, scripts, machine, at_once), began
                except (OSError, RuntimeError, ValueError, yaml.YAMLError) as e:
                    fail(f'{run.folder.name}: not started: {e}')
            for folder, (run, process, began) in list(running.items()):
                is_over = process.poll() is not None
                note_seconds(folder, began)
                if is_over:
                    del running[folder]
                    if process.returncode:
                        fail(f'{folder.name}: train.py failed, see {folder / "train.log"}')
                    elif not run.is_finished(planned[folder]):
                        fail(f'{folder.name}: train.py stopped early, see {folder / "train.log"}')
            progress.n = sum(run.done() for run in runs)
            progress.refresh()
            if progress.disable and monotonic() - reported >= REPORT_SECONDS:
                reported = monotonic()
                tell(f'{progress.n} of {progress.total} epochs, {len(running)} runs at work')
            busy = {*running, *(run.folder for run in waiting)}
            ended = [model for model in models if not any(run.folder in busy for run in model.runs)]
            for model in ended:
                models.remove(model)
                if all(run.is_finished(planned[run.folder]) for run in model.runs):
                    adding[model.name] = executor.submit(finish, model, scripts, data_dir, device)
                elif not any(failure.startswith(f'{run.folder.name}: ') for failure in failures for run in model.runs):
                    fail(f'{model.name}: not added: its runs are not finished')
            for name in [name for name, future in adding.items() if future.done()]:
                try:
                    measured = adding.pop(name).result()
                    if measured:
                        tell(f'{name}: {measured}')
                except Exception as e:  # the others go on, whatever a run has amiss
                    fail(f'{name}: not added: {type(e).__name__}: {e}')
            if models or adding:
                sleep(POLL_SECONDS)
    finally:
        progress.close()
        executor.shutdown(wait=False, cancel_futures=True)
        while not all(future.done() for future in adding.values()):  # where this was told to end
            for process in list(measuring):
                process.terminate()
            sleep(0.05)
        for _, process, _ in running.values():
            process.terminate()
        for _, process, _ in running.values():
            process.wait()
    return failures


def main(argv: Optional[List[str]] = None) -> int:
    """ Run the queue.

    Returns:
        0 if every model was trained and added, else 1.
    """
    parser = argparse.ArgumentParser(
        prog='splitmixer_timm.train_zoo', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', metavar='NAME', nargs='*', help="'arch.tag' or a pattern ('*.cifar10') of the queue")
    parser.add_argument('--queue', type=Path, default=manifest.WEIGHTS_DIR / 'queue.yaml', help='another queue file')
    parser.add_argument('--scripts', type=Path, required=True, help="folder with timm's train.py and validate.py")
    parser.add_argument('--data-dir', type=Path, required=True, help='folder with a folder for each data set')
    parser.add_argument('--output', type=Path, required=True, help='folder for the runs')
    parser.add_argument(
        '--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='default here: %(default)s')
    parser.add_argument('--jobs', type=positive, default=1, help='runs at once (default: %(default)s)')
    parser.add_argument(
        '--workers', type=int, metavar='N',
        help='data loaders a run (default: 4, on a CPU none, for those that start later hold a copy of its memory)')
    parser.add_argument(
        '--fused', action='store_true',
        help='train SplitMixers by the kernels of fuse_for_training, where there is CUDA, and all by fused AdamW')
    parser.add_argument('--cuda-graphs', action='store_true', help='with --fused, launch the kernels as CUDA graphs')
    parser.add_argument(
        '--batch-augment', action='store_true',
        help='augment images of one size a batch at a time, and keep them decoded (150 MB a run on CIFAR, where its '
        'data loaders are forked)')
    parser.add_argument(
        '--held-out', type=Path, metavar='CSV',
        help='hold out a fifth of the training images, and write what is measured on them to this file: to compare '
        'settings, adding nothing to the zoo')
    args = parser.parse_args(argv)
    need_matplotlib(parser)
    if args.workers is None:
        args.workers = 0 if args.device.startswith('cpu') else 4
    if args.workers < 0:
        parser.error(f'--workers must be at least 0, got {args.workers}')
    for script in ('train.py', 'validate.py'):
        if not (args.scripts / script).is_file():
            parser.error(f'--scripts must be a folder with train.py and validate.py, {args.scripts} has no {script}')
    if args.fused and args.device.startswith('cuda') and find_spec('triton') is None:
        parser.error('--fused needs Triton, which this torch comes without')
    if args.cuda_graphs and not args.fused:
        parser.error('--cuda-graphs needs --fused')
    fused = [GRAPHS if args.cuda_graphs else FUSED] if args.fused else []
    modules = [*fused, *([BATCHES] if args.batch_augment else [])]
    data_dir, splits, finish = args.data_dir.resolve(), {}, add_and_tell
    try:
        if args.held_out is not None:
            data_dir, splits = args.output.resolve() / 'held_out', SPLITS
            finish = partial(compare, HeldOutResults(args.held_out))
        else:
            check_folder(manifest.WEIGHTS_DIR, 'weights')
        models = read_queue(
            args.queue, args.names, args.output.resolve(), args.scripts / 'train.py', modules,
            data_dir=data_dir, device=args.device, workers=args.workers,
            **mixed_precision(args.device), **splits)
        machine = device_name(args.device)
    except ValueError as e:
        parser.error(str(e))
    for dataset in {model.dataset for model in models}:
        for split in ('train', 'validation'):
            if not (args.data_dir / dataset / split).is_dir():
                parser.error(f'--data-dir must have image folders {dataset}/{split}, {args.data_dir} has not' + (
                    f': `splitmixer-timm data {dataset} --to DIR` makes them' if dataset in SOURCES else ''))
            try:
                check_images(args.data_dir / dataset / split, dataset)
            except ValueError as e:
                parser.error(f'--data-dir: {e}')
    with ended_tidily():
        if args.held_out is not None:
            try:
                for dataset in {model.dataset for model in models}:
                    hold_out(args.data_dir / dataset / 'train', data_dir / dataset)
            except (OSError, ValueError) as e:
                parser.error(f'--held-out: {e}')
        failures = train(models, args.scripts, data_dir, args.device, machine, args.jobs, finish)
    return 1 if failures else 0


if __name__ == '__main__':
    sys.exit(main())
