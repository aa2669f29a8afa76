"""Reports beside their control: intervals and differences are those of the resampled cases."""

from dataclasses import fields, replace

import numpy as np
import pytest
from numpy.typing import NDArray

from rectvlm.evaluate.report_figures import resample_report_scores
from rectvlm.metrics.bootstrap import draw_patient_weights
from rectvlm.metrics.reports import ReportStatistics, compute_report_statistics, headline_scores

TRUTHS = [
    "Findings: There is a small left pleural effusion. The heart is enlarged.",
    "Findings: No pleural effusion. There is a nodule in the right upper lobe.",
    None,
    "Findings: Consolidation in the left lower lobe. Emphysema in both lungs.",
    "Findings: The lungs are clear. No lymphadenopathy.",
]
WRITTEN = [
    "Findings: There is a small right pleural effusion.",
    "Findings: There is a nodule in the right upper lobe. Emphysema.",
    "Findings: The lungs are clear.",
    "Findings: Consolidation in the left lower lobe.",
    "Findings: Cardiomegaly. The lungs are clear.",
]


@pytest.fixture(scope="module")
def rows() -> ReportStatistics:
    rng = np.random.default_rng(0)
    labels = (rng.random((5, 18)) < 0.4).astype(float)
    return compute_report_statistics(
        WRITTEN, TRUTHS, labels=labels, known=rng.random((5, 18)) < 0.8
    )


def drawn(rows: ReportStatistics, cases: NDArray[np.int64]) -> ReportStatistics:
    """The rows of some cases, repeated or not."""
    arrays = {f.name: getattr(rows, f.name) for f in fields(rows)}
    return replace(
        rows, **{name: a[cases] for name, a in arrays.items() if isinstance(a, np.ndarray)}
    )


def test_a_resample_scores_as_its_cases_score(rows: ReportStatistics) -> None:
    weights = draw_patient_weights(["a", "b", "c", "a", "d"], 30, seed=2)
    found = resample_report_scores(rows, weights)
    for i, weight in enumerate(weights):
        expected = headline_scores(drawn(rows, np.repeat(np.arange(5), weight)))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name][i] == pytest.approx(
                np.nan if value is None else value, nan_ok=True
            ), name


def test_cases_without_a_reference_do_not_dilute_means(rows: ReportStatistics) -> None:
    weights = np.ones((1, 5), np.uint16)
    found, whole = resample_report_scores(rows, weights), headline_scores(rows)
    assert found["rouge_l"][0] == pytest.approx(whole["rouge_l"])
    none = replace(rows, has_reference=np.zeros(5, bool))
    assert np.isnan(resample_report_scores(none, weights)["rouge_l"]).all()
