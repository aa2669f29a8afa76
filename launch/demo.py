"""The whole system in small, with a user's commands: shards, three phases, evaluation, prediction.

    python -m launch.demo [--config demo] [--supervision complete] [--phantoms 320]
        [--valid-phantoms 48] [--strict] [part.field=value …]

Two processes train with DeepSpeed on synthetic CTs with known truth, in phase 3 with ZeRO-3 and a
4-bit language model. What was learnt is measured on cases of other seeds, then two real CTs are
predicted, which were not trained on. `--config learn` is the same with more cases and steps: a
proof of learning, whose `--supervision ct-rate` gives labels and outlines of the training cases the
gaps and errors of CT-RATE's.

Every command runs as a process of its own; its output goes to RUN/logs/. The results are read from
the files of the run and written to RUN/summary.json (`launch.demo_summary.DemoSummary`) and, as
tables, to RUN/summary.md.

The exit status is 0 when all commands ran, 1 when one failed or, with `--strict`, when a target is
missed. `docs/how-to/check-that-it-learns.md` says what the targets mean and what was measured.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from data_pipeline.demo_cases import FIRST_VALID_SEED, phantom_key
from data_pipeline.sample_cts import SAMPLE_CT_FOLDER, VOLUME_FOLDER
from launch.commands import TWO_CPU_PROCESSES, Command, run_commands, run_guarded
from launch.demo_summary import (
    EVALUATION_FILE,
    SUMMARY_FILE,
    TABLES_FILE,
    make_result_tables,
    summarize_demo,
    to_markdown,
)
from launch.demo_targets import DemoSize
from rectvlm.cli_options import CommandParser
from rectvlm.config import load_config, phase_key
from rectvlm.files import write_json
from rectvlm.finding_thresholds import THRESHOLDS_FILE
from rectvlm.machine import count_cores
from rectvlm.optional_packages import require_extra
from rectvlm.phantom.patient_plan import CT_RATE_STYLE, PLAIN_STYLE, PhantomStyle, draw_patient_plan
from rectvlm.phantom.supervision import TrainingSupervision
from rectvlm.runs.run_files import METRICS_FILE
from rectvlm.types import UserError

PHASES = (1, 2, 3)
EVALUATION_BATCH_SIZE = 16
"""Number of cases that are predicted together."""
SHOWN_CASE = "held-out case"
"""Name of the command that makes a page with prediction and truth side by side."""
STYLES: dict[TrainingSupervision, PhantomStyle] = {
    "complete": PLAIN_STYLE,
    "ct-rate": CT_RATE_STYLE,
}
"""Style of all phantoms by supervision."""


@dataclass(frozen=True)
class DemoCases:
    """Numbers of synthetic cases."""

    train: int
    valid: int
    """Number of held-out cases."""
    reports: int
    """Number of held-out cases with a report, each written twice: with the image and without."""


CASES: dict[tuple[DemoSize, TrainingSupervision], DemoCases] = {
    ("demo", "complete"): DemoCases(train=320, valid=48, reports=24),
    ("demo", "ct-rate"): DemoCases(train=320, valid=48, reports=24),
    ("learn", "complete"): DemoCases(train=480, valid=96, reports=48),
    ("learn", "ct-rate"): DemoCases(train=960, valid=128, reports=48),
}
"""Cases by default. With `ct-rate` consolidation is outlined in 13% of the 19% that have it: 24 of
960."""


def find_size(source: str) -> DemoSize:
    """Return the size of a configuration: `learn` by its name, `demo` for any other one."""
    return "learn" if load_config(source).name == "learn" else "demo"


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


def plan_commands(
    source: str,
    overrides: Sequence[str],
    cases: DemoCases,
    phases: Sequence[int] = PHASES,
    launcher: str = TWO_CPU_PROCESSES,
    supervision: TrainingSupervision = "complete",
) -> list[Command]:
    """List the commands, in order; paths are relative to the checkout.

    Args:
        source: name or path of a configuration.
        overrides: changes of the configuration, `part.field=value`.
        cases: numbers of the synthetic cases.
        phases: numbers of the phases to train, in order; the last one is evaluated and predicts.
        launcher: Accelerate's config file.
        supervision: labels and outlines of the cases to learn from.

    Raises:
        UserError: the configuration is wrong, or has no section for a phase.
    """
    config = load_config(source, overrides)
    folder = Path(config.train.runs) / config.name
    cores = count_cores()
    config_options = ("--config", source, *overrides)
    style, size = STYLES[supervision], find_size(source)

    preprocess = [sys.executable, "-m", "data_pipeline.preprocess", *config_options]
    preprocess += ["--phantom-style", style.name, "--phantom-supervision", supervision]
    preprocess += ["--phantoms", str(cases.train), "--valid-phantoms", str(cases.valid)]
    if size == "learn":
        preprocess += ["--no-samples", "--samples-per-shard", "24"]
    commands = [Command("shards", tuple(preprocess), cores)]
    for phase in phases:
        key = phase_key(phase)
        settings = config.train.phases.get(key)
        if settings is None:
            raise UserError(
                f"The configuration of run {config.name} has no train.phases.{key}: add the "
                "section."
            )
        accelerate = (_tool("accelerate"), "launch", "--config_file", launcher)
        train = [*accelerate, f"launch/phase{phase}.py", "--restart", *config_options]
        if phase == 3 and size == "learn":
            # The language model is not packed to 4 bits, so its layers need not be gathered either:
            # each process holds all of it.
            train += ["--ds-config", "ds_configs/phase3_zero2.json"]
        commands.append(
            Command(
                f"phase {phase}",
                tuple(train),
                threads=max(1, cores // 2),
                steps=math.ceil(settings.samples / settings.global_batch),
                metrics_path=folder / key / METRICS_FILE,
            )
        )

    checkpoint = ("--checkpoint", str(folder / f"phase{phases[-1]}"))
    evaluate = [_tool("torchrun"), "--standalone", "--nproc-per-node", "2"]
    evaluate += ["-m", "rectvlm", "evaluate", *checkpoint, "--convention", style.convention]
    evaluate += ["--batch-size", str(EVALUATION_BATCH_SIZE), "--fit-limit", str(cases.valid)]
    evaluate += ["--report-limit", str(cases.reports), "--out", str(folder / EVALUATION_FILE)]
    commands.append(Command("evaluation", tuple(evaluate), max(1, cores // 2)))
    thresholds = ("--thresholds", str((folder / EVALUATION_FILE).with_name(THRESHOLDS_FILE)))
    results = ("--out", str(folder / "predictions"))
    rectvlm_predict = (_tool("rectvlm"), "predict")
    options = (*checkpoint, *results, *thresholds)
    shown_key = choose_shown_case(cases.valid, style)
    shown = (*rectvlm_predict, str(config.data.shards), "--keys", shown_key, *options)
    commands.append(Command(SHOWN_CASE, shown, cores))
    fetch = (sys.executable, "-m", "data_pipeline.sample_cts")
    commands.append(Command("sample CTs", fetch, 1))
    real = (*rectvlm_predict, str(SAMPLE_CT_FOLDER / VOLUME_FOLDER), *options)
    commands.append(Command("real CTs", real, cores))
    return commands


def choose_shown_case(valid_count: int, style: PhantomStyle) -> str:
    """Return the key of the held-out phantom with most findings, whose page shows most."""

    def count_findings(seed: int) -> int:
        return sum(draw_patient_plan(seed, style).present.values())

    seeds = range(FIRST_VALID_SEED, FIRST_VALID_SEED + valid_count)
    return phantom_key(max(seeds, key=count_findings))


def _tool(name: str) -> str:
    """Path of a command of this Python."""
    return str(Path(sys.executable).parent / name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parse_arguments(arguments)
    console = Console(stderr=True)
    return run_guarded(console, lambda: _run_demo(options, console))


def _run_demo(options: argparse.Namespace, console: Console) -> int:
    require_extra("train", "demo")
    supervision = options.supervision
    overrides = add_run_overrides(options.config, options.overrides, supervision)
    config = load_config(options.config, overrides)
    folder = Path(config.train.runs) / config.name
    size = find_size(options.config)
    cases = CASES[size, supervision]
    cases = DemoCases(
        cases.train if options.phantoms is None else options.phantoms,
        cases.valid if options.valid_phantoms is None else options.valid_phantoms,
        cases.reports,
    )
    commands = plan_commands(
        options.config, overrides, cases, options.phases, options.accelerate, supervision
    )
    (folder / SUMMARY_FILE).unlink(missing_ok=True)
    finished_commands = run_commands(commands, folder, options.accelerate, console)
    summary = summarize_demo(
        folder, options.phases, finished_commands, size, supervision, STYLES[supervision]
    )
    write_json(folder / SUMMARY_FILE, summary.to_json())
    (folder / TABLES_FILE).write_text(to_markdown(summary))
    console.print(
        *make_result_tables(summary),
        f"All figures are in {folder}/{SUMMARY_FILE}, tables in {folder}/{TABLES_FILE}.",
    )
    if summary.table_comparison:
        console.print(summary.table_comparison, highlight=False, soft_wrap=True)
    for ct in summary.real_cts:
        console.print(ct.describe(), highlight=False, soft_wrap=True)
    console.print("Open in a browser, the first with the truth beside the prediction:")
    for page in summary.pages:
        console.print(f"    {page}", highlight=False, soft_wrap=True)
    is_good = all(target.is_met for target in summary.targets)
    return 0 if is_good or not options.strict else 1


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(prog="python -m launch.demo", description="The whole system in small.")
    parser.add_argument(
        "--config",
        default="demo",
        help="name or path of a configuration: demo, or learn for a proof of learning "
        "(default: demo)",
    )
    parser.add_argument(
        "--supervision",
        choices=STYLES,
        default="complete",
        help="labels and outlines of the cases to learn from (default: %(default)s)",
    )
    for flag, field_name, noun in (
        ("--phantoms", "train", "cases to learn from"),
        ("--valid-phantoms", "valid", "held-out cases"),
    ):
        counts = {str(getattr(cases, field_name)): None for cases in CASES.values()}
        default = f"{' or '.join(counts)}, by configuration and supervision"
        parser.add_argument(flag, type=int, metavar="N", help=f"{noun} (default: {default})")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a target is missed")
    parser.add_argument(
        "--phases", type=int, nargs="+", default=list(PHASES), choices=PHASES, metavar="N"
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
