""" Training images that runs of timm's train.py at the same time augment once for all of them.

Where several models train on one GPU, augmentation on the CPU holds them up. Import this by train.py's
`--device-modules splitmixer_timm splitmixer_timm.shared_images`, with `SPLITMIXER_SHARED_IMAGES` naming a folder in
memory (`/dev/shm/NAME`): an image is augmented anew in each epoch by the run that comes to it first, and the others
take what that one made. Each run has its own order of the images. Without the variable nothing changes.

It takes the pixels of each image for each epoch: 15 GB for 100 epochs of CIFAR. Whoever names the folder removes it.
"""
import fcntl
import hashlib
import os
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import torch
from timm.data import ImageDataset, dataset_factory

__all__ = ['FOLDER', 'SharedImageDataset']

FOLDER = 'SPLITMIXER_SHARED_IMAGES'
_HEADER = 9  # whether the image is there, and its target


class SharedImageDataset(ImageDataset):
    """ Image data set that shares what its transforms make, from the first call of `set_epoch` on.

    An epoch is a file of a record for each image, which is filled in under a lock on that record alone.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._made_of = repr((args, sorted(kwargs.items())))
        self._epoch = torch.full((), -1).share_memory_()  # data loaders read it
        self._shape: Optional[Tuple[int, ...]] = None
        self._open: Tuple[int, int] = (-1, -1)  # epoch and its file

    def __getstate__(self) -> Dict[str, Any]:
        return {**self.__dict__, '_open': (-1, -1)}  # a file is of one process

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

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
            name = hashlib.sha256(f'{self._made_of} {self.transform} {self._shape}'.encode()).hexdigest()[:16]
            folder = Path(os.environ[FOLDER], name)
            folder.mkdir(parents=True, exist_ok=True)
            file = os.open(folder / str(epoch), os.O_RDWR | os.O_CREAT, 0o600)
            os.ftruncate(file, size)
            self._open = epoch, file
        return file

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
                    record = b'\1' + target.to_bytes(_HEADER - 1, 'little', signed=True) + image.numpy().tobytes()
                    os.pwrite(file, record[1:], place + 1)
                    os.pwrite(file, record[:1], place)  # last: who reads it finds the rest
            finally:
                fcntl.lockf(file, fcntl.LOCK_UN, 1, place)
        image = torch.frombuffer(bytearray(record), dtype=torch.uint8, offset=_HEADER).view(self._shape)
        return image, int.from_bytes(record[1:_HEADER], 'little', signed=True)


if os.environ.get(FOLDER):
    dataset_factory.ImageDataset = SharedImageDataset
