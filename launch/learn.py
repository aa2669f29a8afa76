"""A proof that the system learns: three phases on synthetic CTs with known truth, measured on cases of other seeds.

    python -m launch.learn [--config learn] [--phantoms 480] [--valid-phantoms 96] [part.field=value …]

The commands are a user's own, each a process whose output goes to RUN/logs/. The targets, what was found and whether it
is enough are written to RUN/learn.json and, as a table, to RUN/learn.md:

    targets    of each: name, wanted, found (None where there is nothing to measure), met
    beside     figures that belong to them, by name
    findings   those that the synthesis draws, with the AUROC of each
    lesions    Dice of each lesion
    cases      train, valid, reports
    phases     of each phase: steps, losses at the beginning and at the end, seconds
    machine, versions, stages (name, command, seconds and cpu_seconds of each), seconds

The exit status is 0 when all targets are met, 1 when one is missed or a command failed. `docs/how-to/check-that-it-learns.md` says what
the targets mean and what was measured.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from launch.demo import (
    TWO_CPU_PROCESSES,
    DemoCommand,
    FinishedCommand,
    plan_commands,
    run_commands,
    run_guarded,
    summarize_phase,
)
from rectvlm.config import load_config
from rectvlm.data.shards import read_index
from rectvlm.phantom.patient_plan import PLAIN_STYLE

PHASES = (1, 2, 3)
MAX_MINUTES = 20
"""That the whole may take on two CPU cores."""
REPORT_CASES = 48
"""Held-out cases that reports are written for, twice: with the image and without."""
EVALUATION_BATCH_SIZE = 16
"""Cases that are predicted together."""


@dataclass(frozen=True)
class LearningTarget:
    """A figure and what it has to be."""

    name: str
    wanted: float
    found: float | None
    at_most: bool = False

    @property
    def is_met(self) -> bool:
        """Whether it was measured and is good enough."""
        if self.found is None:
            return False
        return self.found <= self.wanted if self.at_most else self.found >= self.wanted


def plan_learning_commands(
    source: str, overrides: Sequence[str], phantoms: int, valid_phantoms: int
) -> list[DemoCommand]:
    """The commands, in order: those of the demo, with other cases, without a prediction.

    Raises:
        UserError: the configuration is wrong, or has no section for a phase.
    """
    shards, *phases, evaluation, _ = plan_commands(source, overrides, PHASES, TWO_CPU_PROCESSES)
    cases = (
        "--phantoms",
        str(phantoms),
        "--valid-phantoms",
        str(valid_phantoms),
        "--samples-per-shard",
        "24",
    )
    shards = replace(
        shards,
        command=(*shards.command, "--no-samples", "--phantom-style", PLAIN_STYLE.name, *cases),
    )
    # The language model is not packed, so its layers need not be gathered either: each process holds it whole.
    phases[-1] = replace(
        phases[-1], command=(*phases[-1].command, "--ds-config", "ds_configs/phase3_zero2.json")
    )
    config = load_config(source, overrides)
    folder = Path(config.train.runs) / config.name
    evaluate = (
        *(
            str(Path(sys.executable).parent / "torchrun"),
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "rectvlm",
        ),
        *(
            "evaluate",
            "--checkpoint",
            str(folder / "phase3"),
            "--out",
            str(folder / "evaluation" / "metrics.json"),
        ),
        *(
            "--batch-size",
            str(EVALUATION_BATCH_SIZE),
            "--report-limit",
            str(REPORT_CASES),
            "--fit-limit",
            str(valid_phantoms),
        ),
    )
    return [shards, *phases, replace(evaluation, command=evaluate, threads=phases[0].threads)]


def summarize_learning(folder: Path, stages: Sequence[FinishedCommand]) -> dict[str, Any]:
    """What a run came to, read from the files that it wrote; the module's docstring has the keys."""
    figures = json.loads((folder / "evaluation" / "metrics.json").read_text())
    seconds = {stage.name: stage.seconds for stage in stages}
    total = round(sum(seconds.values()), 1)
    rows = figures["classification"]["per_finding"]
    findings = {name: rows[name].get("auroc") for name in PLAIN_STYLE.findings}
    lesions = {
        key: {score: row[score] for score in ("dice_where_present", "dice", "sensitivity")}
        for key, row in figures["localization"]["per_lesion"].items()
    }
    image, ablated = (figures["reports"][name]["scores"] for name in ("image", "image_ablated"))
    f1, without = image["clinical_labels_micro_f1"], ablated["clinical_labels_micro_f1"]
    targets = [
        LearningTarget("macro AUROC of the findings", 0.95, _mean_known(findings.values())),
        LearningTarget(
            "mean Dice of the lesions",
            0.70,
            _mean_known(row["dice_where_present"] for row in lesions.values()),
        ),
        LearningTarget("F1 of the findings in the reports", 0.90, f1),
        LearningTarget("laterality of the lesions in the reports", 0.90, image["laterality"]),
        LearningTarget(
            "F1 lost without the image",
            0.40,
            None if f1 is None or without is None else f1 - without,
        ),
        LearningTarget("minutes", MAX_MINUTES, total / 60, at_most=True),
    ]
    return {
        "config": figures["config"],
        "targets": [asdict(target) | {"met": target.is_met} for target in targets],
        "beside": {
            "macro F1 of the findings, thresholds fitted on other cases": figures["classification"][
                "macro"
            ]["f1"],
            "mean Dice, 0 where a lesion was drawn that is not there": _mean_known(
                row["dice"] for row in lesions.values()
            ),
            "F1 of the findings in the reports, mean of the findings": image[
                "clinical_labels_macro_f1"
            ],
            "F1 of the findings in the reports without the image": without,
            "BLEU-4 of the reports": image["bleu_4"],
        },
        "findings": findings,
        "lesions": lesions,
        "cases": {
            "train": len(read_index(Path(figures["shards"])).select_split("train")),
            "valid": figures["n_cases"],
            "reports": figures["reports"]["image"]["n"],
        },
        "phases": [summarize_phase(folder / f"phase{n}", n, seconds[f"phase {n}"]) for n in PHASES],
        "machine": figures["machine"],
        "versions": figures["versions"],
        "stages": [asdict(stage) for stage in stages],
        "seconds": total,
    }


def _mean_known(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _format_figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def to_markdown(summary: dict[str, Any]) -> str:
    """Targets, findings, lesions and stages as tables."""
    cases = summary["cases"]
    lines = [
        f"{cases['valid']} held-out cases ({cases['reports']} with reports), {cases['train']} to learn from; "
        f"{summary['machine']['cores']} cores, {summary['machine']['cpu']}.",
        *("", "| target | wanted | found | met |", "|---|---|---|---|"),
    ]
    for row in summary["targets"]:
        sign = "≤" if row["at_most"] else "≥"
        met = "yes" if row["met"] else "no"
        lines.append(
            f"| {row['name']} | {sign} {row['wanted']:g} | {_format_figure(row['found'])} | {met} |"
        )
    lines += ["", "| beside them | found |", "|---|---|"]
    lines += [f"| {name} | {_format_figure(value)} |" for name, value in summary["beside"].items()]
    lines += ["", "| finding | AUROC |", "|---|---|"]
    lines += [
        f"| {name} | {_format_figure(value)} |" for name, value in summary["findings"].items()
    ]
    lines += ["", "| lesion | Dice where present | Dice | sensitivity |", "|---|---|---|---|"]
    for key, row in summary["lesions"].items():
        scores = " | ".join(
            _format_figure(row[score]) for score in ("dice_where_present", "dice", "sensitivity")
        )
        lines.append(f"| {key.replace('_', ' ')} | {scores} |")
    lines += ["", "| stage | seconds | seconds of CPU |", "|---|---|---|"]
    lines += [
        f"| {one['name']} | {one['seconds']:.0f} | {one['cpu_seconds']:.0f} |"
        for one in summary["stages"]
    ]
    used = sum(one["cpu_seconds"] for one in summary["stages"])
    return "\n".join([*lines, f"| all | {summary['seconds']:.0f} | {used:.0f} |", ""])


def make_target_table(summary: dict[str, Any]) -> Table:
    """The targets, for the terminal."""
    cases = summary["cases"]
    table = Table(
        title=f"{cases['valid']} held-out cases, {cases['train']} to learn from",
        title_justify="left",
    )
    for column in ("target", "wanted", "found", "met"):
        table.add_column(column, justify="left" if column == "target" else "right")
    for row in summary["targets"]:
        sign = "at most" if row["at_most"] else "at least"
        met = "[green]yes[/]" if row["met"] else "[red]no[/]"
        table.add_row(row["name"], f"{sign} {row['wanted']:g}", _format_figure(row["found"]), met)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    options = _parse_arguments(arguments)
    console = Console(stderr=True)
    return run_guarded(console, lambda: _run_learning(options, console))


def _run_learning(options: argparse.Namespace, console: Console) -> int:
    config = load_config(options.config, options.overrides)
    folder = Path(config.train.runs) / config.name
    stages = plan_learning_commands(
        options.config, options.overrides, options.phantoms, options.valid_phantoms
    )
    summary = summarize_learning(folder, run_commands(stages, folder, TWO_CPU_PROCESSES, console))
    (folder / "learn.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    (folder / "learn.md").write_text(to_markdown(summary))
    console.print(
        make_target_table(summary),
        f"All figures are in {folder}/learn.json, tables in {folder}/learn.md.",
    )
    return 0 if all(row["met"] for row in summary["targets"]) else 1


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
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
