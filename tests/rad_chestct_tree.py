"""A Rad-ChestCT download in small: archives and label tables in the published form."""

import csv
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.rad_chestct import ABNORMALITIES_BY_FINDING, NAME_COLUMN

ABNORMALITIES = (
    *("air_trapping", "aneurysm", "atherosclerosis", "coronary_artery_disease", "groundglass"),
    *(name for names in ABNORMALITIES_BY_FINDING.values() for name in names),
    *("mass", "scarring"),
)
LOCATIONS = ("aorta", "heart", "left_upper", "lung", "right_lower", "other_location")
SHAPE = (128, 72, 72)
"""Voxels (slice, row, column) of an archive, of 0.8 mm."""


@cache
def small_chest() -> NDArray[np.int16]:
    """HU of a miniature chest, (slice, row, column) growing to inferior, posterior and left.

    A bright block lies high, in front and on the left.
    """
    _, y, x = np.indices(SHAPE) - 36
    hu = np.where((x / 33) ** 2 + (y / 25) ** 2 < 1, 40.0, -1000.0)
    hu[((abs(x) - 15) / 12) ** 2 + (y / 17) ** 2 < 1] = -850
    hu += np.random.default_rng(0).normal(0, 20, hu.shape)
    hu[8:28, 16:22, 39:50] = 1000
    return np.clip(np.rint(hu), -1000, 1000).astype(np.int16)


def write_archive(path: Path, seed: int) -> None:
    """Write a scan as the data set has it: one array and no geometry."""
    path.parent.mkdir(parents=True, exist_ok=True)
    hu = small_chest().copy()
    hu[0, 0, :seed] = -999
    np.savez(path, ct=hu)


def write_table(
    path: Path,
    present: Mapping[str, set[str]],
    empty: set[str] = frozenset(),  # type: ignore[assignment]
    word: str = "1.0",
) -> None:
    """Write a table of labels.

    Args:
        path: of the table.
        present: columns that are not 0, by name of the scan.
        empty: columns without a value in any row where they are not present.
        word: text of a label that is present; any other than 1 stands in every row.
    """
    columns = [f"{name}*{location}" for name in ABNORMALITIES for location in LOCATIONS]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([NAME_COLUMN, *columns])
        for name, names in present.items():
            cells = ["" if column in empty else "0.0" for column in columns]
            for i, column in enumerate(columns):
                if column in names or word not in ("1", "1.0"):
                    cells[i] = word
            writer.writerow([name, *cells])
