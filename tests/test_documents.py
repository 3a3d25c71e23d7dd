""" README, model card and CI say what is so. """
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from hub_server import HubServer

from splitmixer_timm import manifest

README = (ROOT / 'README.md').read_text(encoding='utf-8')
BLOCKS = re.findall(r'```(\w+)\n(.*?)```', README, re.DOTALL)


def test_tables_are_fresh():
    done = subprocess.run(
        [sys.executable, ROOT / 'benchmarks' / 'report.py', '--check'], capture_output=True, text=True)
    assert done.returncode == 0, f'{done.stdout}{done.stderr}run benchmarks/report.py'


def test_introduction():
    """ How far SplitMixer-I is behind ConvMixer, which README tells in words, is what the manifest has."""
    ours, baseline = (
        manifest.entries()[f'{name}_256_8.cifar10']['metrics']['top1'] for name in ('splitmixer_i', 'convmixer'))
    told = re.search(r'0\.3 points less accurate in the paper, and ([0-9.]+) with\s+the\s+weights', README)
    assert told[1] == f'{baseline - ours:.1f}'


@pytest.fixture
def hub_env(tmp_path):
    """ Environment of a process that talks to a Hub of its own, where USER is logged in."""
    with HubServer() as server:
        server.add_token('hf_user', 'USER')
        yield {**os.environ, **server.env(tmp_path), 'HF_TOKEN': 'hf_user'}


@pytest.mark.parametrize('code', [code for language, code in BLOCKS if language == 'python'])
def test_python_examples(code, tmp_path, hub_env):
    if 'published.pth' in code:
        import reference
        import torch
        torch.save(reference.Package('i', 256, 8).state_dict(), tmp_path / 'published.pth')
        code = 'import timm, splitmixer_timm\n' + code.replace('published.pth', str(tmp_path / 'published.pth'))
    elif 'import' not in code:
        code = 'import timm, splitmixer_timm\n' + code
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, env=hub_env)
    assert done.returncode == 0, done.stderr
    if 'airplane.png' in code:
        assert done.stdout.startswith('airplane ')


def test_ci_runs_the_readme():
    """ The first two shell blocks, set-up and main job, then set-up and tests, are what .ci/run takes from here."""
    shell = [code.strip() for language, code in BLOCKS if language == 'bash']
    assert 'pip install .' in shell[0]
    assert 'splitmixer-timm predict' in shell[0]
    assert '-m pytest' in shell[1].splitlines()[-1]
    assert 'README.md' in (ROOT / '.ci' / 'run').read_text()


def test_links():
    for document in ('README.md', 'MODEL_CARD.md', 'benchmarks/README.md'):
        path = ROOT / document
        for target in re.findall(r'\]\((?!https?:)([^)#]+)\)', path.read_text(encoding='utf-8')):
            assert (path.parent / target).exists(), f'{document} links to {target}'
    for path in re.findall(r'`((?:splitmixer_timm|weights|benchmarks|tests)/[\w./]+)`', README):
        assert (ROOT / path).exists(), path
