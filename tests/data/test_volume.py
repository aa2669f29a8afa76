"""Volumes: sides come from the affine in every axis order, HU by evidence, masks go home, broken files are named."""

import gzip
import itertools
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import nibabel as nib
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
from rectvlm.data.hounsfield import to_hu
from rectvlm.data.volume import read_mask, read_volume
from rectvlm.types import UserError, Volume

SHAPE, SPACING = (44, 40, 16), (8.0, 8.0, 16.0)
RAS = np.array([[8.0, 0, 0, -170], [0, 8.0, 0, -160], [0, 0, 16.0, 900], [0, 0, 0, 1]])
ORDERS = [
    (p, f)
    for p in itertools.permutations(range(3))
    for f in itertools.product((False, True), repeat=3)
]


def world(affine: NDArray, shape: tuple[int, ...]) -> NDArray:
    return np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]


def paint(affine: NDArray, shape: tuple[int, ...]) -> tuple[NDArray, NDArray]:
    """A chest and its lesions as functions of the place in the world, so that no axis convention enters.

    The heart lies to the patient's left (negative x in RAS); consolidation is a slanted ellipsoid in the left lung,
    a nodule lies within it, and an effusion behind the right lung.
    """
    x, y, z = np.moveaxis(world(affine, shape), -1, 0)
    z = z - 1020
    hu = np.full(shape, -1000.0)
    hu[(x / 150) ** 2 + (y / 110) ** 2 < 1] = 40
    for side in (-1, 1):
        hu[((x - side * 70) / 52) ** 2 + (y / 80) ** 2 + (z / 130) ** 2 < 1] = -850
    hu[((x + 25) / 40) ** 2 + ((y - 25) / 40) ** 2 + (z / 50) ** 2 < 1] = 45
    hu[(x / 15) ** 2 + ((y + 85) / 15) ** 2 < 1] = 500
    lesions = np.zeros(shape, np.uint8)
    lesions[
        ((x + 80 + z / 4) / 34) ** 2 + ((y - y / 9 + 20) / 45) ** 2 + ((z - 20) / 60) ** 2 < 1
    ] |= 1 << 2
    lesions[((x + 80) / 14) ** 2 + ((y + 20) / 14) ** 2 + ((z - 30) / 24) ** 2 < 1] |= 1 << 4
    lesions[((x - 75) / 42) ** 2 + ((y + 60) / 26) ** 2 + ((z + 40) / 70) ** 2 < 1] |= 1 << 1
    hu[lesions > 0] = 20
    # A gentle ramp instead of noise: enough grey levels, and the same wherever it is sampled.
    return hu + 0.05 * x + 0.03 * y + 0.02 * z, lesions


def chest() -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    hu, lesions = paint(RAS, SHAPE)
    return np.rint(hu).astype(np.int16), lesions


def reorder(array: NDArray, affine: NDArray, order: tuple, flips: tuple) -> tuple[NDArray, NDArray]:
    """The same voxels in another axis order, with the affine that says so."""
    out, matrix = array.transpose(order), affine[:, [*order, 3]].copy()
    for axis in np.flatnonzero(flips):
        out = np.flip(out, axis)
        matrix[:3, 3] += matrix[:3, axis] * (out.shape[axis] - 1)
        matrix[:3, axis] *= -1
    return np.ascontiguousarray(out), matrix


def dice(a: NDArray, b: NDArray) -> float:
    return 2 * np.count_nonzero(a & b) / max(1, np.count_nonzero(a) + np.count_nonzero(b))


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
        where = np.argwhere(bits >> bit & 1).mean(axis=0)
        assert (where[2] - middle[2]) * side > 0.1 * grid[2]
        native = np.argwhere(lesions >> bit & 1).mean(axis=0)
        gap = (placed @ [*where, 1])[:3] - (RAS @ [*native, 1])[:3]
        assert np.abs(gap)[: 2 if name == "shorter" else 3].max() < max(spacing) / 2
    spine = np.argwhere(ct > 300).mean(axis=0)
    assert spine[1] > middle[1] + 0.1 * grid[1]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(ORDERS), st.integers(0, 2**32 - 1))
def test_a_mask_that_goes_in_and_comes_out_agrees_with_itself(order: tuple, seed: int) -> None:
    """At equal sampling, whatever the axis order; a lopsided blob, so that a wrong side or a swap would show."""
    rng = np.random.default_rng(seed)
    hu, lesions = chest()
    corner = rng.integers((26, 4, 2), (34, 10, 5))
    for size, bit in (((6, 12, 4), 0), ((3, 3, 3), 3)):
        lesions[tuple(slice(c, c + s) for c, s in zip(corner, size, strict=True))] |= 1 << bit
    native, affine = reorder(hu, RAS, *order)
    mask, _ = reorder(lesions, RAS, *order)
    grid, spacing = GRIDS["equal"]
    placed, _, bits, _ = canonical(native, mask, affine, grid, spacing)
    back = mask_to_native(bits, placed, native.shape, affine)
    assert back.shape == native.shape and back.dtype == np.uint8
    probabilities = np.stack([(bits >> bit & 1) * 0.8 for bit in range(5)]).astype(np.float32)
    for bit in range(5):
        assert dice(back >> bit & 1, mask >> bit & 1) >= 0.99
    home = mask_to_native(probabilities, placed, native.shape, affine)
    for bit in range(5):
        assert dice(home >> bit & 1, mask >> bit & 1) >= 0.9
    wrong_side = np.flip(mask, order[0].index(0))
    assert dice(back >> 1 & 1, wrong_side >> 1 & 1) < 0.5


def test_a_finer_grid_returns_the_same_mask() -> None:
    hu, lesions = chest()
    placed, _, bits, _ = canonical(hu, lesions, RAS, (48, 120, 120), (16 / 3, 8 / 3, 8 / 3))
    back = mask_to_native(bits, placed, SHAPE, RAS)
    for bit in (1, 2, 4):
        assert dice(back >> bit & 1, lesions >> bit & 1) >= 0.99


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
    hu, lesions = paint(affine, shape)
    native, turned = reorder(np.rint(hu).astype(np.int16), affine, *order)
    mask, _ = reorder(lesions, affine, *order)
    tilted = resample_to_grid(native, turned, placed, grid, "ct")
    inner = (slice(2, -2),) * 3
    assert np.abs(tilted.astype(int) - ct)[inner].mean() < 60
    tilted_bits = resample_to_grid(mask, turned, placed, grid, "bits")
    back = mask_to_native(tilted_bits, placed, native.shape, turned)
    for bit in (1, 2):
        assert dice(tilted_bits >> bit & 1, bits >> bit & 1) > 0.85
        assert dice(tilted_bits >> bit & 1, bits[..., ::-1] >> bit & 1) < 0.3
        assert dice(back >> bit & 1, mask >> bit & 1) > 0.8


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
    """Placed by itself, as a file is; left stays left, and the place in the world is the painted one."""
    grid, spacing = GRIDS["coarser"]
    tilt = np.eye(4)
    tilt[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    shape, centred = (56, 52, 26), RAS.copy()
    centred[:3, 3] = -RAS[:3, :3] @ (np.array(shape) - 1) / 2
    affine = tilt @ centred
    affine[2, 3] += 1020
    hu, lesions = paint(affine, shape)
    hu = np.rint(hu).astype(np.int16)
    placed, ct, bits, _ = canonical(hu, lesions, affine, grid, spacing)
    painted = paint(placed @ np.eye(4)[:, [2, 1, 0, 3]], grid[::-1])[1].transpose(2, 1, 0)
    for bit in (1, 2):
        assert dice(bits >> bit & 1, painted >> bit & 1) > 0.8
        assert dice(bits[..., ::-1] >> bit & 1, painted >> bit & 1) < 0.3
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
    hu, _ = paint(tilt @ RAS, SHAPE)
    placed = canonical_affine(tilt @ RAS, SHAPE, hu.astype(np.int16), *GRIDS["equal"])
    np.testing.assert_allclose(
        placed[:3, :3], np.array([[0, 0, -1], [0, -1, 0], [1, 0, 0]]) * [16, 8, 8]
    )
    centre = (placed @ [7.5, 19.5, 21.5, 1])[:3]
    assert np.abs(centre[:2]).max() < 12


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
    """One voxel, and a plate beside it, on a grid of voxels a hundred times as large; straight or oblique."""
    mask = np.zeros((16, 16, 16), np.uint8)
    mask[tuple(place)] |= 1 << 4
    mask[place[0], :, 3] |= 1 << 1
    tilt = np.eye(4)
    tilt[:3, :3] = Rotation.from_euler("y", angle, degrees=True).as_matrix()
    native, affine = reorder(mask, tilt, *order)
    target = np.array([[0, 0, -5.0, 25], [0, -5.0, 0, 25], [5.0, 0, 0, -25], [0, 0, 0, 1]])
    bits = resample_to_grid(native, affine, target, (11, 11, 11), "bits")
    nodule = np.argwhere(bits >> 4 & 1)
    assert len(nodule) == 1 and (bits >> 1 & 1).any()
    gap = (target @ [*nodule[0], 1])[:3] - (tilt @ [*place, 1])[:3]
    assert np.abs(gap).max() <= 2.5 + 1e-5


def test_each_of_two_nodules_stays_and_one_outside_the_grid_does_not() -> None:
    mask = np.zeros((30, 30, 30), np.uint8)
    mask[4, 4, 4] = mask[20, 4, 4] = mask[29, 29, 29] = 1 << 4
    target = np.array([[0, 0, -6.0, 23], [0, -6.0, 0, 23], [6.0, 0, 0, 2], [0, 0, 0, 1]])
    assert np.count_nonzero(resample_to_grid(mask, np.eye(4), target, (4, 4, 4), "bits")) == 2


def test_a_mask_elsewhere_is_refused() -> None:
    require_overlap(np.eye(4), (10, 10, 10), np.diag([-1.0, -1.0, 1.0, 1.0]), (10, 10, 10))
    with pytest.raises(UserError, match="does not lie on its volume"):
        require_overlap(np.eye(4), (10, 10, 10), RAS, SHAPE, "mask.nii")


# Hounsfield units


def volume(array: NDArray) -> Volume:
    return Volume(array, RAS, "case.nii.gz")


def grainy() -> NDArray[np.int16]:
    noise = np.random.default_rng(0).normal(0, 30, SHAPE)
    return np.clip(chest()[0] + noise, -1024, 3071).astype(np.int16)


def test_hu_stays_hu_and_is_never_rescaled_twice() -> None:
    hu = grainy()
    for slope, intercept in ((None, None), (1.0, -1024.0), (1.0, -8192.0), (1.0, 0.0)):
        got, decision = to_hu(volume(hu), slope, intercept)
        np.testing.assert_array_equal(got, hu)
        assert (decision.slope, decision.intercept, decision.padding_voxels) == (1, 0, 0)
        assert ("not applied again" in decision.reason) == (intercept not in (None, 0.0))


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.float32, np.int32])
@pytest.mark.parametrize("intercept", [-1024.0, -8192.0])
def test_stored_numbers_need_their_intercept(intercept: float, dtype: type) -> None:
    hu = grainy()
    stored = (hu.astype(np.int32) - int(intercept)).astype(dtype)
    stored[:3] = 0
    got, decision = to_hu(volume(stored), 1.0, intercept)
    np.testing.assert_array_equal(got[3:], hu[3:])
    assert (got[:3] == -1024).all() and decision.intercept == intercept
    assert decision.padding_voxels == (stored[:3].size if intercept == -8192 else 0)
    with pytest.raises(UserError, match="not in HU"):
        to_hu(volume(stored))


def test_a_slope_is_applied() -> None:
    hu = grainy()
    got, decision = to_hu(volume(((hu + 1024.0) * 2).astype(np.float32)), 0.5, -1024)
    np.testing.assert_array_equal(got, hu)
    assert decision.slope == 0.5


@pytest.mark.parametrize("padding", [-2048, -8192, -2000, -1025])
def test_padding_becomes_air_and_is_counted(padding: int) -> None:
    hu = grainy()
    hu[:, :2] = padding
    hu[5, 5, 5] = 20000
    got, decision = to_hu(volume(hu))
    assert (got[:, :2] == -1024).all() and got.max() == 3071 and got.dtype == np.int16
    assert decision.padding_voxels == hu[:, :2].size
    assert str(hu[:, :2].size) in decision.reason


@pytest.mark.parametrize("offset", [-1024, -8192, 1024])
def test_numbers_that_were_rescaled_twice_are_refused(offset: int) -> None:
    hu = grainy()
    with pytest.raises(UserError, match=r"case\.nii\.gz is not in HU"):
        to_hu(volume((hu + offset).astype(np.int16)), 1.0, -1024.0 if offset != 1024 else None)


def test_windowed_pictures_are_refused() -> None:
    hu = grainy()
    picture = np.clip((hu + 1350) / 1500 * 255, 0, 255).astype(np.uint8)
    for array in (picture, picture.astype(np.int16), picture / np.float32(255) * 1500 - 1350):
        with pytest.raises(UserError, match="windowed picture"):
            to_hu(volume(array))
    with pytest.raises(UserError, match="windowed picture"):
        to_hu(volume(np.clip(hu, -1000, 20).astype(np.int16)))
    with pytest.raises(UserError, match="not in HU"):
        to_hu(volume((hu / 1000).astype(np.float32)))


# Files


def save(path: Path, array: NDArray, affine: NDArray = RAS, kind: type = nib.Nifti1Image) -> Path:
    nib.save(kind(array, affine), path)
    return path


def edit(path: Path, **fields: object) -> Path:
    """Change header fields in place (uncompressed files)."""
    data = bytearray(path.read_bytes())
    header = nib.Nifti1Header(bytes(data[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    data[:348] = header.binaryblock
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("dtype", ["<i2", ">i2", "<i4", "<f4", "<f8"])
def test_files_are_read_as_nibabel_reads_them(
    tmp_path: Path, suffix: str, kind: type, dtype: str
) -> None:
    hu, _ = chest()
    path = save(tmp_path / f"a{suffix}", hu.astype(dtype), kind=kind)
    got = read_volume(path)
    np.testing.assert_array_equal(got.array, hu)
    np.testing.assert_allclose(got.affine, RAS)
    assert got.array.dtype == ("float32" if dtype == "<f8" else np.dtype(dtype).newbyteorder("="))


def test_header_scaling_trailing_axis_and_odd_gzip_are_read(tmp_path: Path) -> None:
    hu, lesions = chest()
    image = nib.Nifti1Image(hu, RAS)
    image.header.set_slope_inter(2.0, -24.0)
    nib.save(image, tmp_path / "scaled.nii.gz")
    expected = np.asanyarray(nib.load(tmp_path / "scaled.nii.gz").dataobj)
    np.testing.assert_allclose(read_volume(tmp_path / "scaled.nii.gz").array, expected)
    assert read_volume(save(tmp_path / "four.nii.gz", hu[..., None])).array.shape == SHAPE
    plain = save(tmp_path / "plain.nii", hu).read_bytes()
    (tmp_path / "two.nii.gz").write_bytes(gzip.compress(plain[:5000]) + gzip.compress(plain[5000:]))
    np.testing.assert_array_equal(read_volume(tmp_path / "two.nii.gz").array, hu)
    np.testing.assert_array_equal(
        read_mask(save(tmp_path / "mask.nii.gz", lesions.astype(np.float32))).array, lesions
    )
    assert not read_mask(save(tmp_path / "none.nii.gz", np.zeros(SHAPE, np.uint8))).array.any()
    with pytest.raises(UserError, match="not a mask"):
        read_mask(save(tmp_path / "ct.nii.gz", hu))


def _nan(path: Path, hu: NDArray) -> None:
    array = hu.astype(np.float32)
    array[3, 3, 3], array[4, 4, 4] = np.nan, np.inf
    save(path, array)


def _two_orientations(path: Path, hu: NDArray) -> None:
    image = nib.Nifti1Image(hu, RAS)
    image.set_sform(RAS, 1)
    image.set_qform(RAS @ np.diag([-1.0, -1.0, 1.0, 1.0]), 1)
    nib.save(image, path)


BROKEN = {
    "text": (lambda p, hu: p.write_text("not a volume" * 100), "not a NIfTI"),
    "text_in_gzip": (
        lambda p, hu: p.write_bytes(gzip.compress(b"not a volume" * 100)),
        "not a NIfTI",
    ),
    "empty": (lambda p, hu: p.write_bytes(b""), "empty"),
    "folder": (lambda p, hu: p.mkdir(), "folder"),
    "missing": (lambda p, hu: None, "does not exist"),
    "cut": (lambda p, hu: p.write_bytes(save(p, hu).read_bytes()[:-100]), "cut short"),
    "cut_gzip": (
        lambda p, hu: p.write_bytes(gzip.compress(save(p, hu).read_bytes())[:-100]),
        "cut short",
    ),
    "cut_in_gzip": (
        lambda p, hu: p.write_bytes(gzip.compress(save(p, hu).read_bytes()[:-100])),
        "cut short",
    ),
    "bad_checksum": (
        lambda p, hu: p.write_bytes(
            gzip.compress(save(p, hu).read_bytes())[:-8] + bytes(4) + b"\x60\xdd\0\0"
        ),
        "cut short or damaged",
    ),
    "header_only": (lambda p, hu: p.write_bytes(save(p, hu).read_bytes()[:200]), "not a NIfTI"),
    "series": (lambda p, hu: save(p, np.stack([hu, hu], axis=-1)), "shape"),
    "flat": (lambda p, hu: save(p, hu[:, :, 0]), "shape"),
    "nan": (_nan, "2 voxels that are NaN or infinite"),
    "zero_spacing": (
        lambda p, hu: edit(save(p, hu), pixdim=[1, 0, 8, 8, 0, 0, 0, 0]),
        "voxel size",
    ),
    "nan_spacing": (
        lambda p, hu: edit(save(p, hu), pixdim=[1, np.nan, 8, 8, 0, 0, 0, 0]),
        "voxel size",
    ),
    "nan_affine": (lambda p, hu: edit(save(p, hu), srow_x=[np.nan, 0, 0, 0]), "voxel size"),
    "sheared": (
        lambda p, hu: edit(save(p, hu), srow_x=[8, 7, 16, 0], srow_y=[7, 8, 16, 0]),
        "right angles",
    ),
    "huge": (
        lambda p, hu: edit(save(p, hu), dim=[3, 32000, 32000, 32000, 1, 1, 1, 1]),
        "by its header",
    ),
    "constant": (lambda p, hu: save(p, np.full(SHAPE, 7, np.int16)), "7 in every voxel"),
    "colours": (
        lambda p, hu: save(p, np.zeros(SHAPE, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))),
        "type",
    ),
    "complex": (lambda p, hu: save(p, hu.astype(np.complex64)), "type"),
    "no_orientation": (
        lambda p, hu: edit(save(p, hu), sform_code=0, qform_code=0),
        "no orientation",
    ),
    "two_orientations": (_two_orientations, "two orientations"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_get_one_clear_error(tmp_path: Path, name: str) -> None:
    make, words = BROKEN[name]
    path = tmp_path / "case.nii"
    make(path, chest()[0])
    with pytest.raises(UserError, match=words) as error:
        read_volume(path)
    assert str(path) in str(error.value)


def test_a_huge_header_in_a_small_gzip_allocates_nothing(tmp_path: Path) -> None:
    plain = edit(save(tmp_path / "a.nii", chest()[0]), dim=[3, 32000, 32000, 32000, 1, 1, 1, 1])
    packed = tmp_path / "a.nii.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    with pytest.raises(UserError, match="asks for too much"):
        read_volume(packed)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 347), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_header_gives_a_user_error_or_a_volume(changes: list[tuple[int, int]]) -> None:
    with TemporaryDirectory() as folder:
        path = save(Path(folder) / "a.nii", chest()[0][:4, :4, :4])
        data = bytearray(path.read_bytes())
        for place, value in changes:
            data[place] = value
        path.write_bytes(data)
        with suppress(UserError):
            assert read_volume(path).array.ndim == 3
