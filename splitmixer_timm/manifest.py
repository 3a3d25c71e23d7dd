""" Which weights the zoo has, where they are, and the class names of their data sets.

`weights/manifest.json` is the one list of weights. It ships inside the package as `splitmixer_timm/weights`; a checkout
and an editable install read the top-level `weights/` folder instead.
"""
import hashlib
import json
import re
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, ContextManager, Dict, Iterator, Optional, Sequence, Tuple, Union

from huggingface_hub.utils import WeakFileLock

from .files import replace_file

_PACKAGE_DIR = Path(__file__).resolve().parent
_PUBLISHED = ('hf_hub_id', 'revision', 'url')  # of an entry: where its weights can be downloaded
WEIGHTS_DIR = next(
    (d for d in (_PACKAGE_DIR / 'weights', _PACKAGE_DIR.parent / 'weights') if (d / 'manifest.json').is_file()),
    _PACKAGE_DIR / 'weights',
)


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


def write_entry(name: str, entry: Dict[str, Any], files: Optional[Dict[Path, bytes]] = None) -> Dict[str, Any]:
    """ Put an entry into the manifest's file, in place of one of that name; what fails leaves all as it was.

    Args:
        name: 'arch.tag'.
        entry: The entry.
        files: Its files, weights last, so that they do not wait for others to be the manifest's. The arguments and
            the log of a seed that is not among them are removed.

    Returns:
        The entry as it is now: where the same weights are published, it says so still.
    """
    changes: Dict[Path, Optional[bytes]] = {}
    with _lock():
        if files:
            beside = WEIGHTS_DIR / 'runs' / name
            changes.update(dict.fromkeys({*beside.glob('args.*.yaml'), *beside.glob('summary.*.csv')} - files.keys()))
            changes.update(files)
        with _changed(changes), _open_manifest() as models:
            old = models.get(name, {})
            if old.get('sha256') == entry.get('sha256'):
                entry = {**entry, **{key: old[key] for key in _PUBLISHED if key in old.keys() - entry.keys()}}
            models[name] = entry
    return entry


def record(name: str, sha256: str, **place: str) -> None:
    """ Put into the manifest's file where weights are published.

    Args:
        name: 'arch.tag'.
        sha256: Of the weights that were published.
        **place: `hf_hub_id` and `revision`, or `url`.

    Raises:
        ValueError: If the weights of that name are others by now.
    """
    with _lock(), _open_manifest() as models:
        if models.get(name, {}).get('sha256') != sha256:
            raise ValueError(f'{name} has other weights now than were published, and is not recorded')
        models[name].update(place)


def _lock() -> ContextManager:
    """ Nobody else writes the zoo meanwhile."""
    return WeakFileLock(WEIGHTS_DIR / 'manifest.lock')


@contextmanager
def _open_manifest() -> Iterator[Dict[str, Any]]:
    """ The entries in the manifest's file, to change: it is written at the end."""
    path = WEIGHTS_DIR / 'manifest.json'
    zoo = json.loads(path.read_text(encoding='utf-8'))
    yield zoo['models']
    zoo['models'] = dict(sorted(zoo['models'].items()))
    replace_file(path, (json.dumps(zoo, indent=2) + '\n').encode())


@contextmanager
def _changed(changes: Dict[Path, Optional[bytes]]) -> Iterator[None]:
    """ Files written, or removed where they have no content, in this order; as they were if the body fails."""
    before = {path: path.read_bytes() if path.is_file() else None for path in changes}
    try:
        _write(changes)
        yield
    except BaseException:
        _write(before)
        raise


def _write(files: Dict[Path, Optional[bytes]]) -> None:
    for path, content in files.items():
        if content is None:
            path.unlink(missing_ok=True)
        else:
            replace_file(path, content)


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
