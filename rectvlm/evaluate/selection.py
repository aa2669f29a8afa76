"""Selection bias: whether a checkpoint was chosen on the cases that it is evaluated on.

Its figures are then better than on other cases.
"""

from pathlib import Path

from rectvlm.checkpoint import TrainingState, run_folder
from rectvlm.config import Config, phase_key
from rectvlm.data.shards import SHARD_INDEX_FILE
from rectvlm.data.store import ShardStore
from rectvlm.runs.read_runs import read_run
from rectvlm.runs.run_files import VALIDATION_FILE
from rectvlm.types import Split, UserError


def are_same_shards(shards: str, trained_on: str) -> bool | None:
    """Whether two places hold the same shards; None where one of them cannot be read.

    The indexes are compared, which hold checksums.
    """
    if shards == trained_on:
        return True
    try:
        index, trained_index = (
            ShardStore(place).read_file(SHARD_INDEX_FILE) for place in (shards, trained_on)
        )
    except (OSError, UserError):
        return None
    return index == trained_index


def was_selected_on(
    checkpoint: Path,
    config: Config,
    state: TrainingState,
    split: Split,
    has_training_shards: bool | None,
    selection_split: Split = "valid",
) -> bool | None:
    """Whether validation during training chose a checkpoint on the split that is evaluated.

    It was chosen if it is the best of its run, or the one with which patience ended the run.
    Earlier phases do not count: a phase that started from the best checkpoint of the one before is
    a choice too, but of where to begin.

    Args:
        checkpoint: folder of the checkpoint.
        config: configuration that it was trained with.
        state: training state of the checkpoint.
        split: split that is evaluated.
        has_training_shards: whether the evaluated shards are those of the training; None where
            that is not known.
        selection_split: split of the evaluated shards on which a training validates.

    Returns:
        None where it cannot be known: the checkpoint was exported or moved away from its run, or
        it was chosen and its shards cannot be compared.
    """
    settings = config.train.phases[phase_key(state.phase, state.stage)].validation
    if split not in ("dev", "valid") or not settings.every or has_training_shards is False:
        return False
    if has_training_shards and split != selection_split:
        return False

    folder = checkpoint.resolve()
    phase_folder = folder.parents[1]
    is_in_run = folder == run_folder.step_folder(phase_folder, state.step)
    if not is_in_run or not (phase_folder / VALIDATION_FILE).is_file():
        return None

    is_chosen = run_folder.best_checkpoint(phase_folder) == folder
    if settings.patience and not is_chosen:
        is_chosen = _was_last_by_patience(phase_folder, state.step)
    return has_training_shards if is_chosen else False


def _was_last_by_patience(phase_folder: Path, step: int) -> bool:
    """Whether a run ended at this step before its planned number of steps."""
    run = read_run(phase_folder)
    if run.state != "finished" or run.planned_steps is None:
        return False
    return run.last_step < run.planned_steps and run.last_step == step
