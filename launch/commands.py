"""Commands that run one after the other: their output goes to logs, their progress is shown."""

import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from rectvlm.runs.run_tables import format_number
from rectvlm.types import UserError

CHECKOUT = Path(__file__).resolve().parents[1]
TWO_CPU_PROCESSES = "launch/accelerate/cpu2.yaml"
FAILURE_LOG_LINES = 20
"""Number of last lines of a failed command's log that are shown."""
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Command:
    """A command to run."""

    name: str
    command: tuple[str, ...]
    threads: int
    """Threads of numerical libraries in each of the command's processes."""
    steps: int | None = None
    """Number of optimizer steps that the command will record in `metrics_path`."""
    metrics_path: Path | None = None
    """The `metrics.jsonl` that the command writes, for the display of progress."""


@dataclass(frozen=True)
class FinishedCommand:
    """A command that ended well."""

    name: str
    command: str
    """The command line."""
    seconds: float
    """Duration, seconds."""
    log: str
    """Path of the command's output."""
    cpu_seconds: float = 0.0
    """CPU time of all processes of the command, seconds: its cost on a busy machine too."""


class CommandFailed(Exception):
    """A command ended with an error."""

    def __init__(self, command: Command, exit_code: int, log_path: Path) -> None:
        super().__init__(
            f"{command.name} ended with exit code {exit_code}; all of its output is in {log_path}"
        )
        self.log_path = log_path


def run_commands(
    commands: Sequence[Command], folder: Path, launcher: str, console: Console
) -> list[FinishedCommand]:
    """Run commands one after the other, their output going to `folder`/logs.

    Args:
        commands: the commands, in order.
        folder: the run's folder.
        launcher: Accelerate's config file.
        console: shows the commands and their progress.

    Raises:
        CommandFailed: a command ended with an error; those behind it are not run.
    """
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    environment = make_environment(launcher)
    return [run_command(command, logs, environment, console) for command in commands]


def make_environment(launcher: str) -> dict[str, str]:
    """Make the environment of the commands.

    Tools of this Python come first on the path, and two CPU processes see no GPU.
    """
    tools = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"}
    if launcher == TWO_CPU_PROCESSES:
        # Two CPU processes on any machine, also on one with a single GPU.
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return environment


def run_command(
    command: Command, logs: Path, environment: dict[str, str], console: Console
) -> FinishedCommand:
    """Run a command to its end, its output going to a log.

    The console's last line shows the steps that the command records.

    Raises:
        CommandFailed: an exit code other than 0.
    """
    log_path = logs / f"{command.name.replace(' ', '')}.log"
    command_line = shlex.join([Path(command.command[0]).name, *command.command[1:]])
    console.print(f"[bold]{command.name:<14}[/]{command_line}", soft_wrap=True, highlight=False)
    start_seconds, cpu_seconds_before = time.monotonic(), _cpu_seconds()
    exit_code = _run_process(command, log_path, environment, console)
    seconds = time.monotonic() - start_seconds
    if exit_code:
        raise CommandFailed(command, exit_code, log_path)
    console.print(f"              [green]done[/] in {seconds:.0f} s", highlight=False)
    return FinishedCommand(
        name=command.name,
        command=command_line,
        seconds=round(seconds, 1),
        log=str(log_path),
        cpu_seconds=round(_cpu_seconds() - cpu_seconds_before, 1),
    )


def _run_process(
    command: Command, log_path: Path, environment: dict[str, str], console: Console
) -> int:
    """Run a command's process and show its progress; return its exit code."""
    start_seconds = time.monotonic()
    columns = (
        TextColumn(" " * 14),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    display = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with log_path.open("w") as log_file, display as progress:
        bar = progress.add_task("starting", total=command.steps)
        process = subprocess.Popen(
            command.command,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            env=environment | {"OMP_NUM_THREADS": str(command.threads)},
        )
        try:
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
                if not display.disable and command.metrics_path is not None:
                    _show_step(command, start_seconds, progress, bar)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    return process.returncode


def _cpu_seconds() -> float:
    """Return the CPU time of the child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _show_step(command: Command, start_seconds: float, progress: Progress, bar: Any) -> None:
    path = command.metrics_path
    assert path is not None
    start_time = time.time() - (time.monotonic() - start_seconds)
    # An earlier run's file is there until the new run has started.
    if not path.is_file() or path.stat().st_mtime < start_time:
        return
    texts = path.read_text().splitlines(keepends=True)
    complete_lines = [text for text in texts if text.endswith("\n")]
    if complete_lines:
        line = json.loads(complete_lines[-1])
        loss = format_number(line["loss"], 3)
        description = f"step {line['step']} of {command.steps}, loss {loss}"
        progress.update(bar, completed=line["step"], description=description)


def run_guarded(console: Console, run: Callable[[], int]) -> int:
    """Run a function from the checkout; return the exit status, and print errors in words."""
    os.chdir(CHECKOUT)
    # A terminated run takes its processes along, as an interrupted one does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run()
    except UserError as error:
        # Soft-wrapped and without markup, which would take the brackets of "rectvlm[train]".
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    except CommandFailed as error:
        log_lines = error.log_path.read_text(errors="replace").splitlines()
        tail = "\n".join(log_lines[-FAILURE_LOG_LINES:])
        console.print(tail, markup=False, highlight=False)
        console.print(f"error: {error}", style="red", highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("stopped")
        return 130
