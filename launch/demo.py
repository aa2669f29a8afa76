"""The whole system in small, with a user's commands: shards, three phases, evaluation, a predicted CT.

    python launch/demo.py [--config demo] [--phases 1 2 3] [part.field=value …]

Two processes train with DeepSpeed, in phase 3 with ZeRO-3 and a 4-bit language model. Every command runs as a process
of its own; its output goes to RUN/logs/. What came of it is read back from the files of the run into RUN/summary.json:

    engine        of the last phase: distributed_type, zero_stage, world_size, llm_quantization
    phases        of each phase: phase, steps, loss_first and loss_last (mean total loss of the first and of the last
                  `loss_over` steps: 20, or half of fewer than 40), the same by task, seconds of the command,
                  seconds_training of its steps, peak_memory_bytes of the largest rank
    evaluation    the main figures of the evaluation, and the file that holds all of them
    predictions   of each predicted case: case, dir, page
    machine, versions, stages (name, command and seconds of each), seconds
"""

import argparse
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from rectvlm.config import load_config, phase_key
from rectvlm.types import UserError

CHECKOUT = Path(__file__).resolve().parents[1]
TWO_CPU_PROCESSES = "launch/accelerate/cpu2.yaml"
SAMPLE_CT = "data/samples/lung1.nii.gz"
LOSS_WINDOW_STEPS = 20
"""Steps that the first and the last loss are the mean of."""
FAILURE_LOG_LINES = 20
"""Last lines of a failed command's log that are shown."""
EVALUATION_BATCH_SIZE = "7"
"""Cases at once; reports are generated for the first batch only, twice: with the image and, as a control, without."""


@dataclass(frozen=True)
class DemoCommand:
    """One command."""

    name: str
    command: tuple[str, ...]
    threads: int
    """Of each of its processes, for numerical libraries."""
    steps: int | None = None
    """Optimizer steps that it will record in `metrics`, for the display."""
    metrics_path: Path | None = None


@dataclass(frozen=True)
class FinishedCommand:
    """A command that ended well."""

    name: str
    command: str
    seconds: float
    log: str
    cpu_seconds: float = 0.0
    """Of all its processes: what it costs wherever else the cores are busy."""


class CommandFailed(Exception):
    """A command ended with an error."""

    def __init__(self, stage: DemoCommand, code: int, log: Path) -> None:
        super().__init__(f"{stage.name} ended with exit code {code}; all of its output is in {log}")
        self.log_path = log


def plan_commands(
    source: str, overrides: Sequence[str], phases: Sequence[int], launcher: str
) -> list[DemoCommand]:
    """The commands, in order; paths are relative to the checkout.

    Args:
        source: name or path of a configuration.
        overrides: `part.field=value`.
        phases: which to train, in order; the last one is evaluated and predicts.
        launcher: Accelerate's config file.

    Raises:
        UserError: the configuration is wrong, or has no section for a phase.
    """
    config = load_config(source, overrides)
    folder = Path(config.train.runs) / config.name
    tools = Path(sys.executable).parent
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    chosen = ("--config", source, *overrides)
    stages = [
        DemoCommand("shards", (sys.executable, "-m", "data_pipeline.preprocess", *chosen), cores)
    ]
    for phase in phases:
        if phase_key(phase) not in config.train.phases:
            raise UserError(
                f"Configuration {config.name} has no train.phases.phase{phase}: add the section."
            )
        command = (
            str(tools / "accelerate"),
            "launch",
            "--config_file",
            launcher,
            f"launch/phase{phase}.py",
        )
        metrics = folder / f"phase{phase}" / "metrics.jsonl"
        stages.append(
            DemoCommand(
                f"phase {phase}",
                (*command, "--restart", *chosen),
                max(1, cores // 2),
                config.train.phases[phase_key(phase)].steps,
                metrics,
            )
        )
    rectvlm, checkpoint = str(tools / "rectvlm"), str(folder / f"phase{phases[-1]}")
    out = str(folder / "evaluation" / "metrics.json")
    amount = ("--batch-size", EVALUATION_BATCH_SIZE, "--report-limit", EVALUATION_BATCH_SIZE)
    evaluate = (rectvlm, "evaluate", "--checkpoint", checkpoint, *amount, "--out", out)
    predict = (
        rectvlm,
        "predict",
        SAMPLE_CT,
        "--checkpoint",
        checkpoint,
        "--out",
        str(folder / "predictions"),
    )
    return [
        *stages,
        DemoCommand("evaluation", evaluate, cores),
        DemoCommand("prediction", predict, cores),
    ]


def run_command(
    stage: DemoCommand, logs: Path, environment: dict[str, str], console: Console
) -> FinishedCommand:
    """Run a command to its end, its output going to a log, with the recorded steps on the console's last line.

    Raises:
        StageFailed: an exit code other than 0.
    """
    log = logs / f"{stage.name.replace(' ', '')}.log"
    shown = shlex.join([Path(stage.command[0]).name, *stage.command[1:]])
    console.print(f"[bold]{stage.name:<11}[/]{shown}", soft_wrap=True, highlight=False)
    begin, used = time.monotonic(), _cpu_seconds()
    columns = (
        TextColumn(" " * 11),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    live = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with log.open("w") as file, live as progress:
        bar = progress.add_task("starting", total=stage.steps)
        process = subprocess.Popen(
            stage.command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment | {"OMP_NUM_THREADS": str(stage.threads)},
        )
        try:
            while process.poll() is None:
                time.sleep(0.2)
                if not live.disable and stage.metrics_path is not None:
                    _show_step(stage, begin, progress, bar)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    seconds = time.monotonic() - begin
    if process.returncode:
        raise CommandFailed(stage, process.returncode, log)
    console.print(f"           [green]done[/] in {seconds:.0f} s", highlight=False)
    return FinishedCommand(
        stage.name, shown, round(seconds, 1), str(log), round(_cpu_seconds() - used, 1)
    )


def _cpu_seconds() -> float:
    """Of the child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _show_step(stage: DemoCommand, begin: float, progress: Progress, bar: Any) -> None:
    assert stage.metrics_path is not None
    path = stage.metrics_path
    # An earlier run's file is there until the new run has started.
    if not path.is_file() or path.stat().st_mtime < time.time() - (time.monotonic() - begin):
        return
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    if lines:
        last = json.loads(lines[-1])
        text = f"step {last['step']} of {stage.steps}, loss {format_figure(last['loss'])}"
        progress.update(bar, completed=last["step"], description=text)


def summarize_demo(
    folder: Path, phases: Sequence[int], stages: Sequence[FinishedCommand]
) -> dict[str, Any]:
    """What a run came to, read from the files that it wrote below `folder`; the module's docstring has the keys."""
    seconds = {stage.name: stage.seconds for stage in stages}
    engine = json.loads((folder / f"phase{phases[-1]}" / "engine.json").read_text())
    evaluated = folder / "evaluation" / "metrics.json"
    figures = json.loads(evaluated.read_text())
    found = sorted(path.parent for path in (folder / "predictions").glob("*/findings.json"))
    return {
        "config": figures["config"],
        "engine": {
            key: engine[key]
            for key in ("distributed_type", "zero_stage", "world_size", "llm_quantization")
        },
        "phases": [summarize_phase(folder / f"phase{n}", n, seconds[f"phase {n}"]) for n in phases],
        "evaluation": _select_main_figures(figures) | {"file": str(evaluated)},
        "predictions": [
            {"case": p.name, "dir": str(p), "page": str(p / "index.html")} for p in found
        ],
        "machine": figures["machine"],
        "versions": figures["versions"],
        "stages": [asdict(stage) for stage in stages],
        "seconds": round(sum(seconds.values()), 1),
    }


def summarize_phase(folder: Path, number: int, seconds: float) -> dict[str, Any]:
    """What a phase's `metrics.jsonl` comes to; `seconds` are those of its command."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    over = max(1, min(LOSS_WINDOW_STEPS, len(lines) // 2))
    first, last = lines[:over], lines[-over:]
    return {
        "phase": number,
        "steps": lines[-1]["step"],
        "loss_first": mean_known(line["loss"] for line in first),
        "loss_last": mean_known(line["loss"] for line in last),
        "loss_over": over,
        "losses": {
            task: {
                "first": mean_known(line["losses"][task] for line in first),
                "last": mean_known(line["losses"][task] for line in last),
            }
            for task in lines[-1]["losses"]
        },
        "seconds": seconds,
        "seconds_training": round(sum(line["seconds"]["total"] for line in lines), 1),
        "peak_memory_bytes": max(line["memory_bytes"] for line in lines),
    }


def mean_known(values: Iterable[float | None]) -> float | None:
    """Mean of what is known; None when nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def format_figure(value: float | None) -> str:
    """As it is shown; a step that was skipped may have no loss."""
    return "–" if value is None else f"{value:.3f}"


def _select_main_figures(figures: dict[str, Any]) -> dict[str, Any]:
    lesions = (figures["localization"] or {"per_lesion": {}})["per_lesion"]
    reports = figures["reports"] or {}
    scores = ("n", "bleu_1", "bleu_4", "rouge_l", "bertscore_f1")
    return {
        "split": figures["split"],
        "n_cases": figures["n_cases"],
        "macro": figures["classification"]["macro"],
        "weighted": figures["classification"]["weighted"],
        "dice": {key: row["dice"] for key, row in lesions.items()},
        "reports": {name: {s: row[s] for s in scores if s in row} for name, row in reports.items()}
        or None,
    }


def make_result_tables(summary: dict[str, Any]) -> list[Table]:
    """The few lines that end a run: what was trained, and what the evaluation found."""
    engine, evaluation = summary["engine"], summary["evaluation"]
    language = (
        f", language model in {engine['llm_quantization']}" if engine["llm_quantization"] else ""
    )
    title = f"{engine['world_size']} processes, {engine['distributed_type']}, ZeRO-{engine['zero_stage']}{language}"
    trained = Table(title=title, title_justify="left")
    for column in ("phase", "steps", "loss, first", "loss, last", "seconds"):
        trained.add_column(column, justify="right")
    for row in summary["phases"]:
        losses = format_figure(row["loss_first"]), format_figure(row["loss_last"])
        trained.add_row(str(row["phase"]), str(row["steps"]), *losses, f"{row['seconds']:.0f}")
    figures = {
        "findings, macro AUROC": evaluation["macro"]["auroc"],
        "findings, macro F1": evaluation["macro"]["f1"],
    }
    figures |= {
        f"Dice, {key.replace('_', ' ')}": value for key, value in evaluation["dice"].items()
    }
    if evaluation["reports"]:
        figures["reports, BLEU-1"] = evaluation["reports"]["image"]["bleu_1"]
        figures["the same without the image"] = evaluation["reports"]["image_ablated"]["bleu_1"]
    cases = f"{evaluation['n_cases']} cases of the {evaluation['split']} split"
    evaluated = Table(title=cases, title_justify="left", show_header=False)
    for name, value in figures.items():
        evaluated.add_row(name, format_figure(value))
    return [trained, evaluated]


def make_environment(launcher: str) -> dict[str, str]:
    """The environment of the commands: tools of this Python first on the path, and no GPU where two CPU processes are
    asked for."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    }
    if launcher == TWO_CPU_PROCESSES:
        # Two CPU processes on any machine, also on one with a single GPU.
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return environment


def run_guarded(console: Console, work: Callable[[], int]) -> int:
    """Do the work from the checkout; the exit status, with errors in words."""
    os.chdir(CHECKOUT)
    # A terminated run takes its processes along, as an interrupted one does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return work()
    except UserError as error:
        console.print(f"error: {error}", style="red", highlight=False)
        return 2
    except CommandFailed as failed:
        tail = failed.log_path.read_text(errors="replace").splitlines()[-FAILURE_LOG_LINES:]
        console.print("\n".join(tail), markup=False, highlight=False)
        console.print(f"error: {failed}", style="red", highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("stopped")
        return 130


def run_commands(
    stages: Sequence[DemoCommand], folder: Path, launcher: str, console: Console
) -> list[FinishedCommand]:
    """Run commands one after the other, their output going to `folder`/logs.

    Raises:
        StageFailed: the first one that ended with an error; those behind it are not run.
    """
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").unlink(missing_ok=True)
    environment = make_environment(launcher)
    return [run_command(stage, folder / "logs", environment, console) for stage in stages]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    options = _parse_arguments(arguments)
    console = Console(stderr=True)
    return run_guarded(console, lambda: _run_demo(options, console))


def _run_demo(options: argparse.Namespace, console: Console) -> int:
    stages = plan_commands(options.config, options.overrides, options.phases, options.accelerate)
    config = load_config(options.config, options.overrides)
    folder = Path(config.train.runs) / config.name
    summary = summarize_demo(
        folder, options.phases, run_commands(stages, folder, options.accelerate, console)
    )
    (folder / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    console.print(
        *make_result_tables(summary),
        f"{summary['seconds']:.0f} s in all; all figures are in {folder}/summary.json.",
    )
    for prediction in summary["predictions"]:
        console.print(f"Open {prediction['page']} in a browser.", highlight=False, soft_wrap=True)
    return 0


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/demo.py", description="The whole system in small."
    )
    parser.add_argument(
        "--config", default="demo", help="name or path of a configuration (default: demo)"
    )
    parser.add_argument(
        "--phases", type=int, nargs="+", default=[1, 2, 3], choices=(1, 2, 3), metavar="N"
    )
    parser.add_argument(
        "--accelerate",
        default=TWO_CPU_PROCESSES,
        metavar="FILE",
        help=f"Accelerate's config file (default: {TWO_CPU_PROCESSES}; with another one GPUs are used)",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="part.field=value",
        help="change a value of the configuration",
    )
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
