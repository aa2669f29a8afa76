"""The guard that a killed builder leaves behind."""

import subprocess
import sys
from pathlib import Path

from rectvlm.train.engine.build_lock import remove_stale_lock

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
