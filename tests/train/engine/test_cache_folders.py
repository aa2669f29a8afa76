"""Caches of libraries where the home cannot be written."""

import os
from pathlib import Path

import pytest

from rectvlm.train.engine.cache_folders import CACHE_VARIABLES, replace_unwritable_caches


@pytest.mark.parametrize("home", ["/dev/null", "/proc/no-home"])
def test_caches_move_when_the_home_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    monkeypatch.setenv("HOME", home)
    for variable in CACHE_VARIABLES:
        monkeypatch.setenv(variable, "")
    replace_unwritable_caches()
    for variable in CACHE_VARIABLES:
        folder = Path(os.environ[variable])
        assert folder.is_absolute() and not str(folder).startswith(home)
        (folder / "probe").touch()


def test_caches_that_can_be_written_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in CACHE_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", "/dev/null/triton")
    replace_unwritable_caches()
    assert Path(os.environ["TRITON_CACHE_DIR"]).is_dir()
    assert "MPLCONFIGDIR" not in os.environ
