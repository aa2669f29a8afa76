"""A language model written packed: read as if it were packed now, by us and by Transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rectvlm import pretrained
from rectvlm.cli import main
from rectvlm.config import Config
from rectvlm.models.language_model import build_quantization_config, load_language_model
from rectvlm.models.pack_language_model import pack_language_model
from rectvlm.types import UserError


@pytest.fixture(scope="module")
def llama(models_folder: None) -> str:
    return pretrained.resolve_model("bundled:tiny-llama")


@pytest.fixture(scope="module")
def packed(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_language_model(llama, tmp_path_factory.mktemp("packed") / "tiny")


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: tensor.contiguous().view(-1).view(torch.uint8)
        for name, tensor in model.state_dict().items()
    }


def logits(config: Any, folder: str | Path) -> torch.Tensor:
    model = load_language_model(config, folder).model.train()
    with torch.no_grad():
        output: torch.Tensor = model(torch.arange(5, 25)[None]).logits
    return output


def test_it_trains_as_if_it_were_packed_at_the_start(
    tiny: Config, llama: str, packed: Path
) -> None:
    assert tiny.generator.quantization == "nf4"
    assert torch.equal(logits(tiny.generator, packed), logits(tiny.generator, llama))


def test_transformers_reads_it(tiny: Config, llama: str, packed: Path) -> None:
    quantization = build_quantization_config(
        tiny.generator.model_copy(update={"quant_storage": "uint8"})
    )
    expected = AutoModelForCausalLM.from_pretrained(
        llama, dtype=torch.bfloat16, quantization_config=quantization
    )
    found = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16)
    wanted, read = tensors(expected), tensors(found)
    assert wanted.keys() == read.keys()
    assert all(torch.equal(wanted[name], read[name]) for name in wanted)
    assert AutoTokenizer.from_pretrained(packed).chat_template


def test_each_layer_is_a_file(packed: Path) -> None:
    files = json.loads((packed / "model.safetensors.index.json").read_text())["weight_map"]
    layers: dict[str, set[str]] = {}
    for name, file in files.items():
        if ".layers." in name:
            layers.setdefault(file, set()).add(name.split(".layers.")[1].split(".")[0])
    assert len(layers) == 2 and all(len(numbers) == 1 for numbers in layers.values())
    stored = set()
    for file in set(files.values()):
        with safe_open(packed / file, "pt") as handle:
            stored |= set(handle.keys())
    assert stored == set(files)
    weights = [name for name in files if name.endswith("q_proj.weight")]
    with safe_open(packed / files[weights[0]], "pt") as handle:
        assert handle.get_tensor(weights[0]).dtype == torch.uint8


def test_tied_words_are_written_once(tiny: Config, llama: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(llama)),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "tied")
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "tied")
    out = pack_language_model(str(tmp_path / "tied"), tmp_path / "packed")
    files = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert "model.embed_tokens.weight" in files and "lm_head.weight" not in files
    assert torch.equal(logits(tiny.generator, out), logits(tiny.generator, tmp_path / "tied"))


def test_what_cannot_be_packed_is_one_sentence(llama: str, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="quantized already: use them as they are"):
        pack_language_model(str(packed), tmp_path / "again")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="exists already"):
        pack_language_model(llama, tmp_path / "full")
    with pytest.raises(UserError):
        pack_language_model(str(tmp_path / "nothing"), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_the_command_prints_the_folder(
    llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["weights", "pack", llama, "--out", str(tmp_path / "tiny")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "tiny")
