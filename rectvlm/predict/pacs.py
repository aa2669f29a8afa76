"""Prediction on CTs that a PACS holds."""

from pathlib import Path

from rectvlm.predict.dicomweb import DicomWebAddress, fetched_cts
from rectvlm.predict.run import predict_cases
from rectvlm.types import UserError


def predict_from_pacs(
    address: DicomWebAddress,
    checkpoint: Path,
    out: Path,
    device: str | None = None,
    thresholds: Path | None = None,
    series: str | None = None,
) -> list[Path]:
    """Fetch a series or the CTs of a study, and predict on the chest CT; see `predict_cases`.

    What was fetched is deleted afterwards.

    Raises:
        UserError: as of `fetched_cts` and `predict_cases`.
    """
    with fetched_cts(address, series) as folder:
        try:
            return predict_cases(
                folder, checkpoint, out, device, thresholds, series, origin=address.text
            )
        except UserError as error:
            raise UserError(str(error).replace(str(folder), address.text)) from error
