"""Where the voxels of a NIfTI file lie in the patient, in mm.

The rules are those of the standard (nifti1.h). The sform decides where its code is above 0, else
the qform. A form that decides must be sound; a broken qform beside an sform is ignored. Sound
fields that contradict each other are refused, since other programs may believe the other one.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.quaternions import quat2mat
from numpy.typing import NDArray

from rectvlm.types import Affine, InputError

_UNITS = {1: ("metres", 1000.0), 2: ("millimetres", 1.0), 3: ("micrometres", 0.001)}
"""Names of the spatial units of `xyzt_units`, and their lengths in mm."""
_NO_UNIT = ("no unit, so millimetres", 1.0)
_MIN_SPACING_MM, _MAX_SPACING_MM = 0.1, 50.0
_MAX_EXTENT_MM = 3000.0
"""Longest side of a volume: more than the reach of a CT table."""
_MAX_POSITION_MM = 100_000.0
_ROUNDING_MM = 1e-4
"""Largest distance from 0 that a program's rounding makes of an origin of 0."""
_MIN_DETERMINANT = 0.5
"""Least determinant of the axes' directions: a gantry tilted by 30° leaves 0.87."""
_MAX_QUATERNION_LENGTH = 1.05
"""Longest (b, c, d) that rounding explains; it is scaled to 1, as in the standard's own code."""
_TOLERANCE_MM, _SIZE_TOLERANCE = 1.0, 0.01
_POSITION_FIELDS = (
    "sform_code",
    "qform_code",
    "srow_x",
    "srow_y",
    "srow_z",
    "quatern_b",
    "quatern_c",
    "quatern_d",
    "qoffset_x",
    "qoffset_y",
    "qoffset_z",
    "xyzt_units",
)


def read_affine(
    header: nib.Nifti1Header, shape: Sequence[int], path: Path, default_affine: Affine | None
) -> tuple[Affine, bool]:
    """Read the affine of a header.

    Args:
        header: as stored, without nibabel's corrections.
        shape: shape (i, j, k) of the volume.
        path: file in messages.
        default_affine: affine of a file whose header is blank, where it is known from elsewhere.

    Returns:
        4 × 4, index (i, j, k, 1) to RAS+ mm, and whether it is the header's.

    Raises:
        InputError: no form decides, the one that does says nothing about sides, is broken or
            impossible in size or place, or is contradicted by the other form or the voxel size.
    """
    unit_name, unit_mm = _UNITS.get(int(header["xyzt_units"]) & 7, _NO_UNIT)
    affine, form = None, "none"
    if header["sform_code"] > 0:
        affine, form = _scale_affine(_sform(header), unit_mm), "sform"
    elif header["qform_code"] > 0:
        affine, form = _scale_affine(_require_qform(header, path), unit_mm), "qform"
    if affine is not None and not _is_made_up(affine, shape):
        require_possible_affine(affine, shape, path, f"({unit_name} by its {form})")
        if form == "sform":
            _require_agreement(header, affine, unit_mm, shape, path)
        return affine, True
    if default_affine is None:
        raise _blank_header_error(affine, path)
    for sizes in (_pixdim(header) * unit_mm, None if affine is None else voxel_sizes(affine)):
        if sizes is not None:
            _require_same_size(sizes, default_affine, path)
    require_possible_affine(default_affine, shape, path, "(by the metadata)")
    return default_affine, False


def is_blank_affine(affine: Affine) -> bool:
    """Whether an affine holds a voxel size at most: axes along the world's, origin at 0.

    Programs that know no better write it so. No scanner puts its first voxel there.
    """
    if not np.isfinite(affine).all():
        return False
    # The axes of a qform are rounded by up to a tenth of a degree.
    is_used = np.abs(affine[:3, :3]) > 2e-3 * np.abs(affine[:3, :3]).max()
    has_axes_of_world = (is_used.sum(axis=0) == 1).all() and (is_used.sum(axis=1) == 1).all()
    return bool(has_axes_of_world and (np.abs(affine[:3, 3]) < _ROUNDING_MM).all())


def copy_position(source: nib.Nifti1Header, target: nib.Nifti1Header) -> None:
    """Copy the position fields of a header bit for bit: forms with codes, voxel size and unit."""
    for name in _POSITION_FIELDS:
        target[name] = source[name]
    target["pixdim"][:4] = source["pixdim"][:4]


# Forms of a header


def _sform(header: nib.Nifti1Header) -> Affine:
    rows = [header[name] for name in ("srow_x", "srow_y", "srow_z")]
    return np.vstack([*rows, [0, 0, 0, 1]]).astype(np.float64)


def _quaternion(header: nib.Nifti1Header) -> NDArray[np.float64]:
    """(b, c, d) of the qform's rotation."""
    return np.array([header[f"quatern_{name}"] for name in "bcd"], np.float64)


def _pixdim(header: nib.Nifti1Header) -> NDArray[np.float64]:
    """Voxel size (i, j, k) as stored."""
    return np.asarray(header["pixdim"][1:4], np.float64)


def _is_size(sizes: NDArray[np.float64]) -> bool:
    return bool((np.isfinite(sizes) & (sizes > 0)).all())


def _qform(header: nib.Nifti1Header) -> Affine | None:
    """The qform by the standard's own code; None where its numbers are no rotation and no size.

    A handedness (`pixdim[0]`) of 0 means 1, and (b, c, d) longer than 1 by rounding is scaled.
    """
    quaternion, sizes = _quaternion(header), _pixdim(header)
    length = float(np.linalg.norm(quaternion)) if np.isfinite(quaternion).all() else np.inf
    offset = [float(header[f"qoffset_{name}"]) for name in "xyz"]
    handedness = float(header["pixdim"][0])
    is_sound = _is_size(sizes) and np.isfinite([*offset, handedness]).all()
    if not is_sound or length > _MAX_QUATERNION_LENGTH:
        return None
    scalar = np.sqrt(max(0.0, 1 - length**2))
    affine = np.eye(4)
    affine[:3, :3] = quat2mat([scalar, *quaternion]) * sizes
    affine[:3, 2] *= -1 if handedness < 0 else 1
    affine[:3, 3] = offset
    return affine


def _require_qform(header: nib.Nifti1Header, path: Path) -> Affine:
    affine = _qform(header)
    if affine is not None:
        return affine
    if not _is_size(_pixdim(header)):
        raise _size_error(path, f"{_format_sizes(_pixdim(header))} (pixdim)")
    values = ", ".join(f"{value:g}" for value in _quaternion(header))
    raise InputError(
        path,
        "has no valid orientation",
        expected="a rotation: a quaternion (b, c, d) of length 1 at most, a finite offset and "
        "pixdim[0] of 1 or −1",
        found=f"({values}) and pixdim[0] of {header['pixdim'][0]:g} in its qform",
        remedy="convert the DICOM series again",
    )


def _scale_affine(affine: Affine, unit_mm: float) -> Affine:
    scaled: Affine = affine.copy()
    scaled[:3] *= unit_mm
    return scaled


# What is believed


def _is_made_up(affine: Affine, shape: Sequence[int]) -> bool:
    """Whether a program made the affine up: a blank one, or the centred one of a blank header.

    nibabel gives a file without orientation the latter (left-handed, world's origin at the
    volume's centre), and writes it into what is saved from it. Turned to other axes, the world's
    origin of a blank one lies at another corner of the volume, and a centred one is right-handed.
    """
    if not np.isfinite(affine).all():
        return False
    for corner in itertools.product(*((0, size - 1) for size in shape)):
        moved = affine.copy()
        moved[:3, 3] = affine[:3] @ (*corner, 1)
        if is_blank_affine(moved):
            return True
    diagonal = np.diag(affine)[:3]
    centred = np.diag([*diagonal, 1.0])
    centred[:3, 3] = -diagonal * (np.array(shape) - 1) / 2
    is_centred = (diagonal[1:] > 0).all() and np.allclose(affine, centred, rtol=1e-5, atol=1e-5)
    return bool(is_centred)


def require_stated_affine(affine: Affine, shape: Sequence[int], path: Path) -> None:
    """Refuse an affine that a program made up for a file without an orientation.

    Raises:
        InputError: it holds a voxel size at most, so left and right are unknown.
    """
    if _is_made_up(affine, shape):
        raise _blank_header_error(affine, path)


def require_possible_affine(affine: Affine, shape: Sequence[int], path: Path, source: str) -> None:
    """Refuse voxels and volumes of sizes that no CT has, before anything is allocated for them.

    Args:
        affine: 4 × 4, index (i, j, k, 1) to RAS+ mm.
        shape: shape (i, j, k) of the volume.
        path: file in the message.
        source: where the affine is from, in brackets, for the message.

    Raises:
        InputError: numbers that are not finite, an impossible voxel size, extent or position, or
            axes far from right angles.
    """
    is_finite = np.isfinite(affine).all() and np.abs(affine).max() < 1e150
    sizes = voxel_sizes(affine) if is_finite else np.full(3, np.nan)
    if not ((sizes >= _MIN_SPACING_MM) & (sizes <= _MAX_SPACING_MM)).all():
        raise _size_error(path, f"{_format_sizes(sizes)} {source}")
    extents = sizes * shape
    if extents.max() > _MAX_EXTENT_MM:
        raise InputError(
            path,
            "has an impossible extent",
            expected=f"sides of at most {_MAX_EXTENT_MM:g} mm",
            found=f"{_format_sizes(extents)} from voxels of {_format_sizes(sizes)} {source}",
            remedy="write the series' voxel size and unit into it",
        )
    if np.abs(affine[:3, 3]).max() > _MAX_POSITION_MM:
        raise InputError(
            path,
            "has an impossible position",
            expected=f"a first voxel within {_MAX_POSITION_MM / 1000:g} m of the scanner's origin",
            found=f"{', '.join(f'{value:.4g}' for value in affine[:3, 3])} mm {source}",
            remedy="convert the DICOM series again",
        )
    determinant = abs(np.linalg.det(affine[:3, :3] / sizes))
    if determinant < _MIN_DETERMINANT:
        raise InputError(
            path,
            "has axes that are not at right angles",
            expected="a straight grid",
            found=f"a determinant of {determinant:.2g} instead of 1",
            remedy="resample it to a straight grid",
        )


def _require_agreement(
    header: nib.Nifti1Header, sform: Affine, unit_mm: float, shape: Sequence[int], path: Path
) -> None:
    """Refuse an sform that a sound qform or voxel size contradicts.

    A tilted gantry shears the sform. A qform cannot hold that, so each axis may differ from it by
    as much as the sform's is sheared.

    Raises:
        InputError: the voxels' sizes or places differ.
    """
    sizes, pixdim = voxel_sizes(sform), _pixdim(header)
    shear = _sines_of_shear(sform)
    # Writers that know nothing of `pixdim` leave it at 1 throughout.
    if _is_size(pixdim) and not (pixdim == 1).all():
        ratios = pixdim * unit_mm / sizes
        longest = 1 / np.sqrt(1 - np.minimum(shear, 0.9) ** 2) + _SIZE_TOLERANCE
        if (np.maximum(ratios, 1 / ratios) > longest).any():
            raise InputError(
                path,
                "names two voxel sizes, so volumes are unknown",
                expected="one",
                found=f"{_format_sizes(sizes)} (sform) and {_format_sizes(pixdim * unit_mm)} "
                "(pixdim)",
                remedy="convert the DICOM series again",
            )
    stored_qform = _qform(header) if header["qform_code"] > 0 else None
    if stored_qform is None:
        return
    qform = _scale_affine(stored_qform, unit_mm)
    steps = np.append(np.array(shape) - 1, 1)
    distances = np.linalg.norm((sform - qform)[:3], axis=0) * steps
    allowed = _TOLERANCE_MM + np.append((shear + _SIZE_TOLERANCE) * sizes * steps[:3], 0)
    if (distances <= allowed).all():
        return
    sform_axes, qform_axes = ("".join(nib.aff2axcodes(form)) for form in (sform, qform))
    if sform_axes != qform_axes:
        raise InputError(
            path,
            "names two orientations, so left and right are unknown",
            expected="one",
            found=f"{sform_axes} (sform) and {qform_axes} (qform)",
            remedy="convert the DICOM series again",
        )
    raise InputError(
        path,
        "names two places",
        expected="an sform and a qform that agree",
        found=f"{distances[3]:.0f} mm between their first voxels, and up to "
        f"{distances[:3].max():.0f} mm along an axis",
        remedy="convert the DICOM series again, or set the code of the wrong one to 0",
    )


def _sines_of_shear(affine: Affine) -> NDArray[np.float64]:
    """How far each axis is from a right angle with the others, as a sine."""
    directions = affine[:3, :3] / voxel_sizes(affine)
    cosines = np.abs(directions.T @ directions)
    np.fill_diagonal(cosines, 0)
    sines: NDArray[np.float64] = cosines.max(axis=0)
    return sines


def _require_same_size(sizes: NDArray[np.float64], affine: Affine, path: Path) -> None:
    """Refuse metadata of another voxel size than a blank header, where that has any."""
    has_size = _is_size(sizes) and not (sizes == 1).all()
    if has_size and not np.allclose(sizes, voxel_sizes(affine), rtol=_SIZE_TOLERANCE):
        raise InputError(
            path,
            "has a blank header (voxels along the world's axes, at the origin) and no metadata "
            "that fits, so left and right are unknown",
            expected=f"the metadata's voxels of {_format_sizes(voxel_sizes(affine))}",
            found=_format_sizes(sizes),
            remedy="take the volume of the fixed tree",
        )


def _blank_header_error(affine: Affine | None, path: Path) -> InputError:
    if affine is None:
        return InputError(
            path,
            "has no orientation, so left and right are unknown",
            expected="an sform or a qform",
            found="codes 0 for both",
            remedy="convert the DICOM series again, with its orientation",
        )
    kind = "at the origin" if is_blank_affine(affine) else "around the origin"
    return InputError(
        path,
        f"has a blank header (voxels along the world's axes, {kind}), so left and right are "
        "unknown",
        expected="the affine of the scan",
        found=f"an affine that a program made up, with voxels of "
        f"{_format_sizes(voxel_sizes(affine))}",
        remedy="convert the DICOM series again; write the affine of its CT into a mask (those of "
        "RadGenome-ChestCT need it); of CT-RATE, take the volume of the fixed tree",
    )


def _format_sizes(sizes: NDArray[np.float64]) -> str:
    return " × ".join(f"{size:.4g}" for size in sizes) + " mm"


def _size_error(path: Path, found: str) -> InputError:
    return InputError(
        path,
        "has an impossible voxel size",
        expected=f"{_MIN_SPACING_MM:g} to {_MAX_SPACING_MM:g} mm",
        found=found,
        remedy="write the series' voxel size and unit (xyzt_units) into it",
    )
