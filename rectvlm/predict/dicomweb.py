"""CTs from a PACS and results into it, by DICOMweb (QIDO-RS, WADO-RS, STOW-RS).

An address is `dicomweb://HOST:PORT/PATH/studies/UID/series/UID` (HTTP, on this machine only) or
`dicomwebs://…` (HTTPS). Credentials come from the environment: they stand in no command line, log
or message.
"""

import contextlib
import importlib.util
import ipaddress
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rectvlm.types import UserError

if TYPE_CHECKING:
    from dicomweb_client.web import DICOMwebClient  # of the extra `pacs`

log = logging.getLogger(__name__)

USER_VARIABLE = "RECTVLM_DICOMWEB_USER"
PASSWORD_VARIABLE = "RECTVLM_DICOMWEB_PASSWORD"
TOKEN_VARIABLE = "RECTVLM_DICOMWEB_TOKEN"
SCHEMES = {"dicomweb": "http", "dicomwebs": "https"}
TIMEOUT_SECONDS = (10.0, 120.0)
"""Longest wait for a connection, and for the next bytes of an answer."""
_ADDRESS_FORM = "dicomweb://HOST:PORT/PATH/studies/UID or …/studies/UID/series/UID"
_UID = r"[0-9.]{1,64}"
_RESOURCE = re.compile(rf"(?P<root>.*)/studies/(?P<study>{_UID})(?:/series/(?P<series>{_UID}))?")


@dataclass(frozen=True)
class DicomWebAddress:
    """A DICOMweb service, or a study or series in it."""

    text: str
    """Address as the user gave it, which holds no credentials."""
    url: str
    """HTTP address of the service."""
    study_uid: str | None = None
    """StudyInstanceUID; None for the service itself."""
    series_uid: str | None = None
    """SeriesInstanceUID; None for the service, or for a whole study."""

    @classmethod
    def parse(cls, text: str) -> "DicomWebAddress":
        """Read an address.

        Raises:
            UserError: it is malformed, holds credentials, or would send a patient's data
                unencrypted to another machine.
        """
        parts = urlsplit(text)
        try:
            has_host = bool(parts.hostname) and parts.port != 0
        except ValueError:
            has_host = False
        if "@" in parts.netloc:
            raise UserError(
                "A DICOMweb address holds credentials, which others see on a command line: set "
                f"{USER_VARIABLE} and {PASSWORD_VARIABLE}, or {TOKEN_VARIABLE}, in their place."
            )
        if not has_host or parts.query or parts.fragment or parts.scheme not in SCHEMES:
            raise UserError(f"{text} is no DICOMweb address: expected {_ADDRESS_FORM}.")
        if parts.scheme == "dicomweb" and not is_loopback(parts.hostname or ""):
            raise UserError(
                f"{text} would send a patient's data unencrypted over the network: expected "
                "dicomwebs:// (HTTPS) for another machine, found dicomweb://; use HTTPS, or "
                "a tunnel."
            )
        path = parts.path.rstrip("/")
        resource = _RESOURCE.fullmatch(path)
        if resource is None and re.search(r"/(studies|series)(/|$)", path):
            raise UserError(f"{text} names no study: expected {_ADDRESS_FORM}.")
        root = path if resource is None else resource["root"]
        url = f"{SCHEMES[parts.scheme]}://{parts.netloc}{root}"
        if resource is None:
            return cls(text, url)
        return cls(text, url, resource["study"], resource["series"])


def read_study_address(text: str) -> DicomWebAddress | None:
    """Address of a study or series in a PACS; None for a path.

    Raises:
        UserError: it is a wrong address, names no study, or dicomweb-client is not installed.
    """
    scheme, separator, _ = text.partition("://")
    if not separator or scheme.lower() not in SCHEMES:
        return None
    require_client()
    address = DicomWebAddress.parse(text)
    if address.study_uid is None:
        raise UserError(f"{text} names no study: expected {_ADDRESS_FORM}.")
    return address


def read_service_address(text: str) -> DicomWebAddress:
    """Address of a PACS that results are stored in: each object names its study itself.

    Raises:
        UserError: it is a wrong address, names a study, or dicomweb-client is not installed.
    """
    require_client()
    address = DicomWebAddress.parse(text)
    if address.study_uid is not None:
        raise UserError(
            f"{text} names a study: expected the service that stores results, found /studies/; "
            "leave that part out, results go to the study of their CT."
        )
    return address


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine's own, which no network carries."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


@contextlib.contextmanager
def fetched_cts(address: DicomWebAddress, wanted_series: str | None = None) -> Iterator[Path]:
    """Fetch a series, or the CT series of a study, for the time of a `with` block.

    Args:
        address: of a study or series.
        wanted_series: number or SeriesInstanceUID of the one series of the study that is needed.

    Yields:
        A folder that nobody else can read; files have numbers as names.

    Raises:
        UserError: the PACS cannot be reached, refuses, or holds no such CT.
    """
    assert address.study_uid is not None, "parsed by read_study_address"
    study_uid = address.study_uid
    with tempfile.TemporaryDirectory(prefix="rectvlm-dicomweb-") as name:
        folder = Path(name)
        with _explained_errors(address, "fetch it"):
            client = _make_client(address)
            n_files = sum(
                _fetch_series(client, study_uid, series_uid, folder / f"{number:04d}")
                for number, series_uid in enumerate(_list_series(client, address, wanted_series))
            )
        if n_files == 0:
            wanted = "" if wanted_series is None else f" that --series {wanted_series} asks for"
            raise UserError(
                f"{address.text} has no CT{wanted}: expected a series of the modality CT, found "
                "none; check the UIDs."
            )
        log.info("fetched %d DICOM files from %s", n_files, urlsplit(address.url).netloc)
        yield folder


def store_results(folders: Sequence[Path], address: DicomWebAddress) -> int:
    """Store the DICOM objects (`*.dcm`) in the folders of cases in a PACS; return their number.

    Raises:
        UserError: there are none, or the PACS cannot be reached or refuses one.
    """
    files = [file for folder in folders for file in sorted(folder.rglob("*.dcm"))]
    if not files:
        raise UserError(
            f"No result was stored in {address.text}: expected DICOM objects (*.dcm) in the "
            "folders of the cases, found none; give a CT in DICOM."
        )
    import pydicom

    with _explained_errors(address, "store results"):
        client = _make_client(address)
        for file in files:
            response = client.store_instances([pydicom.dcmread(file)])
            failures = response.get("FailedSOPSequence", [])
            if failures:
                code = failures[0].get("FailureReason", 0)
                raise UserError(
                    f"{address.text} refuses {file} (failure reason {code:#06x}): expected that "
                    "the PACS takes the object; ask who runs it. The results on the disk are "
                    "complete."
                )
    log.info("stored %d DICOM objects in %s", len(files), urlsplit(address.url).netloc)
    return len(files)


def require_client() -> None:
    """Make sure that dicomweb-client is installed.

    Raises:
        UserError: it is not.
    """
    if importlib.util.find_spec("dicomweb_client") is None:
        raise UserError(
            'DICOMweb needs dicomweb-client, which is not installed: pip install "rectvlm[pacs]".'
        )


def _make_client(address: DicomWebAddress) -> "DICOMwebClient":
    import requests
    from dicomweb_client.web import DICOMwebClient

    session = requests.Session()
    if is_loopback(urlsplit(address.url).hostname or ""):
        session.trust_env = False  # no proxy
    user, token = os.environ.get(USER_VARIABLE), os.environ.get(TOKEN_VARIABLE)
    if token:
        session.headers["Authorization"] = f"Bearer {token}"
    elif user:
        session.auth = (user, os.environ.get(PASSWORD_VARIABLE, ""))
    client = DICOMwebClient(address.url, session, timeout=TIMEOUT_SECONDS)
    client.set_http_retry_params(retry=False)  # it would wait out each timeout five times
    return client


def _list_series(
    client: "DICOMwebClient", address: DicomWebAddress, wanted_series: str | None
) -> list[str]:
    """UIDs of the series to fetch: the address's, or those of the study that are CTs."""
    if address.series_uid is not None:
        return [address.series_uid]
    fields = ["SeriesInstanceUID", "SeriesNumber", "Modality"]
    rows = client.search_for_series(address.study_uid, fields=fields)
    uids: list[str] = []
    for row in rows:
        uid = _first_value(row, "0020000E")
        number = str(_first_value(row, "00200011"))
        is_ct = _first_value(row, "00080060") == "CT"
        if is_ct and wanted_series in (None, uid, number):
            uids.append(str(uid))
    return uids


def _first_value(row: dict[str, Any], tag: str) -> Any:
    """First value of an attribute in DICOM JSON; None where it has none."""
    values = row.get(tag, {}).get("Value") or [None]
    return values[0]


def _fetch_series(client: "DICOMwebClient", study_uid: str, series_uid: str, folder: Path) -> int:
    """Write the instances of a series as they are stored, one after the other; their number."""
    folder.mkdir()
    number = 0
    stored_as_is = (("application/dicom", "*"),)
    for dataset in client.iter_series(study_uid, series_uid, media_types=stored_as_is):
        dataset.save_as(folder / f"{number:06d}.dcm", enforce_file_format=True)
        number += 1
    return number


@contextlib.contextmanager
def _explained_errors(address: DicomWebAddress, purpose: str) -> Iterator[None]:
    """Turn what a PACS, or the way to it, can do wrong into one sentence.

    Raises:
        UserError: the sentence. No answer's text is in it: it may name a patient.
    """
    import pydicom
    import requests

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of media types that are nearly right
            yield
    except requests.HTTPError as error:
        assert error.response is not None, "only an answer raises it"
        fault = _explain_status(error.response.status_code)
    except requests.exceptions.SSLError:
        fault = (
            "has no certificate that this machine trusts: set REQUESTS_CA_BUNDLE to the file of "
            "your hospital's authority"
        )
    except requests.Timeout:
        fault = "gave no answer in time: check that the PACS is well"
    except (requests.exceptions.ChunkedEncodingError, requests.exceptions.ContentDecodingError):
        fault = "broke off its answer: try again"
    except requests.ConnectionError:
        fault = "cannot be reached: check host, port and whether the PACS runs"
    except (
        *(ValueError, KeyError, AttributeError, TypeError),
        pydicom.errors.InvalidDicomError,
    ):
        fault = (
            "answers with something else than DICOMweb: check the path of the service, such as "
            "/dicom-web"
        )
    except OSError as error:
        if error.filename is not None or error.errno is not None:
            raise
        fault = "cannot be asked: check the address"
    else:
        return
    raise UserError(f"{address.text} {fault} (asked to {purpose}).")


def _explain_status(status: int) -> str:
    if status in (401, 403):
        return (
            f"refuses access (HTTP {status}): set {USER_VARIABLE} and {PASSWORD_VARIABLE}, or "
            f"{TOKEN_VARIABLE}"
        )
    if status == 404:
        return "is not there (HTTP 404): check the path of the service and the UIDs"
    return f"answers with an error (HTTP {status}): ask who runs the PACS"
