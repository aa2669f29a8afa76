"""Start the processes of a phase: `rectvlm train N` and `python launch/phaseN.py`.

`accelerate launch` works as well, but it ends with 1 and a traceback of its own whatever a rank's
exit code was. Here the exit code is the ranks' (`recovery/exit_codes.py`), signals go to all ranks,
and a rank that is lost takes the others along. A single process is not started anew: it trains
itself.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rectvlm.machine import count_cores
from rectvlm.train.arguments import parse_arguments
from rectvlm.train.errors_of_ranks import ERRORS_VARIABLE
from rectvlm.train.phases import PHASES
from rectvlm.train.recovery.exit_codes import ExitCode
from rectvlm.train.recovery.signals import CAUGHT_SIGNALS, LAUNCHER_VARIABLE
from rectvlm.types import UserError

FORWARDED_SIGNALS = CAUGHT_SIGNALS
ENDING_SECONDS = 5.0
"""Time that ranks have to end by themselves after one of them has failed, seconds."""
SAVING_SECONDS = 60.0
"""Time after SIGTERM after which a rank is killed, seconds."""
POLL_SECONDS = 0.1
GPU_DEVICES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""Files that exist where there is a GPU's driver; without one torch is not imported to count."""
UNTOLD_KEYS = ("deepspeed_multinode_launcher",)
"""Keys of an Accelerate config file that concern Accelerate's launcher alone."""


@dataclass(frozen=True)
class LaunchPlan:
    """The processes to start."""

    processes: int
    """Number of processes on this machine."""
    machines: int = 1
    machine_rank: int = 0
    """Number of this machine, counted from 0."""
    main_address: str = "127.0.0.1"
    """Address of machine 0."""
    main_port: int = 0
    """Port at which the processes meet; 0 takes a free one."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of every process: what an Accelerate config file says."""

    @property
    def world_size(self) -> int:
        """Number of processes on all machines."""
        return self.processes * self.machines


def launch_phase(phase_number: int, argv: Sequence[str]) -> int | None:
    """Start a phase's processes and wait for them.

    Args:
        phase_number: number of the phase.
        argv: arguments of the phase's command line.

    Returns:
        The exit code; None where this process is the only one and is to train itself.
    """
    args = parse_arguments(PHASES[phase_number], argv)
    try:
        plan = plan_processes(args)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return ExitCode.USER_ERROR
    if plan.world_size == 1:
        os.environ |= plan.environment | {LAUNCHER_VARIABLE: str(os.getpid())}
        return None
    command = [sys.executable, "-m", "rectvlm", "train", str(phase_number), *argv]
    return run_processes(command, plan)


def plan_processes(args: Namespace) -> LaunchPlan:
    """Decide on the processes from the command line and an Accelerate config file.

    The command line comes first, then the file, then one process a GPU.

    Raises:
        UserError: the numbers or the file make no sense.
    """
    file = {} if args.accelerate_config is None else _read_accelerate_config(args.accelerate_config)
    machines = _choose(args.machines, file.get("num_machines"), 1)
    machine_rank = _choose(args.machine_rank, file.get("machine_rank"), 0)
    address = args.main_address or file.get("main_process_ip")
    port = _choose(args.main_port, file.get("main_process_port"), 0)
    environment = _export_accelerate_config(file)
    if machines < 1 or not 0 <= machine_rank < machines:
        raise UserError(
            f"Machine {machine_rank} of {machines}: machines are counted from 0, so "
            "--machine-rank must be less than --machines."
        )
    if machines > 1 and not (address and port):
        raise UserError(
            f"{machines} machines need --main-address and --main-port, the same on all of them: "
            "where machine 0 is reached."
        )
    gpus = 0 if environment.get("CUDA_VISIBLE_DEVICES") == "" else _count_gpus(environment)
    per_machine = None
    if file.get("num_processes") is not None:
        if int(file["num_processes"]) % machines:
            raise UserError(
                f"{args.accelerate_config} asks for {file['num_processes']} processes on "
                f"{machines} machines: expected as many on each; give --processes, their number on "
                "this one."
            )
        per_machine = int(file["num_processes"]) // machines
    processes = _choose(args.processes, per_machine, gpus or 1)
    if processes < 1:
        raise UserError(f"{processes} processes on each machine: give 1 or more (--processes).")
    if gpus and processes > gpus:
        raise UserError(
            f"{processes} processes were asked for, but this machine has {gpus} visible GPUs: "
            f"give --processes {gpus}, or CUDA_VISIBLE_DEVICES= to train on the CPU."
        )
    return LaunchPlan(processes, machines, machine_rank, address or "127.0.0.1", port, environment)


def _choose(*values: Any) -> int:
    """The first value that is given."""
    return int(next(value for value in values if value is not None))


def _read_accelerate_config(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"The Accelerate config file {path} cannot be read ({reason}): give one such as "
            "launch/accelerate/gpu1.yaml."
        ) from None
    numbers = ("num_processes", "num_machines", "machine_rank", "main_process_port")
    for key in numbers if isinstance(tree, dict) else ():
        value = tree.get(key)
        if value is not None and not str(value).isdecimal():
            raise UserError(f"{path} sets {key} to {value!r}: expected a number.")
    if not isinstance(tree, dict) or not {"num_processes", "distributed_type"} & set(tree):
        raise UserError(
            f"{path} is no Accelerate config file: expected keys such as num_processes, as in "
            "launch/accelerate/gpu1.yaml."
        )
    return tree


def _export_accelerate_config(file: dict[str, Any]) -> dict[str, str]:
    """Variables that say what a file asks for; the engine records what it does not follow."""
    environment: dict[str, str] = {}
    if file.get("use_cpu"):
        environment |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    elif str(file.get("gpu_ids") or "all") != "all":
        environment["CUDA_VISIBLE_DEVICES"] = str(file["gpu_ids"])
    if file.get("mixed_precision"):
        environment["ACCELERATE_MIXED_PRECISION"] = str(file["mixed_precision"])
    for name, section in file.items():
        if not name.endswith("_config") or not isinstance(section, dict):
            continue
        for key, value in section.items():
            if key not in UNTOLD_KEYS:
                environment[f"ACCELERATE_{key.upper()}"] = str(value)
    return environment


def _count_gpus(environment: dict[str, str]) -> int:
    if not any(Path(device).exists() for device in GPU_DEVICES):
        return 0
    os.environ |= environment
    import torch

    return torch.cuda.device_count()


def run_processes(command: Sequence[str], plan: LaunchPlan) -> int:
    """Run this machine's processes to their end.

    Returns:
        0, or the exit code of the first rank that failed for a reason of its own.
    """
    processes: list[subprocess.Popen[bytes]] = []
    errors_folder = tempfile.TemporaryDirectory(
        prefix="rectvlm-errors-", ignore_cleanup_errors=True
    )
    with errors_folder as errors, _forward_signals(processes) as received:
        environment = _shared_environment(plan) | {ERRORS_VARIABLE: errors}
        for local_rank in range(plan.processes):
            rank = plan.machine_rank * plan.processes + local_rank
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(local_rank)}
            processes.append(subprocess.Popen(command, env=environment | ranks))
        codes = _wait_for_all(processes)
    return _choose_exit_code(codes, received)


def _shared_environment(plan: LaunchPlan) -> dict[str, str]:
    port = plan.main_port
    if not port:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    threads = max(1, count_cores() // plan.processes)
    return (
        {"OMP_NUM_THREADS": str(threads)}
        | os.environ
        | plan.environment
        | {
            "WORLD_SIZE": str(plan.world_size),
            "LOCAL_WORLD_SIZE": str(plan.processes),
            "MASTER_ADDR": plan.main_address,
            "MASTER_PORT": str(port),
            LAUNCHER_VARIABLE: str(os.getpid()),
        }
    )


@contextmanager
def _forward_signals(processes: list[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Pass signals on to processes while it is open; yields the numbers of those received."""
    received: list[int] = []

    def forward(number: int, _frame: object) -> None:
        received.append(number)
        for process in processes:
            process.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in FORWARDED_SIGNALS}
    try:
        yield received
    finally:
        for process in processes:
            process.kill()  # none is left, unless an error ended the wait
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait_for_all(processes: Sequence[subprocess.Popen[bytes]]) -> dict[int, int]:
    """Wait until all processes have ended; those that outlive a failed one are ended.

    Returns:
        Exit codes by place in the list, in the order in which the processes ended.
    """
    codes: dict[int, int] = {}
    failed_at, is_terminated = 0.0, False
    while True:
        for number, process in enumerate(processes):
            if number not in codes and process.poll() is not None:
                codes[number] = process.returncode
                failed_at = failed_at or (time.monotonic() if process.returncode else 0.0)
        if len(codes) == len(processes):
            return codes
        waited = time.monotonic() - failed_at if failed_at else 0.0
        if waited > ENDING_SECONDS and not is_terminated:
            is_terminated = True
            for process in processes:
                process.terminate()
        if waited > ENDING_SECONDS + SAVING_SECONDS:
            for process in processes:
                process.kill()
        time.sleep(POLL_SECONDS)


def _choose_exit_code(codes: dict[int, int], received: Sequence[int]) -> int:
    """The exit code of the command from those of the ranks, in the order in which they ended."""
    failures = {number: code for number, code in codes.items() if code}
    if not failures:
        return ExitCode.FINISHED
    consequences = (ExitCode.RANK_LOST, ExitCode.STOPPED_BY_SIGNAL)
    for code in failures.values():
        if code > 0 and code not in consequences:
            return code
    if received and all(-code in received or code > 0 for code in failures.values()):
        # Ranks that die of the signal had not begun to train.
        return ExitCode.STOPPED_BY_SIGNAL
    for number, code in failures.items():
        if code < 0:
            name = signal.Signals(-code).name
            cause = " (often for want of memory)" if -code == signal.SIGKILL else ""
            sys.stderr.write(
                f"error: process {number} was ended by {name}{cause}; go on with --resume auto.\n"
            )
            break
    return ExitCode.RANK_LOST
