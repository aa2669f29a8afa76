"""Checkpoints on the Hugging Face Hub: hub ids as local folders, and errors in one sentence."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, get_token, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from rectvlm.checkpoint.checkpoint import list_model_files
from rectvlm.checkpoint.integrity import MANIFEST_FILE
from rectvlm.checkpoint.model_card import HUB_ID_PATTERN
from rectvlm.checkpoint.run_folder import MODEL_CONFIG_FILE, find_checkpoint, is_checkpoint
from rectvlm.config import MODEL_PARTS, ModelPart
from rectvlm.files import is_disk_full
from rectvlm.finding_thresholds import THRESHOLDS_FILE
from rectvlm.types import UserError


def find_model_folder(
    reference: str | Path,
    revision: str | None = None,
    parts: Collection[ModelPart] | None = None,
    cache_dir: str | Path | None = None,
    token: str | None = None,
) -> Path:
    """Find the local folder of a model, or fetch what `parts` need from the Hub, and no pickle.

    Args:
        reference: a checkpoint, a run's phase folder or an exported model, or a hub id OWNER/NAME.
        revision: branch, tag or commit on the Hub.
        parts: parts to fetch; by default all.
        cache_dir: folder of the Hub's files, by default that of huggingface_hub.
        token: access token of the Hub, by default that of the login.

    Raises:
        UserError: there is no such folder, repository or revision, no access to it, or no network.
    """
    path, name = Path(reference).expanduser(), str(reference)
    if path.is_dir():
        if revision is not None:
            raise UserError(
                f"{path} is a folder here, which has no revision {revision!r}: leave the revision "
                "out."
            )
        return find_checkpoint(path, "give a folder that has one of the two")
    if not HUB_ID_PATTERN.fullmatch(name):
        raise UserError(
            f"No model at {name}: expected an exported folder, a run's phase folder or a hub id "
            "OWNER/NAME."
        )
    files = [
        *list_model_files(MODEL_PARTS if parts is None else parts),
        MANIFEST_FILE,
        THRESHOLDS_FILE,
    ]
    with explain_hub_errors(name, revision):
        folder = Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=files,
                cache_dir=cache_dir,
                token=token,
                library_name="rectvlm",
            )
        )
    if not is_checkpoint(folder):
        raise UserError(f"{name} on the Hub is no model of rectvlm: it has no {MODEL_CONFIG_FILE}.")
    return folder


@contextmanager
def explain_hub_errors(
    repository: str, revision: str | None = None, endpoint: str | None = None
) -> Iterator[None]:
    """Turn errors of the Hub, the network and the disk into one sentence that says what to do."""
    endpoint = endpoint or constants.ENDPOINT
    login = "" if get_token() else "; if it is private, log in with `hf auth login` or set HF_TOKEN"
    try:
        yield
    except GatedRepoError:
        account = (
            "with the account of your token"
            if get_token()
            else "then log in with `hf auth login` or set HF_TOKEN"
        )
        raise UserError(
            f"{repository} is gated: accept its terms at {endpoint}/{repository}, {account}, and "
            "try again."
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{repository} has no revision {revision!r} at {endpoint}.") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"No repository {repository} at {endpoint}, and no folder of that name here: check the "
            f"spelling{login}."
        ) from None
    except RemoteEntryNotFoundError as error:
        raise UserError(f"{repository} at {endpoint} is incomplete ({_one_line(error)}).") from None
    except HFValidationError:
        raise UserError(f"{repository!r} is no repository: expected OWNER/NAME.") from None
    except (OfflineModeIsEnabled, LocalEntryNotFoundError):
        reason = f"{endpoint} cannot be reached"
        if constants.HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE is set"
        raise UserError(
            f"{repository} is neither a folder here nor complete in the Hub's cache, and {reason}: "
            "fetch it once with a network, or give a folder."
        ) from None
    except HfHubHTTPError as error:
        raise UserError(_explain_status(error.response.status_code, repository, endpoint)) from None
    except HTTPError as error:
        raise UserError(
            f"Could not reach {endpoint} for {repository} ({_one_line(error)}): check the network, "
            "or give a mirror or a folder with --from; files that have arrived are kept."
        ) from None
    except OSError as error:
        raise UserError(_explain_disk_error(error, repository)) from None


def _explain_status(status: int, repository: str, endpoint: str) -> str:
    if status == 401:
        if get_token():
            return (
                f"{endpoint} does not accept the token for {repository}: log in again with "
                "`hf auth login`, or set HF_TOKEN."
            )
        return (
            f"{endpoint} wants to know who asks for {repository}: log in with `hf auth login`, or "
            "set HF_TOKEN."
        )
    if status == 403:
        return (
            f"{endpoint} forbids {repository} to the account of this token: ask its owner, or use "
            "a token with more rights."
        )
    return (
        f"{endpoint} answers {status} for {repository}: try later; files that have arrived are "
        "kept."
    )


def _explain_disk_error(error: OSError, repository: str) -> str:
    if is_disk_full(error):
        return (
            f"The disk is full while {repository} is fetched: make room and try again; files that "
            "have arrived are kept."
        )
    reason = error.strerror or _one_line(error)
    return f"{repository} could not be transferred ({reason}): try again."


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
