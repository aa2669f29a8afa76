"""What a chest-CT report says of the 18 findings, by rules.

They read the sections that describe the examination, sentence by sentence, clause by clause: names of findings
(`terms`), and the cues of negation, doubt and past (`cues`) in whose reach they stand.
"""

import re
import textwrap
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from rectvlm.labels import FINDINGS, N_FINDINGS
from rectvlm.metrics import cues
from rectvlm.metrics.terms import IMPLIES, NORMAL, TERMS, Term

LONGEST = 1000
"""Characters of a sentence. A longer one, as of a language model that repeats itself, is read in pieces, since the time
grows with the square."""
_PLAIN = str.maketrans({"’": "'", "\u2010": "-", "\u2011": "-", "\u00a0": " "})
"""Typographic signs that stand inside words and between them."""


class State(IntEnum):
    """What a report says of a finding. The higher one wins where sentences disagree."""

    NOT_MENTIONED = 0
    ABSENT = 1
    UNCERTAIN = 2
    PRESENT = 3


@dataclass(frozen=True)
class Mention:
    """A finding's name in a sentence."""

    finding: str
    state: State
    start: int
    end: int
    """Characters of the sentence."""


@dataclass(frozen=True)
class Sentence:
    """A sentence in lower case, and the findings that it names, in the order of their places."""

    text: str
    mentions: tuple[Mention, ...]


class RuleLabeler:
    """The rules of this project, for English reports."""

    signature = "rules of rectvlm for English chest-CT reports, version 2"

    def label(self, reports: Sequence[str]) -> NDArray[np.int8]:
        """States (N, 18)."""
        states = np.zeros((len(reports), N_FINDINGS), dtype=np.int8)
        for row, report in zip(states, reports, strict=True):
            for sentence in read(report):
                for mention in sentence.mentions:
                    i = FINDINGS.index(mention.finding)
                    row[i] = max(row[i], mention.state)
            for kind, whole in IMPLIES.items():
                i, j = FINDINGS.index(kind), FINDINGS.index(whole)
                if row[i] >= State.UNCERTAIN:
                    row[j] = max(row[i], row[j])
        return states


def label_report(report: str) -> dict[str, State]:
    """What the rules read in one report, by finding."""
    row = RuleLabeler().label([report])[0]
    return {finding: State(int(state)) for finding, state in zip(FINDINGS, row, strict=True)}


@lru_cache(maxsize=8192)
def read(report: str) -> tuple[Sentence, ...]:
    """The sentences of a report that describe this examination, with the findings that they name.

    Kept, since findings and sides are read from the same reports, and a reference beside several generated ones.
    """
    return tuple(Sentence(text, tuple(_mentions(text))) for text in _sentences(report))


def _sentences(report: str) -> Iterator[str]:
    """Lower-case sentences of the sections that describe the examination; a report without headings is read whole."""
    text = re.sub(r"[ \t\r\f\v]+", " ", report.lower().translate(_PLAIN).replace("\r\n", "\n"))
    heads = list(cues.HEADING.finditer(text))
    bounds = [head.start() for head in heads] + [len(text)]
    parts = [text[: bounds[0]]]
    for head, end in zip(heads, bounds[1:], strict=True):
        if re.fullmatch(cues.READ_SECTION, head[1]):
            parts.append(text[head.end() : end])
    for part in parts:
        last = 0
        for stop in [*cues.SENTENCE_END.finditer(part), None]:
            sentence = part[last : stop.end() if stop else len(part)].strip(" \n*#_")
            last = stop.end() if stop else len(part)
            if any(character.isalpha() for character in sentence):
                yield from textwrap.wrap(sentence, LONGEST, break_on_hyphens=False)


def _mentions(sentence: str) -> list[Mention]:
    """Names of findings in a sentence with their states."""
    text = cues.NO_NEGATION.sub(lambda found: " " * len(found[0]), sentence)
    spans = _names(text)
    clauses = _clauses(text, [span[1:] for span in spans])
    named = []
    for term, start, end in spans:
        first, last = next((a, b) for a, b in clauses if a <= start < b)
        if term.needs is not None and not term.needs.search(text[first:last]):
            continue
        if term.unless is not None and term.unless.search(text[first:last]):
            continue
        named.append((term, start, end, first, last))
    mentions = []
    for term, start, end, first, last in named:
        state = _state(text[first:last], start - first, end - first, text[end:])
        if state >= State.UNCERTAIN and _denied_in_form(text, first, last):
            state = State.ABSENT
        if state >= State.UNCERTAIN and term.present_from_mm is not None:
            others = [begin for other, begin, *_ in named if other.finding != term.finding]
            size = _by_size(text, first, start, end, others, term.present_from_mm)
            state = state if size == State.PRESENT else size
        if state != State.NOT_MENTIONED:
            mentions.append(Mention(term.finding, state, start, end))
    for first, last in clauses:
        for normal in NORMAL:
            found = normal.structure.search(text, first, last)
            if found and not re.search(r"\babnormal|\bnot normal", found[0]):
                mentions += [Mention(f, State.ABSENT, found.start(), found.end()) for f in normal.findings]
    return sorted(mentions, key=lambda mention: (mention.start, mention.end))


def _names(text: str) -> list[tuple[Term, int, int]]:
    """Every term's matches; a weak one only where no other term's words cover it."""
    strong = [
        (term, found.start(), found.end()) for term in TERMS if not term.weak for found in term.named.finditer(text)
    ]
    weak = [
        (term, found.start(), found.end())
        for term in TERMS
        if term.weak
        for found in term.named.finditer(text)
        if not any(start < found.end() and found.start() < end for _, start, end in strong)
    ]
    return strong + weak


def _clauses(text: str, names: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Cuts a sentence where one statement ends and another begins; see `cues`."""
    cuts = {0, len(text)}
    cuts |= {found.end() for found in cues.CLAUSE_END.finditer(text)}
    cuts |= {found.start() for found in cues.OPENER.finditer(text) if not _within(found.start(), names)}
    verbs = [found.start() for found in cues.VERB.finditer(text)]
    for one, other in pairwise(verbs):
        if any(one < cut < other for cut in cuts):
            continue
        delimiters = [found for found in cues.DELIMITER.finditer(text, one, other) if not _within(found.start(), names)]
        cut = _last_before_name(text, delimiters, [start for start, _ in names if one < start < other])
        if cut is None and delimiters:
            cut = delimiters[-1].start()
        if cut is not None:
            cuts.add(cut)
    heads = [found for start in cuts if (found := cues.FRONTED.match(text, start))]
    cuts |= {cut for head in heads if (cut := _end_of_fronted(text, head.end(), cuts)) is not None}
    marks = sorted(cuts)
    return list(pairwise(marks))


def _end_of_fronted(text: str, start: int, cuts: Collection[int]) -> int | None:
    """Where a phrase such as "without effusion" ends and the subject of its clause begins.

    That is the last comma before the verb, which a preposition does not govern. None where there is no verb, or where
    "or" stands between: a list of what is denied, as after "no".
    """
    verb = cues.VERB.search(text, start)
    if verb is None or any(start < cut <= verb.start() for cut in cuts):
        return None
    before = text[start : verb.start()].rstrip(" ,")
    comma = before.rfind(",")
    return None if comma < 0 or re.search(r"\bn?or\b", before[comma:]) else start + comma


def _last_before_name(text: str, delimiters: Sequence[re.Match[str]], names: Sequence[int]) -> int | None:
    """The delimiter right before the first name that begins a new subject."""
    for start in sorted(names):
        before = [found for found in delimiters if found.end() <= start]
        if before and not cues.ACCOMPANIED.match(text, before[-1].start()):
            return before[-1].start()
    return None


def _within(position: int, spans: Sequence[tuple[int, int]]) -> bool:
    return any(start < position < end for start, end in spans)


def _state(clause: str, start: int, end: int, after: str) -> State:
    """The state of a name at `start` to `end` of its clause; `after` is what follows in the sentence."""
    if any(cue.end() <= start for cue in cues.HISTORY_BEFORE.finditer(clause)):
        return State.NOT_MENTIONED
    if cues.PAST.search(clause) and not cues.PRESENT_TIME.search(clause):
        return State.NOT_MENTIONED
    if cues.NOTHING_SAID.search(clause):
        return State.NOT_MENTIONED
    if _negated(clause, start, end) or cues.NEGATION_RIGHT_AFTER.match(after):
        return State.ABSENT
    if (
        _reaches_forward(cues.DOUBT_BEFORE, clause, start)
        or any(cue.start() >= end for cue in cues.DOUBT_AFTER.finditer(clause))
        or cues.QUESTIONED.match(after)
    ):
        return State.UNCERTAIN
    return State.PRESENT


def _denied_in_form(text: str, first: int, last: int) -> bool:
    """Whether a form denies a clause, all of it a list that ends in a colon: "effusion or nodule: none"."""
    return bool(cues.NEGATION_RIGHT_AFTER.match(text, last - 1)) and not cues.STATED.search(text, first, last - 1)


def _negated(clause: str, start: int, end: int) -> bool:
    doubts = [cue.span() for pattern in (cues.DOUBT_AFTER, cues.DOUBT_BEFORE) for cue in pattern.finditer(clause)]

    def real(cue: re.Match[str]) -> bool:
        """ "Cannot be excluded" holds the negation "excluded", which is none."""
        return not any(first <= cue.start() < last for first, last in doubts)

    if cues.NEGATION_WITHIN.search(clause, start, end) or _reaches_forward(cues.NEGATION_BEFORE, clause, start, real):
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


def _by_size(text: str, first: int, start: int, end: int, others: Sequence[int], present_from_mm: float) -> State:
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
    size = sizes[0]
    axes = [float(axis.replace(",", ".")) for axis in (size[1], size[2]) if axis]
    short = min(axes) * (10.0 if size[3].startswith("c") else 1.0)
    if cues.BELOW.search(text[max(first, size.start() - 25) : size.start()]):
        return State.ABSENT
    return State.PRESENT if short >= present_from_mm else State.ABSENT


def _adjectival(text: str, size: re.Match[str], name: int) -> bool:
    """Whether a measure stands right before the name that begins at `name`: "a 15 mm solid nodule"."""
    return name < len(text) and not cues.NOT_ADJECTIVAL.search(text, size.end(), name)
