"""Classifier labeler: labels by name, the context length, and models that are refused."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from rectvlm.labels import FINDINGS, N_FINDINGS
from rectvlm.metrics.report_labeler.classifier_labeler import ClassifierLabeler
from rectvlm.metrics.report_labeler.finding_states import FindingState
from rectvlm.metrics.report_labeler.labeler import load_labeler
from rectvlm.metrics.reports import score_reports
from rectvlm.types import UserError

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, "no", "left", "right", "pleural", "effusion", "nodule", "lungs", "clear"]
SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
CONTEXT = 12
TEXTS = ["left pleural effusion", "", "no nodule", "right nodule lungs clear no effusion"]


def settings(labels: Sequence[str]) -> dict[str, object]:
    names = dict(enumerate(labels))
    ids = {name: i for i, name in names.items()}
    return {
        "vocab_size": len(WORDS),
        "max_position_embeddings": CONTEXT,
        "id2label": names,
        "label2id": ids,
        **SHAPE,
    }


def tokenizer(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)


def classifier(
    folder: Path, labels: Sequence[str], order: Sequence[int] = range(N_FINDINGS)
) -> Path:
    """A random BERT whose head has its outputs in an order; the same network for the same order."""
    tokenizer(folder)
    torch.manual_seed(0)
    network = BertForSequenceClassification(BertConfig(**settings(labels)))
    with torch.no_grad():
        head = torch.nn.Linear(SHAPE["hidden_size"], N_FINDINGS)
        network.classifier.weight.copy_(20 * head.weight[list(order)])
        network.classifier.bias.copy_(head.bias[list(order)])
    network.save_pretrained(folder)
    return folder


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return classifier(tmp_path / "plain", FINDINGS)


def test_a_finding_is_present_where_its_probability_is_one_half(plain: Path) -> None:
    labeler = ClassifierLabeler(plain, device="cpu")
    inputs = labeler.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = labeler.network(**inputs).logits.numpy() >= 0
    states = labeler.label_reports(TEXTS)
    assert states.shape == (4, N_FINDINGS) and 0 < expected.mean() < 1
    assert np.array_equal(states, np.where(expected, FindingState.PRESENT, FindingState.ABSENT))
    # The other cases of a batch change nothing.
    assert np.array_equal(
        states, ClassifierLabeler(plain, batch_size=1, device="cpu").label_reports(TEXTS)
    )
    assert labeler.label_reports([]).shape == (0, N_FINDINGS)


def test_labels_are_found_by_name_in_any_order(plain: Path, tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(N_FINDINGS).tolist()
    names = [FINDINGS[i].upper().replace(" ", "_") for i in order]
    shuffled = classifier(tmp_path / "shuffled", names, order)
    expected = ClassifierLabeler(plain, device="cpu").label_reports(TEXTS)
    assert not np.array_equal(expected, expected[:, order])
    assert np.array_equal(ClassifierLabeler(shuffled, device="cpu").label_reports(TEXTS), expected)


def test_labels_without_names_are_in_ct_rates_order(plain: Path, tmp_path: Path) -> None:
    unnamed = classifier(tmp_path / "unnamed", [f"LABEL_{i}" for i in range(N_FINDINGS)])
    assert np.array_equal(
        ClassifierLabeler(unnamed, device="cpu").label_reports(TEXTS),
        ClassifierLabeler(plain, device="cpu").label_reports(TEXTS),
    )


def test_a_report_longer_than_the_context_is_cut_and_counted(
    plain: Path, caplog: pytest.LogCaptureFixture
) -> None:
    labeler = ClassifierLabeler(plain, device="cpu")
    long = "left nodule " * 40
    with caplog.at_level(logging.WARNING, logger="rectvlm"):
        states = labeler.label_reports(["no nodule", long])
    assert "1 of 2 reports were cut to 12 tokens" in caplog.text
    assert np.array_equal(states[1:], labeler.label_reports(["left nodule " * 5]))


def test_roberta_counts_its_positions_from_its_padding(tmp_path: Path) -> None:
    folder = tmp_path / "roberta"
    tokenizer(folder)
    RobertaForSequenceClassification(
        RobertaConfig(**settings(FINDINGS), pad_token_id=0)
    ).save_pretrained(folder)
    labeler = ClassifierLabeler(folder, device="cpu")
    assert labeler.max_tokens == CONTEXT - 1
    assert labeler.label_reports(["left nodule " * 40]).shape == (1, N_FINDINGS)


def test_it_takes_the_rules_place_in_the_figures(plain: Path) -> None:
    found = score_reports(TEXTS, TEXTS, labeler=plain)
    assert found["clinical"]["reference_reports"]["micro"]["f1"] == 1
    assert (
        "sequence classifier plain, threshold 0.5, first 12 tokens"
        in found["signatures"]["clinical"]
    )
    assert str(plain.parent) not in found["signatures"]["clinical"]


@pytest.mark.parametrize(
    ("labels", "missing"),
    [
        (["negative", "positive"], "Medical material"),
        ([*FINDINGS[:-1], "Pneumothorax"], "Interlobular septal thickening"),
        ([f"LABEL_{i}" for i in range(14)], "Medical material"),
    ],
)
def test_other_labels_are_refused(labels: list[str], missing: str, tmp_path: Path) -> None:
    tokenizer(tmp_path)
    BertForSequenceClassification(BertConfig(**settings(labels))).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"found {len(labels)} labels without '{missing}'"):
        load_labeler(tmp_path)


def test_what_is_no_classifier_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    tokenizer(folder)
    BertModel(BertConfig(**settings(FINDINGS))).save_pretrained(folder)
    with pytest.raises(UserError, match=r"not trained: .* no weights for classifier\.bias"):
        load_labeler(folder)
    (folder / "model.safetensors").rename(folder / "other")
    torch.save({}, folder / "pytorch_model.bin")
    for path in (folder, tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match=r"cannot be loaded .* give `rules`"):
            load_labeler(path)
