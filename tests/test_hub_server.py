""" The Hub of `hub_server`, asked by the real client. """
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub as hf
import pytest
import timm
import torch
from hub_server import Call, HubServer, use_hub
from huggingface_hub import constants, errors
from safetensors.torch import save

NAME = 'alice/model'
LARGE = 'model.safetensors'
CONTENT = bytes(range(256)) * 1000
FILES = {
    'README.md': b'---\nlibrary_name: timm\ntags:\n- image-classification\n---\n# Model\n',
    'config.json': b'{"architecture": "splitmixer_i_256_8"}',
    LARGE: CONTENT,
    'runs/summary.csv': b'epoch,top1\n0,1\n',
}


def start(storage, monkeypatch, tmp_path):
    hub = HubServer(storage=storage)
    hub.add_token('hf_alice', 'alice', orgs=['zoo'])
    hub.add_token('hf_reader', 'alice', role='read')
    hub.add_token('hf_bob', 'bob')
    use_hub(hub, monkeypatch, tmp_path)
    return hub


@pytest.fixture(params=['lfs', 'xet'])
def hub(request, monkeypatch, tmp_path):
    """ Large files by git LFS and by Xet."""
    with start(request.param, monkeypatch, tmp_path) as hub:
        yield hub


@pytest.fixture
def lfs_hub(monkeypatch, tmp_path):
    with start('lfs', monkeypatch, tmp_path) as hub:
        hub.create_repo(NAME).commit(FILES, 'First')
        yield hub


def push(files, token='hf_alice', repo=NAME, **kwargs):
    operations = [hf.CommitOperationAdd(path, content) for path, content in files.items()]
    return hf.HfApi(token=token).create_commit(repo, operations, commit_message='Push', **kwargs)


def read(filename=LARGE, **kwargs):
    return Path(hf.hf_hub_download(NAME, filename, **kwargs)).read_bytes()


class TestRoundTrip:
    def test_push_and_pull(self, hub, tmp_path):
        api = hf.HfApi(token='hf_alice')
        assert api.whoami()['orgs'][0]['name'] == 'zoo'
        assert api.create_repo(NAME).repo_id == NAME
        assert api.create_repo(NAME, exist_ok=True) == f'{hub.endpoint}/{NAME}'
        repo = hub.repos[NAME]
        first = repo.branches['main']
        (tmp_path / 'weights').write_bytes(CONTENT)
        info = push({**FILES, LARGE: tmp_path / 'weights'})
        commit = repo.commits[-1]
        assert (commit.id, commit.parent, commit.title, len(repo.commits)) == (info.oid, first, 'Push', 2)
        assert {k: v for k, v in repo.files().items() if k != '.gitattributes'} == FILES
        assert push(FILES).oid == info.oid  # nothing has changed
        api.create_repo('zoo/same', private=True)
        push({LARGE: CONTENT}, repo='zoo/same')
        assert hub.repos['zoo/same'].files()[LARGE] == CONTENT
        assert any('/xet-write-token/' in r.path for r in hub.requests) == (hub.storage == 'xet')
        assert any('/upload/' in r.path for r in hub.requests) == (hub.storage == 'lfs')

        hub.requests.clear()
        assert {name: read(name) for name in FILES} == FILES
        folder = Path(hf.snapshot_download(NAME, cache_dir=tmp_path / 'other', token='hf_alice'))
        assert {name: (folder / name).read_bytes() for name in FILES} == FILES
        assert any(r.path.startswith('/cdn/') for r in hub.requests) == (hub.storage == 'lfs')
        hub.requests.clear()
        assert read(revision=info.oid) == CONTENT
        assert hub.requests == []

    def test_delete(self, hub):
        repo = hub.create_repo(NAME)
        before = set(repo.files())
        push(FILES)
        for name in FILES:
            hf.HfApi(token='hf_alice').delete_file(name, NAME)
        assert set(repo.files()) == before

    def test_other_processes(self, hub, tmp_path):
        """ One pushes, then two pull at the same time while the first is still there."""
        hub.create_repo(NAME)
        (tmp_path / 'folder').mkdir()
        (tmp_path / 'folder' / LARGE).write_bytes(CONTENT)
        script = f"""
import sys
from huggingface_hub import HfApi, hf_hub_download
if sys.argv[1:]:
    HfApi(token=sys.argv[1]).upload_folder(repo_id={NAME!r}, folder_path={str(tmp_path / 'folder')!r})
else:
    assert open(hf_hub_download({NAME!r}, {LARGE!r}), 'rb').read() == bytes(range(256)) * 1000
print('done', flush=True)
sys.stdin.read()
"""
        def run(home, *args):
            return subprocess.Popen(
                [sys.executable, '-c', script, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env={**os.environ, **hub.env(tmp_path / home)})

        with run('0', 'hf_alice') as pusher:
            assert pusher.stdout.readline() == 'done\n'
            with run('1') as first, run('2') as second:
                assert first.stdout.readline() == second.stdout.readline() == 'done\n'
                for process in (first, second, pusher):
                    process.communicate()
        assert hub.repos[NAME].files()[LARGE] == CONTENT

    def test_timm(self, hub):
        model = timm.create_model('splitmixer_i_256_8', depth=1, num_classes=2)
        config = {'architecture': 'splitmixer_i_256_8', 'num_classes': 2, 'model_args': {'depth': 1},
                  'pretrained_cfg': {'num_classes': 2, 'input_size': [3, 32, 32], 'classifier': 'head'}}
        repo = hub.create_repo(NAME)
        repo.commit({'config.json': json.dumps(config).encode(), LARGE: save(model.state_dict())}, 'First')
        hf.HfApi(token='hf_alice').create_tag(NAME, tag='v1')
        repo.commit({LARGE: b'other'}, 'Second')
        pulled = timm.create_model(f'hf-hub:{NAME}@v1', pretrained=True)
        assert all(torch.equal(pulled.state_dict()[k], v) for k, v in model.state_dict().items())

    def test_api(self, lfs_hub):
        repo, api = lfs_hub.repos[NAME], hf.HfApi(token='hf_alice')
        first = repo.branches['main']
        api.create_branch(NAME, branch='dev')
        assert push({'new': b'1'}, revision='dev').oid == repo.branches['dev']
        api.create_tag(NAME, tag='v1', revision='dev')
        assert repo.tags == {'v1': repo.branches['dev']}
        assert set(repo.files('v1')) == {'.gitattributes', 'new', *FILES}
        pull = push({'new': b'2'}, token='hf_bob', create_pr=True)
        assert pull.pr_revision == 'refs/pr/1'
        assert repo.commits[-1].parent == repo.branches['main'] == first
        assert read('new', revision='refs/pr/1') == b'2'
        refs = api.list_repo_refs(NAME, include_pull_requests=True)
        assert [[r.name for r in kind] for kind in (refs.branches, refs.tags, refs.pull_requests)] == [
            ['main', 'dev'], ['v1'], ['refs/pr/1']]
        assert set(api.list_repo_files(NAME)) == {'.gitattributes', *FILES}
        info = api.model_info(NAME, files_metadata=True)
        assert (info.sha, info.card_data['library_name'], len(info.siblings)) == (first, 'timm', 5)
        assert api.get_paths_info(NAME, [LARGE])[0].lfs.size == len(CONTENT)
        assert api.file_exists(NAME, LARGE)
        assert not api.file_exists(NAME, 'none')
        assert api.repo_exists(NAME)
        assert not api.repo_exists('alice/none')
        api.auth_check(NAME)
        api.auth_check(NAME, write=True)


def status(error):
    return error.value.response.status_code


class TestErrors:
    def test_accounts(self, lfs_hub):
        api = hf.HfApi()
        lfs_hub.create_repo('alice/private', private=True)
        lfs_hub.create_repo('alice/gated', gated=True).commit(FILES, 'First')
        for token, code in ((None, 401), ('hf_bob', 404)):
            with pytest.raises(errors.RepositoryNotFoundError) as e:
                hf.hf_hub_download('alice/private', LARGE, token=token)
            assert status(e) == code
        for token, code in ((None, 401), ('hf_bob', 403)):
            with pytest.raises(errors.GatedRepoError) as e:
                api.auth_check('alice/gated', token=token)
            assert status(e) == code
            with pytest.raises(errors.GatedRepoError):
                hf.hf_hub_download('alice/gated', LARGE, token=token)
        for token in ('hf_alice', 'hf_reader'):
            assert api.model_info('alice/private', token=token).private
            api.auth_check('alice/gated', token=token)
        for token, code in ((False, 401), ('hf_wrong', 401), ('hf_reader', 403), ('hf_bob', 403)):
            with pytest.raises(errors.HfHubHTTPError) as e:
                push(FILES, token=token)
            assert status(e) == code
        for token in ('hf_reader', 'hf_bob'):
            with pytest.raises(errors.HfHubHTTPError, match='namespace "zoo"'):
                api.create_repo('zoo/model', token=token)
        assert len(lfs_hub.repos[NAME].commits) == 2
        assert not {r.authorization for r in lfs_hub.requests if r.path.startswith(('/cdn/', '/upload/'))} - {None}

    def test_requests_that_cannot_be_met(self, lfs_hub):
        api, repo = hf.HfApi(token='hf_alice'), lfs_hub.repos[NAME]
        with pytest.raises(errors.RevisionNotFoundError):
            read(revision='none')
        with pytest.raises(errors.EntryNotFoundError):
            read('none')
        with pytest.raises(errors.RepositoryNotFoundError):
            push(FILES, repo='alice/none')
        with pytest.raises(errors.RevisionNotFoundError):
            push(FILES, revision='none')
        stale = repo.branches['main']
        repo.commit({'new': b'1'}, 'Second')
        with pytest.raises(errors.HfHubHTTPError) as e:
            push({'new': b'2'}, parent_commit=stale)
        assert status(e) == 412
        for create in (lambda: api.create_repo(NAME), lambda: api.create_branch(NAME, branch='main')):
            with pytest.raises(errors.HfHubHTTPError) as e:
                create()
            assert status(e) == 409
        damaged = hf.CommitOperationAdd(LARGE, CONTENT + b'1')
        damaged.path_or_fileobj = CONTENT + b'2'
        with pytest.raises(RuntimeError, match=LARGE):
            api.create_commit(NAME, [damaged], commit_message='Damaged on the way')
        assert lfs_hub.requests[-1].path.startswith('/upload/')
        with pytest.raises(ValueError, match='YAML Metadata Error'):
            push({'README.md': b'---\n[\n---\n'})
        assert repo.commits[-1].title == 'Second'

    def test_offline(self, lfs_hub, monkeypatch):
        read()
        lfs_hub.requests.clear()
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
        assert read() == CONTENT
        with pytest.raises(errors.LocalEntryNotFoundError):
            read('config.json')
        assert lfs_hub.requests == []


class TestFaults:
    def test_status(self, lfs_hub):
        lfs_hub.fail('config.json', 503, method='HEAD', times=2)
        assert read('config.json') == FILES['config.json']
        assert [r.method for r in lfs_hub.requests] == ['HEAD', 'HEAD', 'HEAD', 'GET']
        lfs_hub.fail('/commit/', 500, times=None)
        with pytest.raises(errors.HfHubHTTPError):
            push({'new': b'1'})
        assert len(lfs_hub.repos[NAME].commits) == 2

    def test_status_of_xet_token(self, monkeypatch, tmp_path):
        with start('xet', monkeypatch, tmp_path) as hub:
            hub.create_repo(NAME)
            hub.fail('xet-write-token', 503, times=2)
            push(FILES)
            assert sum('xet-write-token' in r.path for r in hub.requests) == 3

    def test_drop_and_resume(self, lfs_hub, monkeypatch):
        ranges = []
        send = Call.send
        monkeypatch.setattr(
            Call, 'send', lambda call, *args: ranges.append(call.headers.get('Range')) or send(call, *args))
        monkeypatch.setattr(constants, 'DOWNLOAD_CHUNK_SIZE', 1000)
        lfs_hub.fail('/cdn/', 'drop')
        assert read() == CONTENT
        assert ranges == [None, f'bytes={len(CONTENT) // 2}-']

    def test_wrong_hash(self, lfs_hub):
        lfs_hub.fail(LARGE, 'wrong-hash')
        assert read() == CONTENT[:-1] + b'\0'
        assert read(force_download=True) == CONTENT

    def test_slow(self, lfs_hub):
        lfs_hub.fail('whoami', 'slow', delay=0.3)
        begin = time.monotonic()
        hf.whoami(token='hf_alice')
        assert time.monotonic() - begin >= 0.3

    @pytest.mark.parametrize(('asked', 'expected'), [
        ('bytes=5-5', CONTENT[5:6]), ('bytes=-7', CONTENT[-7:]), ('bytes=9-', CONTENT[9:]), ('bytes=999999-', None)])
    def test_range(self, lfs_hub, asked, expected):
        url = f'{lfs_hub.endpoint}/{NAME}/resolve/main/{LARGE}'
        response = hf.get_session().get(url, headers={'Range': asked})
        assert (response.status_code, response.content) == ((206, expected) if expected else (416, b''))
