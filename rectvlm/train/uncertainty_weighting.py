"""Task weights that are learnt: homoscedastic uncertainty (Kendall, Gal and Cipolla, 2018).

A task's loss L with configured weight w counts exp(−s) · w · L + s / 2, where s = log σ² is learnt. At first s = 0, and
the weights are the configured ones. For a constant loss the minimum is at s = log(2 w L), where every task counts 1/2
whatever its scale: so w decides where the weights begin, and L where they end. All three of our losses are
cross-entropies (with Dice beside one), hence the paper's form for classification, without its 1/2 before L.

The learned values belong to the run, not to the model: they are saved with the optimizer's state and resumed, and a
checkpoint's weights are the same with them and without. The next phase, which has another set of tasks, begins anew.
"""

import torch
from torch import Tensor, nn


class UncertaintyWeighting(nn.Module):
    """One log-variance a task."""

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(tasks))

    def forward(self, weighted: Tensor, known: Tensor) -> Tensor:
        """The total of losses.

        Args:
            weighted: (T,) float32, w · L of each task.
            known: (T,) bool, whether the batch says anything of it; if not, it does not move its s either, though it
                may have a loss (the localizer's denoising needs no outline).
        """
        s = self.log_variance.float()
        s = torch.where(known, s, s.detach())
        return (torch.exp(-s) * weighted + known * s / 2).sum()

    def compute_factors(self) -> Tensor:
        """(T,) float32: exp(−s), what each configured weight is multiplied with."""
        return torch.exp(-self.log_variance.detach().float())
