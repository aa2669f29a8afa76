"""Whether a checkpoint was chosen on the cases that it is evaluated on: its figures are then better than on others."""

from pathlib import Path

from rectvlm.checkpoint import TrainingState, run_folder
from rectvlm.config import Config, phase_key
from rectvlm.data.shards import SHARD_INDEX_FILE
from rectvlm.data.store import ShardStore
from rectvlm.runs.read_runs import VALIDATION_FILE, read_run
from rectvlm.types import Split, UserError


def are_same_shards(shards: str, trained_on: str) -> bool | None:
    """Whether two places hold the same shards, by the index, which holds checksums; None where one cannot be read."""
    if shards == trained_on:
        return True
    try:
        return ShardStore(shards).read_file(SHARD_INDEX_FILE) == ShardStore(trained_on).read_file(
            SHARD_INDEX_FILE
        )
    except (OSError, UserError):
        return None


def was_selected_on(
    checkpoint: Path,
    config: Config,
    state: TrainingState,
    split: Split,
    has_training_shards: bool | None,
) -> bool | None:
    """Whether validation during training chose a checkpoint on the split that is evaluated: as the best of its run, or
    as the one with which patience ended the run.

    Earlier phases do not count: a phase that started from the best checkpoint of the one before is a choice too, but of
    where to begin.

    Args:
        checkpoint: its folder.
        config: it was trained with.
        state: of the checkpoint.
        split: that is evaluated.
        own_shards: whether its shards are those of the training.

    Returns:
        None where it cannot be known: the checkpoint was exported or moved away from its run, or it was chosen and its
        shards cannot be compared.
    """
    settings = config.train.phases[phase_key(state.phase, state.stage)].validation
    if split != "valid" or not settings.every or has_training_shards is False:
        return False
    folder = checkpoint.resolve()
    phase_folder = folder.parents[1]
    if (
        folder != run_folder.step_folder(phase_folder, state.step)
        or not (phase_folder / VALIDATION_FILE).is_file()
    ):
        return None
    chosen = run_folder.best_checkpoint(phase_folder) == folder
    if settings.patience and not chosen:
        run = read_run(phase_folder)
        ended_early = (
            run.state == "finished"
            and run.planned_steps is not None
            and run.last_step < run.planned_steps
        )
        chosen = ended_early and run.last_step == state.step
    return has_training_shards if chosen else False
