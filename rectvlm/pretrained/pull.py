"""From a hub, a mirror or a folder to this machine: whole models, parts of ours, and models of others."""

import fnmatch
import hashlib
import json
import logging
import struct
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.file_download import repo_folder_name

from rectvlm.checkpoint import manifest
from rectvlm.checkpoint.manifest import CheckpointManifest, ManifestEntry, TensorEntry
from rectvlm.pretrained import transfer
from rectvlm.pretrained.catalog import (
    ADAPTER,
    BUNDLED_MODELS,
    EXTERNAL_MODELS,
    MODEL_FILE_PATTERNS,
    PUBLISHED_SIZES,
    SIZE_REPOSITORIES,
    WEIGHTS_FILE,
    part_of,
)
from rectvlm.pretrained.model_references import BUNDLED_SCHEME, models_folder, resolve_model
from rectvlm.pretrained.sources import Hub, RemoteFile, Source, explain_hub_errors, open_source
from rectvlm.pretrained.transfer import Job, Piece
from rectvlm.types import UserError

log = logging.getLogger(__name__)

ITEM_SIZES = {"64": 8, "32": 4, "16": 2, "8": 1}


def pull(
    name: str,
    parts: Sequence[str] = (),
    where: str | None = None,
    repository: str | None = None,
    revision: str = "main",
    out: Path | None = None,
) -> Path:
    """Bring one model here, or complete and repair it.

    Args:
        name: a size, a bundled model, a model of others by its short name or hub id.
        parts: of a size: these alone; by default all.
        where: the address of a mirror, or a folder, instead of the hub.
        repository: `OWNER/NAME` instead of the one that the name stands for.
        revision: branch, tag or commit.
        out: folder for the files. By default a size goes to `data/models`, a model of others to the hub's cache,
            where Transformers finds it.

    Returns:
        The folder with the model.

    Raises:
        UserError: with what is wrong and what to do.
    """
    if name.removeprefix(BUNDLED_SCHEME) in BUNDLED_MODELS:
        return Path(resolve_model(BUNDLED_SCHEME + name.removeprefix(BUNDLED_SCHEME)))
    if name in SIZE_REPOSITORIES:
        if (
            name not in PUBLISHED_SIZES
            and repository is None
            and where is None
            and not _own_endpoint()
        ):
            raise UserError(
                f"No weights of size {name} are published yet: name a repository that has some with --repo OWNER/NAME, "
                "or a folder or mirror with --from."
            )
        source = open_source(where, repository or SIZE_REPOSITORIES[name], revision)
        return pull_model(source, out or models_folder() / f"rectvlm-{name}", parts)
    if name not in EXTERNAL_MODELS and name.count("/") != 1:
        known = ", ".join([*SIZE_REPOSITORIES, *EXTERNAL_MODELS, *BUNDLED_MODELS])
        raise UserError(
            f"No weights called {name!r}: choose one of {known}, or give a hub id OWNER/NAME."
        )
    if parts:
        raise UserError(f"{name} has no parts: --part is for {', '.join(SIZE_REPOSITORIES)}.")
    repository = repository or (
        EXTERNAL_MODELS[name].repository if name in EXTERNAL_MODELS else name
    )
    source = open_source(where, repository, revision)
    if out is None and isinstance(source, Hub):
        return _pull_to_cache(source)
    return _pull_external(source, out or models_folder() / repository.replace("/", "--"))


def _own_endpoint() -> bool:
    return constants.ENDPOINT != "https://huggingface.co"


def pull_model(source: Source, folder: Path, parts: Sequence[str] = ()) -> Path:
    """Bring a model of ours into a folder: all of it, or some parts.

    A part's folder has the layout of the whole, with fewer tensors in `model.safetensors`, whatever files they lay in
    at the source.

    Raises:
        UserError: no such part there, or a file that is not what the source and its manifest say.
    """
    files = source.files()
    if "config.json" not in files:
        raise UserError(f"{source.name} holds no config.json, so it is no model of rectvlm.")
    if manifest.MANIFEST_FILE not in files:
        return _pull_without_manifest(source, files, folder, parts)
    data = transfer.small(
        whole_file(
            manifest.MANIFEST_FILE, files[manifest.MANIFEST_FILE], folder / manifest.MANIFEST_FILE
        ),
        source,
    )
    whole = manifest.parse_manifest(data, f"{manifest.MANIFEST_FILE} of {source.name}")
    absent = sorted(whole.files.keys() - files.keys())
    if absent:
        raise UserError(
            f"{source.name} lacks {', '.join(absent)}, which its {manifest.MANIFEST_FILE} lists: push it again."
        )
    wrong = sorted(set(parts) - set(whole.parts))
    if wrong:
        raise UserError(
            f"{source.name} holds no {', '.join(wrong)}: it has {', '.join(whole.parts)}."
        )
    chosen = set(parts or whole.parts)
    cut = chosen != set(whole.parts)
    listed = {
        name: entry
        for name, entry in whole.files.items()
        if not cut or _stays_whole(name, entry, chosen)
    }
    placed: dict[str, TensorEntry] = {}
    jobs = [whole_file(name, files[name], folder / name, entry) for name, entry in listed.items()]
    jobs += [
        whole_file(name, files[name], folder / name) for name in ("README.md",) if name in files
    ]
    if cut:
        job, placed = _cut(whole, files, folder / WEIGHTS_FILE, chosen)
        jobs.append(job)
    transfer.run(jobs, source, folder)
    if cut:
        path = folder / WEIGHTS_FILE
        listed[WEIGHTS_FILE] = ManifestEntry(
            path.stat().st_size, manifest.compute_sha256(path), placed
        )
    _replace_manifest(folder, CheckpointManifest(listed))
    return folder


def _replace_manifest(folder: Path, made: CheckpointManifest) -> None:
    """Write the manifest, and remove what an earlier pull brought and this one does not."""
    if (folder / manifest.MANIFEST_FILE).is_file():
        for name in manifest.read_manifest(folder).files.keys() - made.files.keys():
            log.info("%s is removed: it belongs to what was pulled here before", folder / name)
            (folder / name).unlink(missing_ok=True)
    manifest.write_manifest(folder, made)


def _pull_without_manifest(
    source: Source, files: dict[str, RemoteFile], folder: Path, parts: Sequence[str]
) -> Path:
    if parts:
        raise UserError(
            f"{source.name} has no {manifest.MANIFEST_FILE}, so parts cannot be told apart and checked: pull it whole, or push "
            "it again with `rectvlm weights push`."
        )
    kept = [
        name
        for name in files
        if name.endswith((".safetensors", ".json", ".md", ".txt")) and name[0] != "."
    ]
    transfer.run([whole_file(name, files[name], folder / name) for name in kept], source, folder)
    _replace_manifest(folder, manifest.build_manifest(folder, tensors=True, names=kept))
    return folder


def whole_file(
    name: str, file: RemoteFile, target: Path, entry: ManifestEntry | None = None
) -> Job:
    """A whole file, which must be what the source says and, where given, what the manifest says."""

    def fault(path: Path) -> str | None:
        found = manifest.compute_sha256(path) if file.sha256 or entry else ""
        if file.sha256 and found != file.sha256:
            return f"its SHA-256 is {found}, the source says {file.sha256}"
        if file.git_sha1 and manifest.compute_git_sha1(path) != file.git_sha1:
            return f"its git digest is {manifest.compute_git_sha1(path)}, the source says {file.git_sha1}"
        if entry and found != entry.sha256:
            return f"its SHA-256 is {found}, {manifest.MANIFEST_FILE} says {entry.sha256}"
        return None

    return Job(
        target, (Piece(name, 0, file.size, file.size),) if file.size else (), fault, file.key
    )


def _stays_whole(name: str, entry: ManifestEntry, chosen: Collection[str]) -> bool:
    """Whether a file belongs to some parts as it is; the weights are cut, and then need no index."""
    if name.startswith(f"{ADAPTER}/"):
        return part_of(name) in chosen
    return entry.tensors is None and not name.endswith(".safetensors.index.json")


def _cut(
    whole: CheckpointManifest, files: dict[str, RemoteFile], target: Path, chosen: Collection[str]
) -> tuple[Job, dict[str, TensorEntry]]:
    """The job that makes one weights file of some parts, and what lies where in it."""
    rows = [
        (file, name, row)
        for file, entry in whole.files.items()
        for name, row in (entry.tensors or {}).items()
        if part_of(name) in chosen or part_of(name) is None
    ]
    # As safetensors orders them: large types first, so that every tensor is aligned.
    rows.sort(key=lambda row: (-_item_size(row[2].dtype), row[1]))
    head, placed = _head([(name, row) for _, name, row in rows])
    pieces: list[Piece] = []
    for file, _, row in rows:
        if pieces and pieces[-1].path == file and pieces[-1].end == row.begin:
            pieces[-1] = replace(pieces[-1], end=row.end)
        elif row.end > row.begin:
            pieces.append(Piece(file, row.begin, row.end, files[file].size))

    def fault(path: Path) -> str | None:
        with path.open("rb") as stream:
            if stream.read(len(head)) != head:
                return "its head is of another version"
        wrong = [
            name
            for name, row in placed.items()
            if manifest.digest_of(path, row.begin, row.end) != row.sha256
        ]
        return (
            f"{len(wrong)} tensors differ from {manifest.MANIFEST_FILE}, the first is {wrong[0]}"
            if wrong
            else None
        )

    key = hashlib.sha256(head + "".join(row.sha256 for row in placed.values()).encode()).hexdigest()
    return Job(target, tuple(pieces), fault, key, head), placed


def _head(rows: Sequence[tuple[str, TensorEntry]]) -> tuple[bytes, dict[str, TensorEntry]]:
    """Header of a safetensors file with these tensors one behind the other, and their places in it."""
    tree: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, row in rows:
        length = row.end - row.begin
        tree[name] = {
            "dtype": row.dtype,
            "shape": row.shape,
            "data_offsets": [position, position + length],
        }
        position += length
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    placed, position = {}, len(head)
    for name, row in rows:
        length = row.end - row.begin
        placed[name] = replace(row, begin=position, end=position + length)
        position += length
    return head, placed


def _item_size(dtype: str) -> int:
    return next((size for suffix, size in ITEM_SIZES.items() if dtype.endswith(suffix)), 1)


def _pull_external(source: Source, folder: Path) -> Path:
    files = _needed(source)
    transfer.run(
        [whole_file(name, file, folder / name) for name, file in files.items()], source, folder
    )
    _replace_manifest(folder, manifest.build_manifest(folder, tensors=False, names=files))
    return folder


def _pull_to_cache(hub: Hub) -> Path:
    """Into the hub's own cache: contents under their digest, which huggingface_hub then links to their names."""
    files = _needed(hub)
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(
        repo_id=hub.repository, repo_type="model"
    )
    contents = {
        file.key: whole_file(name, file, folder / "blobs" / file.key)
        for name, file in files.items()
    }
    transfer.run(list(contents.values()), hub, folder)
    for name in sorted(files):
        with explain_hub_errors(hub, name):
            linked = hf_hub_download(
                hub.repository, name, revision=hub.revision, endpoint=hub.endpoint
            )
    return Path(linked).parent


def _needed(source: Source) -> dict[str, RemoteFile]:
    """The files of a model of others that are needed.

    Raises:
        UserError: no configuration, or no weights but pickled ones.
    """
    files = source.files()
    needed = {
        name: file
        for name, file in files.items()
        if "/" not in name
        and any(fnmatch.fnmatchcase(name, pattern) for pattern in MODEL_FILE_PATTERNS)
    }
    if "config.json" not in needed:
        raise UserError(
            f"{source.name} holds no config.json, so it is no model that Transformers loads."
        )
    if not any(name.endswith(".safetensors") for name in needed):
        others = ", ".join(
            sorted(
                name for name in files if name.endswith((".bin", ".pt", ".pth", ".h5", ".msgpack"))
            )
        )
        raise UserError(
            f"{source.name} has its weights in {others or 'no file'} and not in safetensors, which alone are read: "
            "give --revision of one that has them (the hub's conversions are refs/pr/NUMBER), or another repository "
            "with --repo."
        )
    return needed
