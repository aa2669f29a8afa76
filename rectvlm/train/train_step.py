"""One optimizer step: micro-batches forward and backward, the update, and what all ranks saw."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rectvlm.config import Config
from rectvlm.data.augment import augment_batch
from rectvlm.finite import finite_or_none
from rectvlm.train.budget import PhaseBudget
from rectvlm.train.engine.engine import Engine, OptimizerStepResult
from rectvlm.train.engine.peak_memory import peak_memory_bytes
from rectvlm.train.objectives import combine_losses, compute_losses
from rectvlm.train.optimizer import set_learning_rates, set_requires_grad
from rectvlm.train.phases import Phase
from rectvlm.train.recovery.bad_steps import (
    RankObservation,
    SkippedStep,
    explain_skipped_step,
    judge_losses,
)
from rectvlm.train.recovery.position import TrainingPosition, seed_micro_batch
from rectvlm.train.recovery.signals import StopSignals
from rectvlm.train.recovery.watchdog import RankActivity
from rectvlm.train.step_result import StepResult
from rectvlm.train.task_loss import TargetCounts
from rectvlm.types import Batch

TIMED_OPERATIONS = ("data", "augment", "forward", "backward", "optimizer")


class StepTimer:
    """Times the operations of a step on the host, which waits for the device after each."""

    def __init__(self, device: torch.device, activity: RankActivity) -> None:
        self.device, self.activity = device, activity
        self.seconds_by_operation = dict.fromkeys(TIMED_OPERATIONS, 0.0)

    @contextmanager
    def time_operation(self, name: str) -> Iterator[None]:
        """Add the time of a block to an operation."""
        self.activity.operation = name
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds_by_operation[name] += time.perf_counter() - start


@dataclass
class _RankTotals:
    """What one rank adds up over the micro-batches of a step. T tasks."""

    loss_sums: Tensor
    """(T,) float32: the sum of each task's losses over the micro-batches."""
    loss_values: list[float] = field(default_factory=list)
    """Combined loss of each micro-batch."""
    sample_keys: list[str] = field(default_factory=list)
    token_count: int = 0


class StepTrainer:
    """Trains a prepared model step by step, from a position on."""

    def __init__(
        self,
        engine: Engine,
        phase: Phase,
        config: Config,
        budget: PhaseBudget,
        position: TrainingPosition,
        signals: StopSignals,
        activity: RankActivity,
    ) -> None:
        """Prepare to train.

        Args:
            engine: the engine with the prepared model.
            phase: the phase that trains.
            config: the configuration.
            budget: the phase's samples and steps.
            position: where to begin; every step moves it on.
            signals: open; their numbers are gathered with every step.
            activity: what this rank is doing, kept up to date for the watchdog.
        """
        self.engine, self.phase, self.config = engine, phase, config
        self.position, self.signals, self.activity = position, signals, activity
        self.settings = phase.get_settings(config)
        self.limits = config.train.limits
        self.weighting = getattr(engine.model.module, "weighting", None)
        self.budget = budget

    def train_step(self, batches: Iterator[Batch]) -> StepResult:
        """Take one optimizer step; every rank must call it."""
        start = time.perf_counter()
        timer = StepTimer(self.engine.device, self.activity)
        self.activity.step, self.activity.sample_keys = self.position.step + 1, []
        learning_rates = self._set_learning_rates()
        with timer.time_operation("data"):
            loaded = [next(batches) for _ in range(self.budget.step_batch.accumulation)]
            micro_batches = [self.phase.hide_outlines(batch) for batch in loaded]
        counts = self._count_targets(micro_batches)
        totals = _RankTotals(loss_sums=torch.zeros(len(self.phase.tasks)))
        optimizer_step = None
        for number, loaded_batch in enumerate(micro_batches):
            self._seed_micro_batch(number)
            is_last = number == len(micro_batches) - 1
            optimizer_step = self._train_micro_batch(loaded_batch, counts, totals, timer, is_last)
        assert optimizer_step is not None

        self.activity.operation = "gathering results"
        skipped = None
        if not optimizer_step.is_applied:
            skipped = self._gather_skipped_step(totals, optimizer_step.gradient_norm)
        self.position.skipped_in_a_row = skipped.in_a_row if skipped else 0
        self.position.step += 1
        self.position.samples_seen += self.budget.step_batch.global_batch

        losses_by_task = self._average_losses(totals, counts)
        memory, signal = self.engine.all_reduce_max(
            peak_memory_bytes(), self.signals.received_signal
        )
        return StepResult(
            step=self.position.step,
            loss=self._combine_mean_losses(losses_by_task, skipped),
            losses_by_task=losses_by_task,
            learning_rates=learning_rates,
            gradient_norm=finite_or_none(optimizer_step.gradient_norm),
            skipped=skipped,
            samples_seen=self.position.samples_seen,
            token_count=self.engine.all_reduce_sum(totals.token_count),
            total_seconds=time.perf_counter() - start,
            seconds_by_operation=timer.seconds_by_operation,
            peak_memory_bytes=memory,
            task_weights=self._read_task_weights(),
            sample_keys=totals.sample_keys,
            stop_signal=int(signal),
        )

    def _set_learning_rates(self) -> dict[str, float]:
        """Set the learning rates of the step and which parameters train; the rates by part."""
        groups = self.engine.optimizer.param_groups
        rates = set_learning_rates(groups, self.settings, self.budget, self.position.samples_seen)
        set_requires_grad(self.engine.model.module, groups)
        return rates

    def _seed_micro_batch(self, number: int) -> None:
        """Seed torch for this rank's micro-batch `number` of the step."""
        micro_batch_index = number * self.engine.world_size + self.engine.rank
        first_sample = (
            self.position.samples_seen + micro_batch_index * self.budget.step_batch.micro_batch
        )
        seed_micro_batch(self.config.train.seed, first_sample)

    def _count_targets(self, micro_batches: list[Batch]) -> TargetCounts:
        """Count what the micro-batches of all ranks teach, per micro-batch."""
        counts = torch.tensor([TargetCounts.of_batch(batch).to_list() for batch in micro_batches])
        micro_batch_counts = torch.full((counts.shape[1],), float(len(micro_batches)))
        means = self.engine.all_reduce_mean(counts.sum(0), micro_batch_counts)
        return TargetCounts.from_list(means.tolist())

    def _train_micro_batch(
        self,
        loaded_batch: Batch,
        counts: TargetCounts,
        totals: _RankTotals,
        timer: StepTimer,
        is_last: bool,
    ) -> OptimizerStepResult | None:
        """Train on one micro-batch; the last of a step updates the weights."""
        engine, train_config = self.engine, self.config.train
        self.activity.sample_keys = loaded_batch.keys
        with timer.time_operation("augment"):
            batch = augment_batch(loaded_batch.to(engine.device), self.config.data.augment)
        with timer.time_operation("forward"):
            outputs = engine.model(batch)
            task_losses = compute_losses(
                outputs, batch, self.phase.tasks, train_config.localization_loss_weights, counts
            )
            loss = combine_losses(task_losses, train_config.loss_weights, self.weighting)
        with timer.time_operation("backward"):
            engine.backward(loss)
            totals.loss_values.append(loss.item())
        with timer.time_operation("optimizer"):
            skip = is_last and self._is_bad_loss(totals.loss_values)
            optimizer_step = engine.step(skip, self.limits.max_gradient_norm)
        totals.loss_sums += torch.tensor([loss.value.item() for loss in task_losses.values()])
        totals.sample_keys += batch.keys
        totals.token_count += outputs.token_count
        return optimizer_step

    def _is_bad_loss(self, loss_values: list[float]) -> bool:
        """Whether some rank's loss is not normal; all ranks agree, so all skip the step or none."""
        return self.engine.all_reduce_max(judge_losses(loss_values, self.limits))[0] > 0

    def _gather_skipped_step(self, totals: _RankTotals, gradient_norm: float | None) -> SkippedStep:
        """Gather what every rank saw of a skipped step; every rank must call it."""
        losses = [finite_or_none(value) for value in totals.loss_values]
        observation = RankObservation(self.engine.rank, losses, totals.sample_keys)
        observations: list[RankObservation] = self.engine.all_gather_object(observation)
        reason = explain_skipped_step(observations, gradient_norm, self.limits)
        return SkippedStep(reason, self.position.skipped_in_a_row + 1, observations)

    def _average_losses(self, totals: _RankTotals, counts: TargetCounts) -> dict[str, float | None]:
        """Loss of each task over the step, the mean of all ranks' micro-batches."""
        micro_batch_counts = torch.full_like(totals.loss_sums, self.budget.step_batch.accumulation)
        means = self.engine.all_reduce_mean(totals.loss_sums, micro_batch_counts).tolist()
        losses_by_task: dict[str, float | None] = {}
        for task, mean in zip(self.phase.tasks, means, strict=True):
            losses_by_task[task] = finite_or_none(mean) if counts.of_task(task) else None
        return losses_by_task

    def _combine_mean_losses(
        self, losses_by_task: dict[str, float | None], skipped: SkippedStep | None
    ) -> float | None:
        """Weighted sum of the mean losses; None without targets or if one was not finite."""
        if skipped is not None and skipped.has_non_finite_loss:
            return None
        if all(loss is None for loss in losses_by_task.values()):
            return None
        weights = self.config.train.loss_weights
        return sum(getattr(weights, task) * (loss or 0.0) for task, loss in losses_by_task.items())

    def _read_task_weights(self) -> dict[str, float] | None:
        """Current weight of each task's loss, where the weights are learned."""
        if self.weighting is None:
            return None
        weights = self.config.train.loss_weights
        factors = self.weighting.compute_factors().tolist()
        task_weights: dict[str, float] = {}
        for task, factor in zip(self.phase.tasks, factors, strict=True):
            task_weights[task] = getattr(weights, task) * factor
        return task_weights
