""" What goes wrong with the Hugging Face Hub, told in one line that says what to do. """
import json
import queue
import re
import threading
from contextlib import contextmanager
from typing import Any, Callable, Iterator, Optional, Union

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    OIDCError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)
from safetensors import SafetensorError

__all__ = [
    'HubError', 'OutOfTime', 'TransportError', 'checked_token', 'explained', 'explained_model', 'one_line', 'within']

# any failure of the connection: httpx's, of which huggingface_hub 2.0 made httpx2's
TransportError = next(base for base in HfHubHTTPError.__bases__ if base is not OSError)


class HubError(RuntimeError):
    """ The Hub could not be reached, or refused, or sent what cannot be used."""


class OutOfTime(TransportError):
    """ No answer came in time."""


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """ What a call returns or raises, or `OutOfTime`; a client's own limit is for each address that a host has."""
    outcome: queue.SimpleQueue = queue.SimpleQueue()

    def work() -> None:
        try:
            outcome.put((call(), None))
        except BaseException as e:
            outcome.put((None, e))

    threading.Thread(target=work, daemon=True).start()
    try:
        result, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise OutOfTime(f'no answer in {seconds:g} seconds') from None
    if error is not None:
        raise error
    return result


def _can_be_sent(token: str) -> bool:
    return bool(token) and token.isascii() and token.isprintable() and ' ' not in token


def checked_token(token: Optional[Union[str, bool]] = None, is_sent: bool = True) -> Optional[Union[str, bool]]:
    """ A token, or huggingface_hub's None (the one that is logged in, if any), True (that one) or False (none).

    Args:
        token: The token.
        is_sent: Whether the Hub is asked at all. If not, or offline, it is False: the client would look all the same.

    Raises:
        ValueError: If it is no token or cannot be sent; the error of the connection would show it.
        HubError: If the one that is logged in would be sent and cannot.
    """
    is_stored = token is True or token is None and not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN
    if isinstance(token, str):
        token = token.strip()
        if not _can_be_sent(token):
            raise ValueError('token must be one word of ASCII letters and digits (it is not shown here).')
    elif token is not None and not isinstance(token, bool):
        raise ValueError(f'token must be text, True, False or None, got {type(token).__name__}.')
    if not is_sent or constants.HF_HUB_OFFLINE:
        return False
    if is_stored:
        try:
            stored = get_token()
        except (OSError, UnicodeDecodeError):
            stored = ''
        except OIDCError as e:
            raise HubError(f'HF_OIDC_RESOURCE is set, but gives no token: {one_line(e)}') from e
        if stored is not None and not _can_be_sent(stored):
            raise HubError(
                'The token that is logged in (HF_TOKEN, or the file that `hf auth login` writes) cannot be read, or '
                'is not one word of ASCII letters and digits (it is not shown here).')
    return token


def _without_secrets(message: str) -> str:
    """ A message without an endpoint's user name and password, and without a token that could not be sent."""
    return re.sub("""(?<=//)[^/@ ]*@|(?<=Bearer )[^'"]*""", '', message)


def one_line(error: BaseException) -> str:
    """ What an error says, in a line of bounded length that tells no secrets."""
    return _without_secrets(' '.join(str(error).split()))[:500] or type(error).__name__


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
        if status in known:
            return f'{known[status]}{message}'
        return f'the Hub answered {status}{message}' + ('; try again later' if status >= 429 else '')
    endpoint = constants.ENDPOINT
    if isinstance(error, TransportError):
        return f'{endpoint} cannot be reached ({type(error).__name__}): check the network'
    if isinstance(error, json.JSONDecodeError):
        return f'{endpoint} answers, but not as the Hub does: check HF_ENDPOINT, and whether the network asks to log in'
    message = one_line(error).rstrip('.')
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
    except (EntryNotFoundError, HFValidationError, ImportError, OSError, RuntimeError, SafetensorError, TransportError,
            XetDownloadError, json.JSONDecodeError) as e:  # ImportError: of what a SOCKS proxy needs
        raise HubError(f'{repo_id}: {_without_secrets(_reason(e, revision))}.') from e


@contextmanager
def explained_model(name: str) -> Iterator[None]:
    """ As `explained`, for what timm makes a model of by name: it fetches the config of 'hf-hub:' by itself."""
    scheme, _, place = name.partition(':')
    if scheme.lower() not in ('hf-hub', 'hf_hub'):
        yield
        return
    repo_id, _, revision = place.partition('@')
    checked_token()
    with explained(repo_id, revision or None):
        yield
