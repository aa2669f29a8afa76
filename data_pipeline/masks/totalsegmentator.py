"""TotalSegmentator's outputs: which class a number stands for, and which of our regions or lesions a class belongs to.

Class numbers follow TotalSegmentator's `map_to_binary.py` (Wasserthal et al., Radiology: AI 2023). A file may carry the
names of its classes in its header (an XML list that TotalSegmentator writes as a NIfTI extension); they then count
before the tables here.
"""

import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from rectvlm.data.volume import read_mask
from rectvlm.labels import LESION_BY_KEY, REGIONS
from rectvlm.types import InputError, MaskVolume, Volume

ClassNames = Mapping[int, str]
"""Number in a file → class name."""

_VERTEBRAE = " ".join(
    f"vertebrae_{part}{n}"
    for part, top in (("L", 5), ("T", 12), ("C", 7))
    for n in range(top, 0, -1)
)
_RIBS = " ".join(f"rib_{side}_{n}" for side in ("left", "right") for n in range(1, 13))
_LOBES = "lung_upper_lobe_left lung_lower_lobe_left lung_upper_lobe_right lung_middle_lobe_right lung_lower_lobe_right"
_ILIAC = "iliac_artery_left iliac_artery_right iliac_vena_left iliac_vena_right"
_GLUTEI = " ".join(
    f"gluteus_{size}_{side}"
    for size in ("maximus", "medius", "minimus")
    for side in ("left", "right")
)
_BACK = "autochthon_left autochthon_right iliopsoas_left iliopsoas_right"
_LIMBS = "humerus_left humerus_right scapula_left scapula_right clavicula_left clavicula_right femur_left femur_right"


def _number_classes(names: str) -> dict[int, str]:
    return dict(enumerate(names.split(), start=1))


TOTAL_V2: ClassNames = _number_classes(
    "spleen kidney_right kidney_left gallbladder liver stomach pancreas adrenal_gland_right adrenal_gland_left "
    f"{_LOBES} esophagus trachea thyroid_gland small_bowel duodenum colon urinary_bladder prostate kidney_cyst_left "
    f"kidney_cyst_right sacrum vertebrae_S1 {_VERTEBRAE} heart aorta pulmonary_vein brachiocephalic_trunk "
    "subclavian_artery_right subclavian_artery_left common_carotid_artery_right common_carotid_artery_left "
    "brachiocephalic_vein_left brachiocephalic_vein_right atrial_appendage_left superior_vena_cava inferior_vena_cava "
    f"portal_vein_and_splenic_vein {_ILIAC} {_LIMBS} hip_left hip_right spinal_cord {_GLUTEI} {_BACK} brain skull "
    f"{_RIBS} sternum costal_cartilages"
)
"""Task `total` of version 2, 117 classes."""

TOTAL_V1: ClassNames = _number_classes(
    "spleen kidney_right kidney_left gallbladder liver stomach aorta inferior_vena_cava portal_vein_and_splenic_vein "
    f"pancreas adrenal_gland_right adrenal_gland_left {_LOBES} {_VERTEBRAE} esophagus trachea heart_myocardium "
    "heart_atrium_left heart_ventricle_left heart_atrium_right heart_ventricle_right pulmonary_artery brain "
    f"{_ILIAC} small_bowel duodenum colon {_RIBS} {_LIMBS} hip_left hip_right sacrum face {_GLUTEI} {_BACK} "
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
"""The tasks that outline lesions, by their folder in CT-RATE."""

_LESION_OF_CLASS = {
    "lung_nodules": "lung_nodule",
    "pleural_effusion": "pleural_effusion",
    "pericardial_effusion": "pericardial_effusion",
}
_LABEL_TAG = re.compile(
    r'<Label Key="(\d+)"[^>]*>\s*(?:<!\[CDATA\[)?\s*([^\]<]+?)\s*(?:\]\]>)?\s*</Label>'
)
_V2_LOBES, _V1_LOBES = slice(10, 13), slice(15, 18)
"""Numbers that stand for lobes in one version and for nothing large in the other: pancreas and adrenal glands in the
first, esophagus, trachea and thyroid in the second."""
_LUNG_ML = 300
"""More than those organs have, and less than three lobes."""
_SIDED_STRUCTURES = (
    (("left lobes", (4, 5)), ("right lobes", (1, 2, 3))),
    (("left ribs", (15,)), ("right ribs", (14,))),
)
_SPINE = ("spine", (13,))


_KNOWN_CLASSES = {*TOTAL_V1.values(), *TOTAL_V2.values()}


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
    """The lesion that a class of `LESION_TASKS` outlines; None for the organs among them."""
    return _LESION_OF_CLASS.get(name)


def read_class_names(path: Path) -> ClassNames | None:
    """The class names that a NIfTI carries in its header; None when it carries none."""
    image = nib.load(path)
    assert isinstance(image, nib.Nifti1Image)
    for extension in image.header.extensions:
        content = extension.get_content()
        text = content.decode("utf-8", "replace") if isinstance(content, bytes) else str(content)
        found = {int(number): name for number, name in _LABEL_TAG.findall(text)}
        if found:
            return found
    return None


def read_regions(path: Path) -> tuple[Volume, str]:
    """A multi-label map of the task `total` as uint8 region ids, and how its numbers were read.

    Without names in its header a map is read by the version that gives it lungs of the size of lungs. Read by the
    other, left lobes would be right ones, so a map that fits neither well is refused.

    Raises:
        UserError: a file that cannot be read as a mask, a number that no class has, or a map that both versions fit.
    """
    mask, counts, classes = _read_class_map(path)
    how = "classes named in the file"
    if classes is None:
        classes, how = _detect_version(mask, counts)
    return _translate_classes(mask, counts, classes, region_of_class), f"TotalSegmentator, {how}"


def _detect_version(mask: Volume, counts: NDArray[np.int64]) -> tuple[ClassNames, str]:
    voxel = abs(np.linalg.det(mask.affine[:3, :3])) / 1000
    new, old = (float(counts[lobes].sum() * voxel) for lobes in (_V2_LOBES, _V1_LOBES))
    if counts[1:].any() and (max(new, old) < _LUNG_ML or max(new, old) < 2 * min(new, old)):
        raise InputError(
            mask.where,
            "does not tell which version of TotalSegmentator numbered its classes",
            expected=f"lobes, more than {_LUNG_ML} ml under 10 to 12 (version 2) or 15 to 17 (version 1)",
            found=f"{new:.0f} ml and {old:.0f} ml, and no names in its header",
            remedy="save it with the names of its classes (--ml), or leave it out",
        )
    return (TOTAL_V2, "version 2 classes") if new >= old else (TOTAL_V1, "version 1 classes")


def require_sides(regions: Volume) -> None:
    """Refuse a region map whose left lies to the right, by its affine: it was mirrored, or its affine is wrong.

    Args:
        regions: uint8 region ids (i, j, k).

    Raises:
        InputError: left and right lobes or ribs are on the wrong side of each other, or of the spine.
    """
    steps = [max(1, n // 128) for n in regions.array.shape]
    thin = regions.array[:: steps[0], :: steps[1], :: steps[2]]
    right_axis = regions.affine[0, :3] * steps

    def place(ids: tuple[int, ...]) -> float | None:
        """Mean place along the world's axis to the right, mm; of a few voxels none."""
        where = np.argwhere(np.isin(thin, ids))
        return float((where @ right_axis).mean()) if len(where) >= 50 else None

    for left, right in _SIDED_STRUCTURES:
        for one, other in ((left, right), (left, _SPINE), (_SPINE, right)):
            here, there = place(one[1]), place(other[1])
            if here is not None and there is not None and here > there:
                raise InputError(
                    regions.where,
                    "has left and right exchanged",
                    expected=f"{one[0]} to the left of the {other[0]}",
                    found=f"them {here - there:.0f} mm to the right",
                    remedy="correct its affine, or leave it out",
                )


def read_lesions(path: Path, task: str) -> tuple[Volume, set[str]]:
    """A map of a lesion task as uint8 lesion bits, and the lesions that the task looks for.

    Raises:
        UserError: as `read_regions`, or classes of another task.
    """
    mask, counts, named = _read_class_map(path)
    classes = named or LESION_TASKS[task]

    def bit(name: str) -> int:
        key = lesion_of_class(name)
        return 0 if key is None else LESION_BY_KEY[key].mask_value

    looked_for = {key for key in map(lesion_of_class, classes.values()) if key}
    if not looked_for & {lesion_of_class(name) for name in LESION_TASKS[task].values()}:
        raise InputError(
            path,
            f"is no output of the task {task}",
            expected=" or ".join(
                name for name in LESION_TASKS[task].values() if lesion_of_class(name)
            ),
            found=", ".join(list(classes.values())[:5]),
            remedy="put it into the folder of its own task",
        )
    return _translate_classes(mask, counts, classes, bit), looked_for


def read_class_folder(folder: Path) -> Volume:
    """A folder with one NIfTI a class (`CLASS.nii.gz`), all on one grid, as uint8 region ids.

    Raises:
        UserError: no class among the names, files on different grids, or one that cannot be read.
    """
    files = {
        path.name.split(".")[0]: path
        for path in sorted([*folder.glob("*.nii.gz"), *folder.glob("*.nii")])
    }
    wanted = sorted(
        (region_of_class(name), path) for name, path in files.items() if region_of_class(name)
    )
    if not wanted:
        raise InputError(
            folder,
            "has no anatomical class",
            expected="files named like TotalSegmentator's classes, such as lung_upper_lobe_left.nii.gz",
            found=", ".join(sorted(files)[:5]) or "no NIfTI file",
            remedy="rename its files",
        )
    whole: Volume | None = None
    for number, path in wanted:
        mask = read_mask(path)
        if whole is None:
            whole = Volume(np.zeros_like(mask.array), mask.affine, str(folder))
        if mask.array.shape != whole.array.shape or not np.allclose(
            mask.affine, whole.affine, atol=1e-3
        ):
            raise InputError(
                path,
                "is on another grid than its neighbours",
                expected=f"shape {whole.array.shape} and the affine of {wanted[0][1].name}",
                found=f"shape {mask.array.shape}",
                remedy="save all classes of a scan on one grid",
            )
        whole.array[(mask.array > 0) & (whole.array == 0)] = number
    assert whole is not None
    return whole


def _read_class_map(path: Path) -> tuple[Volume, NDArray[np.int64], ClassNames | None]:
    mask = read_mask(path)
    # Plane by plane: bincount makes a copy in 64 bits of what it counts.
    planes = mask.array.transpose(2, 1, 0)
    counts = sum(
        (np.bincount(plane.ravel(), minlength=256) for plane in planes), np.zeros(256, np.int64)
    )
    return mask, counts, read_class_names(path)


def _translate_classes(
    mask: Volume, counts: NDArray[np.int64], classes: ClassNames, value: Callable[[str], int]
) -> Volume:
    unknown = sorted({int(n) for n in np.flatnonzero(counts)} - {0} - set(classes))
    if unknown:
        raise InputError(
            mask.where,
            "has numbers that are no class",
            expected=f"0 and the {len(classes)} classes from {min(classes)} to {max(classes)}",
            found=", ".join(map(str, unknown[:10])),
            remedy="save it with TotalSegmentator's class names in its header (--ml), or leave it out",
        )
    table: MaskVolume = np.zeros(256, np.uint8)
    for number, name in classes.items():
        if 0 < number < 256:
            table[number] = value(name)
    return Volume(table[mask.array], mask.affine, mask.where)
