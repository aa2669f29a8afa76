"""Evaluation on several processes, killed and resumed: the same figures, and nothing mixed."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import phantom_sample

from rectvlm import folder_lock
from rectvlm.checkpoint import run_folder
from rectvlm.config import Config
from rectvlm.data.shards import write_shards
from rectvlm.evaluate.journal import EvaluationJournal
from rectvlm.evaluate.options import EvaluationOptions
from rectvlm.evaluate.process_ranks import ProcessRanks, read_ranks_from_environment
from rectvlm.evaluate.run import evaluate_checkpoint
from rectvlm.folder_lock import FolderLock
from rectvlm.types import UserError

OFTEN = ["--batch-size", "1", "--bootstrap", "50", "--device", "cpu"]
SECONDS = 240
N_TRAIN, N_CASES = 12, 21
"""Thresholds are fitted on the training cases, one by one, after the groups of the others."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, tiny: Config) -> Path:
    folder = tmp_path_factory.mktemp("more")
    write_shards(
        (
            phantom_sample(seed, tiny, "train" if seed < N_TRAIN else "valid")
            for seed in range(N_CASES)
        ),
        folder,
    )
    return folder


def start(run: Path, shards: Path, out: Path, rank: int, world: int) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "rectvlm",
        "evaluate",
        "--checkpoint",
        str(run),
        "--shards",
        str(shards),
    ]
    environment = os.environ | {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
    }
    return subprocess.Popen(
        [*command, "--out", str(out / "metrics.json"), *OFTEN],
        env=environment | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, log = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, log[-2000:]
    return out, " ".join(log.split())


def files(out: Path) -> dict[str, Any]:
    """What an evaluation wrote, without what may differ between runs."""
    metrics = json.loads((out / "metrics.json").read_text())
    for name in ("seconds", "processes"):
        del metrics[name]
    return {"metrics": metrics} | {
        name: (out / name).read_text() for name in ("cases.jsonl", "metrics.md")
    }


def lines(out: Path) -> dict[Path, int]:
    return {path: path.read_text().count("\n") for path in sorted(out.glob("cases/*/rank-*.jsonl"))}


@pytest.mark.slow
def test_two_processes_killed_and_gone_on_with_give_what_one_gives(
    tiny_run: Callable[[int], Path], shards: Path, tmp_path: Path
) -> None:
    """Two processes are killed with SIGKILL in the middle; two others finish as if one had run."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run(3), run)
    finish(start(run, shards, tmp_path / "one", 0, 1))
    expected = files(tmp_path / "one")
    expected["reports"] = (tmp_path / "one" / "reports.jsonl").read_text()
    assert sum(lines(tmp_path / "one").values()) == N_CASES

    out = tmp_path / "two"
    killed = [start(run, shards, out, rank, 2) for rank in range(2)]
    until = time.monotonic() + SECONDS
    while len(counted := lines(out)) < 2 or min(counted.values()) < 1:
        assert time.monotonic() < until and all(process.poll() is None for process in killed)
        time.sleep(0.02)
    for process in killed:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    before = lines(out)
    assert sum(before.values()) < N_CASES and not (out / "metrics.json").exists()
    torn = list(before)[1]
    with torn.open("a") as file:
        file.write('{"purpose":"evaluate","position":5,"ke')

    again = [start(run, shards, out, rank, 2) for rank in range(2)]
    (printed, log), (silent, _) = finish(again[0]), finish(again[1])
    assert (
        "Going on" in log and silent == "" and printed.splitlines()[-1] == str(out / "metrics.json")
    )
    # Nothing was done twice, and what was known was kept as it was.
    assert sum(lines(out).values()) == N_CASES
    got = files(out)
    got["reports"] = (out / "reports.jsonl").read_text()
    assert got == expected


def test_what_is_known_is_not_done_again_and_never_mixed(
    tiny_run: Callable[[int], Path], tiny: Config, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run(1), run)
    folder = run_folder.find_checkpoint(run, "")
    data = tmp_path / "shards"
    write_shards((phantom_sample(seed, tiny, "valid") for seed in (8, 9)), data)
    out = tmp_path / "out" / "metrics.json"

    def evaluated(**options: Any) -> dict[str, Any]:
        result = evaluate_checkpoint(
            run,
            data,
            out,
            device="cpu",
            options=EvaluationOptions(plots=False, bootstrap=20, **options),
        )
        assert result is not None
        return result.as_dict()

    def journals() -> int:
        return len(list(out.parent.glob("cases/*/rank-*.jsonl")))

    first = evaluated()
    names = next(out.parent.glob("cases/*/rank-*.jsonl"))
    begun = names.read_bytes()
    # Half of it is gone, as after a kill: the other half is used as it stands.
    kept = json.loads(begun.splitlines()[0])
    kept["probabilities"] = [0.25] * 18
    names.write_text(json.dumps(kept) + "\n" + begun.splitlines()[1].decode()[:50])
    second = evaluated()
    assert names.read_text().count("\n") == 2
    rows = [json.loads(line) for line in (out.parent / "cases.jsonl").read_text().splitlines()]
    assert rows[0]["probabilities"] == [0.25] * 18
    assert rows[1] == {
        name: value for name, value in json.loads(begun.splitlines()[1]).items() if name in rows[1]
    }
    assert second["fingerprint"] == first["fingerprint"] and journals() == 1
    (folder / "manifest.json").unlink()  # which would refuse other weights
    weights = folder / "encoder.safetensors"
    hidden = weights.read_bytes()
    assert evaluated()["classification"] == second["classification"]
    # Other weights, other shards, other options: nothing of what is there counts.
    changed = bytearray(hidden)
    changed[-1] ^= 1
    weights.write_bytes(bytes(changed))
    assert (
        evaluated()["fingerprint"]["weights"] != first["fingerprint"]["weights"] and journals() == 2
    )
    weights.write_bytes(hidden)
    write_shards((phantom_sample(seed, tiny, "valid") for seed in (9, 8)), data)
    assert (
        evaluated()["fingerprint"]["shards"] != first["fingerprint"]["shards"] and journals() == 3
    )
    evaluated(batch_size=2)
    assert journals() == 4


def test_the_first_process_says_when_another_has_stopped(tmp_path: Path) -> None:
    journal = EvaluationJournal(tmp_path, {"weights": "0"}, rank=0)
    with pytest.raises(UserError, match=r"2 of 2 cases are missing .* give the same command again"):
        journal.wait_for_records([("evaluate", 0), ("evaluate", 1)], timeout_seconds=0.2)


def hold_lock(path: Path) -> None:
    with FolderLock(path, "", ""):
        path.with_name("held").touch()
        time.sleep(60)


def test_a_second_evaluation_of_one_folder_says_who_is_at_work(
    tiny_run: Callable[[int], Path],
    phantom_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(folder_lock, "PATIENCE_SECONDS", 0.1)
    fork = multiprocessing.get_context("fork")
    holder = fork.Process(target=hold_lock, args=(tmp_path / ".rank-0000.lock",))
    holder.start()
    try:
        while not (tmp_path / "held").exists():
            time.sleep(0.01)
        out = tmp_path / "metrics.json"
        with pytest.raises(UserError, match=f"is being written by process {holder.pid} of .*--out"):
            evaluate_checkpoint(tiny_run(1), phantom_shards, out, device="cpu")
        assert not (tmp_path / "cases").exists()
    finally:
        holder.kill()
        holder.join()


def test_ranks_are_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert read_ranks_from_environment() == ProcessRanks() and ProcessRanks().is_main
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (
        read_ranks_from_environment() == ProcessRanks(3, 4, 1)
        and not read_ranks_from_environment().is_main
    )
    assert read_ranks_from_environment().choose_device("cpu") == "cpu"
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="RANK=3, WORLD_SIZE=3"):
        read_ranks_from_environment()
