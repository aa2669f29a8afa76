"""The checkpoint format: written, read back, and refused with names."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import named
from safetensors.torch import load_file, save_file
from torch import Tensor

from rectvlm import RectVLM
from rectvlm.checkpoint import Checkpoint, TrainingState
from rectvlm.checkpoint.integrity import hash_files, write_manifest
from rectvlm.checkpoint.strict_load import find_differing_tensors
from rectvlm.config import Config
from rectvlm.labels import FINDINGS
from rectvlm.machine import package_versions
from rectvlm.models import language_model, load_part
from rectvlm.types import UserError

MakeFolder = Callable[[int], Path]
EACH_PHASE = pytest.mark.parametrize("phase", [1, 2, 3])
ADAPTER_WEIGHTS = "adapter/adapter_model.safetensors"


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_write_and_read_back(tmp_path: Path, tiny: Config) -> None:
    tensors = {
        "encoder.weight": torch.randn(3, 4).T,  # not contiguous
        "classifier.bias": torch.randn(2).bfloat16(),
        "prompts.present": torch.randn(18, 2),
    }
    training = TrainingState(phase=1, step=7, samples_seen=28, world_size=2)
    written = Checkpoint(tmp_path, ("encoder", "classifier"), tiny, training, package_versions())
    paths = written.write_files(tensors, None)
    assert {path.name for path in paths} == {path.name for path in tmp_path.iterdir()}
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint == written
    assert find_differing_tensors(checkpoint.read_tensors(), tensors) == []
    assert checkpoint.read_tensors(["encoder"]).keys() == {"encoder.weight", "prompts.present"}
    assert checkpoint.count_parameters() == {"encoder": 12, "classifier": 2}


def test_the_folder_holds_a_file_per_part(exported: MakeFolder) -> None:
    folder = exported(3)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "config.json",
        "encoder.safetensors",
        "classifier.safetensors",
        "localizer.safetensors",
        "generator.safetensors",
        "prompts.safetensors",
        "adapter/adapter_config.json",
        ADAPTER_WEIGHTS,
        "thresholds.json",
        "README.md",
        "manifest.json",
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "rectvlm"
    assert config["labels"]["findings"] == list(FINDINGS)
    assert config["config"]["name"] == "tiny"
    assert config["versions"]["torch"]
    for path in folder.glob("*.safetensors"):
        names = load_file(path)
        assert {name.partition(".")[0] for name in names} == {path.stem}
        assert not any("lora" in name for name in names)
    assert len({path.stat().st_mode for path in folder.rglob("*") if path.is_file()}) == 1


@EACH_PHASE
def test_the_loaded_model_has_the_tensors_of_the_checkpoint(
    trained_checkpoint: MakeFolder, phase: int
) -> None:
    checkpoint = Checkpoint.open(trained_checkpoint(phase))
    tensors = checkpoint.read_tensors()
    model = RectVLM.from_checkpoint(checkpoint, "cpu")
    assert not model.training
    assert model.parts == checkpoint.parts
    assert set(model.checkpoint_tensor_names()) == set(tensors)
    assert find_differing_tensors(named(model, tensors), tensors) == []
    (checkpoint.folder / "thresholds.json").touch()  # has no entry in the manifest


def test_parts_load_alone(
    copied: MakeFolder, trained_checkpoint: MakeFolder, full_model: RectVLM
) -> None:
    folder = copied(3)
    shutil.rmtree(folder / "adapter")
    for part in ("localizer", "generator"):
        (folder / f"{part}.safetensors").unlink()
    for source in (folder, trained_checkpoint(3)):
        model = RectVLM.from_pretrained(source, "cpu", parts=("encoder", "classifier"))
        assert (model.localizer, model.generator) == (None, None)
        names = model.checkpoint_tensor_names()
        assert find_differing_tensors(named(model, names), named(full_model, names)) == []
    for part in ("encoder", "localizer"):
        module = load_part(trained_checkpoint(3), part, "cpu")  # type: ignore[arg-type]
        whole = full_model.get_submodule(part)
        assert type(module) is type(whole)
        names = [name for name, _ in module.named_parameters()]
        assert names
        assert find_differing_tensors(named(module, names), named(whole, names)) == []


def test_the_language_model_goes_where_it_is_asked_to(
    exported: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not to the default device first, which on every rank of an evaluation is the first GPU."""

    def refuse(_: Any) -> torch.device:
        raise AssertionError("no one asked for the default device")

    monkeypatch.setattr(language_model, "_default_device", refuse)
    assert RectVLM.from_pretrained(exported(3), "cpu").generator is not None
    load_part(exported(3), "generator", "cpu")


@pytest.mark.parametrize(
    ("phase", "parts", "message"),
    [
        (1, ("encoder", "classifier", "localizer"), "has no localizer"),
        (3, ("encoder",), "load_part"),
        (3, ("encoder", "classifier", "generator"), "need the localizer"),
    ],
)
def test_parts_that_make_no_model_are_refused(
    exported: MakeFolder, phase: int, parts: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        RectVLM.from_pretrained(exported(phase), "cpu", parts=parts)
    with pytest.raises(UserError, match="has no generator"):
        load_part(exported(1), "generator")


def test_tensors_that_do_not_fit_are_named(unlisted: MakeFolder) -> None:
    folder = unlisted(3)

    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors["encoder.whole"]
        tensors["decoder.weight"] = torch.zeros(1)

    edit_tensors(folder / "encoder.safetensors", spoil)
    edit_tensors(
        folder / "classifier.safetensors",
        lambda tensors: tensors.update({"classifier.bias": torch.zeros(3)}),
    )
    edit_tensors(
        folder / ADAPTER_WEIGHTS,
        lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.zeros(1)}),
    )
    with pytest.raises(UserError) as caught:
        RectVLM.from_pretrained(folder, "cpu")
    message = str(caught.value)
    assert "missing: encoder.whole" in message
    stranger = "generator.language_model.base_model.model.lm_head.weight"
    assert f"unexpected: decoder.weight, {stranger}" in message
    assert "classifier.bias (3,) instead of (18,)" in message
    with pytest.raises(UserError, match=r"unexpected: decoder\.weight"):
        RectVLM.from_pretrained(folder, "cpu", parts=("encoder", "classifier"))
    edit_tensors(folder / "prompts.safetensors", lambda tensors: tensors.pop("prompts.present"))
    with pytest.raises(UserError, match=r"lack 'prompts\.present'"):
        RectVLM.from_pretrained(folder, "cpu")


def test_a_missing_adapter_tensor_is_named(unlisted: MakeFolder) -> None:
    folder = unlisted(3)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    edit_tensors(folder / ADAPTER_WEIGHTS, lambda tensors: tensors.pop(name))
    with pytest.raises(
        UserError,
        match=r"missing: generator\..*layers\.0\.self_attn\.q_proj\.lora_A\.default\.weight",
    ):
        RectVLM.from_pretrained(folder, "cpu")


@pytest.mark.parametrize(
    "change", [{"r": 8}, {"lora_alpha": 16}, {"peft_type": "IA3"}, {"use_rslora": True}]
)
def test_an_adapter_that_peft_would_read_differently_is_refused(
    unlisted: MakeFolder, change: dict[str, Any]
) -> None:
    folder = unlisted(3)
    edit_json(folder / "adapter/adapter_config.json", **change)
    key = next(iter(change))
    with pytest.raises(UserError, match=f"adapter_config.json does not fit config.json: {key}"):
        RectVLM.from_pretrained(folder, "cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model of type 'llama', not 'rectvlm'"),
        ({"format": 99}, "format 99"),
        ({"parts": ["encoder", "decoder"]}, r"damaged: parts\.1"),
        ({"training": {"phase": 1}}, "damaged: training"),
        ({"surprise": 1}, "damaged: surprise"),
        ({"labels": {"findings": sorted(FINDINGS)}}, "lists other findings"),
        ({"config": {}}, "missing key 'encoder'"),
    ],
)
def test_another_configuration_is_refused(
    copied: MakeFolder, change: dict[str, Any], message: str
) -> None:
    folder = copied(1)
    edit_json(folder / "config.json", **change)
    with pytest.raises(UserError, match=message) as caught:
        RectVLM.from_pretrained(folder, "cpu")
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("is_listed", [True, False])
@pytest.mark.parametrize(
    "file", ["config.json", "encoder.safetensors", "adapter/adapter_config.json", ADAPTER_WEIGHTS]
)
@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "list"])
def test_damaged_files_are_named(
    copied: MakeFolder, file: str, damage: str, is_listed: bool
) -> None:
    folder = copied(3)
    path = folder / file
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-40], "empty": b"", "gone": b"", "list": b"[1]"}[damage])
    if damage == "gone":
        path.unlink()
    if not is_listed:
        (folder / "manifest.json").unlink()
    with pytest.raises(UserError) as caught:
        RectVLM.from_pretrained(folder, "cpu")
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)


def test_weights_that_disagree_with_the_manifest_are_not_read(copied: MakeFolder) -> None:
    folder = copied(1)
    edit_tensors(folder / "encoder.safetensors", lambda tensors: tensors["encoder.whole"].add_(1))
    with pytest.raises(UserError, match=r"encoder\.safetensors has another checksum"):
        Checkpoint.open(folder).read_tensors()
    assert Checkpoint.open(folder).folder == folder
    write_manifest(folder, hash_files(folder, ["config.json"]))
    with pytest.raises(UserError, match=r"encoder\.safetensors is not listed in manifest\.json"):
        Checkpoint.open(folder).read_tensors(["encoder"])


class PickleTrap:
    """A pickle that leaves a mark where it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_pickles_are_never_opened(unlisted: MakeFolder, tmp_path: Path) -> None:
    folder, mark = unlisted(3), tmp_path / "opened"
    traps = [folder / "pytorch_model.bin", folder / "encoder.pt", folder / "adapter/model.bin"]
    for path in traps:
        torch.save(PickleTrap(mark), path)
    RectVLM.from_pretrained(folder, "cpu")
    (folder / ADAPTER_WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is missing"):
        RectVLM.from_pretrained(folder, "cpu")
    (folder / "encoder.safetensors").unlink()
    with pytest.raises(UserError, match=r"pytorch_model\.bin, a pickle, which is never read"):
        RectVLM.from_pretrained(folder, "cpu")
    assert not mark.exists()
    torch.load(traps[0], weights_only=False)
    assert mark.exists()  # the trap works
