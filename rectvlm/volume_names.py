"""Names of CT-RATE's volumes, and files that list them.

Every copy of CT-RATE writes its names a little differently: `valid_` or `validation_`, with or
without `.nii.gz`, sometimes as paths. `parse_volume_name` is the only place that knows.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rectvlm.types import InputError, UserError

_NAME_PATTERN = re.compile(r"(train|valid|validation)_(\d+)_([a-z]+)(?:_(\d+))?(?:\.nii(?:\.gz)?)?")


ReleasedSplit = Literal["train", "valid"]
"""Split of a patient in the data set's own names and files."""


@dataclass(frozen=True)
class VolumeName:
    """The parts of a CT-RATE name.

    `train_1_a_2` is reconstruction 2 of scan a of patient 1 of the training split.
    """

    split: ReleasedSplit
    patient_number: int
    scan_letters: str
    reconstruction: int | None
    """Number of the reconstruction; None in a name that stands for a whole scan."""

    @property
    def patient(self) -> str:
        """The patient's name; it holds the split, since each split numbers its patients from 1."""
        return f"{self.split}_{self.patient_number}"

    @property
    def scan(self) -> str:
        """The scan's name, which its reconstructions share."""
        return f"{self.patient}_{self.scan_letters}"

    @property
    def key(self) -> str:
        """The name of the volume's file without its suffix."""
        return self.scan if self.reconstruction is None else f"{self.scan}_{self.reconstruction}"

    @property
    def sort_key(self) -> tuple[str, int, int, str, int]:
        """A key that sorts as people count: train_2 before train_10."""
        letters = self.scan_letters
        return self.split, self.patient_number, len(letters), letters, self.reconstruction or 0


def parse_volume_name(text: str) -> VolumeName | None:
    """Read the name of a volume or scan from a file name, path or cell; None if it is none."""
    match = _NAME_PATTERN.fullmatch(re.split(r"[/\\]", text.strip())[-1])
    if match is None:
        return None
    prefix, patient, letters, reconstruction = match.groups()
    return VolumeName(
        split="train" if prefix == "train" else "valid",
        patient_number=int(patient),
        scan_letters=letters,
        reconstruction=int(reconstruction) if reconstruction is not None else None,
    )


def require_volume_name(text: str, path: Path, place: str) -> VolumeName:
    """Read a name from a file that must hold names.

    Args:
        text: the name as the file has it.
        path: of the file.
        place: of the name in the file, such as `row 2`.

    Raises:
        InputError: the text names neither a volume nor a scan.
    """
    name = parse_volume_name(text)
    if name is None:
        raise InputError(
            path,
            f"has a name in {place} that is not of CT-RATE",
            expected="one such as train_1_a_1.nii.gz or valid_1_a_1",
            found=repr(text),
            remedy="correct or delete it",
        )
    return name


def read_volume_list(path: Path) -> list[VolumeName]:
    """Read a list of volumes or scans, one a line; `#` starts a comment.

    Raises:
        UserError: no such file, or a line that names neither a volume nor a scan.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read as a list of volume names ({error}): expected one name a line."
        ) from None
    names = []
    for line_number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if text:
            names.append(require_volume_name(text, path, f"line {line_number}"))
    return names


def read_held_out_volumes(path: Path) -> list[VolumeName]:
    """Read the volumes of the validation and test splits of a ReXGroundingCT table.

    Raises:
        UserError: the file cannot be read, names no volume, or holds a name that is not of CT-RATE.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as JSON ({error}): expected ReXGroundingCT's dataset.json."
        ) from None
    rows: list[Any] = []
    for split in ("val", "valid", "validation", "test"):
        if split in table and isinstance(table[split], list):
            rows += table[split]

    names = []
    for row in rows:
        text = row.get("name") if isinstance(row, dict) else row
        name = parse_volume_name(text) if isinstance(text, str) else None
        if name is None:
            raise _not_a_rexgrounding_table(path, f"the name {text!r}")
        names.append(name)
    if not names:
        raise _not_a_rexgrounding_table(path, "none in them")
    return names


def _not_a_rexgrounding_table(path: Path, found: str) -> InputError:
    return InputError(
        path,
        "is no table of ReXGroundingCT",
        expected='lists "val" and "test" of items with a "name" such as train_1_a_1.nii.gz',
        found=found,
        remedy="give its dataset.json",
    )
