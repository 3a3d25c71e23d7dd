""" `splitmixer_timm.add_run`: from a finished run to weights and a manifest entry. """
import json

import pytest
import timm
import torch
import yaml
from conftest import ROOT
from safetensors.torch import load_file

from splitmixer_timm import add_run, manifest

NAME = 'splitmixer_ii_256_8.cifar10_plus'
VALIDATE = """
import argparse, json
parser = argparse.ArgumentParser()
for name in ('model', 'checkpoint', 'data-dir', 'split', 'device', 'batch-size', 'workers', 'results-file',
             'results-format'):
    parser.add_argument('--' + name)
parser.add_argument('--no-prefetcher', action='store_true')
args = parser.parse_args()
assert args.model == 'splitmixer_ii_256_8.cifar10' and args.split == 'validation'
import timm
model = timm.create_model(args.model)
timm.models.load_checkpoint(model, args.checkpoint)
json.dump(dict(top1=81.25, top5=99.5), open(args.results_file, 'w'))
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """ A run of train.py with an EMA, a zoo of its own, and a stand-in for validate.py that checks what it is given."""
    args = yaml.safe_load((manifest.WEIGHTS_DIR / 'runs' / 'splitmixer_i_256_8.cifar10' / 'args.yaml').read_text())
    args.update(model='splitmixer_ii_256_8', epochs=2, warmup_epochs=1, seed=7, data_dir='/somewhere/data',
                output='/somewhere/else', device='cpu')
    zoo = tmp_path / 'weights'
    zoo.mkdir()
    data = dict(hf_hub_org='', base_url='', models={})
    monkeypatch.setattr(manifest, 'WEIGHTS_DIR', zoo)
    monkeypatch.setattr(manifest, 'load_manifest', lambda: data)
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    run_dir = tmp_path / 'run'
    run_dir.mkdir()
    (run_dir / 'args.yaml').write_text(yaml.safe_dump(args))
    (run_dir / 'summary.csv').write_text('epoch,eval_top1\n0,60\n1,70\n2,80\n')
    ema = timm.create_model('splitmixer_ii_256_8').state_dict()
    torch.save({'epoch': 2, 'state_dict': {k: v * 0 for k, v in ema.items()}, 'state_dict_ema': ema},
               run_dir / 'last.pth.tar')
    scripts = tmp_path / 'scripts'
    scripts.mkdir()
    (scripts / 'validate.py').write_text(VALIDATE)
    for i in range(3):
        image = tmp_path / 'data' / 'validation' / 'cat' / f'{i}.png'
        image.parent.mkdir(parents=True, exist_ok=True)
        image.touch()

    class Run:
        path, weights, state_dict = run_dir, zoo, ema
        validate = scripts / 'validate.py'

        def add(self, name=NAME):
            add_run.main([str(run_dir), name, '--dataset', 'cifar10', '--data-dir', str(tmp_path / 'data'),
                          '--scripts', str(scripts), '--recipe', 'a test'])

    return Run()


def test_adds(run, monkeypatch):
    run.add()
    written = json.loads((run.weights / 'manifest.json').read_text())
    entry = written['models'][NAME]
    assert entry['metrics'] == {**entry['metrics'], 'top1': 81.25, 'top5': 99.5, 'images': 3}
    assert (entry['params'], entry['dataset'], entry['training']['epochs'], entry['training']['seed']) == \
        (175_370, 'cifar10', 3, 7)
    monkeypatch.setattr(manifest, 'load_manifest', lambda: written)
    manifest.check_file(run.weights / entry['file'], NAME)
    saved = load_file(run.weights / entry['file'])
    assert all(torch.equal(saved[k], v) for k, v in run.state_dict.items())
    args = (run.weights / entry['training']['args']).read_text()
    assert '/somewhere' not in args
    assert yaml.safe_load(args)['data_dir'] == '<DATA_DIR>'
    assert (run.weights / entry['training']['summary']).read_bytes() == (run.path / 'summary.csv').read_bytes()
    assert not list(run.weights.rglob('*.tmp'))


def test_unfinished_run(run, capsys):
    (run.path / 'summary.csv').write_text('epoch,eval_top1\n0,60\n')
    with pytest.raises(SystemExit):
        run.add()
    assert '1 of 3 epochs' in capsys.readouterr().err
    assert not list(run.weights.iterdir())


def test_other_architecture(run, capsys):
    with pytest.raises(SystemExit):
        run.add('splitmixer_i_256_8.cifar10')
    assert 'trained splitmixer_ii_256_8' in capsys.readouterr().err


def test_failed_validation_leaves_the_zoo_alone(run):
    run.validate.write_text('raise SystemExit(1)')
    with pytest.raises(Exception, match='validate.py'):
        run.add()
    assert not list(run.weights.iterdir())
