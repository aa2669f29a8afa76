"""A CT or mask file to an array with an affine, and stored numbers to Hounsfield units.

The way to the canonical grid and back is `rectvlm.data.frame`; its functions are named here too, so that who handles a
volume imports one module.
"""

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deflate
import nibabel as nib
import numpy as np
import psutil
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from rectvlm.data.frame import AIR, canonical_affine, mask_to_native, require_overlap, resample_to_grid
from rectvlm.types import Affine, HuDecision, Int16Volume, UserError

__all__ = [
    "Volume",
    "canonical_affine",
    "mask_to_native",
    "read_mask",
    "read_volume",
    "require_overlap",
    "resample_to_grid",
    "to_hu",
]

HU_LOW, HU_HIGH = AIR, 3071
_MAX_BYTES = 16 << 30
_MAX_DEFLATE_RATIO = 1032
"""The most that DEFLATE can expand a byte."""
_HEADER_BYTES = 540
_HEADERS: dict[int, type[nib.Nifti1Header]] = {348: nib.Nifti1Header, 540: nib.Nifti2Header}


@dataclass(frozen=True)
class Volume:
    """An array with its place in the world."""

    array: NDArray[Any]
    """(i, j, k), numbers as the file means them (its header's own scaling applied), often read-only."""
    affine: Affine
    """4 × 4, index to RAS+ mm."""
    where: str
    """The file or case, for messages."""


def read_volume(path: Path) -> Volume:
    """Read a CT from a NIfTI file; voxels keep their stored type where the header does not scale them.

    Raises:
        UserError: no such file, not a NIfTI, cut short, not 3-D, too large for memory, no orientation, a spacing that
            is zero or not finite, voxels that are not finite, or one value throughout.
    """
    volume = _read(path)
    if volume.array.min() == volume.array.max():
        raise UserError(f"{path} holds {volume.array.flat[0]} in every voxel: expected a CT; export the series again.")
    return volume


def read_mask(path: Path) -> Volume:
    """Read a mask of whole numbers from 0 to 255 as uint8; it may be empty.

    Raises:
        UserError: as `read_volume`, or values that are not of a mask.
    """
    volume = _read(path)
    array = volume.array.astype(np.uint8)
    if (array != volume.array).any():
        low, high = volume.array.min(), volume.array.max()
        raise UserError(f"{path} is not a mask: expected whole numbers from 0 to 255, found values {low} to {high}.")
    return Volume(array, volume.affine, volume.where)


def _read(path: Path) -> Volume:
    if path.is_dir():
        raise UserError(f"{path} is a folder: expected one NIfTI file (.nii or .nii.gz); convert DICOM with dcm2niix.")
    if not path.is_file():
        raise UserError(f"{path} does not exist: expected a NIfTI file (.nii or .nii.gz).")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes): copy or export it again.")
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    header = _header(path, packed)
    shape = _shape(header, path, packed)
    affine = _affine(header, path)
    array = _voxels(header, shape, path, packed)
    slope, inter = header.get_slope_inter()
    if slope is not None and (slope, inter) != (1, 0):
        array = array.astype(np.float32) * np.float32(slope) + np.float32(inter)
    if array.dtype.kind == "f":
        bad = array.size - np.count_nonzero(np.isfinite(array))
        if bad:
            raise UserError(f"{path} has {bad} voxels that are NaN or infinite: expected finite HU; export it again.")
    return Volume(array, affine, str(path))


def _header(path: Path, packed: bool) -> nib.Nifti1Header:
    try:
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            block = file.read(_HEADER_BYTES)
        size = {int.from_bytes(block[:4], order): order for order in ("little", "big")}
        kind = next((_HEADERS[n] for n in size if n in _HEADERS), None)
        if kind is None:
            raise HeaderDataError("it does not start with a NIfTI header")
        if len(block) < kind.template_dtype.itemsize:
            raise HeaderDataError(f"it ends after {len(block)} bytes, inside its header")
        # Unchecked: nibabel's check would turn a spacing of 0 into 1 mm, with only a line in the log.
        header = kind(block[: kind.template_dtype.itemsize], check=False)
        if int(header["datatype"]) not in nib.nifti1.data_type_codes.dtype:
            raise HeaderDataError(f"voxel type {int(header['datatype'])} is unknown")
        if not kind.template_dtype.itemsize + 4 <= header["vox_offset"] < 1 << 20:
            raise HeaderDataError(f"its voxels would start at byte {float(header['vox_offset']):g}")
    except (HeaderDataError, nib.spatialimages.HeaderTypeError, EOFError, zlib.error, OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a NIfTI file (.nii or .nii.gz): {error}; convert it or copy it again."
        ) from None
    if not header["magic"].item().startswith((b"n+1", b"n+2")):
        raise UserError(f"{path} is not a single-file NIfTI: expected .nii or .nii.gz, not a pair of .hdr and .img.")
    return header


def _shape(header: nib.Nifti1Header, path: Path, packed: bool) -> tuple[int, int, int]:
    """The three sides; sizes are compared with the file and with memory before anything is allocated."""
    shape = tuple(int(n) for n in header.get_data_shape())
    if len(shape) < 3 or set(shape[3:]) - {1} or min(shape) < 1:
        raise UserError(f"{path} has shape {shape}: expected one 3-D volume; split a series of volumes first.")
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise UserError(f"{path} has voxels of type {dtype}: expected integers or real numbers; convert it to int16.")
    size = path.stat().st_size
    needed = int(np.prod(shape, dtype=object)) * dtype.itemsize
    room = min(_MAX_BYTES, psutil.virtual_memory().available)
    if not packed and needed + int(header["vox_offset"]) > size:
        raise UserError(f"{path} is cut short: its header promises {needed} bytes of voxels, the file has {size}.")
    if needed > room or needed > size * _MAX_DEFLATE_RATIO:
        raise UserError(
            f"{path}: its header promises {shape} voxels, {needed / 2**30:.1f} GiB, more than the file of {size} bytes "
            f"or the {room / 2**30:.1f} GiB of memory can hold: the header is damaged, or crop the volume."
        )
    return shape[0], shape[1], shape[2]


def _affine(header: nib.Nifti1Header, path: Path) -> Affine:
    zooms = header["pixdim"][1:4].astype(float)
    codes = int(header["sform_code"]), int(header["qform_code"])
    if not (np.isfinite(zooms).all() and (zooms > 0).all()):
        raise UserError(
            f"{path} has voxel size {zooms.tolist()} mm: expected positive numbers; write the series' spacing."
        )
    if not any(codes):
        raise UserError(
            f"{path} has no orientation (sform and qform codes are 0), so left and right are unknown: "
            f"convert the DICOM series again, with its orientation."
        )
    try:
        forms = [form for form, code in zip((header.get_sform, header.get_qform), codes, strict=True) if code]
        affines = [np.asarray(form(), np.float64) for form in forms]
    except (HeaderDataError, ValueError, np.linalg.LinAlgError) as error:
        raise UserError(f"{path} has no valid orientation ({error}): convert the DICOM series again.") from None
    for affine in affines:
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        if not (np.isfinite(affine).all() and ((spacing > 1e-3) & (spacing < 1e3)).all()):
            raise UserError(
                f"{path} has voxel size {spacing.round(4).tolist()} mm in its affine: expected positive numbers; "
                f"write the series' spacing into it."
            )
        if abs(np.linalg.det(affine[:3, :3] / spacing)) < 0.5:
            raise UserError(f"{path} has an affine whose axes are not at right angles: resample it to a straight grid.")
    names = ["".join(nib.aff2axcodes(affine)) for affine in affines]
    if len(set(names)) > 1:
        raise UserError(
            f"{path} names two orientations, {names[0]} (sform) and {names[1]} (qform), so left and right are unknown: "
            f"convert the DICOM series again."
        )
    # As everywhere in NIfTI, the sform counts before the qform.
    return affines[0]


def _voxels(header: nib.Nifti1Header, shape: tuple[int, int, int], path: Path, packed: bool) -> NDArray[Any]:
    """Stored numbers (i, j, k) in Fortran order, without a detour over float64."""
    dtype, offset = header.get_data_dtype(), int(header["vox_offset"])
    count = int(np.prod(shape))
    if packed:
        data = _gunzip(path, offset + count * dtype.itemsize)
        array = np.frombuffer(data, dtype, count, offset)
    else:
        array = np.fromfile(path, dtype, count, offset=offset)
    if dtype.kind == "f" and dtype.itemsize == 8:
        array = array.astype(np.float32)
    return array.astype(array.dtype.newbyteorder("="), copy=False).reshape(shape, order="F")


def _gunzip(path: Path, needed: int) -> bytes | bytearray:
    """At least `needed` bytes of a gzip file; libdeflate where it is one plain member, the standard library else."""
    data = path.read_bytes()
    # The trailer holds the size of the last member, which is the only one in nearly every file.
    if int.from_bytes(data[-4:], "little") == needed:
        try:
            whole: bytearray = deflate.gzip_decompress(data)
        except deflate.DeflateError:
            whole = bytearray()
        if len(whole) == needed:
            return whole
    try:
        with gzip.open(path, "rb") as file:
            part = file.read(needed)
            while file.read(1 << 20):
                """To the end, where the checksum is."""
    except (EOFError, zlib.error, OSError) as error:
        raise UserError(f"{path} is cut short or damaged ({error}): copy it again.") from None
    if len(part) < needed:
        raise UserError(f"{path} is cut short: its header promises {needed} bytes, it unpacks to {len(part)}.")
    return part


# Hounsfield units


def to_hu(volume: Volume, slope: float | None = None, intercept: float | None = None) -> tuple[Int16Volume, HuDecision]:
    """Hounsfield units (i, j, k), int16 in [−1024, 3071], and how they came about.

    Whether the numbers are HU already is read from the numbers: air (and lung) must lie near −1000 and soft tissue
    near 0 to 80. `slope` and `intercept` of the series are applied only when that is not so and then makes it so,
    hence never twice. What lies below −1024 is padding outside the field of view and becomes air.

    Args:
        volume: numbers as the file means them.
        slope: of the series' metadata (DICOM RescaleSlope), when known.
        intercept: as above (RescaleIntercept).

    Raises:
        UserError: a windowed picture, or numbers that are not HU with or without slope and intercept.
    """
    sample = _sample(volume.array)
    levels = len(np.unique(sample))
    if volume.array.dtype == np.uint8 or levels <= 256:
        raise UserError(
            f"{volume.where} is a windowed picture, not CT numbers: it has {levels} grey levels from {sample.min():g} "
            f"to {sample.max():g}; expected HU from about −1000 to above 1000; export the original series."
        )
    as_stored = _Evidence.of(sample)
    given = (1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept))
    if as_stored.is_hu:
        _refuse_clipped(sample, volume.where)
        unused = "" if given == (1.0, 0.0) else f"; slope {given[0]:g} and intercept {given[1]:g} not applied again"
        return _finish(volume.array, 1.0, 0.0, f"already HU: {as_stored}{unused}")
    if given != (1.0, 0.0):
        rescaled = _Evidence.of(sample * np.float32(given[0]) + np.float32(given[1]))
        if rescaled.is_hu:
            reason = f"stored numbers were not HU ({as_stored}); with slope and intercept {rescaled}"
            return _finish(volume.array, *given, reason)
    raise UserError(
        f"{volume.where} is not in HU: expected air or lung near −1000 and soft tissue near 0 to 80, found {as_stored} "
        f"in numbers from {sample.min():g} to {sample.max():g}"
        + (f", and slope {given[0]:g}, intercept {given[1]:g} do not mend it" if given != (1.0, 0.0) else "")
        + "; give the series' RescaleSlope and RescaleIntercept, or export it without rescaling twice."
    )


@dataclass(frozen=True)
class _Evidence:
    """Shares of the voxels inside the field of view."""

    air: float
    soft: float

    @classmethod
    def of(cls, values: NDArray[Any]) -> "_Evidence":
        inside = values[values >= AIR - 26]
        count = max(1, inside.size)
        air = np.count_nonzero(inside <= -700) / count
        soft = np.count_nonzero((inside >= -150) & (inside <= 150)) / count
        return cls(air, soft)

    @property
    def is_hu(self) -> bool:
        """Both are there: an offset of ±1000 or a scale loses one of them."""
        return self.air >= 0.05 and self.soft >= 0.05

    def __str__(self) -> str:
        return f"{self.air:.0%} of voxels are air or lung (−1050 to −700), {self.soft:.0%} soft tissue (−150 to 150)"


def _sample(array: NDArray[Any], about: int = 1_000_000) -> NDArray[np.float32]:
    """About a million voxels from all over the volume, in memory order."""
    step = max(1, int(np.ceil((array.size / about) ** (1 / 3))))
    return array[::step, ::step, ::step].astype(np.float32).ravel(order="K")


def _refuse_clipped(sample: NDArray[np.float32], where: str) -> None:
    """A display window cuts the top off: much of the body then sits at one highest value."""
    top = sample.max()
    share = np.count_nonzero(sample == top) / sample.size
    if top < 1000 and share > 0.02:
        raise UserError(
            f"{where} is a windowed picture, not CT numbers: {share:.0%} of its voxels are at {top:g}, the highest; "
            f"export the original series."
        )


def _finish(array: NDArray[Any], slope: float, intercept: float, reason: str) -> tuple[Int16Volume, HuDecision]:
    values = array
    if (slope, intercept) != (1.0, 0.0):
        values = array.astype(np.float32) * np.float32(slope) + np.float32(intercept)
    if values.dtype.kind == "f":
        values = np.rint(values)
    padding = int(np.count_nonzero(values < HU_LOW))
    hu = np.clip(values, HU_LOW, HU_HIGH).astype(np.int16, copy=False)
    if padding:
        reason += f"; {padding} voxels below {HU_LOW} set to air"
    return hu, HuDecision(slope, intercept, reason, padding)
