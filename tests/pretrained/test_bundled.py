"""Where a model reference leads."""

import multiprocessing
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from rectvlm import pretrained
from rectvlm.pretrained import bundled, catalog
from rectvlm.types import UserError


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of models."""
    monkeypatch.setenv("RECTVLM_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


def test_tiny_llama_is_built_once_and_loads(models: Path) -> None:
    folder = Path(pretrained.resolve_model("bundled:tiny-llama"))
    assert folder == models / "tiny-llama"
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert pretrained.resolve_model("bundled:tiny-llama") == str(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.chat_template
    text = "Findings: a nodule (12 ml) in the right upper lobe; HU −600."
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert sorted(path.name for path in models.iterdir() if not path.name.endswith(".lock")) == [
        "tiny-llama"
    ]


def test_bundled_random_weights_are_seeded(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    first = AutoModel.from_pretrained(pretrained.resolve_model("bundled:tiny-bert")).state_dict()
    monkeypatch.setenv("RECTVLM_MODELS", str(tmp_path / "again"))
    torch.manual_seed(2)
    second = AutoModel.from_pretrained(pretrained.resolve_model("bundled:tiny-bert")).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def _resolve(_: int) -> str:
    return pretrained.resolve_model("bundled:tiny-bert")


@pytest.mark.slow
def test_two_processes_at_once_prepare_one_model(models: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert set(pool.map(_resolve, range(4), chunksize=1)) == {str(models / "tiny-bert")}
    assert (models / "tiny-bert" / "model.safetensors").is_file()


def test_a_cut_off_preparation_is_begun_anew(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: Path) -> None:
        folder.mkdir()
        (folder / "tokenizer.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setitem(bundled.BUILDERS, "tiny-bert", broken)
    with pytest.raises(KeyboardInterrupt):
        pretrained.resolve_model("bundled:tiny-bert")
    assert not (models / "tiny-bert").exists()
    monkeypatch.undo()
    monkeypatch.setenv("RECTVLM_MODELS", str(models))
    assert (Path(pretrained.resolve_model("bundled:tiny-bert")) / "config.json").is_file()


def test_unknown_bundled_name_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'tiny-lama'.*bundled:tiny-llama"):
        pretrained.resolve_model("bundled:tiny-lama")


@pytest.mark.parametrize(
    "reference", ["/nowhere/at/all", "./nowhere", "~/nowhere-at-all", "some/deep/path"]
)
def test_missing_paths_say_what_was_expected(reference: str) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        pretrained.resolve_model(reference)


def test_folders_and_hub_ids_pass_through(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert pretrained.resolve_model(str(tmp_path)) == str(tmp_path)
    assert pretrained.resolve_model("organization/model") == "organization/model"
    with pytest.raises(UserError, match=r"config\.json"):
        pretrained.resolve_model(str(tmp_path.parent))


def test_every_bundled_name_has_a_builder() -> None:
    assert catalog.BUNDLED_MODELS.keys() == bundled.BUILDERS.keys()


def test_a_model_beside_the_run_is_used_from_any_folder(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = Path(pretrained.resolve_model("bundled:tiny-llama"))
    beside = tmp_path / "work/data/models/tiny-llama"
    beside.parent.mkdir(parents=True)
    prepared.rename(beside)
    checkpoint = tmp_path / "work/runs/tiny/phase3/checkpoints/step-000001"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.delenv("RECTVLM_MODELS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(elsewhere)
    assert pretrained.resolve_model("bundled:tiny-llama", checkpoint) == str(beside)
    built = pretrained.resolve_model("bundled:tiny-bert", checkpoint)
    assert built == str(tmp_path / "cache/rectvlm/models/tiny-bert")
    assert list(elsewhere.iterdir()) == []
    (elsewhere / "data/models").mkdir(parents=True)
    assert pretrained.resolve_model("bundled:tiny-bert") == "data/models/tiny-bert"
