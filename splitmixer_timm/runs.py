""" What timm's train.py is given, and what it leaves in the output folder of a run. """
import csv
import io
import os
import threading
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import yaml
from timm.utils import load_checkpoint_metadata

RECIPES_DIR = Path(__file__).resolve().parent / 'recipes'
FIRST_ARGS = 'args.first.yaml'  # the arguments of a run that was resumed, as they were when it began
MADE_ON = 'made_on.yaml'  # machine and versions of each part of a run of `train_zoo`, those that differ

# what in a run's arguments is a place on the machine it ran on
PATH_ARGS = {
    'config': '<CONFIG>', 'data': '<DATA_DIR>', 'data_dir': '<DATA_DIR>', 'output': '<OUTPUT_DIR>',
    'resume': '<RESUME>', 'initial_checkpoint': '<CHECKPOINT>', 'pretrained_path': '<CHECKPOINT>',
    'class_map': '<CLASS_MAP>',
}
HUB_SCHEMES = ('hfds', 'hfids')  # of train.py's `--dataset`: Hugging Face datasets, whole or streamed
# what may differ between the parts of a run, and between its seeds: mixed precision is as the device has it, and how
# often it is measured changes no weight
LOCAL_ARGS = {'data', 'data_dir', 'output', 'device', 'workers', 'amp', 'amp_dtype', 'val_interval'}
# modules for train.py that make it faster, and change nothing else in what it computes, but that the last draws
# augmentations of the same distribution by other random numbers
FUSED, GRAPHS, BATCHES = 'splitmixer_timm.train_fused', 'splitmixer_timm.train_graphs', 'splitmixer_timm.batch_augment'
KERNELS = {FUSED, GRAPHS}
SHARED = 'splitmixer_timm.shared_images'  # of an earlier version, by which some of the zoo were trained

loading = threading.RLock()  # what torch may unpickle is a setting of the whole process


def read_args(run_dir: Path) -> Dict[str, Any]:
    """ Arguments of a run, those of its beginning where `train_zoo` resumed it, but for where it is now.

    Raises:
        ValueError: If the folder has none that can be read.
    """
    if not (run_dir / FIRST_ARGS).is_file():
        return _read_args(run_dir / 'args.yaml')
    run_args = _read_args(run_dir / FIRST_ARGS)
    try:
        here = _read_args(run_dir / 'args.yaml')
    except ValueError:  # train.py was cut off while it wrote them anew
        return run_args
    return {**run_args, **{key: value for key, value in here.items() if key in LOCAL_ARGS}}


def read_made_on(run_dir: Path) -> List[Dict[str, Any]]:
    """ What `train_zoo` kept of each part of a run (machine, runs, torch, timm, precision); nothing where it kept
    nothing, or was cut off."""
    file = run_dir / MADE_ON
    return (yaml.safe_load(file.read_text(encoding='utf-8')) if file.is_file() else None) or []


def comparable_args(run_args: Dict[str, Any]) -> Dict[str, Any]:
    """ Arguments that are the same in all parts of a run: without where it runs, and how fast."""
    args = {key: value for key, value in run_args.items() if key not in LOCAL_ARGS}
    if args.get('device_modules'):
        faster = {*KERNELS, BATCHES, SHARED}
        args['device_modules'] = [module for module in args['device_modules'] if module not in faster]
    if args.get('opt_kwargs'):
        args['opt_kwargs'] = {key: value for key, value in args['opt_kwargs'].items() if key != 'fused'}
    return args


def _read_args(path: Path) -> Dict[str, Any]:
    run_dir = path.parent
    if not path.is_file():
        raise ValueError(f'{run_dir} is not an output folder of train.py: it has no args.yaml')
    try:
        run_args = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ValueError(f'{path} cannot be read: {" ".join(str(e).split())}') from e
    if not isinstance(run_args, dict) or not {'model', 'train_split', 'val_split'} <= run_args.keys():
        raise ValueError(f'{path} is not the arguments of a run of train.py')
    return run_args


def checkpoint_epoch(checkpoint: Path) -> Optional[int]:
    """ Epoch after which train.py wrote a checkpoint, from 0; None where it does not tell (safetensors, an average)."""
    if checkpoint.suffix == '.safetensors':
        return None
    with loading:
        return load_checkpoint_metadata(checkpoint).get('epoch')


def sorted_classes(reader: Any) -> Tuple[str, ...]:
    """ Class names of one of timm's readers of image folders, in label order."""
    return tuple(sorted(reader.class_to_idx, key=reader.class_to_idx.get))


def public_args(run_args: Dict[str, Any]) -> Dict[str, Any]:
    """ Arguments of a run with placeholders for places on the machine it ran on."""
    public = {key: PATH_ARGS[key] if key in PATH_ARGS and value else value for key, value in run_args.items()}
    if is_local_dataset(public.get('dataset')):
        public['dataset'] = f'{split_dataset(public["dataset"])[0]}/<DATA_DIR>'
    for key in ('train_split', 'val_split'):
        if is_place(public.get(key)):
            public[key] = f'<{key.upper()}>'
    for key in ('model', 'kd_model_name'):
        if str(public.get(key)).lower().startswith('local-dir:'):
            public[key] = 'local-dir:<MODEL_DIR>'
    return public


def split_dataset(dataset: Any) -> Tuple[str, str]:
    """ Scheme and name of train.py's `--dataset`, as timm reads them; a folder has no scheme."""
    scheme, slash, name = str(dataset or '').partition('/')
    scheme = scheme.lower() if slash else ''
    return scheme, name.lower() if scheme == 'torch' else name


def is_local_dataset(dataset: Any) -> bool:
    """ Whether train.py's `--dataset` names a folder of this machine by way of Hugging Face datasets."""
    scheme, place = split_dataset(dataset)
    return scheme in HUB_SCHEMES and (
        place.startswith(('/', '.', '~')) or Path(place).is_absolute() or os.path.exists(place))


def is_place(split: Any) -> bool:
    """ Whether train.py's `--train-split` or `--val-split` is a path or a URL (WebDataset's shards), not a name."""
    return any(separator in str(split) for separator in '/\\')


def read_summary(run_dir: Path) -> List[Dict[str, str]]:
    """ A row of summary.csv for each epoch that the run has finished and measured; none where it has not begun.

    A resumed run writes the header again, and an epoch that was cut off before its checkpoint was written as well. What
    follows that epoch is of an earlier part, or of a run that was in this folder before, whose log train.py appends to.
    """
    path = run_dir / 'summary.csv'
    header: List[str] = []
    rows: List[Dict[str, str]] = []
    for cells in csv.reader(path.read_text().splitlines()) if path.is_file() else []:
        if cells and cells[0] == 'epoch':  # other columns, where it was measured otherwise
            header = cells
        elif header and cells and cells[0].isdecimal():
            while rows and int(rows[-1]['epoch']) >= int(cells[0]):
                rows.pop()
            rows.append(dict(zip(header, cells)))
    return rows


def summary_content(rows: List[Dict[str, str]]) -> bytes:
    """ A summary.csv of these rows, under one header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(key for row in rows for key in row), lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def finished_epochs(rows: List[Dict[str, str]]) -> int:
    """ Epochs up to the last row of a summary; with `val_interval` there are fewer rows."""
    return int(rows[-1]['epoch']) + 1 if rows else 0
