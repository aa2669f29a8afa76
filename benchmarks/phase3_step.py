"""A complete step of phase 3 at full size, through the engine, beside its plan.

    python -m benchmarks.phase3_step [--config large] [--ds-configs phase3 phase3_zero2]
        [--micro-batch 1] [--rounds 3]

It shows seconds, tokens and memory by kind. Encoder, classifier, localizer and report generator
train on a phantom of the configuration's grid, with the engine, the losses and the optimizer of
`launch/phase3.py`. The language model has its true geometry and random weights, which are drawn,
packed to 4 bits and sharded module by module, so that it is never complete. Its tokenizer is the
bundled tiny one; prompts are random embeddings as wide as those of the configured text encoder.
Reports have the greatest length that the configuration allows.

One process runs on one device. Each measurement has a process of its own, since a process holds one
engine in its life, and so has its plan, since Transformers builds another model where ZeRO-3 is on.
Two plans stand beside each measurement: one of tensors alone, and one with the workspace of kernels
measured (`rectvlm plan --work-areas`). Results go to
benchmarks/results/phase3-step-MACHINE-DATE.json and .md.
"""

import argparse
import contextlib
import io
import itertools
import logging
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.publishing import (
    CHECKOUT,
    add_config_options,
    make_page_header,
    make_parser,
    make_table,
    positive_int,
    prepare_engine_environment,
    publish_result,
    quiet_main,
)
from benchmarks.report_step import STEP_SECTIONS, build_language_model
from benchmarks.timing import SectionTimer, default_device, run_in_new_process, synchronized_time
from rectvlm.config import Config, load_config
from rectvlm.labels import N_FINDINGS, N_LESIONS
from rectvlm.train.engine.peak_memory import peak_memory_bytes, reset_peak_memory
from rectvlm.types import Batch, JsonObject, UserError

log = logging.getLogger(__name__)

PHASE = 3
WARMUP_STEPS = 2
"""The first step makes the optimizer's state; the second records ZeRO-3's order of gathers."""
PLAN_NAMES = ("plan", "plan_with_areas")
"""Plans of tensors alone, and with the workspace of kernels measured."""


def measure_step(size: str, overrides: Sequence[str], ds_config: Path, rounds: int) -> JsonObject:
    """Build the model, warm up, and time the other steps."""
    from rectvlm import pretrained
    from rectvlm.models import RectVLM
    from rectvlm.models.prompt_embeddings import PromptEmbeddings
    from rectvlm.train.budget import PhaseBudget
    from rectvlm.train.engine.engine import Engine
    from rectvlm.train.objectives import combine_losses, compute_losses
    from rectvlm.train.optimizer import build_optimizer, freeze_all_but
    from rectvlm.train.phases import PHASES

    config, phase = load_config(size, overrides), PHASES[PHASE]
    settings = phase.get_settings(config)
    budget = PhaseBudget.plan(settings, sample_count=settings.micro_batch, world_size=1)
    with (
        tempfile.TemporaryDirectory(prefix="rectvlm-bench-") as folder,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        engine = Engine(ds_config, budget.step_batch, config.train.gradient_clipping, Path(folder))
    batch = make_long_batch(config, settings.micro_batch).to(engine.device)

    reset_peak_memory()
    start_seconds = synchronized_time(engine.device)
    language_model, _ = build_language_model(config, None, engine.device, engine.shard_module)
    load_seconds = synchronized_time(engine.device) - start_seconds
    load_peak_bytes = peak_memory_bytes()

    text_width = pretrained.read_model_config(config.text.model).hidden_size
    prompt_counts = (N_FINDINGS, N_FINDINGS, N_LESIONS)
    prompts = PromptEmbeddings(*(torch.randn(count, text_width) for count in prompt_counts))
    model = RectVLM(config, phase.parts, prompts, language_model)
    freeze_all_but(model, settings.lr)
    trainable = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            trainable += getattr(parameter, "ds_numel", parameter.numel())
    engine.prepare(model, build_optimizer(model, config.train, settings, budget))

    reset_peak_memory()
    timer = SectionTimer(STEP_SECTIONS, engine.device)
    losses: list[dict[str, float]] = []
    tokens = language_positions = 0
    for turn in range(WARMUP_STEPS + rounds):
        if turn == WARMUP_STEPS:
            reset_peak_memory()
            timer.drop_steps()
        timer.start_step()
        outputs = engine.model(batch)
        localization_weights = config.train.localization_loss_weights
        task_losses = compute_losses(outputs, batch, phase.tasks, localization_weights)
        loss = combine_losses(task_losses, config.train.loss_weights)
        timer.end_section("forward")
        engine.backward(loss)
        timer.end_section("backward")
        engine.step()
        timer.end_section("optimizer")
        losses.append({task: part.value.item() for task, part in task_losses.items()})
        tokens = outputs.token_count
        language_positions = outputs.report_loss.position_count
        del outputs, task_losses, loss
    peak_bytes = peak_memory_bytes()
    static_bytes = engine.describe_ranks().ranks[0].bytes
    engine.close()
    step_seconds = timer.step_seconds
    return {
        "load_seconds": load_seconds,
        "load_peak_bytes": load_peak_bytes,
        "trainable": trainable,
        "peak_bytes": peak_bytes,
        "bytes": static_bytes,
        "ds_config": ds_config.name,
        "micro_batch": settings.micro_batch,
        "seconds": timer.seconds,
        "step_seconds": step_seconds,
        "tokens_per_second": tokens / step_seconds,
        "language_positions": language_positions,
        "language_positions_per_second": language_positions / step_seconds,
        "losses": losses,
    }


def plan_step(size: str, overrides: Sequence[str], ds_config: Path) -> JsonObject:
    """Plan a step, without and with measured workspace, and count its TFLOP."""
    from rectvlm.plan.planner import ResourcePlanner
    from rectvlm.train.dry_run.kernel_workspace import KernelWorkspaceMeter

    config = load_config(size, overrides)
    plans: JsonObject = {}
    meters = (None, KernelWorkspaceMeter(default_device()))
    for name, meter in zip(PLAN_NAMES, meters, strict=True):
        planner = ResourcePlanner(config, PHASE, ds_config, workspace_meter=meter)
        plan = planner.make_plan(1, math.inf)
        plans[name] = {
            "gpu_memory_gb": plan.gpu_memory_gb,
            "loading_peak_gb": plan.loading_peak_gb - plan.gpu_memory_gb["context"],
            "seconds": plan.time.total,
            "tokens": planner.dry_run(planner.settings.micro_batch).positions,
        }
        plans["model_tflop"] = plan.flops_per_step.model
        plans["hardware_tflop"] = plan.flops_per_step.hardware
    return plans


def make_long_batch(config: Config, micro_batch: int) -> Batch:
    """Make a micro-batch of copies of a phantom, with the longest report."""
    from data_pipeline.cases import case_to_sample
    from data_pipeline.demo_cases import list_demo_cases
    from rectvlm.data.dataset import collate_samples

    (case,) = list_demo_cases(1, 0, None)
    sample = case_to_sample(case, config.data.grid, config.data.spacing)
    batch = collate_samples([sample] * micro_batch)
    report = "The lungs are clear. " * config.generator.max_report_tokens
    return replace(batch, reports=[report] * micro_batch)


def to_markdown(result: JsonObject) -> str:
    """Write the result as a page: speed, then memory beside the plan."""
    kind = "resident, the process included, unlike plans"
    if result["machine"]["gpus"]:
        kind = "as torch's allocator saw it"
    return (
        make_page_header("A complete step of phase 3", "python -m benchmarks.phase3_step", result)
        + f"Configuration {result['config']}, language model {result['geometry']} with random "
        f"weights; one process, median of {result['rounds']} steps after two. Tokens are patches "
        f"and language positions.\n\n{_make_speed_table(result)}"
        + f"\nMemory in GB, {kind}; planned as allocated, in brackets by how much the plan is "
        f"off.\n\n{_make_peak_table(result)}"
        + f"\nHeld between steps, in GB.\n\n{_make_static_table(result)}"
    )


def _make_speed_table(result: JsonObject) -> str:
    columns = ["DeepSpeed", "micro-batch", "trainable", "load s", "forward s", "backward s"]
    columns += ["optimizer s", "step s", "planned s", "tokens/s", "language positions"]
    columns += ["of them/s", "useful TFLOP/s", "hardware TFLOP/s"]
    rows: list[list[str]] = []
    for row in result["rows"]:
        step_seconds = row["step_seconds"]
        cells = [row["ds_config"], str(row["micro_batch"]), f"{row['trainable'] / 1e6:.1f} M"]
        cells.append(f"{row['load_seconds']:.1f}")
        for section in STEP_SECTIONS:
            cells.append(f"{statistics.median(row['seconds'][section]):.3f}")
        cells += [f"{step_seconds:.3f}", f"{row['plan']['seconds']:.3f}"]
        cells += [f"{row['tokens_per_second']:.0f}", str(row["language_positions"])]
        cells.append(f"{row['language_positions_per_second']:.1f}")
        cells.append(f"{row['model_tflop'] / step_seconds:.2f}")
        rows.append([*cells, f"{row['hardware_tflop'] / step_seconds:.2f}"])
    return make_table(columns, rows)


def _make_peak_table(result: JsonObject) -> str:
    columns = ["DeepSpeed", "micro-batch", "peak", "planned", "with work areas measured"]
    columns += ["peak while loading", "planned"]
    rows: list[list[str]] = []
    for row in result["rows"]:
        peak_gb, load_gb = row["peak_bytes"] / 1e9, row["load_peak_bytes"] / 1e9
        cells = [row["ds_config"], str(row["micro_batch"]), f"{peak_gb:.2f}"]
        for name in PLAN_NAMES:
            cells.append(_format_planned(row[name]["gpu_memory_gb"]["allocated"], peak_gb))
        cells.append(f"{load_gb:.2f}")
        rows.append([*cells, _format_planned(row["plan"]["loading_peak_gb"], load_gb)])
    return make_table(columns, rows)


def _make_static_table(result: JsonObject) -> str:
    rows: list[list[str]] = []
    for row in result["rows"]:
        for kind, size_bytes in row["bytes"].items():
            planned_gb = row["plan"]["gpu_memory_gb"].get(kind, 0.0)
            figures = [f"{size_bytes / 1e9:.3f}", f"{planned_gb:.3f}"]
            rows.append([row["ds_config"], kind.replace("_", " "), *figures])
    return make_table(["DeepSpeed", "kind", "held", "planned"], rows)


def _format_planned(planned: float, measured: float) -> str:
    return f"{planned:.2f} ({planned / measured - 1:+.1%})"


@quiet_main
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parse_arguments(arguments)
    prepare_engine_environment()
    from rectvlm.machine import package_versions

    start_seconds = time.monotonic()
    rows: list[JsonObject] = []
    geometry = [f"generator.model={options.geometry}"] if options.geometry else []
    common_overrides = [*geometry, *options.overrides]
    config = load_config(options.config, [*geometry, *options.overrides])
    for name, micro_batch in itertools.product(options.ds_configs, options.micro_batch):
        overrides = list(common_overrides)
        for key in ("micro_batch", "global_batch"):
            overrides.append(f"train.phases.phase{PHASE}.{key}={micro_batch}")
        ds_config = CHECKOUT / "ds_configs" / f"{name}.json"
        step_settings = (options.config, overrides, ds_config)
        try:
            measured = run_in_new_process(measure_step, *step_settings, options.rounds)
        except torch.OutOfMemoryError:
            log.error(
                "%s, a micro-batch of %d: out of memory, left out", ds_config.name, micro_batch
            )
            continue
        rows.append(measured | run_in_new_process(plan_step, *step_settings))
    if not rows:
        raise UserError(
            "Nothing fitted into the memory of the GPU: choose a smaller --config or --micro-batch."
        )
    facts = {
        "versions": package_versions(),
        "config": config.name,
        "geometry": config.generator.model,
        "rounds": options.rounds,
        "rows": rows,
    }
    publish_result(options.out, "phase3-step", start_seconds, facts, to_markdown)
    return 0


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("phase3_step", "A complete step of phase 3, beside its plan.")
    add_config_options(parser, "tiny")
    parser.add_argument(
        "--geometry", metavar="MODEL", help="language model, instead of the configuration's"
    )
    parser.add_argument(
        "--ds-configs", nargs="+", default=["phase3"], metavar="NAME", help="in ds_configs/"
    )
    parser.add_argument("--micro-batch", type=positive_int, nargs="+", default=[1])
    parser.add_argument(
        "--rounds", type=positive_int, default=3, help="steps that count (default 3)"
    )
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
