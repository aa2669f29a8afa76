"""Incidental sentences: none of the 18 findings, few of them often and most of them rarely."""

from collections import Counter
from typing import get_args

import numpy as np

from rectvlm.labels import FINDINGS, LabelConvention
from rectvlm.metrics.report_labeler.labeler import load_labeler
from rectvlm.metrics.report_labeler.laterality import count_side_outcomes
from rectvlm.phantom.incidental_findings import (
    INCIDENTAL_SENTENCES,
    MAX_INCIDENTAL_SENTENCES,
    draw_incidental_sentences,
)


def test_no_sentence_asserts_or_denies_one_of_the_18_findings() -> None:
    for convention in get_args(LabelConvention):
        states = load_labeler("rules", convention).label_reports(INCIDENTAL_SENTENCES)
        for sentence, row in zip(INCIDENTAL_SENTENCES, states, strict=True):
            named = [finding for finding, state in zip(FINDINGS, row, strict=True) if state]
            assert not named, f"{sentence} names {named}"


def test_no_sentence_states_the_side_of_a_lesion() -> None:
    sides = count_side_outcomes(list(INCIDENTAL_SENTENCES), list(INCIDENTAL_SENTENCES))
    assert not np.asarray(sides).any()


def test_few_sentences_are_frequent_and_many_are_rare() -> None:
    drawn = [draw_incidental_sentences(np.random.default_rng([seed, 6])) for seed in range(2000)]
    assert {len(sentences) for sentences in drawn} == set(range(MAX_INCIDENTAL_SENTENCES + 1))
    assert all(len(set(sentences)) == len(sentences) for sentences in drawn)
    counts = Counter(sentence for sentences in drawn for sentence in sentences)
    assert len(INCIDENTAL_SENTENCES) >= 40 and set(counts) == set(INCIDENTAL_SENTENCES)
    assert counts[INCIDENTAL_SENTENCES[0]] > 8 * counts[INCIDENTAL_SENTENCES[-1]]
    assert drawn[3] == draw_incidental_sentences(np.random.default_rng([3, 6]))
