"""Pixels of DICOM slices as HU: pydicom reads plain ones, SimpleITK decodes compressed ones."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import SimpleITK
from numpy.typing import NDArray

from rectvlm.data.dicom.headers import DicomSlice, syntax_name
from rectvlm.data.hounsfield import MAX_HU
from rectvlm.labels import AIR_HU
from rectvlm.types import InputError


class HuReader:
    """Reads slices of a series; a file of many frames is read once."""

    def __init__(self, where: Path) -> None:
        self.where = where
        self.file: Path | None = None
        self.frames: NDArray[Any] | None = None

    def read_slice(self, piece: DicomSlice) -> NDArray[Any]:
        """HU (row, column): integers where slope and intercept are, else float32.

        A padding value above all HU becomes air; one below is left to `to_hu`.

        Raises:
            InputError: the pixels are cut short, cannot be decoded, or have another size.
        """
        if piece.is_compressed:
            hu = self._decode(piece)
        else:
            hu = rescale(self._read_plain(piece), piece.slope, piece.intercept)
        if hu.shape != (piece.rows, piece.columns):
            raise self._error(
                piece,
                "has pixels of another size than its header says",
                f"{piece.rows} × {piece.columns}",
                " × ".join(map(str, hu.shape)),
            )
        if piece.padding is not None:
            padding_hu = piece.padding * piece.slope + piece.intercept
            if padding_hu > MAX_HU:
                hu = np.where(hu == padding_hu, hu.dtype.type(AIR_HU), hu)
        return hu

    def _read_plain(self, piece: DicomSlice) -> NDArray[Any]:
        """Stored numbers (row, column)."""
        if piece.file != self.file or self.frames is None:
            n_bytes = 0
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    dataset = pydicom.dcmread(piece.file)
                    n_bytes = len(dataset.get("PixelData") or b"")
                    self.frames = dataset.pixel_array
            except MemoryError:
                raise
            except Exception:  # pydicom has many for damaged data, and quotes the header in some
                raise self._error(
                    piece,
                    "has pixels that are cut short or damaged",
                    f"{piece.rows} × {piece.columns} pixels of {piece.bits} bits",
                    f"{n_bytes} bytes of pixels",
                ) from None
            self.file = piece.file
        frames: NDArray[Any] = self.frames
        return frames[piece.frame] if piece.frame is not None and frames.ndim == 3 else frames

    def _decode(self, piece: DicomSlice) -> NDArray[Any]:
        """HU (row, column) of a compressed slice; ITK applies slope and intercept itself."""
        if piece.frame is not None:
            raise self._error(
                piece,
                "holds several compressed frames, which are not read",
                "one slice a file, or plain pixels",
                syntax_name(piece.transfer_syntax),
                "decompress it, for example with dcmdjpeg of DCMTK",
            )
        SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
        reader = SimpleITK.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(str(piece.file))
        try:
            array = SimpleITK.GetArrayFromImage(reader.Execute())
        except RuntimeError:
            raise self._error(
                piece,
                "has compressed pixels that cannot be decoded",
                "intact RLE, JPEG, JPEG-LS or JPEG 2000",
                syntax_name(piece.transfer_syntax),
                "decompress the series, for example with dcmdjpeg of DCMTK or gdcmconv --raw",
            ) from None
        hu: NDArray[Any] = array[0] if array.ndim == 3 else array
        return hu.astype(np.float32) if hu.dtype == np.float64 else hu

    def _error(
        self,
        piece: DicomSlice,
        reason: str,
        expected: str,
        found: str,
        remedy: str = "export the series again",
    ) -> InputError:
        place = f"{found} in {piece.file.name}"
        return InputError(self.where, reason, expected=expected, found=place, remedy=remedy)


def rescale(stored: NDArray[Any], slope: float, intercept: float) -> NDArray[Any]:
    """HU = slope × stored + intercept: int32 where both are whole numbers, else float32."""
    if slope.is_integer() and intercept.is_integer() and stored.dtype.kind in "iu":
        hu: NDArray[Any] = stored.astype(np.int64) * int(slope) + int(intercept)
        return hu
    return stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)
