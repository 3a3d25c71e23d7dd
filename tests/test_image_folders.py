""" Data sets as image folders, by torchvision's own classes from small files in their formats. """
import json
import os
import pickle
import signal
import sys
from types import ModuleType
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image
from timm.data import create_dataset
from torchvision import datasets

from splitmixer_timm import cli, manifest
from splitmixer_timm.image_folders import SOURCES, write_image_folders
from splitmixer_timm.runs import sorted_classes


def cifar(root, monkeypatch, name):
    """ Two images of each class to train on and one to test on, as torchvision keeps them; labels and pixels."""
    kind = datasets.CIFAR10 if name == 'cifar10' else datasets.CIFAR100
    monkeypatch.setattr('torchvision.datasets.cifar.check_integrity', lambda path, md5=None: True)
    names = manifest.label_names(name)
    (root / kind.base_folder).mkdir()

    def dump(file, **content):
        (root / kind.base_folder / file).write_bytes(pickle.dumps(content))

    pixels = {'train': [], 'validation': []}
    for split, files in (('train', kind.train_list), ('validation', kind.test_list)):
        for file, _ in files:
            count = 2 if file in ('data_batch_1', 'train') else int(split == 'validation')
            labels = list(range(len(names)))[::-1] * count
            data = np.random.randint(0, 256, (len(labels), 3072), dtype=np.uint8)
            dump(file, data=data, **{'labels' if name == 'cifar10' else 'fine_labels': labels})
            pixels[split] += zip(labels, data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    dump(kind.meta['filename'], **{kind.meta['key']: list(names)})
    return pixels


def photograph(path, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 50).convert('RGB').save(path)


def flowers(root, monkeypatch):
    """ A photograph of each class in each official split."""
    monkeypatch.setattr('torchvision.datasets.flowers102.check_integrity', lambda path, md5=None: True)
    scipy, io = ModuleType('scipy'), ModuleType('scipy.io')
    io.loadmat = lambda path, squeeze_me: dict(np.load(path))
    scipy.io = io
    monkeypatch.setitem(sys.modules, 'scipy', scipy)
    monkeypatch.setitem(sys.modules, 'scipy.io', io)
    ids = np.arange(1, 3 * 102 + 1)
    for i in ids:
        photograph(root / 'flowers-102' / 'jpg' / f'image_{i:05d}.jpg', (20, 15))
    for file, content in (
            ('imagelabels.mat', dict(labels=(ids - 1) // 3 + 1)),
            ('setid.mat', dict(trnid=ids[::3], valid=ids[1::3], tstid=ids[2::3]))):
        with open(root / 'flowers-102' / file, 'wb') as f:
            np.savez(f, **content)


def food(root):
    """ Two photographs of each class to train on and one to test on."""
    names = [name.replace(' ', '_') for name in manifest.label_names('food101')]
    (root / 'food-101' / 'meta').mkdir(parents=True)
    for split, numbers in (('train', (1, 2)), ('test', (3,))):
        files = {name: [f'{name}/{number}' for number in numbers] for name in names}
        (root / 'food-101' / 'meta' / f'{split}.json').write_text(json.dumps(files))
        for name in names:
            for number in numbers:
                photograph(root / 'food-101' / 'images' / name / f'{number}.jpg', (20, 15))


@pytest.mark.parametrize('name', ['cifar10', 'cifar100'])
def test_cifar(tmp_path, monkeypatch, name):
    pixels = cifar(tmp_path, monkeypatch, name)
    folder = write_image_folders(name, tmp_path)
    assert folder == tmp_path / name
    assert sorted(path.name for path in folder.iterdir()) == ['train', 'validation']
    for split in ('train', 'validation'):
        dataset = create_dataset('', root=str(tmp_path / name), split=split)
        manifest.check_class_order(sorted_classes(dataset.reader), name)
        found = sorted((label, np.asarray(image).tobytes()) for image, label in dataset)
        assert found == sorted((label, image.tobytes()) for label, image in pixels[split])


@pytest.mark.parametrize('name', ['flowers102', 'food101'])
def test_photographs(tmp_path, monkeypatch, name):
    flowers(tmp_path, monkeypatch) if name == 'flowers102' else food(tmp_path)
    # smooth: of noise JPEG keeps less
    across, down = np.meshgrid(np.linspace(0, 255, 20), np.linspace(0, 255, 15))
    smooth = tmp_path / {
        'flowers102': 'flowers-102/jpg/image_00001.jpg', 'food101': 'food-101/images/apple_pie/1.jpg'}[name]
    Image.fromarray(np.stack([across, down, 255 - down], -1).astype(np.uint8)).save(smooth)
    folder = write_image_folders(name, tmp_path)
    labels = manifest.label_names(name)
    for split, count, size in (('train', 2, (230, 230)), ('validation', 1, (20, 15))):
        dataset = create_dataset('', root=str(folder), split=split)
        manifest.check_class_order(sorted_classes(dataset.reader), name)
        assert sorted(label for _, label in dataset) == sorted(list(range(len(labels))) * count)
        assert {image.size for image, _ in dataset} == {size}
    expected = Image.open(smooth).resize((230, 230), Image.Resampling.BILINEAR)
    expected.save(tmp_path / 'expected.jpg', quality=95)
    written = Image.open(folder / 'train' / {'flowers102': '001', 'food101': 'apple_pie'}[name] / smooth.name)
    assert np.abs(np.asarray(written, int) - np.asarray(expected, int)).mean() < 1
    assert written.quantization == Image.open(tmp_path / 'expected.jpg').quantization
    first = {'flowers102': ('image_00003.jpg', 'flowers-102/jpg', '001'),
             'food101': ('3.jpg', 'food-101/images/apple_pie', 'apple_pie')}[name]
    copied = folder / 'validation' / first[2] / first[0]
    assert copied.read_bytes() == (tmp_path / first[1] / first[0]).read_bytes()


def test_command(tmp_path, monkeypatch, capsys):
    cifar(tmp_path, monkeypatch, 'cifar10')
    assert cli.main(['data', 'cifar10', '--to', str(tmp_path)]) == 0
    assert capsys.readouterr().out == f'{tmp_path / "cifar10"}\n'
    cifar(tmp_path, monkeypatch, 'cifar100')
    assert cli.main(['data', 'cifar10', 'cifar100', '--to', str(tmp_path)]) == 0  # what an earlier call left undone
    out, err = capsys.readouterr()
    assert out == f'{tmp_path / "cifar100"}\n'
    assert f'{tmp_path / "cifar10"} is there already' in err


def test_without_scipy(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'scipy.io', None)
    assert cli.main(['data', 'flowers102', '--to', str(tmp_path)]) == 1
    assert 'FAILED  flowers102  needs SciPy' in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('number', [2, 3], ids=['train', 'validation'])
def test_nothing_is_left_of_what_failed(tmp_path, capsys, number):
    food(tmp_path)
    damaged = tmp_path / 'food-101' / 'images' / 'waffles' / f'{number}.jpg'
    damaged.write_bytes(damaged.read_bytes()[:400])
    assert cli.main(['data', 'food101', '--to', str(tmp_path)]) == 1
    assert f'FAILED  food101  {damaged} cannot be read' in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ['food-101']


def test_without_a_network(tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise URLError('no route')

    monkeypatch.setattr('torchvision.datasets.cifar.download_and_extract_archive', fail)
    assert cli.main(['data', 'cifar100', '--to', str(tmp_path)]) == 1
    assert 'FAILED  cifar100  <urlopen error no route>' in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', ['data', 'data/cifar10'])
@pytest.mark.parametrize('is_link', [False, True])
def test_no_folder(tmp_path, monkeypatch, capsys, name, is_link):
    """ Neither what an earlier call finished, nor what is found out once all is downloaded."""
    monkeypatch.setattr('splitmixer_timm.image_folders._images', lambda *args: pytest.fail('began'))
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.symlink_to('nowhere') if is_link else path.touch()
    assert cli.main(['data', 'cifar10', '--to', str(tmp_path / 'data')]) == 1
    assert f'FAILED  cifar10  {path} is no folder' in capsys.readouterr().out


def test_what_there_is(tmp_path):
    with pytest.raises(ValueError, match="name must be one of 'cifar10', .*, got 'svhn'"):
        write_image_folders('svhn', tmp_path)
    assert set(SOURCES) == {entry['dataset'] for entry in manifest.entries().values()} | {'food101'}


@pytest.mark.skipif(not hasattr(signal, 'SIGHUP'), reason='needs the signals of a Unix')
@pytest.mark.parametrize('name', ['SIGTERM', 'SIGHUP'])
@pytest.mark.parametrize('is_ignored', [False, True])
def test_ended_from_outside(tmp_path, monkeypatch, name, is_ignored):
    """ Who is told to end leaves nothing half done behind; under nohup, who is ignored stays so."""
    signum = getattr(signal, name)

    def images(*args):
        yield Image.new('RGB', (2, 2)), 'a'
        assert is_ignored or signal.getsignal(signum) is not signal.SIG_DFL
        os.kill(os.getpid(), signum)
        yield Image.new('RGB', (2, 2)), 'b'

    monkeypatch.setattr('splitmixer_timm.image_folders._images', images)
    own = signal.SIG_IGN if is_ignored else signal.SIG_DFL
    before = signal.signal(signum, own)
    try:
        command = ['data', 'cifar10', '--to', str(tmp_path)]
        if is_ignored:
            assert cli.main(command) == 0
        else:
            with pytest.raises(SystemExit) as end:
                cli.main(command)
            assert end.value.code == 128 + signum
        assert [path.name for path in tmp_path.iterdir()] == (['cifar10'] if is_ignored else [])
        assert signal.getsignal(signum) is own
    finally:
        signal.signal(signum, before)
