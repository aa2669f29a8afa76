"""Checkpoints of tiny models in which no tensor has the value of a new model, and their exports."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rectvlm import RectVLM
from rectvlm.checkpoint import Checkpoint
from rectvlm.checkpoint.export import export_checkpoint
from rectvlm.finding_thresholds import THRESHOLDS_FILE
from rectvlm.labels import FINDINGS

MakeFolder = Callable[[int], Path]
"""Folder of a phase's model."""


@pytest.fixture(scope="session")
def trained_checkpoint(
    tiny_run: MakeFolder, tmp_path_factory: pytest.TempPathFactory
) -> MakeFolder:
    """A checkpoint after step 7 with thresholds; LoRA, which starts with zeros, has values."""
    root = tmp_path_factory.mktemp("trained")

    def make(phase: int) -> Path:
        folder = root / f"phase{phase}" / "checkpoints" / "step-000007"
        if not folder.exists():
            model = RectVLM.from_pretrained(tiny_run(phase), "cpu")
            source = Checkpoint.open(tiny_run(phase))
            torch.manual_seed(phase)
            tensors = {}
            for name, tensor in source.read_tensors().items():
                noise = 0.05 * torch.randn(tensor.shape)
                tensors[name] = (tensor.float() + noise).to(tensor.dtype)
            training = replace(source.training, step=7, samples_seen=28)
            model.save_pretrained(folder, state_dict=tensors, training=training)
            thresholds = {"values": dict.fromkeys(FINDINGS, 0.5)}
            (folder / THRESHOLDS_FILE).write_text(json.dumps(thresholds))
        return folder

    return make


@pytest.fixture(scope="session")
def exported(
    trained_checkpoint: MakeFolder, tmp_path_factory: pytest.TempPathFactory
) -> MakeFolder:
    """Those checkpoints as exported folders; not to be changed."""
    root = tmp_path_factory.mktemp("exported")

    def make(phase: int) -> Path:
        folder = root / f"phase{phase}"
        return folder if folder.exists() else export_checkpoint(trained_checkpoint(phase), folder)

    return make


@pytest.fixture
def copied(exported: MakeFolder, tmp_path: Path) -> MakeFolder:
    """Those folders, to be changed."""
    return lambda phase: shutil.copytree(exported(phase), tmp_path / f"phase{phase}")


@pytest.fixture
def unlisted(copied: MakeFolder) -> MakeFolder:
    """Those folders without a manifest, so that their files can be changed unnoticed."""

    def make(phase: int) -> Path:
        folder = copied(phase)
        (folder / "manifest.json").unlink()
        return folder

    return make


@pytest.fixture(scope="session")
def full_model(exported: MakeFolder) -> RectVLM:
    """The model with all parts."""
    return RectVLM.from_pretrained(exported(3), "cpu")
