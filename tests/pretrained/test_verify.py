"""Damage is named, and the list says what is here."""

import json
from collections.abc import Callable
from pathlib import Path

import hub_server
import pytest
from hub_server import read_files

from rectvlm import cli
from rectvlm.pretrained.pull import pull_model
from rectvlm.pretrained.verify import find_model_faults, list_available_models
from rectvlm.types import UserError


def test_damage_is_named(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["weights", "verify", str(exported)]) == 0
    assert capsys.readouterr().out == f"{exported}: intact\n"
    path = exported / "localizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    (exported / "adapter" / "adapter_config.json").unlink()
    (exported / "README.md").write_text("edited")
    assert cli.main(["weights", "verify", str(exported)]) == 2
    assert capsys.readouterr().out.splitlines() == [
        f"{exported}: adapter/adapter_config.json is missing",
        f"{exported}: localizer.safetensors has another checksum than when it was written",
    ]


def test_damage_in_the_cache_of_the_hub_is_named(
    hub: hub_server.Hub, bert: dict[str, bytes]
) -> None:
    hub.add("emilyalsentzer/Bio_ClinicalBERT", bert)
    snapshot = pull_model("bio-clinicalbert", where=hub.url)
    assert find_model_faults("bio-clinicalbert") == (snapshot.parents[1], [])
    blob = (snapshot / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    faults = find_model_faults("bio-clinicalbert")[1]
    assert faults == ["model.safetensors has another checksum than the hub stated"]


def test_a_cached_model_that_lost_a_shard_is_named(
    hub: hub_server.Hub, bert: dict[str, bytes]
) -> None:
    shard = "model-00001-of-00002.safetensors"
    index = {"metadata": {}, "weight_map": {"a": shard}}
    files = {"config.json": bert["config.json"], shard: b"1"}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    hub.add("other/sharded", files)
    snapshot = pull_model("other/sharded", where=hub.url)
    assert find_model_faults("other/sharded")[1] == []
    (snapshot / shard).unlink()
    assert find_model_faults("other/sharded")[1] == [f"{shard} is missing"]
    hub.sent.clear()
    pull_model("other/sharded", where=hub.url)
    assert find_model_faults("other/sharded")[1] == []
    assert not hub.sent, "the content was here, its name was not"


def test_what_is_not_here_cannot_be_verified(hub: hub_server.Hub, tmp_path: Path) -> None:
    for target in ("llama-3.1-70b", "large", "nowhere/at-all"):
        with pytest.raises(UserError, match=rf"Nothing called '{target}' is here"):
            find_model_faults(target)
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        find_model_faults(str(tmp_path))
    with pytest.raises(UserError, match="checked when it is prepared"):
        find_model_faults("tiny-bert")


def test_the_list_says_what_can_be_had(
    hub: hub_server.Hub,
    exported: Path,
    bert: dict[str, bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def list_states(where: str | None = None) -> dict[str, str]:
        return {model.name: model.availability for model in list_available_models(where)}

    states = list_states()
    assert states["small"] == "not published"
    assert states["llama-3.1-70b"].startswith("not here; gated")
    hub.add("rectvlm/rectvlm-small", read_files(exported))
    hub.add("emilyalsentzer/Bio_ClinicalBERT", bert)
    states = list_states(hub.url)
    assert states["small"].startswith(f"at {hub.url}")
    assert states["large"].startswith("not at")
    pull_model("small", where=hub.url)
    pull_model("bio-clinicalbert", where=hub.url)
    states = list_states()
    for name in ("small", "bio-clinicalbert", "tiny-bert"):
        assert states[name].startswith("here: ")
    assert states["tiny-llama"] == "built on first use"
    assert cli.main(["weights", "list"]) == 0
    printed = capsys.readouterr().out
    assert "No weights of rectvlm are published yet" in printed
    assert "llama-3.1-70b" in printed


def test_a_runs_folder_means_its_newest_checkpoint(tiny_run: Callable[[int], Path]) -> None:
    folder, faults = find_model_faults(str(tiny_run(1)))
    assert folder.parent.name == "checkpoints"
    assert faults == []
