"""How long a step takes on stated hardware, alone and on many GPUs.

Each operation takes the longest of its arithmetic, its memory traffic and its launch (roofline model: Williams et al.,
2009). What GPUs say to each other hides behind the computation where DeepSpeed prefetches, and is added elsewhere.
"""

import math
from dataclasses import dataclass

import numpy as np

from rectvlm.plan.ledger import Stage, Work
from rectvlm.plan.states import States


@dataclass(frozen=True)
class Hardware:
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


def seconds(work: Work, hardware: Hardware) -> float:
    """Time of some operations on one GPU."""
    flops, moved = np.asarray(work.flops), np.asarray(work.moved)
    reached = np.where(work.convolved, hardware.convolution_efficiency, hardware.efficiency)
    arithmetic = flops / (hardware.tflops * 1e12 * reached)
    traffic = moved / (hardware.bandwidth * 1e12 * hardware.bandwidth_efficiency)
    return float(np.maximum(np.maximum(arithmetic, traffic), hardware.launch).sum())


@dataclass
class Network:
    """One collective over all GPUs: a ring within a node, rings through every node's adapters between them."""

    gpus: int
    hardware: Hardware

    def seconds(self, size: float, calls: int) -> float:
        """Time to gather (or reduce and scatter) `size` bytes in so many calls."""
        if self.gpus == 1 or size == 0:
            return 0.0
        h = self.hardware
        nodes = math.ceil(self.gpus / h.gpus_per_node)
        local = min(self.gpus, h.gpus_per_node)
        rate = h.intra if nodes == 1 else min(h.intra, h.inter * local)
        hops = local - 1 + nodes - 1
        return size * (self.gpus - 1) / self.gpus / (rate * 1e9 * h.network_efficiency) + calls * hops * h.hop


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
class Calls:
    """What the engine does one after the other, whatever its size."""

    stage: int
    """Of ZeRO."""
    reductions: int
    """Each time that gradients go out."""
    hooks: int
    """Passes of modules with weights in a micro-batch, under ZeRO-3."""
    tensors: int
    """That the optimizer updates."""


def step_time(
    work: dict[tuple[str, Stage], Work], held: States, accumulation: int, gpus: int, hardware: Hardware, calls: Calls
) -> StepTime:
    """Time of a step of all GPUs together.

    Under ZeRO-3 shared parameters are gathered in each micro-batch, and gradients reduced and scattered. DeepSpeed's
    ZeRO-1 and 2 reduce them to all instead, which moves twice as much (ZeRO-1 once a step), and gather the new weights
    after the step.
    """
    network = Network(gpus, hardware)
    compute = sum(seconds(w, hardware) for w in work.values())
    gathers = network.seconds(held.gathered, held.gathers)
    reductions = network.seconds(held.reduced, calls.reductions)
    after = 0.0
    if calls.stage < 3:
        after = reductions
        reductions *= 2 if calls.stage == 2 else 2 / accumulation
    hooks = calls.hooks * hardware.hook
    # Adam reads and writes master, two moments and gradient, some of them twice.
    moved = 3 * held.held["optimizer"] / (hardware.bandwidth * 1e12 * hardware.bandwidth_efficiency)
    optimizer = moved + calls.tensors * hardware.tensor + after
    total = accumulation * (max(compute, gathers) + reductions + hooks) + optimizer
    return StepTime(
        accumulation * compute,
        accumulation * gathers,
        accumulation * reductions,
        accumulation * hooks,
        optimizer,
        total,
    )
