"""All figures of two models on the same cases, in resamples and in exchanges of both.

Shapes: S scans, M rows of weights.
"""

import numpy as np

from rectvlm.evaluate.pairing import EvaluationPair
from rectvlm.evaluate.report_figures import resample_report_scores
from rectvlm.evaluate.stored_evaluation import StoredEvaluation
from rectvlm.evaluate.summary import LesionRow, select_source
from rectvlm.labels import FINDINGS
from rectvlm.metrics.arrays import BoolArray, FloatArray
from rectvlm.metrics.bootstrap import ResampleWeights
from rectvlm.metrics.findings import FINDING_SCORES, mean_over_findings, resample_finding_scores
from rectvlm.metrics.lesions import resample_grounding_scores, resample_lesion_scores
from rectvlm.metrics.paired_test import rank_scores
from rectvlm.types import REXGROUNDING_OUTLINES

Figures = dict[str, FloatArray]
"""Values of each figure, (M,), by its dotted path in `metrics.json`; NaN where a row of weights has
none."""


def compute_figures(pair: EvaluationPair, weights: ResampleWeights) -> Figures:
    """Compute every figure that both evaluations have, in each row of weights.

    Args:
        pair: evaluations A and B of S scans.
        weights: how often each case counts: S scans by the results of A, then by those of B,
            (M, 2S).
    """
    figures = _finding_figures(pair, weights)
    if pair.lesions_a is not None and pair.lesions_b is not None:
        figures |= _lesion_figures(pair, [*pair.lesions_a, *pair.lesions_b], weights)
    if pair.reports is not None:
        n_scans = len(pair.scans_a.names)
        columns = np.concatenate([pair.report_scans, pair.report_scans + n_scans])
        for score, values in resample_report_scores(pair.reports, weights[:, columns]).items():
            figures[f"reports.image.scores.{score}"] = values
    return {name: values for name, values in figures.items() if name not in pair.left_out}


def _finding_figures(pair: EvaluationPair, weights: ResampleWeights) -> Figures:
    both = (pair.scans_a, pair.scans_b)
    called = [_call_findings(pair.a, both[0].probabilities)]
    called.append(_call_findings(pair.b, both[1].probabilities))
    samples = resample_finding_scores(
        np.concatenate([scans.probabilities for scans in both]),
        np.concatenate([scans.labels for scans in both]),
        np.concatenate([scans.known for scans in both]),
        np.concatenate(called),
        weights,
        ranks=np.concatenate([rank_scores(scans.probabilities, scans.known) for scans in both]),
    )
    figures = {}
    for score in FINDING_SCORES:
        values = samples[score]
        figures[f"classification.macro.{score}"] = mean_over_findings(values, 1.0)
        weighted_mean = mean_over_findings(values, samples["positives"])
        figures[f"classification.weighted.{score}"] = weighted_mean
        for i, finding in enumerate(FINDINGS):
            figures[f"classification.per_finding.{finding}.{score}"] = values[:, i]
    return figures


def _call_findings(evaluation: StoredEvaluation, probabilities: FloatArray) -> BoolArray:
    """Calls at the thresholds of the evaluation, (S, 18)."""
    rows = evaluation.metrics["classification"]["per_finding"]
    thresholds = np.array([rows[finding]["threshold"] for finding in FINDINGS])
    return probabilities >= thresholds


def _lesion_figures(
    pair: EvaluationPair, lesions: list[LesionRow], weights: ResampleWeights
) -> Figures:
    figures = {}
    for name, scores in resample_lesion_scores(lesions, weights).items():
        place = name if name == "macro" else f"per_lesion.{name}"
        for score, values in scores.items():
            figures[f"localization.{place}.{score}"] = values
    sources = [*pair.lesion_sources, *pair.lesion_sources]
    outlined_by_people = select_source(lesions, sources, REXGROUNDING_OUTLINES)
    for score, values in resample_grounding_scores(outlined_by_people, weights).items():
        figures[f"localization.rexgrounding.{score}"] = values
    return figures
