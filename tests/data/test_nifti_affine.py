"""Affines: the right voxel size, place and side from every sound header, and no guess else."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from rectvlm.data.canonical_grid import canonical_affine, resample_to_grid
from rectvlm.data.volume import read_mask, read_volume
from rectvlm.predict.case_folder import save_mask
from rectvlm.types import InputError, Volume
from tests.data.chest_volume import RAS, SHAPE, chest, paint_chest

GRID, SPACING = (20, 48, 48), (16.0, 8.0, 8.0)
SIZES = [8, 8, 16]
BLANK = "blank header .*so left and right are unknown"


def tilted(degrees: float) -> NDArray:
    """`RAS` under a tilted gantry: each slice is shifted backwards against the one below it."""
    affine = RAS.copy()
    affine[1, 2] = -16 * np.tan(np.radians(degrees))
    return affine


def rotated(degrees: float, affine: NDArray = RAS) -> NDArray:
    """An affine turned about the first voxel, around the patient's long axis."""
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turned = affine.copy()
    turned[:3, :3] = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]) @ affine[:3, :3]
    return turned


def write(
    path: Path,
    sform: NDArray | None,
    qform: NDArray | None,
    array: NDArray | None = None,
    kind: type[nib.Nifti1Image] = nib.Nifti1Image,
    **fields: object,
) -> Path:
    """Write a CT with two forms, None for code 0; other fields are set in its bytes as they are."""
    image = kind(chest()[0] if array is None else array, None)
    image.header.set_xyzt_units("mm")
    if qform is not None:
        image.header.set_qform(qform, 1, strip_shears=True)
    elif sform is not None:
        image.header["pixdim"][1:4] = np.linalg.norm(sform[:3, :3], axis=0)
    if sform is not None:
        image.header.set_sform(sform, 1)
    nib.save(image, path)
    block = type(image.header).template_dtype.itemsize
    data = bytearray(path.read_bytes())
    header = type(image.header)(bytes(data[:block]), check=False)
    for name, value in fields.items():
        header[name] = value
    data[:block] = header.binaryblock
    path.write_bytes(data)
    return path


def expect_affine(path: Path, affine: NDArray) -> None:
    np.testing.assert_allclose(read_volume(path).affine, affine, atol=0.01)


# Headers that say nothing

AXES_SWAPPED = np.eye(4)[[1, 0, 2, 3]]
NIBABEL_DEFAULT = nib.Nifti1Image(np.zeros(SHAPE, np.int16), None).header
NIBABEL_DEFAULT.set_zooms(SIZES)
MADE_UP = {
    "identity": np.eye(4),
    "mirror image of it": np.diag([-1.0, 1, 1, 1]),
    "identity of DICOM's world": np.diag([-1.0, -1, 1, 1]),
    "voxel size alone": np.diag([0.7, 0.7, 1.25, 1]),
    "swapped axes": AXES_SWAPPED,
    "nibabel's of a file without one": NIBABEL_DEFAULT.get_base_affine(),
    "nibabel's, turned to RAS": nib.as_closest_canonical(
        nib.Nifti1Image(np.zeros(SHAPE, np.int16), NIBABEL_DEFAULT.get_base_affine())
    ).affine,
    "identity of DICOM's world, turned to RAS": nib.as_closest_canonical(
        nib.Nifti1Image(np.zeros(SHAPE, np.int16), np.diag([-1.0, -1, 1, 1]))
    ).affine,
    "identity with a rounded origin": np.eye(4) + 1e-7 * np.eye(4)[:, [3, 1, 2, 0]],
}


@pytest.mark.parametrize("name", MADE_UP)
@pytest.mark.parametrize("form", ["sform", "qform"])
def test_a_made_up_affine_is_refused_for_cts_and_masks(
    tmp_path: Path, name: str, form: str
) -> None:
    affine = MADE_UP[name]
    forms = (affine, None) if form == "sform" else (None, affine)
    path = write(tmp_path / "ct.nii", *forms)
    with pytest.raises(InputError, match=BLANK):
        read_volume(path)
    path = write(tmp_path / "mask.nii", *forms, array=chest()[1])
    with pytest.raises(InputError, match=BLANK):
        read_mask(path)


def test_a_file_without_orientation_is_refused_also_once_nibabel_saved_it_again(
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "ct.nii", None, None, pixdim=[1, *SIZES, 0, 0, 0, 0])
    with pytest.raises(InputError, match="no orientation"):
        read_volume(path)
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine), tmp_path / "again.nii")
    with pytest.raises(InputError, match=r"around the origin.*left and right are unknown"):
        read_volume(tmp_path / "again.nii")


def test_a_known_affine_replaces_a_blank_one_of_its_size_and_no_other(tmp_path: Path) -> None:
    for forms in ((np.eye(4), None), (np.diag([8.0, 8, 16, 1]), None), (None, None)):
        volume = read_volume(write(tmp_path / "ct.nii", *forms), default_affine=RAS)
        np.testing.assert_array_equal(volume.affine, RAS)
        assert volume.nifti_header is None
    other_size = write(tmp_path / "ct.nii", None, None, pixdim=[1, 8, 8, 12, 0, 0, 0, 0])
    with pytest.raises(InputError, match=r"no metadata that fits.*16 mm, found 8 × 8 × 12 mm"):
        read_volume(other_size, default_affine=RAS)
    with pytest.raises(InputError, match=r"voxel size.*\(by the metadata\)"):
        read_volume(write(tmp_path / "ct.nii", None, None), default_affine=RAS * 1000)
    real = write(tmp_path / "ct.nii", rotated(5), None)
    np.testing.assert_allclose(read_volume(real, default_affine=RAS).affine, rotated(5), atol=0.01)


# Units


@pytest.mark.parametrize(("code", "unit_mm"), [(0, 1), (1, 1000), (2, 1), (3, 0.001), (7, 1)])
@pytest.mark.parametrize("form", ["sform", "qform", "both"])
@pytest.mark.parametrize("time_code", [0, 8, 16])
def test_positions_are_in_the_units_of_the_header(
    tmp_path: Path, code: int, unit_mm: float, form: str, time_code: int
) -> None:
    stored = RAS.copy()
    stored[:3] /= unit_mm
    sform = None if form == "qform" else stored
    qform = None if form == "sform" else stored
    path = write(tmp_path / "ct.nii", sform, qform, xyzt_units=code + time_code)
    expect_affine(path, RAS)
    path = write(tmp_path / "mask.nii", sform, qform, chest()[1], xyzt_units=code + time_code)
    np.testing.assert_allclose(read_mask(path).affine, RAS, atol=0.01)


@pytest.mark.parametrize("factor", [0.001, 1000, 100, 0.01])
@pytest.mark.parametrize("forms", ["sform", "qform"])
def test_voxel_sizes_in_another_unit_than_named_are_one_sentence(
    tmp_path: Path, factor: float, forms: str
) -> None:
    affine = RAS.copy()
    affine[:3] *= factor
    sform, qform = (affine, None) if forms == "sform" else (None, affine)
    path = write(tmp_path / "ct.nii", sform, qform)
    words = r"impossible voxel size: expected 0\.1 to 50 mm, found .*\(millimetres by its .form\)"
    with pytest.raises(InputError, match=words) as error:
        read_volume(path)
    assert f"{8 * factor:.4g} × {8 * factor:.4g}" in str(error.value)
    assert "xyzt_units" in str(error.value)


def test_extents_and_positions_that_no_ct_has_are_refused_with_their_values(
    tmp_path: Path,
) -> None:
    long = RAS @ np.diag([1, 1, 3, 1])
    array = np.tile(chest()[0], (1, 1, 5))
    with pytest.raises(InputError, match=r"impossible extent.*at most 3000 mm.*3840 mm"):
        read_volume(write(tmp_path / "ct.nii", long, None, array))
    far = RAS.copy()
    far[2, 3] = 1e6
    with pytest.raises(InputError, match=r"impossible position.*1e\+06"):
        read_volume(write(tmp_path / "ct.nii", far, None))


def test_a_ct_in_centimetres_is_refused_and_a_small_mask_is_not(tmp_path: Path) -> None:
    small = RAS.copy()
    small[:3] /= 10
    with pytest.raises(InputError, match=r"too small for a chest.*at least 100 mm.*xyzt_units"):
        read_volume(write(tmp_path / "ct.nii", small, None))
    read_mask(write(tmp_path / "mask.nii", RAS, None, chest()[1][:5, :5, :4]))


# Two forms


def double(affine: NDArray, axes: tuple[int, ...] = (0, 1, 2)) -> NDArray:
    larger = affine.copy()
    larger[:3, axes] *= 2
    return larger


def moved(x: float = 0, y: float = 0, z: float = 0) -> NDArray:
    affine = RAS.copy()
    affine[:3, 3] += (x, y, z)
    return affine


LEFT_HANDED = RAS @ np.diag([-1.0, 1, 1, 1])
DISAGREEING = {
    "twice as large": (double(RAS), RAS, "two voxel sizes.*16 × 16 × 32 mm.*8 × 8 × 16 mm"),
    "slices twice as thick": (double(RAS, (2,)), RAS, "two voxel sizes"),
    "a tenth larger": (RAS @ np.diag([1.1, 1.1, 1.1, 1]), RAS, "two voxel sizes"),
    "moved": (moved(z=42), RAS, "two places.*42 mm between"),
    "moved by 3 mm": (moved(x=3), RAS, "two places"),
    "turned": (rotated(10), RAS, r"two places.*\d+ mm along an axis"),
    "mirrored": (RAS, LEFT_HANDED, "two orientations.*RAS .sform. and LAS .qform."),
    "turned around": (RAS, rotated(180), "two orientations"),
    "axes swapped": (RAS, RAS[:, [1, 0, 2, 3]], "two orientations"),
    "tilted and mirrored": (tilted(20), tilted(20) @ np.diag([-1.0, 1, 1, 1]), "orientations"),
    "tilted and moved": (tilted(20), moved(z=30), "two places"),
    "tilted and thicker": (tilted(20), RAS @ np.diag([1, 1, 1.3, 1]), "two voxel sizes"),
}


@pytest.mark.parametrize("name", DISAGREEING)
def test_two_forms_that_disagree_are_refused(tmp_path: Path, name: str) -> None:
    sform, qform, words = DISAGREEING[name]
    path = write(tmp_path / "ct.nii", sform, qform)
    for read in (read_volume, read_mask):
        with pytest.raises(InputError, match=words):
            read(path)


def test_a_voxel_size_that_contradicts_an_sform_alone_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "ct.nii", double(RAS), None, pixdim=[1, *SIZES, 0, 0, 0, 0])
    with pytest.raises(InputError, match="two voxel sizes, so volumes are unknown"):
        read_volume(path)


UNUSED = {
    "qform of code 0 and another place": {"qform_code": 0, "qoffset_x": 500},
    "quaternion that is none": {"quatern_b": 5.0, "quatern_c": -7.0},
    "quaternion of NaN": {"quatern_d": np.nan},
    "offset that is not finite": {"qoffset_z": np.inf},
    "voxel size of 0": {"pixdim": [1, 0, 0, 0, 0, 0, 0, 0]},
    "negative voxel size": {"pixdim": [1, -8, -8, 16, 0, 0, 0, 0]},
    "voxel size of NaN": {"pixdim": [1, np.nan, 8, 16, 0, 0, 0, 0]},
    "voxel size that was never set": {"qform_code": 0, "pixdim": [1, 1, 1, 1, 1, 1, 1, 1]},
    "handedness of 0": {"pixdim": [0, 8, 8, 16, 0, 0, 0, 0]},
    "unknown code of the sform": {"sform_code": 9},
    "negative code of the qform": {"qform_code": -1},
}


@pytest.mark.parametrize("name", UNUSED)
@pytest.mark.parametrize("sform", [RAS, LEFT_HANDED, rotated(33)], ids=["RAS", "LAS", "oblique"])
def test_fields_that_do_not_decide_need_not_be_perfect(
    tmp_path: Path, name: str, sform: NDArray
) -> None:
    fields = dict(UNUSED[name])
    if sform is LEFT_HANDED and name == "handedness of 0":
        fields["qform_code"] = 0
    expect_affine(write(tmp_path / "ct.nii", sform, sform, **fields), sform)


def test_an_sform_of_a_negative_code_leaves_the_decision_to_the_qform(tmp_path: Path) -> None:
    expect_affine(write(tmp_path / "ct.nii", double(RAS), RAS, sform_code=-1), RAS)


@pytest.mark.parametrize("handedness", [0, 1, -1])
@pytest.mark.parametrize("affine", [RAS, rotated(20), rotated(180)])
def test_a_qform_alone_is_repaired_as_the_standard_says(
    tmp_path: Path, affine: NDArray, handedness: int
) -> None:
    pixdim = [handedness, *SIZES, 0, 0, 0, 0]
    expected = affine @ np.diag([1, 1, -1 if handedness < 0 else 1, 1])
    expect_affine(write(tmp_path / "ct.nii", None, affine, pixdim=pixdim), expected)


def test_a_quaternion_a_little_too_long_is_scaled_and_a_wrong_one_refused(tmp_path: Path) -> None:
    lps = rotated(180)
    expect_affine(write(tmp_path / "ct.nii", None, lps, quatern_d=1.004), lps)
    with pytest.raises(InputError, match=r"no valid orientation.*\(0, 0, 3\)"):
        read_volume(write(tmp_path / "ct.nii", None, lps, quatern_d=3))


@pytest.mark.parametrize("size", [0, -8, np.nan, np.inf])
def test_a_broken_voxel_size_beside_a_qform_that_decides_is_refused(
    tmp_path: Path, size: float
) -> None:
    path = write(tmp_path / "ct.nii", None, RAS, pixdim=[1, size, 8, 16, 0, 0, 0, 0])
    with pytest.raises(InputError, match="impossible voxel size"):
        read_volume(path)


@pytest.mark.parametrize("degrees", [5, 15, 25, 30, -20])
@pytest.mark.parametrize("qform", ["sheared as far as it can", "unsheared", "none"])
def test_a_tilted_gantry_shears_the_sform_and_not_the_qform(
    tmp_path: Path, degrees: float, qform: str
) -> None:
    sform = tilted(degrees)
    forms = {"sheared as far as it can": sform, "unsheared": RAS, "none": None}
    expect_affine(write(tmp_path / "ct.nii", sform, forms[qform]), sform)


# Sides


@pytest.mark.parametrize("form", ["sform", "qform", "both"])
@pytest.mark.parametrize("turn", [0, 15, 90, 180])
@pytest.mark.parametrize("is_mirrored", [False, True])
def test_the_heart_stays_on_the_left_whatever_form_and_order_the_file_has(
    tmp_path: Path, form: str, turn: float, is_mirrored: bool
) -> None:
    centre = np.eye(4)
    centre[:3, 3] = -(RAS @ [*(np.array(SHAPE) - 1) / 2, 1])[:3]
    back = np.linalg.inv(centre)
    affine = back @ rotated(turn, np.eye(4)) @ centre @ RAS
    if is_mirrored:
        flip = np.diag([-1.0, 1, 1, 1])
        flip[0, 3] = SHAPE[0] - 1
        affine = affine @ flip
    hu = np.rint(paint_chest(affine, SHAPE)[0]).astype(np.int16)
    sform = None if form == "qform" else affine
    qform = None if form == "sform" else affine
    volume = read_volume(write(tmp_path / "ct.nii", sform, qform, hu))
    np.testing.assert_allclose(volume.affine, affine, atol=0.05)
    grid = canonical_affine(volume.affine, SHAPE, volume.array, GRID, SPACING)
    on_grid = resample_to_grid(volume.array, volume.affine, grid, GRID, "ct")
    index = np.linalg.inv(grid) @ [-45, 25, 1020, 1]
    mirror = np.linalg.inv(grid) @ [45, 25, 1020, 1]
    heart, lung = (on_grid[tuple(np.rint(i[:3]).astype(int))] for i in (index, mirror))
    assert heart > -100 and lung < -700
    assert index[2] > mirror[2], "canonical x grows towards the patient's left"


# Masks that are written

POSITION_FIELDS = (
    *("sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "xyzt_units"),
    *("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
)
SOURCES = {
    "sform of a tilted gantry alone": ((tilted(20), None), {}),
    "qform alone": ((None, rotated(7)), {"qform_code": 2}),
    "both": ((RAS, RAS), {"sform_code": 4, "qform_code": 3}),
    "no unit": ((RAS, None), {"xyzt_units": 0}),
    "metres": ((RAS * [[0.001], [0.001], [0.001], [1]], None), {"xyzt_units": 1}),
    "broken qform": ((RAS, RAS), {"quatern_b": 5.0}),
    "no voxel size": ((RAS, None), {"pixdim": [0, 0, 0, 0, 0, 0, 0, 0]}),
}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_a_mask_has_the_position_of_its_cts_header_bit_for_bit(
    tmp_path: Path, name: str, kind: type[nib.Nifti1Image]
) -> None:
    (sform, qform), fields = SOURCES[name]
    ct = write(tmp_path / "ct.nii", sform, qform, None, kind, **fields)
    volume, bits = read_volume(ct), chest()[1]
    mask = tmp_path / "mask.nii"
    save_mask(bits, volume, mask)
    block = kind.header_class.template_dtype.itemsize
    source, copy = (
        kind.header_class(path.read_bytes()[:block], check=False) for path in (ct, mask)
    )
    for field in POSITION_FIELDS:
        assert source[field].tobytes() == copy[field].tobytes(), field
    assert source["pixdim"][:4].tobytes() == copy["pixdim"][:4].tobytes()
    again = read_mask(mask)
    np.testing.assert_array_equal(again.affine, volume.affine)
    np.testing.assert_array_equal(again.array, bits)
    np.testing.assert_array_equal(nib.load(mask).affine, nib.load(ct).affine)


def test_a_mask_of_a_big_endian_ct_with_a_scaling_holds_its_bits(tmp_path: Path) -> None:
    hu, bits = chest()
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(np.dtype(">i2"))
    image = nib.Nifti1Image(hu, tilted(12), header)
    image.header["cal_max"], image.header["intent_code"] = 400, 3
    image.header.set_slope_inter(2, -1024)
    nib.save(image, tmp_path / "ct.nii.gz")
    save_mask(bits, read_volume(tmp_path / "ct.nii.gz"), tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.nii.gz").array, bits)
    mask = nib.load(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(np.asarray(mask.dataobj), bits)
    np.testing.assert_array_equal(mask.affine, nib.load(tmp_path / "ct.nii.gz").affine)
    assert mask.header["cal_max"] == 0 and mask.header["intent_code"] == 0
    assert "bits: 1" in mask.header.extensions[0].text


def test_a_mask_of_a_volume_whose_affine_is_known_from_elsewhere_takes_that(
    tmp_path: Path,
) -> None:
    hu, bits = chest()
    save_mask(bits, Volume(hu, rotated(12), "metadata"), tmp_path / "mask.nii.gz")
    np.testing.assert_allclose(read_mask(tmp_path / "mask.nii.gz").affine, rotated(12), atol=1e-3)
