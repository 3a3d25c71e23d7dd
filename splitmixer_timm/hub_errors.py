""" What goes wrong with the Hugging Face Hub, told in one line that says what to do. """
from contextlib import contextmanager
from typing import Iterator, Optional

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)
from safetensors import SafetensorError

__all__ = ['HubError', 'TransportError', 'explained']

# any failure of the connection: httpx's, of which huggingface_hub 2.0 made httpx2's
TransportError = next(base for base in HfHubHTTPError.__bases__ if base is not OSError)


class HubError(RuntimeError):
    """ The Hub could not be reached, or refused, or sent what cannot be used."""


def _reason(error: BaseException, revision: Optional[str]) -> str:
    if isinstance(error, LocalEntryNotFoundError):
        if error.__cause__ is not None:
            return f'{_reason(error.__cause__, revision)}, and the cache does not have it'
        return 'not in the cache, and local_files_only forbids to download it'
    if isinstance(error, OfflineModeIsEnabled):
        return 'offline (HF_HUB_OFFLINE is set)'
    if isinstance(error, GatedRepoError):
        return 'gated: ask for access on its page, then pass a token that has it'
    if isinstance(error, RepositoryNotFoundError):
        return 'no such repository, or a private one that the token (`hf auth login`, or token=...) does not open'
    if isinstance(error, RevisionNotFoundError):
        return f'no such revision: {revision}'
    if isinstance(error, EntryNotFoundError):
        return f'a file is missing ({str(error).splitlines()[-1].strip()})'
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        known = {
            401: 'not logged in, or the token is not valid (`hf auth login`, or token=...)',
            403: 'the token has no permission for this',
            409: 'another change is under way, try again',
            412: 'another commit came first (parent_commit is not the last one): look at it and push again',
        }
        message = f' ({" ".join(error.server_message.split())})' if error.server_message else ''
        return known.get(status, f'the Hub answered {status}{message}' + ('; try again later' if status >= 429 else ''))
    if isinstance(error, TransportError):
        return f'{constants.ENDPOINT} cannot be reached ({type(error).__name__}): check the network'
    message = str(error).splitlines()[0].rstrip('.') if str(error) else type(error).__name__
    if isinstance(error.__cause__, TransportError):
        return f'{message}: {_reason(error.__cause__, revision)}'
    return message


@contextmanager
def explained(repo_id: str, revision: Optional[str] = None) -> Iterator[None]:
    """ Raises what goes wrong with a repository inside as a `HubError` of one line; a token is in none of them."""
    try:
        yield
    except HubError:
        raise
    except (EntryNotFoundError, HFValidationError, OSError, RuntimeError, SafetensorError, TransportError,
            XetDownloadError) as e:
        raise HubError(f'{repo_id}: {_reason(e, revision)}.') from e
