"""DICOM objects of a case that was read from DICOM: outlines (SEG), measurements and report (SR).

A PACS files them beside the CT, so they carry the patient's name and id, as DICOM demands. They
are made by highdicom, which is optional: without it, or where a series lacks what they need, one
line says so, and the case has its other files.
"""

import logging
import warnings
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from rectvlm.files import printable_line
from rectvlm.predict.case import PredictedCase
from rectvlm.predict.case_summary import CaseSummary
from rectvlm.types import UserError

log = logging.getLogger(__name__)

SEGMENTATION_FILE = "lesions.seg.dcm"
MEASUREMENTS_FILE = "measurements.sr.dcm"
REPORT_SR_FILE = "report.sr.dcm"
DICOM_FILES = (SEGMENTATION_FILE, MEASUREMENTS_FILE, REPORT_SR_FILE)
"""Names of a case's DICOM objects, each of which may be absent: the ones to send to a PACS."""


def write_dicom_results(case: PredictedCase, summary: CaseSummary, folder: Path) -> None:
    """Write the DICOM objects of a case; nothing for a CT of another format.

    Without an outline there is neither SEG nor measurements, without a report no report.
    """
    if case.volume.dicom_headers is None or not _has_highdicom():
        return
    # Their warnings quote what headers hold.
    logging.getLogger("highdicom").setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _write_objects(case, summary, folder)
    except OSError:
        raise
    except Exception as error:  # pydicom and highdicom have many for headers that break the rules
        reason = str(error) if isinstance(error, UserError) else _name_reason(error)
        # Not the case's name: on a server it is the key to the case.
        series = case.volume.pseudonym or "a series"
        log.warning("%s: no DICOM SEG or SR: %s", printable_line(series), printable_line(reason))
        log.debug("%s: DICOM results failed", series, exc_info=not isinstance(error, UserError))
        for name in DICOM_FILES:
            (folder / name).unlink(missing_ok=True)


def _write_objects(case: PredictedCase, summary: CaseSummary, folder: Path) -> None:
    from rectvlm.predict.dicom_seg import make_segmentation
    from rectvlm.predict.dicom_sr import make_measurement_report, make_text_report

    headers = case.volume.dicom_headers
    assert headers is not None
    if case.lesion_bits is not None and case.lesion_bits.any():
        segmentation = make_segmentation(case.lesion_bits, case.volume.affine, headers, summary)
        segmentation.save_as(folder / SEGMENTATION_FILE)
        measurements = make_measurement_report(segmentation, headers, summary)
        measurements.save_as(folder / MEASUREMENTS_FILE)
    if summary.report is not None:
        make_text_report(headers, summary).save_as(folder / REPORT_SR_FILE)


def _name_reason(error: Exception) -> str:
    """An error by its type alone: its text may quote the header."""
    return f"the headers of the series break DICOM's rules ({type(error).__name__})"


@cache
def _has_highdicom() -> bool:
    """Whether highdicom is installed; the first answer "no" is logged."""
    if find_spec("highdicom") is not None:
        return True
    log.warning(
        "no DICOM SEG and SR are written, since highdicom is not installed: "
        "pip install 'rectvlm[dicom]' to get them"
    )
    return False
