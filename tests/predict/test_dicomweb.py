"""Prediction on a CT in a PACS, and results into it: against a real Orthanc on loopback."""

import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import dicom_files
import pydicom
import pytest
import requests
from orthanc import PASSWORD, USER, free_port, running_orthanc
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SegmentationStorage, generate_uid

from rectvlm.cli import main
from rectvlm.predict import dicomweb
from rectvlm.predict.dicomweb import DicomWebAddress, fetched_cts, store_results
from rectvlm.types import UserError
from tests.predict.test_predict_dicom import write_study
from tests.small_cases import AFFINE, body


@pytest.fixture(autouse=True)
def _no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (dicomweb.USER_VARIABLE, dicomweb.PASSWORD_VARIABLE, dicomweb.TOKEN_VARIABLE):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dicomweb.USER_VARIABLE, USER)
    monkeypatch.setenv(dicomweb.PASSWORD_VARIABLE, PASSWORD)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_orthanc(tmp_path_factory.mktemp("orthanc")) as port:
        yield f"dicomweb://127.0.0.1:{port}/dicom-web"


@pytest.fixture(scope="module")
def study(service: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """A study in the PACS, put there by its own REST API; UIDs of study, soft and sharp series."""
    folder = tmp_path_factory.mktemp("study")
    soft, sharp = write_study(folder)
    url = service.replace("dicomweb:", "http:").replace("/dicom-web", "/instances")
    with requests.Session() as session:
        session.auth = (USER, PASSWORD)
        for file in folder.rglob("*"):
            if file.is_file():
                session.post(url, data=file.read_bytes(), timeout=20).raise_for_status()
    first = pydicom.dcmread(next((folder / "2").iterdir()))
    return str(first.StudyInstanceUID), soft, sharp


def query(service: str, path: str) -> list[dict[str, dict[str, list[object]]]]:
    """Answer of the PACS to a query, asked without our client."""
    url = service.replace("dicomweb:", "http:") + path
    answer = requests.get(url, auth=(USER, PASSWORD), timeout=20)
    answer.raise_for_status()
    rows: list[dict[str, dict[str, list[object]]]] = answer.json()
    return rows


def write_result(path: Path, study_uid: str) -> None:
    """A DICOM object of a study, as a result would be."""
    result = Dataset()
    result.file_meta = FileMetaDataset()
    result.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    result.file_meta.MediaStorageSOPClassUID = result.SOPClassUID = SegmentationStorage
    result.SOPInstanceUID = result.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    result.StudyInstanceUID, result.SeriesInstanceUID = study_uid, generate_uid()
    result.PatientID, result.PatientName = dicom_files.PATIENT_ID, dicom_files.PATIENT
    result.Modality, result.SeriesDescription = "SEG", "research use only"
    path.parent.mkdir(parents=True, exist_ok=True)
    result.save_as(path, enforce_file_format=True)


def test_a_series_of_a_pacs_is_predicted_and_leaves_no_copy(
    service, study, tiny_run, tmp_path, credentials, capsys, caplog, monkeypatch
):
    study_uid, _, sharp = study
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    caplog.set_level(logging.DEBUG)
    address = f"{service}/studies/{study_uid}/series/{sharp}"
    command = ["predict", address, "--checkpoint", str(tiny_run(1)), "--device", "cpu"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    (page,) = (Path(line) for line in capsys.readouterr().out.splitlines() if "index" in line)
    findings = json.loads(page.with_name("findings.json").read_text())
    assert findings["file"] == page.parent.name and page.parent.name.startswith("ct-")
    assert findings["shape"] == list(body(1)[0].shape)
    summary = json.loads((tmp_path / "out" / "predict-summary.json").read_text())
    assert summary["source"] == address
    assert summary["predicted"][0]["file"] == f"{address}, series 2"
    assert not list(scratch.iterdir())
    texts = [caplog.text, *map(str, tmp_path.rglob("*"))]
    texts += [path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()]
    for word in (*dicom_files.PERSONAL_WORDS, PASSWORD):
        assert not any(word in text for text in texts)


def test_of_a_study_the_chest_ct_is_chosen_or_the_series_asked_for(
    service, study, tmp_path, credentials
):
    study_uid, soft, sharp = study
    address = DicomWebAddress.parse(f"{service}/studies/{study_uid}")
    for wanted, uids in ((None, {soft, sharp}), ("2", {sharp}), (soft, {soft})):
        with fetched_cts(address, wanted) as folder:
            assert folder.stat().st_mode & 0o077 == 0
            files = [path for path in folder.rglob("*") if path.is_file()]
            fetched = {str(pydicom.dcmread(file).SeriesInstanceUID) for file in files}
        assert uids <= fetched and (wanted is None or fetched == uids)
        assert not folder.exists()
    with (
        pytest.raises(UserError, match="has no CT that --series 9 asks for"),
        fetched_cts(address, "9"),
    ):
        pass


def test_pixels_come_as_they_were_stored(service, study, tmp_path, credentials):
    study_uid, soft, _ = study
    address = DicomWebAddress.parse(f"{service}/studies/{study_uid}/series/{soft}")
    expected = dicom_files.write_series(body(1)[0], AFFINE, tmp_path / "expected")
    pixels = {item.PixelData for item in dicom_files.read_all(expected)}
    with fetched_cts(address) as folder:
        (series,) = folder.iterdir()
        assert {item.PixelData for item in dicom_files.read_all(series)} == pixels


def test_results_appear_beside_the_series_in_its_study(service, study, tmp_path, credentials):
    study_uid, *_ = study
    before = query(service, f"/studies/{study_uid}/series")
    write_result(tmp_path / "case" / "lesions.dcm", study_uid)
    write_result(tmp_path / "case" / "deeper" / "report.dcm", study_uid)
    (tmp_path / "case" / "notes.txt").write_text("no DICOM")
    assert store_results([tmp_path / "case"], DicomWebAddress.parse(service)) == 2
    after = query(service, f"/studies/{study_uid}/series")
    assert len(after) == len(before) + 2
    assert sum(row["00080060"]["Value"] == ["SEG"] for row in after) == 2


def test_a_case_without_dicom_objects_stores_nothing_and_says_so(service, tmp_path, credentials):
    (tmp_path / "findings.json").write_text("{}")
    with pytest.raises(UserError, match=r"No result was stored.*give a CT in DICOM"):
        store_results([tmp_path], DicomWebAddress.parse(service))


def test_a_pacs_that_refuses_an_object_is_named(service, tmp_path, credentials):
    write_result(tmp_path / "bad.dcm", "1.2.3")
    damaged = pydicom.dcmread(tmp_path / "bad.dcm")
    del damaged.SOPClassUID, damaged.StudyInstanceUID, damaged.SOPInstanceUID
    damaged.save_as(tmp_path / "bad.dcm", enforce_file_format=False)
    with pytest.raises(UserError, match=r"refuses|answers with an error"):
        store_results([tmp_path], DicomWebAddress.parse(service))


def fetch(text: str) -> None:
    with fetched_cts(DicomWebAddress.parse(text)):
        raise AssertionError("something was fetched")


def test_each_fault_of_a_pacs_is_one_sentence(service, study, credentials, monkeypatch):
    study_uid, soft, _ = study
    for path in (f"/studies/{study_uid}/series/1.2.3", "/studies/1.2.3/series/4.5.6"):
        with pytest.raises(UserError, match=r"HTTP 404|has no CT"):
            fetch(f"{service}{path}")
    with pytest.raises(UserError, match=r"has no CT|HTTP 404"):
        fetch(f"{service}/studies/1.2.3")
    with pytest.raises(UserError, match="HTTP 404"):
        fetch(service.replace("dicom-web", "nowhere") + f"/studies/{study_uid}")
    with pytest.raises(UserError, match=r"something else than DICOMweb|HTTP 404"):
        fetch(service.replace("dicom-web", "app") + f"/studies/{study_uid}")
    monkeypatch.setenv(dicomweb.PASSWORD_VARIABLE, "wrong")
    with pytest.raises(UserError, match=r"refuses access \(HTTP 401\)") as refused:
        fetch(f"{service}/studies/{study_uid}/series/{soft}")
    assert "wrong" not in str(refused.value)
    with pytest.raises(UserError, match=r"cannot be reached: check host, port"):
        fetch(f"dicomweb://127.0.0.1:{free_port()}/dicom-web/studies/1.2")


@pytest.fixture
def strange_server() -> Iterator[Callable[[int, str, bytes], str]]:
    """A server that gives one answer to everything; returns its address."""
    servers = []

    def start(status: int, content_type: str, content: bytes) -> str:
        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_arguments: object) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Answer)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"dicomweb://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    "answer",
    [
        (200, "text/html", b"<html>a portal</html>"),
        (200, "application/json", b'"SECRETNAME"'),
        (200, "application/dicom+json", b"[1, 2]"),
        (200, "multipart/related; type=application/dicom; boundary=x", b"--x\r\n\r\njunk\r\n--x--"),
        (200, "", b""),
    ],
    ids=["html", "json", "numbers", "multipart", "empty"],
)
@pytest.mark.parametrize("series", ["", "/series/1.2.3"])
def test_what_is_no_dicomweb_is_named(strange_server, answer, series):
    with pytest.raises(UserError, match=r"something else than DICOMweb|has no CT") as refused:
        fetch(strange_server(*answer) + "/studies/1.2" + series)
    assert "SECRETNAME" not in str(refused.value)


def test_a_silent_pacs_is_not_waited_for_for_ever(monkeypatch):
    monkeypatch.setattr(dicomweb, "TIMEOUT_SECONDS", (0.2, 0.2))
    listener = socket.create_server(("127.0.0.1", 0))
    with listener, pytest.raises(UserError, match="gave no answer in time"):
        fetch(f"dicomweb://127.0.0.1:{listener.getsockname()[1]}/studies/1.2")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("dicomweb://pacs.example/dicom-web/studies/1.2", "unencrypted over the network"),
        ("dicomweb://name:secret@127.0.0.1/studies/1.2", "holds credentials"),
        ("dicomweb:///studies/1.2", "is no DICOMweb address"),
        ("dicomweb://127.0.0.1:99999/studies/1.2", "is no DICOMweb address"),
        ("dicomweb://127.0.0.1/studies/1.2?x=1", "is no DICOMweb address"),
        ("dicomweb://127.0.0.1/studies/../1.2", "names no study"),
        ("dicomweb://127.0.0.1/dicom-web", "names no study"),
    ],
)
def test_a_wrong_address_is_told_without_its_secrets(text, fault, tmp_path, capsys):
    command = ["predict", text, "--checkpoint", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert fault in error and error.count("\n") == 1 and "secret" not in error


def test_addresses_are_http_here_and_https_elsewhere():
    here = DicomWebAddress.parse("dicomweb://localhost:8042/dicom-web/studies/1.2/series/3.4")
    assert here.url == "http://localhost:8042/dicom-web"
    assert (here.study_uid, here.series_uid) == ("1.2", "3.4")
    there = DicomWebAddress.parse("dicomwebs://pacs.example/a/b/")
    assert there.url == "https://pacs.example/a/b" and there.study_uid is None


def test_results_are_stored_in_a_service_and_not_in_a_study(tmp_path, capsys):
    command = ["predict", str(tmp_path), "--checkpoint", str(tmp_path), "--out", str(tmp_path)]
    assert main([*command, "--store", "dicomweb://127.0.0.1/studies/1.2"]) == 2
    assert "names a study" in capsys.readouterr().err
