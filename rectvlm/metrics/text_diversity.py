"""Diversity of generated reports: how many differ, and how much of one is found in the others.

A table of texts or a language model that ignores the image repeats itself, which no comparison of
a report with its own reference shows.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sacrebleu.metrics import BLEU
from sacrebleu.metrics.helpers import extract_all_word_ngrams

from rectvlm.metrics import text_overlap
from rectvlm.metrics.text_overlap import MAX_NGRAM
from rectvlm.types import JsonObject

_NGram = tuple[str, ...]


def measure_diversity(texts: Sequence[str]) -> JsonObject:
    """Number of texts (`n`) and of distinct ones, their share, and self-BLEU-4.

    Self-BLEU (Zhu et al., SIGIR 2018, arXiv 1802.01886) is BLEU of each text with all others as
    references, here of the corpus: 1 where every text is found elsewhere. None for fewer than two
    texts. White space does not make texts distinct.
    """
    n_distinct = len({" ".join(text.split()) for text in texts})
    return {
        "n": len(texts),
        "n_distinct": n_distinct,
        "distinct_share": n_distinct / len(texts) if texts else None,
        "self_bleu_4": _self_bleu(texts) if len(texts) > 1 else None,
    }


def _self_bleu(texts: Sequence[str]) -> float:
    """Corpus BLEU-4, equal to sacrebleu's with all other texts as references.

    A match is clipped at the largest count in another text. The two largest counts of an n-gram
    say that for every text, so the time grows with the number of words and not with its square.
    """
    scorer = BLEU(lowercase=True)
    segments = [scorer.tokenizer(text.lower().rstrip()) for text in texts]
    lengths = np.zeros(len(segments), np.int64)
    largest: dict[_NGram, tuple[int, int]] = {}
    second: dict[_NGram, int] = {}
    for number, segment in enumerate(segments):
        ngrams, lengths[number] = extract_all_word_ngrams(segment, 1, MAX_NGRAM)
        _keep_two_largest(ngrams, number, largest, second)

    counts = np.zeros(2 + 2 * MAX_NGRAM, np.int64)
    for number, segment in enumerate(segments):
        ngrams, _ = extract_all_word_ngrams(segment, 1, MAX_NGRAM)
        counts[0] += lengths[number]
        counts[1] += _closest_other_length(lengths, number)
        for ngram, count in ngrams.items():
            largest_count, owner = largest[ngram]
            elsewhere = second.get(ngram, 0) if owner == number else largest_count
            counts[1 + len(ngram)] += min(count, elsewhere)
            counts[1 + MAX_NGRAM + len(ngram)] += count
    return text_overlap.bleu(counts, MAX_NGRAM)


def _keep_two_largest(
    ngrams: Counter[_NGram],
    number: int,
    largest: dict[_NGram, tuple[int, int]],
    second: dict[_NGram, int],
) -> None:
    """Bring the largest count of each n-gram, with its text, and the second largest up to date."""
    for ngram, count in ngrams.items():
        largest_count, _ = largest.get(ngram, (0, -1))
        if count > largest_count:
            largest[ngram] = count, number
            count = largest_count
        if count > second.get(ngram, 0):
            second[ngram] = count


def _closest_other_length(lengths: NDArray[np.int64], number: int) -> int:
    """Length of another text that is closest to that of a text; the shorter of two."""
    others = np.delete(lengths, number)
    distances = np.abs(others - lengths[number])
    return int(others[distances == distances.min()].min())
