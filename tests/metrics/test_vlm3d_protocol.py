"""The challenge's protocol: equal to its published formulas, on any vectors."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import (
    accuracy_score,
    f1_score,
    precision_score,
    recall_score,
    roc_auc_score,
)

from rectvlm.labels import FINDINGS, N_FINDINGS
from rectvlm.metrics.vlm3d_protocol import PROTOCOL_SCORES, score_by_protocol

Matrix = NDArray[np.float64]


def published_macro(probabilities: Matrix, labels: Matrix) -> dict[str, float | None]:
    """Means as in `calc_scores.py`, written out: one column at a time, `zero_division=0`."""
    called, truth = (probabilities >= 0.5).astype(int), labels.astype(int)
    columns: dict[str, list[float]] = {score: [] for score in PROTOCOL_SCORES}
    for i in range(N_FINDINGS):
        pair = truth[:, i], called[:, i]
        columns["precision"].append(precision_score(*pair, zero_division=0))
        columns["recall"].append(recall_score(*pair, zero_division=0))
        columns["f1"].append(f1_score(*pair, zero_division=0))
        columns["accuracy"].append(accuracy_score(*pair))
        if len(set(truth[:, i])) == 2:
            columns["auroc"].append(roc_auc_score(truth[:, i], probabilities[:, i]))
    return {name: float(np.mean(values)) if values else None for name, values in columns.items()}


def published_crg(probabilities: Matrix, labels: Matrix) -> float | None:
    """CRG as in `crg_score.py`; None where it divides by no positive."""
    called, truth = probabilities >= 0.5, labels == 1
    tp, fn, fp = (called & truth).sum(), (~called & truth).sum(), (called & ~truth).sum()
    x, a = labels.size, truth.sum()
    if a == 0:
        return None
    r, u = (x - a) / (2 * a), (x - a) / 2
    s = r * tp - r * fn - fp
    return u / (2 * u - s) if 2 * u - s != 0 else 0


def check_equality(probabilities: Matrix, labels: Matrix) -> None:
    scores = score_by_protocol(probabilities, labels, np.ones(labels.shape, bool))
    assert scores["macro"] == pytest.approx(published_macro(probabilities, labels), abs=1e-12)
    if not labels.all():  # the published code then says 0, ours that there is no value
        assert scores["crg"] == pytest.approx(published_crg(probabilities, labels), abs=1e-12)
    assert scores["n_findings"] == N_FINDINGS


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.floats(0, 1))
def test_random_vectors_give_the_published_figures(seed: int, n: int, prevalence: float) -> None:
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, N_FINDINGS)) < prevalence).astype(float)
    # Ties, and probabilities of exactly 0, 0.5 and 1.
    probabilities = rng.integers(0, 5, (n, N_FINDINGS)) / 4
    check_equality(probabilities, labels)


@pytest.mark.parametrize("missing", [0, 1])
@pytest.mark.parametrize("called", [0.0, 0.5, 1.0])
def test_a_finding_of_one_class_counts_as_published(missing: int, called: float) -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random((30, N_FINDINGS)) < 0.3).astype(float)
    probabilities = rng.random((30, N_FINDINGS))
    labels[:, 7], probabilities[:, 7] = 1 - missing, called
    check_equality(probabilities, labels)
    scores = score_by_protocol(probabilities, labels, np.ones(labels.shape, bool))
    row = scores["per_finding"][FINDINGS[7]]
    assert row["auroc"] is None
    if missing == 1:  # no positive: 0, and part of the mean
        assert row["f1"] == row["recall"] == row["precision"] == 0.0


def test_all_right_all_wrong_and_nothing_called() -> None:
    labels = np.tile(np.eye(N_FINDINGS), (2, 1))
    known = np.ones(labels.shape, bool)
    for probabilities, crg in ((labels, 1.0), (1 - labels, 0.2), (0 * labels, 1 / 3)):
        check_equality(probabilities, labels)
        assert score_by_protocol(probabilities, labels, known)["crg"] == pytest.approx(crg)
    nothing = np.zeros_like(labels)
    scores = score_by_protocol(nothing, nothing, known)
    assert scores["crg"] is None and scores["macro"]["auroc"] is None
    assert scores["macro"]["accuracy"] == 1 and scores["macro"]["f1"] == 0


def test_unknown_labels_take_no_part() -> None:
    rng = np.random.default_rng(1)
    labels = (rng.random((20, N_FINDINGS)) < 0.4).astype(float)
    probabilities = rng.random((20, N_FINDINGS))
    known = np.ones(labels.shape, bool)
    known[:, [4, 13]] = False  # as in Rad-ChestCT
    known[:5, 0] = False
    scores = score_by_protocol(probabilities, labels, known)
    assert scores["n_findings"] == 16 and FINDINGS[4] not in scores["per_finding"]
    first = probabilities[5:, 0], labels[5:, 0]
    row = scores["per_finding"][FINDINGS[0]]
    assert row["f1"] == pytest.approx(f1_score(first[1], first[0] >= 0.5))
    changed = np.where(known, labels, 1 - labels)
    assert score_by_protocol(probabilities, changed, known) == scores
