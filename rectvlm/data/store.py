"""The folder of a data set's shards, on a disk or at a URL that fsspec knows (s3://, https://, …).

A file appears under its name complete or not at all: on a disk it is written under another name,
flushed and renamed; an object store shows an upload when it is complete.
"""

import errno
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec

from rectvlm.files import atomic_file
from rectvlm.types import UserError

_MAX_ATTEMPTS = 4
_FIRST_RETRY_SECONDS = 0.25
"""Pause before the second attempt; each further pause is four times as long."""
_READ_TIMEOUT_SECONDS = 60.0
"""Longest silence of a web server. An answer may take longer in all, as over a slow line."""
_TEMPORARY_FILE = re.compile(r"\..+\.\d+\.tmp")
_T = TypeVar("_T")


class ShardStore:
    """Files by name in one folder; names may hold `/`. It can be sent to another process."""

    def __init__(self, path_or_url: "str | Path | ShardStore") -> None:
        """Name a folder by path or URL; nothing is made or read yet.

        Raises:
            UserError: the protocol of a URL is unknown or lacks its package.
        """
        self.path_or_url: str = (
            str(
                path_or_url.path_or_url if isinstance(path_or_url, ShardStore) else path_or_url
            ).rstrip("/")
            or "/"
        )
        self.local_folder: Path | None = None
        if "://" not in self.path_or_url or self.path_or_url.startswith("file://"):
            self.local_folder = Path(self.path_or_url.removeprefix("file://"))
            if self.path_or_url.startswith("~"):
                self.local_folder = self.local_folder.expanduser()
                self.path_or_url = str(self.local_folder)
            return
        try:
            self._fs, self._root = fsspec.core.url_to_fs(
                self.path_or_url, **_fsspec_options(self.path_or_url)
            )
        except (ValueError, ImportError) as error:
            raise UserError(
                f"{self.path_or_url} cannot be opened ({error}): give a folder or a URL whose "
                "fsspec package is installed."
            ) from None

    def __str__(self) -> str:
        return self.path_or_url

    def __truediv__(self, name: str) -> str:
        """Path or URL of a file, for messages."""
        return (
            str(self.local_folder / name)
            if self.local_folder is not None
            else f"{self.path_or_url}/{name}"
        )

    def read_file(self, name: str) -> bytes:
        """Read an entire file.

        Raises:
            OSError: it is not there (`FileNotFoundError`) or cannot be read.
        """
        if self.local_folder is not None:
            return (self.local_folder / name).read_bytes()
        return bytes(self._call_with_retries(lambda: self._fs.cat_file(self._remote_path(name))))

    def read_range(self, name: str, start: int, size: int) -> bytes:
        """Read `size` bytes from `start` on; fewer where the file ends before.

        A local file is opened anew each time, so threads and processes do not interfere.

        Raises:
            OSError: as `read_file`.
        """
        if self.local_folder is not None:
            with (self.local_folder / name).open("rb") as file:
                file.seek(start)
                return file.read(size)
        data = bytes(
            self._call_with_retries(
                lambda: self._fs.cat_file(self._remote_path(name), start=start, end=start + size)
            )
        )
        if len(data) > size:
            raise OSError(
                "the server sends whole files where a part is asked for; it must support range "
                "requests"
            )
        return data

    def file_size(self, name: str) -> int | None:
        """Size of a file in bytes; None when it is not there."""
        if self.local_folder is not None:
            path = self.local_folder / name
            return path.stat().st_size if path.is_file() else None
        try:
            return int(self._call_with_retries(lambda: self._fs.size(self._remote_path(name))))
        except FileNotFoundError:
            return None

    def list_names(self, folder: str = "") -> list[str]:
        """Sorted names of the files directly in the store, or in one of its folders."""
        return sorted(self.list_sizes(folder))

    def list_sizes(self, folder: str = "") -> dict[str, int]:
        """Size in bytes of each file directly in the store, or in one of its folders, by name."""
        sizes: dict[str, int | None] = {}
        if self.local_folder is not None:
            root = self.local_folder / folder
            for path in root.iterdir() if root.is_dir() else ():
                if path.is_file():
                    sizes[path.name] = path.stat().st_size
        else:
            for entry in self._list_remote(folder):
                if entry["type"] == "file":
                    sizes[entry["name"].rsplit("/", 1)[-1]] = entry["size"]
        prefix = f"{folder}/" if folder else ""
        return {prefix + name: int(size or 0) for name, size in sizes.items()}

    def _list_remote(self, folder: str) -> list[dict[str, Any]]:
        """Entries of a folder as fsspec describes them; none when it is not there."""
        # Without its cache: s3fs would answer from a listing made before other processes wrote.
        self._fs.invalidate_cache()
        path = self._remote_path(folder)
        try:
            entries = self._call_with_retries(lambda: self._fs.ls(path, detail=True))
        except FileNotFoundError:
            return []
        return list(entries)

    def remove_file(self, name: str) -> None:
        """Remove a file if it is there."""
        if self.local_folder is not None:
            (self.local_folder / name).unlink(missing_ok=True)
        elif self.file_size(name) is not None:
            self._call_with_retries(lambda: self._fs.rm_file(self._remote_path(name)))

    def write_file(self, name: str, data: bytes) -> None:
        """Write an entire file; see `open_for_writing`."""
        with self.open_for_writing(name) as file:
            file.write(data)

    def remove_temporary_files(self, folder: str = "") -> None:
        """Remove half-written files of killed processes, where no other process writes."""
        for name in self.list_names(folder):
            if self.local_folder is not None and _TEMPORARY_FILE.fullmatch(name.rpartition("/")[2]):
                self.remove_file(name)

    @contextmanager
    def open_for_writing(self, name: str) -> Iterator[IO[bytes]]:
        """Open a file that appears under its name complete or not at all.

        It is readable and seekable while it is written.
        """
        if self.local_folder is not None:
            with atomic_file(self.local_folder / name) as file:
                yield file
            return
        # A file without a name leaves nothing in the temporary folder when the process is killed.
        with tempfile.TemporaryFile(prefix="rectvlm-") as temporary:
            yield temporary
            temporary.flush()
            self._fs.makedirs(os.path.dirname(self._remote_path(name)), exist_ok=True)
            self._call_with_retries(lambda: self._upload_file(temporary, name))

    def _upload_file(self, file: IO[bytes], name: str) -> None:
        file.seek(0)
        self._fs.put_file(f"/dev/fd/{file.fileno()}", self._remote_path(name))

    def _remote_path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}".rstrip("/")

    def _call_with_retries(self, call: Callable[[], _T]) -> _T:
        """Call a function again when it fails: a long run must outlive one lost reply."""
        for attempt in range(_MAX_ATTEMPTS):
            try:
                return call()
            except FileNotFoundError as error:  # without a reason, in most of fsspec
                raise FileNotFoundError(
                    errno.ENOENT, os.strerror(errno.ENOENT), str(error)
                ) from None
            except Exception as error:
                if attempt + 1 == _MAX_ATTEMPTS:
                    raise OSError(f"{type(error).__name__}: {error}") from error
                time.sleep(_FIRST_RETRY_SECONDS * 4**attempt)
        raise AssertionError("unreachable")


def _fsspec_options(url: str) -> dict[str, Any]:
    """Options of fsspec for a URL.

    By default, aiohttp gives up after five minutes in all and does not notice silence.
    """
    if not url.startswith(("http://", "https://")):
        return {}
    import aiohttp

    timeout = aiohttp.ClientTimeout(
        total=None, sock_connect=_READ_TIMEOUT_SECONDS, sock_read=_READ_TIMEOUT_SECONDS
    )
    return {"client_kwargs": {"timeout": timeout}}
