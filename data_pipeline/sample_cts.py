"""Two real chest CTs with a tumour outline each: `python -m data_pipeline.sample_cts`.

They are the test data of pyradiomics 3.0.1 (BSD-3-Clause): CTs of two patients with non-small-cell
lung cancer, 5 mm slices, with the tumour outlined (1.36 ml in lung1, 48.4 ml in lung2). Of the five
lesions only "lung nodule" fits a solid tumour in the lung, so its outline serves as that mask;
lung2 is a mass by size, so the finding "Lung nodule" is left unknown there. Nothing else was
annotated and there is no report: all other labels are unknown.
"""

import logging
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from rectvlm.cli_options import CommandParser
from rectvlm.optional_packages import require_extra
from rectvlm.pretrained import package_archives
from rectvlm.types import Affine, UserError

log = logging.getLogger(__name__)

SAMPLE_CT_FOLDER = Path("data/samples")
VOLUME_FOLDER = "cts"
"""Name of the folder of the CTs in it, which holds nothing else."""
OUTLINED_LESION = "lung_nodule"
"""Key of the lesion that the tumours' outlines stand for."""
_PACKAGE, _VERSION = "pyradiomics", "3.0.1"
_ARCHIVE_SHA256 = "47c57f441d6cb7973fa3b2ea48d3948df78e3348e1c69e1e2ff19001601fc2f5"
_SIGNS_TO_RAS = {"left-posterior-superior": (-1, -1, 1), "right-anterior-superior": (1, 1, 1)}
"""Signs that turn coordinates of an NRRD space into RAS+."""


@dataclass(frozen=True)
class SampleCt:
    """One of the two CTs."""

    name: str
    nodule_label: int | None
    """Label of the finding "Lung nodule"; None for unknown."""

    def volume_path(self, folder: Path) -> Path:
        """The CT's file in the folder of sample CTs."""
        return folder / VOLUME_FOLDER / f"{self.name}.nii.gz"

    def mask_path(self, folder: Path) -> Path:
        """The file with the outline of its tumour, on the CT's grid."""
        return folder / "outlines" / f"{self.name}_{OUTLINED_LESION}.nii.gz"


SAMPLE_CTS = (SampleCt("lung1", 1), SampleCt("lung2", None))


def fetch_sample_cts(folder: Path = SAMPLE_CT_FOLDER) -> list[Path]:
    """Fetch the two CTs and their masks as NIfTI files, unless they are in the folder already.

    Returns:
        The paths of the CTs, lung1 and lung2.

    Raises:
        UserError: no network, or an archive that is not the expected one.
    """
    volume_paths = [ct.volume_path(folder) for ct in SAMPLE_CTS]
    mask_paths = [ct.mask_path(folder) for ct in SAMPLE_CTS]
    if all(path.is_file() for path in volume_paths + mask_paths):
        return volume_paths
    with tempfile.TemporaryDirectory() as work:
        members = []
        for ct in SAMPLE_CTS:
            stem = f"{_PACKAGE}-{_VERSION}/data/{ct.name}"
            members += [f"{stem}_image.nrrd", f"{stem}_label.nrrd"]
        raw = package_archives.fetch_package_files(
            _PACKAGE, _VERSION, _ARCHIVE_SHA256, members, Path(work) / "raw", is_source_archive=True
        )
        for path in (volume_paths[0], mask_paths[0]):
            path.parent.mkdir(parents=True, exist_ok=True)
        for ct in SAMPLE_CTS:
            image, image_affine = read_nrrd(raw / f"{ct.name}_image.nrrd")
            label, label_affine = read_nrrd(raw / f"{ct.name}_label.nrrd")
            _write_nifti(image, image_affine, ct.volume_path(folder))
            _write_nifti((label > 0).astype(np.uint8), label_affine, ct.mask_path(folder))
    log.info("two sample CTs in %s", folder)
    return volume_paths


def read_nrrd(path: Path) -> tuple[NDArray[Any], Affine]:
    """Read a 3-D NRRD volume (i, j, k) and its affine to RAS+ mm.

    Raises:
        UserError: not 3-D, or no patient space that is known.
    """
    import nrrd  # in the demo extra: only the sample CTs come as NRRD

    array, header = nrrd.read(str(path))
    space = header.get("space")
    if array.ndim != 3 or space not in _SIGNS_TO_RAS or "space origin" not in header:
        raise UserError(
            f"{path} is {array.ndim}-D in space {space!r}: expected 3-D in one of "
            f"{', '.join(_SIGNS_TO_RAS)}."
        )
    affine = np.eye(4)
    # NRRD lists one direction an array axis; in an affine they are columns.
    affine[:3, :3] = np.asarray(header["space directions"], np.float64).T
    affine[:3, 3] = header["space origin"]
    return array, np.diag([*_SIGNS_TO_RAS[space], 1.0]) @ affine


def _write_nifti(array: NDArray[Any], affine: Affine, path: Path) -> None:
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    unfinished = path.with_name(f".part-{path.name}")
    nib.save(image, unfinished)
    unfinished.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch the CTs and log where they are; return the exit status."""
    parser = CommandParser(
        prog="python -m data_pipeline.sample_cts",
        description="Fetch two public chest CTs and their tumour outlines into data/samples.",
    )
    parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        require_extra("demo")
        for path in fetch_sample_cts():
            log.info("%s", path)
    except UserError as error:
        log.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
