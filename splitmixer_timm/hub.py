""" Models to and from the Hugging Face Hub.

A repository holds what plain timm reads (config.json and model.safetensors, never a pickle), the model's card, and the
arguments and log of its run where they are known.
"""
import json
import logging
import shutil
import tempfile
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
    constants,
    hf_hub_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RevisionNotFoundError,
)
from torch import nn

from . import __version__
from .card import card_licence, merge_cards
from .hub_errors import HubError, TransportError, checked_token, explained, within
from .pretrained import check_download
from .release import ARGS, CARD, CONFIG, SUMMARY, WEIGHTS, Release, describe, load_folder

__all__ = ['HubError', 'pull_from_hub', 'push_to_hub']

_logger = logging.getLogger(__name__)

_LIBRARY = dict(library_name='splitmixer_timm', library_version=__version__)
_REACH_SECONDS = 10.  # before the Hub counts as out of reach


@contextmanager
def _new_branch(api: HfApi, repo_id: str, branch: str) -> Iterator[ModelInfo]:
    """ Make a branch and yield its info; it is deleted if the body fails and nobody else has committed to it."""
    api.create_branch(repo_id, branch=branch)
    made_from = None
    try:
        made_from = api.model_info(repo_id, revision=branch)
        yield made_from
    except BaseException:
        with suppress(TransportError):
            if made_from is None or api.model_info(repo_id, revision=branch).sha == made_from.sha:
                api.delete_branch(repo_id, branch=branch)
        raise


def upload(
        release: Release,
        repo_id: str,
        *,
        private: Optional[bool] = None,
        token: Optional[Union[str, bool]] = None,
        revision: Optional[str] = None,
        commit_message: str = 'Add model',
        create_pr: bool = False,
        parent_commit: Optional[str] = None,
) -> CommitInfo:
    """ Publish a release in one commit, see `push_to_hub`."""
    token = checked_token(token)
    api = HfApi(token=token, **_LIBRARY)
    files = release.files(repo_id)
    with explained(repo_id, revision), ExitStack() as stack:
        asked, repo_id = repo_id, api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if repo_id != asked:  # a name without its user's was completed
            files[CARD] = release.repo_card(repo_id)
        try:
            info = api.model_info(repo_id, revision=revision)
        except RevisionNotFoundError:
            if create_pr:
                raise
            info = stack.enter_context(_new_branch(api, repo_id, revision))
        with tempfile.TemporaryDirectory() as folder:
            try:
                existing = hf_hub_download(repo_id, CARD, revision=info.sha, local_dir=folder, token=token, **_LIBRARY)
            except RemoteEntryNotFoundError:  # not its base class, which an answer that failed to come has too
                pass
            else:
                card = merge_cards(
                    Path(existing).read_text(encoding='utf-8-sig'), files[CARD].decode(),
                    release.license is None)
                files[CARD] = card.encode()
                files[CONFIG] = release.config(card_licence(card))  # the two must not contradict each other
        # of the run of earlier weights: nothing would tell that they are not of these
        stale = {file.rfilename for file in info.siblings or ()} & {ARGS, SUMMARY} - files.keys()
        return api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, content) for name, content in files.items()),
                *(CommitOperationDelete(name) for name in sorted(stale)),
            ],
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            # the card was merged with that of this commit: whatever came in between must not be overwritten
            parent_commit=parent_commit or info.sha,
        )


def push_to_hub(
        model: nn.Module,
        repo_id: str,
        *,
        metrics: Optional[Dict[str, Any]] = None,
        dataset: Optional[str] = None,
        private: Optional[bool] = None,
        token: Optional[Union[str, bool]] = None,
        revision: Optional[str] = None,
        commit_message: str = 'Add model',
        create_pr: bool = False,
        parent_commit: Optional[str] = None,
        label_names: Optional[Sequence[str]] = None,
        data_config: Optional[Dict[str, Any]] = None,
        license: Optional[str] = None,
) -> str:
    """ Publish a model on the Hub, for `timm.create_model('hf-hub:USER/NAME', pretrained=True)`.

    One commit with config.json, model.safetensors and the card. Nothing is guessed of a model that was trained further:
    its metrics, data set and class names are those given here, or none; only a model with the zoo's own weights has
    the zoo's. A card that is there already is made anew but for what others wrote in it and the licence that they
    chose; its datasets, model-index, library_name and pipeline_tag are always this push's. The arguments and log of an
    earlier model's run are removed. Pushing the same again makes no new commit. The model is run once on noise, in eval
    mode, to see that its arguments and weights make it again.

    Args:
        model: Model of this package from `timm.create_model`, as it is or wrapped (compiled, DDP, EMA).
        repo_id: 'USER/NAME', made if it does not exist.
        metrics: 'top1' and 'top5' in percent, on how many 'images' of which 'split', 'measured_by' what, and 'seeds',
            from at least two seeds to the top-1 of each.
        dataset: What it was trained on: a name of `splitmixer_timm.card.DATASETS`, an id of the Hub, or any other name.
        private: Whether a new repository is private; if None as the Hub has it: public, but for organisations that
            have chosen otherwise.
        token: Token of the Hub, the one that is logged in if None.
        revision: Branch, made if it does not exist; 'main' if None.
        commit_message: Message of the commit.
        create_pr: Open a pull request in place of committing to the branch.
        parent_commit: Commit that must be the last one; a later one makes the push fail.
        label_names: Class names in label order.
        data_config: Preprocessing, as `timm.data.resolve_data_config` gives it; the model's pretrained cfg's if None.
        license: Licence, as the Hub names it ('mit'); if None the one of the repository's card, else of the pretrained
            cfg.

    Returns:
        URL of the commit, or of the pull request.

    Raises:
        ValueError: If the model or what is said of it cannot be published, or `token` cannot be sent.
        HubError: If the Hub refuses or cannot be reached; the repository is then as it was (one that did not exist may
            be there, empty).
    """
    given = dict(
        metrics=metrics, dataset=dataset, label_names=label_names, data_config=data_config, license=license)
    info = upload(
        describe(model, **given), repo_id, private=private, token=token, revision=revision,
        commit_message=commit_message, create_pr=create_pr, parent_commit=parent_commit)
    return info.pr_url or info.commit_url


def download(
        repo_id: str,
        *,
        revision: Optional[str] = None,
        token: Optional[Union[str, bool]] = None,
        cache_dir: Optional[Union[str, Path]] = None,
        local_files_only: bool = False,
        optional: Sequence[str] = (),
) -> Path:
    """ Folder of the cache with config.json and model.safetensors of one commit, and what there is of `optional`."""
    token = checked_token(token, is_sent=not local_files_only)
    kwargs = dict(cache_dir=cache_dir, token=token, **_LIBRARY)
    with explained(repo_id, revision):
        if not local_files_only and not constants.HF_HUB_OFFLINE:
            try:
                # one request that fails at once, where a download would try for half a minute
                api = HfApi(token=token, **_LIBRARY)
                within(_REACH_SECONDS, partial(api.model_info, repo_id, revision=revision, timeout=_REACH_SECONDS))
            except (TransportError, json.JSONDecodeError) as e:
                if isinstance(e, HfHubHTTPError) and e.response.status_code < 500:
                    raise
                local_files_only = True
                try:
                    for name in (CONFIG, WEIGHTS):  # timm may have cached the one, by hf_hub_id, without the other
                        hf_hub_download(repo_id, name, revision=revision, cache_dir=cache_dir, local_files_only=True)
                except EntryNotFoundError:
                    raise e from None
                _logger.warning(f'{repo_id}: the Hub cannot be reached, taken from the cache')
        kwargs['local_files_only'] = local_files_only
        config = hf_hub_download(repo_id, CONFIG, revision=revision, **kwargs)
        check_download(config)
        folder = Path(config).parent
        kwargs['revision'] = folder.name  # the commit, so that the files are of one
        check_download(hf_hub_download(repo_id, WEIGHTS, **kwargs))
        for name in optional:
            try:
                check_download(hf_hub_download(repo_id, name, **kwargs))
            except RemoteEntryNotFoundError:
                pass
            except LocalEntryNotFoundError:
                if not local_files_only and not constants.HF_HUB_OFFLINE:
                    raise
    return folder


def pull_from_hub(
        repo_id: str,
        *,
        revision: Optional[str] = None,
        token: Optional[Union[str, bool]] = None,
        cache_dir: Optional[Union[str, Path]] = None,
        local_files_only: bool = False,
) -> nn.Module:
    """ A model of this package from the Hub.

    Both files are of one commit; weights are read from safetensors only. Without a network the cache is used.

    Args:
        repo_id: 'USER/NAME', or 'USER/NAME@REVISION'.
        revision: Branch, tag or commit; 'main' if None.
        token: Token of the Hub, the one that is logged in if None.
        cache_dir: Where to keep downloads, huggingface_hub's own cache if None.
        local_files_only: Ask no network.

    Returns:
        The model, in train mode as `timm.create_model` gives it.

    Raises:
        HubError: If it cannot be had (no such repository or revision, no permission, no network and not in the cache)
            or cannot be used (another architecture, weights that do not fit its config, damaged files).
        ValueError: If `token` cannot be sent, or two revisions are given.
    """
    repo_id, revision = split_revision(repo_id, revision)
    folder = download(
        repo_id, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    return load_folder(folder, repo_id)


def split_revision(repo_id: str, revision: Optional[str]) -> Tuple[str, Optional[str]]:
    """ 'USER/NAME@REVISION' as timm takes it, in its two parts."""
    name, at, own = repo_id.partition('@')
    if at and revision is not None:
        raise ValueError(f'revision must be given once, got {repo_id!r} and revision={revision!r}.')
    return name, own if at else revision


def pull_to_folder(
        repo_id: str,
        folder: Path,
        *,
        revision: Optional[str] = None,
        token: Optional[Union[str, bool]] = None,
) -> List[str]:
    """ Leave a model of the Hub in a new folder that `timm.create_model('local-dir:FOLDER', pretrained=True)` reads.

    Returns:
        Names of the files in it.

    Raises:
        ValueError: If the folder exists and has something in it, or is the current one.
        HubError: As `pull_from_hub`; the folder is then not made.
    """
    repo_id, revision = split_revision(repo_id, revision)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir()) or folder.resolve() == Path.cwd()):
        raise ValueError(f'{folder} exists already: name another folder.')
    cached = download(repo_id, revision=revision, token=token, optional=(CARD, ARGS, SUMMARY))
    load_folder(cached, repo_id)
    is_there = folder.is_dir()  # perhaps a link, or where a volume is mounted, of which no other can take the place
    if not is_there:
        folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix='.pull-', dir=folder if is_there else folder.parent))
    try:
        names = [name for name in (CONFIG, WEIGHTS, CARD, ARGS, SUMMARY) if (cached / name).is_file()]
        for name in names:
            shutil.copyfile(cached / name, temporary / name)
        if is_there:
            for name in reversed(names):  # the config last, without which the others are no model
                (temporary / name).replace(folder / name)
        else:
            temporary.chmod(0o755)
            temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return names
