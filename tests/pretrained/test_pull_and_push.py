"""Weights over HTTP, against a stand-in of the Hub that runs in this process."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import hub_server
import pytest
import torch
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel

from rectvlm import cli
from rectvlm.checkpoint import manifest
from rectvlm.models.load_quantized import SafetensorsCheckpoint
from rectvlm.pretrained import resolve_model, sources
from rectvlm.pretrained.pull import pull
from rectvlm.pretrained.push import push, seal
from rectvlm.pretrained.verify import find_model_faults, list_available_models
from rectvlm.types import UserError

REPOSITORY = "lab/chest"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_server.Hub]:
    """A hub that is at hand, and an empty home of its user."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sources, "WAITS", (0.01, 0.01))
    monkeypatch.setenv("RECTVLM_MODELS", str(tmp_path / "models"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with hub_server.running() as running:
        yield running


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "encoder.blocks.0.weight": random(64, 65),
        "encoder.blocks.1.weight": random(64, 33).bfloat16(),
        "encoder.steps": torch.arange(7),
        "encoder.odd": torch.tensor([True, False, True]),
        "encoder.scale": torch.tensor(0.5),
        "classifier.weight": random(18, 20),
        "localizer.decoder.weight": random(200, 300),
        "generator.resampler.queries": random(16, 20).bfloat16(),
        "prompts.present": random(18, 8),
    }


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A small folder in the layout of an exported model."""
    return export(tmp_path / "exported")


def export(folder: Path, shards: int = 1) -> Path:
    (folder / "adapter").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "rectvlm"}))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nA model.\n")
    (folder / "thresholds.json").write_text("{}")
    (folder / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file(
        {"base_model.model.q.lora_A.weight": torch.ones(4, 9)},
        folder / "adapter" / "adapter_model.safetensors",
    )
    named = tensors()
    if shards == 1:
        save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    places = {
        name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors"
        for i, name in enumerate(sorted(named))
    }
    for file in set(places.values()):
        save_file(
            {name: named[name] for name, place in places.items() if place == file}, folder / file
        )
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places})
    )
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def published(hub: hub_server.Hub, folder: Path) -> hub_server.Repository:
    seal(folder)
    return hub.add(REPOSITORY, contents(folder))


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@pytest.mark.parametrize("shards", [1, 3])
def test_a_whole_model_arrives_bit_for_bit(
    hub: hub_server.Hub, tmp_path: Path, shards: int
) -> None:
    folder = export(tmp_path / "model", shards)
    published(hub, folder)
    pulled = pull("small", where=hub.url, repository=REPOSITORY)
    assert pulled == tmp_path / "models" / "rectvlm-small"
    assert contents(pulled) == contents(folder)
    assert find_model_faults("small") == (pulled, [])
    hub.sent.clear()
    pull("small", where=hub.url, repository=REPOSITORY)
    assert set(hub.sent) == {manifest.MANIFEST_FILE}, "what is here and right is not sent again"


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("parts", [("encoder",), ("localizer", "classifier"), ("generator",)])
def test_parts_arrive_bit_for_bit_and_alone(
    hub: hub_server.Hub, tmp_path: Path, parts: tuple[str, ...], shards: int
) -> None:
    folder = export(tmp_path / "model", shards)
    published(hub, folder)
    pulled = pull("small", parts, hub.url, REPOSITORY, out=tmp_path / "part")
    wanted = {
        name: tensor
        for name, tensor in tensors().items()
        if name.split(".")[0] in (*parts, "prompts")
    }
    assert equal(load_file(pulled / "model.safetensors"), wanted)
    sent = sum(size for name, size in hub.sent.items() if name.startswith("model"))
    assert sent == sum(tensor.nbytes for tensor in wanted.values()), (
        "only the bytes of the parts travel"
    )
    expected = {
        "config.json",
        "README.md",
        "thresholds.json",
        "model.safetensors",
        manifest.MANIFEST_FILE,
    }
    if "generator" in parts:
        expected |= {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert contents(pulled).keys() == expected
    assert find_model_faults(str(pulled))[1] == [] and set(
        manifest.read_manifest(pulled).parts
    ) == set(parts)
    with safe_open(pulled / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_whole_replaces_a_part_and_a_part_the_whole(
    hub: hub_server.Hub, tmp_path: Path
) -> None:
    folder = export(tmp_path / "model", shards=2)
    published(hub, folder)
    pulled = pull("small", ["encoder"], hub.url, REPOSITORY)
    pull("small", (), hub.url, REPOSITORY)
    assert contents(pulled) == contents(folder)
    pull("small", ["encoder"], hub.url, REPOSITORY)
    assert find_model_faults("small")[1] == [] and not list(pulled.glob("model-*"))


def test_a_cut_transfer_goes_on_where_it_was_cut(
    hub: hub_server.Hub, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The library writes in portions of this size; what it holds of the last one is lost with the connection.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    published(hub, exported)
    size = (exported / "model.safetensors").stat().st_size
    hub.faults.cut["model.safetensors"] = [100_000, 50_000]
    pulled = pull("small", where=hub.url, repository=REPOSITORY)
    assert contents(pulled) == contents(exported)
    assert hub.sent["model.safetensors"] == size


def wait_for_part(folder: Path, size: int) -> None:
    """Until a file that is under way has grown to a size."""
    deadline = time.monotonic() + 30
    while not any(
        path.exists() and path.stat().st_size > size for path in (folder / ".pull").glob("*")
    ):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_pull_goes_on_and_no_file_is_ever_half(
    hub: hub_server.Hub, exported: Path, tmp_path: Path
) -> None:
    big = {"localizer.wide": torch.arange(5_000_000, dtype=torch.int32), **tensors()}
    save_file(big, exported / "model.safetensors")
    published(hub, exported)
    size, most = (exported / "model.safetensors").stat().st_size, 14_000_000
    hub.faults.hold["model.safetensors"] = most
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "rectvlm.cli",
        "weights",
        "pull",
        "small",
        "--repo",
        REPOSITORY,
        "--out",
        str(out),
    ]
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
    }
    environment.pop("HF_HUB_CACHE", None)
    process = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert hub.faults.held.wait(60), process.communicate(timeout=5)
    wait_for_part(out, 5_000_000)
    process.send_signal(signal.SIGKILL)
    process.wait()
    hub.faults.released.set()
    assert not (out / "model.safetensors").exists()
    kept = max(path.stat().st_size for path in (out / ".pull").glob("*"))
    hub.sent.clear()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{out}\n" and "going on with model.safetensors" in done.stderr
    assert hub.sent["model.safetensors"] == size - kept
    assert contents(out) == contents(exported)


def test_ctrl_c_stops_at_once_and_keeps_what_arrived(
    hub: hub_server.Hub, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    published(hub, exported)
    hub.faults.hold["model.safetensors"] = 100_000

    def press() -> None:
        wait_for_part(tmp_path / "out", 90_000)
        signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.3)
        hub.faults.released.set()

    # A shell starts what runs in the background with SIGINT ignored, and Python leaves it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    main = threading.get_ident()
    presser = threading.Thread(target=press)
    presser.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            pull("small", where=hub.url, repository=REPOSITORY, out=tmp_path / "out")
        presser.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    hub.sent.clear()
    assert contents(
        pull("small", where=hub.url, repository=REPOSITORY, out=tmp_path / "out")
    ) == contents(exported)
    assert hub.sent["model.safetensors"] < (exported / "model.safetensors").stat().st_size - 90_000


def test_damage_is_named_and_repaired(
    hub: hub_server.Hub, exported: Path, capsys: pytest.CaptureFixture
) -> None:
    published(hub, exported)
    pulled = pull("small", where=hub.url, repository=REPOSITORY)
    entry = manifest.read_manifest(pulled).files["model.safetensors"]
    assert entry.tensors is not None
    with (pulled / "model.safetensors").open("r+b") as file:
        file.seek(entry.tensors["localizer.decoder.weight"].begin + 11)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    (pulled / "adapter" / "adapter_config.json").unlink()
    (pulled / "other.txt").write_text("what is this")
    (pulled / "README.md").write_text("edited")
    assert cli.main(["weights", "verify", str(pulled)]) == 2
    assert capsys.readouterr().out.splitlines() == [
        f"{pulled}: differs: model.safetensors (in localizer.decoder.weight)",
        f"{pulled}: extra: other.txt",
        f"{pulled}: missing: adapter/adapter_config.json",
    ]
    hub.sent.clear()
    pull("small", where=hub.url, repository=REPOSITORY)
    (pulled / "other.txt").unlink()
    assert contents(pulled) == contents(exported)
    assert "adapter_adapter_model.safetensors" not in hub.sent, "what was whole stays"


def test_a_damaged_part_file_is_begun_again(
    hub: hub_server.Hub, exported: Path, tmp_path: Path
) -> None:
    published(hub, exported)
    out = tmp_path / "out"
    hub.faults.broken["model.safetensors"] = 9
    with pytest.raises(UserError, match="answers 500"):
        pull("small", where=hub.url, repository=REPOSITORY, out=out)
    for path in (out / ".pull").glob("*"):
        if path.name != "lock":
            path.write_bytes(b"\0" * 1000)
    hub.faults.broken.clear()
    assert contents(pull("small", where=hub.url, repository=REPOSITORY, out=out)) == contents(
        exported
    )


def test_other_bytes_than_announced_are_never_taken(
    hub: hub_server.Hub, exported: Path, tmp_path: Path
) -> None:
    published(hub, exported)
    data = bytearray((exported / "model.safetensors").read_bytes())
    data[-1] ^= 1
    hub.faults.wrong["model.safetensors"] = bytes(data)
    with pytest.raises(UserError, match=r"model\.safetensors.*SHA-256"):
        pull("small", where=hub.url, repository=REPOSITORY, out=tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()
    with pytest.raises(UserError, match=r"tensors differ.*localizer|prompts|encoder"):
        pull(
            "small",
            ["encoder", "localizer", "classifier"],
            hub.url,
            REPOSITORY,
            out=tmp_path / "part",
        )


def test_a_repository_that_contradicts_its_manifest_is_refused(
    hub: hub_server.Hub, exported: Path
) -> None:
    seal(exported)
    files = contents(exported)
    hub.add(REPOSITORY, {**files, "config.json": b'{"model_type": "other"}'})
    with pytest.raises(UserError, match=r"config\.json.*manifest\.json says"):
        pull("small", where=hub.url, repository=REPOSITORY)
    hub.add(REPOSITORY, {name: data for name, data in files.items() if "adapter" not in name})
    with pytest.raises(UserError, match=r"lacks adapter/adapter_config\.json"):
        pull("small", where=hub.url, repository=REPOSITORY)


def test_paths_that_lead_out_of_the_folder_are_refused(
    hub: hub_server.Hub, exported: Path, tmp_path: Path
) -> None:
    hub.add(REPOSITORY, {**contents(exported), "../evil.json": b"{}"})
    with pytest.raises(UserError, match="outside its folder"):
        pull("small", where=hub.url, repository=REPOSITORY, out=tmp_path / "out" / "here")
    assert not (tmp_path / "out" / "evil.json").exists()


def test_a_server_that_breaks_once_is_asked_again(hub: hub_server.Hub, exported: Path) -> None:
    published(hub, exported)
    hub.faults.broken.update({"/revision/main": 1, "config.json": 1, "model.safetensors": 2})
    assert contents(pull("small", where=hub.url, repository=REPOSITORY)) == contents(exported)
    assert sum(hub.faults.broken.values()) == 0


def test_messages_say_what_to_do(
    hub: hub_server.Hub, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = published(hub, exported)

    def message(name: str = "small", **more: object) -> str:
        with pytest.raises(UserError) as caught:
            pull(name, **{"where": hub.url, "repository": REPOSITORY, **more})  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no revision 'v9'" in message(revision="v9")
    assert "No repository lab/none" in message(repository="lab/none")
    assert "OWNER/NAME" in message(repository="lab/none/at/all")
    assert "holds no generato" in message(parts=["generato"])
    repository.gated = True
    gated = message()
    assert (
        f"accept its terms at {hub.url}/lab/chest" in gated
        and "hf auth login" in gated
        and "HF_TOKEN" in gated
    )
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    assert "with the account of your token" in message()
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    assert "does not accept the token" in message()
    monkeypatch.delenv("HF_TOKEN")
    repository.gated, repository.private = False, True
    assert "if it is private, log in with `hf auth login`" in message()
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    pull("small", where=hub.url, repository=REPOSITORY)
    hub.faults.broken["/revision/main"] = 99
    assert "answers 500" in message()
    assert "Could not reach http://127.0.0.1:9" in message(where="http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in message()


def test_sizes_are_not_asked_for_while_none_is_published() -> None:
    with pytest.raises(
        UserError, match=r"No weights of size large are published yet.*--repo OWNER/NAME"
    ):
        pull("large")
    with pytest.raises(UserError, match=r"No weights called 'huge'.*small, medium, large"):
        pull("huge")


def test_a_disk_that_is_too_small_is_found_before_anything_is_sent(
    hub: hub_server.Hub, exported: Path
) -> None:
    hub.add(REPOSITORY, contents(exported))
    hub.faults.lie["model.safetensors"] = 10**17
    with pytest.raises(UserError, match=r"too small: 100000000\.0 GB are to come"):
        pull("small", where=hub.url, repository=REPOSITORY)
    assert not hub.sent


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_disk_that_fills_up_is_one_sentence(
    hub: hub_server.Hub, exported: Path, tmp_path: Path
) -> None:
    published(hub, exported)
    hub.faults.broken["model.safetensors"] = 99
    out = tmp_path / "out"
    with pytest.raises(UserError, match="answers 500"):
        pull("small", where=hub.url, repository=REPOSITORY, out=out)
    hub.faults.broken.clear()
    for path in (out / ".pull").glob("*"):
        if path.name != "lock":
            path.unlink()
            path.symlink_to("/dev/full")
    with pytest.raises(UserError, match=f"The disk is full at {out}"):
        pull("small", where=hub.url, repository=REPOSITORY, out=out)


def test_push_then_pull_gives_the_same_folder(
    hub: hub_server.Hub, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"wants to know who asks.*hf auth login"):
        push(exported, REPOSITORY, where=hub.url)
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    address = push(exported, REPOSITORY, where=hub.url)
    assert address == f"{hub.url}/{REPOSITORY}/tree/{hub.repositories[REPOSITORY].branches['main']}"
    assert hub.repositories[REPOSITORY].private and hub.uploads == 2
    assert contents(pull("small", where=hub.url, repository=REPOSITORY)) == contents(exported)
    push(exported, REPOSITORY, where=hub.url)
    assert hub.uploads == 2, "what the hub has is not sent again"
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="if it is private"):
        pull("small", where=hub.url, repository=REPOSITORY, out=tmp_path / "other")


def test_parts_go_to_a_repository_of_their_own(
    hub: hub_server.Hub, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    push(exported, "lab/encoder", ["encoder"], hub.url)
    pulled = pull("small", where=hub.url, repository="lab/encoder")
    assert equal(
        load_file(pulled / "model.safetensors"),
        {
            name: tensor
            for name, tensor in tensors().items()
            if name.split(".")[0] in ("encoder", "prompts")
        },
    )
    push(exported, REPOSITORY, where=hub.url)
    with pytest.raises(
        UserError, match="holds classifier, generator, localizer, which this push would remove"
    ):
        push(exported, REPOSITORY, ["encoder"], hub.url)
    with pytest.raises(UserError, match="holds no teacher"):
        push(exported, REPOSITORY, ["teacher"], hub.url)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".exported")]


def test_a_push_replaces_shards_that_are_no_more(
    hub: hub_server.Hub, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    push(export(tmp_path / "sharded", shards=3), REPOSITORY, where=hub.url)
    push(exported, REPOSITORY, where=hub.url)
    names = set(hub.repositories[REPOSITORY].files)
    assert names == {*contents(exported), ".gitattributes"}


def test_what_does_not_verify_is_not_pushed(
    hub: hub_server.Hub, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    hub.add(REPOSITORY, {}, private=False)
    with pytest.raises(UserError, match="is public: say --public"):
        push(exported, REPOSITORY, where=hub.url)
    push(exported, REPOSITORY, where=hub.url, public=True)
    pickled = shutil.copytree(exported, tmp_path / "pickled")
    (pickled / manifest.MANIFEST_FILE).unlink()
    (pickled / "extra.pt").write_bytes(b"x")
    with pytest.raises(UserError, match=r"extra\.pt, which are pickles"):
        push(pickled, REPOSITORY, where=hub.url)
    (exported / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"does not verify.*differs: config\.json"):
        push(exported, "lab/new", where=hub.url)
    (exported / manifest.MANIFEST_FILE).unlink()
    data = (exported / "model.safetensors").read_bytes()
    (exported / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors has .* bytes where its header says"):
        push(exported, "lab/new", where=hub.url)
    assert "lab/new" not in hub.repositories
    with pytest.raises(UserError, match="No exported model"):
        push(tmp_path, "lab/new", where=hub.url)


def test_a_folder_serves_as_source_and_as_target(exported: Path, tmp_path: Path) -> None:
    mirror = tmp_path / "mirror"
    seal(exported)
    assert push(exported, "rectvlm/rectvlm-small", where=str(mirror)) == str(
        mirror / "rectvlm" / "rectvlm-small"
    )
    assert contents(pull("small", where=str(mirror), out=tmp_path / "a")) == contents(exported)
    assert contents(pull("small", where=str(exported), out=tmp_path / "b")) == contents(exported)
    part = pull("small", ["classifier"], str(mirror), out=tmp_path / "c")
    assert load_file(part / "model.safetensors").keys() == {"classifier.weight", "prompts.present"}
    with pytest.raises(
        UserError, match=r"No model in .*expected rectvlm/rectvlm-large/config\.json"
    ):
        pull("large", where=str(mirror))
    file = mirror / "rectvlm" / "rectvlm-small" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"model\.safetensors.*SHA-256"):
        pull("small", where=str(mirror), out=tmp_path / "d")
    assert find_model_faults(str(file.parent))[1] == ["differs: model.safetensors (in encoder.odd)"]


@pytest.fixture
def bert(tmp_path: Path) -> dict[str, bytes]:
    """A model of others as hubs hold it, with much that is not needed."""
    folder = Path(resolve_model("bundled:tiny-bert"))
    files = contents(folder)
    more = (
        "pytorch_model.bin",
        "tf_model.h5",
        "original/consolidated.pth",
        "onnx/model.safetensors",
        "README.md",
    )
    return {**files, **dict.fromkeys(more, b"not needed")}


def test_a_model_of_others_goes_to_the_cache_of_the_hub(
    hub: hub_server.Hub, bert: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("emilyalsentzer/Bio_ClinicalBERT", bert)
    snapshot = pull("bio-clinicalbert", where=hub.url)
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
    assert find_model_faults("bio-clinicalbert") == (snapshot.parents[1], [])
    blob = (snapshot / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    assert [fault.split(" (")[0] for fault in find_model_faults("bio-clinicalbert")[1]] == [
        "differs: model.safetensors"
    ]
    pull("emilyalsentzer/Bio_ClinicalBERT", where=hub.url)
    assert find_model_faults("bio-clinicalbert")[1] == []


def test_a_model_of_others_goes_to_a_folder(
    hub: hub_server.Hub, bert: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add("other/model", bert)
    pulled = pull("other/model", where=hub.url, out=tmp_path / "model")
    assert find_model_faults(str(pulled))[1] == [] and resolve_model(str(pulled)) == str(pulled)
    AutoModel.from_pretrained(pulled)
    again = pull("bio-clinicalbert", where=str(pulled))
    assert again == tmp_path / "models" / "emilyalsentzer--Bio_ClinicalBERT"
    assert contents(again) == contents(pulled)
    hub.add(
        "other/pickled", {name: data for name, data in bert.items() if name != "model.safetensors"}
    )
    with pytest.raises(UserError, match=r"weights in .*pytorch_model\.bin.*not in safetensors"):
        pull("other/pickled", where=hub.url)
    with pytest.raises(UserError, match="has no parts"):
        pull("other/model", ["encoder"], where=hub.url)


@pytest.mark.parametrize("ours", [True, False])
def test_a_pull_removes_what_an_earlier_one_brought_and_nothing_of_yours(
    hub: hub_server.Hub, exported: Path, bert: dict[str, bytes], tmp_path: Path, ours: bool
) -> None:
    """Models of others, and a repository of ours without a manifest: shards give way to one file and come back."""
    own = {"notes.txt": b"mine", "cases/list.json": b"[1]", "finetuned.safetensors": b"mine too"}
    split = contents(export(tmp_path / "split", shards=2))
    one = contents(exported) if ours else bert
    many = split if ours else {**split, "config.json": bert["config.json"]}
    out = tmp_path / "out"
    (out / "cases").mkdir(parents=True)
    for name, data in own.items():
        (out / name).write_bytes(data)
    for files, weights in ((many, 3), (one, 1), (many, 3)):
        hub.add(REPOSITORY, files)
        pull("small" if ours else REPOSITORY, where=hub.url, repository=REPOSITORY, out=out)
        assert len(list(out.glob("model*safetensors*"))) == weights
        assert {name: (out / name).read_bytes() for name in own} == own
        listed = manifest.read_manifest(out).files
        assert not listed.keys() & own.keys()
        assert listed.keys() == contents(out).keys() - own.keys() - manifest.UNLISTED_FILES
    assert find_model_faults(str(out))[1] == sorted(f"extra: {name}" for name in own)


def test_the_list_says_what_can_be_had(
    hub: hub_server.Hub, exported: Path, bert: dict[str, bytes], capsys: pytest.CaptureFixture
) -> None:
    states = {row.name: row.state for row in list_available_models()}
    assert states["small"] == "not published" and states["llama-3.1-70b"].startswith(
        "not here; gated"
    )
    seal(exported)
    hub.add("rectvlm/rectvlm-small", contents(exported))
    hub.add("emilyalsentzer/Bio_ClinicalBERT", bert)
    states = {row.name: row.state for row in list_available_models(hub.url)}
    assert states["small"].startswith(f"at {hub.url}") and states["large"].startswith("not at")
    pull("small", where=hub.url)
    pull("bio-clinicalbert", where=hub.url)
    states = {row.name: row.state for row in list_available_models()}
    assert states["small"].startswith("here: ") and states["bio-clinicalbert"].startswith("here: ")
    assert states["tiny-bert"].startswith("here: ") and states["tiny-llama"] == "built on first use"
    assert cli.main(["weights", "list"]) == 0
    printed = capsys.readouterr().out
    assert "No weights of rectvlm are published yet" in printed and "llama-3.1-70b" in printed


def test_a_pulled_part_of_a_real_model_loads(
    hub: hub_server.Hub, tiny_run: Callable[[int], Path], tmp_path: Path
) -> None:
    from rectvlm.checkpoint.hub import RectVLM

    model = RectVLM.from_pretrained(tiny_run(2), device="cpu")
    model.save_pretrained(tmp_path / "model")
    published(hub, tmp_path / "model")
    pulled = pull("small", ["encoder", "classifier"], hub.url, REPOSITORY)
    part = RectVLM.from_pretrained(pulled, device="cpu", parts=("encoder", "classifier"))
    assert part.localizer is None and equal(
        part.state_dict(),
        {
            name: tensor
            for name, tensor in model.state_dict().items()
            if not name.startswith("localizer")
        },
    )
    with pytest.raises(UserError, match=r"missing: localizer"):
        RectVLM.from_pretrained(pulled, device="cpu")


def test_a_cached_model_that_lost_a_shard_is_named(
    hub: hub_server.Hub, bert: dict[str, bytes]
) -> None:
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    files = {
        "config.json": bert["config.json"],
        "model.safetensors.index.json": json.dumps(index).encode(),
    }
    hub.add("other/sharded", {**files, "model-00001-of-00002.safetensors": b"1"})
    snapshot = pull("other/sharded", where=hub.url)
    assert find_model_faults("other/sharded")[1] == []
    (snapshot / "model-00001-of-00002.safetensors").unlink()
    assert find_model_faults("other/sharded")[1] == ["missing: model-00001-of-00002.safetensors"]
    hub.sent.clear()
    pull("other/sharded", where=hub.url)
    assert find_model_faults("other/sharded")[1] == [] and not hub.sent, (
        "the content was here, its name was not"
    )


def test_a_language_model_whose_shard_cannot_be_had_is_named(
    hub: hub_server.Hub, bert: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = contents(export(tmp_path / "split", shards=2))
    hub.add("other/sharded", {**split, "config.json": bert["config.json"]})
    snapshot = pull("other/sharded", where=hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert SafetensorsCheckpoint.from_reference("other/sharded") is not None
    (snapshot / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"other/sharded lacks model-00002-of.*`rectvlm weights pull other/sharded`"
    ) as caught:
        SafetensorsCheckpoint.from_reference("other/sharded")
    assert "\n" not in str(caught.value)


def test_what_is_not_here_cannot_be_verified(hub: hub_server.Hub, tmp_path: Path) -> None:
    for target in ("llama-3.1-70b", "large", "nowhere/at-all"):
        with pytest.raises(UserError, match=rf"Nothing called '{target}' is here"):
            find_model_faults(target)
    with pytest.raises(UserError, match=r"No manifest\.json in"):
        find_model_faults(str(tmp_path))
    with pytest.raises(UserError, match="checked when it is prepared"):
        find_model_faults("tiny-bert")
