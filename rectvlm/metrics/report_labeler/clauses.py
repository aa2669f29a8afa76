"""Where a statement begins and ends: clauses, and the phrases inside them.

A clause is as far as a cue reaches; a phrase, between "and", "with" and commas, is what speaks of one thing.
"""

import re
from collections.abc import Collection, Sequence
from itertools import pairwise

from rectvlm.metrics.report_labeler import modifiers


def split_clauses(text: str, names: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Cuts a sentence where one statement ends and another begins; see `cues`."""
    cuts = {0, len(text)}
    cuts |= {found.end() for found in modifiers.CLAUSE_END.finditer(text)}
    for opener in modifiers.CLAUSE_OPENER.finditer(text):
        start = opener.start()
        begun = max(cut for cut in cuts if cut <= start)
        # "In the previous CT, there was …" is of that CT.
        fronted = modifiers.PRIOR_EXAMINATION.match(text[begun:start].lstrip(" ,")) and not any(
            begun <= name < start for name, _ in names
        )
        if not fronted and not _is_within(start, names):
            cuts.add(start)
    verbs = [found.start() for found in modifiers.VERB.finditer(text)]
    for one, other in pairwise(verbs):
        if any(one < cut < other for cut in cuts):
            continue
        delimiters = [
            found
            for found in modifiers.CLAUSE_DELIMITER.finditer(text, one, other)
            if not _is_within(found.start(), names)
        ]
        cut = _find_delimiter_before_name(
            text, delimiters, [start for start, _ in names if one < start < other]
        )
        if cut is None and delimiters:
            cut = delimiters[-1].start()
        if cut is not None:
            cuts.add(cut)
    heads = [found for start in cuts if (found := modifiers.FRONTED_NEGATION.match(text, start))]
    heads += modifiers.HISTORY_BEFORE.finditer(text)
    cuts |= {
        cut for head in heads if (cut := _find_fronted_end(text, head.end(), cuts)) is not None
    }
    marks = sorted(cuts)
    return list(pairwise(marks))


def _find_fronted_end(text: str, start: int, cuts: Collection[int]) -> int | None:
    """Where a phrase such as "without effusion" or "history of lymphoma" ends and the subject of its clause begins.

    That is the last comma before the verb, which a preposition does not govern. None where there is no verb, or where
    "or" stands between: a list of what is denied, as after "no".
    """
    verb = modifiers.VERB.search(text, start)
    if verb is None or any(start < cut <= verb.start() for cut in cuts):
        return None
    before = text[start : verb.start()].rstrip(" ,")
    comma = before.rfind(",")
    return None if comma < 0 or re.search(r"\bn?or\b", before[comma:]) else start + comma


def _find_delimiter_before_name(
    text: str, delimiters: Sequence[re.Match[str]], names: Sequence[int]
) -> int | None:
    """The delimiter right before the first name that begins a new subject."""
    for start in sorted(names):
        before = [found for found in delimiters if found.end() <= start]
        if before and not modifiers.ACCOMPANYING_PHRASE.match(text, before[-1].start()):
            return before[-1].start()
    return None


def _is_within(position: int, spans: Sequence[tuple[int, int]]) -> bool:
    return any(start < position < end for start, end in spans)


def extract_phrase(text: str, first: int, last: int, start: int, end: int) -> str:
    """What is said of the name at `start` to `end` itself, in its clause from `first` to `last`."""
    before = [found.end() for found in modifiers.PHRASE_END.finditer(text, first, start)]
    after = modifiers.PHRASE_END.search(text, end, last)
    return text[max(before, default=first) : after.start() if after else last]


def extract_without_side(text: str, first: int, last: int, start: int) -> str:
    """The side of a "without" on which a name stands in its clause: what has it, or what has it not."""
    cuts = [found.start() for found in modifiers.WITHOUT.finditer(text, first, last)]
    before = [cut for cut in cuts if cut <= start]
    after = [cut for cut in cuts if cut > start]
    return text[max(before, default=first) : min(after, default=last)]
