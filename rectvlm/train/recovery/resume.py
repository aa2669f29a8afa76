"""Where a run starts: from the previous phase, its own newest intact checkpoint, or anew.

`rectvlm.train.run.train_phase` loads what these functions find: weights, optimizer shards, and the
loader's place in the data.
"""

from __future__ import annotations

import logging
import shutil
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rectvlm.checkpoint import Checkpoint, integrity, run_folder
from rectvlm.checkpoint.hub import find_model_folder
from rectvlm.checkpoint.model_card import HUB_ID_PATTERN
from rectvlm.config import Config
from rectvlm.runs.run_files import (
    CHECKPOINTS_FOLDER,
    ENDING_FILE,
    METRICS_FILE,
    RANKS_FOLDER,
    SESSIONS_FILE,
)
from rectvlm.train.budget import PhaseBudget
from rectvlm.train.early_stopping import has_stopped_early
from rectvlm.train.phases import Phase
from rectvlm.train.recovery.position import TrainingPosition
from rectvlm.train.recovery.run_session import on_main_rank
from rectvlm.types import UserError

if TYPE_CHECKING:
    from rectvlm.train.engine.engine import Engine

log = logging.getLogger(__name__)

RUN_FOLDER_MARKS = (METRICS_FILE, SESSIONS_FILE, ENDING_FILE, CHECKPOINTS_FOLDER, RANKS_FOLDER)
"""Files and folders by one of which a folder is a run's; a run makes one of them first."""

ResumeMode = Literal["no", "yes", "auto"]
"""Whether to resume an earlier run; `auto` starts anew where there is none."""


def find_source_checkpoint(phase: Phase, config: Config, requested: str | None) -> Path | None:
    """Find the checkpoint whose weights a phase starts from: as requested, or the previous phase's.

    Raises:
        UserError: there is none.
    """
    if requested not in (None, run_folder.BEST_CHECKPOINT):
        return _find_requested_checkpoint(requested, phase)
    if phase.previous_phase is None:
        if requested is not None:
            raise UserError(
                "Phase 1 has no phase before it: give --from the path of a checkpoint, or leave it "
                "out."
            )
        return None
    folder = Path(config.train.runs) / config.name / f"phase{phase.previous_phase}"
    if requested is not None:
        folder /= run_folder.BEST_CHECKPOINT
    remedy = (
        f"phase {phase.number} starts from phase {phase.previous_phase}'s, so run "
        f"launch/phase{phase.previous_phase}.py first, with the same --config, name and train.runs"
    )
    return run_folder.find_checkpoint(folder, remedy)


def _find_requested_checkpoint(requested: str, phase: Phase) -> Path:
    """Find the model that `--from` names: a folder here, or a hub id.

    Raises:
        UserError: there is none.
    """
    path = Path(requested).expanduser()
    is_in_folder = path.parent != Path() and path.parent.is_dir()
    if HUB_ID_PATTERN.fullmatch(requested) and not path.exists() and not is_in_folder:
        return find_model_folder(requested, parts=phase.parts)
    return run_folder.find_checkpoint(
        path,
        "give --from a run's phase folder, one checkpoint in it, an exported or pulled model, or a "
        "hub id OWNER/NAME",
    )


def has_checkpoints(folder: Path) -> bool:
    """Whether there is a checkpoint, intact or not."""
    return bool(run_folder.list_step_folders(folder))


def require_checkpoint_to_resume(folder: Path, phase: Phase) -> None:
    """Check before anything is loaded that there is a checkpoint to resume from.

    Raises:
        UserError: there is none, intact or not.
    """
    if not has_checkpoints(folder):
        raise UserError(
            f"No checkpoint in {folder}: there is nothing to resume, so run phase {phase.number} "
            "without --resume, or with --resume auto."
        )


def find_newest_intact_checkpoint(folder: Path, resume: ResumeMode, engine: Engine) -> Path | None:
    """Find the newest checkpoint whose files are intact, and set damaged ones aside.

    Each rank reads its share of the files, and all find the same. Every rank must call it.

    Raises:
        UserError: none is intact, and `resume` is not `auto`.
    """
    if resume == "no":
        return None
    if engine.is_main:
        for unfinished in folder.glob("checkpoints/.step-*.partial"):
            log.warning("%s was being written or removed when the run ended: removed", unfinished)
            shutil.rmtree(unfinished, ignore_errors=True)
    # Rank 0 decides what is there: a file system may show the ranks different folders.
    checkpoints: list[Path] = engine.all_gather_object(run_folder.list_step_folders(folder))[0]
    for path in reversed(checkpoints):
        faults: set[str] = set()
        for faults_of_rank in engine.all_gather_object(_find_faults(path, engine)):
            faults.update(faults_of_rank)
        if not faults:
            return path
        if engine.is_main:
            new_path = integrity.set_damaged_aside(path)
            message = "; ".join(sorted(faults))
            log.warning("%s is damaged: %s; it is now %s", path, message, new_path.name)
        engine.barrier()
    if checkpoints and resume == "yes":
        raise UserError(
            f"None of the {len(checkpoints)} checkpoints in {folder} is intact; all are set aside: "
            "begin anew with --restart, or without --resume."
        )
    return None


def read_position(resumed_from: Path | None) -> TrainingPosition:
    """Position that a checkpoint was saved at; the beginning without one."""
    if resumed_from is None:
        return TrainingPosition(step=0, samples_seen=0)
    state = Checkpoint.open(resumed_from).training
    return TrainingPosition(state.step, state.samples_seen, state.skipped_in_a_row)


def prepare_run_folder(
    folder: Path,
    phase: Phase,
    config: Config,
    budget: PhaseBudget,
    restart: bool,
    engine: Engine,
) -> None:
    """Empty the run folder; an earlier run is deleted only with `restart`.

    A run that is finished, damaged, or ended between its first step and its first checkpoint is
    moved aside; one that was cut off later can be resumed. Every rank must call it.

    Args:
        folder: the phase's run folder.
        phase: the phase that trains.
        config: the configuration.
        budget: the phase's samples and steps.
        restart: whether to delete an earlier run.
        engine: the engine, for the ranks to agree.

    Raises:
        UserError: an unfinished run is there, and `restart` is not given; or the folder cannot be
            emptied, or holds something that is no run.
    """

    def prepare() -> None:
        _require_run_folder(folder)
        if not restart:
            unfinished = _describe_unfinished_run(folder, phase, config, budget)
            if unfinished is not None:
                raise UserError(
                    f"{folder} already holds an unfinished run ({unfinished}): go on with "
                    "--resume, begin anew with --restart, or write elsewhere with name=NEW."
                )
        place = folder.resolve()  # a link to another disk stays
        try:
            if not restart and _has_records(folder):
                _move_run_aside(place, folder.name)
            if place.exists():
                shutil.rmtree(place)
            place.mkdir(parents=True)
        except OSError as error:
            raise UserError(
                f"{folder} cannot be emptied ({error.strerror}: {error.filename}): make it "
                "writable, or write elsewhere with name=NEW."
            ) from None

    on_main_rank(engine, prepare)


def _require_run_folder(folder: Path) -> None:
    """Refuse to empty a folder that is no run's.

    Raises:
        UserError: there is a file, or a folder that holds files and no run.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not any((folder / name).exists() for name in RUN_FOLDER_MARKS):
        raise UserError(
            f"{folder} is no run's folder: expected {' or '.join(RUN_FOLDER_MARKS)} in it, so it "
            "is not emptied; move it away, or write elsewhere with name=NEW."
        )


def _describe_unfinished_run(
    folder: Path, phase: Phase, config: Config, budget: PhaseBudget
) -> str | None:
    """How far a run came that can go on; None where none can, or it is finished."""
    checkpoints = run_folder.list_checkpoints(folder)
    if not checkpoints:
        return None
    # Progress is measured in samples: the run may have had another number of ranks.
    done = Checkpoint.open(checkpoints[-1]).training
    validation = phase.get_settings(config).validation
    if budget.is_finished(done.samples_seen) or has_stopped_early(folder, validation):
        return None
    last_step = done.step + budget.count_steps_left(done.samples_seen)
    return f"up to {checkpoints[-1].name} of {last_step} steps"


def _has_records(folder: Path) -> bool:
    """Whether a run left anything to keep: a checkpoint, intact or not, or the record of a step."""
    metrics = folder / METRICS_FILE
    has_steps = metrics.is_file() and metrics.stat().st_size > 0
    return has_steps or any(folder.glob(f"{CHECKPOINTS_FOLDER}/*step-*"))


def _move_run_aside(place: Path, phase_key: str) -> None:
    for number in count(1):
        new_folder = place.with_name(f"{place.name}.earlier-{number}")
        if not new_folder.exists():
            break
    place.rename(new_folder)
    phase_name = phase_key.removeprefix("phase")
    log.info("the earlier run of phase %s is now in %s", phase_name, new_folder)


def _find_faults(path: Path, engine: Engine) -> list[str]:
    """Faults of this rank's share of a checkpoint's files, in words."""
    try:
        names = integrity.list_manifest_files(path)
        return integrity.find_faults(path, names[engine.rank :: engine.world_size])
    except UserError as error:
        return [str(error)]
