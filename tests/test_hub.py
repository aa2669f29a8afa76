"""Models as folders in the layout of Hugging Face: written, reopened, and refused with names."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rectvlm import RectVLM, checkpoint, hub, pretrained
from rectvlm.types import UserError


@pytest.fixture(scope="session")
def exported(tiny_run: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The folder of an untrained tiny model with the parts of a phase."""
    root = tmp_path_factory.mktemp("exported")

    def make(phase: int) -> Path:
        folder = root / f"phase{phase}"
        return folder if folder.exists() else hub.export(tiny_run(phase), folder)

    return make


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_an_exported_checkpoint_holds_its_tensors_bitwise(
    tiny_run: Callable[[int], Path], exported: Callable[[int], Path], phase: int
) -> None:
    folder = exported(phase)
    source = checkpoint.read_weights(checkpoint.find(tiny_run(phase), ""))
    assert pretrained.differing(checkpoint.read_weights(folder), source) == []
    model = RectVLM.from_pretrained(folder, "cpu")
    assert not model.training
