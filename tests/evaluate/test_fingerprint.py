"""Fingerprint of an evaluation: the code that decides a case, and the frozen language model."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from rectvlm.code_fingerprint import find_imported_modules
from rectvlm.evaluate.fingerprint import (
    FINGERPRINTED_MODULES,
    SAMPLED_BLOCK_BYTES,
    SAMPLED_BLOCKS,
    identify_language_model,
)
from rectvlm.types import UserError


def test_the_code_that_decides_a_case_counts_and_the_code_of_figures_does_not() -> None:
    modules = {
        name.removeprefix("rectvlm.") for name in find_imported_modules(FINGERPRINTED_MODULES)
    }
    assert {
        "data.loader",
        "evaluate.native_grid",
        "labels",
        "lesion_places",
        "metrics.lesion_overlap",
        "metrics.lesions",
        "models.report_generator",
    } <= modules
    figures = ("plots", "tables", "summary", "scans", "thresholds", "report_figures", "run")
    assert not modules & {f"evaluate.{name}" for name in figures}
    assert not modules & {"metrics.findings", "metrics.reports", "metrics.text_overlap"}
    assert not any(name.startswith(("train", "plan", "predict")) for name in modules)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    rows = np.random.default_rng(0).integers(
        0, 255, 3 * SAMPLED_BLOCK_BYTES * SAMPLED_BLOCKS, dtype=np.uint8
    )
    save_file({"rows": rows, "norm": np.ones(8, np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_a_language_model_is_known_by_its_contents(model: Path, tmp_path: Path) -> None:
    first = identify_language_model(str(model))
    assert first["reference"] == str(model)
    # A copy elsewhere, with other times and another page of its owner's, is the same one.
    shutil.copytree(model, tmp_path / "copy", copy_function=shutil.copyfile)
    (tmp_path / "copy" / "README.md").write_text("hello")
    assert identify_language_model(str(tmp_path / "copy"))["contents"] == first["contents"]
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "copy" / name).write_text("[]")
        assert identify_language_model(str(tmp_path / "copy"))["contents"] != first["contents"], (
            name
        )
        (tmp_path / "copy" / name).write_text("{}")
    assert identify_language_model(str(tmp_path / "copy"))["contents"] == first["contents"]
    rows = np.random.default_rng(1).integers(
        0, 255, 3 * SAMPLED_BLOCK_BYTES * SAMPLED_BLOCKS, dtype=np.uint8
    )
    save_file(
        {"rows": rows, "norm": np.ones(8, np.float32)}, tmp_path / "copy" / "model.safetensors"
    )
    assert identify_language_model(str(tmp_path / "copy"))["contents"] != first["contents"]


@pytest.mark.parametrize("byte", [0, 100, -1])
def test_of_a_large_file_the_head_and_the_end_count(byte: int, model: Path) -> None:
    before = identify_language_model(str(model))
    file = model / "model.safetensors"
    data = bytearray(file.read_bytes())
    assert len(data) > SAMPLED_BLOCK_BYTES * SAMPLED_BLOCKS
    data[byte] ^= 1
    file.write_bytes(data)
    assert identify_language_model(str(model)) != before


def test_a_hub_id_stands_for_itself_and_a_lost_folder_is_an_error(tmp_path: Path) -> None:
    assert identify_language_model("owner/name") == {"reference": "owner/name", "contents": None}
    with pytest.raises(UserError, match="No model at"):
        identify_language_model(str(tmp_path / "none"))
