"""State of a finding where a report names it, by the modifiers in whose scope the name stands."""

import re
from collections.abc import Iterable, Sequence
from enum import IntEnum
from itertools import pairwise

from rectvlm.metrics.report_labeler import modifiers
from rectvlm.metrics.report_labeler.clauses import Span

SIZE_CONTEXT_CHARACTERS = 40
"""Characters on either side of a name in which "small" and the like speak of its size."""
MEASUREMENT_CONTEXT_CHARACTERS = 25
"""Characters before a measurement in which "less than" and the like belong to it."""


class FindingState(IntEnum):
    """State of a finding in a report. The higher one wins where sentences disagree."""

    NOT_MENTIONED = 0
    ABSENT = 1
    UNCERTAIN = 2
    PRESENT = 3


def classify_mention(clause: str, start: int, end: int, following: str) -> FindingState:
    """Classify the mention of a finding.

    Args:
        clause: text of the clause.
        start: first character of the finding's name in the clause.
        end: last character + 1 of the name.
        following: text of the sentence after the name.
    """
    if _is_in_forward_scope(modifiers.HISTORY_BEFORE, clause, start):
        return FindingState.NOT_MENTIONED
    if modifiers.NOT_ASSESSED.search(clause):
        return FindingState.NOT_MENTIONED
    is_denied_right_after = modifiers.NEGATION_RIGHT_AFTER.match(
        following
    ) or modifiers.PAIRED_NEGATION_AFTER.match(following)
    if is_denied_right_after or _is_negated(clause, start, end):
        if _is_only_new_denied(clause, start):
            return FindingState.NOT_MENTIONED
        return FindingState.ABSENT
    if _is_uncertain(clause, start, end) or modifiers.QUESTION_MARK_AFTER.match(following):
        return FindingState.UNCERTAIN
    return FindingState.PRESENT


def is_about_prior_examination(clause: str) -> bool:
    """Whether a clause speaks of an earlier examination only."""
    prior = modifiers.PRIOR_EXAMINATION.search(clause)
    if prior is None:
        return False
    rest = modifiers.PRIOR_EXAMINATION.sub(" ", clause)
    if modifiers.CURRENT_EXAMINATION.search(rest):
        return False
    is_heading = not clause[: prior.start()].strip(" ,")
    return is_heading or not modifiers.PRESENT_TENSE.search(rest)


def is_device_removed(clause: str, start: int, end: int) -> bool:
    """Whether a device, named at `start` to `end` of its clause, is no longer there."""
    for modifier in modifiers.REMOVED_BEFORE.finditer(clause):
        if modifier.end() <= start and "," not in clause[modifier.end() : start]:
            return True
    return modifiers.REMOVED_AFTER.match(clause, end) is not None


def is_denied_in_form(text: str, clause: Span) -> bool:
    """Whether a form denies a whole clause, a list before a colon: "effusion, nodule: none"."""
    start, end = clause
    if not modifiers.NEGATION_RIGHT_AFTER.match(text, end - 1):
        return False
    return not modifiers.FORM_STATEMENT.search(text, start, end - 1)


def classify_by_size(
    text: str, clause_start: int, name: Span, other_names: Sequence[int], min_short_axis_mm: float
) -> FindingState:
    """Present or absent by the short axis that is stated with a name; not mentioned without one.

    Args:
        text: the sentence.
        clause_start: first character of the name's clause.
        name: span of the name.
        other_names: first characters of the names of other findings, whose measurements do not
            count.
        min_short_axis_mm: shortest axis of a finding that is present, mm.
    """
    start, end = name
    next_name = min((other for other in other_names if other >= end), default=len(text))
    sizes = []
    for size in modifiers.MEASUREMENT.finditer(text, end, next_name):
        if not _is_adjectival(text, size, next_name):
            sizes.append(size)
    if not sizes:
        has_rival = any(clause_start <= other < start for other in other_names)
        for size in modifiers.MEASUREMENT.finditer(text, clause_start, start):
            if not has_rival or _is_adjectival(text, size, start):
                sizes.insert(0, size)
    if not sizes:
        context_start = max(clause_start, start - SIZE_CONTEXT_CHARACTERS)
        context = text[context_start : min(next_name, end + SIZE_CONTEXT_CHARACTERS)]
        is_small = modifiers.BELOW_SIZE.search(context) is not None
        return FindingState.ABSENT if is_small else FindingState.NOT_MENTIONED

    for size in _sizes_of_same_nodes(text, sizes):
        if _is_long_enough(text, clause_start, size, min_short_axis_mm):
            return FindingState.PRESENT
    return FindingState.ABSENT


def _is_negated(clause: str, start: int, end: int) -> bool:
    """Whether a negation before, inside or after a name denies it."""
    if modifiers.NEGATION_WITHIN.search(clause, start, end):
        return True
    uncertainties = _find_uncertainties(clause)
    negations = modifiers.NEGATION_BEFORE.finditer(clause, 0, start)
    genuine = _outside_spans(negations, uncertainties)
    has_negation_before = any(_reaches(modifier, clause, start) for modifier in genuine)
    if has_negation_before and not modifiers.CHANGE_AFTER_NAME.match(clause, end):
        return True
    is_partial = modifiers.PARTIAL_SUBJECT_BEFORE.search(clause[:start])
    if not is_partial and _is_negated_after(clause, end, uncertainties):
        return True
    resolved = modifiers.RESOLVED_BEFORE.finditer(clause, 0, start)
    return any(not modifiers.WITH.search(clause, match.end(), start) for match in resolved)


def _is_negated_after(clause: str, end: int, uncertainties: Sequence[Span]) -> bool:
    """Whether a negation after the end of a name reaches back to it."""
    for modifier in modifiers.BARE_NEGATION_AFTER.finditer(clause, end):
        if not modifiers.BARE_NEGATION_END.search(clause, end, modifier.start()):
            return True
    negations = modifiers.NEGATION_AFTER.finditer(clause, end)
    for modifier in _outside_spans(negations, uncertainties):
        if not modifiers.LOCATION_BEFORE_LIST.search(clause, end, modifier.start()):
            return True
    return False


def _find_uncertainties(clause: str) -> list[Span]:
    """Spans of the modifiers of uncertainty."""
    spans = []
    for pattern in (modifiers.UNCERTAINTY_AFTER, modifiers.UNCERTAINTY_BEFORE):
        spans += [modifier.span() for modifier in pattern.finditer(clause)]
    return spans


def _outside_spans(matches: Iterable[re.Match[str]], spans: Sequence[Span]) -> list[re.Match[str]]:
    """Matches that begin in no span: "cannot be excluded" does not negate by "excluded"."""
    outside = []
    for match in matches:
        if not any(start <= match.start() < end for start, end in spans):
            outside.append(match)
    return outside


def _is_uncertain(clause: str, start: int, end: int) -> bool:
    if _is_in_forward_scope(modifiers.UNCERTAINTY_BEFORE, clause, start):
        return True
    after = modifiers.UNCERTAINTY_AFTER.finditer(clause)
    return any(modifier.start() >= end for modifier in after)


def _is_only_new_denied(clause: str, start: int) -> bool:
    """Whether only something new is denied: no other negation is between "new" and the name."""
    for modifier in modifiers.NEW.finditer(clause, 0, start):
        if not _reaches(modifier, clause, start):
            continue
        if not modifiers.NEGATION_BEFORE.search(clause, modifier.end(), start):
            return True
    return False


def _is_in_forward_scope(pattern: re.Pattern[str], clause: str, start: int) -> bool:
    """Whether a modifier before `start` reaches it."""
    matches = pattern.finditer(clause, 0, start)
    return any(_reaches(modifier, clause, start) for modifier in matches)


def _reaches(modifier: re.Match[str], clause: str, start: int) -> bool:
    """Whether the forward scope of a modifier extends to `start`."""
    return modifiers.FORWARD_SCOPE_END.search(clause, modifier.end(), start) is None


def _sizes_of_same_nodes(text: str, sizes: Sequence[re.Match[str]]) -> list[re.Match[str]]:
    """The first measurement, and those after it that measure more of the same nodes."""
    same = [sizes[0]]
    for previous, size in pairwise(sizes):
        if not _is_another_size(text, previous, size):
            break
        same.append(size)
    return same


def _is_long_enough(text: str, clause_start: int, size: re.Match[str], minimum_mm: float) -> bool:
    """Whether the short axis of a measurement is at least `minimum_mm`."""
    axes = [float(axis.replace(",", ".")) for axis in (size[1], size[2]) if axis]
    short_axis_mm = min(axes) * (10.0 if size[3].startswith("c") else 1.0)
    context_start = max(clause_start, size.start() - MEASUREMENT_CONTEXT_CHARACTERS)
    is_upper_bound = modifiers.BELOW_SIZE.search(text[context_start : size.start()])
    return short_axis_mm >= minimum_mm and not is_upper_bound


def _is_another_size(text: str, previous: re.Match[str], size: re.Match[str]) -> bool:
    """Whether a measurement is of another of the nodes that the previous one measures."""
    between = modifiers.BETWEEN_NODE_SIZES.fullmatch(text, previous.end(), size.start())
    return between is not None and bool(modifiers.AFTER_NODE_SIZE.match(text, size.end()))


def _is_adjectival(text: str, size: re.Match[str], name_start: int) -> bool:
    """Whether a measurement stands right before a name: "a 15 mm solid nodule"."""
    if name_start >= len(text):
        return False
    return not modifiers.NOT_ADJECTIVAL.search(text, size.end(), name_start)
