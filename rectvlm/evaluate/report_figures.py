"""Figures of generated reports, their control and their baselines, with paired intervals."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from rectvlm import pretrained
from rectvlm.config import Config
from rectvlm.evaluate.report_baselines import BaselineReports
from rectvlm.evaluate.scans import ScanResults
from rectvlm.labels import LabelConvention
from rectvlm.metrics.arrays import FloatArray
from rectvlm.metrics.bootstrap import ResampleWeights, iterate_chunks, percentile_interval
from rectvlm.metrics.radeval_scores import RadEvalOptions, score_by_radeval
from rectvlm.metrics.report_labeler.labeler import ReportLabeler
from rectvlm.metrics.reports import (
    ReportStatistics,
    compute_report_statistics,
    headline_scores,
    summarize_reports,
)
from rectvlm.metrics.text_diversity import measure_diversity
from rectvlm.metrics.vlm3d_report_protocol import MeteorProgram, score_reports_by_protocol
from rectvlm.types import JsonObject, UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoredReports:
    """Figures of one set of reports on the evaluated cases."""

    figures: JsonObject
    """Figures of `summarize_reports`, headline `scores`, their intervals (`ci95`), and those of the
    VLM3D challenge's protocol (`vlm3d`)."""
    samples: dict[str, FloatArray]
    """Headline scores in each resample, (R,); empty where no intervals are wanted."""
    statistics: ReportStatistics
    """What each case adds to the figures."""


def evaluate_reports(
    scans: ScanResults,
    config: Config,
    labeler: ReportLabeler,
    convention: LabelConvention,
    weights: ResampleWeights | None,
    baselines: BaselineReports,
    radeval: RadEvalOptions,
) -> tuple[JsonObject, ReportStatistics]:
    """Figures of the reports (`image`), of the control (`image_ablated`), and of each baseline.

    `difference` is image minus control, and in a baseline image minus baseline, on the same
    resamples of the patients. `reference_diversity` is what `diversity` is compared with. The
    statistics of the reports by case are returned beside the figures.

    Args:
        scans: results of the evaluation by scan.
        config: configuration that names the encoder of BERTScore.
        labeler: labeler that reads findings in the texts.
        convention: convention of the rules that read sides.
        weights: resamples of the N scans with a generated report, (R, N); None for no intervals.
        baselines: reports of the baselines for the N scans.
        radeval: metrics of RadEval that are wanted (`radeval`, None for none).
    """
    numbers, records = scans.select_report_cases()
    references = [record.reference for record in records]
    labels, known = scans.labels[numbers], scans.known[numbers]
    encoder = resolve_bertscore_encoder(config)

    def score_texts(texts: Sequence[str], meteor: MeteorProgram) -> ScoredReports:
        statistics = compute_report_statistics(
            texts,
            references,
            encoder,
            labels=labels,
            known=known,
            labeler=labeler,
            convention=convention,
        )
        scored = _score_statistics(statistics, weights)
        scored.figures["vlm3d"] = score_reports_by_protocol(
            texts, references, statistics.label_counts, meteor
        )
        return scored

    generated = [record.generated or "" for record in records]
    without_image = [record.without_image or "" for record in records]
    baseline_figures: JsonObject = {}
    with MeteorProgram() as meteor:
        image = score_texts(generated, meteor)
        control = score_texts(without_image, meteor)
        for name, texts in baselines.texts.items():
            baseline = score_texts(texts, meteor)
            baseline_figures[name] = baseline.figures | {
                "difference": _score_differences(image, baseline),
                "source": baselines.sources[name],
            }
    figures: JsonObject = {
        "image": image.figures,
        "image_ablated": control.figures,
        "difference": _score_differences(image, control),
        "baselines": baseline_figures,
        "left_out_baselines": baselines.left_out,
        "reference_diversity": measure_diversity([text for text in references if text is not None]),
        "radeval": None,
    }
    if radeval.metrics:
        texts_by_source = {"image": generated, **baselines.texts, "image_ablated": without_image}
        figures["radeval"] = score_by_radeval(radeval, texts_by_source, references, weights)
    return figures, image.statistics


def _score_statistics(
    statistics: ReportStatistics, weights: ResampleWeights | None
) -> ScoredReports:
    scores = headline_scores(statistics)
    figures = summarize_reports(statistics) | {"scores": scores}
    if weights is None:
        return ScoredReports(figures, {}, statistics)
    samples = resample_report_scores(statistics, weights)
    scored = [name for name, value in scores.items() if value is not None]
    figures["ci95"] = _score_intervals(samples, scored)
    return ScoredReports(figures, samples, statistics)


def resample_report_scores(
    statistics: ReportStatistics, weights: ResampleWeights
) -> dict[str, FloatArray]:
    """Headline scores in each resample, (R,); NaN where a resample has no value.

    Counts add up and means are weighted, so that a resample is one row of sums, whatever the number
    of cases.

    Args:
        statistics: statistics of N cases.
        weights: how often each case counts in each resample, (R, N).
    """
    counts, values = _split_columns(statistics)
    has_reference = statistics.has_reference
    scores_by_resample: list[dict[str, float | None]] = []
    for chunk in iterate_chunks(weights):
        n_references = chunk @ has_reference
        columns: JsonObject = {}
        for name, column in counts.items():
            columns[name] = np.tensordot(chunk, column, axes=1).astype(np.int64)
        for name, column in values.items():
            sums = chunk @ np.where(has_reference, column, 0)
            columns[name] = sums / np.maximum(n_references, 1)
        columns["has_reference"] = n_references > 0
        for i in range(len(chunk)):
            row = {name: column[i : i + 1] for name, column in columns.items()}
            scores_by_resample.append(headline_scores(replace(statistics, **row)))

    names = list(scores_by_resample[0]) if scores_by_resample else []
    samples = {}
    for name in names:
        values_of_score = [scores[name] for scores in scores_by_resample]
        samples[name] = np.array([np.nan if value is None else value for value in values_of_score])
    return samples


def _split_columns(
    statistics: ReportStatistics,
) -> tuple[dict[str, FloatArray], dict[str, FloatArray]]:
    """Columns that hold counts of each case, and columns that hold a score of each case."""
    counts, values = {}, {}
    for field in fields(statistics):
        column = getattr(statistics, field.name)
        if isinstance(column, np.ndarray) and column.dtype == np.int64:
            counts[field.name] = column
        elif isinstance(column, np.ndarray) and column.dtype == np.float64:
            values[field.name] = column
    return counts, values


def _score_intervals(samples: dict[str, FloatArray], names: Iterable[str]) -> JsonObject:
    return {name: percentile_interval(samples[name]) for name in names}


def _score_differences(image: ScoredReports, other: ScoredReports) -> JsonObject:
    """Image minus other of each score that both have, with intervals on the same resamples."""
    image_scores, other_scores = image.figures["scores"], other.figures["scores"]
    differences: JsonObject = {}
    for name, value in image_scores.items():
        if value is not None and other_scores.get(name) is not None:
            differences[name] = value - other_scores[name]
    if image.samples:
        names = list(differences)
        pairs: dict[str, FloatArray] = {}
        for name in names:
            pairs[name] = image.samples[name] - other.samples[name]
        differences["ci95"] = _score_intervals(pairs, names)
    return differences


def resolve_bertscore_encoder(config: Config) -> str | None:
    """Text encoder of BERTScore; None, with a warning, where it cannot be found."""
    try:
        return pretrained.resolve_model(config.text.model)
    except UserError as error:
        log.warning("BERTScore is left out: %s", error)
        return None
