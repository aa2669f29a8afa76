"""Evaluation of a checkpoint on shards: findings, lesions and reports, with intervals.

Command: `rectvlm evaluate --checkpoint runs/demo/phase3`; on several processes with
`accelerate launch --num_processes 2 -m rectvlm evaluate …` or
`torchrun --nproc-per-node 2 -m rectvlm evaluate …`.
"""

import itertools
import json
import logging
import time
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from rectvlm.checkpoint import Checkpoint, find_checkpoint
from rectvlm.config import Config, DataConfig
from rectvlm.data.dataset import ShardDataset
from rectvlm.data.loader import BatchLoader
from rectvlm.data.shard_manifest import read_label_origin
from rectvlm.data.shards import read_index
from rectvlm.data.store import ShardStore
from rectvlm.evaluate import summary, tables
from rectvlm.evaluate.case_evaluation import CaseEvaluator
from rectvlm.evaluate.case_groups import CaseGroup, plan_groups
from rectvlm.evaluate.case_records import CasePurpose, CaseRecord
from rectvlm.evaluate.fingerprint import compute_fingerprint
from rectvlm.evaluate.journal import CaseId, EvaluationJournal
from rectvlm.evaluate.options import EvaluationOptions, require_truth_folder
from rectvlm.evaluate.other_labels import summarize_other_labels
from rectvlm.evaluate.process_ranks import ProcessRanks, read_ranks_from_environment
from rectvlm.evaluate.region_maps import RegionMapUsage
from rectvlm.evaluate.report_baselines import (
    BaselineReports,
    choose_baseline_reports,
    read_training_reports,
)
from rectvlm.evaluate.report_figures import evaluate_reports
from rectvlm.evaluate.report_server import ReportServer
from rectvlm.evaluate.result import BootstrapSettings, EvaluationResult
from rectvlm.evaluate.scans import ScanResults, group_by_scan
from rectvlm.evaluate.selection import are_same_shards, was_selected_on
from rectvlm.evaluate.stored_evaluation import (
    CASES_FILE,
    OMITTED_FIELDS,
    REPORTS_FILE,
    STATISTICS_FILE,
    write_report_statistics,
)
from rectvlm.evaluate.thresholds import choose_thresholds
from rectvlm.files import (
    atomic_file,
    encode_json_text,
    printable_text,
    require_writable_file,
    write_json,
)
from rectvlm.finding_thresholds import THRESHOLDS_FILE, FindingThresholds
from rectvlm.folder_lock import FolderLock
from rectvlm.label_table import LabelTable, read_label_table
from rectvlm.machine import describe_machine, package_versions
from rectvlm.metrics.radeval_scores import require_radeval
from rectvlm.metrics.report_labeler.labeler import ReportLabeler, load_labeler
from rectvlm.metrics.reports import ReportStatistics
from rectvlm.models import RectVLM
from rectvlm.types import JsonObject, Split

log = logging.getLogger(__name__)

LOG_INTERVAL_SECONDS = 10.0
"""Time between two log lines of progress, seconds."""
METRIC_PACKAGES = (
    "numpy",
    "scipy",
    "scikit-learn",
    "monai",
    "sacrebleu",
    "rouge-score",
    "bert-score",
)
"""Packages that decide a figure, besides those that decide a prediction."""
_UNFITTED_HERE = FindingThresholds.all_default(
    "0.5: too few cases to fit to, and the model's were fitted on the evaluated split"
)
"""Thresholds of an evaluation that can fit none, of a model that knows the evaluated cases."""
TABLE_FILE = "metrics.md"
PAGE_FILE = "results.html"


def evaluate_checkpoint(
    checkpoint: str | Path,
    shards: str | Path | None = None,
    out: str | Path | None = None,
    *,
    device: str | None = None,
    options: EvaluationOptions | None = None,
) -> EvaluationResult | None:
    """Evaluate a checkpoint on a split; write metrics, tables and plots.

    Thresholds of the findings are fitted on the dev split, or on train where there is no dev, and
    written beside the metrics; the model keeps its own, at which its prompts suggest findings.
    Reports are generated twice, the second time from a volume of air: what the control scores was
    not read from the image.

    The records of a group of cases, whose reports are written together, are written beside the
    metrics as soon as they are known. The same call continues after a kill, and only computes the
    figures where all records are there. Several processes (RANK and WORLD_SIZE in the environment)
    share the cases; the first one waits for the others and writes.

    Args:
        checkpoint: a run's phase folder, or one checkpoint in it.
        shards: folder or URL of shards; by default those of the checkpoint's configuration.
        out: JSON file of the metrics; by default `evaluation-SPLIT/metrics.json` in the
            checkpoint's folder. All other files lie beside it.
        device: device of the model; by default a GPU for each process if there is one.
        options: what is evaluated and how.

    Returns:
        The metrics; None on all processes but the first.

    Raises:
        UserError: There is no such checkpoint or shards, the shards have another grid, the split
            has no sample, the labeler does not load, a process has stopped, or another evaluation
            writes to the same folder.
    """
    start_time = time.monotonic()
    ranks = read_ranks_from_environment()
    options = options or EvaluationOptions()
    require_truth_folder(options.truth)
    require_radeval(options.radeval)
    folder = find_checkpoint(checkpoint, "train first, or give a run's phase folder")
    metrics_path = output_path(folder, options.split, out)
    require_writable_file(metrics_path)
    run = _EvaluationRun(
        folder, shards, options, ranks, ranks.choose_device(device), metrics_path.parent
    )
    with _lock_output(metrics_path.parent, ranks):
        return _evaluate_cases(run, metrics_path, start_time)


def _lock_output(out: Path, ranks: ProcessRanks) -> FolderLock:
    """Lock of one process's records; a second evaluation would write the same files."""
    return FolderLock(
        out / f".rank-{ranks.rank:04d}.lock",
        in_use=f"{out} is being written",
        remedy="wait for its end, stop it, or name another place with --out",
    )


def _evaluate_cases(
    run: "_EvaluationRun", metrics_path: Path, start_time: float
) -> EvaluationResult | None:
    """Predict the cases without a record; on the first process, write the figures of all."""
    ranks, options = run.ranks, run.options
    labeler = None
    if ranks.is_main and run.has_reports:
        # Before the hours of prediction: it may not load.
        labeler = load_labeler(options.labeler, options.convention)
    label_table = run.read_other_labels()
    run.predict_missing_cases()
    if not ranks.is_main:
        return None

    all_records = run.wait_for_records()
    records = run.select_records(all_records, "evaluate")
    # Those of a validation during training on the evaluated split know the answers: they are taken
    # where they are asked for.
    knows_split = _find_threshold_split(run, run.model_thresholds) == options.split
    is_replaced = knows_split and options.thresholds == "fit"
    thresholds = choose_thresholds(
        run.model_thresholds,
        run.select_records(all_records, "fit"),
        f"{run.index.threshold_split} split of {run.data.shards}",
        options.hide_regions,
        _UNFITTED_HERE if is_replaced else None,
    )
    scans = group_by_scan(records)
    baselines = None
    if run.has_reports:
        baselines = run.choose_baselines(scans, thresholds, all_records)
    result, report_statistics = _compute_metrics(
        run, scans, thresholds, labeler, label_table, baselines, start_time
    )
    _write_results(metrics_path, result, report_statistics, records, scans, baselines, options)
    return result


def output_path(checkpoint: str | Path, split: Split, out: str | Path | None) -> Path:
    """JSON file of the metrics: `out`, or `evaluation-SPLIT/metrics.json` in the checkpoint."""
    if out is not None:
        return Path(out)
    folder = find_checkpoint(checkpoint, "train first")
    return folder / f"evaluation-{split}" / "metrics.json"


class _EvaluationRun:
    """The cases of an evaluation, this process's share of them, and the records so far."""

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
        self.model_thresholds = self.checkpoint.read_thresholds()
        self.data: DataConfig = self.config.data
        if shards is not None:
            self.data = self.data.model_copy(update={"shards": str(shards)})
        self.store = ShardStore(self.data.shards)
        self.index = read_index(self.store)
        self.has_reports = "generator" in self.checkpoint.parts and options.reports
        self.datasets = self._open_datasets()
        self.groups = self._plan_groups()
        self.fingerprint = compute_fingerprint(
            folder, self.config, self.store, device, options, self.has_reports
        )
        self.journal = EvaluationJournal(out, self.fingerprint, ranks.rank)

    @cached_property
    def has_training_shards(self) -> bool | None:
        """Whether the shards are those of the training; None where that cannot be known."""
        return are_same_shards(self.data.shards, self.config.data.shards)

    def read_other_labels(self) -> LabelTable | None:
        """Read the other labels before the hours of prediction; None where none are wanted.

        Raises:
            UserError: the table cannot be used, or lacks a case.
        """
        if self.options.labels is None:
            return None
        table = read_label_table([self.options.labels])
        locations = self.datasets["evaluate"].locations[: self.options.limit]
        table.labels_of([[location.key] for location in locations])
        return table

    @cached_property
    def lack_of_baselines(self) -> str | None:
        """Why no baseline can be learned from the training cases; None where they can be."""
        if self.options.split == "train":
            return "the evaluated cases are those that baselines learn from"
        locations = self.index.select_split("train")
        if not locations:
            return f"{self.store} holds no training case"
        shard = locations[0].shard
        try:
            self.store.read_range(shard, 0, 1)
        except OSError as error:
            return (
                f"training cases cannot be read ({self.store / shard}: {error.strerror or error})"
            )
        return None

    def choose_baselines(
        self,
        scans: ScanResults,
        thresholds: FindingThresholds,
        records: dict[CaseId, CaseRecord],
    ) -> BaselineReports:
        """Reports of the baselines for the scans with a report, in their order."""
        if self.lack_of_baselines is not None:
            return BaselineReports.left_out_for(self.lack_of_baselines)
        numbers, cases = scans.select_report_cases()
        purpose: CasePurpose = "neighbor" if "neighbor" in self.datasets else "fit"
        return choose_baseline_reports(
            scans.probabilities[numbers] >= thresholds.values,
            cases,
            read_training_reports(self.store, self.index.select_split("train")),
            self.select_records(records, purpose),
        )

    def predict_missing_cases(self) -> None:
        """Predict this process's cases without a record; load the model only if there are any."""
        records = self.journal.read_records()
        own_groups = self.groups[self.ranks.rank :: self.ranks.world_size]
        missing = [group for group in own_groups if not records.keys() >= set(group.case_ids)]
        n_own = sum(len(group.positions) for group in own_groups)
        n_missing = sum(len(group.positions) for group in missing)
        if n_missing < n_own:
            log.info("Going on: %d of %d cases are there already", n_own - n_missing, n_own)
        if not missing:
            return

        server = None
        if self.has_reports and self.options.report_server is not None:
            server = ReportServer(self.options.report_server, self.checkpoint)
        model = RectVLM.from_checkpoint(
            self.checkpoint, self.device, word_embeddings_only=server is not None
        )
        evaluator = CaseEvaluator(model, self.options, server)
        n_left, last_log = n_missing, time.monotonic()
        for purpose, dataset in self.datasets.items():
            groups = [group for group in missing if group.purpose == purpose]
            planned = itertools.chain.from_iterable(group.batches for group in groups)
            batches = iter(BatchLoader(dataset, list(planned)))
            for group in groups:
                group_records = evaluator.evaluate_group(group, batches)
                self.journal.append_records(
                    record for record in group_records if (purpose, record.position) not in records
                )
                n_left -= len(group_records)
                if time.monotonic() - last_log > LOG_INTERVAL_SECONDS:
                    log.info("%s%d of %d cases left", self._process_label(), n_left, n_missing)
                    last_log = time.monotonic()

    def wait_for_records(self) -> dict[CaseId, CaseRecord]:
        """Records of all cases, as soon as all processes have written theirs."""
        return self.journal.wait_for_records(
            itertools.chain.from_iterable(group.case_ids for group in self.groups)
        )

    def select_records(
        self, records: dict[CaseId, CaseRecord], purpose: CasePurpose
    ) -> list[CaseRecord]:
        """Records of the cases of one purpose, in their order."""
        selected = []
        for group in self.groups:
            if group.purpose == purpose:
                selected += [records[case_id] for case_id in group.case_ids]
        return selected

    def _open_datasets(self) -> dict[CasePurpose, ShardDataset]:
        datasets: dict[CasePurpose, ShardDataset] = {
            "evaluate": ShardDataset(self.data, self.options.split)
        }
        can_fit = self.options.thresholds == "fit"
        if can_fit and self.index.select_split(self.index.threshold_split):
            datasets["fit"] = ShardDataset(self.data, self.index.threshold_split)
        has_training_cases = "fit" in datasets and datasets["fit"].split == "train"
        if self.has_reports and self.lack_of_baselines is None and not has_training_cases:
            datasets["neighbor"] = ShardDataset(self.data, "train")
        return datasets

    def _plan_groups(self) -> list[CaseGroup]:
        fit_limit = self.options.fit_limit
        limits = {"evaluate": self.options.limit, "fit": fit_limit, "neighbor": fit_limit}
        groups = []
        for purpose, dataset in self.datasets.items():
            n_cases = min(len(dataset), limits[purpose] or len(dataset))
            n_reports = 0
            if self.has_reports and purpose == "evaluate":
                n_reports = min(n_cases, self.options.report_limit or n_cases)
            groups += plan_groups(purpose, n_cases, self.options.batch_size, n_reports)
        return groups

    def _process_label(self) -> str:
        if self.ranks.world_size == 1:
            return ""
        return f"process {self.ranks.rank} of {self.ranks.world_size}: "


def _compute_metrics(
    run: _EvaluationRun,
    scans: ScanResults,
    thresholds: FindingThresholds,
    labeler: ReportLabeler | None,
    label_table: LabelTable | None,
    baselines: BaselineReports | None,
    start_time: float,
) -> tuple[EvaluationResult, ReportStatistics | None]:
    """All figures, with a description of what was measured where; the reports' by case too."""
    options = run.options
    weights = summary.draw_resamples(scans.patients, options)
    lesions, reports, report_statistics = None, None, None
    if "localizer" in run.checkpoint.parts:
        lesions = summary.summarize_lesions(scans, weights, options)
    if labeler is not None and baselines is not None:
        patients = [record.patient for record in scans.select_report_cases()[1]]
        report_weights = summary.draw_resamples(patients, options)
        reports, report_statistics = evaluate_reports(
            scans,
            run.config,
            labeler,
            options.convention,
            report_weights,
            baselines,
            options.radeval,
        )

    other_labels = None
    if label_table is not None:
        other_labels = summarize_other_labels(scans, label_table, thresholds, weights, labeler)

    records = list(itertools.chain.from_iterable(scans.volumes))
    result = EvaluationResult(
        checkpoint=str(run.folder),
        config=run.config.name,
        step=run.state.step,
        shards=run.data.shards,
        labels=read_label_origin(run.store),
        split=options.split,
        threshold_split=_find_threshold_split(run, thresholds),
        selected_on_this_split=was_selected_on(
            run.folder,
            run.config,
            run.state,
            options.split,
            run.has_training_shards,
            run.index.selection_split,
        ),
        n_cases=len(records),
        region_maps=RegionMapUsage.from_records(records, options.hide_regions),
        n_scans=len(scans.names),
        n_patients=len(set(scans.patients)),
        limit=options.limit,
        classification=summary.summarize_findings(scans, thresholds, weights),
        other_thresholds=summary.compare_thresholds(scans, run.model_thresholds),
        other_labels=other_labels,
        thresholds=thresholds,
        localization=lesions,
        reports=reports,
        bootstrap=BootstrapSettings(resamples=options.bootstrap, seed=options.seed),
        fingerprint=run.fingerprint,
        machine=describe_machine(),
        device=run.device,
        processes=run.ranks.world_size,
        versions=package_versions(*METRIC_PACKAGES),
        seconds=round(time.monotonic() - start_time, 1),
    )
    return result, report_statistics


def _find_threshold_split(run: _EvaluationRun, thresholds: FindingThresholds) -> Split | None:
    """Split of the evaluated shards that thresholds were fitted on; None where it is none."""
    if not thresholds.is_fitted.any():
        return None
    if thresholds is not run.model_thresholds:
        return run.index.threshold_split
    if run.has_training_shards is False:
        return None
    return run.index.selection_split  # by the validation of the training


def _write_results(
    metrics_path: Path,
    result: EvaluationResult,
    report_statistics: ReportStatistics | None,
    records: list[CaseRecord],
    scans: ScanResults,
    baselines: BaselineReports | None,
    options: EvaluationOptions,
) -> None:
    """Write the results, the metrics last: a folder with metrics is complete."""
    _write_jsonl(metrics_path.with_name(CASES_FILE), map(_make_case_row, records))
    if report_statistics is not None and baselines is not None:
        write_report_statistics(metrics_path.with_name(STATISTICS_FILE), report_statistics)
        _write_jsonl(metrics_path.with_name(REPORTS_FILE), _report_texts(scans, baselines))
    _write_text(metrics_path.with_name(TABLE_FILE), tables.render_markdown(result))
    from rectvlm.evaluate import plots, results_page  # matplotlib takes its time

    figures = plots.draw_plots(result, scans) if options.plots else {}
    plots.write_plots(metrics_path.parent, figures)
    page = results_page.render_results_page(result, scans, figures, metrics_path.parent)
    _write_text(metrics_path.with_name(PAGE_FILE), page)
    result.thresholds.write(metrics_path.with_name(THRESHOLDS_FILE))
    write_json(metrics_path, result.as_dict())


def _make_case_row(record: CaseRecord) -> JsonObject:
    row = record.as_dict()
    for name in OMITTED_FIELDS:
        del row[name]
    return row


def _report_texts(scans: ScanResults, baselines: BaselineReports) -> list[JsonObject]:
    rows = []
    for number, record in enumerate(scans.select_report_cases()[1]):
        row = {
            "key": record.key,
            "reference": record.reference,
            "generated": record.generated,
            "generated_without_image": record.without_image,
        }
        for name, texts in baselines.texts.items():
            row[name] = texts[number]
        rows.append(row)
    return rows


def _write_jsonl(path: Path, rows: Iterable[JsonObject]) -> None:
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
    with atomic_file(path) as file:
        file.write(encode_json_text("".join(lines)))


def _write_text(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(printable_text(text).encode())
