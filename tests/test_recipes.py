""" The training recipes: what timm's train.py builds from them is what the paper says. """
import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from conftest import ROOT
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.transforms_factory import create_transform
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from torchvision.transforms import RandAugment

import splitmixer_timm.randaugment  # noqa: F401, as recipes have train.py import it
from splitmixer_timm import cli, manifest, runs

RECIPES = {path.stem: yaml.safe_load(path.read_text()) for path in runs.RECIPES_DIR.glob('*.yaml')}
PLUS = ('cifar10_plus', 'cifar100_plus')
PAPER = [name for name in RECIPES if not name.startswith('in1k') and name not in PLUS]
IMAGENET = [name for name in RECIPES if name.startswith('in1k')]
ABLATIONS = {
    'cifar10_no_spatial_residual': {'model_kwargs': {'spatial_residual': False}},
    'cifar10_channel_residual': {'model_kwargs': {'channel_residual': True}},
    'cifar10_layernorm': {'model_kwargs': {'norm_layer': 'layernorm2d'}},
    'cifar10_relu': {'model_kwargs': {'act_layer': 'relu'}},
    'cifar10_spatial_only': {'model_kwargs': {'channel_mixing': 'none'}},
    'cifar10_channel_only': {'model_kwargs': {'spatial_mixing': 'none'}},
    'cifar10_one_segment': {'model_kwargs': {'alternate_segments': False}},
    'cifar10_no_randaugment': {'aa': None, 'device_modules': ['splitmixer_timm']},
    'cifar10_no_clipping': {'clip_grad': None},
}
# all that train.py has arguments for, where none is given and in the record of a real run
DEFAULTS = yaml.safe_load((ROOT / 'tests' / 'assets' / 'train_defaults.yaml').read_text())
RUN_ARGS = yaml.safe_load((manifest.WEIGHTS_DIR / 'runs' / 'splitmixer_i_256_8.cifar10' / 'args.yaml').read_text())


def build(recipe):
    """ Model and optimizer as train.py makes them."""
    model = timm.create_model(recipe['model'], **recipe.get('model_kwargs', {}), device='meta')
    args = argparse.Namespace(**{**DEFAULTS, **recipe})
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), **args.opt_kwargs)
    return model, optimizer, args


def test_names():
    assert set(RECIPES) == {'cifar10', 'cifar100', 'flowers102', 'food101', 'in1k_1536_20', 'in1k_768_32',
                            'in1k_1024_20_ks9_p14', *PLUS, *ABLATIONS}


@pytest.mark.parametrize('name', RECIPES)
class TestEvery:
    def test_keys_are_train_arguments(self, name):
        assert RECIPES[name].keys() <= DEFAULTS.keys()

    def test_names_the_plugin(self, name):
        """ And what makes its augmentation."""
        is_torchvisions = str(RECIPES[name].get('aa')).startswith('torchvision')
        augment = ['splitmixer_timm.randaugment'] if is_torchvisions else []
        assert RECIPES[name]['device_modules'] == ['splitmixer_timm', *augment]

    def test_kinds_are_those_train_has(self, name):
        """ YAML reads 5e-2 as a string and 1 as no float: every value is of the kind that a real run recorded."""
        for key, value in RECIPES[name].items():
            recorded = RUN_ARGS[key]
            if isinstance(recorded, (bool, str)):
                assert type(value) is type(recorded), key
            elif isinstance(recorded, (int, float)):
                assert isinstance(value, (int, float)), key
                assert not isinstance(value, bool), key

    def test_builds(self, name):
        model, optimizer, args = build(RECIPES[name])
        assert model.num_classes == timm.get_pretrained_cfg(args.model).num_classes
        assert sum(len(group['params']) for group in optimizer.param_groups) == len(list(model.parameters()))
        _, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=97)
        assert epochs == (100 if name in PAPER else 300 if name in (*PLUS, 'in1k_768_32') else 150)


@pytest.mark.parametrize('name', PAPER)
class TestPaper:
    def test_optimizer(self, name):
        _, optimizer, args = build(RECIPES[name])
        lr, decay, batch = {'flowers102': (0.03, 0.1, 64), 'food101': (0.01, 0.005, 64)}.get(name, (0.05, 0.005, 512))
        assert isinstance(optimizer, torch.optim.AdamW)
        assert [(g['lr'], g['weight_decay']) for g in optimizer.param_groups] == [(lr, decay)]
        assert (optimizer.defaults['betas'], optimizer.defaults['eps']) == ((0.9, 0.999), 1e-8)
        assert (args.batch_size, args.amp, args.channels_last, args.smoothing) == (batch, True, True, 0.)
        assert not any(getattr(args, key) for key in ('mixup', 'cutmix', 'reprob', 'drop', 'drop_path', 'model_ema'))
        assert RECIPES[name].get('clip_grad') == (None if name == 'cifar10_no_clipping' else 1.)

    @pytest.mark.parametrize('updates', [16, 97])
    def test_learning_rate_step_by_step(self, name, updates):
        """ The authors' piecewise-linear curve: 0, max at 2/5, max / 20 at 4/5, 0 at the end."""
        _, optimizer, args = build(RECIPES[name])
        scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=updates)
        total = epochs * updates
        worst = 0.
        for step in range(total):
            scheduler.step_update(num_updates=step)
            t = 100 * step / total
            if t <= 40:
                expected = t / 40
            elif t <= 80:
                expected = 1 - 0.95 * (t - 40) / 40
            else:
                expected = 0.05 * (100 - t) / 20
            difference = abs(optimizer.param_groups[0]['lr'] / args.lr - expected)
            assert difference < (0.0451 if 80 <= t <= 82.01 else 0.003), f'epoch {t}'
            if t <= 40:
                worst = max(worst, difference)
        assert worst < 1e-9
        assert optimizer.param_groups[0]['lr'] < 1e-3 * args.lr

    def test_transform(self, name):
        """ Flips and RandAugment alone; a whole image stays whole."""
        args = build(RECIPES[name])[2]
        size = timm.get_pretrained_cfg(args.model).input_size
        kwargs = dict(
            is_training=True, scale=args.scale, ratio=args.ratio, hflip=args.hflip, color_jitter=args.color_jitter,
            interpolation=args.train_interpolation)
        transforms = create_transform(size, auto_augment=RECIPES[name].get('aa'), **kwargs).transforms
        kinds = {type(t).__name__: t for t in transforms}
        if name == 'cifar10_no_randaugment':
            assert 'RandAugment' not in kinds
        else:
            assert repr(kinds['RandAugment']) == repr(RandAugment(num_ops=2, magnitude=12, num_magnitude_bins=31))
        if 'ColorJitter' in kinds:
            assert kinds['ColorJitter'].brightness is kinds['ColorJitter'].saturation is None  # changes nothing
        assert args.hflip == 0.5
        assert args.train_interpolation == ('bilinear' if name in ('flowers102', 'food101') else 'nearest')
        corners = Image.new('RGB', (size[2], size[1]))
        corners.putpixel((0, 0), (255, 0, 0))
        for _ in range(5):
            out = create_transform(size, **kwargs, mean=(0., 0., 0.), std=(1., 1., 1.))(corners)
            assert max(out[0, 0, 0], out[0, 0, -1]) == 1


@pytest.mark.parametrize('name', PLUS)
def test_plus(name):
    """ The paper's network and RandAugment; no step of the learning rate is a jump."""
    recipe, base = RECIPES[name], RECIPES[name.removesuffix('_plus')]
    for key in ('model', 'model_kwargs', 'dataset', 'aa'):
        assert recipe.get(key) == base.get(key)
    _, optimizer, args = build(recipe)
    expected = dict(
        batch_size=512, clip_grad=1., model_ema=True, model_ema_decay=0.999, hflip=0.5, scale=[0.75, 1.],
        ratio=[0.9, 1.1111], color_jitter=0., train_interpolation='bicubic', reprob=0.25, mixup=0.2, cutmix=1.,
        mixup_prob=0.5, smoothing=0.1)
    assert {key: getattr(args, key) for key in expected} == expected
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [(g['lr'], g['weight_decay']) for g in optimizer.param_groups] == [(0.02, 0.0125)]
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=97)
    rates = [0.]
    for step in range(epochs * 97):
        scheduler.step_update(num_updates=step)
        rates.append(optimizer.param_groups[0]['lr'])
        assert abs(rates[-1] - rates[-2]) < 1e-3 * args.lr
    assert max(rates) == rates[30 * 97 + 1] == args.lr
    assert rates[-1] < 1e-4 * args.lr


@pytest.mark.parametrize('name', IMAGENET)
def test_imagenet(name):
    """ ConvMixer's published recipe; biases and norms are not decayed."""
    _, optimizer, args = build(RECIPES[name])
    expected = dict(
        batch_size=64, clip_grad=1., amp=True, channels_last=True, aa='rand-m9-mstd0.5-inc1', mixup=0.5, cutmix=0.5,
        reprob=0.25, remode='pixel', smoothing=0.1)
    assert {key: getattr(args, key) for key in expected} == expected
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [(g['lr'], g['weight_decay'], g['eps']) for g in optimizer.param_groups] == [
        (0.01, 0., 1e-3), (0.01, 2e-5, 1e-3)]


@pytest.mark.parametrize('name', ABLATIONS)
def test_ablation_differs_in_one_thing(name):
    base, ablation = RECIPES['cifar10'], RECIPES[name]
    changed = {k: ablation.get(k) for k in base.keys() | ablation.keys() if base.get(k) != ablation.get(k)}
    assert changed == ABLATIONS[name]


def test_timms_randaugment_at_that_strength():
    """ What README sets beside torchvision's: always applied, 0.4 of the greatest strength, as bin 12 of 30 is."""
    aa = 'rand-m4-n2-p1.0-mstd0-inc1'
    transform = rand_augment_transform(aa, {'img_mean': (1, 2, 3)})
    assert transform.num_layers == 2
    assert {op.prob for op in transform.ops} == {1.}
    assert {op.magnitude for op in transform.ops} == {4}
    assert {op.magnitude_std for op in transform.ops} == {0}
    theirs = RandAugment(num_ops=2, magnitude=12, num_magnitude_bins=31)._augmentation_space(31, (32, 32))
    ours = {op.name: op.level_fn(op.magnitude, {}) if op.level_fn else () for op in transform.ops}
    # level of ours, and of torchvision's in the same units
    for name in ('Rotate', 'ShearX', 'ShearY'):
        assert abs(ours[name][0]) == pytest.approx(theirs[name][0][12].item(), abs=1e-6)
    for name, torchvisions in (('ColorIncreasing', 'Color'), ('BrightnessIncreasing', 'Brightness'),
                               ('ContrastIncreasing', 'Contrast'), ('SharpnessIncreasing', 'Sharpness')):
        assert abs(ours[name][0] - 1) == pytest.approx(theirs[torchvisions][0][12].item(), abs=1e-6)
    # the differences
    assert {'Invert', 'SolarizeAdd'} <= {op.name for op in transform.ops}
    assert 'Identity' not in ours
    assert 'Identity' in theirs
    assert (ours['PosterizeIncreasing'][0], theirs['Posterize'][0][12]) == (3, 6)
    assert {op.kwargs['fillcolor'] for op in transform.ops} == {(1, 2, 3)}
    assert RandAugment().fill is None
    interpolation = RECIPES['flowers102']['train_interpolation']
    augment, = (
        t for t in create_transform(32, is_training=True, auto_augment=aa, interpolation=interpolation).transforms
        if type(t).__name__ == 'RandAugment')
    assert {op.kwargs['resample'] for op in augment.ops} == {Image.Resampling.BILINEAR}
    assert RandAugment().interpolation.value == 'nearest'


class TestCommand:
    def test_list(self, capsys):
        assert cli.main(['recipe']) == 0
        assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == set(RECIPES)

    def test_path(self, capsys):
        assert cli.main(['recipe', 'cifar10']) == 0
        assert Path(capsys.readouterr().out.strip()).read_text().startswith('# CIFAR-10')

    def test_copy(self, capsys, tmp_path):
        assert cli.main(['recipe', 'cifar10', '--copy', str(tmp_path)]) == 0
        copied = Path(capsys.readouterr().out.strip())
        assert copied == tmp_path / 'cifar10.yaml'
        assert yaml.safe_load(copied.read_text()) == RECIPES['cifar10']
        copied.write_text('mine')
        assert cli.main(['recipe', 'cifar10', '--copy', str(tmp_path)]) == 2
        assert copied.read_text() == 'mine'
        assert 'cannot write' in capsys.readouterr().err

    def test_copy_to_a_full_disk(self, capsys, tmp_path):
        """ Nothing is left of it, which the next attempt would find in its way."""
        resource = pytest.importorskip('resource')
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            assert cli.main(['recipe', 'cifar10', '--copy', str(tmp_path)]) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert capsys.readouterr().err.startswith(f'splitmixer-timm: error: cannot write {tmp_path / "cifar10.yaml"}: ')
        assert list(tmp_path.iterdir()) == []

    def test_copy_into_a_folder_that_is_not_there(self, capsys, tmp_path):
        assert cli.main(['recipe', 'cifar10', '--copy', f'{tmp_path}/new/']) == 2
        assert f'cannot write into {tmp_path}/new/: no such folder' in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

    def test_copy_of_none(self, capsys, tmp_path):
        assert cli.main(['recipe', '--copy', str(tmp_path)]) == 2
        assert '--copy needs the NAME of a recipe: one of' in capsys.readouterr().err

    def test_unknown(self, capsys):
        assert cli.main(['recipe', 'mnist']) == 2
        assert 'cifar100' in capsys.readouterr().err


SCRIPTS = os.environ.get('SPLITMIXER_TIMM_SCRIPTS')


@pytest.mark.data
@pytest.mark.skipif(not SCRIPTS, reason="SPLITMIXER_TIMM_SCRIPTS does not name a folder with timm's train.py")
@pytest.mark.parametrize('name', RECIPES)
def test_train_parses_it(name):
    """ The real parser takes every recipe, and knows every key of it."""
    code = (
        'import sys, yaml; sys.path.insert(0, sys.argv.pop(1)); import train; args, _ = train._parse_args(); '
        'known = {a.dest for a in train.parser._actions}; '
        'print(yaml.safe_load(open(sys.argv[2])).keys() - known)')
    done = subprocess.run(
        [sys.executable, '-c', code, SCRIPTS, '--config', runs.RECIPES_DIR / f'{name}.yaml'],
        capture_output=True, text=True)
    assert done.stdout == 'set()\n', done.stderr


@pytest.mark.data
@pytest.mark.skipif(not SCRIPTS, reason="SPLITMIXER_TIMM_SCRIPTS does not name a folder with timm's train.py")
def test_defaults_are_trains():
    code = (
        'import sys, yaml; sys.path.insert(0, sys.argv[1]); import train; '
        'print(yaml.safe_dump(vars(train.parser.parse_args([]))))')
    done = subprocess.run([sys.executable, '-c', code, SCRIPTS], capture_output=True, text=True)
    assert yaml.safe_load(done.stdout) == DEFAULTS, done.stderr
