"""The guard that a killed builder leaves behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from rectvlm.train.engine.build_lock import load_extension_exclusively, remove_stale_lock

HOLD = (
    "import os, sys; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); "
    "print('held', flush=True); sys.stdin.read()"
)
"""As torch's FileBaton takes it."""


def test_a_guard_is_removed_when_its_builder_is_dead_and_not_before(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "home").symlink_to(tmp_path / "disk")  # as a home that lies elsewhere
    lock = tmp_path / "home" / "lock"
    assert not remove_stale_lock(lock)
    builder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert builder.stdout is not None and builder.stdout.readline() == "held\n"
    assert not remove_stale_lock(lock) and lock.exists()
    builder.kill()
    builder.communicate()
    assert lock.exists()
    assert remove_stale_lock(lock) and not lock.exists()


def test_the_linker_gets_a_path_without_spaces_to_the_same_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries = tmp_path / "a b" / "lib"
    libraries.mkdir(parents=True)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setattr(cpp_extension, "TORCH_LIB_PATH", str(libraries))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    paths: list[str] = []

    def load() -> None:
        paths.append(cpp_extension.TORCH_LIB_PATH)

    load_extension_exclusively("first", load)
    load_extension_exclusively("first", load)
    assert str(libraries) == cpp_extension.TORCH_LIB_PATH
    assert " " not in paths[0] and Path(paths[0]).samefile(libraries)
    assert paths[0] == paths[1]  # another one would link the extension again

    Path(paths[0]).unlink()
    Path(paths[0]).symlink_to("/somewhere/else")  # another user's
    load_extension_exclusively("first", load)
    assert paths[2] != paths[0] and os.readlink(paths[2]) == str(libraries)
