"""Processes that a phase starts itself: their number, exit codes, signals, and none left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import launches
import psutil
import pytest

from rectvlm.train import launch
from rectvlm.train.arguments import parse_arguments
from rectvlm.train.launch import LaunchPlan, plan_processes, run_processes
from rectvlm.train.phases import PHASES
from rectvlm.train.recovery.exit_codes import ExitCode
from rectvlm.types import UserError

TWO = LaunchPlan(processes=2)


def plan(*words: str) -> LaunchPlan:
    return plan_processes(parse_arguments(PHASES[1], words))


def python(code: str) -> list[str]:
    """A command whose ranks run a line of Python; `rank` is theirs."""
    return [
        sys.executable,
        "-c",
        f"import os, signal, sys, time\nrank = os.environ['RANK']\n{code}",
    ]


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "ENDING_SECONDS", 0.2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def earlier_children() -> set[psutil.Process]:
    """Child processes that other tests have left."""
    return set(psutil.Process().children(recursive=True))


def new_children(earlier_children: set[psutil.Process]) -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True)) - earlier_children


def test_accelerates_files_say_how_many_processes_start() -> None:
    assert plan() == LaunchPlan(processes=1)
    assert plan("--accelerate-config", "launch/accelerate/cpu2.yaml").processes == 2
    given = ("--processes", "3", "--accelerate-config", "launch/accelerate/cpu2.yaml")
    assert plan(*given).processes == 3
    nodes = ("--accelerate-config", "launch/accelerate/nodes.yaml", "--machine-rank", "1")
    found = plan(*nodes)
    assert (found.processes, found.machines, found.world_size) == (8, 2, 16)
    assert (found.machine_rank, found.main_port) == (1, 29500)


def test_a_config_file_passes_on_what_the_engine_records(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    text = "distributed_type: NO\nuse_cpu: true\nmixed_precision: fp16\nnum_processes: 1\n"
    file.write_text(f"{text}dynamo_config: {{dynamo_backend: INDUCTOR}}\n")
    environment = plan("--accelerate-config", str(file)).environment
    assert environment == {
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_MIXED_PRECISION": "fp16",
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--processes", "0"], "0 processes on each machine"),
        (["--machines", "2"], "2 machines need --main-address and --main-port"),
        (["--machines", "2", "--machine-rank", "2"], "Machine 2 of 2"),
        (["--accelerate-config", "missing.yaml"], "missing.yaml cannot be read"),
        (["--accelerate-config", "ds_configs/phase1.json"], "is no Accelerate config file"),
    ],
)
def test_numbers_and_files_that_make_no_sense_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(*words)


def test_processes_that_machines_cannot_share_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text("num_processes: 5\nnum_machines: 2\n")
    meeting = ("--main-address", "127.0.0.1", "--main-port", "29500")
    with pytest.raises(UserError, match="5 processes on 2 machines"):
        plan("--accelerate-config", str(file), *meeting)


def test_an_error_that_all_ranks_meet_is_said_once(capfd: pytest.CaptureFixture[str]) -> None:
    lines = (
        "from rectvlm.train.errors_of_ranks import claim_error",
        "texts = ['shared', 'of rank ' + rank]",
        "[print(text, flush=True) for text in texts if claim_error(text)]",
    )
    assert run_processes(python("; ".join(lines)), TWO) == 0
    assert sorted(capfd.readouterr().out.splitlines()) == ["of rank 0", "of rank 1", "shared"]


def test_ranks_know_each_other_and_success_is_0(tmp_path: Path) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    code = f"open(sys.argv[1] + rank, 'w').write(' '.join(os.environ[n] for n in {names}))"
    machine = LaunchPlan(2, machines=2, machine_rank=1, main_address="first", main_port=1)
    assert run_processes([*python(code), f"{tmp_path}/"], machine) == 0
    assert sorted(path.read_text() for path in tmp_path.iterdir()) == [
        "2 0 4 2 first",
        "3 1 4 2 first",
    ]


@pytest.mark.parametrize("code", [ExitCode.USER_ERROR, ExitCode.FAILED, ExitCode.WRITE_FAILED])
def test_the_exit_code_is_that_of_the_rank_that_failed(code: int) -> None:
    assert run_processes(python(f"sys.exit({code} if rank == '1' else 69)"), TWO) == code


def test_a_rank_that_fails_alone_takes_the_others_along(
    earlier_children: set[psutil.Process],
) -> None:
    assert run_processes(python("sys.exit(65) if rank == '1' else time.sleep(60)"), TWO) == 65
    assert not new_children(earlier_children)


def test_a_killed_rank_is_a_lost_one(capfd: pytest.CaptureFixture[str]) -> None:
    code = "os.kill(os.getpid(), 9) if rank == '1' else sys.exit(69)"
    assert run_processes(python(code), TWO) == ExitCode.RANK_LOST
    assert "process 1 was ended by SIGKILL (often for want of memory)" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("saves", [True, False])
def test_signals_reach_all_ranks_and_a_stopped_run_says_so(
    tmp_path: Path, number: signal.Signals, saves: bool, earlier_children: set[psutil.Process]
) -> None:
    handler = "lambda *_: sys.exit(75)" if saves else "signal.SIG_DFL"
    code = f"signal.signal({number}, {handler})\nopen(sys.argv[1] + rank, 'w')\ntime.sleep(60)"

    def send_when_both_run() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=send_when_both_run).start()
    command = [*python(code), f"{tmp_path}/"]
    assert run_processes(command, TWO) == ExitCode.STOPPED_BY_SIGNAL
    assert not new_children(earlier_children)


@pytest.mark.parametrize("command", [["-m", "rectvlm", "train", "2"], ["launch/phase2.py"]])
def test_mistakes_end_with_one_sentence_and_code_2(tmp_path: Path, command: list[str]) -> None:
    process = subprocess.run(
        [sys.executable, *command, "--processes", "2", "trian.seed=1"],
        cwd=launches.CHECKOUT,
        env=launches.environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2
    assert process.stderr.startswith("error: Override 'trian.seed=1'")
    assert len(process.stderr.splitlines()) == 1


@pytest.mark.slow
def test_shards_that_do_not_suit_are_one_line_of_two_ranks(
    tmp_path: Path, phantom_shards: Path
) -> None:
    command = [sys.executable, "-m", "rectvlm", "train", "1", "--processes", "2"]
    command += [*launches.settings(1, phantom_shards, tmp_path, 2), "data.grid=[16,32,32]"]
    process = subprocess.run(
        command, cwd=launches.CHECKOUT, env=launches.environment(tmp_path), capture_output=True
    )
    assert process.returncode == 2
    assert process.stderr.count(b"error:") == 1, process.stderr


@pytest.mark.slow
def test_two_processes_save_when_stopped_and_go_on(tmp_path: Path, phantom_shards: Path) -> None:
    command = [sys.executable, "launch/phase1.py", "--processes", "2", "--resume", "auto"]
    command += launches.settings(1, phantom_shards, tmp_path / "runs", steps=400)
    folder = tmp_path / "runs" / "tiny" / "phase1"
    process = launches.start(command, tmp_path)
    launches.wait_for(lambda: launches.steps_done(folder) >= 1, process)
    process.terminate()
    code, stderr = launches.finish(process)
    assert code == ExitCode.STOPPED_BY_SIGNAL, stderr
    assert "Traceback" not in stderr
    done = launches.steps_done(folder)
    process = launches.start([*command, *launches.length("phase1", done + 2)], tmp_path)
    code, stderr = launches.finish(process)
    assert code == 0, stderr
    assert launches.steps_done(folder) == done + 2


@pytest.mark.slow
def test_no_rank_outlives_a_killed_command(tmp_path: Path, phantom_shards: Path) -> None:
    command = [sys.executable, "-m", "rectvlm", "train", "1", "--processes", "2"]
    command += launches.settings(1, phantom_shards, tmp_path / "runs", steps=4000)
    folder = tmp_path / "runs" / "tiny" / "phase1"
    process = launches.start(command, tmp_path)
    launches.wait_for(lambda: launches.steps_done(folder) >= 1, process)
    ranks = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    _, alive = psutil.wait_procs(ranks, timeout=60)
    process.communicate()
    assert not alive
