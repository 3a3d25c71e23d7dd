""" Training by others' means: DistributedDataParallel, and timm's own scripts where they are at hand.

timm's package does not ship its scripts: SPLITMIXER_TIMM_SCRIPTS names a folder that has them.
"""
import copy
import csv
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import timm
import torch
import torch.multiprocessing
from conftest import BASELINES, ROOT, SPLITMIXERS, real_images
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

SCRIPTS = os.environ.get('SPLITMIXER_TIMM_SCRIPTS')
RECIPE = ROOT / 'splitmixer_timm' / 'recipes' / 'cifar10.yaml'
CPU = ('--device', 'cpu', '--workers', '1', '--no-prefetcher')
WORLD = 2


def narrow(name):
    """ The variant cut to two blocks, with images of 4 x 4 patches for both processes."""
    patch = timm.get_pretrained_cfg(name).input_size[1] // timm.get_pretrained_cfg(name).pool_size[0]
    torch.manual_seed(0)
    model = timm.create_model(name, depth=2, num_classes=3)
    return model, torch.randn(2 * WORLD, 3, 4 * patch, 4 * patch), torch.tensor([0, 1, 2, 0])


def gradients(model, x, target):
    model.zero_grad()
    torch.nn.functional.cross_entropy(model(x), target).backward()
    return [p.grad for p in model.parameters()]


def train_distributed(rank, names, rendezvous, failures):
    torch.set_num_threads(1)
    distributed.init_process_group('gloo', init_method=f'file://{rendezvous}', rank=rank, world_size=WORLD)
    for name in names:
        model, x, target = narrow(name)
        mine = slice(rank, None, WORLD)
        # statistics of the joint batch need synchronised BatchNorm and so a GPU: without one, with statistics fixed
        model.eval()
        expected = [g.clone() for g in gradients(model, x, target)]
        parallel = DistributedDataParallel(model)
        actual = gradients(parallel, x[mine], target[mine])
        if not all(torch.allclose(a, e, rtol=1e-3, atol=1e-5) for a, e in zip(actual, expected)):
            failures.put(f'{name}: gradients differ from those of the joint batch')
        # in train mode a parameter left out of a step makes the next forward raise
        parallel.train()
        optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-3)
        for _ in range(2):
            if any(g is None for g in gradients(parallel, x[mine], target[mine])):
                failures.put(f'{name}: a parameter has no gradient')
            optimizer.step()
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        others = [torch.empty_like(weights) for _ in range(WORLD)]
        distributed.all_gather(others, weights)
        if not torch.equal(*others):
            failures.put(f'{name}: the processes have different weights')
    distributed.destroy_process_group()


def test_distributed_data_parallel(tmp_path):
    """ Two processes train every variant; their gradients are those of one process on the joint batch."""
    failures = torch.multiprocessing.get_context('spawn').SimpleQueue()
    names = [*SPLITMIXERS, *BASELINES]
    torch.multiprocessing.spawn(train_distributed, (names, tmp_path / 'rendezvous', failures), nprocs=WORLD)
    found = []
    while not failures.empty():
        found.append(failures.get())
    assert not found


def synchronise(rank, names, rendezvous, failures):
    device = torch.device('cuda', rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    # NCCL refuses two processes on one GPU
    distributed.init_process_group('gloo', init_method=f'file://{rendezvous}', rank=rank, world_size=WORLD)
    torch.backends.cudnn.conv.fp32_precision = 'ieee'
    for name in names:
        model, x, target = narrow(name)
        model, x, target = model.to(device).train(), x.to(device), target.to(device)
        synchronised = torch.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
        expected = gradients(model, x, target)
        mine = slice(rank, None, WORLD)
        parallel = DistributedDataParallel(synchronised, device_ids=[device.index])
        actual = gradients(parallel, x[mine], target[mine])
        if not all(torch.allclose(a, e, rtol=1e-2, atol=1e-4) for a, e in zip(actual, expected)):
            failures.put(f'{name}: gradients differ from those of the joint batch')
        buffers = zip(model.buffers(), synchronised.buffers())
        if not all(torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-5) for a, b in buffers):
            failures.put(f'{name}: running statistics differ from those of the joint batch')
    distributed.destroy_process_group()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA')
def test_synchronised_batchnorm_on_gpu(tmp_path):
    """ Two processes train as one does on the joint batch, its statistics included."""
    failures = torch.multiprocessing.get_context('spawn').SimpleQueue()
    names = [f'splitmixer_{kind}_256_8' for kind in ('i', 'ii', 'iii', 'iv', 'v', '3d')]
    torch.multiprocessing.spawn(synchronise, (names, tmp_path / 'rendezvous', failures), nprocs=WORLD)
    found = []
    while not failures.empty():
        found.append(failures.get())
    assert not found


def run(*args):
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, env=env)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """ A few real images of each class of CIFAR-10, in folders."""
    if not SCRIPTS:
        pytest.skip("SPLITMIXER_TIMM_SCRIPTS does not name a folder with timm's scripts")
    return real_images('cifar10', tmp_path_factory.mktemp('cifar10'), 16)


@pytest.mark.data
class TestTimmScripts:
    def test_validate(self, folders):
        done = run(
            '-m', 'splitmixer_timm.run', os.path.join(SCRIPTS, 'validate.py'), '--model', 'splitmixer_i_256_8',
            '--pretrained', '--data-dir', folders, *CPU, '--batch-size', 32)
        assert done.returncode == 0, done.stderr
        assert '"top1"' in done.stdout

    @pytest.mark.parametrize('kind', ['ii', 'iv'])
    def test_train_with_a_recipe(self, folders, tmp_path, kind):
        """ train.py alone, without our launcher: the recipe names the plugin."""
        done = run(
            os.path.join(SCRIPTS, 'train.py'), '--config', RECIPE, '--dataset', '', '--data-dir', folders, *CPU,
            '--model', f'splitmixer_{kind}_256_8', '--model-kwargs', 'depth=2', 'dim=32', '--batch-size', 32,
            '--amp-dtype', 'bfloat16', '--epochs', 1, '--warmup-epochs', 1, '--lr-cycle-limit', 1,
            '--output', tmp_path, '--experiment', 'run')
        assert done.returncode == 0, done.stderr
        assert (tmp_path / 'run' / 'last.pth.tar').is_file()
        assert len((tmp_path / 'run' / 'summary.csv').read_text().splitlines()) == 3

    @pytest.mark.skipif(
        torch.multiprocessing.get_start_method() != 'fork', reason='data loaders would not see what is put in place')
    def test_train_by_batches(self, folders, tmp_path):
        """ Crops, RandAugment and flips of whole batches, in data loaders' processes, before Mixup and CutMix."""
        modules = 'splitmixer_timm', 'splitmixer_timm.randaugment', 'splitmixer_timm.batch_augment'
        seen = """
import runpy, sys
from splitmixer_timm import batch_augment
script, place = sys.argv.pop(1), sys.argv.pop(1)
augment = batch_augment.augment
def told(images, steps):
    with open(place, 'a') as f:
        print(*images.shape, file=f)
    return augment(images, steps)
batch_augment.augment = told
runpy.run_path(script, run_name='__main__')
"""
        done = run(
            '-c', seen, os.path.join(SCRIPTS, 'train.py'), tmp_path / 'seen',
            '--config', RECIPE.with_stem('cifar10_plus'), '--dataset', '', '--data-dir', folders, '--device', 'cpu',
            '--model-kwargs', 'depth=2', 'dim=32', '--batch-size', 32, '--workers', 2, '--amp-dtype', 'bfloat16',
            '--epochs', 1, '--warmup-epochs', 1, '--device-modules', *modules,
            '--output', tmp_path, '--experiment', 'run')
        assert done.returncode == 0, done.stderr
        assert set((tmp_path / 'seen').read_text().splitlines()) == {'32 3 32 32'}
        assert len((tmp_path / 'run' / 'summary.csv').read_text().splitlines()) == 3

    def test_fine_tune(self, folders, tmp_path):
        """ README's command, on a CPU: without a recipe, from pretrained weights, for another number of classes."""
        readme = (ROOT / 'README.md').read_text(encoding='utf-8')
        command = re.search(r'python (train\.py --device-modules splitmixer_timm .*?--epochs) 20', readme, re.DOTALL)[1]
        script, *args = shlex.split(command.replace('\\\n', ' ').replace('--data-dir DATA', f'--data-dir {folders}'))
        done = run(
            os.path.join(SCRIPTS, script), *args, 1, '--num-classes', 10, *CPU, '--batch-size', 80,
            '--warmup-epochs', 0, '--output', tmp_path, '--experiment', 'run')
        assert done.returncode == 0, done.stderr
        assert 'Loading pretrained weights from' in done.stderr
        assert (tmp_path / 'run' / 'last.pth.tar').is_file()

    @pytest.mark.cuda
    @pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA')
    @pytest.mark.parametrize('modules', [
        [], ['splitmixer_timm.train_fused'], ['splitmixer_timm.train_graphs']], ids=['plain', 'fused', 'graphs'])
    def test_train_under_torchrun_on_gpu(self, folders, tmp_path, modules):
        """ As on many GPUs: a process for each, the models wrapped in DistributedDataParallel."""
        done = run(
            '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', torch.cuda.device_count(),
            os.path.join(SCRIPTS, 'train.py'), '--config', RECIPE, '--dataset', '', '--data-dir', folders,
            '--workers', 1, '--batch-size', 32, '--sync-bn', '--epochs', 1, '--warmup-epochs', 1,
            '--lr-cycle-limit', 1, '--device-modules', 'splitmixer_timm', 'splitmixer_timm.randaugment', *modules,
            '--output', tmp_path, '--experiment', 'run')
        assert done.returncode == 0, done.stderr
        assert len((tmp_path / 'run' / 'summary.csv').read_text().splitlines()) == 3

    def test_average_and_export(self, folders, tmp_path):
        """ timm's scripts that read what train.py left, by our launcher where they create a model."""
        for script in ('avg_checkpoints.py', 'onnx_export.py'):
            if not os.path.isfile(os.path.join(SCRIPTS, script)):
                pytest.skip(f'SPLITMIXER_TIMM_SCRIPTS has no {script}')
        done = run(
            os.path.join(SCRIPTS, 'train.py'), '--config', RECIPE, '--dataset', '', '--data-dir', folders, *CPU,
            '--batch-size', 80, '--amp-dtype', 'bfloat16', '--epochs', 1, '--warmup-epochs', 1, '--lr-cycle-limit', 1,
            '--checkpoint-hist', 2, '--model-kwargs', 'depth=1', '--output', tmp_path, '--experiment', 'run')
        assert done.returncode == 0, done.stderr
        average = tmp_path / 'average.pth'
        done = run(
            os.path.join(SCRIPTS, 'avg_checkpoints.py'), '--input', tmp_path / 'run', '--output', average,
            '--filter', 'checkpoint-*.pth.tar')
        assert done.returncode == 0, done.stderr
        model = timm.create_model('splitmixer_i_256_8', depth=1, checkpoint_path=str(average))
        parts = [torch.load(path, weights_only=False)['state_dict']['head.weight']
                 for path in (tmp_path / 'run').glob('checkpoint-*.pth.tar')]
        torch.testing.assert_close(model.head.weight.detach(), torch.stack(parts).mean(0))
        done = run(
            '-m', 'splitmixer_timm.run', os.path.join(SCRIPTS, 'onnx_export.py'), tmp_path / 'model.onnx',
            '--model', 'splitmixer_iv_256_8.cifar10', '--reparam')
        assert done.returncode == 0, done.stderr
        assert (tmp_path / 'model.onnx').is_file()

    def test_killed_and_resumed(self, folders, tmp_path):
        """ A run that is killed and resumed ends as one that was not: learning rate, epoch, weights, optimizer, EMA.

        The whole training set is one batch without augmentation, so that nothing depends on the order of images.
        """
        command = [
            sys.executable, os.path.join(SCRIPTS, 'train.py'), '--config', str(RECIPE), '--dataset', '',
            '--data-dir', str(folders), *CPU, '--model-kwargs', 'depth=2', 'dim=16', '--no-aug', '--batch-size', '160',
            '--amp-dtype', 'bfloat16', '--epochs', '4', '--warmup-epochs', '2', '--lr-cycle-limit', '1', '--lr', '1e-3',
            '--model-ema', '--model-ema-decay', '0.9', '--checkpoint-hist', '9', '--output', str(tmp_path)]
        env = {**os.environ, 'PYTHONPATH': str(ROOT)}
        subprocess.run([*command, '--experiment', 'whole'], check=True, capture_output=True, env=env)

        process = subprocess.Popen(
            [*command, '--experiment', 'cut'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
        deadline = time.monotonic() + 300
        while not (tmp_path / 'cut' / 'checkpoint-2.pth.tar').is_file():
            assert process.poll() is None, 'the run ended before it could be killed'
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        last = str(tmp_path / 'cut' / 'last.pth.tar')
        subprocess.run(
            [*command, '--experiment', 'resumed', '--resume', last], check=True, capture_output=True, env=env)

        def rows(experiment):
            with open(tmp_path / experiment / 'summary.csv') as f:
                return [(row['epoch'], float(row['lr'])) for row in csv.DictReader(f)]

        assert len(rows('whole')) == 6
        assert 0 < len(rows('resumed')) < 6
        assert rows('whole')[-len(rows('resumed')):] == rows('resumed')
        whole, resumed = (
            torch.load(tmp_path / name / 'last.pth.tar', weights_only=False) for name in ('whole', 'resumed'))
        assert whole['epoch'] == resumed['epoch'] == 5
        for key in ('state_dict', 'state_dict_ema'):
            torch.testing.assert_close(resumed[key], whole[key], rtol=1e-2, atol=1e-3)
        groups, resumed_groups = whole['optimizer']['param_groups'], resumed['optimizer']['param_groups']
        assert groups == resumed_groups
        for index, state in whole['optimizer']['state'].items():
            assert resumed['optimizer']['state'][index]['step'] == state['step'] == 6
