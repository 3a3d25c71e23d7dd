""" Settings of a recipe compared on training images that are held out, so that no test image has a say in them. """
import csv
import io
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Dict

from .add_run import count_images, latest_part, made_on
from .manifest import replace_file
from .runs import finished_epochs, read_args, read_summary

__all__ = ['HELD_OUT', 'SPLITS', 'hold_out', 'write_row']

HELD_OUT = 5  # of so many images of a class in order of their names, the last is held out
# names of their own, by which train.py's arguments tell such a run from one of the whole training set
SPLITS = {'train_split': 'rest', 'val_split': 'held_out'}


def hold_out(train_dir: Path, target: Path) -> None:
    """ Make image folders `target/rest/CLASS` and `target/held_out/CLASS` of the training images of a data set.

    The images are linked, or copied where the file system has no links. What is there already stays.

    Args:
        train_dir: Folder with a folder of images for each class.
        target: Folder to make.

    Raises:
        OSError: If the folders cannot be written.
    """
    if target.is_dir():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f'.{target.name}.') as temporary:
        staged = Path(temporary) / target.name
        for label in sorted(path for path in train_dir.iterdir() if path.is_dir()):
            for number, image in enumerate(sorted(label.iterdir()), 1):
                folder = staged / SPLITS['train_split' if number % HELD_OUT else 'val_split'] / label.name
                folder.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(image.resolve(), folder / image.name)
                except OSError:
                    shutil.copyfile(image, folder / image.name)
        staged.rename(target)


def write_row(path: Path, run_dir: Path, recipe: str, data_dir: Path, scripts: Path) -> Dict[str, Any]:
    """ Write what a finished run measured on the images held out to a CSV file, in place of its earlier row.

    Args:
        path: CSV file, begun where there is none.
        run_dir: Output folder of train.py.
        recipe: The recipe, and what differs from it.
        data_dir: Image folders of `hold_out`.
        scripts: Folder of timm's scripts, which may have their own timm.

    Returns:
        The row: the last epoch's top-1 (%), of the EMA where the run kept one, as train.py measured it.

    Raises:
        OSError: If the file cannot be read or written.
    """
    run_args, rows = read_args(run_dir), read_summary(run_dir)
    row = {
        'model': run_args['model'],
        'recipe': recipe,
        'seed': run_args['seed'],
        'epochs': finished_epochs(rows),
        'top1': f'{float(rows[-1]["eval_top1"]):.2f}',
        'trained_on': count_images(data_dir / run_args['train_split']),
        'images': count_images(data_dir / run_args['val_split']),
        **made_on(run_dir, run_args['device'], scripts),
        'date': latest_part(run_dir)[1],
    }
    key = ('model', 'recipe', 'seed', 'epochs')
    before = [*csv.DictReader(path.read_text(encoding='utf-8').splitlines())] if path.is_file() else []
    others = [old for old in before if any(old[name] != str(row[name]) for name in key)]
    content = io.StringIO()
    writer = csv.DictWriter(content, list(row), lineterminator='\n')
    writer.writeheader()
    writer.writerows([*others, row])
    replace_file(path, content.getvalue().encode())
    return row
