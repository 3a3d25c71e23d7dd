""" `splitmixer_timm.batch_augment`: images augmented a batch at a time, with the distribution of one by one."""
import importlib
import logging
import pickle
import random
import subprocess
import sys
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_dataset, create_loader, dataset_factory
from timm.data.transforms import MaybePILToTensor, RandomResizedCropAndInterpolation
from torchvision import datasets, transforms
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from splitmixer_timm.randaugment import torchvision_rand_augment
from splitmixer_timm.run import environment

COUNT = 12
FLIP = transforms.RandomHorizontalFlip(1.)


@pytest.fixture
def module(monkeypatch):
    """ As train.py imports it; timm's own classes are back afterwards."""
    monkeypatch.setattr(dataset_factory, 'ImageDataset', dataset_factory.ImageDataset)
    monkeypatch.setattr(dataset_factory, '_TORCH_BASIC_DS', dict(dataset_factory._TORCH_BASIC_DS))
    monkeypatch.delitem(sys.modules, 'splitmixer_timm.batch_augment', raising=False)
    yield importlib.import_module('splitmixer_timm.batch_augment')
    del sys.modules['splitmixer_timm.batch_augment']


def _pixels(count, size=(8, 8), channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *size, channels), dtype=np.uint8)


@pytest.fixture
def root(tmp_path):
    """ Two classes of noise."""
    for n, pixels in enumerate(_pixels(COUNT)):
        folder = tmp_path / 'data' / 'train' / f'class{n // (COUNT // 2)}'
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f'{n:02}.png')
    return tmp_path / 'data'


def _dataset(root, *steps):
    dataset = create_dataset('', root=str(root), split='train', is_training=True)
    dataset.transform = transforms.Compose([*(steps or [FLIP]), MaybePILToTensor()])
    return dataset


def _flipped(count=COUNT):
    return torch.from_numpy(_pixels(count)).permute(0, 3, 1, 2).flip(-1)


def _images(items):
    return torch.stack([image for image, _ in items])


def _photo(brighter=0):
    """ Smooth and coloured, with a square in it and no black or white: each operation changes it in its own way."""
    across, down = np.meshgrid(np.arange(32), np.arange(32))
    pixels = np.stack([40 + 5 * across, 60 + 4 * down, 200 - 2 * (across + down)], -1)
    pixels[8:16, 8:20] = [210, 30, 90]
    return Image.fromarray((pixels + brighter).astype(np.uint8))


def test_operations_are_torchvisions(monkeypatch):
    """ Of a batch, each of the same operations as of a PIL image, but for rounding and pixels at slanting borders."""
    policy = torchvision_rand_augment('torchvision-m12-n1')
    table = policy._augmentation_space(31, (32, 32))
    pictures = [_photo(brighter) for brighter in range(2 * len(table))]  # each keeps its place
    batch = torch.stack([pil_to_tensor(picture) for picture in pictures])
    drawn = iter([torch.arange(len(table)).repeat(2), torch.tensor([0, 1]).repeat_interleave(len(table))])
    with monkeypatch.context() as context:
        context.setattr(torch, 'randint', lambda *args: next(drawn))
        made = policy.batch(batch)
    assert all(torch.equal(image, pil_to_tensor(picture)) for image, picture in zip(batch, pictures))  # as they were
    theirs = transforms.RandAugment(num_ops=1, magnitude=12)
    for n, image in enumerate(made):
        drawn = iter([torch.tensor([n % len(table)]), torch.tensor([n // len(table)])])
        with monkeypatch.context() as context:
            context.setattr(torch, 'randint', lambda *args, drawn=drawn: next(drawn))
            expected = pil_to_tensor(theirs(pictures[n]))
        apart = (image.int() - expected.int()).abs()
        name = list(table)[n % len(table)]
        if name in ('ShearX', 'ShearY', 'Rotate'):
            assert (apart > 0).float().mean() < 0.03, name
        else:
            assert apart.max() <= 1, name
        if name != 'Identity':
            assert not torch.equal(image, batch[n]), name


def test_operations_are_drawn_alike():
    """ Each image has its own, each operation as often as torchvision has it, and each sign."""
    torch.manual_seed(0)
    count = 5600
    image = pil_to_tensor(_photo())
    made = torchvision_rand_augment('torchvision-m12-n1').batch(image[None].repeat(count, 1, 1, 1))
    ours = Counter(bytes(one.numpy()) for one in made)
    # the same operations, one image at a time
    policy = torchvision_rand_augment('torchvision-m12-n1')
    theirs = Counter(bytes(policy(image).numpy()) for _ in range(count))
    assert ours.keys() == theirs.keys()
    assert len(ours) >= 20
    for outcome, number in ours.items():
        assert abs(number - theirs[outcome]) < 5 * (number + theirs[outcome]) ** 0.5
    assert abs(ours[bytes(image.numpy())] / count - 1 / 14) < 0.02


def test_operations_follow_each_other():
    """ With two, of independent draws: one of 196 images is left as it is."""
    torch.manual_seed(0)
    image = pil_to_tensor(_photo())
    made = torchvision_rand_augment('torchvision-m12-n2').batch(image[None].repeat(4000, 1, 1, 1))
    counts = Counter(bytes(one.numpy()) for one in made)
    assert len(counts) > 150
    assert 5 < counts[bytes(image.numpy())] < 45


@pytest.mark.parametrize('channels', [1, 3])
def test_augment(module, channels):
    """ The transforms in their order, in batches or not."""
    images = torch.from_numpy(_pixels(6, channels=channels)).permute(0, 3, 1, 2)
    pad = transforms.Pad((1, 0, 0, 0))  # to the left: not the same before and after a flip
    padded = torch.nn.functional.pad(images, (1, 0))
    assert torch.equal(module.augment(images, [pad]), padded)
    assert torch.equal(module.augment(images, [pad, FLIP]), padded.flip(-1))
    assert torch.equal(module.augment(images, [FLIP, FLIP, pad, pad]), torch.nn.functional.pad(padded, (1, 0)))
    assert torch.equal(module.augment(images, [FLIP, pad, FLIP]), torch.nn.functional.pad(images, (0, 1)))
    assert torch.equal(module.augment(images, [transforms.RandomVerticalFlip(1.)]), images.flip(-2))
    assert torch.equal(module.augment(images, [transforms.RandomHorizontalFlip(0.)]), images)
    assert module.augment(images, [torchvision_rand_augment('torchvision-m12-n2'), FLIP]).shape == images.shape


@pytest.mark.parametrize('interpolation', ['nearest', 'bilinear', 'bicubic', 'random'])
@pytest.mark.parametrize(('size', 'scale', 'ratio'), [
    (32, (0.75, 1.), (0.9, 1.1)), (24, (0.3, 1.), (1., 1.)), ((40, 48), (0.3, 0.9), (0.75, 1.33)),
    (32, (1., 1.), (1., 1.)), (16, (1., 1.), (1., 1.))])
def test_crops_are_timms(module, size, scale, ratio, interpolation):
    """ Of the same random numbers, but for rounding; all of an image is left as it is."""
    step = RandomResizedCropAndInterpolation(size, scale, ratio, interpolation)
    angles = np.linspace(0, 3, 32)
    waves = [np.sin(angles[:, None] * (n + 1) + angles + phase) for n in range(12) for phase in (0, 1, 2)]
    images = torch.from_numpy(np.stack(waves).reshape(12, 3, 32, 32) * 100 + 128).to(torch.uint8)
    random.seed(0)
    expected = torch.stack([pil_to_tensor(step(to_pil_image(image))) for image in images])
    random.seed(0)
    made = module.augment(images, [step])
    assert made.shape == expected.shape
    apart = (made.int() - expected.int()).abs()
    # where a pixel's middle is on the border of two, PIL may take the other
    assert (apart > 1).float().mean() < (0.1 if interpolation == 'nearest' else 0.001)
    if size == 32 and scale == (1., 1.):
        assert torch.equal(made, images)


def test_flips_are_drawn_for_each(module):
    torch.manual_seed(0)
    images = torch.from_numpy(_pixels(1)).permute(0, 3, 1, 2).repeat(400, 1, 1, 1)
    made = module.augment(images, [transforms.RandomHorizontalFlip()])
    assert 150 < sum(torch.equal(image, images[0].flip(-1)) for image in made) < 250


def test_loader(module, root):
    """ timm's loader takes its batches from it; decoded images stay, also those that its processes decoded."""
    dataset = create_dataset('', root=str(root), split='train', is_training=True)
    assert type(dataset) is module.BatchImageDataset
    loader = create_loader(
        dataset, (3, 8, 8), 4, is_training=True, hflip=1., scale=(1., 1.), ratio=(1., 1.), color_jitter=0.,
        auto_augment=None, num_workers=2, persistent_workers=False, use_prefetcher=True, device=torch.device('cpu'),
        mean=(0., 0., 0.), std=(1 / 255, 1 / 255, 1 / 255))
    expected = {bytes(image.numpy()): n // (COUNT // 2) for n, image in enumerate(_flipped())}
    for _ in range(2):
        seen = {bytes(image.to(torch.uint8).contiguous().numpy()): int(target)
                for images, targets in loader for image, target in zip(images.round(), targets)}
        assert seen == expected
        if loader.loader.multiprocessing_context is None and sys.platform == 'linux' and sys.version_info < (3, 14):
            for file in root.rglob('*.png'):
                file.write_bytes(b'')  # nothing reads it any more


@pytest.mark.parametrize('interpolation', ['lanczos', 'box', 'hamming'])
def test_interpolations_of_pil_alone(module, interpolation):
    """ Crops by them are made one by one."""
    step = RandomResizedCropAndInterpolation(6, (0.5, 1.), (1., 1.), interpolation)
    images = torch.from_numpy(_pixels(3)).permute(0, 3, 1, 2)
    random.seed(0)
    expected = torch.stack([pil_to_tensor(step(to_pil_image(image))) for image in images])
    random.seed(0)
    assert torch.equal(module.augment(images, [step, FLIP]), expected.flip(-1))


def test_archive(module, root):
    """ The process of train.py leaves it closed, for those of a data loader to open their own."""
    archive = root.parent / 'images.tar'
    with tarfile.open(archive, 'w') as tar:
        for file in sorted(root.rglob('*.png')):
            tar.add(file, file.relative_to(root / 'train'))
    dataset = module.BatchImageDataset(str(archive), reader='')
    pickle.dumps(dataset)
    assert dataset.reader.tar_state.tf is None
    dataset.transform = transforms.Compose([FLIP, MaybePILToTensor()])
    assert torch.equal(_images(dataset.__getitems__([0, 7])), _flipped()[[0, 7]])


def test_too_large_to_keep(module, root, monkeypatch):
    monkeypatch.setattr(module, 'KEPT_BYTES', COUNT * 8 * 8 * 3 - 1)
    dataset = _dataset(root)
    assert dataset._pixels is None
    assert torch.equal(_images(dataset.__getitems__([*range(COUNT)])), _flipped())
    monkeypatch.setattr(module, 'KEPT_BYTES', COUNT * 8 * 8 * 3)
    assert _dataset(root)._pixels is not None


@pytest.mark.parametrize('size', [(8, 9), (1, 8)])
@pytest.mark.parametrize('is_kept', [False, True])
def test_several_sizes(module, root, monkeypatch, caplog, is_kept, size):
    """ Told once; all images are there, one by one, none of them stretched."""
    monkeypatch.setattr(module, 'KEPT_BYTES', 2**30 if is_kept else 0)
    Image.fromarray(_pixels(1, size)[0]).save(root / 'train' / 'class0' / '05.png')
    dataset = _dataset(root, transforms.CenterCrop(8), FLIP)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert len(dataset.__getitems__([4, 5, 6])) == 3
    assert [record.message for record in caplog.records] == [
        'Images are of several sizes: they are augmented one by one.']
    assert torch.equal(_images(dataset.__getitems__([4, 6])), _flipped()[[4, 6]])


@pytest.mark.parametrize('index', [0, 5])
def test_damaged_image(module, root, index):
    """ timm takes the next one."""
    (root / 'train' / 'class0' / f'{index:02}.png').write_bytes(b'no image')
    items = _dataset(root).__getitems__([index, 8])
    assert torch.equal(_images(items), _flipped()[[index + 1, 8]])


def test_not_for_evaluation(module, root):
    """ Nor where nothing has a form for batches, or images do not become tensors of uint8."""
    dataset = _dataset(root)
    crop, to_uint8, to_float = transforms.CenterCrop(8), MaybePILToTensor(), transforms.ToTensor()
    for steps in ([crop, to_uint8], [FLIP, to_float], [FLIP], [to_uint8]):
        dataset.transform = transforms.Compose(steps)
        dataset._batch = None
        expected = [dataset[n] for n in range(3)]
        items = dataset.__getitems__([0, 1, 2])
        assert [target for _, target in items] == [0, 0, 0]
        for (image, _), (theirs, _) in zip(items, expected):
            assert image == theirs if isinstance(image, Image.Image) else torch.equal(image, theirs)
    dataset.transform = None
    assert dataset.__getitems__([0])[0][0].size == (8, 8)


def test_targets(module, root):
    dataset = _dataset(root)
    dataset.target_transform = lambda target: target + 7
    assert [target for _, target in dataset.__getitems__([0, COUNT - 1])] == [7, 8]
    dataset.target_transform, dataset.reader.samples = None, [(file, None) for file, _ in dataset.reader.samples]
    dataset._keep()
    assert [target for _, target in dataset.__getitems__([0, COUNT - 1])] == [-1, -1]


def test_grayscale(module, root):
    dataset = _dataset(root)
    dataset.input_img_mode = 'L'
    dataset._keep()
    assert torch.equal(_images(dataset.__getitems__([3, 4])), torch.stack([dataset[3][0], dataset[4][0]]))
    assert dataset.__getitems__([3])[0][0].shape == (1, 8, 8)


def test_goes_to_other_processes(module, root):
    """ As to data loaders that are not forked; the images stay here."""
    dataset = _dataset(root)
    dataset.__getitems__([0])
    content = pickle.dumps(dataset)
    assert len(content) < 10_000
    assert torch.equal(_images(pickle.loads(content).__getitems__([0, 7])), _flipped()[[0, 7]])


@pytest.mark.parametrize('name', ['cifar10', 'cifar100'])
def test_torchvisions_cifar(module, name):
    """ What train.py's `--dataset torch/cifar10` is of."""
    kind = dataset_factory._TORCH_BASIC_DS[name]
    assert issubclass(kind, getattr(datasets, name.upper()))
    dataset = object.__new__(kind)
    dataset.data, dataset.targets, dataset.target_transform = _pixels(4), [3, 1, 4, 2], None
    dataset.transform = transforms.Compose([FLIP, MaybePILToTensor()])
    items = dataset.__getitems__([2, 0])
    assert torch.equal(_images(items), _flipped(4)[[2, 0]])
    assert [target for _, target in items] == [4, 3]


def test_only_where_it_is_asked_for():
    """ The package alone leaves timm as it is."""
    code = (
        'import splitmixer_timm, splitmixer_timm.randaugment; from timm.data import dataset_factory, ImageDataset; '
        'assert dataset_factory.ImageDataset is ImageDataset; import splitmixer_timm.batch_augment; '
        'assert dataset_factory.ImageDataset is splitmixer_timm.batch_augment.BatchImageDataset')
    subprocess.run([sys.executable, '-c', code], check=True, env=environment())
