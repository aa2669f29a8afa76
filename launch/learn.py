"""A proof that the system learns: three phases on synthetic CTs with known truth.

    python -m launch.learn [--config learn] [--supervision complete] [--phantoms 480]
        [--valid-phantoms 96] [part.field=value …]

With `--supervision ct-rate` labels and outlines of the training cases have the gaps and errors of
CT-RATE's; the truth of the held-out cases is exhaustive.

It is measured on cases of other seeds. The commands are a user's own, each a process whose output
goes to RUN/logs/. The targets, the measured figures and whether they are enough are written to
RUN/learn.json and, as tables, to RUN/learn.md:

    supervision   of the training cases
    targets    for each target: name, wanted, found (None where there is nothing to measure), met
    beside     figures that belong to them, by name
    table_comparison    whether the language model's reports beat a table of texts, in words
    findings   those that the synthesis draws, with the AUROC of each
    lesions    Dice, sensitivity, instance F1 and false-positive volume of each lesion
    cases      train, valid, reports
    phases     for each phase: steps, losses at the beginning and at the end, seconds
    machine, versions, stages (name, command, seconds and cpu_seconds of each), seconds

The exit status is 0 when all targets are met, 1 when one is missed or a command failed.
`docs/how-to/check-that-it-learns.md` says what the targets mean and what was measured.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
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
from launch.learning_targets import LearningFigures, LearningTarget, LesionScores, list_targets
from rectvlm.cli_options import CommandParser
from rectvlm.config import load_config
from rectvlm.data.shards import read_index
from rectvlm.evaluate.report_baselines import BASELINE_NAMES
from rectvlm.evaluate.report_tables import describe_table_comparison
from rectvlm.files import read_json_object, write_json
from rectvlm.phantom.patient_plan import CT_RATE_STYLE, PLAIN_STYLE, PhantomStyle
from rectvlm.phantom.supervision import TrainingSupervision
from rectvlm.runs.phase_summary import PhaseSummary, summarize_phase
from rectvlm.runs.run_tables import format_number
from rectvlm.terminal_tables import FoldingTable
from rectvlm.types import JsonObject

PHASES = (1, 2, 3)
REPORT_CASES = 48
"""Number of held-out cases with a report, each written twice: with the image and without."""
EVALUATION_BATCH_SIZE = 16
"""Number of cases that are predicted together."""
SUMMARY_FILE, TABLES_FILE = "learn.json", "learn.md"
_SCORES = fields(LesionScores)
_LESION_COLUMNS = (
    "Dice where present",
    "Dice",
    "sensitivity",
    "instance F1",
    "ml where there is none",
)
"""Columns of the fields of `LesionScores`."""


@dataclass(frozen=True)
class LearningCases:
    """Synthetic cases of a run, by default."""

    style: PhantomStyle
    """Style of all cases."""
    phantoms: int
    """Number of cases to learn from."""
    valid_phantoms: int
    """Number of held-out cases."""


CASES_BY_SUPERVISION: dict[TrainingSupervision, LearningCases] = {
    "complete": LearningCases(PLAIN_STYLE, phantoms=480, valid_phantoms=96),
    "ct-rate": LearningCases(CT_RATE_STYLE, phantoms=960, valid_phantoms=128),
}
"""Cases by supervision. Consolidation is outlined in 13% of the 19% that have it: 24 of 960."""


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
    supervision: TrainingSupervision
    targets: list[LearningTarget]
    beside: dict[str, float | None]
    table_comparison: str
    """Whether the language model's reports beat a table of texts, in words."""
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


def add_run_overrides(
    source: str, overrides: Sequence[str], supervision: TrainingSupervision
) -> list[str]:
    """Put name and shards of a supervision's run before the changes of the configuration.

    `complete` has those of the configuration.
    """
    if supervision == "complete":
        return list(overrides)
    config = load_config(source)
    name, shards = f"{config.name}-{supervision}", f"{config.data.shards}-{supervision}"
    return [f"name={name}", f"data.shards={shards}", *overrides]


def plan_learning_commands(
    source: str,
    overrides: Sequence[str],
    phantoms: int,
    valid_phantoms: int,
    supervision: TrainingSupervision = "complete",
) -> list[DemoCommand]:
    """List the commands, in order: those of the demo, with other cases and no prediction.

    Args:
        source: name or path of a configuration.
        overrides: changes of the configuration, `part.field=value`.
        phantoms: number of cases to learn from.
        valid_phantoms: number of held-out cases.
        supervision: labels and outlines of the cases to learn from.

    Raises:
        UserError: the configuration is wrong, or has no section for a phase.
    """
    shards, *phases, evaluation, _ = plan_commands(source, overrides, PHASES, TWO_CPU_PROCESSES)
    phantom_style = CASES_BY_SUPERVISION[supervision].style
    style = ("--phantom-style", phantom_style.name, "--phantom-supervision", supervision)
    counts = ("--phantoms", str(phantoms), "--valid-phantoms", str(valid_phantoms))
    shards_command = (*shards.command, "--no-samples", *style, *counts, "--samples-per-shard", "24")
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
    convention = ("--convention", phantom_style.convention)
    evaluate = ("-m", "rectvlm", "evaluate", *paths, *batch, *limits, *convention)
    evaluate_command = (*torchrun, "--nproc-per-node", "2", *evaluate)
    return [
        replace(shards, command=shards_command),
        *phases,
        replace(evaluation, command=evaluate_command, threads=phases[0].threads),
    ]


def summarize_learning(
    folder: Path,
    commands: Sequence[FinishedCommand],
    supervision: TrainingSupervision = "complete",
) -> LearningSummary:
    """Summarize a learning run from the files that it wrote.

    Args:
        folder: the run's folder.
        commands: the commands that ran.
        supervision: labels and outlines of the cases to learn from.
    """
    metrics = read_json_object(folder / EVALUATION_FILE, RUN_AGAIN)
    seconds_by_command = {command.name: command.seconds for command in commands}
    total_seconds = round(sum(seconds_by_command.values()), 1)
    figures = _select_figures(metrics, total_seconds / 60, supervision)
    phases: list[PhaseSummary] = []
    for phase in PHASES:
        seconds = seconds_by_command[f"phase {phase}"]
        phases.append(summarize_phase(folder / f"phase{phase}", phase, seconds))
    image_scores = metrics["reports"]["image"]["scores"]
    train_samples = read_index(Path(metrics["shards"])).select_split("train")
    return LearningSummary(
        config=metrics["config"],
        supervision=supervision,
        targets=list_targets(figures, supervision),
        beside={
            "macro F1 of the findings, thresholds fitted on other cases": metrics["classification"][
                "macro"
            ]["f1"],
            "F1 of the findings in the reports, mean of the findings": image_scores[
                "clinical_labels_macro_f1"
            ],
            "F1 of the findings in the reports without the image": figures.report_f1_without_image,
            **_select_baseline_figures(metrics["reports"]),
            "BLEU-4 of the reports": image_scores["bleu_4"],
        },
        table_comparison=describe_table_comparison(metrics["reports"]),
        findings=dict(figures.auroc_by_finding),
        lesions=dict(figures.lesions),
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


def _select_baseline_figures(reports: JsonObject) -> dict[str, float | None]:
    """F1 of the reports of each baseline, by name."""
    figures = {}
    for key, baseline in reports["baselines"].items():
        name = f"F1 of the findings in the reports of the baseline {BASELINE_NAMES[key]}"
        figures[name] = baseline["scores"]["clinical_labels_micro_f1"]
    return figures


def _select_figures(
    metrics: JsonObject, minutes: float, supervision: TrainingSupervision
) -> LearningFigures:
    """Select the figures that targets are made of."""
    auroc_by_finding: dict[str, float | None] = {}
    for finding in CASES_BY_SUPERVISION[supervision].style.findings:
        auroc_by_finding[finding] = metrics["classification"]["per_finding"][finding].get("auroc")
    lesions: dict[str, LesionScores] = {}
    for lesion, scores in metrics["localization"]["per_lesion"].items():
        lesions[lesion] = LesionScores(**{score.name: scores[score.name] for score in _SCORES})
    image_scores = metrics["reports"]["image"]["scores"]
    ablated_scores = metrics["reports"]["image_ablated"]["scores"]
    return LearningFigures(
        auroc_by_finding=auroc_by_finding,
        lesions=lesions,
        report_f1=image_scores["clinical_labels_micro_f1"],
        report_f1_without_image=ablated_scores["clinical_labels_micro_f1"],
        laterality=image_scores["laterality"],
        minutes=minutes,
    )


def to_markdown(summary: LearningSummary) -> str:
    """Write targets, findings, lesions and commands as tables."""
    cases, machine = summary.cases, summary.machine
    lines = [
        f"{cases.valid} held-out cases ({cases.reports} with reports), {cases.train} to learn "
        f"from, supervision {summary.supervision}; {machine['cores']} cores, {machine['cpu']}.",
    ]
    lines += ["", "| target | wanted | found | met |", "|---|---|---|---|"]
    for target in summary.targets:
        wanted = f"{'≤' if target.at_most else '≥'} {target.wanted:g}"
        met = "yes" if target.is_met else "no"
        lines.append(f"| {target.name} | {wanted} | {format_number(target.found, 3)} | {met} |")
    lines += ["", "| beside them | found |", "|---|---|"]
    lines += [*_figure_rows(summary.beside), "", summary.table_comparison]
    lines += ["", "| finding | AUROC |", "|---|---|"]
    lines += _figure_rows(summary.findings)

    lines += ["", f"| lesion | {' | '.join(_LESION_COLUMNS)} |", "|---" * 6 + "|"]
    for lesion, scores in summary.lesions.items():
        cells = " | ".join(format_number(figure, 3) for figure in astuple(scores))
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
    supervision = options.supervision
    overrides = add_run_overrides(options.config, options.overrides, supervision)
    config = load_config(options.config, overrides)
    folder = Path(config.train.runs) / config.name
    cases = CASES_BY_SUPERVISION[supervision]
    phantoms = cases.phantoms if options.phantoms is None else options.phantoms
    valid_phantoms = cases.valid_phantoms
    if options.valid_phantoms is not None:
        valid_phantoms = options.valid_phantoms
    commands = plan_learning_commands(
        options.config, overrides, phantoms, valid_phantoms, supervision
    )
    finished_commands = run_commands(commands, folder, TWO_CPU_PROCESSES, console)
    summary = summarize_learning(folder, finished_commands, supervision)
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
        "--supervision",
        choices=CASES_BY_SUPERVISION,
        default="complete",
        help="labels and outlines of the cases to learn from (default: %(default)s)",
    )
    for flag, field_name, noun in (
        ("--phantoms", "phantoms", "cases to learn from"),
        ("--valid-phantoms", "valid_phantoms", "held-out cases"),
    ):
        counts = [getattr(cases, field_name) for cases in CASES_BY_SUPERVISION.values()]
        default = f"{counts[0]}, with ct-rate {counts[1]}"
        parser.add_argument(flag, type=int, metavar="N", help=f"{noun} (default: {default})")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="part.field=value",
        help="change a value of the configuration",
    )
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
