"""Two starts of one run, and starts that are refused: what they leave of a run's folder."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launches import TWO, ending, finish, kill, metrics, settings, start, steps_done, wait_for

from rectvlm.checkpoint import run_folder

ONE_PROCESS = [sys.executable, "launch/phase1.py"]
MANY_STEPS = 100_000


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    """Launches of a test, none of which outlives it."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        if process.poll() is None:
            kill(process)


def holder_pid(runs: Path) -> int:
    return int(json.loads((runs / "tiny" / ".phase1.lock").read_text())["pid"])


def sentences(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("error: ")]


@pytest.mark.slow
def test_of_two_starts_one_trains_and_the_other_says_who_does(
    phantom_shards: Path, tmp_path: Path, processes: list[subprocess.Popen[str]]
) -> None:
    """Before the first checkpoint, where "no checkpoint" could be taken for "no run"."""
    save_never = "train.phases.phase1.save_every=1"
    arguments = [*settings(1, phantom_shards, tmp_path, MANY_STEPS), save_never]
    folder = tmp_path / "tiny" / "phase1"
    processes.append(start([*ONE_PROCESS, *arguments], tmp_path))
    wait_for(lambda: steps_done(folder) > 0, processes[0])
    begun = metrics(folder)[0]

    for more in ([], ["--resume", "auto"], ["--restart"]):
        processes.append(start([*ONE_PROCESS, *arguments, *more], tmp_path))
    for second in processes[1:]:
        code, stderr = finish(second)
        assert code == 2 and "Traceback" not in stderr, stderr[-3000:]
        (sentence,) = sentences(stderr)
        assert f"{folder} is in use by process {processes[0].pid} of " in sentence
    code, stderr = finish(start([*TWO, "launch/phase1.py", *arguments], tmp_path))
    assert code == 1  # the launcher's
    assert len(sentences(stderr)) == 1 and "is in use by process" in stderr, stderr[-3000:]
    assert metrics(folder)[0] == begun
    assert not (folder / "ending.json").exists()

    kill(processes[0])
    few = [*ONE_PROCESS, *settings(1, phantom_shards, tmp_path, 2), "--resume", "auto"]
    code, stderr = finish(start(few, tmp_path))
    assert code == 0, stderr[-3000:]
    earlier = folder.with_name("phase1.earlier-1")
    assert f"the earlier run of phase 1 is now in {earlier}" in stderr
    assert metrics(earlier)[0] == begun and len(metrics(folder)) == 2


@pytest.mark.slow
def test_a_refused_start_changes_nothing_and_a_dead_machines_lock_is_taken(
    phantom_shards: Path, tmp_path: Path, processes: list[subprocess.Popen[str]]
) -> None:
    """The run's folder is a link to another disk, which stays."""
    disk, folder = tmp_path / "disk", tmp_path / "tiny" / "phase1"
    disk.mkdir()
    folder.parent.mkdir()
    folder.symlink_to(disk, target_is_directory=True)
    lock = tmp_path / ".disk.lock"
    lock.write_text(
        '{"host": "node7", "node": "x", "pid": 1, "process_start": 0.0, "user": "anna", '
        '"since": "2026-11-28 10:00:00 UTC", "token": "ab"}'
    )
    hour_ago = time.time() - 3600
    os.utime(lock, (hour_ago, hour_ago))
    arguments = settings(1, phantom_shards, tmp_path, 2)
    code, stderr = finish(start([*ONE_PROCESS, *arguments], tmp_path))
    assert code == 0, stderr[-3000:]
    assert "process 1 of anna on node7" in stderr and "its lock is void" in stderr
    assert lock.read_bytes() == b"" and folder.is_symlink()
    finished = ending(folder)
    assert finished["code"] == 0

    foreign = tmp_path / "other" / "phase1"
    foreign.mkdir(parents=True)
    (foreign / "thesis.tex").touch()
    longer = settings(1, phantom_shards, tmp_path, 3)
    refused = {
        "No shards in": [*arguments, f"data.shards={tmp_path}"],
        "nowhere.json cannot be read": [*arguments, "--ds-config", "nowhere.json"],
        "already holds an unfinished run (up to step-000002 of 3 steps)": longer,
        "is no run's folder": [*arguments, "name=other", "--restart"],
    }
    for more in refused.values():
        processes.append(start([*ONE_PROCESS, *more], tmp_path))
    for reason, process in zip(refused, processes, strict=True):
        code, stderr = finish(process)
        assert code == 2, stderr[-3000:]
        assert len(sentences(stderr)) == 1 and reason.lower() in stderr.lower(), stderr[-1000:]
    assert ending(folder) == finished and (foreign / "thesis.tex").exists()
    assert [path.name for path in run_folder.list_checkpoints(folder)] == ["step-000002"]
