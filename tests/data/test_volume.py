"""Files: NIfTI in every form is read, and a broken file gets one clear error."""

import gzip
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rectvlm.data.volume import read_mask, read_volume
from rectvlm.types import UserError
from tests.data.chest_volume import RAS, SHAPE, chest


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
        lambda p, hu: edit(
            save(p, hu), sform_code=0, qform_code=1, pixdim=[1, 0, 8, 8, 0, 0, 0, 0]
        ),
        "voxel size",
    ),
    "nan_spacing": (
        lambda p, hu: edit(
            save(p, hu), sform_code=0, qform_code=1, pixdim=[1, np.nan, 8, 8, 0, 0, 0, 0]
        ),
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
