"""What a chest-CT report says of the 18 findings, by rules.

They read the sections that describe the examination, sentence by sentence, clause by clause: names of findings
(`terms`), and the cues of negation, doubt and past (`cues`) in whose reach they stand (`clauses`, `states`).
"""

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from rectvlm.labels import FINDINGS, N_FINDINGS
from rectvlm.metrics import cues
from rectvlm.metrics.clauses import clauses, phrase, without
from rectvlm.metrics.states import State, by_size, denied_in_form, of_the_past, removed, state_of
from rectvlm.metrics.terms import IMPLIES, LUNG, NORMAL, TERMS, VESSEL, Term

LONGEST = 1000
"""Characters of a sentence. A longer one, as of a language model that repeats itself, is read in pieces, since the time
grows with the square."""
_PLAIN = str.maketrans({"’": "'", "\u2010": "-", "\u2011": "-", "\u00a0": " "})
"""Typographic signs that stand inside words and between them."""


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

    signature = "rules of rectvlm for English chest-CT reports, version 3"

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
    report = report.translate(_PLAIN).replace("\r\n", "\n")
    if any(character.isupper() for character in report):  # else a small letter may begin a sentence
        report = cues.WRAPPED.sub(" ", report)
    text = re.sub(r"[ \t\r\f\v]+", " ", report.lower())
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
    said = cues.PAST_ASIDE.sub(_blank, sentence)
    text = cues.NO_NEGATION.sub(_blank, said)
    spans = _names(text)
    parts = clauses(text, [span[1:] for span in spans])
    mentions = []
    for first, last in parts:
        for normal in NORMAL:
            found = normal.structure.search(said, first, last)
            if found and not re.search(r"\babnormal|\bnot normal", found[0]):
                mentions += [Mention(f, State.ABSENT, found.start(), found.end()) for f in normal.findings]
    named = []
    for term, start, end in spans:
        first, last = next((a, b) for a, b in parts if a <= start < b)
        normal_here = any(m.finding == term.finding and m.start <= start and end <= m.end for m in mentions)
        if not normal_here and _is_meant(term, text, first, last, start, end):
            named.append((term, start, end, first, last))
    past = {(first, last) for first, last in parts if of_the_past(said[first:last])}
    for term, start, end, first, last in named:
        if (first, last) in past:
            continue
        state = state_of(text[first:last], start - first, end - first, text[end:])
        gone = term.device and removed(text[first:last], start - first, end - first)
        if state >= State.UNCERTAIN and (gone or denied_in_form(text, first, last)):
            state = State.ABSENT
        if state >= State.UNCERTAIN and term.present_from_mm is not None:
            others = [begin for other, begin, *_ in named if other.finding != term.finding]
            size = by_size(text, first, start, end, others, term.present_from_mm)
            state = state if size == State.PRESENT else size
        if state != State.NOT_MENTIONED:
            mentions.append(Mention(term.finding, state, start, end))
    return sorted(mentions, key=lambda mention: (mention.start, mention.end))


def _blank(found: re.Match[str]) -> str:
    """As many spaces, so that places stay what they are."""
    return " " * len(found[0])


def _is_meant(term: Term, text: str, first: int, last: int, start: int, end: int) -> bool:
    """Whether a term's words mean its finding, by what stands beside them in the clause from `first` to `last`."""
    clause, own = text[first:last], phrase(text, first, last, start, end)
    if term.needs is not None:
        side = cues.LANDMARK.sub(" ", without(text, first, last, start))
        if not VESSEL.search(side):
            side = cues.LANDMARK.sub(" ", clause)
        if not term.needs.search(side):
            return False
    if term.unless is not None and term.unless.search(own):
        return False
    if term.not_of is None or LUNG.search(own):
        return True
    return not term.not_of.search(own) and (bool(LUNG.search(clause)) or not term.not_of.search(clause))


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
