"""Models as folders in the layout of Hugging Face: written, reopened, and refused with names."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hub_server
import pytest
import torch
from conftest import write_nifti
from huggingface_hub import ModelCard, constants
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import rectvlm
from rectvlm import RectVLM, cli, models, pretrained
from rectvlm.checkpoint import hub, model_folder, run_checkpoint
from rectvlm.config import Config, ModelPart, load_config
from rectvlm.labels import FINDINGS
from rectvlm.models import language_model
from rectvlm.models.language_model import build_quantization_config
from rectvlm.models.meta_model import build_meta_model
from rectvlm.predict.run import predict_cases
from rectvlm.types import UserError

EACH_PHASE = pytest.mark.parametrize("phase", [1, 2, 3])
EXPORTED = Callable[[int], Path]


@pytest.fixture(scope="module")
def runs(tiny_run: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> EXPORTED:
    """Checkpoints of tiny models in which no tensor is what a new model would have; LoRA starts with zeros."""
    root = tmp_path_factory.mktemp("moved")

    def make(phase: int) -> Path:
        folder = root / f"phase{phase}" / "checkpoints" / "step-000007"
        if not folder.exists():
            shutil.copytree(run_checkpoint.find_checkpoint(tiny_run(phase), ""), folder)
            torch.manual_seed(phase)
            tensors = load_file(folder / run_checkpoint.WEIGHTS_FILE)
            moved = {
                name: (x.float() + 0.05 * torch.randn(x.shape)).to(x.dtype)
                for name, x in tensors.items()
            }
            save_file(moved, folder / run_checkpoint.WEIGHTS_FILE)
            state = json.loads((folder / run_checkpoint.STATE_FILE).read_text()) | {
                "step": 7,
                "samples_seen": 28,
            }
            (folder / run_checkpoint.STATE_FILE).write_text(json.dumps(state))
            (folder / run_checkpoint.THRESHOLDS_FILE).write_text(
                json.dumps({"values": dict.fromkeys(FINDINGS, 0.5)})
            )
        return folder

    return make


@pytest.fixture(scope="module")
def exported(runs: EXPORTED, tmp_path_factory: pytest.TempPathFactory) -> EXPORTED:
    """Those checkpoints as folders; not to be changed."""
    root = tmp_path_factory.mktemp("exported")

    def make(phase: int) -> Path:
        folder = root / f"phase{phase}"
        return folder if folder.exists() else hub.export_checkpoint(runs(phase), folder)

    return make


@pytest.fixture
def copied(exported: EXPORTED, tmp_path: Path) -> EXPORTED:
    """Those folders, to be changed."""
    return lambda phase: shutil.copytree(exported(phase), tmp_path / f"phase{phase}")


@pytest.fixture(scope="module")
def whole(exported: EXPORTED) -> RectVLM:
    """The model with all parts."""
    return RectVLM.from_pretrained(exported(3), "cpu")


def own(model: torch.nn.Module, names: Any) -> dict[str, Tensor]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensors[name].detach() for name in names}


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@EACH_PHASE
def test_a_checkpoint_travels_bitwise(
    runs: EXPORTED, exported: EXPORTED, phase: int, tmp_path: Path
) -> None:
    source, folder = run_checkpoint.read_weights(runs(phase)), exported(phase)
    assert model_folder.find_differing_tensors(run_checkpoint.read_weights(folder), source) == []
    model = RectVLM.from_pretrained(folder, "cpu")
    assert isinstance(model, RectVLM)
    assert not model.training
    assert model.parts == run_checkpoint.read_training_state(runs(phase)).parts
    assert (
        set(hub.exported_tensor_names(model))
        == set(source)
        == set(run_checkpoint.checkpoint_tensor_names(model))
    )
    assert model_folder.find_differing_tensors(own(model, source), source) == []
    assert run_checkpoint.read_config(folder) == run_checkpoint.read_config(runs(phase))
    assert run_checkpoint.read_training_state(folder) == run_checkpoint.read_training_state(
        runs(phase)
    )
    assert (folder / model_folder.ADAPTER_FOLDER).exists() == (phase == 3)

    again = model.save_pretrained(tmp_path / "again")
    for path in [
        path.relative_to(again) for path in again.rglob("*") if path.name != model_folder.CARD_FILE
    ]:
        assert (again / path).is_dir() or (again / path).read_bytes() == (
            folder / path
        ).read_bytes(), path


def test_the_layout_is_that_of_hugging_face(exported: EXPORTED) -> None:
    folder = exported(3)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    adapter = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert files == {"config.json", "model.safetensors", "thresholds.json", "README.md", *adapter}
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "rectvlm"
    assert config["labels"]["findings"] == list(FINDINGS)
    assert config["config"]["name"] == "tiny"
    assert config["versions"]["torch"]
    prefixes = {name.partition(".")[0] for name in load_file(folder / "model.safetensors")}
    assert prefixes == {"encoder", "classifier", "localizer", "generator", "prompts"}
    assert all("lora" not in name for name in load_file(folder / "model.safetensors"))
    assert len({path.stat().st_mode for path in folder.rglob("*") if path.is_file()}) == 1


def test_peft_loads_the_adapter_alone_with_the_same_logits(
    exported: EXPORTED, whole: RectVLM, tiny: Config
) -> None:
    def base() -> Any:
        folder = pretrained.resolve_model(tiny.generator.model)
        settings = build_quantization_config(tiny.generator)
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, quantization_config=settings
        ).eval()

    assert whole.generator is not None
    ids = torch.arange(5, 29)[None]
    adapter = str(exported(3) / "adapter")
    with torch.no_grad():
        ours = whole.generator.language_model(input_ids=ids).logits
        alone = base()(input_ids=ids).logits
        theirs = PeftModel.from_pretrained(base(), adapter, autocast_adapter_dtype=False)(
            input_ids=ids
        ).logits
        widened = PeftModel.from_pretrained(base(), adapter)(input_ids=ids).logits
    assert torch.equal(theirs, ours)
    assert not torch.allclose(alone, ours, atol=0.05)  # so the adapter says something
    torch.testing.assert_close(widened, ours, atol=0.02, rtol=0.02)


def test_large_weights_are_split_and_read_back(whole: RectVLM, tmp_path: Path) -> None:
    folder = whole.save_pretrained(tmp_path / "split", max_shard_size="100KB")
    shards = sorted(path.name for path in folder.glob("model-*.safetensors"))
    index = json.loads((folder / model_folder.INDEX_FILE).read_text())
    assert len(shards) > 3
    assert set(index["weight_map"].values()) == set(shards)
    assert not (folder / model_folder.WEIGHTS_FILE).exists()
    names = hub.exported_tensor_names(whole)
    assert (
        model_folder.find_differing_tensors(run_checkpoint.read_weights(folder), own(whole, names))
        == []
    )

    one = RectVLM.from_pretrained(folder, "cpu", parts=("encoder", "classifier"))
    assert (
        model_folder.find_differing_tensors(
            own(one, hub.exported_tensor_names(one)), own(whole, hub.exported_tensor_names(one))
        )
        == []
    )
    edit_tensors(folder / shards[0], lambda tensors: tensors.update(stranger=torch.zeros(1)))
    with pytest.raises(UserError, match="disagree about stranger"):
        RectVLM.from_pretrained(folder, "cpu")
    (folder / shards[0]).unlink()
    with pytest.raises(UserError, match=shards[0]):
        RectVLM.from_pretrained(folder, "cpu")
    with pytest.raises(UserError, match="'five'"):
        whole.save_pretrained(tmp_path / "odd", max_shard_size="five")
    assert not (tmp_path / "odd").exists()


def test_parts_load_alone(copied: EXPORTED, runs: EXPORTED, whole: RectVLM) -> None:
    folder = copied(3)
    shutil.rmtree(folder / model_folder.ADAPTER_FOLDER)  # not needed without the generator
    two: tuple[Any, ...] = ("encoder", "classifier")
    for source in (folder, runs(3)):
        model = RectVLM.from_pretrained(source, "cpu", parts=two)
        assert (model.localizer, model.generator) == (None, None)
        assert (
            model_folder.find_differing_tensors(
                own(model, hub.exported_tensor_names(model)),
                own(whole, hub.exported_tensor_names(model)),
            )
            == []
        )
    for part in ("encoder", "localizer"):
        module = hub.load_part(folder, part, "cpu")
        names = [name for name, _ in module.named_parameters()]
        assert type(module) is type(whole.get_submodule(part))
        assert names
        assert (
            model_folder.find_differing_tensors(
                own(module, names), own(whole.get_submodule(part), names)
            )
            == []
        )


def altered(source: Path, parts: tuple[ModelPart, ...], setting: str, run: Path) -> RectVLM:
    """A model with another setting than `tiny`, with its checkpoint in the folder `run`; prompts are of `source`."""
    config = load_config("tiny", [setting])
    model = RectVLM(
        config,
        parts,
        run_checkpoint.prompts_from_tensors(run_checkpoint.read_weights(source), source),
    )
    if model.encoder.atlas is not None:
        model.encoder.fit_atlas(
            torch.randint(-1000, 400, config.data.grid) for _ in range(config.encoder.atlas_cases)
        )
    run.mkdir()
    state = run_checkpoint.TrainingState(
        len(parts) - 1, parts, 0, 0, 1, run_checkpoint.package_versions()
    )
    run_checkpoint.write_checkpoint(
        run, own(model, run_checkpoint.checkpoint_tensor_names(model)), config, state
    )
    return model


def test_the_atlas_travels_with_the_encoder(runs: EXPORTED, tmp_path: Path) -> None:
    model = altered(
        runs(2), ("encoder", "classifier", "localizer"), "encoder.atlas_cases=2", tmp_path / "run"
    )
    atlas = model.encoder.atlas
    assert atlas is not None
    assert atlas.any()
    for folder in (
        tmp_path / "run",
        hub.export_checkpoint(tmp_path / "run", tmp_path / "exported"),
        model.save_pretrained(tmp_path / "saved"),
    ):
        alone, in_model = (
            hub.load_part(folder, "encoder", "cpu"),
            RectVLM.from_pretrained(folder, "cpu").encoder,
        )
        assert torch.equal(alone.get_buffer("atlas"), atlas)
        assert torch.equal(in_model.get_buffer("atlas"), atlas)
        hub.load_part(folder, "localizer", "cpu")


def test_findings_that_the_localizer_informs_need_it(runs: EXPORTED, tmp_path: Path) -> None:
    """Without it a summand of the logits would be missing, and nothing would say so."""
    two: tuple[ModelPart, ...] = ("encoder", "classifier")
    model = altered(
        runs(2), (*two, "localizer"), "localizer.volumes_to_findings=true", tmp_path / "run"
    )
    for folder in (tmp_path / "run", model.save_pretrained(tmp_path / "saved")):
        with pytest.raises(
            UserError, match=r"localizer\.volumes_to_findings.*add the localizer to parts"
        ) as caught:
            RectVLM.from_pretrained(folder, "cpu", parts=two)
        assert "\n" not in str(caught.value)
        assert (
            RectVLM.from_pretrained(folder, "cpu", parts=(*two, "localizer")).localizer is not None
        )
    altered(runs(1), two, "localizer.volumes_to_findings=true", tmp_path / "before")
    assert RectVLM.from_pretrained(tmp_path / "before", "cpu", parts=two).localizer is None


def test_the_language_model_goes_where_it_is_asked_to(
    runs: EXPORTED, exported: EXPORTED, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not to the default device first, which on every rank of an evaluation is the first GPU."""
    run, folder = runs(3), exported(3)

    def refuse(_: Any) -> torch.device:
        raise AssertionError("no one asked for the default device")

    monkeypatch.setattr(language_model, "_default_device", refuse)
    assert run_checkpoint.load_model(run, "cpu")[0].generator is not None
    assert RectVLM.from_pretrained(folder, "cpu").generator is not None
    hub.load_part(folder, "generator", "cpu")


@pytest.mark.parametrize(
    ("phase", "parts", "said"),
    [
        (1, ("encoder", "classifier", "localizer"), "has no localizer"),
        (3, ("encoder",), "load_part"),
        (3, ("encoder", "classifier", "generator"), "need the localizer"),
    ],
)
def test_parts_that_make_no_model(exported: EXPORTED, phase: int, parts: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        RectVLM.from_pretrained(exported(phase), "cpu", parts=parts)
    with pytest.raises(UserError, match="has no generator"):
        hub.load_part(exported(1), "generator")


def test_keys_that_do_not_fit_are_named(copied: EXPORTED) -> None:
    folder = copied(3)

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["encoder.whole"]
        tensors["decoder.weight"] = torch.zeros(1)
        tensors["classifier.bias"] = torch.zeros(3)

    edit_tensors(folder / model_folder.WEIGHTS_FILE, change)
    edit_tensors(
        folder / model_folder.ADAPTER_FOLDER / model_folder.ADAPTER_WEIGHTS_FILE,
        lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.zeros(1)}),
    )
    with pytest.raises(UserError) as caught:
        RectVLM.from_pretrained(folder, "cpu")
    message = str(caught.value)
    assert "missing: encoder.whole" in message
    assert (
        "unexpected: decoder.weight, generator.language_model.base_model.model.lm_head.weight"
        in message
    )
    assert "classifier.bias (3,) instead of (18,)" in message
    with pytest.raises(UserError, match=r"unexpected: decoder\.weight"):
        RectVLM.from_pretrained(folder, "cpu", parts=("encoder", "classifier"))


def test_a_missing_adapter_tensor_is_named(copied: EXPORTED) -> None:
    folder = copied(3)
    edit_tensors(
        folder / model_folder.ADAPTER_FOLDER / model_folder.ADAPTER_WEIGHTS_FILE,
        lambda tensors: tensors.pop(
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        ),
    )
    with pytest.raises(
        UserError,
        match=r"missing: generator\..*layers\.0\.self_attn\.q_proj\.lora_A\.default\.weight",
    ):
        RectVLM.from_pretrained(folder, "cpu")


@pytest.mark.parametrize(
    "change", [{"r": 8}, {"lora_alpha": 16}, {"peft_type": "IA3"}, {"use_rslora": True}]
)
def test_an_adapter_that_peft_would_read_differently_is_refused(
    copied: EXPORTED, change: dict[str, Any]
) -> None:
    folder = copied(3)
    edit(folder / model_folder.ADAPTER_FOLDER / model_folder.ADAPTER_CONFIG_FILE, **change)
    with pytest.raises(
        UserError, match=f"adapter_config.json does not fit config.json: {next(iter(change))}"
    ):
        RectVLM.from_pretrained(folder, "cpu")


@pytest.mark.parametrize(
    ("change", "said"),
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
    copied: EXPORTED, change: dict[str, Any], said: str
) -> None:
    folder = copied(1)
    edit(folder / model_folder.CONFIG_FILE, **change)
    with pytest.raises(UserError, match=said) as caught:
        RectVLM.from_pretrained(folder, "cpu")
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "file", ["config.json", "model.safetensors", "adapter/adapter_config.json"]
)
@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "list"])
def test_damaged_files_are_named(copied: EXPORTED, file: str, damage: str) -> None:
    path = copied(3) / file
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-40], "empty": b"", "gone": b"", "list": b"[1]"}[damage])
    if damage == "gone":
        path.unlink()
    with pytest.raises(UserError) as caught:
        RectVLM.from_pretrained(path.parents[len(Path(file).parts) - 1], "cpu")
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)


def test_an_index_that_leads_elsewhere_is_refused(copied: EXPORTED) -> None:
    folder = copied(1)
    (folder / model_folder.INDEX_FILE).write_text("{}")
    with pytest.raises(UserError, match="holds both"):
        RectVLM.from_pretrained(folder, "cpu")
    (folder / model_folder.WEIGHTS_FILE).rename(folder.parent / "outside.safetensors")
    for content, said in (
        ("{}", "no weight_map"),
        ("{", "not JSON"),
        ('{"weight_map": {"encoder.whole": "../outside.safetensors"}}', "'../outside.safetensors'"),
        ('{"weight_map": {"encoder.whole": "weights.bin"}}', "'weights.bin'"),
    ):
        (folder / model_folder.INDEX_FILE).write_text(content)
        with pytest.raises(UserError, match=said):
            RectVLM.from_pretrained(folder, "cpu")


class Trap:
    """A pickle that leaves a mark where it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_pickles_are_never_opened(copied: EXPORTED, tmp_path: Path) -> None:
    folder, mark = copied(3), tmp_path / "opened"
    traps = [
        folder / "pytorch_model.bin",
        folder / "model.pt",
        folder / "adapter" / "adapter_model.bin",
    ]
    for path in traps:
        torch.save(Trap(mark), path)
    RectVLM.from_pretrained(folder, "cpu")
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        RectVLM.from_pretrained(folder, "cpu")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"pytorch_model\.bin, a pickle, which is never read"):
        RectVLM.from_pretrained(folder, "cpu")
    assert not mark.exists()
    torch.load(traps[0], weights_only=False)
    assert mark.exists()  # the trap works


def test_prediction_from_the_folder_is_the_checkpoints(
    runs: EXPORTED, exported: EXPORTED, phantoms: Callable[[int], Any], tmp_path: Path
) -> None:
    file = write_nifti(phantoms(1).hu, phantoms(1).affine, tmp_path / "chest.nii.gz")
    cases = [
        predict_cases(file, source, tmp_path / str(k), "cpu")[0]
        for k, source in enumerate((runs(3), exported(3)))
    ]
    said = [json.loads((case / "findings.json").read_text()) for case in cases]
    assert (said[0].pop("checkpoint"), said[1].pop("checkpoint")) == (
        str(runs(3)),
        str(exported(3)),
    )
    assert said[0] == said[1]
    assert said[0]["step"] == 7
    assert all(row["threshold"] == 0.5 for row in said[1]["findings"].values())
    for name in ("lesions.nii.gz", "report.txt"):
        assert (cases[0] / name).read_bytes() == (cases[1] / name).read_bytes()


def test_a_folder_is_not_written_over_unasked(whole: RectVLM, copied: EXPORTED) -> None:
    folder = copied(3)
    (folder / "LICENSE").write_text("theirs")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="exists and is not empty"):
        whole.save_pretrained(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    whole.save_pretrained(folder, overwrite=True, max_shard_size="100KB")
    assert (folder / "LICENSE").read_text() == "theirs"
    assert not (folder / model_folder.WEIGHTS_FILE).exists()
    assert not (
        folder / run_checkpoint.THRESHOLDS_FILE
    ).exists()  # they belonged to what was there before
    names = hub.exported_tensor_names(whole)
    assert (
        model_folder.find_differing_tensors(run_checkpoint.read_weights(folder), own(whole, names))
        == []
    )
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_failure_leaves_nothing(
    whole: RectVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metrics.json").write_text('{"classification": 3}')
    with pytest.raises(UserError, match="rectvlm evaluate"):
        whole.save_pretrained(tmp_path / "out", metrics=tmp_path / "metrics.json")

    def failing_disk(tensors: dict[str, Tensor], path: Path) -> None:
        save_file(
            {name: x.clone() + (name == "encoder.whole") for name, x in tensors.items()}, path
        )

    monkeypatch.setattr(model_folder, "_save_tensors", failing_disk)
    with pytest.raises(UserError, match=r"does not hold what was written to it \(encoder\.whole\)"):
        whole.save_pretrained(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_equal_means_every_bit() -> None:
    nan, zero = torch.tensor([float("nan"), 1.0]), torch.tensor([0.0])
    assert (
        model_folder.find_differing_tensors(
            {"a": nan, "b": torch.tensor(3)}, {"a": nan.clone(), "b": torch.tensor(3)}
        )
        == []
    )
    assert model_folder.find_differing_tensors({"a": zero}, {"a": -zero}) == ["a"]
    assert model_folder.find_differing_tensors({"a": zero}, {"a": zero.bfloat16()}) == ["a"]
    assert model_folder.find_differing_tensors({"a": zero}, {"a": zero[None]}) == ["a"]
    assert model_folder.find_differing_tensors({"a": zero, "b": zero}, {"b": zero, "c": zero}) == [
        "a",
        "c",
    ]


def test_a_model_without_values_is_refused_unless_they_are_given(
    runs: EXPORTED, whole: RectVLM, tiny: Config, tmp_path: Path
) -> None:
    tensors = run_checkpoint.read_weights(runs(2))
    frame = build_meta_model(
        tiny,
        run_checkpoint.read_training_state(runs(2)).parts,
        tensors["prompts.present"].shape[1],
        None,
    )
    with pytest.raises(UserError, match="state_dict"):
        hub.save_pretrained(frame, tmp_path / "out")
    with pytest.raises(UserError, match=r"missing: encoder\.whole"):
        rest = {name: tensor for name, tensor in tensors.items() if name != "encoder.whole"}
        hub.save_pretrained(frame, tmp_path / "out", state_dict=rest)
    hub.save_pretrained(frame, tmp_path / "out", state_dict=tensors)
    assert (
        model_folder.find_differing_tensors(run_checkpoint.read_weights(tmp_path / "out"), tensors)
        == []
    )
    names = hub.exported_tensor_names(whole)
    for parameter in whole.parameters():
        parameter.requires_grad_(False)
    assert hub.exported_tensor_names(whole) == names  # also where nothing trains


def test_the_card_says_what_it_is(runs: EXPORTED, tmp_path: Path) -> None:
    scores = ("auroc", "f1", "precision", "recall")
    macro = dict.fromkeys(scores, 0.61) | {f"n_findings_{score}": 17 for score in scores}
    found = {
        "classification": {"macro": macro},
        "localization": {
            "per_lesion": {"lung_nodule": {"n_cases": 9, "n_present": 4, "dice": None}}
        },
        "reports": {"image": {"n": 5, "bleu_1": 0.5}, "image_ablated": {"n": 5, "bleu_1": 0.25}},
        "n_cases": 13,
        "split": "valid",
        "selected_on_this_split": True,
        "step": 7,
    }
    metrics = tmp_path / "metrics.json"
    metrics.write_text(json.dumps(found))
    settings = {"license_id": "llama3.1", "datasets": ["owner/data"], "metrics": metrics}
    folder = hub.export_checkpoint(
        runs(3), tmp_path / "model", base_model="owner/language-model", **settings
    )
    card = ModelCard.load(folder / "README.md")
    data = card.data.to_dict()
    assert (data["license"], data["datasets"], data["base_model"]) == (
        "llama3.1",
        ["owner/data"],
        "owner/language-model",
    )
    assert (data["library_name"], data["pipeline_tag"]) == ("rectvlm", "image-to-text")
    for words in (
        "Research use only",
        "0.610 | 17 of 18",
        "Dice, lung nodule | –",
        "0.500 (0.250 without the image)",
    ):
        assert words in card.content
    assert "at step 7.\nValidation during training chose this checkpoint" in card.content
    assert "these figures are optimistic.\n\n| | metric" in card.content
    assert all(finding.lower() in card.content for finding in FINDINGS)
    assert "Phase 3, 7 steps, 28 samples seen by\n1 process." in card.content
    adapter = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "owner/language-model"
    assert run_checkpoint.read_config(folder).generator.model == "owner/language-model"

    plain = ModelCard.load(hub.export_checkpoint(runs(1), tmp_path / "plain") / "README.md")
    assert not {"license", "datasets", "base_model"} & plain.data.to_dict().keys()
    assert "peft" not in plain.data.tags
    assert "PeftModel" not in plain.content


def test_the_command_exports(
    runs: EXPORTED, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert (
        cli.main(["export", "--checkpoint", str(runs(1)), "--out", str(out), "--license", "mit"])
        == 0
    )
    assert capsys.readouterr().out == f"{out}\n"
    assert (
        model_folder.find_differing_tensors(
            run_checkpoint.read_weights(out), run_checkpoint.read_weights(runs(1))
        )
        == []
    )
    assert cli.main(["export", "--checkpoint", str(runs(1)), "--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main(["export", "--checkpoint", str(tmp_path), "--out", str(out)]) == 2


@pytest.fixture
def stand_in(exported: EXPORTED, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A hub with one model of ours, and an empty cache."""
    with hub_server.running() as server:
        monkeypatch.setattr(
            constants, "ENDPOINT", server.url
        )  # as HF_ENDPOINT sets both at the start
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
        folder = exported(3)
        files = {
            path.relative_to(folder).as_posix(): path
            for path in folder.rglob("*")
            if path.is_file()
        }
        held = {name: path.read_bytes() for name, path in files.items()}
        server.add("clinic/model", held | {"pytorch_model.bin": b"a pickle"})
        yield server


def test_a_hub_id_loads_and_stays_in_the_cache(
    stand_in: Any, whole: RectVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two: tuple[Any, ...] = ("encoder", "classifier")
    RectVLM.from_pretrained("clinic/model", "cpu", parts=two)
    assert stand_in.sent["model.safetensors"]
    assert not any(name.startswith("adapter") for name in stand_in.sent)
    model = RectVLM.from_pretrained("clinic/model", "cpu", "main")
    names = hub.exported_tensor_names(whole)
    assert model_folder.find_differing_tensors(own(model, names), own(whole, names)) == []
    assert not any(name.endswith(".bin") for name in stand_in.sent)

    sent = sum(stand_in.sent.values())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    RectVLM.from_pretrained("clinic/model", "cpu", parts=two)
    assert sum(stand_in.sent.values()) == sent
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        RectVLM.from_pretrained("clinic/other", "cpu")


def test_what_a_hub_refuses_is_one_sentence(
    stand_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = stand_in.repositories["clinic/model"].files
    stand_in.add("clinic/gated", files, gated=True)
    stand_in.add("clinic/text", {"README.md": b"nothing else"})
    stand_in.add("clinic/foreign", {**files, "config.json": b'{"model_type": "llama"}'})
    refusals = [
        (("clinic/gated",), "clinic/gated is gated: accept its terms"),
        (("clinic/nothing",), "neither a folder here nor a repository"),
        (("clinic/model", "cpu", "v9"), "no revision 'v9'"),
        (("clinic/text",), "no model of rectvlm"),
        (("clinic/foreign",), "model of type 'llama'"),
        ((tmp_path / "nowhere",), "expected an exported folder"),
        (("no-owner",), "expected an exported folder"),
        ((tmp_path, "cpu", "v1"), "leave the revision out"),
        ((tmp_path,), "config.json of an exported model"),
    ]
    for arguments, said in refusals:
        with pytest.raises(UserError, match=said) as caught:
            RectVLM.from_pretrained(*arguments)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:1 cannot be reached"):
        RectVLM.from_pretrained("clinic/other")


def test_the_class_is_the_packages(whole: RectVLM) -> None:
    assert rectvlm.RectVLM is hub.RectVLM
    assert isinstance(whole, models.RectVLM)
    with pytest.raises(AttributeError, match="RecVLM"):
        rectvlm.RecVLM  # noqa: B018
