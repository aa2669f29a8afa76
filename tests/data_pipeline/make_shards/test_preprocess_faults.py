"""Preprocessing that is killed, stopped, or whose disk fails: the same command then ends as if
nothing had been.

The quick tests start a run as a copy of a process that holds the libraries, which takes no time;
the slow ones give the command as a user does.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest

from data_pipeline.make_shards.shard_folder import preprocess
from data_pipeline.make_shards.workers import worker_context
from data_pipeline.preprocess import main
from rectvlm.data.shards import read_index
from rectvlm.types import UserError
from tests.preprocess_run import preprocess_small
from tests.small_cases import (
    GRID,
    SPACING,
    contents,
    lose_folder,
    never_end_at_all,
    say_what_is_wrong,
    small_case,
    small_cases,
    small_tree,
)

CHECKOUT = Path(__file__).resolve().parents[3]
TRAIN, VALID, PER_SHARD = 24, 4, 2
CASES = small_cases(TRAIN, VALID)
CASES[2], CASES[-1] = (replace(CASES[n], load=say_what_is_wrong) for n in (2, -1))
SEED = 20250611


def test_files_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / "raw_scans.tar").write_bytes(b"mine")
    preprocess(small_cases(2, 1), tmp_path, GRID, SPACING)
    assert (tmp_path / "raw_scans.tar").read_bytes() == b"mine"


def test_shards_of_other_cases_do_not_go_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING")  # an earlier test may have left another one
    preprocess(small_cases(2, 1), tmp_path, GRID, SPACING)
    assert "replaces" not in caplog.text
    preprocess(small_cases(2, 1), tmp_path, GRID, tuple(2 * size for size in SPACING))
    assert "holds 2 shards of other cases, settings or code, which this run replaces" in caplog.text


@pytest.mark.parametrize("name", ["index.json", "manifest.json"])
def test_a_folder_with_an_index_of_something_else_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"scans": [1, 2]}')
    with pytest.raises(UserError, match=f"{name} is no list of shards.*--out"):
        preprocess(small_cases(2, 1), tmp_path, GRID, SPACING)
    assert (tmp_path / name).read_text() == '{"scans": [1, 2]}'


# What a run leaves


def everything(out: Path) -> dict[str, bytes]:
    """All files of an output but the lock, temporary ones included."""
    parts = {
        f".parts/{name}": data for name, data in contents(out / ".parts").items() if name != "lock"
    }
    return contents(out) | parts


def tars(files: dict[str, bytes]) -> int:
    return sum(name.endswith(".tar") for name in files)


def state(out: Path) -> set[tuple[str, int]]:
    """Names and times of all files, whatever comes and goes meanwhile."""
    found = set()
    for path in out.rglob("*"):
        with suppress(FileNotFoundError):
            found.add((str(path), path.stat().st_mtime_ns))
    return found


def wait_for_work(out: Path, running: Callable[[], bool]) -> None:
    """Until the first file changes."""
    before = state(out)
    while state(out) == before and running():
        time.sleep(0.002)


def wait_for_shard(out: Path) -> None:
    while not list(out.glob("*.tar")):
        time.sleep(0.002)


# Quick


@dataclass(frozen=True)
class Unbroken:
    """What a run comes to that nothing disturbs."""

    files: dict[str, bytes]
    seconds: float
    """From the first file that it wrote to its end."""


def finish(out: Path) -> None:
    """The same run again, by other means: what comes out must not depend on them."""
    preprocess(CASES, out, GRID, SPACING, samples_per_shard=PER_SHARD, workers=2)


def start(
    out: Path, log: Path, per_shard: int = PER_SHARD, limit: int | None = None
) -> BaseProcess:
    """A run in a process of its own."""
    context = worker_context()
    process = context.Process(target=preprocess_small, args=(CASES, out, log, per_shard, limit))  # type: ignore[attr-defined]
    process.start()
    return process


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    root = tmp_path_factory.mktemp("unbroken")
    finish(root / "workers")
    process = start(root / "out", root / "log")
    wait_for_work(root / "out", process.is_alive)
    began = time.monotonic()
    process.join()
    seconds = time.monotonic() - began
    assert everything(root / "out") == everything(root / "workers")
    assert len(read_index(root / "out").select_split(None)) == TRAIN + VALID - 2
    return Unbroken(everything(root / "out"), seconds)


def require_stopped(unbroken: dict[str, bytes], out: Path, said: str, words: str) -> None:
    """One sentence, no half file under any name, and what was finished is kept."""
    assert said.startswith(f"Shards cannot be written to {out} ({words}") and said.count("\n") == 0
    assert said.endswith("then give the same command again; finished shards are kept.")
    kept = everything(out)
    assert kept.items() <= unbroken.items()
    assert not {"index.json", "manifest.json"} & set(kept)


def test_a_run_that_is_killed_again_and_again_goes_on_to_the_same_files(
    unbroken: Unbroken, tmp_path: Path
) -> None:
    moments, out, hits = random.Random(SEED), tmp_path / "out", 0
    for _ in range(3):
        process = start(out, tmp_path / "log")
        wait_for_work(out, process.is_alive)
        time.sleep(moments.uniform(0, 0.5 * unbroken.seconds))
        process.kill()
        process.join()
        hits += process.exitcode == -signal.SIGKILL
    assert hits >= 2
    finish(out)
    assert everything(out) == unbroken.files


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command")
    command = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_stops_the_run_and_room_lets_it_go_on(
    unbroken: Unbroken, small_disk: Path
) -> None:
    out = small_disk / "out"
    with pytest.raises(UserError) as error:
        finish(out)
    require_stopped(
        unbroken.files, out, str(error.value), "No space left on device): make room there"
    )
    assert 3 <= tars(everything(out)) < tars(unbroken.files)
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    finish(out)
    assert everything(out) == unbroken.files


@pytest.mark.parametrize("limit", [1000, 40_000, 71_000])
def test_files_that_may_not_grow_stop_the_run(
    unbroken: Unbroken, tmp_path: Path, limit: int
) -> None:
    """The system's limit as a full disk, which works on every machine: in a record, in a sample, at
    a shard's end."""
    out, log = tmp_path / "out", tmp_path / "log"
    process = start(out, log, limit=limit)
    process.join()
    assert process.exitcode == 1
    require_stopped(
        unbroken.files,
        out,
        log.read_text().strip(),
        "File too large): raise the limit of file sizes",
    )
    finish(out)
    assert everything(out) == unbroken.files


def test_an_output_folder_that_goes_away(tmp_path: Path) -> None:
    out = tmp_path / "out"
    cases = small_cases(8, 0)
    whole = preprocess(cases, tmp_path / "whole", GRID, SPACING, samples_per_shard=2)
    losing = [*cases[:5], lose_folder(cases[5], out), *cases[6:]]
    with pytest.raises(
        UserError, match=r"finished shards are kept|check it, then give the same command again"
    ):
        preprocess(losing, out, GRID, SPACING, samples_per_shard=2, workers=2)
    assert not (out / "index.json").exists()
    assert preprocess(cases, out, GRID, SPACING, samples_per_shard=2).index == whole.index
    assert everything(out) == everything(tmp_path / "whole")


def test_an_output_that_cannot_be_written_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"cannot be written to .*/file/out \(Not a directory\): check the place"
    ):
        preprocess([small_case(0)], tmp_path / "file" / "out", GRID, SPACING, workers=2)
    if os.geteuid() != 0:  # root may write all
        (tmp_path / "shut").mkdir(mode=0o500)
        with pytest.raises(UserError, match=r"Permission denied"):
            preprocess([small_case(0)], tmp_path / "shut" / "out", GRID, SPACING)


def test_a_second_run_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = start(out, tmp_path / "log", per_shard=1)
    wait_for_shard(out)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGSTOP)
    try:
        with pytest.raises(UserError, match="Another run is writing to"):
            preprocess(small_cases(1, 0), out, GRID, SPACING)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    first.join()
    assert first.exitcode == 0
    assert len(read_index(out).select_split(None)) == TRAIN + VALID - 2


# Slow: the command


@dataclass(frozen=True)
class Download:
    """A CT-RATE download with two broken volumes, and what the command makes of it."""

    root: Path
    files: dict[str, bytes] = None  # type: ignore[assignment]
    before: float = 0
    """Seconds until the command wrote its first file."""
    seconds: float = 0
    """From then to its end."""

    @property
    def greeting(self) -> list[str]:
        """What the command says before its work."""
        return [f"reading the tables of {self.root}", "28 cases; shards to make: 14"]

    def arguments(self, out: Path, per_shard: int = PER_SHARD) -> list[str]:
        tree = [
            "--config",
            "tiny",
            "--ct-rate",
            str(self.root),
            "--lesions",
            str(self.root / "lesions"),
        ]
        return [*tree, "--out", str(out), "--workers", "2", "--samples-per-shard", str(per_shard)]

    def command(
        self, out: Path, per_shard: int = PER_SHARD, limit: int | None = None
    ) -> "subprocess.Popen[str]":
        """In a process group of its own."""
        within = ["prlimit", f"--fsize={limit}"] if limit else []
        return subprocess.Popen(
            [
                *within,
                sys.executable,
                "-m",
                "data_pipeline.preprocess",
                *self.arguments(out, per_shard),
            ],
            cwd=CHECKOUT,
            start_new_session=True,
            # Tests that run in the background were told to ignore Ctrl-C, and would hand that on.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, out: Path) -> None:
        """The same to its end, in this process; the result is that of an unbroken run."""
        assert main(self.arguments(out)) == 0
        assert everything(out) == self.files


@pytest.fixture(scope="module")
def download(tmp_path_factory: pytest.TempPathFactory) -> Download:
    root = tmp_path_factory.mktemp("download")
    tree = small_tree(root / "ct", TRAIN, VALID)
    for name in ("train_3_a_1", "valid_2_a_1"):
        os.truncate(tree.path(name), 3000)
    began = time.monotonic()
    process = Download(root / "ct").command(root / "out")
    wait_for_work(root / "out", lambda: process.poll() is None)
    wrote = time.monotonic()
    process.communicate()
    ended = time.monotonic()
    assert process.returncode == 0
    assert len(read_index(root / "out").select_split(None)) == TRAIN + VALID - 2
    return Download(root / "ct", everything(root / "out"), wrote - began, ended - wrote)


def kill_group(process: "subprocess.Popen[str]") -> bool:
    """Whether it was still running."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def of_session(leader: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.mark.slow
def test_kills_of_the_group_at_20_random_moments(download: Download, tmp_path: Path) -> None:
    """Each of a run of its own: two before its first file, the others between that and its end."""
    moments, hits = random.Random(SEED), 0
    for number in range(20):
        out = tmp_path / f"out{number}"
        process = download.command(out)
        if number < 2:
            time.sleep(moments.uniform(0, download.before))
        else:
            wait_for_work(out, lambda process=process: process.poll() is None)  # type: ignore[misc]
            # The run that was timed may have had a busier machine than this one.
            time.sleep(moments.uniform(0, 0.75 * download.seconds))
        hits += kill_group(process)
        download.finish(out)
    assert hits >= 14


@pytest.mark.slow
def test_a_chain_of_kills_without_an_end_between_them(download: Download, tmp_path: Path) -> None:
    moments, out, number, hits = random.Random(SEED + 1), tmp_path / "out", 12, 0
    for _ in range(number):
        process = download.command(out)
        wait_for_work(out, lambda process=process: process.poll() is None)  # type: ignore[misc]
        time.sleep(moments.uniform(0, 0.4 * download.seconds / number))
        hits += kill_group(process)
        whole = {name: data for name, data in contents(out).items() if name.endswith(".tar")}
        assert whole.items() <= download.files.items()
    assert hits >= number // 2
    download.finish(out)


@pytest.mark.slow
def test_no_worker_goes_on_when_its_run_alone_is_killed(download: Download, tmp_path: Path) -> None:
    """All cases in one shard, which an orphan would write seconds later."""
    out = tmp_path / "out"
    process = download.command(out, per_shard=TRAIN)
    while not list(out.glob(".train-*.tmp")):  # the shard, half written
        time.sleep(0.002)
    family = of_session(process.pid)
    assert len(family) > 2
    process.kill()
    process.communicate()
    before = everything(out)
    psutil.wait_procs(family, timeout=5)
    assert of_session(process.pid) == []
    time.sleep(3 * download.seconds)
    assert everything(out) == before and "train-000000.tar" not in before


@pytest.mark.slow
def test_ctrl_c_on_a_terminal_ends_with_one_sentence(download: Download, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = download.command(out)
    wait_for_shard(out)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130
    *before, last = said.splitlines()
    assert last == "stopped; finished shards are kept, and the same command goes on with the rest"
    assert before == download.greeting
    assert of_session(process.pid) == []
    assert everything(out).items() < download.files.items()
    download.finish(out)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prlimit") is None, reason="needs prlimit of util-linux")
def test_the_command_says_in_one_sentence_that_it_cannot_write(
    download: Download, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = download.command(out, limit=60_000)
    _, said = process.communicate()
    assert process.returncode == 2
    *before, last = said.splitlines()
    assert before == download.greeting
    require_stopped(download.files, out, last, "File too large): raise the limit of file sizes")
    download.finish(out)


@pytest.mark.slow
def test_a_case_that_no_alarm_can_stop_costs_its_worker_and_no_more(tmp_path: Path) -> None:
    cases = small_cases(4, 1)
    cases[1] = replace(cases[1], load=never_end_at_all)
    outcome = preprocess(
        cases, tmp_path, GRID, SPACING, samples_per_shard=2, workers=2, timeout_seconds=1
    )
    assert [one.key for one in outcome.rejected] == ["small_1"]
    assert outcome.rejected[0].reason == "ended the process that worked on it"
    assert len(outcome.index.select_split(None)) == 4
