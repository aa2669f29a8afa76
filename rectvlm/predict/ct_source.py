"""One CT among the files that a command was given."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rectvlm.data.volume import read_volume, require_chest
from rectvlm.types import Volume

if TYPE_CHECKING:
    from rectvlm.data.dicom.series import DicomSeries  # loads pydicom


@dataclass(frozen=True)
class CtSource:
    """Where one CT is read from."""

    path: Path
    """File, archive, or folder of a DICOM series."""
    series: "DicomSeries | None" = None
    """DICOM series with the headers of its files, which lie in a folder; None for other formats."""
    archived_uid: str | None = None
    """SeriesInstanceUID of a series in an archive; None elsewhere."""
    pseudonym: str | None = None
    """Name of a DICOM series that says nothing of the patient; None for other formats."""
    label: str = ""
    """Number of a DICOM series, in words."""
    origin: str | None = None
    """Where the CT came from, when its path is a temporary one; None for the path."""

    @property
    def place(self) -> str:
        """Path of the CT or its origin, with the number of its series where it has one."""
        path = self.origin or str(self.path)
        return f"{path}, {self.label}" if self.label else path

    def read(self, with_headers: bool = False) -> Volume:
        """Read the CT.

        Args:
            with_headers: whether to keep the headers of DICOM files, which name the patient.

        Raises:
            UserError: it cannot be used.
        """
        if self.series is None and self.archived_uid is None:
            return read_volume(self.path)
        from rectvlm.data.dicom.volume import read_dicom_archive, read_series

        if self.series is None:
            volume = read_dicom_archive(self.path, self.archived_uid, with_headers)
        else:
            volume = read_series(self.series, self.path, with_headers)
        require_chest(volume, Path(self.place))
        return volume
