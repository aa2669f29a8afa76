"""Cues of the report prompt: grades of the findings, and true ones with noise."""

import math

import pytest
import torch
from scipy.special import ndtr
from sklearn.metrics import roc_auc_score

from rectvlm.labels import FINDINGS, N_FINDINGS
from rectvlm.models.cues import TRUE_CUE_LOG_ODDS, draw_true_cues, grade_findings

THRESHOLDS = torch.linspace(0.05, 0.9, N_FINDINGS)


@pytest.mark.parametrize("threshold", [0.02, 0.5, 0.97])
def test_a_grade_says_how_far_a_finding_lies_above_its_threshold(threshold: float) -> None:
    def grade(log_odds: float) -> list[str]:
        odds = threshold / (1 - threshold) * math.exp(log_odds)
        probabilities = [odds / (1 + odds), *[0.0] * (N_FINDINGS - 1)]
        names_by_grade = grade_findings(probabilities, [threshold] * N_FINDINGS)
        return [grade for grade, names in names_by_grade.items() if names]

    assert grade(3) == grade(2.01) == ["Certain"]
    assert grade(1.99) == grade(1.01) == ["Likely"]
    assert grade(0.99) == grade(0.01) == ["Possible"]
    assert grade(-0.01) == grade(-9) == []


def test_exactly_the_findings_that_are_called_are_suggested() -> None:
    """At the threshold itself too, and where probabilities have run against their ends."""
    probabilities = [0.0, 1.0, 0.5, 0.3, 1e-9, 1.0, *[0.4] * (N_FINDINGS - 6)]
    thresholds = [0.0, 1.0, 0.5, 0.3000001, 1e-9, 1e-9, *[0.6] * (N_FINDINGS - 6)]
    names_by_grade = grade_findings(probabilities, thresholds)
    suggested = {name for names in names_by_grade.values() for name in names}
    assert suggested == {FINDINGS[i] for i in (0, 1, 2, 4, 5)}
    assert FINDINGS[5] in names_by_grade["Certain"] and FINDINGS[2] in names_by_grade["Possible"]


def test_true_cues_without_noise_are_certain_and_draw_no_numbers() -> None:
    labels = (torch.arange(N_FINDINGS) % 2).float()[None]
    state = torch.get_rng_state()
    cues = draw_true_cues(labels, THRESHOLDS, 0)
    assert torch.equal(torch.get_rng_state(), state)
    names_by_grade = grade_findings(cues[0].tolist(), THRESHOLDS.tolist())
    assert names_by_grade == {"Certain": list(FINDINGS[1::2]), "Likely": [], "Possible": []}


@pytest.mark.parametrize("noise", [1.0, 4.0])
def test_noise_gives_cues_the_errors_of_a_classifier(noise: float) -> None:
    """The share of wrong cues and the AUROC are those of two normal distributions."""
    torch.manual_seed(0)
    labels = (torch.rand(4000, N_FINDINGS) < 0.3).float()
    cues = draw_true_cues(labels, THRESHOLDS, noise)
    is_wrong = (cues >= THRESHOLDS) != (labels > 0)
    assert is_wrong.float().mean() == pytest.approx(ndtr(-TRUE_CUE_LOG_ODDS / noise), abs=4e-3)
    auroc = roc_auc_score(labels[:, 3], cues[:, 3])
    assert auroc == pytest.approx(ndtr(2**0.5 * TRUE_CUE_LOG_ODDS / noise), abs=0.02)
