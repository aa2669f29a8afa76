"""Model FLOPs utilization (MFU): the arithmetic that a step needs, over what its devices could do in that time.

The FLOPs are those of the operations of a step, forward and backward, without what checkpointing computes again
(Chowdhery et al., 2022, appendix B), counted by `rectvlm.plan`. The devices' rate is stated by the user or known by
their name; where it is neither, there is no MFU.
"""

import logging
import math
import os
import re
from dataclasses import dataclass

import torch

from rectvlm.config import Config
from rectvlm.train.phases import Phase
from rectvlm.types import UserError

log = logging.getLogger(__name__)

PEAK_TFLOPS_VARIABLE = "RECTVLM_PEAK_TFLOPS"
DENSE_BF16_TFLOPS: tuple[tuple[str, float], ...] = (
    (r"\bB200\b", 2250.0),
    (r"\bGH200\b", 989.0),
    (r"\bH200 NVL\b", 835.0),
    (r"\bH200\b", 989.0),
    (r"\bH100 NVL\b", 835.0),
    (r"\bH100 PCIe\b", 756.0),
    (r"\bH100 80GB HBM3\b", 989.0),
    (r"\bA100\b", 312.0),
    (r"\bL40S\b", 362.0),
)
"""By the name that the driver gives: dense bf16 matrix rates of NVIDIA's data sheets, TFLOP/s. The first that fits
counts; what is not here has to be stated."""


@dataclass(frozen=True)
class DevicePeak:
    """What a device could do at most."""

    tflops: float
    """Dense bf16 matrix rate, TFLOP/s."""
    source: str
    """Where the figure comes from."""


def find_device_peak() -> DevicePeak | None:
    """The rate of this process's device: stated in the environment, or of a GPU that is known by name; else None.

    Raises:
        UserError: the environment states something else than a positive number.
    """
    stated = os.environ.get(PEAK_TFLOPS_VARIABLE)
    if stated:
        try:
            tflops = float(stated)
        except ValueError:
            tflops = math.nan
        if not 0 < tflops < math.inf:
            raise UserError(
                f"{PEAK_TFLOPS_VARIABLE} must be the rate of one device in TFLOP/s, a number above 0, not {stated!r}."
            )
        return DevicePeak(tflops, f"stated in {PEAK_TFLOPS_VARIABLE}")
    return find_peak_by_name(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def find_peak_by_name(device: str) -> DevicePeak | None:
    """The rate of a whole GPU by its driver's name."""
    if "MIG" in device:
        return None  # a slice of a GPU, at a share of its rate
    for pattern, tflops in DENSE_BF16_TFLOPS:
        if re.search(pattern, device):
            return DevicePeak(tflops, f"data sheet of {device}")
    return None


@dataclass(frozen=True)
class StepFlops:
    """What a step asks of all devices together."""

    micro_batches: int
    """Of all ranks, in a step."""
    patches: int
    """Of a micro-batch."""
    flops: float
    """Of a micro-batch, without the language model."""
    flops_per_position: float
    """Of the language model, for each of its positions: an average, as attention over a prompt and a report of a few
    hundred positions is a small part of it."""
    peak: DevicePeak
    world: int

    def compute_mfu(self, tokens: int, steps: int, seconds: float) -> float:
        """MFU of some steps.

        Args:
            tokens: patches and language positions of all ranks in them.
            steps: how many.
            seconds: that they took.
        """
        towers = steps * self.micro_batches
        positions = tokens - towers * self.patches
        done = towers * self.flops + positions * self.flops_per_position
        return done / (seconds * self.world * self.peak.tflops * 1e12)


def count_step_flops(phase: Phase, config: Config) -> StepFlops | None:
    """Rehearse a micro-batch on the meta device; None where no rate is known, and on other ranks than 0.

    To be called before the engine starts: under ZeRO-3 Transformers builds every model in shards from then on, on all
    ranks together.
    """
    rate, world = find_device_peak(), int(os.environ.get("WORLD_SIZE", "1"))
    if rate is None or os.environ.get("RANK", "0") != "0":
        return None
    # Here: the planner sees the training rooms, which see it nowhere else; and most runs need it not at all.
    from rectvlm import pretrained
    from rectvlm.train.dry_run.dry_run import build_phase_meta_model, dry_run_micro_batch

    settings = phase.get_settings(config)
    try:
        language = (
            pretrained.read_model_config(config.generator.model)
            if "generator" in phase.parts
            else None
        )
        model = build_phase_meta_model(
            config, phase, pretrained.read_model_config(config.text.model).hidden_size, language
        )
        rehearsal = dry_run_micro_batch(config, phase, model, settings.micro_batch)
    except (UserError, RuntimeError, ValueError) as error:
        # Only a figure is missing then: no reason not to train.
        log.warning("the FLOPs of a step cannot be counted, so no MFU is shown: %s", error)
        return None
    flops = {"language model": 0.0, "rest": 0.0}
    for (part, stage), work in rehearsal.costs.items():
        if stage != "recomputation":
            flops[part if part in flops else "rest"] += sum(work.flops)
    positions = rehearsal.positions - rehearsal.patches
    return StepFlops(
        micro_batches=settings.accumulation * world,
        patches=rehearsal.patches,
        flops=flops["rest"],
        flops_per_position=flops["language model"] / positions if positions else 0.0,
        peak=rate,
        world=world,
    )
