"""Approximate lobes of lesions: as exact maps have them, never of the other side, never a guess."""

import csv
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from rectvlm.data.coarse_regions import estimate_coarse_regions
from rectvlm.labels import LESION_BY_KEY, LOBES, REGION_BY_NAME
from rectvlm.lesion_bits import lesion_mask
from rectvlm.lesion_places import LesionLocator, LesionPlace
from rectvlm.phantom.phantom import make_phantom
from rectvlm.predict.case_folder import canonical_view
from rectvlm.predict.fhir import make_diagnostic_report
from rectvlm.predict.lesion_lobes import LOBES_NOTE, LobeFinder
from rectvlm.predict.lesion_table import write_lesion_csv
from rectvlm.predict.markdown_report import render_markdown
from tests.predict.small_summary import make_summary

NODULE = LESION_BY_KEY["lung_nodule"]
LUNG_LESIONS = [lesion for lesion in LESION_BY_KEY.values() if lesion.site == "lung"]
SPACING = (4.0, 2.0, 2.0)


def place_at(side: Any, is_plausible: bool | None = True) -> LesionPlace:
    return LesionPlace(NODULE.key, 1.0, side, (), "geometry", "somewhere", is_plausible)


@pytest.mark.slow
def test_the_main_lobe_of_most_lesions_is_that_of_the_exact_map(record_property: Any) -> None:
    """In phantoms of all axis orders, whose true lobes are known."""
    outcomes: Counter[str] = Counter()
    for seed in range(12):
        phantom = make_phantom(seed)
        ct, affine = canonical_view(phantom.hu, phantom.affine)
        bits, _ = canonical_view(phantom.lesions, phantom.affine)
        regions, _ = canonical_view(phantom.regions, phantom.affine)
        z_mm, y_mm, x_mm = np.linalg.norm(affine[:3, :3], axis=0).tolist()
        spacing = (z_mm, y_mm, x_mm)
        locator = LesionLocator(ct, None, spacing)
        finder = LobeFinder(partial(estimate_coarse_regions, ct, spacing), spacing)
        for lesion in LUNG_LESIONS:
            parts, n_parts = ndimage.label(lesion_mask(bits, lesion), np.ones((3, 3, 3)))
            for number in range(1, n_parts + 1):
                voxels = np.flatnonzero(parts == number)
                true_ids = regions.reshape(-1)[voxels]
                true_ids = true_ids[(true_ids > 0) & (true_ids <= len(LOBES))]
                if voxels.size * z_mm * y_mm * x_mm < 200 or not true_ids.size:
                    continue
                place = locator.locate(lesion, voxels, 1.0)
                lobes = finder.find_lobes(lesion, place, voxels)
                true_lobe = LOBES[np.bincount(true_ids).argmax() - 1]
                if lobes is None:
                    outcomes["none"] += 1
                    continue
                sides = {REGION_BY_NAME[name].side for name in lobes}
                assert true_lobe.side in sides
                outcomes["right" if lobes[0] == true_lobe.name else "wrong"] += 1
    record_property("outcomes", dict(outcomes))
    assert outcomes["right"] > 0.7 * outcomes.total(), outcomes


def make_regions() -> NDArray[np.uint8]:
    """Two boxes of lung at `SPACING`, of one lobe each, and a heart between them."""
    regions = np.zeros((20, 60, 70), np.uint8)
    regions[5:15, 20:40, 5:30] = REGION_BY_NAME["right lower lobe"].id
    regions[5:15, 20:40, 45:65] = REGION_BY_NAME["left upper lobe"].id
    regions[5:15, 20:40, 31:44] = REGION_BY_NAME["heart"].id
    return regions


def voxels_of(*box: slice) -> NDArray[np.intp]:
    mask = np.zeros((20, 60, 70), bool)
    mask[box] = True
    return np.flatnonzero(mask)


def test_a_lesion_in_or_beside_a_lobe_has_it_and_one_far_from_it_has_none() -> None:
    finder = LobeFinder(make_regions, SPACING)

    def find(voxels: NDArray[np.intp], place: LesionPlace | None) -> tuple[str, ...] | None:
        return finder.find_lobes(NODULE, place, voxels)

    inside = voxels_of(slice(6, 9), slice(25, 30), slice(10, 15))
    assert find(inside, place_at("right")) == ("right lower lobe",)
    behind = voxels_of(slice(6, 9), slice(41, 44), slice(10, 15))  # 2 to 8 mm
    assert find(behind, place_at("right")) == ("right lower lobe",)
    far = voxels_of(slice(6, 9), slice(50, 55), slice(10, 15))
    assert find(far, place_at("right")) is None
    heart = voxels_of(slice(6, 9), slice(25, 30), slice(35, 40))
    assert find(heart, place_at("right")) is None
    both = voxels_of(slice(6, 9), slice(25, 30), slice(10, 60))
    assert find(both, place_at("both")) == ("right lower lobe", "left upper lobe")


def test_a_lobe_is_never_of_the_other_side_and_never_a_guess() -> None:
    finder = LobeFinder(make_regions, SPACING)
    inside = voxels_of(slice(6, 9), slice(25, 30), slice(10, 15))
    for place in (place_at("left"), place_at("right", None), place_at("right", False), None):
        assert finder.find_lobes(NODULE, place, inside) is None
    effusion = LESION_BY_KEY["pleural_effusion"]
    assert finder.find_lobes(effusion, place_at("right"), inside) is None
    # A CT without lungs has a map of zeros.
    no_lungs = LobeFinder(lambda: np.zeros((20, 60, 70), np.uint8), SPACING)
    assert no_lungs.find_lobes(NODULE, place_at("right"), inside) is None


def test_table_report_and_fhir_name_the_lobe_and_say_that_it_is_approximate(
    tmp_path: Path,
) -> None:
    phantom = next(
        phantom
        for phantom in map(make_phantom, range(20))
        if [place.lesion for place in phantom.true_places] == [NODULE.key]
    )
    summary = make_summary(phantom.lesions, phantom.hu, phantom.affine)
    assert summary.components is not None and summary.lesions is not None
    (lobes,) = {row.approximate_lobes for row in summary.components[:1]}
    assert lobes and summary.lesions[NODULE.bit].approximate_lobes
    write_lesion_csv(summary.components, tmp_path / "lesions.csv")
    with (tmp_path / "lesions.csv").open(newline="") as file:
        row = next(csv.DictReader(file))
    assert row["approximate_lobes"].split("; ") == list(lobes)
    assert row["side"] in row["approximate_lobes"]
    markdown = render_markdown("ct", summary)
    assert "Lobe (approximate)" in markdown and f"| {lobes[0]} |" in markdown
    assert LOBES_NOTE in markdown
    tree = make_diagnostic_report("ct", summary)
    (note,) = next(row for row in tree["contained"] if row["id"] == "lesion-1")["note"]
    assert lobes[0] in note["text"] and LOBES_NOTE in note["text"]
