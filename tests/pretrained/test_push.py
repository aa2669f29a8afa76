"""Checkpoints go to a stand-in for the Hub or a folder; nothing is lost or published unasked."""

import shutil
from pathlib import Path

import hub_server
import pytest
from hub_server import read_files

from rectvlm import cli
from rectvlm.pretrained.pull import pull_model
from rectvlm.pretrained.push import push_model
from rectvlm.types import UserError

REPOSITORY = "lab/chest"


def test_push_then_pull_gives_the_same_folder(
    hub: hub_server.Hub, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"hf auth login"):
        push_model(exported, REPOSITORY, where=hub.url)
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    address = push_model(exported, REPOSITORY, where=hub.url)
    repository = hub.repositories[REPOSITORY]
    assert address == f"{hub.url}/{REPOSITORY}/tree/{repository.branches['main']}"
    assert repository.private
    n_weights = len(list(exported.rglob("*.safetensors")))
    assert hub.uploads == n_weights
    pulled = pull_model("small", where=hub.url, repository=REPOSITORY)
    assert read_files(pulled) == read_files(exported)
    again = ["weights", "push", str(exported), "--repo", REPOSITORY, "--to", hub.url]
    assert cli.main(again) == 0
    assert hub.uploads == n_weights, "what the hub has is not sent again"
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="if it is private"):
        pull_model("small", where=hub.url, repository=REPOSITORY, out=tmp_path / "other")


def test_a_name_that_is_a_path_leads_out_of_no_folder(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'\.\./\.\./q' is no repository: expected OWNER/NAME"):
        push_model(exported, "../../q", where=str(tmp_path / "a" / "b"))
    assert not (tmp_path / "q").exists() and not (tmp_path / "a").exists()


def test_parts_go_to_a_repository_of_their_own(
    hub: hub_server.Hub, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    push_model(exported, "lab/encoder", ["encoder"], hub.url)
    pulled = pull_model("small", ["encoder"], hub.url, "lab/encoder")
    weights = {path.name for path in pulled.rglob("*.safetensors")}
    assert weights == {"encoder.safetensors", "prompts.safetensors"}
    push_model(exported, REPOSITORY, where=hub.url)
    with pytest.raises(
        UserError, match="holds classifier, localizer, generator, which this push would remove"
    ):
        push_model(exported, REPOSITORY, ["encoder"], hub.url)
    with pytest.raises(UserError, match="has no teacher"):
        push_model(exported, REPOSITORY, ["teacher"], hub.url)  # type: ignore[list-item]


def test_a_push_leaves_no_weights_that_it_does_not_name(
    hub: hub_server.Hub, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    hub.add(REPOSITORY, {"old.safetensors": b"1", "LICENSE": b"theirs"}, private=True)
    (exported / "engine").mkdir()
    (exported / "engine" / "rank-00000-of-00001.safetensors").write_bytes(b"optimizer")
    (exported / "extra.pt").write_bytes(b"a pickle")
    push_model(exported, REPOSITORY, where=hub.url)
    pushed = set(hub.repositories[REPOSITORY].files)
    local = set(read_files(exported)) - {"engine/rank-00000-of-00001.safetensors", "extra.pt"}
    assert pushed == local | {"LICENSE"}


def test_what_is_damaged_or_public_is_not_pushed(
    hub: hub_server.Hub, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    hub.add(REPOSITORY, {}, private=False)
    with pytest.raises(UserError, match="is public: say --public"):
        push_model(exported, REPOSITORY, where=hub.url)
    push_model(exported, REPOSITORY, where=hub.url, public=True)
    encoder = exported / "encoder.safetensors"
    encoder.write_bytes(encoder.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"does not verify.*encoder\.safetensors has another"):
        push_model(exported, "lab/new", where=hub.url)
    assert "lab/new" not in hub.repositories
    with pytest.raises(UserError, match=r"No checkpoint.*rectvlm export"):
        push_model(tmp_path, "lab/new", where=hub.url)


def test_a_folder_serves_as_target(exported: Path, tmp_path: Path) -> None:
    mirror = tmp_path / "mirror"
    target = mirror / "lab" / "chest"
    assert push_model(exported, REPOSITORY, where=str(mirror)) == str(target)
    assert read_files(target) == read_files(exported)
    with pytest.raises(UserError, match="which this push would remove"):
        push_model(exported, REPOSITORY, ["encoder"], str(mirror))
    shutil.rmtree(target)
    (exported / "manifest.json").unlink()
    push_model(exported, REPOSITORY, where=str(mirror))
    assert read_files(target) == read_files(exported), "a missing manifest is written"
