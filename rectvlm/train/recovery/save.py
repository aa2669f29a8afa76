"""Saving a checkpoint, complete or not at all, also when the disk is full."""

import logging
import shutil
import time
from pathlib import Path

from safetensors import SafetensorError

from rectvlm.checkpoint import Checkpoint, TrainingState, integrity, run_folder
from rectvlm.checkpoint.checkpoint import ENGINE_FOLDER
from rectvlm.checkpoint.integrity import ManifestEntry
from rectvlm.checkpoint.model_card import write_model_card
from rectvlm.config import Config, phase_key
from rectvlm.finding_thresholds import FindingThresholds
from rectvlm.machine import package_versions
from rectvlm.train.engine.engine import Engine
from rectvlm.train.phases import Phase
from rectvlm.train.recovery.position import TrainingPosition

log = logging.getLogger(__name__)


def save_checkpoint(
    engine: Engine,
    phase: Phase,
    config: Config,
    folder: Path,
    saved_names: list[str],
    position: TrainingPosition,
) -> bool:
    """Write a complete checkpoint or none.

    It is written under a temporary name, with checksums, and flushed to disk before it is renamed.
    Its weights are the moving averages where the phase keeps some.

    Returns:
        Whether it could be written; all ranks agree. If not, earlier checkpoints are untouched and
        a warning says why.
    """
    begin = time.monotonic()
    target = run_folder.step_folder(folder, position.step)
    work = integrity.partial_folder(target)
    if engine.is_main:
        shutil.rmtree(work, ignore_errors=True)
    engine.barrier()
    written, fault = _write_rank_files(engine, phase, config, work, saved_names, position)
    reports = engine.all_gather_object((written, fault))
    faults = [
        f"rank {rank}: {fault}" for rank, (_, fault) in enumerate(reports) if fault is not None
    ]
    if engine.is_main and not faults:
        try:
            integrity.finalize_checkpoint(
                work,
                {name: entry for entries, _ in reports for name, entry in entries.items()},
                target,
            )
        except OSError as error:
            faults = [str(error)]
    faults = engine.all_gather_object(faults)[0]
    if faults:
        if engine.is_main:
            shutil.rmtree(work, ignore_errors=True)
            log.warning(
                "The checkpoint of step %d could not be written to %s (%s): the checkpoints before "
                "it are untouched, and saving is tried again after %.3g of the phase; make room on "
                "the disk.",
                position.step,
                target.parent,
                "; ".join(faults),
                phase.get_settings(config).save_every,
            )
        return False
    if engine.is_main:
        run_folder.prune_checkpoints(folder, config.train.keep_checkpoints)
        log.info("saved %s in %.1f s", target, time.monotonic() - begin)
    engine.barrier()
    return True


def save_thresholds(folder: Path, step: int, thresholds: FindingThresholds) -> None:
    """Write the thresholds that a validation has fitted into the checkpoint of its step.

    Raises:
        OSError: they could not be written.
    """
    _write_thresholds(Checkpoint.open(run_folder.step_folder(folder, step)), thresholds)


def _write_thresholds(checkpoint: Checkpoint, thresholds: FindingThresholds) -> None:
    """Write thresholds and the model card, which lists them."""
    checkpoint.write_thresholds(thresholds)
    training = checkpoint.training
    key = phase_key(training.phase, training.stage)
    write_model_card(checkpoint, f"{checkpoint.config.name}, phase {key}, step {training.step}")


def _write_rank_files(
    engine: Engine,
    phase: Phase,
    config: Config,
    work: Path,
    saved_names: list[str],
    position: TrainingPosition,
) -> tuple[dict[str, ManifestEntry], str | None]:
    """Write this rank's files; their manifest entries, and the error if they could not be written.

    A rank that cannot write still takes part in the gathering, for which the others wait.
    """
    with engine.use_ema_weights():
        tensors = engine.gather_tensors(saved_names)
    try:
        (work / ENGINE_FOLDER).mkdir(parents=True, exist_ok=True)
        files = [engine.save_optimizer_shard(work / ENGINE_FOLDER)]
        if engine.is_main:
            training = TrainingState(
                phase=phase.number,
                step=position.step,
                samples_seen=position.samples_seen,
                world_size=engine.world_size,
                stage=phase.stage,
                skipped_in_a_row=position.skipped_in_a_row,
            )
            checkpoint = Checkpoint(work, phase.parts, config, training, package_versions())
            files += checkpoint.write_files(tensors, engine.model.module.lora_config())
            _write_thresholds(checkpoint, engine.model.module.thresholds)
        entries = {}
        for path in files:
            entries[path.relative_to(work).as_posix()] = integrity.flush_and_hash(path)
        return entries, None
    except (OSError, SafetensorError) as error:
        return {}, str(error)
