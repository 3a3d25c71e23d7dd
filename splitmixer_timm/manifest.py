""" Which weights the zoo has, where they are, and the class names of their data sets.

`weights/manifest.json` is the one list of weights. It ships inside the package as `splitmixer_timm/weights`; a checkout
and an editable install read the top-level `weights/` folder instead. A bundled file is used where there is one, a
published one (Hub, else URL) is downloaded to the usual cache where there is none; both are loaded only if their sha256
is the manifest's.
"""
import hashlib
import json
import os
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Tuple, Union

from huggingface_hub.utils import WeakFileLock
from safetensors import SafetensorError, safe_open
from timm.models import PretrainedCfg, resolve_pretrained_cfg
from timm.models._hub import download_cached_file, download_from_hf, hf_split

from .hub_errors import checked_token, explained

_PACKAGE_DIR = Path(__file__).resolve().parent
WEIGHTS_DIR = next(
    (d for d in (_PACKAGE_DIR / 'weights', _PACKAGE_DIR.parent / 'weights') if (d / 'manifest.json').is_file()),
    _PACKAGE_DIR / 'weights',
)
HUB_FILENAME = 'model.safetensors'
_SOURCES = ('file', 'url', 'hf_hub_id', 'state_dict')


@cache
def load_manifest() -> Dict[str, Any]:
    """ The manifest, read once.

    Returns:
        `hf_hub_org` and `base_url` of the whole zoo, both empty until published, and `models`, an entry for each
        'arch.tag' that has weights.

    Raises:
        RuntimeError: If the file is missing or is not a manifest.
    """
    path = WEIGHTS_DIR / 'manifest.json'
    try:
        manifest = json.loads(path.read_text(encoding='utf-8'))
        if not isinstance(manifest['models'], dict):
            raise TypeError("'models' is not an object")
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise RuntimeError(f'{path} is not a readable weights manifest ({e!r}); reinstall splitmixer-timm.') from e
    return manifest


def entries() -> Dict[str, Dict[str, Any]]:
    """ The manifest's entries by 'arch.tag'."""
    return load_manifest()['models']


@cache
def _labels(dataset: str) -> Tuple[Tuple[str, str], ...]:
    # ImageNet's too: timm's ImageNetInfo, which a test compares them with, is too slow for what is read at import
    path = _PACKAGE_DIR / 'labels' / f'{dataset}.txt'
    lines = path.read_text(encoding='utf-8').splitlines()
    return tuple((name, description) for name, _, description in (line.partition('\t') for line in lines))


@cache
def label_names(dataset: str) -> Tuple[str, ...]:
    """ Class names of a data set in label order, each once (ImageNet's: WordNet's synsets).

    Raises:
        ValueError: If it is none of those in splitmixer_timm/labels.
    """
    datasets = sorted(path.stem for path in (_PACKAGE_DIR / 'labels').glob('*.txt'))
    if dataset not in datasets:
        raise ValueError(f'dataset must be one of {", ".join(datasets)}, got {dataset!r}.')
    return tuple(name for name, _ in _labels(dataset))


@cache
def label_descriptions(dataset: str) -> Optional[Dict[str, str]]:
    """ What the class names of a data set stand for (ImageNet's: WordNet's lemmas), None where they say it."""
    descriptions = dict(_labels(dataset))
    return descriptions if any(descriptions.values()) else None


def check_class_order(names: Sequence[str], dataset: str) -> None:
    """ Check that class folders, in the order that timm reads them in, are not a data set's labels in another order.

    Args:
        names: Names of the folders, in that order.
        dataset: Data set, as in splitmixer_timm/labels.

    Raises:
        ValueError: If they are: each class would be taken for another.
    """
    found, labels = (
        [' '.join(re.findall('[^\\W_]+', name.lower())) for name in order] for order in (names, label_names(dataset)))
    if found != labels and sorted(found) == sorted(labels):
        raise ValueError(
            f'class folders of {dataset} must be in the order of its labels, which is not the alphabetical one: name '
            f'them by number, {1:0{len(str(len(labels)))}} ({labels[0]}) to {len(labels)} ({labels[-1]}).')


def write_entry(name: str, entry: Dict[str, Any]) -> None:
    """ Put an entry into the manifest's file, in place of one of that name."""
    path = WEIGHTS_DIR / 'manifest.json'
    with WeakFileLock(path.with_suffix('.lock')):
        zoo = json.loads(path.read_text(encoding='utf-8'))
        zoo['models'] = dict(sorted({**zoo['models'], name: entry}.items()))
        replace_file(path, (json.dumps(zoo, indent=2) + '\n').encode())


def replace_file(path: Path, content: bytes) -> None:
    """ Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f'.{path.name}.', suffix='.tmp', delete=False) as f:
        temporary = Path(f.name)
        try:
            f.write(content)
            f.close()
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            f.close()
            temporary.unlink()
            raise


def bundled_file(name: str) -> Optional[Path]:
    """ Path of the weights of 'arch.tag' that came with the package, None if they did not."""
    entry = entries().get(name)
    path = WEIGHTS_DIR / entry['file'] if entry else None
    return path if path is not None and path.is_file() else None


def published(name: str) -> Dict[str, Any]:
    """ Where the weights of 'arch.tag' are published, as fields of a `PretrainedCfg`, empty if nowhere."""
    manifest, entry = load_manifest(), entries()[name]
    hub_id = entry.get('hf_hub_id') or (f'{manifest["hf_hub_org"]}/{name}' if manifest.get('hf_hub_org') else None)
    if hub_id:
        return dict(hf_hub_id=f'{hub_id}@{entry["revision"]}' if entry.get('revision') else hub_id)
    url = entry.get('url')
    if not url and manifest.get('base_url'):
        url = f'{manifest["base_url"].rstrip("/")}/{entry["file"]}'
    return dict(url=url) if url else {}


def source_cfg(name: str) -> Dict[str, Any]:
    """ Fields of a `PretrainedCfg` that say where the weights of 'arch.tag' are, empty if there are none."""
    if name not in entries():
        return {}
    path = bundled_file(name)
    return dict(file=str(path)) if path else published(name)


def check_file(path: Union[str, Path], name: str) -> None:
    """ Check a weights file against the manifest's size and sha256 of 'arch.tag'.

    Raises:
        RuntimeError: If they differ.
    """
    entry = entries()[name]
    size = Path(path).stat().st_size
    if size != entry['bytes']:
        raise RuntimeError(
            f'Weights of {name} refused: {path} has {size} bytes, the manifest says {entry["bytes"]} (a truncated or '
            f'different file). Delete it and reinstall or download again.')
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if digest != entry['sha256']:
        raise RuntimeError(
            f'Weights of {name} refused: {path} has sha256 {digest}, the manifest says {entry["sha256"]} (a damaged or '
            f'different file). Delete it and reinstall or download again.')


def check_download(path: Union[str, Path]) -> None:
    """ Check a large file in huggingface_hub's cache, which is named by its sha256 there but not compared with it.

    Raises:
        OSError: If it is damaged; it is then taken out of the cache, and of the store that caches may share.
    """
    path = Path(path)
    if not path.is_symlink():
        return
    blob = path.parent / os.readlink(path)  # itself perhaps a link, to a store with names of another kind
    if re.fullmatch('[0-9a-f]{64}', blob.name) and hashlib.sha256(path.read_bytes()).hexdigest() != blob.name:
        for file in (path.resolve(), blob, path):
            file.unlink(missing_ok=True)
        raise OSError(f'{path.name} was damaged on the way, try again')


def _download(name: str, cfg: PretrainedCfg, cache_dir: Optional[Union[str, Path]]) -> str:
    if cfg.hf_hub_id:
        checked_token()
        with explained(cfg.hf_hub_id, hf_split(cfg.hf_hub_id)[1]):
            path = download_from_hf(cfg.hf_hub_id, HUB_FILENAME, cache_dir=cache_dir)
            check_download(path)
            return path
    # a hash in the file's name keeps releases apart in the cache, and timm drops a download that does not match it
    filename = f'{name}-{entries()[name]["sha256"][:16]}.safetensors'
    return download_cached_file((cfg.url, filename), check_hash=True, progress=True, cache_dir=cache_dir)


def weights_file(name: str) -> Path:
    """ The file of the weights of 'arch.tag', or of the default tag, bundled or downloaded, checked by the manifest.

    Raises:
        RuntimeError: If it is not the one in the manifest, or is nowhere.
    """
    arch, _, tag = name.partition('.')
    tag = tag or resolve_pretrained_cfg(arch).tag
    overlay = checked_overlay(arch, tag)
    return bundled_file(f'{arch}.{tag}') or Path(overlay['file'])


def checked_overlay(
        variant: str,
        pretrained_cfg: Optional[Union[str, Dict[str, Any], PretrainedCfg]] = None,
        pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
        cache_dir: Optional[Union[str, Path]] = None,
) -> Dict[str, Any]:
    """ Overlay of a pretrained cfg that makes timm load weights of the zoo from a file that passed `check_file`.

    Weights that the caller names (a file, URL or state dict of their own) are left to timm; of a Hub repository only
    safetensors are read.

    Args:
        variant: Name of the architecture.
        pretrained_cfg: As for `timm.create_model`: a tag, a cfg, or None for the default.
        pretrained_cfg_overlay: As for `timm.create_model`.
        cache_dir: Where to keep downloads, timm's and huggingface_hub's own caches if None.

    Raises:
        RuntimeError: If there are no weights, the file is not the one in the manifest, or one that the caller names is
            damaged.
        HubError: If the Hub cannot be reached, refuses, or has no such file.
        FileNotFoundError: If the caller names a file that does not exist.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    if any(overlay.get(source) for source in _SOURCES):
        # the caller says where from: no other place that the cfg knows may come before it
        overlay = {**dict.fromkeys(_SOURCES), 'source': '', **overlay}
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
    name = f'{cfg.architecture}.{cfg.tag}' if cfg.tag else cfg.architecture
    known = name in entries()
    place = {k: v for k in ('hf_hub_id', 'hf_hub_filename', 'url') if (v := getattr(cfg, k))}
    is_published = known and bool(place) and place == published(name)
    if cfg.source == 'local-dir' or cfg.state_dict and cfg.source != 'hf-hub':
        return overlay
    if cfg.source == 'hf-hub' or cfg.hf_hub_id and not cfg.file and not is_published:
        # timm would look for a pickle where the Hub does not give the safetensors
        checked_token()
        with explained(cfg.hf_hub_id, hf_split(cfg.hf_hub_id)[1]):
            path = download_from_hf(cfg.hf_hub_id, cfg.hf_hub_filename or HUB_FILENAME, cache_dir=cache_dir)
            check_download(path)
            with safe_open(path, framework='pt'):
                # whatever else a config.json from there says of places
                return {**overlay, **dict.fromkeys(_SOURCES), 'source': '', 'file': path}
    if cfg.file:
        if known and Path(cfg.file) == WEIGHTS_DIR / entries()[name]['file']:
            check_file(cfg.file, name)
        elif not Path(cfg.file).is_file():
            raise FileNotFoundError(f'The weights file {cfg.file} given for {variant} does not exist.')
        elif str(cfg.file).endswith('.safetensors'):
            try:
                with safe_open(cfg.file, framework='pt'):
                    pass
            except SafetensorError as e:
                raise RuntimeError(
                    f'The weights file {cfg.file} given for {variant} is truncated or not safetensors ({e}).') from e
    elif is_published:
        path = _download(name, cfg, cache_dir)
        check_file(path, name)
        overlay['file'] = path
    elif cfg.url:
        return overlay  # the caller's
    elif known:
        raise RuntimeError(
            f'The weights of {name} should be at {WEIGHTS_DIR / entries()[name]["file"]} and are not: reinstall '
            'splitmixer-timm.')
    else:
        available = sorted(entries())
        raise RuntimeError(
            f'No pretrained weights exist for {name}. Those that have weights: {", ".join(available) or "none yet"}; '
            '`pretrained=False` gives any model random ones.')
    return overlay
