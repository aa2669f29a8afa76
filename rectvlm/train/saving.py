"""A checkpoint, whole or not there, and what happens when the disk is full."""

import logging
import shutil
import time
from pathlib import Path

from safetensors import SafetensorError

from rectvlm import checkpoint, whole
from rectvlm.config import Config
from rectvlm.train.engine import Engine
from rectvlm.train.phases import Phase
from rectvlm.train.position import Position
from rectvlm.weights.manifest import FileEntry

log = logging.getLogger(__name__)


def save(
    engine: Engine,
    phase: Phase,
    config: Config,
    folder: Path,
    saved_names: list[str],
    position: Position,
) -> bool:
    """Write a whole checkpoint or none: under a temporary name, with checksums, on the disk before it is renamed.

    Its weights are the moving averages where the phase keeps some.

    Returns:
        Whether it could be written; all ranks agree. If not, earlier checkpoints are untouched and a warning says why.
    """
    begin = time.monotonic()
    target = checkpoint.step_folder(folder, position.step)
    work = whole.unfinished(target)
    if engine.is_main:
        shutil.rmtree(work, ignore_errors=True)
    engine.barrier()
    written, fault = _write_shares(engine, phase, config, work, saved_names, position)
    reports = engine.everyone((written, fault))
    faults = [f"rank {rank}: {fault}" for rank, (_, fault) in enumerate(reports) if fault is not None]
    if engine.is_main and not faults:
        try:
            whole.seal(work, {name: entry for entries, _ in reports for name, entry in entries.items()}, target)
        except OSError as error:
            faults = [str(error)]
    faults = engine.everyone(faults)[0]
    if faults:
        if engine.is_main:
            shutil.rmtree(work, ignore_errors=True)
            log.warning(
                "The checkpoint of step %d could not be written to %s (%s): the checkpoints before it are untouched, "
                "and saving is tried again after %d steps; make room on the disk.",
                position.step,
                target.parent,
                "; ".join(faults),
                phase.settings(config).save_every,
            )
        return False
    if engine.is_main:
        checkpoint.prune(folder, config.train.keep)
        log.info("saved %s in %.1f s", target, time.monotonic() - begin)
    engine.barrier()
    return True


def _write_shares(
    engine: Engine, phase: Phase, config: Config, work: Path, saved_names: list[str], position: Position
) -> tuple[dict[str, FileEntry], str | None]:
    """Every rank writes its files: their checksums, and what went wrong. A rank that cannot write still takes part in
    the gathering, for which the others wait."""
    with engine.averaged():
        tensors = engine.gather(saved_names)
    try:
        (work / checkpoint.ENGINE).mkdir(parents=True, exist_ok=True)
        files = [engine.save_state(work / checkpoint.ENGINE)]
        if engine.is_main:
            state = checkpoint.State(
                phase=phase.number,
                parts=phase.parts,
                step=position.step,
                samples_seen=position.samples_seen,
                world_size=engine.world,
                versions=checkpoint.versions(),
                stage=phase.stage,
                bad_in_a_row=position.bad_in_a_row,
            )
            files += checkpoint.write(work, tensors, config, state)
        return {path.relative_to(work).as_posix(): whole.settle(path) for path in files}, None
    except (OSError, SafetensorError) as error:
        return {}, str(error)
