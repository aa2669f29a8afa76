"""The checkpoints of a run: found, pruned, and missed with a remedy."""

from pathlib import Path

import pytest

from rectvlm.checkpoint.run_folder import (
    find_checkpoint,
    list_checkpoints,
    prune_checkpoints,
    step_folder,
)
from rectvlm.types import UserError


def make_checkpoint(phase_folder: Path, step: int) -> Path:
    folder = step_folder(phase_folder, step)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_the_newest_is_found_and_partial_ones_are_not(tmp_path: Path) -> None:
    for step in (4, 12, 8):
        make_checkpoint(tmp_path, step)
    partial = tmp_path / "checkpoints" / ".step-000016.partial"
    make_checkpoint(tmp_path, 16).rename(partial)
    step_folder(tmp_path, 20).mkdir()  # without config.json it is no checkpoint
    names = [path.name for path in list_checkpoints(tmp_path)]
    assert names == ["step-000004", "step-000008", "step-000012"]
    assert find_checkpoint(tmp_path, "").name == "step-000012"
    assert find_checkpoint(step_folder(tmp_path, 4), "") == step_folder(tmp_path, 4)
    prune_checkpoints(tmp_path, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000008", "step-000012"]
    assert partial.is_dir()


def test_the_newest_is_found_beyond_six_digits(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        make_checkpoint(tmp_path, step)
    assert find_checkpoint(tmp_path, "").name == "step-1000000"


def test_nothing_there_gives_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.*do this instead"):
        find_checkpoint(tmp_path / "nowhere", "do this instead")
