"""Evaluation of a checkpoint on shards: findings, lesions and reports, with intervals, n, thresholds and the machine.

Command: `rectvlm evaluate --checkpoint runs/demo/phase3`, on several processes with
`accelerate launch --num_processes 2 -m rectvlm evaluate …` or `torchrun --nproc-per-node 2 -m rectvlm evaluate …`.
"""

import itertools
import json
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rectvlm.checkpoint import Checkpoint, find_checkpoint
from rectvlm.config import Config, DataConfig
from rectvlm.data.loader import BatchLoader, ShardDataset
from rectvlm.data.shards import read_index
from rectvlm.data.store import ShardStore, atomic_file
from rectvlm.evaluate import summary, tables
from rectvlm.evaluate.case_records import (
    CasePurpose,
    CaseRecord,
    evaluate_batch,
    require_truth_folder,
)
from rectvlm.evaluate.journal import EvaluationJournal
from rectvlm.evaluate.options import EvaluationOptions, compute_fingerprint
from rectvlm.evaluate.process_ranks import ProcessRanks, read_ranks_from_environment
from rectvlm.evaluate.region_maps import RegionMapUsage
from rectvlm.evaluate.report_figures import evaluate_reports as compare_reports
from rectvlm.evaluate.scans import ScanResults, group_by_scan
from rectvlm.evaluate.selection import are_same_shards, was_selected_on
from rectvlm.evaluate.thresholds import choose_thresholds
from rectvlm.machine import describe_machine, package_versions
from rectvlm.metrics import FindingThresholds
from rectvlm.metrics.report_labeler.labeler import ReportLabeler, load_labeler
from rectvlm.models import RectVLM
from rectvlm.types import Split

log = logging.getLogger(__name__)

LOG_INTERVAL_SECONDS = 10.0
"""Seconds between two lines of progress."""
METRIC_PACKAGES = (
    "numpy",
    "scipy",
    "scikit-learn",
    "monai",
    "sacrebleu",
    "rouge-score",
    "bert-score",
)
"""Packages that decide a figure, beside those that decide what a model says."""
CASES_FILE, REPORTS_FILE, TABLE_FILE = "cases.jsonl", "reports.jsonl", "metrics.md"


@dataclass(frozen=True)
class PlannedBatch:
    """Cases that are predicted together: the same ones on any number of processes, since numbers depend on it."""

    purpose: CasePurpose
    positions: list[int]


def evaluate_checkpoint(
    checkpoint: str | Path,
    shards: str | Path | None = None,
    split: Split = "valid",
    out: str | Path | None = None,
    *,
    device: str | None = None,
    **options: Any,
) -> dict[str, Any] | None:
    """Evaluate a checkpoint on a split, write metrics, tables and plots, and return the metrics.

    Thresholds of the findings are fitted on the train split, never on the evaluated cases, and kept in the checkpoint's
    folder for prediction. Reports are generated twice, the second time from a volume of air: what the control scores
    was not read from the image.

    What is found of a case is kept beside the metrics as soon as it is known. The same call goes on after a kill, and
    only makes the figures anew where all is there. Several processes (RANK and WORLD_SIZE in the environment) share
    the cases; the first one waits for the others and writes.

    Args:
        checkpoint: a run's phase folder, or one checkpoint in it.
        shards: folder or URL of shards; by default the one that the checkpoint's configuration names.
        split: `valid` or `train`.
        out: the JSON; by default `evaluation-SPLIT/metrics.json` in the checkpoint's folder. The rest lies beside it.
        device: by default a GPU for each process if there is one.
        options: fields of `Options`.

    Returns:
        The metrics, as in the JSON; None on all processes but the first.

    Raises:
        UserError: no such checkpoint or shards, shards of another grid, no sample of the split, a labeler that does
            not load, or a process that has stopped.
    """
    started = time.monotonic()
    ranks = read_ranks_from_environment()
    asked = EvaluationOptions(split=split, **options)
    require_truth_folder(asked.truth)
    folder = find_checkpoint(checkpoint, "train first, or give a run's phase folder")
    target = output_path(folder, split, out)
    work = _EvaluationRun(folder, shards, asked, ranks, ranks.choose_device(device), target.parent)
    # Before the hours of prediction, since it may not load.
    labeler = load_labeler(asked.labeler) if ranks.is_main and work.has_reports else None
    work.predict_missing_cases()
    if not ranks.is_main:
        return None
    found = work.journal.wait_for_records(
        [(unit.purpose, position) for unit in work.units for position in unit.positions]
    )
    records = {purpose: work.select_records(found, purpose) for purpose in ("evaluate", "fit")}
    scans = group_by_scan(records["evaluate"])
    stored_alone = asked.thresholds == "stored"
    thresholds = choose_thresholds(
        folder,
        records["fit"],
        work.data.shards,
        stored_alone,
        bool(work.has_training_shards),
        asked.hide_regions,
    )
    facts = {
        "machine": describe_machine(),
        "device": work.device,
        "processes": ranks.world_size,
        "versions": package_versions(*METRIC_PACKAGES),
        "seconds": 0.0,
    }
    result = _compute_metrics(work, scans, thresholds, labeler) | facts
    result["seconds"] = round(time.monotonic() - started, 1)
    _write_results(target, result, records["evaluate"], scans, asked)
    return result


def output_path(checkpoint: str | Path, split: Split, out: str | Path | None) -> Path:
    """Where `evaluate` writes the metrics: `out`, or `evaluation-SPLIT/metrics.json` in the checkpoint's folder."""
    if out is not None:
        return Path(out)
    return find_checkpoint(checkpoint, "train first") / f"evaluation-{split}" / "metrics.json"


class _EvaluationRun:
    """The cases of an evaluation, which of them are this process's, and what is known of them."""

    def __init__(
        self,
        folder: Path,
        shards: str | Path | None,
        options: EvaluationOptions,
        ranks: ProcessRanks,
        device: str,
        out: Path,
    ) -> None:
        self.folder, self.options, self.ranks, self.device = folder, options, ranks, device
        self.checkpoint = Checkpoint.open(folder)
        self.config: Config = self.checkpoint.config
        self.state = self.checkpoint.training
        chosen = {} if shards is None else {"shards": str(shards)}
        self.data: DataConfig = self.config.data.model_copy(update=chosen)
        self.datasets: dict[CasePurpose, ShardDataset] = {
            "evaluate": ShardDataset(self.data, options.split)
        }
        if options.thresholds == "fit" and read_index(self.data.shards).select_split("train"):
            self.datasets["fit"] = ShardDataset(self.data, "train")
        limits = {"evaluate": options.limit, "fit": options.fit_limit}
        self.units = [
            PlannedBatch(purpose, list(range(start, min(start + options.batch_size, count))))
            for purpose, dataset in self.datasets.items()
            for count in [min(len(dataset), limits[purpose] or len(dataset))]
            for start in range(0, count, options.batch_size)
        ]
        self.has_reports = "generator" in self.checkpoint.parts and options.reports
        store = ShardStore(self.data.shards)
        self.fingerprint = compute_fingerprint(
            folder, self.config, store, device, options, self.has_reports
        )
        self.journal = EvaluationJournal(out, self.fingerprint, ranks.rank)

    @cached_property
    def has_training_shards(self) -> bool | None:
        """Whether the shards are those of the training; None where that cannot be known."""
        return are_same_shards(self.data.shards, self.config.data.shards)

    def predict_missing_cases(self) -> None:
        """Predict this process's cases that nothing is known of; the model is loaded only if there are any."""
        found = self.journal.read_records()
        own = self.units[self.ranks.rank :: self.ranks.world_size]
        missing = [
            unit
            for unit in own
            if any((unit.purpose, place) not in found for place in unit.positions)
        ]
        done = sum(len(unit.positions) for unit in own) - sum(
            len(unit.positions) for unit in missing
        )
        if done:
            log.info(
                "Going on: %d of %d cases are there already",
                done,
                sum(len(unit.positions) for unit in own),
            )
        if not missing:
            return
        model = RectVLM.from_checkpoint(self.checkpoint, self.device)
        left, told = len(missing), time.monotonic()
        for purpose, dataset in self.datasets.items():
            units = [unit for unit in missing if unit.purpose == purpose]
            for unit, batch in zip(
                units, BatchLoader(dataset, [unit.positions for unit in units]), strict=True
            ):
                records = evaluate_batch(model, batch, unit.positions, purpose, self.options)
                self.journal.append_records(
                    one for one in records if (purpose, one.position) not in found
                )
                left -= 1
                if time.monotonic() - told > LOG_INTERVAL_SECONDS:
                    log.info("%s%d of %d batches left", self._process_label(), left, len(missing))
                    told = time.monotonic()

    def select_records(
        self, found: dict[tuple[CasePurpose, int], CaseRecord], purpose: CasePurpose
    ) -> list[CaseRecord]:
        """What was found of the cases of this evaluation, in their order."""
        return [
            found[purpose, place]
            for unit in self.units
            if unit.purpose == purpose
            for place in unit.positions
        ]

    def _process_label(self) -> str:
        return (
            f"process {self.ranks.rank} of {self.ranks.world_size}: "
            if self.ranks.world_size > 1
            else ""
        )


def _compute_metrics(
    work: _EvaluationRun,
    scans: ScanResults,
    thresholds: FindingThresholds,
    labeler: ReportLabeler | None,
) -> dict[str, Any]:
    """All figures, and what was measured."""
    options, parts = work.options, work.checkpoint.parts
    drawn = summary.draw_resamples(scans.patients, options)
    reports = None
    if labeler is not None:
        patients = [one.patient for one in scans.select_report_cases()[1]]
        reports = compare_reports(
            scans, work.config, labeler, summary.draw_resamples(patients, options)
        )
    return {
        "checkpoint": str(work.folder),
        "config": work.config.name,
        "step": work.state.step,
        "shards": work.data.shards,
        "split": options.split,
        "selected_on_this_split": was_selected_on(
            work.folder, work.config, work.state, options.split, work.has_training_shards
        ),
        "n_cases": sum(len(volumes) for volumes in scans.volumes),
        **RegionMapUsage.from_records(
            itertools.chain.from_iterable(scans.volumes), options.hide_regions
        ).as_dict(),
        "n_scans": len(scans.names),
        "n_patients": len(set(scans.patients)),
        "limit": options.limit,
        "classification": summary.summarize_findings(scans, thresholds, drawn),
        "thresholds": thresholds.as_dict() | {"same_data": options.split == "train"},
        "localization": summary.summarize_lesions(scans, drawn, options)
        if "localizer" in parts
        else None,
        "reports": reports,
        "bootstrap": summary.describe_bootstrap(options),
        "fingerprint": work.fingerprint,
    }


def _write_results(
    target: Path,
    result: dict[str, Any],
    records: list[CaseRecord],
    scans: ScanResults,
    options: EvaluationOptions,
) -> None:
    """The results, the metrics last: a folder with metrics is complete."""
    _write_jsonl(target.with_name(CASES_FILE), (_drop_texts(one) for one in records))
    if result["reports"] is not None:
        _write_jsonl(
            target.with_name(REPORTS_FILE),
            (_report_texts(one) for one in scans.select_report_cases()[1]),
        )
    _write_text(target.with_name(TABLE_FILE), tables.render_markdown(result))
    if options.plots:
        from rectvlm.evaluate import plots  # matplotlib takes its time

        plots.write_plots(target.parent, result, scans)
    _write_text(target, json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _drop_texts(record: CaseRecord) -> dict[str, Any]:
    row = record.as_dict()
    return {
        name: value
        for name, value in row.items()
        if name not in ("reference", "generated", "without_image")
    }


def _report_texts(record: CaseRecord) -> dict[str, Any]:
    return {
        "key": record.key,
        "reference": record.reference,
        "generated": record.generated,
        "generated_without_image": record.without_image,
    }


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    _write_text(
        path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    )


def _write_text(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())
