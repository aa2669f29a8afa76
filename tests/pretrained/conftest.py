"""A stand-in of the Hub, a real exported model, and a model of others as hubs hold it."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import hub_server
import pytest
from huggingface_hub import constants

from rectvlm.checkpoint.export import export_checkpoint
from rectvlm.pretrained import resolve_model


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_server.Hub]:
    """A hub that is at hand, and an empty home of its user."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("RECTVLM_MODELS", str(tmp_path / "models"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with hub_server.running() as running:
        yield running


@pytest.fixture(scope="session")
def exported_model(
    tiny_run: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A tiny model with all parts, exported; not to be changed."""
    return export_checkpoint(tiny_run(3), tmp_path_factory.mktemp("exported") / "model")


@pytest.fixture
def exported(exported_model: Path, tmp_path: Path) -> Path:
    """That model, to be changed."""
    return shutil.copytree(exported_model, tmp_path / "exported")


@pytest.fixture
def bert(tmp_path: Path) -> dict[str, bytes]:
    """Files of a model of others as hubs hold it, with many that are not needed."""
    folder = Path(resolve_model("bundled:tiny-bert"))
    files = hub_server.read_files(folder)
    unneeded = (
        "pytorch_model.bin",
        "tf_model.h5",
        "original/consolidated.pth",
        "onnx/model.safetensors",
        "README.md",
    )
    return {**files, **dict.fromkeys(unneeded, b"not needed")}
