"""Model FLOPs utilization (MFU): FLOPs of a step over what its devices could do in its time.

A step's FLOPs are those of its operations, forward and backward, without what activation
checkpointing computes again (Chowdhery et al., 2022, appendix B), counted by a dry run. The
devices' peak rate is stated by the user or known by their name; where it is neither, there is no
MFU.
"""

import logging
import math
import os
import re
from dataclasses import dataclass

import torch

from rectvlm.config import Config
from rectvlm.train.budget import read_world_size, split_step
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
"""Dense bf16 matrix rates of NVIDIA's data sheets, TFLOP/s, by patterns of the driver's name of the
device. The first pattern that matches counts; the rate of any other device has to be stated."""


@dataclass(frozen=True)
class DevicePeak:
    """The peak rate of a device."""

    tflops: float
    """Dense bf16 matrix rate, TFLOP/s."""
    source: str
    """Where the rate comes from."""


def find_device_peak() -> DevicePeak | None:
    """Peak rate of this process's device, stated in the environment or known by name; else None.

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
                f"{PEAK_TFLOPS_VARIABLE} must be the rate of one device in TFLOP/s, a number above "
                f"0, not {stated!r}."
            )
        return DevicePeak(tflops, f"stated in {PEAK_TFLOPS_VARIABLE}")
    return find_peak_by_name(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def find_peak_by_name(device: str) -> DevicePeak | None:
    """Peak rate of an entire GPU by the name that its driver gives."""
    if "MIG" in device:
        return None  # a slice of a GPU, with a share of its rate
    for pattern, tflops in DENSE_BF16_TFLOPS:
        if re.search(pattern, device):
            return DevicePeak(tflops, f"data sheet of {device}")
    return None


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of a step on all devices together; the field names are keys of `run.json`."""

    micro_batches: int
    """Number of micro-batches that all ranks take in a step."""
    patches: int
    """Number of patches of a micro-batch."""
    flops: float
    """FLOPs of a micro-batch without the language model."""
    flops_per_position: float
    """FLOPs of the language model for each of its positions. This is an average: attention over a
    prompt and a report of a few hundred positions is a small part of it."""
    peak: DevicePeak
    """Peak rate of one device."""
    world: int
    """Number of devices."""

    def compute_mfu(self, tokens: int, steps: int, seconds: float) -> float:
        """MFU of some steps.

        Args:
            tokens: number of patches and language positions that all ranks took in the steps.
            steps: number of steps.
            seconds: duration of the steps.
        """
        micro_batches = steps * self.micro_batches
        positions = tokens - micro_batches * self.patches
        flops = micro_batches * self.flops + positions * self.flops_per_position
        return flops / (seconds * self.world * self.peak.tflops * 1e12)


def count_step_flops(phase: Phase, config: Config) -> StepFlops | None:
    """Count a step's FLOPs in a dry run on the meta device.

    To be called before the engine starts: under ZeRO-3 Transformers builds every model in shards
    from then on, on all ranks together.

    Returns:
        The FLOPs; None where no peak rate is known, and on ranks other than 0.
    """
    peak, world_size = find_device_peak(), read_world_size()
    if peak is None or os.environ.get("RANK", "0") != "0":
        return None
    # Imported here, since most runs do not need it.
    from rectvlm import pretrained
    from rectvlm.models.tissue_patches import TYPICAL_TISSUE_SHARE
    from rectvlm.train.dry_run.dry_run import (
        CaseSize,
        build_phase_meta_model,
        dry_run_micro_batch,
    )

    step_batch = split_step(phase.get_settings(config), world_size)
    try:
        text_width = pretrained.read_model_config(config.text.model).hidden_size
        language = None
        if "generator" in phase.parts:
            language = pretrained.read_model_config(config.generator.model)
        model = build_phase_meta_model(config, phase, text_width, language)
        dry_run = dry_run_micro_batch(
            config,
            phase,
            model,
            step_batch.micro_batch,
            case=CaseSize(tissue_share=TYPICAL_TISSUE_SHARE),
        )
    except (UserError, RuntimeError, ValueError) as error:
        # Only a figure is missing then, which is no reason not to train.
        log.warning("the FLOPs of a step cannot be counted, so no MFU is shown: %s", error)
        return None

    language_flops, other_flops = 0.0, 0.0
    for (part, step_pass), costs in dry_run.costs.items():
        if step_pass == "recomputation":
            continue
        if part == "language model":
            language_flops += sum(costs.flops)
        else:
            other_flops += sum(costs.flops)
    positions = dry_run.positions - dry_run.patches
    return StepFlops(
        micro_batches=step_batch.accumulation * world_size,
        patches=dry_run.patches,
        flops=other_flops,
        flops_per_position=language_flops / positions if positions else 0.0,
        peak=peak,
        world=world_size,
    )
