"""TotalSegmentator's outputs: the class of each number, and the region or lesion of each class.

Class numbers follow TotalSegmentator's `map_to_binary.py` (Wasserthal et al., Radiology: AI 2023).
A file may carry the names of its classes in its header (an XML list that TotalSegmentator writes as
a NIfTI extension); these then count before the tables here.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from rectvlm.data.volume import read_mask
from rectvlm.data.voxel_size import voxel_volume_ml
from rectvlm.labels import LESION_BY_KEY, REGIONS
from rectvlm.types import InputError, MaskVolume, Volume

ClassNames = Mapping[int, str]
"""Class names by their number in a file."""


def _numbered_names(stem: str, numbers: Iterable[int]) -> str:
    return " ".join(f"{stem}{number}" for number in numbers)


def _side_names(*stems: str) -> str:
    return " ".join(f"{stem}_left {stem}_right" for stem in stems)


_LUMBAR = _numbered_names("vertebrae_L", range(5, 0, -1))
_THORACIC = _numbered_names("vertebrae_T", range(12, 0, -1))
_CERVICAL = _numbered_names("vertebrae_C", range(7, 0, -1))
_VERTEBRAE = f"{_LUMBAR} {_THORACIC} {_CERVICAL}"
_LEFT_RIBS = _numbered_names("rib_left_", range(1, 13))
_RIGHT_RIBS = _numbered_names("rib_right_", range(1, 13))
_RIBS = f"{_LEFT_RIBS} {_RIGHT_RIBS}"
_LOBES = (
    "lung_upper_lobe_left lung_lower_lobe_left "
    "lung_upper_lobe_right lung_middle_lobe_right lung_lower_lobe_right"
)
_ILIAC = _side_names("iliac_artery", "iliac_vena")
_GLUTEI = _side_names("gluteus_maximus", "gluteus_medius", "gluteus_minimus")
_BACK = _side_names("autochthon", "iliopsoas")
_LIMBS = _side_names("humerus", "scapula", "clavicula", "femur")


def _number_classes(names: str) -> dict[int, str]:
    return dict(enumerate(names.split(), start=1))


TOTAL_V2: ClassNames = _number_classes(
    "spleen kidney_right kidney_left gallbladder liver stomach pancreas adrenal_gland_right "
    f"adrenal_gland_left {_LOBES} esophagus trachea thyroid_gland small_bowel duodenum colon "
    f"urinary_bladder prostate kidney_cyst_left kidney_cyst_right sacrum vertebrae_S1 {_VERTEBRAE} "
    "heart aorta pulmonary_vein brachiocephalic_trunk subclavian_artery_right "
    "subclavian_artery_left common_carotid_artery_right common_carotid_artery_left "
    "brachiocephalic_vein_left brachiocephalic_vein_right atrial_appendage_left superior_vena_cava "
    f"inferior_vena_cava portal_vein_and_splenic_vein {_ILIAC} {_LIMBS} hip_left hip_right "
    f"spinal_cord {_GLUTEI} {_BACK} brain skull {_RIBS} sternum costal_cartilages"
)
"""Task `total` of version 2, 117 classes."""

TOTAL_V1: ClassNames = _number_classes(
    "spleen kidney_right kidney_left gallbladder liver stomach aorta inferior_vena_cava "
    f"portal_vein_and_splenic_vein pancreas adrenal_gland_right adrenal_gland_left {_LOBES} "
    f"{_VERTEBRAE} esophagus trachea heart_myocardium heart_atrium_left heart_ventricle_left "
    f"heart_atrium_right heart_ventricle_right pulmonary_artery brain {_ILIAC} small_bowel "
    f"duodenum colon {_RIBS} {_LIMBS} hip_left hip_right sacrum face {_GLUTEI} {_BACK} "
    "urinary_bladder"
)
"""Task `total` of version 1, 104 classes."""

LESION_TASKS: dict[str, ClassNames] = {
    "ts_lung_nodules": {1: "lung", 2: "lung_nodules"},
    "ts_pleural_pericard_effusion": {
        1: "lung_pleural",
        2: "pleural_effusion",
        3: "pericardial_effusion",
    },
}
"""Classes of the tasks that outline lesions, by the task's folder in CT-RATE."""

_LESION_OF_CLASS = {
    "lung_nodules": "lung_nodule",
    "pleural_effusion": "pleural_effusion",
    "pericardial_effusion": "pericardial_effusion",
}
_KNOWN_CLASSES = {*TOTAL_V1.values(), *TOTAL_V2.values()}
_LABEL_TAG = re.compile(
    r'<Label Key="(\d+)"[^>]*>\s*(?:<!\[CDATA\[)?\s*([^\]<]+?)\s*(?:\]\]>)?\s*</Label>'
)
_V2_LOBES, _V1_LOBES = slice(10, 13), slice(15, 18)
"""Numbers that stand for lobes in one version and for nothing large in the other: for pancreas and
adrenal glands in the first, for esophagus, trachea and thyroid in the second."""
_MIN_LOBES_ML = 300
"""Volume that three lobes exceed and those organs do not reach, ml."""
_MAX_SAMPLES_PER_AXIS = 128
"""Samples along an axis from which the place of a structure is averaged, about."""
_MIN_STRUCTURE_SAMPLES = 50
"""Samples of a structure below which its mean place is not used."""


class _BodyStructure(NamedTuple):
    """Regions whose mean position shows whether a map is mirrored."""

    name: str
    region_ids: tuple[int, ...]


_SPINE = _BodyStructure("spine", (13,))
_SIDED_STRUCTURES = (
    (_BodyStructure("left lobes", (4, 5)), _BodyStructure("right lobes", (1, 2, 3))),
    (_BodyStructure("left ribs", (15,)), _BodyStructure("right ribs", (14,))),
)
"""Structures of the left side, each with its counterpart of the right."""


@dataclass(frozen=True)
class _ClassMap:
    """A multi-label map as it was read."""

    mask: Volume
    voxel_counts: NDArray[np.int64]
    """Number of voxels with each value, (256,)."""
    named_classes: ClassNames | None
    """Class names in the file's header; None when there are none."""


def region_of_class(name: str) -> int:
    """The region of `labels.REGIONS` that a class belongs to; 0 for a class outside all of them."""
    for region in REGIONS:
        if any(fnmatchcase(name, pattern) for pattern in region.totalsegmentator_classes):
            return region.id
    return 0


def is_known_class(name: str) -> bool:
    """Whether TotalSegmentator has such a class."""
    return name in _KNOWN_CLASSES or region_of_class(name) > 0


def lesion_of_class(name: str) -> str | None:
    """Key of the lesion that a class of `LESION_TASKS` outlines; None for the organs among them."""
    return _LESION_OF_CLASS.get(name)


def read_class_names(path: Path) -> ClassNames | None:
    """Read the class names in a NIfTI's header; None when it carries none."""
    image = nib.load(path)
    assert isinstance(image, nib.Nifti1Image)
    for extension in image.header.extensions:
        content = extension.get_content()
        text = content.decode("utf-8", "replace") if isinstance(content, bytes) else str(content)
        names = {int(number): name for number, name in _LABEL_TAG.findall(text)}
        if names:
            return names
    return None


def read_regions(path: Path) -> tuple[Volume, str]:
    """Read a multi-label map of the task `total` as region ids; return it with its source.

    A map without class names in its header is read by the version that gives it lungs of the size
    of lungs. The other version would turn left lobes into right ones, so a map that does not decide
    between the two is refused.

    Raises:
        UserError: a file that cannot be read as a mask, a number that no class has, or a map that
            fits both versions or neither.
    """
    class_map = _read_class_map(path)
    if class_map.named_classes is not None:
        classes, numbering = class_map.named_classes, "classes named in the file"
    elif _detect_version(class_map) == 2:
        classes, numbering = TOTAL_V2, "version 2 classes"
    else:
        classes, numbering = TOTAL_V1, "version 1 classes"
    regions = _translate_classes(class_map, classes, region_of_class)
    return regions, f"TotalSegmentator, {numbering}"


def _detect_version(class_map: _ClassMap) -> int:
    """The version of TotalSegmentator, 1 or 2, that numbered the classes of a map.

    Raises:
        InputError: the lobes of neither version are clearly larger.
    """
    mask, counts = class_map.mask, class_map.voxel_counts
    voxel_ml = voxel_volume_ml(mask.affine)
    v2_ml = float(counts[_V2_LOBES].sum() * voxel_ml)
    v1_ml = float(counts[_V1_LOBES].sum() * voxel_ml)
    larger, smaller = max(v2_ml, v1_ml), min(v2_ml, v1_ml)
    is_empty = not counts[1:].any()
    if not is_empty and (larger < _MIN_LOBES_ML or larger < 2 * smaller):
        raise InputError(
            mask.where,
            "does not tell which version of TotalSegmentator numbered its classes",
            expected=f"lobes, more than {_MIN_LOBES_ML} ml under 10 to 12 (version 2) or 15 to 17 "
            f"(version 1)",
            found=f"{v2_ml:.0f} ml and {v1_ml:.0f} ml, and no names in its header",
            remedy="save it with the names of its classes (--ml), or leave it out",
        )
    return 2 if v2_ml >= v1_ml else 1


def require_sides(regions: Volume) -> None:
    """Refuse a region map whose left lies to the right: it was mirrored, or its affine is wrong.

    Args:
        regions: region ids, uint8 (i, j, k).

    Raises:
        InputError: left and right lobes or ribs are on the wrong side of each other, or of the
            spine.
    """
    steps = [max(1, size // _MAX_SAMPLES_PER_AXIS) for size in regions.array.shape]
    samples = regions.array[:: steps[0], :: steps[1], :: steps[2]]
    right_axis = regions.affine[0, :3] * steps

    def mean_place(structure: _BodyStructure) -> float | None:
        """Mean place along the world's axis to the right, mm; None where there is too little."""
        indexes = np.argwhere(np.isin(samples, structure.region_ids))
        if len(indexes) < _MIN_STRUCTURE_SAMPLES:
            return None
        return float((indexes @ right_axis).mean())

    for left, right in _SIDED_STRUCTURES:
        for left_one, right_one in ((left, right), (left, _SPINE), (_SPINE, right)):
            left_place, right_place = mean_place(left_one), mean_place(right_one)
            if left_place is None or right_place is None or left_place <= right_place:
                continue
            raise InputError(
                regions.where,
                "has left and right exchanged",
                expected=f"{left_one.name} to the left of the {right_one.name}",
                found=f"them {left_place - right_place:.0f} mm to the right",
                remedy="correct its affine, or leave it out",
            )


def read_lesions(path: Path, task: str) -> tuple[Volume, set[str]]:
    """Read a map of a lesion task as lesion bits; return it with the lesions it looked for.

    Args:
        path: of the map.
        task: one of `LESION_TASKS`.

    Raises:
        UserError: as `read_regions`, or classes of another task.
    """
    class_map = _read_class_map(path)
    task_classes = LESION_TASKS[task]
    classes = class_map.named_classes or task_classes
    lesion_classes = [name for name in task_classes.values() if lesion_of_class(name)]
    if not set(lesion_classes) & set(classes.values()):
        raise InputError(
            path,
            f"is no output of the task {task}",
            expected=" or ".join(lesion_classes),
            found=", ".join(list(classes.values())[:5]),
            remedy="put it into the folder of its own task",
        )

    def mask_value(name: str) -> int:
        key = lesion_of_class(name)
        return 0 if key is None else LESION_BY_KEY[key].mask_value

    keys = {lesion_of_class(name) for name in classes.values()}
    looked_for = {key for key in keys if key is not None}
    return _translate_classes(class_map, classes, mask_value), looked_for


def read_class_folder(folder: Path) -> Volume:
    """Read a folder with one NIfTI a class (`CLASS.nii.gz`), all on one grid, as region ids.

    Raises:
        UserError: no class among the names, files on different grids, or one that cannot be read.
    """
    paths = sorted([*folder.glob("*.nii.gz"), *folder.glob("*.nii")])
    files = {path.name.split(".")[0]: path for path in paths}
    region_files = sorted((region_of_class(name), path) for name, path in files.items())
    region_files = [(region_id, path) for region_id, path in region_files if region_id]
    if not region_files:
        raise InputError(
            folder,
            "has no anatomical class",
            expected="files named like TotalSegmentator's classes, such as "
            "lung_upper_lobe_left.nii.gz",
            found=", ".join(sorted(files)[:5]) or "no NIfTI file",
            remedy="rename its files",
        )
    regions: Volume | None = None
    for region_id, path in region_files:
        mask = read_mask(path)
        if regions is None:
            regions = Volume(np.zeros_like(mask.array), mask.affine, str(folder))
        is_aligned = np.allclose(mask.affine, regions.affine, atol=1e-3)
        if mask.array.shape != regions.array.shape or not is_aligned:
            raise InputError(
                path,
                "is on another grid than its neighbours",
                expected=f"shape {regions.array.shape} and the affine of {region_files[0][1].name}",
                found=f"shape {mask.array.shape}",
                remedy="save all classes of a scan on one grid",
            )
        regions.array[(mask.array > 0) & (regions.array == 0)] = region_id
    assert regions is not None
    return regions


def _read_class_map(path: Path) -> _ClassMap:
    mask = read_mask(path)
    voxel_counts = np.zeros(256, np.int64)
    # Plane by plane: bincount makes a copy in 64 bits of what it counts.
    for plane in mask.array.transpose(2, 1, 0):
        voxel_counts += np.bincount(plane.ravel(), minlength=256)
    return _ClassMap(mask, voxel_counts, read_class_names(path))


def _translate_classes(
    class_map: _ClassMap, classes: ClassNames, value_of_class: Callable[[str], int]
) -> Volume:
    """Replace the numbers of a map by the values of their classes.

    Raises:
        InputError: a number that no class has.
    """
    mask = class_map.mask
    numbers = {int(number) for number in np.flatnonzero(class_map.voxel_counts)}
    unknown = sorted(numbers - {0} - set(classes))
    if unknown:
        raise InputError(
            mask.where,
            "has numbers that are no class",
            expected=f"0 and the {len(classes)} classes from {min(classes)} to {max(classes)}",
            found=", ".join(map(str, unknown[:10])),
            remedy="save it with TotalSegmentator's class names in its header (--ml), or leave it "
            "out",
        )
    table: MaskVolume = np.zeros(256, np.uint8)
    for number, name in classes.items():
        if 0 < number < 256:
            table[number] = value_of_class(name)
    return Volume(table[mask.array], mask.affine, mask.where)
