"""Exported checkpoints and saved models: the same folder bit by bit, or none."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import named, write_nifti
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from rectvlm import RectVLM, cli, pretrained
from rectvlm.checkpoint import Checkpoint, TrainingState, checkpoint
from rectvlm.checkpoint.export import export_checkpoint
from rectvlm.checkpoint.integrity import find_faults
from rectvlm.checkpoint.strict_load import find_differing_tensors
from rectvlm.config import Config, ModelPart, load_config
from rectvlm.finding_thresholds import THRESHOLDS_FILE
from rectvlm.models import load_part
from rectvlm.models.language_model import build_quantization_config
from rectvlm.models.meta_model import build_meta_model
from rectvlm.models.prompt_embeddings import PromptEmbeddings
from rectvlm.predict.run import predict_cases
from rectvlm.types import UserError

MakeFolder = Callable[[int], Path]


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_a_checkpoint_travels_bitwise(
    trained_checkpoint: MakeFolder, exported: MakeFolder, phase: int, tmp_path: Path
) -> None:
    source, copy = Checkpoint.open(trained_checkpoint(phase)), Checkpoint.open(exported(phase))
    assert find_differing_tensors(copy.read_tensors(), source.read_tensors()) == []
    assert (copy.parts, copy.config, copy.training, copy.versions) == (
        source.parts,
        source.config,
        source.training,
        source.versions,
    )
    assert find_faults(copy.folder) == []
    again = RectVLM.from_checkpoint(copy, "cpu").save_pretrained(tmp_path / "again")
    for path in again.rglob("*"):
        name = path.relative_to(again)
        if path.is_file() and path.name != "README.md":
            assert path.read_bytes() == (copy.folder / name).read_bytes(), name


def test_an_export_leaves_the_optimizer_and_damaged_files_behind(
    copied: MakeFolder, tmp_path: Path
) -> None:
    folder = copied(2)
    (folder / "engine").mkdir()
    (folder / "engine" / "rank-00000-of-00001.safetensors").write_bytes(b"optimizer")
    copy = export_checkpoint(folder, tmp_path / "copy")
    assert not (copy / "engine").exists()
    path = folder / "localizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"localizer\.safetensors has another checksum"):
        export_checkpoint(folder, tmp_path / "damaged")
    assert not (tmp_path / "damaged").exists()


def test_peft_loads_the_adapter_alone_with_the_same_logits(
    exported: MakeFolder, full_model: RectVLM, tiny: Config
) -> None:
    def load_base() -> Any:
        folder = pretrained.resolve_model(tiny.generator.model)
        settings = build_quantization_config(tiny.generator)
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, quantization_config=settings
        ).eval()

    assert full_model.generator is not None
    ids = torch.arange(5, 29)[None]
    adapter = str(exported(3) / "adapter")
    with torch.no_grad():
        ours = full_model.generator.language_model(input_ids=ids).logits
        without_adapter = load_base()(input_ids=ids).logits
        narrow = PeftModel.from_pretrained(load_base(), adapter, autocast_adapter_dtype=False)
        theirs = narrow(input_ids=ids).logits
        widened = PeftModel.from_pretrained(load_base(), adapter)(input_ids=ids).logits
    assert torch.equal(theirs, ours)
    assert not torch.allclose(without_adapter, ours, atol=0.05)  # so the adapter has an effect
    torch.testing.assert_close(widened, ours, atol=0.02, rtol=0.02)


def save_altered_model(
    source: Path, parts: tuple[ModelPart, ...], setting: str, folder: Path
) -> RectVLM:
    """A model with one setting unlike `tiny` and the prompts of `source`, saved as a checkpoint."""
    config = load_config("tiny", [setting])
    tensors = Checkpoint.open(source).read_tensors()
    model = RectVLM(config, parts, PromptEmbeddings.from_tensors(tensors, source))
    if model.encoder.atlas is not None:
        model.encoder.fit_atlas(
            torch.randint(-1000, 400, config.data.grid) for _ in range(config.encoder.atlas_cases)
        )
    model.save_pretrained(folder)
    return model


def test_the_atlas_travels_with_the_encoder(trained_checkpoint: MakeFolder, tmp_path: Path) -> None:
    parts: tuple[ModelPart, ...] = ("encoder", "classifier", "localizer")
    setting = "encoder.atlas_cases=2"
    model = save_altered_model(trained_checkpoint(2), parts, setting, tmp_path / "saved")
    atlas = model.encoder.atlas
    assert atlas is not None
    assert atlas.any()
    export_checkpoint(tmp_path / "saved", tmp_path / "exported")
    for folder in (tmp_path / "saved", tmp_path / "exported"):
        encoder = load_part(folder, "encoder", "cpu")
        model = RectVLM.from_pretrained(folder, "cpu")
        assert torch.equal(encoder.get_buffer("atlas"), atlas)
        assert torch.equal(model.encoder.get_buffer("atlas"), atlas)
        load_part(folder, "localizer", "cpu")


def test_findings_that_use_lesion_volumes_need_the_localizer(
    trained_checkpoint: MakeFolder, tmp_path: Path
) -> None:
    """Without it a summand of the logits would be missing, and nothing would say so."""
    two: tuple[ModelPart, ...] = ("encoder", "classifier")
    three: tuple[ModelPart, ...] = (*two, "localizer")
    setting = "localizer.volumes_to_findings=true"
    save_altered_model(trained_checkpoint(2), three, setting, tmp_path / "saved")
    with pytest.raises(
        UserError, match=r"localizer\.volumes_to_findings.*add the localizer to parts"
    ) as caught:
        RectVLM.from_pretrained(tmp_path / "saved", "cpu", parts=two)
    assert "\n" not in str(caught.value)
    model = RectVLM.from_pretrained(tmp_path / "saved", "cpu", parts=three)
    assert model.localizer is not None
    save_altered_model(trained_checkpoint(1), two, setting, tmp_path / "before")
    assert RectVLM.from_pretrained(tmp_path / "before", "cpu", parts=two).localizer is None


def test_prediction_from_the_export_is_that_of_the_checkpoint(
    trained_checkpoint: MakeFolder,
    exported: MakeFolder,
    phantoms: Callable[[int], Any],
    tmp_path: Path,
) -> None:
    file = write_nifti(phantoms(1).hu, phantoms(1).affine, tmp_path / "chest.nii.gz")
    sources = (trained_checkpoint(3), exported(3))
    cases, summaries = [], []
    for number, source in enumerate(sources):
        case = predict_cases(file, source, tmp_path / str(number), "cpu")[0]
        summary = json.loads((case / "findings.json").read_text())
        assert summary.pop("checkpoint") == str(source)
        cases.append(case)
        summaries.append(summary)
    assert summaries[0] == summaries[1]
    assert summaries[0]["step"] == 7
    assert all(row["threshold"] == 0.5 for row in summaries[1]["findings"].values())
    for name in ("lesions.nii.gz", "report.txt"):
        assert (cases[0] / name).read_bytes() == (cases[1] / name).read_bytes()


def test_a_folder_is_not_written_over_unasked(full_model: RectVLM, copied: MakeFolder) -> None:
    folder = copied(3)
    (folder / "LICENSE").write_text("theirs")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="exists and is not empty"):
        full_model.save_pretrained(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    (folder / THRESHOLDS_FILE).write_text("of the model that was there before")
    full_model.save_pretrained(folder, overwrite=True)
    assert (folder / "LICENSE").read_text() == "theirs"
    thresholds = Checkpoint.open(folder).read_thresholds()
    assert thresholds.as_dict() == full_model.thresholds.as_dict()
    tensors = Checkpoint.open(folder).read_tensors()
    assert find_differing_tensors(tensors, named(full_model, tensors)) == []
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_failing_disk_leaves_nothing(
    full_model: RectVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_with_error(tensors: dict[str, Tensor], path: Path) -> None:
        spoilt = {name: x.clone() + (name == "encoder.whole") for name, x in tensors.items()}
        save_file(spoilt, path)

    monkeypatch.setattr(checkpoint, "_save_tensors", save_with_error)
    with pytest.raises(UserError, match=r"does not hold what was written to it \(encoder\.whole\)"):
        full_model.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_values_is_refused_unless_they_are_given(
    trained_checkpoint: MakeFolder, full_model: RectVLM, tiny: Config, tmp_path: Path
) -> None:
    source = Checkpoint.open(trained_checkpoint(2))
    tensors = source.read_tensors()
    width = tensors["prompts.present"].shape[1]
    meta_model = build_meta_model(tiny, source.parts, width, None)
    with pytest.raises(UserError, match="state_dict"):
        meta_model.save_pretrained(tmp_path / "out")
    rest = {name: tensor for name, tensor in tensors.items() if name != "encoder.whole"}
    with pytest.raises(UserError, match=r"missing: encoder\.whole"):
        meta_model.save_pretrained(tmp_path / "out", state_dict=rest)
    meta_model.save_pretrained(tmp_path / "out", state_dict=tensors)
    saved = Checkpoint.open(tmp_path / "out")
    assert find_differing_tensors(saved.read_tensors(), tensors) == []
    assert saved.training == TrainingState(phase=2, step=0, samples_seen=0, world_size=1)
    names = full_model.checkpoint_tensor_names()
    for parameter in full_model.parameters():
        parameter.requires_grad_(False)
    assert full_model.checkpoint_tensor_names() == names  # also where nothing trains


def test_the_command_exports(
    trained_checkpoint: MakeFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = str(trained_checkpoint(1)), tmp_path / "out"
    command = ["export", "--out", str(out), "--license", "mit"]
    command += ["--dataset", "OWNER/DATASET", "--checkpoint"]
    assert cli.main([*command, source]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    tensors = Checkpoint.open(out).read_tensors()
    assert find_differing_tensors(tensors, Checkpoint.open(source).read_tensors()) == []
    assert cli.main([*command, source]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main([*command, source, "--overwrite"]) == 0
    assert cli.main([*command, str(tmp_path)]) == 2
    others = tmp_path / "others"
    others.mkdir()
    (others / "README.md").write_text("mine")
    command[command.index(str(out))] = str(others)
    assert cli.main([*command, source, "--overwrite"]) == 2
    assert "holds no model" in capsys.readouterr().err
    assert (others / "README.md").read_text() == "mine"
