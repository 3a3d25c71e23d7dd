""" Add the model of a finished run of timm's train.py to the zoo.

Converts the run's last checkpoint (its EMA where it kept one) to safetensors, measures it on the whole official test
set by timm's own validate.py, and writes the manifest entry; the run's arguments, its log and a picture of it are kept
beside the weights. Of several runs, alike but for the seed, the first is published and all are reported, with the
arguments and the log of each (args.SEED.yaml, summary.SEED.csv). Nothing of the zoo is touched before all of that
succeeded.

    python -m splitmixer_timm.add_run splitmixer_i_256_8.cifar10 RUN_DIR --dataset cifar10 \\
        --data-dir DATA --scripts TIMM_CHECKOUT --recipe 'four epochs, flips only'

What `train_zoo` trained can be added anywhere. A run that train.py was started for by hand is added on the machine, and
in the environment, that trained: those are what the entry names. Needs the `bench` extra.
"""
import argparse
import datetime
import hashlib
import io
import json
import math
import re
import runpy
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import timm
import torch
import yaml
from safetensors.torch import save
from timm.data import resolve_data_config
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.models import load_state_dict
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from . import manifest
from .card import DATASETS
from .cli import ended_tidily, positive
from .convmixer import ARCHITECTURES
from .files import check_folder
from .machine import device_name
from .run import environment
from .runs import (
    PATH_ARGS,
    checkpoint_epoch,
    comparable_args,
    finished_epochs,
    loading,
    public_args,
    read_args,
    read_made_on,
    read_summary,
    summary_content,
)

ELAPSED = 'elapsed.txt'  # seconds of each part of a run that was cut off and resumed, a line each
SEEN = 'seen.txt'  # seconds and date of the last checkpoint of the latest part, as `train_zoo` saw it
measuring: List[subprocess.Popen] = []  # validate.py, while it is at work
BUFFERS = ('running_mean', 'running_var', 'num_batches_tracked')


def checked_name(name: str) -> Tuple[str, str]:
    """ Architecture and tag of 'arch.tag'.

    Raises:
        ValueError: If it is not that, of a model of this package.
    """
    arch, _, tag = name.partition('.')
    if arch not in ARCHITECTURES or not re.fullmatch('[A-Za-z0-9_]+', tag):
        raise ValueError(f"name must be 'arch.tag', of a model of this package, got {name!r}")
    return arch, tag


def check_dataset(arch: str, dataset: str) -> None:
    """ Check that an architecture is registered for a data set, with its input and its classes.

    Raises:
        ValueError: If it is not.
    """
    datasets = ARCHITECTURES[arch][1]
    if dataset not in datasets:
        raise ValueError(f'dataset of {arch} must be one that it is registered for ({", ".join(datasets)}), '
                         f'got {dataset!r}')


def planned_epochs(run_args: Dict[str, Any], images: int = 0) -> int:
    """ Epochs of a run to its end, warm-up, cycles and cool-down included, as train.py has them from its scheduler.

    Args:
        run_args: Arguments of train.py.
        images: Training images, 0 if not known: timm rounds the length of a cycle to updates.
    """
    updates = math.ceil(images // (run_args.get('batch_size') or 1) / (run_args.get('grad_accum_steps') or 1))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=run_args['lr'] or 1.)
    kwargs = scheduler_kwargs(argparse.Namespace(**run_args))
    return create_scheduler_v2(optimizer, **kwargs, updates_per_epoch=updates or 1000)[1]


def latest_part(run_dir: Path) -> Tuple[float, str]:
    """ Seconds of the latest part of a run to its last checkpoint, and the date of that.

    As `train_zoo` recorded it, since the times of files are lost when a folder is copied; by those times for a run
    started by hand, or one whose driver was ended first.
    """
    started, finished = ((run_dir / name).stat().st_mtime for name in ('args.yaml', 'last.pth.tar'))
    seconds, date = max(0., finished - started), datetime.date.fromtimestamp(finished).isoformat()
    seen = (run_dir / SEEN).read_text().split() if (run_dir / SEEN).is_file() else []
    return (float(seen[0]), seen[1]) if seen and float(seen[0]) >= seconds else (seconds, date)


def training_hours(run_dir: Path) -> float:
    """ Hours from the start of the run to its last checkpoint, what was cut off and done again left out."""
    elapsed = run_dir / ELAPSED
    seconds = sum(map(float, elapsed.read_text().split())) if elapsed.is_file() else 0.
    return (seconds + latest_part(run_dir)[0]) / 3600


def timm_version(scripts: Path) -> str:
    """ Version of timm that a script in a folder finds: a checkout has its own beside its scripts."""
    own = scripts / 'timm' / 'version.py'
    return runpy.run_path(str(own))['__version__'] if own.is_file() else timm.__version__


def made_on(run_dir: Path, device: str, scripts: Path) -> Dict[str, str]:
    """ Machine and versions that a run was made on, as `train_zoo` kept them; these here where it did not.

    Raises:
        ValueError: If nothing was kept, and the run was made on a device that is not here.
    """
    parts = read_made_on(run_dir)
    if not parts:
        try:
            return dict(machine=device_name(device), torch=torch.__version__, timm=timm_version(scripts))
        except ValueError as e:
            raise ValueError(
                f'{run_dir} was trained on {device}, which is not here: add it on the machine that trained it') from e
    made = {key: ' and '.join(dict.fromkeys(part[key] for part in parts)) for key in ('machine', 'torch', 'timm')}
    runs = max(part['runs'] for part in parts)
    return {**made, 'machine': f'{made["machine"]}, shared by up to {runs} runs'} if runs > 1 else made


def read_weights(run_dir: Path) -> Dict[str, torch.Tensor]:
    """ Weights of a run's last checkpoint, of its EMA where it kept one."""
    with loading:
        return {k: v.contiguous() for k, v in load_state_dict(str(run_dir / 'last.pth.tar')).items()}


def weights_content(state_dict: Dict[str, torch.Tensor]) -> bytes:
    """ The zoo's file of these weights, the same bytes whenever it is made."""
    return save(state_dict, metadata={'format': 'pt'})


def count_images(folder: Path) -> int:
    """ Images of a split in image folders, as timm finds them; 0 where it is not there."""
    return len(find_images_and_targets(str(folder), sort=False)[0])


def check_images(folder: Path, dataset: str) -> int:
    """ Images of a split in image folders, which must be those of a data set's classes: timm numbers what it finds.

    Raises:
        ValueError: If there are fewer or more, or they are its labels in another order.
    """
    images, names = find_images_and_targets(str(folder), sort=False)
    labels = manifest.label_names(dataset)
    if len(names) != len(labels):
        raise ValueError(f'{folder} must have images in {len(labels)} class folders, those of {dataset}, has them in '
                         f'{len(names)}')
    manifest.check_class_order(tuple(names), dataset)
    return len(images)


def need_matplotlib(parser: argparse.ArgumentParser) -> None:
    """ End a program that would otherwise fail at the curves, after all else."""
    if find_spec('matplotlib') is None:
        parser.error("matplotlib draws the curves, and is not installed: pip install 'splitmixer-timm[bench]'")


def plot_curves(rows: List[Dict[str, str]], title: str) -> bytes:
    """ Picture (PNG) of a run: loss and test accuracy by epoch, as far as train.py measured them (`--val-split ''`)."""
    from matplotlib.figure import Figure

    def curve(key: str) -> Tuple[List[int], List[float]]:
        measured = [row for row in rows if row.get(key)]
        return [int(row['epoch']) + 1 for row in measured], [float(row[key]) for row in measured]

    figure = Figure(figsize=(8, 3), layout='constrained')
    loss, top1 = figure.subplots(1, 2)
    loss.plot(*curve('train_loss'), label='training')
    loss.plot(*curve('eval_loss'), label='test')
    loss.set(xlabel='epoch', ylabel='cross-entropy', yscale='log')
    loss.legend()
    epochs, values = curve('eval_top1')
    top1.plot(epochs, values, color='tab:orange')
    if values:
        top1.annotate(
            f'{values[-1]:.2f}', (epochs[-1], values[-1]), xytext=(0, -14), textcoords='offset points', ha='right')
    top1.set(xlabel='epoch', ylabel='test top-1 %')
    for axes in (loss, top1):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    png = io.BytesIO()
    figure.savefig(png, dpi=100, metadata={'Software': None})
    return png.getvalue()


def validate(
        model: str,
        weights: Path,
        data_dir: Path,
        scripts: Path,
        split: str,
        device: str,
        batch_size: int,
) -> Dict[str, Any]:
    """ Result of timm's validate.py on a split."""
    results = weights.with_suffix('.json')
    # on a GPU validate.py allows products in TF32, which is not the fp32 that the entry tells of, and timm measures the
    # next image once more in place of one that cannot be read
    env = environment(NVIDIA_TF32_OVERRIDE='0', TIMM_DATASET_MAX_RETRIES='1')
    # a worker hands its batches over in shared memory, which for 200 images of 224 x 224 a container may not have
    workers = '0' if device.startswith('cpu') else '1'
    command = [
        sys.executable, '-m', 'splitmixer_timm.run', str(scripts / 'validate.py'),
        '--model', model, '--checkpoint', str(weights), '--data-dir', str(data_dir.absolute()), '--split', split,
        '--device', device, '--batch-size', str(batch_size), '--workers', workers, '--no-prefetcher',
        '--results-file', str(results), '--results-format', 'json',
    ]
    with subprocess.Popen(command, env=env) as process:
        measuring.append(process)
        try:
            if process.wait():
                raise subprocess.CalledProcessError(process.returncode, command)
        except BaseException:
            process.kill()
            raise
        finally:
            measuring.remove(process)
    return json.loads(results.read_text())


def changed_from_registered(args: Dict[str, Any]) -> List[str]:
    """ Arguments of train.py that make of `model` another network, other classes or another input than its name stands
    for."""
    cfg = timm.get_pretrained_cfg(args['model'])
    data = resolve_data_config({}, pretrained_cfg=cfg.to_dict())
    channels, *_, width = data['input_size']
    registered = {
        **data, 'in_chans': channels, 'img_size': width, 'gp': 'avg', 'model_kwargs': None,
        'num_classes': cfg.num_classes, 'class_map': None}
    given = {key: args[key] for key in registered if args.get(key)}
    return [
        f'{key} {value}' for key, value in given.items()
        if (tuple(value) if isinstance(value, list) else value) != registered[key]]


def _checked_run(run_dir: Path, arch: str, data_dir: Path) -> Dict[str, Any]:
    """ Arguments of a run, or a ValueError if it is not a finished one of that architecture."""
    run_args = read_args(run_dir)
    images = count_images(data_dir / run_args['train_split'])
    epochs, planned = finished_epochs(read_summary(run_dir)), planned_epochs(run_args, images)
    if epochs != planned:
        raise ValueError(f'{run_dir} has {epochs} of {planned} epochs: train it to the end first')
    if not (run_dir / 'last.pth.tar').is_file():
        raise ValueError(f'{run_dir} has no last.pth.tar')
    try:
        epoch = checkpoint_epoch(run_dir / 'last.pth.tar')
    except Exception as e:  # of many kinds, by where it was cut off
        raise ValueError(f'{run_dir}/last.pth.tar cannot be read ({type(e).__name__}): resume the run from an earlier '
                         'checkpoint') from e
    if epoch != planned - 1:
        raise ValueError(f'{run_dir}/last.pth.tar is of epoch {epoch}, not of the last, {planned - 1}: resume the run')
    if arch != run_args['model'].partition('.')[0]:
        raise ValueError(f'{run_dir} trained {run_args["model"]}, not {arch}')
    if changes := changed_from_registered(run_args):
        raise ValueError(
            f'{run_dir} trained {arch} with {", ".join(changes)}: the zoo has models as they are registered')
    return run_args


def add_runs(
        name: str,
        run_dirs: List[Path],
        dataset: str,
        data_dir: Path,
        scripts: Path,
        recipe: str,
        split: str = 'validation',
        device: str = 'cpu',
        batch_size: int = 200,
) -> Dict[str, Any]:
    """ Add the first of several runs to the zoo.

    Args:
        name: 'arch.tag' to add.
        run_dirs: Output folders of train.py, alike but for the seed; the first is published.
        dataset: Data set of the tag, as in splitmixer_timm/labels.
        data_dir: Image folders of the data set.
        scripts: Folder with timm's validate.py.
        recipe: One line that says how it was trained.
        split: Folder of the official test set in `data_dir`.
        device: Device to measure on.
        batch_size: Images a batch, to measure with.

    Returns:
        The manifest entry.

    Raises:
        ValueError: If the name, the data set or a folder is not what it must be; if a run is not finished, is of
            another architecture, differs from the others in more than the seed, ended in weights that are not finite,
            or was made on what nothing tells of; if class folders are not the data set's, or in another order; or if
            the zoo's folder cannot be written to.
        subprocess.CalledProcessError: If validate.py failed.
    """
    arch, _ = checked_name(name)
    if not (scripts / 'validate.py').is_file():
        raise ValueError(f'scripts must be a folder with validate.py, {scripts} has none')
    if not count_images(data_dir / split):
        raise ValueError(f'data_dir must have image folders {split}, {data_dir} has no images there')
    all_args = [_checked_run(run_dir, arch, data_dir) for run_dir in run_dirs]
    run_dir, run_args = run_dirs[0], all_args[0]
    for other_dir, other_args in zip(run_dirs, all_args):
        one, other = comparable_args(run_args), comparable_args(other_args)
        different = sorted(
            key for key in one.keys() | other.keys()
            if key not in {'seed', 'experiment', *PATH_ARGS} and one.get(key) != other.get(key))
        if different:
            raise ValueError(f'{other_dir} must differ from {run_dir} in the seed alone, not in {", ".join(different)}')
    if len({other_args['seed'] for other_args in all_args}) < len(all_args):
        raise ValueError(f'runs must differ in the seed, got {", ".join(str(a["seed"]) for a in all_args)}')
    tested_on, train_dir = check_images(data_dir / split, dataset), data_dir / run_args['train_split']
    trained_on = check_images(train_dir, dataset) if train_dir.is_dir() else 0
    check_dataset(arch, dataset)
    # what else lies there, a part held out or a first few images, is not taken for it
    test_set = 'the official test set' if tested_on == DATASETS[dataset].test else \
        f'{tested_on:,} images, not the official test set'
    check_folder(manifest.WEIGHTS_DIR, 'weights')
    rows = read_summary(run_dir)
    made = made_on(run_dir, run_args['device'], scripts)

    results, contents = [], []
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / f'{name}.safetensors'
        for other in run_dirs:
            state_dict = read_weights(other)
            if not all(value.isfinite().all() for value in state_dict.values()):
                raise ValueError(f'{other} ended in weights that are not finite')
            weights.write_bytes(weights_content(state_dict))
            # by the data set's own tag: a new one is registered only once the manifest has it
            results.append(
                validate(f'{arch}.{dataset}', weights, data_dir, scripts, split, device, batch_size))
            contents.append(weights.read_bytes())
    content = contents[0]

    entry = {
        'file': weights.name,
        'bytes': len(content),
        'sha256': hashlib.sha256(content).hexdigest(),
        'params': sum(v.numel() for k, v in state_dict.items() if not k.endswith(BUFFERS)),
        'dataset': dataset,
        'metrics': {
            'top1': results[0]['top1'],
            'top5': results[0]['top5'],
            'images': tested_on,
            'measured_by': f"timm's validate.py on {test_set}, fp32, {device}",
        },
        'training': {
            'recipe': recipe,
            'args': f'runs/{name}/args.yaml',
            'summary': f'runs/{name}/summary.csv',
            'curves': f'runs/{name}/curves.png',
            'checkpoint': 'last, EMA' if run_args.get('model_ema') else 'last',
            'epochs': finished_epochs(rows),
            'seed': run_args['seed'],
            # of one that was resumed by hand the folder has only the last part's
            **({} if run_args.get('resume') else {'hours': round(training_hours(run_dir), 2)}),
            **made,
            'date': latest_part(run_dir)[1],
        },
        'license': 'apache-2.0',
    }
    if trained_on:
        entry['training']['images'] = trained_on
    if len(results) > 1:
        entry['metrics']['seeds'] = {str(a['seed']): r['top1'] for a, r in zip(all_args, results)}
    folder = manifest.WEIGHTS_DIR
    kept = {folder / entry['training']['curves']: plot_curves(rows, f'{name}, seed {run_args["seed"]}')}
    for other, other_args in zip(run_dirs, all_args):
        for key, file_content in (('args', yaml.safe_dump(public_args(other_args)).encode()),
                                  ('summary', summary_content(read_summary(other)))):
            file = folder / entry['training'][key]
            kept[file if other == run_dir else file.with_stem(f'{file.stem}.{other_args["seed"]}')] = file_content
    return manifest.write_entry(name, entry, {**kept, folder / entry['file']: content})


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        prog='splitmixer_timm.add_run', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('name', help="'arch.tag' to add")
    parser.add_argument(
        'run_dirs', metavar='RUN_DIR', type=Path, nargs='+',
        help='output folder of train.py (last.pth.tar, args.yaml, summary.csv); of several the first is published')
    parser.add_argument('--dataset', required=True, help='data set of the tag, as in splitmixer_timm/labels')
    parser.add_argument('--data-dir', type=Path, required=True, help='image folders of the data set')
    parser.add_argument('--split', default='validation', help='folder of the official test set (default: %(default)s)')
    parser.add_argument('--scripts', type=Path, required=True, help="folder with timm's validate.py")
    parser.add_argument('--recipe', required=True, help='one line that says how it was trained')
    parser.add_argument('--device', default='cpu', help='device to measure on (default: %(default)s)')
    parser.add_argument('--batch-size', type=positive, default=200, help='to measure with (default: %(default)s)')
    args = parser.parse_args(argv)
    need_matplotlib(parser)
    try:
        with ended_tidily():
            entry = add_runs(**vars(args))
    except ValueError as e:
        parser.error(str(e))
    except subprocess.CalledProcessError as e:
        parser.exit(1, f'{parser.prog}: validate.py failed with exit status {e.returncode}; nothing was added\n')
    except OSError as e:  # as of a package that may not be written to, or a full disk
        parser.exit(1, f'{parser.prog}: {e}\n')
    print(f'{args.name}: top-1 {entry["metrics"]["top1"]:.2f} %, {entry["bytes"]:,} bytes')


if __name__ == '__main__':
    main()
