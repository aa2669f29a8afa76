"""The canonical grid: sides come from the affine in every axis order, and masks go back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from rectvlm.data.canonical_grid import (
    canonical_affine,
    mask_to_native,
    require_overlap,
    resample_to_grid,
)
from rectvlm.labels import LESIONS
from rectvlm.lesion_bits import lesion_mask, unpack_lesions
from rectvlm.types import UserError
from tests.data.chest_volume import EFFUSION, NODULE, RAS, SHAPE, chest, paint_chest
from tests.grids import ORDERS, dice, reorder


def lesion_dice(bits: NDArray, expected: NDArray, bit: int) -> float:
    return dice(lesion_mask(bits, LESIONS[bit]), lesion_mask(expected, LESIONS[bit]))


def canonical(
    hu: NDArray, lesions: NDArray, affine: NDArray, grid: tuple, spacing: tuple
) -> tuple[NDArray, ...]:
    placed = canonical_affine(affine, hu.shape, hu, grid, spacing)
    ct = resample_to_grid(hu, affine, placed, grid, "ct")
    bits = resample_to_grid(lesions, affine, placed, grid, "bits")
    labels = resample_to_grid(lesions, affine, placed, grid, "labels")
    return placed, ct, bits, labels


GRIDS = {
    "equal": ((16, 40, 44), (16.0, 8.0, 8.0)),
    "coarser": ((12, 24, 24), (22.0, 15.0, 15.0)),
    "finer": ((32, 60, 50), (7.0, 5.0, 5.5)),
    "shorter": ((8, 40, 44), (16.0, 8.0, 8.0)),
}


@pytest.mark.parametrize("name", GRIDS)
def test_all_48_axis_orders_give_one_canonical_sample(name: str) -> None:
    grid, spacing = GRIDS[name]
    hu, lesions = chest()
    placed, ct, bits, labels = canonical(hu, lesions, RAS, grid, spacing)
    # z to superior, y to posterior, x to the patient's left.
    np.testing.assert_allclose(
        placed[:3, :3], np.array([[0, 0, -1], [0, -1, 0], [1, 0, 0]]) * spacing
    )
    for order, flips in ORDERS:
        native, affine = reorder(hu, RAS, order, flips)
        mask, _ = reorder(lesions, RAS, order, flips)
        one_placed, one_ct, one_bits, one_labels = canonical(native, mask, affine, grid, spacing)
        np.testing.assert_allclose(one_placed, placed, atol=1e-6)
        assert (
            np.abs(one_ct.astype(int) - ct).max() <= 1
        )  # float32 sums differ in their last digit before rounding
        np.testing.assert_array_equal(one_bits, bits)
        np.testing.assert_array_equal(one_labels, labels)


@pytest.mark.parametrize("name", GRIDS)
def test_the_patients_left_is_at_large_x_and_back_at_large_y(name: str) -> None:
    grid, spacing = GRIDS[name]
    hu, lesions = chest()
    placed, ct, bits, _ = canonical(hu, lesions, RAS, grid, spacing)
    middle = (np.array(grid) - 1) / 2
    for bit, side in ((2, 1), (4, 1), (1, -1)):
        where = np.argwhere(lesion_mask(bits, LESIONS[bit])).mean(axis=0)
        assert (where[2] - middle[2]) * side > 0.1 * grid[2]
        native = np.argwhere(lesion_mask(lesions, LESIONS[bit])).mean(axis=0)
        gap = (placed @ [*where, 1])[:3] - (RAS @ [*native, 1])[:3]
        assert np.abs(gap)[: 2 if name == "shorter" else 3].max() < max(spacing) / 2
    spine = np.argwhere(ct > 300).mean(axis=0)
    assert spine[1] > middle[1] + 0.1 * grid[1]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(ORDERS), st.integers(0, 2**32 - 1))
def test_a_mask_that_goes_in_and_comes_out_agrees_with_itself(order: tuple, seed: int) -> None:
    """At equal sampling, in any axis order; the blob is lopsided, so that a wrong side shows."""
    rng = np.random.default_rng(seed)
    hu, lesions = chest()
    corner = rng.integers((26, 4, 2), (34, 10, 5))
    for size, bit in (((6, 12, 4), 0), ((3, 3, 3), 3)):
        lesions[tuple(slice(c, c + s) for c, s in zip(corner, size, strict=True))] |= LESIONS[
            bit
        ].mask_value
    native, affine = reorder(hu, RAS, *order)
    mask, _ = reorder(lesions, RAS, *order)
    grid, spacing = GRIDS["equal"]
    placed, _, bits, _ = canonical(native, mask, affine, grid, spacing)
    back = mask_to_native(bits, placed, native.shape, affine)
    assert back.shape == native.shape and back.dtype == np.uint8
    probabilities = (unpack_lesions(bits) * 0.8).astype(np.float32)
    for bit in range(5):
        assert lesion_dice(back, mask, bit) >= 0.99
    home = mask_to_native(probabilities, placed, native.shape, affine)
    for bit in range(5):
        assert lesion_dice(home, mask, bit) >= 0.9
    wrong_side = np.flip(mask, order[0].index(0))
    assert lesion_dice(back, wrong_side, 1) < 0.5


def test_a_finer_grid_returns_the_same_mask() -> None:
    hu, lesions = chest()
    placed, _, bits, _ = canonical(hu, lesions, RAS, (48, 120, 120), (16 / 3, 8 / 3, 8 / 3))
    back = mask_to_native(bits, placed, SHAPE, RAS)
    for bit in (1, 2, 4):
        assert lesion_dice(back, lesions, bit) >= 0.99


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(ORDERS), st.lists(st.floats(-20, 20), min_size=3, max_size=3))
def test_oblique_volumes_give_the_straight_sample(order: tuple, angles: list[float]) -> None:
    grid, spacing = GRIDS["coarser"]
    placed, ct, bits, _ = canonical(*chest(), RAS, grid, spacing)
    shape = (60, 56, 30)
    tilt = np.eye(4)
    tilt[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    centred = RAS.copy()
    centred[:3, 3] = -RAS[:3, :3] @ (np.array(shape) - 1) / 2
    affine = tilt @ centred
    affine[2, 3] += 1020
    hu, lesions = paint_chest(affine, shape)
    native, turned = reorder(np.rint(hu).astype(np.int16), affine, *order)
    mask, _ = reorder(lesions, affine, *order)
    tilted = resample_to_grid(native, turned, placed, grid, "ct")
    inner = (slice(2, -2),) * 3
    assert np.abs(tilted.astype(int) - ct)[inner].mean() < 60
    tilted_bits = resample_to_grid(mask, turned, placed, grid, "bits")
    back = mask_to_native(tilted_bits, placed, native.shape, turned)
    # Of 1,289 random tilts the worst gave 0.840 and 0.800: the border voxels of a small lesion fall
    # otherwise on another grid.
    for bit in (1, 2):
        assert lesion_dice(tilted_bits, bits, bit) > 0.8
        assert lesion_dice(tilted_bits, bits[..., ::-1], bit) < 0.3
        assert lesion_dice(back, mask, bit) > 0.77


@pytest.mark.parametrize(
    ("angles", "orders"),
    [
        ((12, -9, 14), ORDERS[::7]),
        *(
            pytest.param(angles, ORDERS, marks=pytest.mark.slow)
            for angles in ((0, 0, 17), (12, -9, 14), (-20, 15, -25))
        ),
    ],
)
def test_axis_orders_of_an_oblique_volume_give_one_canonical_sample(
    angles: tuple, orders: list
) -> None:
    """Each file is placed by itself; left stays left, at the painted world coordinates."""
    grid, spacing = GRIDS["coarser"]
    tilt = np.eye(4)
    tilt[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    shape, centred = (56, 52, 26), RAS.copy()
    centred[:3, 3] = -RAS[:3, :3] @ (np.array(shape) - 1) / 2
    affine = tilt @ centred
    affine[2, 3] += 1020
    hu, lesions = paint_chest(affine, shape)
    hu = np.rint(hu).astype(np.int16)
    placed, ct, bits, _ = canonical(hu, lesions, affine, grid, spacing)
    painted = paint_chest(placed @ np.eye(4)[:, [2, 1, 0, 3]], grid[::-1])[1].transpose(2, 1, 0)
    for bit in (1, 2):
        assert lesion_dice(bits, painted, bit) > 0.8
        assert lesion_dice(bits[..., ::-1], painted, bit) < 0.3
    for order, flips in orders:
        native, turned = reorder(hu, affine, order, flips)
        mask, _ = reorder(lesions, affine, order, flips)
        one_placed, one_ct, one_bits, _ = canonical(native, mask, turned, grid, spacing)
        np.testing.assert_allclose(one_placed, placed, atol=1e-6)
        assert np.abs(one_ct.astype(int) - ct).max() <= 1
        np.testing.assert_array_equal(one_bits, bits)


def test_oblique_placement_is_canonical_and_centred() -> None:
    tilt = np.eye(4)
    tilt[:3, :3] = Rotation.from_euler("z", 10, degrees=True).as_matrix()
    hu, _ = paint_chest(tilt @ RAS, SHAPE)
    placed = canonical_affine(tilt @ RAS, SHAPE, hu.astype(np.int16), *GRIDS["equal"])
    np.testing.assert_allclose(
        placed[:3, :3], np.array([[0, 0, -1], [0, -1, 0], [1, 0, 0]]) * [16, 8, 8]
    )
    centre = (placed @ [7.5, 19.5, 21.5, 1])[:3]
    assert np.abs(centre[:2]).max() < 12


@pytest.mark.parametrize(("lungs", "edges"), [((24, 30), (136, 296)), ((33, 39), (160, 320))])
def test_a_short_grid_is_centred_on_the_lungs_within_the_volume(
    lungs: tuple[int, int], edges: tuple[int, int]
) -> None:
    """A body in air, 320 mm long, on a grid of 160 mm."""
    hu = np.full((44, 40, 40), -1000, np.int16)
    hu[6:38, 6:34] = 40
    for columns in (slice(9, 20), slice(24, 35)):
        hu[columns, 12:28, slice(*lungs)] = -850
    affine = np.diag([8.0, 8.0, 8.0, 1.0])
    affine[2, 3] = 4.0
    placed = canonical_affine(affine, hu.shape, hu, (20, 40, 44), (8.0, 8.0, 8.0))
    assert [(placed @ [z, 0, 0, 1])[2] for z in (-0.5, 19.5)] == pytest.approx(edges)


@pytest.mark.parametrize(("n_slices", "edge"), [(33, 892), (35, 876)])
def test_the_grid_moves_to_the_nearest_voxel_edge(n_slices: int, edge: float) -> None:
    """Centred, its edge lies 4 or 12 mm below the volume's at 892 mm; voxels are 16 mm long."""
    placed = canonical_affine(RAS, SHAPE, chest()[0], (n_slices, 40, 44), (8.0, 8.0, 8.0))
    assert (placed @ [-0.5, 0, 0, 1])[2] == pytest.approx(edge)


def test_downsampling_is_the_mean_of_blocks_and_outside_is_air() -> None:
    rng = np.random.default_rng(0)
    hu = rng.integers(-1000, 1000, (12, 12, 8)).astype(np.int16)
    affine = np.diag([-1.0, -1.0, 2.0, 1.0])
    target = np.array([[0, 0, -3.0, -1.0], [0, -3.0, 0, -1.0], [8.0, 0, 0, 3.0], [0, 0, 0, 1]])
    blocks = hu.reshape(4, 3, 4, 3, 2, 4).mean(axis=(1, 3, 5)).transpose(2, 1, 0)
    got = resample_to_grid(hu, affine, target, (3, 5, 4), "ct")
    assert np.abs(got[:2, :4] - blocks).max() <= 0.51
    assert (got[2] == -1024).all() and (got[:, 4] == -1024).all()
    half = target.copy()
    half[2, 3] = -1.0
    edge = resample_to_grid(hu, affine, half, (1, 4, 4), "ct")[0]
    first = hu.reshape(4, 3, 4, 3, 8).mean(axis=(1, 3))[:, :, :2].mean(axis=2).T
    assert np.abs(edge - (first - 1024) / 2).max() <= 0.51


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(ORDERS), st.lists(st.integers(2, 13), min_size=3, max_size=3), st.floats(0, 30)
)
def test_a_lesion_never_disappears(order: tuple, place: list[int], angle: float) -> None:
    """One voxel and a plate beside it, straight or oblique, on a grid 100 times as coarse."""
    mask = np.zeros((16, 16, 16), np.uint8)
    mask[tuple(place)] |= NODULE
    mask[place[0], :, 3] |= EFFUSION
    tilt = np.eye(4)
    tilt[:3, :3] = Rotation.from_euler("y", angle, degrees=True).as_matrix()
    native, affine = reorder(mask, tilt, *order)
    target = np.array([[0, 0, -5.0, 25], [0, -5.0, 0, 25], [5.0, 0, 0, -25], [0, 0, 0, 1]])
    bits = resample_to_grid(native, affine, target, (11, 11, 11), "bits")
    nodule = np.argwhere(bits & NODULE)
    assert len(nodule) == 1 and (bits & EFFUSION).any()
    gap = (target @ [*nodule[0], 1])[:3] - (tilt @ [*place, 1])[:3]
    assert np.abs(gap).max() <= 2.5 + 1e-5


def test_each_of_two_nodules_stays_and_one_outside_the_grid_does_not() -> None:
    mask = np.zeros((30, 30, 30), np.uint8)
    mask[4, 4, 4] = mask[20, 4, 4] = mask[29, 29, 29] = NODULE
    target = np.array([[0, 0, -6.0, 23], [0, -6.0, 0, 23], [6.0, 0, 0, 2], [0, 0, 0, 1]])
    assert np.count_nonzero(resample_to_grid(mask, np.eye(4), target, (4, 4, 4), "bits")) == 2


@pytest.mark.parametrize(
    "voxels",
    [
        pytest.param([(4, 2, 2), (5, 2, 2), (6, 2, 2)], id="row"),
        pytest.param([(5, 5, 4), (5, 5, 5), (6, 6, 6)], id="corner"),
    ],
)
def test_a_small_lesion_keeps_one_voxel_where_most_of_it_lies(voxels: list) -> None:
    """Two voxels lie in the grid's first cell of 6 mm, the third in the next one."""
    mask = np.zeros((24, 24, 24), np.uint8)
    mask[tuple(np.transpose(voxels))] = NODULE
    target = np.array([[0, 0, -6.0, 20.5], [0, -6.0, 0, 20.5], [6.0, 0, 0, 2.5], [0, 0, 0, 1]])
    bits = resample_to_grid(mask, np.eye(4), target, (4, 4, 4), "bits")
    assert np.argwhere(bits).tolist() == [[0, 3, 3]]


def test_labels_between_two_voxels_are_the_same_in_every_axis_order() -> None:
    """At twice the spacing, each centre lies on the border of two voxels along every axis."""
    labels = np.random.default_rng(0).integers(1, 250, (8, 6, 10)).astype(np.uint8)
    target = np.array([[0, 0, -2.0, 6.5], [0, -2.0, 0, 4.5], [2.0, 0, 0, 0.5], [0, 0, 0, 1]])
    expected = resample_to_grid(labels, np.eye(4), target, (5, 3, 4), "labels")
    assert expected.all()
    for order, flips in ORDERS:
        native, affine = reorder(labels, np.eye(4), order, flips)
        got = resample_to_grid(native, affine, target, (5, 3, 4), "labels")
        np.testing.assert_array_equal(got, expected)


def test_a_mask_elsewhere_is_refused() -> None:
    require_overlap(np.eye(4), (10, 10, 10), np.diag([-1.0, -1.0, 1.0, 1.0]), (10, 10, 10))
    with pytest.raises(UserError, match="does not lie on its volume"):
        require_overlap(np.eye(4), (10, 10, 10), RAS, SHAPE, "mask.nii")
