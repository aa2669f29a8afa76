"""A proof that the system learns: three phases on synthetic CTs with known truth.

    python -m launch.learn [--config learn] [--phantoms 480] [--valid-phantoms 96]
        [part.field=value …]

It is measured on cases of other seeds. The commands are a user's own, each a process whose output
goes to RUN/logs/. The targets, the measured figures and whether they are enough are written to
RUN/learn.json and, as tables, to RUN/learn.md:

    targets    for each target: name, wanted, found (None where there is nothing to measure), met
    beside     figures that belong to them, by name
    findings   those that the synthesis draws, with the AUROC of each
    lesions    Dice of each lesion
    cases      train, valid, reports
    phases     for each phase: steps, losses at the beginning and at the end, seconds
    machine, versions, stages (name, command, seconds and cpu_seconds of each), seconds

The exit status is 0 when all targets are met, 1 when one is missed or a command failed.
`docs/how-to/check-that-it-learns.md` says what the targets mean and what was measured.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from launch.demo import (
    EVALUATION_FILE,
    RUN_AGAIN,
    TWO_CPU_PROCESSES,
    DemoCommand,
    FinishedCommand,
    plan_commands,
    run_commands,
    run_guarded,
)
from rectvlm.cli_options import CommandParser
from rectvlm.config import load_config
from rectvlm.data.shards import read_index
from rectvlm.files import read_json_object, write_json
from rectvlm.finite import mean_of_finite
from rectvlm.phantom.patient_plan import PLAIN_STYLE
from rectvlm.runs.phase_summary import PhaseSummary, summarize_phase
from rectvlm.runs.run_tables import format_number
from rectvlm.terminal_tables import FoldingTable
from rectvlm.types import JsonObject

PHASES = (1, 2, 3)
MAX_MINUTES = 20
"""Time that all commands together may take on two CPU cores, minutes."""
REPORT_CASES = 48
"""Number of held-out cases with a report, each written twice: with the image and without."""
EVALUATION_BATCH_SIZE = 16
"""Number of cases that are predicted together."""
SUMMARY_FILE, TABLES_FILE = "learn.json", "learn.md"


@dataclass(frozen=True)
class LearningTarget:
    """A figure, and the value that it has to reach."""

    name: str
    wanted: float
    found: float | None
    """Measured value; None where there was nothing to measure."""
    at_most: bool = False
    """Whether the value must not exceed `wanted`, instead of reaching it."""

    @property
    def is_met(self) -> bool:
        """Whether the figure was measured and is good enough."""
        if self.found is None:
            return False
        return self.found <= self.wanted if self.at_most else self.found >= self.wanted


@dataclass(frozen=True)
class LesionScores:
    """How well a lesion was outlined on the held-out cases."""

    dice_where_present: float | None
    """Mean Dice of the cases that have the lesion."""
    dice: float | None
    """Mean Dice, 0 for a case where the lesion was drawn and is not there."""
    sensitivity: float | None
    """Share of the lesion's outlines that were detected."""


@dataclass(frozen=True)
class CaseCounts:
    """Numbers of cases."""

    train: int
    valid: int
    reports: int
    """Number of held-out cases with a report."""


@dataclass(frozen=True)
class LearningSummary:
    """What a learning run came to; RUN/learn.json, as the module's docstring describes it."""

    config: str
    targets: list[LearningTarget]
    beside: dict[str, float | None]
    findings: dict[str, float | None]
    """AUROC by finding."""
    lesions: dict[str, LesionScores]
    cases: CaseCounts
    phases: list[PhaseSummary]
    machine: JsonObject
    versions: dict[str, str]
    stages: list[FinishedCommand]
    seconds: float
    """Duration of all commands, seconds."""

    def to_json(self) -> JsonObject:
        """Return the summary as plain values."""
        targets = [asdict(target) | {"met": target.is_met} for target in self.targets]
        return asdict(self) | {"targets": targets}


def plan_learning_commands(
    source: str, overrides: Sequence[str], phantoms: int, valid_phantoms: int
) -> list[DemoCommand]:
    """List the commands, in order: those of the demo, with other cases and no prediction.

    Args:
        source: name or path of a configuration.
        overrides: changes of the configuration, `part.field=value`.
        phantoms: number of cases to learn from.
        valid_phantoms: number of held-out cases.

    Raises:
        UserError: the configuration is wrong, or has no section for a phase.
    """
    shards, *phases, evaluation, _ = plan_commands(source, overrides, PHASES, TWO_CPU_PROCESSES)
    style = ("--no-samples", "--phantom-style", PLAIN_STYLE.name)
    counts = ("--phantoms", str(phantoms), "--valid-phantoms", str(valid_phantoms))
    shards_command = (*shards.command, *style, *counts, "--samples-per-shard", "24")
    # The language model is not packed to 4 bits, so its layers need not be gathered either: each
    # process holds all of it.
    last_command = (*phases[-1].command, "--ds-config", "ds_configs/phase3_zero2.json")
    phases[-1] = replace(phases[-1], command=last_command)

    config = load_config(source, overrides)
    folder = Path(config.train.runs) / config.name
    torchrun = (str(Path(sys.executable).parent / "torchrun"), "--standalone")
    paths = ("--checkpoint", str(folder / "phase3"), "--out", str(folder / EVALUATION_FILE))
    batch = ("--batch-size", str(EVALUATION_BATCH_SIZE))
    limits = ("--report-limit", str(REPORT_CASES), "--fit-limit", str(valid_phantoms))
    evaluate = ("-m", "rectvlm", "evaluate", *paths, *batch, *limits)
    evaluate_command = (*torchrun, "--nproc-per-node", "2", *evaluate)
    return [
        replace(shards, command=shards_command),
        *phases,
        replace(evaluation, command=evaluate_command, threads=phases[0].threads),
    ]


def summarize_learning(folder: Path, commands: Sequence[FinishedCommand]) -> LearningSummary:
    """Summarize a learning run from the files that it wrote.

    Args:
        folder: the run's folder.
        commands: the commands that ran.
    """
    metrics = read_json_object(folder / EVALUATION_FILE, RUN_AGAIN)
    seconds_by_command = {command.name: command.seconds for command in commands}
    total_seconds = round(sum(seconds_by_command.values()), 1)
    auroc_by_finding: dict[str, float | None] = {}
    for finding in PLAIN_STYLE.findings:
        auroc_by_finding[finding] = metrics["classification"]["per_finding"][finding].get("auroc")
    lesions: dict[str, LesionScores] = {}
    for lesion, scores in metrics["localization"]["per_lesion"].items():
        lesions[lesion] = LesionScores(
            scores["dice_where_present"], scores["dice"], scores["sensitivity"]
        )
    phases: list[PhaseSummary] = []
    for phase in PHASES:
        seconds = seconds_by_command[f"phase {phase}"]
        phases.append(summarize_phase(folder / f"phase{phase}", phase, seconds))
    image_scores = metrics["reports"]["image"]["scores"]
    ablated_scores = metrics["reports"]["image_ablated"]["scores"]
    train_samples = read_index(Path(metrics["shards"])).select_split("train")
    return LearningSummary(
        config=metrics["config"],
        targets=_list_targets(
            auroc_by_finding, lesions, image_scores, ablated_scores, total_seconds / 60
        ),
        beside={
            "macro F1 of the findings, thresholds fitted on other cases": metrics["classification"][
                "macro"
            ]["f1"],
            "mean Dice, 0 where a lesion was drawn that is not there": mean_of_finite(
                scores.dice for scores in lesions.values()
            ),
            "F1 of the findings in the reports, mean of the findings": image_scores[
                "clinical_labels_macro_f1"
            ],
            "F1 of the findings in the reports without the image": ablated_scores[
                "clinical_labels_micro_f1"
            ],
            "BLEU-4 of the reports": image_scores["bleu_4"],
        },
        findings=auroc_by_finding,
        lesions=lesions,
        cases=CaseCounts(
            train=len(train_samples),
            valid=metrics["n_cases"],
            reports=metrics["reports"]["image"]["n"],
        ),
        phases=phases,
        machine=metrics["machine"],
        versions=metrics["versions"],
        stages=list(commands),
        seconds=total_seconds,
    )


def _list_targets(
    auroc_by_finding: dict[str, float | None],
    lesions: dict[str, LesionScores],
    image_scores: JsonObject,
    ablated_scores: JsonObject,
    minutes: float,
) -> list[LearningTarget]:
    mean_auroc = mean_of_finite(auroc_by_finding.values())
    mean_dice = mean_of_finite(scores.dice_where_present for scores in lesions.values())
    f1 = image_scores["clinical_labels_micro_f1"]
    f1_without_image = ablated_scores["clinical_labels_micro_f1"]
    f1_loss = None
    if f1 is not None and f1_without_image is not None:
        f1_loss = f1 - f1_without_image
    laterality = image_scores["laterality"]
    return [
        LearningTarget("macro AUROC of the findings", 0.95, mean_auroc),
        LearningTarget("mean Dice of the lesions", 0.70, mean_dice),
        LearningTarget("F1 of the findings in the reports", 0.90, f1),
        LearningTarget("laterality of the lesions in the reports", 0.90, laterality),
        LearningTarget("F1 lost without the image", 0.40, f1_loss),
        LearningTarget("minutes", MAX_MINUTES, minutes, at_most=True),
    ]


def to_markdown(summary: LearningSummary) -> str:
    """Write targets, findings, lesions and commands as tables."""
    cases, machine = summary.cases, summary.machine
    lines = [
        f"{cases.valid} held-out cases ({cases.reports} with reports), {cases.train} to learn "
        f"from; {machine['cores']} cores, {machine['cpu']}.",
    ]
    lines += ["", "| target | wanted | found | met |", "|---|---|---|---|"]
    for target in summary.targets:
        wanted = f"{'≤' if target.at_most else '≥'} {target.wanted:g}"
        met = "yes" if target.is_met else "no"
        lines.append(f"| {target.name} | {wanted} | {format_number(target.found, 3)} | {met} |")
    lines += ["", "| beside them | found |", "|---|---|"]
    lines += _figure_rows(summary.beside)
    lines += ["", "| finding | AUROC |", "|---|---|"]
    lines += _figure_rows(summary.findings)

    lines += ["", "| lesion | Dice where present | Dice | sensitivity |", "|---|---|---|---|"]
    for lesion, scores in summary.lesions.items():
        figures = (scores.dice_where_present, scores.dice, scores.sensitivity)
        cells = " | ".join(format_number(figure, 3) for figure in figures)
        lines.append(f"| {lesion.replace('_', ' ')} | {cells} |")
    lines += ["", "| stage | seconds | seconds of CPU |", "|---|---|---|"]
    for command in summary.stages:
        lines.append(f"| {command.name} | {command.seconds:.0f} | {command.cpu_seconds:.0f} |")
    cpu_seconds = sum(command.cpu_seconds for command in summary.stages)
    lines += [f"| all | {summary.seconds:.0f} | {cpu_seconds:.0f} |", ""]
    return "\n".join(lines)


def _figure_rows(figures: dict[str, float | None]) -> list[str]:
    return [f"| {name} | {format_number(value, 3)} |" for name, value in figures.items()]


def make_target_table(summary: LearningSummary) -> Table:
    """Make a table of the targets, for the terminal."""
    title = f"{summary.cases.valid} held-out cases, {summary.cases.train} to learn from"
    table = FoldingTable(title=title, title_justify="left")
    table.add_column("target")
    for column in ("wanted", "found", "met"):
        table.add_column(column, justify="right")
    for target in summary.targets:
        wanted = f"{'at most' if target.at_most else 'at least'} {target.wanted:g}"
        met = "[green]yes[/]" if target.is_met else "[red]no[/]"
        table.add_row(target.name, wanted, format_number(target.found, 3), met)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parse_arguments(arguments)
    console = Console(stderr=True)
    return run_guarded(console, lambda: _run_learning(options, console))


def _run_learning(options: argparse.Namespace, console: Console) -> int:
    config = load_config(options.config, options.overrides)
    folder = Path(config.train.runs) / config.name
    commands = plan_learning_commands(
        options.config, options.overrides, options.phantoms, options.valid_phantoms
    )
    finished_commands = run_commands(commands, folder, TWO_CPU_PROCESSES, console)
    summary = summarize_learning(folder, finished_commands)
    write_json(folder / SUMMARY_FILE, summary.to_json())
    (folder / TABLES_FILE).write_text(to_markdown(summary))
    console.print(
        make_target_table(summary),
        f"All figures are in {folder}/{SUMMARY_FILE}, tables in {folder}/{TABLES_FILE}.",
    )
    return 0 if all(target.is_met for target in summary.targets) else 1


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m launch.learn", description="A proof that the system learns."
    )
    parser.add_argument(
        "--config", default="learn", help="name or path of a configuration (default: learn)"
    )
    parser.add_argument(
        "--phantoms", type=int, default=480, metavar="N", help="cases to learn from (default: 480)"
    )
    parser.add_argument(
        "--valid-phantoms", type=int, default=96, metavar="N", help="held-out cases (default: 96)"
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
