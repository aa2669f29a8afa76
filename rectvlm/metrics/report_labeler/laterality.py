"""Side and lobe of each finding in a report, and their agreement with the reference report.

Shapes: N cases, S sided findings (11).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from rectvlm.labels import DEFAULT_CONVENTION, FINDINGS, LESIONS, BodySide, LabelConvention
from rectvlm.metrics.arrays import CountArray
from rectvlm.metrics.report_labeler import modifiers
from rectvlm.metrics.report_labeler.clauses import Span
from rectvlm.metrics.report_labeler.finding_states import FindingState
from rectvlm.metrics.report_labeler.rule_labeler import (
    FindingMention,
    ReportSentence,
    parse_report,
)
from rectvlm.types import JsonObject

BodySides = frozenset[BodySide]
Places = frozenset[str]
"""Sides, or lobes."""

SIDED_LESION_FINDINGS = tuple(lesion.finding for lesion in LESIONS if lesion.site != "pericardium")
"""Findings of the lesions that have a side; the headline accuracy is over these."""
_SIDED = {
    *SIDED_LESION_FINDINGS,
    "Emphysema",
    "Atelectasis",
    "Pulmonary fibrotic sequela",
    "Mosaic attenuation pattern",
    "Peribronchial thickening",
    "Bronchiectasis",
    "Interlobular septal thickening",
}
SIDED_FINDINGS = tuple(finding for finding in FINDINGS if finding in _SIDED)
"""Findings of the lungs and pleura, in the order of `labels.FINDINGS`."""

LOBE_OUTCOMES = ("correct", "partial", "other", "unstated", "not_mentioned")
"""Outcomes of a finding whose lobe the reference states; the last one is not part of any n."""
SIDE_OUTCOMES = ("correct", "partial", "opposite", "unstated", "not_mentioned")
"""Outcomes of a finding whose side the reference states; the last one is not part of any n."""

_NOT_A_SIDE = (
    r"(?! (?:\w+ )?(?:ventric|atri|heart|coronary|main coronary|anterior descending|kidney|"
    r"adrenal|subclavian|jugular|"
    r"brachiocephalic|carotid|axill|breast|hepatic|lobe of the (?:thyroid|liver)|thyroid|"
    r"chest wall|shoulder|clavic|"
    r"rib))"
)
_SIDE_PATTERN = re.compile(
    rf"(?P<left>\bleft\b{_NOT_A_SIDE}|\bl[ul]l\b|\blingul\w*)"
    rf"|(?P<right>\bright\b{_NOT_A_SIDE}|\br[uml]l\b|(?<!left )\bmiddle lobe\b)"
    r"|(?P<both>\bboth\b(?! (?:main )?bronch)|\bbilateral\w*|\bbi-?(?:basal|basilar|"
    r"apical)\w*|\beither (?:lung|side)\b"
    r"|\beach (?:lung|side)\b)"
)
_DISPLACEMENT = re.compile(
    r"\b(?:shift|displac|deviat|push)\w*(?:(?: (?!due\b|secondary\b)[\w-]+){0,6}? (?:to|"
    r"towards?)(?: the)?)? $"
)
"""Before a side: the direction in which something is moved, not the place of the finding."""
_JOINING_WORDS = re.compile(r"^(?:,|\s|\band\b|\bor\b|\bwith\b|\baccompanied by\b|[\w-]+\s)*$")
_MAX_JOINING_CHARACTERS = 30
"""Longest text between two names with a common side: "consolidation and patchy ground glass"."""
_STATEMENT = re.compile(r"\s*(?:,|and\b)")
"""What stands between a name and the statement after it."""
_LOBE_PATTERN = re.compile(
    r"(?P<right_upper>\bright (?:lung )?upper lobe\b|\brul\b|"
    r"\bupper lobe (?:[a-z]+ ){0,3}?of the right lung\b)"
    r"|(?P<right_lower>\bright (?:lung )?lower lobe\b|\brll\b|"
    r"\blower lobe (?:[a-z]+ ){0,3}?of the right lung\b)"
    r"|(?P<middle>\b(?:right (?:lung )?)?middle lobe\b|\brml\b)"
    r"|(?P<left_upper>\bleft (?:lung )?upper lobe\b|\blul\b|\blingul\w*|"
    r"\bupper lobe (?:[a-z]+ ){0,3}?of the left lung\b)"
    r"|(?P<left_lower>\bleft (?:lung )?lower lobe\b|\blll\b|"
    r"\blower lobe (?:[a-z]+ ){0,3}?of the left lung\b)"
    r"|(?P<both_upper>\b(?:both|bilateral) (?:lung )?upper lobes?\b|"
    r"\bupper lobes (?:[a-z]+ ){0,2}?of both lungs\b)"
    r"|(?P<both_lower>\b(?:both|bilateral) (?:lung )?lower lobes?\b|"
    r"\blower lobes (?:[a-z]+ ){0,2}?of both lungs\b)"
)


@dataclass(frozen=True)
class _PlaceWords:
    """Words for the places of one kind."""

    pattern: re.Pattern[str]
    """Finds the words; the group that matches says which places they name."""
    places: Mapping[str, Places]
    """Places by group of the pattern."""


_SIDE_WORDS = _PlaceWords(
    _SIDE_PATTERN,
    {
        "left": frozenset({"left"}),
        "right": frozenset({"right"}),
        "both": frozenset({"left", "right"}),
    },
)
_LOBES = ("right_upper", "middle", "right_lower", "left_upper", "left_lower")
_LOBE_WORDS = _PlaceWords(
    _LOBE_PATTERN,
    {lobe: frozenset({lobe}) for lobe in _LOBES}
    | {
        "both_upper": frozenset({"right_upper", "left_upper"}),
        "both_lower": frozenset({"right_lower", "left_lower"}),
    },
)


def read_sides(
    report: str, convention: LabelConvention = DEFAULT_CONVENTION
) -> dict[str, BodySides]:
    """Read the sides of each sided finding that a report calls present or uncertain.

    The set is empty where the report states no side. A side belongs to the name that it stands
    before ("left pleural effusion", "right upper lobe nodule"), else to the name before it and
    those joined to that ("consolidation and ground glass in the left lower lobe"), else, at the
    beginning of a statement, to all that follow ("In the right lung, …"). Lobes have their lung's
    side, the middle lobe is right, the lingula left; "both" and "bilateral" are both. The sides of
    all sentences are put together.
    """
    return _read_places(report, convention, _SIDE_WORDS)


def read_lobes(report: str, convention: LabelConvention = DEFAULT_CONVENTION) -> dict[str, Places]:
    """Read the lobes of each sided finding that a report calls present or uncertain.

    As `read_sides`. The lingula counts as the left upper lobe.
    """
    return _read_places(report, convention, _LOBE_WORDS)


def _read_places(
    report: str, convention: LabelConvention, words: _PlaceWords
) -> dict[str, frozenset[Any]]:
    places_by_finding: dict[str, frozenset[Any]] = {}
    for sentence in parse_report(report, convention):
        for mention, places in _assign_places(sentence, words):
            if mention.finding in SIDED_FINDINGS and mention.state >= FindingState.UNCERTAIN:
                previous = places_by_finding.get(mention.finding, frozenset())
                places_by_finding[mention.finding] = previous | places
    return places_by_finding


def count_side_outcomes(
    generated: Sequence[str],
    references: Sequence[str | None],
    convention: LabelConvention = DEFAULT_CONVENTION,
) -> CountArray:
    """Count the outcome of each sided finding in each case.

    correct: the same set of sides; partial: one side in common; opposite: none in common; unstated:
    the finding is there without a side; not_mentioned: the finding is not there.

    Args:
        generated: generated report of each case, (N,).
        references: true report of each case, (N,); None where there is none.
        convention: convention of the rules that read both.

    Returns:
        Counts by finding of `SIDED_FINDINGS` and by `SIDE_OUTCOMES`, (N, 11, 5), 0 or 1; all 0
        where the reference states no side.
    """
    return _count_place_outcomes(generated, references, convention, _SIDE_WORDS)


def count_lobe_outcomes(
    generated: Sequence[str],
    references: Sequence[str | None],
    convention: LabelConvention = DEFAULT_CONVENTION,
) -> CountArray:
    """Count the outcome of each finding whose lobe the reference states, as `count_side_outcomes`.

    Returns:
        Counts by finding of `SIDED_FINDINGS` and by `LOBE_OUTCOMES`, (N, S, 5), 0 or 1; a finding
        in none of the reference's lobes is `other`.
    """
    return _count_place_outcomes(generated, references, convention, _LOBE_WORDS)


def _count_place_outcomes(
    generated: Sequence[str],
    references: Sequence[str | None],
    convention: LabelConvention,
    words: _PlaceWords,
) -> CountArray:
    shape = (len(generated), len(SIDED_FINDINGS), len(SIDE_OUTCOMES))
    counts = np.zeros(shape, dtype=np.int64)
    for case_counts, text, reference in zip(counts, generated, references, strict=True):
        if reference is None:
            continue
        stated = _read_places(text, convention, words)
        for finding, true_places in _read_places(reference, convention, words).items():
            if true_places:
                outcome = _classify_places(stated.get(finding), true_places)
                i, j = SIDED_FINDINGS.index(finding), SIDE_OUTCOMES.index(outcome)
                case_counts[i, j] = 1
    return counts


def _classify_places(stated: Places | None, true: Places) -> str:
    """Outcome as `SIDE_OUTCOMES` names it."""
    if stated is None:
        return "not_mentioned"
    if not stated:
        return "unstated"
    if stated == true:
        return "correct"
    return "partial" if stated & true else "opposite"


def score_laterality(counts: CountArray) -> JsonObject:
    """Accuracy of sides: over the lesions' findings, over all, and for each sided finding.

    n counts findings whose side the reference states and which the generated report names.

    Args:
        counts: counts of `count_side_outcomes`, (N, 11, 5).
    """
    per_finding = {}
    for i, finding in enumerate(SIDED_FINDINGS):
        per_finding[finding] = _side_accuracy(counts[:, i].sum(axis=0))
    return score_lesion_laterality(counts) | {
        "all_findings": _side_accuracy(counts.sum(axis=(0, 1))),
        "per_finding": per_finding,
    }


def score_lobes(counts: CountArray) -> JsonObject:
    """Accuracy of lobes over the lesions' findings, and for each of them.

    Args:
        counts: counts of `count_lobe_outcomes`, (N, S, 5).
    """
    per_finding = {}
    for finding in SIDED_LESION_FINDINGS:
        totals = counts[:, SIDED_FINDINGS.index(finding)].sum(axis=0)
        per_finding[finding] = _side_accuracy(totals, LOBE_OUTCOMES)
    rows = [SIDED_FINDINGS.index(finding) for finding in SIDED_LESION_FINDINGS]
    totals = counts[:, rows].sum(axis=(0, 1))
    return _side_accuracy(totals, LOBE_OUTCOMES) | {"per_finding": per_finding}


def score_lesion_laterality(counts: CountArray) -> JsonObject:
    """Accuracy of sides over the lesions' findings.

    Args:
        counts: counts of `count_side_outcomes`, (N, 11, 5).
    """
    lesion_rows = [SIDED_FINDINGS.index(finding) for finding in SIDED_LESION_FINDINGS]
    return _side_accuracy(counts[:, lesion_rows].sum(axis=(0, 1)))


def _side_accuracy(totals: CountArray, outcomes: Sequence[str] = SIDE_OUTCOMES) -> JsonObject:
    n = int(totals[:-1].sum())
    counts = dict(zip(outcomes, map(int, totals), strict=True))
    accuracy = counts["correct"] / n if n else None
    return {"accuracy": accuracy, "n": n} | {
        f"n_{outcome}": count for outcome, count in counts.items()
    }


def _assign_places(
    sentence: ReportSentence, words: _PlaceWords
) -> list[tuple[FindingMention, Places]]:
    """Mentions of a sentence with their places."""
    ends = [match.end() for match in modifiers.CLAUSE_END.finditer(sentence.text)]
    assigned = []
    for clause in pairwise([0, *ends, len(sentence.text)]):
        mentions = [
            mention for mention in sentence.mentions if clause[0] <= mention.start < clause[1]
        ]
        assigned += _assign_clause_places(sentence.text, clause, mentions, words)
    return assigned


def _assign_clause_places(
    text: str, clause: Span, mentions: list[FindingMention], words: _PlaceWords
) -> list[tuple[FindingMention, Places]]:
    """Mentions of a clause with their places."""
    places: list[Places] = [frozenset() for _ in mentions]
    fronted_places: Places = frozenset()
    adjectival: set[int] = set()
    for match in words.pattern.finditer(text, *clause):
        if _DISPLACEMENT.search(text[clause[0] : match.start()]):
            continue
        owners = mentions_right_after(text, match, mentions)
        adjectival.update(owners)
        if not owners:
            owners = _mentions_before_side(text, match.start(), mentions, adjectival)
        stated = words.places[str(match.lastgroup)]
        for i in owners:
            places[i] |= stated
        if not owners:
            fronted_places |= stated

    for i, (mention, following) in enumerate(pairwise(mentions)):
        # "left effusion and atelectasis", unless the second has a side of its own
        is_joined = _is_joined(text, mention.end, following.start)
        if i in adjectival and not places[i + 1] and is_joined:
            places[i + 1] = places[i]
            adjectival.add(i + 1)
    return [
        (mention, mention_places or fronted_places)
        for mention, mention_places in zip(mentions, places, strict=True)
    ]


def mentions_right_after(
    text: str, attribute: re.Match[str], mentions: Sequence[FindingMention]
) -> list[int]:
    """Indexes of the mentions whose name a side or a size stands right before, or inside."""
    inside, following = [], []
    for i, mention in enumerate(mentions):
        if mention.start <= attribute.start() < mention.end:
            inside.append(i)
        elif mention.start >= attribute.end():
            following.append(i)
    if inside:
        return inside
    if not following:
        return []
    name = mentions[following[0]]
    if modifiers.NOT_ADJECTIVAL.search(text, attribute.end(), name.start):
        return []
    return [i for i in following if mentions[i].start < name.end]


def _mentions_before_side(
    text: str, start: int, mentions: list[FindingMention], adjectival: set[int]
) -> list[int]:
    """Indexes of the mention before a side, and of those joined to it that have none before."""
    before = [i for i, mention in enumerate(mentions) if mention.end <= start]
    if not before:
        return []
    last = mentions[before[-1]]
    is_denied = last.state < FindingState.UNCERTAIN
    if is_denied and before[-1] + 1 < len(mentions) and _STATEMENT.match(text, last.end, start):
        return []  # "no effusion, and the left lung has a nodule"
    owners = [before[-1]]
    for i in reversed(before[:-1]):
        nearest = mentions[owners[-1]]
        is_same_name = mentions[i].end > nearest.start
        is_joined = i not in adjectival and _is_joined(text, mentions[i].end, nearest.start)
        if not is_same_name and not is_joined:
            break
        owners.append(i)
    return owners


def _is_joined(text: str, start: int, end: int) -> bool:
    """Whether only words such as "and" stand between two names."""
    between = text[start:end]
    if len(between) > _MAX_JOINING_CHARACTERS or _SIDE_PATTERN.search(between):
        return False
    return _JOINING_WORDS.match(between) is not None
