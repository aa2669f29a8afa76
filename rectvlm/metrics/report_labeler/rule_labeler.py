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
from rectvlm.metrics.report_labeler import modifiers
from rectvlm.metrics.report_labeler.clauses import (
    extract_phrase,
    extract_without_side,
    split_clauses,
)
from rectvlm.metrics.report_labeler.finding_states import (
    FindingState,
    classify_by_size,
    classify_mention,
    is_about_prior_examination,
    is_denied_in_form,
    is_device_removed,
)
from rectvlm.metrics.report_labeler.finding_terms import (
    FINDING_TERMS,
    IMPLIED_FINDINGS,
    LUNG_PATTERN,
    NORMAL_STRUCTURES,
    VESSEL_PATTERN,
    FindingTerm,
)

MAX_SENTENCE_CHARACTERS = 1000
"""Characters of a sentence. A longer one, as of a language model that repeats itself, is read in pieces, since the time
grows with the square."""
_PLAIN_CHARACTERS = str.maketrans({"’": "'", "\u2010": "-", "\u2011": "-", "\u00a0": " "})
"""Typographic signs that stand inside words and between them."""


@dataclass(frozen=True)
class FindingMention:
    """A finding's name in a sentence."""

    finding: str
    state: FindingState
    start: int
    end: int
    """Characters of the sentence."""


@dataclass(frozen=True)
class ReportSentence:
    """A sentence in lower case, and the findings that it names, in the order of their places."""

    text: str
    mentions: tuple[FindingMention, ...]


class RuleLabeler:
    """The rules of this project, for English reports."""

    signature = "rules of rectvlm for English chest-CT reports, version 3"

    def label_reports(self, reports: Sequence[str]) -> NDArray[np.int8]:
        """States (N, 18)."""
        states = np.zeros((len(reports), N_FINDINGS), dtype=np.int8)
        for row, report in zip(states, reports, strict=True):
            for sentence in parse_report(report):
                for mention in sentence.mentions:
                    i = FINDINGS.index(mention.finding)
                    row[i] = max(row[i], mention.state)
            for kind, whole in IMPLIED_FINDINGS.items():
                i, j = FINDINGS.index(kind), FINDINGS.index(whole)
                if row[i] >= FindingState.UNCERTAIN:
                    row[j] = max(row[i], row[j])
        return states


def label_report(report: str) -> dict[str, FindingState]:
    """What the rules read in one report, by finding."""
    row = RuleLabeler().label_reports([report])[0]
    return {finding: FindingState(int(state)) for finding, state in zip(FINDINGS, row, strict=True)}


@lru_cache(maxsize=8192)
def parse_report(report: str) -> tuple[ReportSentence, ...]:
    """The sentences of a report that describe this examination, with the findings that they name.

    Kept, since findings and sides are read from the same reports, and a reference beside several generated ones.
    """
    return tuple(
        ReportSentence(text, tuple(_find_mentions(text))) for text in _split_sentences(report)
    )


def _split_sentences(report: str) -> Iterator[str]:
    """Lower-case sentences of the sections that describe the examination; a report without headings is read whole."""
    report = report.translate(_PLAIN_CHARACTERS).replace("\r\n", "\n")
    if any(character.isupper() for character in report):  # else a small letter may begin a sentence
        report = modifiers.WRAPPED_LINE.sub(" ", report)
    text = re.sub(r"[ \t\r\f\v]+", " ", report.lower())
    heads = list(modifiers.SECTION_HEADING.finditer(text))
    bounds = [head.start() for head in heads] + [len(text)]
    parts = [text[: bounds[0]]]
    for head, end in zip(heads, bounds[1:], strict=True):
        if re.fullmatch(modifiers.READ_SECTION, head[1]):
            parts.append(text[head.end() : end])
    for part in parts:
        last = 0
        for stop in [*modifiers.SENTENCE_END.finditer(part), None]:
            sentence = part[last : stop.end() if stop else len(part)].strip(" \n*#_")
            last = stop.end() if stop else len(part)
            if any(character.isalpha() for character in sentence):
                yield from textwrap.wrap(sentence, MAX_SENTENCE_CHARACTERS, break_on_hyphens=False)


def _find_mentions(sentence: str) -> list[FindingMention]:
    """Names of findings in a sentence with their states."""
    said = modifiers.PRIOR_EXAMINATION_ASIDE.sub(_blank_out, sentence)
    text = modifiers.PSEUDO_NEGATION.sub(_blank_out, said)
    spans = _match_terms(text)
    parts = split_clauses(text, [span[1:] for span in spans])
    mentions = []
    for first, last in parts:
        for normal in NORMAL_STRUCTURES:
            found = normal.structure.search(said, first, last)
            if found and not re.search(r"\babnormal|\bnot normal", found[0]):
                mentions += [
                    FindingMention(f, FindingState.ABSENT, found.start(), found.end())
                    for f in normal.findings
                ]
    named = []
    for term, start, end in spans:
        first, last = next((a, b) for a, b in parts if a <= start < b)
        normal_here = any(
            m.finding == term.finding and m.start <= start and end <= m.end for m in mentions
        )
        if not normal_here and _is_term_meant(term, text, first, last, start, end):
            named.append((term, start, end, first, last))
    past = {(first, last) for first, last in parts if is_about_prior_examination(said[first:last])}
    for term, start, end, first, last in named:
        if (first, last) in past:
            continue
        state = classify_mention(text[first:last], start - first, end - first, text[end:])
        gone = term.is_device and is_device_removed(text[first:last], start - first, end - first)
        if state >= FindingState.UNCERTAIN and (gone or is_denied_in_form(text, first, last)):
            state = FindingState.ABSENT
        if state >= FindingState.UNCERTAIN and term.min_short_axis_mm is not None:
            others = [begin for other, begin, *_ in named if other.finding != term.finding]
            size = classify_by_size(text, first, start, end, others, term.min_short_axis_mm)
            state = state if size == FindingState.PRESENT else size
        if state != FindingState.NOT_MENTIONED:
            mentions.append(FindingMention(term.finding, state, start, end))
    return sorted(mentions, key=lambda mention: (mention.start, mention.end))


def _blank_out(found: re.Match[str]) -> str:
    """As many spaces, so that places stay what they are."""
    return " " * len(found[0])


def _is_term_meant(
    term: FindingTerm, text: str, first: int, last: int, start: int, end: int
) -> bool:
    """Whether a term's words mean its finding, by what stands beside them in the clause from `first` to `last`."""
    clause, own = text[first:last], extract_phrase(text, first, last, start, end)
    if term.required_vessel is not None:
        side = modifiers.VESSEL_LANDMARK.sub(" ", extract_without_side(text, first, last, start))
        if not VESSEL_PATTERN.search(side):
            side = modifiers.VESSEL_LANDMARK.sub(" ", clause)
        if not term.required_vessel.search(side):
            return False
    if term.excluded_in_phrase is not None and term.excluded_in_phrase.search(own):
        return False
    if term.excluded_organs is None or LUNG_PATTERN.search(own):
        return True
    return not term.excluded_organs.search(own) and (
        bool(LUNG_PATTERN.search(clause)) or not term.excluded_organs.search(clause)
    )


def _match_terms(text: str) -> list[tuple[FindingTerm, int, int]]:
    """Every term's matches; a weak one only where no other term's words cover it."""
    strong = [
        (term, found.start(), found.end())
        for term in FINDING_TERMS
        if not term.is_weak
        for found in term.name_pattern.finditer(text)
    ]
    weak = [
        (term, found.start(), found.end())
        for term in FINDING_TERMS
        if term.is_weak
        for found in term.name_pattern.finditer(text)
        if not any(start < found.end() and found.start() < end for _, start, end in strong)
    ]
    return strong + weak
