"""The command `rectvlm plan`."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from rectvlm.config import Config, load_config
from rectvlm.plan.plan_tables import print_memory_savings, print_plan, print_scaling
from rectvlm.plan.memory_savings import find_memory_savings
from rectvlm.plan.planner import ResourcePlan, ResourcePlanner
from rectvlm.plan.step_time import HardwareRates
from rectvlm.train.dry_run.kernel_workspace import KernelWorkspaceMeter
from rectvlm.train.phases import STAGES
from rectvlm.types import UserError

CHECKOUT = Path(__file__).resolve().parents[2]


def run(options: argparse.Namespace) -> None:
    """Plan and show.

    Raises:
        UserError: an option without sense, an unknown configuration, or a model whose geometry is out of reach.
    """
    for name in ("gpu_memory", "tflops", "bandwidth", "intra", "inter", "samples", "gpus_per_node"):
        value = getattr(options, name)
        if not (value > 0 and math.isfinite(value) and math.isfinite(1 / value)):
            raise UserError(
                f"--{name.replace('_', '-')} must be a number greater than 0, not {value}."
            )
    gpus = _parse_gpu_counts(options.gpus, options.nodes, options.gpus_per_node)
    if not 0 < options.efficiency <= 1:
        raise UserError(f"--efficiency is a share above 0 and up to 1, not {options.efficiency}.")
    hardware = HardwareRates(
        tflops=options.tflops,
        efficiency=options.efficiency,
        bandwidth=options.bandwidth,
        gpus_per_node=options.gpus_per_node,
        intra=options.intra,
        inter=options.inter,
    )

    def with_more(more: Sequence[str]) -> Config:
        return load_config(options.config, [*options.overrides, *more])

    ds_configs = options.ds_configs or CHECKOUT / "ds_configs"
    areas = _make_workspace_meter(options.work_areas)
    phase = options.phase if options.stage is None else STAGES[options.stage].number
    planner = ResourcePlanner(with_more([]), phase, ds_configs, hardware, areas, options.stage)
    plans: list[ResourcePlan] = [
        planner.make_plan(n, options.gpu_memory, options.samples) for n in gpus
    ]
    short = next((plan for plan in plans if not plan.fits), None)
    per_node = None if options.nodes is None else options.gpus_per_node
    found = (
        []
        if short is None
        else find_memory_savings(planner, short.gpus, options.gpu_memory, with_more, per_node)
    )
    if options.json:
        trees = [
            plan.to_json() | {"knobs": [vars(k) for k in found] if plan is short else []}
            for plan in plans
        ]
        sys.stdout.write(
            json.dumps(trees if len(trees) > 1 else trees[0], indent=2, allow_nan=False) + "\n"
        )
        return
    console = Console()
    print_plan(plans[0], console)
    if len(plans) > 1:
        print_scaling(plans, console)
    if short is not None and found:
        print_memory_savings(short, found, console)


def _make_workspace_meter(device: str | None) -> KernelWorkspaceMeter | None:
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--work-areas cuda measures kernels on a GPU and torch finds none: leave it out, or say cpu."
        )
    return None if device is None else KernelWorkspaceMeter(device)


def _parse_gpu_counts(text: str, nodes: int | None, per_node: int) -> list[int]:
    """Numbers of GPUs from `--gpus`, or from `--nodes`."""
    if nodes is not None:
        if nodes < 1:
            raise UserError(f"--nodes must be at least 1, not {nodes}.")
        text = str(nodes * per_node)
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise UserError(
            f"--gpus takes a number of GPUs of at least 1, or several with commas, not {text!r}."
        )
    return found
