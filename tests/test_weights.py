""" The manifest and its weights: bundled, published, damaged, absent. """
import csv
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import timm
import torch
import yaml
from conftest import BASELINES, SPLITMIXERS
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_model_data_config
from timm.models import get_pretrained_cfg

from splitmixer_timm import manifest, pretrained, splitmixer
from splitmixer_timm.card import DATASETS
from splitmixer_timm.files import replace_file

NAME = 'splitmixer_i_256_8.cifar10'
ENTRIES = sorted(manifest.entries())
TEST_IMAGES = {'cifar10': 10_000, 'cifar100': 10_000, 'flowers102': 6_149, 'food101': 25_250, 'in1k': 50_000}
WITHOUT = [f'{arch}.{get_pretrained_cfg(arch).tag}' for arch in [*SPLITMIXERS, *BASELINES]
           if f'{arch}.{get_pretrained_cfg(arch).tag}' not in ENTRIES]


class TestManifest:
    """ Every entry is complete and true."""

    def test_has_the_first_weights(self):
        assert NAME in ENTRIES

    @pytest.mark.parametrize('name', ENTRIES)
    def test_entry(self, name):
        entry = manifest.entries()[name]
        arch = name.partition('.')[0]
        assert arch in [*SPLITMIXERS, *BASELINES]
        model = timm.create_model(name, device='meta')
        assert entry['params'] == sum(p.numel() for p in model.parameters())
        assert model.num_classes == len(manifest.label_names(entry['dataset']))
        metrics = entry['metrics']
        assert 0 < metrics['top1'] < metrics['top5'] <= 100
        assert metrics['images'] == TEST_IMAGES[entry['dataset']] == DATASETS[entry['dataset']].test
        assert 'on the official test set' in metrics['measured_by']
        assert entry['license']
        training = entry['training']
        assert {'recipe', 'epochs', 'seed', 'machine', 'torch', 'timm', 'date', 'args', 'summary'} <= training.keys()

    @pytest.mark.parametrize('name', ENTRIES)
    def test_run_is_kept(self, name):
        """ And those of further seeds."""
        entry = manifest.entries()[name]
        training, metrics = entry['training'], entry['metrics']
        seeds = metrics.get('seeds', {str(training['seed']): metrics['top1']})
        assert seeds[str(training['seed'])] == metrics['top1']
        for seed, top1 in seeds.items():
            part = '' if seed == str(training['seed']) else f'.{seed}'
            file, log = (manifest.WEIGHTS_DIR / training[key] for key in ('args', 'summary'))
            args = yaml.safe_load(file.with_stem(f'args{part}').read_text())
            assert args['model'].partition('.')[0] == name.partition('.')[0]
            assert str(args['seed']) == seed
            assert not [v for v in args.values() if isinstance(v, str) and v.startswith(('/', '~', '..'))]
            with open(log.with_stem(f'summary{part}'), encoding='utf-8', newline='') as f:
                last = [*csv.DictReader(f)][-1]
            assert last['epoch'] == str(training['epochs'] - 1)
            if entry['dataset'].startswith('cifar'):  # which train.py tests by the same pixels, in half precision
                assert float(last['eval_top1']) == pytest.approx(top1, abs=0.1)

    @pytest.mark.parametrize('name', ENTRIES)
    def test_bundled_file(self, name):
        path = manifest.bundled_file(name)
        if path is None:
            assert manifest.source_cfg(name), f'{name} is neither bundled nor published'
            return
        manifest.check_file(path, name)
        with safe_open(path, 'pt') as f:
            assert f.metadata()['format'] == 'pt'
            assert set(f.keys()) == timm.create_model(name, device='meta').state_dict().keys()

    def test_nothing_unlisted(self):
        listed = {entry['file'] for entry in manifest.entries().values()}
        assert {path.name for path in manifest.WEIGHTS_DIR.glob('*.safetensors')} <= listed
        assert not [p for p in manifest.WEIGHTS_DIR.rglob('*') if p.suffix in ('.pth', '.pt', '.bin', '.pkl', '.tar')]


class TestPretrained:
    def test_bundled_weights_load(self):
        model = timm.create_model('splitmixer_i_256_8', pretrained=True)
        expected = load_file(manifest.bundled_file(NAME))
        assert model.num_classes == 10
        assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())

    def test_listed_as_pretrained(self):
        assert NAME in timm.list_pretrained('splitmixer*')
        assert timm.models.is_model_pretrained('splitmixer_i_256_8')
        assert set(timm.list_pretrained('*mixer_*256_8*')) == set(ENTRIES)

    @pytest.mark.parametrize('in_chans', [1, 3, 4, '4'])
    def test_adapted(self, in_chans):
        model = timm.create_model('splitmixer_i_256_8', pretrained=True, in_chans=in_chans, num_classes=5)
        weights = load_file(manifest.bundled_file(NAME))
        assert torch.equal(model.blocks[7].spatial_mixing.conv2.weight,
                           weights['blocks.7.spatial_mixing.conv2.weight'])
        assert model(torch.randn(2, int(in_chans), 32, 32)).shape == (2, 5)

    def test_features(self):
        model = timm.create_model(NAME, pretrained=True, features_only=True, out_indices=(0, 7))
        assert [f.shape for f in model(torch.randn(1, 3, 32, 32))] == [(1, 256, 16, 16)] * 2

    def test_classifies_the_example(self):
        from PIL import Image
        model = timm.create_model(NAME, pretrained=True).eval()
        transform = create_transform(**resolve_model_data_config(model))
        image = Image.open(Path(__file__).parent / 'assets' / 'airplane.png').convert('RGB')
        with torch.no_grad():
            top = model(transform(image)[None]).argmax().item()
        assert model.pretrained_cfg['label_names'][top] == 'airplane'

    @pytest.mark.parametrize('name', WITHOUT)
    def test_none(self, name):
        with pytest.raises(RuntimeError) as error:
            timm.create_model(name, pretrained=True)
        assert f'No pretrained weights exist for {name}' in str(error.value)
        assert all(entry in str(error.value) for entry in ENTRIES)


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """ A weights folder of its own, with a narrow model for the tag of the first weights."""
    weights_dir = tmp_path / 'weights'
    weights_dir.mkdir()
    state_dict = timm.create_model('splitmixer_i_256_8', dim=16, depth=2).state_dict()
    save_file(state_dict, weights_dir / 'w.safetensors')
    content = (weights_dir / 'w.safetensors').read_bytes()
    entry = dict(
        file='w.safetensors', bytes=len(content), sha256=hashlib.sha256(content).hexdigest(), dataset='cifar10')
    data = dict(hf_hub_org='', base_url='', models={NAME: entry})
    monkeypatch.setattr(manifest, 'WEIGHTS_DIR', weights_dir)
    monkeypatch.setattr(manifest, 'load_manifest', lambda: data)

    class Zoo:
        path = weights_dir / 'w.safetensors'
        file = tmp_path / 'published.safetensors'

        def publish(self, **where):
            """ Move the file away from the bundle; it is to be had elsewhere."""
            shutil.move(self.path, self.file)
            (entry if 'url' in where or 'hf_hub_id' in where else data).update(where)

        def create(self, **kwargs):
            cfg = dict(get_pretrained_cfg(NAME).to_dict(), file=None, url=None, hf_hub_id=None)
            return timm.create_model(
                'splitmixer_i_256_8', pretrained=True, dim=16, depth=2,
                pretrained_cfg={**cfg, **manifest.source_cfg(NAME)}, **kwargs)

        def check(self, model):
            assert all(torch.equal(v, state_dict[k]) for k, v in model.state_dict().items())

    zoo = Zoo()
    zoo.entry, zoo.data = entry, data
    return zoo


@pytest.fixture
def server(tmp_path, monkeypatch):
    """ An HTTP server on loopback that serves `tmp_path` and counts requests."""
    requests = []
    monkeypatch.setenv('no_proxy', '*')

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path)

        def log_message(self, *args):
            requests.append(self.path)

    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    httpd.requests = requests
    httpd.url = f'http://127.0.0.1:{httpd.server_port}'
    yield httpd
    httpd.shutdown()
    thread.join()
    httpd.server_close()


class TestDamaged:
    """ A file that is not the manifest's is never loaded."""

    def test_intact(self, zoo):
        zoo.check(zoo.create())

    def test_truncated(self, zoo):
        zoo.path.write_bytes(zoo.path.read_bytes()[:-100])
        with pytest.raises(RuntimeError, match=f'{NAME} refused.*truncated'):
            zoo.create()

    def test_changed_byte(self, zoo):
        content = bytearray(zoo.path.read_bytes())
        content[-1] ^= 1
        zoo.path.write_bytes(content)
        with pytest.raises(RuntimeError, match=f'{NAME} refused.*sha256'):
            zoo.create()

    def test_missing_and_unpublished(self, zoo):
        zoo.path.unlink()
        with pytest.raises(RuntimeError, match=f'weights of {NAME} should be at {zoo.path} and are not: reinstall'):
            zoo.create()

    @pytest.mark.parametrize('cfg', [get_pretrained_cfg(NAME).to_dict(remove_source=True), dict(num_classes=10)])
    def test_no_place_in_a_cfg(self, cfg):
        """ Which is not that the file is missing, or that the model has no weights."""
        with pytest.raises(RuntimeError, match='given for splitmixer_i_256_8 does not say where .* file, url,'):
            timm.create_model('splitmixer_i_256_8', pretrained=True, pretrained_cfg=cfg)

    @pytest.mark.parametrize('name', [NAME, 'splitmixer_i_256_8'])
    def test_weights_file(self, name):
        """ Of the default tag where none is given."""
        assert pretrained.weights_file(name) == manifest.bundled_file(NAME)

    def test_own_file_is_truncated(self, zoo, tmp_path):
        path = tmp_path / 'own.safetensors'
        path.write_bytes(zoo.path.read_bytes()[:-100])
        with pytest.raises(RuntimeError, match='own.safetensors.*truncated'):
            zoo.create(pretrained_cfg_overlay=dict(file=str(path)))

    def test_own_file_is_missing(self, zoo):
        with pytest.raises(FileNotFoundError, match='nowhere.safetensors'):
            zoo.create(pretrained_cfg_overlay=dict(file='nowhere.safetensors'))

    def test_manifest_is_broken(self, tmp_path, monkeypatch):
        (tmp_path / 'manifest.json').write_text('{"models": ')
        monkeypatch.setattr(manifest, 'WEIGHTS_DIR', tmp_path)
        with pytest.raises(RuntimeError, match='not a readable weights manifest'):
            manifest.load_manifest.__wrapped__()


class TestPublished:
    """ Where no file is bundled, the published one is fetched once, checked, then loaded."""

    @pytest.mark.parametrize('how', ['url', 'base_url'])
    def test_url(self, zoo, server, tmp_path, how):
        zoo.publish(**{how: server.url + ('/published.safetensors' if how == 'url' else '/files/')})
        (tmp_path / 'files').mkdir()
        shutil.copy(zoo.file, tmp_path / 'files' / 'w.safetensors')
        for _ in range(2):
            zoo.check(zoo.create(cache_dir=tmp_path / 'cache'))
        assert len(server.requests) == 1
        assert len(list((tmp_path / 'cache').iterdir())) == 1

    def test_url_serves_another_file(self, zoo, server, tmp_path):
        zoo.publish(url=f'{server.url}/published.safetensors')
        zoo.file.write_bytes(zoo.file.read_bytes() + b'more')
        with pytest.raises(RuntimeError, match='hash'):
            zoo.create(cache_dir=tmp_path / 'cache')
        assert not list((tmp_path / 'cache').iterdir())

    def test_cache_is_damaged(self, zoo, server, tmp_path):
        zoo.publish(url=f'{server.url}/published.safetensors')
        zoo.create(cache_dir=tmp_path / 'cache')
        cached = next((tmp_path / 'cache').iterdir())
        cached.write_bytes(cached.read_bytes()[:-1])
        with pytest.raises(RuntimeError, match=f'{NAME} refused.*Delete it'):
            zoo.create(cache_dir=tmp_path / 'cache')

    def test_unreachable(self, zoo, tmp_path):
        zoo.publish(url='http://127.0.0.1:9/published.safetensors')
        with pytest.raises(OSError, match='.'):
            zoo.create(cache_dir=tmp_path / 'cache')
        assert not [p for p in (tmp_path / 'cache').rglob('*') if p.is_file()]

    @pytest.mark.parametrize(('where', 'expected'), [
        (dict(hf_hub_org='zoo'), f'zoo/{NAME}'),
        (dict(hf_hub_id='me/mine'), 'me/mine'),
        (dict(hf_hub_id='me/mine', revision='v2'), 'me/mine@v2'),
    ])
    def test_hub(self, zoo, where, expected, monkeypatch, tmp_path):
        asked = []

        def download_from_hf(model_id, filename, cache_dir=None):
            asked.append((model_id, filename, cache_dir))
            return str(zoo.file)

        monkeypatch.setattr(pretrained, 'download_from_hf', download_from_hf)
        zoo.publish(**where)
        zoo.check(zoo.create(cache_dir=tmp_path))
        assert asked == [(expected, 'model.safetensors', tmp_path)]
        zoo.file.write_bytes(zoo.file.read_bytes()[:-1])
        with pytest.raises(RuntimeError, match='refused'):
            zoo.create(cache_dir=tmp_path)

    def test_bundled_comes_first(self, zoo):
        zoo.entry['url'] = 'http://127.0.0.1:9/never-asked'
        zoo.check(zoo.create())

    def test_callers_own_place_comes_before_the_bundled(self, zoo, server, tmp_path):
        """ A URL in the overlay is what the caller wants, though timm would prefer the cfg's file."""
        other = {k: v + 1 if v.is_floating_point() else v for k, v in load_file(zoo.path).items()}
        save_file(other, tmp_path / 'mine.safetensors')
        model = zoo.create(
            pretrained_cfg_overlay=dict(file=str(tmp_path / 'mine.safetensors')), cache_dir=tmp_path / 'cache')
        assert torch.equal(model.head.bias, other['head.bias'])
        torch.save(other, tmp_path / 'mine.pth')
        model = zoo.create(
            pretrained_cfg_overlay=dict(url=f'{server.url}/mine.pth'), cache_dir=tmp_path / 'cache')
        assert torch.equal(model.head.bias, other['head.bias'])

    @pytest.mark.parametrize('zoo_is_at', [dict(url='http://127.0.0.1:9/zoo'), dict(hf_hub_id='zoo/model')])
    @pytest.mark.parametrize('callers', ['url', 'hf_hub_id', 'file', 'state_dict'])
    def test_callers_own_place_comes_before_the_published(
            self, zoo, server, tmp_path, monkeypatch, zoo_is_at, callers):
        """ Wherever the zoo's weights are published, the caller's are the ones that load."""
        other = {k: v + 1 if v.is_floating_point() else v for k, v in load_file(zoo.path).items()}
        save_file(other, tmp_path / 'mine.safetensors')
        torch.save(other, tmp_path / 'mine.pth')

        def download_from_hf(model_id, filename, cache_dir=None):
            assert (model_id, filename) == ('me/mine', 'model.safetensors')
            return str(tmp_path / 'mine.safetensors')

        monkeypatch.setattr(pretrained, 'download_from_hf', download_from_hf)
        zoo.publish(**zoo_is_at)
        model = zoo.create(cache_dir=tmp_path / 'cache', pretrained_cfg_overlay={callers: dict(
            url=f'{server.url}/mine.pth', hf_hub_id='me/mine', file=str(tmp_path / 'mine.safetensors'),
            state_dict=dict(other))[callers]})
        assert torch.equal(model.head.bias, other['head.bias'])


def test_licence_is_the_manifests(zoo):
    zoo.entry['license'] = 'cc-by-nc-4.0'
    cfgs = splitmixer.generate_variant_cfgs({'splitmixer_i_256_8': splitmixer.VARIANTS['splitmixer_i_256_8']})
    licenses = {tag: cfg.license for tag, cfg in cfgs['splitmixer_i_256_8'].cfgs.items()}
    assert licenses == {'cifar10': 'cc-by-nc-4.0', 'cifar100': 'apache-2.0'}


class TestClassOrder:
    def test_numbers_and_labels_in_order(self):
        for names in ([f'{n:03d}' for n in range(1, 103)], manifest.label_names('flowers102')):
            manifest.check_class_order(names, 'flowers102')
        manifest.check_class_order(sorted(manifest.label_names('cifar10')), 'cifar10')

    @pytest.mark.parametrize(('between', 'spelt'), [(' ', str), ('_', str.title)])
    def test_labels_in_alphabetical_order(self, between, spelt):
        """ Their first is not the data set's first: every class would be taken for another, without an error."""
        names = sorted(spelt(name.replace(' ', between)) for name in manifest.label_names('flowers102'))
        with pytest.raises(ValueError, match=r'name them by number, 001 \(pink primrose\) to 102'):
            manifest.check_class_order(names, 'flowers102')


class TestLocalDirAndStateDict:
    def test_local_dir(self, tmp_path):
        """ timm's own way to keep a model in a folder works with ours."""
        model = timm.create_model('splitmixer_iv_256_8', depth=2, num_segments=4, num_classes=6).eval()
        timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
        assert json.loads((tmp_path / 'config.json').read_text())['architecture'] == 'splitmixer_iv_256_8'
        loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
        x = torch.randn(1, 3, 32, 32)
        assert torch.equal(loaded(x), model(x))

    def test_state_dict(self):
        source = timm.create_model('splitmixer_ii_256_8')
        model = timm.create_model(
            'splitmixer_ii_256_8', pretrained=True, pretrained_cfg_overlay=dict(state_dict=source.state_dict()))
        assert all(torch.equal(v, source.state_dict()[k]) for k, v in model.state_dict().items())


def test_files_are_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / 'file'
    replace_file(path, b'old')
    with pytest.raises(TypeError):
        replace_file(path, 'no bytes')
    with monkeypatch.context() as patch:
        def read_only(*args):
            raise OSError('read-only')

        for module, name in ((os, 'replace'), (os, 'rename'), (type(path), 'replace'), (type(path), 'rename')):
            patch.setattr(module, name, read_only)
        with pytest.raises(OSError, match='read-only'):
            replace_file(path, b'new')
    assert [p.name for p in tmp_path.iterdir()] == ['file']
    assert path.read_bytes() == b'old'
    replace_file(path, b'new')
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b'new', 0o644)


def test_published_weights_are_recorded(tmp_path, monkeypatch):
    """ In the entry as it is by then, unless its weights are others."""
    monkeypatch.setattr(manifest, 'WEIGHTS_DIR', tmp_path)
    path = tmp_path / 'manifest.json'
    path.write_text('{"models": {}}')
    manifest.write_entry('a', dict(sha256='1', bytes=1))
    manifest.record('a', '1', hf_hub_id='someone/a', revision='2')
    assert manifest.write_entry('a', dict(sha256='1', bytes=2)) == dict(
        sha256='1', bytes=2, hf_hub_id='someone/a', revision='2')
    content = path.read_text()
    for name, sha256 in (('a', '3'), ('b', '1')):
        with pytest.raises(ValueError, match=f'^{name} has other weights now than were published'):
            manifest.record(name, sha256, hf_hub_id='someone/a', revision='4')
    assert path.read_text() == content
    assert manifest.write_entry('a', dict(sha256='3')) == dict(sha256='3')


def test_entries_written_at_once(tmp_path):
    """ None of two processes' entries is lost, nor where they are published."""
    (tmp_path / 'manifest.json').write_text('{"models": {}}')
    code = (
        'import pathlib, sys\n'
        'from splitmixer_timm import manifest\n'
        'manifest.WEIGHTS_DIR = folder = pathlib.Path(sys.argv[1])\n'
        'def begin(part):\n'  # together: else one may be done before the other begins
        '    (folder / (sys.argv[2] + part)).touch()\n'
        '    while not all((folder / (name + part)).exists() for name in "ab"):\n'
        '        pass\n'
        'begin("entries")\n'
        'for i in range(40):\n'
        '    manifest.write_entry(f"{sys.argv[2]}{i}", dict(sha256=""))\n'
        'begin("places")\n'
        'for i in range(40):\n'
        '    manifest.record(f"{sys.argv[2]}{i}", "", url="http://a/b")')
    processes = [subprocess.Popen([sys.executable, '-c', code, tmp_path, name]) for name in 'ab']
    assert [process.wait(300) for process in processes] == [0, 0]
    entries = json.loads((tmp_path / 'manifest.json').read_text())['models']
    assert list(entries.values()) == [dict(sha256='', url='http://a/b')] * 80
    assert not list(tmp_path.glob('.*.tmp'))
