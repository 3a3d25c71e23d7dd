""" Weights that are about to be loaded: found, downloaded where they are not bundled, and checked.

A bundled file is used where there is one, a published one (Hub, else URL) is downloaded to the usual cache where there
is none; both are loaded only if their sha256 is the manifest's.
"""
import hashlib
import os
import re
from pathlib import Path
from typing import Any, Dict, Optional, Union

from safetensors import SafetensorError, safe_open
from timm.models import PretrainedCfg, resolve_pretrained_cfg
from timm.models._hub import download_cached_file, download_from_hf, hf_split

from . import manifest
from .hub_errors import checked_token, explained

HUB_FILENAME = 'model.safetensors'
_SOURCES = ('file', 'url', 'hf_hub_id', 'state_dict')


def check_download(path: Union[str, Path]) -> None:
    """ Check a file in huggingface_hub's cache, which is named by its hash there but not compared with it.

    Raises:
        OSError: If it is damaged; it is then taken out of the cache, and of the store that caches may share.
    """
    path = Path(path)
    if not path.is_symlink():
        return
    blob = path.parent / os.readlink(path)  # itself perhaps a link, to a store with names of another kind
    content = path.read_bytes()
    if re.fullmatch('[0-9a-f]{64}', blob.name):
        hashes = [hashlib.sha256(content)]
    elif re.fullmatch('[0-9a-f]{40}', blob.name):
        # of a small file git's hash, and of a mirror perhaps that of the content alone
        hashes = [hashlib.sha1(head + content) for head in (b'blob %d\0' % len(content), b'')]
    else:
        return
    if blob.name not in [file_hash.hexdigest() for file_hash in hashes]:
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
    filename = f'{name}-{manifest.entries()[name]["sha256"][:16]}.safetensors'
    return download_cached_file((cfg.url, filename), check_hash=True, progress=True, cache_dir=cache_dir)


def weights_file(name: str) -> Path:
    """ The file of the weights of 'arch.tag', or of the default tag, bundled or downloaded, checked by the manifest.

    Raises:
        RuntimeError: If it is not the one in the manifest, or is nowhere.
    """
    arch, _, tag = name.partition('.')
    tag = tag or resolve_pretrained_cfg(arch).tag
    overlay = checked_overlay(arch, tag)
    return manifest.bundled_file(f'{arch}.{tag}') or Path(overlay['file'])


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
    known = name in manifest.entries()
    place = {k: v for k in ('hf_hub_id', 'hf_hub_filename', 'url') if (v := getattr(cfg, k))}
    is_published = known and bool(place) and place == manifest.published(name)
    if cfg.source == 'local-dir' or cfg.state_dict and cfg.source != 'hf-hub':
        return overlay
    if cfg.source == 'hf-hub' or cfg.hf_hub_id and not cfg.file and not is_published:
        # timm would look for a pickle where the Hub does not give the safetensors
        checked_token()
        with explained(cfg.hf_hub_id, hf_split(cfg.hf_hub_id)[1]):
            path = download_from_hf(cfg.hf_hub_id, cfg.hf_hub_filename or HUB_FILENAME, cache_dir=cache_dir)
            check_download(path)
            with safe_open(path, framework='pt'):
                # whatever else a config.json from there says of places, but hf_hub_id, which tells where this is from
                return {**overlay, 'state_dict': None, 'url': None, 'source': '', 'file': path}
    if cfg.file:
        if known and Path(cfg.file) == manifest.WEIGHTS_DIR / manifest.entries()[name]['file']:
            manifest.check_file(cfg.file, name)
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
        manifest.check_file(path, name)
        overlay['file'] = path
    elif cfg.url:
        return overlay  # the caller's
    elif not cfg.tag or manifest.source_cfg(name):  # the registry's cfgs have both
        raise RuntimeError(
            f'The pretrained cfg given for {variant} does not say where its weights are: it must have one of '
            f'{", ".join(_SOURCES)}. A tag in its place stands for weights of the zoo.')
    elif known:
        raise RuntimeError(
            f'The weights of {name} should be at {manifest.WEIGHTS_DIR / manifest.entries()[name]["file"]} and are '
            'not: reinstall splitmixer-timm.')
    else:
        available = sorted(manifest.entries())
        raise RuntimeError(
            f'No pretrained weights exist for {name}. Those that have weights: {", ".join(available) or "none yet"}; '
            '`pretrained=False` gives any model random ones.')
    return overlay
