"""The checkpoints of a run: where they lie, which is the newest and the best, which are deleted.

    RUN/phaseN/checkpoints/step-000060/     one checkpoint (`rectvlm.checkpoint.checkpoint`)
    RUN/phaseN/best.json                    which one validated best

A path to a phase folder means its newest checkpoint, `RUN/phaseN/best` its best.
"""

import json
import logging
from pathlib import Path

from rectvlm.checkpoint.integrity import remove_checkpoint
from rectvlm.files import atomic_file
from rectvlm.types import UserError

log = logging.getLogger(__name__)

MODEL_CONFIG_FILE = "config.json"
"""File by which a folder is a checkpoint: a folder gets its name when all its files are written."""
BEST_CHECKPOINT = "best"


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint, intact or damaged."""
    return (folder / MODEL_CONFIG_FILE).is_file()


def step_folder(phase_folder: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return phase_folder / "checkpoints" / f"step-{step:06d}"


def list_step_folders(phase_folder: Path) -> list[Path]:
    """Step folders of a phase, intact or damaged, oldest first; copies have other names."""
    steps: dict[int, Path] = {}
    for path in phase_folder.glob("checkpoints/step-*"):
        number = path.name.removeprefix("step-")
        if number.isdigit():
            steps[int(number)] = path
    return [steps[step] for step in sorted(steps)]


def list_checkpoints(phase_folder: Path) -> list[Path]:
    """Checkpoints of a phase, oldest first."""
    return [folder for folder in list_step_folders(phase_folder) if is_checkpoint(folder)]


def prune_checkpoints(phase_folder: Path, keep: int) -> None:
    """Delete all checkpoints of a phase but the `keep` newest and the best.

    One that cannot be deleted stays, with a warning: that is no reason to end a run.
    """
    best = best_checkpoint(phase_folder)
    for folder in list_checkpoints(phase_folder)[:-keep]:
        if folder != best:
            try:
                remove_checkpoint(folder)
            except OSError as error:
                log.warning("%s could not be removed (%s)", folder, error)


def best_checkpoint(phase_folder: Path) -> Path | None:
    """The checkpoint that validated best; None where none is recorded, or it is gone."""
    try:
        step = int(json.loads((phase_folder / f"{BEST_CHECKPOINT}.json").read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    folder = step_folder(phase_folder, step)
    return folder if is_checkpoint(folder) else None


def record_best_checkpoint(
    phase_folder: Path, step: int | None, metric: str, value: float | None
) -> None:
    """Record which checkpoint is the best, once it is on disk; None forgets it."""
    path = phase_folder / f"{BEST_CHECKPOINT}.json"
    if step is None:
        path.unlink(missing_ok=True)
        return
    record = {"step": step, "metric": metric, "value": value}
    with atomic_file(path) as file:
        file.write((json.dumps(record) + "\n").encode())


def find_checkpoint(folder: str | Path, remedy: str) -> Path:
    """Find the checkpoint that a path means: itself, a phase's newest, or its best (`PHASE/best`).

    Args:
        folder: of a checkpoint or of a phase, or `PHASE/best`.
        remedy: what the user can do when there is none, as the end of a sentence.

    Raises:
        UserError: there is no checkpoint.
    """
    folder = Path(folder)
    if folder.name == BEST_CHECKPOINT and not folder.exists():
        best = best_checkpoint(folder.parent)
        if best is None:
            raise UserError(
                f"No best checkpoint in {folder.parent}: expected {BEST_CHECKPOINT}.json there, "
                f"which validation during training writes (validation.every); {remedy}."
            )
        return best
    if is_checkpoint(folder):
        return folder
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        raise UserError(
            f"No checkpoint in {folder}: expected {MODEL_CONFIG_FILE}, or "
            f"checkpoints/step-…/{MODEL_CONFIG_FILE} in a run's phase folder; {remedy}."
        )
    return checkpoints[-1]
