"""Figures of generated reports equal those of the libraries and papers that define them."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from nltk.stem.porter import PorterStemmer
from nltk.translate.meteor_score import single_meteor_score
from numpy.typing import NDArray
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU
from sklearn.metrics import precision_recall_fscore_support

from rectvlm.labels import FINDINGS, N_FINDINGS
from rectvlm.metrics import text_overlap
from rectvlm.metrics.clinical_efficacy import count_confusions, score_clinical_efficacy
from rectvlm.metrics.report_labeler.finding_states import FindingState
from rectvlm.metrics.reports import compute_report_statistics, headline_scores, score_reports

TRUTHS = [
    "Findings: There is a small left pleural effusion. The heart is enlarged.",
    "Findings: No pleural effusion. There is a 5.5 mm nodule in the right upper lobe.",
    "Findings: Consolidation in the left lower lobe. Emphysema in both lungs, no pleural effusion.",
    "The lungs are clear.",
    "Findings: Ground-glass opacity in the lingula.",
]
WRITTEN = [
    "Findings: There is a small right pleural effusion. The heart is not enlarged.",
    "Findings: There is a nodule in the right upper lobe. No pleural effusion is seen.",
    "Findings: Consolidation in the left lower lobe.",
    "",
    "Findings: Ground-glass opacity in the lingula.",
]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("cases", [range(5), range(2), [3], [0, 3]])
def test_bleu_is_sacrebleus(order: int, cases: Sequence[int]) -> None:
    written, truths = [WRITTEN[i] for i in cases], [TRUTHS[i] for i in cases]
    expected = (
        BLEU(max_ngram_order=order, lowercase=True).corpus_score(written, [truths]).score / 100
    )
    assert score_reports(written, truths)[f"bleu_{order}"] == pytest.approx(expected)


def test_rouge_l_is_rouge_scores() -> None:
    scorer = RougeScorer(["rougeL"])
    expected = [
        scorer.score(truth, text)["rougeL"].fmeasure
        for text, truth in zip(WRITTEN, TRUTHS, strict=True)
    ]
    assert text_overlap.rouge_l(WRITTEN, TRUTHS) == pytest.approx(expected)
    assert score_reports(WRITTEN, TRUTHS)["rouge_l"] == pytest.approx(np.mean(expected))


def test_words_keep_hyphens_and_numbers_and_lose_punctuation() -> None:
    assert text_overlap.tokenize_text("Ground-Glass: 5.5 mm (LLL), n.b.") == [
        "ground-glass",
        "5.5",
        "mm",
        "lll",
        "n",
        "b",
    ]


class _WordNet:
    """One synonym, in the shape that NLTK's METEOR reads: "big" may stand for "vast"."""

    def synsets(self, word: str) -> list["_WordNet"]:
        return [self] if word == "big" else []

    def lemmas(self) -> list["_WordNet"]:
        return [self]

    def name(self) -> str:
        return "vast"


@pytest.mark.parametrize("synonyms", [text_overlap._NoSynonyms(), _WordNet()])
def test_meteor_is_nltks(synonyms: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_overlap, "_load_wordnet", lambda: synonyms)
    written = [*WRITTEN, "a big effusion was seen on the left"]
    truths = [*TRUTHS, "vast effusions on the left"]
    expected = [
        single_meteor_score(
            text_overlap.tokenize_text(truth),
            text_overlap.tokenize_text(text),
            stemmer=PorterStemmer(),
            wordnet=synonyms,
        )
        for text, truth in zip(written, truths, strict=True)
    ]
    assert text_overlap.meteor(written, truths) == pytest.approx(expected)
    # One chunk of six equal words: 1 − 0.5 / 6³, whatever the stages.
    assert text_overlap.meteor([TRUTHS[4]], [TRUTHS[4]])[0] == pytest.approx(1 - 0.5 / 6**3)
    assert ("WordNet is not installed" in text_overlap.meteor_signature()) == isinstance(
        synonyms, text_overlap._NoSynonyms
    )


def test_a_synonym_counts_where_wordnet_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = ["big effusion"], ["vast effusion"]
    monkeypatch.setattr(text_overlap, "_load_wordnet", text_overlap._NoSynonyms)
    without = text_overlap.meteor(*pair)[0]
    monkeypatch.setattr(text_overlap, "_load_wordnet", _WordNet)
    assert text_overlap.meteor(*pair)[0] > without > 0


def cider_d(written: Sequence[str], truths: Sequence[str]) -> list[float]:
    """CIDEr-D as in the paper: clipped TF-IDF cosine for each n, Gaussian length penalty."""

    def grams(text: str, n: int) -> Counter[tuple[str, ...]]:
        found = text_overlap.tokenize_text(text)
        return Counter(tuple(found[i : i + n]) for i in range(len(found) - n + 1))

    scores = []
    for text, truth in zip(written, truths, strict=True):
        total = 0.0
        for n in range(1, 5):
            documents = [grams(one, n) for one in truths]
            said, true = grams(text, n), grams(truth, n)
            idf = {
                g: math.log(len(truths) / max(1, sum(g in one for one in documents)))
                for g in said | true
            }
            dot = sum(min(said[g], true[g]) * true[g] * idf[g] ** 2 for g in said)
            norms = [math.sqrt(sum((one[g] * idf[g]) ** 2 for g in one)) for one in (said, true)]
            gap = sum(grams(text, 2).values()) - sum(grams(truth, 2).values())
            total += dot / math.prod(norms) * math.exp(-(gap**2) / (2 * 6**2)) if all(norms) else 0
        scores.append(10 * total / 4)
    return scores


def test_cider_is_the_papers() -> None:
    found = text_overlap.cider(WRITTEN, TRUTHS)
    assert found == pytest.approx(cider_d(WRITTEN, TRUTHS))
    assert found[4] == pytest.approx(10) and found[3] == 0 and 0 < found[1] < 10
    repeated = [f"{text} {text}" for text in TRUTHS]
    assert text_overlap.cider(repeated, TRUTHS) == pytest.approx(cider_d(repeated, TRUTHS))
    assert text_overlap.cider(repeated, TRUTHS)[0] < text_overlap.cider(TRUTHS, TRUTHS)[0]


def test_cider_of_one_case_is_left_out_with_its_reason() -> None:
    found = score_reports(WRITTEN[:2], [TRUTHS[0], None])
    assert found["cider"] is None and "two cases" in found["left_out"]["cider"]
    assert headline_scores(compute_report_statistics(WRITTEN[:1], TRUTHS[:1]))["cider"] is None


def _random(seed: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
    rng = np.random.default_rng(seed)
    called, truth, known = (rng.random((40, N_FINDINGS)) < share for share in (0.4, 0.3, 0.8))
    truth[:, 2] = False
    called[:, 5] = False
    known[:, 7] = False
    return called, truth, known


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_precision_recall_and_f1_are_scikit_learns_of_the_known_labels(seed: int) -> None:
    called, truth, known = _random(seed)
    found = score_clinical_efficacy(count_confusions(called, truth, known))

    def sklearns(rows: NDArray[np.bool_], of: NDArray[np.bool_]) -> list[float]:
        values = precision_recall_fscore_support(rows, of, average="binary", zero_division=0)
        return [float(value) for value in values[:3]]

    positives = (truth & known).sum(axis=0)
    each = np.full((N_FINDINGS, 3), np.nan)
    for i in np.flatnonzero(positives):
        rows = known[:, i]
        each[i] = sklearns(truth[rows, i], called[rows, i])
    for i, name in enumerate(FINDINGS):
        row = found["per_finding"][name]
        expected = [None] * 3 if not positives[i] else pytest.approx(each[i])
        assert [row["precision"], row["recall"], row["f1"]] == expected
        assert (row["n_known"], row["n_positive"]) == (known[:, i].sum(), positives[i])
    has = positives > 0
    assert found["n_findings"] == has.sum() == N_FINDINGS - 2
    assert list(found["macro"].values()) == pytest.approx(each[has].mean(axis=0))
    assert list(found["weighted"].values()) == pytest.approx(
        np.average(each[has], axis=0, weights=positives[has])
    )
    assert list(found["micro"].values()) == pytest.approx(sklearns(truth[known], called[known]))
    assert found["per_finding"][FINDINGS[5]]["precision"] == 0


def test_scikit_learns_own_means_where_every_label_is_known() -> None:
    called, truth, known = _random(3)
    truth[0], known[:] = True, True
    found = score_clinical_efficacy(count_confusions(called, truth, known))
    for average in ("micro", "macro", "weighted"):
        expected = precision_recall_fscore_support(truth, called, average=average, zero_division=0)[
            :3
        ]
        assert list(found[average].values()) == pytest.approx(expected)


def test_crg_of_the_extremes() -> None:
    _, truth, known = _random(4)
    for called, expected in (
        (truth, 1),
        (truth & False, 1 / 3),
        (truth | True, 1 / 3),
        (~truth, 0.2),
    ):
        assert score_clinical_efficacy(count_confusions(called, truth, known))[
            "crg"
        ] == pytest.approx(expected)
    for same in (truth & False, truth | True):
        assert score_clinical_efficacy(count_confusions(truth, same, known))["crg"] is None
    assert (
        score_clinical_efficacy(count_confusions(truth, truth, known & False))["micro"]["f1"]
        is None
    )


class _Fixed:
    """Reads what it was told to."""

    signature = "fixed"

    def __init__(self, states: dict[str, list[int]]) -> None:
        self.states = states

    def label_reports(self, reports: Sequence[str]) -> NDArray[np.int8]:
        rows = np.zeros((len(reports), N_FINDINGS), np.int8)
        for row, report in zip(rows, reports, strict=True):
            row[: len(self.states[report])] = self.states[report]
        return rows


@pytest.mark.parametrize(("uncertain", "f1"), [(True, 2 / 3), (False, 0)])
def test_what_is_uncertain_counts_as_asked(uncertain: bool, f1: float) -> None:
    states = {
        "said": [FindingState.UNCERTAIN, FindingState.PRESENT, FindingState.ABSENT],
        "true": [FindingState.PRESENT, FindingState.ABSENT, 0],
    }
    found = score_reports(
        ["said"], ["true"], labeler=_Fixed(states), uncertain_is_present=uncertain
    )
    assert found["clinical"]["reference_reports"]["micro"]["f1"] == pytest.approx(f1)
    assert found["clinical"]["labels"] is None
    assert found["signatures"]["clinical"].startswith("fixed; uncertain counts as")


def test_labels_count_also_where_there_is_no_reference_report() -> None:
    labels, known = np.zeros((2, N_FINDINGS)), np.zeros((2, N_FINDINGS), bool)
    labels[:, FINDINGS.index("Pleural effusion")] = 1
    known[0] = True
    found = score_reports(
        ["Left pleural effusion."] * 2, [None, "No effusion."], labels=labels, known=known
    )
    by_labels, by_reference = found["clinical"]["labels"], found["clinical"]["reference_reports"]
    assert (by_labels["n_cases"], by_labels["n_labels"], by_labels["micro"]["f1"]) == (1, 18, 1)
    assert (by_reference["n_cases"], by_reference["micro"]["f1"]) == (1, None)
