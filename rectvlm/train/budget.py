"""How a phase's samples are cut into optimizer steps on a number of ranks.

A configuration counts samples, never steps: a phase sees as many on any number of ranks, and with
more of them it ends sooner. Warm-up, saving, validation and late starts are shares of the phase.

A step has `global_batch` samples. Where the ranks do not divide it, each takes a sample or a few
more, and all learning rates follow the square-root rule of adaptive optimizers: a batch that is κ
times as large has rates that are √κ times as large (Malladi et al., 2022, "On the SDEs and scaling
rules for adaptive gradient algorithms"). A moving average keeps its span in samples: its decay is
raised to the power κ (Busbridge et al., 2023, "How to scale your EMA").
"""

import math
import os
from dataclasses import dataclass

from rectvlm.config import PhaseConfig


@dataclass(frozen=True)
class StepBatch:
    """The samples of an optimizer step, and how the ranks take them."""

    global_batch: int
    """Samples of all ranks."""
    micro_batch: int
    """Samples of a rank in one forward pass."""
    accumulation: int
    """Micro-batches of a rank."""


def split_step(settings: PhaseConfig, world_size: int) -> StepBatch:
    """Cut an optimizer step into micro-batches of at most `micro_batch` samples.

    Args:
        settings: the phase's settings.
        world_size: number of ranks.

    Returns:
        The step with the fewest forward passes; its micro-batches are of one size, and it has at
        least `global_batch` samples.
    """
    samples_of_rank = math.ceil(settings.global_batch / world_size)
    accumulation = math.ceil(samples_of_rank / settings.micro_batch)
    micro_batch = math.ceil(samples_of_rank / accumulation)
    return StepBatch(micro_batch * accumulation * world_size, micro_batch, accumulation)


def read_world_size() -> int:
    """Number of ranks that the launcher started, before they have joined."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class PhaseBudget:
    """The samples of a phase, and the steps that they make."""

    samples: int
    """Samples that the phase sees. Its last step may take some more."""
    step_batch: StepBatch
    lr_batch: int
    """Global batch that the configuration's learning rates are meant for."""

    @classmethod
    def plan(cls, settings: PhaseConfig, sample_count: int, world_size: int) -> "PhaseBudget":
        """Plan a phase.

        Args:
            settings: its settings.
            sample_count: number of samples in the training split, for a length in epochs.
            world_size: number of ranks.
        """
        samples = settings.samples
        if settings.epochs:
            samples = max(1, math.ceil(settings.epochs * sample_count))
        return cls(samples, split_step(settings, world_size), settings.lr_batch)

    @property
    def batch_ratio(self) -> float:
        """Global batch, as a multiple of the one that the learning rates are meant for."""
        return self.step_batch.global_batch / self.lr_batch

    @property
    def lr_factor(self) -> float:
        """What the configuration's learning rates are multiplied with."""
        return math.sqrt(self.batch_ratio)

    def scale_ema_decay(self, decay: float) -> float:
        """Decay of a moving average for steps of this batch, from that for `lr_batch`."""
        return decay**self.batch_ratio

    def samples_after(self, share: float) -> int:
        """Number of samples in a share of the phase."""
        return round(share * self.samples)

    def count_steps_left(self, samples_seen: int) -> int:
        """Number of optimizer steps from a number of samples to the end."""
        return max(0, math.ceil((self.samples - samples_seen) / self.step_batch.global_batch))

    def is_finished(self, samples_seen: int) -> bool:
        """Whether all samples have been seen."""
        return samples_seen >= self.samples

    def is_due(self, every: float, samples_seen: int) -> bool:
        """Whether something that is done at every share of the phase belongs after a step.

        Args:
            every: share of the phase from one time to the next, above 0.
            samples_seen: samples seen after the step.
        """
        samples_before = samples_seen - self.step_batch.global_batch
        return self._count_times(every, samples_seen) > self._count_times(every, samples_before)

    def _count_times(self, every: float, samples_seen: int) -> int:
        # Shares such as 1/3 are not exact, and the time that they stand for must not be missed.
        return math.floor(samples_seen / (every * self.samples) + 1e-9)
