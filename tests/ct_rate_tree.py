"""A small CT-RATE download in a folder: the true layout, columns and quirks of names, with phantoms
for patients."""

import csv
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np

from rectvlm.labels import FINDINGS, LESIONS
from rectvlm.lesion_bits import lesion_mask
from rectvlm.phantom.phantom import PhantomCase, make_phantom

_COLUMNS = """
VolumeName Manufacturer SeriesDescription ManufacturerModelName PatientSex PatientAge
ReconstructionDiameter DistanceSourceToDetector DistanceSourceToPatient GantryDetectorTilt
TableHeight RotationDirection ExposureTime XRayTubeCurrent Exposure FilterType GeneratorPower
FocalSpots ConvolutionKernel PatientPosition RevolutionTime SingleCollimationWidth
TotalCollimationWidth TableSpeed TableFeedPerRotation SpiralPitchFactor DataCollectionCenterPatient
ReconstructionTargetCenterPatient ExposureModulationType CTDIvol ImagePositionPatient
ImageOrientationPatient SliceLocation SamplesPerPixel PhotometricInterpretation Rows Columns
XYSpacing RescaleIntercept RescaleSlope RescaleType NumberofSlices ZSpacing StudyDate
"""
METADATA = _COLUMNS.split()
REPORT = ["VolumeName", "ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN"]
LABELS = ["VolumeName", *FINDINGS]
LONG = {"train": "train", "valid": "validation"}
"""Reports and metadata say validation_ where volumes and labels say valid_."""

phantom = lru_cache(maxsize=None)(make_phantom)
Rows = dict[str, dict[str, str]]


@dataclass
class Tree:
    """A download in the making: `add` volumes, change the tables' rows by name, `write` the
    tables."""

    root: Path
    labels: Rows = field(default_factory=dict)
    """By volume name, like the next two; a row's cells are what goes into the file."""
    reports: Rows = field(default_factory=dict)
    metadata: Rows = field(default_factory=dict)
    no_chest: dict[str, list[str]] = field(default_factory=lambda: {"train": [], "valid": []})
    columns: dict[str, list[str]] = field(
        default_factory=lambda: {
            "labels": list(LABELS),
            "reports": list(REPORT),
            "metadata": list(METADATA),
        }
    )
    name_as: Callable[[str], str] = "{}.nii.gz".format
    """How the tables write a name."""

    @property
    def dataset(self) -> Path:
        return self.root / "dataset"

    def path(self, name: str, layout: str = "fixed") -> Path:
        split, patient, scan, _ = name.split("_")
        folder = f"{split}_fixed" if layout == "fixed" else split
        return (
            self.dataset
            / folder
            / f"{split}_{patient}"
            / f"{split}_{patient}_{scan}"
            / f"{name}.nii.gz"
        )

    def add(
        self,
        name: str,
        seed: int | None = None,
        *,
        layout: str | None = "fixed",
        kernel: str = "['Br40f', '3']",
        spacing: float = 1.5,
        intercept: float = -1024,
        slope: float = 1,
    ) -> None:
        """A volume and its rows.

        Args:
            seed: of its phantom; without one the file is empty and the labels are 0, for tests of
                tables alone.
            layout: `fixed` (HU and an affine), `v1` (stored numbers and a blank header) or None for
                no file.
            spacing: mm between slices in the metadata; of a phantom, its own.
        """
        one = phantom(seed) if seed is not None else None
        hu, affine = (
            _lps(one, one.hu) if one else (np.zeros((512, 512, round(300 / spacing))), np.eye(4))
        )
        voxel = np.linalg.norm(affine[:3, :3], axis=0) if one else np.array((0.7, 0.7, spacing))
        given = one.labels if one else dict.fromkeys(FINDINGS, 0)
        self.labels[name] = {
            finding: "" if value is None else str(value) for finding, value in given.items()
        }
        self.reports[name] = {
            "ClinicalInformation_EN": "Not given.",
            "Technique_EN": "Not given.",
            "Findings_EN": one.findings if one else f"Findings of {name.rpartition('_')[0]}.",
            "Impressions_EN": one.impression if one else "Not given.",
        }
        self.metadata[name] = {
            "Manufacturer": "SIEMENS",
            "ConvolutionKernel": kernel,
            # Wrong on purpose: the side comes from the affine alone.
            "PatientPosition": "FFP",
            "ImagePositionPatient": str((affine[:3, 3] * (-1, -1, 1)).tolist()),
            "ImageOrientationPatient": "[1, 0, 0, 0, 1, 0]",
            "Rows": str(hu.shape[0]),
            "Columns": str(hu.shape[1]),
            "XYSpacing": str(voxel[:2].tolist()),
            "RescaleIntercept": str(intercept),
            "RescaleSlope": str(slope),
            "NumberofSlices": str(hu.shape[2]),
            "ZSpacing": str(voxel[2]),
        }
        if layout is None:
            return
        path = self.path(name, layout)
        path.parent.mkdir(parents=True, exist_ok=True)
        if one is None:
            path.touch()
        elif layout == "fixed":
            nib.save(nib.Nifti1Image(hu, affine), path)
        else:
            stored = ((hu.astype(np.float32) - intercept) / slope).astype(np.float32)
            nib.save(nib.Nifti1Image(stored, np.eye(4)), path)

    def add_lesions(self, name: str, seed: int, folder: Path) -> None:
        """One mask a lesion that the phantom's maker outlined."""
        one = phantom(seed)
        bits, affine = _lps(one, one.lesions)
        (folder / name).mkdir(parents=True, exist_ok=True)
        for lesion in LESIONS:
            if one.lesions_annotated[lesion.key]:
                mask = nib.Nifti1Image(lesion_mask(bits, lesion).astype(np.uint8), affine)
                nib.save(mask, folder / name / f"{lesion.key}.nii.gz")

    def write(self) -> Path:
        """The tables; the download's top folder."""
        for split in ("train", "valid"):
            self._table(
                "multi_abnormality_labels", f"{split}_predicted_labels.csv", "labels", split, split
            )
            self._table(
                "radiology_text_reports",
                f"{LONG[split]}_reports.csv",
                "reports",
                split,
                LONG[split],
            )
            self._table("metadata", f"{LONG[split]}_metadata.csv", "metadata", split, LONG[split])
            lines = "".join(f"{line}\n" for line in self.no_chest[split])
            (self.dataset / "metadata" / f"no_chest_{split}.txt").write_text(lines)
        return self.root

    def _table(self, folder: str, file: str, kind: str, split: str, prefix: str) -> None:
        path = self.dataset / folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = self.columns[kind]
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(columns)
            for name, row in getattr(self, kind).items():
                if name.startswith(split):
                    title = self.name_as(name.replace(split, prefix, 1))
                    writer.writerow([title, *(row.get(column, "") for column in columns[1:])])


def _lps(one: PhantomCase, array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A phantom's array as CT-RATE stores it, towards left, posterior and superior, with its
    affine."""
    native = nib.orientations.io_orientation(one.affine)
    wanted = nib.orientations.axcodes2ornt(("L", "P", "S"))
    turn = nib.orientations.ornt_transform(native, wanted)
    turned = nib.orientations.apply_orientation(array, turn)
    return turned, one.affine @ nib.orientations.inv_ornt_aff(turn, array.shape)
