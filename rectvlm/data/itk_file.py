"""Reading of MetaImage (`.mha`, `.mhd`) and NRRD (`.nrrd`) files with SimpleITK.

ITK's world is LPS, ours RAS. What ITK would assume where a header is silent is refused here.
"""

import re
from pathlib import Path

import numpy as np
import SimpleITK

from rectvlm.data.file_checks import (
    require_finite_voxels,
    require_possible_size,
    require_regular_file,
    truncated_error,
)
from rectvlm.data.nifti_affine import require_possible_affine, require_stated_affine
from rectvlm.types import Affine, InputError, Volume

META_IMAGE_SUFFIXES = (".mha", ".mhd")
_MAX_HEADER_BYTES = 1 << 16
_NRRD_SPACES = {
    *("left-posterior-superior", "lps", "right-anterior-superior", "ras"),
    *("left-anterior-superior", "las"),
}
"""Spaces of NRRD in which ITK knows left from right."""
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def read_itk_file(path: Path) -> Volume:
    """Read a MetaImage or NRRD file as (i, j, k); voxels keep their stored type, never float64.

    Raises:
        InputError: the file is broken, cut short, no single 3-D volume of numbers, larger than the
            memory, without an orientation, or names data in another place.
    """
    require_regular_file(path, "a MetaImage or NRRD file (.mha, .mhd or .nrrd)")
    is_meta_image = path.name.lower().endswith(META_IMAGE_SUFFIXES)
    fields = _read_header_fields(path, "=" if is_meta_image else ":")
    data_file = _meta_image_data(path, fields) if is_meta_image else path
    if not is_meta_image:
        _require_nrrd_space(path, fields)
    reader = SimpleITK.ImageFileReader()
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    reader.SetImageIO("MetaImageIO" if is_meta_image else "NrrdImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        _require_volume(reader, path, data_file, fields)
        image = reader.Execute()
    except RuntimeError as error:
        raise _damaged_error(path, error) from None
    array = SimpleITK.GetArrayFromImage(image).reshape(reader.GetSize()[2::-1]).transpose(2, 1, 0)
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    require_finite_voxels(array, path)
    return Volume(array, _lps_affine(reader), str(path))


def _read_header_fields(path: Path, separator: str) -> dict[str, str]:
    """Fields of a text header by their names in lower case; the first of each counts."""
    with path.open("rb") as file:
        block = file.read(_MAX_HEADER_BYTES)
    if block.lower().count(b"elementdatafile") > 1:
        block = b""  # MetaIO takes other separators too, and may follow the other one
    if separator == ":":
        block = _read_nrrd_header(path, block)
    fields: dict[str, str] = {}
    for line in block.split(b"\n"):
        text = line.decode("latin-1").strip()
        name, found, value = text.partition(separator)
        if found and not text.startswith("#"):
            fields.setdefault(name.strip().lower(), value.strip(" ="))
        if name.strip().lower() == "elementdatafile":
            break
    return fields


def _read_nrrd_header(path: Path, block: bytes) -> bytes:
    """The header at the beginning of a NRRD file, up to the empty line.

    ITK ends a line at a bare carriage return too: a comment with one would hide a field, such as
    another file's name, from us alone.

    Raises:
        InputError: there is no empty line, or a carriage return within a line.
    """
    end = re.search(rb"\r?\n\r?\n", block)
    header = block[: end.start()] if end else block
    if end is None or re.search(rb"\r(?!\n)", header):
        raise InputError(
            path,
            "has a header that cannot be read",
            expected=f"lines of text and an empty one within {_MAX_HEADER_BYTES} bytes",
            found="a carriage return within a line" if end else "no empty line",
            remedy="save it again as one .nrrd",
        )
    return header


def _meta_image_data(path: Path, fields: dict[str, str]) -> Path:
    """File with the voxels: the header's own, or one beside it.

    Raises:
        InputError: the header names a file in another place, or several.
    """
    name = fields.get("elementdatafile", "")
    if name.upper() == "LOCAL":
        return path
    is_plain_name = re.fullmatch(r"[^/\\:%]+", name) and name.upper() != "LIST"
    if not is_plain_name or name.startswith("."):
        raise InputError(
            path,
            "names its voxels in another place",
            expected="LOCAL or the name of one file beside it (ElementDataFile)",
            found=repr(name[:100]),
            remedy="save it as .mha",
        )
    data_file = path.with_name(name)
    require_regular_file(data_file, "a file of voxels")
    return data_file


def _require_nrrd_space(path: Path, fields: dict[str, str]) -> None:
    """Refuse a NRRD that does not say where left is; ITK would take it for LPS.

    Raises:
        InputError: its space is missing or no anatomical one, or its data lie in another file.
    """
    if "data file" in fields or "datafile" in fields:
        raise InputError(
            path,
            "names its voxels in another place",
            expected="header and voxels in one file",
            found="a detached header",
            remedy="save it as one .nrrd",
        )
    space = fields.get("space", "")
    if space.lower() not in _NRRD_SPACES or "space directions" not in fields:
        raise InputError(
            path,
            "has no orientation, so left and right are unknown",
            expected="space LPS, RAS or LAS with space directions",
            found=f"space {space[:40]!r}",
            remedy="convert the DICOM series again, with its orientation",
        )


def _require_volume(
    reader: SimpleITK.ImageFileReader, path: Path, data_file: Path, fields: dict[str, str]
) -> None:
    """Check kind, size and position by the header, before the voxels are read.

    Raises:
        InputError: see `read_itk_file`.
    """
    size = reader.GetSize()
    if len(size) < 3 or set(size[3:]) - {1}:
        raise InputError(
            path,
            "is not one volume",
            expected="3 dimensions",
            found=f"shape {size}",
            remedy="split a series of volumes first",
        )
    pixel_type = SimpleITK.GetPixelIDValueAsString(reader.GetPixelID())
    if reader.GetNumberOfComponents() != 1 or "complex" in pixel_type:
        raise InputError(
            path,
            "has voxels of a strange type",
            expected="integers or real numbers",
            found=f"{reader.GetNumberOfComponents()} × {pixel_type}",
            remedy="convert it to int16",
        )
    needed = int(np.prod(size, dtype=object)) * _voxel_bytes(pixel_type)
    file_bytes = data_file.stat().st_size
    is_plain = fields.get("encoding", "").lower() == "raw" or (
        "elementdatafile" in fields and fields.get("compresseddata", "").lower() != "true"
    )
    if is_plain and needed > file_bytes:
        raise truncated_error(data_file, needed, file_bytes)
    require_possible_size(path, size, needed, file_bytes)
    affine = _lps_affine(reader)
    require_stated_affine(affine, size[:3], path)
    require_possible_affine(affine, size[:3], path, "(by its header)")


def _voxel_bytes(pixel_type: str) -> int:
    """Bytes of a voxel by ITK's name of its type."""
    bits = re.search(r"(8|16|32|64)-bit", pixel_type)
    return int(bits[1]) // 8 if bits else 8


def _lps_affine(reader: SimpleITK.ImageFileReader) -> Affine:
    """Index (i, j, k, 1) to RAS+ mm."""
    n = len(reader.GetSize())
    direction = np.array(reader.GetDirection()).reshape(n, n)[:3, :3]
    affine = np.eye(4)
    affine[:3, :3] = direction * reader.GetSpacing()[:3]
    affine[:3, 3] = reader.GetOrigin()[:3]
    ras_affine: Affine = _LPS_TO_RAS @ affine
    return ras_affine


def _damaged_error(path: Path, error: RuntimeError) -> InputError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return InputError(
        path,
        "is cut short or damaged",
        expected="a whole MetaImage or NRRD file",
        found=lines[-1].rstrip(".")[-200:] if lines else "no reason by ITK",
        remedy="copy or export it again",
    )
