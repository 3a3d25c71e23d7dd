""" timm's own tests, of the installed version, on our models.

They come with timm's source distribution, which the package registry has, and run with this package loaded as a pytest
plugin. What they leave out by name or by module is in test_timm_contract.py.
"""
import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections import Counter

import pytest
import timm
from conftest import BASELINES, ROOT, SPLITMIXERS
from timm.models import get_arch_pretrained_cfgs

MODELS = [*SPLITMIXERS, *BASELINES]
TESTS = (
    'test_model_forward', 'test_model_backward', 'test_model_forward_torchscript', 'test_model_forward_fx',
    'test_model_backward_fx', 'test_model_forward_fx_torchscript',
)


@pytest.fixture(scope='module')
def suite(tmp_path_factory):
    """ Folder with the tests of the installed timm."""
    folder = tmp_path_factory.mktemp('timm')
    done = subprocess.run([
        sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', 'timm', '--dest', str(folder),
        f'timm=={timm.__version__}'], capture_output=True, text=True)
    if done.returncode:
        message = f"timm's source distribution is not to be had from the package registry: {done.stderr[-500:]}"
        (pytest.fail if os.environ.get('CI') else pytest.skip)(message)
    with tarfile.open(next(folder.glob('timm-*.tar.gz'))) as archive:
        wanted = [m for m in archive.getmembers() if m.name.split('/')[1:2] in (['tests'], ['pyproject.toml'])]
        archive.extractall(folder, wanted, filter='data')
    return next(path for path in folder.iterdir() if path.is_dir())


@pytest.mark.timm_suite
@pytest.mark.timeout(1800)
def test_models(suite):
    report = suite / 'report.xml'
    done = subprocess.run([
        sys.executable, '-m', 'pytest', '-p', 'splitmixer_timm', 'tests/test_models.py', '-q', '-k',
        'splitmixer_ or convmixer_256_8', f'--junitxml={report}', '-o', 'junit_family=xunit2',
    ], cwd=suite, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    cases = ElementTree.parse(report).iter('testcase')
    passed = Counter(case.get('name').partition('[')[0] for case in cases if not len(case))
    tags = sum(len(get_arch_pretrained_cfgs(name)) for name in MODELS)
    assert passed['test_model_default_cfgs_non_std'] == tags
    assert {name: passed[name] for name in TESTS} == dict.fromkeys(TESTS, len(MODELS))
    assert passed['test_model_load_pretrained'] >= 1
