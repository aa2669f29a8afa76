"""What outlines, labels and region maps teach the masks, and what stays unknown."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import phantom_sample
from torch import Tensor

from rectvlm.config import Config, LocalizationLossWeightsConfig
from rectvlm.data.dataset import collate_samples
from rectvlm.labels import FINDINGS, LESION_BY_KEY, LESIONS, N_FINDINGS, N_LESIONS
from rectvlm.metrics.lesion_overlap import count_lesion_voxels, score_lesion_overlap
from rectvlm.models.localizer import LocalizerOutput
from rectvlm.phantom.phantom import make_phantom
from rectvlm.train import localization_loss as lesion_loss
from rectvlm.train.lesion_targets import (
    LesionPresence,
    LesionTargets,
    collect_lesion_targets,
    find_outlined,
    find_possible_lung,
    infer_lesions_from_labels,
)
from rectvlm.train.localization_loss import localization_loss
from rectvlm.train.task_loss import TargetCounts, TaskLoss

GRID, HALF, PATCHES = (8, 32, 32), (8, 16, 16), (2, 4, 4)
SIZES = (GRID, HALF, PATCHES)
NODULE = LESION_BY_KEY["lung_nodule"].bit
CONSOLIDATION = LESION_BY_KEY["consolidation"].bit
PLEURAL = LESION_BY_KEY["pleural_effusion"].bit
ALL = torch.ones(2, N_LESIONS, dtype=torch.bool)
NONE = ~ALL
UNLABELLED = LesionPresence(NONE, NONE)
TERMS = LocalizationLossWeightsConfig(
    volume=0.5, half_resolution=0.5, patch_resolution=0.5, denoising=0.1, consistency=0, alignment=0
)


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
    at = [masks, *(torch.nn.functional.adaptive_max_pool3d(masks, s) for s in (HALF, PATCHES))]
    logits = ((m * 2 - 1) * sure for m in at)
    return LocalizerOutput(
        *logits, alignment_logits=torch.zeros(masks.shape[:2]), denoising_loss=torch.zeros(())
    )


def noise(count: int = 2) -> LocalizerOutput:
    torch.manual_seed(0)
    logits = [torch.randn(count, N_LESIONS, *size).requires_grad_() for size in SIZES]
    alignment = torch.randn(count, N_LESIONS, requires_grad=True)
    return LocalizerOutput(*logits, alignment, denoising_loss=torch.zeros((), requires_grad=True))


def describe(
    bits: Tensor,
    annotated: Tensor,
    partial: Tensor = NONE,
    labelled: LesionPresence = UNLABELLED,
    lung: Tensor | None = None,
) -> LesionTargets:
    lung = torch.ones_like(bits, dtype=torch.bool) if lung is None else lung
    return LesionTargets(bits, annotated, partial, labelled, lung, voxel_ml=0.1)


def count(targets: LesionTargets) -> TargetCounts:
    outlined = find_outlined(targets.bits) & (targets.annotated | targets.partial)
    return TargetCounts(
        labels=0.0,
        lesions=float(targets.known.sum()),
        reports=0.0,
        outlined=tuple(outlined.sum(0).tolist()),
    )


def localization(found: LocalizerOutput, targets: LesionTargets, **weights: float) -> TaskLoss:
    """What the targets teach, as a step of its own."""
    terms = TERMS.model_copy(update=dict(weights))
    return localization_loss(found, targets, terms, count(targets))


def gradients(found: LocalizerOutput, targets: LesionTargets, **weights: float) -> list[Tensor]:
    """Gradients of the logits at the three resolutions and of the alignment."""
    localization(found, targets, **weights).value.backward()
    return [
        torch.zeros_like(logits) if logits.grad is None else logits.grad for logits in found[:4]
    ]


def labelled(sample: int, lesion: int, present: bool) -> LesionPresence:
    known = NONE.clone()
    known[sample, lesion] = True
    return LesionPresence(known & present, known)


def test_what_no_outline_and_no_label_says_carries_no_loss_and_no_gradient() -> None:
    annotated = ALL.clone()
    annotated[0, 1] = annotated[1, 2] = False
    found, bits = noise(), boxes()
    targets = describe(bits, annotated)
    for gradient in gradients(found, targets)[:3]:
        assert torch.equal(gradient.flatten(2).abs().amax(2) > 0, annotated)
    without = bits.clone()
    without[0] &= ~torch.tensor(1 << 1, dtype=torch.uint8)
    without[1] = 0
    other = localization(noise(), replace(targets, bits=without))
    assert other.value == localization(noise(), targets).value
    assert other.count == annotated.sum()


def test_nothing_known_is_zero_with_a_graph_of_everything() -> None:
    found = noise()
    loss = localization(found, describe(boxes(), NONE), consistency=0.1, alignment=0.1)
    assert (loss.value, loss.count) == (0, 0)
    loss.value.backward()
    for logits in found[:4]:
        assert logits.grad is not None
        assert not logits.grad.any()


def test_recomputing_terms_changes_neither_loss_nor_gradients() -> None:
    found, again = noise(), noise()._replace(recompute=True)
    targets, weights = describe(boxes(), ALL), {"consistency": 0.1, "alignment": 0.1}
    assert (
        localization(found, targets, **weights).value
        == localization(again, targets, **weights).value
    )
    for gradient, gradient_again in zip(
        gradients(found, targets, **weights), gradients(again, targets, **weights), strict=True
    ):
        torch.testing.assert_close(gradient, gradient_again)


def test_terms_are_kept_only_where_they_are_not_recomputed() -> None:
    def count_saved_bytes(found: LocalizerOutput) -> int:
        total = 0

        def add(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(add, lambda tensor: tensor):
            localization(found, describe(boxes(), ALL))
        return total

    recomputed = count_saved_bytes(noise()._replace(recompute=True))
    assert recomputed < count_saved_bytes(noise()) / 5


def test_perfect_masks_cost_nearly_nothing_and_others_do() -> None:
    bits = boxes()
    assert localization(drawn(masks_of(bits)), describe(bits, ALL)).value < 1e-3
    assert localization(drawn(masks_of(bits.flip(3))), describe(bits, ALL)).value > 1


@pytest.mark.parametrize("lesion", range(N_LESIONS))
def test_each_lesion_reads_its_own_bit(lesion: int) -> None:
    bits = boxes()
    masks = masks_of(bits)
    masks[0, lesion] = 0  # all lesions right but one, which is missed
    annotated = torch.zeros_like(ALL)
    annotated[0] = True
    others = annotated.clone()
    others[0, lesion] = False
    assert localization(drawn(masks), describe(bits, annotated)).value > 0.1
    assert localization(drawn(masks), describe(bits, others)).value < 1e-3


@pytest.mark.parametrize("source", ["outlines", "label"])
def test_an_absent_lesion_pulls_its_mask_down_everywhere(source: str) -> None:
    """A label that says absent is an empty outline."""
    annotated = torch.zeros_like(ALL)
    label = UNLABELLED
    if source == "outlines":
        annotated[1, 0] = True
    else:
        label = labelled(1, 0, present=False)
    for gradient in gradients(noise(), describe(boxes(), annotated, labelled=label))[:3]:
        assert (gradient[1, 0] > 0).all()
        gradient[1, 0] = 0
        assert not gradient.any()


def test_an_outline_decides_where_a_label_says_otherwise() -> None:
    for label in (labelled(1, 2, present=False), labelled(0, 3, present=True)):
        with_label = gradients(noise(), describe(boxes(), ALL, labelled=label))
        for found, wanted in zip(
            with_label, gradients(noise(), describe(boxes(), ALL)), strict=True
        ):
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("present", [False, True])
@pytest.mark.parametrize("outline", ["empty", "partial"])
def test_an_outline_is_believed_whatever_a_label_says(outline: str, present: bool) -> None:
    """An outline without a voxel, of a lesion that was looked for, and one that is partial."""
    sample, lesion = (1, 0) if outline == "empty" else (0, CONSOLIDATION)
    outlined = NONE.clone()
    outlined[sample, lesion] = True
    annotated, partial = (outlined, NONE) if outline == "empty" else (NONE, outlined)
    targets = describe(boxes(), annotated, partial)
    with_label = replace(targets, labelled=labelled(sample, lesion, present))
    found = gradients(noise(), with_label, alignment=0.1)
    assert (found[3][sample, lesion] > 0) == (outline == "empty")
    for one, other in zip(found, gradients(noise(), targets, alignment=0.1), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-9)


def test_a_lesion_smaller_than_a_patch_marks_its_patch() -> None:
    bits = torch.zeros(1, *GRID, dtype=torch.uint8)
    bits[0, 5, 25, 2] = 1 << NODULE
    found = noise(1)
    patches = gradients(
        found, describe(bits, ALL[:1], NONE[:1], LesionPresence(NONE[:1], NONE[:1]))
    )[2]
    assert (patches < 0).nonzero().tolist() == [[0, NODULE, 1, 3, 0]]


def test_a_partial_outline_teaches_its_surroundings_and_places_outside_the_lungs() -> None:
    bits = torch.zeros(2, *GRID, dtype=torch.uint8)
    bits[0, 1:3, 1:6, 1:6] = 1 << CONSOLIDATION
    partial = NONE.clone()
    partial[0, CONSOLIDATION] = True
    lung = torch.ones(2, *GRID, dtype=torch.bool)
    lung[0, :, 24:] = False
    near = torch.zeros_like(lung)
    near[0, :, :16, :16] = True  # the patch of the outline and those around it
    full = gradients(noise(), describe(bits, NONE, partial, lung=lung))[0][0, CONSOLIDATION]
    outline = bits[0].bool()
    assert (full[outline] < 0).all()
    assert (full[near[0] & ~outline] > 0).all()
    assert (full[~lung[0]] > 0).all()
    assert not full[~near[0] & lung[0]].any()


def test_what_no_one_outlined_in_a_partial_outline_is_neither_right_nor_wrong() -> None:
    bits = torch.zeros(2, *GRID, dtype=torch.uint8)
    bits[0, 1:3, 1:6, 1:6] = 1 << CONSOLIDATION
    partial = NONE.clone()
    partial[0, CONSOLIDATION] = True
    masks = masks_of(bits)
    elsewhere = masks.clone()
    elsewhere[0, CONSOLIDATION, :, 24:, 24:] = 1
    targets = describe(bits, NONE, partial)
    assert localization(drawn(masks), targets).value < 1e-3
    assert localization(drawn(elsewhere), targets).value < 1e-3
    assert localization(drawn(masks * 0), targets).value > 1


def test_a_partial_outline_without_a_voxel_leaves_the_word_to_the_label() -> None:
    empty, partial = torch.zeros(2, *GRID, dtype=torch.uint8), NONE.clone()
    partial[0, CONSOLIDATION] = True
    for present in (False, True):
        label = labelled(0, CONSOLIDATION, present)
        found = gradients(noise(), describe(empty, NONE, partial, label))
        for one, other in zip(
            found, gradients(noise(), describe(empty, NONE, NONE, label)), strict=True
        ):
            torch.testing.assert_close(one, other)


def test_a_lesion_that_no_one_outlined_must_be_drawn_somewhere_in_the_lungs() -> None:
    empty, lung = torch.zeros(2, *GRID, dtype=torch.uint8), torch.ones(2, *GRID, dtype=torch.bool)
    lung[:, :, 16:] = False
    targets = describe(empty, NONE, labelled=labelled(0, CONSOLIDATION, True), lung=lung)
    full = gradients(noise(), targets)[0][0, CONSOLIDATION]
    assert (full[lung[0]] < 0).all()
    assert (full[~lung[0]] > 0).all()
    some = torch.zeros(2, N_LESIONS, *GRID)
    some[0, CONSOLIDATION, 2:6, 2:10, 2:10] = 1
    assert localization(drawn(some), targets).value < localization(drawn(some * 0), targets).value
    misplaced = some.flip(3)
    assert localization(drawn(misplaced), targets).value > localization(drawn(some), targets).value


def test_volumes_of_a_missed_lesion_by_hand() -> None:
    """What is drawn outside the lungs is too much, what is drawn inside is too little."""
    empty, lung = torch.zeros(2, *GRID, dtype=torch.uint8), torch.ones(2, *GRID, dtype=torch.bool)
    lung[:, :, 16:] = False
    found = noise()
    targets = describe(empty, NONE, labelled=labelled(0, CONSOLIDATION, True), lung=lung)
    wanted = torch.zeros(())
    for logits, cell_ml, weight in zip(found[:3], (0.1, 0.4, 25.6), (1.0, 0.5, 0.25), strict=True):
        small_lesions = logits[0, CONSOLIDATION].sigmoid().square() * cell_ml / 5.0
        inside, outside = small_lesions.chunk(2, dim=1)
        wanted = wanted + weight * (outside.sum().log1p() + (1 / inside.sum()).log1p())
    loss = localization(found, targets, volume=1.0, half_resolution=0.5, patch_resolution=0.25)
    torch.testing.assert_close(loss.value, wanted)


def test_what_is_drawn_beside_an_outline_is_no_volume() -> None:
    """There overlap counts."""
    bits, annotated = torch.zeros(2, *GRID, dtype=torch.uint8), NONE.clone()
    bits[0, 1:3, 1:6, 1:6] = 1 << CONSOLIDATION
    annotated[0, CONSOLIDATION] = True
    targets, masks = describe(bits, annotated), torch.zeros(2, N_LESIONS, *GRID)
    for depth, costs in ((16, False), (24, True)):  # the patches around the outline, and more
        masks[0, CONSOLIDATION, :, :depth, :16] = 1
        values = [localization(drawn(masks), targets, volume=v).value.item() for v in (0.0, 1.0)]
        assert (values[1] - values[0] > 0.1) == costs
        assert costs or values[0] == pytest.approx(values[1], abs=1e-6)


@pytest.mark.parametrize("looked_for", [1, N_LESIONS])
def test_the_overlap_of_the_only_outlined_lesion_counts_whole(looked_for: int) -> None:
    bits, annotated = torch.zeros(2, *GRID, dtype=torch.uint8), NONE.clone()
    bits[0, 1:3, 1:6, 1:6] = 1
    annotated[0, :looked_for] = True
    unsure = drawn(torch.zeros(2, N_LESIONS, *GRID), sure=0.0)
    loss = localization(
        unsure, describe(bits, annotated), volume=0.0, half_resolution=0.0, patch_resolution=0.0
    )
    # Dice of 50 voxels among 2048 around them, with p = 1/2 everywhere, and cross-entropy.
    assert loss.value.item() == pytest.approx(1 - 50 / (2048 / 4 + 50) + np.log(2), rel=1e-5)


def test_only_lung_lesions_are_bound_to_the_lungs() -> None:
    empty, nowhere = torch.zeros(2, *GRID, dtype=torch.uint8), torch.zeros(2, *GRID).bool()
    for lesion in LESIONS:
        targets = describe(empty, NONE, labelled=labelled(0, lesion.bit, True), lung=nowhere)
        pulls_down = (gradients(noise(), targets)[0][0, lesion.bit] > 0).all()
        assert bool(pulls_down) == (lesion.site == "lung")


def test_lungs_are_lobes_and_what_is_near_them() -> None:
    regions = torch.zeros(3, 8, 8, 8, dtype=torch.uint8)
    regions[:, 3, 3, 3] = 4
    regions[1] = 7  # a map that has the heart alone
    known = torch.tensor([True, True, False])
    lung = find_possible_lung(regions, known, (10.0, 5.0, 16.0))
    near = torch.zeros(8, 8, 8, dtype=torch.bool)
    near[2:5, 0:7, 3] = True
    assert torch.equal(lung[0], near)
    assert lung[1:].all()


@pytest.mark.parametrize("consistency", [0.0, 0.1])
def test_the_gradient_does_not_depend_on_how_samples_are_cut_into_micro_batches(
    consistency: float,
) -> None:
    """4 × 1, 2 × 2 and 1 × 4: an engine averages the gradients of the micro-batches."""
    bits = torch.cat([boxes(), boxes().flip(2)])
    bits[3] = 0
    annotated = torch.rand(4, N_LESIONS, generator=torch.Generator().manual_seed(1)) < 0.5
    partial = ~annotated & torch.tensor([[True], [False], [True], [False]])
    known = torch.ones_like(annotated)
    known[1] = False
    labels = LesionPresence(known & torch.tensor([True, False, True, False, True]), known)
    lung = torch.ones_like(bits, dtype=torch.bool)
    lung[:, :, :8] = False
    whole = describe(bits, annotated, partial, labels, lung)
    terms = TERMS.model_copy(update={"consistency": consistency, "alignment": 0.1})

    def gradient(size: int) -> list[Tensor]:
        found = noise(4)
        total = torch.zeros(())
        parts = [slice(first, first + size) for first in range(0, 4, size)]
        counts = TargetCounts.from_list([n / len(parts) for n in count(whole).to_list()])
        for part in parts:
            targets = describe(
                bits[part],
                annotated[part],
                partial[part],
                LesionPresence(labels.present[part], labels.known[part]),
                lung[part],
            )
            logits = LocalizerOutput(*(t[part] for t in found[:4]), found.denoising_loss)
            total = total + localization_loss(logits, targets, terms, counts).value / len(parts)
        total.backward()
        return [logits.grad for logits in found[:4] if logits.grad is not None]

    wanted = gradient(4)
    assert len(wanted) == 4
    for size in (1, 2):
        for found, expected in zip(gradient(size), wanted, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)


FULL_SIZE, FULL_HALF, FULL_PATCHES = (64, 512, 512), (64, 256, 256), (16, 32, 32)
FULL_VOXEL_ML = 5 * 0.75 * 0.75 / 1000


def full_size(bits: Tensor, faint: float = -8.0) -> tuple[LocalizerOutput, LesionTargets]:
    """Masks drawn as outlined, on a background of logits `faint`, and their targets."""
    mask = (bits >> NODULE & 1).float()[:, None]
    sizes = (FULL_SIZE, FULL_HALF, FULL_PATCHES)
    resolutions = [torch.nn.functional.adaptive_max_pool3d(mask, size) for size in sizes]
    logits = []
    for cells in resolutions:
        full = torch.full((1, N_LESIONS, *cells.shape[2:]), faint)
        full[:, NODULE] = torch.where(cells[:, 0] > 0, 8.0, faint)
        logits.append(full)
    found = LocalizerOutput(*logits, torch.zeros(1, N_LESIONS), torch.zeros(()))
    lung = torch.ones(1, *FULL_SIZE, dtype=torch.bool)
    one = slice(1)
    targets = LesionTargets(
        bits, ALL[one], NONE[one], LesionPresence(NONE[one], NONE[one]), lung, FULL_VOXEL_ML
    )
    return found, targets


@pytest.mark.slow
def test_a_lesion_of_100_voxels_that_is_drawn_perfectly_at_full_size_costs_little() -> None:
    bits = torch.zeros(1, *FULL_SIZE, dtype=torch.uint8)
    bits[0, 30:34, 200:205, 200:205] = 1 << NODULE
    found, targets = full_size(bits)
    with torch.no_grad():
        loss = localization(found, targets, consistency=0.1)
        missed = found._replace(mask_logits=torch.full_like(found.mask_logits, -8.0))
        missed_loss = localization(missed, targets)
    assert missed_loss.value > 1
    assert loss.value < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("distance", [8, 200])
def test_a_speck_in_a_healthy_case_gets_the_gradient_of_one_beside_a_lesion(distance: int) -> None:
    """At full size, near the lesion and far from it; within a factor of 3.

    In a step of these two cases, where one has a lesion of each kind and the other none.
    """
    lesion = torch.zeros(1, *FULL_SIZE, dtype=torch.uint8)
    lesion[0, 30:34, 200:205, 200:205] = 1 << NODULE
    speck = (0, NODULE, slice(30, 32), slice(205 + distance, 209 + distance), slice(200, 204))
    found_gradients = []
    for bits in (lesion, torch.zeros_like(lesion)):
        found, targets = full_size(bits)
        masks = found.mask_logits
        masks[speck] = 1.0
        masks.requires_grad_()
        outlined = (1.0,) * N_LESIONS
        counts = TargetCounts(0.0, lesions=2.0 * N_LESIONS, reports=0.0, outlined=outlined)
        localization_loss(found, targets, TERMS, counts).value.backward()
        assert masks.grad is not None
        found_gradients.append(masks.grad[speck].mean().item())
    sick, healthy = found_gradients
    assert 1 / 3 < healthy / sick < 3


def test_halving_a_flood_gains_as_much_as_halving_a_pool() -> None:
    annotated = torch.zeros_like(ALL)
    annotated[0, CONSOLIDATION] = True
    targets = describe(torch.zeros(2, *GRID, dtype=torch.uint8), annotated)

    def cost(depth: int) -> float:
        masks = torch.zeros(2, N_LESIONS, *GRID)
        masks[0, CONSOLIDATION, :, :depth] = 1
        only_full = drawn(masks)._replace(
            half_mask_logits=torch.full((2, N_LESIONS, *HALF), -30.0),
            patch_logits=torch.full((2, N_LESIONS, *PATCHES), -30.0),
        )
        return localization(only_full, targets).value.item()

    large, middle, small = cost(32), cost(16), cost(8)
    assert large - middle == pytest.approx(middle - small, rel=0.02)
    assert large - middle == pytest.approx(TERMS.volume * np.log(2), rel=0.02)


def test_partial_lesions_count_in_no_figure(tiny: Config) -> None:
    """Evaluation scores annotated lesions, by the batch's flags and these two functions."""
    sample = phantom_sample(0, tiny)
    key = next(place.lesion for place in make_phantom(0).true_places)
    bit = LESION_BY_KEY[key].bit
    flags = {**sample.meta.lesions_annotated, key: False}
    partial = {**sample.meta.lesions_partial, key: True}
    meta = replace(sample.meta, lesions_annotated=flags, lesions_partial=partial)
    batch = collate_samples([replace(sample, meta=meta)])
    assert batch.lesions_partial[0].nonzero().flatten().tolist() == [bit]
    assert not batch.lesions_annotated[0, bit]
    truth = batch.lesions.numpy()[0]
    assert (truth >> bit & 1).any()
    counts = count_lesion_voxels(np.zeros((N_LESIONS, *truth.shape), bool), truth)
    scores = score_lesion_overlap(counts[None], batch.lesions_annotated.numpy())
    scored = scores["per_lesion"][key]
    assert (scored["n_annotated"], scored["n_present"], scored["n_missed"]) == (0, 0, 0)
    assert scored["dice"] is None


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


def test_alignment_reads_labels_where_no_one_outlined() -> None:
    """By hand: the outline where there is one, else the label, and nothing if neither is known."""
    bits, annotated = boxes(), NONE.clone()
    annotated[0, :2], annotated[1, 0] = True, True  # outlined; looked for and absent
    known_labels = annotated ^ (torch.arange(5) < 4)
    present = torch.tensor([[0, 0, 1, 0, 0], [1, 0, 0, 1, 0]]).bool() & known_labels
    targets = describe(bits, annotated, labelled=LesionPresence(present, known_labels))
    found = noise()
    loss = localization(found, targets, alignment=0.3)
    base = localization(noise(), targets)
    wanted = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 1, 0]]).float()
    known = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 0]]).bool()
    each = torch.nn.functional.binary_cross_entropy_with_logits(
        found.alignment_logits, wanted, reduction="none"
    )
    torch.testing.assert_close(loss.value, base.value + 0.3 * each[known].mean())
    assert loss.count == 8
    loss.value.backward()
    assert found.alignment_logits.grad is not None
    assert torch.equal(found.alignment_logits.grad != 0, known)
    assert torch.equal(found.alignment_logits.grad < 0, known & wanted.bool())


def test_resolutions_that_agree_cost_nothing_and_others_do() -> None:
    bits = boxes()
    targets, agreed = describe(bits, ALL), drawn(masks_of(bits))
    assert localization(agreed, targets, consistency=1.0).value < 1e-3
    silent = agreed._replace(patch_logits=agreed.patch_logits.abs().neg())
    more = (
        localization(silent, targets, consistency=1.0).value - localization(silent, targets).value
    )
    cells = torch.nn.functional.adaptive_max_pool3d(masks_of(bits), PATCHES).mean()
    torch.testing.assert_close(more, cells, rtol=1e-3, atol=1e-4)


def test_consistency_leaves_partial_outlines_alone() -> None:
    partial = NONE.clone()
    partial[0, 1] = True
    label = labelled(1, NODULE, present=True)
    targets = describe(boxes(), NONE, partial, label)
    with_it = gradients(noise(), targets, consistency=1.0)
    without = gradients(noise(), targets)
    for one, other in zip(with_it[:3], without[:3], strict=True):
        differs = (one - other).abs().flatten(2).amax(2) > 1e-7
        assert differs.nonzero().tolist() == [[1, NODULE]]


@pytest.mark.parametrize("size", [HALF, PATCHES])
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


def test_counts_of_a_batch_are_those_of_its_targets(tiny: Config) -> None:
    """One sample whose outlines are partial, one that no one outlined, both with labels."""
    sample = phantom_sample(0, tiny)
    nothing = dict.fromkeys(sample.meta.lesions_annotated, False)
    every = dict.fromkeys(nothing, True)
    metas = [
        replace(sample.meta, lesions_annotated=nothing, lesions_partial=partial)
        for partial in (every, nothing)
    ]
    batch = collate_samples([replace(sample, meta=meta) for meta in metas])
    counts, targets = TargetCounts.of_batch(batch), collect_lesion_targets(batch)
    assert targets.labelled.known[1].any()
    assert counts.lesions == N_LESIONS + targets.labelled.known[1].sum()
    held = [float((sample.lesions >> bit & 1).any()) for bit in range(N_LESIONS)]
    assert counts.outlined == tuple(held) and 0 < sum(held) < N_LESIONS


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bits": boxes().int()}, "uint8"),
        ({"bits": boxes()[:, :4]}, "masks for lesion bits"),
        ({"bits": boxes()[:1]}, "masks for lesion bits"),
        ({"annotated": ALL.float()}, "annotated must be bool"),
        ({"annotated": ALL[:1]}, "annotated must be bool of shape"),
        ({"partial": NONE[:, :4]}, "partial must be bool of shape"),
        ({"lung": boxes()}, "lung must be bool"),
        ({"bits": boxes().to("meta")}, "on one device"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Tensor], said: str) -> None:
    right = describe(boxes(), ALL)
    with pytest.raises(AssertionError, match=said):
        localization_loss(noise(), replace(right, **change), TERMS, count(right))
