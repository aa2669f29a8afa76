"""Augmentation: exact identities at zero, everything moves together, sides stay sides."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rectvlm.config import ELASTIC_LATTICE_MM, AugmentConfig, Config
from rectvlm.data.augment import augment_batch
from rectvlm.data.dataset import ShardDataset, collate_samples
from rectvlm.data.warp import SpatialWarp, draw_warps
from rectvlm.labels import AIR_HU, REGIONS
from rectvlm.types import Batch

NOTHING = AugmentConfig(
    probability=1,
    rotate=0,
    tilt=0,
    scale=0,
    shift=0,
    elastic=0,
    contrast=0,
    intensity=0,
    noise=0,
    mirror=0,
    hide_regions=0,
)
STRONG = NOTHING.model_copy(
    update={"rotate": 20.0, "tilt": 8.0, "scale": 0.2, "shift": 0.1, "elastic": 15.0}
)
INTENSE = {"contrast": 0.3, "intensity": 50.0, "noise": 50.0}


@pytest.fixture
def batch(tiny: Config, phantom_shards: Path) -> Batch:
    dataset = ShardDataset(tiny.data.model_copy(update={"shards": str(phantom_shards)}), "train")
    return collate_samples([dataset[k] for k in range(4)])


def able_to_mirror(batch: Batch) -> Batch:
    """The batch without what forbids a mirror image: its reports and its region maps."""
    metas = [replace(meta, findings=None, impression=None) for meta in batch.metas]
    hidden = torch.zeros_like(batch.regions_known)
    return replace(batch, metas=metas, reports=[None] * len(metas), regions_known=hidden)


def volumes(batch: Batch) -> list[torch.Tensor]:
    return [batch.ct, batch.lesions, batch.regions]


def asked(**changes: float) -> AugmentConfig:
    return NOTHING.model_copy(update=changes)


@pytest.mark.parametrize(
    "config",
    [NOTHING, STRONG.model_copy(update={**INTENSE, "probability": 0.0, "mirror": 1.0})],
    ids=["zero", "none"],
)
def test_zero_is_the_identity(batch: Batch, config: AugmentConfig) -> None:
    torch.manual_seed(0)
    changed = augment_batch(batch, config)
    assert changed.ct.dtype == torch.float32
    assert torch.equal(changed.ct, batch.ct.float())
    assert torch.equal(changed.lesions, batch.lesions)
    assert torch.equal(changed.regions, batch.regions)
    assert changed.reports == batch.reports and changed.metas == batch.metas


def test_the_input_is_left_alone(batch: Batch) -> None:
    for ct in (batch.ct, batch.ct.float()):
        given = replace(batch, ct=ct)
        before = [volume.clone() for volume in volumes(given)]
        augment_batch(given, STRONG.model_copy(update=INTENSE))
        augment_batch(able_to_mirror(given), STRONG.model_copy(update={"mirror": 1.0}))
        assert all(torch.equal(a, b) for a, b in zip(volumes(given), before, strict=True))


def test_draws_are_those_of_the_seed(batch: Batch) -> None:
    config = STRONG.model_copy(update={"noise": 20.0, "probability": 0.5})
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(augment_batch(batch, config))
    assert all(
        torch.equal(a, b) for a, b in zip(volumes(results[0]), volumes(results[1]), strict=True)
    )
    assert not torch.equal(results[0].ct, results[2].ct)


def test_a_strength_does_not_change_the_other_draws(batch: Batch) -> None:
    states = []
    for config in (
        NOTHING,
        STRONG.model_copy(update={**INTENSE, "mirror": 0.5, "hide_regions": 0.5}),
    ):
        torch.manual_seed(0)
        augment_batch(batch, config)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_ct_and_masks_move_together(batch: Batch) -> None:
    """CT, mask and region of a bright box still mark the same voxels after any move."""
    shape = batch.ct.shape
    ct, bits, regions = (
        torch.full(shape, AIR_HU, dtype=torch.int16),
        *(torch.zeros(shape, dtype=torch.uint8),) * 2,
    )
    bits, regions = bits.clone(), regions.clone()
    box = (slice(None), slice(5, 11), slice(12, 30), slice(26, 40))
    ct[box], bits[box], regions[box] = 1000, 0b10010, 7
    torch.manual_seed(0)
    moved = augment_batch(replace(batch, ct=ct, lesions=bits, regions=regions), STRONG)
    bright = moved.ct > (1000 + AIR_HU) / 2
    assert bright.any()
    assert not torch.equal(bright, ct > 0)
    for marked in (
        (moved.lesions >> 1 & 1).bool(),
        (moved.lesions >> 4 & 1).bool(),
        moved.regions == 7,
    ):
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
    moved = augment_batch(full, config)
    outside = moved.ct < AIR_HU + 1
    assert outside.any()
    assert (moved.ct >= AIR_HU - 0.1).all()
    assert not moved.lesions[outside].any()
    assert not moved.regions[outside].any()


def test_a_lesion_smaller_than_a_voxel_of_the_moved_grid_keeps_a_voxel(batch: Batch) -> None:
    bits = torch.zeros_like(batch.lesions)
    bits[:, 8, 24, 32] = 1 << 2
    for seed in range(5):
        torch.manual_seed(seed)
        moved = augment_batch(replace(batch, lesions=bits), STRONG)
        assert (moved.lesions == 1 << 2).flatten(1).any(1).all()
        assert (moved.lesions > 0).flatten(1).sum(1).max() <= 8


def full_grid(
    warp: SpatialWarp, shape: tuple[int, int, int], spacing: tuple[float, float, float]
) -> torch.Tensor:
    """Source of each voxel (Z, Y, X, 3) as (z, y, x), mm from the centre of the grid."""
    half = torch.tensor(
        [n * step / 2 for n, step in zip(shape, spacing, strict=True)], dtype=torch.float64
    )
    return warp.sampling_grid(shape, spacing, torch.device("cpu"))[0].double().flip(-1) * half


def jacobian(points: torch.Tensor, spacing: tuple[float, float, float]) -> torch.Tensor:
    """Jacobian by differences of neighbours: 1 without change, 0 and below where tissue folds."""
    inner = points[:-1, :-1, :-1]
    ahead = (points[1:, :-1, :-1], points[:-1, 1:, :-1], points[:-1, :-1, 1:])
    return torch.linalg.det(
        torch.stack([(p - inner) / step for p, step in zip(ahead, spacing, strict=True)], -1)
    )


def test_no_move_mirrors_or_folds(batch: Batch) -> None:
    config = asked(rotate=45.0, tilt=20.0, scale=0.5, shift=0.2, elastic=0.4 * ELASTIC_LATTICE_MM)
    shape, spacing = tuple(batch.ct.shape[1:]), batch.spacing
    torch.manual_seed(0)
    for warp in draw_warps(200, shape, spacing, config):
        assert torch.linalg.det(warp.affine[:, :3]) > 0
        assert warp.affine[0, 0] > 0  # left of the image stays left
    for warp in draw_warps(5, shape, spacing, config):
        assert jacobian(full_grid(warp, shape, spacing), spacing).min() > 0


def test_the_strongest_elastic_move_that_can_be_asked_for_does_not_fold() -> None:
    """Control points at full strength, all towards the middle, squeeze tissue without folds."""
    most, shape, spacing = 0.4 * ELASTIC_LATTICE_MM, (60, 60, 60), (4.0, 4.0, 4.0)
    with pytest.raises(ValueError, match="elastic"):
        AugmentConfig(**{**NOTHING.model_dump(), "elastic": most + 0.1})
    identity = draw_warps(1, shape, spacing, NOTHING)[0]
    points = torch.arange(identity.control_points.shape[0])
    towards = torch.sign(3.5 - points)
    half = shape[0] * spacing[0] / 2
    squeeze = torch.stack(torch.meshgrid(towards, towards, towards, indexing="ij")[::-1], -1)
    smallest = []
    for strength in (most, 1.75 * most):
        warp = SpatialWarp(identity.affine, squeeze * strength / half)
        smallest.append(jacobian(full_grid(warp, shape, spacing), spacing).min())
    assert 0 < smallest[0] < 0.1
    assert smallest[1] < 0


def test_elastic_moves_by_no_more_than_asked_in_millimetres() -> None:
    shape, spacing = (12, 40, 20), (16.0, 4.0, 9.0)
    torch.manual_seed(0)
    here = full_grid(draw_warps(1, shape, spacing, NOTHING)[0], shape, spacing)
    moves = torch.stack(
        [
            full_grid(warp, shape, spacing) - here
            for warp in draw_warps(40, shape, spacing, asked(elastic=10.0))
        ]
    )
    largest = moves.abs().flatten(0, 3).amax(0)
    assert (largest <= 10.001).all() and (largest > 4).all()  # along each axis alike
    assert moves[0].flatten(0, 2).std(0).min() > 0.5  # no mere shift
    step = moves.diff(dim=3).abs().amax() / spacing[2]
    assert step < 2 * 10.0 / ELASTIC_LATTICE_MM  # smooth: a cubic B-spline's slope is at most that


def test_slices_stay_slices_where_no_tilt_is_asked() -> None:
    torch.manual_seed(0)
    linear = torch.stack(
        [w.affine for w in draw_warps(50, (8, 40, 20), (4.0, 0.5, 2.0), asked(rotate=45.0))]
    )
    assert (linear[:, 2, :2] == 0).all() and (linear[:, :2, 2] == 0).all()
    assert (linear[:, 2, 2] == 1).all()


def test_sides_stay_sides(batch: Batch) -> None:
    """The centre of every right region stays to the right (smaller x) of its left twin."""
    right, left = ([r.id for r in REGIONS if r.side == side] for side in ("right", "left"))
    for seed in range(5):
        torch.manual_seed(seed)
        moved = augment_batch(batch, STRONG).regions
        for sample in moved:
            at = [
                torch.isin(sample, torch.tensor(ids, dtype=torch.uint8))
                .nonzero()[:, 2]
                .float()
                .mean()
                for ids in (right, left)
            ]
            assert at[0] < at[1]


def test_rotation_is_rigid_in_millimetres() -> None:
    """With other voxel sizes on each axis, rotation keeps lengths and angles stay in bounds."""
    torch.manual_seed(0)
    spacing, shape = (4.0, 0.5, 2.0), (8, 40, 20)
    warps = draw_warps(50, shape, spacing, asked(rotate=30.0, tilt=10.0))
    half = torch.tensor(
        [n * step / 2 for n, step in zip(shape, spacing, strict=True)], dtype=torch.float64
    ).flip(0)
    in_mm = torch.stack(
        [half[:, None] * warp.affine[:, :3].double() / half[None, :] for warp in warps]
    )
    torch.testing.assert_close(
        in_mm @ in_mm.mT, torch.eye(3).double().expand(50, 3, 3), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        torch.linalg.det(in_mm), torch.ones(50).double(), rtol=1e-5, atol=1e-5
    )
    about_z = torch.atan2(in_mm[:, 1, 0], in_mm[:, 0, 0]).rad2deg().abs().max()
    away_from_z = in_mm[:, 2, 2].clamp(max=1).acos().rad2deg().max()
    assert 20 < about_z < 30.01
    assert 5 < away_from_z < 10 * 2**0.5


def test_intensity_changes_the_ct_alone_and_by_no_more_than_asked(batch: Batch) -> None:
    torch.manual_seed(0)
    changed = augment_batch(batch, NOTHING.model_copy(update={"intensity": 40.0}))
    offset = (changed.ct - batch.ct.float()).flatten(1)
    assert (offset.amax(1) - offset.amin(1) < 0.1).all()
    assert 0 < offset.abs().max() <= 40.1
    noisy = augment_batch(batch, NOTHING.model_copy(update={"noise": 25.0}))
    spread = (noisy.ct - batch.ct.float()).flatten(1).std(1)
    assert (spread <= 25.5).all()
    assert spread.max() > 1
    for result in (changed, noisy):
        assert torch.equal(result.lesions, batch.lesions)
        assert torch.equal(result.regions, batch.regions)


def test_contrast_leaves_air_and_water(batch: Batch) -> None:
    torch.manual_seed(0)
    ct = batch.ct.float()
    changed = augment_batch(batch, asked(contrast=0.2))
    calibrated = ct <= 0
    assert torch.equal(changed.ct[calibrated], ct[calibrated])
    factors = [
        after[before > 0] / before[before > 0] for before, after in zip(ct, changed.ct, strict=True)
    ]
    for factor in factors:
        torch.testing.assert_close(factor, factor[:1].expand_as(factor))
    first = torch.tensor([factor[0] for factor in factors])
    assert (
        ((first - 1).abs() <= 0.2001).all()
        and (first - 1).abs().max() > 0.02
        and first.unique().numel() > 1
    )
    assert torch.equal(changed.lesions, batch.lesions) and torch.equal(
        changed.regions, batch.regions
    )


def test_noise_is_another_in_each_sample(batch: Batch) -> None:
    torch.manual_seed(0)
    noise = (augment_batch(batch, asked(noise=25.0)).ct - batch.ct.float()).flatten(1)
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.05


def test_only_the_asked_share_of_the_changed_samples_is_mirrored(batch: Batch) -> None:
    able = able_to_mirror(batch)
    flipped = able.ct.float().flip(-1)
    assert not (flipped == able.ct).flatten(1).all(1).any()
    torch.manual_seed(0)
    for probability, share, least, most in (
        (1.0, 0.5, 35, 65),
        (0.5, 0.5, 12, 38),
        (1.0, 0.0, 0, 0),
        (1.0, 1.0, 100, 100),
    ):
        config = asked(probability=probability, mirror=share)
        found = 0
        for _ in range(25):
            changed = augment_batch(able, config)
            mirrored = (changed.ct == flipped).flatten(1).all(1)
            assert (mirrored | (changed.ct == able.ct).flatten(1).all(1)).all()
            assert [meta.source.endswith("mirrored") for meta in changed.metas] == mirrored.tolist()
            found += int(mirrored.sum())
        assert least <= found <= most  # of 100


def test_a_sample_that_cannot_be_mirrored_truly_is_not(batch: Batch) -> None:
    """Phantoms have a region map with a middle lobe."""
    torch.manual_seed(0)
    changed = augment_batch(batch, asked(mirror=1.0))
    assert torch.equal(changed.ct, batch.ct.float()) and changed.reports == batch.reports


def test_only_the_chosen_share_changes(batch: Batch) -> None:
    config = STRONG.model_copy(update={"probability": 0.5, "noise": 5.0})
    torch.manual_seed(0)
    changed = sum(
        int((augment_batch(batch, config).ct != batch.ct.float()).flatten(1).any(1).sum())
        for _ in range(20)
    )
    assert 20 < changed < 60  # of 80


def test_hidden_regions_are_unknown_and_nothing_else_changes(batch: Batch) -> None:
    hidden = augment_batch(batch, NOTHING.model_copy(update={"hide_regions": 1.0}))
    assert batch.regions_known.any() and not hidden.regions_known.any()
    torch.testing.assert_close(hidden.regions, batch.regions)
    assert augment_batch(batch, NOTHING).regions_known.equal(batch.regions_known)
