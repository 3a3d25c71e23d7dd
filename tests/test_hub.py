""" Push and pull, through the real client of the Hub, to a Hub on loopback. """
import dataclasses
import hashlib
import io
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import BASELINES, ROOT, SPLITMIXERS
from hub_server import HubServer, use_hub
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import _http
from safetensors import safe_open
from safetensors.torch import load, load_file
from torch import nn

import splitmixer_timm
from splitmixer_timm import HubError, card, cli, hub, manifest, pull_from_hub, push_to_hub
from splitmixer_timm.hub_errors import explained, one_line
from splitmixer_timm.predict import Classifier
from splitmixer_timm.pretrained import check_download
from splitmixer_timm.release import CONFIG, Release, describe, folder_release, run_release, zoo_release

NAME = 'splitmixer_ii_256_8.cifar10'
ZOO = 'splitmixer_i_256_8.cifar10'
REPO = 'alice/model'
TOLD = '- Arguments: all of them in `args.yaml`\n- Log: each measured epoch in `summary.csv`\n'
TOKEN = 'hf_alice_secret'
SMALL = dict(depth=2, dim=16)


def start(storage, monkeypatch, tmp_path):
    server = HubServer(storage=storage)
    server.add_token(TOKEN, 'alice', orgs=['zoo'])
    server.add_token('hf_reader_secret', 'alice', role='read')
    server.add_token('hf_bob_secret', 'bob')
    use_hub(server, monkeypatch, tmp_path / 'client')
    return server


@pytest.fixture
def server(monkeypatch, tmp_path):
    with start('lfs', monkeypatch, tmp_path) as server:
        yield server


@pytest.fixture
def fresh(monkeypatch, tmp_path, server):
    """ Call it for an empty cache."""
    def clear():
        shutil.rmtree(tmp_path / 'client', ignore_errors=True)
    return clear


def create(name=NAME, **kwargs):
    """ A small model whose every weight and statistic is its own."""
    model = timm.create_model(name, **{**SMALL, **kwargs}).eval()
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.uniform_(0.1, 0.5)
    return model


def images(model, size=None):
    cfg = model.pretrained_cfg
    return torch.rand(2, model.stem[0].in_channels, *(size or cfg['input_size'][1:]))


def files(server, repo=REPO, revision='main'):
    return {k: v for k, v in server.repos[repo].files(revision).items() if k != '.gitattributes'}


def assert_same(a, b, size=None):
    x = images(a, size)
    with torch.inference_mode():
        assert torch.equal(a.eval()(x), b.eval()(x))


class TestRoundTrip:
    @pytest.mark.parametrize('name', [*SPLITMIXERS, *BASELINES])
    def test_every_variant(self, server, name):
        """ Pushed, and created by timm from an empty cache, it is the same to the last bit."""
        model = create(name, dim=24, depth=3)
        push_to_hub(model, REPO, token=TOKEN)
        again = timm.create_model(f'hf-hub:{REPO}', pretrained=True)
        assert_same(model, again, size=(42, 42))
        assert again.pretrained_cfg['architecture'] == name
        config, expected = (json.dumps(timm.data.resolve_model_data_config(m)) for m in (again, model))
        assert config == expected
        assert_same(model, pull_from_hub(REPO), size=(42, 42))

    def test_full_size(self, server):
        """ The model that the zoo has weights of, as it is."""
        model = timm.create_model(ZOO, pretrained=True)
        push_to_hub(model, REPO, token=TOKEN)
        assert_same(model, timm.create_model(f'hf-hub:{REPO}', pretrained=True))

    def test_by_xet(self, monkeypatch, tmp_path):
        with start('xet', monkeypatch, tmp_path) as server:
            model = create()
            push_to_hub(model, REPO, token=TOKEN)
            assert any('xet-write-token' in request.path for request in server.requests)
            assert_same(model, timm.create_model(f'hf-hub:{REPO}', pretrained=True))
            assert any('xet-read-token' in request.path for request in server.requests)

    def test_damaged_store(self, monkeypatch, tmp_path):
        """ The file that caches of repositories share goes as well, or the next download would have it again."""
        with start('xet', monkeypatch, tmp_path):
            model = create()
            push_to_hub(model, REPO, token=TOKEN)
            pull_from_hub(REPO)
            file, = ((tmp_path / 'client').rglob('model.safetensors'))
            file = file.resolve()
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.chmod(0o644)
            file.write_bytes(content)
            with pytest.raises(HubError, match='damaged on the way, try again'):
                pull_from_hub(REPO)
            assert_same(model, pull_from_hub(REPO))

    @pytest.mark.parametrize('kwargs', [
        dict(act_layer=nn.ReLU),
        dict(act_layer='silu', norm_layer=timm.layers.LayerNorm2d),
        dict(overlap_ratio='6/11'),
        dict(in_chans=1),
        dict(in_chans=4),
        dict(num_classes=0),
        dict(num_classes=7, global_pool='max'),
        dict(name='splitmixer_iv_256_8', num_segments='4', channel_residual='true', drop_path_rate=0.1),
        dict(name='convmixer_256_8', act_layer=nn.SiLU, in_chans=2),
    ], ids=str)
    def test_arguments(self, server, kwargs):
        model = create(**{'name': 'splitmixer_i_256_8', **kwargs})
        push_to_hub(model, REPO, token=TOKEN)
        json.loads(files(server)['config.json'])
        for again in (timm.create_model(f'hf-hub:{REPO}', pretrained=True), pull_from_hub(REPO)):
            assert_same(model, again)
            assert again.num_classes == model.num_classes
            assert not any(isinstance(module, timm.layers.DropPath) for module in again.modules())
            assert timm.data.resolve_model_data_config(again)['input_size'][0] == model.stem[0].in_channels

    def test_wrapped_and_laid_out_otherwise(self, server):
        model = create()
        push_to_hub(torch.compile(nn.DataParallel(model)), REPO, token=TOKEN)
        first = files(server)
        push_to_hub(model.to(memory_format=torch.channels_last), REPO, token=TOKEN)
        assert files(server) == first
        push_to_hub(timm.utils.ModelEmaV3(model).half(), REPO, token=TOKEN)
        assert load(files(server)['model.safetensors'])['head.weight'].dtype == torch.float16

    def test_as_it_is(self, server):
        """ What is no other network is taken: under another default device, compiled, of two types, or diverged."""
        with torch.device('meta'):
            push_to_hub(create(device='cpu'), REPO, token=TOKEN)
        model = create()
        for block in model.blocks:
            block.compile(backend=lambda *args: pytest.fail('nothing is compiled for a push'))
        push_to_hub(model, REPO, token=TOKEN)
        model = create().bfloat16()
        model.head.float()
        push_to_hub(model, REPO, token=TOKEN)
        assert load(files(server)['model.safetensors'])['stem.0.weight'].dtype == torch.bfloat16
        for value in (math.nan, math.inf):
            model = create()
            with torch.no_grad():
                model.head.bias[1] = value
            push_to_hub(model, REPO, token=TOKEN)
        model.blocks[0].channel_mixing.norm.eps = 0.1
        with pytest.raises(ValueError, match='was changed after it was made'):
            push_to_hub(model, REPO, token=TOKEN)

    def test_pretrained_cfg_is_a_fresh_start(self, server):
        """ A pulled model can be trained further and pushed again."""
        push_to_hub(create(), REPO, token=TOKEN)
        model = pull_from_hub(REPO)
        model.reset_classifier(5)
        push_to_hub(model, 'alice/other', token=TOKEN, label_names=list('abcde'))
        model = timm.create_model(f'hf-hub:{REPO}', pretrained=True)
        push_to_hub(model, 'alice/same', token=TOKEN)
        assert files(server, 'alice/same')['config.json'] == files(server)['config.json']
        again = pull_from_hub('alice/other')
        assert again.num_classes == 5
        assert again.pretrained_cfg['label_names'] == list('abcde')


class TestContents:
    def test_numbers_of_numpy(self, server):
        metrics = dict(
            top1=np.mean([0, 101.]), top5=np.float32(99.5), images=np.int64(200),
            seeds={1: np.float32(50), 2: np.int64(51)})
        push_to_hub(create(), REPO, token=TOKEN, metrics=metrics, dataset='cifar10')
        readme = files(server)['README.md'].decode()
        result, = yaml.safe_load(readme.split('---')[1])['model-index'][0]['results']
        assert [metric['value'] for metric in result['metrics']] == [50.5, 99.5]
        assert '- Measured: 200 images' in readme
        assert '- Over 2 runs that differ in the seed: top-1 50.50 +- 0.71\n' in readme

    def test_files(self, server):
        url = push_to_hub(create(), REPO, token=TOKEN, metrics=dict(top1=50, top5=99.5), dataset='cifar10')
        commit = server.repos[REPO].commits[-1]
        assert url == f'{server.endpoint}/{REPO}/commit/{commit.id}'
        assert len(server.repos[REPO].commits) == 2  # the Hub's own first one, and ours
        assert files(server).keys() == {'config.json', 'model.safetensors', 'README.md'}
        config = json.loads(files(server)['config.json'])
        assert config['architecture'] == 'splitmixer_ii_256_8'
        assert config['num_classes'] == 10
        assert 'file' not in config['pretrained_cfg']
        assert str(ROOT) not in json.dumps(config)

    @pytest.mark.parametrize('name', [NAME, 'convmixer_256_8'])
    def test_config_for_transformers(self, name):
        """ Its TimmWrapper gives `timm.create_model` the number of classes beside the config's arguments."""
        config = json.loads(Release(create(name)).config())
        model = timm.create_model(config['architecture'], num_classes=3, **config['model_args'])
        assert model.head.out_features == 3

    def test_weights_have_metadata(self, server, tmp_path):
        push_to_hub(create(), REPO, token=TOKEN)
        (tmp_path / 'weights').write_bytes(files(server)['model.safetensors'])
        with safe_open(tmp_path / 'weights', 'pt') as f:
            assert f.metadata() == {'format': 'pt'}

    def test_somebodys_ten_classes_are_not_cifars(self, server):
        """ timm would keep the class names of what a model was made from."""
        model = timm.create_model(ZOO, pretrained=True)
        with torch.no_grad():
            model.head.bias.add_(1)
        assert 'airplane' in model.pretrained_cfg['label_names']
        push_to_hub(model, REPO, token=TOKEN)
        assert b'airplane' not in files(server)['config.json']
        assert f'{manifest.entries()[ZOO]["metrics"]["top1"]:.2f}' not in files(server)['README.md'].decode()
        assert 'Not measured.' in files(server)['README.md'].decode()
        push_to_hub(model, REPO, token=TOKEN, label_names=tuple('abcdefghij'))
        again = timm.create_model(f'hf-hub:{REPO}', pretrained=True)
        assert again.pretrained_cfg['label_names'] == list('abcdefghij')

    def test_the_zoos_own_weights_have_the_zoos_names(self, server):
        push_to_hub(timm.create_model(ZOO, pretrained=True), REPO, token=TOKEN)
        config = json.loads(files(server)['config.json'])
        assert config['label_names'][0] == 'airplane'
        top1 = f'{manifest.entries()[ZOO]["metrics"]["top1"]:.2f}'
        assert f'top-1 accuracy, %: {top1}' in files(server)['README.md'].decode()
        assert files(server).keys() >= {'args.yaml', 'summary.csv'}

    @pytest.mark.parametrize('kwargs', [
        dict(act_layer='relu'), dict(channel_residual=True), dict(global_pool='max')], ids=str)
    def test_what_computes_otherwise_is_not_the_zoos(self, kwargs, caplog):
        """ Arguments that have no weights change what a model gives, and its accuracy."""
        release = describe(timm.create_model(ZOO, pretrained=True, **kwargs))
        assert (release.name, release.metrics) == (None, {})
        assert f'the weights are those of {ZOO}, the arguments are not' in caplog.text

    def test_what_computes_the_same_is_the_zoos(self, tmp_path):
        model = timm.create_model(
            ZOO, pretrained=True, act_layer=nn.GELU, drop_rate=0.1, drop_path_rate=0.1, depth='8', overlap_ratio='2/3',
            norm_layer='BatchNorm2d', patch_stride=2)
        model = timm.layers.convert_sync_batchnorm(model.train())
        model.blocks[0].eval()
        model.head.register_forward_hook(lambda module, args, logits: None)
        modes = [module.training for module in model.modules()]
        assert describe(model).name == ZOO
        assert [module.training for module in model.modules()] == modes
        for name, content in Release(model).files(REPO).items():
            (tmp_path / name).write_bytes(content)
        assert folder_release(tmp_path).name == ZOO
        given = folder_release(tmp_path, 'alice/insects', tuple('abcdefghij'))
        assert (given.name, given.dataset, given.label_names) == (ZOO, 'alice/insects', tuple('abcdefghij'))

    @pytest.mark.parametrize('name', ['splitmixer_i_256_8', 'convmixer_256_8'])
    def test_frozen_norms(self, name, tmp_path):
        """ timm's freeze makes other modules of them, with a buffer less; the model is left frozen."""
        model = timm.create_model(name, pretrained=True, num_classes=3)
        timm.utils.freeze(model, ['stem', 'blocks.0'])
        frozen = set(model.state_dict())
        for file, content in Release(model).files(REPO).items():
            (tmp_path / file).write_bytes(content)
        assert set(model.state_dict()) == frozen
        images = torch.randn(2, 3, 32, 32)
        same = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
        assert set(same.state_dict()) > frozen
        zoo = timm.create_model(ZOO, pretrained=True)
        timm.utils.freeze(zoo)
        assert describe(zoo).name == ZOO
        torch.testing.assert_close(same.eval()(images), model.eval()(images))

    def test_zoo_with_other_preprocessing_was_not_measured(self):
        model = timm.create_model(ZOO, pretrained=True)
        measured = describe(model)
        assert measured.metrics['top1'] == manifest.entries()[ZOO]['metrics']['top1']
        same = timm.data.resolve_model_data_config(model)
        alike = {**same, 'mean': list(same['mean']), 'crop_pct': 1}
        assert describe(model, data_config=alike).metrics == measured.metrics
        other = dict(mean=(0., 0., 0.))
        assert describe(model, data_config=other).metrics == {}
        assert describe(model, data_config=other, metrics=dict(top1=80.)).metrics == dict(top1=80.)

    def test_zoo_on_another_data_set_was_not_measured(self):
        """ The Hub's id of its own is no other."""
        model = timm.create_model(ZOO, pretrained=True)
        text = describe(model).card('a', 'b')
        assert describe(model, dataset='uoft-cs/cifar10').card('a', 'b') == text
        for dataset in ('alice/insects', 'cifar100'):
            text = describe(model, dataset=dataset).card('a', 'b')
            assert 'model-index' not in text
            assert 'Not measured.' in text
            text = describe(model, dataset=dataset, metrics=dict(top1=12.25)).card('a', 'b')
            assert '12.25' in text
            assert "The paper's top-1" not in text

    def test_preprocessing(self, server):
        push_to_hub(create(), REPO, token=TOKEN, data_config=dict(mean=(0.5, 0.5, 0.5), input_size=(3, 64, 64)))
        config = timm.data.resolve_model_data_config(pull_from_hub(REPO))
        assert tuple(config['mean']) == (0.5, 0.5, 0.5)
        assert tuple(config['input_size']) == (3, 64, 64)
        assert tuple(config['std']) == (.2023, .1994, .2010)
        assert 'pool_size' not in json.loads(files(server)['config.json'])['pretrained_cfg']  # that of 32 x 32

    def test_same_again_is_no_commit(self, server):
        model = create()
        first = push_to_hub(model, REPO, token=TOKEN)
        assert push_to_hub(model, REPO, token=TOKEN) == first
        assert len(server.repos[REPO].commits) == 2

    def test_card_is_refreshed_and_what_others_wrote_kept(self, server):
        model = create()
        push_to_hub(model, REPO, token=TOKEN, metrics=dict(top1=50.), dataset='cifar10')
        old = files(server)['README.md'].decode()
        edited = old.replace('tags:\n', 'language: en\ntags:\n- mine\n') + '\n## Thanks\n\nTo my cat.\n'
        server.repos[REPO].commit({**server.repos[REPO].files(), 'README.md': edited.encode()}, 'Edit')
        push_to_hub(model, REPO, token=TOKEN, metrics=dict(top1=60.), dataset='cifar10')
        new = files(server)['README.md'].decode()
        assert new.count('To my cat.') == new.count('## Evaluation') == 1
        assert 'top-1 accuracy, %: 60.00' in new
        assert '50.0' not in new
        metadata = yaml.safe_load(new.split('---')[1])
        assert metadata['language'] == 'en'
        assert set(metadata['tags']) == {'mine', 'timm', 'splitmixer'}
        assert metadata['model-index'][0]['results'][0]['metrics'][0]['value'] == 60
        push_to_hub(model, REPO, token=TOKEN)
        assert 'model-index' not in files(server)['README.md'].decode()

    def test_card_is_kept_where_it_cannot_be_read(self, server):
        model = create()
        push_to_hub(model, REPO, token=TOKEN)
        repo = server.repos[REPO]
        mine = files(server)['README.md'] + b'\nTo my cat.\n'
        repo.commit({**repo.files(), 'README.md': mine}, 'Edit')
        server.fail('README.md', 503, times=None)
        with pytest.raises(HubError, match='503'):
            push_to_hub(create(), REPO, token=TOKEN)
        assert files(server)['README.md'] == mine

    @pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig'])
    def test_licence_of_the_repository_stays(self, server, encoding):
        card = '---\nlicense: cc-by-nc-4.0\n---'.encode(encoding)
        server.create_repo(REPO).commit({'README.md': card}, 'First')
        for _ in range(2):
            push_to_hub(create(), REPO, token=TOKEN)
            assert yaml.safe_load(files(server)['README.md'].decode().split('---')[1])['license'] == 'cc-by-nc-4.0'

    def test_card_of_another_tool(self, server):
        server.create_repo(REPO).commit({'README.md': b'# By hand\n\nText.\n'}, 'First')
        push_to_hub(create(), REPO, token=TOKEN)
        new = files(server)['README.md'].decode()
        assert new.startswith('---\n')
        assert '# By hand\n\nText.' in new


class TestCardOfAModel:
    def test_what_differs_from_the_registered(self):
        text = Release(create(act_layer=nn.ReLU, overlap_ratio='6/11', name='splitmixer_i_256_8')).card('a', 'a')
        changes = '`dim=16`, `depth=2`, `overlap_ratio=6/11`, `act_layer=relu`'
        assert f'- Architecture: `splitmixer_i_256_8`, but with {changes}\n' in text
        text = zoo_release(ZOO).card('a', 'a')
        assert '- Architecture: `splitmixer_i_256_8`\n' in text

    @pytest.mark.parametrize(('name', 'said'), [
        (ZOO, 'bicubic interpolation, center crop of 100%'),
        (ZOO, "- The paper's top-1 accuracy, %: 93.91, after 100 epochs with its full recipe\n"),
        (ZOO, "`summary.csv`: train.py's own figures, from which the evaluation above may differ\n"),
        ('convmixer_256_8_ks7_p7.flowers102', 'bilinear interpolation, squashed to that size'),
        ('convmixer_256_8_ks7_p7.flowers102', 'full recipe; it does not say on which splits it trained\n'),
        ('convmixer_256_8_ks7_p7.flowers102', '@article{trockman2022patches,'),
        ('convmixer_256_8_ks7_p7.flowers102', '- Note: training images were resized to 230 x 230 beforehand; the log'),
    ])
    def test_what_a_figure_depends_on(self, name, said):
        assert said in zoo_release(name).card(name, name)

    def test_split(self, monkeypatch):
        """ The official test set is named where it is what was measured."""
        assert zoo_release(ZOO).metrics['split'] == 'test'
        monkeypatch.setitem(card.DATASETS, 'cifar10', dataclasses.replace(card.DATASETS['cifar10'], test=9_999))
        assert 'split' not in zoo_release(ZOO).metrics

    def test_example(self):
        """ It tells the class by name where names are known."""
        assert "pretrained_cfg['label_names']" in zoo_release(ZOO).card(ZOO, ZOO)
        text = Release(create()).card('a', 'a')
        assert "pretrained_cfg['label_names']" not in text
        assert 'print(probabilities.topk(5))' in text

    def test_descriptions(self, tmp_path):
        """ ImageNet's classes are told by what their names stand for, wherever the model comes from."""
        names = manifest.label_names('in1k')
        model = timm.create_model('splitmixer_ii_768_32', depth=1, dim=8)
        for name, content in Release(model, label_names=names).files(REPO).items():
            (tmp_path / name).write_bytes(content)
        release = folder_release(tmp_path)
        config = json.loads(release.config())
        assert config['label_descriptions'][config['label_names'][0]] == 'tench, Tinca tinca'
        assert "print(model.pretrained_cfg['label_descriptions'][model.pretrained_cfg['label_names']" in \
            release.card('a', 'a')
        classifier = Classifier(f'local-dir:{tmp_path}')
        assert classifier.labels[:2] == ('tench, Tinca tinca', 'goldfish, Carassius auratus')

    def test_metrics_without_a_data_set(self, caplog):
        """ The Hub takes none of those."""
        Release(create(), metrics=dict(top1=90), dataset='cifar10').card('a', 'a')
        describe(timm.create_model(ZOO, pretrained=True), metrics=dict(top1=90.)).card('a', 'a')
        assert not caplog.text
        Release(create(), metrics=dict(top1=90)).card('a', 'a')
        assert 'no data set is given: the Hub will not list the metrics' in caplog.text


def without_pooling():
    model = timm.create_model(ZOO, pretrained=True)
    model.global_pool = nn.Identity()
    return model


class TestRefused:
    """ Before anything is asked of the Hub."""

    @pytest.mark.parametrize(('make', 'kwargs', 'message'), [
        (lambda: timm.create_model('test_vit'), {}, 'model must be a SplitMixer or ConvMixer'),
        (lambda: timm.create_model('convmixer_768_32', device='meta'), {}, 'model must be a SplitMixer or ConvMixer'),
        (lambda: create(features_only=True, out_indices=(0,)), {}, 'model must be a SplitMixer or ConvMixer'),
        (lambda: splitmixer_timm.SplitMixer(16, 2), {}, 'made by timm.create_model'),
        (lambda: create(act_layer=type('Mine', (nn.ReLU,), {})), {}, 'act_layer of the model must be one'),
        (without_pooling, {}, 'global_pool of the model must be the one it was made with, got Identity'),
        (create, dict(label_names=['a']), 'a name for each of 10 classes, got 1'),
        (create, dict(metrics=dict(top1=0.9, f1=1)), "and no other, got 'f1'"),
        (create, dict(metrics=dict(top1=101)), 'from 0 to 100'),
        (create, dict(metrics=dict(top1='90')), 'from 0 to 100'),
        (create, dict(metrics=dict(top1=50, images='10,000')), "metrics['images'] must be a number of images"),
        (create, dict(metrics=dict(top1=50, images=0)), "metrics['images'] must be a number of images"),
        (create, dict(metrics=dict(top1=50, seeds=[1])), "metrics['seeds'] must map"),
        (create, dict(metrics=dict(seeds={1: 50.})), "metrics['seeds'] must map two seeds or more"),
        (create, dict(metrics=dict(seeds={1: 50., 2: math.nan})), "metrics['seeds'] must map"),
        (create, dict(metrics=dict(seeds={1: 50., 2: True})), "metrics['seeds'] must map"),
        (create, dict(metrics=dict(seeds={1: 50., 2: 500})), "metrics['seeds'] must map"),
        (create, dict(dataset=['a', 'b']), "dataset must be the name of one, got ['a', 'b']"),
        (create, dict(dataset=''), "dataset must be the name of one, got ''"),
        (create, dict(data_config=dict(input_size=(3, -1, 0))), 'must be numbers of at least 1, got (3, -1, 0)'),
        (create, dict(data_config=dict(crop_mode='bogus')), "must be 'center', 'squash' or 'border', got 'bogus'"),
        (create, dict(token=b'hf_alice'), 'token must be text, True, False or None, got bytes'),
        (create, dict(metrics=dict(top1=50, split=1)), "metrics['split'] must be text, got 1"),
        (create, dict(label_names=dict(enumerate('abcdefghij'))), 'must be a list of names in label order'),
        (create, dict(data_config=dict(men=(0.5, 0.5, 0.5))), "and no other, got 'men'"),
        (create, dict(data_config=dict(mean=0.5)), "data_config['mean'] must be 3 numbers, got 0.5"),
        (create, dict(data_config=dict(std=torch.ones(3))), "data_config['std'] must be 3 numbers"),
        (create, dict(data_config=dict(crop_pct='1')), "data_config['crop_pct'] must be a number above 0"),
        (create, dict(data_config=dict(interpolation=3)), "data_config['interpolation'] must be text"),
        (create, dict(token='hf_\xe4'), 'token must be one word of ASCII'),
        (lambda: timm.create_model(NAME, device='meta'), {}, "model must have its weights, got one on device 'meta'"),
    ])
    def test_model_or_claims(self, server, make, kwargs, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            push_to_hub(make(), REPO, **{'token': TOKEN, **kwargs})
        assert not server.requests

    @pytest.mark.parametrize('change', [
        lambda model: setattr(model, 'head', nn.Linear(16, 4)),
        lambda model: setattr(model.blocks[1].channel_mixing, 'act', nn.ReLU()),
        lambda model: setattr(model.blocks[0].channel_mixing.norm, 'eps', 0.1),
        lambda model: model.head.register_forward_hook(lambda module, args, logits: -logits),
        lambda model: model.register_forward_pre_hook(lambda module, args: (args[0].sub_(0.5), None)[1]),
        lambda model: setattr(model.half().blocks[0].channel_mixing, 'act', nn.ReLU()),
    ], ids=['layer', 'activation', 'eps', 'hook', 'in place', 'half'])
    def test_changed_model(self, server, change):
        """ Whoever downloads it would get another network."""
        model = create()
        change(model)
        with pytest.raises(ValueError, match='was changed after it was made'):
            push_to_hub(model, REPO, token=TOKEN)
        assert not server.requests


class TestRevisions:
    def test_branch_tag_and_commit(self, server):
        one, two = create(), create()
        push_to_hub(one, REPO, token=TOKEN)
        push_to_hub(two, REPO, token=TOKEN, revision='v2')
        repo = server.repos[REPO]
        repo.tags['release'] = repo.branches['main']
        for revision, model in (('main', one), ('v2', two), ('release', one), (repo.branches['v2'], two)):
            again = timm.create_model(f'hf-hub:{REPO}@{revision}', pretrained=True)
            assert_same(model, again)
            assert again.pretrained_cfg['hf_hub_id'] == f'{REPO}@{revision}'
            assert_same(model, pull_from_hub(REPO, revision=revision))
            assert_same(model, pull_from_hub(f'{REPO}@{revision}'))

    def test_pull_request(self, server):
        push_to_hub(create(), REPO, token=TOKEN)
        before = files(server)
        url = push_to_hub(create(), REPO, token=TOKEN, create_pr=True)
        assert url == f'{server.endpoint}/{REPO}/discussions/1'
        assert files(server) == before
        assert files(server, revision='refs/pr/1')['model.safetensors'] != before['model.safetensors']
        with pytest.raises(HubError, match='v2'):
            push_to_hub(create(), REPO, token=TOKEN, create_pr=True, revision='v2')
        assert 'v2' not in server.repos[REPO].branches

    def test_card_of_the_branch_is_kept(self, server):
        push_to_hub(create(), REPO, token=TOKEN)
        push_to_hub(create(), REPO, token=TOKEN, revision='v2')
        repo = server.repos[REPO]
        edited = repo.files('v2')['README.md'] + b'\nTo my cat.\n'
        repo.commit({**repo.files('v2'), 'README.md': edited}, 'Edit', branch='v2')
        push_to_hub(create(), REPO, token=TOKEN, revision='v2')
        assert b'To my cat.' in files(server, revision='v2')['README.md']

    def test_a_branch_that_got_no_commit_goes_again(self, server):
        push_to_hub(create(), REPO, token=TOKEN)
        server.fail('/commit/', 500, times=None)
        with pytest.raises(HubError, match='500'):
            push_to_hub(create(), REPO, token=TOKEN, revision='v2')
        assert server.repos[REPO].branches.keys() == {'main'}

    def test_a_branch_that_cannot_be_read_goes_again(self, server, monkeypatch):
        push_to_hub(create(), REPO, token=TOKEN)
        create_branch = hub.HfApi.create_branch

        def create_and_fail(*args, **kwargs):
            create_branch(*args, **kwargs)
            server.fail('/revision/v2', 500, times=None)

        monkeypatch.setattr(hub.HfApi, 'create_branch', create_and_fail)
        with pytest.raises(HubError, match='500'):
            push_to_hub(create(), REPO, token=TOKEN, revision='v2')
        assert server.repos[REPO].branches.keys() == {'main'}

    def test_a_branch_that_somebody_committed_to_stays(self, server, monkeypatch):
        push_to_hub(create(), REPO, token=TOKEN)
        merge = hub.merge_cards

        def merge_late(*args):
            server.repos[REPO].commit({'theirs.txt': b'work'}, 'Theirs', branch='v2')
            return merge(*args)

        monkeypatch.setattr(hub, 'merge_cards', merge_late)
        with pytest.raises(HubError, match='another commit came first'):
            push_to_hub(create(), REPO, token=TOKEN, revision='v2')
        assert 'theirs.txt' in files(server, revision='v2')

    @pytest.mark.parametrize('private', [None, False, True])
    def test_private(self, server, monkeypatch, private):
        """ None leaves it to the Hub, where organisations have a choice of their own."""
        asked, create_repo = [], hub.HfApi.create_repo
        monkeypatch.setattr(
            hub.HfApi, 'create_repo', lambda *args, **kwargs: asked.append(kwargs) or create_repo(*args, **kwargs))
        push_to_hub(create(), REPO, token=TOKEN, private=private)
        assert server.repos[REPO].private == bool(private)
        assert [kwargs['private'] for kwargs in asked] == [private]

    def test_revision_twice(self):
        with pytest.raises(ValueError, match='revision must be given once'):
            pull_from_hub(f'{REPO}@a', revision='b')


def told(error):
    """ The one line that a user reads."""
    message = str(error.value)
    assert '\n' not in message
    assert 'secret' not in message
    assert message.startswith(REPO)
    return message


class TestErrors:
    @pytest.fixture(autouse=True)
    def _no_token_in_logs(self, caplog, capfd):
        """ Nothing of the client's or ours shows a token, at any level."""
        with caplog.at_level(logging.DEBUG):
            yield
        out, err = capfd.readouterr()
        logged = [record.getMessage() for record in caplog.get_records('call')]  # caplog.text is of this part alone
        assert 'secret' not in '\n'.join([*logged, out, err])

    def test_missing_repo(self, server):
        with pytest.raises(HubError) as error:
            pull_from_hub(REPO)
        assert 'no such repository' in told(error)

    @pytest.mark.parametrize('token', [None, 'hf_bob_secret', 'hf_wrong_secret'], ids=['none', 'bob', 'wrong'])
    def test_private(self, server, token):
        push_to_hub(create(), REPO, token=TOKEN, private=True)
        assert isinstance(pull_from_hub(REPO, token=TOKEN), splitmixer_timm.SplitMixer)
        with pytest.raises(HubError) as error:
            pull_from_hub(REPO, token=token)
        assert 'token' in told(error)

    def test_gated(self, server):
        server.create_repo(REPO, gated=True).commit(Release(create()).files(REPO), 'First')
        with pytest.raises(HubError) as error:
            pull_from_hub(REPO, token='hf_bob_secret')
        assert 'gated' in told(error)

    def test_missing_revision(self, server):
        push_to_hub(create(), REPO, token=TOKEN)
        with pytest.raises(HubError) as error:
            pull_from_hub(REPO, revision='nowhere')
        assert 'no such revision: nowhere' in told(error)

    @pytest.mark.parametrize(('token', 'reason'), [
        ('hf_reader_secret', 'no permission'), ('hf_bob_secret', 'no permission'), ('hf_wrong_secret', 'token'),
    ], ids=['reader', 'bob', 'wrong'])
    def test_push_without_permission(self, server, token, reason):
        push_to_hub(create(), REPO, token=TOKEN)
        before = files(server)
        with pytest.raises(HubError) as error:
            push_to_hub(create(), REPO, token=token)
        assert reason in told(error)
        assert files(server) == before

    def test_card_is_made_once(self, server, caplog):
        """ But for a name without its user's, which is known when the repository is."""
        for name, times in ((REPO, 1), (REPO.partition('/')[2], 2)):
            caplog.clear()
            push_to_hub(create(), name, metrics=dict(top1=90), token=TOKEN)
            assert caplog.text.count('no data set is given') == times

    def test_not_logged_in(self, server):
        with pytest.raises(HubError) as error:
            push_to_hub(create(), REPO)
        assert 'not logged in' in told(error)

    def test_token_from_a_file(self, server):
        push_to_hub(create(), REPO, token=f'{TOKEN}\n')
        with pytest.raises(ValueError, match='token must be one word') as error:
            pull_from_hub(REPO, token='hf_secret\nhf_secret')
        assert 'secret' not in str(error.value)

    @pytest.mark.parametrize('stored', [
        'hf_\x0bsecret', '\ufeffhf_secret'.encode(), 'hf_secret\n'.encode('utf-16'),
    ], ids=['environment', 'bom', 'utf16'])
    def test_logged_in_with_what_cannot_be_sent(self, server, monkeypatch, stored):
        """ It would be shown by the error of the connection, and the network be blamed."""
        push_to_hub(create(), REPO, token=TOKEN)
        if isinstance(stored, str):
            monkeypatch.setenv('HF_TOKEN', stored)
        else:
            path = Path(constants.HF_TOKEN_PATH)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(stored)
        for use_it in (
                pull_from_hub, lambda repo: push_to_hub(create(), repo), lambda repo: Classifier(f'HF_Hub:{repo}'),
                lambda repo: create(pretrained=True, pretrained_cfg_overlay=dict(hf_hub_id=repo))):
            with pytest.raises(HubError, match='The token that is logged in') as error:
                use_it(REPO)
            assert 'secret' not in ''.join(traceback.format_exception(error.value))
        assert isinstance(pull_from_hub(REPO, token=TOKEN), splitmixer_timm.SplitMixer)
        assert isinstance(pull_from_hub(REPO, token=False), splitmixer_timm.SplitMixer)
        # nor does it matter where it is not sent
        assert isinstance(pull_from_hub(REPO, local_files_only=True), splitmixer_timm.SplitMixer)
        for setting in ('HF_HUB_OFFLINE', 'HF_HUB_DISABLE_IMPLICIT_TOKEN'):
            with monkeypatch.context() as context:
                context.setattr(constants, setting, True)
                assert isinstance(pull_from_hub(REPO), splitmixer_timm.SplitMixer)

    def test_model_that_timm_fetches(self, server, run_dir, monkeypatch, capfd):
        """ timm has the Hub asked for config.json first; both commands tell what `pull` would."""
        folder, _ = run_dir
        args = yaml.safe_load((folder / 'args.yaml').read_text())
        (folder / 'args.yaml').write_text(yaml.safe_dump({**args, 'model': f'hf-hub:{REPO}', 'model_kwargs': {}}))
        commands = (
            ['predict', str(ROOT / 'tests/assets/airplane.png'), '--model', f'hf-hub:{REPO}'], ['card', str(folder)])

        def errors():
            assert [cli.main(command) for command in commands] == [2, 2]
            lines = capfd.readouterr().err.splitlines()
            assert len(lines) == 2
            assert 'secret' not in ''.join(lines)
            return lines

        predict, card_of_run = errors()
        assert predict.startswith(f'splitmixer-timm: error: {REPO}: no such repository')
        assert f'trained hf-hub:{REPO}, which cannot be made here (HubError: {REPO}: no such' in card_of_run
        monkeypatch.setenv('HF_TOKEN', 'hf_\x0bsecret')
        assert all('The token that is logged in' in line for line in errors())
        monkeypatch.setattr(constants, 'ENDPOINT', constants.ENDPOINT.replace('//', '//user:secret@'))
        monkeypatch.setenv('HF_TOKEN', '')
        server.__exit__(None, None, None)
        assert all('http://127.0.0.1' in line for line in errors())

    def test_no_token_by_oidc(self, server, monkeypatch):
        """ As of a job that may not ask for one."""
        monkeypatch.setenv('HF_OIDC_RESOURCE', 'x')
        for name in ('HF_OIDC_ID_TOKEN', 'GITHUB_ACTIONS'):
            monkeypatch.delenv(name, raising=False)
        with pytest.raises(HubError, match='HF_OIDC_RESOURCE is set, but gives no token: '):
            pull_from_hub(REPO)

    def test_endpoint_with_a_password(self, server, monkeypatch):
        server.__exit__(None, None, None)
        monkeypatch.setattr(constants, 'ENDPOINT', constants.ENDPOINT.replace('//', '//user:secret@'))
        with pytest.raises(HubError) as error:
            pull_from_hub(REPO)
        assert '//127.0.0.1' in told(error)

    def test_password_in_an_answer(self, server):
        """ Whatever names the endpoint."""
        url = f'{constants.ENDPOINT.replace("//", "//user:secret@")}/{REPO}/resolve/main/model.safetensors'
        with pytest.raises(HubError) as error, explained(REPO):
            raise EntryNotFoundError(f'404\n\nEntry Not Found for url: {url}.')
        assert 'a file is missing (Entry Not Found for url: http://127.0.0.1' in str(error.value)
        assert 'secret' not in str(error.value)

    @pytest.mark.parametrize(('error', 'told'), [
        (ValueError(f'no\n  {"/" * 600}'), f'no {"/" * 497}'),
        (ValueError("Illegal header value b'Bearer hf_\\x0bsecret'"), "Illegal header value b'Bearer '"),
        (OSError(f'{"x" * 485} http://user:secret@host'), f'{"x" * 485} http://host'),
        (ValueError(), 'ValueError')], ids=['lines', 'token', 'password', 'nothing'])
    def test_one_line(self, error, told):
        """ What timm itself loads from the Hub fails with errors of the connection."""
        assert one_line(error) == told

    def test_reason_of_a_refusal(self, server):
        """ What the Hub says itself is passed on."""
        push_to_hub(create(), REPO, token=TOKEN)
        server.fail('/commit/', 403, times=None)
        with pytest.raises(HubError, match='no permission for this') as error:
            push_to_hub(create(), REPO, token=TOKEN)
        assert re.search(r'no permission for this \(.+\)', told(error))

    def test_something_else_answers(self, server, monkeypatch):
        """ A page to log in to the network, which answers 200 to everything: what is cached can be had."""
        push_to_hub(create(), REPO, token=TOKEN)
        model = pull_from_hub(REPO)
        monkeypatch.setattr(hub.HfApi, 'model_info', lambda *args, **kwargs: json.loads('<html>'))
        monkeypatch.setattr(hub.HfApi, 'create_repo', lambda *args, **kwargs: json.loads('<html>'))
        assert_same(model, pull_from_hub(REPO))
        for use_it in (lambda: pull_from_hub(REPO, revision='v2'), lambda: push_to_hub(model, REPO, token=TOKEN)):
            with pytest.raises(HubError) as error:
                use_it()
            assert 'answers, but not as the Hub does' in told(error)

    def test_no_answer(self, server, monkeypatch):
        """ The time limit is for all addresses of the host together, where the client's is for each."""
        push_to_hub(create(), REPO, token=TOKEN)
        model = pull_from_hub(REPO)
        monkeypatch.setattr(hub, '_REACH_SECONDS', 0.2)
        monkeypatch.setattr(hub.HfApi, 'model_info', lambda *args, **kwargs: time.sleep(5))
        began = time.monotonic()
        assert_same(model, pull_from_hub(REPO))
        with pytest.raises(HubError, match=r'cannot be reached \(OutOfTime\)'):
            pull_from_hub(REPO, revision='v2')
        assert time.monotonic() - began < 9

    def test_stale_parent_commit(self, server):
        push_to_hub(create(), REPO, token=TOKEN)
        stale = server.repos[REPO].branches['main']
        push_to_hub(create(), REPO, token=TOKEN)
        before = files(server)
        with pytest.raises(HubError) as error:
            push_to_hub(create(), REPO, token=TOKEN, parent_commit=stale)
        assert 'another commit came first' in told(error)
        assert files(server) == before

    def test_edited_meanwhile(self, server, monkeypatch):
        """ A card that someone writes while we push is not overwritten."""
        push_to_hub(create(), REPO, token=TOKEN)
        merge = hub.merge_cards

        def merge_late(*args):
            server.repos[REPO].commit({'README.md': b'# Mine\n'}, 'Edit')
            return merge(*args)

        monkeypatch.setattr(hub, 'merge_cards', merge_late)
        with pytest.raises(HubError, match='another commit came first'):
            push_to_hub(create(), REPO, token=TOKEN)
        assert files(server)['README.md'] == b'# Mine\n'

    def test_no_network(self, server):
        """ At once, and with the repository's name; what is in the cache can still be had."""
        push_to_hub(create(), REPO, token=TOKEN)
        model = pull_from_hub(REPO)
        server.__exit__(None, None, None)
        began = time.monotonic()
        assert_same(model, pull_from_hub(REPO))
        with pytest.raises(HubError) as error:
            pull_from_hub(REPO, revision='v2')
        assert 'cannot be reached' in told(error)
        with pytest.raises(HubError, match='cannot be reached'):
            push_to_hub(model, REPO, token=TOKEN)
        assert time.monotonic() - began < 20

    def test_proxy_that_the_client_cannot_use(self, server, monkeypatch):
        """ SOCKS needs a package that does not come with the client; where it is there, nobody listens."""
        for name in ('NO_PROXY', 'no_proxy'):
            monkeypatch.setenv(name, '')
        monkeypatch.setenv('HTTP_PROXY', 'socks5://127.0.0.1:9')
        monkeypatch.setattr(_http, '_GLOBAL_CLIENT', None)
        for call in (partial(push_to_hub, create(), REPO, token=TOKEN), partial(pull_from_hub, REPO)):
            with pytest.raises(HubError, match='(?i)socks|cannot be reached') as error:
                call()
            told(error)

    def test_offline(self, server, monkeypatch):
        push_to_hub(create(), REPO, token=TOKEN)
        model = pull_from_hub(REPO)
        server.requests.clear()
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
        assert_same(model, pull_from_hub(REPO))
        assert_same(model, timm.create_model(f'hf-hub:{REPO}', pretrained=True))
        with pytest.raises(HubError) as error:
            pull_from_hub(REPO, revision='v2')
        assert 'offline (HF_HUB_OFFLINE is set), and the cache does not have it' in told(error)
        assert not server.requests

    def test_local_files_only(self, server):
        push_to_hub(create(), REPO, token=TOKEN)
        with pytest.raises(HubError) as error:
            pull_from_hub(REPO, local_files_only=True)
        assert 'not in the cache' in told(error)
        model = pull_from_hub(REPO)
        server.requests.clear()
        assert_same(model, pull_from_hub(REPO, local_files_only=True))
        assert not server.requests

    def test_server_error(self, server):
        """ timm alone tells of a missing pytorch_model.bin."""
        push_to_hub(create(), REPO, token=TOKEN)
        server.fail('model.safetensors', 503, times=None)
        for load_it in (pull_from_hub, lambda repo: timm.create_model(f'hf-hub:{repo}', pretrained=True)):
            with pytest.raises(HubError) as error:
                load_it(REPO)
            assert '503' in told(error)
            assert 'try again later' in told(error)
        server.faults.clear()
        server.fail('/api/models', 503, times=None)
        with pytest.raises(HubError, match='503'):
            pull_from_hub(REPO)

    def test_server_error_where_a_part_is_cached(self, server, caplog):
        """ It is the server's error that is told: nobody asked to do without it."""
        push_to_hub(create(), REPO, token=TOKEN)
        timm.create_model(NAME, pretrained=True, **SMALL, pretrained_cfg_overlay=dict(hf_hub_id=REPO))
        server.fail('/api/models', 503, times=None)
        with pytest.raises(HubError) as error:
            pull_from_hub(REPO)
        assert 'the Hub answered 503' in told(error)
        assert 'taken from the cache' not in caplog.text

    def test_flaky(self, server):
        """ An error or two in passing are overcome."""
        model = create()
        push_to_hub(model, REPO, token=TOKEN)
        server.fail('config.json', 503, method='HEAD')
        server.fail('/cdn/', 'drop')
        assert_same(model, pull_from_hub(REPO))

    @pytest.mark.parametrize('fault', ['wrong-hash', 'drop'])
    def test_interrupted_pull_leaves_no_broken_cache(self, server, fault):
        model = create(dim=64)
        push_to_hub(model, REPO, token=TOKEN)
        server.fail('/cdn/', fault, times=None)
        with pytest.raises(HubError) as error:
            pull_from_hub(REPO)
        told(error)
        server.faults.clear()
        assert_same(model, pull_from_hub(REPO))

    @pytest.mark.parametrize('name', ['config.json', 'README.md', 'args.yaml'])
    def test_damaged_small_file(self, server, tmp_path, name):
        """ It does not stay in the cache."""
        push_to_hub(timm.create_model(ZOO, pretrained=True), REPO, token=TOKEN)
        server.fail(name, 'wrong-hash', method='GET')
        with pytest.raises(HubError, match=f'{name} was damaged on the way, try again'):
            hub.pull_to_folder(REPO, tmp_path / 'pulled')
        hub.pull_to_folder(REPO, tmp_path / 'pulled')
        assert (tmp_path / 'pulled' / name).read_bytes() == files(server)[name]

    @pytest.mark.parametrize('name', [hashlib.sha1(b'{}').hexdigest(), 'W-1234'])
    def test_names_of_a_mirror(self, tmp_path, name):
        """ In its cache files may be called by other hashes, or by none."""
        (tmp_path / name).write_bytes(b'{}')
        (tmp_path / 'config.json').symlink_to(name)
        check_download(tmp_path / 'config.json')
        assert (tmp_path / name).is_file()

    @pytest.mark.parametrize('where', ['/upload/', '/commit/', '/info/lfs/', '/preupload/'])
    def test_interrupted_push_leaves_the_repository_alone(self, server, where):
        push_to_hub(create(), REPO, token=TOKEN)
        before, commits = files(server), len(server.repos[REPO].commits)
        server.fail(where, 500, times=None)
        model = create()
        with pytest.raises(HubError) as error:
            push_to_hub(model, REPO, token=TOKEN)
        assert '500' in told(error)
        assert files(server) == before
        assert len(server.repos[REPO].commits) == commits
        server.faults.clear()
        push_to_hub(model, REPO, token=TOKEN)
        assert_same(model, pull_from_hub(REPO))

    def test_damaged_on_the_way_to_timm(self, server):
        push_to_hub(create(), REPO, token=TOKEN)
        server.fail('/cdn/', 'wrong-hash')
        with pytest.raises(HubError, match='damaged on the way'):
            timm.create_model(f'hf-hub:{REPO}', pretrained=True)

    def test_pushed_to_meanwhile(self, server, monkeypatch):
        """ Configuration and weights are those of one commit."""
        model = create()
        push_to_hub(model, REPO, token=TOKEN)
        download = hub.hf_hub_download

        def meanwhile(repo_id, filename, **kwargs):
            path = download(repo_id, filename, **kwargs)
            if filename == CONFIG:
                push_to_hub(create(), REPO, token=TOKEN)
            return path

        monkeypatch.setattr(hub, 'hf_hub_download', meanwhile)
        assert_same(model, pull_from_hub(REPO))


class TestUnusable:
    @pytest.fixture
    def repo(self, server):
        """ Publish files of a model with changes; None takes a file away."""
        def publish(**changes):
            contents = Release(create()).files(REPO)
            changed = {**contents, **{k.replace('_', '.'): v for k, v in changes.items()}}
            repo = server.create_repo(REPO)
            repo.commit({k: v for k, v in changed.items() if v is not None}, 'First')
            return contents
        return publish

    def test_only_a_pickle(self, repo, server):
        repo(model_safetensors=None, pytorch_model_bin=b'x')
        for load_it in (pull_from_hub, lambda name: timm.create_model(f'hf-hub:{name}', pretrained=True)):
            with pytest.raises(HubError) as error:
                load_it(REPO)
            assert 'model.safetensors' in told(error)
        assert not [request for request in server.requests if 'pytorch' in request.path]

    @pytest.mark.parametrize('given', ['pretrained_cfg', 'pretrained_cfg_overlay'])
    def test_repository_that_the_caller_names(self, repo, server, given):
        """ By a cfg, as by 'hf-hub:': its safetensors or nothing."""
        contents = repo()
        load_it = partial(timm.create_model, NAME, pretrained=True, **SMALL, **{given: dict(hf_hub_id=REPO)})
        if given == 'pretrained_cfg':
            load_it = partial(load_it, num_classes=load(contents['model.safetensors'])['head.bias'].numel())
        model = load_it()
        assert torch.equal(model.head.bias, load(contents['model.safetensors'])['head.bias'])
        assert model.pretrained_cfg['hf_hub_id'] == REPO
        repo(model_safetensors=None, pytorch_model_bin=b'x')
        with pytest.raises(HubError) as error:
            load_it()
        assert 'model.safetensors' in told(error)
        assert not [request for request in server.requests if 'pytorch' in request.path]

    def test_file_that_the_caller_names(self, repo, tmp_path):
        weights = Release(create()).files(REPO)['model.safetensors']
        repo(other_safetensors=weights)
        model = timm.create_model(
            NAME, pretrained=True, **SMALL, cache_dir=tmp_path / 'cache',
            pretrained_cfg_overlay=dict(hf_hub_id=REPO, hf_hub_filename='other.safetensors'))
        assert torch.equal(model.head.bias, load(weights)['head.bias'])
        assert [*(tmp_path / 'cache').rglob('other.safetensors')]

    def test_config_that_names_another_place(self, repo, server):
        """ Only what the repository has as safetensors is loaded, whatever its config says."""
        config = json.loads(repo()['config.json'])
        config['pretrained_cfg'].update(state_dict={'a': 1}, file='nowhere.pth', url='http://127.0.0.1:9/x')
        changes = dict(config_json=json.dumps(config).encode(), pytorch_model_bin=b'x')
        contents = repo(**changes)
        model = timm.create_model(f'hf-hub:{REPO}', pretrained=True)
        assert torch.equal(model.head.bias, load(contents['model.safetensors'])['head.bias'])
        repo(model_safetensors=None, **changes)
        with pytest.raises(HubError, match='model.safetensors'):
            timm.create_model(f'hf-hub:{REPO}', pretrained=True)
        assert not [request for request in server.requests if 'pytorch' in request.path]

    @pytest.mark.parametrize('place', ['file', 'state_dict'])
    def test_callers_own_place(self, repo, tmp_path, place):
        """ As train.py's `--pretrained-path` gives it."""
        repo()
        weights = create().state_dict()
        torch.save(weights, tmp_path / 'mine.pth')
        model = timm.create_model(f'hf-hub:{REPO}', pretrained=True, pretrained_cfg_overlay={
            place: dict(file=str(tmp_path / 'mine.pth'), state_dict=weights)[place]})
        assert torch.equal(model.head.bias, weights['head.bias'])

    @pytest.mark.parametrize('change', [
        dict(pretrained_cfg=None), dict(model_args=None), dict(model_args=[]),
        dict(model_args=dict(SMALL, features_only=True)), dict(pretrained_cfg=dict(input_size=[32, 32]))], ids=str)
    def test_config_of_another_shape(self, repo, change):
        config = json.loads(repo()['config.json'])
        repo(config_json=json.dumps({**config, **change}).encode())
        with pytest.raises(HubError) as error:
            pull_from_hub(REPO)
        assert 'config.json does not fit model.safetensors' in told(error)

    def test_other_architecture(self, repo):
        contents = repo()
        config = {**json.loads(contents['config.json']), 'architecture': 'resnet18'}
        repo(config_json=json.dumps(config).encode())
        with pytest.raises(HubError) as error:
            pull_from_hub(REPO)
        assert "architecture 'resnet18' is none of this package" in told(error)

    @pytest.mark.parametrize('config', [b'', b'[]', b'{}', b'\xff' * 2000])
    def test_broken_config(self, repo, config):
        repo(config_json=config)
        with pytest.raises(HubError) as error:
            pull_from_hub(REPO)
        assert 'config.json is not a config of timm' in told(error)
        assert len(str(error.value)) < 200

    def test_weights_that_do_not_fit(self, repo, tmp_path):
        contents = repo()
        config = json.loads(contents['config.json'])
        config['model_args']['depth'] = 3
        repo(config_json=json.dumps(config).encode())
        with pytest.raises(HubError) as error:
            pull_from_hub(REPO)
        assert 'config.json does not fit model.safetensors' in told(error)
        with pytest.raises(HubError, match='does not fit'):
            hub.pull_to_folder(REPO, tmp_path / 'pulled')
        assert not (tmp_path / 'pulled').exists()

    def test_truncated_weights(self, repo):
        repo(model_safetensors=repo()['model.safetensors'][:1000])
        for load_it in (pull_from_hub, lambda name: timm.create_model(f'hf-hub:{name}', pretrained=True)):
            with pytest.raises(HubError) as error:
                load_it(REPO)
            told(error)


def test_two_processes_pull_at_once(server, tmp_path):
    push_to_hub(create(dim=256), REPO, token=TOKEN)
    server.fail('/cdn/', 'slow', times=None)
    code = f"import splitmixer_timm; print(splitmixer_timm.pull_from_hub('{REPO}').head.weight.sum().item())"
    env = {**os.environ, **server.env(tmp_path / 'shared'), 'PYTHONPATH': str(ROOT)}
    processes = [
        subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
        for _ in range(2)]
    answers = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    assert answers[0][0] == answers[1][0] != b''


@pytest.fixture
def run_dir(tmp_path):
    """ A run of train.py on somebody's ten classes, with its class folders."""
    args = yaml.safe_load((manifest.WEIGHTS_DIR / 'runs' / ZOO / 'args.yaml').read_text())
    model = create(num_classes=10)
    data = tmp_path / 'secret-place'
    for label in 'jihgfedcba':
        (data / 'train' / label).mkdir(parents=True)
        (data / 'train' / label / '0.png').touch()
    args.update(
        model=NAME, model_kwargs=SMALL, num_classes=None, data_dir=str(data), train_split='train',
        mean=[0.5, 0.5, 0.5], output='/secret/output')
    folder = tmp_path / 'run'
    folder.mkdir()
    (folder / 'args.yaml').write_text(yaml.safe_dump(args))
    (folder / 'summary.csv').write_text('epoch,train_loss,eval_loss,eval_top1,eval_top5\n0,2,2,40,90\n1,1,1,70.5,99\n')
    torch.save({'epoch': 1, 'state_dict': model.state_dict()}, folder / 'last.pth.tar')
    torch.save({'epoch': 0, 'state_dict': model.state_dict()}, folder / 'model_best.pth.tar')
    return folder, model


class TestCommandLine:
    @pytest.fixture(autouse=True)
    def _logged_in(self, server, monkeypatch):
        monkeypatch.setenv('HF_TOKEN', TOKEN)

    def test_push_of_the_zoo(self, server, capsys):
        assert cli.main(['push', ZOO, REPO]) == 0
        url = capsys.readouterr().out.strip()
        assert url.endswith(server.repos[REPO].branches['main'])
        assert load(files(server)['model.safetensors']).keys() == load_file(manifest.bundled_file(ZOO)).keys()
        assert cli.main(['predict', str(ROOT / 'tests/assets/airplane.png'), '--model', f'hf-hub:{REPO}']) == 0
        assert 'airplane' in capsys.readouterr().out

    def test_push_of_a_run(self, server, run_dir):
        folder, model = run_dir
        args = yaml.safe_load((folder / 'args.yaml').read_text())
        # which train.py looks at with --pretrained alone
        (folder / 'args.yaml').write_text(yaml.safe_dump({**args, 'pretrained_path': '/secret/first.pth'}))
        assert cli.main(['push', str(folder), REPO, '--dataset', 'alice/letters']) == 0
        published = files(server)
        config = json.loads(published['config.json'])
        assert config['label_names'] == list('abcdefghij')
        assert config['pretrained_cfg']['mean'] == [0.5, 0.5, 0.5]
        assert published.keys() == {'config.json', 'model.safetensors', 'README.md', 'args.yaml', 'summary.csv'}
        assert not [name for name, content in published.items() if b'secret' in content]
        readme = published['README.md'].decode()
        assert 'top-1 accuracy, %: 70.50' in readme
        assert '- Epochs: 2' in readme
        assert TOLD in readme
        assert yaml.safe_load(readme.split('---')[1])['datasets'] == ['alice/letters']
        assert_same(model, pull_from_hub(REPO))

        assert 'Started from' not in readme

        assert cli.main(['push', str(folder / 'model_best.pth.tar'), REPO]) == 0
        assert 'top-1 accuracy, %: 40.00' in files(server)['README.md'].decode()

    @pytest.mark.parametrize(('given', 'told'), [
        (dict(pretrained=True), f'- Started from: the pretrained weights of `{NAME}`'),
        (dict(pretrained=True, initial_checkpoint='/secret/first.pth'), '- Started from: a checkpoint'),
        (dict(pretrained=True, pretrained_path='/secret/first.pth'), '- Started from: a checkpoint'),
        (dict(kd_model_name='resnet18', kd_distill_type='logit'), '- Teacher: `resnet18`, distilled from its logits'),
        (dict(kd_model_name='local-dir:/secret', kd_distill_type='feature'),
         '- Teacher: `local-dir:<MODEL_DIR>`, distilled from its features'),
    ])
    def test_card_of_a_fine_tuned_run(self, run_dir, capsys, given, told):
        """ Of what weights, and no share of five answers where there are no more classes."""
        folder, _ = run_dir
        args = yaml.safe_load((folder / 'args.yaml').read_text())
        for num_classes in (5, 6):
            (folder / 'args.yaml').write_text(yaml.safe_dump({**args, **given, 'num_classes': num_classes}))
            state_dict = create(num_classes=num_classes).state_dict()
            torch.save({'epoch': 1, 'state_dict': state_dict}, folder / 'last.pth.tar')
            assert cli.main(['card', str(folder)]) == 0
            card = capsys.readouterr().out
            assert told in card
            assert 'secret' not in card
            assert ('top-5' in card) == (num_classes == 6)

    def test_pull_and_push_of_a_folder(self, server, tmp_path, capsys):
        push_to_hub(timm.create_model(ZOO, pretrained=True), REPO, token=TOKEN)
        folder = tmp_path / 'new' / 'folder'
        assert cli.main(['pull', REPO, '--to', str(folder)]) == 0
        assert f"timm.create_model('local-dir:{folder}', pretrained=True)" in capsys.readouterr().out
        names = {path.name for path in folder.iterdir()}
        assert names == files(server).keys()
        assert not list(folder.parent.glob('.*'))
        assert folder.stat().st_mode & 0o777 == 0o755  # others may read it
        server.requests.clear()
        model = timm.create_model(f'local-dir:{folder}', pretrained=True)
        assert not server.requests
        assert_same(model, timm.create_model(ZOO, pretrained=True))
        assert cli.main(['push', str(folder), 'alice/copy']) == 0
        assert json.loads(files(server, 'alice/copy')['config.json'])['label_names'][0] == 'airplane'

    @pytest.mark.parametrize('revision', [None, 'v2'])
    def test_push_over_a_run(self, server, run_dir, revision):
        """ What tells of the run goes with its weights, and what others put beside them stays."""
        assert cli.main(['push', str(run_dir[0]), REPO]) == 0
        server.repos[REPO].commit({'notes.txt': b'Mine'}, 'Edit')
        for _ in range(2):
            push_to_hub(create(), REPO, token=TOKEN, revision=revision)
            published = files(server, revision=revision or 'main')
            assert published.keys() == {'config.json', 'model.safetensors', 'README.md', 'notes.txt'}
        model = create()
        commits = [push_to_hub(model, REPO, token=TOKEN, revision=revision) for _ in range(2)]
        assert commits[0] == commits[1]

    def test_card_of_a_pulled_run(self, server, run_dir, tmp_path, capsys):
        """ It names the files that are there."""
        assert cli.main(['push', str(run_dir[0]), REPO]) == 0
        assert cli.main(['pull', REPO, '--to', str(tmp_path / 'pulled')]) == 0
        capsys.readouterr()
        assert cli.main(['card', str(tmp_path / 'pulled')]) == 0
        assert TOLD in capsys.readouterr().out

    @pytest.mark.parametrize('repo_id', ['bad name/x', 'a/b/c', 'name'])
    def test_dry_run_of_a_name_that_the_hub_refuses(self, server, capsys, repo_id):
        assert cli.main(['push', ZOO, repo_id, '--dry-run']) == 2
        out, err = capsys.readouterr()
        assert out == ''
        assert repo_id in err

    def test_reader_that_goes_away(self):
        code = f'import sys; from splitmixer_timm import cli; sys.exit(cli.main(["push", "{ZOO}", "a/b", "--dry-run"]))'
        process = subprocess.Popen(
            [sys.executable, '-u', '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
        process.stdout.close()
        with process.stderr:
            assert process.stderr.read() == b''
        assert process.wait() == 1

    def test_pull_to_a_place_that_is_taken(self, server, tmp_path, capsys):
        push_to_hub(create(), REPO, token=TOKEN)
        (tmp_path / 'file').touch()
        assert cli.main(['pull', REPO, '--to', str(tmp_path)]) == 2
        assert f'{tmp_path} exists already' in capsys.readouterr().err

    def test_pull_to_where_one_is(self, server, tmp_path, capsys, monkeypatch):
        push_to_hub(create(), REPO, token=TOKEN)
        empty = tmp_path / 'empty'
        empty.mkdir()
        monkeypatch.chdir(empty)
        assert cli.main(['pull', REPO, '--to', '.']) == 2
        assert 'name another folder' in capsys.readouterr().err

    def test_pull_to_a_link(self, server, tmp_path):
        """ It stays, as the mount point of a volume must."""
        push_to_hub(create(), REPO, token=TOKEN)
        (tmp_path / 'volume').mkdir(mode=0o700)
        (tmp_path / 'link').symlink_to('volume')
        assert cli.main(['pull', REPO, '--to', str(tmp_path / 'link')]) == 0
        assert (tmp_path / 'link').is_symlink()
        assert {path.name for path in (tmp_path / 'volume').iterdir()} == files(server).keys()
        assert (tmp_path / 'volume').stat().st_mode & 0o777 == 0o700
        assert isinstance(timm.create_model(f'local-dir:{tmp_path}/link', pretrained=True), splitmixer_timm.SplitMixer)

    @pytest.mark.parametrize('name', ["alice's", 'n' * 255], ids=['quote', 'long'])
    def test_pull_to_any_name(self, server, tmp_path, capsys, monkeypatch, name):
        push_to_hub(create(), REPO, token=TOKEN)
        monkeypatch.chdir(tmp_path)
        assert cli.main(['pull', REPO, '--to', name]) == 0
        assert isinstance(eval(capsys.readouterr().out.splitlines()[-1]), splitmixer_timm.SplitMixer)

    @pytest.mark.parametrize('fault', [503, 'drop'])
    def test_pull_of_a_part_is_none(self, server, tmp_path, capsys, fault):
        push_to_hub(create(), REPO, token=TOKEN)
        server.fail('README.md', fault, times=None)
        assert cli.main(['pull', REPO, '--to', str(tmp_path / 'a')]) == 2
        assert capsys.readouterr().err.count('\n') == 1
        assert not (tmp_path / 'a').exists()

    def test_failed_pull_leaves_no_folder(self, server, tmp_path, capsys):
        assert cli.main(['pull', REPO, '--to', str(tmp_path / 'a' / 'b')]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f'splitmixer-timm: error: {REPO}: no such repository')
        assert err.count('\n') == 1
        assert not (tmp_path / 'a').exists()

    def test_whole_zoo(self, server, capsys, monkeypatch, tmp_path):
        assert cli.main(['push', '--all', '--org', 'zoo', '--dry-run']) == 0
        out = capsys.readouterr().out
        assert not server.requests
        for name, entry in manifest.entries().items():
            assert f'{name} -> zoo/{name}\n' in out
            assert f' {entry["bytes"]:,}  model.safetensors\n' in out
        path = tmp_path / 'manifest.json'
        shutil.copy(manifest.WEIGHTS_DIR / 'manifest.json', path)
        runs = manifest.WEIGHTS_DIR / 'runs'
        (tmp_path / 'runs').symlink_to(runs)
        for entry in manifest.entries().values():
            (tmp_path / entry['file']).symlink_to(manifest.WEIGHTS_DIR / entry['file'])
        monkeypatch.setattr(manifest, 'WEIGHTS_DIR', tmp_path)
        assert cli.main(['push', '--all', '--org', 'zoo', '--record']) == 0
        written = json.loads(path.read_text())['models']
        for name in manifest.entries():
            assert written[name]['hf_hub_id'] == f'zoo/{name}'
            assert written[name]['revision'] == server.repos[f'zoo/{name}'].branches['main']
        # what is recorded is what the zoo then downloads where it does not bundle a file
        monkeypatch.setattr(manifest, 'load_manifest', lambda: {'models': written})
        assert manifest.published(ZOO) == dict(hf_hub_id=f'zoo/{ZOO}@{written[ZOO]["revision"]}')
        expected = timm.create_model(ZOO, pretrained=True)
        (tmp_path / written[ZOO]['file']).unlink()
        cfg = {**expected.pretrained_cfg, 'file': None, **manifest.source_cfg(ZOO)}
        server.fail('/cdn/', 'wrong-hash')
        with pytest.raises(HubError, match='damaged on the way'):
            timm.create_model(ZOO, pretrained=True, pretrained_cfg=cfg)
        assert_same(expected, timm.create_model(ZOO, pretrained=True, pretrained_cfg=cfg))

    def test_record_of_what_is_not_the_zoos(self, server, run_dir, capsys):
        folder, _ = run_dir
        for argv in (['push', str(folder), REPO, '--record'], ['push', ZOO, REPO, '--record', '--create-pr']):
            assert cli.main(argv) == 2
            assert '--record is for models of the zoo' in capsys.readouterr().err
        assert not server.requests

    @pytest.mark.usefixtures('read_only')
    def test_record_where_it_cannot_be_written(self, server, capsys):
        """ Told before anything is published."""
        assert cli.main(['push', ZOO, REPO, '--record']) == 2
        err = capsys.readouterr().err
        assert f'where models are published cannot be written to {manifest.WEIGHTS_DIR}: Read-only file system' in err
        assert not server.requests

    def test_a_folder_named_like_a_model(self, server, tmp_path, monkeypatch):
        """ The zoo's name is the zoo's; the folder's weights are known as the zoo's besides."""
        push_to_hub(timm.create_model(ZOO, pretrained=True), f'alice/{ZOO}', token=TOKEN)
        expected = files(server, f'alice/{ZOO}')
        monkeypatch.chdir(tmp_path)
        assert cli.main(['pull', f'alice/{ZOO}']) == 0
        for argv in ([ZOO], [f'./{ZOO}'], ['splitmixer_i_256_8']):
            assert cli.main(['push', *argv, 'alice/b']) == 0
            published = files(server, 'alice/b')
            assert published['model.safetensors'] == expected['model.safetensors']
            assert b'top-1 accuracy, %' in published['README.md']

    def test_averaged_checkpoint_was_not_measured(self, server, run_dir):
        folder, model = run_dir
        torch.save({'state_dict': model.state_dict()}, folder / 'averaged.pth')
        assert cli.main(['push', str(folder / 'averaged.pth'), REPO]) == 0
        assert 'Not measured.' in files(server)['README.md'].decode()

    @pytest.mark.parametrize(('dataset', 'hub_id', 'labels'), [
        ('torch/cifar10', 'uoft-cs/cifar10', True), ('hfds/uoft-cs/cifar10', 'uoft-cs/cifar10', False),
        ('hfds/acme/cifar10', 'acme/cifar10', False), ('torch/CIFAR10', 'uoft-cs/cifar10', True),
        ('HFiDS/uoft-cs/cifar10', 'uoft-cs/cifar10', False)])
    def test_dataset_of_a_run(self, server, run_dir, dataset, hub_id, labels):
        folder, _ = run_dir
        args = yaml.safe_load((folder / 'args.yaml').read_text())
        (folder / 'args.yaml').write_text(yaml.safe_dump({**args, 'dataset': dataset}))
        assert cli.main(['push', str(folder), REPO]) == 0
        metadata = yaml.safe_load(files(server)['README.md'].decode().split('---')[1])
        assert metadata['datasets'] == [hub_id]
        # torchvision's other split is the test set
        is_test = dataset in ('torch/cifar10', 'torch/CIFAR10')
        split = metadata['model-index'][0]['results'][0]['dataset']['split']
        assert split == ('test' if is_test else 'validation')
        told = 'the official test set' if is_test else 'its validation split'
        measured = f"- Measured: {split} split; timm's train.py on {told}, after epoch 2\n"
        assert measured in files(server)['README.md'].decode()
        assert ('label_names' in json.loads(files(server)['config.json'])) == labels

    def test_checkpoint_in_the_middle_of_a_run(self, run_dir):
        """ One that is kept for its figure on the test set is said to be."""
        folder, model = run_dir
        (folder / 'summary.csv').write_text('epoch,eval_top1\n0,40\n1,71\n2,70\n')
        told = {}
        for epoch in range(3):
            torch.save({'epoch': epoch, 'state_dict': model.state_dict()}, folder / 'model_best.pth.tar')
            told[epoch] = run_release(folder / 'model_best.pth.tar').metrics['measured_by'].partition(', ')[2]
        assert told == {
            0: 'after epoch 1 of a run of 3', 1: 'after epoch 2 of a run of 3, the best of 3 measured so',
            2: 'after epoch 3'}

    @pytest.mark.parametrize('source', ['hf-hub', 'local-dir'])
    def test_run_from_a_published_model(self, server, run_dir, tmp_path, source):
        """ As fine-tuning of what was pushed goes: the architecture and its arguments are in that configuration."""
        folder, _ = run_dir
        pushed = create(num_classes=10, dim=24)
        push_to_hub(pushed, 'alice/first', token=TOKEN)
        pulled = tmp_path / 'somewhere'
        assert cli.main(['pull', 'alice/first', '--to', str(pulled)]) == 0
        name = 'hf-hub:alice/first' if source == 'hf-hub' else f'local-dir:{pulled}'
        args = yaml.safe_load((folder / 'args.yaml').read_text())
        (folder / 'args.yaml').write_text(
            yaml.safe_dump({**args, 'model': name, 'model_kwargs': {}, 'pretrained': True}))
        tuned = create(num_classes=10, dim=24)
        torch.save({'epoch': 1, 'state_dict': tuned.state_dict()}, folder / 'last.pth.tar')
        assert cli.main(['push', str(folder), REPO]) == 0
        assert_same(tuned, pull_from_hub(REPO))
        published = files(server)
        assert json.loads(published['config.json'])['label_names'] == list('abcdefghij')
        assert yaml.safe_load(published['args.yaml'])['model'] == (
            name if source == 'hf-hub' else 'local-dir:<MODEL_DIR>')
        assert not [content for content in published.values() if str(tmp_path).encode() in content]

    @pytest.mark.parametrize(('model', 'message'), [
        ('hf-hub:alice/none', 'trained hf-hub:alice/none, which cannot be made here (HubError: alice/none: no such '),
        ('local-dir:nowhere', 'trained local-dir:nowhere, which cannot be made here ('),
        ('local-dir:FOLDER', 'FOLDER, which is no model of this package'),
        ('resnet18', 'trained resnet18, which is no model of this package'),
    ])
    def test_run_of_another_model(self, server, run_dir, tmp_path, capsys, model, message):
        folder, _ = run_dir
        (tmp_path / 'config.json').write_text(json.dumps(dict(
            architecture='resnet18', num_classes=10, num_features=512, pretrained_cfg=dict(input_size=[3, 32, 32]))))
        args = yaml.safe_load((folder / 'args.yaml').read_text())
        model = model.replace('FOLDER', str(tmp_path))
        (folder / 'args.yaml').write_text(yaml.safe_dump({**args, 'model': model, 'model_kwargs': {}}))
        assert cli.main(['push', str(folder), REPO]) == 2
        err = capsys.readouterr().err
        assert message.replace('FOLDER', str(tmp_path)) in err
        assert err.count('\n') == 1

    def test_label_names(self, server, run_dir, tmp_path, caplog):
        folder, _ = run_dir
        shutil.rmtree(tmp_path / 'secret-place')
        assert cli.main(['push', str(folder), REPO]) == 0
        assert 'published without class names' in caplog.text
        (tmp_path / 'labels.txt').write_text('\n'.join('klmnopqrst'), encoding='utf-8-sig')  # as Windows writes it
        assert cli.main(['push', str(folder), REPO, '--label-names', str(tmp_path / 'labels.txt')]) == 0
        assert json.loads(files(server)['config.json'])['label_names'] == list('klmnopqrst')

    def test_label_names_that_are_not_there(self, run_dir, capsys):
        assert cli.main(['push', str(run_dir[0]), REPO, '--label-names', 'nowhere.txt']) == 2
        assert '--label-names: nowhere.txt cannot be read: No such file or directory' in capsys.readouterr().err

    @pytest.mark.parametrize('there', ['nothing', 'other classes', 'no class map'])
    def test_class_folders_that_are_the_runs_no_more(self, server, run_dir, tmp_path, caplog, monkeypatch, there):
        """ A relative place may be anything by now: no name is better than a wrong one."""
        folder, _ = run_dir
        args = yaml.safe_load((folder / 'args.yaml').read_text())
        if there == 'no class map':
            args['class_map'] = str(tmp_path / 'gone.txt')
        else:
            args['data_dir'] = 'data'
            monkeypatch.chdir(tmp_path)
            (tmp_path / 'data').mkdir()
            for label in 'abc' if there == 'other classes' else '':
                (tmp_path / 'data' / label).mkdir()
                (tmp_path / 'data' / label / '0.png').touch()
        (folder / 'args.yaml').write_text(yaml.safe_dump(args))
        assert cli.main(['push', str(folder), REPO]) == 0
        assert 'published without class names' in caplog.text
        assert 'label_names' not in json.loads(files(server)['config.json'])

    @pytest.mark.parametrize(('place', 'told'), [
        (dict(dataset='hfds//somewhere/secret'), 'hfds/<DATA_DIR>'),
        (dict(dataset='HFiDS//somewhere/secret'), 'hfids/<DATA_DIR>'),
        (dict(dataset='hfds/somewhere/secret'), 'hfds/<DATA_DIR>'),
        (dict(train_split='/somewhere/secret-{0..9}.tar', dataset='wds/mine'), '<TRAIN_SPLIT>'),
        (dict(val_split='s3://secret/somewhere/{0..9}.tar', dataset='wds/mine'), '<VAL_SPLIT>'),
        (dict(val_split='part-{0..9}.tar', dataset='wds/mine'), 'part-{0..9}.tar'),
        (dict(class_map='/somewhere/secret.txt'), '<CLASS_MAP>'),
        (dict(kd_model_name='local-dir:/somewhere/secret'), 'local-dir:<MODEL_DIR>')])
    def test_places_are_not_told(self, server, run_dir, tmp_path, monkeypatch, place, told):
        folder, _ = run_dir
        (tmp_path / 'somewhere' / 'secret').mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        args = yaml.safe_load((folder / 'args.yaml').read_text())
        (folder / 'args.yaml').write_text(yaml.safe_dump({**args, **place}))
        assert cli.main(['push', str(folder), REPO]) == 0
        assert not [name for name, content in files(server).items() if b'somewhere' in content]
        assert yaml.safe_load(files(server)['args.yaml'])[next(iter(place))] == told

    def test_recovery(self, run_dir):
        """ What was written within an epoch was not measured, unlike the weights at its end."""
        folder, _ = run_dir
        (folder / 'recovery-1-7.pth.tar').write_bytes((folder / 'last.pth.tar').read_bytes())
        release = run_release(folder / 'recovery-1-7.pth.tar')
        assert (release.metrics, release.training['epochs']) == ({}, None)
        assert run_release(folder).metrics['top1'] == 70.5

    def test_more_classes_than_the_data_set_has(self, run_dir, caplog):
        folder, _ = run_dir
        args = yaml.safe_load((folder / 'args.yaml').read_text())
        (folder / 'args.yaml').write_text(yaml.safe_dump({**args, 'dataset': 'torch/cifar100'}))
        assert run_release(folder).label_names is None
        assert 'names of its classes are not at hand' in caplog.text

    def test_ema_that_was_not_measured(self, run_dir):
        """ Of an EMA on the CPU train.py keeps the weights and measures the others."""
        folder, model = run_dir
        args = yaml.safe_load((folder / 'args.yaml').read_text())
        for force_cpu in (False, True):
            args.update(model_ema=True, model_ema_force_cpu=force_cpu)
            (folder / 'args.yaml').write_text(yaml.safe_dump(args))
            assert bool(run_release(folder).metrics) != force_cpu

    def test_ema_is_published(self, run_dir):
        folder, model = run_dir
        ema = create(num_classes=10)
        args = yaml.safe_load((folder / 'args.yaml').read_text())
        (folder / 'args.yaml').write_text(yaml.safe_dump({**args, 'model_ema': True}))
        torch.save(
            {'epoch': 1, 'state_dict': model.state_dict(), 'state_dict_ema': ema.state_dict()}, folder / 'last.pth.tar')
        release = run_release(folder)
        assert torch.equal(release.model.head.weight, ema.head.weight)
        assert '- Checkpoint: EMA\n' in release.card('a', 'a')

    def test_pooling_of_the_run(self, run_dir):
        folder, _ = run_dir
        args = yaml.safe_load((folder / 'args.yaml').read_text())
        (folder / 'args.yaml').write_text(yaml.safe_dump({**args, 'gp': 'max'}))
        assert run_release(folder).model.global_pool.pool_type == 'max'

    def test_damaged_summary(self, run_dir):
        (run_dir[0] / 'summary.csv').write_text('# notes\n1,2\n')
        assert run_release(run_dir[0]).metrics == {}

    def test_log_of_a_run_that_was_there_before(self, run_dir):
        """ train.py appends to it; the best of the other run is not this one's."""
        folder, _ = run_dir
        log = (folder / 'summary.csv').read_text()
        header = log.splitlines(keepends=True)[0]
        (folder / 'summary.csv').write_text(header + ''.join(f'{n},9,9,99,99\n' for n in range(5)) + log)
        release = run_release(folder)
        assert release.metrics['measured_by'] == "timm's train.py on its validation split, after epoch 2"
        assert release.extra['summary.csv'].decode() == log

    def test_run_of_one_channel(self, server, run_dir):
        folder, _ = run_dir
        args = yaml.safe_load((folder / 'args.yaml').read_text())
        args.update(input_size=[1, 32, 32], mean=None, std=None)
        (folder / 'args.yaml').write_text(yaml.safe_dump(args))
        model = create(in_chans=1)
        torch.save({'epoch': 1, 'state_dict': model.state_dict()}, folder / 'last.pth.tar')
        assert cli.main(['push', str(folder), REPO]) == 0
        again = pull_from_hub(REPO)
        assert_same(model, again)
        assert len(again.pretrained_cfg['mean']) == 1

    @pytest.mark.parametrize(('change', 'message'), [
        (dict(args=b''), 'is not the arguments of a run'),
        (dict(args=b'a: ['), 'cannot be read'),
        (dict(args=b'model: resnet18\n'), 'is not the arguments of a run'),
        (dict(checkpoint=b'x'), 'is not a checkpoint of splitmixer_ii_256_8.cifar10 that can be read'),
        (dict(push='summary.csv'), 'is not a checkpoint of splitmixer_ii_256_8.cifar10 that can be read'),
        (dict(other=dict(dim=24)), 'is not a checkpoint of splitmixer_ii_256_8.cifar10 that can be read'),
    ], ids=str)
    def test_unreadable_run(self, server, run_dir, capsys, change, message):
        folder, _ = run_dir
        if 'args' in change:
            (folder / 'args.yaml').write_bytes(change['args'])
        if 'checkpoint' in change:
            (folder / 'last.pth.tar').write_bytes(change['checkpoint'])
        if 'other' in change:
            torch.save({'epoch': 1, 'state_dict': create(**change['other']).state_dict()}, folder / 'last.pth.tar')
        assert cli.main(['push', str(folder / change.get('push', '')), REPO]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count('\n') == 1
        assert not server.requests

    @pytest.mark.parametrize(('argv', 'message'), [
        (['push'], 'give MODEL and REPO_ID'),
        (['push', ZOO], 'give the REPO_ID'),
        (['push', '--all'], 'give MODEL and REPO_ID, or --all and --org'),
        (['push', '--all', '--org', 'zoo', '--parent-commit', 'x'], '--parent-commit is for one model'),
        (['push', ZOO, REPO, '--dataset', 'x'], 'a model of the zoo has its own'),
        (['push', 'output/run', REPO], 'no such file or folder: output/run'),
        (['push', 'splitmixer_3d_256_8', REPO], 'splitmixer_3d_256_8.cifar10 has no weights; '),
        (['push', 'splitmixer_i_256_8.mnist', REPO], "unknown tag 'mnist' of splitmixer_i_256_8; it has cifar10, "),
        (['push', 'nonsense', REPO], "unknown model 'nonsense'; "),
        (['push', ZOO, 'not a name'], 'not a name'),
        (['push', str(ROOT), REPO], 'it has no args.yaml'),
        (['card', 'nonsense'], "unknown model 'nonsense'; "),
    ])
    def test_bad_requests(self, server, capsys, argv, message):
        assert cli.main(argv) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count('\n') == 1


class TestCard:
    def run_snippet(self, text, tmp_path):
        shutil.copy(ROOT / 'tests' / 'assets' / 'airplane.png', tmp_path / 'image.png')
        code = re.search(r'```python\n(.*?)```', text, re.DOTALL)[1]
        script = tmp_path / 'snippet.py'
        script.write_text(code)
        names = {}
        here = os.getcwd()
        os.chdir(tmp_path)
        try:
            exec(compile(code, 'snippet', 'exec'), names)
        finally:
            os.chdir(here)
        return names

    def test_zoo(self, capsys, tmp_path):
        assert cli.main(['card', ZOO]) == 0
        text = capsys.readouterr().out
        entry = manifest.entries()[ZOO]
        metadata = yaml.safe_load(text.split('---')[1])
        assert metadata['library_name'] == 'timm'
        assert metadata['pipeline_tag'] == 'image-classification'
        assert metadata['license'] == entry['license']
        assert metadata['datasets'] == ['uoft-cs/cifar10']
        result, = metadata['model-index'][0]['results']
        assert [m['value'] for m in result['metrics']] == [entry['metrics']['top1'], entry['metrics']['top5']]
        assert f'Parameters: {entry["params"]:,}' in text
        assert 'Multiply-accumulates: 65.2 M' in text
        assert entry['training']['machine'] in text
        names = self.run_snippet(text, tmp_path)
        assert names['probabilities'].argmax() == 0

    @pytest.mark.parametrize('kwargs', [
        {}, dict(num_classes=3), dict(num_classes=0), dict(in_chans=1), dict(in_chans=4)], ids=str)
    def test_snippet_of_a_pushed_model(self, server, tmp_path, kwargs):
        push_to_hub(create(**kwargs), REPO, token=TOKEN)
        text = files(server)['README.md'].decode()
        names = self.run_snippet(text, tmp_path)
        assert isinstance(names['model'], splitmixer_timm.SplitMixer)
        task = 'image-feature-extraction' if kwargs.get('num_classes') == 0 else 'image-classification'
        assert yaml.safe_load(text.split('---')[1])['pipeline_tag'] == task

    def test_licence_that_is_given(self, server):
        """ It replaces the repository's; another push without one leaves it."""
        card = b'---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\nlanguage: en\n---'
        server.create_repo(REPO).commit({'README.md': card}, 'First')
        push_to_hub(create(), REPO, token=TOKEN, license='mit')
        metadata = yaml.safe_load(files(server)['README.md'].decode().split('---')[1])
        assert metadata['language'] == 'en'
        assert not {'license_name', 'license_link'} & metadata.keys()
        assert json.loads(files(server)['config.json'])['pretrained_cfg']['license'] == 'mit'
        push_to_hub(create(num_classes=3), REPO, token=TOKEN)
        assert yaml.safe_load(files(server)['README.md'].decode().split('---')[1])['license'] == 'mit'
        with pytest.raises(ValueError, match="license must be the Hub's name of one"):
            push_to_hub(create(), REPO, token=TOKEN, license='')

    @pytest.mark.parametrize('licence', ['cc-by-nc-4.0', '[mit, gpl]'])
    def test_licence_is_one(self, server, tmp_path, licence):
        """ That of the card, in config.json as well, and so in what is made of it."""
        server.create_repo(REPO).commit({'README.md': f'---\nlicense: {licence}\n---'.encode()}, 'First')
        model = create()
        urls = [push_to_hub(model, REPO, token=TOKEN) for _ in range(2)]
        assert urls[0] == urls[1]
        expected = 'apache-2.0' if licence.startswith('[') else licence  # timm has one of a model
        assert json.loads(files(server)['config.json'])['pretrained_cfg']['license'] == expected
        assert cli.main(['pull', REPO, '--to', str(tmp_path / 'pulled')]) == 0
        assert cli.main(['push', str(tmp_path / 'pulled'), 'alice/copy', '--token', TOKEN]) == 0
        metadata = yaml.safe_load(files(server, 'alice/copy')['README.md'].decode().split('---')[1])
        assert metadata['license'] == expected

    def test_licence_of_the_command_line(self, server, run_dir):
        assert cli.main(['push', str(run_dir[0]), REPO, '--token', TOKEN, '--license', 'mit']) == 0
        assert yaml.safe_load(files(server)['README.md'].decode().split('---')[1])['license'] == 'mit'

    def test_licence_is_the_models(self, server):
        model = create()
        model.pretrained_cfg = {**model.pretrained_cfg, 'license': 'mit'}
        push_to_hub(model, REPO, token=TOKEN)
        assert yaml.safe_load(files(server)['README.md'].decode().split('---')[1])['license'] == 'mit'

    def test_any_dataset(self):
        release = Release(create(), dict(top1=12.5), 'my letters')
        metadata = yaml.safe_load(release.card('a', 'b').split('---')[1])
        assert 'datasets' not in metadata
        assert metadata['model-index'][0]['results'][0]['dataset']['name'] == 'my letters'

    def test_merge_is_stable(self):
        one = Release(create()).card('a', 'b')
        assert card.merge_cards(one, one) == one
        assert card.merge_cards(one.replace('\n', '\r\n'), one) == one
        assert card.merge_cards('', one) == one

    @pytest.mark.parametrize('head', [
        '---\nlanguage: en\n---', '\n---\nlanguage: en\n---\n', '---\r\nlanguage: en\r\n---\r\n\r\n'])
    def test_front_matter(self, head):
        merged = card.merge_cards(head, Release(create()).card('a', 'b'))
        assert yaml.safe_load(merged.split('---')[1])['language'] == 'en'
        assert merged.count('---\n') == 2
        assert card.merge_cards('---\n---\n# Mine\n', merged).endswith('\n# Mine\n')

    @pytest.mark.parametrize('lines', [
        'language: no\n', 'date: 2024-13-45\n', 'foo: 0123\ntime: 12:30:45\nversion: 1.10\nx: yes\n',
        'inference: false\nwidget:\n- src: a.png\n  text: |\n    a\n\n    b\n'])
    def test_metadata_of_others_is_kept_letter_by_letter(self, lines):
        new = Release(create()).card('a', 'b')
        merged = card.merge_cards(f'---\nlicense: mit\n{lines}---\n', new)
        assert f'\n{lines}---\n' in merged
        assert card.merge_cards(merged, new) == merged

    @pytest.mark.parametrize('metadata', ['license: mit\n', '{license: mit}\n', '', 'a: 1  # one\n'])
    def test_comments_before_the_first_key_are_kept(self, metadata):
        new = Release(create()).card('a', 'b')
        merged = card.merge_cards(f'---\n\n# For the docs see\n\n  # the Hub\n{metadata}---\n', new)
        assert merged.startswith('---\n# For the docs see\n\n  # the Hub\nlibrary_name: timm\n')
        assert card.merge_cards(merged, new) == merged

    @pytest.mark.parametrize('metadata', [
        '{a: 1, b: [x, y]}', '  a: 1\n  b: [x, y]', 'license: &x mit\na: 1\nb: [x, y]\nc: *x'])
    def test_metadata_that_shares_lines(self, metadata):
        new = Release(create()).card('a', 'b')
        merged = card.merge_cards(f'---\n{metadata}\n---\n', new)
        read = yaml.safe_load(merged.split('---')[1])
        assert (read['a'], read['b']) == (1, ['x', 'y'])
        assert card.merge_cards(merged, new) == merged

    @pytest.mark.parametrize(('tags', 'expected'), [
        ('mine', ['mine']), ('[mine, timm]', ['mine']), ('[{a: b}]', [{'a': 'b'}]), ('null', []), ('', [])])
    def test_tags_of_others(self, tags, expected):
        merged = card.merge_cards(f'---\ntags: {tags}\n---\n', Release(create()).card('a', 'b'))
        assert yaml.safe_load(merged.split('---')[1])['tags'] == ['timm', 'splitmixer', *expected]

    @pytest.mark.parametrize('value', ['null', '~', ''])
    def test_licence_without_a_value(self, value):
        new = Release(create()).card('a', 'b')
        assert card.merge_cards(f'---\nlicense: {value}\n---\n', new) == new

    def test_heading_by_hand(self):
        """ As timm's is, but in a card that is not timm's."""
        merged = card.merge_cards('# Model card for my cat\n', Release(create()).card('a', 'b'))
        assert merged.endswith('\n# Model card for my cat\n')
        one = Release(create()).card('a', 'b')
        headed = one.replace(card.BEGIN, f'# Model card for my cat\n\n{card.BEGIN}')
        assert card.merge_cards(headed, one) == headed

    def test_sections_in_the_generated_part(self):
        """ What somebody wrote between its marks goes below them."""
        one = Release(create(), dataset='cifar10').card('a', 'b')
        edited = one.replace('## Citation', '## My notes\n\nTo my cat.\n\n## Citation')
        merged = card.merge_cards(edited, Release(create()).card('a', 'b'))
        assert merged.endswith(f'{card.END}\n\n## My notes\n\nTo my cat.\n')
        assert '## Data' not in merged
        assert card.merge_cards(merged, one).count('To my cat.') == 1

    def test_every_section_is_known(self):
        text = zoo_release(ZOO).card('a', 'b')
        assert tuple(re.findall('^## (.*)', text, re.MULTILINE)) == card.SECTIONS

    def test_card_that_timm_made(self):
        for given in ({}, dict(tags=['image-classification', 'timm'])):
            old = timm.models._hub.generate_readme(given, 'alice/model')
            merged = card.merge_cards(old, Release(create()).card('a', 'b'))
            assert 'transformers' not in merged
            assert '# Model card for' not in merged

    def test_seeds(self):
        text = Release(create(), dict(top1=90., seeds={'1': 90., '2': 91.})).card('a', 'b')
        assert 'Over 2 runs that differ in the seed: top-1 90.50 +- 0.71' in text

    def test_run(self, run_dir, capsys):
        assert cli.main(['card', str(run_dir[0])]) == 0
        assert "timm.create_model('hf-hub:USER/run', pretrained=True)" in capsys.readouterr().out

    def test_run_that_one_is_in(self, run_dir, monkeypatch, capsys):
        """ It has a name all the same."""
        folder, _ = run_dir
        (folder / 'below').mkdir()
        for place, name in ((folder, '.'), (folder / 'below', '..')):
            monkeypatch.chdir(place)
            assert cli.main(['card', name]) == 0
            card = capsys.readouterr().out
            assert '\n# run\n' in card
            assert "timm.create_model('hf-hub:USER/run', pretrained=True)" in card

    @pytest.mark.parametrize('line', ['datasets: [alice/insects]\n', 'model-index: []\n'])
    def test_metadata_of_a_push_is_the_last_ones(self, line):
        """ Else it could be that of earlier weights; README tells so."""
        one = Release(create()).card('a', 'b')
        assert card.merge_cards(one.replace('tags:\n', f'{line}tags:\n'), one) == one

    def test_output_that_takes_no_such_letters(self, run_dir, monkeypatch):
        monkeypatch.setattr('sys.stdout', io.TextIOWrapper(io.BytesIO(), 'ascii', 'strict'))
        assert cli.main(['card', str(run_dir[0]), '--dataset', 'Bl\xfcten']) == 0
        assert b'trained on Bl\\xfcten' in sys.stdout.buffer.getvalue()

    @pytest.mark.parametrize('metadata', ['a: [', '- a', 'text', '{a: 2024-13-45}'])
    def test_broken_metadata(self, metadata):
        with pytest.raises(ValueError, match='README.md has metadata that cannot be read'):
            card.merge_cards(f'---\n{metadata}\n---\n# By hand\n', Release(create()).card('a', 'b'))


def test_save_is_deterministic():
    model = create()
    assert len({Release(model).weights() for _ in range(5)}) == 1
