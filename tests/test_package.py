""" The distribution: built, installed away from the checkout, used without a network. """
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
from conftest import ROOT

from splitmixer_timm import manifest

pytestmark = pytest.mark.package

NAME = 'splitmixer_i_256_8.cifar10'
USE = """
import json, timm, splitmixer_timm, torch
model = timm.create_model('splitmixer_i_256_8', pretrained=True).eval()
shape = model(torch.zeros(1, 3, 32, 32)).shape
print(json.dumps([splitmixer_timm.__file__, model.pretrained_cfg['file'], list(shape)]))
"""
EXAMPLE = ROOT / 'tests' / 'assets' / 'airplane.png'


@pytest.fixture(scope='module')
def dist(tmp_path_factory):
    """ Folder with the wheel and the source distribution, the wheel built from the latter."""
    folder = tmp_path_factory.mktemp('dist')
    done = subprocess.run(
        [sys.executable, '-m', 'build', '--outdir', str(folder), str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


@pytest.fixture(scope='module')
def installed(dist, tmp_path_factory):
    """ Run Python with the wheel installed away from the checkout, from a folder that is not the checkout's."""
    site = tmp_path_factory.mktemp('site')
    subprocess.run([
        sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--target', str(site),
        str(next(dist.glob('*.whl')))], check=True)

    def run(*args):
        env = {**os.environ, 'PYTHONPATH': str(site), 'HF_HUB_OFFLINE': '1', 'PYTHONSAFEPATH': '1'}
        # no proxy leads out of here: whatever asks for a network fails
        env.update(dict.fromkeys(('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'), 'http://127.0.0.1:9'))
        done = subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=site.parent, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    run.site = site
    return run


def test_wheel_holds_what_it_must(dist):
    with zipfile.ZipFile(next(dist.glob('*.whl'))) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(next(n for n in names if n.endswith('METADATA'))).decode()
    assert {'splitmixer_timm/weights/manifest.json', 'splitmixer_timm/labels/cifar10.txt',
            'splitmixer_timm/labels/in1k.LICENSE',
            'splitmixer_timm/cpu_kernels.cpp', 'splitmixer_timm/py.typed'} <= names
    for entry in manifest.entries().values():
        for file in (entry['file'], *(entry['training'][key] for key in ('args', 'summary', 'curves'))):
            assert f'splitmixer_timm/weights/{file}' in names
    assert not [n for n in names if n.startswith(('tests', 'benchmarks', 'weights'))]
    assert not [n for n in names if n.startswith('splitmixer_timm/weights/') and n.endswith('.py')]
    for line in ('Name: splitmixer-timm', 'Requires-Python: >=3.10', 'License-Expression: Apache-2.0',
                 'Requires-Dist: pillow<13', 'Provides-Extra: bench', 'Provides-Extra: export', 'Provides-Extra: test'):
        assert line in metadata
    assert 'SplitMixer for timm' in metadata


def test_sdist_holds_what_it_must(dist):
    with tarfile.open(next(dist.glob('*.tar.gz'))) as archive:
        names = {name.partition('/')[2] for name in archive.getnames()}
    files = [entry['file'] for entry in manifest.entries().values()]
    assert {'weights/manifest.json', 'LICENSE', 'README.md', 'splitmixer_timm/labels/in1k.txt',
            'splitmixer_timm/labels/in1k.LICENSE',
            *(f'weights/{file}' for file in files)} <= names
    if shutil.which('git'):
        tracked = subprocess.run(['git', '-C', ROOT, 'ls-files'], capture_output=True, text=True)
        if tracked.returncode == 0:  # all of it: the tests run from there as well
            assert set(tracked.stdout.splitlines()) <= names


def test_pretrained_offline(installed):
    module, file, shape = json.loads(installed('-c', USE))
    assert module.startswith(str(installed.site))
    assert file.startswith(str(installed.site))
    assert shape == [1, 10]


def test_command_line(installed):
    answer = json.loads(installed('-m', 'splitmixer_timm', 'predict', str(EXAMPLE), '--json'))
    assert answer['model'] == NAME
    assert answer['images'][0]['predictions'][0]['label'] == 'airplane'
    assert installed('-m', 'splitmixer_timm', 'verify').startswith('ok')
    out = installed(
        '-m', 'splitmixer_timm', 'benchmark', '--device', 'cpu', '--models', 'splitmixer_i_256_8', '--img-size', '8',
        '--batch-size', '1', '--batches', '1', '--repeats', '1', '--no-plot')
    assert '| splitmixer_i_256_8 |' in out
    results, = (installed.site.parent / 'benchmarks' / 'results').iterdir()
    assert results.suffix == '.csv'


def test_from_a_bare_checkout(tmp_path):
    """ Without an installation the checkout's own weights are found."""
    done = subprocess.run(
        [sys.executable, '-c', 'from splitmixer_timm import manifest; print(manifest.WEIGHTS_DIR)'],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(ROOT)}, check=True)
    assert done.stdout.strip() == str(ROOT / 'weights')
