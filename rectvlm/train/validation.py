"""Validation while a phase trains: losses and metrics of some cases of the dev split, or of
the valid split where the shards hold no dev.

It decides which checkpoint is the best and when to end early. Every rank takes as many cases as
every other, one at a time (under ZeRO-3 all must run the same forward passes); where the cases do
not divide, a rank repeats one that does not count. So the metrics do not depend on the number of
ranks. The weights are the moving averages where the phase keeps some.

Which checkpoint is the best is a function of `validation.jsonl` alone, whose later lines a resumed
run drops. Random numbers of the training do not depend on validation. What training takes from it
are the thresholds of the findings, which each validation fits: predicted cues in the prompts of
phase 3 depend on them. Checkpoints carry them.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from rectvlm.checkpoint import run_folder
from rectvlm.config import Config
from rectvlm.data.dataset import ShardDataset
from rectvlm.data.loader import BatchLoader
from rectvlm.train.budget import PhaseBudget
from rectvlm.train.early_stopping import (
    MetricValue,
    is_patience_exhausted,
    metric_sort_key,
    read_metric_history,
)
from rectvlm.train.engine.engine import Engine
from rectvlm.train.objectives import compute_losses
from rectvlm.train.optimizer import set_training_modes
from rectvlm.train.phases import Phase
from rectvlm.train.recovery.position import TrainingPosition
from rectvlm.train.validation_cases import (
    ScoredCase,
    ValidationExample,
    WrittenReport,
    compute_validation_metrics,
    fit_case_thresholds,
    make_example,
    read_reports,
    score_case,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ValidationResult:
    """Result of a validation, the same on every rank except for the examples."""

    step: int
    """Number of optimizer steps done."""
    metrics: dict[str, float | None]
    """Metrics by name; None where the cases do not determine one."""
    examples: list[ValidationExample]
    """Cases to look at, on rank 0; empty elsewhere."""
    best_value: float | None
    """Value of the deciding metric if it is better than every checkpoint's, else None."""


class Validator:
    """Validates when it is due, and remembers which checkpoint is the best."""

    def __init__(
        self,
        engine: Engine,
        phase: Phase,
        config: Config,
        budget: PhaseBudget,
        folder: Path,
        step: int,
    ) -> None:
        """Continue after `step`.

        Every rank must call it before any line of the folder's files is dropped.

        Raises:
            UserError: validation is asked for and the shards hold neither a dev nor a valid split.
        """
        self.engine, self.phase, self.config, self.folder = engine, phase, config, folder
        self.budget = budget
        self.settings = phase.get_settings(config).validation
        self.dataset: ShardDataset | None = None
        if self.settings.every:
            self.dataset = ShardDataset.open_selection_split(config.data)
        history = read_metric_history(folder, self.settings)
        self._history = [entry for entry in history if entry.step <= step]
        self._best = self._find_best_checkpoint()
        engine.barrier()
        if engine.is_main and self.dataset is not None:
            best_step, best_value = self._best or (None, None)
            run_folder.record_best_checkpoint(
                folder, best_step, self.settings.best_metric, best_value
            )

    def _find_best_checkpoint(self) -> MetricValue | None:
        """Step and value of the best checkpoint that exists."""
        candidates = []
        for entry in self._history:
            folder = run_folder.step_folder(self.folder, entry.step)
            if entry.value is not None and run_folder.is_checkpoint(folder):
                candidates.append(entry)
        # Of equal values the first counts, as in a run that was not interrupted.
        return min(candidates, key=self._sort_key, default=None)

    def _sort_key(self, entry: MetricValue) -> tuple[float, int]:
        return metric_sort_key(entry.value, self.settings), entry.step

    @property
    def should_stop(self) -> bool:
        """Whether the metric has not got better for longer than the patience allows."""
        return is_patience_exhausted(self._history, self.settings)

    def is_due(self, position: TrainingPosition) -> bool:
        """Whether a validation belongs after the steps done and has not been done."""
        step, samples_seen = position.step, position.samples_seen
        if self.dataset is None or step == 0 or any(entry.step == step for entry in self._history):
            return False
        is_last = self.budget.is_finished(samples_seen)
        return is_last or self.budget.is_due(self.settings.every, samples_seen)

    def validate_if_due(
        self, position: TrainingPosition, heartbeat: Callable[[], None] = lambda: None
    ) -> ValidationResult | None:
        """Validate if it is due after a step; every rank must call it.

        Args:
            position: how far the run has come.
            heartbeat: called after every case.
        """
        if not self.is_due(position):
            return None
        step = position.step
        with self._evaluation_mode():
            rank_cases, examples = self._run_cases(heartbeat)
        cases: list[ScoredCase] = []
        for cases_of_rank in self.engine.all_gather_object(rank_cases):
            cases += cases_of_rank
        cases.sort(key=lambda case: case.case_index)
        self._fit_thresholds(step, cases)
        with self._evaluation_mode():
            rank_reports = self._write_reports(heartbeat)
        reports: list[WrittenReport] = []
        for reports_of_rank in self.engine.all_gather_object(rank_reports):
            reports += reports_of_rank
        metrics = compute_validation_metrics(
            cases, self.phase.tasks, self.config.train.loss_weights, reports
        )
        value = metrics.get(self.settings.best_metric)
        best_value = value if self._is_better(value) else None
        self._log_metrics(step, cases, metrics, is_best=best_value is not None)
        self._history.append(MetricValue(step, value))
        return ValidationResult(step, metrics, examples, best_value)

    def _fit_thresholds(self, step: int, cases: list[ScoredCase]) -> None:
        """Fit the model's thresholds to the cases, which are the same on every rank."""
        model = self.engine.model.module
        run_name = f"{self.config.name}, phase {self.phase.key}, step {step}"
        source = f"maximum F1 on {len(cases)} validation cases ({run_name})"
        model.thresholds = fit_case_thresholds(cases, model.thresholds, source)

    def _is_better(self, value: float | None) -> bool:
        """Whether a value is better than the best checkpoint's."""
        if value is None or self._best is None:
            return value is not None
        best_key = metric_sort_key(self._best.value, self.settings)
        return metric_sort_key(value, self.settings) < best_key

    def _log_metrics(
        self, step: int, cases: list[ScoredCase], metrics: dict[str, float | None], is_best: bool
    ) -> None:
        bad_case_count = sum(not case.is_finite for case in cases)
        if bad_case_count and self.engine.is_main:
            log.warning(
                "validation: figures of %d of %d cases are not finite", bad_case_count, len(cases)
            )
        best_metric = self.settings.best_metric
        if metrics.get(best_metric) is None and not self._history:
            log.warning(
                "the %d validation cases do not decide %s, so no checkpoint is the best",
                len(cases),
                best_metric,
            )
        words = []
        for name, value in metrics.items():
            words.append(f"{name} –" if value is None else f"{name} {value:.4f}")
        suffix = " (best so far)" if is_best else ""
        log.info("step %d, %d validation cases: %s%s", step, len(cases), ", ".join(words), suffix)

    def keep_best(self, result: ValidationResult) -> None:
        """Record that a validation's checkpoint, which is on disk, is the best.

        The checkpoint that was the best before may be removed.
        """
        assert result.best_value is not None
        self._best = MetricValue(result.step, result.best_value)
        if self.engine.is_main:
            run_folder.record_best_checkpoint(
                self.folder, result.step, self.settings.best_metric, result.best_value
            )
            run_folder.prune_checkpoints(self.folder, self.config.train.keep_checkpoints)

    @contextmanager
    def _evaluation_mode(self) -> Iterator[None]:
        """Use eval mode and averaged weights, without gradients.

        Afterwards modes, weights and random states are as before.
        """
        devices = [self.engine.device] if self.engine.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices), self.engine.use_ema_weights():
            self.engine.model.eval()
            yield
            set_training_modes(self.engine.model.module, self.phase.get_settings(self.config))

    def _choose_case_indices(self, limit: int) -> list[int]:
        """Numbers of at most `limit` cases, spread evenly over the split."""
        assert self.dataset is not None
        case_count = min(limit, len(self.dataset))
        return [i * len(self.dataset) // case_count for i in range(case_count)]

    def _write_reports(self, heartbeat: Callable[[], None]) -> list[WrittenReport]:
        """Write reports of this rank's share of the cases, and read what they state.

        The batches are the same on any number of ranks. Every rank runs equally many; beyond the
        end it repeats the last one, which does not count.
        """
        assert self.dataset is not None
        model = self.engine.model.module
        if not self.settings.report_cases or not model.has_generator:
            return []
        indices = self._choose_case_indices(self.settings.report_cases)
        size = self.phase.get_settings(self.config).micro_batch
        all_batches = [indices[start : start + size] for start in range(0, len(indices), size)]
        rank, world_size = self.engine.rank, self.engine.world_size
        positions = range(rank, world_size * math.ceil(len(all_batches) / world_size), world_size)
        batches = [all_batches[min(i, len(all_batches) - 1)] for i in positions]
        reports = []
        for position, loaded_batch in zip(
            positions, BatchLoader(self.dataset, batches), strict=True
        ):
            batch = loaded_batch.to(self.engine.device)
            texts = model.predict_batch(batch).reports
            if position < len(all_batches):
                reports += read_reports(all_batches[position], batch, texts)
            heartbeat()
        return reports

    def _run_cases(
        self, heartbeat: Callable[[], None]
    ) -> tuple[list[ScoredCase], list[ValidationExample]]:
        """Run this rank's cases and give those that count, and on rank 0 examples."""
        assert self.dataset is not None
        rank, world_size = self.engine.rank, self.engine.world_size
        all_indices = self._choose_case_indices(self.settings.cases)
        cases_per_rank = math.ceil(len(all_indices) / world_size)
        positions = range(rank, world_size * cases_per_rank, world_size)
        # Beyond the end, a rank repeats the last case.
        indices = [all_indices[min(i, len(all_indices) - 1)] for i in positions]
        loader = BatchLoader(self.dataset, [[index] for index in indices])
        model = self.engine.model.module
        cases, examples = [], []
        for number, (index, loaded_batch) in enumerate(zip(indices, loader, strict=True)):
            batch = self.phase.hide_outlines(loaded_batch).to(self.engine.device)
            outputs = self.engine.model(batch)
            if positions[number] < len(all_indices):
                task_losses = compute_losses(
                    outputs, batch, self.phase.tasks, self.config.train.localization_loss_weights
                )
                cases.append(score_case(index, outputs, batch, task_losses))
            if number < self.settings.shown_cases:
                reports = model.predict_batch(batch).reports if model.has_generator else None
                if self.engine.is_main:
                    examples.append(make_example(outputs, batch, reports))
            heartbeat()
        return cases, examples
