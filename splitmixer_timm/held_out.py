""" Settings of a recipe compared on training images that are held out, so that no test image has a say in them. """
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Dict

from timm.data.readers.reader_image_folder import find_images_and_targets

from .add_run import count_images, latest_part, made_on
from .benchmark import Results
from .runs import finished_epochs, read_args, read_summary

__all__ = ['HELD_OUT', 'SPLITS', 'HeldOutResults', 'describe', 'hold_out']

HELD_OUT = 5  # of so many images of a class, in timm's order, the last is held out
# names of their own, by which train.py's arguments tell such a run from one of the whole training set
SPLITS = {'train_split': 'rest', 'val_split': 'held_out'}


class HeldOutResults(Results):
    """ A row for each run that was measured on images held out."""
    columns = (
        'model', 'recipe', 'seed', 'epochs', 'top1', 'trained_on', 'images', 'machine', 'torch', 'timm', 'date')
    key = ('model', 'recipe', 'seed', 'epochs')


def hold_out(train_dir: Path, target: Path) -> None:
    """ Make image folders `target/rest` and `target/held_out` of the training images of a data set.

    Each image keeps its name and its place among the folders. Images are linked, or copied where the file system has no
    links. What is there already stays.

    Args:
        train_dir: Folder with a folder of images for each class.
        target: Folder to make.

    Raises:
        ValueError: If a class has too few images to hold one out: timm would number those held out without it.
        OSError: If the folders cannot be written.
    """
    if target.is_dir():
        return
    images, classes = find_images_and_targets(str(train_dir))
    found = Counter(index for _, index in images)
    if few := [name for name, index in classes.items() if found[index] < HELD_OUT]:
        raise ValueError(f'{train_dir} must have at least {HELD_OUT} images of each class, has fewer of '
                         f'{", ".join(few[:8])}' + (f', ... ({len(few)} in all)' if len(few) > 8 else ''))
    target.parent.mkdir(parents=True, exist_ok=True)
    seen = Counter()
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f'.{target.name}.') as temporary:
        staged = Path(temporary) / target.name
        for file, index in images:
            seen[index] += 1
            split = SPLITS['train_split' if seen[index] % HELD_OUT else 'val_split']
            image = staged / split / Path(file).relative_to(train_dir)
            image.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(Path(file).resolve(), image)
            except OSError:
                shutil.copyfile(file, image)
        try:
            staged.rename(target)
        except OSError:
            if not target.is_dir():  # by another driver meanwhile
                raise


def describe(run_dir: Path, recipe: str, data_dir: Path, scripts: Path) -> Dict[str, str]:
    """ The row of a finished run: the last epoch's top-1 (%) as train.py measured it, which is that of the EMA where it
    kept one (but not of one kept on the CPU by `model_ema_force_cpu`).

    Args:
        run_dir: Output folder of train.py.
        recipe: The recipe, and what differs from it.
        data_dir: Image folders of `hold_out`.
        scripts: Folder of timm's scripts, which may have their own timm.
    """
    run_args, rows = read_args(run_dir), read_summary(run_dir)
    return {
        'model': run_args['model'],
        'recipe': recipe,
        'seed': str(run_args['seed']),
        'epochs': str(finished_epochs(rows)),
        'top1': f'{float(rows[-1]["eval_top1"]):.2f}',
        'trained_on': str(count_images(data_dir / run_args['train_split'])),
        'images': str(count_images(data_dir / run_args['val_split'])),
        **made_on(run_dir, run_args['device'], scripts),
        'date': latest_part(run_dir)[1],
    }
