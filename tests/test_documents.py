""" README, model card and CI say what is so. """
import os
import re
import subprocess
import sys
from typing import Dict, Set

import pytest
import report
import torch
import yaml
from conftest import ROOT
from hub_server import HubServer
from timm.data import create_loader
from torch.utils.data import TensorDataset

from splitmixer_timm import manifest, paper
from splitmixer_timm.runs import read_summary

README = (ROOT / 'README.md').read_text(encoding='utf-8')
BLOCKS = re.findall(r'```(\w+)\n(.*?)```', README, re.DOTALL)


def test_tables_are_fresh():
    done = subprocess.run(
        [sys.executable, ROOT / 'benchmarks' / 'report.py', '--check'], capture_output=True, text=True)
    assert done.returncode == 0, f'{done.stdout}{done.stderr}run benchmarks/report.py'


def test_introduction():
    """ What README tells in words of the weights is what the manifest has."""
    top1 = {name: entry['metrics']['top1'] for name, entry in manifest.entries().items()}
    seeds = manifest.entries()['splitmixer_i_256_8.cifar10']['metrics']['seeds'].values()
    assert len(seeds) == 3
    ours = sum(seeds) / 3
    told = re.search(r'0\.3 points less accurate in the paper, and ([0-9.]+) with\s+the\s+weights', README)
    assert told[1] == f'{top1["convmixer_256_8.cifar10"] - ours:.1f}'
    below = {name: paper.top1(name) - value for name, value in top1.items() if 'cifar' in name and paper.top1(name)}
    iii, conv = below.pop('splitmixer_iii_256_8.cifar10'), below.pop('convmixer_256_8.cifar100')
    assert re.search(r'III on CIFAR-10, ([0-9.]+) above it, and ConvMixer on CIFAR-100, as good', README)[1] == (
        f'{-iii:.1f}')
    assert abs(conv) < 0.1
    assert re.search(r'are ([0-9.]+) to ([0-9.]+) points below it, but for', README).groups() == (
        f'{min(below.values()):.1f}', f'{max(below.values()):.1f}')
    mean = re.search(r'The mean\s+of three seeds of I on CIFAR-10 is ([0-9.]+) below it', README)[1]
    assert mean == f'{paper.top1("splitmixer_i_256_8.cifar10") - ours:.1f}'
    one = 'splitmixer_i_256_8'
    gains = [top1[f'{one}.{tag}_plus'] - top1[f'{one}.{tag}'] for tag in ('cifar10', 'cifar100')]
    assert re.search(r'([0-9.]+) and ([0-9.]+) points above those by the paper', README).groups() == (
        f'{gains[0]:.1f}', f'{gains[1]:.1f}')
    entries = manifest.entries().values()
    size = sum(entry['bytes'] for entry in entries) / 1e6
    assert f'[{len(entries)} trained models](#weights) ({size:.0f} MB)' in README
    assert {entry['dataset'] for entry in entries} == {'cifar10', 'cifar100', 'flowers102'}  # "None on Food101"


def test_measured():
    """ What README tells in words of speed is what the results have."""
    fastest, single = set(), []
    for results in report.speed():
        tasks = {}
        for row in results.values():
            if row['device'].startswith('CPU') and row['mode'] == 'infer' and not row['error']:
                task = tuple(row[name] for name in ('device', 'model', 'batch_size', 'memory', 'threads'))
                tasks.setdefault(task, {})[row['form']] = float(row['seconds'])
        for (device, model, batch_size, *_), seconds in tasks.items():
            best = min(seconds, key=seconds.get)
            fastest.add((model.partition('_')[0], best.startswith('optimized compiled')))
            if model.startswith('splitmixer'):
                assert best.endswith('bf16') == device.endswith('bf16')
                if batch_size == '1' and device.endswith('AVX2'):
                    single += [seconds[form] / seconds[best] - 1 for form in ('ONNX Runtime', 'OpenVINO')]
    assert fastest == {('splitmixer', True), ('convmixer', False)}
    assert re.search(r"`compile=True` is the fastest in every SplitMixer's row of inference on both", README)
    low, high = re.search(r'single images took (\d+) to (\d+) % longer in\s+ONNX Runtime and OpenVINO', README).groups()
    assert (round(100 * min(single)), round(100 * max(single))) == (int(low), int(high))


def test_trained_by():
    """ README tells which of the zoo's SplitMixers the kernels trained, and which of those as CUDA graphs."""
    by: Dict[str, Set[str]] = {'train_fused': set(), 'train_graphs': set(), '': set()}
    for name in manifest.entries():
        if name.startswith('splitmixer') and 'cifar' in name:
            args = yaml.safe_load((manifest.WEIGHTS_DIR / 'runs' / name / 'args.yaml').read_text())
            modules = {module.rpartition('.')[2] for module in args['device_modules']}
            by[next(iter(modules & by.keys()), '')].add(name)
    assert not by['']
    assert re.search(
        r"kernels trained the zoo's SplitMixers on CIFAR there, V and the two plus models\s+with graphs", README)
    assert by['train_graphs'] == {
        name for name in by['train_graphs'] | by['train_fused'] if '_v_' in name or name.endswith('_plus')}
    assert len([name for name in by['train_graphs'] if name.endswith('_plus')]) == 2


def test_logs():
    """ MODEL_CARD tells how far the logs' last figures are from the zoo's."""
    differences = {}
    for entry in manifest.entries().values():
        log = read_summary((manifest.WEIGHTS_DIR / entry['training']['summary']).parent)
        difference = abs(float(log[-1]['eval_top1']) - entry['metrics']['top1'])
        differences.setdefault(entry['dataset'].rstrip('0123456789'), []).append(difference)
    card = ' '.join((ROOT / 'MODEL_CARD.md').read_text(encoding='utf-8').split())
    most = re.search(r'On CIFAR they differ by at most ([0-9.]+) points, on Flowers102 by more', card)[1]
    assert most == f'{max(differences["cifar"]):.2f}'
    assert min(differences['flowers']) > max(differences['cifar'])


def test_fine_tuning():
    """ Fewer images than a batch give train.py none: README tells how many that are, where its command names none."""
    command = next(code for _, code in BLOCKS if '--num-classes 3' in code)
    assert not re.search(r'--batch-size|-b ', command)
    defaults = yaml.safe_load((ROOT / 'tests' / 'assets' / 'train_defaults.yaml').read_text())
    assert re.search(r'less than a\s+batch \((\d+) by default\)', README)[1] == str(defaults['batch_size'])
    images = TensorDataset(torch.zeros(defaults['batch_size'] - 1, 3, 32, 32), torch.zeros(defaults['batch_size'] - 1))
    assert len(create_loader(
        images, (3, 32, 32), defaults['batch_size'], is_training=True, num_workers=0, device=torch.device('cpu'))) == 0


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
    """ Set-up and main job, then set-up and tests: what .ci/run takes from here."""
    script = (ROOT / '.ci' / 'run').read_text()
    shell = [code for language, code in BLOCKS if language == 'bash']
    words = re.search(r"for words in '(.*)' '(.*)'; do", script).groups()
    install, test = (next(code for code in shell if word in code) for word in words)
    assert all(command in install for command in ('python3 -m venv', 'splitmixer-timm predict'))
    assert all(command in test for command in ('python3 -m venv', 'ruff check'))
    assert '-m pytest' in test.splitlines()[-1]
    function = re.search(r'^block\(\) \{.*?^\}', script, re.DOTALL | re.MULTILINE)[0]
    for word, code in ((words[0], install), (words[1], test)):
        found = subprocess.run(
            ['bash', '-c', f'{function}\nblock "{word}"'], capture_output=True, text=True, check=True, cwd=ROOT)
        assert found.stdout.strip() == code.strip()
    assert subprocess.run(['bash', '-c', f'{function}\nblock "no such words"'], cwd=ROOT).returncode


def test_links():
    for document in ('README.md', 'MODEL_CARD.md', 'benchmarks/README.md', 'weights/README.md'):
        path = ROOT / document
        for target, anchor in re.findall(r'\]\((?!https?:)([^)#]*)#?([^)]*)\)', path.read_text(encoding='utf-8')):
            linked = path.parent / target if target else path
            assert linked.exists(), f'{document} links to {target}'
            if anchor:
                titles = re.findall(r'^#+ (.*)$', linked.read_text(encoding='utf-8'), re.MULTILINE)
                anchors = [re.sub(r'[^\w -]', '', title.lower()).replace(' ', '-') for title in titles]
                assert anchor in anchors, f'{document} links to {target}#{anchor}'
    for path in re.findall(r'`((?:splitmixer_timm|weights|benchmarks|tests)/[\w./]+)`', README):
        assert (ROOT / path).exists(), path
