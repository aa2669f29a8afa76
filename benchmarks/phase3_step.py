"""A whole step of phase 3 at full size, through the engine, beside its plan: seconds, tokens, memory by kind.

    python -m benchmarks.phase3_step [--config large] [--ds-configs phase3 phase3_zero2] [--micro-batch 1] [--rounds 3]

Encoder, classifier, localizer and report generator train on a phantom of the configuration's grid, with the engine,
the losses and the optimizer of `launch/phase3.py`. The language model has its true geometry and random weights, which
are drawn, packed to 4 bits and settled module by module, so that it is never whole. Its tokenizer is the bundled tiny
one; prompts are random embeddings as wide as those of the configured text encoder. Reports have the greatest length
that the configuration allows.

One process on one device. Each measurement has a process of its own, since a process holds one engine in its life, and
so has its plan, since Transformers builds another model where ZeRO-3 is on. Two plans stand beside each measurement:
one of tensors alone, and one with the work areas of the kernels measured (`rectvlm plan --work-areas`). Results go to
benchmarks/results/phase3-step-MACHINE-DATE.json and .md.
"""

import argparse
import contextlib
import io
import logging
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.publishing import (
    CHECKOUT,
    RESULTS_FOLDER,
    make_page_header,
    positive_int,
    publish_result,
    quiet_main,
)
from benchmarks.report_step import build_language_model
from rectvlm.config import Config, load_config
from rectvlm.labels import N_FINDINGS, N_LESIONS
from rectvlm.train.engine.peak_memory import peak_memory_bytes, reset_peak_memory
from rectvlm.types import Batch, UserError

log = logging.getLogger(__name__)

PHASE = 3
TIMED_SECTIONS = ("forward", "backward", "optimizer")
PLAN_NAMES = ("plan", "plan_with_areas")


def measure_step(
    size: str, overrides: Sequence[str], ds_config: Path, rounds: int
) -> dict[str, Any]:
    """Build, warm up with two steps, and time the others.

    The first step makes the optimizer's state; the second records ZeRO-3's order of gathers.
    """
    from rectvlm import pretrained
    from rectvlm.models import RectVLM
    from rectvlm.models.prompt_embeddings import PromptEmbeddings
    from rectvlm.train.engine.engine import Engine
    from rectvlm.train.objectives import combine_losses, compute_losses
    from rectvlm.train.optimizer import build_optimizer, freeze_all_but
    from rectvlm.train.phases import PHASES

    config, phase = load_config(size, overrides), PHASES[PHASE]
    settings = phase.get_settings(config)
    with (
        tempfile.TemporaryDirectory(prefix="rectvlm-bench-") as folder,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        engine = Engine(ds_config, settings, config.train.gradient_clipping, Path(folder))
    batch = make_long_batch(config, settings.micro_batch).to(engine.device)
    reset_peak_memory()
    begin = _synchronized_time(engine.device)
    language, _ = build_language_model(config, None, engine.device, engine.shard_module)
    row: dict[str, Any] = {
        "load_seconds": _synchronized_time(engine.device) - begin,
        "load_peak_bytes": peak_memory_bytes(),
    }
    width = pretrained.read_model_config(config.text.model).hidden_size
    prompts = PromptEmbeddings(
        *(torch.randn(n, width) for n in (N_FINDINGS, N_FINDINGS, N_LESIONS))
    )
    model = RectVLM(config, phase.parts, prompts, language)
    freeze_all_but(model, settings.lr)
    row["trainable"] = sum(
        getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad
    )
    engine.prepare(model, build_optimizer(model, config.train, settings))
    reset_peak_memory()
    seconds: dict[str, list[float]] = {part: [] for part in TIMED_SECTIONS}
    found_losses: list[dict[str, float]] = []
    tokens = 0
    for turn in range(rounds + 2):
        if turn == 2:
            reset_peak_memory()
        times = [_synchronized_time(engine.device)]
        outputs = engine.model(batch)
        found = compute_losses(outputs, batch, phase.tasks, config.train.localization_loss_weights)
        loss = combine_losses(found, config.train.loss_weights)
        times.append(_synchronized_time(engine.device))
        engine.backward(loss)
        times.append(_synchronized_time(engine.device))
        engine.step()
        times.append(_synchronized_time(engine.device))
        found_losses.append({task: part.value.item() for task, part in found.items()})
        tokens, positions = outputs.token_count, outputs.report_loss.position_count
        del outputs, found, loss
        if turn >= 2:
            for part, first, last in zip(TIMED_SECTIONS, times, times[1:], strict=False):
                seconds[part].append(last - first)
    row |= {
        "peak_bytes": peak_memory_bytes(),
        "bytes": engine.describe_ranks().ranks[0].bytes,
    }
    engine.close()
    step = sum(statistics.median(values) for values in seconds.values())
    return row | {
        "ds_config": ds_config.name,
        "micro_batch": settings.micro_batch,
        "seconds": seconds,
        "step_seconds": step,
        "tokens_per_second": tokens / step,
        "language_positions": positions,
        "language_positions_per_second": positions / step,
        "losses": found_losses,
    }


def plan_step(size: str, overrides: Sequence[str], ds_config: Path) -> dict[str, Any]:
    """What is planned, without and with measured work areas, and the floating-point operations of a step."""
    from rectvlm.plan.planner import ResourcePlanner
    from rectvlm.train.dry_run.kernel_workspace import KernelWorkspaceMeter

    config = load_config(size, overrides)
    found: dict[str, Any] = {}
    for name, areas in zip(
        PLAN_NAMES,
        (None, KernelWorkspaceMeter("cuda" if torch.cuda.is_available() else "cpu")),
        strict=True,
    ):
        planner = ResourcePlanner(config, PHASE, ds_config, workspace_meter=areas)
        plan = planner.make_plan(1, math.inf)
        found[name] = {
            "gpu_memory_gb": plan.gpu_memory_gb,
            "loading_peak_gb": plan.loading_peak_gb - plan.gpu_memory_gb["context"],
            "seconds": plan.time.total,
            "tokens": planner.dry_run.positions,
        }
        found |= {
            "model_tflop": plan.flops_per_step.model,
            "hardware_tflop": plan.flops_per_step.hardware,
        }
    return found


def make_long_batch(config: Config, micro_batch: int) -> Batch:
    """A phantom on the configuration's grid, as often as a micro-batch holds, with the longest report."""
    from data_pipeline.cases import case_to_sample
    from data_pipeline.demo_cases import list_demo_cases
    from rectvlm.data.dataset import collate_samples

    (case,) = list_demo_cases(1, 0, None)
    sample = case_to_sample(case, config.data.grid, config.data.spacing)
    batch = collate_samples([sample] * micro_batch)
    return replace(
        batch, reports=["The lungs are clear. " * config.generator.max_report_tokens] * micro_batch
    )


def _synchronized_time(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _run_in_new_process(task: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """The result of a task in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(task, *arguments).result()


def to_markdown(result: dict[str, Any]) -> str:
    """The result as a page: speed, then memory beside the plan."""
    lines = [
        make_page_header("A whole step of phase 3", "python -m benchmarks.phase3_step", result),
        f"Configuration {result['config']}, language model {result['geometry']} with random weights"
        f"; one process, median of {result['rounds']} steps after two. Tokens are patches and language positions.\n\n"
        "| DeepSpeed | micro-batch | trainable | load s | forward s | backward s | optimizer s | step s | planned s "
        "| tokens/s | language positions | of them/s | useful TFLOP/s | hardware TFLOP/s |\n"
        + "|---" * 14
        + "|\n",
    ]
    for row in result["rows"]:
        parts = " | ".join(
            f"{statistics.median(row['seconds'][part]):.3f}" for part in TIMED_SECTIONS
        )
        lines.append(
            f"| {row['ds_config']} | {row['micro_batch']} | {row['trainable'] / 1e6:.1f} M | {row['load_seconds']:.1f} "
            f"| {parts} | {row['step_seconds']:.3f} | {row['plan']['seconds']:.3f} | {row['tokens_per_second']:.0f} "
            f"| {row['language_positions']} | {row['language_positions_per_second']:.1f} "
            f"| {row['model_tflop'] / row['step_seconds']:.2f} | {row['hardware_tflop'] / row['step_seconds']:.2f} |\n"
        )
    kind = (
        "as torch's allocator saw it"
        if result["machine"]["gpus"]
        else "resident, the process included, unlike plans"
    )
    lines.append(
        f"\nMemory in GB, {kind}; planned as allocated, in brackets by how much the plan is off.\n\n"
        "| DeepSpeed | micro-batch | peak | planned | with work areas measured | peak while loading | planned |\n"
        + "|---" * 7
        + "|\n"
    )
    for row in result["rows"]:
        peak, load = row["peak_bytes"] / 1e9, row["load_peak_bytes"] / 1e9
        planned = " | ".join(
            _format_planned(row[name]["gpu_memory_gb"]["allocated"], peak) for name in PLAN_NAMES
        )
        lines.append(
            f"| {row['ds_config']} | {row['micro_batch']} | {peak:.2f} | {planned} | {load:.2f} "
            f"| {_format_planned(row['plan']['loading_peak_gb'], load)} |\n"
        )
    lines.append(
        "\nHeld between steps, in GB.\n\n| DeepSpeed | kind | held | planned |\n|---|---|---|---|\n"
    )
    for row in result["rows"]:
        for name, size in row["bytes"].items():
            planned = row["plan"]["gpu_memory_gb"].get(name, 0.0)
            lines.append(
                f"| {row['ds_config']} | {name.replace('_', ' ')} | {size / 1e9:.3f} | {planned:.3f} |\n"
            )
    return "".join(lines)


def _format_planned(planned: float, found: float) -> str:
    return f"{planned:.2f} ({planned / found - 1:+.1%})"


@quiet_main
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    options = _parse_arguments(arguments)
    os.environ.setdefault("RECTVLM_TRACKERS", "none")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from rectvlm.machine import package_versions

    begin = time.monotonic()
    rows = []
    geometry = [f"generator.model={options.geometry}"] if options.geometry else []
    config = load_config(options.config, [*geometry, *options.overrides])
    for name in options.ds_configs:
        for micro_batch in options.micro_batch:
            overrides = [
                *geometry,
                *options.overrides,
                f"train.phases.phase{PHASE}.micro_batch={micro_batch}",
            ]
            overrides.append(f"train.phases.phase{PHASE}.accumulation=1")
            ds_config = CHECKOUT / "ds_configs" / f"{name}.json"
            chosen = (options.config, overrides, ds_config)
            try:
                measured = _run_in_new_process(measure_step, *chosen, options.rounds)
            except torch.OutOfMemoryError:
                log.error(
                    "%s, a micro-batch of %d: out of memory, left out", ds_config.name, micro_batch
                )
                continue
            rows.append(measured | _run_in_new_process(plan_step, *chosen))
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
    publish_result(options.out, "phase3-step", begin, facts, to_markdown)
    return 0


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.phase3_step",
        description="A whole step of phase 3, beside its plan.",
    )
    default = "large" if torch.cuda.is_available() else "tiny"
    parser.add_argument("--config", default=default, help="default: large on a GPU, else tiny")
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
    parser.add_argument("--out", type=Path, default=RESULTS_FOLDER, metavar="DIR")
    parser.add_argument(
        "overrides", nargs="*", metavar="part.field=value", help="changes of the configuration"
    )
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
