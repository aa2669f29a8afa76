"""Validation while a phase trains: the losses and metrics of some cases of the valid split, which checkpoint is the
best, and when to end early.

Every rank takes as many cases as every other, one at a time (under ZeRO-3 all must run the same forwards); where they
do not divide, a rank repeats one that does not count. So the figures do not depend on the number of ranks. The weights
are the moving averages where the phase keeps some.

What validation concluded is a function of `validation.jsonl` alone, of which a resumed run drops what lies ahead of it,
and nothing that training draws depends on it: a run with validation has the losses of a run without.
"""

import contextlib
import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from rectvlm.checkpoint import run_folder
from rectvlm.config import Config, PhaseConfig, ValidationConfig
from rectvlm.data.dataset import ShardDataset
from rectvlm.data.loader import BatchLoader
from rectvlm.labels import N_FINDINGS
from rectvlm.lesion_bits import pack_lesions
from rectvlm.models import ModelOutputs
from rectvlm.train.engine.engine import Engine
from rectvlm.train.objectives import compute_losses
from rectvlm.train.optimizer import set_training_modes
from rectvlm.train.phases import Phase
from rectvlm.train.recovery.bad_steps import finite_or_none
from rectvlm.types import Batch

log = logging.getLogger(__name__)

VALIDATION_FILE = "validation.jsonl"


class ValidationExample(NamedTuple):
    """One case to look at. Volumes are on the model's grid, canonical."""

    key: str
    ct: NDArray[np.int16]
    """(Z, Y, X), HU."""
    spacing_mm: tuple[float, float, float]
    """(z, y, x), mm."""
    labels: NDArray[np.float32]
    """(18,), NaN where unknown."""
    finding_probabilities: NDArray[np.float32]
    """(18,), probabilities."""
    lesions_annotated: NDArray[np.bool_]
    """(5,), whether a lesion was looked for."""
    true_lesions: NDArray[np.uint8]
    """(Z, Y, X), lesion bits."""
    predicted_lesions: NDArray[np.uint8] | None
    """(Z, Y, X), lesion bits; None without a localizer."""
    true_report: str | None
    predicted_report: str | None
    """None without a generator."""


@dataclass(frozen=True)
class ValidationResult:
    """What a validation found; the same on every rank but for the samples."""

    step: int
    metrics: dict[str, float | None]
    """By name (`rectvlm.config.Metric`); None where the cases do not decide it."""
    examples: list[ValidationExample]
    """On the first rank; empty elsewhere."""
    best_value: float | None
    """The value of the metric that decides, if it is better than that of every checkpoint."""


class _ScoredCase(NamedTuple):
    """A case: what the model said, and the truth."""

    case_index: int
    losses: dict[str, float | None]
    probabilities: NDArray[np.float32]
    labels: NDArray[np.float32]
    labels_known: NDArray[np.bool_]
    overlap_counts: NDArray[np.int64] | None
    lesions_annotated: NDArray[np.bool_]

    @property
    def is_finite(self) -> bool:
        """Whether the model gave numbers."""
        known = [value for value in self.losses.values() if value is not None]
        return bool(np.isfinite(known).all() and np.isfinite(self.probabilities).all())


class Validator:
    """Validates when it is time, and remembers which checkpoint is the best."""

    def __init__(
        self, engine: Engine, phase: Phase, config: Config, folder: Path, step: int
    ) -> None:
        """Go on after `step`; every rank must call it before any line of the folder's files is dropped.

        Raises:
            UserError: validation is asked for and the shards hold no valid split.
        """
        self.engine, self.phase, self.config, self.folder = engine, phase, config, folder
        self.phase_settings: PhaseConfig = phase.get_settings(config)
        self.settings: ValidationConfig = self.phase_settings.validation
        self.dataset = ShardDataset(config.data, "valid") if self.settings.every else None
        self._values = [
            (done, value) for done, value in _read_history(folder, self.settings) if done <= step
        ]
        kept = [
            (done, value)
            for done, value in self._values
            if value is not None and run_folder.is_checkpoint(run_folder.step_folder(folder, done))
        ]
        # The first of equals, as in a run that was not broken.
        self._best = min(kept, key=lambda pair: (self._sort_key(pair[1]), pair[0]), default=None)
        engine.barrier()
        if engine.is_main and self.dataset is not None:
            chosen = self._best or (None, None)
            run_folder.record_best_checkpoint(
                folder, chosen[0], self.settings.best_metric, chosen[1]
            )

    def _sort_key(self, value: float) -> float:
        """Smaller is better."""
        return _sort_key(value, self.settings)

    @property
    def should_stop(self) -> bool:
        """Whether patience has run out."""
        return _is_patience_exhausted([value for _, value in self._values], self.settings)

    def is_due(self, step: int) -> bool:
        """Whether a step is followed by a validation that has not been done."""
        if self.dataset is None or step == 0 or any(done == step for done, _ in self._values):
            return False
        return step % self.settings.every == 0 or step == self.phase_settings.steps

    def validate_if_due(
        self, step: int, heartbeat: Callable[[], None] = lambda: None
    ) -> ValidationResult | None:
        """Validate if it is time after a step; every rank must call it. `beat` is called after every case."""
        if not self.is_due(step):
            return None
        with self._evaluation_mode():
            rows, samples = self._run_cases(heartbeat)
        every = sorted(
            (row for part in self.engine.all_gather_object(rows) for row in part),
            key=lambda row: row.case_index,
        )
        metrics = self._compute_metrics(every)
        value = metrics.get(self.settings.best_metric)
        if value is None and not self._values:
            log.warning(
                "the %d validation cases do not decide %s, so no checkpoint is the best",
                len(every),
                self.settings.best_metric,
            )
        self._values.append((step, value))
        best = value is not None and (
            self._best is None or self._sort_key(value) < self._sort_key(self._best[1])
        )
        told = ", ".join(
            f"{name} {'–' if v is None else f'{v:.4f}'}" for name, v in metrics.items()
        )
        log.info(
            "step %d, %d validation cases: %s%s",
            step,
            len(every),
            told,
            " (best so far)" if best else "",
        )
        return ValidationResult(step, metrics, samples, value if best else None)

    def keep_best(self, found: ValidationResult) -> None:
        """A validation's checkpoint, which is on the disk, is the best; the one that was may go."""
        assert found.best_value is not None
        self._best = (found.step, found.best_value)
        if self.engine.is_main:
            run_folder.record_best_checkpoint(
                self.folder, found.step, self.settings.best_metric, found.best_value
            )
            run_folder.prune_checkpoints(self.folder, self.config.train.keep_checkpoints)

    @contextlib.contextmanager
    def _evaluation_mode(self) -> Iterator[None]:
        """Eval mode, averaged weights, no gradients; modes, weights and random states are as before afterwards."""
        module = self.engine.model.module
        devices = [self.engine.device] if self.engine.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices), self.engine.use_ema_weights():
            self.engine.model.eval()
            yield
            set_training_modes(module, self.phase_settings)

    def _choose_case_indices(self) -> list[int]:
        """Numbers of the cases that count, spread evenly over the split."""
        assert self.dataset is not None
        n = min(self.settings.cases, len(self.dataset))
        return [i * len(self.dataset) // n for i in range(n)]

    def _run_cases(
        self, beat: Callable[[], None]
    ) -> tuple[list[_ScoredCase], list[ValidationExample]]:
        assert self.dataset is not None
        rank, world = self.engine.rank, self.engine.world_size
        places = self._choose_case_indices()
        mine = [
            places[min(i, len(places) - 1)]
            for i in range(rank, world * math.ceil(len(places) / world), world)
        ]
        module = self.engine.model.module
        rows, samples = [], []
        for number, batch in enumerate(BatchLoader(self.dataset, [[place] for place in mine])):
            torch.manual_seed(
                self.config.train.seed + mine[number]
            )  # which cues are true does not depend on the ranks
            batch = batch.to(self.engine.device)
            outputs = self.engine.model(batch)
            if rank + number * world < len(places):
                rows.append(self._score_case(mine[number], outputs, batch))
            if number < self.settings.shown_cases:
                written = module.predict_batch(batch).reports if module.has_generator else None
                if self.engine.is_main:
                    samples.append(_make_example(outputs, batch, written))
            beat()
        return rows, samples

    def _score_case(self, place: int, outputs: ModelOutputs, batch: Batch) -> _ScoredCase:
        # Imported here: scikit-learn takes a second that a run without validation need not spend.
        from rectvlm.metrics.lesion_overlap import count_lesion_voxels

        found = compute_losses(
            outputs, batch, self.phase.tasks, self.config.train.localization_loss_weights
        )
        counts = None
        if outputs.localization is not None:
            marked = (outputs.localization.mask_logits[0] >= 0).cpu().numpy()
            counts = count_lesion_voxels(marked, batch.lesions[0].cpu().numpy())
        return _ScoredCase(
            place,
            {task: loss.value.item() if loss.count > 0 else None for task, loss in found.items()},
            outputs.finding_logits[0].float().sigmoid().cpu().numpy(),
            batch.labels[0].cpu().numpy(),
            batch.labels_known[0].cpu().numpy(),
            counts,
            batch.lesions_annotated[0].cpu().numpy(),
        )

    def _compute_metrics(self, rows: list[_ScoredCase]) -> dict[str, float | None]:
        from rectvlm.metrics.findings import score_findings
        from rectvlm.metrics.lesion_overlap import score_lesion_overlap

        weights = self.config.train.loss_weights
        spoilt = [row.case_index for row in rows if not row.is_finite]
        if spoilt and self.engine.is_main:
            log.warning(
                "validation: figures of %d of %d cases are not finite", len(spoilt), len(rows)
            )
        if spoilt:  # the other cases' mean would look better than the model is
            names = [
                "loss",
                *(f"loss_{task}" for task in self.phase.tasks),
                "macro_auroc",
                "macro_average_precision",
            ]
            return dict.fromkeys(
                [*names, "mean_dice"] if rows[0].overlap_counts is not None else names
            )
        by_task = {
            task: _mean_of_known([row.losses[task] for row in rows]) for task in self.phase.tasks
        }
        known = [
            getattr(weights, task) * value for task, value in by_task.items() if value is not None
        ]
        found: dict[str, float | None] = {"loss": sum(known) if known else None}
        found |= {f"loss_{task}": value for task, value in by_task.items()}
        probabilities, labels, flags = (
            np.stack(parts) for parts in list(zip(*rows, strict=True))[2:5]
        )
        scores = score_findings(probabilities, labels, flags, np.full(N_FINDINGS, 0.5))["macro"]
        found |= {
            "macro_auroc": scores["auroc"],
            "macro_average_precision": scores["average_precision"],
        }
        if rows[0].overlap_counts is not None:
            counts = np.stack(
                [row.overlap_counts for row in rows if row.overlap_counts is not None]
            )
            outlined = score_lesion_overlap(
                counts, np.stack([row.lesions_annotated for row in rows])
            )
            found["mean_dice"] = outlined["macro"]["dice"]
        return found


def has_stopped_early(folder: Path, settings: ValidationConfig) -> bool:
    """Whether the run in a phase's folder ended early."""
    return _is_patience_exhausted([value for _, value in _read_history(folder, settings)], settings)


def _is_patience_exhausted(values: list[float | None], settings: ValidationConfig) -> bool:
    if not (settings.every and settings.patience):
        return False
    best, waited = math.inf, 0
    for value in values:
        order = math.inf if value is None else _sort_key(value, settings)
        best, waited = (order, 0) if order < best else (best, waited + 1)
    return waited >= settings.patience


def _sort_key(value: float, settings: ValidationConfig) -> float:
    """Smaller is better: a loss as it is, anything else turned round."""
    return value if settings.best_metric.startswith("loss") else -value


def _read_history(folder: Path, settings: ValidationConfig) -> list[tuple[int, float | None]]:
    """Steps of a run's validations and the values of the metric that decides."""
    path = folder / VALIDATION_FILE
    found = []
    for text in path.read_text().splitlines() if path.is_file() and settings.every else []:
        with contextlib.suppress(json.JSONDecodeError):  # the last line may be cut off by a kill
            line = json.loads(text)
            found.append(
                (int(line["step"]), finite_or_none(line["metrics"].get(settings.best_metric)))
            )
    return found


def _mean_of_known(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _make_example(
    outputs: ModelOutputs, batch: Batch, written: list[str] | None
) -> ValidationExample:
    found: Any = None
    if outputs.localization is not None:
        marked = outputs.localization.mask_logits[0] >= 0
        found = pack_lesions(marked).cpu().numpy()
    labels = torch.where(batch.labels_known[0], batch.labels[0], torch.nan)
    return ValidationExample(
        batch.keys[0],
        batch.ct[0].cpu().numpy(),
        batch.spacing,
        labels.cpu().numpy(),
        outputs.finding_logits[0].float().sigmoid().cpu().numpy(),
        batch.lesions_annotated[0].cpu().numpy(),
        batch.lesions[0].cpu().numpy(),
        found,
        batch.reports[0],
        None if written is None else written[0],
    )
