"""How long a step takes on stated hardware, on one GPU and on many.

Each operation takes the longest of its arithmetic, its memory traffic and its launch (roofline
model: Williams et al., 2009). Communication between GPUs hides behind the computation where
DeepSpeed prefetches, and is added elsewhere.
"""

import math
from dataclasses import dataclass

import numpy as np

from rectvlm.plan.hardware import HardwareRates
from rectvlm.plan.static_memory import StaticMemory
from rectvlm.train.dry_run.memory_tracker import OperationCosts, StepPass


def estimate_operation_seconds(
    costs: OperationCosts, hardware: HardwareRates, growth: float = 1.0
) -> float:
    """Estimate the time of some operations on one GPU.

    Args:
        costs: the operations.
        hardware: rates of the GPU.
        growth: samples, as a multiple of those that the costs are for.
    """
    flops, bytes_moved = growth * np.asarray(costs.flops), growth * np.asarray(costs.bytes_moved)
    shares = np.where(costs.is_convolution, hardware.convolution_efficiency, hardware.efficiency)
    arithmetic = flops / (hardware.tflops * 1e12 * shares)
    traffic = bytes_moved / (hardware.bandwidth * 1e12 * hardware.bandwidth_efficiency)
    return float(np.maximum(np.maximum(arithmetic, traffic), hardware.launch).sum())


@dataclass
class RingCollective:
    """One collective over all GPUs.

    It is a ring within a node, and rings through every node's adapters between nodes.
    """

    gpus: int
    hardware: HardwareRates

    def estimate_seconds(self, size_bytes: float, calls: int) -> float:
        """Estimate the time to gather (or reduce and scatter) `size_bytes` in so many calls."""
        if self.gpus == 1 or size_bytes == 0:
            return 0.0
        rates = self.hardware
        nodes = math.ceil(self.gpus / rates.gpus_per_node)
        gpus_in_node = min(self.gpus, rates.gpus_per_node)
        rate = rates.intra if nodes == 1 else min(rates.intra, rates.inter * gpus_in_node)
        hops = gpus_in_node - 1 + nodes - 1
        sent_bytes = size_bytes * (self.gpus - 1) / self.gpus
        return sent_bytes / (rate * 1e9 * rates.network_efficiency) + calls * hops * rates.hop


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by what takes them."""

    compute: float
    """Seconds of the operations of all micro-batches."""
    gathers: float
    """Seconds of gathering weights, hidden behind the computation as far as that lasts."""
    reductions: float
    """Seconds of reducing gradients."""
    hooks: float
    """Seconds of ZeRO-3's hooks on the host. Large micro-batches may hide them; they are added, so
    that a plan is not too short."""
    optimizer: float
    """Seconds of the optimizer's update, and under ZeRO-1 and 2 of gathering the new weights."""
    total: float
    """Seconds of the step."""


@dataclass(frozen=True)
class EngineCalls:
    """What the engine does one after the other, whatever its size."""

    zero_stage: int
    reductions: int
    """Number of buckets each time that gradients are reduced."""
    module_passes: int
    """Number of passes of leaf modules, and of modules with weights outside them, in a micro-batch
    under ZeRO-3, else 0."""
    trained_tensors: int
    """Number of tensors that the optimizer updates."""


def estimate_step_time(
    costs: dict[tuple[str, StepPass], OperationCosts],
    static_memory: StaticMemory,
    accumulation: int,
    gpus: int,
    hardware: HardwareRates,
    calls: EngineCalls,
) -> StepTime:
    """Estimate the time of a step of all GPUs together.

    Under ZeRO-3 sharded parameters are gathered in each micro-batch, and gradients reduced and
    scattered. DeepSpeed's ZeRO-1 and 2 all-reduce them instead, which moves twice as much (ZeRO-1
    once a step), and gather the new weights after the step.
    """
    collective = RingCollective(gpus, hardware)
    compute = sum(estimate_operation_seconds(part, hardware) for part in costs.values())
    in_node = static_memory.gathered_in_node_bytes
    node_collective = RingCollective(min(gpus, hardware.gpus_per_node), hardware)
    gathers = node_collective.estimate_seconds(in_node, static_memory.gather_calls)
    gathers += collective.estimate_seconds(
        static_memory.gathered_bytes - in_node, 0 if in_node else static_memory.gather_calls
    )
    reductions = collective.estimate_seconds(static_memory.reduced_bytes, calls.reductions)
    weight_gather = 0.0
    if calls.zero_stage < 3:
        weight_gather = reductions
        reductions *= 2 if calls.zero_stage == 2 else 2 / accumulation
    hooks = calls.module_passes * hardware.hook

    # Adam reads and writes master, two moments and gradient, some of them twice.
    optimizer_bytes = 3 * static_memory.bytes_by_kind["optimizer"]
    update = optimizer_bytes / (hardware.bandwidth * 1e12 * hardware.bandwidth_efficiency)
    optimizer = update + calls.trained_tensors * hardware.tensor + weight_gather
    micro_batch = max(compute, gathers) + reductions + hooks
    return StepTime(
        compute=accumulation * compute,
        gathers=accumulation * gathers,
        reductions=accumulation * reductions,
        hooks=accumulation * hooks,
        optimizer=optimizer,
        total=accumulation * micro_batch + optimizer,
    )
