""" `splitmixer_timm.train_zoo`: the queue that trains the zoo. """
import csv
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import timm
import torch
import yaml
from conftest import ROOT, make_images, real_images
from timm.models import is_model

from splitmixer_timm import add_run, held_out, manifest, runs, train_zoo
from splitmixer_timm.machine import device_name, has_bfloat16
from splitmixer_timm.run import environment

DEFAULTS = ROOT / 'tests' / 'assets' / 'train_defaults.yaml'
SCRIPTS = os.environ.get('SPLITMIXER_TIMM_SCRIPTS')
# trains nothing: its files are those that train.py leaves, and it fails, hangs or waits where a file asks for it
TRAIN = """
import argparse, os, pathlib, shutil, sys, time, yaml
parser = argparse.ArgumentParser()
parser.add_argument('--config', type=pathlib.Path)
parser.add_argument('--mixup')
parser.add_argument('-v', '--val-interval', '--vi')
parser.add_argument('--amp-dtype')
parser.add_argument('--gp')
parser.add_argument('--mean')
parser.add_argument('--num-classes')
parser.add_argument('--class-map')
config = yaml.safe_load(parser.parse_args().config.read_text())
folder = pathlib.Path(config['output']) / config['experiment']
ask = folder.parent.parent
splits = {'train_split': 'train', 'val_split': 'validation'}
(folder / 'args.yaml').write_text(yaml.safe_dump({'resume': '', **splits, **config}))
if (ask / ('fail-' + config['experiment'])).exists():
    sys.exit('cannot go on')
first = 2 if config.get('resume') else 0
with open(ask / 'started', 'a') as f:
    print(config['experiment'], config['lr'], first, file=f)
with open(ask / 'seeds', 'a') as f:
    print(config['seed'], file=f)
(ask / 'allocator').write_text(os.environ.get('MALLOC_MMAP_MAX_', 'as it is'))
while (ask / 'wait-for-three').exists() and len((ask / 'started').read_text().splitlines()) < 3:
    time.sleep(0.02)
last = config['epochs'] + config['warmup_epochs'] - 1
header = True
for epoch in range(first, last + 1):
    if (epoch + 1) % config.get('val_interval', 1) and epoch != last:
        continue
    with open(folder / 'summary.csv', 'a') as f:
        if header:
            print('epoch,train_loss,eval_loss,eval_top1', file=f)
            header = False
        print(f'{epoch},1.5,1.25,{50 + epoch}', file=f)
    shutil.copy(ask / f'checkpoint-{epoch}', folder / 'last.pth.tar')
    if epoch == 1 and (ask / 'hang').exists():
        (ask / 'hang').rename(ask / 'hung')
        time.sleep(600)
"""
RECIPES_MODULES = ['splitmixer_timm', 'splitmixer_timm.randaugment']
NAME = 'splitmixer_i_256_8.cifar10'
OTHER = 'splitmixer_iv_256_8.cifar100'
QUEUE = {
    NAME: dict(recipe='cifar10', args=dict(epochs=2, warmup_epochs=1, lr_cycle_limit=1), seeds=[1, 2]),
    OTHER: dict(recipe='cifar100', args=dict(epochs=2, warmup_epochs=1, lr_cycle_limit=1, lr=0.01)),
}


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """ A queue of two models, a stand-in for train.py, data of an image a class, and a zoo of its own."""
    weights = tmp_path / 'weights'
    weights.mkdir()
    (weights / 'manifest.json').write_text(json.dumps(dict(hf_hub_org='', base_url='', models={})))
    monkeypatch.setattr(manifest, 'WEIGHTS_DIR', weights)
    monkeypatch.setattr(train_zoo, 'POLL_SECONDS', 0.05)
    (tmp_path / 'queue.yaml').write_text(yaml.safe_dump(QUEUE, sort_keys=False))
    scripts = tmp_path / 'scripts'
    scripts.mkdir()
    (scripts / 'train.py').write_text(TRAIN)
    (scripts / 'validate.py').touch()
    state_dict = timm.create_model(NAME).state_dict()
    for epoch in range(3):
        torch.save({'epoch': epoch, 'state_dict': state_dict}, tmp_path / f'checkpoint-{epoch}')
    for dataset, classes in (('cifar10', 10), ('cifar100', 100)):
        for split in ('train', 'validation'):
            make_images(tmp_path / 'data' / dataset / split, range(classes))

    class Zoo:
        path = tmp_path
        command = [
            '--queue', str(tmp_path / 'queue.yaml'), '--scripts', str(scripts), '--data-dir', str(tmp_path / 'data'),
            '--output', str(tmp_path / 'runs'), '--device', 'cpu', '--workers', '1']

        def run(self, *args):
            return train_zoo.main([*self.command, *args])

        def started(self):
            return [line.split() for line in (tmp_path / 'started').read_text().splitlines()]

        def entries(self):
            return json.loads((weights / 'manifest.json').read_text())['models']

    return Zoo()


def end_what_names(path):
    for process in Path('/proc').glob('[0-9]*/cmdline'):
        with suppress(OSError):
            if str(path).encode() in process.read_bytes():
                os.kill(int(process.parent.name), signal.SIGKILL)


def driver_until(name, zoo):
    """ A process that trains `OTHER`, when the file `name` is there."""
    driver = subprocess.Popen([sys.executable, '-m', 'splitmixer_timm.train_zoo', OTHER, *zoo.command])
    while not (zoo.path / name).exists():
        assert driver.poll() is None
        time.sleep(0.05)
    return driver


@pytest.fixture
def validated(monkeypatch):
    """ validate.py answers at once."""
    monkeypatch.setattr(add_run, 'validate', lambda *args: dict(top1=90.5, top5=99.5))


@pytest.fixture
def gpu(monkeypatch):
    """ Every device is here, and a GPU."""
    monkeypatch.setattr(train_zoo, 'device_name', lambda device: 'Great GPU')


@pytest.mark.usefixtures('validated')
def test_trains_and_adds(zoo, monkeypatch):
    assert zoo.run() == 0
    assert zoo.started() == [[f'{NAME}-1', '0.05', '0'], [f'{NAME}-2', '0.05', '0'], [f'{OTHER}-42', '0.01', '0']]
    entries = zoo.entries()
    assert entries.keys() == {NAME, OTHER}
    assert entries[NAME]['metrics']['seeds'] == {'1': 90.5, '2': 90.5}
    assert 'seeds' not in entries[OTHER]['metrics']
    assert entries[OTHER]['dataset'] == 'cifar100'
    precision = 'amp_dtype bfloat16' if has_bfloat16() else 'amp False'
    assert entries[OTHER]['training']['recipe'] == (
        f'cifar100; epochs 2 after 1 of warm-up; lr_cycle_limit 1; lr 0.01; {precision}')
    args = yaml.safe_load((manifest.WEIGHTS_DIR / entries[OTHER]['training']['args']).read_text())
    assert args['model'] == 'splitmixer_iv_256_8.cifar100'
    assert args['data_dir'] == '<DATA_DIR>'
    assert str(zoo.path) not in json.dumps(args)
    assert entries[OTHER]['training']['machine'] == device_name('cpu')
    # again: nothing is trained twice, nor measured
    monkeypatch.setattr(manifest, 'load_manifest', lambda: {'models': entries})
    with monkeypatch.context() as context:
        context.setattr(train_zoo, 'add_runs', None)
        assert zoo.run() == 0
    # but where its file is lost a model is added again
    file = manifest.WEIGHTS_DIR / entries[OTHER]['file']
    file.unlink()
    assert zoo.run(OTHER) == 0
    assert file.is_file()
    assert len(zoo.started()) == 3


@pytest.mark.usefixtures('validated')
def test_folders_that_begin_with_a_dash(zoo, monkeypatch):
    """ They are no options of Python's."""
    monkeypatch.chdir(zoo.path)
    (zoo.path / 'scripts').rename('-scripts')
    assert zoo.run(OTHER, '--scripts', './-scripts', '--output', './-runs') == 0
    assert OTHER in zoo.entries()


@pytest.mark.usefixtures('validated')
def test_epochs_by_the_images(zoo):
    """ timm rounds a cycle to updates: this one has an epoch more than one of a thousand updates an epoch has."""
    args = dict(epochs=2, warmup_epochs=1, lr_cycle_limit=1, lr_cycle_mul=0.9, batch_size=100)
    (zoo.path / 'queue.yaml').write_text(yaml.safe_dump({OTHER: dict(recipe='cifar100', args=args)}))
    assert zoo.run() == 0
    assert zoo.entries()[OTHER]['training']['epochs'] == 3


def test_held_out(zoo, capsys):
    """ Trained and measured on training images alone; the zoo gets nothing, the file one row for each run."""
    for folder in (zoo.path / 'data' / 'cifar100' / 'train').iterdir():
        for number in range(1, 11):
            (folder / f'{number}.png').touch()
    table = zoo.path / 'settings.csv'
    assert zoo.run(OTHER, '--held-out', str(table)) == 0
    assert f'{OTHER}: top-1 52.00 % of the images held out' in capsys.readouterr().out
    assert zoo.entries() == {}
    held_out = zoo.path / 'runs' / 'held_out' / 'cifar100'
    assert runs.read_args(zoo.path / 'runs' / f'{OTHER}-42')['data_dir'] == str(held_out)
    assert {path.name for path in (held_out / 'held_out' / '7').iterdir()} == {'4.png', '9.png'}  # of 0, 1, ... 10
    assert len([*(held_out / 'rest' / '7').iterdir()]) == 9
    row, = csv.DictReader(table.read_text().splitlines())
    assert (row['model'], row['seed'], row['epochs'], row['top1']) == (OTHER, '42', '3', '52.00')
    assert (row['trained_on'], row['images'], row['machine']) == ('900', '200', device_name('cpu'))
    here = 'amp_dtype bfloat16' if has_bfloat16() else 'amp False'
    assert row['recipe'] == f'cifar100; epochs 2 after 1 of warm-up; lr_cycle_limit 1; lr 0.01; {here}'
    # other settings are added, and the same again are no second row; it is no run for the zoo
    queue = {OTHER: QUEUE[OTHER], f'{OTHER}_lr': dict(recipe='cifar100', args=dict(QUEUE[OTHER]['args'], lr=0.02))}
    (zoo.path / 'queue.yaml').write_text(yaml.safe_dump(queue, sort_keys=False))
    assert zoo.run('--held-out', str(table)) == 0
    lines = [row['recipe'].split('; ')[3:] for row in csv.DictReader(table.read_text().splitlines())]
    assert lines == [['lr 0.01', here], ['lr 0.02', here]]
    assert zoo.run(OTHER) == 1
    assert "was trained with train_split 'rest', not train.py's default" in capsys.readouterr().err
    # another file is not written over, which is told before anything is trained
    table.write_text('a,b\n1,2\n')
    with pytest.raises(SystemExit):
        zoo.run('--held-out', str(table))
    assert 'is not a results file' in capsys.readouterr().err
    assert table.read_text() == 'a,b\n1,2\n'


def test_a_class_of_which_none_is_held_out(zoo, capsys):
    """ timm would number the classes that are held out without it, and take each after it for another."""
    for folder in (zoo.path / 'data' / 'cifar100' / 'train').iterdir():
        for number in range(1, 4 if folder.name == '7' else 5):
            (folder / f'{number}.png').touch()
    with pytest.raises(SystemExit):
        zoo.run(OTHER, '--held-out', str(zoo.path / 'settings.csv'))
    assert 'train must have at least 5 images of each class, has fewer of 7\n' in capsys.readouterr().err
    assert not (zoo.path / 'runs').exists()


def test_held_out_by_how_they_were_trained(zoo):
    """ What else differs is a row of its own; it is not in what the queue says beside a recipe."""
    args = QUEUE[OTHER]['args']
    queue = {
        OTHER: dict(recipe='cifar100', args=dict(args, amp=False), seeds=[1, 2]),
        f'{OTHER}_half': dict(recipe='cifar100', args=dict(args, amp_dtype='float16'))}
    (zoo.path / 'queue.yaml').write_text(yaml.safe_dump(queue, sort_keys=False))
    for folder in (zoo.path / 'data' / 'cifar100' / 'train').iterdir():
        for number in range(1, 5):
            (folder / f'{number}.png').touch()
    table = zoo.path / 'settings.csv'
    assert zoo.run('--held-out', str(table)) == 0
    assert zoo.run('--held-out', str(table), f'{OTHER}_half', '--batch-augment', '--output', str(zoo.path / 'new')) == 0
    recipe = 'cifar100; epochs 2 after 1 of warm-up; lr_cycle_limit 1; lr 0.01'
    assert [(row['recipe'], row['seed']) for row in csv.DictReader(table.read_text().splitlines())] == [
        (f'{recipe}; amp False', '1'), (f'{recipe}; amp False', '2'), (recipe, '42'),
        (f'{recipe}; amp_dtype float16; images augmented in batches', '42')]


def test_results_of_two_drivers(tmp_path):
    """ Each adds to what the other has put since."""
    table = tmp_path / 'settings.csv'
    results = [held_out.HeldOutResults(table) for _ in range(2)]
    row = dict.fromkeys(held_out.HeldOutResults.columns, '1')
    for seed in range(4):
        results[seed % 2].put({**row, 'seed': str(seed)})
    assert [key[2] for key in held_out.HeldOutResults(table).rows] == ['0', '1', '2', '3']


@pytest.mark.parametrize('links', [True, False])
def test_images_are_held_out_as_they_are(tmp_path, monkeypatch, links):
    """ Those of one name in two folders of a class are two; those that are links keep their names."""
    train, blobs = tmp_path / 'train', tmp_path / 'blobs'
    blobs.mkdir()
    for part in 'ab':
        (train / part / '0').mkdir(parents=True)
        for number in range(5):
            (train / part / '0' / f'{number}.png').write_text(f'{part}{number}')
            (blobs / f'{part}{number}').write_text(f'linked {part}{number}')
            (train / part / '0' / f'{number}.jpg').symlink_to(Path('../../../blobs') / f'{part}{number}')
    if not links:
        def link(source, target):
            raise PermissionError('no links here')
        monkeypatch.setattr(os, 'link', link)
    held_out.hold_out(train, tmp_path / 'target')
    held_out.hold_out(train, tmp_path / 'target')
    files = {
        split: {str(file.relative_to(tmp_path / 'target' / split)): file.read_text()
                for file in (tmp_path / 'target' / split).rglob('*.*')}
        for split in held_out.SPLITS.values()}
    assert (len(files['rest']), len(files['held_out'])) == (16, 4)
    assert {**files['rest'], **files['held_out']} == {
        f'{part}/0/{number}.{kind}': f'{text}{part}{number}'
        for part in 'ab' for number in range(5) for kind, text in (('png', ''), ('jpg', 'linked '))}
    assert (train / 'a' / '0' / '3.png').read_text() == 'a3'
    assert add_run.count_images(tmp_path / 'target' / 'rest') == 16


def test_held_out_by_another_driver(tmp_path, monkeypatch):
    """ Who comes second takes what the first made meanwhile, and leaves nothing behind."""
    link = os.link

    def other_driver(*args):
        monkeypatch.setattr(os, 'link', link)
        held_out.hold_out(tmp_path / 'train', tmp_path / 'runs' / 'cifar10')
        link(*args)

    make_images(tmp_path / 'train', range(5))
    for folder in (tmp_path / 'train').iterdir():
        for number in range(1, 5):
            (folder / f'{number}.png').touch()
    monkeypatch.setattr(os, 'link', other_driver)
    held_out.hold_out(tmp_path / 'train', tmp_path / 'runs' / 'cifar10')
    assert [path.name for path in (tmp_path / 'runs').iterdir()] == ['cifar10']
    assert add_run.count_images(tmp_path / 'runs' / 'cifar10' / 'rest') == 20


@pytest.mark.parametrize('split', ['train', 'validation'])
def test_classes_are_checked_first(zoo, capsys, split):
    """ Not after days of training."""
    (zoo.path / 'data' / 'cifar100' / split / '7' / '0.png').unlink()
    with pytest.raises(SystemExit):
        zoo.run()
    folder = zoo.path / 'data' / 'cifar100' / split
    assert f'--data-dir: {folder} must have images in 100 class folders' in capsys.readouterr().err
    assert not (zoo.path / 'runs').exists()


@pytest.mark.usefixtures('validated')
def test_one_job_at_a_time(zoo, monkeypatch):
    start, processes = train_zoo.start, []

    def watched(*args):
        assert all(process.poll() is not None for process in processes)
        processes.append(start(*args))
        return processes[-1]

    monkeypatch.setattr(train_zoo, 'start', watched)
    assert zoo.run('--jobs', '1') == 0
    assert len(processes) == 3


@pytest.mark.usefixtures('validated')
def test_another_seed_later(zoo, monkeypatch):
    """ A model that the zoo has is added again when it has more seeds to report."""
    assert zoo.run(OTHER) == 0
    monkeypatch.setattr(manifest, 'load_manifest', lambda: {'models': zoo.entries()})
    (zoo.path / 'queue.yaml').write_text(yaml.safe_dump({OTHER: dict(QUEUE[OTHER], seeds=[42, 43])}))
    assert zoo.run(OTHER) == 0
    assert zoo.entries()[OTHER]['metrics']['seeds'] == {'42': 90.5, '43': 90.5}


@pytest.mark.usefixtures('validated')
def test_hours(zoo):
    """ Those of all parts of a resumed run; none of what was there before a run that begins anew."""
    assert zoo.run(OTHER) == 0
    folder = zoo.path / 'runs' / f'{OTHER}-42'
    shutil.copy(zoo.path / 'checkpoint-1', folder / 'last.pth.tar')
    os.utime(folder / 'args.yaml', (1_000_000, 1_000_000))
    os.utime(folder / 'last.pth.tar', (1_007_200, 1_007_200))
    assert zoo.run(OTHER) == 0
    assert zoo.entries()[OTHER]['training']['hours'] == 2
    for file in folder.glob('*.pth.tar'):
        file.unlink()
    assert zoo.run(OTHER) == 0
    assert zoo.entries()[OTHER]['training']['hours'] == 0


@pytest.mark.usefixtures('validated')
def test_hours_of_a_copy(zoo):
    """ A copy of a run's folder may have lost the times of its files: its hours and its date are in it."""
    assert zoo.run(OTHER) == 0
    folder = zoo.path / 'runs' / f'{OTHER}-42'
    shutil.copy(zoo.path / 'checkpoint-1', folder / 'last.pth.tar')
    train_zoo.note_seconds(folder, (folder / 'last.pth.tar').stat().st_mtime - 7200)
    for name in ('args.yaml', 'last.pth.tar'):
        os.utime(folder / name, (1_000_000, 1_000_000))
    today = datetime.date.today().isoformat()
    assert add_run.training_hours(folder) == 2
    assert add_run.latest_part(folder) == (7200, today)
    assert zoo.run(OTHER) == 0
    training = zoo.entries()[OTHER]['training']
    assert (training['hours'], training['date']) == (2, today)
    # of the part that began now there is no checkpoint yet
    train_zoo.note_seconds(folder, time.time() + 60)
    assert add_run.training_hours(folder) < 2.01


@pytest.mark.usefixtures('validated')
def test_some_of_the_queue(zoo):
    assert zoo.run('*.cifar100') == 0
    assert zoo.entries().keys() == {OTHER}


@pytest.mark.usefixtures('validated')
def test_not_every_epoch_measured(zoo, monkeypatch):
    args = dict(epochs=2, warmup_epochs=1, lr_cycle_limit=1, val_interval=3)
    queue = {NAME: dict(recipe='cifar10', args=args, seeds=[1])}
    (zoo.path / 'queue.yaml').write_text(yaml.safe_dump(queue))
    assert zoo.run() == 0
    entries = zoo.entries()
    assert entries[NAME]['training']['epochs'] == 3
    assert entries[NAME]['training']['recipe'] == (
        'cifar10; epochs 2 after 1 of warm-up; lr_cycle_limit 1; val_interval 3; '
        f'{"amp_dtype bfloat16" if has_bfloat16() else "amp False"}')
    # again: it is seen to be finished
    monkeypatch.setattr(manifest, 'load_manifest', lambda: {'models': entries})
    assert zoo.run() == 0
    assert len(zoo.started()) == 1


@pytest.mark.usefixtures('validated')
def test_several_at_once(zoo):
    """ The entry says that the machine's time was shared."""
    (zoo.path / 'wait-for-three').touch()
    assert zoo.run('--jobs', '9') == 0
    assert len(zoo.started()) == 3
    assert zoo.entries()[OTHER]['training']['machine'] == f'{device_name("cpu")}, shared by up to 3 runs'


@pytest.mark.usefixtures('validated')
def test_batch_augment(zoo):
    """ train.py imports the module, and the entry says so; what began without it can go on with it."""
    assert zoo.run(OTHER) == 0
    assert zoo.run(OTHER, '--batch-augment') == 0
    assert len(zoo.started()) == 1
    shutil.rmtree(zoo.path / 'runs')
    assert zoo.run(OTHER, '--batch-augment') == 0
    training = zoo.entries()[OTHER]['training']
    assert training['recipe'].endswith('; images augmented in batches')
    args = yaml.safe_load((manifest.WEIGHTS_DIR / training['args']).read_text())
    assert args['device_modules'] == [*RECIPES_MODULES, 'splitmixer_timm.batch_augment']


@pytest.mark.usefixtures('validated')
def test_seeds_made_differently(zoo):
    """ The entry says which was made how, not that one was begun so and ended otherwise."""
    (zoo.path / f'fail-{NAME}-2').touch()
    assert zoo.run(NAME) == 1
    (zoo.path / f'fail-{NAME}-2').unlink()
    assert zoo.run(NAME, '--batch-augment') == 0
    part = train_zoo.precision(yaml.safe_load((zoo.path / 'runs' / f'{NAME}-1' / 'args.yaml').read_text()))
    assert zoo.entries()[NAME]['training']['recipe'].endswith(
        f'; seed 1: {part}, seed 2: {part}; images augmented in batches')


@pytest.mark.parametrize('module', [train_zoo.FUSED, train_zoo.GRAPHS])
@pytest.mark.parametrize(('device', 'said'), [('cuda', 'amp_dtype float16; fused kernels'), ('cpu', None)])
def test_fused(zoo, device, said, module):
    """ SplitMixers by the kernels, where they run, and fused AdamW for all."""
    (zoo.path / 'queue.yaml').write_text(yaml.safe_dump(
        {name: dict(recipe='cifar10') for name in (NAME, 'convmixer_256_8.cifar10')}, sort_keys=False))
    ours, baseline = (model.runs[0].config for model in train_zoo.read_queue(
        zoo.path / 'queue.yaml', [], zoo.path / 'runs', zoo.path / 'scripts' / 'train.py', [module],
        data_dir=zoo.path / 'data', device=device, workers=1, **train_zoo.mixed_precision(device)))
    assert ours['device_modules'] == [*RECIPES_MODULES, module]
    assert baseline['device_modules'] == RECIPES_MODULES
    for config in (ours, baseline):
        assert config['opt_kwargs'] == {'filter_bias_and_bn': False, 'fused': True}
    plain, _ = train_zoo.read_queue(
        zoo.path / 'queue.yaml', [], zoo.path / 'runs', zoo.path / 'scripts' / 'train.py', data_dir=zoo.path / 'data',
        device=device, workers=1, **train_zoo.mixed_precision(device))
    assert 'fused' not in plain.runs[0].config['opt_kwargs']
    # gone on with elsewhere, or for another seed, it is the same run
    assert runs.comparable_args(plain.runs[0].config) == runs.comparable_args(ours)
    unfused = train_zoo.precision(baseline)
    assert train_zoo.precision(ours) == (said or unfused)
    assert 'fused' not in unfused


@pytest.mark.usefixtures('validated')
def test_gone_on_with_elsewhere(zoo, monkeypatch):
    """ What each part was made on is kept with the run, and added where that is not."""
    assert zoo.run(OTHER) == 0
    folder = zoo.path / 'runs' / f'{OTHER}-42'
    shutil.copy(zoo.path / 'checkpoint-1', folder / 'last.pth.tar')
    with monkeypatch.context() as patch:
        patch.setattr(train_zoo, 'device_name', lambda device: 'Great GPU')
        assert zoo.run(OTHER) == 0
    (folder / 'args.yaml').write_text((folder / 'args.yaml').read_text().replace('device: cpu', 'device: cuda'))
    model, = train_zoo.read_queue(
        zoo.path / 'queue.yaml', [OTHER], folder.parent, zoo.path / 'scripts' / 'train.py',
        data_dir=zoo.path / 'data', device='cpu', workers=1)
    entry = train_zoo.add(model, zoo.path / 'scripts', zoo.path / 'data', 'cpu')
    assert entry['training']['machine'] == f'{device_name("cpu")} and Great GPU'
    assert (entry['training']['torch'], entry['training']['timm']) == (torch.__version__, timm.__version__)


@pytest.mark.usefixtures('validated')
@pytest.mark.parametrize('kept', [None, b''])
def test_gone_on_with_where_nothing_was_kept(zoo, kept):
    """ What the first part was made on is not guessed; a file that was cut off holds nothing up."""
    assert zoo.run(OTHER) == 0
    folder = zoo.path / 'runs' / f'{OTHER}-42'
    shutil.copy(zoo.path / 'checkpoint-1', folder / 'last.pth.tar')
    (folder / runs.MADE_ON).unlink()
    if kept is not None:
        (folder / runs.MADE_ON).write_bytes(kept)
    assert zoo.run(OTHER) == 0
    machines = [part['machine'] for part in yaml.safe_load((folder / runs.MADE_ON).read_text())]
    assert machines == [*(['an unknown machine'] if kept is None else []), device_name('cpu')]
    (folder / runs.MADE_ON).unlink()
    here = 'amp_dtype bfloat16' if has_bfloat16() else 'amp False'
    assert train_zoo.trained_in(folder) == [here]
    (folder / runs.MADE_ON).write_text('[{machine: A GPU}, {machine: A GPU, precision: amp_dtype float16}]')
    assert train_zoo.trained_in(folder) == [here, 'amp_dtype float16']


@pytest.mark.usefixtures('validated')
@pytest.mark.parametrize(('with_bfloat16', 'queued', 'expected', 'said'), [
    (True, {}, (True, 'bfloat16'), '; amp_dtype bfloat16'),
    (False, {}, (False, None), '; amp False'),
    (False, dict(amp_dtype='bfloat16'), (True, 'bfloat16'), '; amp_dtype bfloat16'),
    (True, dict(amp_dtype='float16'), (True, 'float16'), ''),
    (True, dict(amp=False), (False, 'bfloat16'), '; amp False'),
])
def test_mixed_precision_on_a_cpu(zoo, monkeypatch, with_bfloat16, queued, expected, said):
    """ As it has it, but where the queue says otherwise; the entry says what differs from the recipe's fp16."""
    monkeypatch.setattr(train_zoo, 'has_bfloat16', lambda: with_bfloat16)
    args = {**QUEUE[OTHER]['args'], **queued}
    (zoo.path / 'queue.yaml').write_text(yaml.safe_dump({OTHER: {**QUEUE[OTHER], 'args': args}}, sort_keys=False))
    assert zoo.run() == 0
    training = zoo.entries()[OTHER]['training']
    args = yaml.safe_load((manifest.WEIGHTS_DIR / training['args']).read_text())
    assert (args['amp'], args.get('amp_dtype')) == expected
    assert training['recipe'] == f'cifar100; epochs 2 after 1 of warm-up; lr_cycle_limit 1; lr 0.01{said}'


@pytest.mark.usefixtures('validated', 'gpu')
@pytest.mark.parametrize(('device', 'workers'), [('cpu', 0), ('cuda', 4)])
def test_data_loaders(zoo, device, workers):
    """ On a CPU one that starts between epochs would double the memory that the run keeps."""
    del zoo.command[-2:]  # --workers 1
    assert zoo.run(OTHER, '--device', device) == 0
    assert yaml.safe_load((zoo.path / 'runs' / f'{OTHER}-42' / 'config.yaml').read_text())['workers'] == workers


@pytest.mark.usefixtures('validated', 'gpu')
def test_mixed_precision_is_the_devices(zoo, monkeypatch):
    """ A GPU's is as the recipe says; its run is added on a CPU as what it is, and can be gone on with there."""
    monkeypatch.setattr(train_zoo, 'has_bfloat16', lambda: False)
    assert zoo.run(OTHER, '--device', 'cuda') == 0
    assert zoo.entries()[OTHER]['training']['recipe'].endswith('; lr 0.01')
    shutil.copy(zoo.path / 'checkpoint-1', zoo.path / 'runs' / f'{OTHER}-42' / 'last.pth.tar')
    torch.save({'epoch': 2, 'state_dict': timm.create_model(OTHER).state_dict()}, zoo.path / 'checkpoint-2')
    assert zoo.run(OTHER) == 0
    assert len(zoo.started()) == 2
    assert zoo.entries()[OTHER]['training']['recipe'].endswith('; lr 0.01; amp_dtype float16, then amp False')


@pytest.mark.usefixtures('validated', 'gpu')
@pytest.mark.parametrize('users', [None, '7'])
def test_memory_is_kept_on_a_cpu(zoo, monkeypatch, users):
    """ But where the user has set glibc's allocator otherwise, and not for a GPU."""
    monkeypatch.delenv('MALLOC_MMAP_MAX_', raising=False)
    if users:
        monkeypatch.setenv('MALLOC_MMAP_MAX_', users)
    assert zoo.run(OTHER) == 0
    assert (zoo.path / 'allocator').read_text() == (users or '0')
    shutil.rmtree(zoo.path / 'runs')
    assert zoo.run(OTHER, '--device', 'cuda') == 0
    assert (zoo.path / 'allocator').read_text() == (users or 'as it is')


def test_the_package_is_found():
    """ By train.py and validate.py too, where it is not installed."""
    code = "from importlib.util import find_spec; print(find_spec('splitmixer_timm').origin)"
    without_installed = [sys.executable, '-S', '-c', code]
    done = subprocess.run(without_installed, env=environment(), cwd='/', capture_output=True, text=True)
    assert done.stdout.strip() == str(ROOT / 'splitmixer_timm' / '__init__.py'), done.stderr


@pytest.mark.usefixtures('validated')
def test_told_while_others_are_at_work(zoo):
    """ A failure is told when it happens, and how far the queue is where there is no terminal: the end may be hard."""
    (zoo.path / f'fail-{NAME}-1').touch()
    (zoo.path / 'hang').touch()
    code = (
        'import sys; from splitmixer_timm import train_zoo; train_zoo.REPORT_SECONDS = 0.1; '
        'train_zoo.POLL_SECONDS = 0.05; train_zoo.main(sys.argv[1:])')
    out, err = zoo.path / 'out', zoo.path / 'err'
    with open(out, 'w') as stdout, open(err, 'w') as stderr:
        driver = subprocess.Popen(
            [sys.executable, '-c', code, '--jobs', '3', *zoo.command], env=environment(), stdout=stdout, stderr=stderr)
    try:
        while not (zoo.path / 'hung').exists() or 'epochs, ' not in out.read_text() or not err.read_text():
            assert driver.poll() is None
            time.sleep(0.05)
    finally:
        driver.kill()
        driver.wait()
        end_what_names(zoo.path)
    assert f'{NAME}-1: train.py failed, see {zoo.path}' in err.read_text()
    assert ' of 9 epochs, ' in out.read_text()


@pytest.mark.usefixtures('validated')
def test_interrupted_and_resumed(zoo, monkeypatch):
    """ Interrupted, it leaves no run behind; the next time it goes on after the last checkpoint."""
    (zoo.path / 'hang').touch()
    processes = []

    def start(*args):
        processes.append(original(*args))
        return processes[-1]

    def sleep(seconds):
        if (zoo.path / 'hung').exists():
            raise KeyboardInterrupt
        time.sleep(seconds)

    original = train_zoo.start
    monkeypatch.setattr(train_zoo, 'start', start)
    with monkeypatch.context() as patch:
        patch.setattr(train_zoo, 'sleep', sleep)
        with pytest.raises(KeyboardInterrupt):
            zoo.run(OTHER)
    assert [process.poll() for process in processes] == [-signal.SIGTERM]
    assert not zoo.entries()
    assert zoo.run(OTHER) == 0
    assert zoo.started() == [[f'{OTHER}-42', '0.01', '0'], [f'{OTHER}-42', '0.01', '2']]
    # images and augmentations are not those of the first epochs again; what is published is the run's own seed
    assert (zoo.path / 'seeds').read_text().split() == ['42', '2042']
    assert zoo.entries()[OTHER]['training']['seed'] == 42
    args = yaml.safe_load((manifest.WEIGHTS_DIR / zoo.entries()[OTHER]['training']['args']).read_text())
    assert (args['seed'], args['resume']) == (42, '')
    assert len((zoo.path / 'runs' / f'{OTHER}-42' / add_run.ELAPSED).read_text().splitlines()) == 1
    rows = (manifest.WEIGHTS_DIR / zoo.entries()[OTHER]['training']['summary']).read_text().splitlines()
    assert [row.split(',')[0] for row in rows] == ['epoch', '0', '1', '2']


@pytest.mark.usefixtures('validated')
def test_finished_by_another_driver(zoo, monkeypatch):
    """ While it waited for its turn: it is not begun again, and was not made on this machine."""
    assert zoo.run(NAME) == 0
    folders = [zoo.path / 'runs' / f'{NAME}-{seed}' for seed in (1, 2)]
    kept = (folders[1] / runs.MADE_ON).read_bytes()
    for folder in folders:
        folder.rename(folder.with_name(folder.name + ' kept'))
    start = train_zoo.start

    def other_driver(run, *args):
        process = start(run, *args)
        folders[1].with_name(folders[1].name + ' kept').rename(folders[1])
        return process

    monkeypatch.setattr(train_zoo, 'start', other_driver)
    monkeypatch.setattr(train_zoo, 'device_name', lambda device: 'Another machine')
    assert zoo.run(NAME) == 0
    assert [name for name, *_ in zoo.started()] == [f'{NAME}-1', f'{NAME}-2', f'{NAME}-1']
    assert (folders[1] / runs.MADE_ON).read_bytes() == kept


@pytest.mark.usefixtures('validated')
def test_damaged_log(zoo, capsys):
    """ One run's ends that run alone."""
    folder = zoo.path / 'runs' / f'{NAME}-2'
    folder.mkdir(parents=True)
    (zoo.path / f'fail-{NAME}-2').touch()
    script = zoo.path / 'scripts' / 'train.py'
    end = "sys.exit('cannot go on')"
    assert end in TRAIN
    script.write_text(TRAIN.replace(end, f"(folder / 'summary.csv').write_bytes(b'\\xff\\xfe'); {end}"))
    assert zoo.run() == 1
    assert f'{NAME}-2: train.py failed' in capsys.readouterr().err
    assert zoo.entries().keys() == {OTHER}


def test_hours_where_it_cannot_go_on(zoo, monkeypatch):
    """ No part of a run counts twice, however often starting it fails."""
    model, = train_zoo.read_queue(
        zoo.path / 'queue.yaml', [OTHER], zoo.path / 'runs', zoo.path / 'scripts' / 'train.py',
        data_dir=zoo.path / 'data', device='cpu', workers=1)
    run, = model.runs
    assert train_zoo.start(run, zoo.path / 'scripts', 'Great GPU', 1).wait() == 0
    shutil.copy(zoo.path / 'checkpoint-1', run.folder / 'last.pth.tar')
    os.utime(run.folder / 'args.yaml', (1_000_000, 1_000_000))
    os.utime(run.folder / 'last.pth.tar', (1_007_200, 1_007_200))

    def full(path, content):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as context:
        context.setattr(train_zoo, 'replace_file', full)
        for _ in range(3):
            with pytest.raises(OSError, match='No space left'):
                train_zoo.start(run, zoo.path / 'scripts', 'Great GPU', 1)
    assert add_run.training_hours(run.folder) == 2
    assert train_zoo.start(run, zoo.path / 'scripts', 'Great GPU', 1).wait() == 0
    assert 2 <= add_run.training_hours(run.folder) < 2.1


@pytest.mark.usefixtures('validated')
def test_a_failure_does_not_stop_the_others(zoo, capsys):
    (zoo.path / f'fail-{NAME}-2').touch()
    assert zoo.run() == 1
    assert zoo.entries().keys() == {OTHER}
    log = zoo.path / 'runs' / f'{NAME}-2' / 'train.log'
    assert f'{NAME}-2: train.py failed, see {log}' in capsys.readouterr().err
    assert 'cannot go on' in log.read_text()
    (zoo.path / f'fail-{NAME}-2').unlink()
    assert zoo.run() == 0
    assert zoo.entries().keys() == {NAME, OTHER}


@pytest.mark.usefixtures('validated')
def test_cut_off_before_the_last_checkpoint(zoo, capsys):
    """ The log has every epoch, the checkpoint is of the one before: train.py goes on once more."""
    assert zoo.run(OTHER) == 0
    folder = zoo.path / 'runs' / f'{OTHER}-42'
    shutil.copy(zoo.path / 'checkpoint-1', folder / 'last.pth.tar')
    assert zoo.run(OTHER) == 0
    assert zoo.started()[1] == [f'{OTHER}-42', '0.01', '2']
    # and where train.py ends without an error and without its last epoch, that is told
    shutil.copy(zoo.path / 'checkpoint-1', folder / 'last.pth.tar')
    shutil.copy(zoo.path / 'checkpoint-1', zoo.path / 'checkpoint-2')
    assert zoo.run(OTHER) == 1
    assert f'{OTHER}-42: train.py stopped early, see {folder / "train.log"}' in capsys.readouterr().err


@pytest.mark.usefixtures('validated')
def test_cut_off_while_the_checkpoint_was_written(zoo, capsys):
    """ train.py removes the old one before it renames the new one: the latest that can be read is gone on from."""
    assert zoo.run(OTHER) == 0
    folder = zoo.path / 'runs' / f'{OTHER}-42'
    (folder / 'last.pth.tar').write_bytes(b'damaged')
    shutil.copy(zoo.path / 'checkpoint-0', folder / 'checkpoint-0.pth.tar')
    shutil.copy(zoo.path / 'checkpoint-1', folder / 'tmp.pth.tar')
    before = (folder / 'tmp.pth.tar').stat().st_mtime
    assert train_zoo.last_checkpoint(folder) == folder / 'last.pth.tar'
    assert add_run.checkpoint_epoch(folder / 'last.pth.tar') == 1
    assert (folder / 'last.pth.tar').stat().st_mtime == before
    (folder / 'last.pth.tar').unlink()
    assert zoo.run(OTHER) == 0
    assert zoo.started()[1] == [f'{OTHER}-42', '0.01', '2']
    for file in folder.glob('*.pth.tar'):
        file.write_bytes(b'damaged')
    assert zoo.run(OTHER) == 1
    assert f'{OTHER}-42: not started: no checkpoint can be read: remove {folder}' in capsys.readouterr().err
    assert len((folder / 'summary.csv').read_text().splitlines()) > 3
    # in the middle of the very first nothing is lost
    for file in folder.glob('*.pth.tar'):
        file.unlink()
    (folder / 'tmp.pth.tar').write_bytes(b'damaged')
    assert zoo.run(OTHER) == 0
    assert zoo.started()[-1] == [f'{OTHER}-42', '0.01', '0']


@pytest.mark.usefixtures('validated')
def test_cut_off_while_the_arguments_were_written(zoo):
    """ train.py writes them anew when it resumes; those of the beginning are kept beside."""
    assert zoo.run(OTHER) == 0
    folder = zoo.path / 'runs' / f'{OTHER}-42'
    for _ in range(2):
        shutil.copy(zoo.path / 'checkpoint-1', folder / 'last.pth.tar')
        assert zoo.run(OTHER) == 0
        (folder / 'args.yaml').write_text('model: [')
    assert [run[2] for run in zoo.started()] == ['0', '2', '2']


@pytest.mark.usefixtures('validated')
@pytest.mark.parametrize('finished', [True, False])
@pytest.mark.parametrize(('args', 'message'), [
    (dict(lr=0.02, mixup=0.2), 'lr 0.01, not 0.02'),
    (dict(lr=0.01), "mixup 0.2, not train.py's default"),
])
def test_trained_with_other_arguments(zoo, capsys, finished, args, message):
    """ Neither published as what the queue says now, nor gone on with."""
    mixed = {OTHER: dict(QUEUE[OTHER], args=dict(QUEUE[OTHER]['args'], mixup=0.2))}
    (zoo.path / 'queue.yaml').write_text(yaml.safe_dump(mixed))
    assert zoo.run(OTHER) == 0
    folder = zoo.path / 'runs' / f'{OTHER}-42'
    if not finished:
        shutil.copy(zoo.path / 'checkpoint-1', folder / 'last.pth.tar')
    queue = {OTHER: dict(recipe='cifar100', args=dict(epochs=2, warmup_epochs=1, lr_cycle_limit=1, **args))}
    (zoo.path / 'queue.yaml').write_text(yaml.safe_dump(queue))
    assert zoo.run() == 1
    assert f'{folder} was trained with {message}' in capsys.readouterr().err
    assert len(zoo.started()) == 1


@pytest.mark.skipif(not Path('/proc/self/cmdline').is_file(), reason='finds what it must end in /proc')
def test_a_run_left_behind(zoo, monkeypatch, capsys):
    """ While it is at work no other train.py starts in its folder, whoever started it."""
    monkeypatch.setattr(train_zoo, 'LOCK_SECONDS', 0.3)
    (zoo.path / 'hang').touch()
    driver = driver_until('hung', zoo)
    driver.kill()
    driver.wait()
    try:
        assert zoo.run(OTHER) == 1
        assert f'another train.py is at work in {zoo.path / "runs" / f"{OTHER}-42"}' in capsys.readouterr().err
    finally:
        end_what_names(zoo.path)


def test_ended_from_outside(zoo):
    """ A driver that is told to end takes its runs with it."""
    (zoo.path / 'hang').touch()
    driver = driver_until('hung', zoo)
    driver.terminate()
    assert driver.wait(60) == 128 + signal.SIGTERM
    for process in Path('/proc').glob('[0-9]*/cmdline'):
        with suppress(OSError):
            assert str(zoo.path).encode() not in process.read_bytes()


def test_ended_while_images_are_held_out(zoo, monkeypatch):
    """ What is half held out is removed: a driver that is told to end does so in order from there on."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def hold_out(*args):
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train_zoo, 'hold_out', hold_out)
    try:
        with pytest.raises(SystemExit) as end:
            zoo.run(OTHER, '--held-out', str(zoo.path / 'settings.csv'))
        assert end.value.code == 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)


def test_ended_while_it_measures(zoo):
    """ What is being measured is given up, and not added."""
    (zoo.path / 'scripts' / 'validate.py').write_text(
        f'import pathlib, time; pathlib.Path({str(zoo.path)!r}, "measuring").touch(); time.sleep(600)')
    driver = driver_until('measuring', zoo)
    driver.terminate()
    assert driver.wait(60) == 128 + signal.SIGTERM
    assert not zoo.entries()


def test_what_ends_is_not_deaf():
    """ What is started once the driver was told to end can be told so, too."""
    ended = []

    @train_zoo.ended_tidily()
    def drive():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            process = subprocess.Popen(
                [sys.executable, '-c', 'import time; print(flush=True); time.sleep(600)'], stdout=subprocess.PIPE)
            process.stdout.readline()
            process.terminate()
            ended.append(process.wait(60))
            os.kill(os.getpid(), signal.SIGTERM)  # a second one changes nothing
            ended.append('tidied')

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit):
            drive()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended == [-signal.SIGTERM, 'tidied']


@pytest.mark.parametrize(('change', 'message'), [
    (dict(args=['--jobs', '0']), "--jobs: must be an integer of at least 1, got '0'"),
    (dict(args=['--workers', '-1']), '--workers must be at least 0, got -1'),
    (dict(args=['--cuda-graphs']), '--cuda-graphs needs --fused'),
    (dict(args=['--device', 'cuda:99']), "device 'cuda:99' asked for, but"),
    (dict(args=['--device', 'gpu']), "device must be 'cuda', 'cuda:N', 'cpu' or 'mps', got 'gpu'"),
    (dict(args=['mnist']), "'mnist' is not in the queue"),
    (dict(queue='- a'), "must map each 'arch.tag' to a recipe"),
    (dict(queue='{'), 'cannot be read'),
    (dict(queue=f'{NAME}: {{recipe: mnist}}'), "got 'mnist'"),
    (dict(queue='resnet18.cifar10: {recipe: cifar10}'), "of a model of this package, got 'resnet18.cifar10'"),
    (dict(queue='splitmixer_i_256_8: {recipe: cifar10}'), "must be 'arch.tag'"),
    (dict(queue='splitmixer_i_256_8.a/b: {recipe: cifar10}'), "must be 'arch.tag'"),
    (dict(queue='1: {recipe: cifar10}'), "must be 'arch.tag'"),
    (dict(queue=f'{NAME}: {{recipe: cifar100}}'), 'cifar100 is for the tag cifar100'),
    (dict(queue='splitmixer_i_256_8.flowers102: {recipe: flowers102}'), "(cifar10, cifar100), got 'flowers102'"),
    (dict(queue=f'{NAME}: {{recipe: cifar10, args: {{seed: 5, output: x}}}}'), 'must not have output, seed'),
    (dict(queue=f'{NAME}: {{recipe: cifar10, args: {{gp: max}}}}'), 'its args make it gp max'),
    (dict(queue=f'{NAME}: {{recipe: cifar10, args: {{mean: [0., 0., 0.]}}}}'), 'make it mean [0.0, 0.0, 0.0]'),
    (dict(queue=f'{NAME}: {{recipe: cifar10, args: {{num_classes: 3}}}}'), 'its args make it num_classes 3'),
    (dict(queue=f'{NAME}: {{recipe: cifar10, args: {{class_map: m.txt}}}}'), 'its args make it class_map m.txt'),
    (dict(queue=f'{NAME}: {{recipe: cifar10_relu}}'), "make it model_kwargs {'act_layer': 'relu'}"),
    (dict(queue=f'{NAME}: {{recipe: cifar10, args: {{epoch: 5}}}}'), 'must be arguments of train.py, got epoch'),
    (dict(queue=f'{NAME}: {{recipe: cifar10, args: {{vi: 5}}}}'), 'must be arguments of train.py, got vi'),
    (dict(queue=f'{NAME}: {{recipe: cifar10, seeds: [1, 1]}}'), 'must be a list of different integers, got [1, 1]'),
    (dict(queue=f'{NAME}: {{recipe: cifar10, epochs: 3}}'), 'nothing else'),
    (dict(queue=f'{NAME}: {{recipe: cifar10, args: 3}}'), 'must map arguments of train.py to values, got 3'),
    (dict(queue=f'{NAME}: {{recipe: cifar10, args: {{lr: 1e-3}}}}'), "must be a number, got the text '1e-3'"),
    (dict(queue=f'{NAME}: {{recipe: cifar10, args: {{device_modules: x}}}}'), "must be a list, got 'x'"),
    (dict(queue=f'{NAME}: {{recipe: cifar10, args: {{opt_kwargs: [1]}}}}'), 'must be a mapping, got [1]'),
    (dict(queue=f'{NAME}: {{recipe: cifar10, seeds: 42}}'), 'must be a list of different integers, got 42'),
    (dict(queue=f'{NAME}: {{recipe: cifar10, seeds: []}}'), 'must be a list of different integers, got []'),
    (dict(absent='scripts/validate.py'), 'has no validate.py'),
    (dict(absent='data/cifar100/train'), 'must have image folders cifar100/train'),
])
def test_bad_requests(zoo, capsys, change, message):
    """ Told before anything is trained."""
    if 'queue' in change:
        (zoo.path / 'queue.yaml').write_text(change['queue'])
    if 'absent' in change:
        (zoo.path / change['absent']).rename(zoo.path / 'moved')
    with pytest.raises(SystemExit):
        zoo.run(*change.get('args', []))
    assert message in capsys.readouterr().err
    assert not (zoo.path / 'runs').exists()


@pytest.mark.usefixtures('read_only')
def test_read_only_zoo(zoo, capsys):
    with pytest.raises(SystemExit):
        zoo.run()
    assert f'weights cannot be written to {manifest.WEIGHTS_DIR}: Read-only file system' in capsys.readouterr().err
    assert not (zoo.path / 'runs').exists()


def test_without_matplotlib(zoo, capsys, monkeypatch):
    monkeypatch.setattr('splitmixer_timm.add_run.find_spec', lambda name: None)
    with pytest.raises(SystemExit):
        zoo.run()
    assert "pip install 'splitmixer-timm[bench]'" in capsys.readouterr().err
    assert not (zoo.path / 'runs').exists()


def test_the_zoos_own_queue(tmp_path):
    """ All of it can be read, and what is in it is a model with a recipe of its data set."""
    path = ROOT / 'weights' / 'queue.yaml'
    script = tmp_path / 'train.py'
    script.write_text(' '.join(f"add_argument('--{name}')" for name in yaml.safe_load(DEFAULTS.read_text())))
    models = train_zoo.read_queue(path, [], tmp_path, script, data_dir=tmp_path, device='cpu', workers=1)
    assert {f'{arch}_256_8.{dataset}' for dataset in ('cifar10', 'cifar100') for arch in (
        'splitmixer_i', 'splitmixer_ii', 'splitmixer_iii', 'splitmixer_iv', 'splitmixer_v', 'convmixer')} < {
            model.name for model in models}
    assert len(models[0].runs) == 3
    for model in models:
        tag = model.name.partition('.')[2]
        assert model.dataset == tag.removesuffix('_plus')
        for run in model.runs:
            assert is_model(run.config['model'])
            images = 2040 if model.dataset == 'flowers102' else 50_000
            planned = 300 if tag.endswith('_plus') else 100
            assert add_run.planned_epochs(run.config) == add_run.planned_epochs(run.config, images) == planned


def test_modules_of_the_queue(zoo):
    """ Beside that which registers the models."""
    path, script = zoo.path / 'queue.yaml', zoo.path / 'scripts' / 'train.py'
    path.write_text(yaml.safe_dump({NAME: dict(recipe='cifar10', args=dict(device_modules=['json']))}))
    model, = train_zoo.read_queue(path, [], zoo.path, script, modules=['csv'], data_dir=zoo.path)
    assert model.runs[0].config['device_modules'] == [*RECIPES_MODULES, 'json', 'csv']


def test_planned_epochs_of_a_cycle():
    """ As train.py says it schedules them: timm rounds a cycle down to updates."""
    recipe = yaml.safe_load((runs.RECIPES_DIR / 'cifar100.yaml').read_text())
    args = {**yaml.safe_load(DEFAULTS.read_text()), **recipe, 'lr_cycle_limit': 1}
    assert add_run.planned_epochs(args, 50_000) == 81
    assert add_run.planned_epochs({**args, 'batch_size': 128, 'grad_accum_steps': 4}, 50_000) == 82
    assert add_run.planned_epochs({**args, 'lr_cycle_mul': 1.}, 50_000) == 82


@pytest.mark.skipif(not SCRIPTS, reason="SPLITMIXER_TIMM_SCRIPTS does not name a folder with timm's scripts")
def test_arguments_of_the_real_script(tmp_path):
    """ Each of its arguments may stand in the queue, its other names may not."""
    path, script = tmp_path / 'queue.yaml', Path(SCRIPTS) / 'train.py'
    names = yaml.safe_load(DEFAULTS.read_text()).keys() - train_zoo.OWN_ARGS
    registered = {
        'gp', 'in_chans', 'input_size', 'img_size', 'mean', 'std', 'crop_pct', 'crop_mode', 'interpolation',
        'num_classes', 'class_map'}
    args = {**dict.fromkeys(names, 1), 'device_modules': ['json'], 'opt_kwargs': {}}
    args.update(dict.fromkeys(args.keys() & registered))  # in these a model must be as it is registered
    path.write_text(yaml.safe_dump({NAME: dict(recipe='cifar10', args=args)}))
    train_zoo.read_queue(path, [], tmp_path, script, data_dir=tmp_path)
    for name in ('dr', 'train_steps_per_epoch', 'epoch'):
        path.write_text(yaml.safe_dump({NAME: dict(recipe='cifar10', args={name: 1})}))
        with pytest.raises(ValueError, match=f'must be arguments of train.py, got {name}'):
            train_zoo.read_queue(path, [], tmp_path, script, data_dir=tmp_path)


@pytest.mark.data
@pytest.mark.skipif(not SCRIPTS, reason="SPLITMIXER_TIMM_SCRIPTS does not name a folder with timm's scripts")
def test_with_timms_scripts(zoo, tmp_path):
    """ The real train.py and validate.py, on a few real images."""
    data = tmp_path / 'real'
    real_images('cifar10', data / 'cifar10', 8)
    queue = {NAME: dict(recipe='cifar10', args=dict(
        epochs=1, warmup_epochs=1, lr_cycle_limit=1, batch_size=40, lr=0.001))}
    (tmp_path / 'queue.yaml').write_text(yaml.safe_dump(queue))
    command = [*zoo.command, '--scripts', SCRIPTS, '--data-dir', str(data)]
    assert train_zoo.main(command) == 0
    entry = zoo.entries()[NAME]
    assert entry['metrics']['images'] == 80
    assert 0 <= entry['metrics']['top1'] <= 100
    assert entry['training']['epochs'] == 2
    assert entry['training']['recipe'].endswith('amp_dtype bfloat16' if has_bfloat16() else 'amp False')
    assert runs.RECIPES_DIR.name not in entry['training']['args']
    # held out: of 8 images of a class the fifth
    table = tmp_path / 'settings.csv'
    assert train_zoo.main([*command, '--output', str(tmp_path / 'compared'), '--held-out', str(table)]) == 0
    row, = csv.DictReader(table.read_text().splitlines())
    assert (row['trained_on'], row['images'], row['epochs']) == ('70', '10', '2')
    assert 0 <= float(row['top1']) <= 100
    assert zoo.entries()[NAME] == entry
