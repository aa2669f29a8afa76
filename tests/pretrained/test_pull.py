"""Models come from a folder or, over HTTP, a stand-in for the Hub: bit for bit, or not at all."""

import json
from collections.abc import Callable
from pathlib import Path

import hub_server
import pytest
import torch
from hub_server import read_files
from huggingface_hub import constants
from safetensors.torch import save_file
from transformers import AutoModel

from rectvlm import RectVLM, cli
from rectvlm.checkpoint.integrity import UNLISTED_FILES, read_manifest
from rectvlm.config import ModelPart
from rectvlm.finding_thresholds import THRESHOLDS_FILE, FindingThresholds
from rectvlm.models.load_quantized import SafetensorsCheckpoint
from rectvlm.pretrained import resolve_model
from rectvlm.pretrained.pull import pull_model
from rectvlm.pretrained.verify import find_model_faults
from rectvlm.types import UserError

REPOSITORY = "lab/chest"


def pull(hub: hub_server.Hub, *parts: ModelPart, out: Path | None = None) -> Path:
    """Pull our repository from the hub as the weights of a size."""
    return pull_model("small", parts, hub.url, REPOSITORY, out=out)


def test_a_whole_model_arrives_bit_for_bit(
    hub: hub_server.Hub, exported: Path, tmp_path: Path
) -> None:
    hub.add(REPOSITORY, read_files(exported))
    pulled = pull(hub)
    assert pulled == tmp_path / "models" / "rectvlm-small"
    assert read_files(pulled) == read_files(exported)
    assert find_model_faults("small") == (pulled, [])
    hub.sent.clear()
    pull(hub)
    assert not hub.sent["encoder.safetensors"], "what is here and right is not sent again"


@pytest.mark.parametrize("from_folder", [False, True])
def test_our_model_arrives_whole_by_its_hub_id(
    from_folder: bool, hub: hub_server.Hub, exported: Path, tmp_path: Path
) -> None:
    thresholds = FindingThresholds.all_default("a test").as_dict()
    (exported / "thresholds.json").write_text(json.dumps(thresholds))
    hub.add(REPOSITORY, read_files(exported))
    where = str(exported) if from_folder else hub.url
    assert cli.main(["weights", "pull", REPOSITORY, "--from", where]) == 0
    pulled = tmp_path / "models" / "lab--chest"
    assert read_files(pulled) == read_files(exported)
    assert find_model_faults(REPOSITORY) == (pulled, [])
    RectVLM.from_pretrained(pulled, "cpu")
    words = ["small", "--repo", REPOSITORY, "--part", "encoder", "--from", where]
    assert cli.main(["weights", "pull", *words, "--out", str(tmp_path / "part")]) == 0
    assert {path.name for path in (tmp_path / "part").glob("*.safetensors")} == {
        "encoder.safetensors",
        "prompts.safetensors",
    }


@pytest.mark.parametrize(
    "name", ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
)
def test_a_model_without_its_adapter_is_not_called_whole(name: str, exported: Path) -> None:
    (exported / name).unlink()
    manifest = exported / "manifest.json"
    tree = json.loads(manifest.read_text())
    del tree["files"][name]
    manifest.write_text(json.dumps(tree))
    assert find_model_faults(str(exported)) == (exported, [f"{name} is missing"])


@pytest.mark.parametrize("parts", [("encoder",), ("localizer", "classifier"), ("generator",)])
def test_parts_arrive_alone(
    hub: hub_server.Hub, exported: Path, tmp_path: Path, parts: tuple[ModelPart, ...]
) -> None:
    hub.add(REPOSITORY, read_files(exported))
    pulled = pull(hub, *parts, out=tmp_path / "part")
    expected = {"config.json", "README.md", "prompts.safetensors", "manifest.json"}
    expected |= {f"{part}.safetensors" for part in parts}
    if "generator" in parts:
        expected |= {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert read_files(pulled).keys() == expected
    assert not {name for name in hub.sent if name.endswith(".safetensors")} - {
        name.replace("/", "_") for name in expected
    }
    assert find_model_faults(str(pulled)) == (pulled, [])


def test_the_whole_replaces_a_part_and_a_part_the_whole(
    hub: hub_server.Hub, exported: Path
) -> None:
    hub.add(REPOSITORY, read_files(exported))
    pull(hub, "encoder")
    pulled = pull(hub)
    assert read_files(pulled) == read_files(exported)
    pull(hub, "encoder")
    assert find_model_faults("small") == (pulled, [])
    assert not (pulled / "localizer.safetensors").exists()


def test_a_pulled_part_loads(
    hub: hub_server.Hub, exported: Path, tiny_run: Callable[[int], Path]
) -> None:
    hub.add(REPOSITORY, read_files(exported))
    pulled = pull(hub, "encoder", "classifier")
    model = RectVLM.from_pretrained(tiny_run(3), "cpu", parts=("encoder", "classifier"))
    part = RectVLM.from_pretrained(pulled, "cpu", parts=("encoder", "classifier"))
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in part.state_dict().items())
    assert RectVLM.from_pretrained(pulled, "cpu").parts == ("encoder", "classifier")


def test_damage_is_repaired(hub: hub_server.Hub, exported: Path) -> None:
    hub.add(REPOSITORY, read_files(exported))
    pulled = pull(hub)
    encoder = pulled / "encoder.safetensors"
    encoder.write_bytes(encoder.read_bytes()[:-1] + b"?")
    (pulled / "adapter" / "adapter_config.json").unlink()
    hub.sent.clear()
    pull(hub)
    assert read_files(pulled) == read_files(exported)
    assert not hub.sent["localizer.safetensors"], "what was intact stays"


def test_a_cut_transfer_goes_on(hub: hub_server.Hub, exported: Path) -> None:
    hub.add(REPOSITORY, read_files(exported))
    hub.faults.cut["encoder.safetensors"] = [100_000, 50_000]
    assert read_files(pull(hub)) == read_files(exported)


def test_other_bytes_than_the_hub_states_are_never_taken(
    hub: hub_server.Hub, exported: Path, tmp_path: Path
) -> None:
    files = read_files(exported)
    hub.add(REPOSITORY, files)
    hub.faults.wrong["encoder.safetensors"] = files["encoder.safetensors"][:-1] + b"?"
    with pytest.raises(UserError, match=r"encoder\.safetensors.*another digest"):
        pull(hub, out=tmp_path / "out")
    hub.faults.wrong.clear()
    assert read_files(pull(hub, out=tmp_path / "out")) == files


def test_a_repository_that_contradicts_its_manifest_is_refused(
    hub: hub_server.Hub, exported: Path
) -> None:
    files = read_files(exported)
    changed = files["encoder.safetensors"][:-1] + b"?"
    hub.add(REPOSITORY, {**files, "encoder.safetensors": changed})
    with pytest.raises(UserError, match=r"contradicts its manifest\.json: encoder\.safetensors"):
        pull(hub)
    hub.add(REPOSITORY, {name: data for name, data in files.items() if "adapter" not in name})
    with pytest.raises(UserError, match=r"lacks adapter/adapter_config\.json"):
        pull(hub)
    hub.add(REPOSITORY, {name: data for name, data in files.items() if name != "manifest.json"})
    with pytest.raises(UserError, match=r"holds no manifest\.json"):
        pull(hub)


def test_paths_that_lead_out_of_the_folder_are_refused(
    hub: hub_server.Hub, exported: Path, tmp_path: Path
) -> None:
    hub.add(REPOSITORY, {**read_files(exported), "../evil.json": b"{}"})
    with pytest.raises(UserError, match="outside its folder"):
        pull(hub, out=tmp_path / "out" / "here")
    assert not (tmp_path / "out" / "evil.json").exists()


def test_messages_say_what_to_do(
    hub: hub_server.Hub, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = hub.add(REPOSITORY, read_files(exported))

    def message(name: str = "small", **changes: object) -> str:
        arguments = {"where": hub.url, "repository": REPOSITORY, **changes}
        with pytest.raises(UserError) as caught:
            pull_model(name, **arguments)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no revision 'v9'" in message(revision="v9")
    assert "No repository lab/none" in message(repository="lab/none")
    assert "OWNER/NAME" in message(repository="lab/none/at/all")
    assert "has no generato" in message(parts=["generato"])
    repository.gated = True
    gated = message()
    assert f"accept its terms at {hub.url}/lab/chest" in gated
    assert "hf auth login" in gated
    assert "HF_TOKEN" in gated
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    assert "with the account of your token" in message()
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    assert "does not accept the token" in message()
    monkeypatch.delenv("HF_TOKEN")
    repository.gated, repository.private = False, True
    assert "if it is private, log in with `hf auth login`" in message()
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    pull(hub)
    hub.faults.broken["/revision/main"] = 99
    assert "answers 500" in message()
    assert "Could not reach http://127.0.0.1:9" in message(where="http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in message()


def test_sizes_are_not_asked_for_while_none_is_published() -> None:
    with pytest.raises(
        UserError, match=r"No weights of size large are published yet.*--repo OWNER/NAME"
    ):
        pull_model("large")
    with pytest.raises(UserError, match=r"No weights called 'huge'.*small, medium, large"):
        pull_model("huge")


def test_a_folder_serves_as_source(exported: Path, tmp_path: Path) -> None:
    mirror = tmp_path / "mirror"
    exported.rename(mirror)
    for where in (mirror, tmp_path):
        name = "mirror" if where == tmp_path else "rectvlm/rectvlm-small"
        pulled = pull_model("small", (), str(where), name, out=tmp_path / "a")
        assert read_files(pulled) == read_files(mirror)
    part = pull_model("small", ["classifier"], str(mirror), out=tmp_path / "c")
    names = {path.name for path in part.glob("*.safetensors")}
    assert names == {"classifier.safetensors", "prompts.safetensors"}
    with pytest.raises(
        UserError, match=r"No model in .*expected rectvlm/rectvlm-large/config\.json"
    ):
        pull_model("large", (), str(tmp_path / "nowhere"))
    encoder = mirror / "encoder.safetensors"
    encoder.write_bytes(encoder.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"encoder\.safetensors has another checksum"):
        pull_model("small", (), str(mirror), out=tmp_path / "d")


def test_a_model_of_others_goes_to_the_cache_of_the_hub(
    hub: hub_server.Hub, bert: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("emilyalsentzer/Bio_ClinicalBERT", bert)
    snapshot = pull_model("bio-clinicalbert", where=hub.url)
    names = {path.name for path in snapshot.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not names & {"pytorch_model.bin", "tf_model.h5", "original", "onnx"}
    assert all(snapshot.joinpath(name).read_bytes() == bert[name] for name in names)
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        AutoModel.from_pretrained(
            "emilyalsentzer/Bio_ClinicalBERT", cache_dir=constants.HF_HUB_CACHE
        )
    assert hub.sent["model.safetensors"] == len(bert["model.safetensors"])
    blob = (snapshot / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    pull_model("emilyalsentzer/Bio_ClinicalBERT", where=hub.url)
    assert find_model_faults("bio-clinicalbert") == (snapshot.parents[1], [])


def test_a_model_of_others_goes_to_a_folder(
    hub: hub_server.Hub, bert: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add("other/model", bert)
    pulled = pull_model("other/model", where=hub.url, out=tmp_path / "model")
    assert find_model_faults(str(pulled)) == (pulled, [])
    assert resolve_model(str(pulled)) == str(pulled)
    AutoModel.from_pretrained(pulled)
    again = pull_model("bio-clinicalbert", where=str(pulled))
    assert again == tmp_path / "models" / "emilyalsentzer--Bio_ClinicalBERT"
    assert read_files(again) == read_files(pulled)
    pickled = {name: data for name, data in bert.items() if name != "model.safetensors"}
    hub.add("other/pickled", pickled)
    with pytest.raises(UserError, match=r"weights in .*pytorch_model\.bin.*not in safetensors"):
        pull_model("other/pickled", where=hub.url)
    with pytest.raises(UserError, match="has no parts"):
        pull_model("other/model", ["encoder"], where=hub.url)


def split_weights() -> dict[str, bytes]:
    """Two weights files with their index, as Transformers writes them."""
    files = {f"model-0000{n}-of-00002.safetensors": b"%d" % n for n in (1, 2)}
    weight_map = {name: name for name in files}
    index = {"metadata": {}, "weight_map": weight_map}
    return {**files, "model.safetensors.index.json": json.dumps(index).encode()}


def test_a_pull_removes_what_an_earlier_one_brought_and_nothing_of_yours(
    hub: hub_server.Hub, bert: dict[str, bytes], tmp_path: Path
) -> None:
    own_files = {
        "notes.txt": b"mine",
        "cases/list.json": b"[1]",
        "finetuned.safetensors": b"mine too",
    }
    split = {**split_weights(), "config.json": bert["config.json"]}
    out = tmp_path / "out"
    (out / "cases").mkdir(parents=True)
    for name, data in own_files.items():
        (out / name).write_bytes(data)
    for files, n_weights in ((split, 3), (bert, 1), (split, 3)):
        hub.add(REPOSITORY, files)
        pull_model(REPOSITORY, where=hub.url, out=out)
        assert len(list(out.glob("model*safetensors*"))) == n_weights
        assert {name: (out / name).read_bytes() for name in own_files} == own_files
        expected = read_files(out).keys() - own_files.keys() - UNLISTED_FILES
        assert read_manifest(out).keys() == expected


def test_thresholds_of_the_model_that_was_here_before_are_removed(
    hub: hub_server.Hub, exported: Path
) -> None:
    files = read_files(exported)
    hub.add(REPOSITORY, files | {THRESHOLDS_FILE: b"{}"})
    assert (pull(hub) / THRESHOLDS_FILE).is_file()
    hub.add(REPOSITORY, {name: data for name, data in files.items() if name != THRESHOLDS_FILE})
    assert not (pull(hub) / THRESHOLDS_FILE).exists()


def test_a_language_model_whose_shard_is_missing_is_named(
    hub: hub_server.Hub, bert: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {**split_weights(), "config.json": bert["config.json"]}
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        save_file({name: torch.zeros(1)}, tmp_path / name)
        files[name] = (tmp_path / name).read_bytes()
    hub.add("other/sharded", files)
    snapshot = pull_model("other/sharded", where=hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert SafetensorsCheckpoint.from_reference("other/sharded") is not None
    (snapshot / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"other/sharded lacks model-00002-of.*`rectvlm weights pull other/sharded`"
    ) as caught:
        SafetensorsCheckpoint.from_reference("other/sharded")
    assert "\n" not in str(caught.value)
