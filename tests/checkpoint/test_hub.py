"""Hub ids load from a stand-in of the Hub, and what it refuses is one sentence."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hub_server
import pytest
from conftest import named
from huggingface_hub import constants

import rectvlm
from rectvlm import RectVLM, models
from rectvlm.checkpoint.strict_load import find_differing_tensors
from rectvlm.types import UserError

MakeFolder = Callable[[int], Path]


@pytest.fixture
def hub(
    exported: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[hub_server.Hub]:
    """A hub with one model of ours, and an empty cache."""
    with hub_server.running() as server:
        # HF_ENDPOINT sets both when the library is imported.
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
        folder = exported(3)
        files = {"pytorch_model.bin": b"a pickle"}
        for path in folder.rglob("*"):
            if path.is_file():
                files[path.relative_to(folder).as_posix()] = path.read_bytes()
        server.add("clinic/model", files)
        yield server


def test_a_hub_id_loads_and_stays_in_the_cache(
    hub: hub_server.Hub, full_model: RectVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    two: tuple[Any, ...] = ("encoder", "classifier")
    RectVLM.from_pretrained("clinic/model", "cpu", parts=two)
    assert hub.sent["encoder.safetensors"]
    assert not hub.sent["localizer.safetensors"]
    assert not any(name.startswith("adapter") for name in hub.sent)
    model = RectVLM.from_pretrained("clinic/model", "cpu", "main")
    names = full_model.checkpoint_tensor_names()
    assert find_differing_tensors(named(model, names), named(full_model, names)) == []
    assert not any(name.endswith(".bin") for name in hub.sent)

    sent = sum(hub.sent.values())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    RectVLM.from_pretrained("clinic/model", "cpu", parts=two)
    assert sum(hub.sent.values()) == sent
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        RectVLM.from_pretrained("clinic/other", "cpu")


def test_what_the_hub_refuses_is_one_sentence(
    hub: hub_server.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = hub.repositories["clinic/model"].files
    hub.add("clinic/gated", files, gated=True)
    hub.add("clinic/text", {"README.md": b"nothing else"})
    hub.add("clinic/foreign", {**files, "config.json": b'{"model_type": "llama"}'})
    refusals: list[tuple[tuple[Any, ...], str]] = [
        (("clinic/gated",), "clinic/gated is gated: accept its terms"),
        (("clinic/nothing",), "No repository clinic/nothing at .*, and no folder of that name"),
        (("clinic/model", "cpu", "v9"), "no revision 'v9'"),
        (("clinic/text",), "no model of rectvlm"),
        (("clinic/foreign",), "model of type 'llama'"),
        ((tmp_path / "nowhere",), "expected an exported folder"),
        (("no-owner",), "expected an exported folder"),
        ((tmp_path, "cpu", "v1"), "leave the revision out"),
        ((tmp_path,), r"expected config\.json, or checkpoints/step-…/config\.json"),
    ]
    for arguments, message in refusals:
        with pytest.raises(UserError, match=message) as caught:
            RectVLM.from_pretrained(*arguments)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:1 cannot be reached"):
        RectVLM.from_pretrained("clinic/other")


def test_the_package_exports_the_one_class() -> None:
    assert rectvlm.RectVLM is models.RectVLM
    with pytest.raises(AttributeError, match="RecVLM"):
        rectvlm.RecVLM  # noqa: B018
