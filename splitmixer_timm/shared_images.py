""" Training images that runs of timm's train.py at the same time augment once for all of them.

Where several models train on one GPU, augmentation on the CPU can hold them up. Import this by train.py's
`--device-modules splitmixer_timm splitmixer_timm.shared_images` (and what else a recipe names there), with
`SPLITMIXER_SHARED_IMAGES` naming a folder in memory (`/dev/shm/NAME`): an image is augmented anew in each epoch by the
run that comes to it first, and the others take what that one made. The order of the images is each run's own, as its
random numbers have it. Without the variable nothing changes.

Epochs that all runs have passed are removed: it takes the pixels of an epoch (150 MB of CIFAR) for each epoch that the
runs are apart. What is left at the end is for whoever names the folder to remove. Repeats of an image in an epoch
(`--aug-repeats`) would be the same, and `--use-multi-epochs-loader` begins an epoch before it is told.
"""
import hashlib
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import torch
from timm.data import ImageDataset, dataset_factory

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ['FOLDER', 'SharedImageDataset']

FOLDER = 'SPLITMIXER_SHARED_IMAGES'
_LEFT = 2**30  # bytes of the folder's file system that are left free, or half of it
_HEADER = 9  # whether the image is there, and its target

_logger = logging.getLogger(__name__)


def _describe(transform: Any) -> str:
    """ All that images depend on: what timm's transforms show of themselves leaves out the colour of empty corners."""
    ops = [op for part in getattr(transform, 'transforms', []) for op in getattr(part, 'ops', [])]
    return f'{transform} {[getattr(op, "kwargs", None) for op in ops]}'


class SharedImageDataset(ImageDataset):
    """ Image data set that shares what its transforms make, from the first call of `set_epoch` on.

    An epoch is a file of a record for each image, which is filled in under a lock on that record alone.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        classes = getattr(self.reader, 'class_to_idx', None)
        self._made_of = repr((args, sorted(kwargs.items()), len(self), classes))
        self._epoch = torch.full((), -1).share_memory_()  # data loaders read it
        self._shape: Optional[Tuple[int, ...]] = None
        self._folder: Optional[Path] = None
        self._open: Tuple[int, int] = (-1, -1)  # epoch and its file
        self._is_full = False

    def __getstate__(self) -> Dict[str, Any]:
        return {**self.__dict__, '_open': (-1, -1)}  # a file is of one process

    def set_epoch(self, epoch: int) -> None:
        """ Begin an epoch, and remove those that this run and all others have passed."""
        self._epoch.fill_(epoch)
        if self._folder is None:
            name = hashlib.sha256(f'{self._made_of} {_describe(self.transform)}'.encode()).hexdigest()[:16]
            self._folder = Path(os.environ[FOLDER], name)
            self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / f'run{os.getpid()}').write_text(str(epoch))
        at_work = [epoch]
        for marker in self._folder.glob('run*'):
            if Path('/proc').is_dir() and not Path('/proc', marker.name[3:]).is_dir():
                marker.unlink(missing_ok=True)  # a run that is over
            else:
                with suppress(OSError, ValueError):  # one that is being written counts the next time
                    at_work.append(int(marker.read_text()))
        for file in self._folder.iterdir():
            if file.name.isdecimal() and int(file.name) < min(at_work):
                file.unlink(missing_ok=True)

    def _augment(self, index: int) -> Tuple[torch.Tensor, int]:
        image, target = super().__getitem__(index)
        if not isinstance(image, torch.Tensor) or image.dtype != torch.uint8:
            raise RuntimeError(f'{FOLDER} shares the uint8 tensors that timm makes with its prefetcher alone')
        return image, target

    def _file(self, epoch: int, size: int) -> int:
        opened, file = self._open
        if opened != epoch:
            if file >= 0:
                os.close(file)
            file = os.open(self._folder / str(epoch), os.O_RDWR | os.O_CREAT, 0o600)
            os.ftruncate(file, size)
            self._open = epoch, file
        return file

    def _store(self, file: int, place: int, body: bytes) -> None:
        """ Write a record, its flag last: who reads that finds the rest. Without space it stays unwritten.

        A folder in memory is also where data loaders hand over their batches, and they wait for ever where there is no
        space for one: a part of it is left to them.
        """
        try:
            space = os.fstatvfs(file)
            is_written = (
                space.f_bavail > min(space.f_blocks // 2, _LEFT // space.f_frsize)
                and os.pwrite(file, body, place + 1) == len(body) and os.pwrite(file, b'\1', place) == 1)
        except OSError:
            is_written = False
        if not is_written and not self._is_full:
            self._is_full = True
            _logger.warning(f'No space for shared images in {os.environ[FOLDER]}: each run augments its own.')

    def __getitem__(self, index: int) -> Tuple[Any, Any]:
        epoch = int(self._epoch)
        if epoch < 0:
            return super().__getitem__(index)
        if self._shape is None:
            self._shape = tuple(self._augment(index)[0].shape)
        size = _HEADER + torch.Size(self._shape).numel()
        place = index * size
        file = self._file(epoch, len(self) * size)
        record = os.pread(file, size, place)
        if not record[0]:
            fcntl.lockf(file, fcntl.LOCK_EX, 1, place)
            try:
                record = os.pread(file, size, place)
                if not record[0]:
                    image, target = self._augment(index)
                    body = target.to_bytes(_HEADER - 1, 'little', signed=True) + image.numpy().tobytes()
                    self._store(file, place, body)
                    return image, target
            finally:
                fcntl.lockf(file, fcntl.LOCK_UN, 1, place)
        image = torch.frombuffer(bytearray(record), dtype=torch.uint8, offset=_HEADER).view(self._shape)
        return image, int.from_bytes(record[1:_HEADER], 'little', signed=True)


if os.environ.get(FOLDER):
    if fcntl is None:
        raise RuntimeError(f'{FOLDER} needs a system with file locks')
    dataset_factory.ImageDataset = SharedImageDataset
