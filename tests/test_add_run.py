""" `splitmixer_timm.add_run`: from a finished run to weights and a manifest entry. """
import dataclasses
import json
import os
import shutil
import signal

import pytest
import timm
import torch
import yaml
from conftest import make_images
from PIL import Image
from safetensors.torch import load_file

from splitmixer_timm import add_run, manifest

NAME = 'splitmixer_ii_256_8.cifar10_plus'
SUMMARY = """epoch,train_loss,eval_loss,eval_top1
0,1.5,1.2,60
1,1.2,1.0,70
2,1.0,0.9,80
"""
VALIDATE = """
import argparse, json
parser = argparse.ArgumentParser()
for name in ('model', 'checkpoint', 'data-dir', 'split', 'device', 'batch-size', 'workers', 'results-file',
             'results-format'):
    parser.add_argument('--' + name)
parser.add_argument('--no-prefetcher', action='store_true')
args = parser.parse_args()
assert args.model == 'splitmixer_ii_256_8.cifar10' and args.split == 'validation'
assert args.device == 'cpu' and args.workers == '0', 'a worker needs shared memory'
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
    (zoo / 'manifest.json').write_text(json.dumps(dict(hf_hub_org='', base_url='', models={})))
    monkeypatch.setattr(manifest, 'WEIGHTS_DIR', zoo)
    run_dir = tmp_path / 'run'
    run_dir.mkdir()
    (run_dir / 'args.yaml').write_text(yaml.safe_dump(args))
    (run_dir / 'summary.csv').write_text(SUMMARY)
    ema = timm.create_model('splitmixer_ii_256_8').state_dict()
    torch.save({'epoch': 2, 'state_dict': {k: v * 0 for k, v in ema.items()}, 'state_dict_ema': ema},
               run_dir / 'last.pth.tar')
    scripts = tmp_path / 'scripts'
    scripts.mkdir()
    (scripts / 'validate.py').write_text(VALIDATE)
    make_images(tmp_path / 'data' / 'validation', range(10))

    class Run:
        path, weights, state_dict = run_dir, zoo, ema
        validate = scripts / 'validate.py'

        def add(self, name=NAME, runs=None, more=()):
            add_run.main([name, *map(str, runs or [run_dir]), '--dataset', 'cifar10', '--data-dir',
                          str(tmp_path / 'data'), '--scripts', str(scripts), '--recipe', 'a test', *more])

    return Run()


@pytest.fixture
def measured(monkeypatch):
    """ Figures in place of a process that measures them."""
    monkeypatch.setattr(add_run, 'validate', lambda *args: dict(top1=81.25, top5=99.5))


def test_adds(run, monkeypatch):
    run.add()
    written = json.loads((run.weights / 'manifest.json').read_text())
    entry = written['models'][NAME]
    assert entry['metrics'] == {**entry['metrics'], 'top1': 81.25, 'top5': 99.5, 'images': 10}
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
    with Image.open(run.weights / entry['training']['curves']) as picture:
        assert picture.format == 'PNG'
        assert picture.size == (800, 300)
    curves = add_run.plot_curves(add_run.read_summary(run.path), f'{NAME}, seed 7')
    assert (run.weights / entry['training']['curves']).read_bytes() == curves
    assert not list(run.weights.rglob('.*.tmp'))


def test_folders_that_begin_with_a_dash(run, tmp_path, monkeypatch):
    """ They are no options of validate.py."""
    monkeypatch.chdir(tmp_path)
    for name in ('data', 'scripts'):
        (tmp_path / name).rename(f'-{name}')
    run.add(more=['--data-dir', './-data', '--scripts', './-scripts'])
    assert NAME in json.loads((run.weights / 'manifest.json').read_text())['models']


@pytest.mark.usefixtures('measured')
def test_training_images_are_counted(run, tmp_path):
    """ As timm finds them: what else lies in the folders is none."""
    for split in ('train', 'validation'):
        shutil.rmtree(tmp_path / 'data' / split, ignore_errors=True)
        make_images(tmp_path / 'data' / split, range(10))
        (tmp_path / 'data' / split / '3' / 'two.JPG').touch()
        (tmp_path / 'data' / split / '3' / 'Thumbs.db').touch()
        (tmp_path / 'data' / split / '.DS_Store').touch()
    run.add()
    entry = json.loads((run.weights / 'manifest.json').read_text())['models'][NAME]
    assert entry['training']['images'] == entry['metrics']['images'] == 11


@pytest.mark.usefixtures('measured')
def test_what_it_was_measured_on(run, monkeypatch):
    def measured_by():
        run.add()
        return json.loads((run.weights / 'manifest.json').read_text())['models'][NAME]['metrics']['measured_by']

    assert measured_by() == "timm's validate.py on 10 images, not the official test set, fp32, cpu"
    monkeypatch.setitem(
        add_run.DATASETS, 'cifar10', dataclasses.replace(add_run.DATASETS['cifar10'], test=10))
    assert measured_by() == "timm's validate.py on the official test set, fp32, cpu"


@pytest.mark.usefixtures('measured')
def test_epochs_by_the_images(run, tmp_path):
    """ timm rounds a cycle to updates: this one has an epoch more than one of a thousand updates an epoch has."""
    make_images(tmp_path / 'data' / 'train', range(10))
    args = yaml.safe_load((run.path / 'args.yaml').read_text())
    args.update(lr_cycle_limit=1, lr_cycle_mul=0.9, batch_size=10, grad_accum_steps=2)
    assert add_run.planned_epochs(args) == 2
    (run.path / 'args.yaml').write_text(yaml.safe_dump(args))
    run.add()
    assert json.loads((run.weights / 'manifest.json').read_text())['models'][NAME]['training']['epochs'] == 3


@pytest.mark.parametrize('split', ['train', 'validation'])
def test_class_folders(run, tmp_path, capsys, split):
    """ timm numbers the classes that it finds: one that is missing shifts all after it."""
    before = (run.weights / 'manifest.json').read_bytes()
    data = tmp_path / 'flowers'
    names = [name.replace('/', ' ') for name in manifest.label_names('flowers102')]
    make_images(data / 'validation', names if split == 'validation' else range(102))
    make_images(data / 'train', names if split == 'train' else range(102))
    for message in ('name them by number', f'{data / split} must have images in 102 class folders, those of '
                                           'flowers102, has them in 101'):
        with pytest.raises(SystemExit):
            add_run.main([
                'splitmixer_ii_256_8.cifar10', str(run.path), '--dataset', 'flowers102', '--data-dir', str(data),
                '--scripts', str(run.validate.parent), '--recipe', 'a test'])
        assert message in capsys.readouterr().err
        assert (run.weights / 'manifest.json').read_bytes() == before
        next((data / split).glob('*/0.png')).unlink()


def test_dataset_of_another_architecture(run, tmp_path, capsys):
    """ It has no such tag, by which validate.py could measure it."""
    make_images(tmp_path / 'flowers' / 'validation', range(102))
    with pytest.raises(SystemExit):
        run.add(more=['--dataset', 'flowers102', '--data-dir', str(tmp_path / 'flowers')])
    assert 'dataset of splitmixer_ii_256_8 must be one that it is registered for (cifar10, cifar100), got ' \
           "'flowers102'" in capsys.readouterr().err


def test_seeds(run, tmp_path, monkeypatch):
    """ The first run is published, the accuracy of all is reported."""
    def validate(model, weights, *args):
        better = load_file(weights)['head.bias'][0] < 0.5
        return dict(top1=81.25, top5=99.5) if better else dict(top1=80.5, top5=99)

    monkeypatch.setattr(add_run, 'validate', validate)
    other = tmp_path / 'other'
    shutil.copytree(run.path, other)
    args = yaml.safe_load((other / 'args.yaml').read_text())
    elsewhere = dict(
        data_dir='/other', output='/other', resume='/other/last.pth.tar', workers=9, device='cpu', val_interval=3)
    (other / 'args.yaml').write_text(yaml.safe_dump({**args, **elsewhere, 'seed': 8}))
    (other / 'summary.csv').write_text(SUMMARY.replace('2,1.0,0.9,80', '2,1.0,0.9,79'))
    worse = {k: v + 1 for k, v in run.state_dict.items()}
    torch.save({'epoch': 2, 'state_dict': worse}, other / 'last.pth.tar')
    run.add(runs=[run.path, other])
    entry = json.loads((run.weights / 'manifest.json').read_text())['models'][NAME]
    assert entry['training']['seed'] == 7
    assert (entry['metrics']['top1'], entry['metrics']['top5']) == (81.25, 99.5)
    assert entry['metrics']['seeds'] == {'7': 81.25, '8': 80.5}
    saved = load_file(run.weights / entry['file'])
    assert all(torch.equal(saved[k], v) for k, v in run.state_dict.items())
    # the arguments and the log of each are kept
    kept = (run.weights / entry['training']['args']).parent
    assert {path.name for path in kept.iterdir()} == {
        'args.yaml', 'args.8.yaml', 'summary.csv', 'summary.8.csv', 'curves.png'}
    assert [yaml.safe_load((kept / name).read_text())['seed'] for name in ('args.yaml', 'args.8.yaml')] == [7, 8]
    assert '/other' not in (kept / 'args.8.yaml').read_text()
    assert [(kept / name).read_text() for name in ('summary.csv', 'summary.8.csv')] == [
        SUMMARY, SUMMARY.replace('2,1.0,0.9,80', '2,1.0,0.9,79')]
    run.add()
    assert {path.name for path in kept.iterdir()} == {'args.yaml', 'summary.csv', 'curves.png'}


@pytest.mark.usefixtures('measured')
def test_added_again(run):
    """ Where the same weights are to be had is kept; of other weights it would be wrong."""
    path = run.weights / 'manifest.json'
    place = dict(hf_hub_id='someone/model', revision='0' * 40, url='https://example.com/model.safetensors')

    def entry():
        return json.loads(path.read_text())['models'][NAME]

    run.add()
    manifest.write_entry(NAME, {**entry(), **place})
    run.add()
    assert entry().items() >= place.items()
    changed = {k: v + 1 for k, v in run.state_dict.items()}
    torch.save({'epoch': 2, 'state_dict': changed}, run.path / 'last.pth.tar')
    run.add()
    assert not place.keys() & entry().keys()


@pytest.fixture
def seeds(run, tmp_path):
    """ The run, and another of other weights and of seed 8."""
    other = tmp_path / 'other'
    shutil.copytree(run.path, other)
    args = yaml.safe_load((other / 'args.yaml').read_text())
    (other / 'args.yaml').write_text(yaml.safe_dump({**args, 'seed': 8}))
    torch.save({'epoch': 2, 'state_dict': {k: v + 1 for k, v in run.state_dict.items()}}, other / 'last.pth.tar')
    return [run.path, other]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file() and path.suffix != '.lock'}


@pytest.mark.usefixtures('measured')
@pytest.mark.parametrize('last', ['args.yaml', f'{NAME}.safetensors', 'manifest.json'])
def test_interrupted(run, seeds, monkeypatch, last):
    """ Whatever was written when it came, the zoo is as before, and its weights are the manifest's."""
    run.add(runs=seeds)
    before = contents(run.weights)
    replace_file = manifest.replace_file

    def interrupted(path, content):
        if path.name == last and path.read_bytes() == before[path]:
            raise KeyboardInterrupt
        replace_file(path, content)

    monkeypatch.setattr(manifest, 'replace_file', interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.add(runs=seeds[1:])
    assert contents(run.weights) == before


@pytest.mark.usefixtures('measured')
def test_two_at_once(run, seeds, monkeypatch):
    """ What another process adds while the first measures is replaced whole."""
    run.add(runs=seeds)
    before = contents(run.weights)
    write_entry = manifest.write_entry

    def late(*args):
        monkeypatch.setattr(manifest, 'write_entry', write_entry)
        run.add(runs=seeds[1:])
        assert contents(run.weights) != before
        return write_entry(*args)

    monkeypatch.setattr(manifest, 'write_entry', late)
    run.add(runs=seeds)
    assert contents(run.weights) == before


@pytest.mark.usefixtures('measured')
def test_resumed_run(run):
    """ train.py writes the header again when it resumes, and an epoch again that was cut off before its checkpoint."""
    lines = SUMMARY.splitlines(keepends=True)
    (run.path / 'summary.csv').write_text(''.join([*lines[:3], lines[0], '1,1.3,1.1,71\n', lines[3]]))
    (run.path / add_run.ELAPSED).write_text('3600\n1800\n')
    os.utime(run.path / 'args.yaml', (1_000_000, 1_000_000))
    os.utime(run.path / 'last.pth.tar', (1_001_800, 1_001_800))
    run.add()
    entry = json.loads((run.weights / 'manifest.json').read_text())['models'][NAME]
    assert entry['training']['epochs'] == 3
    assert entry['training']['hours'] == 2
    assert (run.weights / entry['training']['summary']).read_text() == SUMMARY.replace('1,1.2,1.0,70', '1,1.3,1.1,71')


@pytest.mark.usefixtures('measured')
def test_resumed_by_hand(run):
    """ train.py writes its arguments anew: when the run began is not known."""
    args = yaml.safe_load((run.path / 'args.yaml').read_text())
    run.add()
    entries = json.loads((run.weights / 'manifest.json').read_text())['models']
    assert 'hours' in entries[NAME]['training']
    (run.path / 'args.yaml').write_text(yaml.safe_dump(dict(args, resume='/somewhere/run/last.pth.tar')))
    run.add()
    entries = json.loads((run.weights / 'manifest.json').read_text())['models']
    assert 'hours' not in entries[NAME]['training']


@pytest.mark.usefixtures('measured')
@pytest.mark.parametrize(('before', 'epochs'), [('01234', '012'), ('2', '12')])
def test_log_of_what_was_before(run, before, epochs):
    """ A longer run by the same name, or a part with another val_interval whose last checkpoint was lost."""
    header, *rows = SUMMARY.splitlines(keepends=True)
    ours = header + ''.join(rows[int(epoch)] for epoch in epochs)
    (run.path / 'summary.csv').write_text(header + ''.join(f'{epoch},9,9,99\n' for epoch in before) + ours)
    run.add()
    entry = json.loads((run.weights / 'manifest.json').read_text())['models'][NAME]
    assert entry['training']['epochs'] == 3
    assert (run.weights / entry['training']['summary']).read_text() == ours


@pytest.mark.usefixtures('measured')
def test_not_every_epoch_measured(run):
    """ With train.py's val_interval the log has only the epochs that were measured."""
    lines = SUMMARY.splitlines(keepends=True)
    (run.path / 'summary.csv').write_text(lines[0] + lines[2] + lines[3])
    run.add()
    entry = json.loads((run.weights / 'manifest.json').read_text())['models'][NAME]
    assert entry['training']['epochs'] == 3


@pytest.mark.usefixtures('measured')
def test_no_epoch_measured(run):
    """ Trained without validation images: validate.py measures it all the same."""
    (run.path / 'summary.csv').write_text('epoch,train_loss\n0,1.5\n1,1.2\n2,1.0\n')
    run.add()
    entry = json.loads((run.weights / 'manifest.json').read_text())['models'][NAME]
    with Image.open(run.weights / entry['training']['curves']) as picture:
        assert picture.size == (800, 300)


@pytest.mark.usefixtures('measured')
def test_columns_of_each_part(run):
    """ Begun without validation images, and resumed with them."""
    (run.path / 'summary.csv').write_text(
        'epoch,train_loss,lr\n0,1.5,0.3\nepoch,train_loss,eval_loss,eval_top1,lr\n1,1.2,1.0,70,0.2\n2,1.0,0.9,80,0.1\n')
    run.add()
    entry = json.loads((run.weights / 'manifest.json').read_text())['models'][NAME]
    assert (run.weights / entry['training']['summary']).read_text() == (
        'epoch,train_loss,lr,eval_loss,eval_top1\n0,1.5,0.3,,\n1,1.2,0.2,1.0,70\n2,1.0,0.1,0.9,80\n')


def test_not_a_run(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run.add(runs=[run.path, tmp_path])
    assert f'{tmp_path} is not an output folder' in capsys.readouterr().err
    assert [path.name for path in run.weights.iterdir()] == ['manifest.json']


def test_unfinished_run(run, capsys):
    (run.path / 'summary.csv').write_text('epoch,eval_top1\n0,60\n')
    with pytest.raises(SystemExit):
        run.add()
    assert '1 of 3 epochs' in capsys.readouterr().err
    assert [path.name for path in run.weights.iterdir()] == ['manifest.json']


def test_checkpoint_of_an_earlier_epoch(run, capsys):
    """ train.py logs an epoch before it saves it."""
    torch.save({'epoch': 1, 'state_dict': run.state_dict}, run.path / 'last.pth.tar')
    with pytest.raises(SystemExit):
        run.add()
    assert 'last.pth.tar is of epoch 1, not of the last, 2' in capsys.readouterr().err


def test_damaged_checkpoint(run, capsys):
    content = (run.path / 'last.pth.tar').read_bytes()
    for damaged in (b'', content[:len(content) // 2]):
        (run.path / 'last.pth.tar').write_bytes(damaged)
        with pytest.raises(SystemExit) as error:
            run.add()
        assert error.value.code == 2
        assert f'{run.path}/last.pth.tar cannot be read (' in capsys.readouterr().err
    assert [path.name for path in run.weights.iterdir()] == ['manifest.json']


def test_weights_that_are_not_finite(run, capsys):
    broken = {**run.state_dict, 'head.bias': run.state_dict['head.bias'] * torch.nan}
    torch.save({'epoch': 2, 'state_dict': broken}, run.path / 'last.pth.tar')
    with pytest.raises(SystemExit):
        run.add()
    assert 'not finite' in capsys.readouterr().err
    assert [path.name for path in run.weights.iterdir()] == ['manifest.json']


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(model_kwargs=dict(act_layer='relu')), "with model_kwargs {'act_layer': 'relu'}: the zoo has models as they"),
    (dict(gp='max'), 'with gp max: the zoo has models as they are'),
    (dict(mean=[0., 0., 0.], img_size=64), 'with mean [0.0, 0.0, 0.0], img_size 64: the zoo'),
    (dict(class_map='m.txt', num_classes=10), 'with class_map m.txt: the zoo'),
    (dict(seed=8, lr=0.5), 'in the seed alone, not in lr'),
    ({}, 'runs must differ in the seed, got 7, 7'),
])
def test_runs_that_do_not_fit(run, tmp_path, capsys, changes, message):
    other = tmp_path / 'other'
    shutil.copytree(run.path, other)
    args = yaml.safe_load((other / 'args.yaml').read_text())
    (other / 'args.yaml').write_text(yaml.safe_dump({**args, **changes}))
    with pytest.raises(SystemExit):
        run.add(runs=[run.path, other])
    assert message in capsys.readouterr().err
    assert [path.name for path in run.weights.iterdir()] == ['manifest.json']


@pytest.mark.usefixtures('measured')
def test_ema_is_named(run):
    args = yaml.safe_load((run.path / 'args.yaml').read_text())
    (run.path / 'args.yaml').write_text(yaml.safe_dump({**args, 'model_ema': True}))
    run.add()
    entry = json.loads((run.weights / 'manifest.json').read_text())['models'][NAME]
    assert entry['training']['checkpoint'] == 'last, EMA'


def test_measured_in_fp32(run):
    """ On a GPU validate.py would allow TF32; a damaged image is an error, not the next one in its place."""
    run.validate.write_text(
        "import os; assert os.environ['NVIDIA_TF32_OVERRIDE'] == '0'\n"
        'from timm.data import dataset; assert dataset._ERROR_RETRY == 1\n' + run.validate.read_text())
    run.add()


@pytest.mark.usefixtures('measured')
def test_record_of_the_machine_that_was_cut_off(run):
    """ As if there were none."""
    (run.path / 'made_on.yaml').touch()
    run.add()
    entry = json.loads((run.weights / 'manifest.json').read_text())['models'][NAME]
    assert entry['training']['torch'] == torch.__version__


def test_made_on_a_device_that_is_not_here(run, capsys):
    """ Told before anything is measured."""
    args = yaml.safe_load((run.path / 'args.yaml').read_text())
    (run.path / 'args.yaml').write_text(yaml.safe_dump({**args, 'device': 'cuda:99'}))
    run.validate.write_text('raise SystemExit(3)')
    with pytest.raises(SystemExit):
        run.add()
    assert f'{run.path} was trained on cuda:99, which is not here' in capsys.readouterr().err


def test_other_architecture(run, capsys):
    with pytest.raises(SystemExit):
        run.add('splitmixer_i_256_8.cifar10')
    assert 'trained splitmixer_ii_256_8' in capsys.readouterr().err


def test_failed_validation_leaves_the_zoo_alone(run, capsys):
    run.validate.write_text('raise SystemExit(1)')
    with pytest.raises(SystemExit) as error:
        run.add()
    assert error.value.code == 1
    assert 'validate.py failed with exit status 1; nothing was added' in capsys.readouterr().err
    assert [path.name for path in run.weights.iterdir()] == ['manifest.json']


@pytest.mark.usefixtures('measured')
def test_zoo_that_cannot_be_written(run, capsys, monkeypatch):
    def replace_file(path, content):
        raise PermissionError(13, 'Permission denied', str(path))

    monkeypatch.setattr(manifest, 'replace_file', replace_file)
    with pytest.raises(SystemExit) as error:
        run.add()
    assert error.value.code == 1
    assert f"splitmixer_timm.add_run: [Errno 13] Permission denied: '{run.weights}" in capsys.readouterr().err


@pytest.mark.usefixtures('read_only')
def test_read_only_zoo(run, capsys):
    """ Told before anything is measured."""
    run.validate.write_text('raise SystemExit(3)')
    with pytest.raises(SystemExit) as error:
        run.add()
    assert error.value.code == 2
    assert f'weights cannot be written to {run.weights}: Read-only file system' in capsys.readouterr().err


@pytest.mark.parametrize(('change', 'message'), [
    (['--dataset', 'mnist'], "dataset must be one of cifar10, cifar100, flowers102, food101, in1k, got 'mnist'"),
    (['--scripts', 'nowhere'], 'scripts must be a folder with validate.py, nowhere has none'),
    (['--data-dir', 'nowhere'], 'data_dir must have image folders validation, nowhere has no images there'),
    (['--split', 'test'], 'data_dir must have image folders test'),
    (['--batch-size', '0'], "--batch-size: must be an integer of at least 1, got '0'"),
])
def test_bad_requests(run, capsys, change, message):
    with pytest.raises(SystemExit):
        run.add(more=change)
    assert message in capsys.readouterr().err
    assert [path.name for path in run.weights.iterdir()] == ['manifest.json']


def test_without_matplotlib(run, capsys, monkeypatch):
    """ Told at once, not after the measurement."""
    monkeypatch.setattr(add_run, 'find_spec', lambda name: None)
    run.validate.unlink()
    with pytest.raises(SystemExit):
        run.add()
    assert "pip install 'splitmixer-timm[bench]'" in capsys.readouterr().err


@pytest.mark.parametrize('name', ['splitmixer_ii_256_8', 'resnet18.cifar10', 'splitmixer_ii_256_8.', 'a/../b.cifar10'])
def test_names(run, capsys, name):
    with pytest.raises(SystemExit):
        run.add(name)
    assert f"name must be 'arch.tag', of a model of this package, got {name!r}" in capsys.readouterr().err


def test_ended_while_it_measures(run):
    """ What is being measured is given up, and not added."""
    run.validate.write_text('import os, signal, time\nos.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(300)\n')
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as end:
            run.add()
        assert end.value.code == 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not add_run.measuring
    assert [path.name for path in run.weights.iterdir()] == ['manifest.json']
