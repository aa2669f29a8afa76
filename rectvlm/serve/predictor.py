"""Prediction on one uploaded file: its case folder, or the sentence that says why there is none."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rectvlm.data.volume import SUFFIXES
from rectvlm.predict.case import LoadedModel, predict_case
from rectvlm.predict.case_folder import write_case_folder
from rectvlm.predict.ct_source import CtSource
from rectvlm.predict.find_volumes import find_volumes
from rectvlm.predict.run import FailedFile
from rectvlm.types import UserError, Volume

log = logging.getLogger(__name__)

UPLOAD_SUFFIXES = tuple(suffix for suffix in SUFFIXES if suffix != ".mhd")
"""Ends of the names that are taken. A `.mhd` has its voxels in a second file."""
UPLOAD_WORDS = "The uploaded file"
"""What messages call an upload: its own name may be a patient's."""


@dataclass(frozen=True)
class _WatchedSource(CtSource):
    """A CT that tells when it has been read."""

    after_read: Callable[[], None] = lambda: None

    def read(self, *arguments: Any, **settings: Any) -> Volume:
        """Read the CT as `CtSource` does; its path is no part of its results."""
        volume = super().read(*arguments, **settings)
        self.after_read()
        return replace(volume, where=Path(volume.where).name)


def upload_suffix(name: str) -> str:
    """The part of an upload's name that is used: the suffix of its format.

    Raises:
        UserError: there is none that is known.
    """
    lowered = name.lower()
    for suffix in UPLOAD_SUFFIXES:
        if lowered.endswith(suffix):
            return suffix
    raise UserError(
        f"{UPLOAD_WORDS} has a name of another format: expected one that ends in "
        f"{', '.join(UPLOAD_SUFFIXES)}; give a CT in one of these, a DICOM series as .zip."
    )


def predict_upload(
    loaded: LoadedModel, name: str, upload: Path, out: Path, report_stage: Callable[[str], None]
) -> Path:
    """Predict on an uploaded file; return the folder of the case, `out/name`.

    Args:
        loaded: the model.
        name: of the case.
        upload: file to read.
        out: folder of all cases.
        report_stage: is told what begins: reading, predicting, writing.

    Raises:
        UserError: whatever went wrong, in a sentence without paths.
    """
    try:
        report_stage("reading")
        source = _find_single_ct(upload, out)
        watched = _WatchedSource(**vars(source), after_read=lambda: report_stage("predicting"))
        case = predict_case(loaded, name, watched)
        report_stage("writing")
        return write_case_folder(loaded, case, out)
    except Exception as error:
        if not isinstance(error, UserError):
            log.error("a case met an unexpected %s", type(error).__name__)
            log.debug("its traceback", exc_info=True)  # may quote the file
        reason = FailedFile.from_error(UPLOAD_WORDS, error).reason
        raise UserError(reason.replace(str(upload), UPLOAD_WORDS)) from error


def _find_single_ct(upload: Path, out: Path) -> CtSource:
    sources = find_volumes(upload, out).sources
    if len(sources) != 1:
        raise UserError(
            f"{UPLOAD_WORDS} holds {len(sources)} studies: expected one; upload each on its own."
        )
    return sources[0]
