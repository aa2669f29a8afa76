"""Cues of the report prompt: suggested findings with grades, and lesions with their places.

A finding is suggested where its probability reaches its threshold, as a call is. Its grade says how
far the log-odds lie above those of the threshold:

    Certain findings: consolidation. Possible findings: lung nodule. Lesions outlined: …

Shapes: B samples, F findings (18), Z × Y × X voxels.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rectvlm.labels import FINDINGS, LESION_BY_KEY
from rectvlm.lesion_places import describe_places, locate_lesions
from rectvlm.models.report_prompt import describe_examination
from rectvlm.types import COARSE_REGIONS_SOURCE, Batch, SampleMeta

GRADES = (("Certain", 2.0), ("Likely", 1.0), ("Possible", 0.0))
"""Grades of suggested findings with the log-odds above the threshold from which each holds."""
TRUE_CUE_LOG_ODDS = 3.0
"""Log-odds above or below the threshold at which a true label stands, before noise: as of a
classifier that is 95% certain where the threshold is one half."""
_SMALLEST_PROBABILITY = 1e-6
"""Probability at which log-odds are cut off, and its distance from 1."""


def draw_true_cues(labels: Tensor, thresholds: Tensor, noise: float) -> Tensor:
    """Probabilities (B, F) as a classifier would give them to true labels (B, F), 0 or 1.

    Args:
        labels: true labels.
        thresholds: thresholds of the findings, (F,).
        noise: standard deviation of the log-odds around ±`TRUE_CUE_LOG_ODDS` (m). With s the
            standard deviation and Φ the normal distribution, a share Φ(−m/s) of the cues is wrong,
            and their AUROC is Φ(√2·m/s), the AUROC of two normal distributions 2m apart.
    """
    log_odds = TRUE_CUE_LOG_ODDS * (2 * labels - 1)
    if noise:
        # Drawn on the CPU: the same numbers on every device.
        log_odds = log_odds + noise * torch.randn(labels.shape).to(labels.device)
    return torch.sigmoid(torch.logit(thresholds, eps=_SMALLEST_PROBABILITY) + log_odds)


def describe_batch_cues(
    batch: Batch, findings: Tensor, thresholds: Sequence[float], lesion_bits: Tensor
) -> list[str]:
    """Cues of each sample from its indication and technique, probabilities (B, F), thresholds (F,)
    and lesion bits (B, Z, Y, X)."""
    cues = []
    for i, meta in enumerate(batch.metas):
        # The lobes of a coarse map are only roughly placed. Lesions are then described by side and
        # zone, as without a map.
        has_lobes = bool(batch.regions_known[i]) and meta.regions_source != COARSE_REGIONS_SOURCE
        regions = batch.regions[i] if has_lobes else None
        probabilities = findings[i].tolist()
        text = describe_cues(
            probabilities, thresholds, lesion_bits[i], batch.ct[i], regions, batch.spacing
        )
        cues.append(add_examination(text, meta))
    return cues


def add_examination(cues: str, meta: SampleMeta) -> str:
    """Put what was known before the CT, the indication and the technique, before cues."""
    examination = describe_examination(meta.indication, meta.technique)
    return f"{examination} {cues}".lstrip()


def describe_cues(
    findings: Sequence[float],
    thresholds: Sequence[float],
    lesion_bits: Tensor,
    ct: Tensor,
    regions: Tensor | None,
    spacing: tuple[float, float, float],
) -> str:
    """Findings and lesions of one sample, in words.

    A lesion whose finding is not suggested is left out. A prompt that contradicts itself makes the
    language model write the finding, and a localizer outlines specks where a classifier sees none.

    Args:
        findings: (F,), probabilities.
        thresholds: (F,), thresholds of the findings.
        lesion_bits: (Z, Y, X).
        ct: (Z, Y, X) HU.
        regions: (Z, Y, X) region ids, if they are known.
        spacing: voxel size (z, y, x), mm.
    """
    names_by_grade = grade_findings(findings, thresholds)
    suggested = {name for names in names_by_grade.values() for name in names}
    hu = ct.round().to(torch.int16).cpu().numpy()
    region_ids = None if regions is None else regions.cpu().numpy().astype(np.uint8)

    consistent_places = []
    for place in locate_lesions(lesion_bits.cpu().numpy(), hu, region_ids, spacing):
        if LESION_BY_KEY[place.lesion].finding in suggested:
            consistent_places.append(place)
    return f"{_word_findings(names_by_grade)} {describe_places(consistent_places)}"


def grade_findings(findings: Sequence[float], thresholds: Sequence[float]) -> dict[str, list[str]]:
    """Names of the suggested findings by grade, from probabilities (F,) and thresholds (F,)."""
    names_by_grade: dict[str, list[str]] = {grade: [] for grade, _ in GRADES}
    for name, probability, threshold in zip(FINDINGS, findings, thresholds, strict=True):
        # The probabilities are compared, as for a call: log-odds may round another way.
        if probability >= threshold:
            excess = max(0.0, _to_log_odds(probability) - _to_log_odds(threshold))
            grade = next(grade for grade, lowest in GRADES if excess >= lowest)
            names_by_grade[grade].append(name)
    return names_by_grade


def _to_log_odds(probability: float) -> float:
    clipped = min(max(probability, _SMALLEST_PROBABILITY), 1 - _SMALLEST_PROBABILITY)
    return math.log(clipped / (1 - clipped))


def _word_findings(names_by_grade: dict[str, list[str]]) -> str:
    sentences = []
    for grade, names in names_by_grade.items():
        if names:
            sentences.append(f"{grade} findings: {', '.join(names).lower()}.")
    return " ".join(sentences) or "No findings suggested."
