"""Where a run begins: from the phase before, from its own newest whole checkpoint, or anew."""

import logging
import shutil
from itertools import count
from pathlib import Path
from typing import Literal

from rectvlm.checkpoint import Checkpoint, integrity, run_folder
from rectvlm.config import Config
from rectvlm.train.early_stopping import has_stopped_early
from rectvlm.train.engine.engine import Engine
from rectvlm.train.phases import Phase, with_step_count
from rectvlm.train.recovery.position import TrainingPosition
from rectvlm.types import UserError

log = logging.getLogger(__name__)

ResumeMode = Literal["no", "yes", "auto"]
"""Whether to go on with an earlier run; `auto` begins anew where there is none."""


def find_source_checkpoint(phase: Phase, config: Config, requested: str | None) -> Path | None:
    """The checkpoint whose weights a phase starts from: the one given, or that of the phase before.

    Raises:
        UserError: there is none.
    """
    if requested not in (None, run_folder.BEST_CHECKPOINT):
        return run_folder.find_checkpoint(
            requested,
            "give --from a run's phase folder, one checkpoint in it, or an exported model",
        )
    if phase.previous_phase is None:
        if requested is not None:
            raise UserError(
                "Phase 1 has no phase before it: give --from the path of a checkpoint, or leave it out."
            )
        return None
    folder = Path(config.train.runs) / config.name / f"phase{phase.previous_phase}"
    if requested is not None:
        folder /= run_folder.BEST_CHECKPOINT
    remedy = (
        f"phase {phase.number} starts from phase {phase.previous_phase}'s, so run "
        f"`accelerate launch launch/phase{phase.previous_phase}.py --config {config.name}` first"
    )
    return run_folder.find_checkpoint(folder, remedy)


def has_checkpoints(folder: Path) -> bool:
    """Whether there is a checkpoint, whole or not."""
    return bool(run_folder.list_step_folders(folder))


def require_checkpoint_to_resume(folder: Path, phase: Phase) -> None:
    """Stop before anything is loaded.

    Raises:
        UserError: there is no checkpoint, whole or not.
    """
    if not has_checkpoints(folder):
        raise UserError(
            f"No checkpoint in {folder}: there is nothing to resume, so run phase {phase.number} without --resume, or "
            "with --resume auto."
        )


def find_newest_intact_checkpoint(folder: Path, resume: ResumeMode, engine: Engine) -> Path | None:
    """The newest checkpoint that is what was written; damaged ones are set aside. Every rank must call it.

    Each rank reads its share of the files, and all come to the same end.

    Raises:
        UserError: none is whole, and `resume` is not `auto`.
    """
    if resume == "no":
        return None
    if engine.is_main:
        for unfinished in folder.glob("checkpoints/.step-*.partial"):
            log.warning("%s was being written or removed when the run ended: removed", unfinished)
            shutil.rmtree(unfinished, ignore_errors=True)
    found: list[Path] = engine.all_gather_object(run_folder.list_step_folders(folder))[0]
    for path in reversed(found):
        faults = sorted(
            {
                fault
                for share in engine.all_gather_object(_find_faults(path, engine))
                for fault in share
            }
        )
        if not faults:
            return path
        if engine.is_main:
            log.warning(
                "%s is damaged: %s; it is now %s",
                path,
                "; ".join(faults),
                integrity.set_damaged_aside(path).name,
            )
        engine.barrier()
    if found and resume == "yes":
        raise UserError(
            f"None of the {len(found)} checkpoints in {folder} is whole, and they are set aside: begin anew with "
            "--restart, or without --resume."
        )
    return None


def read_position(resumed_from: Path | None) -> TrainingPosition:
    """How far a checkpoint had come."""
    if resumed_from is None:
        return TrainingPosition(step=0, samples_seen=0)
    state = Checkpoint.open(resumed_from).training
    return TrainingPosition(state.step, state.samples_seen, state.bad_in_a_row)


def prepare_run_folder(
    folder: Path, phase: Phase, config: Config, sample_count: int, restart: bool, engine: Engine
) -> None:
    """Never write over an earlier run unasked: one that is finished or damaged is moved aside, one that was cut off can
    go on.

    Args:
        folder: of the phase's run.
        phase: the row.
        config: as it was given, with epochs not yet counted as steps.
        samples: in the training split.
        restart: delete what is there.
        engine: for the ranks to agree.

    Raises:
        UserError: an unfinished run is there, and `restart` is not given.
    """
    earlier = run_folder.list_checkpoints(folder)
    damaged = list(folder.glob("checkpoints/damaged-*"))
    engine.barrier()  # all ranks have looked before any removes
    finished = False
    if earlier:
        # Its samples count, not its steps: it may have had another number of ranks.
        done = Checkpoint.open(earlier[-1]).training
        settings = phase.get_settings(
            with_step_count(
                config, phase, sample_count, engine.world_size, done.step, done.samples_seen
            )
        )
        finished = done.step >= settings.steps or has_stopped_early(folder, settings.validation)
        if not finished and not restart:
            raise UserError(
                f"{folder} already holds an unfinished run (up to {earlier[-1].name} of {settings.steps} steps): go on "
                "with --resume, begin anew with --restart, or write elsewhere with name=NEW."
            )
    engine.barrier()  # all have read what moves now
    if engine.is_main:
        if (finished or damaged) and not restart:
            aside = next(
                path
                for n in count(1)
                if not (path := folder.with_name(f"{folder.name}.earlier-{n}")).exists()
            )
            folder.rename(aside)
            log.info(
                "the earlier run of phase %s is now in %s", folder.name.removeprefix("phase"), aside
            )
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    engine.barrier()


def _find_faults(path: Path, engine: Engine) -> list[str]:
    """What is wrong with this rank's share of a checkpoint's files."""
    try:
        return integrity.find_faults(
            path, integrity.list_manifest_files(path)[engine.rank :: engine.world_size]
        )
    except UserError as error:
        return [str(error)]
