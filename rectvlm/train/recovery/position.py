"""How far a run has come; with the configuration it decides all that follows.

Everything random in a micro-batch is drawn after seeding with (seed, place of its first sample in the endless row of
samples), so no random state is stored: a resumed run repeats an unbroken one, and one rank that takes two micro-batches
a step draws what two ranks draw with one each.
"""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class TrainingPosition:
    """Where a run stands."""

    step: int
    """Optimizer steps done."""
    samples_seen: int
    """By all ranks together."""
    bad_in_a_row: int = 0
    """Steps skipped just before."""


def seed_micro_batch(seed: int, first_sample: int) -> None:
    """Seed torch for the micro-batch that begins with a sample of the endless row, counted from 0."""
    torch.manual_seed(
        int(np.random.SeedSequence([seed, first_sample]).generate_state(1, np.uint64)[0] >> 1)
    )
