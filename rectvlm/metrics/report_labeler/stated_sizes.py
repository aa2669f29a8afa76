"""Sizes of findings in a report, and their agreement with the reference report.

A table of texts knows that there is a nodule, not that it measures 8 mm. Shape: N cases, F findings
of `SIZED_FINDINGS`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rectvlm.labels import DEFAULT_CONVENTION, FINDINGS, LabelConvention
from rectvlm.metrics.arrays import CountArray
from rectvlm.metrics.report_labeler.entity_terms import ENTITIES
from rectvlm.metrics.report_labeler.finding_states import FindingState
from rectvlm.metrics.report_labeler.laterality import mentions_right_after
from rectvlm.metrics.report_labeler.modifiers import MEASUREMENT
from rectvlm.metrics.report_labeler.rule_labeler import (
    FindingMention,
    parse_entities,
    parse_report,
)
from rectvlm.types import JsonObject

SIZE_TOLERANCE_MM = 2.0
"""Largest difference of two sizes that agree, mm; the repeatability of a nodule's diameter by hand
is 1.7 mm (Revel et al., Radiology 2004)."""
SIZE_TOLERANCE_SHARE = 0.2
"""The same as a share of the reference's size; the larger of both counts."""
SIZED_FINDINGS = (*FINDINGS, *ENTITIES)
SIZE_OUTCOMES = ("within", "outside", "unstated", "not_mentioned")
"""Outcomes of a finding whose size the reference states; the last one is not part of any n."""

_NUMBER = re.compile(r"\d+(?:[.,]\d+)?")
_NOT_A_SIZE_BEFORE = re.compile(
    r"\b(?:previous\w*|prior|former\w*|earlier)[^.;,)]{0,25}$"
    r"|\b(?:from|within|below|under|exceed\w*|distance|(?:slice|section) thickness|"
    r"(?:less|smaller|shorter|lower|larger|greater|bigger|more) than)"
    r"(?: (?:of|is|the|about|approximately))* $"
)
"""Before a measurement: an earlier size, a bound, or a distance."""
_NOT_A_SIZE_AFTER = re.compile(
    r"\s*(?:away|distal|proximal|from\b|above|below|caudal|cranial|(?:slice|section)s?\b|thick "
    r"(?:slice|section)|intervals?\b|(?:on|in) (?:the )?(?:previous|prior))"
)


@dataclass(frozen=True)
class _Measurement:
    """A size in a sentence."""

    match: re.Match[str]
    size_mm: float


def read_sizes(
    report: str, convention: LabelConvention = DEFAULT_CONVENTION
) -> dict[str, float | None]:
    """Read the largest stated diameter of each finding that a report calls present or uncertain.

    A measurement ("12 mm", "1.2 cm", "1,2 cm", "12x9 mm") belongs to the name that it stands before
    ("a 12 mm nodule"), else to the last name before it ("a nodule of 12 mm"), else to the next one.
    Earlier sizes, bounds ("less than 3 mm") and distances are no sizes.

    Args:
        report: text of the report.
        convention: convention of the rules that name the 18 findings.

    Returns:
        Size by finding of `SIZED_FINDINGS`, mm; None where the finding is named without one.
    """
    sizes: dict[str, float | None] = {}
    pairs = zip(parse_report(report, convention), parse_entities(report), strict=True)
    for sentence, entities in pairs:
        mentions = sorted([*sentence.mentions, *entities.mentions], key=_name_start)
        measurements = _find_measurements(sentence.text)
        owners = [_find_owners(sentence.text, one.match, mentions) for one in measurements]
        for mention in mentions:
            if mention.state < FindingState.UNCERTAIN:
                continue
            size = sizes.setdefault(mention.finding, None)
            for measurement, owner in zip(measurements, owners, strict=True):
                if mention in owner:
                    size = max(size or 0.0, measurement.size_mm)
            sizes[mention.finding] = size
    return sizes


def _name_start(mention: FindingMention) -> tuple[int, int]:
    return mention.start, mention.end


def _find_measurements(text: str) -> list[_Measurement]:
    measurements = []
    for match in MEASUREMENT.finditer(text):
        is_size = not _NOT_A_SIZE_BEFORE.search(text, 0, match.start())
        if is_size and not _NOT_A_SIZE_AFTER.match(text, match.end()):
            measurements.append(_Measurement(match, _longest_axis_mm(match)))
    return measurements


def _longest_axis_mm(match: re.Match[str]) -> float:
    axes = [float(number.replace(",", ".")) for number in _NUMBER.findall(match[0])]
    return max(axes) * (10.0 if match[3].startswith("c") else 1.0)


def _find_owners(
    text: str, match: re.Match[str], mentions: Sequence[FindingMention]
) -> list[FindingMention]:
    """Names that a measurement belongs to; several where they share words."""
    following = mentions_right_after(text, match, mentions)
    if following:
        return [mentions[i] for i in following]
    before = [mention for mention in mentions if mention.end <= match.start()]
    if before:
        nearest = before[-1]
        return [mention for mention in before if mention.end > nearest.start]
    return [mention for mention in mentions if mention.start >= match.end()][:1]


def count_size_outcomes(
    generated: Sequence[str],
    references: Sequence[str | None],
    convention: LabelConvention = DEFAULT_CONVENTION,
) -> CountArray:
    """Count the outcome of each finding whose size the reference states.

    within: the sizes differ by at most 2 mm or 20% of the reference's, the larger of both;
    outside: by more; unstated: the finding is there without a size; not_mentioned: it is not there.

    Args:
        generated: generated report of each case, (N,).
        references: true report of each case, (N,); None where there is none.
        convention: convention of the rules that read both.

    Returns:
        Counts by finding of `SIZED_FINDINGS` and by `SIZE_OUTCOMES`, (N, F, 4), 0 or 1.
    """
    shape = (len(generated), len(SIZED_FINDINGS), len(SIZE_OUTCOMES))
    counts = np.zeros(shape, dtype=np.int64)
    for case_counts, text, reference in zip(counts, generated, references, strict=True):
        if reference is None:
            continue
        stated_sizes = read_sizes(text, convention)
        for finding, true_mm in read_sizes(reference, convention).items():
            if true_mm is not None:
                outcome = _classify_size(finding, stated_sizes, true_mm)
                case_counts[SIZED_FINDINGS.index(finding), SIZE_OUTCOMES.index(outcome)] = 1
    return counts


def _classify_size(finding: str, stated_sizes: dict[str, float | None], true_mm: float) -> str:
    if finding not in stated_sizes:
        return "not_mentioned"
    stated_mm = stated_sizes[finding]
    if stated_mm is None:
        return "unstated"
    tolerance_mm = max(SIZE_TOLERANCE_MM, SIZE_TOLERANCE_SHARE * true_mm)
    # The sizes are decimal fractions: 1.2 cm and 10 mm differ by 2 mm, whatever the rounding.
    is_within = abs(stated_mm - true_mm) <= tolerance_mm + 1e-9
    return "within" if is_within else "outside"


def score_sizes(counts: CountArray) -> JsonObject:
    """Share of sizes within the tolerance: over all findings, and for each that has one.

    n counts findings whose size the reference states and which the generated report names.

    Args:
        counts: counts of `count_size_outcomes`, (N, F, 4).
    """
    totals = counts.sum(axis=0)
    per_finding = {}
    for finding, row in zip(SIZED_FINDINGS, totals, strict=True):
        if row.any():
            per_finding[finding] = _size_accuracy(row)
    return _size_accuracy(totals.sum(axis=0)) | {
        "tolerance_mm": SIZE_TOLERANCE_MM,
        "tolerance_share": SIZE_TOLERANCE_SHARE,
        "per_finding": per_finding,
    }


def size_accuracy(counts: CountArray) -> float | None:
    """Share of sizes within the tolerance, of all findings; None where no size can be compared."""
    accuracy: float | None = _size_accuracy(counts.sum(axis=(0, 1)))["accuracy"]
    return accuracy


def _size_accuracy(totals: CountArray) -> JsonObject:
    n = int(totals[:-1].sum())
    counts = {f"n_{name}": int(count) for name, count in zip(SIZE_OUTCOMES, totals, strict=True)}
    return {"accuracy": counts["n_within"] / n if n else None, "n": n} | counts
