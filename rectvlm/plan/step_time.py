"""How long a step takes on stated hardware, alone and on many GPUs.

Each operation takes the longest of its arithmetic, its memory traffic and its launch (roofline model: Williams et al.,
2009). What GPUs say to each other hides behind the computation where DeepSpeed prefetches, and is added elsewhere.
"""

import math
from dataclasses import dataclass

import numpy as np

from rectvlm.plan.static_memory import StaticMemory
from rectvlm.train.dry_run.memory_tracker import OperationCosts, StepPass


@dataclass(frozen=True)
class HardwareRates:
    """Rates of one GPU and of the network. Defaults: an H200 SXM's data sheet, and shares of it that are assumed."""

    tflops: float = 989.0
    """Dense bf16 matrix rate, TFLOP/s."""
    efficiency: float = 0.5
    """Share of it that matrix products reach."""
    convolution_efficiency: float = 0.11
    """Share of it that the localizer's convolutions reach: with it, their part took what it took on an H200."""
    bandwidth: float = 4.8
    """GPU memory, TB/s."""
    bandwidth_efficiency: float = 0.7
    launch: float = 6e-6
    """Seconds that an operation takes at least: the host launches one after the other."""
    gpus_per_node: int = 8
    intra: float = 450.0
    """NVLink 4, GB/s in one direction for each GPU."""
    inter: float = 50.0
    """InfiniBand NDR 400 Gb/s, GB/s for each GPU."""
    network_efficiency: float = 0.7
    hop: float = 5e-6
    """Seconds of latency for each further member of a ring."""
    hook: float = 4.8e-4
    """Seconds that ZeRO-3's hooks take for one pass of a module with weights: what a step of an H200 took longer than
    under ZeRO-2."""
    tensor: float = 2.0e-4
    """Seconds that the engine's optimizer takes for one tensor, on the same host."""


def estimate_operation_seconds(costs: OperationCosts, hardware: HardwareRates) -> float:
    """Time of some operations on one GPU."""
    flops, moved = np.asarray(costs.flops), np.asarray(costs.bytes_moved)
    reached = np.where(costs.is_convolution, hardware.convolution_efficiency, hardware.efficiency)
    arithmetic = flops / (hardware.tflops * 1e12 * reached)
    traffic = moved / (hardware.bandwidth * 1e12 * hardware.bandwidth_efficiency)
    return float(np.maximum(np.maximum(arithmetic, traffic), hardware.launch).sum())


@dataclass
class RingCollective:
    """One collective over all GPUs: a ring within a node, rings through every node's adapters between them."""

    gpus: int
    hardware: HardwareRates

    def estimate_seconds(self, size_bytes: float, calls: int) -> float:
        """Time to gather (or reduce and scatter) `size` bytes in so many calls."""
        if self.gpus == 1 or size_bytes == 0:
            return 0.0
        h = self.hardware
        nodes = math.ceil(self.gpus / h.gpus_per_node)
        local = min(self.gpus, h.gpus_per_node)
        rate = h.intra if nodes == 1 else min(h.intra, h.inter * local)
        hops = local - 1 + nodes - 1
        return (
            size_bytes * (self.gpus - 1) / self.gpus / (rate * 1e9 * h.network_efficiency)
            + calls * hops * h.hop
        )


@dataclass
class StepTime:
    """Seconds of one optimizer step."""

    compute: float
    gathers: float
    """Hidden behind the computation as far as that lasts."""
    reductions: float
    hooks: float
    """The host's, of ZeRO-3. Large micro-batches may hide them; they are added, so that a plan is not too short."""
    optimizer: float
    """Its update, and under ZeRO-1 and 2 the gather of the new weights."""
    total: float


@dataclass(frozen=True)
class EngineCalls:
    """What the engine does one after the other, whatever its size."""

    zero_stage: int
    """Of ZeRO."""
    reductions: int
    """Each time that gradients go out."""
    module_passes: int
    """Passes of modules with weights in a micro-batch, under ZeRO-3."""
    trained_tensors: int
    """That the optimizer updates."""


def estimate_step_time(
    costs: dict[tuple[str, StepPass], OperationCosts],
    static_memory: StaticMemory,
    accumulation: int,
    gpus: int,
    hardware: HardwareRates,
    calls: EngineCalls,
) -> StepTime:
    """Time of a step of all GPUs together.

    Under ZeRO-3 shared parameters are gathered in each micro-batch, and gradients reduced and scattered. DeepSpeed's
    ZeRO-1 and 2 reduce them to all instead, which moves twice as much (ZeRO-1 once a step), and gather the new weights
    after the step.
    """
    network = RingCollective(gpus, hardware)
    compute = sum(estimate_operation_seconds(w, hardware) for w in costs.values())
    gathers = network.estimate_seconds(static_memory.gathered_bytes, static_memory.gather_calls)
    reductions = network.estimate_seconds(static_memory.reduced_bytes, calls.reductions)
    after = 0.0
    if calls.zero_stage < 3:
        after = reductions
        reductions *= 2 if calls.zero_stage == 2 else 2 / accumulation
    hooks = calls.module_passes * hardware.hook
    # Adam reads and writes master, two moments and gradient, some of them twice.
    moved = (
        3
        * static_memory.bytes_by_kind["optimizer"]
        / (hardware.bandwidth * 1e12 * hardware.bandwidth_efficiency)
    )
    optimizer = moved + calls.trained_tensors * hardware.tensor + after
    total = accumulation * (max(compute, gathers) + reductions + hooks) + optimizer
    return StepTime(
        accumulation * compute,
        accumulation * gathers,
        accumulation * reductions,
        accumulation * hooks,
        optimizer,
        total,
    )
