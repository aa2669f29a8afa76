"""ReXGroundingCT: findings of CT-RATE reports with a mask each (Baharoon et al., arXiv 2507.22030).

A folder has `dataset.json` (and, since 2026, `MICCAI_challenge_dataset.json`), which lists by split
the findings of each volume in words and a category each; and `segmentations/KEY.nii.gz`, an array
(finding, i, j, k). That array follows the voxel order of CT-RATE's `_fixed` files, which are LPS;
the affine in its header describes the finding axis as space and is of no use.
"""

import gzip
import json
import re
import zlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from rectvlm.labels import LESION_BY_KEY
from rectvlm.lesion_bits import combined_mask_value
from rectvlm.types import InputError, MaskVolume, Volume

TABLE_FILES = ("dataset.json", "MICCAI_challenge_dataset.json")
_BLOCK_BYTES = 8 << 20
_VOXEL_ORDER = ("L", "P", "S")
_NO_MATCH = r"(?!)"
"""Regular expression that matches nothing."""

Certainty = Literal["sure", "perhaps"]


@dataclass(frozen=True)
class CategoryRule:
    """The lesion that findings of one category are, if their words allow it.

    Patterns are regular expressions; an empty one matches all words.
    """

    lesion: str
    """Key of the lesion."""
    sure_pattern: str = ""
    """Words that make the mask this lesion."""
    unless_pattern: str = _NO_MATCH
    """Words that mean the mask may also hold something else, even where `sure_pattern` matches."""
    never_pattern: str = _NO_MATCH
    """Words that exclude the lesion, unless `sure_pattern` matches too."""


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
"""The categories that are one of the five lesions: 2b atelectasis or consolidation, 2c ground-glass
opacity, 2d nodules or masses, 2e pleural effusion or thickening. All others (1a bronchial wall
thickening, 1b bronchiectasis, 1c emphysema, 1d septal thickening, 1e micronodules, 1f other
non-focal, 2a linear, 2f honeycombing, 2g pneumothorax, 2h other focal, and 3 to 12 outside the
lungs) are none."""

_ANY_LESION = {
    "pericardial_effusion": "pericard",
    "pleural_effusion": "effusion",
    "consolidation": "consolidat",
    "ground_glass_opacity": "ground.?glass",
    "lung_nodule": "nodul",
}
POSSIBLE_LESIONS: dict[str, dict[str, str]] = {
    "1e": {"lung_nodule": ""},
    "2b": {"ground_glass_opacity": "ground.?glass"},
    "2c": {"consolidation": "consolidat"},
    "2e": {"pericardial_effusion": "pericard"},
    "1f": _ANY_LESION,
    "2h": _ANY_LESION,
}
"""Lesions that the masks of a category may hold too, each with the words that say so. They are not
drawn, and they take away the certainty that all of that lesion is outlined elsewhere."""


class RexFinding(NamedTuple):
    """One finding of a report."""

    category: str
    words: str


@dataclass(frozen=True)
class RexVolumeRecord:
    """The record of one volume in the data set's tables."""

    is_exhaustive: bool
    """Whether every instance of each finding is outlined, as in validation and test; in training
    three instances are outlined at most."""
    findings: tuple[RexFinding, ...]
    """Findings in the order of the mask's first axis."""


def find_tables(folder: Path) -> list[Path]:
    """The data set's tables that a folder has."""
    paths = [folder / name for name in TABLE_FILES]
    return [path for path in paths if path.is_file()]


def find_record(folder: Path, key: str) -> RexVolumeRecord | None:
    """Find the record of a volume (named without `.nii.gz`); None when no table lists it.

    Raises:
        InputError: no table, or one that is not of the published form.
    """
    tables = find_tables(folder)
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
    """Find the mask of a volume and the tables that explain it.

    There is none for test volumes, whose masks are withheld.
    """
    for path in (folder / "segmentations" / f"{key}.nii.gz", folder / f"{key}.nii.gz"):
        if path.is_file():
            return (path, *find_tables(folder))
    return ()


def has_exhaustive_outlines(folder: Path, key: str) -> bool:
    """Whether a volume's mask is there and outlines every instance of the findings it lists.

    Raises:
        InputError: as `find_record`.
    """
    record = find_record(folder, key)
    return record is not None and record.is_exhaustive and bool(find_mask_files(folder, key))


@lru_cache(maxsize=8)
def _read_records(tables: tuple[tuple[Path, int], ...]) -> Mapping[str, RexVolumeRecord]:
    """Read the records by volume.

    Args:
        tables: path and modification time of each; the time keeps a changed table out of the cache.
    """
    records: dict[str, RexVolumeRecord] = {}
    for path, _ in tables:
        try:
            for split, rows in json.loads(path.read_text("utf-8")).items():
                for row in rows if isinstance(rows, list) else ():
                    key = row["name"].removesuffix(".nii.gz")
                    record = RexVolumeRecord(split != "train", _parse_findings(row))
                    # A volume that one table trains on keeps the weaker promise.
                    if key not in records or not record.is_exhaustive:
                        records[key] = record
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise InputError(
                path,
                "is not a table of ReXGroundingCT",
                expected="by split, volumes with name, findings and categories",
                found=f"{type(error).__name__}: {error}",
                remedy="download it again",
            ) from None
    return records


def _parse_findings(row: dict[str, Any]) -> tuple[RexFinding, ...]:
    words, categories = row["findings"], row.get("categories")
    if not isinstance(words, dict):
        words = dict(enumerate(words))
        categories = categories and dict(enumerate(categories))
    # The challenge's test part, whose masks are withheld, may come without categories: its findings
    # are then of no kind.
    categories = categories or dict.fromkeys(words, "")
    order = sorted(words, key=int)
    if [int(number) for number in order] != list(range(len(order))):
        raise ValueError(f"findings of {row['name']} are numbered {order}")
    return tuple(RexFinding(str(categories[number]), str(words[number])) for number in order)


def infer_lesions(category: str, words: str) -> dict[str, Certainty]:
    """Infer the lesions of a finding's mask, by lesion key.

    `sure` says that the mask is this lesion, `perhaps` that it may hold it among other things.
    """
    words = words.lower()
    lesions: dict[str, Certainty] = {}
    for lesion, pattern in POSSIBLE_LESIONS.get(category, {}).items():
        if re.search(pattern, words):
            lesions[lesion] = "perhaps"
    rule = CATEGORY_RULES.get(category)
    if rule is not None:
        matches = re.search(rule.sure_pattern, words) is not None
        if matches and not re.search(rule.unless_pattern, words):
            lesions[rule.lesion] = "sure"
        elif matches or not re.search(rule.never_pattern, words):
            lesions[rule.lesion] = "perhaps"
    return lesions


@dataclass(frozen=True)
class RexLesionOutlines:
    """The lesions of one mask file."""

    lesions: Volume
    """Lesion bits, uint8, on the volume's grid."""
    annotated: frozenset[str]
    """Keys of the lesions that are outlined wherever the report names them."""
    partial: frozenset[str]
    """Keys of the lesions that may be outlined only in part."""


def read_outlines(path: Path, record: RexVolumeRecord, volume: Volume) -> RexLesionOutlines:
    """Read a mask file.

    It is read a block at a time, so the extra memory is one volume of bits for any number of
    findings. A lesion that no finding names is not annotated, and neither is one whose finding has
    an empty mask.

    Args:
        path: of the mask file.
        record: of the volume.
        volume: the CT that the masks were drawn on.

    Raises:
        InputError: not one mask a finding on the volume's array, a volume that is not in the order
            of the released files, or a file that is damaged.
    """
    voxels = _open_mask(path, record, volume)
    sure_keys: dict[int, list[str]] = defaultdict(list)
    doubtful: set[str] = set()
    for number, finding in enumerate(record.findings):
        for key, certainty in infer_lesions(*finding).items():
            if certainty == "sure":
                sure_keys[number].append(key)
            else:
                doubtful.add(key)
    mask_values = {
        number: combined_mask_value(LESION_BY_KEY[key] for key in keys)
        for number, keys in sure_keys.items()
    }
    bits, drawn_findings = _stream_lesion_bits(path, voxels, volume.array.shape, mask_values)

    outlined: set[str] = set()
    for number, keys in sure_keys.items():
        if number in drawn_findings:
            outlined.update(keys)
        else:
            doubtful.update(keys)
    annotated = outlined - doubtful if record.is_exhaustive else set()
    return RexLesionOutlines(
        lesions=Volume(bits, volume.affine, str(path)),
        annotated=frozenset(annotated),
        partial=frozenset(outlined - annotated),
    )


def _open_mask(path: Path, record: RexVolumeRecord, volume: Volume) -> nib.arrayproxy.ArrayProxy:
    """Check a mask file against its volume; return a proxy that knows how the voxels are stored.

    The header of a loaded image does not know: nibabel clears its offset and scale.
    """
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
    expected_shape = (len(record.findings), *volume.array.shape)
    if shape != expected_shape:
        raise InputError(
            path,
            "does not fit its volume",
            expected=f"shape {expected_shape}, one mask a finding on the volume's array",
            found=str(shape),
            remedy="give the volume that it was drawn on, and the dataset.json of the same "
            "download",
        )
    return image.dataobj


def _stream_lesion_bits(
    path: Path,
    stored: nib.arrayproxy.ArrayProxy,
    shape: tuple[int, ...],
    mask_values: Mapping[int, int],
) -> tuple[MaskVolume, set[int]]:
    """Unite the masks of some findings, reading a block at a time.

    The finding axis runs fastest in the file, so each block holds some voxels of all findings.

    Args:
        path: of the mask file.
        stored: how the file stores its voxels.
        shape: of the volume, (i, j, k).
        mask_values: lesion bits by number of the finding; other findings are left out.

    Returns:
        Lesion bits (i, j, k), and the findings among the chosen ones that have any voxel.
    """
    finding_count, dtype = int(stored.shape[0]), stored.dtype
    voxel_bytes = finding_count * dtype.itemsize
    voxel_count = int(np.prod(shape))
    bits = np.zeros(voxel_count, np.uint8)
    step = max(1, _BLOCK_BYTES // voxel_bytes)
    drawn_findings: set[int] = set()
    with path.open("rb") as raw:
        is_gzip = raw.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path, "rb") if is_gzip else path.open("rb") as file:
            file.read(stored.offset)
            for start in range(0, voxel_count, step):
                size = min(step, voxel_count - start) * voxel_bytes
                block = file.read(size)
                if len(block) < size:
                    raise EOFError(f"it ends after {start} of {voxel_count} voxels")
                values = np.frombuffer(block, dtype).reshape(-1, finding_count)
                _unite_block(bits[start : start + step], values, mask_values, drawn_findings)
            while file.read(1 << 20):
                """Read to the end, where the checksum is."""
    except (EOFError, zlib.error, OSError) as error:
        raise InputError(
            path,
            "is cut short or damaged",
            expected="a whole file",
            found=str(error),
            remedy="download it again",
        ) from None
    return bits.reshape(shape, order="F"), drawn_findings


def _unite_block(
    bits: MaskVolume,
    values: NDArray[Any],
    mask_values: Mapping[int, int],
    drawn_findings: set[int],
) -> None:
    """Add the masks of a block (voxel, finding) to its bits, in place; note the findings it
    shows."""
    for finding, mask_value in mask_values.items():
        inside = values[:, finding] > 0
        if inside.any():
            drawn_findings.add(finding)
            bits |= inside * np.uint8(mask_value)
