"""Augmentation: exact identities at zero, everything moves together, sides stay sides."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rectvlm.config import AugmentConfig, Config
from rectvlm.data.augment import _affines, augment
from rectvlm.data.loader import ShardDataset, collate
from rectvlm.labels import AIR_HU, REGIONS
from rectvlm.types import Batch

STRONG = AugmentConfig(probability=1, rotate=20, scale=0.2, shift=0.1, intensity=0, noise=0, hide_regions=0)
NOTHING = AugmentConfig(probability=1, rotate=0, scale=0, shift=0, intensity=0, noise=0, hide_regions=0)


@pytest.fixture
def batch(tiny: Config, phantom_shards: Path) -> Batch:
    dataset = ShardDataset(tiny.data.model_copy(update={"shards": str(phantom_shards)}), "train")
    return collate([dataset[k] for k in range(4)])


def volumes(batch: Batch) -> list[torch.Tensor]:
    return [batch.ct, batch.lesions, batch.regions]


@pytest.mark.parametrize(
    "config", [NOTHING, STRONG.model_copy(update={"probability": 0.0, "intensity": 50.0, "noise": 50.0})]
)
def test_zero_is_the_identity(batch: Batch, config: AugmentConfig) -> None:
    torch.manual_seed(0)
    changed = augment(batch, config)
    # Resampling on the very same points leaves rounding of its coordinates in the CT.
    torch.testing.assert_close(changed.ct, batch.ct.float(), rtol=0, atol=0.05)
    assert torch.equal(changed.lesions, batch.lesions)
    assert torch.equal(changed.regions, batch.regions)
    if config.probability == 0:
        assert torch.equal(changed.ct, batch.ct.float())


def test_the_input_is_left_alone(batch: Batch) -> None:
    for ct in (batch.ct, batch.ct.float()):
        given = replace(batch, ct=ct)
        before = [volume.clone() for volume in volumes(given)]
        augment(given, STRONG.model_copy(update={"intensity": 30.0, "noise": 30.0}))
        assert all(torch.equal(a, b) for a, b in zip(volumes(given), before, strict=True))


def test_draws_are_those_of_the_seed(batch: Batch) -> None:
    config = STRONG.model_copy(update={"noise": 20.0, "probability": 0.5})
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(augment(batch, config))
    assert all(torch.equal(a, b) for a, b in zip(volumes(results[0]), volumes(results[1]), strict=True))
    assert not torch.equal(results[0].ct, results[2].ct)


def test_ct_and_masks_move_together(batch: Batch) -> None:
    """A bright box with its own mask and region: after any move the three still mark the same voxels."""
    shape = batch.ct.shape
    ct, bits, regions = torch.full(shape, AIR_HU, dtype=torch.int16), *(torch.zeros(shape, dtype=torch.uint8),) * 2
    bits, regions = bits.clone(), regions.clone()
    box = (slice(None), slice(5, 11), slice(12, 30), slice(26, 40))
    ct[box], bits[box], regions[box] = 1000, 0b10010, 7
    torch.manual_seed(0)
    moved = augment(replace(batch, ct=ct, lesions=bits, regions=regions), STRONG)
    bright = moved.ct > (1000 + AIR_HU) / 2
    assert bright.any()
    assert not torch.equal(bright, ct > 0)
    for marked in ((moved.lesions >> 1 & 1).bool(), (moved.lesions >> 4 & 1).bool(), moved.regions == 7):
        overlap = 2 * (marked & bright).sum() / (marked.sum() + bright.sum())
        assert overlap > 0.9
    assert torch.equal(moved.lesions >> 1 & 1, moved.lesions >> 4 & 1)
    assert set(moved.lesions.unique().tolist()) == {0, 0b10010}
    assert set(moved.regions.unique().tolist()) == {0, 7}


def test_what_enters_from_outside_is_air_without_region(batch: Batch) -> None:
    config = NOTHING.model_copy(update={"shift": 0.4})
    full = replace(
        batch,
        ct=torch.full_like(batch.ct, 50),
        lesions=torch.full_like(batch.lesions, 1),
        regions=torch.full_like(batch.regions, 3),
    )
    torch.manual_seed(0)
    moved = augment(full, config)
    outside = moved.ct < AIR_HU + 1
    assert outside.any()
    assert (moved.ct >= AIR_HU - 0.1).all()
    assert not moved.lesions[outside].any()
    assert not moved.regions[outside].any()


def test_nothing_is_mirrored(batch: Batch) -> None:
    config = AugmentConfig(probability=1, rotate=45, scale=0.5, shift=0.2, intensity=0, noise=0, hide_regions=0)
    torch.manual_seed(0)
    theta = _affines(500, batch.spacing, tuple(batch.ct.shape[1:]), config)
    assert (torch.linalg.det(theta[:, :, :3]) > 0).all()
    assert (theta[:, 2, :2] == 0).all()  # slices stay slices
    assert (theta[:, 0, 0] > 0).all()  # left of the image stays left


def test_sides_stay_sides(batch: Batch) -> None:
    """The centre of every right region stays to the right (smaller x) of its left twin."""
    right, left = ([r.id for r in REGIONS if r.side == side] for side in ("right", "left"))
    for seed in range(5):
        torch.manual_seed(seed)
        moved = augment(batch, STRONG).regions
        for sample in moved:
            at = [
                torch.isin(sample, torch.tensor(ids, dtype=torch.uint8)).nonzero()[:, 2].float().mean()
                for ids in (right, left)
            ]
            assert at[0] < at[1]


def test_rotation_is_rigid_in_millimetres(batch: Batch) -> None:
    """On a grid whose rows and columns differ in size, a rotated distance keeps its length."""
    config = NOTHING.model_copy(update={"rotate": 30.0})
    torch.manual_seed(0)
    spacing, shape = (4.0, 0.5, 2.0), (8, 40, 20)
    theta = _affines(50, spacing, shape, config)[:, :2, :2].double()
    half = torch.tensor([shape[2] * spacing[2], shape[1] * spacing[1]], dtype=torch.float64) / 2
    in_mm = half[:, None] * theta / half[None, :]
    torch.testing.assert_close(in_mm @ in_mm.mT, torch.eye(2).double().expand(50, 2, 2), rtol=1e-5, atol=1e-5)
    assert in_mm[:, 0, 1].abs().max() > 0.1


def test_intensity_changes_the_ct_alone_and_by_no_more_than_asked(batch: Batch) -> None:
    torch.manual_seed(0)
    changed = augment(batch, NOTHING.model_copy(update={"intensity": 40.0}))
    offset = (changed.ct - batch.ct.float()).flatten(1)
    assert (offset.amax(1) - offset.amin(1) < 0.1).all()
    assert 0 < offset.abs().max() <= 40.1
    noisy = augment(batch, NOTHING.model_copy(update={"noise": 25.0}))
    spread = (noisy.ct - batch.ct.float()).flatten(1).std(1)
    assert (spread <= 25.5).all()
    assert spread.max() > 1
    for result in (changed, noisy):
        assert torch.equal(result.lesions, batch.lesions)
        assert torch.equal(result.regions, batch.regions)


def test_only_the_chosen_share_changes(batch: Batch) -> None:
    config = STRONG.model_copy(update={"probability": 0.5, "noise": 5.0})
    torch.manual_seed(0)
    changed = sum(int((augment(batch, config).ct != batch.ct.float()).flatten(1).any(1).sum()) for _ in range(20))
    assert 20 < changed < 60  # of 80


def test_hidden_regions_are_unknown_and_nothing_else_changes(batch: Batch) -> None:
    hidden = augment(batch, NOTHING.model_copy(update={"hide_regions": 1.0}))
    assert batch.regions_known.any() and not hidden.regions_known.any()
    torch.testing.assert_close(hidden.regions, batch.regions)
    assert augment(batch, NOTHING).regions_known.equal(batch.regions_known)
