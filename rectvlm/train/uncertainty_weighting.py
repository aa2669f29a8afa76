"""Learned task weights by homoscedastic uncertainty (Kendall, Gal and Cipolla, 2018).

A task's loss L with configured weight w contributes exp(−s) · w · L + s / 2, where s = log σ² is
learned. At first s = 0, and the weights are the configured ones. For a constant loss the minimum is
at s = log(2 w L), where every task contributes 1/2 whatever its scale: so w decides where the
weights begin, and L where they end. All three losses are cross-entropies (one with Dice beside it),
hence the paper's form for classification, without its 1/2 before L.

The learned values belong to the run, not to the model: they are saved and resumed with the
optimizer's state, and a checkpoint's weights are the same with and without them. The next phase,
which has another set of tasks, begins anew.
"""

import torch
from torch import Tensor, nn


class UncertaintyWeighting(nn.Module):
    """One log-variance for each task. T tasks."""

    def __init__(self, task_count: int) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(task_count))

    def forward(self, weighted: Tensor, known: Tensor) -> Tensor:
        """Total of the losses, a scalar.

        Args:
            weighted: (T,) float32, w · L of each task.
            known: (T,) bool, whether the batch says anything about the task. If not, the task does
                not move its s, though it may have a loss: the localizer's denoising needs no
                outline.
        """
        s = self.log_variance.float()
        s = torch.where(known, s, s.detach())
        return (torch.exp(-s) * weighted + known * s / 2).sum()

    def compute_factors(self) -> Tensor:
        """(T,) float32: exp(−s), by which each configured weight is multiplied."""
        return torch.exp(-self.log_variance.detach().float())
