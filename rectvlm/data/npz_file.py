"""Reading of NumPy archives (`.npz`) that declare where their voxels lie.

An archive holds one 3-D array and either `affine`, or `spacing` with `orientation` or `direction`:

- `affine`: 4 × 4, index (i, j, k, 1) to RAS+ mm, as in NIfTI
- `spacing`: distance of voxels along each axis of the array, mm
- `orientation`: three letters, the side towards which each axis grows, such as "SPL"
- `direction`: 3 × 3, whose columns are the axes' unit vectors in RAS+
- `origin`: RAS+ position of the first voxel, mm; by default 0, 0, 0
"""

import zipfile
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from rectvlm.data.file_checks import (
    require_finite_voxels,
    require_possible_size,
    require_regular_file,
)
from rectvlm.data.nifti_affine import require_possible_affine, require_stated_affine
from rectvlm.types import Affine, InputError, Volume

_GEOMETRY_KEYS = ("affine", "spacing", "orientation", "direction", "origin")
_MAX_GEOMETRY_BYTES = 4096


def read_npz(path: Path, default_affine: Affine | None = None) -> Volume:
    """Read a CT from an archive of NumPy arrays; voxels keep their type, never float64.

    Args:
        path: of the archive.
        default_affine: index to RAS+ mm for an archive that declares nothing, when it is known
            from elsewhere.

    Raises:
        InputError: the file is broken, larger than the memory, without exactly one 3-D array of
            numbers, or does not say where its voxels lie.
    """
    require_regular_file(path, "an archive of NumPy arrays (.npz)")
    try:
        with zipfile.ZipFile(path) as archive:
            headers = {
                info.filename.removesuffix(".npy"): (info, _read_array_header(archive, info))
                for info in archive.infolist()
                if info.filename.endswith(".npy")
            }
        key, shape = _find_volume({name: header for name, (_, header) in headers.items()}, path)
        declared = headers[key][1][1].itemsize * int(np.prod(shape, dtype=object))
        needed = max(declared, headers[key][0].file_size)
        require_possible_size(path, shape, needed, path.stat().st_size)
        if declared > headers[key][0].file_size:
            raise ValueError(f"{headers[key][0].file_size} bytes of {declared} in {key!r}")
        geometry_names = [
            name
            for name in _GEOMETRY_KEYS
            if name in headers and headers[name][0].file_size <= _MAX_GEOMETRY_BYTES
        ]
        with np.load(path, allow_pickle=False) as arrays:
            geometry = {name: arrays[name] for name in geometry_names}
            affine = _read_geometry(geometry, shape, path, default_affine)
            array = arrays[key]
    except (
        *(zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, KeyError),
        *(NotImplementedError, RuntimeError, SyntaxError),
    ) as error:
        raise InputError(
            path,
            "is cut short or damaged",
            expected="an archive of plain arrays by numpy.savez",
            found=str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__,
            remedy="save it again",
        ) from None
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    require_finite_voxels(array, path)
    return Volume(array, affine, str(path))


def _read_array_header(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo
) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of an array, without its numbers."""
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            read = np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    return shape, dtype


def _find_volume(
    headers: dict[str, tuple[tuple[int, ...], np.dtype[Any]]], path: Path
) -> tuple[str, tuple[int, ...]]:
    """Name and shape of the one 3-D array.

    Raises:
        InputError: there is none, or several.
    """
    volumes = [
        (name, shape)
        for name, (shape, dtype) in headers.items()
        if len(shape) == 3 and dtype.kind in "iuf" and dtype.itemsize <= 8
    ]
    if len(volumes) != 1:
        arrays = ", ".join(f"{name} {shape} {dtype}" for name, (shape, dtype) in headers.items())
        raise InputError(
            path,
            "is not one volume",
            expected="exactly one array of numbers with 3 dimensions",
            found=arrays[:300] or "no arrays",
            remedy="save the CT alone, with its affine",
        )
    return volumes[0]


def _read_geometry(
    arrays: dict[str, NDArray[Any]],
    shape: tuple[int, ...],
    path: Path,
    default_affine: Affine | None,
) -> Affine:
    """Index (i, j, k, 1) to RAS+ mm, as declared; the default where nothing is.

    Raises:
        InputError: nothing is declared, or no valid geometry.
    """
    affine = np.eye(4)
    if not arrays and default_affine is not None:
        return default_affine
    if "affine" in arrays:
        affine = arrays["affine"].astype(np.float64)
        if affine.shape != (4, 4) or not np.array_equal(affine[3], [0, 0, 0, 1]):
            raise _geometry_error(path, f"an affine of shape {affine.shape}")
        require_stated_affine(affine, shape, path)
    elif "spacing" in arrays and ("orientation" in arrays or "direction" in arrays):
        spacing = arrays["spacing"].astype(np.float64)
        origin = arrays.get("origin", np.zeros(3)).astype(np.float64)
        if spacing.shape != (3,) or origin.shape != (3,):
            raise _geometry_error(path, f"spacing {spacing.shape} and origin {origin.shape}")
        affine[:3, :3] = _read_directions(arrays, path) * spacing
        affine[:3, 3] = origin
    else:
        raise _geometry_error(path, f"{', '.join(arrays) or 'neither'}")
    require_possible_affine(affine, shape, path, "(as declared in it)")
    return affine


def _read_directions(arrays: dict[str, NDArray[Any]], path: Path) -> NDArray[np.float64]:
    """Unit vectors of the axes as columns, RAS+."""
    if "direction" in arrays:
        directions = arrays["direction"].astype(np.float64)
        is_unit = directions.shape == (3, 3) and np.allclose(
            np.linalg.norm(directions, axis=0), 1, atol=0.01
        )
        if not is_unit:
            raise _geometry_error(path, "a direction whose columns are no unit vectors")
        return directions
    letters = "".join(map(str, np.atleast_1d(arrays["orientation"]))).upper()
    try:
        ornt = nib.orientations.axcodes2ornt(tuple(letters))
    except ValueError:
        ornt = np.empty((0, 2))
    if ornt.shape != (3, 2) or sorted(ornt[:, 0]) != [0, 1, 2]:
        raise _geometry_error(path, f"orientation {letters[:20]!r}")
    directions = np.zeros((3, 3))
    for axis, (world_axis, sign) in enumerate(ornt):
        directions[int(world_axis), axis] = sign
    return directions


def _geometry_error(path: Path, found: str) -> InputError:
    return InputError(
        path,
        "does not say where its voxels lie, so left and right are unknown",
        expected="an array 'affine' (4 × 4, index to RAS mm), or 'spacing' (mm for each axis of "
        "the array) with 'orientation' (such as 'SPL', the side each axis grows to) or "
        "'direction' (3 × 3)",
        found=found,
        remedy="add these names with numpy.savez",
    )
