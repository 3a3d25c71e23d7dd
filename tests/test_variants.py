""" The table of variants, its default configs and what timm's registry makes of them. """
import os
import pickle
import re
import subprocess
import sys

import pytest
import timm
import torch
from conftest import BASELINES, SPLITMIXERS, real_images
from timm.data import ImageNetInfo, resolve_data_config
from timm.models import generate_default_cfgs, get_arch_pretrained_cfgs, get_pretrained_cfg

from splitmixer_timm import convmixer, manifest, splitmixer

NAMES = {
    *(f'splitmixer_{kind}_256_8{size}' for kind in ('i', 'ii', 'iii', 'iv', 'v', '3d') for size in ('', '_ks7_p7')),
    *(f'splitmixer_{kind}_{size}' for kind in ('i', 'ii', 'iii', 'iv') for size in (
        '1536_20', '768_32', '1024_20_ks9_p14')),
}
ALL_TAGS = [name for arch in [*SPLITMIXERS, *BASELINES] for name in get_arch_pretrained_cfgs(arch)]


def test_names():
    assert set(SPLITMIXERS) == NAMES == set(splitmixer.VARIANTS)
    assert set(timm.list_models('convmixer_256_8*')) == set(BASELINES) == set(convmixer.VARIANTS)
    assert set(timm.list_models(module='splitmixer')) == NAMES
    assert 'splitmixer' in timm.list_modules()


@pytest.mark.parametrize('name', sorted(NAMES))
def test_entry_point_is_a_function_of_its_module(name):
    entry_point = getattr(splitmixer, name)
    assert entry_point is timm.models.model_entrypoint(name)
    assert entry_point.__name__ == name
    assert entry_point.__module__ == 'splitmixer_timm.splitmixer'
    assert pickle.loads(pickle.dumps(entry_point)) is entry_point


@pytest.mark.parametrize('name', [*SPLITMIXERS, *BASELINES])
def test_architecture_is_what_the_name_says(name):
    dim, depth, kernel, patch = re.search(r'_(\d+)_(\d+)(?:_ks(\d+))?(?:_p(\d+))?$', name).groups()
    unsaid_kernel, unsaid_patch = {'1536': (9, 7), '768': (7, 7)}.get(dim, (5, 2))
    kernel, patch = int(kernel or unsaid_kernel), int(patch or unsaid_patch)
    model = timm.create_model(name, device='meta')
    assert (model.num_features, len(model.blocks)) == (int(dim), int(depth))
    assert model.stem[0].kernel_size == model.stem[0].stride == (patch, patch)
    kernels = {m.kernel_size for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.groups > 1}
    assert kernels == ({(kernel, kernel)} if name.startswith('convmixer') else {(1, kernel), (kernel, 1)})
    acts = {layer for layer in (torch.nn.GELU, torch.nn.ReLU) if any(isinstance(m, layer) for m in model.modules())}
    assert acts == ({torch.nn.ReLU} if dim == '768' else {torch.nn.GELU})


@pytest.mark.parametrize('name', [*SPLITMIXERS, *BASELINES])
def test_tags(name):
    """ Each architecture has the tags of its size, and the first of them is the default."""
    tags = ['cifar10', 'cifar100'] if name.endswith('_256_8') else \
        ['flowers102', 'food101'] if '_256_8_' in name else ['in1k']
    assert set(tags) <= {tagged.partition('.')[2] for tagged in get_arch_pretrained_cfgs(name)}
    assert get_pretrained_cfg(name).tag == tags[0]


@pytest.mark.parametrize('name', ALL_TAGS)
def test_default_cfg_is_complete(name):
    cfg = get_pretrained_cfg(name)
    model = timm.create_model(name, device='meta')
    size = cfg.input_size
    assert cfg.architecture == name.partition('.')[0]
    assert cfg.num_classes == len(cfg.label_names) == model.num_classes
    assert cfg.pool_size == tuple(model.forward_features(torch.empty(1, *size, device='meta')).shape[2:])
    assert model.get_submodule(cfg.first_conv).in_channels == size[0]
    assert model.get_submodule(cfg.classifier).out_features == cfg.num_classes
    assert cfg.license == 'apache-2.0'
    paper = '2207.10255' if cfg.architecture.startswith('splitmixer') else '2201.09792'
    assert cfg.origin_url == f'https://arxiv.org/abs/{paper}'
    assert cfg.paper_ids == f'arXiv:{paper}'
    assert cfg.paper_name
    config = resolve_data_config(pretrained_cfg=cfg.to_dict())
    assert config['input_size'] == size
    assert config['crop_pct'] == cfg.crop_pct


@pytest.mark.parametrize(('name', 'size', 'mean', 'std', 'crop'), [
    ('splitmixer_i_256_8.cifar10', 32, (.4914, .4822, .4465), (.2023, .1994, .2010), (1., 'center', 'bicubic')),
    ('splitmixer_i_256_8.cifar100', 32, (.5071, .4867, .4408), (.2675, .2565, .2761), (1., 'center', 'bicubic')),
    ('splitmixer_i_256_8_ks7_p7.flowers102', 224, (.507, .487, .441), (.267, .256, .276), (1., 'squash', 'bilinear')),
    ('splitmixer_i_256_8_ks7_p7.food101', 224, (.485, .456, .406), (.229, .224, .225), (1., 'squash', 'bilinear')),
    ('splitmixer_i_1536_20.in1k', 224, (.485, .456, .406), (.229, .224, .225), (.96, 'center', 'bicubic')),
])
def test_input_of_the_recipe(name, size, mean, std, crop):
    cfg = get_pretrained_cfg(name)
    assert (cfg.input_size, cfg.mean, cfg.std) == ((3, size, size), mean, std)
    assert (cfg.crop_pct, cfg.crop_mode, cfg.interpolation) == crop


def test_label_names():
    """ Label order is alphabetical where image folders give the labels, the official one for Flowers102."""
    for dataset, count in (('cifar10', 10), ('cifar100', 100), ('food101', 101)):
        names = manifest.label_names(dataset)
        assert list(names) == sorted(set(names))
        assert len(names) == count
    flowers = manifest.label_names('flowers102')
    assert (len(set(flowers)), flowers[0], flowers[101]) == (102, 'pink primrose', 'blackberry lily')
    info = ImageNetInfo('imagenet-1k')
    assert list(manifest.label_names('in1k')) == info.label_names()
    assert manifest.label_descriptions('in1k') == info.label_descriptions(as_dict=True)
    assert manifest.label_descriptions('cifar10') is None
    cfg = get_pretrained_cfg('splitmixer_i_768_32')
    assert cfg.label_descriptions[cfg.label_names[0]] == 'tench, Tinca tinca'
    with pytest.raises(ValueError, match="dataset must be one of cifar10, cifar100, .*, got 'mnist'"):
        manifest.label_names('mnist')


@pytest.mark.parametrize('name', ['splitmixer_i_256_8', 'splitmixer_i_768_32', 'convmixer_256_8'])
def test_label_names_are_of_the_models_classes(name):
    for num_classes, known in ((None, True), (0, True), (3, False)):
        model = timm.create_model(name, device='meta', num_classes=num_classes)
        assert bool(model.pretrained_cfg.get('label_names')) is known
        assert bool(model.pretrained_cfg.get('label_descriptions')) is (known and name == 'splitmixer_i_768_32')
    assert get_pretrained_cfg(name).label_names  # what the registry has is not the model's to change


@pytest.mark.data
@pytest.mark.parametrize('dataset', ['cifar10', 'cifar100'])
def test_label_names_are_the_data_sets(dataset, tmp_path):
    folder = real_images(dataset, tmp_path, 1, ('validation',)) / 'validation'
    assert manifest.label_names(dataset) == tuple(sorted(path.name for path in folder.iterdir()))


@pytest.mark.parametrize('with_weights', [(), ('cifar100',), ('cifar10',), ('cifar10', 'cifar100'), ('plus',)])
def test_default_tag_does_not_follow_the_weights(with_weights, monkeypatch):
    models = {f'splitmixer_ii_256_8.{tag}': dict(file='x', dataset='cifar100' if tag == 'cifar100' else 'cifar10',
                                                 url=f'https://example.org/{tag}') for tag in with_weights}
    monkeypatch.setattr(manifest, 'load_manifest', lambda: dict(hf_hub_org='', base_url='', models=models))
    cfgs = splitmixer.generate_variant_cfgs({'splitmixer_ii_256_8': splitmixer.VARIANTS['splitmixer_ii_256_8']})
    cfg = cfgs['splitmixer_ii_256_8']
    assert cfg.tags[0] == 'cifar10'
    assert set(cfg.tags) == {'cifar10', 'cifar100', *with_weights}
    assert cfg.default.num_classes == 10
    assert {tag for tag in cfg.tags if cfg.cfgs[tag].has_weights} == set(with_weights)


def test_why_the_default_is_marked():
    """ Without the mark timm would take the first tag that has weights."""
    cfgs = generate_default_cfgs({'x.cifar10': dict(), 'x.cifar100': dict(url='u')})
    assert cfgs['x'].tags[0] == 'cifar100'


@pytest.mark.parametrize(('name', 'kwargs', 'params'), [
    ('splitmixer_i_256_8_ks7_p7', dict(overlap_ratio='6/11'), 265_350),
    ('splitmixer_ii_256_8_ks7_p7', dict(num_segments=6), 124_474),
    ('splitmixer_iii_256_8_ks7_p7', dict(num_segments=8), 118_118),
    ('splitmixer_iv_256_8_ks7_p7', dict(num_segments=5), 216_582),
    ('splitmixer_i_256_8', dict(channel_mixing='iv'), 307_466),
])
def test_every_argument_can_be_overridden(name, kwargs, params):
    assert sum(p.numel() for p in timm.create_model(name, device='meta', **kwargs).parameters()) == params


def test_depth_and_width_sweep():
    for depth in (2, 4, 16, 32):
        assert len(timm.create_model('splitmixer_i_256_8', depth=depth, device='meta').blocks) == depth
    assert timm.create_model('splitmixer_v_256_8', dim=96, device='meta').num_features == 96


def test_import_takes_little_more_than_timm():
    """ Reading the manifest and building the table costs at most 50 ms beyond `import timm`.

    Of this process's own time, whatever else is at work, and with the bytecode that an installed package has.
    """
    code = 'import time, timm; t = time.process_time(); import splitmixer_timm; print(time.process_time() - t)'
    env = {name: value for name, value in os.environ.items() if name != 'PYTHONDONTWRITEBYTECODE'}

    def seconds():
        run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env=env)
        return float(run.stdout)

    assert any(seconds() < 0.05 for _ in range(5))
