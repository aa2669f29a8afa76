"""What a report says of one finding where it names it: the cues in whose reach the name stands."""

import re
from collections.abc import Callable, Sequence
from enum import IntEnum
from itertools import pairwise, takewhile

from rectvlm.metrics import cues


class State(IntEnum):
    """What a report says of a finding. The higher one wins where sentences disagree."""

    NOT_MENTIONED = 0
    ABSENT = 1
    UNCERTAIN = 2
    PRESENT = 3


def state_of(clause: str, start: int, end: int, after: str) -> State:
    """The state of a name at `start` to `end` of its clause; `after` is what follows in the sentence."""
    if _reaches_forward(cues.HISTORY_BEFORE, clause, start) or cues.NOTHING_SAID.search(clause):
        return State.NOT_MENTIONED
    if _negated(clause, start, end) or cues.NEGATION_RIGHT_AFTER.match(after):
        return State.NOT_MENTIONED if _new(clause, start) else State.ABSENT
    if (
        _reaches_forward(cues.DOUBT_BEFORE, clause, start)
        or any(cue.start() >= end for cue in cues.DOUBT_AFTER.finditer(clause))
        or cues.QUESTIONED.match(after)
    ):
        return State.UNCERTAIN
    return State.PRESENT


def of_the_past(clause: str) -> bool:
    """Whether a clause speaks of an earlier examination only."""
    past = cues.PAST.search(clause)
    if past is None:
        return False
    rest = cues.PAST.sub(" ", clause)
    heads = not clause[: past.start()].strip(" ,")
    return not cues.PRESENT_TIME.search(rest) and (heads or not cues.PRESENT_TENSE.search(rest))


def removed(clause: str, start: int, end: int) -> bool:
    """Whether a device, named at `start` to `end` of its clause, is no longer there."""
    before = [cue for cue in cues.REMOVED_BEFORE.finditer(clause) if cue.end() <= start]
    if any("," not in clause[cue.end() : start] for cue in before):
        return True
    return cues.REMOVED_AFTER.match(clause, end) is not None


def _new(clause: str, start: int) -> bool:
    """Whether only something new is denied: no other negation stands between "new" and the name."""
    return any(
        not cues.NEGATION_BEFORE.search(clause, cue.end(), start)
        for cue in cues.NEW.finditer(clause, 0, start)
        if not cues.FRESH_START.search(clause, cue.end(), start)
    )


def denied_in_form(text: str, first: int, last: int) -> bool:
    """Whether a form denies a clause, all of it a list that ends in a colon: "effusion or nodule: none"."""
    return bool(cues.NEGATION_RIGHT_AFTER.match(text, last - 1)) and not cues.STATED.search(text, first, last - 1)


def _negated(clause: str, start: int, end: int) -> bool:
    doubts = [cue.span() for pattern in (cues.DOUBT_AFTER, cues.DOUBT_BEFORE) for cue in pattern.finditer(clause)]

    def real(cue: re.Match[str]) -> bool:
        """ "Cannot be excluded" holds the negation "excluded", which is none."""
        return not any(first <= cue.start() < last for first, last in doubts)

    if cues.NEGATION_WITHIN.search(clause, start, end):
        return True
    if _reaches_forward(cues.NEGATION_BEFORE, clause, start, real) and not cues.ITS_CHANGE.match(clause, end):
        return True
    if not cues.NOT_THE_SUBJECT.search(clause[:start]):
        for cue in cues.BARE_AFTER.finditer(clause, end):
            if not cues.BARE_END.search(clause, end, cue.start()):
                return True
        for cue in cues.NEGATION_AFTER.finditer(clause, end):
            if real(cue) and not cues.PLACE.search(clause, end, cue.start()):
                return True
    resolved = cues.RESOLVED_BEFORE.finditer(clause, 0, start)
    return any(not cues.WITH.search(clause, cue.end(), start) for cue in resolved)


def _reaches_forward(
    pattern: re.Pattern[str],
    clause: str,
    start: int,
    real: Callable[[re.Match[str]], bool] = lambda cue: True,
) -> bool:
    """Whether a cue before `start` reaches it."""
    return any(
        real(cue) and not cues.FRESH_START.search(clause, cue.end(), start)
        for cue in pattern.finditer(clause, 0, start)
    )


def by_size(text: str, first: int, start: int, end: int, others: Sequence[int], present_from_mm: float) -> State:
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
    sizes = [size for size in cues.MEASURE.finditer(text, end, until) if not _adjectival(text, size, until)]
    if not sizes:
        alone = not any(first <= other < start for other in others)
        before = list(cues.MEASURE.finditer(text, first, start))
        sizes = [size for size in reversed(before) if alone or _adjectival(text, size, start)]
    if not sizes:
        near = text[max(first, start - 40) : min(until, end + 40)]
        return State.ABSENT if cues.BELOW.search(near) else State.NOT_MENTIONED
    several = takewhile(lambda pair: _another(text, *pair), pairwise(sizes))
    counted = sizes[:1] + [size for _, size in several]
    return State.PRESENT if any(_reaches(text, first, size, present_from_mm) for size in counted) else State.ABSENT


def _reaches(text: str, first: int, size: re.Match[str], least_mm: float) -> bool:
    """Whether the short axis of a measure, in a clause from `first` on, is that long."""
    axes = [float(axis.replace(",", ".")) for axis in (size[1], size[2]) if axis]
    short = min(axes) * (10.0 if size[3].startswith("c") else 1.0)
    return short >= least_mm and not cues.BELOW.search(text[max(first, size.start() - 25) : size.start()])


def _another(text: str, one: re.Match[str], size: re.Match[str]) -> bool:
    """Whether a measure is of another of the same nodes as the measure before it."""
    between = cues.TO_ANOTHER_SIZE.fullmatch(text, one.end(), size.start())
    return between is not None and bool(cues.AFTER_ANOTHER_SIZE.match(text, size.end()))


def _adjectival(text: str, size: re.Match[str], name: int) -> bool:
    """Whether a measure stands right before the name that begins at `name`: "a 15 mm solid nodule"."""
    return name < len(text) and not cues.NOT_ADJECTIVAL.search(text, size.end(), name)
