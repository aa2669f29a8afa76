"""Launch files: read by the launcher that they are for, run as far as one machine goes.

Two machines are two network namespaces joined by a cable where the system allows that, else two
addresses of one. Slurm is played by two small programs of its names; what it starts, signals and
sends back to the queue is real.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import DistributedType
from launches import (
    CHECKOUT,
    LAUNCH,
    TIMEOUT,
    TWO,
    comparable,
    ending,
    environment,
    finish,
    kill,
    length,
    run,
    settings,
    steps_done,
    wait_for,
)
from launches import start as start_here

from rectvlm.checkpoint import Checkpoint
from rectvlm.train.recovery.exit_codes import ExitCode

SCRIPTS = ("launch/slurm/train.sbatch", "launch/slurm/node.sh")


# Files


@pytest.mark.parametrize(
    ("name", "machines", "processes"),
    [("cpu2", 1, 2), ("gpu1", 1, 1), ("h200x2", 1, 2), ("nodes", 2, 16)],
)
def test_accelerate_reads_its_files(name: str, machines: int, processes: int) -> None:
    """Keys that it does not know are an error of its own."""
    found = load_config_from_file(str(CHECKOUT / f"launch/accelerate/{name}.yaml"))
    assert isinstance(found, ClusterConfig)
    assert found.distributed_type == DistributedType.DEEPSPEED
    assert (found.num_machines, found.num_processes, found.mixed_precision) == (
        machines,
        processes,
        "bf16",
    )
    assert not found.use_cpu
    # DeepSpeed's settings are in ds_configs/; how other machines are started has no other place.
    assert found.deepspeed_config == (
        {"deepspeed_multinode_launcher": "standard"} if machines > 1 else {}
    )


def test_there_is_no_other_file_for_accelerate() -> None:
    names = {path.stem for path in (CHECKOUT / "launch/accelerate").iterdir()}
    assert names == {"cpu2", "gpu1", "h200x2", "nodes"}


def check_script(text: str) -> None:
    """Its syntax, and what shellcheck knows to go wrong."""
    for command in (
        ["bash", "-n"],
        [shutil.which("shellcheck") or "shellcheck", "--shell=bash", "-"],
    ):
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_sound(name: str) -> None:
    check_script((CHECKOUT / name).read_text())


def test_the_job_for_slurm_asks_to_be_told_in_time() -> None:
    text = (CHECKOUT / SCRIPTS[0]).read_text()
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in text.splitlines()
        if line.startswith("#SBATCH")
    )
    assert (
        options["signal"].startswith("B:USR1@")
        and "requeue" in options
        and options["ntasks-per-node"] == "1"
    )
    assert (
        f"FINISHED={ExitCode.FINISHED:d} LOST={ExitCode.RANK_LOST:d} "
        f"RESUME={ExitCode.STOPPED_BY_SIGNAL:d} " in text
    )


def test_the_job_for_skypilot() -> None:
    """Its parts; SkyPilot itself has read it (docs/how-to/train-on-many-machines.md)."""
    job = yaml.safe_load((CHECKOUT / "launch/sky/train.yaml").read_text())
    recovery = job["resources"]["job_recovery"]
    assert job["resources"]["use_spot"] is True and job["envs"]["BUCKET"] is None
    assert set(recovery["recover_on_exit_codes"]) == {
        ExitCode.RANK_LOST,
        ExitCode.STOPPED_BY_SIGNAL,
    }
    check_script(job["run"])
    check_script(job["setup"])
    assert "launch/accelerate/nodes.yaml" in job["run"] and "--resume auto" in job["run"]


def stand_in(folder: Path, name: str, text: str) -> None:
    """A program of a name, first on the path of what is run in a folder."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / name).write_text(text)
    (folder / "bin" / name).chmod(0o755)


def test_a_spot_machine_goes_on_after_a_phase_that_ended_as_it_was_asked_to(tmp_path: Path) -> None:
    """A launcher that received a signal fails, however its ranks ended; what they say counts."""
    (tmp_path / "rectvlm/bin").mkdir(parents=True)
    (tmp_path / "rectvlm/bin/activate").touch()
    endings = {1: ExitCode.FINISHED, 2: ExitCode.STOPPED_BY_SIGNAL}
    told = "\n".join(
        f'case "$*" in *phase{phase}.py*) echo \'{{"code": {code:d}}}\' '
        f'>"$RUNS/tiny/phase{phase}/ending.json" ;; esac'
        for phase, code in endings.items()
    )
    stand_in(tmp_path, "accelerate", f'#!/bin/sh\necho "$*" >>"$RUNS/launched"\n{told}\nexit 1\n')
    for phase in (1, 2, 3):
        (tmp_path / f"runs/tiny/phase{phase}").mkdir(parents=True)
    job = yaml.safe_load((CHECKOUT / "launch/sky/train.yaml").read_text())
    variables = {
        "HOME": str(tmp_path),
        "RUNS": str(tmp_path / "runs"),
        "CONFIG": "tiny",
        "NAME": "",
        "ARGUMENTS": "",
    }
    variables |= {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "PHASES": "1 2 3"}
    variables |= {
        f"SKYPILOT_{name}": "1" for name in ("NUM_NODES", "NUM_GPUS_PER_NODE", "NODE_IPS")
    }
    script = job["run"].replace("/runs", variables["RUNS"])
    done = subprocess.run(
        ["bash", "-c", script],
        env=variables | {"SKYPILOT_NODE_RANK": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == ExitCode.STOPPED_BY_SIGNAL, done.stdout + done.stderr
    launched = (tmp_path / "runs/launched").read_text().splitlines()
    assert ["phase1.py" in launched[0], "phase2.py" in launched[1], len(launched)] == [
        True,
        True,
        2,
    ]


# Two machines


@dataclass
class Network:
    """Two machines on this one: what goes before a command on each, and the first one's address."""

    before: list[list[str]]
    first: str
    environment: dict[str, str] = field(default_factory=dict)


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    names = [f"rectvlm{os.getpid()}{end}" for end in "ab"]
    cables = [f"rv{os.getpid()}{end}" for end in "ab"]

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            cables[0],
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            cables[1],
            "netns",
            names[1],
        )
        for number, (name, cable) in enumerate(zip(names, cables, strict=True), start=1):
            ip("-n", name, "address", "add", f"10.87.0.{number}/24", "dev", cable)
            for link in (cable, "lo"):
                ip("-n", name, "link", "set", link, "up")
    except (OSError, subprocess.CalledProcessError):
        _remove(names)
        yield Network([[], []], "127.0.0.1", {"GLOO_SOCKET_IFNAME": "lo"})
        return
    # This machine's name stands for its own loopback address in both: tell gloo which interface to
    # use.
    before = [
        ["ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={cable}"]
        for name, cable in zip(names, cables, strict=True)
    ]
    yield Network(before, "10.87.0.1")
    _remove(names)


def _remove(names: list[str]) -> None:
    for name in names:
        if shutil.which("ip"):
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


Machines = Callable[..., list["subprocess.Popen[str]"]]


@pytest.fixture
def on_both(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Machines]:
    """Start a launcher with one process on each machine; what still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []
    for name, value in network.environment.items():
        monkeypatch.setenv(name, value)

    def start(port: int, *arguments: str) -> list[subprocess.Popen[str]]:
        both = []
        for rank, before in enumerate(network.before):
            where = (
                "--machine_rank",
                str(rank),
                "--main_process_ip",
                network.first,
                "--main_process_port",
                str(port),
            )
            launch = [
                *LAUNCH,
                "--config_file",
                "launch/accelerate/nodes.yaml",
                "--num_processes",
                "2",
                *where,
            ]
            both.append(start_here([*before, *launch, *arguments], tmp_path))
        started.extend(both)
        return both

    yield start
    for process in started:
        if process.poll() is None:
            kill(process)


def phase_3(shards: Path, runs: Path, source: Path, steps: int) -> list[str]:
    arguments = settings(3, shards, runs, steps)
    return [
        "launch/phase3.py",
        *arguments,
        "--from",
        str(source),
        *length("phase3", steps, save_every=2),
    ]


@pytest.mark.slow
def test_two_machines_train_as_one_with_two_processes(
    on_both: Machines, tiny_run: Callable[[int], Path], phantom_shards: Path, tmp_path: Path
) -> None:
    """ZeRO-3 with a 4-bit language model: the same losses to the last digit, the same weights."""
    apart, together = tmp_path / "apart", tmp_path / "together"
    both = on_both(29611, *phase_3(phantom_shards, apart, tiny_run(2), 3))
    for process in both:
        code, stderr = finish(process)
        assert code == 0, stderr[-3000:]
    run([*TWO, *phase_3(phantom_shards, together, tiny_run(2), 3)], tmp_path)
    folders = [runs / "tiny/phase3" for runs in (apart, together)]
    assert steps_done(folders[0]) == 3
    assert comparable(folders[0]) == comparable(folders[1])
    ours, theirs = (Checkpoint.open(folder).read_tensors() for folder in folders)
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)
    from rectvlm.runs.read_runs import read_run

    sessions = [read_run(folder).sessions[-1] for folder in folders]
    assert [(session["world_size"], session["nodes"]) for session in sessions] == [(2, 2), (2, 1)]


@pytest.mark.slow
def test_a_machine_is_lost_and_comes_back(
    on_both: Machines, tiny_run: Callable[[int], Path], phantom_shards: Path, tmp_path: Path
) -> None:
    """The other one does not wait for it: it ends and says so.

    Both go on from the last whole checkpoint.
    """
    arguments = phase_3(phantom_shards, tmp_path, tiny_run(2), 60)
    folder = tmp_path / "tiny/phase3"
    first, second = on_both(29612, *arguments)
    wait_for(lambda: steps_done(folder) >= 3, first)
    kill(second)
    code, stderr = finish(first)
    assert code != 0 and "--resume auto" in stderr
    assert ending(folder)["code"] == ExitCode.RANK_LOST
    done = steps_done(folder)
    kept = Checkpoint.open(folder).training.step
    assert 2 <= kept <= done < 60
    again = [*arguments, *length("phase3", done + 2, save_every=2), "--resume", "auto"]
    for process in on_both(29613, *again):
        code, stderr = finish(process)
        assert code == 0, stderr[-3000:]
    assert [line["step"] for line in comparable(folder)] == list(range(1, done + 3))
    assert ending(folder)["code"] == ExitCode.FINISHED


# Slurm

SRUN = """#!{python}
# Stands in for Slurm's srun: the command once for each node, all here.
# What is sent to it is sent to each.
import os, signal, subprocess, sys

words = sys.argv[1:]
while words[0].startswith("-"):
    words.pop(0)
nodes = [
    subprocess.Popen(
        words, env=os.environ | {{"SLURM_NODEID": str(number)}}, start_new_session=True
    )
    for number in range(int(os.environ["SLURM_NNODES"]))
]
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(
        number,
        lambda number, _: [node.send_signal(number) for node in nodes if node.poll() is None],
    )
sys.exit(max(abs(node.wait()) for node in nodes))
"""
SCONTROL = """#!/bin/sh
# Stands in for Slurm's scontrol: both "nodes" are this machine.
# A job that goes back to the queue is written down.
case "$1" in
  show) echo 127.0.0.1; echo 127.0.0.1 ;;
  requeue) echo "$2" >>"$QUEUE" ;;
  *) exit 1 ;;
esac
"""


@dataclass
class Slurm:
    """The stand-in: starts the job's script as Slurm would."""

    folder: Path
    shards: Path
    queue: Path
    jobs: list["subprocess.Popen[str]"] = field(default_factory=list)
    phases: str = "1"

    def start(self, steps: int, restarts: int = 0, *more: str) -> "subprocess.Popen[str]":
        """The script on the first of two nodes with a process each."""
        variables = {
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{environment(self.folder)['PATH']}",
            "QUEUE": str(self.queue),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_NNODES": "2",
            "SLURM_RESTART_COUNT": str(restarts),
            "SLURM_SUBMIT_DIR": str(CHECKOUT),
            "GPUS_PER_NODE": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "CONFIG": "tiny",
            "NAME": "trial",
            "RUNS": str(self.folder / "runs"),
            "PHASES": self.phases,
            "MOST_RESTARTS": "2",
        }
        size = (
            f"data.shards={self.shards}",
            *length("phase1", steps, save_every=4),
        )
        # Slurm copies the script away before it runs it.
        shutil.copy(CHECKOUT / SCRIPTS[0], self.folder / "slurm_script")
        self.jobs.append(
            subprocess.Popen(
                ["bash", str(self.folder / "slurm_script"), *size, *more],
                env=environment(self.folder) | variables,
                cwd=CHECKOUT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return self.jobs[-1]

    @property
    def run(self) -> Path:
        return self.folder / "runs/trial/phase1"

    @property
    def requeued(self) -> int:
        """How often the job went back to the queue."""
        return self.queue.read_text().count("4711\n") if self.queue.exists() else 0


@pytest.fixture
def slurm(tmp_path: Path, phantom_shards: Path) -> Iterator[Slurm]:
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        stand_in(tmp_path, name, text)
    found = Slurm(tmp_path, phantom_shards, tmp_path / "queue")
    yield found
    for job in found.jobs:
        if job.poll() is None:
            kill(job)


def result(job: "subprocess.Popen[str]") -> tuple[int, str]:
    stdout, stderr = job.communicate(timeout=TIMEOUT)
    return job.returncode, stdout + stderr


def test_a_job_goes_back_for_its_other_phases_when_the_notice_comes_at_the_end_of_one(
    slurm: Slurm,
) -> None:
    """The launchers fail, since they were asked to end; the ranks have finished, and say so."""
    slurm.phases = "1 2"
    slurm.run.mkdir(parents=True)
    last = f"""#!/bin/sh
trap 'echo "{{\\"code\\": {ExitCode.FINISHED:d}}}" >"$RUNS/trial/phase1/ending.json"; exit 1' USR1
touch "$QUEUE.started"
while true; do sleep 0.1; done
"""
    stand_in(slurm.folder, "srun", last)
    job = slurm.start(8)
    wait_for(lambda: Path(f"{slurm.queue}.started").exists(), job)
    job.send_signal(signal.SIGUSR1)
    code, said = result(job)
    assert code == 0 and "phase 1 is done; back to the queue" in said, said
    assert slurm.requeued == 1


@pytest.mark.slow
def test_a_job_saves_before_its_time_is_over_and_goes_on(slurm: Slurm) -> None:
    job = slurm.start(400)
    wait_for(lambda: steps_done(slurm.run) >= 5, job)
    job.send_signal(signal.SIGUSR1)
    code, said = result(job)
    assert code == 0, said
    assert (
        slurm.requeued == 1 and "phase 1 was asked to stop and has saved; back to the queue" in said
    )
    done = steps_done(slurm.run)
    assert done < 400 and ending(slurm.run)["code"] == ExitCode.STOPPED_BY_SIGNAL
    assert (
        Checkpoint.open(slurm.run).training.step == done
    )  # saved at once, not at the last 4th step
    code, said = result(slurm.start(done + 3, 1))
    assert code == 0, said
    assert slurm.requeued == 1 and ending(slurm.run)["code"] == ExitCode.FINISHED
    assert [line["step"] for line in comparable(slurm.run)] == list(range(1, done + 4))
    code, said = result(slurm.start(done + 3, 2))  # there is nothing left to do
    assert code == 0 and slurm.requeued == 1, said


@pytest.mark.slow
def test_a_job_that_lost_a_rank_goes_back_but_not_for_ever(slurm: Slurm) -> None:
    for restarts in (0, 2):
        job = slurm.start(400, restarts)
        before = steps_done(slurm.run)
        wait_for(lambda before=before: steps_done(slurm.run) > max(4, before), job)
        node = [
            child
            for child in psutil.Process(job.pid).children(recursive=True)
            if _rank(child) == "1"
        ]
        node[0].kill()
        code, said = result(job)
        assert ending(slurm.run)["code"] == ExitCode.RANK_LOST
        assert slurm.requeued == 1
        assert (code, "lost a rank; back" in said, "times: enough" in said) == (
            (0, True, False) if restarts == 0 else (1, False, True)
        ), said


@pytest.mark.slow
def test_a_mistake_is_not_repeated(slurm: Slurm) -> None:
    code, said = result(slurm.start(4, 0, "encoder.witdh=3"))
    assert code not in (0, ExitCode.RANK_LOST, ExitCode.STOPPED_BY_SIGNAL) and slurm.requeued == 0
    assert "'width'" in said and "that would not change by starting it again" in said


def _rank(process: psutil.Process) -> Any:
    """Of a training process; None for others."""
    words = process.cmdline()
    if "launch/phase1.py" in words[:4] and not any("accelerate" in word for word in words[:4]):
        return process.environ().get("RANK")
    return None
