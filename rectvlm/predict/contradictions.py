"""Contradictions in one case between the classifier's calls, the outlines and the report's text.

Three parts of the model answer on their own, so they may disagree; a reader must see where. The
report is read by the rules of `metrics.report_labeler`. A finding that the report calls uncertain
contradicts nothing.
"""

import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from rectvlm.data.voxel_size import voxel_spacing_mm, voxel_volume_ml
from rectvlm.labels import LESIONS, Lesion
from rectvlm.lesion_bits import lesion_mask
from rectvlm.lesion_places import MIN_LESION_ML, LesionPlace
from rectvlm.metrics.report_labeler.finding_states import FindingState
from rectvlm.metrics.report_labeler.laterality import read_sides
from rectvlm.metrics.report_labeler.modifiers import MEASUREMENT
from rectvlm.metrics.report_labeler.rule_labeler import label_report, parse_report
from rectvlm.types import Affine, MaskVolume

ContradictionKind = Literal[
    "call_without_outline",
    "outline_without_call",
    "report_denies_call",
    "report_without_call",
    "report_denies_outline",
    "report_without_outline",
    "report_omits_outline",
    "side",
    "size",
    "place",
]

MAX_SIZE_RATIO = 2.0
"""Largest ratio of a size in the report and one of the outline that still agree."""
_MAX_MEASURED_VOXELS = 2_000_000
"""Number of voxels in the box of a lesion that is measured; a larger box is thinned out."""
_VOLUME = re.compile(r"(\d+(?:[.,]\d+)?)\s*-?\s*(?:ml|cc|cm3|cm³|millilit\w+)\b")


@dataclass(frozen=True)
class Contradiction:
    """Two statements of one case that cannot both hold."""

    kind: ContradictionKind
    finding: str
    lesion: str | None
    """Key of the lesion; null where no outline takes part."""
    message: str
    """Both statements in one sentence."""


@dataclass(frozen=True)
class _Outline:
    """Outline of one kind of lesion."""

    lesion: Lesion
    mask: NDArray[np.bool_]
    spacing_mm: tuple[float, float, float]
    voxel_ml: float
    place: LesionPlace | None

    @property
    def volume_ml(self) -> float:
        return int(self.mask.sum()) * self.voxel_ml

    @property
    def is_present(self) -> bool:
        """Whether it is more than a speck."""
        return self.volume_ml >= MIN_LESION_ML

    def describe(self) -> str:
        """The outline in words: "12.0 ml of consolidation are outlined (right lung)"."""
        words = f"{self.volume_ml:.1f} ml of {self.lesion.name} are outlined"
        return words if self.place is None else f"{words} ({self.place.wording})"

    def describe_absence(self) -> str:
        """The lack of an outline in words, with the voxels of a speck."""
        voxels = int(self.mask.sum())
        if not voxels:
            return f"no {self.lesion.name} is outlined"
        noun = "voxel" if voxels == 1 else "voxels"
        return f"only {voxels} {noun} of {self.lesion.name} ({self.volume_ml:.2g} ml) are outlined"


def find_contradictions(
    calls: Mapping[str, bool],
    lesion_bits: MaskVolume | None,
    places: Sequence[LesionPlace],
    affine: Affine,
    report: str | None,
) -> list[Contradiction]:
    """Find the contradictions of one case.

    Args:
        calls: whether the classifier calls a finding present; one that is missing contradicts
            nothing.
        lesion_bits: lesion bits (Z, Y, X); None when the model has no localizer.
        places: places of the lesions that are large enough to have one.
        affine: 4 × 4, index (z, y, x, 1) to world, mm.
        report: generated text; None when the model has no report generator.
    """
    outlines = []
    if lesion_bits is not None:
        sizes = (voxel_spacing_mm(affine), voxel_volume_ml(affine))
        places_by_key = {place.lesion: place for place in places}
        for lesion in LESIONS:
            mask = lesion_mask(lesion_bits, lesion)
            outlines.append(_Outline(lesion, mask, *sizes, places_by_key.get(lesion.key)))
    contradictions = [*_compare_calls_with_outlines(calls, outlines), *_find_wrong_places(outlines)]
    if report is not None:
        states = label_report(report)
        contradictions += _compare_report_with_calls(states, calls)
        contradictions += _compare_report_with_outlines(states, outlines)
        contradictions += _compare_sides(report, outlines)
        contradictions += _compare_sizes(report, outlines)
    return contradictions


def _compare_calls_with_outlines(
    calls: Mapping[str, bool], outlines: Sequence[_Outline]
) -> Iterator[Contradiction]:
    for outline in outlines:
        lesion = outline.lesion
        call = calls.get(lesion.finding)
        if call is False and outline.is_present:
            words = f"The classifier calls {lesion.finding} absent, but {outline.describe()}."
            yield Contradiction("outline_without_call", lesion.finding, lesion.key, words)
        if call and lesion.is_implied_by_finding and not outline.is_present:
            absence = outline.describe_absence()
            words = f"The classifier calls {lesion.finding} present, but {absence}."
            yield Contradiction("call_without_outline", lesion.finding, lesion.key, words)


def _find_wrong_places(outlines: Sequence[_Outline]) -> Iterator[Contradiction]:
    for outline in outlines:
        lesion, place = outline.lesion, outline.place
        if place is not None and place.is_plausible is False:
            words = (
                f"{lesion.name.capitalize()} is outlined, at least in part, where it cannot lie: "
                f"{place.wording}."
            )
            yield Contradiction("place", lesion.finding, lesion.key, words)


def _compare_report_with_calls(
    states: Mapping[str, FindingState], calls: Mapping[str, bool]
) -> Iterator[Contradiction]:
    for finding, call in calls.items():
        if call and states[finding] == FindingState.ABSENT:
            words = f"The classifier calls {finding} present, but the report denies it."
            yield Contradiction("report_denies_call", finding, None, words)
        if call is False and states[finding] == FindingState.PRESENT:
            words = f"The report states {finding}, but the classifier calls it absent."
            yield Contradiction("report_without_call", finding, None, words)


def _compare_report_with_outlines(
    states: Mapping[str, FindingState], outlines: Sequence[_Outline]
) -> Iterator[Contradiction]:
    for outline in outlines:
        lesion = outline.lesion
        state = states[lesion.finding]
        if outline.is_present and state == FindingState.ABSENT:
            words = f"The report denies {lesion.finding}, but {outline.describe()}."
            yield Contradiction("report_denies_outline", lesion.finding, lesion.key, words)
        elif outline.is_present and state == FindingState.NOT_MENTIONED:
            words = f"The report does not mention {lesion.finding}, but {outline.describe()}."
            yield Contradiction("report_omits_outline", lesion.finding, lesion.key, words)
        is_stated = state == FindingState.PRESENT and lesion.is_implied_by_finding
        if is_stated and not outline.is_present:
            words = f"The report states {lesion.finding}, but {outline.describe_absence()}."
            yield Contradiction("report_without_outline", lesion.finding, lesion.key, words)


def _compare_sides(report: str, outlines: Sequence[_Outline]) -> Iterator[Contradiction]:
    stated_sides = read_sides(report)
    for outline in outlines:
        lesion, place = outline.lesion, outline.place
        stated = stated_sides.get(lesion.finding)
        if place is None or place.side is None or not stated:
            continue
        outlined = {"left", "right"} if place.side == "both" else {place.side}
        if stated != outlined:
            words = (
                f"The report places {lesion.finding} {_word_sides(stated)}, but the outline of "
                f"{lesion.name} is {_word_sides(outlined)} ({place.wording})."
            )
            yield Contradiction("side", lesion.finding, lesion.key, words)


def _word_sides(sides: Set[str]) -> str:
    return "on both sides" if len(sides) == 2 else f"on the {next(iter(sides))}"


def _compare_sizes(report: str, outlines: Sequence[_Outline]) -> Iterator[Contradiction]:
    for outline in outlines:
        lesion = outline.lesion
        lengths_mm, volumes_ml = _read_sizes(report, lesion.finding)
        if not outline.is_present:
            continue
        if lengths_mm:
            stated = max(lengths_mm)
            thickness, length = measure_extent(outline.mask, outline.spacing_mm)
            if not thickness / MAX_SIZE_RATIO <= stated <= length * MAX_SIZE_RATIO:
                words = (
                    f"The report measures {lesion.finding} at {stated:g} mm, but the largest part "
                    f"of the outline is {thickness:.0f} mm thick and {length:.0f} mm long."
                )
                yield Contradiction("size", lesion.finding, lesion.key, words)
        if volumes_ml:
            stated, ratio = max(volumes_ml), max(volumes_ml) / outline.volume_ml
            if not 1 / MAX_SIZE_RATIO <= ratio <= MAX_SIZE_RATIO:
                words = (
                    f"The report measures {lesion.finding} at {stated:g} ml, but "
                    f"{outline.describe()}."
                )
                yield Contradiction("size", lesion.finding, lesion.key, words)


def _read_sizes(report: str, finding: str) -> tuple[list[float], list[float]]:
    """Lengths (mm) and volumes (ml) in the sentences that state this finding and no other one."""
    lengths_mm, volumes_ml = [], []
    for sentence in parse_report(report):
        named = {mention.finding for mention in sentence.mentions}
        is_stated = any(mention.state >= FindingState.UNCERTAIN for mention in sentence.mentions)
        if named != {finding} or not is_stated:
            continue
        for match in MEASUREMENT.finditer(sentence.text):
            is_volume = sentence.text[match.end() : match.end() + 1] in ("3", "³")
            if not is_volume:
                axes = [float(axis.replace(",", ".")) for axis in (match[1], match[2]) if axis]
                lengths_mm.append(max(axes) * (10.0 if match[3].startswith("c") else 1.0))
        for match in _VOLUME.finditer(sentence.text):
            volumes_ml.append(float(match[1].replace(",", ".")))
    return lengths_mm, volumes_ml


def measure_extent(
    mask: NDArray[np.bool_], spacing_mm: tuple[float, float, float]
) -> tuple[float, float]:
    """Thickness and length of the largest component of a mask that is not empty, mm.

    The thickness is the diameter of the largest ball inside it, the length its extent along its
    longest principal axis.
    """
    (box,) = ndimage.find_objects(mask.astype(np.uint8))
    step = max(1, round((mask[box].size / _MAX_MEASURED_VOXELS) ** (1 / 3)))
    thin = mask[box][::step, ::step, ::step]
    spacing = np.asarray(spacing_mm) * step
    components, _ = ndimage.label(thin, np.ones((3, 3, 3)))
    sizes = np.bincount(components.reshape(-1))
    sizes[0] = 0
    largest = np.pad(components == sizes.argmax(), 1)
    thickness = 2 * float(ndimage.distance_transform_edt(largest, sampling=spacing).max())
    points = np.argwhere(largest) * spacing
    points -= points.mean(axis=0)
    axis = np.linalg.eigh(points.T @ points)[1][:, -1]
    along = points @ axis
    length = float(np.ptp(along) + np.abs(axis) @ spacing)
    return min(thickness, length), length
