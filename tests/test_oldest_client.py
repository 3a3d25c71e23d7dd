""" The tests of the Hub again, with the oldest client that the package admits."""
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from importlib.metadata import requires

import pytest
from conftest import ROOT

OLDEST = next(re.search(r'>=([\d.]+)', line)[1] for line in requires('splitmixer_timm') if 'huggingface_hub' in line)


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    """ Folder with that client and what it needs, to stand before the installed one."""
    folder = tmp_path_factory.mktemp('client')
    done = subprocess.run([
        sys.executable, '-m', 'pip', 'install', '--quiet', '--target', str(folder), f'huggingface_hub=={OLDEST}.*',
    ], capture_output=True, text=True)
    if done.returncode:
        message = f'huggingface_hub {OLDEST} is not to be had from the package registry: {done.stderr[-500:]}'
        (pytest.fail if os.environ.get('CI') else pytest.skip)(message)
    return folder


@pytest.mark.package
@pytest.mark.timeout(1200)
def test_hub(site, tmp_path):
    env = {**os.environ, 'PYTHONPATH': f'{site}{os.pathsep}{ROOT}'}
    version = subprocess.run(
        [sys.executable, '-c', 'import huggingface_hub; print(huggingface_hub.__version__)'],
        capture_output=True, text=True, env=env, check=True).stdout.strip()
    assert version.startswith(f'{OLDEST}.')
    report = tmp_path / 'report.xml'
    done = subprocess.run([
        sys.executable, '-m', 'pytest', '-q', 'tests/test_hub.py', 'tests/test_hub_server.py', f'--junitxml={report}',
    ], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert sum(not len(case) for case in ElementTree.parse(report).iter('testcase')) > 100
