"""Laterality: the side of each finding in a report, and its agreement with the reference report."""

import re
from collections.abc import Sequence
from itertools import pairwise

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
_SIDE_SETS: dict[str, BodySides] = {
    "left": frozenset({"left"}),
    "right": frozenset({"right"}),
    "both": frozenset({"left", "right"}),
}


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
    sides_by_finding: dict[str, BodySides] = {}
    for sentence in parse_report(report, convention):
        for mention, sides in _assign_sides(sentence):
            if mention.finding in SIDED_FINDINGS and mention.state >= FindingState.UNCERTAIN:
                previous = sides_by_finding.get(mention.finding, frozenset())
                sides_by_finding[mention.finding] = previous | sides
    return sides_by_finding


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
    shape = (len(generated), len(SIDED_FINDINGS), len(SIDE_OUTCOMES))
    counts = np.zeros(shape, dtype=np.int64)
    for case_counts, text, reference in zip(counts, generated, references, strict=True):
        if reference is None:
            continue
        stated_sides = read_sides(text, convention)
        for finding, true_sides in read_sides(reference, convention).items():
            if true_sides:
                outcome = _classify_side(stated_sides.get(finding), true_sides)
                i, j = SIDED_FINDINGS.index(finding), SIDE_OUTCOMES.index(outcome)
                case_counts[i, j] = 1
    return counts


def _classify_side(stated: BodySides | None, true: BodySides) -> str:
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


def score_lesion_laterality(counts: CountArray) -> JsonObject:
    """Accuracy of sides over the lesions' findings.

    Args:
        counts: counts of `count_side_outcomes`, (N, 11, 5).
    """
    lesion_rows = [SIDED_FINDINGS.index(finding) for finding in SIDED_LESION_FINDINGS]
    return _side_accuracy(counts[:, lesion_rows].sum(axis=(0, 1)))


def _side_accuracy(totals: CountArray) -> JsonObject:
    n = int(totals[:-1].sum())
    counts = dict(zip(SIDE_OUTCOMES, map(int, totals), strict=True))
    accuracy = counts["correct"] / n if n else None
    return {"accuracy": accuracy, "n": n} | {
        f"n_{outcome}": count for outcome, count in counts.items()
    }


def _assign_sides(sentence: ReportSentence) -> list[tuple[FindingMention, BodySides]]:
    """Mentions of a sentence with their sides."""
    ends = [match.end() for match in modifiers.CLAUSE_END.finditer(sentence.text)]
    assigned = []
    for clause in pairwise([0, *ends, len(sentence.text)]):
        mentions = [
            mention for mention in sentence.mentions if clause[0] <= mention.start < clause[1]
        ]
        assigned += _assign_clause_sides(sentence.text, clause, mentions)
    return assigned


def _assign_clause_sides(
    text: str, clause: Span, mentions: list[FindingMention]
) -> list[tuple[FindingMention, BodySides]]:
    """Mentions of a clause with their sides."""
    sides: list[BodySides] = [frozenset() for _ in mentions]
    fronted_sides: BodySides = frozenset()
    adjectival: set[int] = set()
    for match in _SIDE_PATTERN.finditer(text, *clause):
        if _DISPLACEMENT.search(text[clause[0] : match.start()]):
            continue
        owners = mentions_right_after(text, match, mentions)
        adjectival.update(owners)
        if not owners:
            owners = _mentions_before_side(text, match.start(), mentions, adjectival)
        stated = _SIDE_SETS[str(match.lastgroup)]
        for i in owners:
            sides[i] |= stated
        if not owners:
            fronted_sides |= stated

    for i, (mention, following) in enumerate(pairwise(mentions)):
        # "left effusion and atelectasis", unless the second has a side of its own
        is_joined = _is_joined(text, mention.end, following.start)
        if i in adjectival and not sides[i + 1] and is_joined:
            sides[i + 1] = sides[i]
            adjectival.add(i + 1)
    return [
        (mention, mention_sides or fronted_sides)
        for mention, mention_sides in zip(mentions, sides, strict=True)
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
