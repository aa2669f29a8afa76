"""The side of each finding as a report words it, and how often a generated report has the reference's side."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rectvlm.labels import FINDINGS, LESIONS, BodySide
from rectvlm.metrics.report_labeler import modifiers
from rectvlm.metrics.report_labeler.rule_labeler import (
    FindingMention,
    FindingState,
    ReportSentence,
    parse_report,
)

SIDED_LESION_FINDINGS = tuple(lesion.finding for lesion in LESIONS if lesion.site != "pericardium")
"""Findings of the lesions that have a side; the accuracy is over these."""
SIDED_FINDINGS = tuple(
    finding
    for finding in FINDINGS
    if finding
    in {
        *SIDED_LESION_FINDINGS,
        "Emphysema",
        "Atelectasis",
        "Pulmonary fibrotic sequela",
        "Mosaic attenuation pattern",
        "Peribronchial thickening",
        "Bronchiectasis",
        "Interlobular septal thickening",
    }
)
"""Findings of the lungs and pleura, in the order of `labels.FINDINGS`."""

SIDE_OUTCOMES = ("correct", "partial", "opposite", "unstated", "not_mentioned")
"""What becomes of a finding whose side the reference states; the last one is not part of any n."""

_NOT_A_SIDE = (
    r"(?! (?:\w+ )?(?:ventric|atri|heart|coronary|main coronary|anterior descending|kidney|adrenal|subclavian|jugular|"
    r"brachiocephalic|carotid|axill|breast|hepatic|lobe of the (?:thyroid|liver)|thyroid|chest wall|shoulder|clavic|"
    r"rib))"
)
_SIDE_PATTERN = re.compile(
    rf"(?P<left>\bleft\b{_NOT_A_SIDE}|\bl[ul]l\b|\blingul\w*)"
    rf"|(?P<right>\bright\b{_NOT_A_SIDE}|\br[uml]l\b|(?<!left )\bmiddle lobe\b)"
    r"|(?P<both>\bboth\b(?! (?:main )?bronch)|\bbilateral\w*|\bbi-?(?:basal|basilar|apical)\w*|\beither (?:lung|side)\b"
    r"|\beach (?:lung|side)\b)"
)
_DISPLACEMENT = re.compile(
    r"\b(?:shift|displac|deviat|push)\w*(?:(?: (?!due\b|secondary\b)[\w-]+){0,6}? (?:to|towards?)(?: the)?)? $"
)
"""Before a side: where something is moved to, not where the finding is."""
_JOINING_WORDS = re.compile(r"^(?:,|\s|\band\b|\bor\b|\bwith\b|\baccompanied by\b|[\w-]+\s)*$")
_MAX_JOINING_CHARACTERS = 30
"""Characters between two names that share a side: "consolidation and patchy ground-glass opacity"."""
_SIDE_SETS: dict[str, frozenset[BodySide]] = {
    "left": frozenset({"left"}),
    "right": frozenset({"right"}),
    "both": frozenset({"left", "right"}),
}


def read_sides(report: str) -> dict[str, frozenset[BodySide]]:
    """The sides of each finding of `SIDED` that a report calls present or uncertain; empty where it states none.

    A side belongs to the name that it stands before ("left pleural effusion", "right upper lobe nodule"), else to the
    name before it and those joined to that ("consolidation and ground glass in the left lower lobe"), else, at the
    beginning of a statement, to all that follow ("In the right lung, …"). Lobes have their lung's side, the middle lobe
    is right, the lingula left; "both" and "bilateral" are both. The sides of all sentences are put together.
    """
    found: dict[str, frozenset[BodySide]] = {}
    for sentence in parse_report(report):
        for mention, own in _assign_sides(sentence):
            if mention.finding in SIDED_FINDINGS and mention.state >= FindingState.UNCERTAIN:
                found[mention.finding] = found.get(mention.finding, frozenset()) | own
    return found


def count_side_outcomes(
    generated: Sequence[str], references: Sequence[str | None]
) -> NDArray[np.int64]:
    """(N, 11, 5) counts, 0 or 1: for each case and finding of `SIDED`, which of `OUTCOMES`; all 0 where the reference
    states no side.

    correct: the same set of sides; partial: one side in common; opposite: none in common; unstated: the finding is
    there without a side; not_mentioned: the finding is not there.
    """
    counts = np.zeros((len(generated), len(SIDED_FINDINGS), len(SIDE_OUTCOMES)), dtype=np.int64)
    for case, text, reference in zip(counts, generated, references, strict=True):
        if reference is None:
            continue
        said = read_sides(text)
        for finding, true in read_sides(reference).items():
            if true:
                case[
                    SIDED_FINDINGS.index(finding),
                    SIDE_OUTCOMES.index(_classify_side(said.get(finding), true)),
                ] = 1
    return counts


def _classify_side(said: frozenset[BodySide] | None, true: frozenset[BodySide]) -> str:
    if said is None:
        return "not_mentioned"
    if not said:
        return "unstated"
    if said == true:
        return "correct"
    return "partial" if said & true else "opposite"


def score_laterality(counts: NDArray[np.int64]) -> dict[str, Any]:
    """Accuracy of sides from `side_outcomes`: over the lesions' findings, and for each finding of `SIDED`.

    n counts findings whose side the reference states and which the generated report names.
    """
    per_finding = {
        finding: _side_accuracy(counts[:, i].sum(axis=0))
        for i, finding in enumerate(SIDED_FINDINGS)
    }
    return score_lesion_laterality(counts) | {
        "all_findings": _side_accuracy(counts.sum(axis=(0, 1))),
        "per_finding": per_finding,
    }


def score_lesion_laterality(counts: NDArray[np.int64]) -> dict[str, Any]:
    """The first part of `laterality`: over the lesions' findings."""
    lesions = [SIDED_FINDINGS.index(finding) for finding in SIDED_LESION_FINDINGS]
    return _side_accuracy(counts[:, lesions].sum(axis=(0, 1)))


def _side_accuracy(totals: NDArray[np.int64]) -> dict[str, Any]:
    n = int(totals[:-1].sum())
    names = (f"n_{outcome}" for outcome in SIDE_OUTCOMES)
    counts = dict(zip(names, map(int, totals), strict=True))
    return {"accuracy": counts["n_correct"] / n if n else None, "n": n} | counts


def _assign_sides(sentence: ReportSentence) -> list[tuple[FindingMention, frozenset[BodySide]]]:
    """Each mention with its sides."""
    ends = [found.end() for found in modifiers.CLAUSE_END.finditer(sentence.text)]
    bounds = [0, *ends, len(sentence.text)]
    result = []
    for first, last in pairwise(bounds):
        mentions = [mention for mention in sentence.mentions if first <= mention.start < last]
        result += _assign_clause_sides(sentence.text, first, last, mentions)
    return result


def _assign_clause_sides(
    text: str, first: int, last: int, mentions: list[FindingMention]
) -> list[tuple[FindingMention, frozenset[BodySide]]]:
    own: list[frozenset[BodySide]] = [frozenset() for _ in mentions]
    fronted: frozenset[BodySide] = frozenset()
    adjectival: set[int] = set()
    for found in _SIDE_PATTERN.finditer(text, first, last):
        if _DISPLACEMENT.search(text[first : found.start()]):
            continue
        side = _SIDE_SETS[str(found.lastgroup)]
        owners = _mentions_after_side(text, found, mentions)
        adjectival |= set(owners)
        owners = owners or _mentions_before_side(text, found.start(), mentions, adjectival)
        for i in owners:
            own[i] |= side
        if not owners:
            fronted |= side
    for i, (name, following) in enumerate(pairwise(mentions)):
        # "left effusion and atelectasis", unless the second has a side of its own
        if i in adjectival and not own[i + 1] and _is_joined(text, name.end, following.start):
            own[i + 1] = own[i]
            adjectival.add(i + 1)
    return [(mention, sides or fronted) for mention, sides in zip(mentions, own, strict=True)]


def _mentions_after_side(
    text: str, side: re.Match[str], mentions: list[FindingMention]
) -> list[int]:
    """The mentions of the name that a side stands right before, or inside."""
    inside = [
        i for i, mention in enumerate(mentions) if mention.start <= side.start() < mention.end
    ]
    if inside:
        return inside
    following = [i for i, mention in enumerate(mentions) if mention.start >= side.end()]
    if not following or modifiers.NOT_ADJECTIVAL.search(
        text, side.end(), mentions[following[0]].start
    ):
        return []
    name = mentions[following[0]]
    return [i for i in following if mentions[i].start < name.end]


def _mentions_before_side(
    text: str, start: int, mentions: list[FindingMention], adjectival: set[int]
) -> list[int]:
    """The mention before a side, and those joined to it that have none before them."""
    before = [i for i, mention in enumerate(mentions) if mention.end <= start]
    if not before:
        return []
    owners = [before[-1]]
    for i in reversed(before[:-1]):
        nearest = mentions[owners[-1]]
        same = mentions[i].end > nearest.start
        if not same and (i in adjectival or not _is_joined(text, mentions[i].end, nearest.start)):
            break
        owners.append(i)
    return owners


def _is_joined(text: str, start: int, end: int) -> bool:
    between = text[start:end]
    return (
        len(between) <= _MAX_JOINING_CHARACTERS
        and bool(_JOINING_WORDS.match(between))
        and not _SIDE_PATTERN.search(between)
    )
