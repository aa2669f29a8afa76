"""The command `rectvlm plan`."""

import argparse
import itertools
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from rectvlm.cli_options import options_from_namespace
from rectvlm.config import Config, load_config
from rectvlm.plan.auto_settings import CHECKPOINTED_PARTS, SettingsSearch, list_auto_parts
from rectvlm.plan.hardware import HardwareRates, describe_assumed_rates
from rectvlm.plan.options import DEFAULT_GPUS, PlanOptions
from rectvlm.train.budget import split_step
from rectvlm.train.engine.ds_config import find_ds_config, read_ds_config
from rectvlm.train.phases import PHASES, STAGES, Phase
from rectvlm.types import UserError

if TYPE_CHECKING:
    from rectvlm.plan.memory_savings import MemorySaving
    from rectvlm.plan.planner import ResourcePlan, ResourcePlanner
    from rectvlm.plan.speedups import Speedup
    from rectvlm.train.dry_run.kernel_workspace import KernelWorkspaceMeter

log = logging.getLogger(__name__)


@dataclass
class _PhasePlans:
    """Plans of a phase."""

    plans: list["ResourcePlan"]
    """Plan for each number of GPUs."""
    planner: "ResourcePlanner"
    """Planner of the first plan's configuration, without `auto`."""


def run(namespace: argparse.Namespace) -> None:
    """Plan, and print the plan.

    Raises:
        UserError: an option without sense, an unknown configuration, or a model whose geometry is
            out of reach.
    """
    options = options_from_namespace(PlanOptions, namespace)
    hardware = options_from_namespace(HardwareRates, namespace)
    _check_numbers(options, hardware)
    gpu_counts = _parse_gpu_counts(options, hardware.gpus_per_node)

    def load_with_overrides(overrides: Sequence[str]) -> Config:
        return load_config(options.config, [*options.overrides, *overrides])

    phases = list(PHASES.values()) if options.all_phases else [PHASES[options.phase]]
    if options.stage is not None:
        phases = [STAGES[options.stage]]
    config = load_with_overrides([])
    # Read here too: a wrong path need not wait for torch and transformers to be imported.
    for phase in phases:
        ds_config = find_ds_config(phase.number, options.ds_configs)
        step_batch = split_step(phase.get_settings(config), gpu_counts[0])
        read_ds_config(ds_config, step_batch, config.train.gradient_clipping)

    log.info("loading torch and transformers")
    _choose_deepspeed_device()
    from rectvlm.plan.memory_savings import find_memory_savings
    from rectvlm.plan.planner import ResourcePlanner
    from rectvlm.plan.speedups import find_speedups

    workspace_meter = _make_workspace_meter(options.work_areas)

    def make_planner(phase: Phase, config: Config) -> ResourcePlanner:
        return ResourcePlanner(
            config, phase.number, options.ds_configs, hardware, workspace_meter, phase.stage
        )

    plans_by_phase = [
        _plan_phase(phase, config, gpu_counts, options, partial(make_planner, phase))
        for phase in phases
    ]
    assumed = describe_assumed_rates(hardware, max(gpu_counts), options.gpu_memory)
    if options.all_phases:
        _show_all_phases([phase_plans.plans for phase_plans in plans_by_phase], options, assumed)
        return

    (phase_plans,) = plans_by_phase
    plans, planner = phase_plans.plans, phase_plans.planner
    plan_too_large = next((plan for plan in plans if not plan.fits), None)
    savings: list[MemorySaving] = []
    if plan_too_large is not None:
        log.info("planning changes that save memory")
        gpus_per_node = None if options.nodes is None else hardware.gpus_per_node
        chosen = _list_chosen_settings(planner)
        savings = find_memory_savings(
            planner,
            plan_too_large.gpus,
            options.gpu_memory,
            lambda changes: load_with_overrides([*chosen, *changes]),
            gpus_per_node,
        )
    speedups: list[Speedup] = []
    if plans[0].fits:
        log.info("planning changes that save time")
        speedups = find_speedups(planner, plans[0], partial(make_planner, phases[0]))

    if options.as_json:
        if assumed is not None:
            log.warning("%s", assumed)
        _write_json(plans, plan_too_large, savings, speedups)
        return
    _print_tables(plans, plan_too_large, savings, speedups)


def _plan_phase(
    phase: Phase,
    config: Config,
    gpu_counts: Sequence[int],
    options: PlanOptions,
    make_planner: "Callable[[Config], ResourcePlanner]",
) -> _PhasePlans:
    """Plan a phase for each number of GPUs, with the fastest settings that fit for `auto`."""
    log.info("planning %s of %s: a micro-batch without values", phase.key, config.name)
    if not list_auto_parts(phase, config):
        planner = make_planner(config)
        plans = [planner.make_plan(n, options.gpu_memory, options.samples) for n in gpu_counts]
        return _PhasePlans(plans, planner)
    search = SettingsSearch(config, phase, make_planner)
    choices = [search.choose(n, options.gpu_memory, options.samples) for n in gpu_counts]
    return _PhasePlans([choice.plan for choice in choices], choices[0].planner)


def _list_chosen_settings(planner: "ResourcePlanner") -> list[str]:
    """List the settings that `auto` may have decided, as overrides."""
    overrides = [f"train.phases.{planner.phase.key}.micro_batch={planner.settings.micro_batch}"]
    for part in CHECKPOINTED_PARTS:
        is_recomputed = bool(getattr(planner.config, part).activation_checkpointing)
        overrides.append(f"{part}.activation_checkpointing={str(is_recomputed).lower()}")
    return overrides


def _show_all_phases(
    plans_by_phase: Sequence[Sequence["ResourcePlan"]], options: PlanOptions, assumed: str | None
) -> None:
    from rectvlm.plan.plan_tables import print_all_phases
    from rectvlm.terminal_tables import make_stdout_console

    if options.as_json:
        if assumed is not None:
            log.warning("%s", assumed)
        plans = list(itertools.chain.from_iterable(plans_by_phase))
        _write_json(plans, None, [], [])
        return
    print_all_phases(plans_by_phase, make_stdout_console())


def _choose_deepspeed_device() -> None:
    """Tell DeepSpeed of a machine without a GPU: it warns on stdout, where the JSON goes."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _print_tables(
    plans: Sequence["ResourcePlan"],
    plan_too_large: "ResourcePlan | None",
    savings: Sequence["MemorySaving"],
    speedups: Sequence["Speedup"],
) -> None:
    from rectvlm.plan.plan_tables import (
        print_memory_savings,
        print_plan,
        print_scaling,
        print_speedups,
    )
    from rectvlm.terminal_tables import make_stdout_console

    console = make_stdout_console()
    print_plan(plans[0], console)
    if len(plans) > 1:
        print_scaling(plans, console)
    if speedups:
        print_speedups(plans[0], speedups, console)
    if plan_too_large is not None and savings:
        print_memory_savings(plan_too_large, savings, console)


def _write_json(
    plans: Sequence["ResourcePlan"],
    plan_too_large: "ResourcePlan | None",
    savings: Sequence["MemorySaving"],
    speedups: Sequence["Speedup"],
) -> None:
    """Write one plan as an object, or several as a list.

    Savings of memory stand in the plan that they are for, those of time in the first.
    """
    trees = []
    for plan in plans:
        plan_savings = savings if plan is plan_too_large else []
        plan_speedups = speedups if plan is plans[0] else []
        changes = {
            "knobs": [vars(saving) for saving in plan_savings],
            "speedups": [vars(speedup) for speedup in plan_speedups],
        }
        trees.append(plan.to_json() | changes)
    document = trees if len(trees) > 1 else trees[0]
    sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")


def _check_numbers(options: PlanOptions, hardware: HardwareRates) -> None:
    numbers = {
        "gpu-memory": options.gpu_memory,
        "tflops": hardware.tflops,
        "bandwidth": hardware.bandwidth,
        "intra": hardware.intra,
        "inter": hardware.inter,
        "samples": options.samples,
        "gpus-per-node": hardware.gpus_per_node,
    }
    for name, number in numbers.items():
        if not (number > 0 and math.isfinite(number) and math.isfinite(1 / number)):
            raise UserError(f"--{name} must be a number greater than 0, not {number}.")
    if not 0 < hardware.efficiency <= 1:
        raise UserError(f"--efficiency is a share above 0 and up to 1, not {hardware.efficiency}.")


def _make_workspace_meter(device: str | None) -> "KernelWorkspaceMeter | None":
    import torch

    from rectvlm.train.dry_run.kernel_workspace import KernelWorkspaceMeter

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--work-areas cuda measures kernels on a GPU and torch finds none: leave it out, or "
            "say cpu."
        )
    return None if device is None else KernelWorkspaceMeter(device)


def _parse_gpu_counts(options: PlanOptions, gpus_per_node: int) -> list[int]:
    """Read the numbers of GPUs from `--gpus` or `--nodes`."""
    if options.nodes is not None:
        if options.nodes < 1:
            raise UserError(f"--nodes must be at least 1, not {options.nodes}.")
        return [options.nodes * gpus_per_node]
    if options.gpus is None:
        return [DEFAULT_GPUS]
    try:
        counts = [int(number) for number in options.gpus.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise UserError(
            "--gpus takes a number of GPUs of at least 1, or several with commas, not "
            f"{options.gpus!r}."
        )
    return counts
