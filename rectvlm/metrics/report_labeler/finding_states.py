"""What a report says of one finding where it names it: the cues in whose reach the name stands."""

import re
from collections.abc import Callable, Sequence
from enum import IntEnum
from itertools import pairwise, takewhile

from rectvlm.metrics.report_labeler import modifiers


class FindingState(IntEnum):
    """What a report says of a finding. The higher one wins where sentences disagree."""

    NOT_MENTIONED = 0
    ABSENT = 1
    UNCERTAIN = 2
    PRESENT = 3


def classify_mention(clause: str, start: int, end: int, after: str) -> FindingState:
    """The state of a name at `start` to `end` of its clause; `after` is what follows in the sentence."""
    if _is_in_forward_scope(
        modifiers.HISTORY_BEFORE, clause, start
    ) or modifiers.NOT_ASSESSED.search(clause):
        return FindingState.NOT_MENTIONED
    if _is_negated(clause, start, end) or modifiers.NEGATION_RIGHT_AFTER.match(after):
        return (
            FindingState.NOT_MENTIONED
            if _is_only_new_denied(clause, start)
            else FindingState.ABSENT
        )
    if (
        _is_in_forward_scope(modifiers.UNCERTAINTY_BEFORE, clause, start)
        or any(cue.start() >= end for cue in modifiers.UNCERTAINTY_AFTER.finditer(clause))
        or modifiers.QUESTION_MARK_AFTER.match(after)
    ):
        return FindingState.UNCERTAIN
    return FindingState.PRESENT


def is_about_prior_examination(clause: str) -> bool:
    """Whether a clause speaks of an earlier examination only."""
    past = modifiers.PRIOR_EXAMINATION.search(clause)
    if past is None:
        return False
    rest = modifiers.PRIOR_EXAMINATION.sub(" ", clause)
    heads = not clause[: past.start()].strip(" ,")
    return not modifiers.CURRENT_EXAMINATION.search(rest) and (
        heads or not modifiers.PRESENT_TENSE.search(rest)
    )


def is_device_removed(clause: str, start: int, end: int) -> bool:
    """Whether a device, named at `start` to `end` of its clause, is no longer there."""
    before = [cue for cue in modifiers.REMOVED_BEFORE.finditer(clause) if cue.end() <= start]
    if any("," not in clause[cue.end() : start] for cue in before):
        return True
    return modifiers.REMOVED_AFTER.match(clause, end) is not None


def _is_only_new_denied(clause: str, start: int) -> bool:
    """Whether only something new is denied: no other negation stands between "new" and the name."""
    return any(
        not modifiers.NEGATION_BEFORE.search(clause, cue.end(), start)
        for cue in modifiers.NEW.finditer(clause, 0, start)
        if not modifiers.FORWARD_SCOPE_END.search(clause, cue.end(), start)
    )


def is_denied_in_form(text: str, first: int, last: int) -> bool:
    """Whether a form denies a clause, all of it a list that ends in a colon: "effusion or nodule: none"."""
    return bool(
        modifiers.NEGATION_RIGHT_AFTER.match(text, last - 1)
    ) and not modifiers.FORM_STATEMENT.search(text, first, last - 1)


def _is_negated(clause: str, start: int, end: int) -> bool:
    doubts = [
        cue.span()
        for pattern in (modifiers.UNCERTAINTY_AFTER, modifiers.UNCERTAINTY_BEFORE)
        for cue in pattern.finditer(clause)
    ]

    def real(cue: re.Match[str]) -> bool:
        """ "Cannot be excluded" holds the negation "excluded", which is none."""
        return not any(first <= cue.start() < last for first, last in doubts)

    if modifiers.NEGATION_WITHIN.search(clause, start, end):
        return True
    if _is_in_forward_scope(
        modifiers.NEGATION_BEFORE, clause, start, real
    ) and not modifiers.CHANGE_AFTER_NAME.match(clause, end):
        return True
    if not modifiers.PARTIAL_SUBJECT_BEFORE.search(clause[:start]):
        for cue in modifiers.BARE_NEGATION_AFTER.finditer(clause, end):
            if not modifiers.BARE_NEGATION_END.search(clause, end, cue.start()):
                return True
        for cue in modifiers.NEGATION_AFTER.finditer(clause, end):
            if real(cue) and not modifiers.LOCATION_BEFORE_LIST.search(clause, end, cue.start()):
                return True
    resolved = modifiers.RESOLVED_BEFORE.finditer(clause, 0, start)
    return any(not modifiers.WITH.search(clause, cue.end(), start) for cue in resolved)


def _is_in_forward_scope(
    pattern: re.Pattern[str],
    clause: str,
    start: int,
    is_genuine: Callable[[re.Match[str]], bool] = lambda cue: True,
) -> bool:
    """Whether a cue before `start` reaches it."""
    return any(
        is_genuine(cue) and not modifiers.FORWARD_SCOPE_END.search(clause, cue.end(), start)
        for cue in pattern.finditer(clause, 0, start)
    )


def classify_by_size(
    text: str, first: int, start: int, end: int, others: Sequence[int], present_from_mm: float
) -> FindingState:
    """Present or absent by the short axis that is given with a name, not mentioned where none is.

    Args:
        text: the sentence.
        first: where the name's clause begins.
        start: where the name begins.
        end: where it ends.
        others: where names of other findings begin; a measure that belongs to one of them says nothing here.
        present_from_mm: shortest axis that counts.
    """
    until = min((other for other in others if other >= end), default=len(text))
    sizes = [
        size
        for size in modifiers.MEASUREMENT.finditer(text, end, until)
        if not _is_adjectival(text, size, until)
    ]
    if not sizes:
        alone = not any(first <= other < start for other in others)
        before = list(modifiers.MEASUREMENT.finditer(text, first, start))
        sizes = [size for size in reversed(before) if alone or _is_adjectival(text, size, start)]
    if not sizes:
        near = text[max(first, start - 40) : min(until, end + 40)]
        return (
            FindingState.ABSENT if modifiers.BELOW_SIZE.search(near) else FindingState.NOT_MENTIONED
        )
    several = takewhile(lambda pair: _is_another_size(text, *pair), pairwise(sizes))
    counted = sizes[:1] + [size for _, size in several]
    return (
        FindingState.PRESENT
        if any(_is_long_enough(text, first, size, present_from_mm) for size in counted)
        else FindingState.ABSENT
    )


def _is_long_enough(text: str, first: int, size: re.Match[str], least_mm: float) -> bool:
    """Whether the short axis of a measure, in a clause from `first` on, is that long."""
    axes = [float(axis.replace(",", ".")) for axis in (size[1], size[2]) if axis]
    short = min(axes) * (10.0 if size[3].startswith("c") else 1.0)
    return short >= least_mm and not modifiers.BELOW_SIZE.search(
        text[max(first, size.start() - 25) : size.start()]
    )


def _is_another_size(text: str, one: re.Match[str], size: re.Match[str]) -> bool:
    """Whether a measure is of another of the same nodes as the measure before it."""
    between = modifiers.BETWEEN_NODE_SIZES.fullmatch(text, one.end(), size.start())
    return between is not None and bool(modifiers.AFTER_NODE_SIZE.match(text, size.end()))


def _is_adjectival(text: str, size: re.Match[str], name: int) -> bool:
    """Whether a measure stands right before the name that begins at `name`: "a 15 mm solid nodule"."""
    return name < len(text) and not modifiers.NOT_ADJECTIVAL.search(text, size.end(), name)
