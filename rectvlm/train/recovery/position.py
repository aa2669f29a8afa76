"""How far a run has come; together with the configuration it decides everything that follows.

torch is seeded for every micro-batch with (seed, number of its first sample in the endless sequence
of samples). So no random state is stored: a resumed run repeats an unbroken one, and one rank that
takes two micro-batches a step draws what two ranks draw with one each.
"""

from dataclasses import dataclass

import numpy as np


@dataclass
class TrainingPosition:
    """How far a run has come."""

    step: int
    """Number of optimizer steps done."""
    samples_seen: int
    """Number of samples that all ranks together have taken."""
    skipped_in_a_row: int = 0
    """Number of steps skipped since the last one that changed the weights."""


def seed_micro_batch(seed: int, first_sample: int) -> None:
    """Seed torch for a micro-batch.

    Args:
        seed: the run's seed.
        first_sample: number of the micro-batch's first sample in the endless sequence, from 0.
    """
    import torch

    state = np.random.SeedSequence([seed, first_sample]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0] >> 1))
