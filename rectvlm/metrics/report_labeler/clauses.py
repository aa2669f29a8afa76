"""Clauses of a sentence, and the phrases inside them.

A clause is as far as the scope of a modifier reaches; a phrase, between "and", "with" and commas,
is about one thing.
"""

import re
from collections.abc import Collection, Sequence
from itertools import pairwise

from rectvlm.metrics.report_labeler import modifiers

Span = tuple[int, int]
"""First character and last + 1 of a part of a sentence."""


def split_clauses(text: str, names: Sequence[Span]) -> list[Span]:
    """Split a sentence where one statement ends and another begins.

    Args:
        text: the sentence.
        names: spans of the findings' names.
    """
    cuts = {0, len(text)}
    negated_pairs = [match.span() for match in modifiers.NEGATED_PAIR.finditer(text)]
    for match in modifiers.CLAUSE_END.finditer(text):
        if not _is_within(match.start(), negated_pairs):
            cuts.add(match.end())
    for opener in modifiers.CLAUSE_OPENER.finditer(text):
        if _opens_clause(text, opener.start(), names, cuts):
            cuts.add(opener.start())

    verbs = [match.start() for match in modifiers.VERB.finditer(text)]
    for verb, next_verb in pairwise(verbs):
        if not any(verb < cut < next_verb for cut in cuts):
            cut = _find_cut_between_verbs(text, verb, next_verb, names)
            if cut is not None:
                cuts.add(cut)

    fronted_ends = [match.end() for match in modifiers.HISTORY_BEFORE.finditer(text)]
    for cut in cuts:
        negation = modifiers.FRONTED_NEGATION.match(text, cut)
        if negation is not None:
            fronted_ends.append(negation.end())
    subjects = [_find_subject_after(text, end, cuts) for end in fronted_ends]
    cuts.update(subject for subject in subjects if subject is not None)
    return list(pairwise(sorted(cuts)))


def _opens_clause(text: str, start: int, names: Sequence[Span], cuts: Collection[int]) -> bool:
    """Whether an opener begins a clause: not inside a name, nor after "In the previous CT, "."""
    if _is_within(start, names):
        return False
    clause_start = max(cut for cut in cuts if cut <= start)
    before = text[clause_start:start].lstrip(" ,")
    has_name = any(clause_start <= name_start < start for name_start, _ in names)
    return has_name or modifiers.PRIOR_EXAMINATION.match(before) is None


def _find_cut_between_verbs(
    text: str, verb: int, next_verb: int, names: Sequence[Span]
) -> int | None:
    """The delimiter between two verbs at which a new subject begins, else the last delimiter."""
    delimiters = []
    for match in modifiers.CLAUSE_DELIMITER.finditer(text, verb, next_verb):
        if not _is_within(match.start(), names):
            delimiters.append(match)
    name_starts = sorted(start for start, _ in names if verb < start < next_verb)
    for name_start in name_starts:
        before = [match for match in delimiters if match.end() <= name_start]
        if before and not modifiers.ACCOMPANYING_PHRASE.match(text, before[-1].start()):
            return before[-1].start()
    return delimiters[-1].start() if delimiters else None


def _find_subject_after(text: str, start: int, cuts: Collection[int]) -> int | None:
    """Position at which a fronted phrase ends and the subject of its clause begins.

    Such a phrase is "without effusion" or "history of lymphoma". It ends at the last comma before
    the verb, which a preposition does not govern. None where there is no verb, or where "or" stands
    between: a list of what is denied, as after "no".

    Args:
        text: the sentence.
        start: position after the words that begin the phrase.
        cuts: positions where clauses begin and end.
    """
    verb = modifiers.VERB.search(text, start)
    if verb is None or any(start < cut <= verb.start() for cut in cuts):
        return None
    before = text[start : verb.start()].rstrip(" ,")
    comma = before.rfind(",")
    if comma < 0 or re.search(r"\bn?or\b", before[comma:]):
        return None
    return start + comma


def _is_within(position: int, spans: Sequence[Span]) -> bool:
    return any(start < position < end for start, end in spans)


def extract_phrase(text: str, clause: Span, name: Span) -> str:
    """The phrase of a clause that holds a name: what is said of the name itself."""
    phrase_start, phrase_end = clause
    for match in modifiers.PHRASE_END.finditer(text, clause[0], name[0]):
        phrase_start = match.end()
    after = modifiers.PHRASE_END.search(text, name[1], clause[1])
    if after is not None:
        phrase_end = after.start()
    return text[phrase_start:phrase_end]


def extract_without_side(text: str, clause: Span, name: Span) -> str:
    """The side of a "without" on which a name stands in its clause: what has it, or has it not."""
    side_start, side_end = clause
    for match in modifiers.WITHOUT.finditer(text, *clause):
        if match.start() > name[0]:
            side_end = match.start()
            break
        side_start = match.start()
    return text[side_start:side_end]
