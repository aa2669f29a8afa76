"""The loop that all phases share: steps, what is recorded and saved after them, and the ways in which it ends."""

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import Signals as Signal
from typing import Any

import torch

from rectvlm.config import Config, TrainingLimitsConfig
from rectvlm.data.augment import augment_batch
from rectvlm.files import is_disk_full
from rectvlm.train.engine.engine import Engine
from rectvlm.train.engine.peak_memory import peak_memory_bytes
from rectvlm.train.logging.mfu import StepFlops
from rectvlm.train.logging.run_log import RunLog
from rectvlm.train.objectives import combine_losses, compute_losses
from rectvlm.train.optimizer import set_learning_rates, set_requires_grad
from rectvlm.train.phases import Phase
from rectvlm.train.recovery.bad_steps import BAD_STEPS_FILE as BAD_STEPS
from rectvlm.train.recovery.bad_steps import (
    BadStepsLog,
    RankObservation,
    explain_skipped_step,
    finite_or_none,
    join_sample_names,
    judge_losses,
)
from rectvlm.train.recovery.exit_codes import ExitCode, RunEnded
from rectvlm.train.recovery.position import TrainingPosition, seed_micro_batch
from rectvlm.train.recovery.save import save_checkpoint
from rectvlm.train.recovery.signals import StopSignals
from rectvlm.train.recovery.watchdog import RankActivity, Watchdog
from rectvlm.train.validation import Validator
from rectvlm.types import Batch

log = logging.getLogger(__name__)


class StepTimer:
    """Seconds by part of a step, as the host sees them with the device waited for."""

    def __init__(self, device: torch.device, doing: RankActivity) -> None:
        self.device, self.activity = device, doing
        self.seconds_by_operation = dict.fromkeys(
            ("data", "augment", "forward", "backward", "optimizer"), 0.0
        )

    @contextmanager
    def time_operation(self, name: str) -> Iterator[None]:
        """Add the time of a block to a part."""
        self.activity.operation = name
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds_by_operation[name] += time.perf_counter() - start


def run_training_loop(
    engine: Engine,
    loader: Iterable[Batch],
    phase: Phase,
    config: Config,
    folder: Path,
    saved_names: list[str],
    position: TrainingPosition,
    signals: StopSignals,
    step_flops: StepFlops | None = None,
) -> None:
    """Train from a position to the phase's last step, recording every step and saving checkpoints.

    Args:
        engine: prepared.
        loader: endless micro-batches of this rank, from the position on.
        phase: which tasks.
        config: everything else.
        folder: of the phase's run.
        saved_names: of the tensors that a checkpoint holds.
        position: where to begin; it moves along.
        signals: open; one that has arrived ends the run after its next step.
        work: FLOPs of a step, for the record.
    """
    settings, guard = phase.get_settings(config), config.train.limits
    doing = RankActivity()
    with (
        _end_run_on_full_disk(folder),
        Watchdog(doing, engine.rank, folder, 60 * guard.timeout_minutes) as watchdog,
        ExitStack() as opened,
    ):
        validator = Validator(engine, phase, config, folder, position.step)
        bad_steps = BadStepsLog(folder, position.step) if engine.is_main else None
        record = opened.enter_context(
            RunLog(engine, phase, config, folder, position.step, step_flops)
        )
        after = _StepFollowUp(
            engine,
            phase,
            config,
            folder,
            saved_names,
            position,
            validator,
            record,
            watchdog,
            position.step,
        )
        if validator.is_due(position.step):  # the run was asked to end before it could validate
            after.save_and_validate(signal=0)
        batches = iter(loader)
        while position.step < settings.steps and not validator.should_stop:
            watchdog.record_heartbeat()
            line, samples, signal = _train_step(
                engine, batches, phase, config, position, doing, signals
            )
            if line["skipped"] is not None:
                _log_skipped_step(bad_steps, engine, line, guard)
            record.log_step(line, samples)
            if position.bad_in_a_row >= guard.max_bad_steps:
                raise RunEnded(ExitCode.DIVERGED, _explain_divergence(line, folder))
            after.save_and_validate(signal)


@dataclass
class _StepFollowUp:
    """What follows a step."""

    engine: Engine
    phase: Phase
    config: Config
    folder: Path
    saved_names: list[str]
    position: TrainingPosition
    validator: Validator
    record: RunLog
    watchdog: Watchdog
    saved_step: int
    """Step of the newest checkpoint, which is never written over."""

    def save_and_validate(self, signal: int) -> None:
        """Save and validate where it is time, in this order: a validation takes longer than the notice that a machine
        gives before it vanishes. With a signal, save and end: whoever goes on makes the validation up.

        Raises:
            Ended: asked to end, or the last checkpoint could not be written.
        """
        step, settings = self.position.step, self.phase.get_settings(self.config)
        if step % settings.save_every == 0 or step == settings.steps or signal:
            self._save_checkpoint()
        if not signal:
            self._run_validation()
        last = step == settings.steps or self.validator.should_stop
        if (last or signal) and self.saved_step != step:
            raise RunEnded(
                ExitCode.WRITE_FAILED, f"the checkpoint of step {step} could not be written"
            )
        if signal and (not last or self.validator.is_due(step)):
            raise RunEnded(
                ExitCode.STOPPED_BY_SIGNAL,
                f"{Signal(signal).name}: saved after step {step}, go on with --resume auto",
            )

    def _save_checkpoint(self) -> None:
        if self.saved_step == self.position.step:
            return
        self._begin_operation("saving")
        self.record.fsync_logs()
        if save_checkpoint(
            self.engine, self.phase, self.config, self.folder, self.saved_names, self.position
        ):
            self.saved_step = self.position.step

    def _run_validation(self) -> None:
        self._begin_operation("validation")
        found = self.validator.validate_if_due(self.position.step, self.watchdog.record_heartbeat)
        if found is None:
            return
        self.record.log_validation(found.step, found.metrics, found.examples)
        if found.best_value is not None or self.validator.should_stop:
            self._save_checkpoint()
        if found.best_value is not None and self.saved_step == found.step:
            self.validator.keep_best(found)

    def _begin_operation(self, part: str) -> None:
        doing = self.watchdog.activity
        doing.operation, doing.sample_keys = part, []
        self.watchdog.record_heartbeat()


def _train_step(
    engine: Engine,
    batches: Iterator[Batch],
    phase: Phase,
    config: Config,
    position: TrainingPosition,
    doing: RankActivity,
    signals: StopSignals,
) -> tuple[dict[str, Any], list[str], int]:
    """One optimizer step: what `metrics.jsonl` says of it, the samples that this rank took, and the number of a signal
    that some rank has received, 0 for none."""
    settings, guard = phase.get_settings(config), config.train.limits
    begin = time.perf_counter()
    watch = StepTimer(engine.device, doing)
    doing.step, doing.sample_keys = position.step + 1, []
    groups = engine.optimizer.param_groups
    samples_a_step = settings.micro_batch * settings.accumulation * engine.world_size
    # Where epochs count, the schedule follows the samples: another number of ranks has other steps.
    scheduled = position.samples_seen / samples_a_step if settings.epochs else None
    rates = set_learning_rates(groups, position.step, settings, scheduled)
    set_requires_grad(engine.model.module, groups)
    weighting = getattr(engine.model.module, "weighting", None)
    sums = torch.zeros(len(phase.tasks), 2)
    values: list[float] = []
    keys: list[str] = []
    tokens, stepped = 0, None
    for number in range(settings.accumulation):
        first = (
            position.samples_seen
            + (number * engine.world_size + engine.rank) * settings.micro_batch
        )
        seed_micro_batch(config.train.seed, first)
        with watch.time_operation("data"):
            raw = next(batches)
        doing.sample_keys = raw.keys
        with watch.time_operation("augment"):
            batch = augment_batch(raw.to(engine.device), config.data.augment)
        with watch.time_operation("forward"):
            outputs = engine.model(batch)
            found = compute_losses(
                outputs, batch, phase.tasks, config.train.localization_loss_weights
            )
            loss = combine_losses(found, config.train.loss_weights, weighting)
        with watch.time_operation("backward"):
            engine.backward(loss)
            values.append(loss.item())
        with watch.time_operation("optimizer"):
            last = number == settings.accumulation - 1
            # A loss that is not normal is refused by all ranks or by none.
            refuse = last and engine.all_reduce_max(judge_losses(values, guard))[0] > 0
            stepped = engine.step(refuse, guard.max_gradient_norm)
        for row, task in enumerate(found.values()):
            known = float(task.count > 0)
            sums[row] += torch.tensor([known * task.value.item(), known])
        keys += batch.keys
        tokens += outputs.token_count
    assert stepped is not None
    doing.operation = "agreeing"
    skipped = (
        None
        if stepped.is_applied
        else _describe_skipped_step(engine, values, keys, stepped.gradient_norm, position, guard)
    )
    position.bad_in_a_row = skipped["in_a_row"] if skipped else 0
    position.step += 1
    position.samples_seen += samples_a_step
    means = engine.all_reduce_mean(sums[:, 0], sums[:, 1])
    by_task = {
        task: finite_or_none(value) for task, value in zip(phase.tasks, means.tolist(), strict=True)
    }
    memory, signal = engine.all_reduce_max(peak_memory_bytes(), signals.received_signal)
    line = {
        "step": position.step,
        "loss": sum(
            getattr(config.train.loss_weights, task) * (value or 0.0)
            for task, value in by_task.items()
        ),
        "losses": by_task,
        "lr": rates,
        "grad_norm": finite_or_none(stepped.gradient_norm),
        "skipped": skipped,
        "samples_seen": position.samples_seen,
        "tokens": engine.all_reduce_sum(tokens),
        "seconds": {"total": time.perf_counter() - begin, **watch.seconds_by_operation},
        "memory_bytes": memory,
    }
    if skipped is not None and any(None in seen["losses"] for seen in skipped["ranks"]):
        line["loss"] = None
    if weighting is not None:
        factors = zip(phase.tasks, weighting.compute_factors().tolist(), strict=True)
        line["task_weights"] = {
            task: getattr(config.train.loss_weights, task) * factor for task, factor in factors
        }
    return line, keys, int(signal)


def _describe_skipped_step(
    engine: Engine,
    values: list[float],
    keys: list[str],
    norm: float | None,
    position: TrainingPosition,
    guard: TrainingLimitsConfig,
) -> dict[str, Any]:
    """Why the step was skipped, and what every rank saw of it; every rank must call it."""
    own: RankObservation = {
        "rank": engine.rank,
        "losses": [finite_or_none(value) for value in values],
        "samples": keys,
    }
    ranks: list[RankObservation] = engine.all_gather_object(own)
    names = [name for rank in ranks for name in rank["samples"]]
    reason = explain_skipped_step(ranks, norm, guard)
    return {
        "reason": reason,
        "in_a_row": position.bad_in_a_row + 1,
        "samples": names,
        "ranks": ranks,
    }


def _log_skipped_step(
    bad_steps: BadStepsLog | None, engine: Engine, line: dict[str, Any], guard: TrainingLimitsConfig
) -> None:
    """Write a skipped step down, by rank, and say so."""
    ranks = line["skipped"].pop("ranks")
    if bad_steps is None:
        return
    skipped = line["skipped"]
    bad_steps.append_step(line["step"], skipped["reason"], line["grad_norm"], ranks)
    log.warning(
        "step %d skipped, %d of at most %d in a row: %s; samples %s",
        line["step"],
        skipped["in_a_row"],
        guard.max_bad_steps,
        skipped["reason"],
        join_sample_names(skipped["samples"]),
    )


def _explain_divergence(line: dict[str, Any], folder: Path) -> str:
    skipped = line["skipped"]
    return (
        f"{skipped['in_a_row']} steps in a row were skipped, the last, {line['step']}, because {skipped['reason']}; "
        f"{folder / BAD_STEPS} names the samples of each: look at them, or lower the learning rate and go on from the "
        "last checkpoint with --resume"
    )


@contextmanager
def _end_run_on_full_disk(folder: Path) -> Iterator[None]:
    """End in order when the log files cannot grow."""
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        reason = f"no room to write to {folder} ({error}): make room, go on with --resume auto"
        raise RunEnded(ExitCode.WRITE_FAILED, reason, on_all_ranks=False) from error
