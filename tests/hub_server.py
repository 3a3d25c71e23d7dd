""" A Hugging Face Hub in this process, on loopback, for tests that talk to it with the real huggingface_hub and hf_xet.

    with HubServer() as hub:
        hub.add_token('hf_alice', 'alice')
        use_hub(hub, monkeypatch, tmp_path)
        HfApi(token='hf_alice').create_repo('alice/model')
        assert list(hub.repos['alice/model'].files()) == ['.gitattributes']

It answers what a model repository needs, with the status codes and headers of the real Hub: accounts, private and gated
repositories, branches, tags, pull requests, commits, downloads. Large files go by git LFS (`storage='lfs'`) or by Xet
(`storage='xet'`), and over HTTP are downloaded from another host name of the same server, as from the Hub's CDN.
All is kept in memory but the Xet storage, which is in a temporary folder.
"""
import base64
import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import re
import secrets
import shutil
import struct
import sys
import tempfile
import threading
import time
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union
from unittest import mock
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

LARGE = ('*.bin', '*.onnx', '*.pkl', '*.pt', '*.pth', '*.safetensors', '*.tar', '*.zip')


class Request(NamedTuple):
    """ What was asked: the path with its query and as it was quoted, the `Authorization` header or None."""
    method: str
    path: str
    authorization: Optional[str]


class Answer(NamedTuple):
    body: bytes = b''
    status: int = 200
    headers: Mapping[str, str] = {}


def to_json(data: Any, status: int = 200, headers: Mapping[str, str] = {}) -> Answer:
    return Answer(json.dumps(data).encode(), status, {'Content-Type': 'application/json', **headers})


class HubError(Exception):
    """ An answer that says what is wrong, as the Hub does."""

    def __init__(self, status: int, message: str, code: Optional[str] = None, **headers: str):
        super().__init__(message)
        headers['X-Error-Message'] = message.encode('ascii', 'backslashreplace').decode()
        if code:
            headers['X-Error-Code'] = code
        self.answer = to_json({'error': message}, status, headers)


class Account(NamedTuple):
    user: str
    role: str
    orgs: Tuple[str, ...]

    def owns(self, repo_id: str) -> bool:
        return repo_id.partition('/')[0] in (self.user, *self.orgs)


@dataclasses.dataclass(frozen=True)
class Blob:
    content: bytes
    large: bool = False
    xet_hash: Optional[str] = None

    @functools.cached_property
    def info(self) -> Dict[str, Any]:
        """ What the API says of a file; its `oid` is git's, of a large file that of the pointer."""
        info, data, size = {}, self.content, len(self.content)
        if self.large:
            sha256 = hashlib.sha256(data).hexdigest()
            data = f'version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n'.encode()
            info['lfs'] = {'oid': sha256, 'sha256': sha256, 'size': size, 'pointerSize': len(data)}
        if self.xet_hash:
            info['xetHash'] = self.xet_hash
        return {'type': 'file', 'oid': hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest(), 'size': size, **info}

    @property
    def etag(self) -> str:
        return self.info['lfs']['oid'] if self.large else self.info['oid']


@dataclasses.dataclass(frozen=True)
class Commit:
    parent: Optional[str]
    title: str
    description: str
    blobs: Mapping[str, Blob]
    id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(20))

    @property
    def files(self) -> Dict[str, bytes]:
        return {path: blob.content for path, blob in self.blobs.items()}


class Repo:
    """ A repository: `commits` in the order they were made, `branches`, `tags` and `pulls` from name to commit id."""

    def __init__(self, hub: 'HubServer', repo_id: str, private: bool, gated: bool):
        self.id, self.private, self.gated, self._hub = repo_id, private, gated, hub
        self.uploads: Dict[str, Blob] = {}  # large files by sha256, committed or not
        attributes = ''.join(f'{pattern} filter=lfs diff=lfs merge=lfs -text\n' for pattern in LARGE)
        first = Commit(None, 'initial commit', '', {'.gitattributes': Blob(attributes.encode())})
        self.commits = [first]
        self.branches: Dict[str, str] = {'main': first.id}
        self.tags: Dict[str, str] = {}
        self.pulls: Dict[str, str] = {}

    def resolve(self, revision: str) -> Commit:
        """ The commit of a branch, tag, pull request ('refs/pr/1') or commit id."""
        commit_id = {**self.pulls, **self.tags, **self.branches}.get(revision, revision)
        for commit in self.commits:
            if commit.id == commit_id:
                return commit
        raise HubError(404, f'Invalid rev id: {revision}', 'RevisionNotFound')

    def files(self, revision: str = 'main') -> Dict[str, bytes]:
        return self.resolve(revision).files

    def commit(self, files: Mapping[str, bytes], title: str, branch: str = 'main') -> Commit:
        """ Add or replace files, without HTTP."""
        with self._hub.lock:
            blobs = {
                k: self.add_large(v) if self.is_large(k, v, len(v)) else Blob(v) for k, v in files.items()}
            return self.add_commit(self.resolve(branch), blobs, title, '', branch)

    def add_commit(
            self,
            parent: Commit,
            changes: Mapping[str, Optional[Blob]],
            title: str,
            description: str,
            ref: str,
    ) -> Commit:
        """ A commit that adds or replaces files, or deletes them, where they are None."""
        blobs = {path: blob for path, blob in sorted({**parent.blobs, **changes}.items()) if blob is not None}
        self.commits.append(Commit(parent.id, title, description, blobs))
        (self.pulls if ref.startswith('refs/pr/') else self.branches)[ref] = self.commits[-1].id
        return self.commits[-1]

    def is_large(self, path: str, sample: bytes, size: int) -> bool:
        return size > 10e6 or b'\0' in sample or any(fnmatch(path, pattern) for pattern in LARGE)

    def add_large(self, content: bytes) -> Blob:
        xet = self._hub.xet
        blob = Blob(content, large=True, xet_hash=xet.put([content])[1][0] if xet else None)
        return self.uploads.setdefault(blob.etag, blob)

    def find_large(self, sha256: str, size: int) -> Blob:
        """ The large file that a client says it has uploaded."""
        if sha256 not in self.uploads and self._hub.xet is not None:
            found = self._hub.xet.find(sha256)
            if found is not None:
                self.uploads[sha256] = found
        blob = self.uploads.get(sha256)
        if blob is None or blob.info['size'] != size:
            raise HubError(400, f'LFS pointer pointed to a file that does not exist: {sha256}')
        return blob


class XetStorage:
    """ Where hf_xet keeps content: in a folder, since `local://FOLDER` stands where the URL of its server would.

    hf_xet locks the folder for its process, so each token gets one of its own: an empty one for an upload, one that
    holds the files of a commit for a download.
    """

    def __init__(self):
        self._root = tempfile.TemporaryDirectory(prefix='hub-xet-', ignore_cleanup_errors=True)
        with mock.patch.dict(os.environ, HF_XET_CACHE=self._root.name):  # hf_xet opens its log when it is imported
            import hf_xet
        self._hf_xet = hf_xet
        self._session = hf_xet.XetSession()
        self._uploads: List[Path] = []
        self.close = self._root.cleanup

    def _new_folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self._root.name))

    def _access(self, folder: Path) -> Dict[str, Any]:
        return {'endpoint': f'local://{folder}', 'token': 'none', 'token_expiry_unix_secs': 2 ** 40}

    def folder_for_upload(self) -> Path:
        self._uploads.append(self._new_folder())
        return self._uploads[-1]

    def put(self, contents: Iterable[bytes]) -> Tuple[Path, List[str]]:
        """ A new folder with these files in it, and the Xet hash of each."""
        folder = self._new_folder()
        with self._session.new_upload_commit(**self._access(folder)) as commit:
            uploads = [commit.start_upload_bytes(c, sha256=self._hf_xet.COMPUTE_SHA256) for c in contents]
        return folder, [upload.result().xet_info.hash for upload in uploads]

    def find(self, sha256: str) -> Optional[Blob]:
        """ The uploaded file of which a commit names the sha256 only, None if there is none."""
        for folder in self._uploads:
            for shard in folder.glob('xet/xorbs/shards/*.mdb'):
                for xet_hash, shard_sha256, size in self._files_of_shard(shard.read_bytes()):
                    if shard_sha256 == sha256:
                        copy = self._new_folder()  # the client's process may still hold the lock of the other
                        shutil.copytree(folder, copy, dirs_exist_ok=True)
                        group = self._session.new_download_stream_group(**self._access(copy))
                        file = self._hf_xet.XetFileInfo(xet_hash, size)
                        blob = Blob(b''.join(group.download_stream(file)), large=True, xet_hash=xet_hash)
                        return blob if blob.etag == sha256 else None
        return None

    @staticmethod
    def _files_of_shard(shard: bytes) -> Iterable[Tuple[str, str, int]]:
        """ Xet hash, sha256 and size of the files in a shard, the index that hf_xet uploads after the content.

        A header of 48 bytes, then for each file records of 48 bytes: the file, its segments, by its flags a check of
        each segment and the sha256. A hash of all ones ends the list. Hashes are four little-endian words.
        """
        def to_hex(data: bytes) -> str:
            return ''.join(f'{word:016x}' for word in struct.unpack('<4Q', data[:32]))

        records = iter([shard[at:at + 48] for at in range(48, len(shard) - 47, 48)])
        for file in records:
            if file[:32] == b'\xff' * 32:
                return
            flags, count = struct.unpack('<2I', file[32:40])
            size = sum(struct.unpack('<I', next(records)[36:40])[0] for _ in range(count))
            for _ in range(count if flags & 1 << 31 else 0):
                next(records)
            if flags & 1 << 30:
                yield to_hex(file), to_hex(next(records)), size


@dataclasses.dataclass
class Fault:
    path_regex: str
    fault: Union[int, str]
    method: Optional[str]
    times: Optional[int]
    delay: float


class HubServer:
    """ The server, and what is on it.

    Args:
        storage: Where large files are kept: 'lfs', for clients with `HF_HUB_DISABLE_XET=1`, which `use_hub` and `env`
            set (huggingface_hub asks no server before it uploads by Xet), or 'xet'.
    """

    def __init__(self, storage: str = 'lfs'):
        if storage not in ('lfs', 'xet'):
            raise ValueError(f"storage must be 'lfs' or 'xet', got {storage!r}")
        self.storage = storage
        self.xet = XetStorage() if storage == 'xet' else None
        self.lock = threading.RLock()
        self.closing = threading.Event()
        self.accounts: Dict[str, Account] = {}
        self.repos: Dict[str, Repo] = {}
        self.requests: List[Request] = []
        self.faults: List[Fault] = []
        self._server = _Server(('127.0.0.1', 0), functools.partial(_Handler, self))
        port = self._server.server_address[1]
        self.endpoint = f'http://127.0.0.1:{port}'
        self.cdn = f'http://localhost:{port}'  # another host: a client must not send it the token

    def __enter__(self) -> 'HubServer':
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc_info) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        if self.xet is not None:
            self.xet.close()

    def add_token(self, token: str, user: str, role: str = 'write', orgs: Sequence[str] = ()) -> None:
        self.accounts[token] = Account(user, role, tuple(orgs))

    def create_repo(self, repo_id: str, private: bool = False, gated: bool = False) -> Repo:
        self.repos[repo_id] = Repo(self, repo_id, private, gated)
        return self.repos[repo_id]

    def fail(
            self,
            path_regex: str,
            fault: Union[int, str],
            method: Optional[str] = None,
            times: Optional[int] = 1,
            delay: float = 1.,
    ) -> None:
        """ Have requests go wrong.

        Args:
            path_regex: Searched for in the path, as `requests` has it. The content of a large file is at
                `/cdn/SHA256/NAME`, unless it goes by Xet, which is no HTTP.
            fault: HTTP status to answer instead of doing what was asked; 'slow': answer after `delay` seconds; 'drop':
                do it, but close the connection in the middle of the answer's body; 'wrong-hash': alter the last byte of
                the answer's body. The last two pass over answers without a body.
            method: Of requests of this method only.
            times: How often, None for always.
            delay: Seconds of 'slow'.
        """
        if fault not in ('slow', 'drop', 'wrong-hash') and not isinstance(fault, int):
            raise ValueError(f"fault must be an HTTP status, 'slow', 'drop' or 'wrong-hash', got {fault!r}")
        self.faults.append(Fault(path_regex, fault, method, times, delay))

    def take_fault(self, method: str, path: str, *kinds: Any) -> Optional[Fault]:
        """ The first fault of these kinds (names, or int for a status) that is in store for a request."""
        with self.lock:
            for fault in self.faults:
                wanted = fault.fault in kinds or type(fault.fault) in kinds
                if wanted and fault.method in (None, method) and re.search(fault.path_regex, path):
                    fault.times = fault.times and fault.times - 1
                    if fault.times == 0:
                        self.faults.remove(fault)
                    return fault
        return None

    def env(self, tmp_path: Union[str, Path]) -> Dict[str, str]:
        """ Environment variables (to add to others) that have a process use this Hub, with no token and empty caches.

        They cannot shorten the pauses between huggingface_hub's attempts: a process waits 1 s, 2 s, ... after a fault.
        """
        home = Path(tmp_path) / 'huggingface'
        return {
            'HF_ENDPOINT': self.endpoint,
            'HF_HOME': str(home),
            'HF_HUB_CACHE': str(home / 'hub'),
            'HF_ASSETS_CACHE': str(home / 'assets'),
            'HF_XET_CACHE': str(home / 'xet'),
            'HF_TOKEN_PATH': str(home / 'token'),
            'HF_TOKEN': '',
            'HUGGING_FACE_HUB_TOKEN': '',
            'HF_OIDC_RESOURCE': '',
            'HUGGINGFACE_CO_STAGING': '0',
            'HF_HUB_OFFLINE': '0',
            'HF_HUB_DISABLE_IMPLICIT_TOKEN': '0',
            'HF_HUB_DISABLE_TELEMETRY': '1',
            'HF_HUB_DISABLE_UPDATE_CHECK': '1',
            'HF_HUB_DISABLE_XET': '1' if self.xet is None else '0',
            'HF_XET_CLIENT_RETRY_BASE_DELAY': '10ms',
            'NO_PROXY': '127.0.0.1,localhost',
            'no_proxy': '127.0.0.1,localhost',
        }


def use_hub(hub: HubServer, monkeypatch, tmp_path: Union[str, Path]) -> None:
    """ Have this process's huggingface_hub and hf_xet use the Hub as `HubServer.env` says, until the test ends.

    Pauses between huggingface_hub's attempts are cut to 10 ms; how often it tries stays as it is.
    """
    from huggingface_hub import constants, file_download, hf_api, hf_file_system
    from huggingface_hub.utils import _detect_agent, _http, _xet

    for name, value in hub.env(tmp_path).items():
        monkeypatch.setenv(name, value)
    # the environment was read when the module was imported: read it again, and pass on what is new
    spec = importlib.util.find_spec('huggingface_hub.constants')
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    new = {k: v for k, v in vars(fresh).items() if k.isupper() and v != getattr(constants, k)}
    for module in [m for name, m in sys.modules.items() if name.split('.')[0] == 'huggingface_hub']:
        for name in new.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, new[name])
    for owner in (hf_api.api, hf_file_system.hffs, hf_file_system.hffs._api):
        monkeypatch.setattr(owner, 'endpoint', hub.endpoint)

    class QuickTime:
        def __getattr__(self, name):
            return getattr(time, name)

        def sleep(self, seconds):
            time.sleep(min(seconds, 0.01))

    monkeypatch.setattr(_http, 'time', QuickTime())
    monkeypatch.setattr(file_download, 'time', QuickTime())
    monkeypatch.setattr(_http, '_GLOBAL_CLIENT', None)  # the next one reads of no proxy for loopback
    monkeypatch.setattr(_xet, '_GLOBAL_XET_HOLDER', _xet.XetSessionHolder())
    monkeypatch.setattr(_xet, 'XET_CONNECTION_INFO_CACHE', {})
    monkeypatch.setattr(_detect_agent, '_registry', _detect_agent._EMPTY_REGISTRY)  # else asked for once a process


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that went away
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """ Reads a request and writes the answer, with the faults in store. HTTP/1.0: a connection for each request."""

    def __init__(self, hub: HubServer, *args):
        self.hub = hub
        super().__init__(*args)

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        self.hub.requests.append(Request(self.command, self.path, self.headers.get('Authorization')))
        take_fault = functools.partial(self.hub.take_fault, self.command, self.path)
        slow = take_fault('slow')
        if slow:
            self.hub.closing.wait(slow.delay)
        failed = take_fault(int)
        if failed:
            answer = HubError(failed.fault, 'A fault was asked for').answer
        else:
            answer = Call(self.hub, self.command, self.path, self.headers, body).answer()
        content = b'' if self.command == 'HEAD' else answer.body
        damage = take_fault('drop', 'wrong-hash') if content and not failed else None
        if damage and damage.fault == 'wrong-hash':
            content = content[:-1] + bytes([content[-1] ^ 0xff])
        elif damage:
            content = content[:len(content) // 2]
        self.send_response(answer.status)
        for name, value in {'Content-Length': str(len(answer.body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET


ROUTES: List[Tuple[str, str, Callable[..., Answer]]] = []


def route(method: str, pattern: str):
    """ Answer such requests by a method of `Call`, whose arguments are the unquoted parts of the path."""
    pattern = pattern.replace('{repo}', '(?P<repo>[^/]+/[^/]+)').replace('{path}', '(?P<path>.+)')
    pattern = re.sub(r'\{(\w+)\}', r'(?P<\1>[^/]+)', pattern)

    def add(fn):
        ROUTES.append((method, pattern, fn))
        return fn

    return add


class Call:
    """ A request and what is answered."""

    def __init__(self, hub: HubServer, method: str, path: str, headers: Mapping[str, str], body: bytes):
        self.hub, self.method, self.headers, self.body = hub, method, headers, body
        self.path = urlsplit(path).path
        self.query = parse_qs(urlsplit(path).query)
        self.right_to_change = 'propose' if 'create_pr' in self.query else 'write'
        self.account: Optional[Account] = None

    def answer(self) -> Answer:
        scheme, _, token = self.headers.get('Authorization', '').partition(' ')
        try:
            if scheme and self.path.startswith(('/cdn/', '/upload/')):
                raise HubError(400, 'Only one auth mechanism allowed')
            if scheme and (scheme.lower() != 'bearer' or token not in self.hub.accounts):
                raise HubError(401, 'Invalid credentials in Authorization header')
            self.account = self.hub.accounts.get(token)
            for method, pattern, fn in ROUTES:
                match = re.fullmatch(pattern, self.path)
                if match and method == self.method.replace('HEAD', 'GET'):
                    with self.hub.lock:
                        return fn(self, **{k: v and unquote(v) for k, v in match.groupdict().items()})
            raise HubError(404, "Sorry, we can't find the page you are looking for.")
        except HubError as e:
            return e.answer

    def open(self, repo_id: str, right: str = 'see') -> Repo:
        """ A repository, if the account has the right to 'see', 'read', 'write' it or to 'propose' a change."""
        repo = self.hub.repos.get(repo_id)
        member = self.account is not None and self.account.owns(repo_id)
        changes = right in ('write', 'propose')
        if self.account is None and (repo is None or repo.private or changes):
            raise HubError(401, 'Invalid username or password.', 'RepoNotFound')
        if repo is None or repo.private and not member:
            raise HubError(404, 'Repository not found', 'RepoNotFound')
        if right != 'see' and repo.gated and not member:
            raise HubError(403 if self.account else 401, f'Access to model {repo_id} is restricted.', 'GatedRepo')
        if changes and self.account.role != 'write':
            raise HubError(403, 'Forbidden: you must use a write token to upload to a repository.')
        if right == 'write' and not member:
            raise HubError(403, 'Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request')
        return repo

    @route('GET', '/api/whoami-v2')
    def whoami(self) -> Answer:
        if self.account is None:
            raise HubError(401, 'Invalid username or password.')
        user, role, orgs = self.account
        return to_json({
            'type': 'user', 'id': user, 'name': user, 'fullname': user, 'isPro': False,
            'orgs': [{'type': 'org', 'id': org, 'name': org, 'fullname': org, 'roleInOrg': role} for org in orgs],
            'auth': {'type': 'access_token', 'accessToken': {'displayName': 'test', 'role': role}},
        })

    @route('POST', '/api/repos/create')
    def create_repo(self) -> Answer:
        if self.account is None:
            raise HubError(401, 'Invalid username or password.')
        data = json.loads(self.body)
        namespace = data.get('organization') or self.account.user
        repo_id = f'{namespace}/{data["name"]}'
        if self.account.role != 'write' or not self.account.owns(repo_id):
            raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        about = {'url': f'{self.hub.endpoint}/{repo_id}', 'name': repo_id}
        if repo_id in self.hub.repos:
            return to_json({'error': 'You already created this model repo', **about}, 409)
        self.hub.create_repo(repo_id, private=data.get('visibility') == 'private')
        return to_json(about)

    def read_card(self, text: str) -> Dict[str, Any]:
        """ The metadata at the top of a README.md."""
        match = re.match(r'\s*---\r?\n(.*?)\r?\n---', text, re.DOTALL)
        try:
            return dict(yaml.safe_load(match[1])) if match else {}
        except (yaml.YAMLError, TypeError, ValueError) as e:
            raise HubError(400, f'YAML Metadata Error: {e}') from e

    @route('POST', '/api/validate-yaml')
    def validate_yaml(self) -> Answer:
        try:
            card = self.read_card(json.loads(self.body)['content'])
        except HubError as e:
            return to_json({'errors': [{'message': str(e)}], 'warnings': []}, 400)
        warnings = [] if card else [{'message': 'empty or missing yaml metadata in repo card'}]
        return to_json({'errors': [], 'warnings': warnings})

    @route('GET', '/api/models/{repo}(/revision/{rev})?')
    def repo_info(self, repo: str, rev: Optional[str]) -> Answer:
        opened = self.open(repo)
        commit = opened.resolve(rev or 'main')
        card = self.read_card(commit.files.get('README.md', b'').decode())
        siblings = [
            {'rfilename': path, **({**blob.info, 'blobId': blob.info['oid']} if 'blobs' in self.query else {})}
            for path, blob in commit.blobs.items()]
        now = time.strftime('%Y-%m-%dT%H:%M:%S.000Z', time.gmtime())
        return to_json({
            'id': repo, 'modelId': repo, 'author': repo.partition('/')[0], 'sha': commit.id, 'lastModified': now,
            'createdAt': now, 'private': opened.private, 'gated': 'manual' if opened.gated else False,
            'disabled': False, 'downloads': 0, 'likes': 0, 'siblings': siblings, 'cardData': card,
            'tags': card.get('tags', []),
            **{key: card[key] for key in ('library_name', 'pipeline_tag', 'model-index') if key in card},
        })

    @route('GET', '/api/models/{repo}/tree/{rev}')
    def tree(self, repo: str, rev: str) -> Answer:
        """ The files, those in folders too; the folders themselves are left out."""
        blobs = self.open(repo).resolve(rev).blobs
        return to_json([{'path': path, **blob.info} for path, blob in blobs.items()])

    @route('POST', '/api/models/{repo}/paths-info/{rev}')
    def paths_info(self, repo: str, rev: str) -> Answer:
        blobs = self.open(repo).resolve(rev).blobs
        paths = parse_qs(self.body.decode())['paths']
        return to_json([{'path': path, **blobs[path].info} for path in paths if path in blobs])

    @route('GET', '/api/models/{repo}/refs')
    def refs(self, repo: str) -> Answer:
        opened = self.open(repo)

        def to_list(refs: Mapping[str, str], prefix: str = '') -> List[Dict[str, str]]:
            return [{'name': k, 'ref': prefix + k, 'targetCommit': v} for k, v in refs.items()]

        pulls = {'pullRequests': to_list(opened.pulls)} if 'include_prs' in self.query else {}
        branches, tags = to_list(opened.branches, 'refs/heads/'), to_list(opened.tags, 'refs/tags/')
        return to_json({'branches': branches, 'converts': [], 'tags': tags, **pulls})

    def create_ref(self, repo: Repo, refs: Dict[str, str], name: str, revision: str) -> Answer:
        if name in refs:
            raise HubError(409, f'Reference already exists: {name}')
        refs[name] = repo.resolve(revision).id
        return to_json({'success': True})

    @route('POST', '/api/models/{repo}/branch/{name}')
    def create_branch(self, repo: str, name: str) -> Answer:
        opened = self.open(repo, 'write')
        return self.create_ref(opened, opened.branches, name, json.loads(self.body).get('startingPoint', 'main'))

    @route('DELETE', '/api/models/{repo}/branch/{name}')
    def delete_branch(self, repo: str, name: str) -> Answer:
        del self.open(repo, 'write').branches[name]
        return to_json({})

    @route('POST', '/api/models/{repo}/tag/{rev}')
    def create_tag(self, repo: str, rev: str) -> Answer:
        opened = self.open(repo, 'write')
        return self.create_ref(opened, opened.tags, json.loads(self.body)['tag'], rev)

    @route('GET', '/api/models/{repo}/auth-check(?P<write>/write)?')
    def auth_check(self, repo: str, write: Optional[str]) -> Answer:
        self.open(repo, 'write' if write else 'read')
        return to_json({})

    @route('POST', '/api/models/{repo}/preupload/{rev}')
    def preupload(self, repo: str, rev: str) -> Answer:
        """ How to upload each file, and what there is already: a client leaves out what has not changed."""
        opened = self.open(repo, self.right_to_change)
        blobs, files = opened.resolve(rev).blobs, []
        for file in json.loads(self.body)['files']:
            path = file['path']
            large = opened.is_large(path, base64.b64decode(file['sample']), file['size'])
            files.append({'path': path, 'uploadMode': 'lfs' if large else 'regular', 'shouldIgnore': False})
            if path in blobs:
                files[-1]['oid'] = blobs[path].etag
        return to_json({'files': files})

    @route('POST', '/api/models/{repo}/commit/{rev}')
    def commit(self, repo: str, rev: str) -> Answer:
        opened = self.open(repo, self.right_to_change)
        header: Dict[str, Any] = {}
        blobs: Dict[str, Optional[Blob]] = {}
        for line in map(json.loads, self.body.splitlines()):
            value = line['value']
            if line['key'] == 'header':
                header = value
            elif line['key'] == 'file':
                blobs[value['path']] = Blob(base64.b64decode(value['content']))
            elif line['key'] == 'lfsFile':
                blobs[value['path']] = opened.find_large(value['oid'], value['size'])
            elif line['key'] == 'deletedFile':
                blobs[value['path']] = None
            else:
                raise HubError(400, f'Operation not supported: {line["key"]}')
        head, parent = opened.resolve(rev), header.get('parentCommit')
        if 'create_pr' in self.query:
            head, rev = opened.resolve(parent or rev), f'refs/pr/{len(opened.pulls) + 1}'
        elif rev not in {**opened.branches, **opened.pulls}:
            raise HubError(400, f'Not a branch: {rev}')
        elif parent and not head.id.startswith(parent):
            raise HubError(412, 'A commit has happened since. Please refresh and try again.')
        commit = opened.add_commit(head, blobs, header['summary'], header['description'], rev)
        url = f'{self.hub.endpoint}/{repo}'
        pull = {'pullRequestUrl': f'{url}/discussions/{len(opened.pulls)}'} if 'create_pr' in self.query else {}
        return to_json({'success': True, 'commitOid': commit.id, 'commitUrl': f'{url}/commit/{commit.id}', **pull})

    @route('POST', r'/{repo}\.git/info/lfs/objects/batch')
    def lfs_batch(self, repo: str) -> Answer:
        opened, objects = self.open(repo, 'propose'), []
        for item in json.loads(self.body)['objects']:
            oid, size = item['oid'], item['size']
            upload = {'href': f'{self.hub.cdn}/upload/{repo}/{oid}?size={size}'}
            verify = {'href': f'{self.hub.endpoint}/{repo}.git/info/lfs/verify'}
            known = oid in opened.uploads
            objects.append({
                'oid': oid, 'size': size, **({} if known else {'actions': {'upload': upload, 'verify': verify}})})
        return to_json({'transfer': 'basic', 'objects': objects})

    @route('PUT', '/upload/{repo}/{sha256}')
    def lfs_upload(self, repo: str, sha256: str) -> Answer:
        if hashlib.sha256(self.body).hexdigest() != sha256 or len(self.body) != int(self.query['size'][0]):
            raise HubError(400, f'Content has not the sha256 {sha256} or not the size it should have')
        self.hub.repos[repo].add_large(self.body)
        return Answer()

    @route('POST', r'/{repo}\.git/info/lfs/verify')
    def lfs_verify(self, repo: str) -> Answer:
        data = json.loads(self.body)
        self.open(repo, 'propose').find_large(data['oid'], data['size'])
        return to_json({})

    def xet_token(self, folder: Path) -> Answer:
        url, token, expires = f'local://{folder}', secrets.token_hex(8), int(time.time()) + 3600
        return to_json({'casUrl': url, 'accessToken': token, 'exp': expires}, headers={
            'X-Xet-Cas-Url': url, 'X-Xet-Access-Token': token, 'X-Xet-Token-Expiration': str(expires)})

    @route('GET', '/api/models/{repo}/xet-write-token/{rev}')
    def xet_write_token(self, repo: str, rev: str) -> Answer:
        self.open(repo, self.right_to_change)
        if self.hub.xet is None:
            raise HubError(404, f'Xet is not enabled for {repo}')
        return self.xet_token(self.hub.xet.folder_for_upload())

    @route('GET', '/api/models/{repo}/xet-read-token/{rev}')
    def xet_read_token(self, repo: str, rev: str) -> Answer:
        blobs = self.open(repo, 'read').resolve(rev).blobs.values()
        return self.xet_token(self.hub.xet.put(blob.content for blob in blobs if blob.xet_hash)[0])

    def send(self, blob: Blob, headers: Mapping[str, str]) -> Answer:
        """ The content, or the one range of it that was asked for."""
        headers = {'Content-Type': 'application/octet-stream', 'ETag': f'"{blob.etag}"', **headers}
        size = blob.info['size']
        match = re.fullmatch(r'bytes=(\d*)-(\d*)', self.headers.get('Range', ''))
        if not match or not match[1] and not match[2]:
            return Answer(blob.content, 200, headers)
        first = int(match[1]) if match[1] else max(size - int(match[2]), 0)
        last = min(int(match[2]), size - 1) if match[1] and match[2] else size - 1
        if first > last:
            return Answer(b'', 416, {'Content-Range': f'bytes */{size}'})
        return Answer(
            blob.content[first:last + 1], 206, {**headers, 'Content-Range': f'bytes {first}-{last}/{size}'})

    @route('GET', '/{repo}/resolve/{rev}/{path}')
    def resolve(self, repo: str, rev: str, path: str) -> Answer:
        commit = self.open(repo, 'read').resolve(rev)
        headers = {'X-Repo-Commit': commit.id}
        blob = commit.blobs.get(path)
        if blob is None:
            raise HubError(404, 'Entry not found', 'EntryNotFound', **headers)
        if not blob.large:
            return self.send(blob, headers)
        headers.update({
            'Location': f'{self.hub.cdn}/cdn/{blob.etag}/{quote(path.rpartition("/")[2])}',
            'X-Linked-Etag': f'"{blob.etag}"', 'X-Linked-Size': str(blob.info['size']),
        })
        if blob.xet_hash:
            token = f'{self.hub.endpoint}/api/models/{repo}/xet-read-token/{commit.id}'
            headers.update({'X-Xet-Hash': blob.xet_hash, 'Link': f'<{token}>; rel="xet-auth"'})
        return Answer(b'', 302, headers)

    @route('GET', '/cdn/{sha256}/{name}')
    def cdn(self, sha256: str, name: str) -> Answer:
        for repo in self.hub.repos.values():
            if sha256 in repo.uploads:
                return self.send(repo.uploads[sha256], {})
        raise HubError(403, 'AccessDenied')
