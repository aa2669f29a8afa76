"""Models of a configuration that cannot be had or read end in one sentence, in training too."""

import subprocess
import sys
from pathlib import Path

import hub_server
import launches
import pytest
import torch
from huggingface_hub import constants
from transformers import BertConfig, BertModel, T5Config

from rectvlm.config import load_config
from rectvlm.models.language_model import load_language_model
from rectvlm.models.prompt_embeddings import PromptEmbeddings
from rectvlm.pretrained import read_model_config, require_model, resolve_model
from rectvlm.types import UserError


@pytest.fixture(autouse=True)
def use_stand_in(hub: hub_server.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask the stand-in wherever no address is given."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def test_a_gated_model_says_what_to_accept(hub: hub_server.Hub) -> None:
    hub.add("meta/gated", {"config.json": b"{}"}, gated=True)
    for ask in (require_model, read_model_config):
        with pytest.raises(UserError, match="meta/gated is gated: accept its terms"):
            ask("meta/gated")


def test_a_misspelt_model_says_that_there_is_none(hub: hub_server.Hub) -> None:
    with pytest.raises(UserError, match=r"No repository some/tpyo at .* check the spelling"):
        require_model("some/tpyo")


@pytest.mark.parametrize("content", ['{"model_type": ', '{"model_type": "not-made-yet"}', "{}"])
def test_a_configuration_that_is_damaged_or_unknown_is_one_sentence(
    tmp_path: Path, content: str
) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=f"The model {tmp_path} cannot be loaded"):
        require_model(str(tmp_path))


@pytest.mark.parametrize("damaged", ["tokenizer.json", "model.safetensors"])
def test_a_damaged_text_encoder_is_one_sentence(tmp_path: Path, damaged: str) -> None:
    source = Path(resolve_model("bundled:tiny-bert"))
    for path in source.iterdir():
        content = path.read_bytes()
        half = content[: len(content) // 2]
        (tmp_path / path.name).write_bytes(half if path.name == damaged else content)
    with pytest.raises(UserError, match=f"The model {tmp_path} cannot be loaded"):
        PromptEmbeddings.from_text_encoder(tmp_path, 16)


def test_a_language_model_without_files_or_of_another_kind_is_one_sentence(tmp_path: Path) -> None:
    config = load_config("tiny").generator
    T5Config(d_model=8).save_pretrained(tmp_path / "t5")
    with pytest.raises(UserError, match="t5 has no chat template"):
        load_language_model(config, tmp_path / "t5", torch.device("cpu"))
    for path in Path(resolve_model("bundled:tiny-llama")).iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="cannot be loaded"):
        load_language_model(config, tmp_path, torch.device("cpu"))


def test_a_model_of_a_hub_is_within_reach(hub: hub_server.Hub, tmp_path: Path) -> None:
    width = 8
    config = BertConfig(hidden_size=width, num_hidden_layers=1, num_attention_heads=1)
    BertModel(config).save_pretrained(tmp_path / "bert")
    hub.add("some/bert", hub_server.read_files(tmp_path / "bert"))
    assert require_model("some/bert") == "some/bert"
    assert read_model_config("some/bert").hidden_size == width


@pytest.mark.slow
def test_training_ends_with_the_sentence_and_code_2(tmp_path: Path, phantom_shards: Path) -> None:
    arguments = launches.settings(1, phantom_shards, tmp_path / "runs")
    process = subprocess.run(
        [sys.executable, "launch/phase1.py", *arguments, "text.model=nobody/none"],
        cwd=launches.CHECKOUT,
        env=launches.environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2
    assert "error: nobody/none is neither a folder here nor" in process.stderr
    assert "Traceback" not in process.stderr
