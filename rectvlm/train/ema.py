"""A moving average of the weights that train, kept by the optimizer.

Each rank averages what its optimizer steps: its own partition of the 32-bit master weights. The average is a further
tensor of the optimizer's state, so that it is sharded, saved and loaded with the moments, at 4 bytes a weight.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

EMA_KEY = "ema"
"""Of the optimizer's state."""


def ema_decay_at(step: int, decay: float) -> float:
    """Share of the average that stays at a step (1 is the first).

    min(decay, (step − 1) / (step + 8)): the average begins as the weights after the first step and forgets quickly at
    first, so that weights from before the training do not linger (as TensorFlow's ExponentialMovingAverage does with
    `num_updates`).
    """
    return min(decay, (step - 1) / (step + 8))


def make_ema_hook(decay: float) -> Callable[..., None]:
    """A hook for `register_step_post_hook` of an Adam: average ← d · average + (1 − d) · weights."""

    @torch.no_grad()
    def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for weights in group["params"]:
                state = optimizer.state[weights]
                if not state:  # no gradient yet
                    continue
                if EMA_KEY not in state:
                    state[EMA_KEY] = weights.detach().clone()
                else:
                    state[EMA_KEY].lerp_(
                        weights, 1 - ema_decay_at(max(1, int(state["step"])), decay)
                    )

    return hook


def swap_ema_tensor(weights: Tensor, state: dict[str, Any]) -> bool:
    """Exchange weights and their average in place, where there is one."""
    average = state.get(EMA_KEY)
    if average is None:
        return False
    held = weights.detach().clone()
    weights.data.copy_(average)
    average.copy_(held)
    return True
