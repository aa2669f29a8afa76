"""Summaries of cases for tests of what is written of them."""

import numpy as np
from numpy.typing import NDArray

from rectvlm.data.coarse_regions import estimate_coarse_regions
from rectvlm.labels import FINDINGS
from rectvlm.lesion_places import LesionLocator
from rectvlm.predict.case_folder import canonical_view, summarize_lesions
from rectvlm.predict.case_summary import (
    CaseSummary,
    FindingSummary,
    ThresholdsSummary,
)
from rectvlm.predict.lesion_lobes import LOBES_NOTE, LobeFinder
from rectvlm.predict.lesion_table import measure_lesions
from rectvlm.types import HuConversion

DISCLAIMER = "Research use only; not a medical device."
REPORT = {"findings": "A nodule in the right lung.\nNo effusion.", "impression": "Ein Knötchen."}


def make_summary(
    lesion_bits: NDArray[np.uint8],
    hu: NDArray[np.int16],
    affine: NDArray[np.float64],
    report: dict[str, str | None] | None = REPORT,
) -> CaseSummary:
    """Summary of outlines (i, j, k) on a CT, with every second finding called."""
    bits, view_affine = canonical_view(lesion_bits, affine)
    ct, _ = canonical_view(hu, affine)
    spacing = tuple(float(step) for step in np.linalg.norm(view_affine[:3, :3], axis=0))
    locator = LesionLocator(ct, None, spacing)
    places = locator.locate_all(bits)
    lobe_finder = LobeFinder(lambda: estimate_coarse_regions(ct, spacing), spacing)
    table = measure_lesions(bits, ct, view_affine, locator, lobe_finder)
    findings = {}
    for number, name in enumerate(FINDINGS):
        findings[name] = FindingSummary(number / 20, 0.5 if number % 2 else 0.01, not number % 2)
    return CaseSummary(
        disclaimer=DISCLAIMER,
        file="ct-0123456789ab",
        shape=list(hu.shape),
        spacing_zyx_mm=list(spacing),
        hu=HuConversion(1.0, 0.0, "the file is DICOM"),
        checkpoint="/secret/place",
        config="tiny",
        step=60,
        version="0.1.0",
        thresholds=ThresholdsSummary("cases of a test", 4, []),
        findings=findings,
        lesions=summarize_lesions(bits, view_affine, places, lobe_finder),
        components=table.components,
        components_left_out=table.n_left_out,
        components_left_out_ml=table.left_out_ml,
        lobes_note=LOBES_NOTE,
        report=report,
        contradictions=[],
    )
