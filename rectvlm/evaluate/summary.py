"""Figures of findings and lesions, from the results by scan."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from rectvlm.evaluate.case_records import LesionRecord
from rectvlm.evaluate.options import LESION_THRESHOLD, EvaluationOptions
from rectvlm.evaluate.scans import ScanResults
from rectvlm.finding_thresholds import FindingThresholds
from rectvlm.labels import LESIONS, N_LESIONS, Lesion
from rectvlm.metrics.bootstrap import ResampleWeights, draw_patient_weights
from rectvlm.metrics.findings import score_findings, score_prevalence
from rectvlm.metrics.lesion_overlap import score_lesion_overlap
from rectvlm.metrics.lesions import (
    HIT_DICE,
    MATCH_DICE,
    LesionComparison,
    score_grounding,
    score_lesions,
)
from rectvlm.metrics.vlm3d_protocol import score_by_protocol
from rectvlm.types import REXGROUNDING_OUTLINES, JsonObject

LesionRow = list[LesionComparison | None]
"""Five lesions of a scan, None where a lesion is not compared."""
SourceRow = list[str | None]
"""Sources of the outlines of the five lesions of a scan, None where a lesion is not compared."""


def draw_resamples(patients: list[str], options: EvaluationOptions) -> ResampleWeights | None:
    """Draw resamples of the patients; None where they are fewer than two, or none are wanted."""
    if not options.bootstrap or len(set(patients)) < 2:
        return None
    return draw_patient_weights(patients, options.bootstrap, options.seed)


def summarize_findings(
    scans: ScanResults, thresholds: FindingThresholds, weights: ResampleWeights | None
) -> JsonObject:
    """Classification figures by scan.

    `prevalence` has the means without an image, `vlm3d` figures by the VLM3D challenge's protocol.
    """
    scores = score_findings(
        scans.probabilities, scans.labels, scans.known, thresholds.values, weights
    )
    return scores | {
        "n_conflicting_labels": scans.n_conflicting_labels,
        "prevalence": score_prevalence(scores["per_finding"]),
        "vlm3d": score_by_protocol(scans.probabilities, scans.labels, scans.known),
    }


def compare_thresholds(scans: ScanResults, model_thresholds: FindingThresholds) -> JsonObject:
    """Macro and weighted figures at the model's thresholds and at 0.5, without intervals."""
    choices = {
        "model": model_thresholds,
        "0.5": FindingThresholds.all_default("0.5 for every finding"),
    }
    rows = {}
    for name, thresholds in choices.items():
        scores = score_findings(scans.probabilities, scans.labels, scans.known, thresholds.values)
        rows[name] = thresholds.as_dict() | {kind: scores[kind] for kind in ("macro", "weighted")}
    return rows


def summarize_lesions(
    scans: ScanResults, weights: ResampleWeights | None, options: EvaluationOptions
) -> JsonObject:
    """Localization figures by scan, on the native grid; Dice and IoU on the model's grid too.

    `sources` of a lesion counts the scans by who or what outlined it, and `per_source` has the
    figures against each: agreement with another network is not agreement with people.
    `rexgrounding` scores the outlines of ReXGroundingCT by its leaderboard's protocol.
    """
    rows = scans.select_lesions()
    n_lost: Counter[str] = Counter()
    truth_sources: Counter[str] = Counter()
    comparisons, sources = select_native_lesions(scans)
    counts = np.zeros((len(rows), N_LESIONS, 3), np.int64)
    annotated = np.zeros((len(rows), N_LESIONS), bool)
    for number, row in enumerate(rows):
        for lesion in LESIONS:
            record = row[lesion.bit]
            if record is None:
                continue
            truth_sources[record.truth] += 1
            counts[number, lesion.bit] = record.grid
            annotated[number, lesion.bit] = True
            n_lost[lesion.key] += _is_lost_on_native_grid(record)

    scores = score_lesions(comparisons, weights)
    scores["rexgrounding"] = score_grounding(
        select_source(comparisons, sources, REXGROUNDING_OUTLINES), weights
    )
    for lesion in LESIONS:
        lesion_scores = scores["per_lesion"][lesion.key]
        lesion_scores["n_lost_on_native_grid"] = n_lost[lesion.key]
        lesion_scores |= _score_by_source(lesion, comparisons, sources, weights)
    return scores | {
        "grid": "native",
        "threshold": LESION_THRESHOLD,
        "surface_tolerance_mm": options.surface_tolerance,
        "hit_dice": HIT_DICE,
        "match_dice": MATCH_DICE,
        "truth": dict(truth_sources),
        "model_grid": score_lesion_overlap(counts, annotated),
    }


def select_native_lesions(scans: ScanResults) -> tuple[list[LesionRow], list[SourceRow]]:
    """Comparisons of each scan on the native grid, and the sources of their outlines.

    A lesion that is lost there is not compared.
    """
    comparisons: list[LesionRow] = []
    sources: list[SourceRow] = []
    for row in scans.select_lesions():
        compared = [
            None if record and _is_lost_on_native_grid(record) else record for record in row
        ]
        comparisons.append([record.native if record else None for record in compared])
        sources.append([record.source if record else None for record in compared])
    return comparisons, sources


def _score_by_source(
    lesion: Lesion,
    comparisons: Sequence[LesionRow],
    sources: Sequence[SourceRow],
    weights: ResampleWeights | None,
) -> JsonObject:
    """Counts and figures of one lesion by the source of its true outlines.

    Args:
        lesion: kind of the lesion.
        comparisons: five lesions of each scan.
        sources: source of each of these lesions' outlines.
        weights: resamples of the scans.
    """
    sources_of_lesion = [row[lesion.bit] for row in sources]
    counts = Counter(source for source in sources_of_lesion if source is not None)
    per_source: JsonObject = {}
    for source in sorted(counts):
        rows = select_source(comparisons, sources, source)
        per_source[source] = score_lesions(rows, weights)["per_lesion"][lesion.key]
    return {"sources": dict(sorted(counts.items())), "per_source": per_source}


def select_source(
    comparisons: Sequence[LesionRow], sources: Sequence[SourceRow], source: str
) -> list[LesionRow]:
    """The same rows with the lesions that one source outlined; the others are None."""
    rows: list[LesionRow] = []
    for row, row_sources in zip(comparisons, sources, strict=True):
        pairs = zip(row, row_sources, strict=True)
        rows.append([lesion if found == source else None for lesion, found in pairs])
    return rows


def _is_lost_on_native_grid(record: LesionRecord) -> bool:
    """Whether a true lesion fell between the voxels of a native grid coarser than the model's."""
    return record.truth == "shard" and record.native.truth == 0 and record.grid[2] > 0
