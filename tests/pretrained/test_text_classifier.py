"""Official text classifier: converted, it says what the published network says; or is refused."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BertConfig,
    RobertaConfig,
)

from rectvlm import cli
from rectvlm.labels import FINDINGS, N_FINDINGS
from rectvlm.metrics.report_labeler.classifier_labeler import ClassifierLabeler
from rectvlm.metrics.report_labeler.finding_states import FindingState
from rectvlm.pretrained.text_classifier import convert_text_classifier
from rectvlm.types import UserError

REPORTS = [
    "Millimetric nonspecific nodules are observed in both lungs.",
    "PLEURAL effusion-thickening was not observed.",
    "",
    "There are calcific atheroma plaques in the aorta and coronary arteries. " * 12,
]
CONTEXT = 512
"""Tokens that the published program reads of a report."""


class PublishedNetwork(nn.Module):
    """The layout of the published weights: `model` and `classifier`, on the pooled first token."""

    def __init__(self, encoder: Path) -> None:
        super().__init__()
        self.model = AutoModel.from_config(AutoConfig.from_pretrained(encoder))
        self.classifier = nn.Linear(self.model.config.hidden_size, N_FINDINGS)

    def forward(self, token_ids: Tensor, mask: Tensor) -> Tensor:
        pooled = self.model(input_ids=token_ids, attention_mask=mask).pooler_output
        return self.classifier(pooled)


def write_encoder(folder: Path) -> Path:
    """Tiny geometry of RadBERT: a RoBERTa's config.json and byte-level tokenizer, no weights."""
    folder.mkdir()
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(ByteLevel.alphabet())]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    RobertaConfig(
        vocab_size=len(pieces),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=CONTEXT + 2,
        type_vocab_size=1,
        hidden_act="gelu",
    ).save_pretrained(folder)
    return folder


def draw_network(encoder: Path) -> PublishedNetwork:
    """Random weights that call each finding in some reports and not in others."""
    torch.manual_seed(3)
    network = PublishedNetwork(encoder).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "LayerNorm" not in name:
                parameter.normal_(std=0.3)
        network.classifier.bias -= compute_published_logits(network, encoder).mean(0)
    return network


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("radbert") / "encoder")


@pytest.fixture(scope="module")
def network(encoder: Path) -> PublishedNetwork:
    return draw_network(encoder)


def compute_published_logits(network: PublishedNetwork, encoder: Path) -> Tensor:
    """Logits as the published program computes them: lower case asked for, padded to 512."""
    tokenizer = AutoTokenizer.from_pretrained(encoder, do_lower_case=True)
    inputs = tokenizer(
        REPORTS, return_tensors="pt", max_length=CONTEXT, padding="max_length", truncation=True
    )
    with torch.inference_mode():
        return network(inputs["input_ids"], inputs["attention_mask"])


def test_the_converted_classifier_says_what_the_published_one_says(
    encoder: Path, network: PublishedNetwork, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, folder = tmp_path / "published.pth", tmp_path / "labeler"
    # Old versions of Transformers stored the positions too.
    positions = {"model.embeddings.position_ids": torch.arange(CONTEXT + 2)[None]}
    torch.save({**network.state_dict(), **positions}, weights)
    arguments = ["--encoder", str(encoder), "--out", str(folder)]
    assert cli.main(["weights", "convert-labeler", str(weights), *arguments]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(folder)
    assert (folder / "model.safetensors").is_file() and not list(folder.glob("*.bin"))

    expected = compute_published_logits(network, encoder)
    labeler = ClassifierLabeler(folder, device="cpu")
    assert labeler.max_tokens == CONTEXT
    assert len(labeler.tokenizer(REPORTS[0])["input_ids"]) == len(REPORTS[0]) + 2
    inputs = labeler.tokenizer(
        REPORTS, padding=True, truncation=True, max_length=CONTEXT, return_tensors="pt"
    )
    with torch.inference_mode():
        logits = labeler.network(**inputs).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)

    is_called = (expected >= 0).numpy()
    assert not (is_called.all(axis=0) | ~is_called.any(axis=0)).any()
    states = labeler.label_reports(REPORTS)
    assert np.array_equal(states == FindingState.PRESENT, is_called)
    assert list(labeler.network.config.id2label.values()) == list(FINDINGS)


Change = Callable[[dict[str, Any]], Any]


def rename(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("pooler.dense", "pooling"): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: {**tensors, "epoch": 3},
            r"holds more than tensors: found 'epoch' of type int",
        ),
        (
            lambda tensors: {"model": tensors, "optimizer": {}},
            r"holds more than tensors: found 'model' of type dict",
        ),
        (lambda tensors: list(tensors.values()), r"holds a list"),
        (lambda tensors: {**tensors, "path": Path("a")}, r"none of its code was run"),
        (
            lambda tensors: {k: v for k, v in tensors.items() if k != "classifier.bias"},
            r"18 outputs: missing classifier\.bias\.$",
        ),
        (
            lambda tensors: {**tensors, "head.weight": torch.zeros(2)},
            r"18 outputs: unexpected head\.weight\.$",
        ),
        (
            rename,
            r"missing model\.pooler\.dense\.weight, model\.pooler\.dense\.bias; "
            r"unexpected model\.pooling\.weight, model\.pooling\.bias\.$",
        ),
        (
            lambda tensors: {**tensors, "classifier.bias": torch.zeros(20)},
            r"of another shape classifier\.bias \[20\] instead of \[18\]\.$",
        ),
        (lambda tensors: {}, r"missing model\.embeddings.*, .*, .* and \d+ more\.$"),
    ],
)
def test_anything_but_the_classifiers_tensors_is_refused(
    change: Change, message: str, encoder: Path, network: PublishedNetwork, tmp_path: Path
) -> None:
    weights = tmp_path / "published.pth"
    torch.save(change(dict(network.state_dict())), weights)
    with pytest.raises(UserError, match=message):
        convert_text_classifier(weights, encoder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.folder,)


def test_no_code_of_the_file_is_run(encoder: Path, tmp_path: Path) -> None:
    weights, sprung = tmp_path / "published.pth", tmp_path / "sprung"
    torch.save({"classifier.weight": Trap(str(sprung))}, weights)
    with pytest.raises(UserError, match="none of its code was run"):
        convert_text_classifier(weights, encoder, tmp_path / "out")
    assert not sprung.exists()
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="or is damaged"):
        convert_text_classifier(weights, encoder, tmp_path / "out")


def test_wrong_folders_are_refused_in_one_sentence(
    encoder: Path, network: PublishedNetwork, tmp_path: Path
) -> None:
    weights = tmp_path / "published.pth"
    with pytest.raises(UserError, match=r"published\.pth is no file"):
        convert_text_classifier(weights, encoder, tmp_path / "out")
    torch.save(network.state_dict(), weights)
    with pytest.raises(UserError, match=r"has no config\.json: give a folder with"):
        convert_text_classifier(weights, tmp_path, tmp_path / "out")

    bert = write_encoder(tmp_path / "bert")
    BertConfig().save_pretrained(bert)
    with pytest.raises(UserError, match="holds a bert: expected the RoBERTa architecture"):
        convert_text_classifier(weights, bert, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(UserError, match="exists already: name a new folder"):
        convert_text_classifier(weights, encoder, tmp_path / "out")
    convert_text_classifier(weights, encoder, tmp_path / "new" / "out")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
