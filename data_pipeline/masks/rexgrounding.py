"""ReXGroundingCT: findings of CT-RATE reports with a mask each (Baharoon et al., arXiv 2507.22030).

A folder has `dataset.json` (and, since 2026, `MICCAI_challenge_dataset.json`): by split, for each volume, its findings
in words and a category each; and `segmentations/KEY.nii.gz`, an array (finding, i, j, k). That array follows the voxel
order of CT-RATE's `_fixed` files, which are LPS; its header's affine describes the finding axis as space and is no use.
"""

import gzip
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from rectvlm.labels import LESION_BY_KEY
from rectvlm.lesion_bits import combined_mask_value
from rectvlm.types import InputError, MaskVolume, Volume

TABLE_FILES = ("dataset.json", "MICCAI_challenge_dataset.json")
_BLOCK_BYTES = 8 << 20
_VOXEL_ORDER = ("L", "P", "S")

Certainty = Literal["sure", "perhaps"]


@dataclass(frozen=True)
class CategoryRule:
    """What the findings of one category are, decided by their words."""

    lesion: str
    sure_pattern: str = ""
    """The mask is this lesion when the words match (a regular expression; empty matches all) …"""
    unless_pattern: str = r"(?!)"
    """… and these do not: then the mask may hold something else besides."""
    never_pattern: str = r"(?!)"
    """Words that leave the lesion out, unless `sure` matches too."""


CATEGORY_RULES: dict[str, CategoryRule] = {
    "2b": CategoryRule(
        "consolidation",
        "consolidat",
        unless_pattern="atelecta|ground.?glass",
        never_pattern="atelecta",
    ),
    "2c": CategoryRule("ground_glass_opacity", unless_pattern="consolidat"),
    "2d": CategoryRule("lung_nodule"),
    "2e": CategoryRule(
        "pleural_effusion", "effusion", unless_pattern="thick|pericard", never_pattern="thick"
    ),
}
"""The categories that are a lesion of ours: 2b atelectasis or consolidation, 2c ground-glass opacity, 2d nodules or
masses, 2e pleural effusion or thickening. All others (1a bronchial wall thickening, 1b bronchiectasis, 1c emphysema,
1d septal thickening, 1e micronodules, 1f other non-focal, 2a linear, 2f honeycombing, 2g pneumothorax, 2h other focal,
and 3 to 12 outside the lungs) are none of the five."""

POSSIBLE_LESIONS: dict[str, dict[str, str]] = {
    "1e": {"lung_nodule": ""},
    "2b": {"ground_glass_opacity": "ground.?glass"},
    "2c": {"consolidation": "consolidat"},
    "2e": {"pericardial_effusion": "pericard"},
    "1f": (
        _ANY := {
            "pericardial_effusion": "pericard",
            "pleural_effusion": "effusion",
            "consolidation": "consolidat",
            "ground_glass_opacity": "ground.?glass",
            "lung_nodule": "nodul",
        }
    ),
    "2h": _ANY,
}
"""By category: lesions that its masks may hold too where the words match. They are not drawn, and they take away the
certainty that all of that lesion is outlined elsewhere."""


@dataclass(frozen=True)
class RexVolumeRecord:
    """One volume of the data set."""

    exhaustive: bool
    """Validation and test: every instance of each finding is outlined. Training: three instances at most."""
    findings: tuple[tuple[str, str], ...]
    """Category and words of each finding, in the order of the mask's first axis."""


def find_record(folder: Path, key: str) -> RexVolumeRecord | None:
    """What the data set's tables say of a volume (named without `.nii.gz`); None when they do not list it.

    Raises:
        InputError: no table, or one that is not of the published form.
    """
    tables = [path for path in (folder / name for name in TABLE_FILES) if path.is_file()]
    if not tables:
        raise InputError(
            folder,
            "is no ReXGroundingCT folder",
            expected="dataset.json",
            found="none",
            remedy="give the folder of the download",
        )
    return _read_records(tuple((path, path.stat().st_mtime_ns) for path in tables)).get(key)


def find_mask_files(folder: Path, key: str) -> tuple[Path, ...]:
    """The mask of a volume and the tables that explain it; empty when there is no mask (test masks are withheld)."""
    for path in (folder / "segmentations" / f"{key}.nii.gz", folder / f"{key}.nii.gz"):
        if path.is_file():
            return (
                path,
                *(table for table in (folder / name for name in TABLE_FILES) if table.is_file()),
            )
    return ()


@lru_cache(maxsize=8)
def _read_records(tables: tuple[tuple[Path, int], ...]) -> Mapping[str, RexVolumeRecord]:
    found: dict[str, RexVolumeRecord] = {}
    for path, _ in tables:
        try:
            splits = json.loads(path.read_text("utf-8"))
            rows = [
                (split, row)
                for split, listed in splits.items()
                if isinstance(listed, list)
                for row in listed
            ]
            for split, row in rows:
                key = row["name"].removesuffix(".nii.gz")
                one = RexVolumeRecord(split != "train", _parse_findings(row))
                # A volume that one table trains on keeps the weaker promise.
                if key not in found or not one.exhaustive:
                    found[key] = one
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise InputError(
                path,
                "is not a table of ReXGroundingCT",
                expected="by split, volumes with name, findings and categories",
                found=f"{type(error).__name__}: {error}",
                remedy="download it again",
            ) from None
    return found


def _parse_findings(row: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    words, categories = row["findings"], row.get("categories")
    if not isinstance(words, dict):
        words, categories = dict(enumerate(words)), categories and dict(enumerate(categories))
    # The challenge's test part, whose masks are withheld, may come without: its findings are then of no kind.
    categories = categories or dict.fromkeys(words, "")
    order = sorted(words, key=int)
    if [int(n) for n in order] != list(range(len(order))):
        raise ValueError(f"findings of {row['name']} are numbered {order}")
    return tuple((str(categories[n]), str(words[n])) for n in order)


def infer_lesions(category: str, words: str) -> dict[str, Certainty]:
    """Which lesions the mask of a finding is (sure) or may hold among other things (perhaps), by lesion key."""
    words = words.lower()
    out: dict[str, Certainty] = {}
    for lesion, pattern in POSSIBLE_LESIONS.get(category, {}).items():
        if re.search(pattern, words):
            out[lesion] = "perhaps"
    rule = CATEGORY_RULES.get(category)
    if rule is not None:
        certain = re.search(rule.sure_pattern, words) is not None
        if certain or not re.search(rule.never_pattern, words):
            out[rule.lesion] = (
                "sure" if certain and not re.search(rule.unless_pattern, words) else "perhaps"
            )
    return out


@dataclass(frozen=True)
class RexLesionOutlines:
    """The lesions of one mask file."""

    lesions: Volume
    """uint8 lesion bits, on the volume's grid."""
    annotated: frozenset[str]
    """Lesion keys of which all that the report names is outlined."""
    partial: frozenset[str]
    """Lesion keys of which only some may be."""


def read_outlines(path: Path, listed: RexVolumeRecord, volume: Volume) -> RexLesionOutlines:
    """Read a mask file, a block at a time: the extra memory is one bit volume, whatever the number of findings.

    A lesion that no finding names is not annotated, and neither is one whose finding has an empty mask.

    Raises:
        InputError: not one mask a finding on the volume's array, a volume that is not in the order of the released
            files, or a file that is damaged.
    """
    stored = _open_mask(path, listed, volume)
    meanings = [infer_lesions(*finding) for finding in listed.findings]
    sure = {
        n: [key for key, how in lesions.items() if how == "sure"]
        for n, lesions in enumerate(meanings)
    }
    bits = {
        n: combined_mask_value(LESION_BY_KEY[key] for key in keys)
        for n, keys in sure.items()
        if keys
    }
    array, drawn = _stream_lesion_bits(path, stored, volume.array.shape, bits)
    outlined = {key for n in bits if n in drawn for key in sure[n]}
    doubtful = {key for lesions in meanings for key, how in lesions.items() if how == "perhaps"}
    doubtful |= {key for n in bits if n not in drawn for key in sure[n]}
    whole = frozenset(outlined - doubtful) if listed.exhaustive else frozenset[str]()
    return RexLesionOutlines(
        Volume(array, volume.affine, str(path)), whole, frozenset(outlined - whole)
    )


def _open_mask(path: Path, listed: RexVolumeRecord, volume: Volume) -> nib.arrayproxy.ArrayProxy:
    """How the file stores its voxels. (The header of a loaded image does not tell: nibabel clears offset and scale.)"""
    order = nib.aff2axcodes(volume.affine)
    if order != _VOXEL_ORDER:
        raise InputError(
            volume.where,
            f"is not in the voxel order of the masks in {path}",
            expected="LPS, as in CT-RATE's _fixed files",
            found="".join(map(str, order)),
            remedy="give the released file as it is",
        )
    try:
        image = nib.load(path)
        if not isinstance(image, nib.Nifti1Image) or image.get_data_dtype().kind not in "biuf":
            raise ValueError(f"it is a {type(image).__name__}, not numbers in a NIfTI")
        assert isinstance(image.dataobj, nib.arrayproxy.ArrayProxy)
        if image.dataobj.inter:
            raise ValueError(f"its header adds {image.dataobj.inter:g} to every voxel, 0 included")
    except (nib.filebasedimages.ImageFileError, ValueError, EOFError, OSError, zlib.error) as error:
        raise InputError(
            path,
            "cannot be read",
            expected="a NIfTI mask",
            found=str(error),
            remedy="download it again",
        ) from None
    shape = tuple(image.shape)
    wanted = (len(listed.findings), *volume.array.shape)
    if shape != wanted:
        raise InputError(
            path,
            "does not fit its volume",
            expected=f"shape {wanted}, one mask a finding on the volume's array",
            found=str(shape),
            remedy="give the volume that it was drawn on, and the dataset.json of the same download",
        )
    return image.dataobj


def _stream_lesion_bits(
    path: Path, stored: nib.arrayproxy.ArrayProxy, shape: tuple[int, ...], bits: Mapping[int, int]
) -> tuple[MaskVolume, set[int]]:
    """The union of the chosen findings as bits (i, j, k), and the findings that have any voxel.

    The finding axis runs fastest in the file, so each block holds some voxels of all findings.
    """
    count, dtype = int(stored.shape[0]), stored.dtype
    voxels = int(np.prod(shape))
    out = np.zeros(voxels, np.uint8)
    step = max(1, _BLOCK_BYTES // (count * dtype.itemsize))
    drawn: set[int] = set()
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            file.read(stored.offset)
            for start in range(0, voxels, step):
                size = min(step, voxels - start) * count * dtype.itemsize
                block = file.read(size)
                if len(block) < size:
                    raise EOFError(f"it ends after {start} of {voxels} voxels")
                _unite_block(
                    out[start : start + step],
                    np.frombuffer(block, dtype).reshape(-1, count),
                    bits,
                    drawn,
                )
            while file.read(1 << 20):
                """To the end, where the checksum is."""
    except (EOFError, zlib.error, OSError) as error:
        raise InputError(
            path,
            "is cut short or damaged",
            expected="a whole file",
            found=str(error),
            remedy="download it again",
        ) from None
    return out.reshape(shape, order="F"), drawn


def _unite_block(
    out: MaskVolume, values: NDArray[Any], bits: Mapping[int, int], drawn: set[int]
) -> None:
    for finding, bit in bits.items():
        inside = values[:, finding] > 0
        if inside.any():
            drawn.add(finding)
            out |= inside * np.uint8(bit)
