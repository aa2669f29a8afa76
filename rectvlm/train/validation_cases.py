"""Cases of a validation: their predictions beside the truth, and the metrics over all of them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from rectvlm.config import LossWeightsConfig
from rectvlm.finding_thresholds import MIN_CASES_TO_FIT, FindingThresholds
from rectvlm.finite import mean_of_finite
from rectvlm.labels import FINDINGS, N_FINDINGS
from rectvlm.lesion_bits import pack_lesions
from rectvlm.models import ModelOutputs
from rectvlm.train.phases import Task
from rectvlm.train.task_loss import TaskLoss
from rectvlm.types import Batch


class ValidationExample(NamedTuple):
    """One case to look at. Volumes are on the model's canonical grid."""

    key: str
    ct: NDArray[np.int16]
    """(Z, Y, X), HU."""
    spacing_mm: tuple[float, float, float]
    """(z, y, x), mm."""
    labels: NDArray[np.float32]
    """(18,), 0 or 1; NaN where unknown."""
    finding_probabilities: NDArray[np.float32]
    """(18,)."""
    lesions_annotated: NDArray[np.bool_]
    """(5,), whether annotators looked for the lesion."""
    true_lesions: NDArray[np.uint8]
    """(Z, Y, X), lesion bits."""
    predicted_lesions: NDArray[np.uint8] | None
    """(Z, Y, X), lesion bits; None without a localizer."""
    true_report: str | None
    predicted_report: str | None
    """Report that the model generates; None without a generator."""


class ScoredCase(NamedTuple):
    """The prediction of one case beside the truth."""

    case_index: int
    """Number of the case in the split."""
    losses_by_task: dict[Task, float | None]
    """Loss of each task; None where the case says nothing about it."""
    probabilities: NDArray[np.float32]
    """(18,), finding probabilities."""
    labels: NDArray[np.float32]
    """(18,), 0 or 1; read only where known."""
    labels_known: NDArray[np.bool_]
    """(18,)."""
    overlap_counts: NDArray[np.int64] | None
    """(5, 3), voxels of each lesion in intersection, prediction and truth; None without a
    localizer."""
    lesions_annotated: NDArray[np.bool_]
    """(5,), whether annotators looked for the lesion."""

    @property
    def is_finite(self) -> bool:
        """Whether all of the model's losses and probabilities are finite."""
        losses = [loss for loss in self.losses_by_task.values() if loss is not None]
        return bool(np.isfinite(losses).all() and np.isfinite(self.probabilities).all())


class WrittenReport(NamedTuple):
    """Findings of one case's generated report beside its labels."""

    case_index: int
    """Number of the case in the split."""
    stated: NDArray[np.bool_]
    """(18,), whether the report states the finding."""
    labels: NDArray[np.bool_]
    """(18,); read only where known."""
    labels_known: NDArray[np.bool_]
    """(18,)."""


def read_reports(
    case_indices: Sequence[int], batch: Batch, reports: Sequence[str]
) -> list[WrittenReport]:
    """Read the findings that generated reports state, with the rules of an evaluation.

    An uncertain finding counts as stated.
    """
    from rectvlm.metrics.report_labeler.finding_states import FindingState
    from rectvlm.metrics.report_labeler.labeler import load_labeler

    stated = load_labeler("rules").label_reports(reports) >= FindingState.UNCERTAIN
    labels = (batch.labels > 0.5).cpu().numpy()
    labels_known = batch.labels_known.cpu().numpy()
    rows = zip(case_indices, stated, labels, labels_known, strict=True)
    return [WrittenReport(*row) for row in rows]


def score_written_reports(reports: Sequence[WrittenReport]) -> float | None:
    """Micro F1 of the findings in reports against the labels; None without a known positive."""
    from rectvlm.metrics.clinical_efficacy import count_confusions, score_clinical_efficacy

    counts = count_confusions(
        np.stack([report.stated for report in reports]),
        np.stack([report.labels for report in reports]),
        np.stack([report.labels_known for report in reports]),
    )
    f1: float | None = score_clinical_efficacy(counts)["micro"]["f1"]
    return f1


def fit_case_thresholds(
    cases: Sequence[ScoredCase], former: FindingThresholds, source: str
) -> FindingThresholds:
    """Fit the thresholds of the findings to validation cases.

    A finding with fewer than `MIN_CASES_TO_FIT` cases of either class keeps its former threshold,
    and so do all where a probability is not finite.
    """
    from rectvlm.metrics.findings import fit_thresholds

    if not all(case.is_finite for case in cases):
        return former
    fitted = fit_thresholds(
        np.stack([case.probabilities for case in cases]).astype(np.float64),
        np.stack([case.labels for case in cases]).astype(np.float64),
        np.stack([case.labels_known for case in cases]),
        source,
        min_cases=MIN_CASES_TO_FIT,
    )
    is_kept = former.is_fitted & ~fitted.is_fitted
    if is_kept.any():
        names = [name for name, kept in zip(FINDINGS, is_kept, strict=True) if kept]
        fitted = replace(fitted, source=f"{source}; earlier ones for {', '.join(names)}")
    return former.replace_fitted(fitted)


def score_case(
    case_index: int, outputs: ModelOutputs, batch: Batch, task_losses: dict[Task, TaskLoss]
) -> ScoredCase:
    """Score the only case of a batch."""
    # Imported here: scikit-learn takes a second that a run without validation need not spend.
    from rectvlm.metrics.lesion_overlap import count_lesion_voxels

    losses_by_task = {}
    for task, loss in task_losses.items():
        losses_by_task[task] = loss.value.item() if loss.count > 0 else None
    overlap_counts = None
    if outputs.localization is not None:
        predicted = (outputs.localization.mask_logits[0] >= 0).cpu().numpy()
        overlap_counts = count_lesion_voxels(predicted, batch.lesions[0].cpu().numpy())
    return ScoredCase(
        case_index=case_index,
        losses_by_task=losses_by_task,
        probabilities=outputs.finding_logits[0].float().sigmoid().cpu().numpy(),
        labels=batch.labels[0].cpu().numpy(),
        labels_known=batch.labels_known[0].cpu().numpy(),
        overlap_counts=overlap_counts,
        lesions_annotated=batch.lesions_annotated[0].cpu().numpy(),
    )


def make_example(
    outputs: ModelOutputs, batch: Batch, reports: list[str] | None
) -> ValidationExample:
    """Make an example of the only case of a batch, with the generated report if there is one."""
    predicted_lesions = None
    if outputs.localization is not None:
        predicted_lesions = pack_lesions(outputs.localization.mask_logits[0] >= 0).cpu().numpy()
    labels = torch.where(batch.labels_known[0], batch.labels[0], torch.nan)
    return ValidationExample(
        key=batch.keys[0],
        ct=batch.ct[0].cpu().numpy(),
        spacing_mm=batch.spacing,
        labels=labels.cpu().numpy(),
        finding_probabilities=outputs.finding_logits[0].float().sigmoid().cpu().numpy(),
        lesions_annotated=batch.lesions_annotated[0].cpu().numpy(),
        true_lesions=batch.lesions[0].cpu().numpy(),
        predicted_lesions=predicted_lesions,
        true_report=batch.reports[0],
        predicted_report=None if reports is None else reports[0],
    )


def compute_validation_metrics(
    cases: Sequence[ScoredCase],
    tasks: Sequence[Task],
    loss_weights: LossWeightsConfig,
    reports: Sequence[WrittenReport] = (),
) -> dict[str, float | None]:
    """Metrics over the cases by name (`ValidationConfig.best_metric`).

    A metric is None where the cases do not determine it. If a case's figures are not finite, all
    metrics are None: the mean over the other cases would look better than the model is.
    """
    # Imported here: scikit-learn takes a second that a run without validation need not spend.
    from rectvlm.metrics.findings import score_findings
    from rectvlm.metrics.lesion_overlap import score_lesion_overlap

    has_masks = cases[0].overlap_counts is not None
    if not all(case.is_finite for case in cases):
        names = ["loss", *(f"loss_{task}" for task in tasks)]
        names += ["macro_auroc", "macro_average_precision"]
        if has_masks:
            names.append("mean_dice")
        if reports:
            names.append("clinical_f1")
        return dict.fromkeys(names)

    metrics = _average_losses(cases, tasks, loss_weights)
    findings = score_findings(
        np.stack([case.probabilities for case in cases]),
        np.stack([case.labels for case in cases]),
        np.stack([case.labels_known for case in cases]),
        np.full(N_FINDINGS, 0.5),
    )
    metrics["macro_auroc"] = findings["macro"]["auroc"]
    metrics["macro_average_precision"] = findings["macro"]["average_precision"]
    if has_masks:
        counts = [case.overlap_counts for case in cases if case.overlap_counts is not None]
        annotated = np.stack([case.lesions_annotated for case in cases])
        lesions = score_lesion_overlap(np.stack(counts), annotated)
        metrics["mean_dice"] = lesions["macro"]["dice"]
    if reports:
        metrics["clinical_f1"] = score_written_reports(reports)
    return metrics


def _average_losses(
    cases: Sequence[ScoredCase], tasks: Sequence[Task], loss_weights: LossWeightsConfig
) -> dict[str, float | None]:
    """Mean loss of each task over the cases, after their weighted sum."""
    means_by_name: dict[str, float | None] = {}
    weighted_means = []
    for task in tasks:
        mean = mean_of_finite(case.losses_by_task[task] for case in cases)
        means_by_name[f"loss_{task}"] = mean
        if mean is not None:
            weighted_means.append(getattr(loss_weights, task) * mean)
    total = sum(weighted_means) if weighted_means else None
    return {"loss": total, **means_by_name}
