"""The sentences of a report with the lesions that they state.

The sentences are read by the rules of `metrics.report_labeler`; a denied finding states no lesion.
"""

from dataclasses import dataclass

from rectvlm.labels import LESIONS
from rectvlm.metrics.report_labeler.finding_states import FindingState
from rectvlm.metrics.report_labeler.modifiers import SENTENCE_END, WRAPPED_LINE
from rectvlm.metrics.report_labeler.rule_labeler import parse_report


@dataclass(frozen=True)
class LinkedSentence:
    """One sentence of a report."""

    text: str
    """The sentence as it was written."""
    lesions: tuple[str, ...]
    """Keys of the lesions whose findings it states, or holds for possible."""


def link_sentences(text: str) -> list[LinkedSentence]:
    """Split a section of a report into sentences, and find the lesions that each one states."""
    text = WRAPPED_LINE.sub(" ", text)
    lowered = text.lower()
    if len(lowered) != len(text):  # a few letters are longer in lower case
        lowered = text
    ends = [end.end() for end in SENTENCE_END.finditer(lowered)]
    sentences = []
    start = 0
    for end in [*ends, len(text)]:
        sentence = text[start:end].strip()
        start = end
        if sentence:
            sentences.append(LinkedSentence(sentence, _stated_lesions(sentence)))
    return sentences


def _stated_lesions(sentence: str) -> tuple[str, ...]:
    stated = set()
    for parsed in parse_report(sentence):
        for mention in parsed.mentions:
            if mention.state >= FindingState.UNCERTAIN:
                stated.add(mention.finding)
    return tuple(lesion.key for lesion in LESIONS if lesion.finding in stated)
