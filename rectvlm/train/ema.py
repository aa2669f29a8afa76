"""Exponential moving average (EMA) of the trained weights, kept by the optimizer.

Each rank averages what its optimizer steps: its own partition of the 32-bit master weights. The
average is one more tensor of the optimizer's state, so it is sharded, saved and loaded with the
moments, at 4 bytes a weight.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

EMA_KEY = "ema"
"""Key of the average in the optimizer's state."""


def ema_decay_at(step: int, decay: float) -> float:
    """Share of the average that stays at a step, counted from 1.

    min(decay, (step − 1) / (step + 8)): the average begins as the weights after the first step and
    forgets quickly at first, so that weights from before the training do not linger (as in
    TensorFlow's ExponentialMovingAverage with `num_updates`).
    """
    return min(decay, (step - 1) / (step + 8))


def make_ema_hook(decay: float) -> Callable[..., None]:
    """Make a hook for `register_step_post_hook` of an Adam: average ← d · average + (1 − d) · w."""

    @torch.no_grad()
    def update_ema(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for weights in group["params"]:
                state = optimizer.state[weights]
                if not state:  # no gradient yet
                    continue
                if EMA_KEY not in state:
                    state[EMA_KEY] = weights.detach().clone()
                else:
                    step = max(1, int(state["step"]))
                    state[EMA_KEY].lerp_(weights, 1 - ema_decay_at(step, decay))

    return update_ema


def swap_ema_tensor(weights: Tensor, state: dict[str, Any]) -> bool:
    """Swap weights and their average in place.

    Returns:
        Whether the state has an average.
    """
    average = state.get(EMA_KEY)
    if average is None:
        return False
    saved_weights = weights.detach().clone()
    weights.data.copy_(average)
    average.copy_(saved_weights)
    return True
