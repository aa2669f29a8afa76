"""One scan in every format gives one canonical volume, or the file is refused by name."""

import io
import zipfile
from pathlib import Path

import dicom_files
import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from numpy.typing import NDArray

from rectvlm.data.canonical_grid import canonical_affine, resample_to_grid
from rectvlm.data.volume import read_volume
from rectvlm.types import InputError, Int16Volume
from tests.data.chest_volume import RAS, chest, paint_chest

GRID, SPACING = (16, 48, 48), (16.0, 8.0, 8.0)


def to_canonical(path: Path) -> Int16Volume:
    volume = read_volume(path)
    hu = volume.array.astype(np.int16)
    affine = canonical_affine(volume.affine, hu.shape, hu, GRID, SPACING)
    return resample_to_grid(hu, volume.affine, affine, GRID, "ct")


def itk_image(hu: NDArray[np.generic], affine: NDArray[np.float64]) -> SimpleITK.Image:
    """Image in ITK's world, LPS."""
    lps = np.diag([-1.0, -1.0, 1.0]) @ affine[:3]
    spacing = np.linalg.norm(lps[:, :3], axis=0)
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(hu.transpose(2, 1, 0)))
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:, 3].tolist())
    return image


def write_itk(path: Path, compressed: bool = False) -> Path:
    SimpleITK.WriteImage(itk_image(chest()[0], RAS), str(path), useCompression=compressed)
    return path


def write_zip(path: Path, folder: Path, inside: str = "DOE_JOHN/deep/") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, inside + file.name)
        archive.writestr("__MACOSX/._readme", "no CT")
    return path


def write_ct(kind: str, folder: Path) -> Path:
    """The chest in a format."""
    hu, _ = chest()
    path = folder / f"chest.{kind}"
    if kind == "nii.gz":
        nib.save(nib.Nifti1Image(hu, RAS), path)
    elif kind == "dicom":
        dicom_files.write_series(hu, RAS, path)
    elif kind == "zip":
        write_zip(path, dicom_files.write_series(hu, RAS, folder / "series"))
    elif kind == "npz":
        np.savez_compressed(path, ct=hu, affine=RAS)
    else:
        write_itk(path, compressed=kind in ("mha", "nrrd"))
    return path


@pytest.mark.parametrize("kind", ["dicom", "zip", "mha", "mhd", "nrrd", "npz"])
def test_every_format_gives_the_canonical_volume_of_the_nifti(tmp_path: Path, kind: str) -> None:
    canonical = to_canonical(write_ct("nii.gz", tmp_path))
    path = write_ct(kind, tmp_path)
    np.testing.assert_array_equal(to_canonical(path), canonical)
    volume = read_volume(path)
    assert volume.array.dtype == np.int16
    expected, _ = paint_chest(volume.affine, volume.array.shape)
    assert (np.abs(volume.array - expected) <= 1).mean() > 0.998
    # The consolidation lies in the patient's left lung, where the canonical index x is high.
    consolidation = np.argwhere(np.abs(canonical[9:12] - 17) < 6)
    assert len(consolidation) > 100 and consolidation[:, 2].mean() > GRID[2] / 2 + 5


@pytest.mark.parametrize("kind", ["mha", "nrrd"])
@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.float64, np.int32])
def test_itk_files_are_read_in_any_axis_order_and_type(
    tmp_path: Path, kind: str, dtype: type
) -> None:
    turn = nib.orientations.axcodes2ornt(tuple("PIR"))
    turn = nib.orientations.ornt_transform(nib.orientations.io_orientation(RAS), turn)
    hu = nib.orientations.apply_orientation(chest()[0], turn)
    affine = RAS @ nib.orientations.inv_ornt_aff(turn, chest()[0].shape)
    path = tmp_path / f"chest.{kind}"
    SimpleITK.WriteImage(itk_image(hu.astype(dtype), affine), str(path))
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.array, hu)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-6)
    assert volume.array.dtype != np.float64


@pytest.mark.parametrize(
    "geometry",
    [
        {"spacing": [8, 8, 16], "orientation": "RAS", "origin": RAS[:3, 3]},
        {"spacing": [8, 8, 16], "orientation": ["R", "A", "S"], "origin": RAS[:3, 3]},
        {"spacing": [8, 8, 16], "direction": np.eye(3), "origin": RAS[:3, 3]},
    ],
)
def test_an_npz_declares_its_geometry_in_either_way(tmp_path: Path, geometry: dict) -> None:
    np.savez(tmp_path / "a.npz", ct=chest()[0].astype(np.float64), **geometry)
    volume = read_volume(tmp_path / "a.npz")
    np.testing.assert_allclose(volume.affine, RAS)
    assert volume.array.dtype == np.float32
    flipped = {**geometry, "orientation": "LPS"}
    if "direction" not in geometry:
        np.savez(tmp_path / "b.npz", ct=chest()[0], **flipped)
        assert read_volume(tmp_path / "b.npz").affine[0, 0] == -8


def _npz(path: Path, **arrays: object) -> Path:
    np.savez(path, **arrays)
    return path


def _edit_text(path: Path, old: bytes, new: bytes) -> Path:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))
    return path


def _cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-2000])
    return path


def _npy_that_claims_too_much(path: Path) -> Path:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<i2", "fortran_order": False, "shape": (40000, 40000, 40000)}
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ct.npy", header.getvalue() + bytes(1000))
    return path


def _colours(path: Path) -> Path:
    image = SimpleITK.GetImageFromArray(np.zeros((4, 4, 4, 3), np.uint8), isVector=True)
    SimpleITK.WriteImage(image, str(path))
    return path


def _blank(path: Path) -> Path:
    image = SimpleITK.GetImageFromArray(chest()[0].transpose(2, 1, 0))
    image.SetSpacing([8, 8, 16])
    SimpleITK.WriteImage(image, str(path))
    return path


LPS_WORDS = b"left-posterior-superior"
WITH_SPACE, WITHOUT_SPACE = b"space: " + LPS_WORDS, b"space dimension: 3"
BROKEN = {
    "npz_without_geometry": (
        lambda f: _npz(f / "a.npz", ct=chest()[0]),
        "does not say where its voxels lie.*'affine'.*'spacing'.*'orientation'.*numpy.savez",
    ),
    "npz_blank": (
        lambda f: _npz(f / "a.npz", ct=chest()[0], affine=np.diag([8.0, 8, 16, 1])),
        "blank header",
    ),
    "npz_bad_letters": (
        lambda f: _npz(f / "a.npz", ct=chest()[0], spacing=[8, 8, 16], orientation="RLS"),
        "found orientation 'RLS'",
    ),
    "npz_two_volumes": (
        lambda f: _npz(f / "a.npz", ct=chest()[0], more=chest()[0], affine=RAS),
        "exactly one array",
    ),
    "npz_of_objects": (
        lambda f: _npz(f / "a.npz", ct=np.array([{}], object), affine=RAS),
        "exactly one array",
    ),
    "npz_geometry_of_objects": (
        lambda f: _npz(f / "a.npz", ct=chest()[0], affine=np.array([{}], object)),
        "damaged.*pickle|does not say",
    ),
    "npz_text": (lambda f: (f / "a.npz").write_text("no zip") and f / "a.npz", "damaged"),
    "npz_cut": (lambda f: _cut(_npz(f / "a.npz", ct=chest()[0], affine=RAS)), "damaged"),
    "npz_absurd": (lambda f: _npy_that_claims_too_much(f / "a.npz"), "asks for too much"),
    "mha_text": (lambda f: (f / "a.mha").write_text("none") and f / "a.mha", "another place"),
    "mha_blank": (lambda f: _blank(f / "a.mha"), "blank header"),
    "mha_cut": (lambda f: _cut(write_itk(f / "a.mha")), "is cut short"),
    "mha_packed_cut": (lambda f: _cut(write_itk(f / "a.mha", True)), "cut short or damaged"),
    "mha_absurd": (
        lambda f: _edit_text(write_itk(f / "a.mha"), b"= 44 40 16", b"= 44000 40000 16000"),
        "is cut short",
    ),
    "mha_packed_absurd": (
        lambda f: _edit_text(write_itk(f / "a.mha", True), b"= 44 40 16", b"= 44000 40000 16000"),
        "asks for too much",
    ),
    "mha_colours": (lambda f: _colours(f / "a.mha"), "strange type"),
    "mhd_elsewhere": (
        lambda f: _edit_text(write_itk(f / "a.mhd"), b"= a.raw", b"= /etc/hostname"),
        "another place.*'/etc/hostname'",
    ),
    "mhd_above": (
        lambda f: _edit_text(write_itk(f / "a.mhd"), b"= a.raw", b"= ../a.raw"),
        "another place",
    ),
    "nrrd_text": (lambda f: (f / "a.nrrd").write_text("none") and f / "a.nrrd", "no empty line"),
    "nrrd_without_space": (
        lambda f: _edit_text(
            write_itk(f / "a.nrrd"), b"space: " + LPS_WORDS, b"space dimension: 3"
        ),
        "no orientation, so left and right are unknown",
    ),
    "nrrd_of_a_scanner": (
        lambda f: _edit_text(write_itk(f / "a.nrrd"), LPS_WORDS, b"scanner-xyz"),
        "no orientation.*scanner-xyz",
    ),
    "nrrd_detached": (
        lambda f: _edit_text(
            write_itk(f / "a.nrrd"), b"encoding:", b"data file: /etc/hostname\nencoding:"
        ),
        "another place",
    ),
    "nrrd_detached_behind_a_comment": (
        lambda f: _edit_text(
            write_itk(f / "a.nrrd"), b"encoding:", b"# x\rdata file: /etc/hostname\nencoding:"
        ),
        "a carriage return within a line",
    ),
    "nrrd_detached_far_down": (
        lambda f: _edit_text(
            write_itk(f / "a.nrrd"),
            b"encoding:",
            b"# long comment\n" * 9000 + b"data file: /etc/hostname\nencoding:",
        ),
        "no empty line",
    ),
    "nrrd_blank": (lambda f: _blank(f / "a.nrrd"), "blank header"),
    "nrrd_cut": (lambda f: _cut(write_itk(f / "a.nrrd")), "cut short"),
    "nrrd_packed_cut": (lambda f: _cut(write_itk(f / "a.nrrd", True)), "cut short or damaged"),
    "nrrd_absurd": (
        lambda f: _edit_text(write_itk(f / "a.nrrd"), b": 44 40 16", b": 44000 40000 16000"),
        "cut short",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_of_every_format_get_one_clear_error(tmp_path: Path, name: str) -> None:
    make, words = BROKEN[name]
    path = make(tmp_path)
    with pytest.raises(InputError, match=words) as error:
        read_volume(path)
    message = str(error.value)
    assert str(path) in message and message.endswith(".") and "\n" not in message


def test_a_nrrd_in_ras_lies_where_the_lps_one_lies(tmp_path: Path) -> None:
    hu, _ = chest()
    lines = [
        *("NRRD0004", "type: short", "dimension: 3", "space: right-anterior-superior"),
        *("sizes: 44 40 16", "space directions: (8,0,0) (0,8,0) (0,0,16)"),
        *("endian: little", "encoding: raw", "space origin: (-170,-160,900)", "", ""),
    ]
    (tmp_path / "a.nrrd").write_bytes("\n".join(lines).encode() + hu.tobytes(order="F"))
    volume = read_volume(tmp_path / "a.nrrd")
    np.testing.assert_allclose(volume.affine, RAS)
    np.testing.assert_array_equal(volume.array, hu)
