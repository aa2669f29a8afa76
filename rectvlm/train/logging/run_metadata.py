"""Where a run came from: `run.json`, with one entry for each time that it was started.

RUN/phaseN/run.json         sessions: command, code, versions, machine, start, end, how it ended
RUN/phaseN/code-1.patch     what was not committed at the first start; `git apply` on the named commit restores it
"""

import contextlib
import hashlib
import json
import logging
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import psutil
import torch

from rectvlm.files import atomic_file
from rectvlm.machine import package_versions

log = logging.getLogger(__name__)

RUN_FILE = "run.json"
MAX_PATCH_BYTES = 2_000_000
"""Bytes of a patch; what is longer is cut off, and the record says so."""
MAX_UNTRACKED_NAMES = 200
"""Untracked files that are named."""
MAX_PATCHED_UNTRACKED_FILES, MAX_PATCHED_UNTRACKED_BYTES = 50, 100_000
"""Untracked files of code, and bytes of each, that are part of the patch."""
CODE_SUFFIXES = {".py", ".sh", ".sbatch", ".j2"}
CONFIG_SUFFIXES, PROJECT_FOLDERS = (
    {".json", ".yaml", ".yml", ".toml"},
    {"rectvlm", "launch", "ds_configs"},
)
"""Elsewhere such files may be credentials, or tables of patients."""
RECORDED_VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "WANDB_MODE")
RECORDED_VARIABLE_PREFIXES = (
    "RECTVLM_",
    "NCCL_",
    "GLOO_",
    "TORCH_NCCL_",
    "SLURM_JOB_",
    "SLURM_RESTART_",
    "SKYPILOT_TASK_",
    "SKYPILOT_NODE_",
)
"""Variables that decide how a run behaves or say which job it is; no others are written down, as some hold secrets."""
LAUNCHER_NAMES = ("accelerate", "torchrun", "torch.distributed.run", "deepspeed")


class SessionLog:
    """The record of a run on rank 0: read when it starts, written when it starts and ends."""

    def __init__(self, folder: Path) -> None:
        """Read what earlier sessions have left; a file that cannot be read is kept beside the new one."""
        self._folder = folder
        self._path = folder / RUN_FILE
        self.sessions: list[dict[str, Any]] = []
        if self._path.exists():
            try:
                self.sessions = [
                    dict(one) for one in json.loads(self._path.read_text())["sessions"]
                ]
            except (ValueError, KeyError, TypeError):
                self._path.replace(self._path.with_suffix(".damaged.json"))

    @property
    def first_start(self) -> str:
        """When the first session started."""
        return str(self.sessions[0]["start"])

    def start_session(self, step: int, steps: int, facts: Mapping[str, Any]) -> None:
        """A new session, from a step on; `facts` are what the caller knows of it."""
        for one in self.sessions:
            if one.get("state") == "running":
                one["state"] = (
                    "cut off"  # it is this run's only writer, and it did not live to say how it ended
                )
        git, patch = read_git_state()
        if patch is not None:
            git["patch"] = self._write_patch(patch)
        self.sessions.append(
            {
                "state": "running",
                "start": _format_current_time(),
                "end": None,
                "error": None,
                "from_step": step,
                "last_step": step,
                "steps": steps,
                **facts,
                **describe_command(),
                "git": git,
                "machine": describe_machine(),
                "environment": {
                    name: value
                    for name, value in sorted(os.environ.items())
                    if name in RECORDED_VARIABLES or name.startswith(RECORDED_VARIABLE_PREFIXES)
                },
                "versions": package_versions(),
                "packages": list_installed_packages(),
            }
        )
        self._write_sessions()

    def end_session(self, state: str, step: int, error: str | None = None) -> None:
        """How this session ended: `finished`, `stopped` or `failed`."""
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
        """Keep a patch under a name of its own, or name the file that holds the same already."""
        kept = patch[:MAX_PATCH_BYTES]
        digest = hashlib.sha256(patch).hexdigest()
        described = {"bytes": len(patch), "cut_off": len(patch) > len(kept), "sha256": digest}
        for one in self.sessions:
            earlier = (one.get("git") or {}).get("patch")
            if earlier and earlier["sha256"] == digest:
                return described | {"file": earlier["file"]}
        name = f"code-{len(self.sessions) + 1}.patch"
        (self._folder / name).write_bytes(kept)
        return described | {"file": name}


def list_installed_packages() -> dict[str, str]:
    """All that is installed, by name; leftovers without a name are left out."""
    return dict(sorted((d.name, d.version) for d in distributions() if d.name and d.version))


def _format_current_time() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def describe_command() -> dict[str, Any]:
    """How this process was started, and by which launcher."""
    found: dict[str, Any] = {
        "command": shlex.join(sys.orig_argv),
        "directory": os.getcwd(),
        "launcher": None,
        "pid": os.getpid(),
        "process_start": psutil.Process().create_time(),
    }
    with contextlib.suppress(psutil.Error):
        for parent in psutil.Process().parents():
            line = parent.cmdline()
            if any(name in word for word in line[:4] for name in LAUNCHER_NAMES):
                found["launcher"] = shlex.join(line)
                break
    return found


def read_git_state(
    checkout: Path = Path(__file__).parents[3],
) -> tuple[dict[str, Any], bytes | None]:
    """Commit, branch, what is not tracked, and the patch of what is not committed, untracked code included.

    Code that was installed as a package has no checkout, even where its folder lies within one of another project.
    """

    def git(*arguments: str, codes: tuple[int, ...] = (0,)) -> bytes:
        line = ["git", "-c", "core.quotePath=false", *arguments]
        done = subprocess.run(
            line, cwd=checkout, capture_output=True, timeout=60, stdin=subprocess.DEVNULL
        )
        if done.returncode not in codes:
            raise subprocess.CalledProcessError(done.returncode, line, done.stdout, done.stderr)
        return done.stdout

    # A diff as it is, whatever tools or colours the user has configured.
    diff = ("diff", "--binary", "--no-color", "--no-ext-diff")
    try:
        git("ls-files", "--error-unmatch", "rectvlm/__init__.py")
        commit = git("rev-parse", "HEAD").decode().strip()
        branch = git("rev-parse", "--abbrev-ref", "HEAD").decode().strip()
        patch = git(*diff, "HEAD")
        others = (
            git("ls-files", "--others", "--exclude-standard").decode(errors="replace").splitlines()
        )
        added = [name for name in others if _is_code(name) and _is_small_file(checkout / name)][
            :MAX_PATCHED_UNTRACKED_FILES
        ]
        patch += b"".join(
            git(*diff, "--no-index", "/dev/null", name, codes=(0, 1)) for name in added
        )
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.decode(errors="replace").strip().splitlines() or ["git failed"])[0]
        return {"commit": None, "reason": reason}, None
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"commit": None, "reason": str(error)}, None
    found = {
        "commit": commit,
        "branch": branch,
        "dirty": bool(patch),
        "untracked": others[:MAX_UNTRACKED_NAMES],
        "untracked_files": len(others),
    }
    return found, patch or None


def _is_code(name: str) -> bool:
    path = Path(name)
    return path.suffix in CODE_SUFFIXES or (
        path.suffix in CONFIG_SUFFIXES and path.parts[0] in PROJECT_FOLDERS
    )


def _is_small_file(path: Path) -> bool:
    return path.is_file() and path.stat().st_size <= MAX_PATCHED_UNTRACKED_BYTES


def describe_machine() -> dict[str, Any]:
    """This process's machine; other machines of the run are in `engine.json`."""
    found: dict[str, Any] = {
        "host": socket.gethostname(),
        "system": platform.platform(),
        "processor": _read_processor_name(),
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [],
    }
    if torch.cuda.is_available():
        count = range(torch.cuda.device_count())
        found["gpus"] = [torch.cuda.get_device_name(index) for index in count]
        found["gpu_memory_bytes"] = [
            torch.cuda.get_device_properties(index).total_memory for index in count
        ]
        found["cuda"] = torch.version.cuda
        found["driver"] = _read_driver_version()
    return found


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
