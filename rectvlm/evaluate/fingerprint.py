"""Fingerprint of an evaluation: case records with the same one may be put together."""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from rectvlm import pretrained
from rectvlm.checkpoint.integrity import UNLISTED_FILES
from rectvlm.code_fingerprint import find_imported_modules, hash_modules
from rectvlm.config import Config
from rectvlm.data.shards import SHARD_INDEX_FILE
from rectvlm.data.store import ShardStore
from rectvlm.evaluate.options import LESION_THRESHOLD, EvaluationOptions
from rectvlm.file_search import list_files
from rectvlm.files import file_sha256, json_sha256
from rectvlm.finding_thresholds import THRESHOLDS_FILE
from rectvlm.machine import package_versions
from rectvlm.types import JsonObject

FINGERPRINTED_MODULES = (
    "rectvlm.checkpoint.checkpoint",
    "rectvlm.data.loader",
    "rectvlm.evaluate.case_evaluation",
)
"""Modules whose code, with all that they import, decides a case record."""
OPTIONS_OF_FIGURES = (
    "labels",
    "thresholds",
    "labeler",
    "convention",
    "radeval",
    "bootstrap",
    "seed",
    "plots",
)
"""Options that case records do not depend on: figures are computed from the records each time."""
SAMPLED_BLOCK_BYTES = 1 << 16
"""Size of a block that is hashed of a large file, bytes."""
SAMPLED_BLOCKS = 64
"""Number of blocks that are hashed of a large file."""


def compute_fingerprint(
    checkpoint: Path,
    config: Config,
    shards: ShardStore,
    device: str,
    options: EvaluationOptions,
    has_reports: bool = False,
) -> JsonObject:
    """Describe weights, samples, options, code and versions by their contents.

    Names and times do not count: a checkpoint that was moved is the same one, and another one in
    its place is not. The index of the shards holds the checksum of the manifest, which holds the
    checksums of the tars.

    Args:
        checkpoint: folder of the checkpoint.
        config: configuration of the checkpoint.
        shards: shards that are evaluated.
        device: device of the model.
        options: options of the evaluation.
        has_reports: whether reports are generated, so that the frozen language model counts too.

    Raises:
        OSError: The index of the shards cannot be read.
        UserError: The language model is not there.
    """
    weights = sorted([*checkpoint.glob("*.safetensors"), *checkpoint.glob("adapter/*.safetensors")])
    weights += checkpoint.glob(THRESHOLDS_FILE)  # the prompts of reports depend on them
    language_model = None
    if has_reports:
        language_model = identify_language_model(config.generator.model, checkpoint)
    return {
        "weights": _hash_files(weights, checkpoint),
        "language_model": language_model,
        "config": hashlib.sha256(config.to_yaml().encode()).hexdigest(),
        "shards": hashlib.sha256(shards.read_file(SHARD_INDEX_FILE)).hexdigest(),
        "truth": None if options.truth is None else _hash_file_stats(options.truth),
        "code": hash_modules(find_imported_modules(FINGERPRINTED_MODULES)),
        "device": device.partition(":")[0],
        "versions": package_versions("numpy", "scipy", "monai"),
        "options": _select_options(options),
    }


def hash_fingerprint(fingerprint: JsonObject) -> str:
    """Short hash of a fingerprint, the name of its folder."""
    return json_sha256(fingerprint)[:16]


def identify_language_model(reference: str, near: Path | None = None) -> dict[str, str | None]:
    """Describe a frozen language model, which no checkpoint holds.

    A folder is described by its contents. Files are told apart by their sizes and by blocks spread
    over them, since a hash of all of a 70B model takes minutes in each process. Times are left out,
    since each machine may have a copy of its own. A hub id stands for itself: one process may know
    the commit that it leads to and another may not.

    Args:
        reference: a folder, a hub id, or `bundled:NAME`.
        near: folder of the checkpoint that names it.

    Raises:
        UserError: The bundled name is unknown, or the path does not exist.
    """
    folder = Path(pretrained.resolve_model(reference, near))
    if not folder.is_dir():
        return {"reference": reference, "contents": None}

    contents = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        is_hidden = path.name.startswith(".")
        if path.is_file() and not is_hidden and path.name not in UNLISTED_FILES:
            line = f"{path.name} {path.stat().st_size} {_hash_sampled_blocks(path)}\n"
            contents.update(line.encode())
    return {"reference": reference, "contents": contents.hexdigest()}


def _select_options(options: EvaluationOptions) -> JsonObject:
    """The options on which case records depend, and those that say which cases there are.

    The folder `truth` is left out as well: its contents are in the fingerprint. Of the server of
    reports only whether there is one counts: it may have another address after a restart.
    """
    fields = asdict(options)
    fields["report_server"] = options.report_server is not None
    for name in (*OPTIONS_OF_FIGURES, "truth"):
        del fields[name]
    return fields | {"lesion_threshold": LESION_THRESHOLD}


def _hash_sampled_blocks(path: Path) -> str:
    """SHA-256 of a file of up to 4 MiB, else of evenly spread blocks, first and last included."""
    size_bytes = path.stat().st_size
    if size_bytes <= SAMPLED_BLOCK_BYTES * SAMPLED_BLOCKS:
        return file_sha256(path)

    blocks = hashlib.sha256()
    with path.open("rb") as file:
        for number in range(SAMPLED_BLOCKS):
            file.seek(number * (size_bytes - SAMPLED_BLOCK_BYTES) // (SAMPLED_BLOCKS - 1))
            blocks.update(file.read(SAMPLED_BLOCK_BYTES))
    return blocks.hexdigest()


def _hash_files(files: Iterable[Path], root: Path) -> str:
    """SHA-256 over names below `root` and checksums of files."""
    listing = hashlib.sha256()
    for path in files:
        listing.update(f"{path.relative_to(root)} {file_sha256(path)}\n".encode())
    return listing.hexdigest()


def _hash_file_stats(folder: Path) -> str:
    """SHA-256 over names, sizes and times of the outlines in a folder; they may be many GB."""
    listing = hashlib.sha256()
    for path in sorted(list_files(folder).files):
        if ".nii" not in path.name:
            continue
        stat = path.stat()
        name = path.relative_to(folder)
        listing.update(f"{name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return listing.hexdigest()
