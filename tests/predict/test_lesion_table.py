"""Single lesions: counted by components, measured in mm in their slice, bounded in number."""

import csv
from pathlib import Path

import numpy as np
import pytest

from rectvlm.labels import LESION_BY_KEY
from rectvlm.lesion_places import LesionLocator
from rectvlm.predict.lesion_lobes import LobeFinder
from rectvlm.predict.lesion_table import (
    MAX_COMPONENTS,
    LesionTable,
    longest_axial_diameter,
    measure_lesions,
    write_lesion_csv,
)

NODULE = LESION_BY_KEY["lung_nodule"].mask_value


def make_affine(z_mm: float, y_mm: float, x_mm: float) -> np.ndarray:
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = z_mm, -y_mm, -x_mm, 1
    return affine


def measure(bits: np.ndarray, affine: np.ndarray, hu: int = 30) -> LesionTable:
    ct = np.full(bits.shape, hu, np.int16)
    spacing = tuple(float(mm) for mm in np.linalg.norm(affine[:3, :3], axis=0))
    lobe_finder = LobeFinder(lambda: np.zeros_like(bits), spacing)
    return measure_lesions(bits, ct, affine, LesionLocator(ct, None, spacing), lobe_finder)


@pytest.mark.parametrize("angle", [0.0, 0.3])
def test_the_diameter_of_a_disc_is_in_mm_whatever_the_pixels_and_the_tilt(angle: float) -> None:
    affine = make_affine(3.0, 1.6, 0.4)
    y, x = np.indices((60, 240))
    mask = np.zeros((3, 60, 240), bool)
    mask[1] = ((y - 30) * 1.6) ** 2 + ((x - 120) * 0.4) ** 2 < 20**2
    mask[0, 30, 118:122] = True
    turn = np.array(
        [[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]]
    )
    affine[:3, :3] = turn @ affine[:3, :3]
    diameter, z = longest_axial_diameter(mask, affine)
    assert z == 1 and diameter == pytest.approx(40, abs=1.6)  # a pixel


def test_a_diagonal_line_is_as_long_as_it_is_in_a_sheared_grid() -> None:
    affine = make_affine(2.0, 1.0, 1.0)
    affine[0, 1] = 0.5  # the axes of the slice are not at right angles
    mask = np.eye(21, dtype=bool)[None]
    diameter, _ = longest_axial_diameter(mask, affine)
    step = np.linalg.norm(affine[:3, 1] + affine[:3, 2])
    assert diameter == pytest.approx(20 * step, abs=np.linalg.norm(affine[:3, 1:3]))
    single = np.ones((1, 1, 1), bool)
    assert longest_axial_diameter(single, make_affine(9, 2, 0.5))[0] == pytest.approx(2)


def test_each_component_of_each_kind_has_a_row() -> None:
    bits = np.zeros((20, 40, 40), np.uint8)
    bits[4:8, 10:20, 5:9] |= NODULE
    bits[8, 20, 9] |= NODULE  # touches a corner
    bits[12:14, 30:34, 30:32] |= NODULE
    bits[3:10, 8:30, 4:12] |= LESION_BY_KEY["consolidation"].mask_value
    table = measure(bits, make_affine(2, 1, 1))
    assert [(row.lesion, row.number) for row in table.components] == [
        *(("consolidation", 1), ("lung_nodule", 1), ("lung_nodule", 2))
    ]
    assert [row.voxels for row in table.components] == [7 * 22 * 8, 161, 16]
    assert table.components[1].volume_ml == pytest.approx(0.322)
    small = table.components[2]
    assert small.slice in (13, 14) and small.mean_hu == 30
    assert small.centre_mm == pytest.approx((-30.5, -31.5, 25.0))
    assert small.place is None and small.approximate_lobes is None  # 0.03 ml
    assert table.n_left_out == 0


def test_thousands_of_specks_are_counted_and_the_largest_lesions_listed() -> None:
    bits = np.zeros((40, 80, 80), np.uint8)
    bits[::2, ::2, ::2] = NODULE
    bits[10:14, 10:14, 10:14] = NODULE
    table = measure(bits, make_affine(1, 1, 1))
    assert len(table.components) == MAX_COMPONENTS
    assert table.components[0].voxels > 64
    n_total = len(table.components) + table.n_left_out
    assert n_total > 30_000
    listed = sum(row.voxels for row in table.components)
    assert table.left_out_ml == pytest.approx((np.count_nonzero(bits) - listed) / 1000)


def test_the_csv_has_the_rows_of_the_table(tmp_path: Path) -> None:
    bits = np.zeros((10, 30, 30), np.uint8)
    bits[2:6, 5:9, 5:9] = NODULE
    table = measure(bits, make_affine(2, 2, 2))
    write_lesion_csv(table.components, tmp_path / "lesions.csv")
    with (tmp_path / "lesions.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    component = table.components[0]
    assert row["lesion"] == "lung_nodule" and int(row["slice"]) == component.slice
    assert float(row["volume_ml"]) == component.volume_ml == pytest.approx(0.512)
    write_lesion_csv([], tmp_path / "none.csv")
    assert (tmp_path / "none.csv").read_text().count("\n") == 1
