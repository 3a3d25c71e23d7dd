""" The data sets that torchvision has, as the image folders that timm's scripts, `verify` and `train_zoo` read. """
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple, Union

from PIL import Image
from torchvision import datasets
from tqdm import tqdm

__all__ = ['SOURCES', 'write_image_folders']

_CIFAR = {'train': [dict(train=True)], 'validation': [dict(train=False)]}
# torchvision's class of each, and its official splits that go into each folder; of photographs it is to give the paths
SOURCES: Dict[str, Tuple[str, Dict[str, List[Dict[str, Any]]]]] = {
    'cifar10': ('CIFAR10', _CIFAR),
    'cifar100': ('CIFAR100', _CIFAR),
    'flowers102': ('Flowers102', {
        'train': [dict(split='train', loader=Path), dict(split='val', loader=Path)],
        'validation': [dict(split='test', loader=Path)]}),
    'food101': ('Food101', {
        'train': [dict(split='train', loader=Path)], 'validation': [dict(split='test', loader=Path)]}),
}
TRAIN_SIZE = 230, 230  # of photographs: the paper's pipeline shrinks them to this before it trains


def _write(image: Union[Image.Image, Path], folder: Path, index: int, is_train: bool) -> None:
    """ Write an image that a data set has in memory, or in a file."""
    if isinstance(image, Image.Image):
        image.save(folder / f'{index:05d}.png')
        return
    try:
        with Image.open(image) as photograph:
            pixels = photograph.convert('RGB')  # of those to test on as well: damaged ones are told now
    except Exception as e:  # a damaged file makes Pillow's decoders raise nearly anything
        raise OSError(f'{image} cannot be read: {" ".join(str(e).split()) or type(e).__name__}') from e
    if is_train:
        pixels.resize(TRAIN_SIZE, Image.Resampling.BILINEAR).save(folder / image.name, quality=95)
    else:
        shutil.copyfile(image, folder / image.name)


def _images(name: str, root: Path, split: str) -> Iterator[Tuple[Union[Image.Image, Path], str]]:
    """ Images of a folder's splits, those of files as their paths, and the name of the folder of each one's class."""
    class_name, splits = SOURCES[name]
    for part in splits[split]:
        dataset = getattr(datasets, class_name)(root, download=True, **part)
        for image, label in dataset:
            # labels of flowers are not in alphabetical order, by which timm numbers folders
            yield image, f'{label + 1:03d}' if name == 'flowers102' else dataset.classes[label]


def write_image_folders(name: str, root: Union[str, Path]) -> Path:
    """ Write a data set as image folders `root/name/train/CLASS` and `root/name/validation/CLASS`.

    `validation` is the official test split, `train` the rest. CIFAR's images are PNG, pixel for pixel. Photographs to
    train on are shrunk to 230 x 230 whatever their aspect, as the paper does, JPEG of quality 95; those to test on are
    copied as they are.

    Args:
        name: One of `SOURCES`.
        root: Folder in which the original files are as torchvision keeps them, or come to be: it downloads what is not
            there.

    Returns:
        The folder `root/name`.

    Raises:
        ValueError: If there is no such data set.
        FileExistsError: If `root/name` is there.
        ModuleNotFoundError: If Flowers102 is asked for without SciPy, by which torchvision reads its labels.
        RuntimeError: If the files are not those whose md5 torchvision has.
        OSError: If they cannot be downloaded, or the folders not be written.
    """
    if name not in SOURCES:
        raise ValueError(f'name must be one of {", ".join(map(repr, SOURCES))}, got {name!r}.')
    root = Path(root)
    target = root / name
    if target.is_dir():
        raise FileExistsError(f'{target} is there already: remove it to make it anew')
    for path in (root, target):
        if os.path.lexists(path) and not path.is_dir():
            raise NotADirectoryError(f'{path} is no folder, but a file or a link that leads nowhere')
    if name == 'flowers102':
        import scipy.io  # noqa: F401  # before anything is downloaded
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=f'.{name}.') as temporary:
        staged = Path(temporary) / name
        for split in SOURCES[name][1]:
            executor = ThreadPoolExecutor(os.cpu_count())
            try:
                jobs = []
                for index, (image, label) in enumerate(_images(name, root, split)):
                    folder = staged / split / label
                    folder.mkdir(parents=True, exist_ok=True)
                    jobs.append(executor.submit(_write, image, folder, index, split == 'train'))
                for job in tqdm(jobs, desc=f'{name} {split}', unit='image', disable=None):
                    job.result()
            finally:
                executor.shutdown(cancel_futures=True)  # Ctrl-C ends it at once
        staged.rename(target)
    return target
