"""The whole system in small, with a user's commands: shards, three phases, evaluation, prediction.

    python launch/demo.py [--config demo] [--phases 1 2 3] [part.field=value …]

Two processes train with DeepSpeed, in phase 3 with ZeRO-3 and a 4-bit language model. Every command
runs as a process of its own; its output goes to RUN/logs/. The results are read from the files of
the run and written to RUN/summary.json:

    engine        distributed_type, zero_stage, world_size, llm_quantization of the last phase
    phases        for each phase: phase, steps, loss_first and loss_last (mean total loss of the
                  first and of the last `loss_over` steps: 20, or half of fewer than 40), the same
                  by task, seconds of the command, seconds_training of its steps,
                  peak_memory_bytes of the largest rank
    evaluation    the main figures of the evaluation, and the file that holds all of them
    predictions   for each predicted case: case, dir, page
    machine, versions, stages (name, command and seconds of each), seconds
"""

import argparse
import json
import math
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from rectvlm.cli_options import CommandParser
from rectvlm.config import load_config, phase_key
from rectvlm.files import read_json_object, write_json
from rectvlm.finding_thresholds import THRESHOLDS_FILE
from rectvlm.machine import count_cores
from rectvlm.runs.phase_summary import PhaseSummary, summarize_phase
from rectvlm.runs.run_files import ENGINE_FILE, METRICS_FILE
from rectvlm.runs.run_tables import format_number
from rectvlm.terminal_tables import FoldingTable
from rectvlm.types import JsonObject, UserError

CHECKOUT = Path(__file__).resolve().parents[1]
TWO_CPU_PROCESSES = "launch/accelerate/cpu2.yaml"
SAMPLE_CT = "data/samples/lung1.nii.gz"
EVALUATION_FILE = "evaluation/metrics.json"
"""Metrics of the evaluation, in the run's folder."""
SUMMARY_FILE = "summary.json"
EVALUATION_BATCH_SIZE = "7"
"""Number of cases that are evaluated at once. Reports are generated for the first batch only: with
the image and, as a control, without."""
FAILURE_LOG_LINES = 20
"""Number of last lines of a failed command's log that are shown."""
POLL_SECONDS = 0.2
RUN_AGAIN = "run the demo again"


@dataclass(frozen=True)
class DemoCommand:
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

    def __init__(self, command: DemoCommand, exit_code: int, log_path: Path) -> None:
        super().__init__(
            f"{command.name} ended with exit code {exit_code}; all of its output is in {log_path}"
        )
        self.log_path = log_path


def plan_commands(
    source: str, overrides: Sequence[str], phases: Sequence[int], launcher: str
) -> list[DemoCommand]:
    """List the commands, in order; paths are relative to the checkout.

    Args:
        source: name or path of a configuration.
        overrides: changes of the configuration, `part.field=value`.
        phases: numbers of the phases to train, in order; the last one is evaluated and predicts.
        launcher: Accelerate's config file.

    Raises:
        UserError: the configuration is wrong, or has no section for a phase.
    """
    config = load_config(source, overrides)
    folder = Path(config.train.runs) / config.name
    tools = Path(sys.executable).parent
    cores = count_cores()
    config_options = ("--config", source, *overrides)

    preprocess = (sys.executable, "-m", "data_pipeline.preprocess", *config_options)
    commands = [DemoCommand("shards", preprocess, cores)]
    accelerate = (str(tools / "accelerate"), "launch", "--config_file", launcher)
    for phase in phases:
        key = phase_key(phase)
        settings = config.train.phases.get(key)
        if settings is None:
            raise UserError(
                f"The configuration of run {config.name} has no train.phases.{key}: add the "
                "section."
            )
        commands.append(
            DemoCommand(
                f"phase {phase}",
                (*accelerate, f"launch/phase{phase}.py", "--restart", *config_options),
                threads=max(1, cores // 2),
                steps=math.ceil(settings.samples / settings.global_batch),
                metrics_path=folder / key / METRICS_FILE,
            )
        )

    rectvlm = str(tools / "rectvlm")
    checkpoint = ("--checkpoint", str(folder / f"phase{phases[-1]}"))
    limits = ("--batch-size", EVALUATION_BATCH_SIZE, "--report-limit", EVALUATION_BATCH_SIZE)
    evaluate_out = ("--out", str(folder / EVALUATION_FILE))
    predict_out = ("--out", str(folder / "predictions"))
    evaluate = (rectvlm, "evaluate", *checkpoint, *limits, *evaluate_out)
    # The few validation cases of the demo decide no thresholds; those of the evaluation are used.
    thresholds = ("--thresholds", str((folder / EVALUATION_FILE).with_name(THRESHOLDS_FILE)))
    predict = (rectvlm, "predict", SAMPLE_CT, *checkpoint, *predict_out, *thresholds)
    commands.append(DemoCommand("evaluation", evaluate, cores))
    commands.append(DemoCommand("prediction", predict, cores))
    return commands


def run_commands(
    commands: Sequence[DemoCommand], folder: Path, launcher: str, console: Console
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
    (folder / SUMMARY_FILE).unlink(missing_ok=True)
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
    command: DemoCommand, logs: Path, environment: dict[str, str], console: Console
) -> FinishedCommand:
    """Run a command to its end, its output going to a log.

    The console's last line shows the steps that the command records.

    Raises:
        CommandFailed: an exit code other than 0.
    """
    log_path = logs / f"{command.name.replace(' ', '')}.log"
    command_line = shlex.join([Path(command.command[0]).name, *command.command[1:]])
    console.print(f"[bold]{command.name:<11}[/]{command_line}", soft_wrap=True, highlight=False)
    start_seconds, cpu_seconds_before = time.monotonic(), _cpu_seconds()
    exit_code = _run_process(command, log_path, environment, console)
    seconds = time.monotonic() - start_seconds
    if exit_code:
        raise CommandFailed(command, exit_code, log_path)
    console.print(f"           [green]done[/] in {seconds:.0f} s", highlight=False)
    return FinishedCommand(
        name=command.name,
        command=command_line,
        seconds=round(seconds, 1),
        log=str(log_path),
        cpu_seconds=round(_cpu_seconds() - cpu_seconds_before, 1),
    )


def _run_process(
    command: DemoCommand, log_path: Path, environment: dict[str, str], console: Console
) -> int:
    """Run a command's process and show its progress; return its exit code."""
    start_seconds = time.monotonic()
    columns = (
        TextColumn(" " * 11),
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


def _show_step(command: DemoCommand, start_seconds: float, progress: Progress, bar: Any) -> None:
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
        console.print(f"error: {error}", style="red", highlight=False)
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


@dataclass(frozen=True)
class EvaluationFigures:
    """Main figures of the evaluation."""

    split: str
    n_cases: int
    macro: JsonObject
    """Metrics of the findings, averaged over findings."""
    weighted: JsonObject
    """Metrics of the findings, weighted by their positive cases."""
    dice: dict[str, float | None]
    """Dice by lesion."""
    reports: dict[str, JsonObject] | None
    """Metrics of the reports, with the image and without; None where none were generated."""
    file: str
    """Path of the file that holds all figures."""


@dataclass(frozen=True)
class DemoPrediction:
    """A predicted case."""

    case: str
    dir: str
    """Folder of the prediction."""
    page: str
    """Page of the case, for a browser."""


@dataclass(frozen=True)
class DemoSummary:
    """What a demo came to; RUN/summary.json."""

    config: str
    engine: JsonObject
    """What really ran in the last phase."""
    phases: list[PhaseSummary]
    evaluation: EvaluationFigures
    predictions: list[DemoPrediction]
    machine: JsonObject
    versions: dict[str, str]
    stages: list[FinishedCommand]
    seconds: float
    """Duration of all commands, seconds."""


def summarize_demo(
    folder: Path, phases: Sequence[int], commands: Sequence[FinishedCommand]
) -> DemoSummary:
    """Summarize a demo from the files that it wrote.

    Args:
        folder: the run's folder.
        phases: numbers of the phases that were trained, in order.
        commands: the commands that ran.
    """
    seconds_by_command = {command.name: command.seconds for command in commands}
    engine = read_json_object(folder / f"phase{phases[-1]}" / ENGINE_FILE, RUN_AGAIN)
    metrics = read_json_object(folder / EVALUATION_FILE, RUN_AGAIN)
    engine_keys = ("distributed_type", "zero_stage", "world_size", "llm_quantization")
    phase_summaries: list[PhaseSummary] = []
    for phase in phases:
        seconds = seconds_by_command[f"phase {phase}"]
        phase_summaries.append(summarize_phase(folder / f"phase{phase}", phase, seconds))
    predictions: list[DemoPrediction] = []
    for findings_path in sorted((folder / "predictions").glob("*/findings.json")):
        case_folder = findings_path.parent
        page = case_folder / "index.html"
        predictions.append(DemoPrediction(case_folder.name, str(case_folder), str(page)))
    return DemoSummary(
        config=metrics["config"],
        engine={key: engine[key] for key in engine_keys},
        phases=phase_summaries,
        evaluation=_select_main_figures(metrics, folder / EVALUATION_FILE),
        predictions=predictions,
        machine=metrics["machine"],
        versions=metrics["versions"],
        stages=list(commands),
        seconds=round(sum(seconds_by_command.values()), 1),
    )


def _select_main_figures(metrics: JsonObject, path: Path) -> EvaluationFigures:
    dice: dict[str, float | None] = {}
    for lesion, scores in (metrics["localization"] or {"per_lesion": {}})["per_lesion"].items():
        dice[lesion] = scores["dice"]
    reports: dict[str, JsonObject] = {}
    for name in ("image", "image_ablated", "difference") if metrics["reports"] else ():
        scores = metrics["reports"][name]
        score_names = ("n", "bleu_1", "bleu_4", "rouge_l", "bertscore_f1")
        reports[name] = {score: scores[score] for score in score_names if score in scores}
    return EvaluationFigures(
        split=metrics["split"],
        n_cases=metrics["n_cases"],
        macro=metrics["classification"]["macro"],
        weighted=metrics["classification"]["weighted"],
        dice=dice,
        reports=reports or None,
        file=str(path),
    )


def make_result_tables(summary: DemoSummary) -> list[Table]:
    """Make the tables that end a demo: what was trained, and the figures of the evaluation."""
    return [_make_training_table(summary), _make_evaluation_table(summary.evaluation)]


def _make_training_table(summary: DemoSummary) -> Table:
    engine = summary.engine
    title = (
        f"{engine['world_size']} processes, {engine['distributed_type']}, "
        f"ZeRO-{engine['zero_stage']}"
    )
    if engine["llm_quantization"]:
        title += f", language model in {engine['llm_quantization']}"
    table = FoldingTable(title=title, title_justify="left")
    for column in ("phase", "steps", "loss, first", "loss, last", "seconds"):
        table.add_column(column, justify="right")
    for phase in summary.phases:
        table.add_row(
            str(phase.phase),
            str(phase.steps),
            format_number(phase.loss_first, 3),
            format_number(phase.loss_last, 3),
            f"{phase.seconds:.0f}",
        )
    return table


def _make_evaluation_table(evaluation: EvaluationFigures) -> Table:
    figures: dict[str, Any] = {
        "findings, macro AUROC": evaluation.macro["auroc"],
        "findings, macro F1": evaluation.macro["f1"],
    }
    for lesion, dice in evaluation.dice.items():
        figures[f"Dice, {lesion.replace('_', ' ')}"] = dice
    if evaluation.reports:
        figures["reports, BLEU-1"] = evaluation.reports["image"]["bleu_1"]
        figures["the same without the image"] = evaluation.reports["image_ablated"]["bleu_1"]
    title = f"{evaluation.n_cases} cases of the {evaluation.split} split"
    table = FoldingTable(title=title, title_justify="left", show_header=False)
    for name, value in figures.items():
        table.add_row(name, format_number(value, 3))
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parse_arguments(arguments)
    console = Console(stderr=True)
    return run_guarded(console, lambda: _run_demo(options, console))


def _run_demo(options: argparse.Namespace, console: Console) -> int:
    commands = plan_commands(options.config, options.overrides, options.phases, options.accelerate)
    config = load_config(options.config, options.overrides)
    folder = Path(config.train.runs) / config.name
    finished_commands = run_commands(commands, folder, options.accelerate, console)
    summary = summarize_demo(folder, options.phases, finished_commands)
    write_json(folder / SUMMARY_FILE, asdict(summary))
    console.print(
        *make_result_tables(summary),
        f"{summary.seconds:.0f} s in all; all figures are in {folder}/{SUMMARY_FILE}.",
    )
    for prediction in summary.predictions:
        console.print(f"Open {prediction.page} in a browser.", highlight=False, soft_wrap=True)
    return 0


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(prog="launch/demo.py", description="The whole system in small.")
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
        help=f"Accelerate's config file (default: {TWO_CPU_PROCESSES}; another one uses GPUs)",
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
