"""What an evaluation is asked to do, and the fingerprint by which results of another one are told apart."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rectvlm import checkpoint as checkpoints
from rectvlm import weights
from rectvlm.config import Config
from rectvlm.data.shards import INDEX
from rectvlm.data.store import Store
from rectvlm.metrics.surfaces import TOLERANCE_MM
from rectvlm.types import Split
from rectvlm.weights.manifest import FREE

LESION_THRESHOLD = 0.5
"""At or above which probability a voxel belongs to a lesion, as in prediction."""
PACKAGE = Path(__file__).parents[1]
DECIDING = (
    "checkpoint.py",
    "data",
    "evaluate/cases.py",
    "evaluate/native.py",
    "labels.py",
    "metrics/lesions.py",
    "metrics/localization.py",
    "metrics/surfaces.py",
    "models",
    "places.py",
    "pretrained.py",
    "types.py",
)
"""Code that decides what is found in a case; the rest makes figures of it, anew each time. A test reads the imports of
these files: each must lead to another of them, or to one that the test names as deciding nothing."""
BLOCK, BLOCKS = 1 << 16, 64
"""Bytes of a block, and blocks of a file, by which a base model is recognized."""


@dataclass(frozen=True)
class Options:
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
    surface_tolerance: float = TOLERANCE_MM
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

    def deciding(self) -> dict[str, Any]:
        """The options on which the results of a case depend, and those that say which cases there are."""
        left_out = {"thresholds", "labeler", "bootstrap", "seed", "plots", "truth"}
        chosen = {name: value for name, value in asdict(self).items() if name not in left_out}
        return chosen | {"lesion_threshold": LESION_THRESHOLD}


def fingerprint(
    checkpoint: Path, config: Config, shards: Store, device: str, options: Options, writes: bool = False
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
    code = [file for part in DECIDING for file in _sources(PACKAGE / part)]
    return {
        "weights": _hash_files(trained, checkpoint),
        "language_model": base_model(config.generator.model) if writes else None,
        "config": hashlib.sha256(config.to_yaml().encode()).hexdigest(),
        "shards": hashlib.sha256(shards.read(INDEX)).hexdigest(),
        "truth": None if options.truth is None else _listing(options.truth),
        "code": _hash_files(code, PACKAGE),
        "device": device.partition(":")[0],
        "versions": checkpoints.versions("numpy", "scipy", "monai"),
        "options": options.deciding(),
    }


def base_model(reference: str) -> dict[str, str | None]:
    """What identifies a frozen language model, which no checkpoint holds.

    Of a folder its contents: the files are told apart by their sizes and by blocks spread over them, since a hash of
    all of a 70B model takes minutes on each process. Times are left out, since each machine may have a copy of its own.
    A hub id stands for itself: which commit it leads to may be known to one process and not yet to another.

    Args:
        reference: a folder, a hub id, or `bundled:NAME`.

    Raises:
        UserError: an unknown bundled name, or a path that does not exist.
    """
    place = weights.resolve(reference)
    if not Path(place).is_dir():
        return {"reference": reference, "contents": None}
    total = hashlib.sha256()
    for path in sorted(Path(place).iterdir()):
        if path.is_file() and not path.name.startswith(".") and path.name not in FREE:
            total.update(f"{path.name} {path.stat().st_size} {_sampled(path)}\n".encode())
    return {"reference": reference, "contents": total.hexdigest()}


def _sampled(path: Path) -> str:
    """Checksum of a file of up to 4 MiB, and of evenly spread blocks, the first and the last among them, of a larger
    one."""
    total, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        if size <= BLOCK * BLOCKS:
            return hashlib.file_digest(file, "sha256").hexdigest()
        for number in range(BLOCKS):
            file.seek(number * (size - BLOCK) // (BLOCKS - 1))
            total.update(file.read(BLOCK))
    return total.hexdigest()


def short(found: dict[str, Any]) -> str:
    """A fingerprint as the name of a folder."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def _sources(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def _hash_files(files: Iterable[Path], root: Path) -> str:
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            total.update(f"{path.relative_to(root)} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def _listing(folder: Path) -> str:
    """Names, sizes and times of the outlines; they may be many GB."""
    stats = ((path, path.stat()) for path in sorted(folder.rglob("*.nii*")))
    text = "".join(f"{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}\n" for path, stat in stats)
    return hashlib.sha256(text.encode()).hexdigest()
