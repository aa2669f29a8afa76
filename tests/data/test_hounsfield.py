"""Conversion to Hounsfield units, above all of numbers that could be read in two ways."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rectvlm.data.hounsfield import HuEvidence, to_hu
from rectvlm.data.volume import read_volume
from rectvlm.types import HuConversion, InputError, UserError, Volume
from tests.ct_rate_tree import phantom
from tests.data.chest_volume import SHAPE, chest

AFFINE = np.diag([-2.5, -2.5, 4.5, 1.0])
AFFINE[:3, 3] = 120, 130, -400


def scan(seed: int = 0) -> NDArray[np.int16]:
    return phantom(seed).hu


def decide(
    array: NDArray, slope: float | None = None, intercept: float | None = None
) -> tuple[NDArray[np.int16], HuConversion]:
    return to_hu(Volume(array, AFFINE, "case.nii.gz"), slope, intercept)


def circle(shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """The field of view of a scanner, round in the plane of the two larger sides."""
    sides = sorted(range(3), key=lambda axis: shape[axis])[1:]
    grid = np.indices(shape)
    return (
        sum(((grid[axis] / (shape[axis] - 1) - 0.5) ** 2 for axis in sides), np.zeros(shape))
        <= 0.25
    )


def grainy() -> NDArray[np.int16]:
    noise = np.random.default_rng(0).normal(0, 30, SHAPE)
    return np.clip(chest()[0] + noise, -1024, 3071).astype(np.int16)


def test_hu_stays_hu_and_is_never_rescaled_twice() -> None:
    hu = grainy()
    for slope, intercept in ((None, None), (1.0, -1024.0), (1.0, -8192.0), (1.0, 0.0)):
        got, decision = decide(hu, slope, intercept)
        np.testing.assert_array_equal(got, hu)
        assert (decision.slope, decision.intercept, decision.padding_voxels) == (1, 0, 0)
        assert ("not applied again" in decision.reason) == (intercept not in (None, 0.0))


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.float32, np.int32])
@pytest.mark.parametrize("intercept", [-1024.0, -8192.0])
def test_stored_numbers_need_their_intercept(intercept: float, dtype: type) -> None:
    hu = grainy()
    stored = (hu.astype(np.int32) - int(intercept)).astype(dtype)
    stored[:3] = 0
    got, decision = decide(stored, 1.0, intercept)
    np.testing.assert_array_equal(got[3:], hu[3:])
    assert (got[:3] == -1024).all() and decision.intercept == intercept
    assert decision.padding_voxels == (stored[:3].size if intercept == -8192 else 0)
    with pytest.raises(UserError, match="not in HU"):
        decide(stored)


def test_a_slope_is_applied() -> None:
    hu = grainy()
    got, decision = decide(((hu + 1024.0) * 2).astype(np.float32), 0.5, -1024)
    np.testing.assert_array_equal(got, hu)
    assert decision.slope == 0.5


@pytest.mark.parametrize("padding", [-2048, -8192, -2000, -1025])
def test_padding_becomes_air_and_is_counted(padding: int) -> None:
    hu = grainy()
    hu[:, :2] = padding
    hu[5, 5, 5] = 20000
    got, decision = decide(hu)
    assert (got[:, :2] == -1024).all() and got.max() == 3071 and got.dtype == np.int16
    assert decision.padding_voxels == hu[:, :2].size
    assert str(hu[:, :2].size) in decision.reason


@pytest.mark.parametrize("offset", [-1024, -8192, 1024])
def test_numbers_that_were_rescaled_twice_are_refused(offset: int) -> None:
    hu = grainy()
    with pytest.raises(UserError, match=r"case\.nii\.gz is not in HU"):
        decide((hu + offset).astype(np.int16), 1.0, -1024.0 if offset != 1024 else None)


def test_windowed_pictures_are_refused() -> None:
    hu = grainy()
    picture = np.clip((hu + 1350) / 1500 * 255, 0, 255).astype(np.uint8)
    for array in (picture, picture.astype(np.int16), picture / np.float32(255) * 1500 - 1350):
        with pytest.raises(UserError, match="windowed picture"):
            decide(array)
    with pytest.raises(UserError, match="windowed picture"):
        decide(np.clip(hu, -1000, 20).astype(np.int16))
    with pytest.raises(UserError, match="not in HU"):
        decide((hu / 1000).astype(np.float32))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("slope", "intercept", "padding"),
    [
        (1, -1024, -2048),
        (1, -1024, -1024),
        (1, -1024, -3024),
        (1, -8192, -8192),
        (2, -1024, -2048),
        (0.5, -1000, -2000),
    ],
)
def test_stored_numbers_with_padding_become_hu(
    seed: int, slope: float, intercept: float, padding: int
) -> None:
    """Padding of −2048 HU is stored as −1024, like air; air is stored as 0, like soft tissue."""
    hu = scan(seed)
    inside = circle(hu.shape)
    stored = np.where(inside, (hu - intercept) / slope, (padding - intercept) / slope).astype(
        np.float32
    )
    for array in (stored, np.rint(stored).astype(np.int16)):
        got, decision = decide(array, slope, intercept)
        assert (decision.slope, decision.intercept) == (slope, intercept)
        assert np.abs(got[inside].astype(int) - np.maximum(hu[inside], -1024)).max() <= slope
        assert (got[~inside] == -1024).all()
        assert decision.padding_voxels >= (0 if padding == -1024 else np.count_nonzero(~inside))
    # Without the metadata they cannot be mended, and must not pass for HU.
    with pytest.raises(UserError):
        decide(stored)


@pytest.mark.parametrize("padding", [-1024, -2048, -8192])
@pytest.mark.parametrize("intercept", [-1024.0, -8192.0, -1000.0, 0.0, None])
def test_fixed_volumes_keep_their_numbers_whatever_their_padding_and_metadata(
    padding: int, intercept: float | None
) -> None:
    hu = scan(1)
    inside = circle(hu.shape)
    got, decision = decide(np.where(inside, hu, np.int16(padding)), 1.0, intercept)
    np.testing.assert_array_equal(got, np.where(inside, hu, -1024))
    assert (decision.slope, decision.intercept) == (1, 0)
    assert decision.padding_voxels == (0 if padding == -1024 else np.count_nonzero(~inside))
    assert decision.reason.startswith("already HU: ")


def test_air_without_noise_leaves_the_lungs_as_evidence() -> None:
    """Programs that blank what is outside the body leave one number there."""
    hu = np.where(scan() < -940, np.int16(-1000), scan())
    np.testing.assert_array_equal(decide(hu, 1, -1024)[0], hu)


def test_numbers_that_are_hu_both_ways_are_refused() -> None:
    """Half of a volume stored one way and half the other, or a small offset: both are refused."""
    hu = scan().astype(np.int32)
    with pytest.raises(InputError, match="may be in HU or not"):
        decide(hu, 1, 31)
    hu[: len(hu) // 2] += 1024
    with pytest.raises(InputError, match="may be in HU or not") as error:
        decide(hu, 1, -1024)
    assert error.value.file == "case.nii.gz" and "as stored" in error.value.found


def test_the_decision_says_what_it_rests_on() -> None:
    hu = scan()
    low = hu.min()
    inside = hu[hu > low]
    found = HuEvidence.from_values(hu.ravel())
    assert found.air_share == pytest.approx(
        (inside <= -700).mean()
    ) and found.soft_tissue_share == pytest.approx(((inside >= -150) & (inside <= 150)).mean())
    _, kept = decide(hu, 1, -1024)
    assert "slope 1 and intercept -1024 not applied again" in kept.reason
    assert (
        f"{HuEvidence.from_values(hu[::2, ::2, ::2].ravel()).air_share:.0%}"[0] in kept.reason
        and "soft tissue" in kept.reason
    )
    _, applied = decide(hu + np.int16(1024), 1, -1024)
    assert (
        applied.reason.startswith("stored numbers were not HU (")
        and "with slope and intercept" in applied.reason
    )
    assert (
        HuEvidence.from_values(np.full(9, -1000)) == HuEvidence(0, 0)
        and not HuEvidence.from_values(np.empty(0)).is_hu
    )


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 3),
    form=st.sampled_from(
        [(1.0, 0.0), (1.0, -1024.0), (1.0, -8192.0), (2.0, -1024.0), (0.5, -1000.0)]
    ),
    dtype=st.sampled_from(["i2", "i4", "f4", ">i2"]),
    twist=st.sampled_from(["none", "noise", "metal", "empty rows"]),
)
def test_hu_equals_the_truth(seed: int, form: tuple[float, float], dtype: str, twist: str) -> None:
    """Any stored array with its metadata: within 1 HU of the truth, or half a coarse step."""
    rng, (slope, intercept) = np.random.default_rng(seed), form
    hu = scan(seed).astype(np.float64)
    if twist == "noise":
        hu += rng.normal(0, 40, hu.shape)
    elif twist == "metal":
        hu[30:33, 30:33] = 9000
    elif twist == "empty rows":
        hu[:4] = -1024
    stored = (hu - intercept) / slope
    array = (stored if dtype == "f4" else np.clip(np.rint(stored), -32768, 32767)).astype(dtype)
    got, decision = decide(array, slope, intercept)
    assert np.abs(got - np.clip(hu, -1024, 3071)).max() <= max(1, slope / 2 + 0.5)
    assert (decision.slope, decision.intercept) == form


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2),
    box=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=3, max_size=3),
)
def test_a_crop_is_read_as_the_whole_or_refused(seed: int, box: list[tuple[float, float]]) -> None:
    """Whatever part of a body is left: its numbers are never read in another way."""
    hu = scan(seed)
    cut = tuple(
        slice(int(min(pair) * (n - 6)), int(max(pair) * (n - 6)) + 6)
        for pair, n in zip(box, hu.shape, strict=True)
    )
    part = hu[cut]
    inside = part[part > part.min()]
    shown = len(inside) > 5000 and min((inside <= -700).mean(), (abs(inside) <= 150).mean()) > 0.1
    for array, intercept in (
        (part, -1024),
        (part + np.int16(1024), -1024),
        (part.astype(np.int32) + 8192, -8192),
    ):
        try:
            got, _ = decide(array, 1, intercept)
        except UserError:
            assert not shown
        else:
            np.testing.assert_array_equal(got, part)


# Files


def write(path: Path, stored: NDArray, slope: float, inter: float) -> Path:
    """Numbers as they are, with a scaling in the header."""
    image = nib.Nifti1Image(stored, AFFINE)
    nib.save(image, path)
    data = bytearray(path.read_bytes())
    header = nib.Nifti1Header(bytes(data[:348]), check=False)
    header["scl_slope"], header["scl_inter"] = slope, inter
    data[:348] = header.binaryblock
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("slope", "inter"), [(1, -1024), (1, -8192), (2, -1024), (0.5, -1000)])
def test_a_scaling_in_the_header_is_applied_once_though_the_metadata_has_it_too(
    tmp_path: Path, slope: float, inter: float
) -> None:
    hu = scan(2)
    stored = np.rint((hu - inter) / slope).astype(np.int16)
    volume = read_volume(write(tmp_path / "a.nii", stored, slope, inter))
    for given_slope, given_inter in ((None, None), (slope, inter)):
        got, decision = to_hu(volume, given_slope, given_inter)
        assert np.abs(got.astype(int) - hu).max() <= slope / 2
        assert (decision.slope, decision.intercept) == (1, 0)


def test_a_header_that_scales_hu_again_is_refused(tmp_path: Path) -> None:
    volume = read_volume(write(tmp_path / "a.nii", scan(2), 1, -1024))
    for slope, intercept in ((None, None), (1.0, -1024.0)):
        with pytest.raises(InputError, match="is not in HU"):
            to_hu(volume, slope, intercept)


@pytest.mark.parametrize(
    ("slope", "inter"), [(1, 0), (1400 / 255, -1000), (1500 / 255, -1350), (400 / 255, -160)]
)
def test_a_windowed_picture_is_refused_whatever_its_header_says(
    tmp_path: Path, slope: float, inter: float
) -> None:
    """Public files of 8 bits, some with a header that stretches them over the range of HU."""
    picture = np.clip((scan(2).astype(np.float32) + 1000) / 1400 * 255, 0, 255).astype(np.uint8)
    volume = read_volume(write(tmp_path / "a.nii", picture, slope, inter))
    with pytest.raises(InputError, match="windowed picture") as error:
        to_hu(volume, 1.0, -1024.0)
    assert str(tmp_path / "a.nii") == error.value.file
