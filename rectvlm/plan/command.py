"""The command `rectvlm plan`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from rectvlm.config import Config, load
from rectvlm.plan.planner import Plan, Planner, knobs
from rectvlm.plan.show import show, show_scale
from rectvlm.plan.speed import Hardware
from rectvlm.plan.workarea import WorkAreas
from rectvlm.types import UserError

CHECKOUT = Path(__file__).resolve().parents[2]


def run(options: argparse.Namespace) -> None:
    """Plan and show.

    Raises:
        UserError: an option without sense, an unknown configuration, or a model whose geometry is out of reach.
    """
    gpus = _gpus(options.gpus, options.nodes, options.gpus_per_node)
    for name in ("gpu_memory", "tflops", "bandwidth", "intra", "inter", "samples", "gpus_per_node"):
        if not getattr(options, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} must be greater than 0, not {getattr(options, name)}.")
    if not 0 < options.efficiency <= 1:
        raise UserError(f"--efficiency is a share above 0 and up to 1, not {options.efficiency}.")
    hardware = Hardware(
        tflops=options.tflops,
        efficiency=options.efficiency,
        bandwidth=options.bandwidth,
        gpus_per_node=options.gpus_per_node,
        intra=options.intra,
        inter=options.inter,
    )

    def with_more(more: Sequence[str]) -> Config:
        return load(options.config, [*options.overrides, *more])

    ds_configs = options.ds_configs or CHECKOUT / "ds_configs"
    areas = _areas(options.work_areas)
    planner = Planner(with_more([]), options.phase, ds_configs, hardware, areas)
    plans: list[Plan] = [planner.plan(n, options.gpu_memory, options.samples) for n in gpus]
    found = [] if plans[0].fits else knobs(planner, gpus[0], options.gpu_memory, with_more)
    if options.json:
        trees = [plan.to_json() for plan in plans]
        trees[0]["knobs"] = [vars(knob) for knob in found]
        sys.stdout.write(json.dumps(trees if len(trees) > 1 else trees[0], indent=2) + "\n")
        return
    console = Console()
    show(plans[0], found, console)
    if len(plans) > 1:
        show_scale(plans, console)


def _areas(device: str | None) -> WorkAreas | None:
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--work-areas cuda measures kernels on a GPU and torch finds none: leave it out, or say cpu.")
    return None if device is None else WorkAreas(device)


def _gpus(text: str, nodes: int | None, per_node: int) -> list[int]:
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
        raise UserError(f"--gpus takes a number of GPUs of at least 1, or several with commas, not {text!r}.")
    return found
