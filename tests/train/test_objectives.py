"""What carries loss and what does not: the unknown and the unannotated never do."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import phantom_sample
from monai.losses import DiceLoss
from torch import Tensor

from rectvlm.config import Config, LocalizationLossWeightsConfig
from rectvlm.data.dataset import collate_samples
from rectvlm.labels import FINDINGS, LESION_BY_KEY, N_FINDINGS, N_LESIONS
from rectvlm.metrics.lesion_overlap import count_lesion_voxels
from rectvlm.metrics.lesion_overlap import score_lesion_overlap as scores
from rectvlm.models import ModelOutputs
from rectvlm.models.localizer import LocalizerOutput
from rectvlm.models.report_generator import ReportLoss
from rectvlm.phantom.phantom import make_phantom
from rectvlm.train import localization_loss as lesion_loss
from rectvlm.train.localization_loss import (
    LesionPresence,
    LesionTargets,
    infer_lesions_from_labels,
)
from rectvlm.train.objectives import classification_loss, combine_losses, compute_losses
from rectvlm.train.task_loss import TaskLoss

GRID, HALF, COARSE = (8, 16, 16), (8, 8, 8), (2, 2, 2)


def boxes() -> Tensor:
    """Bits of two samples: in the first each lesion fills its own box, the second has lesion 2."""
    bits = torch.zeros(2, *GRID, dtype=torch.uint8)
    for k in range(N_LESIONS):
        bits[0, k : k + 2, 2 * k : 2 * k + 6, 3:9] |= 1 << k
    bits[1, 2:5, 4:9, 4:9] |= 1 << 2
    return bits


def masks_of(bits: Tensor) -> Tensor:
    return torch.stack([(bits >> k & 1).float() for k in range(N_LESIONS)], dim=1)


def drawn(masks: Tensor, sure: float = 30.0) -> LocalizerOutput:
    """A localizer that draws these masks, at all three resolutions."""
    at = [masks, *(torch.nn.functional.adaptive_max_pool3d(masks, size) for size in (HALF, COARSE))]
    logits = ((m * 2 - 1) * sure for m in at)
    return LocalizerOutput(
        *logits, alignment_logits=torch.zeros(masks.shape[:2]), denoising_loss=torch.zeros(())
    )


def noise(scale: float = 1.0) -> LocalizerOutput:
    torch.manual_seed(0)
    sizes = (GRID, HALF, COARSE)
    logits = [(torch.randn(2, N_LESIONS, *size) * scale).requires_grad_() for size in sizes]
    alignment = torch.randn(2, N_LESIONS, requires_grad=True)
    return LocalizerOutput(*logits, alignment, denoising_loss=torch.zeros((), requires_grad=True))


ALL = torch.ones(2, N_LESIONS, dtype=torch.bool)
NONE = ~ALL
SIZES = (GRID, HALF, COARSE)
TERMS = LocalizationLossWeightsConfig(
    half_resolution=0.5, patch_resolution=0.5, denoising=0.1, consistency=0, alignment=0
)
WEIGHTS = (1.0, TERMS.half_resolution, TERMS.patch_resolution)
UNLABELLED = LesionPresence(NONE, NONE)


def localization(
    found: LocalizerOutput,
    bits: Tensor,
    annotated: Tensor,
    partial: Tensor,
    labelled: LesionPresence = UNLABELLED,
    **weights: float,
) -> TaskLoss:
    """What outlines teach, and nothing else unless it is weighed."""
    b = len(bits)
    some = LesionPresence(
        labelled.present[:b], labelled.known[:b]
    )  # a test may have fewer samples than flags
    return lesion_loss.localization_loss(
        found, LesionTargets(bits, annotated, partial), some, TERMS.model_copy(update=dict(weights))
    )


def test_unknown_labels_carry_no_loss_and_no_gradient() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, N_FINDINGS, requires_grad=True)
    labels = torch.randint(0, 2, (3, N_FINDINGS)).float()
    known = torch.rand(3, N_FINDINGS) < 0.5
    loss = classification_loss(logits, labels, known)
    loss.value.backward()
    assert loss.count == known.sum()
    assert logits.grad is not None
    assert (logits.grad[~known] == 0).all()
    assert (logits.grad[known] != 0).all()
    other = classification_loss(logits, torch.where(known, labels, 1 - labels), known)
    assert other.value == loss.value
    p = logits.detach().sigmoid()
    by_hand = -(labels * p.log() + (1 - labels) * (1 - p).log())[known].mean()
    torch.testing.assert_close(loss.value.detach(), by_hand)


def test_no_label_at_all_is_zero_with_a_graph() -> None:
    logits = torch.randn(2, N_FINDINGS, requires_grad=True)
    loss = classification_loss(
        logits, torch.ones(2, N_FINDINGS), torch.zeros(2, N_FINDINGS, dtype=torch.bool)
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
    assert classification_loss((labels * 2 - 1) * 30, labels, known).value < 1e-6
    assert classification_loss((1 - labels * 2) * 30, labels, known).value > 10


def test_unannotated_lesions_carry_no_loss_and_no_gradient() -> None:
    annotated = ALL.clone()
    annotated[0, 1] = annotated[1, 2] = False
    found, bits = noise(), boxes()
    loss = localization(found, bits, annotated, NONE)
    loss.value.backward()
    assert loss.count == annotated.sum()
    for logits in found[:3]:
        assert logits.grad is not None
        touched = logits.grad.flatten(2).abs().amax(2) > 0
        assert torch.equal(touched, annotated)
    without = bits.clone()
    without[0] &= ~torch.tensor(1 << 1, dtype=torch.uint8)
    without[1] = 0
    assert localization(noise(), without, annotated, NONE).value == loss.value


def test_nothing_annotated_is_zero_with_a_graph() -> None:
    found = noise()
    loss = localization(found, boxes(), ~ALL, NONE)
    assert (loss.value, loss.count) == (0, 0)
    loss.value.backward()
    for logits in found[:3]:
        assert logits.grad is not None
        assert not logits.grad.any()


def test_perfect_masks_cost_nearly_nothing() -> None:
    bits = boxes()
    assert localization(drawn(masks_of(bits)), bits, ALL, NONE).value < 1e-3
    assert localization(drawn(masks_of(bits.flip(3))), bits, ALL, NONE).value > 1


@pytest.mark.parametrize("lesion", range(N_LESIONS))
def test_each_lesion_reads_its_own_bit(lesion: int) -> None:
    bits = boxes()
    masks = masks_of(bits)
    masks[0, lesion] = 0  # all lesions right but one, which is missed
    annotated = torch.zeros_like(ALL)
    annotated[0] = True
    others = annotated.clone()
    others[0, lesion] = False
    assert localization(drawn(masks), bits, annotated, NONE).value > 0.1
    assert localization(drawn(masks), bits, others, NONE).value < 1e-3


def test_an_absent_lesion_that_was_looked_for_pulls_its_mask_down() -> None:
    found = noise()
    annotated = torch.zeros_like(ALL)
    annotated[1, 0] = True  # not in the second sample
    localization(found, boxes(), annotated, NONE).value.backward()
    assert found.mask_logits.grad is not None
    assert (found.mask_logits.grad[1, 0] > 0).all()


def test_a_lesion_smaller_than_a_patch_marks_its_patch() -> None:
    bits = torch.zeros(1, *GRID, dtype=torch.uint8)
    bits[0, 5, 13, 2] = 1 << 4
    coarse = torch.zeros(1, N_LESIONS, *COARSE, requires_grad=True)
    full, half, match = (torch.zeros(1, N_LESIONS, *size) for size in (GRID, HALF, ()))
    found = LocalizerOutput(full, half, coarse, match, torch.zeros(()))
    localization(found, bits, torch.ones(1, N_LESIONS, dtype=torch.bool), NONE[:1]).value.backward()
    assert coarse.grad is not None
    assert (coarse.grad < 0).nonzero().tolist() == [[0, 4, 1, 1, 0]]


def test_a_partly_outlined_lesion_teaches_where_it_is_drawn_and_nowhere_else() -> None:
    found, bits = noise(), boxes()
    partial = NONE.clone()
    partial[0, 1] = partial[1, 2] = partial[1, 3] = True  # the last one has no outline at all
    loss = localization(found, bits, NONE, partial)
    loss.value.backward()
    assert loss.count == 2
    expected = torch.zeros(())
    for logits, size, weight in zip(found[:3], SIZES, WEIGHTS, strict=True):
        cells = torch.nn.functional.adaptive_max_pool3d(masks_of(bits), size)
        known = cells * partial[:, :, None, None, None]
        assert logits.grad is not None
        assert torch.equal(logits.grad != 0, known.bool())
        # Cross-entropy against 1, no Dice: the mean over a lesion's drawn voxels, then over the two
        # lesions.
        share = weight * known / known.flatten(2).sum(2).clamp_min(1)[:, :, None, None, None] / 2
        torch.testing.assert_close(logits.grad, (logits.detach().sigmoid() - 1) * share)
        expected = expected - (logits.detach().sigmoid().log() * share).sum()
    torch.testing.assert_close(loss.value.detach(), expected)


def test_what_is_empty_in_a_partial_outline_is_neither_right_nor_wrong() -> None:
    bits = boxes()
    partial = NONE.clone()
    partial[0, 4] = True
    masks = masks_of(bits)
    everywhere = masks.clone()
    everywhere[0, 4] = 1
    assert localization(drawn(everywhere), bits, NONE, partial).value < 1e-6
    assert localization(drawn(masks), bits, NONE, partial).value < 1e-6
    assert localization(drawn(masks * 0), bits, NONE, partial).value > 10


def test_partial_outlines_leave_annotated_lesions_as_they_are() -> None:
    bits = boxes()
    annotated, partial = NONE.clone(), NONE.clone()
    annotated[0], partial[1, 2] = True, True
    mixed, alone = noise(), noise()
    loss = localization(mixed, bits, annotated, partial)
    loss.value.backward()
    localization(alone, bits, annotated, NONE).value.backward()
    assert loss.count == N_LESIONS + 1
    assert mixed.patch_logits.grad is not None and alone.patch_logits.grad is not None
    share = N_LESIONS / (N_LESIONS + 1)  # one more lesion takes part in the mean
    torch.testing.assert_close(mixed.patch_logits.grad[0], alone.patch_logits.grad[0] * share)
    assert mixed.mask_logits.grad is not None
    undrawn = masks_of(bits)[1, 2] == 0
    assert not mixed.mask_logits.grad[1, 2][undrawn].any()
    assert mixed.mask_logits.grad[1, 2][~undrawn].all()


def test_partial_without_any_outline_is_zero_with_a_graph() -> None:
    found = noise()
    loss = localization(found, torch.zeros_like(boxes()), NONE, ALL)
    assert (loss.value, loss.count) == (0, 0)
    loss.value.backward()
    for logits in found[:3]:
        assert logits.grad is not None
        assert not logits.grad.any()


def test_partial_lesions_count_in_no_figure(tiny: Config) -> None:
    """Evaluation scores annotated lesions, by the batch's flags and these two functions."""
    sample = phantom_sample(0, tiny)
    key = next(place.lesion for place in make_phantom(0).true_places)
    bit = LESION_BY_KEY[key].bit
    flags = {**sample.meta.lesions_annotated, key: False}
    partial = {**sample.meta.lesions_partial, key: True}
    batch = collate_samples(
        [
            replace(
                sample, meta=replace(sample.meta, lesions_annotated=flags, lesions_partial=partial)
            )
        ]
    )
    assert batch.lesions_partial[0].nonzero().flatten().tolist() == [bit]
    assert not batch.lesions_annotated[0, bit]
    truth = batch.lesions.numpy()[0]
    assert (truth >> bit & 1).any()
    counts = count_lesion_voxels(np.zeros((N_LESIONS, *truth.shape), bool), truth)
    scored = scores(counts[None], batch.lesions_annotated.numpy())["per_lesion"][key]
    assert (scored["n_annotated"], scored["n_present"], scored["n_missed"], scored["dice"]) == (
        0,
        0,
        0,
        None,
    )


def test_soft_dice_is_monais() -> None:
    torch.manual_seed(0)
    logits, masks = torch.randn(2, N_LESIONS, *GRID), masks_of(boxes())
    wanted = DiceLoss(sigmoid=True, reduction="none")(logits, masks).flatten(1)
    own = lesion_loss._soft_dice_loss(logits.flatten(0, 1), masks.flatten(0, 1))
    torch.testing.assert_close(own.view_as(wanted), wanted, rtol=0, atol=1e-7)


def test_report_loss_is_the_mean_over_samples_that_have_one(tiny: Config) -> None:
    per_sample = torch.tensor([3.0, 0.0, 5.0], requires_grad=True)
    report = ReportLoss(per_sample, torch.tensor([7, 0, 9]), torch.zeros(3, 9), 48)
    outputs = ModelOutputs(torch.zeros(3, N_FINDINGS), None, report, 0)
    found = compute_losses(outputs, None, ("report",), TERMS)  # type: ignore[arg-type]  # the batch holds nothing for this task
    assert (found["report"].value, found["report"].count) == (4, 2)
    assert combine_losses(found, tiny.train.loss_weights).item() == pytest.approx(
        4 * tiny.train.loss_weights.report
    )
    found["report"].value.backward()
    assert per_sample.grad is not None
    assert per_sample.grad.tolist() == [0.5, 0, 0.5]


LABELS_SAY = [
    # finding, its label, what is known: present, absent, or nothing
    ("Lung nodule", 1, "lung_nodule", True),
    ("Lung nodule", 0, "lung_nodule", False),
    ("Pleural effusion", 1, "pleural_effusion", True),
    ("Pericardial effusion", 0, "pericardial_effusion", False),
    ("Consolidation", 1, "consolidation", True),
    ("Lung opacity", 0, "ground_glass_opacity", False),
    ("Lung opacity", 1, "ground_glass_opacity", None),
]


@pytest.mark.parametrize(("finding", "label", "lesion", "wanted"), LABELS_SAY)
def test_what_a_label_says_of_a_lesion(
    finding: str, label: int, lesion: str, wanted: bool | None
) -> None:
    labels, known = torch.zeros(1, N_FINDINGS), torch.zeros(1, N_FINDINGS, dtype=torch.bool)
    labels[0, FINDINGS.index(finding)] = label
    assert not infer_lesions_from_labels(labels, known).known.any()
    known[0, FINDINGS.index(finding)] = True
    found = infer_lesions_from_labels(labels, known)
    bit = LESION_BY_KEY[lesion].bit
    assert found.known.nonzero().tolist() == ([] if wanted is None else [[0, bit]])
    assert found.present.nonzero().tolist() == ([[0, bit]] if wanted else [])


def presence(present: Tensor, known: Tensor) -> LesionPresence:
    return LesionPresence(present & known, known)


def test_alignment_reads_labels_where_no_one_outlined() -> None:
    """By hand: the outline where there is one, else the label, and nothing if neither is known."""
    bits, annotated = boxes(), NONE.clone()
    annotated[0, :2], annotated[1, 0] = True, True  # outlined; looked for and absent
    labelled = presence(
        torch.tensor([[0, 0, 1, 0, 0], [1, 0, 0, 1, 0]]).bool(), annotated ^ (torch.arange(5) < 4)
    )
    with_it, without = noise(), noise()
    loss = localization(with_it, bits, annotated, NONE, labelled, alignment=0.3)
    base = localization(without, bits, annotated, NONE, labelled)
    wanted = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 1, 0]]).float()
    known = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 0]]).bool()
    each = torch.nn.functional.binary_cross_entropy_with_logits(
        with_it.alignment_logits, wanted, reduction="none"
    )
    torch.testing.assert_close(loss.value, base.value + 0.3 * each[known].mean())
    assert (loss.count, base.count) == (8, 3)
    loss.value.backward()
    assert with_it.alignment_logits.grad is not None
    assert torch.equal(with_it.alignment_logits.grad != 0, known)
    assert torch.equal(with_it.alignment_logits.grad < 0, known & wanted.bool())


def test_alignment_of_weight_0_is_off_exactly() -> None:
    found = noise()
    localization(found, boxes(), NONE, NONE, LesionPresence(ALL, ALL)).value.backward()
    assert found.alignment_logits.grad is None
    for logits in found[:3]:
        assert logits.grad is not None
        assert not logits.grad.any()


def test_nothing_known_at_all_is_zero_with_a_graph_of_everything() -> None:
    found = noise()
    loss = localization(found, boxes(), NONE, NONE, consistency=0.1, alignment=0.1)
    assert (loss.value, loss.count) == (0, 0)
    loss.value.backward()
    for logits in found[:4]:
        assert logits.grad is not None
        assert not logits.grad.any()


def test_resolutions_that_agree_cost_nothing_and_others_do() -> None:
    bits = boxes()
    agreed = drawn(masks_of(bits))
    assert localization(agreed, bits, ALL, NONE, consistency=1.0).value < 1e-3
    silent = agreed._replace(patch_logits=agreed.patch_logits.abs().neg())
    more = (
        localization(silent, bits, ALL, NONE, consistency=1.0).value
        - localization(silent, bits, ALL, NONE).value
    )
    cells = torch.nn.functional.adaptive_max_pool3d(masks_of(bits), COARSE).mean()
    torch.testing.assert_close(more, cells, rtol=1e-3, atol=1e-4)


def test_consistency_carries_labels_to_masks_and_leaves_partial_outlines_alone() -> None:
    partial, known = NONE.clone(), NONE.clone()
    partial[0, 1], known[1, 4] = True, True
    found = noise()
    localization(
        found, boxes(), NONE, partial, LesionPresence(known, known), consistency=1.0, alignment=1.0
    ).value.backward()
    for logits, size in zip(found[:3], SIZES, strict=True):
        assert logits.grad is not None
        touched = logits.grad != 0
        assert touched[1, 4].all()
        only_drawn = torch.nn.functional.adaptive_max_pool3d(masks_of(boxes()), size)[0, 1].bool()
        assert torch.equal(touched[0, 1], only_drawn)
        touched[1, 4] = touched[0, 1] = False
        assert not touched.any()


@pytest.mark.parametrize("size", [HALF, COARSE])
def test_pooled_probabilities(size: tuple[int, int, int]) -> None:
    """1 where a voxel of the cell is sure, p where all are p, else between mean and largest."""
    torch.manual_seed(0)
    shape = torch.Size(size)
    masks = masks_of(boxes()).flatten(0, 1)
    cells = torch.nn.functional.adaptive_max_pool3d(masks[:, None], size)[:, 0]
    torch.testing.assert_close(lesion_loss._pool_probabilities(masks, shape), cells)
    torch.testing.assert_close(
        lesion_loss._pool_probabilities(torch.full_like(masks, 0.3), shape),
        torch.full_like(cells, 0.3),
    )
    p = torch.rand_like(masks)
    found = lesion_loss._pool_probabilities(p, shape)
    assert (found >= torch.nn.functional.adaptive_avg_pool3d(p[:, None], size)[:, 0]).all()
    assert (found <= torch.nn.functional.adaptive_max_pool3d(p[:, None], size)[:, 0]).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bits": boxes().int()}, "uint8"),
        ({"bits": boxes()[:, :4]}, "masks for lesion bits"),
        ({"bits": boxes()[:1]}, "masks for lesion bits"),
        ({"annotated": ALL.float()}, "annotated must be bool"),
        ({"annotated": ALL[:1]}, "annotated must be bool of shape"),
        ({"partial": NONE[:, :4]}, "partial must be bool of shape"),
        ({"bits": boxes().to("meta")}, "on one device"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Tensor], said: str) -> None:
    right = {"bits": boxes(), "annotated": ALL, "partial": NONE}
    with pytest.raises(AssertionError, match=said):
        localization(noise(), **{**right, **change})
