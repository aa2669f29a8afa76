"""Prompt embeddings of a frozen text encoder."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rectvlm.models.prompt_embeddings import embed_texts
from rectvlm.pretrained import resolve_model
from rectvlm.types import UserError


def test_a_text_encoder_in_pickles_alone_is_refused(models_folder: None, tmp_path: Path) -> None:
    shutil.copytree(resolve_model("bundled:tiny-bert"), tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "pytorch_model.bin")
    both = embed_texts(tmp_path, ["No nodule."], 32)
    weights.unlink()
    with pytest.raises(UserError, match=r"in pytorch_model\.bin and not in safetensors"):
        embed_texts(tmp_path, ["No nodule."], 32)
    assert both.isfinite().all()


def test_a_text_encoder_without_weights_is_refused(models_folder: None, tmp_path: Path) -> None:
    shutil.copytree(resolve_model("bundled:tiny-bert"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        embed_texts(tmp_path, ["No nodule."], 32)
