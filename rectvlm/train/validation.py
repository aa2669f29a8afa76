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

from rectvlm import checkpoint
from rectvlm.config import Config, PhaseConfig, ValidationConfig
from rectvlm.data.loader import Loader, ShardDataset
from rectvlm.labels import N_FINDINGS, N_LESIONS
from rectvlm.models import Outputs
from rectvlm.train.engine import Engine
from rectvlm.train.guard import finite
from rectvlm.train.objectives import losses
from rectvlm.train.optim import set_modes
from rectvlm.train.phases import Phase
from rectvlm.types import Batch

log = logging.getLogger(__name__)

FILE = "validation.jsonl"


class ValidationSample(NamedTuple):
    """One case to look at. Volumes are on the model's grid, canonical."""

    key: str
    ct: NDArray[np.int16]
    """(Z, Y, X), HU."""
    spacing: tuple[float, float, float]
    """(z, y, x), mm."""
    labels: NDArray[np.float32]
    """(18,), NaN where unknown."""
    findings: NDArray[np.float32]
    """(18,), probabilities."""
    annotated: NDArray[np.bool_]
    """(5,), whether a lesion was looked for."""
    lesions_true: NDArray[np.uint8]
    """(Z, Y, X), lesion bits."""
    lesions_found: NDArray[np.uint8] | None
    """(Z, Y, X), lesion bits; None without a localizer."""
    report_true: str | None
    report_found: str | None
    """None without a generator."""


@dataclass(frozen=True)
class Validation:
    """What a validation found; the same on every rank but for the samples."""

    step: int
    metrics: dict[str, float | None]
    """By name (`rectvlm.config.Metric`); None where the cases do not decide it."""
    samples: list[ValidationSample]
    """On the first rank; empty elsewhere."""
    best: float | None
    """The value of the metric that decides, if it is better than that of every checkpoint."""


class _Row(NamedTuple):
    """A case: what the model said, and the truth."""

    place: int
    losses: dict[str, float | None]
    probabilities: NDArray[np.float32]
    labels: NDArray[np.float32]
    known: NDArray[np.bool_]
    counts: NDArray[np.int64] | None
    annotated: NDArray[np.bool_]

    @property
    def is_finite(self) -> bool:
        """Whether the model gave numbers."""
        known = [value for value in self.losses.values() if value is not None]
        return bool(np.isfinite(known).all() and np.isfinite(self.probabilities).all())


class Validator:
    """Validates when it is time, and remembers which checkpoint is the best."""

    def __init__(self, engine: Engine, phase: Phase, config: Config, folder: Path, step: int) -> None:
        """Go on after `step`; every rank must call it before any line of the folder's files is dropped.

        Raises:
            UserError: validation is asked for and the shards hold no valid split.
        """
        self.engine, self.phase, self.config, self.folder = engine, phase, config, folder
        self.phase_settings: PhaseConfig = phase.settings(config)
        self.settings: ValidationConfig = self.phase_settings.validation
        self.dataset = ShardDataset(config.data, "valid") if self.settings.every else None
        self._values = [(done, value) for done, value in _history(folder, self.settings) if done <= step]
        kept = [
            (done, value)
            for done, value in self._values
            if value is not None and (checkpoint.step_folder(folder, done) / checkpoint.STATE).is_file()
        ]
        # The first of equals, as in a run that was not broken.
        self._best = min(kept, key=lambda pair: (self._order(pair[1]), pair[0]), default=None)
        engine.barrier()
        if engine.is_main and self.dataset is not None:
            chosen = self._best or (None, None)
            checkpoint.note_best(folder, chosen[0], self.settings.best, chosen[1])

    def _order(self, value: float) -> float:
        """Smaller is better."""
        return _order(value, self.settings)

    @property
    def stopped(self) -> bool:
        """Whether patience has run out."""
        return _patience_is_out([value for _, value in self._values], self.settings)

    def is_due(self, step: int) -> bool:
        """Whether a step is followed by a validation that has not been done."""
        if self.dataset is None or step == 0 or any(done == step for done, _ in self._values):
            return False
        return step % self.settings.every == 0 or step == self.phase_settings.steps

    def after(self, step: int, beat: Callable[[], None] = lambda: None) -> Validation | None:
        """Validate if it is time after a step; every rank must call it. `beat` is called after every case."""
        if not self.is_due(step):
            return None
        with self._undisturbed():
            rows, samples = self._run(beat)
        every = sorted((row for part in self.engine.everyone(rows) for row in part), key=lambda row: row.place)
        metrics = self._metrics(every)
        value = metrics.get(self.settings.best)
        if value is None and not self._values:
            log.warning(
                "the %d validation cases do not decide %s, so no checkpoint is the best", len(every), self.settings.best
            )
        self._values.append((step, value))
        best = value is not None and (self._best is None or self._order(value) < self._order(self._best[1]))
        told = ", ".join(f"{name} {'–' if v is None else f'{v:.4f}'}" for name, v in metrics.items())
        log.info("step %d, %d validation cases: %s%s", step, len(every), told, " (best so far)" if best else "")
        return Validation(step, metrics, samples, value if best else None)

    def keep(self, found: Validation) -> None:
        """A validation's checkpoint, which is on the disk, is the best; the one that was may go."""
        assert found.best is not None
        self._best = (found.step, found.best)
        if self.engine.is_main:
            checkpoint.note_best(self.folder, found.step, self.settings.best, found.best)
            checkpoint.prune(self.folder, self.config.train.keep)

    @contextlib.contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Eval mode, averaged weights, no gradients; modes, weights and random states are as before afterwards."""
        module = self.engine.model.module
        devices = [self.engine.device] if self.engine.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices), self.engine.averaged():
            self.engine.model.eval()
            yield
            set_modes(module, self.phase_settings)

    def _places(self) -> list[int]:
        """Numbers of the cases that count, spread evenly over the split."""
        assert self.dataset is not None
        n = min(self.settings.cases, len(self.dataset))
        return [i * len(self.dataset) // n for i in range(n)]

    def _run(self, beat: Callable[[], None]) -> tuple[list[_Row], list[ValidationSample]]:
        assert self.dataset is not None
        rank, world = self.engine.rank, self.engine.world
        places = self._places()
        mine = [places[min(i, len(places) - 1)] for i in range(rank, world * math.ceil(len(places) / world), world)]
        module = self.engine.model.module
        rows, samples = [], []
        for number, batch in enumerate(Loader(self.dataset, [[place] for place in mine])):
            torch.manual_seed(self.config.train.seed + mine[number])  # which cues are true does not depend on the ranks
            batch = batch.to(self.engine.device)
            outputs = self.engine.model(batch)
            if rank + number * world < len(places):
                rows.append(self._row(mine[number], outputs, batch))
            if number < self.settings.samples:
                written = module.predict(batch).reports if module.has_generator else None
                if self.engine.is_main:
                    samples.append(_sample(outputs, batch, written))
            beat()
        return rows, samples

    def _row(self, place: int, outputs: Outputs, batch: Batch) -> _Row:
        # Imported here: scikit-learn takes a second that a run without validation need not spend.
        from rectvlm.metrics import lesion_counts

        found = losses(outputs, batch, self.phase.tasks, self.config.train.localization)
        counts = None
        if outputs.localization is not None:
            marked = (outputs.localization.masks[0] >= 0).cpu().numpy()
            counts = lesion_counts(marked, batch.lesions[0].cpu().numpy())
        return _Row(
            place,
            {task: loss.value.item() if loss.count > 0 else None for task, loss in found.items()},
            outputs.findings[0].float().sigmoid().cpu().numpy(),
            batch.labels[0].cpu().numpy(),
            batch.labels_known[0].cpu().numpy(),
            counts,
            batch.lesions_annotated[0].cpu().numpy(),
        )

    def _metrics(self, rows: list[_Row]) -> dict[str, float | None]:
        from rectvlm import metrics

        weights = self.config.train.losses
        spoilt = [row.place for row in rows if not row.is_finite]
        if spoilt and self.engine.is_main:
            log.warning("validation: figures of %d of %d cases are not finite", len(spoilt), len(rows))
        if spoilt:  # the other cases' mean would look better than the model is
            names = ["loss", *(f"loss_{task}" for task in self.phase.tasks), "macro_auroc", "macro_average_precision"]
            return dict.fromkeys([*names, "mean_dice"] if rows[0].counts is not None else names)
        by_task = {task: _mean([row.losses[task] for row in rows]) for task in self.phase.tasks}
        known = [getattr(weights, task) * value for task, value in by_task.items() if value is not None]
        found: dict[str, float | None] = {"loss": sum(known) if known else None}
        found |= {f"loss_{task}": value for task, value in by_task.items()}
        probabilities, labels, flags = (np.stack(parts) for parts in list(zip(*rows, strict=True))[2:5])
        scores = metrics.classification(probabilities, labels, flags, np.full(N_FINDINGS, 0.5))["macro"]
        found |= {"macro_auroc": scores["auroc"], "macro_average_precision": scores["average_precision"]}
        if rows[0].counts is not None:
            counts = np.stack([row.counts for row in rows if row.counts is not None])
            outlined = metrics.localization(counts, np.stack([row.annotated for row in rows]))
            found["mean_dice"] = outlined["macro"]["dice"]
        return found


def has_stopped(folder: Path, settings: ValidationConfig) -> bool:
    """Whether the run in a phase's folder ended early."""
    return _patience_is_out([value for _, value in _history(folder, settings)], settings)


def _patience_is_out(values: list[float | None], settings: ValidationConfig) -> bool:
    if not (settings.every and settings.patience):
        return False
    best, waited = math.inf, 0
    for value in values:
        order = math.inf if value is None else _order(value, settings)
        best, waited = (order, 0) if order < best else (best, waited + 1)
    return waited >= settings.patience


def _order(value: float, settings: ValidationConfig) -> float:
    """Smaller is better: a loss as it is, anything else turned round."""
    return value if settings.best.startswith("loss") else -value


def _history(folder: Path, settings: ValidationConfig) -> list[tuple[int, float | None]]:
    """Steps of a run's validations and the values of the metric that decides."""
    path = folder / FILE
    found = []
    for text in path.read_text().splitlines() if path.is_file() and settings.every else []:
        with contextlib.suppress(json.JSONDecodeError):  # the last line may be cut off by a kill
            line = json.loads(text)
            found.append((int(line["step"]), finite(line["metrics"].get(settings.best))))
    return found


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _sample(outputs: Outputs, batch: Batch, written: list[str] | None) -> ValidationSample:
    found: Any = None
    if outputs.localization is not None:
        marked = outputs.localization.masks[0] >= 0
        bits = torch.arange(N_LESIONS, device=marked.device, dtype=torch.uint8)
        found = (marked.to(torch.uint8) << bits[:, None, None, None]).sum(0, dtype=torch.uint8).cpu().numpy()
    labels = torch.where(batch.labels_known[0], batch.labels[0], torch.nan)
    return ValidationSample(
        batch.keys[0],
        batch.ct[0].cpu().numpy(),
        batch.spacing,
        labels.cpu().numpy(),
        outputs.findings[0].float().sigmoid().cpu().numpy(),
        batch.lesions_annotated[0].cpu().numpy(),
        batch.lesions[0].cpu().numpy(),
        found,
        batch.reports[0],
        None if written is None else written[0],
    )
