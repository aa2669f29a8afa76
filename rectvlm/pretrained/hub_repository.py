"""A repository on a hub or a mirror: its files with their digests, downloaded and checked.

huggingface_hub transfers files and compares their sizes. Their digests are compared here.
"""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download

from rectvlm.checkpoint.hub import explain_hub_errors
from rectvlm.checkpoint.integrity import check_file_name
from rectvlm.files import file_sha256
from rectvlm.types import UserError

_READ_BYTES = 1 << 22


@dataclass(frozen=True)
class HubFile:
    """Size and digest of a file, as the hub states them."""

    size: int
    """Size, bytes."""
    sha256: str | None
    """SHA-256 of a large file; None for a small one."""
    git_sha1: str
    """Git's name of the content, which is that of a small file."""

    def matches(self, path: Path) -> bool:
        """Whether a file on this machine has the same content."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        if self.sha256 is not None:
            return file_sha256(path) == self.sha256
        return git_sha1(path) == self.git_sha1


@dataclass(frozen=True)
class HubRepository:
    """One revision of a repository."""

    name: str
    """OWNER/NAME."""
    endpoint: str
    """Address of the hub or mirror."""
    revision: str
    """Branch, tag or commit."""
    is_private: bool
    files: dict[str, HubFile]
    """Files by path."""

    @property
    def address(self) -> str:
        """Address of the repository, for messages."""
        return f"{self.endpoint}/{self.name}"

    def download_files(self, names: Collection[str], folder: Path | None = None) -> Path:
        """Bring files here that are missing or differ from the hub's; return their folder.

        Args:
            names: files to download.
            folder: where to put them, by default the hub's cache, where Transformers looks.

        Raises:
            UserError: there is no access or no network, or a file arrives with another digest.
        """
        target = self._download(names, folder, is_forced=False)
        damaged = self._find_damaged(names, target)
        if damaged:
            self._download(damaged, folder, is_forced=True)
            damaged = self._find_damaged(damaged, target)
        if damaged:
            raise UserError(
                f"{', '.join(damaged)} from {self.address} arrived with another digest than the "
                "hub states: try again, or use another mirror."
            )
        return target

    def _find_damaged(self, names: Collection[str], folder: Path) -> list[str]:
        return [name for name in names if not self.files[name].matches(folder / name)]

    def _download(self, names: Collection[str], folder: Path | None, is_forced: bool) -> Path:
        with explain_hub_errors(self.name, self.revision, self.endpoint):
            target = snapshot_download(
                self.name,
                revision=self.revision,
                allow_patterns=list(names),
                local_dir=folder,
                endpoint=self.endpoint,
                force_download=is_forced,
                library_name="rectvlm",
            )
        return Path(target)


def read_repository(
    name: str, revision: str | None = None, endpoint: str | None = None
) -> HubRepository:
    """List the files of a repository.

    Args:
        name: OWNER/NAME.
        revision: branch, tag or commit; by default the main branch.
        endpoint: address of a mirror, by default the hub.

    Raises:
        UserError: there is no such repository or revision, no access, or no network.
    """
    endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
    revision = revision or constants.DEFAULT_REVISION
    api = HfApi(endpoint=endpoint, library_name="rectvlm")
    with explain_hub_errors(name, revision, endpoint):
        info = api.model_info(name, revision=revision, files_metadata=True)
    files = {}
    for sibling in info.siblings or ():
        check_file_name(sibling.rfilename, f"{endpoint}/{name}")
        sha256 = None if sibling.lfs is None else sibling.lfs.sha256
        files[sibling.rfilename] = HubFile(sibling.size or 0, sha256, sibling.blob_id or "")
    return HubRepository(name, endpoint, revision, bool(info.private), files)


def git_sha1(path: Path) -> str:
    """Git's name of a file's content, by which the hub knows small files."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            digest.update(data)
    return digest.hexdigest()
