""" `splitmixer_timm.shared_images`: runs at the same time augment each image once an epoch. """
import importlib
import multiprocessing
import os
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from timm.data import create_dataset, create_loader, dataset_factory
from timm.data.auto_augment import rand_augment_transform
from torchvision.transforms import Compose

from splitmixer_timm.randaugment import torchvision_rand_augment

COUNT = 24

pytest.importorskip('fcntl', reason='needs file locks')


@pytest.fixture
def module(tmp_path, monkeypatch):
    """ As train.py imports it; timm's own class is back afterwards."""
    (tmp_path / 'shared').mkdir()
    monkeypatch.setenv('SPLITMIXER_SHARED_IMAGES', str(tmp_path / 'shared'))
    monkeypatch.setattr(dataset_factory, 'ImageDataset', dataset_factory.ImageDataset)
    monkeypatch.delitem(sys.modules, 'splitmixer_timm.shared_images', raising=False)
    yield importlib.import_module('splitmixer_timm.shared_images')
    del sys.modules['splitmixer_timm.shared_images']


@pytest.fixture
def root(tmp_path):
    """ Two classes; the first pixel tells which image it is."""
    for n in range(COUNT):
        folder = tmp_path / 'data' / 'train' / f'class{n % 2}'
        folder.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8), (10 * n, 0, 0)).save(folder / f'{n:02}.png')
    return tmp_path / 'data'


class Noise:
    """ An augmentation that never makes the same image twice, and leaves the first pixel as it is."""

    def __call__(self, image):
        time.sleep(0.02)  # else no two runs come to an image at once
        # not by torch's generator, which is in one state in all runs that begin as copies of this process
        noise = torch.frombuffer(bytearray(os.urandom(3 * 8 * 8)), dtype=torch.uint8).view(3, 8, 8)
        noise[0, 0, 0] = image.getpixel((0, 0))[0]
        return noise

    def __repr__(self):
        return 'Noise()'


def _dataset(root):
    dataset = create_dataset('', root=str(root), split='train', is_training=True)
    dataset.transform = Noise()
    return dataset


def _collect(dataset, queue, epochs):
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=4, shuffle=True, num_workers=2, persistent_workers=True, multiprocessing_context='fork')
    for epoch in range(epochs):
        dataset.set_epoch(epoch)
        images, targets = (torch.cat(parts) for parts in zip(*loader))
        order = images[:, 0, 0, 0].argsort()
        queue.put((epoch, images[order].numpy(), targets[order].numpy()))


def test_runs_share(module, root):
    """ Whichever of three runs at once comes first, all have the same images of an epoch, of each epoch others."""
    context = multiprocessing.get_context('fork')
    queue = context.Queue()
    runs = [context.Process(target=_collect, args=(_dataset(root), queue, 2)) for _ in range(3)]
    for run in runs:
        run.start()
    seen = [queue.get(timeout=60) for _ in range(6)]
    for run in runs:
        run.join()
    of_epoch = {}
    for epoch, images, targets in seen:
        assert images[:, 0, 0, 0].tolist() == [10 * n for n in range(COUNT)]
        assert targets.tolist() == [n % 2 for n in range(COUNT)]
        of_epoch.setdefault(epoch, []).append(images)
    for same in of_epoch.values():
        assert all((images == same[0]).all() for images in same)
    assert (of_epoch[0][0] != of_epoch[1][0]).mean() > 0.9


def test_other_transforms_are_not_shared(module, root):
    dataset, other, same = (_dataset(root) for _ in range(3))
    other.transform = type('Other', (Noise,), {'__repr__': lambda self: 'Other()'})()
    next((root / 'train').rglob('*.png')).unlink()
    fewer = _dataset(root)
    for each in (dataset, other, same, fewer):
        each.set_epoch(0)
    image = dataset[3][0]
    assert torch.equal(same[3][0], image)
    assert torch.equal(dataset[3][0], image)
    assert not torch.equal(other[3][0], image)
    assert len({each._folder for each in (dataset, other, same, fewer)}) == 3
    assert fewer._folder not in (dataset._folder, other._folder)


def test_transforms_of_another_colour(module):
    """ timm's RandAugment does not show what it fills corners with."""
    def describe(colour):
        augment = rand_augment_transform('rand-m4-n2-mstd0-inc1', dict(img_mean=colour, translate_const=3))
        return module._describe(Compose([augment]))

    assert describe((1, 2, 3)) == describe((1, 2, 3)) != describe((1, 2, 4))


def test_policies_of_torchvision(module):
    describe = {module._describe(Compose([torchvision_rand_augment(aa)])) for aa in (
        'torchvision-m12-n2', 'torchvision-m12-n2', 'torchvision-m11-n2', 'torchvision-m12-n1')}
    assert len(describe) == 3


def test_without_epochs(module, root):
    """ As train.py's images of the test set are, which has no epochs: as ever."""
    dataset = _dataset(root)
    assert not torch.equal(dataset[3][0], dataset[3][0])
    assert [dataset[n][1] for n in (3, COUNT - 1)] == [0, 1]
    assert not list((root.parent / 'shared').iterdir())


def test_needs_the_prefetcher(module, root):
    dataset = _dataset(root)
    dataset.transform = lambda image: torch.zeros(3, 8, 8)
    dataset.set_epoch(0)
    with pytest.raises(RuntimeError, match='uint8 tensors that timm makes with its prefetcher'):
        dataset[0]


def test_of_timms_loader(module, root):
    """ What train.py's loader gives, over two epochs."""
    dataset = create_dataset('', root=str(root), split='train', is_training=True)
    loader = create_loader(
        dataset, (3, 8, 8), 8, is_training=True, auto_augment='rand-m4-n2-p1.0-mstd0-inc1', num_workers=1,
        scale=[1, 1], ratio=[1, 1], device=torch.device('cpu'))
    for epoch in range(2):
        loader.dataset.set_epoch(epoch)
        assert sum(len(images) for images, _ in loader) == COUNT
    records, = (root.parent / 'shared').iterdir()
    assert sorted(path.name for path in records.iterdir()) == ['1', f'run{os.getpid()}']


def test_under_spawn(module, root):
    """ Where data loaders are not forked, as on newer Pythons."""
    dataset, same = _dataset(root), _dataset(root)
    loader = torch.utils.data.DataLoader(dataset, batch_size=COUNT, num_workers=1, multiprocessing_context='spawn')
    for each in (dataset, same):
        each.set_epoch(3)
        assert each[0][1] == 0  # from a file, which is of this process
    (images, _), = loader
    assert torch.equal(images, torch.stack([same[n][0] for n in range(COUNT)]))


def test_epochs_that_all_have_passed_are_removed(module, root):
    dataset = _dataset(root)
    for epoch in range(4):
        dataset.set_epoch(epoch)
        dataset[0]
        if epoch == 0:
            records, = (root.parent / 'shared').iterdir()
            (records / 'run1').write_text('2')  # a process that is always there
            (records / 'run4194305').write_text('0')  # and one that cannot be
    assert sorted(path.name for path in records.iterdir()) == ['2', '3', 'run1', f'run{os.getpid()}']


@pytest.mark.parametrize('written', ['nothing', 'a part', 'too little left'])
def test_without_space(module, root, monkeypatch, caplog, written):
    """ Each run has images of its own, told once."""
    def pwrite(file, body, place):
        assert written != 'too little left'
        if written == 'nothing':
            raise OSError(28, 'No space left on device')
        return len(body) // 2

    dataset, other = _dataset(root), _dataset(root)
    monkeypatch.setattr(module.os, 'pwrite', pwrite)
    if written == 'too little left':
        space = SimpleNamespace(f_blocks=4000, f_bavail=2000, f_frsize=4096)
        monkeypatch.setattr(module.os, 'fstatvfs', lambda file: space)
    for each in (dataset, other):
        each.set_epoch(0)
    for n in (3, 4):
        image, target = dataset[n]
        assert (image[0, 0, 0], target) == (20 * n, 0)
        assert not torch.equal(other[n][0], image)
    assert caplog.text.count('No space for shared images') == 2


def test_inert_without_a_folder(monkeypatch):
    monkeypatch.delenv('SPLITMIXER_SHARED_IMAGES', raising=False)
    monkeypatch.delitem(sys.modules, 'splitmixer_timm.shared_images', raising=False)
    before = dataset_factory.ImageDataset
    importlib.import_module('splitmixer_timm.shared_images')
    assert dataset_factory.ImageDataset is before
