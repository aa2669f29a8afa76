"""Rules that read the 18 findings in a chest-CT report.

They read the sections that describe the examination, sentence by sentence, clause by clause: names
of findings (`finding_terms`), and the modifiers of negation, uncertainty and time (`modifiers`) in
whose scope the names stand (`clauses`, `finding_states`). After NegEx (Chapman et al. 2001) and
ConText (Harkema et al. 2009).
"""

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from rectvlm.labels import DEFAULT_CONVENTION, FINDINGS, N_FINDINGS, LabelConvention
from rectvlm.metrics.report_labeler import modifiers
from rectvlm.metrics.report_labeler.clauses import (
    Span,
    extract_phrase,
    extract_without_side,
    split_clauses,
)
from rectvlm.metrics.report_labeler.entity_terms import ENTITIES, ENTITY_TERMS
from rectvlm.metrics.report_labeler.finding_states import (
    FindingState,
    classify_by_size,
    classify_mention,
    is_about_prior_examination,
    is_denied_in_form,
    is_device_removed,
)
from rectvlm.metrics.report_labeler.finding_terms import (
    IMPLIED_FINDINGS,
    LUNG_PATTERN,
    NORMAL_STRUCTURES,
    VESSEL_PATTERN,
    FindingTerm,
    NormalStructure,
    select_terms,
)

MAX_SENTENCE_CHARACTERS = 1000
"""Longest sentence, characters.

A longer one, as of a language model that repeats itself, is read in pieces, since the time grows
with the square of the length.
"""
_PLAIN_CHARACTERS = str.maketrans({"’": "'", "\u2010": "-", "\u2011": "-", "\u00a0": " "})
"""Typographic signs inside and between words, with their plain forms."""
_ABNORMAL = re.compile(r"\babnormal|\bnot normal")


@dataclass(frozen=True)
class FindingMention:
    """A finding's name in a sentence."""

    finding: str
    state: FindingState
    start: int
    """First character of the name in the sentence."""
    end: int
    """Last character + 1 of the name."""


@dataclass(frozen=True)
class ReportSentence:
    """A sentence in lower case with the findings that it names, in order."""

    text: str
    mentions: tuple[FindingMention, ...]


@dataclass(frozen=True)
class _NamedTerm:
    """A term that matches in a sentence."""

    term: FindingTerm
    name: Span
    clause: Span = (0, 0)


class RuleLabeler:
    """The rules of this project, for English reports."""

    def __init__(self, convention: LabelConvention = DEFAULT_CONVENTION) -> None:
        self.convention = convention
        self.signature = (
            f"rules of rectvlm for English chest-CT reports, version 4, {convention} convention"
        )

    def label_reports(self, reports: Sequence[str]) -> NDArray[np.int8]:
        """States of the findings, (N, 18)."""
        states = np.zeros((len(reports), N_FINDINGS), dtype=np.int8)
        for row, report in zip(states, reports, strict=True):
            for sentence in parse_report(report, self.convention):
                for mention in sentence.mentions:
                    i = FINDINGS.index(mention.finding)
                    row[i] = max(row[i], mention.state)
            for finding, implied in IMPLIED_FINDINGS[self.convention].items():
                i, j = FINDINGS.index(finding), FINDINGS.index(implied)
                if row[i] >= FindingState.UNCERTAIN:
                    row[j] = max(row[i], row[j])
        return states


def label_report(
    report: str, convention: LabelConvention = DEFAULT_CONVENTION
) -> dict[str, FindingState]:
    """Read one report by the rules: states by finding."""
    row = RuleLabeler(convention).label_reports([report])[0]
    return {finding: FindingState(int(state)) for finding, state in zip(FINDINGS, row, strict=True)}


@lru_cache(maxsize=8192)
def parse_report(
    report: str, convention: LabelConvention = DEFAULT_CONVENTION
) -> tuple[ReportSentence, ...]:
    """Parse the sentences that describe this examination, with the findings that they name.

    The result is cached, since findings and sides are read from the same reports, and a reference
    stands beside several generated ones.
    """
    terms = select_terms(convention)
    sentences = []
    for text in _split_sentences(report):
        mentions = _find_mentions(text, terms, NORMAL_STRUCTURES)
        sentences.append(ReportSentence(text, tuple(mentions)))
    return tuple(sentences)


@lru_cache(maxsize=8192)
def parse_entities(report: str) -> tuple[ReportSentence, ...]:
    """Parse the same sentences as `parse_report`, with the findings beyond the 18 that they name.

    Each mention's `finding` is one of `ENTITIES`. The modifiers are those of the 18.
    """
    sentences = []
    for text in _split_sentences(report):
        sentences.append(ReportSentence(text, tuple(_find_mentions(text, ENTITY_TERMS, ()))))
    return tuple(sentences)


def label_entities(reports: Sequence[str]) -> NDArray[np.int8]:
    """States of the findings beyond the 18, (N, E): values of `FindingState`."""
    states = np.zeros((len(reports), len(ENTITIES)), dtype=np.int8)
    for row, report in zip(states, reports, strict=True):
        for sentence in parse_entities(report):
            for mention in sentence.mentions:
                i = ENTITIES.index(mention.finding)
                row[i] = max(row[i], mention.state)
    return states


def _split_sentences(report: str) -> Iterator[str]:
    """Lower-case sentences of the sections that describe the examination."""
    report = report.translate(_PLAIN_CHARACTERS).replace("\r\n", "\n")
    # Without capitals a small letter may begin a sentence.
    if any(character.isupper() for character in report):
        report = modifiers.WRAPPED_LINE.sub(" ", report)
    text = re.sub(r"[ \t\r\f\v]+", " ", report.lower())
    for section in _select_sections(text):
        start = 0
        ends = [match.end() for match in modifiers.SENTENCE_END.finditer(section)]
        for end in [*ends, len(section)]:
            sentence = section[start:end].strip(" \n*#_")
            start = end
            if any(character.isalpha() for character in sentence):
                yield from textwrap.wrap(sentence, MAX_SENTENCE_CHARACTERS, break_on_hyphens=False)


def _select_sections(text: str) -> list[str]:
    """Sections that describe the examination; a report without headings is one section."""
    headings = list(modifiers.SECTION_HEADING.finditer(text))
    bounds = [heading.start() for heading in headings] + [len(text)]
    sections = [text[: bounds[0]]]
    for heading, end in zip(headings, bounds[1:], strict=True):
        if re.fullmatch(modifiers.READ_SECTION, heading[1]):
            sections.append(text[heading.end() : end])
    return sections


def _find_mentions(
    sentence: str, terms: Sequence[FindingTerm], normal_structures: Sequence[NormalStructure]
) -> list[FindingMention]:
    """Names of findings in a sentence with their states."""
    current = modifiers.PRIOR_EXAMINATION_ASIDE.sub(_blank_out, sentence)
    text = modifiers.PSEUDO_NEGATION.sub(_blank_out, current)
    matches = _match_terms(text, terms)
    clauses = split_clauses(text, [match.name for match in matches])
    mentions = _find_normal_structures(current, clauses, normal_structures)
    named = []
    for match in matches:
        clause = next(clause for clause in clauses if clause[0] <= match.name[0] < clause[1])
        match = replace(match, clause=clause)
        if not _is_in_normal_structure(match, mentions) and _is_term_meant(match, text):
            named.append(match)

    for match in named:
        if is_about_prior_examination(current[slice(*match.clause)]):
            continue
        other_names = [other.name[0] for other in named if other.term.finding != match.term.finding]
        state = _classify_named_term(match, text, other_names)
        if state != FindingState.NOT_MENTIONED:
            mentions.append(FindingMention(match.term.finding, state, *match.name))
    return sorted(mentions, key=lambda mention: (mention.start, mention.end))


def _find_normal_structures(
    text: str, clauses: Sequence[Span], normal_structures: Sequence[NormalStructure]
) -> list[FindingMention]:
    """Findings that are absent because a clause calls their structure normal."""
    mentions = []
    for clause in clauses:
        for normal in normal_structures:
            match = normal.structure.search(text, *clause)
            if match is None or _ABNORMAL.search(match[0]):
                continue
            for finding in normal.findings:
                mentions.append(FindingMention(finding, FindingState.ABSENT, *match.span()))
    return mentions


def _is_in_normal_structure(named: _NamedTerm, mentions: Sequence[FindingMention]) -> bool:
    """Whether a name is part of the words that call the finding's structure normal."""
    start, end = named.name
    for mention in mentions:
        is_inside = mention.start <= start and end <= mention.end
        if is_inside and mention.finding == named.term.finding:
            return True
    return False


def _classify_named_term(named: _NamedTerm, text: str, other_names: Sequence[int]) -> FindingState:
    """State of a name by the modifiers in its clause and by its size.

    Args:
        named: the name with its clause.
        text: the sentence.
        other_names: first characters of the names of other findings.
    """
    term, (start, end), (clause_start, clause_end) = named.term, named.name, named.clause
    clause = text[clause_start:clause_end]
    start_in_clause, end_in_clause = start - clause_start, end - clause_start
    state = classify_mention(clause, start_in_clause, end_in_clause, text[end:])
    if state < FindingState.UNCERTAIN:
        return state
    if term.is_device and is_device_removed(clause, start_in_clause, end_in_clause):
        return FindingState.ABSENT
    if is_denied_in_form(text, named.clause):
        return FindingState.ABSENT
    if term.min_short_axis_mm is None:
        return state
    state_by_size = classify_by_size(
        text, clause_start, named.name, other_names, term.min_short_axis_mm
    )
    return state if state_by_size == FindingState.PRESENT else state_by_size


def _blank_out(match: re.Match[str]) -> str:
    """As many spaces as the match has characters, so that positions stay valid."""
    return " " * len(match[0])


def _is_term_meant(named: _NamedTerm, text: str) -> bool:
    """Whether a term's words mean its finding, by the words beside them in the clause."""
    term, clause = named.term, text[slice(*named.clause)]
    if term.required_vessel is not None:
        side = extract_without_side(text, named.clause, named.name)
        side = modifiers.VESSEL_LANDMARK.sub(" ", side)
        if not VESSEL_PATTERN.search(side):
            side = modifiers.VESSEL_LANDMARK.sub(" ", clause)
        if not term.required_vessel.search(side):
            return False

    phrase = extract_phrase(text, named.clause, named.name)
    if term.excluded_in_phrase is not None and term.excluded_in_phrase.search(phrase):
        return False
    if term.excluded_organs is None or LUNG_PATTERN.search(phrase):
        return True
    if term.excluded_organs.search(phrase):
        return False
    return bool(LUNG_PATTERN.search(clause)) or not term.excluded_organs.search(clause)


def _match_terms(text: str, terms: Sequence[FindingTerm]) -> list[_NamedTerm]:
    """Matches of every term; of a weak term only where no other term's words cover it."""
    strong: list[_NamedTerm] = []
    weak: list[_NamedTerm] = []
    for term in terms:
        matches = [_NamedTerm(term, match.span()) for match in term.name_pattern.finditer(text)]
        (weak if term.is_weak else strong).extend(matches)
    covered = [match.name for match in strong]
    return strong + [match for match in weak if not _overlaps(match.name, covered)]


def _overlaps(name: Span, spans: Sequence[Span]) -> bool:
    return any(start < name[1] and name[0] < end for start, end in spans)
