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

from rectvlm import checkpoint as checkpoints
from rectvlm.config import Config, DataConfig
from rectvlm.data.loader import Loader, ShardDataset
from rectvlm.data.shards import read_index
from rectvlm.data.store import Store, atomic_file
from rectvlm.evaluate import summary, tables
from rectvlm.evaluate.cases import CaseRecord, Purpose, check_truth, examine
from rectvlm.evaluate.journal import Journal
from rectvlm.evaluate.machine import machine
from rectvlm.evaluate.options import Options, fingerprint
from rectvlm.evaluate.ranks import Ranks, ranks_of_environment
from rectvlm.evaluate.regions import RegionMaps
from rectvlm.evaluate.reports import reports as compare_reports
from rectvlm.evaluate.scans import Scans, by_scan
from rectvlm.evaluate.selection import are_same, selected_on
from rectvlm.evaluate.thresholds import decide
from rectvlm.metrics import Thresholds
from rectvlm.metrics.labelers import Labeler, get_labeler
from rectvlm.types import Split

log = logging.getLogger(__name__)

LOG_EVERY = 10.0
"""Seconds between two lines of progress."""
METRICS = ("numpy", "scipy", "scikit-learn", "monai", "sacrebleu", "rouge-score", "bert-score")
"""Packages that decide a figure, beside those that decide what a model says."""
CASES, REPORTS, TABLE = "cases.jsonl", "reports.jsonl", "metrics.md"


@dataclass(frozen=True)
class Unit:
    """Cases that are predicted together: the same ones on any number of processes, since numbers depend on it."""

    purpose: Purpose
    positions: list[int]


def evaluate(
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
    ranks = ranks_of_environment()
    asked = Options(split=split, **options)
    check_truth(asked.truth)
    folder = checkpoints.find(checkpoint, "train first, or give a run's phase folder")
    target = output_path(folder, split, out)
    work = _Work(folder, shards, asked, ranks, ranks.device(device), target.parent)
    # Before the hours of prediction, since it may not load.
    labeler = get_labeler(asked.labeler) if ranks.first and work.has_reports else None
    work.do()
    if not ranks.first:
        return None
    found = work.journal.wait([(unit.purpose, position) for unit in work.units for position in unit.positions])
    records = {purpose: work.records(found, purpose) for purpose in ("evaluate", "fit")}
    scans = by_scan(records["evaluate"])
    stored_alone = asked.thresholds == "stored"
    thresholds = decide(
        folder, records["fit"], work.data.shards, stored_alone, bool(work.own_shards), asked.hide_regions
    )
    facts = {
        "machine": machine(),
        "device": work.device,
        "processes": ranks.world,
        "versions": checkpoints.versions(*METRICS),
        "seconds": 0.0,
    }
    result = _figures(work, scans, thresholds, labeler) | facts
    result["seconds"] = round(time.monotonic() - started, 1)
    _write(target, result, records["evaluate"], scans, asked)
    return result


def output_path(checkpoint: str | Path, split: Split, out: str | Path | None) -> Path:
    """Where `evaluate` writes the metrics: `out`, or `evaluation-SPLIT/metrics.json` in the checkpoint's folder."""
    if out is not None:
        return Path(out)
    return checkpoints.find(checkpoint, "train first") / f"evaluation-{split}" / "metrics.json"


class _Work:
    """The cases of an evaluation, which of them are this process's, and what is known of them."""

    def __init__(
        self, folder: Path, shards: str | Path | None, options: Options, ranks: Ranks, device: str, out: Path
    ) -> None:
        self.folder, self.options, self.ranks, self.device = folder, options, ranks, device
        self.config: Config = checkpoints.read_config(folder)
        self.state = checkpoints.read_state(folder)
        chosen = {} if shards is None else {"shards": str(shards)}
        self.data: DataConfig = self.config.data.model_copy(update=chosen)
        self.datasets: dict[Purpose, ShardDataset] = {"evaluate": ShardDataset(self.data, options.split)}
        if options.thresholds == "fit" and read_index(self.data.shards).select("train"):
            self.datasets["fit"] = ShardDataset(self.data, "train")
        limits = {"evaluate": options.limit, "fit": options.fit_limit}
        self.units = [
            Unit(purpose, list(range(start, min(start + options.batch_size, count))))
            for purpose, dataset in self.datasets.items()
            for count in [min(len(dataset), limits[purpose] or len(dataset))]
            for start in range(0, count, options.batch_size)
        ]
        self.has_reports = "generator" in self.state.parts and options.reports
        store = Store(self.data.shards)
        self.fingerprint = fingerprint(folder, self.config, store, device, options, self.has_reports)
        self.journal = Journal(out, self.fingerprint, ranks.rank)

    @cached_property
    def own_shards(self) -> bool | None:
        """Whether the shards are those of the training; None where that cannot be known."""
        return are_same(self.data.shards, self.config.data.shards)

    def do(self) -> None:
        """Predict this process's cases that nothing is known of; the model is loaded only if there are any."""
        found = self.journal.found()
        own = self.units[self.ranks.rank :: self.ranks.world]
        missing = [unit for unit in own if any((unit.purpose, place) not in found for place in unit.positions)]
        done = sum(len(unit.positions) for unit in own) - sum(len(unit.positions) for unit in missing)
        if done:
            log.info("Going on: %d of %d cases are there already", done, sum(len(unit.positions) for unit in own))
        if not missing:
            return
        model, _ = checkpoints.load_model(self.folder, self.device)
        left, told = len(missing), time.monotonic()
        for purpose, dataset in self.datasets.items():
            units = [unit for unit in missing if unit.purpose == purpose]
            for unit, batch in zip(units, Loader(dataset, [unit.positions for unit in units]), strict=True):
                records = examine(model, batch, unit.positions, purpose, self.options)
                self.journal.append(one for one in records if (purpose, one.position) not in found)
                left -= 1
                if time.monotonic() - told > LOG_EVERY:
                    log.info("%s%d of %d batches left", self._name(), left, len(missing))
                    told = time.monotonic()

    def records(self, found: dict[tuple[Purpose, int], CaseRecord], purpose: Purpose) -> list[CaseRecord]:
        """What was found of the cases of this evaluation, in their order."""
        return [found[purpose, place] for unit in self.units if unit.purpose == purpose for place in unit.positions]

    def _name(self) -> str:
        return f"process {self.ranks.rank} of {self.ranks.world}: " if self.ranks.world > 1 else ""


def _figures(work: _Work, scans: Scans, thresholds: Thresholds, labeler: Labeler | None) -> dict[str, Any]:
    """All figures, and what was measured."""
    options, parts = work.options, work.state.parts
    drawn = summary.draw(scans.patients, options)
    reports = None
    if labeler is not None:
        patients = [one.patient for one in scans.reported()[1]]
        reports = compare_reports(scans, work.config, labeler, summary.draw(patients, options))
    return {
        "checkpoint": str(work.folder),
        "config": work.config.name,
        "step": work.state.step,
        "shards": work.data.shards,
        "split": options.split,
        "selected_on_this_split": selected_on(work.folder, work.config, work.state, options.split, work.own_shards),
        "n_cases": sum(len(volumes) for volumes in scans.volumes),
        **RegionMaps.of(itertools.chain.from_iterable(scans.volumes), options.hide_regions).as_dict(),
        "n_scans": len(scans.names),
        "n_patients": len(set(scans.patients)),
        "limit": options.limit,
        "classification": summary.findings(scans, thresholds, drawn),
        "thresholds": thresholds.as_dict() | {"same_data": options.split == "train"},
        "localization": summary.lesions(scans, drawn, options) if "localizer" in parts else None,
        "reports": reports,
        "bootstrap": summary.bootstrap_facts(options),
        "fingerprint": work.fingerprint,
    }


def _write(target: Path, result: dict[str, Any], records: list[CaseRecord], scans: Scans, options: Options) -> None:
    """The results, the metrics last: a folder with metrics is complete."""
    _write_lines(target.with_name(CASES), (_without_texts(one) for one in records))
    if result["reports"] is not None:
        _write_lines(target.with_name(REPORTS), (_texts(one) for one in scans.reported()[1]))
    _write_text(target.with_name(TABLE), tables.markdown(result))
    if options.plots:
        from rectvlm.evaluate import plots  # matplotlib takes its time

        plots.write(target.parent, result, scans)
    _write_text(target, json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _without_texts(record: CaseRecord) -> dict[str, Any]:
    row = record.as_dict()
    return {name: value for name, value in row.items() if name not in ("reference", "generated", "without_image")}


def _texts(record: CaseRecord) -> dict[str, Any]:
    return {
        "key": record.key,
        "reference": record.reference,
        "generated": record.generated,
        "generated_without_image": record.without_image,
    }


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    _write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def _write_text(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())
