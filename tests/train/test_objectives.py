"""What carries loss and what does not: what is unknown never does."""

import pytest
import torch

from rectvlm.config import Config
from rectvlm.labels import N_FINDINGS, N_LESIONS
from rectvlm.models import ModelOutputs
from rectvlm.models.report_generator import ReportLoss
from rectvlm.train.objectives import classification_loss, combine_losses, compute_losses
from rectvlm.train.task_loss import TargetCounts, TaskLoss
from rectvlm.train.uncertainty_weighting import UncertaintyWeighting


def test_unknown_labels_carry_no_loss_and_no_gradient() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, N_FINDINGS, requires_grad=True)
    labels = torch.randint(0, 2, (3, N_FINDINGS)).float()
    known = torch.rand(3, N_FINDINGS) < 0.5
    loss = classification_loss(logits, labels, known, float(known.sum()))
    loss.value.backward()
    assert loss.count == known.sum()
    assert logits.grad is not None
    assert (logits.grad[~known] == 0).all()
    assert (logits.grad[known] != 0).all()
    other = classification_loss(
        logits, torch.where(known, labels, 1 - labels), known, float(known.sum())
    )
    assert other.value == loss.value
    p = logits.detach().sigmoid()
    by_hand = -(labels * p.log() + (1 - labels) * (1 - p).log())[known].mean()
    torch.testing.assert_close(loss.value.detach(), by_hand)


def test_a_task_of_weight_zero_leaves_its_learned_factor_alone(tiny: Config) -> None:
    """Without a loss the factor would grow without end."""
    losses = {task: TaskLoss(torch.tensor(0.5), 3) for task in ("classification", "localization")}
    weights = tiny.train.loss_weights.model_copy(update={"classification": 0.0})
    weighting = UncertaintyWeighting(2)
    combine_losses(losses, weights, weighting).backward()
    assert weighting.log_variance.grad is not None
    assert weighting.log_variance.grad[0] == 0 != weighting.log_variance.grad[1]


def test_no_label_at_all_is_zero_with_a_graph() -> None:
    logits = torch.randn(2, N_FINDINGS, requires_grad=True)
    loss = classification_loss(
        logits, torch.ones(2, N_FINDINGS), torch.zeros(2, N_FINDINGS, dtype=torch.bool), 0
    )
    assert (loss.value, loss.count) == (0, 0)
    loss.value.backward()
    assert logits.grad is not None
    assert not logits.grad.any()


def test_sure_and_right_is_near_zero_and_sure_and_wrong_is_not() -> None:
    labels = torch.randint(
        0, 2, (2, N_FINDINGS), generator=torch.Generator().manual_seed(0)
    ).float()
    known = torch.ones(2, N_FINDINGS, dtype=torch.bool)
    assert classification_loss((labels * 2 - 1) * 30, labels, known, known.sum()).value < 1e-6
    assert classification_loss((1 - labels * 2) * 30, labels, known, known.sum()).value > 10


def test_report_loss_is_the_mean_over_samples_that_have_one(tiny: Config) -> None:
    per_sample = torch.tensor([3.0, 0.0, 5.0], requires_grad=True)
    report = ReportLoss(per_sample, torch.tensor([7, 0, 9]), torch.zeros(3, 9), 48)
    outputs = ModelOutputs(torch.zeros(3, N_FINDINGS), None, report, 0)
    counts = TargetCounts(labels=0, lesions=0, reports=2, outlined=(0,) * N_LESIONS)
    weights = tiny.train.localization_loss_weights
    # The batch holds nothing for this task.
    found = compute_losses(outputs, None, ("report",), weights, counts)  # type: ignore[arg-type]
    assert (found["report"].value, found["report"].count) == (4, 2)
    assert combine_losses(found, tiny.train.loss_weights).item() == pytest.approx(
        4 * tiny.train.loss_weights.report
    )
    found["report"].value.backward()
    assert per_sample.grad is not None
    assert per_sample.grad.tolist() == [0.5, 0, 0.5]
