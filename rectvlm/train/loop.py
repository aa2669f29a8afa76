"""The training loop of all phases: steps, logging, checkpoints, validation, and the ways to end."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import Signals

from rectvlm.config import Config
from rectvlm.files import is_disk_full
from rectvlm.train.budget import PhaseBudget
from rectvlm.train.engine.engine import Engine
from rectvlm.train.logging.mfu import StepFlops
from rectvlm.train.logging.run_log import RunLog
from rectvlm.train.logging.startup_clock import StartupClock
from rectvlm.train.phases import Phase
from rectvlm.train.recovery.bad_steps import (
    BAD_STEPS_FILE,
    BadStepsLog,
    SkippedStep,
    join_sample_names,
)
from rectvlm.train.recovery.exit_codes import ExitCode, RunEnded
from rectvlm.train.recovery.position import TrainingPosition
from rectvlm.train.recovery.save import save_checkpoint, save_thresholds
from rectvlm.train.recovery.signals import StopSignals
from rectvlm.train.recovery.watchdog import RankActivity, Watchdog
from rectvlm.train.step_result import StepResult
from rectvlm.train.train_step import StepTrainer
from rectvlm.train.validation import Validator
from rectvlm.types import Batch

log = logging.getLogger(__name__)


def run_training_loop(
    engine: Engine,
    loader: Iterable[Batch],
    phase: Phase,
    config: Config,
    budget: PhaseBudget,
    folder: Path,
    saved_names: list[str],
    position: TrainingPosition,
    signals: StopSignals,
    step_flops: StepFlops | None = None,
    startup: StartupClock | None = None,
) -> None:
    """Train from a position to the phase's last step, logging every step and saving checkpoints.

    Args:
        engine: the engine with the prepared model.
        loader: endless micro-batches of this rank, from the position on.
        phase: the phase that trains.
        config: the configuration.
        budget: the phase's samples and steps.
        folder: the phase's run folder.
        saved_names: names of the tensors that a checkpoint holds.
        position: where to begin; it moves on with every step.
        signals: open; a signal that has arrived ends the run after its next step.
        step_flops: FLOPs of a step, for the MFU.
        startup: clock of the start, for the log of the first step.

    Raises:
        RunEnded: the run ends before the last step is done and saved.
    """
    activity = RankActivity()
    timeout_seconds = 60 * config.train.limits.timeout_minutes
    with (
        _end_run_on_full_disk(folder),
        Watchdog(activity, engine.rank, folder, timeout_seconds) as watchdog,
    ):
        # The validator reads its history before the log drops lines of later steps.
        validator = Validator(engine, phase, config, budget, folder, position.step)
        bad_steps_log = BadStepsLog(folder, position.step) if engine.is_main else None
        trainer = StepTrainer(engine, phase, config, budget, position, signals, activity)
        last_step = position.step + budget.count_steps_left(position.samples_seen)
        with RunLog(
            engine, phase, config, folder, position.step, last_step, step_flops, startup
        ) as run_log:
            loop = TrainingLoop(
                engine=engine,
                phase=phase,
                config=config,
                budget=budget,
                folder=folder,
                saved_names=saved_names,
                position=position,
                trainer=trainer,
                validator=validator,
                run_log=run_log,
                bad_steps_log=bad_steps_log,
                watchdog=watchdog,
                saved_step=position.step,
            )
            loop.run(iter(loader))


@dataclass
class TrainingLoop:
    """Trains a phase step by step, and saves and validates where it is due."""

    engine: Engine
    phase: Phase
    config: Config
    budget: PhaseBudget
    folder: Path
    saved_names: list[str]
    """Names of the tensors that a checkpoint holds."""
    position: TrainingPosition
    trainer: StepTrainer
    validator: Validator
    run_log: RunLog
    bad_steps_log: BadStepsLog | None
    """Log of skipped steps; None on ranks other than 0."""
    watchdog: Watchdog
    saved_step: int
    """Step of the newest checkpoint, which is never overwritten."""

    @property
    def is_last_step_done(self) -> bool:
        """Whether the phase's last step is done."""
        return self.budget.is_finished(self.position.samples_seen)

    @property
    def should_stop(self) -> bool:
        """Whether the last step is done, or validation got no better for too long."""
        return self.is_last_step_done or self.validator.should_stop

    def run(self, batches: Iterator[Batch]) -> None:
        """Train until the loop should stop.

        Raises:
            RunEnded: the run ends early.
        """
        if self.validator.is_due(self.position):
            # A signal ended the run before it could validate.
            self.save_and_validate(stop_signal=0)
        while not self.should_stop:
            self.watchdog.record_heartbeat()
            result = self.trainer.train_step(batches)
            self._log_step(result)
            self.save_and_validate(result.stop_signal)

    def _log_step(self, result: StepResult) -> None:
        if result.skipped is not None:
            self._log_skipped_step(result, result.skipped)
        self.run_log.log_step(result)
        if result.skipped is not None:
            max_bad_steps = self.config.train.limits.max_bad_steps
            if result.skipped.in_a_row >= max_bad_steps:
                raise RunEnded(ExitCode.DIVERGED, self._explain_divergence(result, result.skipped))

    def _log_skipped_step(self, result: StepResult, skipped: SkippedStep) -> None:
        if self.bad_steps_log is None:
            return
        self.bad_steps_log.append_step(result.step, result.gradient_norm, skipped)
        log.warning(
            "step %d skipped, %d of at most %d in a row: %s; samples %s",
            result.step,
            skipped.in_a_row,
            self.config.train.limits.max_bad_steps,
            skipped.reason,
            join_sample_names(skipped.sample_keys),
        )

    def _explain_divergence(self, result: StepResult, skipped: SkippedStep) -> str:
        return (
            f"{skipped.in_a_row} steps in a row were skipped, the last, {result.step}, because "
            f"{skipped.reason}; {self.folder / BAD_STEPS_FILE} names the samples of each: look at "
            "them, or lower the learning rate and go on from the last checkpoint with --resume"
        )

    def save_and_validate(self, stop_signal: int) -> None:
        """Save and validate where it is due, in this order.

        A validation takes longer than the notice that a machine gives before it is taken away. So
        with a signal the run saves and ends; the run that resumes makes up for the validation.

        Raises:
            RunEnded: a signal asks to end, or the last checkpoint could not be written.
        """
        step = self.position.step
        save_every = self.phase.get_settings(self.config).save_every
        is_due = self.budget.is_due(save_every, self.position.samples_seen)
        if is_due or self.is_last_step_done or stop_signal:
            self._save()
        if not stop_signal:
            self._validate()
        if (self.should_stop or stop_signal) and self.saved_step != step:
            raise RunEnded(
                ExitCode.WRITE_FAILED, f"the checkpoint of step {step} could not be written"
            )
        if stop_signal and (not self.should_stop or self.validator.is_due(self.position)):
            raise RunEnded(
                ExitCode.STOPPED_BY_SIGNAL,
                f"{Signals(stop_signal).name}: saved after step {step}, go on with --resume auto",
            )

    def _save(self) -> None:
        if self.saved_step == self.position.step:
            return
        self._begin_operation("saving")
        self.run_log.fsync_logs()
        is_saved = save_checkpoint(
            self.engine, self.phase, self.config, self.folder, self.saved_names, self.position
        )
        if is_saved:
            self.saved_step = self.position.step

    def _validate(self) -> None:
        self._begin_operation("validation")
        result = self.validator.validate_if_due(self.position, self.watchdog.record_heartbeat)
        if result is None:
            return
        if self.saved_step == result.step and self.engine.is_main:
            # Before the log: a validation that is in the log is not made up after a kill.
            save_thresholds(self.folder, result.step, self.engine.model.module.thresholds)
        self.run_log.log_validation(result)
        is_best = result.best_value is not None
        if is_best or self.validator.should_stop:
            self._save()
        if is_best and self.saved_step == result.step:
            self.validator.keep_best(result)

    def _begin_operation(self, operation: str) -> None:
        activity = self.watchdog.activity
        activity.operation, activity.sample_keys = operation, []
        self.watchdog.record_heartbeat()


@contextmanager
def _end_run_on_full_disk(folder: Path) -> Iterator[None]:
    """End the run in order when the log files cannot grow."""
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        reason = f"no room to write to {folder} ({error}): make room, go on with --resume auto"
        raise RunEnded(ExitCode.WRITE_FAILED, reason, on_all_ranks=False) from error
