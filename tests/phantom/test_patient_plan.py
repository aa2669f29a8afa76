"""Styles: the prevalences and reports of `ct-rate`, and the phantoms that must not change."""

import hashlib
import json

import numpy as np
import pytest

from rectvlm.labels import FINDINGS
from rectvlm.metrics.report_labeler.finding_states import FindingState
from rectvlm.metrics.report_labeler.labeler import load_labeler
from rectvlm.phantom.patient_plan import (
    CT_RATE_PREVALENCE,
    CT_RATE_STYLE,
    PHANTOM_STYLES,
    PLAIN_STYLE,
    PhantomStyle,
    draw_patient_plan,
)
from rectvlm.phantom.phantom import make_phantom
from rectvlm.phantom.report import write_report

PLANS = [draw_patient_plan(seed, CT_RATE_STYLE) for seed in range(600)]


def test_findings_are_as_frequent_as_in_ct_rate() -> None:
    assert CT_RATE_STYLE.findings == PLAIN_STYLE.findings
    for finding in FINDINGS:
        rate = np.mean([plan.present[finding] for plan in PLANS])
        expected = CT_RATE_PREVALENCE[finding] if finding in CT_RATE_STYLE.findings else 0
        assert rate == pytest.approx(expected, abs=0.065), finding


def test_a_consolidation_alone_is_no_lung_opacity() -> None:
    alone = [plan for plan in PLANS if plan.present["Consolidation"] and not plan.ground_glass]
    assert alone and not any(plan.present["Lung opacity"] for plan in alone)
    assert all(plan.present["Lung opacity"] == bool(plan.ground_glass) for plan in PLANS)


def test_reports_have_a_long_tail() -> None:
    reports = ["\n".join(write_report(plan)) for plan in PLANS]
    assert len(set(reports)) > 0.9 * len(reports)
    assert any("No pleural effusion." in report for report in reports)


@pytest.mark.parametrize("style", PHANTOM_STYLES.values(), ids=PHANTOM_STYLES)
def test_the_labeler_reads_the_labels_of_every_report_in_the_convention_of_its_style(
    style: PhantomStyle,
) -> None:
    plans = [draw_patient_plan(seed, style) for seed in range(200)]
    reports = ["\n".join(write_report(plan)) for plan in plans]
    labeler = load_labeler("rules", style.convention)
    calls = labeler.label_reports(reports) >= FindingState.UNCERTAIN
    for plan, called, report in zip(plans, calls, reports, strict=True):
        for finding, is_called in zip(FINDINGS, called, strict=True):
            assert is_called == plan.present[finding], f"{finding}: {report}"


EXPECTED_PHANTOMS = (
    # style, seed, checksum of labels and report, sums of lesion bits and of region ids
    ("varied", 0, "267f9588a8f913d8", 92026, 2000277),
    ("varied", 3, "e2ba895baaa5e985", 121186, 2241584),
    ("plain", 0, "a52035814cd5b397", 81882, 1549550),
    ("plain", 3, "f651f77d9a3ec1ee", 76260, 1451146),
    ("plain", 100_001, "de7c22b0ab975b9f", 83943, 1478494),
)


@pytest.mark.parametrize(("style", "seed", "checksum", "lesions", "regions"), EXPECTED_PHANTOMS)
def test_phantoms_of_a_seed_are_what_they_were(
    style: str, seed: int, checksum: str, lesions: int, regions: int
) -> None:
    """Figures of earlier runs stay comparable. Voxels differ by machine in a last digit."""
    made = make_phantom(seed, PHANTOM_STYLES[style])
    facts = [made.labels, made.findings, made.impression, made.lesions_annotated]
    assert hashlib.sha256(json.dumps(facts).encode()).hexdigest().startswith(checksum)
    assert int(made.lesions.sum(dtype=np.int64)) == pytest.approx(lesions, rel=1e-3)
    assert int(made.regions.sum(dtype=np.int64)) == pytest.approx(regions, rel=1e-3)
