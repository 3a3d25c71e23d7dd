import errno
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest
import timm
import torch

import splitmixer_timm  # noqa: F401, registers the models
from splitmixer_timm.machine import has_bfloat16

ROOT = Path(__file__).resolve().parents[1]
DATA_DIR = Path(os.environ.get('SPLITMIXER_DATA', ROOT.parent / 'shared' / 'data'))

workers = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', 1))
if workers > 1:
    # the processes share the cores, those that tests start as well: threads that wait for a core hold up all others
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    os.environ['OMP_NUM_THREADS'] = str(torch.get_num_threads())

KINDS = ('i', 'ii', 'iii', 'iv', 'v', '3d', 'full')
SPLITMIXERS = timm.list_models(module='splitmixer')
BASELINES = ['convmixer_256_8', 'convmixer_256_8_ks7_p7']

# files of few tests that take minutes: begun last, one process would wait for the other's
SLOW = (
    'test_accuracy.py', 'test_timm_suite.py', 'test_oldest_client.py', 'test_fused_training.py', 'test_kernels.py',
    'test_package.py', 'test_complexity_tables.py')

HAS_COMPILER = bool(
    shutil.which(os.environ.get('CXX', 'g++')) and Path(sysconfig.get_path('include'), 'Python.h').is_file())
INDUCTOR = pytest.mark.skipif(
    not HAS_COMPILER, reason="torch's inductor needs a C++ compiler and Python's headers")
# what takes minutes where every product in bf16 is computed one by one
BF16 = pytest.param(
    'bf16', marks=pytest.mark.skipif(not has_bfloat16(), reason='needs a processor that computes in bf16'))


def pytest_configure(config):
    config.option.loadscopereorder = False  # else pytest-xdist begins with the files of most tests


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: SLOW.index(item.path.name) if item.path.name in SLOW else len(SLOW))


def real_images(dataset, folder, per_class=None, splits=('train', 'validation')):
    """ Image folders `folder/SPLIT/CLASS` of a real data set, the first images of each class if not all; skips where
    `SPLITMIXER_DATA` has neither such nor an unpack.py that makes them."""
    if (DATA_DIR / 'unpack.py').is_file():
        command = [sys.executable, DATA_DIR / 'unpack.py', dataset, folder]
        command += ['--split', 'test'] if splits == ('validation',) else []
        subprocess.run([*command, *(['--per-class', str(per_class)] if per_class else [])], check=True)
        return folder
    for split in splits:
        classes = sorted(path for path in (DATA_DIR / dataset / split).glob('*') if path.is_dir())
        if not classes:
            pytest.skip(f'{dataset} is not at hand (SPLITMIXER_DATA names a folder with {dataset}/{split}/CLASS)')
        for source in classes:
            target = folder / split / source.name
            target.mkdir(parents=True)
            for image in sorted(source.iterdir())[:per_class]:
                (target / image.name).symlink_to(image.resolve())
    return folder


def make_images(folder, classes):
    """ An empty image of each class."""
    for name in map(str, classes):
        (folder / name).mkdir(parents=True)
        (folder / name / '0.png').touch()


@pytest.fixture(autouse=True)
def _allocator(monkeypatch):
    """ What the benchmarks ask of the allocator would stay for all tests of this process."""
    monkeypatch.setattr('splitmixer_timm.benchmark.keep_memory', lambda: True)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def images():
    """ Small images whose sides differ and are no multiple of common patches."""
    return torch.randn(2, 3, 15, 18)


@pytest.fixture
def read_only(monkeypatch):
    """ No folder can be written to, which permissions alone do not bring about for root."""
    def refuse(dir=None, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), dir)

    monkeypatch.setattr(tempfile, 'TemporaryFile', refuse)
