"""Series of DICOM files: what a folder holds, and which series is the chest CT of a study."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rectvlm.data.dicom.headers import DicomSlice, NotACtSlice, read_dicom_slices
from rectvlm.data.kernels import kernel_class

_MIN_AXIAL_COSINE = 0.8
"""Least share of the body's axis in an axial slice's normal: a gantry tilted by 30° leaves 0.87."""
_MIN_CHEST_MM = 200.0
"""Length of a series along its normal from which it can show a chest."""
_MAX_STEP_MM = 3.0
"""Distance of slices up to which small nodules do not fall between them."""
_CHEST_WORDS = ("CHEST", "THORAX", "LUNG", "TORSO", "TRUNK", "BODY")
_KERNEL_RANKS = {"soft": 0, None: 1, "sharp": 2}
_CHOICE_REASONS = (
    "is axial",
    "names the chest or no other body part",
    "is ORIGINAL and PRIMARY",
    f"is at least {_MIN_CHEST_MM:g} mm long",
    f"has slices at most {_MAX_STEP_MM:g} mm apart",
    "has the softer kernel",
    "has more slices",
    "has the lower number",
    "comes first",
)
"""Criteria of the choice in their order, as its reason."""


@dataclass(frozen=True)
class DicomSeries:
    """The CT slices of one series, in the order of their files."""

    uid: str
    slices: tuple[DicomSlice, ...]

    @property
    def study_uid(self) -> str:
        """Study of the series."""
        return self.slices[0].study_uid

    @property
    def number(self) -> int | None:
        """Number of the series in its study; None where it has none."""
        return self.slices[0].series_number

    @property
    def pseudonym(self) -> str:
        """Name that is always the same and says nothing of the patient."""
        return f"ct-{hashlib.sha256(self.uid.encode()).hexdigest()[:12]}"

    @property
    def folder(self) -> Path:
        """Folder that holds all files of the series."""
        return Path(os.path.commonpath([piece.file.parent for piece in self.slices]))

    @property
    def label(self) -> str:
        """The series in a sentence: its number, or its pseudonym."""
        return f"series {self.number}" if self.number is not None else f"series {self.pseudonym}"

    def describe(self) -> str:
        """The series in a list: number, slices, distance of slices and kernel."""
        kernel = f", kernel {self.slices[0].kernel}" if self.slices[0].kernel else ""
        return f"{self.label} ({len(self.slices)} slices, {self.step_mm:.3g} mm apart{kernel})"

    @cached_property
    def distances_mm(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Different positions of the slices along the first one's normal, ascending."""
        normal = self.slices[0].normal
        distances = np.array([np.dot(normal, piece.position) for piece in self.slices])
        return np.unique(distances.round(2))

    @property
    def step_mm(self) -> float:
        """Usual distance of neighbouring slices; 0 for a single slice."""
        return float(np.median(np.diff(self.distances_mm))) if len(self.distances_mm) > 1 else 0.0

    def rank(self) -> tuple[Any, ...]:
        """A value for each of `_CHOICE_REASONS`; the smaller one is better."""
        first = self.slices[0]
        is_of_chest = any(word in first.body_part for word in _CHEST_WORDS)
        extent_mm = self.distances_mm[-1] - self.distances_mm[0] + self.step_mm
        return (
            abs(first.normal[2]) < _MIN_AXIAL_COSINE,
            bool(first.body_part) and not is_of_chest,
            first.image_type[:2] != ("ORIGINAL", "PRIMARY"),
            extent_mm < _MIN_CHEST_MM,
            self.step_mm > _MAX_STEP_MM,
            _KERNEL_RANKS[kernel_class(first.kernel)],
            -len(self.distances_mm),
            self.number if self.number is not None else 1 << 30,
            self.uid,
        )


@dataclass
class DicomListing:
    """What DICOM files hold."""

    series: list[DicomSeries] = field(default_factory=list)
    skipped: dict[tuple[Path, str], int] = field(default_factory=dict)
    """Number of files that hold no slice of a CT, by their folder and the reason."""

    def describe_skipped(self) -> list[tuple[Path, str]]:
        """Each folder with what was skipped in it, in words."""
        lines = []
        for (folder, reason), count in self.skipped.items():
            subject = "a file that" if count == 1 else f"{count} files, each of which"
            lines.append((folder, f"holds {subject} {reason}"))
        return lines


def list_series(files: Iterable[Path]) -> DicomListing:
    """Read the headers of DICOM files and sort them into series."""
    slices: dict[str, list[DicomSlice]] = defaultdict(list)
    skipped: dict[tuple[Path, str], int] = defaultdict(int)
    for file in files:
        try:
            file_slices = read_dicom_slices(file)
        except NotACtSlice as reason:
            skipped[(file.parent, str(reason))] += 1
            continue
        slices[file_slices[0].series_uid] += file_slices
    series = [DicomSeries(uid, tuple(pieces)) for uid, pieces in slices.items()]
    return DicomListing(series, dict(skipped))


def group_by_study(series: Iterable[DicomSeries]) -> list[list[DicomSeries]]:
    """Series of each study; one without a study is a study of its own."""
    studies: dict[str, list[DicomSeries]] = defaultdict(list)
    for one_series in series:
        studies[one_series.study_uid or one_series.uid].append(one_series)
    return list(studies.values())


def choose_chest_ct(study: Sequence[DicomSeries]) -> list[tuple[DicomSeries, str]]:
    """Rank the series of a study: the chest CT first, with the reason why each ranks where it does.

    The criteria, in their order: axial; names the chest or no body part; ORIGINAL and PRIMARY; at
    least 200 mm long; slices at most 3 mm apart; softer kernel; more slices; lower number.

    Returns:
        Series and reason; that of the first is empty, those of the others say what the chosen one
        has over them.
    """
    ranked = sorted(study, key=DicomSeries.rank)
    best = ranked[0]
    reasons = [(best, "")]
    for other in ranked[1:]:
        values = zip(_CHOICE_REASONS, best.rank(), other.rank(), strict=True)
        criterion = next(reason for reason, value, worse in values if value != worse)
        reasons.append((other, f"{best.label} {criterion}"))
    return reasons


def is_wanted(series: DicomSeries, wanted: str) -> bool:
    """Whether `--series` asks for a series: by its UID or by its number."""
    return wanted == series.uid or (wanted.isdecimal() and series.number == int(wanted))
