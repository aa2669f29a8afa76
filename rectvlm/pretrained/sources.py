"""Where weights are read from: a hub (or a mirror that speaks its language), or a folder.

Everything over the network goes through huggingface_hub. It does not go on with a file that another process began, so
bytes are asked for through its `http_get` from where the file stands, and `transfer` keeps what has arrived.
"""

import errno
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from huggingface_hub import HfApi, constants, get_token, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers

from rectvlm.checkpoint import manifest
from rectvlm.types import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")

FULL = (errno.ENOSPC, errno.EDQUOT)

WAITS = (1.0, 2.0, 4.0)
"""Seconds between attempts, when a server says that it is busy or broken."""


@dataclass(frozen=True)
class RemoteFile:
    """What a source says about a file; one of the two digests is known."""

    size: int
    sha256: str | None = None
    git_sha1: str | None = None

    @property
    def key(self) -> str:
        """The digest that is known, which is also the name of the content in the hub's cache."""
        found = self.sha256 or self.git_sha1
        assert found is not None
        return found


class Source(Protocol):
    """A place with the files of one model."""

    name: str
    """For messages."""

    def files(self) -> dict[str, RemoteFile]:
        """All files, by path."""

    def read(self, path: str, begin: int, end: int, done: int, size: int, file: BinaryIO) -> None:
        """Append bytes `begin + done` to `end` of a file with `size` bytes; `done` of them stand in `file`."""


class Folder:
    """The files of a folder on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, str(folder)

    def files(self) -> dict[str, RemoteFile]:
        """All files, with the digests that they should have where a manifest says so."""
        present = {
            path.relative_to(self.folder).as_posix(): path
            for path in self.folder.rglob("*")
            if path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(self.folder).parts)
        }
        listed = (
            manifest.read_manifest(self.folder).files if manifest.MANIFEST_FILE in present else {}
        )
        return {
            name: RemoteFile(
                path.stat().st_size,
                listed[name].sha256 if name in listed else manifest.compute_sha256(path),
            )
            for name, path in present.items()
        }

    def read(self, path: str, begin: int, end: int, done: int, size: int, file: BinaryIO) -> None:
        """See `Source`."""
        with (self.folder / path).open("rb") as stream:
            stream.seek(begin + done)
            while (left := end - stream.tell()) > 0 and (data := stream.read(min(left, 1 << 22))):
                file.write(data)


class _FromHere:
    """A file that begins where a piece does: releases of huggingface_hub before 2 take its position for the size."""

    def __init__(self, file: BinaryIO, start: int) -> None:
        self._file, self._start = file, start
        self.write, self.flush = file.write, file.flush

    def tell(self) -> int:
        return self._file.tell() - self._start

    def seek(self, position: int) -> int:
        return self._file.seek(self._start + position) - self._start

    def truncate(self) -> int:
        return self._file.truncate() - self._start


class Hub:
    """One revision of a repository on a hub."""

    def __init__(
        self, repository: str, revision: str = "main", endpoint: str | None = None
    ) -> None:
        self.repository, self.revision = repository, revision
        self.endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self.name = f"{self.endpoint}/{repository}"
        self.api = HfApi(endpoint=self.endpoint, library_name="rectvlm")
        self.commit: str | None = None

    def files(self) -> dict[str, RemoteFile]:
        """All files of the revision, which is fixed to a commit from then on.

        Raises:
            UserError: no such repository or revision, no access, or no network.
        """
        with explain_hub_errors(self):
            self.commit = _patient(
                lambda: self.api.model_info(self.repository, revision=self.revision).sha
            )
            tree = _patient(
                lambda: list(
                    self.api.list_repo_tree(self.repository, recursive=True, revision=self.commit)
                )
            )
        found = {}
        for row in tree:
            if isinstance(row, RepoFile):
                manifest.check_file_name(row.path, self.name)
                large = row.lfs is not None
                found[row.path] = RemoteFile(
                    row.size, row.lfs.sha256 if row.lfs else None, None if large else row.blob_id
                )
        return found

    def read(self, path: str, begin: int, end: int, done: int, size: int, file: BinaryIO) -> None:
        """See `Source`.

        Raises:
            UserError: no access, no network, or a server that stays broken.
        """
        assert self.commit is not None, "files() comes first"
        url = hf_hub_url(self.repository, path, revision=self.commit, endpoint=self.endpoint)
        # Compressed on the way, bytes could not be counted and a transfer could not go on.
        headers = {**build_hf_headers(library_name="rectvlm"), "Accept-Encoding": "identity"}
        if (begin, end) != (0, size):
            headers["Range"] = f"bytes={begin}-{end - 1}"
        piece: Any = _FromHere(file, file.tell() - done)

        def get() -> None:
            http_get(
                url,
                piece,
                resume_size=piece.tell(),
                headers=headers,
                expected_size=end - begin,
                displayed_filename=path,
            )

        with explain_hub_errors(self, path):
            _patient(get)


def open_source(where: str | None, repository: str, revision: str = "main") -> Source:
    """The source that `--from` means.

    Args:
        where: None for the hub, the address of a mirror, a folder with `OWNER/NAME` folders, or a model's folder.
        repository: `OWNER/NAME`.
        revision: branch, tag or commit; a folder has none.

    Raises:
        UserError: no such folder, or not one of a model.
    """
    if where is None or where.startswith(("http://", "https://")):
        return Hub(repository, revision, where)
    root = Path(where).expanduser()
    found = [folder for folder in (root / repository, root) if (folder / "config.json").is_file()]
    if not found:
        raise UserError(
            f"No model in {root}: expected {repository}/config.json or config.json there; give --from a folder that "
            "has one of them, or the address of a mirror (http…)."
        )
    return Folder(found[0])


def _patient(call: Callable[[], T]) -> T:
    for wait in WAITS:
        try:
            return call()
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status != 429 and status < 500:
                raise
            log.info("the server answered %d; asking again in %.0f s", status, wait)
            time.sleep(wait)
    return call()


@contextmanager
def explain_hub_errors(hub: Hub, path: str = "") -> Iterator[None]:
    """Turn errors of the hub, the network and the disk into one sentence that says what to do."""
    what = f"{hub.repository}/{path}" if path else hub.repository
    try:
        yield
    except UserError:
        raise
    except GatedRepoError:
        known = (
            "with the account of your token"
            if get_token()
            else "then log in with `hf auth login` or set HF_TOKEN"
        )
        raise UserError(
            f"{hub.repository} is gated: accept its terms at {hub.name}, {known}, and pull again."
        ) from None
    except RevisionNotFoundError:
        raise UserError(
            f"{hub.repository} has no revision {hub.revision!r} at {hub.endpoint}."
        ) from None
    except RepositoryNotFoundError:
        login = (
            "" if get_token() else "; if it is private, log in with `hf auth login` or set HF_TOKEN"
        )
        raise UserError(
            f"No repository {hub.repository} at {hub.endpoint}: check the name{login}."
        ) from None
    except RemoteEntryNotFoundError:
        raise UserError(
            f"{hub.repository} holds no file {path}: its revision {hub.revision} is incomplete."
        ) from None
    except HfHubHTTPError as error:
        raise UserError(_status_message(error.response.status_code, what, hub.endpoint)) from None
    except HFValidationError:
        raise UserError(f"{hub.repository!r} is no repository: expected OWNER/NAME.") from None
    except OfflineModeIsEnabled:
        raise UserError(
            f"HF_HUB_OFFLINE is set, so {what} cannot be asked for: unset it, or give --from."
        ) from None
    except HTTPError as error:
        reason = str(error) or type(error).__name__
        raise UserError(
            f"Could not reach {hub.endpoint} for {what} ({reason}): check the network, or give a mirror or a folder "
            "with --from; what has arrived is kept."
        ) from None
    except OSError as error:
        if error.errno in FULL:
            raise  # `transfer` knows the folder
        raise disk_error(error, what) from None


def _status_message(status: int, what: str, endpoint: str) -> str:
    if status == 401 and not get_token():
        return f"{endpoint} wants to know who asks for {what}: log in with `hf auth login`, or set HF_TOKEN."
    if status == 401:
        return f"{endpoint} does not accept the token for {what}: log in again with `hf auth login`, or set HF_TOKEN."
    if status == 403:
        return f"{endpoint} forbids {what} to the account of this token: ask its owner, or use a token with more rights."
    if status == 416:
        return f"{endpoint} has fewer bytes of {what} than it announced: pull again."
    return f"{endpoint} answers {status} for {what} again and again: try later; what has arrived is kept."


def disk_error(error: OSError, what: str) -> UserError:
    """An error of the disk, or of a transfer that gave another number of bytes, in one sentence."""
    if error.errno in FULL:
        return UserError(
            f"The disk is full at {what}: make room and pull again; what has arrived is kept."
        )
    reason = error.strerror or str(error).splitlines()[0]
    return UserError(
        f"{what} could not be transferred ({reason}): pull again; what has arrived is kept."
    )
