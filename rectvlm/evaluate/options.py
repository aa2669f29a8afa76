"""What an evaluation is asked to do, and the fingerprint by which results of another one are told apart."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rectvlm import pretrained
from rectvlm.checkpoint.integrity import UNLISTED_FILES
from rectvlm.config import Config
from rectvlm.data.shards import SHARD_INDEX_FILE
from rectvlm.data.store import ShardStore
from rectvlm.machine import package_versions
from rectvlm.metrics.surface_distances import SURFACE_TOLERANCE_MM
from rectvlm.types import Split

LESION_THRESHOLD = 0.5
"""At or above which probability a voxel belongs to a lesion, as in prediction."""
PACKAGE_FOLDER = Path(__file__).parents[1]
FINGERPRINTED_CODE = (
    "checkpoint/checkpoint.py",
    "data",
    "evaluate/case_records.py",
    "evaluate/native_grid.py",
    "labels.py",
    "metrics/lesions.py",
    "metrics/lesion_overlap.py",
    "metrics/surface_distances.py",
    "models",
    "lesion_places.py",
    "types.py",
)
"""Code that decides what is found in a case; the rest makes figures of it, anew each time. A test reads the imports of
these files: each must lead to another of them, or to one that the test names as deciding nothing."""
SAMPLED_BLOCK_BYTES, SAMPLED_BLOCKS = 1 << 16, 64
"""Bytes of a block, and blocks of a file, by which a base model is recognized."""


@dataclass(frozen=True)
class EvaluationOptions:
    """All that decides a case's results, beside checkpoint and shards, and what is made of them."""

    split: Split = "valid"
    reports: bool = True
    """Generate reports, if the model can."""
    report_limit: int | None = None
    """Generate reports for the first cases only."""
    limit: int | None = None
    """Evaluate the first cases only."""
    batch_size: int = 1
    truth: Path | None = None
    """Folder of the lesions' outlines as they were drawn, KEY/LESION.nii.gz; else those of the shards."""
    hide_regions: bool = False
    """Treat every region map as unknown, as prediction does."""
    surface_tolerance: float = SURFACE_TOLERANCE_MM
    """Of the surface Dice, mm."""
    thresholds: Literal["fit", "stored"] = "fit"
    """Fit thresholds of the findings on the train split, or take those that lie with the checkpoint."""
    fit_limit: int = 512
    """Training cases that thresholds are fitted on, at most."""
    labeler: str = "rules"
    """What reads findings in reports: `rules`, or the folder or hub id of a classifier."""
    bootstrap: int = 1000
    """Resamples of the patients for the intervals; 0 for none."""
    seed: int = 0
    """Of the resamples."""
    plots: bool = True

    def fingerprint_fields(self) -> dict[str, Any]:
        """The options on which the results of a case depend, and those that say which cases there are."""
        left_out = {"thresholds", "labeler", "bootstrap", "seed", "plots", "truth"}
        chosen = {name: value for name, value in asdict(self).items() if name not in left_out}
        return chosen | {"lesion_threshold": LESION_THRESHOLD}


def compute_fingerprint(
    checkpoint: Path,
    config: Config,
    shards: ShardStore,
    device: str,
    options: EvaluationOptions,
    has_reports: bool = False,
) -> dict[str, Any]:
    """What results must have in common to be put together: the same weights, samples, options, code and versions.

    Contents, not names and times: a checkpoint that was moved is the same one, another one in its place is not. The
    index of the shards holds the checksum of the manifest, which holds those of the tars.

    Args:
        checkpoint: its folder.
        config: of the checkpoint.
        shards: that are evaluated.
        device: where the model runs.
        options: of the evaluation.
        writes: whether reports are written, so that the frozen language model decides results too.

    Raises:
        OSError: the index of the shards cannot be read.
        UserError: the language model is not there.
    """
    trained = sorted([*checkpoint.glob("*.safetensors"), *checkpoint.glob("adapter/*.safetensors")])
    code = [
        file for part in FINGERPRINTED_CODE for file in _list_source_files(PACKAGE_FOLDER / part)
    ]
    return {
        "weights": _hash_files(trained, checkpoint),
        "language_model": identify_language_model(config.generator.model) if has_reports else None,
        "config": hashlib.sha256(config.to_yaml().encode()).hexdigest(),
        "shards": hashlib.sha256(shards.read_file(SHARD_INDEX_FILE)).hexdigest(),
        "truth": None if options.truth is None else _hash_file_stats(options.truth),
        "code": _hash_files(code, PACKAGE_FOLDER),
        "device": device.partition(":")[0],
        "versions": package_versions("numpy", "scipy", "monai"),
        "options": options.fingerprint_fields(),
    }


def identify_language_model(reference: str) -> dict[str, str | None]:
    """What identifies a frozen language model, which no checkpoint holds.

    Of a folder its contents: the files are told apart by their sizes and by blocks spread over them, since a hash of
    all of a 70B model takes minutes on each process. Times are left out, since each machine may have a copy of its own.
    A hub id stands for itself: which commit it leads to may be known to one process and not yet to another.

    Args:
        reference: a folder, a hub id, or `bundled:NAME`.

    Raises:
        UserError: an unknown bundled name, or a path that does not exist.
    """
    place = pretrained.resolve_model(reference)
    if not Path(place).is_dir():
        return {"reference": reference, "contents": None}
    total = hashlib.sha256()
    for path in sorted(Path(place).iterdir()):
        if path.is_file() and not path.name.startswith(".") and path.name not in UNLISTED_FILES:
            total.update(
                f"{path.name} {path.stat().st_size} {_hash_sampled_blocks(path)}\n".encode()
            )
    return {"reference": reference, "contents": total.hexdigest()}


def _hash_sampled_blocks(path: Path) -> str:
    """Checksum of a file of up to 4 MiB, and of evenly spread blocks, the first and the last among them, of a larger
    one."""
    total, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        if size <= SAMPLED_BLOCK_BYTES * SAMPLED_BLOCKS:
            return hashlib.file_digest(file, "sha256").hexdigest()
        for number in range(SAMPLED_BLOCKS):
            file.seek(number * (size - SAMPLED_BLOCK_BYTES) // (SAMPLED_BLOCKS - 1))
            total.update(file.read(SAMPLED_BLOCK_BYTES))
    return total.hexdigest()


def hash_fingerprint(fingerprint: dict[str, Any]) -> str:
    """A fingerprint as the name of a folder."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]


def _list_source_files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def _hash_files(files: Iterable[Path], root: Path) -> str:
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            total.update(
                f"{path.relative_to(root)} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode()
            )
    return total.hexdigest()


def _hash_file_stats(folder: Path) -> str:
    """Names, sizes and times of the outlines; they may be many GB."""
    stats = ((path, path.stat()) for path in sorted(folder.rglob("*.nii*")))
    text = "".join(
        f"{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}\n" for path, stat in stats
    )
    return hashlib.sha256(text.encode()).hexdigest()
