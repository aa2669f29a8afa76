import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import compute_dice, compute_iou
from safetensors.torch import load_file
from sklearn.metrics import f1_score

from rectvlm.labels import FINDINGS, LESIONS, N_FINDINGS, N_LESIONS
from rectvlm.lesion_bits import unpack_lesions
from rectvlm.metrics.findings import (
    FINDING_SCORES,
    PREVALENCE_SCORES,
    fit_thresholds,
    score_findings,
    score_prevalence,
)
from rectvlm.metrics.lesion_overlap import count_lesion_voxels, score_lesion_overlap
from rectvlm.metrics.reports import score_reports
from rectvlm.metrics.text_overlap import bertscore_by_case
from rectvlm.types import UserError

HALF = np.full(N_FINDINGS, 0.5)


def _case(n: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    probabilities = rng.random((n, N_FINDINGS))
    labels = (rng.random((n, N_FINDINGS)) < 0.4).astype(np.float32)
    return probabilities, labels, np.ones((n, N_FINDINGS), dtype=bool)


def test_prevalence_alone_scores_what_equal_probabilities_score():
    probabilities, labels, known = _case(40)
    known[:25, 3], labels[:, 5] = False, 0  # one finding with few labels, one without a positive
    scores = score_findings(probabilities, labels, known, HALF)
    constant = score_findings(np.full_like(probabilities, 0.5), labels, known, HALF)
    prevalence = score_prevalence(scores["per_finding"])
    for kind in ("macro", "weighted"):
        expected = {score: constant[kind][score] for score in PREVALENCE_SCORES}
        assert prevalence[kind] == pytest.approx(expected)
    assert 0.3 < prevalence["macro"]["average_precision"] < prevalence["macro"]["f1"] < 0.7


def test_known_values_of_one_finding():
    probabilities = np.full((4, N_FINDINGS), 0.1)
    labels = np.zeros((4, N_FINDINGS), dtype=np.float32)
    known = np.zeros((4, N_FINDINGS), dtype=bool)
    probabilities[:, 0], labels[:, 0], known[:, 0] = [0.9, 0.4, 0.6, 0.1], [1, 1, 0, 0], True

    result = score_findings(probabilities, labels, known, HALF)

    row = result["per_finding"][FINDINGS[0]]
    # Of the four positive-negative pairs three are in order; one of two positives is found, one of
    # two calls is right.
    assert row["auroc"] == 0.75 and row["recall"] == row["precision"] == row["f1"] == 0.5
    assert (row["n_known"], row["n_positive"]) == (4, 2)
    assert result["macro"]["auroc"] == result["weighted"]["auroc"] == 0.75
    assert result["macro"]["n_findings_auroc"] == 1
    unknown = result["per_finding"][FINDINGS[1]]
    assert all(unknown[score] is None for score in FINDING_SCORES)
    assert unknown == dict.fromkeys(FINDING_SCORES) | {
        "threshold": 0.5,
        "n_known": 0,
        "n_positive": 0,
    }
    # Of the four calls two are right; squared errors 0.01, 0.36, 0.36, 0.01.
    assert row["accuracy"] == 0.5 and row["brier"] == pytest.approx(0.185)


def test_macro_and_weighted_f1_are_scikit_learns():
    probabilities, labels, known = _case(60)
    result = score_findings(probabilities, labels, known, HALF)
    called = probabilities >= 0.5
    for average in ("macro", "weighted"):
        assert result[average]["f1"] == pytest.approx(f1_score(labels, called, average=average))


def test_an_unknown_label_is_not_a_negative():
    probabilities, labels, known = _case(40)
    known[:20, 3] = False
    hidden = score_findings(probabilities, labels, known, HALF)["per_finding"][FINDINGS[3]]
    alone = score_findings(probabilities[20:], labels[20:], known[20:], HALF)["per_finding"][
        FINDINGS[3]
    ]
    assert hidden == alone
    as_negative = labels * known
    read_as_negative = score_findings(probabilities, as_negative, np.ones_like(known), HALF)
    assert read_as_negative["per_finding"][FINDINGS[3]]["auroc"] != hidden["auroc"]


@pytest.mark.parametrize("value", [0, 1])
def test_one_class_has_no_auroc(value):
    probabilities, labels, known = _case(5)
    labels[:, 7] = value
    result = score_findings(probabilities, labels, known, HALF)
    assert result["per_finding"][FINDINGS[7]]["auroc"] is None
    assert (result["per_finding"][FINDINGS[7]]["f1"] is None) == (value == 0)
    assert result["macro"]["n_findings_auroc"] == N_FINDINGS - 1


def test_thresholds_maximise_f1_and_are_not_fitted_where_a_class_is_missing():
    probabilities, labels, known = _case(30, seed=1)
    labels[:, 2], known[:, 4] = 1, False
    thresholds = fit_thresholds(probabilities, labels, known, "train split")
    assert thresholds.values[2] == thresholds.values[4] == 0.5
    assert (
        not thresholds.is_fitted[2]
        and not thresholds.is_fitted[4]
        and thresholds.is_fitted.sum() == N_FINDINGS - 2
    )
    for i in np.flatnonzero(thresholds.is_fitted):
        reached = f1_score(labels[:, i], probabilities[:, i] >= thresholds.values[i])
        best = max(
            f1_score(labels[:, i], probabilities[:, i] >= cut) for cut in probabilities[:, i]
        )
        assert reached >= best - 1e-12
    assert thresholds.as_dict()["not_fitted"] == [FINDINGS[2], FINDINGS[4]]


def test_a_threshold_lies_between_the_classes_it_separates():
    probabilities = np.tile(np.array([[0.2], [0.4], [0.8], [0.9]]), N_FINDINGS)
    labels = np.tile(np.array([[0.0], [0.0], [1.0], [1.0]]), N_FINDINGS)
    thresholds = fit_thresholds(
        probabilities, labels, np.ones_like(labels, dtype=bool), "train split"
    )
    assert thresholds.values == pytest.approx(0.6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_dice_and_iou_are_monais(seed):
    rng = np.random.default_rng(seed)
    predicted = rng.random((N_LESIONS, 3, 4, 5)) < 0.4
    truth = rng.integers(0, 2**N_LESIONS, (3, 4, 5)).astype(np.uint8)
    counts = count_lesion_voxels(predicted, truth)[None]
    result = score_lesion_overlap(counts, np.ones((1, N_LESIONS), dtype=bool))
    bits = unpack_lesions(truth)
    y_pred, y = torch.from_numpy(predicted)[None].float(), torch.from_numpy(bits)[None].float()
    for lesion in LESIONS:
        row = result["per_lesion"][lesion.key]
        assert row["dice"] == pytest.approx(compute_dice(y_pred, y)[0, lesion.bit].item(), abs=1e-6)
        assert row["iou"] == pytest.approx(compute_iou(y_pred, y)[0, lesion.bit].item(), abs=1e-6)


def test_empty_missed_and_false_positive_cases_are_counted_apart():
    # One lesion in five cases: agreed empty, false positive, missed, Dice 2·2/(3+3), and a perfect
    # one unannotated.
    counts = np.zeros((5, N_LESIONS, 3), dtype=np.int64)
    counts[:, 0] = [[0, 0, 0], [0, 4, 0], [0, 0, 7], [2, 3, 3], [9, 9, 9]]
    annotated = np.zeros((5, N_LESIONS), dtype=bool)
    annotated[:4, 0] = True

    result = score_lesion_overlap(counts, annotated)

    row = result["per_lesion"][LESIONS[0].key]
    assert row["dice"] == pytest.approx((0 + 0 + 2 / 3) / 3)
    assert row["iou"] == pytest.approx((0 + 0 + 2 / 4) / 3)
    assert row["dice_where_present"] == pytest.approx((0 + 2 / 3) / 2)
    assert {name: row[name] for name in row if name.startswith("n_")} == {
        "n_annotated": 4,
        "n_cases": 3,
        "n_present": 2,
        "n_missed": 1,
        "n_false_positive": 1,
        "n_empty_agreed": 1,
    }
    assert result["per_lesion"][LESIONS[1].key]["dice"] is None
    assert result["macro"]["n_lesions_dice"] == 1 and result["macro"]["dice"] == row["dice"]


def test_reports_known_values():
    reference = "There is a small left pleural effusion."
    same = score_reports([reference], [reference])
    assert (
        same["bleu_4"] == pytest.approx(1)
        and same["rouge_l"] == pytest.approx(1)
        and same["n"] == 1
    )
    other = score_reports(["the cat sat on a mat"], ["the cat sat on the mat"])
    # Five of six words match, and of five word pairs "the cat", "cat sat" and "sat on"; equal
    # lengths, no penalty.
    assert other["bleu_1"] == pytest.approx(5 / 6)
    assert other["bleu_2"] == pytest.approx(np.sqrt(5 / 6 * 3 / 5))
    assert other["rouge_l"] == pytest.approx(5 / 6)
    assert "tok:13a" in other["signatures"]["bleu_4"] and "BLEU-4" in other["signatures"]["bleu_4"]


def test_cases_without_a_reference_report_are_left_out():
    with_gap = score_reports(["a b c d e", "x y z"], ["a b c d e", None])
    assert (with_gap["n"], with_gap["n_without_reference"]) == (1, 1) and with_gap[
        "bleu_1"
    ] == pytest.approx(1)
    nothing = score_reports(["x"], [None])
    assert nothing["n"] == 0 and nothing["bleu_1"] is None and nothing["rouge_l"] is None


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    """A random BERT with a word list: BERTScore of equal texts is 1 with any encoder."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-bert")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "no",
        "left",
        "right",
        "pleural",
        "effusion",
        "nodule",
    ]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    config = BertConfig(vocab_size=len(words), max_position_embeddings=32, **shape)
    BertModel(config).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 2
    return folder


def test_bertscore_runs_offline_on_a_local_model(tiny_bert):
    truths = ["left pleural effusion", "no nodule", "right nodule"]
    f1, signature = bertscore_by_case(
        ["left pleural effusion", "", "right effusion " * 40], truths, tiny_bert
    )
    same, _ = bertscore_by_case(truths, truths, tiny_bert)
    assert same == pytest.approx(1, abs=1e-5)
    # One equal text, one empty (0), one that is longer than the encoder's context.
    assert f1[0] == pytest.approx(1, abs=1e-5) and f1[1] == 0 and 0 < f1[2] < 1 - 1e-4
    assert "layer 2" in signature and str(tiny_bert.parent) not in signature


def test_bertscore_reads_no_pickle(tiny_bert, tmp_path):
    shutil.copytree(tiny_bert, tmp_path, dirs_exist_ok=True)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"in pytorch_model\.bin and not in safetensors"):
        bertscore_by_case(["no nodule"], ["no nodule"], tmp_path)
    scores = score_reports(["no nodule"], ["no nodule"], bertscore_model=tmp_path)
    assert "bertscore_f1" not in scores
    assert "not in safetensors" in scores["left_out"]["bertscore_f1"]
