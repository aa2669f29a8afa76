"""Whether the samples of a split carry what a phase learns from, asked before a run starts.

A task without a single label, outline or report has a loss of 0 in every batch: a run would end as
finished and have learned nothing.
"""

import logging
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from rectvlm.config import Config, ValidationMetric
from rectvlm.data.dataset import ShardDataset
from rectvlm.data.report_text import join_report_sections
from rectvlm.data.shards import SampleLocation, read_sample_meta
from rectvlm.labels import LESIONS, Lesion
from rectvlm.models.report_generator import ReportGenerator
from rectvlm.train.budget import PhaseBudget, read_world_size
from rectvlm.train.phases import Phase, Task
from rectvlm.types import SampleMeta, UserError

log = logging.getLogger(__name__)

MAX_MEASURED_REPORTS = 1000
"""Number of reports whose lengths are measured at most before training begins."""
_READERS = 16
"""Number of samples whose metadata are read at the same time."""
_TASK_NEEDS: dict[Task, str] = {
    "classification": "a known label",
    "localization": "outlined lesions",
    "report": "a report",
}
_LESION_LABEL = "a label of a lesion's finding"
"""What localization needs where no outlines are read."""
_METRIC_TASKS: dict[ValidationMetric, Task] = {
    "macro_auroc": "classification",
    "macro_average_precision": "classification",
    "mean_dice": "localization",
    "clinical_f1": "classification",
    "loss_classification": "classification",
    "loss_localization": "localization",
    "loss_report": "report",
}
"""Task whose annotations decide a metric; `loss` takes what any task of the phase needs."""


def require_something_to_learn(phase: Phase, config: Config) -> None:
    """Check that a phase has something to learn, and its validation something to measure.

    Raises:
        UserError: no task has a weight, no part a learning rate, or the samples of a split carry
            nothing of what a task needs; the message counts them.
    """
    settings = phase.get_settings(config)
    weights = config.train.loss_weights
    tasks = [task for task in phase.tasks if getattr(weights, task) > 0]
    if not tasks:
        raise UserError(
            f"train.loss_weights is 0 for {' and '.join(phase.tasks)}, all that phase "
            f"{phase.number} learns: give one of them a weight above 0."
        )
    train_set = ShardDataset(config.data, "train")
    _require_part_that_trains(phase, config, len(train_set))
    counts = count_task_samples(train_set, tasks, phase.reads_outlines)
    untaught = [task for task in tasks if not counts[task]]
    if untaught:
        remedy = "give shards that have them"
        if len(untaught) < len(tasks):
            zero_weights = [f"train.loss_weights.{task}=0" for task in untaught]
            remedy += f", or train without with {' '.join(zero_weights)}"
        sample_counts = _describe_counts(train_set, counts, phase.reads_outlines)
        raise UserError(
            f"{sample_counts}, so phase {phase.number} has nothing to learn "
            f"{' and '.join(untaught)} from: {remedy}."
        )
    if settings.validation.every:
        _require_something_to_measure(phase, config)


def _require_part_that_trains(phase: Phase, config: Config, sample_count: int) -> None:
    settings = phase.get_settings(config)
    budget = PhaseBudget.plan(settings, sample_count, read_world_size())
    last_step_begins = (budget.count_steps_left(0) - 1) * budget.step_batch.global_batch
    starts: dict[str, float] = {}
    for entry in settings.unfreeze:
        starts[entry.part] = min(entry.start, starts.get(entry.part, entry.start))
    for part, rate in settings.lr.items():
        if rate > 0 and budget.samples_after(starts.get(part, 0.0)) <= last_step_begins:
            return
    section = f"train.phases.{phase.key}"
    raise UserError(
        f"{section}.lr and {section}.unfreeze let no part train within {budget.samples} samples: "
        "give a part a learning rate above 0 and let it begin earlier."
    )


def _require_something_to_measure(phase: Phase, config: Config) -> None:
    validation = phase.get_settings(config).validation
    metric = validation.best_metric
    if metric == "clinical_f1" and "generator" not in phase.parts:
        raise UserError(
            f"train.phases.{phase.key}.validation.best_metric = clinical_f1 is measured on written "
            f"reports, and phase {phase.number} has no report generator: choose another metric."
        )
    tasks = phase.tasks if metric == "loss" else (_METRIC_TASKS[metric],)
    selection_set = ShardDataset.open_selection_split(config.data)
    counts = count_task_samples(selection_set, tasks, phase.reads_outlines)
    if not any(counts.values()):
        section = f"train.phases.{phase.key}.validation"
        sample_counts = _describe_counts(selection_set, counts, phase.reads_outlines)
        raise UserError(
            f"{sample_counts}, which {section}.best_metric = {metric} is measured on: give "
            f"shards that have them, another best_metric, or {section}.every=0."
        )


def count_task_samples(
    dataset: ShardDataset, tasks: Sequence[Task], reads_outlines: bool
) -> dict[Task, int]:
    """Number of samples that carry what each task needs.

    Reading ends as soon as every task has some, so only a count of 0 is one of all samples.

    Args:
        dataset: the samples.
        tasks: the tasks.
        reads_outlines: whether localization learns from outlines; else labels are enough.
    """
    counts: dict[Task, int] = dict.fromkeys(tasks, 0)
    for first in range(0, len(dataset), 4 * _READERS):
        locations = dataset.locations[first : first + 4 * _READERS]
        for meta in _read_metas(dataset, locations):
            for task in tasks:
                counts[task] += _carries(meta, task, reads_outlines)
        if all(counts.values()):
            break
    return counts


def _read_metas(dataset: ShardDataset, locations: Sequence[SampleLocation]) -> list[SampleMeta]:
    with ThreadPoolExecutor(_READERS) as readers:
        return list(
            readers.map(lambda location: read_sample_meta(dataset.store, location), locations)
        )


def log_cut_reports(dataset: ShardDataset, generator: ReportGenerator) -> None:
    """Log how many reports of some samples are cut at `generator.max_report_tokens`.

    Args:
        dataset: samples of which at most `MAX_MEASURED_REPORTS`, evenly spread, are read.
        generator: report generator with its tokenizer.
    """
    stride = math.ceil(len(dataset) / MAX_MEASURED_REPORTS)
    report_count = cut_count = 0
    for meta in _read_metas(dataset, dataset.locations[::stride]):
        report = join_report_sections(meta.findings, meta.impression)
        if report is not None:
            report_count += 1
            cut_count += generator.is_cut(report)
    if cut_count:
        log.warning(
            "%d of %d reports are longer than generator.max_report_tokens (%d): they are cut there "
            "and teach no end",
            cut_count,
            report_count,
            generator.config.max_report_tokens,
        )


def _carries(meta: SampleMeta, task: Task, reads_outlines: bool) -> bool:
    """Whether a sample says anything about a task."""
    if task == "classification":
        return any(value is not None for value in meta.labels.values())
    if task == "report":
        return join_report_sections(meta.findings, meta.impression) is not None
    if not reads_outlines:
        return any(_is_labelled(meta, lesion) for lesion in LESIONS)
    # A label alone aligns image and prompt, but draws no outline.
    return any(meta.lesions_annotated.values()) or any(meta.lesions_partial.values())


def _is_labelled(meta: SampleMeta, lesion: Lesion) -> bool:
    """Whether a label says if the patient has a lesion, as in `infer_lesions_from_labels`."""
    label = meta.labels[lesion.finding]
    return label == 0 or (label == 1 and lesion.is_implied_by_finding)


def _describe_counts(dataset: ShardDataset, counts: dict[Task, int], reads_outlines: bool) -> str:
    """The counts as the beginning of a sentence."""
    needs = _TASK_NEEDS if reads_outlines else _TASK_NEEDS | {"localization": _LESION_LABEL}
    words = [f"{count} have {needs[task]}" for task, count in counts.items()]
    return (
        f"Of the {len(dataset)} samples of the split {dataset.split!r} in {dataset.store}, "
        f"{', '.join(words)}"
    )
