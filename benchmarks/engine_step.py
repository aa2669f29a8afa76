"""Steps of every phase through the engine: where the time goes, memory beside the plan, FLOPs.

    python -m benchmarks.engine_step [--config large] [--phases 1 2 3 3-align]
        [--variants zero3 zero3-no-leaf zero2 bf16-zero3] [--micro-batch 1 4] [--processes 1 2]
        [--checkpointing configured on off] [--rounds 3]

The parts of a phase train on a phantom of the configuration's grid, with the loader, the engine,
the losses and the optimizer of `launch/` (`phase_step.py`). Reports have the greatest length that
the configuration allows. `--variants` are ways to run the phases with a report generator.

Each measurement has processes of its own, one on each device, since a process holds one engine in
its life, and so has its plan, since Transformers builds another model where ZeRO-3 is on; several
processes are started by `accelerate launch`. Two plans stand beside each measurement: one of
tensors alone, and one with the workspace of kernels measured (`rectvlm plan --work-areas`).
Communication is timed in further steps, in which each collective is waited for.
"""

import argparse
import itertools
import json
import logging
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks.machine_limits import measure_matrix_rate
from benchmarks.measurements import Comparison, Repetitions, make_table
from benchmarks.phase_step import (
    CHECKPOINTING,
    PHASE_NAMES,
    VARIANTS,
    StepSettings,
    measure_step,
    write_long_report_shards,
)
from benchmarks.publishing import (
    LaunchFailed,
    Program,
    add_config_options,
    make_parser,
    positive_int,
    prepare_engine_environment,
    publish_result,
    quiet_main,
)
from benchmarks.timing import default_device, run_in_new_process
from benchmarks.train_step import launch_processes
from rectvlm.config import load_config
from rectvlm.files import write_json
from rectvlm.types import JsonObject, UserError

log = logging.getLogger(__name__)

PLAN_NAMES = ("plan", "plan_with_areas")
"""Plans of tensors alone, and with the workspace of kernels measured."""


def resolve_checkpointing(settings: StepSettings) -> StepSettings:
    """Write the planner's choice in place of `activation_checkpointing: auto`."""
    from rectvlm.plan.auto_settings import list_auto_parts, resolve_auto_settings

    config, phase = settings.load_config(), settings.find_phase()
    parts = list_auto_parts(phase, config)
    if not parts:
        return settings
    resolved = resolve_auto_settings(phase, config, settings.ds_config)
    choices: list[str] = []
    for part in parts:
        is_recomputed = bool(getattr(resolved, part).activation_checkpointing)
        choices.append(f"{part}.activation_checkpointing={str(is_recomputed).lower()}")
    return replace(settings, overrides=(*settings.overrides, *choices))


def run_measurement(settings: StepSettings, work: Path) -> JsonObject:
    """Measure in processes of its own.

    Raises:
        LaunchFailed: the processes ended with an error.
        OutOfMemoryError: the GPU is too small.
    """
    if settings.processes == 1:
        return run_in_new_process(measure_step, settings)
    settings_path, result_path = work / "settings.json", work / "result.json"
    write_json(settings_path, asdict(settings))
    module = ["--module", "benchmarks.engine_step", "--measure"]
    launch_processes(settings.processes, [*module, str(settings_path), str(result_path)])
    return json.loads(result_path.read_text())


def _measure_as_rank(settings_path: Path, result_path: Path) -> None:
    values = json.loads(settings_path.read_text())
    settings = StepSettings(**values | {"overrides": tuple(values["overrides"])})
    measured = measure_step(settings)
    if os.environ.get("RANK", "0") == "0":
        write_json(result_path, measured)


def plan_step(settings: StepSettings) -> JsonObject:
    """Plan a step, without and with measured workspace, and count its TFLOP on each device."""
    from rectvlm.plan.planner import ResourcePlanner
    from rectvlm.train.dry_run.kernel_workspace import KernelWorkspaceMeter

    config, phase = settings.load_config(), settings.find_phase()
    plans: JsonObject = {}
    meters = (None, KernelWorkspaceMeter(default_device()))
    for name, meter in zip(PLAN_NAMES, meters, strict=True):
        planner = ResourcePlanner(
            config, phase.number, settings.ds_config, workspace_meter=meter, stage=phase.stage
        )
        plan = planner.make_plan(settings.processes, math.inf)
        plans[name] = {
            "gpu_memory_gb": plan.gpu_memory_gb,
            "loading_peak_gb": plan.loading_peak_gb - plan.gpu_memory_gb["context"],
            "seconds": plan.time.total,
            "tokens": planner.dry_run(planner.settings.micro_batch).positions,
        }
        plans["model_tflop"] = plan.flops_per_step.model
        plans["hardware_tflop"] = plan.flops_per_step.hardware
    return plans


def list_comparisons(result: JsonObject) -> list[Comparison]:
    """List parts of a step, speed, shares of the matrix rate, and memory beside its plan."""
    speed, tokens, shares = Repetitions(), Repetitions(), Repetitions()
    sections, memory = Repetitions(), Repetitions()
    rate = result["matrix_flops_per_second"]
    for row in result["rows"]:
        label, seconds = row["label"], row["seconds"]
        steps = [sum(parts) for parts in zip(*seconds.values(), strict=True)]
        samples = row["step_seconds"] * row["samples_per_second"]
        speed.add(label, [samples / step for step in steps])
        positions = row["step_seconds"] * row["tokens_per_second"]
        tokens.add(label, [positions / step for step in steps])
        for section, values in seconds.items():
            communication = row["communication"].get(section, 0.0)
            sections.add(section, [max(0.0, value - communication) for value in values], label)
        if any(row["communication"].values()):
            sections.add("communication", sum(row["communication"].values()), label)
        for kind in ("model", "hardware"):
            if rate is not None:
                flops = row[f"{kind}_tflop"] * 1e12
                shares.add(f"{kind} FLOPs", [flops / step / rate for step in steps], label)
        memory.add("measured", row["peak_bytes"] / 1e9, label)
        memory.add("planned", row["plan_with_areas"]["gpu_memory_gb"]["allocated"], label)
    return [
        Comparison(
            "Parts of a step", "s", sections.to_measurements(), plot="stack", at_label="step"
        ),
        Comparison("Samples a second", "samples/s", speed.to_measurements(), better="higher"),
        Comparison(
            "Tokens a second",
            "tokens/s",
            tokens.to_measurements(),
            better="higher",
            note="Patches and language positions of all processes.",
        ),
        Comparison(
            "FLOP/s of a device",
            "of the rate of a bfloat16 matrix product",
            shares.to_measurements(),
            better="higher",
            at_label="step",
            note="Hardware FLOPs count what checkpointing computes again.",
        ),
        Comparison("Peak memory", "GB", memory.to_measurements(), at_label="step"),
    ]


def write_text(result: JsonObject) -> str:
    """Write circumstances, and tables of speed and of memory beside the plan."""
    kind = "resident, the process included, unlike plans"
    if result["machine"]["gpus"]:
        kind = "as torch's allocator saw it"
    left_out = "".join(f"\nLeft out: {label}: {why}\n" for label, why in result["left_out"].items())
    return (
        f"Configuration {result['config']}, language model {result['geometry']} with random "
        f"weights; median of {result['rounds']} steps after two. Measurements follow one another, "
        "each with processes of its own.\n\n"
        f"{_make_speed_table(result)}"
        + f"\nMemory in GB, {kind}; planned as allocated, in brackets by how much the plan is "
        f"off.\n\n{_make_peak_table(result)}"
        + f"\nHeld between steps by rank 0, in GB.\n\n{_make_static_table(result)}"
        + left_out
    )


PROGRAM = Program("engine_step", "A step of every phase", write_text, list_comparisons)


def _make_speed_table(result: JsonObject) -> str:
    columns = ["step", "DeepSpeed", "trainable", "load s", "forward s", "backward s"]
    columns += ["optimizer s", "step s", "planned s", "tokens/s", "language positions"]
    columns += ["of them/s", "useful TFLOP/s", "hardware TFLOP/s"]
    rows: list[list[str]] = []
    for row in result["rows"]:
        step_seconds = row["step_seconds"]
        cells = [row["label"], row["ds_config"], f"{row['trainable'] / 1e6:.1f} M"]
        cells.append(f"{row['load_seconds']:.1f}")
        for section in ("forward", "backward", "optimizer"):
            cells.append(f"{statistics.median(row['seconds'][section]):.3f}")
        cells += [f"{step_seconds:.3f}", f"{row['plan']['seconds']:.3f}"]
        cells += [f"{row['tokens_per_second']:.0f}", str(row["language_positions"])]
        cells.append(f"{row['language_positions_per_second']:.1f}")
        cells.append(f"{row['model_tflop'] / step_seconds:.2f}")
        rows.append([*cells, f"{row['hardware_tflop'] / step_seconds:.2f}"])
    return make_table(columns, rows)


def _make_peak_table(result: JsonObject) -> str:
    columns = ["step", "peak", "planned", "with work areas measured"]
    columns += ["peak while loading", "planned"]
    rows: list[list[str]] = []
    for row in result["rows"]:
        peak_gb, load_gb = row["peak_bytes"] / 1e9, row["load_peak_bytes"] / 1e9
        cells = [row["label"], f"{peak_gb:.2f}"]
        for name in PLAN_NAMES:
            cells.append(_format_planned(row[name]["gpu_memory_gb"]["allocated"], peak_gb))
        has_loaded = row["language_positions"] > 0
        cells.append(f"{load_gb:.2f}" if has_loaded else "")
        planned_gb = row["plan"]["loading_peak_gb"]
        rows.append([*cells, _format_planned(planned_gb, load_gb) if has_loaded else ""])
    return make_table(columns, rows)


def _make_static_table(result: JsonObject) -> str:
    rows: list[list[str]] = []
    for row in result["rows"]:
        for kind, size_bytes in row["bytes"].items():
            planned_gb = row["plan"]["gpu_memory_gb"].get(kind, 0.0)
            figures = [f"{size_bytes / 1e9:.3f}", f"{planned_gb:.3f}"]
            rows.append([row["label"], kind.replace("_", " "), *figures])
    return make_table(["step", "kind", "held", "planned"], rows)


def _format_planned(planned: float, measured: float) -> str:
    off = f" ({planned / measured - 1:+.1%})" if measured else ""
    return f"{planned:.2f}{off}"


@quiet_main
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parse_arguments(arguments)
    prepare_engine_environment()
    if options.measure:
        _measure_as_rank(*options.measure)
        return 0
    from rectvlm.machine import package_versions

    start_seconds = time.monotonic()
    rows: list[JsonObject] = []
    left_out: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="rectvlm-bench-") as work:
        for unresolved in _list_settings(options, Path(work)):
            settings = resolve_checkpointing(unresolved)
            try:
                measured = run_measurement(settings, Path(work))
            except (torch.OutOfMemoryError, LaunchFailed) as error:
                left_out[settings.label] = str(error).splitlines()[0][:200]
                log.error("%s: left out: %s", settings.label, error)
                continue
            names = {"label": settings.label, "ds_config": settings.ds_config.name}
            rows.append(asdict(settings) | names | measured | _plan_in_new_process(settings))
        device = default_device()
        rates = run_in_new_process(measure_matrix_rate, torch.bfloat16, device)
    if not rows:
        raise UserError(
            f"Nothing could be measured ({left_out}): choose a smaller --config or --micro-batch."
        )
    config = load_config(options.config, options.overrides)
    facts = {
        "versions": package_versions(),
        "config": config.name,
        "geometry": config.generator.model,
        "rounds": options.rounds,
        "matrix_flops_per_second": statistics.median(rates),
        "left_out": left_out,
        "rows": rows,
    }
    publish_result(options.out, PROGRAM, arguments, start_seconds, facts)
    return 0


def _plan_in_new_process(settings: StepSettings) -> JsonObject:
    return run_in_new_process(plan_step, replace(settings, shards=""))


def _list_settings(options: argparse.Namespace, work: Path) -> list[StepSettings]:
    """List the measurements, and write the shards that they read."""
    overrides = tuple(options.overrides)
    if options.geometry:
        overrides = (f"generator.model={options.geometry}", *overrides)
    config = load_config(options.config, overrides)
    samples = 2 * max(options.micro_batch) * max(options.processes)
    write_long_report_shards(config, work / "shards", samples)
    settings: list[StepSettings] = []
    for phase in options.phases:
        variants = options.variants if phase.startswith("3") else [""]
        sizes = (options.micro_batch, options.processes, options.checkpointing)
        for variant, (micro_batch, processes, checkpointing) in itertools.product(
            variants, itertools.product(*sizes)
        ):
            settings.append(
                StepSettings(
                    size=options.config,
                    overrides=overrides,
                    phase=phase,
                    variant=variant,
                    micro_batch=micro_batch,
                    processes=processes,
                    checkpointing=checkpointing,
                    rounds=options.rounds,
                    shards=str(work / "shards"),
                )
            )
    return settings


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("engine_step", "Steps of every phase, beside their plan.")
    add_config_options(parser, "tiny")
    parser.add_argument(
        "--geometry", metavar="MODEL", help="language model, instead of the configuration's"
    )
    parser.add_argument("--phases", nargs="+", choices=PHASE_NAMES, default=["3"], metavar="PHASE")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=["zero3"], help="of phase 3"
    )
    parser.add_argument("--micro-batch", type=positive_int, nargs="+", default=[1])
    parser.add_argument("--processes", type=positive_int, nargs="+", default=[1])
    parser.add_argument("--checkpointing", nargs="+", choices=CHECKPOINTING, default=["configured"])
    parser.add_argument(
        "--rounds", type=positive_int, default=3, help="steps that count (default 3)"
    )
    parser.add_argument(
        "--measure", nargs=2, type=Path, metavar=("SETTINGS", "RESULT"), help=argparse.SUPPRESS
    )
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
