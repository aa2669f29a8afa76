"""Diversity of reports: self-BLEU is sacrebleu's, and what repeats itself is found out."""

import pytest
from sacrebleu.metrics import BLEU

from rectvlm.metrics.text_diversity import measure_diversity

TEXTS = [
    "Findings: There is a small left pleural effusion. The heart is enlarged.",
    "Findings: There is a small right pleural effusion, and the the the heart is enlarged.",
    "The lungs are clear. The heart is normal. The aorta is normal. The lungs are clear.",
    "the lungs are clear.",
    "Nodule of 5.5 mm.",
    "",
]


@pytest.mark.parametrize("n", [2, 4, 6])
def test_self_bleu_is_sacrebleus_with_all_other_texts_as_references(n: int) -> None:
    texts = TEXTS[:n]
    others = [texts[:number] + texts[number + 1 :] for number in range(n)]
    streams = [list(stream) for stream in zip(*others, strict=True)]
    expected = BLEU(lowercase=True).corpus_score(texts, streams).score / 100
    assert 0 < expected < 1
    assert measure_diversity(texts)["self_bleu_4"] == pytest.approx(expected)


def test_texts_that_repeat_themselves_are_not_distinct() -> None:
    same = measure_diversity([TEXTS[0], TEXTS[0] + "\n", TEXTS[0].replace(" ", "  ")])
    assert (same["n"], same["n_distinct"], same["distinct_share"]) == (3, 1, pytest.approx(1 / 3))
    assert same["self_bleu_4"] == pytest.approx(1)
    assert measure_diversity(TEXTS)["n_distinct"] == 6
    assert measure_diversity(TEXTS[:1])["self_bleu_4"] is None
    assert measure_diversity([])["distinct_share"] is None
