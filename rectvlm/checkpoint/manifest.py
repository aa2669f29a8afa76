"""`manifest.json`: sizes and SHA-256 of the files of a model's folder, and of every tensor in its weights.

Files vouch for a folder; tensors let one part be fetched, cut out of a larger file, and still be checked. README.md has
no entry: its owner edits it on the hub's page.
"""

import hashlib
import json
import os
import struct
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from rectvlm.config import MODEL_PARTS
from rectvlm.pretrained.catalog import ADAPTER, part_of
from rectvlm.types import UserError

MANIFEST_FILE = "manifest.json"
UNLISTED_FILES = frozenset({MANIFEST_FILE, "README.md", ".gitattributes"})
"""Files without an entry: they may be there, differ, or not be there."""
_READ = 1 << 22
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class TensorEntry:
    """One tensor of a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    """First byte, from the start of the file."""
    end: int
    """Byte behind the last."""
    sha256: str


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ManifestEntry:
    """One file."""

    size: int
    sha256: str
    tensors: dict[str, TensorEntry] | None = None


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class CheckpointManifest:
    """All files of a folder, by their path with forward slashes."""

    files: dict[str, ManifestEntry]

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of a rectvlm model that the files hold."""
        names = [name for entry in self.files.values() for name in entry.tensors or ()]
        found = {
            part_of(name)
            for name in [*names, *(path for path in self.files if path.startswith(ADAPTER))]
        }
        return tuple(part for part in MODEL_PARTS if part in found)

    def to_json(self) -> str:
        """As text; one tensor a line would be long, so it is compact."""
        return (
            json.dumps(
                _MANIFEST_ADAPTER.dump_python(self, mode="json", exclude_none=True), indent=1
            )
            + "\n"
        )


_MANIFEST_ADAPTER = TypeAdapter(CheckpointManifest)


def compute_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def compute_git_sha1(path: Path) -> str:
    """The name that git gives to a file's content, by which the hub knows small files."""
    sha1 = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while data := file.read(_READ):
            sha1.update(data)
    return sha1.hexdigest()


def digest_of(path: Path, begin: int, end: int) -> str:
    """SHA-256 of the bytes of a file from `begin` to before `end`."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(begin)
        while (left := end - file.tell()) and (data := file.read(min(_READ, left))):
            sha256.update(data)
    return sha256.hexdigest()


def tensors_of(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file, in the order of their bytes.

    Raises:
        UserError: the file is not safetensors, was cut short, or has bytes that belong to no tensor.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
            raise UserError(
                f"{path} is not a safetensors file, or was cut short: fetch or export it again."
            )
        text = file.read(length)
    try:
        tree = json.loads(text)
        tree.pop("__metadata__", None)
        base = 8 + length
        rows = sorted(
            (tuple(row["data_offsets"]), name, row["dtype"], row["shape"])
            for name, row in tree.items()
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} has a damaged safetensors header ({error}): fetch or export it again."
        ) from None
    position = 0
    for (begin, end), name, _, _ in rows:
        if begin != position or end < begin:
            raise UserError(
                f"{path} has a damaged safetensors header (at {name}): fetch or export it again."
            )
        position = end
    if base + position != size:
        raise UserError(
            f"{path} has {size} bytes where its header says {base + position}: fetch or export it again."
        )
    return {
        name: TensorEntry(
            dtype, tuple(shape), base + begin, base + end, digest_of(path, base + begin, base + end)
        )
        for (begin, end), name, dtype, shape in rows
    }


def build_manifest(
    folder: Path, tensors: bool, names: Collection[str] | None = None
) -> CheckpointManifest:
    """Checksums of a folder as it is.

    Args:
        folder: of a model.
        tensors: list the tensors of the top folder's safetensors files too, which reads them twice.
        names: of the files that get an entry, by default all. What is listed, a later pull may remove.

    Raises:
        UserError: a safetensors file is damaged.
    """
    files = {}
    for name, path in sorted(_list_files(folder)):
        if name not in UNLISTED_FILES and (names is None or name in names):
            listed = (
                tensors_of(path)
                if tensors and path.suffix == ".safetensors" and "/" not in name
                else None
            )
            files[name] = ManifestEntry(path.stat().st_size, compute_sha256(path), listed)
    return CheckpointManifest(files)


def write_manifest(folder: Path, manifest: CheckpointManifest) -> None:
    """Put the manifest into the folder, whole or not at all."""
    made = folder / f".{MANIFEST_FILE}.{os.getpid()}"
    made.write_text(manifest.to_json(), encoding="utf-8")
    made.replace(folder / MANIFEST_FILE)


def parse_manifest(data: bytes, where: str) -> CheckpointManifest:
    """A manifest from its bytes.

    Raises:
        UserError: damaged, or it names a path outside its folder.
    """
    try:
        manifest: CheckpointManifest = _MANIFEST_ADAPTER.validate_json(data)
    except ValidationError as error:
        fault = error.errors()[0]
        raise UserError(
            f"{where} is damaged ({'.'.join(map(str, fault['loc']))}: {fault['msg']})."
        ) from None
    for name in manifest.files:
        check_file_name(name, where)
    return manifest


def check_file_name(name: str, where: str) -> None:
    """Refuse a path that could lead out of its folder.

    Raises:
        UserError: absolute, or with `..`.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or not path.parts:
        raise UserError(
            f"{where} names the file {name!r}, which could lie outside its folder: nothing was written."
        )


def read_manifest(folder: Path) -> CheckpointManifest:
    """The manifest of a folder.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = folder / MANIFEST_FILE
    try:
        return parse_manifest(path.read_bytes(), str(path))
    except OSError:
        raise UserError(
            f"No {MANIFEST_FILE} in {folder}: nothing says what should be there; a pull brings one along, a push writes one."
        ) from None


def find_manifest_faults(folder: Path) -> list[str]:
    """What does not agree with the manifest, one line each; empty when all does.

    Raises:
        UserError: there is no manifest.
    """
    manifest, present = read_manifest(folder), dict(_list_files(folder))
    found = [f"missing: {name}" for name in manifest.files.keys() - present.keys()]
    found += [f"extra: {name}" for name in present.keys() - manifest.files.keys() - UNLISTED_FILES]
    for name in sorted(manifest.files.keys() & present.keys()):
        entry, path = manifest.files[name], present[name]
        if path.stat().st_size != entry.size:
            found.append(f"differs: {name} ({path.stat().st_size} bytes, expected {entry.size})")
        elif compute_sha256(path) != entry.sha256:
            found.append(f"differs: {name}{_where(path, entry)}")
    return sorted(found)


def _where(path: Path, entry: ManifestEntry) -> str:
    rows = entry.tensors or {}
    odd = [name for name, row in rows.items() if digest_of(path, row.begin, row.end) != row.sha256]
    return (
        f" (in {', '.join(odd[:3])}{f' and {len(odd) - 3} more' if len(odd) > 3 else ''})"
        if odd
        else ""
    )


def _list_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Files below a folder with their names; what is hidden is the business of tools."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") and part != ".gitattributes" for part in name.parts)
        if path.is_file() and not hidden:
            yield name.as_posix(), path


def find_missing_shards(folder: Path) -> list[str]:
    """Files that an index of the folder names and that are not there."""
    named: set[str] = set()
    for path in folder.glob("*.safetensors.index.json"):
        named |= set(json.loads(path.read_text())["weight_map"].values())
    return sorted(name for name in named if not (folder / name).is_file())
