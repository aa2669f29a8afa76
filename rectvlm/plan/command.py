"""The command `rectvlm plan`."""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence

import torch
from rich.console import Console

from rectvlm.cli_options import options_from_namespace
from rectvlm.config import Config, load_config
from rectvlm.plan.hardware import HardwareRates
from rectvlm.plan.memory_savings import MemorySaving, find_memory_savings
from rectvlm.plan.options import PlanOptions
from rectvlm.plan.plan_tables import print_memory_savings, print_plan, print_scaling
from rectvlm.plan.planner import ResourcePlan, ResourcePlanner
from rectvlm.train.dry_run.kernel_workspace import KernelWorkspaceMeter
from rectvlm.train.phases import STAGES
from rectvlm.types import UserError


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
    if not torch.cuda.is_available():
        # DeepSpeed warns on stdout, where the JSON goes, when it finds the CPU by itself.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")

    def load_with_overrides(overrides: Sequence[str]) -> Config:
        return load_config(options.config, [*options.overrides, *overrides])

    planner = ResourcePlanner(
        load_with_overrides([]),
        phase=options.phase if options.stage is None else STAGES[options.stage].number,
        ds_configs=options.ds_configs,
        hardware=hardware,
        workspace_meter=_make_workspace_meter(options.work_areas),
        stage=options.stage,
    )
    plans: list[ResourcePlan] = []
    for gpus in gpu_counts:
        plans.append(planner.make_plan(gpus, options.gpu_memory, options.samples))
    plan_too_large = next((plan for plan in plans if not plan.fits), None)
    savings: list[MemorySaving] = []
    if plan_too_large is not None:
        gpus_per_node = None if options.nodes is None else hardware.gpus_per_node
        savings = find_memory_savings(
            planner, plan_too_large.gpus, options.gpu_memory, load_with_overrides, gpus_per_node
        )

    if options.as_json:
        _write_json(plans, plan_too_large, savings)
        return
    console = Console()
    print_plan(plans[0], console)
    if len(plans) > 1:
        print_scaling(plans, console)
    if plan_too_large is not None and savings:
        print_memory_savings(plan_too_large, savings, console)


def _write_json(
    plans: Sequence[ResourcePlan],
    plan_too_large: ResourcePlan | None,
    savings: Sequence[MemorySaving],
) -> None:
    """Write one plan as an object, or several as a list; savings stand in the one they are for."""
    trees = []
    for plan in plans:
        plan_savings = savings if plan is plan_too_large else []
        trees.append(plan.to_json() | {"knobs": [vars(saving) for saving in plan_savings]})
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


def _make_workspace_meter(device: str | None) -> KernelWorkspaceMeter | None:
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
