"""Evaluation of a checkpoint on shards: findings, lesions and reports, with n, thresholds and the machine in the JSON.

Command: `rectvlm evaluate --checkpoint runs/demo/phase3`
"""

import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from rectvlm import checkpoint as checkpoints
from rectvlm import metrics, weights
from rectvlm.checkpoint import THRESHOLDS
from rectvlm.config import Config, DataConfig
from rectvlm.data.loader import eval_loader
from rectvlm.data.shards import read_index
from rectvlm.data.store import atomic_file
from rectvlm.models import RectVLM
from rectvlm.types import Batch, Split, UserError

log = logging.getLogger(__name__)

MOST_FITTED = 64
"""Training cases that thresholds are fitted on."""
LESION_THRESHOLD = 0.5
LOG_EVERY = 10.0
"""Seconds between two lines of progress."""
METRICS = ("numpy", "scikit-learn", "sacrebleu", "rouge-score", "bert-score")
"""Packages that decide a figure, beside those that decide what a model says."""


@dataclass
class _Run:
    """What the model said of a split. N cases."""

    keys: list[str]
    probabilities: NDArray[np.float64]
    """(N, 18)."""
    labels: NDArray[np.float64]
    """(N, 18)."""
    known: NDArray[np.bool_]
    """(N, 18)."""
    counts: NDArray[np.int64]
    """(N, 5, 3)."""
    annotated: NDArray[np.bool_]
    """(N, 5)."""
    references: list[str | None]
    generated: list[str]
    """Empty when no reports were asked for."""
    without_image: list[str]
    """The same, from a volume of air."""


def evaluate(
    checkpoint: str | Path,
    shards: str | Path | None = None,
    split: Split = "valid",
    out: str | Path | None = None,
    *,
    reports: bool = True,
    report_limit: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    device: str | None = None,
) -> dict[str, Any]:
    """Evaluate a checkpoint on a split, write the metrics as JSON and the reports beside it, and return the metrics.

    Thresholds of the findings are fitted on at most 64 cases of the train split, never on the evaluated one, and kept
    in the checkpoint's folder for prediction. Reports are generated twice, the second time from a volume of air: what
    the control scores was not read from the image.

    Args:
        checkpoint: a run's phase folder, or one checkpoint in it.
        shards: folder of shards; by default the one that the checkpoint's configuration names.
        split: `valid` or `train`.
        out: the JSON; by default `evaluation-SPLIT/metrics.json` in the checkpoint's folder.
        reports: generate reports, if the model can.
        report_limit: generate reports for the first cases only; the metrics say for how many.
        limit: evaluate the first cases only.
        batch_size: cases at once.
        device: by default the GPU if there is one.

    Raises:
        UserError: no such checkpoint or shards, shards of another grid, or no sample of the split.
    """
    started = time.monotonic()
    folder = checkpoints.find(checkpoint, "train first, or give a run's phase folder")
    model, config = checkpoints.load_model(folder, device)
    data = config.data if shards is None else config.data.model_copy(update={"shards": str(shards)})
    write_reports = reports and model.has_generator
    written = (limit if report_limit is None else report_limit) if write_reports else 0
    run = _run(model, data, split, batch_size, limit, written)
    thresholds = _fit(model, data, batch_size)
    target = output_path(folder, split, out)
    result = {
        "checkpoint": str(folder),
        "config": config.name,
        "step": checkpoints.read_state(folder).step,
        "shards": data.shards,
        "split": split,
        "n_cases": len(run.keys),
        "limit": limit,
        "classification": metrics.classification(run.probabilities, run.labels, run.known, thresholds.values),
        "thresholds": thresholds.as_dict() | {"same_data": split == "train"},
        "localization": _localization(model, run),
        "reports": _reports(run, config) if write_reports else None,
        "machine": machine(),
        "device": str(next(model.parameters()).device),
        "versions": checkpoints.versions(*METRICS),
        "seconds": round(time.monotonic() - started, 1),
    }
    _write_json(folder / THRESHOLDS, thresholds.as_dict())
    if write_reports:
        _write_reports(target.with_name("reports.jsonl"), run)
    _write_json(target, result)
    return result


def output_path(checkpoint: str | Path, split: Split, out: str | Path | None) -> Path:
    """Where `evaluate` writes the metrics: `out`, or `evaluation-SPLIT/metrics.json` in the checkpoint's folder."""
    if out is not None:
        return Path(out)
    return checkpoints.find(checkpoint, "train first") / f"evaluation-{split}" / "metrics.json"


def read_thresholds(folder: Path) -> dict[str, float] | None:
    """Fitted thresholds of a checkpoint by finding, or None when it was never evaluated.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / THRESHOLDS
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text())["values"]
        return {str(name): float(value) for name, value in values.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged: run `rectvlm evaluate` again, or delete it.") from None


def machine() -> dict[str, Any]:
    """The machine that a figure was measured on."""
    names = {line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": ", ".join(sorted(names)) or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": gpus,
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def _fit(model: RectVLM, data: DataConfig, batch_size: int) -> metrics.Thresholds:
    if not read_index(Path(data.shards)).select("train"):
        return metrics.Thresholds.unfitted("0.5 for every finding: the shards hold no train split")
    fitting = _run(model, data, "train", batch_size, MOST_FITTED, written=0, localize=False)
    source = f"maximum F1 on the first {len(fitting.keys)} cases of the train split of {data.shards}"
    return metrics.fit_thresholds(fitting.probabilities, fitting.labels, fitting.known, source)


def _run(
    model: RectVLM,
    data: DataConfig,
    split: Split,
    batch_size: int,
    limit: int | None,
    written: int | None,
    localize: bool = True,
) -> _Run:
    """Predictions beside the truth; reports for the first `written` cases (all when None), batch by batch."""
    device = next(model.parameters()).device
    keys: list[str] = []
    references: list[str | None] = []
    generated: list[str] = []
    without_image: list[str] = []
    arrays: list[tuple[NDArray[Any], ...]] = []
    told = time.monotonic()
    for batch in _first(eval_loader(data, split, batch_size), limit):
        on_device = batch.to(device)
        generate = written is None or len(generated) < written
        prediction = model.predict(on_device, generate=generate, localize=localize)
        if generate:
            control = model.predict(on_device, generate=True, ablate_image=True)
            assert prediction.reports is not None and control.reports is not None
            generated += prediction.reports
            without_image += control.reports
        found = (prediction.lesions >= LESION_THRESHOLD).cpu().numpy()
        overlap = [metrics.lesion_counts(*pair) for pair in zip(found, batch.lesions.numpy(), strict=True)]
        truth = (batch.labels.numpy(), batch.labels_known.numpy())
        flags = batch.lesions_annotated.numpy()
        arrays.append((prediction.findings.cpu().numpy(), *truth, np.stack(overlap), flags))
        keys += batch.keys
        references += batch.reports
        if time.monotonic() - told > LOG_EVERY:
            log.info("%s: %d cases so far", split, len(keys))
            told = time.monotonic()
    log.info("%s: %d cases", split, len(keys))
    probabilities, labels, known, counts, annotated = (np.concatenate(parts) for parts in zip(*arrays, strict=True))
    return _Run(keys, probabilities, labels, known, counts, annotated, references, generated, without_image)


def _first(batches: Any, limit: int | None) -> Iterator[Batch]:
    """Batches until `limit` cases; the last one is cut."""
    left = limit
    for batch in batches:
        if left is None:
            yield batch
            continue
        if left <= 0:
            return
        yield batch if len(batch.keys) <= left else _cut(batch, left)
        left -= len(batch.keys)


def _cut(batch: Batch, n: int) -> Batch:
    """The first n cases of a batch; `spacing` belongs to all of them."""
    parts = {f.name: getattr(batch, f.name)[:n] for f in fields(batch) if f.name != "spacing"}
    return replace(batch, **parts)


def _localization(model: RectVLM, run: _Run) -> dict[str, Any] | None:
    if model.localizer is None:
        return None
    return metrics.localization(run.counts, run.annotated) | {"threshold": LESION_THRESHOLD, "grid": "the model's"}


def _reports(run: _Run, config: Config) -> dict[str, Any]:
    references = run.references[: len(run.generated)]
    encoder: str | None = None
    try:
        encoder = weights.resolve(config.text.model)
    except UserError as error:
        log.warning("BERTScore is left out: %s", error)
    return {
        "image": metrics.reports(run.generated, references, encoder),
        "image_ablated": metrics.reports(run.without_image, references, encoder),
    }


def _write_reports(path: Path, run: _Run) -> None:
    with atomic_file(path) as file:
        n = len(run.generated)
        for key, reference, text, control in zip(
            run.keys[:n], run.references[:n], run.generated, run.without_image, strict=True
        ):
            row = {"key": key, "reference": reference, "generated": text, "generated_without_image": control}
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    with atomic_file(path) as file:
        file.write((json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())
