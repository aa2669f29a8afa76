"""Where a run came from: `run.json`, with one session for each time that it was started.

RUN/phaseN/run.json         sessions: command, code, versions, machine, start, end, how it ended
RUN/phaseN/code-1.patch     what was not committed when the first session started; `git apply` on
                            the named commit restores it
"""

import contextlib
import hashlib
import json
import logging
import os
import platform
import shlex
import socket
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import psutil
import torch

from rectvlm.files import atomic_file
from rectvlm.machine import package_versions
from rectvlm.runs.run_files import SESSIONS_FILE
from rectvlm.train.logging.git_state import read_git_state
from rectvlm.train.recovery.signals import LAUNCHER_VARIABLE

log = logging.getLogger(__name__)

MAX_PATCH_BYTES = 2_000_000
"""Size of a patch, bytes at most; a longer one is cut off, and `run.json` says so."""
RECORDED_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "WANDB_MODE",
    "RECTVLM_TRACKERS",
    "RECTVLM_PEAK_TFLOPS",
    "RECTVLM_VERBOSE",
    "RECTVLM_MODELS",
    "RECTVLM_ARCHIVES",
    LAUNCHER_VARIABLE,
)
RECORDED_VARIABLE_PREFIXES = (
    "NCCL_",
    "GLOO_",
    "TORCH_NCCL_",
    "SLURM_JOB_",
    "SLURM_RESTART_",
    "SKYPILOT_TASK_",
    "SKYPILOT_NODE_",
)
"""Prefixes of variables that decide how a run behaves or say which job it is. No other variables
are recorded, since some hold secrets, `RECTVLM_TOKEN` among them."""
LAUNCHER_NAMES = ("accelerate", "torchrun", "torch.distributed.run", "deepspeed")


class SessionLog:
    """The sessions of a run, on rank 0: read when it starts, written when it starts and ends."""

    def __init__(self, folder: Path) -> None:
        """Read the earlier sessions; a file that cannot be read is kept beside the new one."""
        self._folder = folder
        self._path = folder / SESSIONS_FILE
        self.sessions: list[dict[str, Any]] = []
        if self._path.exists():
            try:
                sessions = json.loads(self._path.read_text())["sessions"]
                self.sessions = [dict(session) for session in sessions]
            except (ValueError, KeyError, TypeError):
                self._path.replace(self._path.with_suffix(".damaged.json"))

    @property
    def first_start(self) -> str:
        """Time at which the first session started, UTC."""
        return str(self.sessions[0]["start"])

    def start_session(self, step: int, total_steps: int, facts: Mapping[str, Any]) -> None:
        """Record the start of a session.

        Args:
            step: number of steps that were done before it.
            total_steps: number of the phase's last step.
            facts: further entries, which only the caller knows.
        """
        for session in self.sessions:
            # This process is the run's only writer: a session that still runs was killed.
            if session.get("state") == "running":
                session["state"] = "cut off"
        git_state = read_git_state()
        git_entry = git_state.to_json()
        if git_state.patch:
            git_entry["patch"] = self._write_patch(git_state.patch)
        self.sessions.append(
            {
                "state": "running",
                "start": _format_current_time(),
                "end": None,
                "error": None,
                "from_step": step,
                "last_step": step,
                "steps": total_steps,
                **facts,
                **asdict(describe_process()),
                "git": git_entry,
                "machine": describe_machine(),
                "environment": _list_recorded_variables(),
                "versions": package_versions(),
                "packages": list_installed_packages(),
            }
        )
        self._write_sessions()

    def add_facts(self, facts: Mapping[str, Any]) -> None:
        """Add entries to this session, of what is known only after its start."""
        self.sessions[-1] |= facts
        self._write_sessions()

    def end_session(self, state: str, step: int, error: str | None = None) -> None:
        """Record the end of this session.

        Args:
            state: `finished`, `stopped` or `failed`.
            step: the last step that was done.
            error: why it ended, if it did not finish.
        """
        self.sessions[-1] |= {
            "state": state,
            "end": _format_current_time(),
            "last_step": step,
            "error": error,
        }
        try:
            self._write_sessions()
        except OSError as problem:
            # The run has ended for a reason of its own, which this one must not hide.
            log.warning("%s could not be written: %s", self._path, problem)

    def _write_sessions(self) -> None:
        with atomic_file(self._path) as file:
            file.write((json.dumps({"sessions": self.sessions}, indent=2) + "\n").encode())

    def _write_patch(self, patch: bytes) -> dict[str, Any]:
        """Write a patch, or name the file that holds the same already."""
        checksum = hashlib.sha256(patch).hexdigest()
        entry = {
            "bytes": len(patch),
            "cut_off": len(patch) > MAX_PATCH_BYTES,
            "sha256": checksum,
        }
        for session in self.sessions:
            earlier = (session.get("git") or {}).get("patch")
            if earlier and earlier["sha256"] == checksum:
                return entry | {"file": earlier["file"]}
        name = f"code-{len(self.sessions) + 1}.patch"
        (self._folder / name).write_bytes(patch[:MAX_PATCH_BYTES])
        return entry | {"file": name}


def list_installed_packages() -> dict[str, str]:
    """Versions of all installed packages by name, without leftovers that have no name."""
    packages = [(package.name, package.version) for package in distributions()]
    return dict(sorted((name, version) for name, version in packages if name and version))


def _list_recorded_variables() -> dict[str, str]:
    variables = {}
    for name, value in sorted(os.environ.items()):
        if name in RECORDED_VARIABLES or name.startswith(RECORDED_VARIABLE_PREFIXES):
            variables[name] = value
    return variables


def _format_current_time() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class ProcessDescription:
    """How this process was started; the field names are keys of `run.json`."""

    command: str
    """Command line of the process."""
    directory: str
    """Working directory."""
    launcher: str | None
    """Command line of the launcher that started the process; None without one."""
    pid: int
    process_start: float
    """Start of the process, seconds since 1970."""


def describe_process() -> ProcessDescription:
    """Describe how this process was started, and by which launcher."""
    launcher = None
    with contextlib.suppress(psutil.Error):
        launcher = _find_launcher(psutil.Process())
    return ProcessDescription(
        command=shlex.join(sys.orig_argv),
        directory=os.getcwd(),
        launcher=launcher,
        pid=os.getpid(),
        process_start=psutil.Process().create_time(),
    )


def _find_launcher(process: psutil.Process) -> str | None:
    """Command line of the nearest parent process that is a launcher."""
    for parent in process.parents():
        command_line = parent.cmdline()
        first_words = " ".join(command_line[:4])
        is_ours = os.environ.get(LAUNCHER_VARIABLE) == str(parent.pid)
        if is_ours or any(name in first_words for name in LAUNCHER_NAMES):
            return shlex.join(command_line)
    return None


def describe_machine() -> dict[str, Any]:
    """Describe this process's machine; `engine.json` has the devices of all ranks."""
    machine: dict[str, Any] = {
        "host": socket.gethostname(),
        "system": platform.platform(),
        "processor": _read_processor_name(),
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [],
    }
    if torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        properties = [torch.cuda.get_device_properties(device) for device in devices]
        machine["gpus"] = [torch.cuda.get_device_name(device) for device in devices]
        machine["gpu_memory_bytes"] = [gpu.total_memory for gpu in properties]
        machine["cuda"] = torch.version.cuda
        machine["driver"] = _read_driver_version()
    return machine


def _read_processor_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _read_driver_version() -> str | None:
    with contextlib.suppress(OSError):
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    return None
