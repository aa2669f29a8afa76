"""The server as a process, with a tiny model: what people, programs and attackers send."""

import http.client
import io
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import dicom_files
import numpy as np
import pytest
import requests
from conftest import write_nifti
from pydicom.dataset import Dataset
from requests import Response

from rectvlm.cli import main
from rectvlm.serve.options import ServeOptions
from rectvlm.serve.run import _listen
from rectvlm.types import UserError
from tests.predict.test_predict_dicom import write_study, write_zip
from tests.small_cases import AFFINE, body

pytestmark = pytest.mark.slow  # a process that imports torch and loads a model

MAX_UPLOAD_MB = 3
SCRIPT_NAME = "../../SECRETNAME<script>alert(1)</script>.nii.gz"


class Server(NamedTuple):
    url: str
    port: int
    folder: Path
    """Its temporary folder."""
    log: Path

    def upload(self, path: Path, name: str | None = None) -> Response:
        files = {"file": (name or path.name, path.open("rb"))}
        return requests.post(f"{self.url}/cases", files=files, timeout=60)

    def result(self, answer: Response) -> dict[str, Any]:
        """The case of an upload, once it is done or has failed."""
        assert answer.status_code == 202, answer.text
        case: dict[str, Any] = {}
        for _ in range(1200):
            case = requests.get(self.url + answer.headers["Location"], timeout=60).json()
            if case["state"] in ("done", "failed"):
                return case
            time.sleep(0.05)
        raise AssertionError(f"the case did not end: {case}")


def start_server(checkpoint: Path, folder: Path) -> tuple["subprocess.Popen[bytes]", Server]:
    log, scratch = folder / "log", folder / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "rectvlm", "serve", str(checkpoint), "--port", "0"]
    options = ["--device", "cpu", "--max-upload-mb", str(MAX_UPLOAD_MB), "--keep-hours", "2"]
    environment = {name: value for name, value in os.environ.items() if name != "RECTVLM_TOKEN"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *options],
            stdout=output,
            stderr=output,
            env=environment | {"TMPDIR": str(scratch), "COLUMNS": "200"},
        )
    for _ in range(1200):
        serving = re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text())
        if serving:
            port = int(serving[1])
            return process, Server(f"http://127.0.0.1:{port}", port, scratch, log)
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    process.kill()
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def server(tiny_run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    process, server = start_server(tiny_run(2), tmp_path_factory.mktemp("server"))
    yield server
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    assert not list(server.folder.glob("rectvlm-serve*")), "uploads and results go with the server"
    for word in (*dicom_files.PERSONAL_WORDS, "SECRET"):
        assert word not in server.log.read_text()


@pytest.fixture
def nifti(tmp_path: Path) -> Path:
    return write_nifti(body(1)[0], AFFINE, tmp_path / "scan.nii.gz")


def test_an_uploaded_ct_becomes_a_page_and_files(server, nifti):
    case = server.result(server.upload(nifti, SCRIPT_NAME))
    assert case["state"] == "done", case["error"]
    files = f"{server.url}/cases/{case['id']}/files"
    assert {"index.html", "findings.json", "lesions.nii.gz"} <= set(case["files"])
    page = requests.get(f"{files}/index.html", timeout=60)
    assert page.headers["content-type"].startswith("text/html") and "<script" in page.text
    assert "script-src 'unsafe-inline'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    mask = requests.get(f"{files}/lesions.nii.gz", timeout=60)
    assert mask.content[:2] == b"\x1f\x8b"
    assert mask.headers["content-disposition"].startswith("attachment")
    archive = zipfile.ZipFile(io.BytesIO(requests.get(f"{files}.zip", timeout=60).content))
    assert archive.namelist() == case["files"] and archive.testzip() is None
    texts = [archive.read(name).decode("latin-1") for name in archive.namelist()]
    for word in (str(server.folder), "SECRETNAME", "alert(1)"):
        assert not any(word in text for text in texts)


def test_uploads_are_deleted_after_the_prediction_and_results_on_request(server, nifti):
    case = server.result(server.upload(nifti))
    address = f"{server.url}/cases/{case['id']}"
    assert not [path for path in server.folder.rglob("uploads/*") if path.is_file()]
    assert list(server.folder.rglob(f"results/{case['id']}/index.html"))
    assert requests.delete(address, timeout=60).status_code == 204
    assert not list(server.folder.rglob(f"{case['id']}*"))
    for path in ("", "/files/index.html", "/files.zip"):
        assert requests.get(address + path, timeout=60).status_code == 404
    assert requests.delete(address, timeout=60).status_code == 404


def test_every_format_is_taken(server, tmp_path):
    hu, _ = body(2)
    np.savez(tmp_path / "ct.npz", ct=hu, affine=AFFINE)
    write_study(tmp_path / "study")
    archive = write_zip(tmp_path / "SECRETNAME.zip", tmp_path / "study")
    for path in (tmp_path / "ct.npz", archive):
        case = server.result(server.upload(path))
        assert case["state"] == "done", case["error"]
        file = f"{server.url}/cases/{case['id']}/files/findings.json"
        findings = requests.get(file, timeout=60).json()
        assert findings["shape"] == list(hu.shape)


def test_two_users_at_once_get_their_own_cases(server, tmp_path):
    shapes = [(24, 24, 12), (24, 24, 11), (24, 23, 12), (23, 24, 12)]
    paths = []
    for number, (i, j, k) in enumerate(shapes):
        hu = body(number)[0][:i, :j, :k]
        paths.append(write_nifti(hu, AFFINE, tmp_path / f"{number}.nii.gz"))
    with ThreadPoolExecutor(len(paths)) as users:
        answers = list(users.map(server.upload, paths))
    cases = [server.result(answer) for answer in answers]
    assert len({case["id"] for case in cases}) == len(shapes)
    for case, shape in zip(cases, shapes, strict=True):
        file = f"{server.url}/cases/{case['id']}/files/findings.json"
        assert tuple(requests.get(file, timeout=60).json()["shape"]) == shape


def write_escaping_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../../escaped.dcm", b"\0" * 128 + b"DICM")


def write_bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.dcm", b"\0" * 128 + b"DICM" + bytes(200 << 20))


def write_absurd_dicom(path: Path) -> None:
    def make_absurd(dataset: Dataset, _number: int) -> None:
        dataset.Rows = dataset.Columns = 65535
        dataset.PatientName = "SECRETNAME"

    folder = path.parent / "absurd"
    dicom_files.write_series(body(1)[0], AFFINE, folder, make_absurd)
    write_zip(path, folder)


def write_pickle(path: Path) -> None:
    class Exploit:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(path.with_name("exploited")),)

    array = np.array([Exploit()], dtype=object)
    if path.suffix == ".npz":
        np.savez(path, ct=array)
    else:
        path.write_bytes(pickle.dumps(Exploit()))


HOSTILE = {
    "escape.zip": (write_escaping_zip, "names a file outside itself"),
    "bomb.zip": (write_bomb, "would be too large when unpacked"),
    "absurd.zip": (write_absurd_dicom, "The uploaded file"),
    "pickle.npz": (write_pickle, "The uploaded file"),
    "pickle.nii.gz": (write_pickle, "is not a NIfTI file"),
    "reference.mha": (
        lambda path: path.write_text(
            "ObjectType = Image\nNDims = 3\nDimSize = 9 9 9\nElementType = MET_SHORT\n"
            "ElementDataFile = /etc/passwd\n"
        ),
        "names its voxels in another place",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_upload_is_one_sentence_and_the_server_lives_on(server, tmp_path, name):
    write, fault = HOSTILE[name]
    write(tmp_path / name)
    case = server.result(server.upload(tmp_path / name))
    assert case["state"] == "failed" and case["files"] == []
    assert fault in case["error"] and str(server.folder) not in case["error"]
    assert "\n" not in case["error"] and "SECRETNAME" not in case["error"]
    assert not (tmp_path / "exploited").exists()
    assert not list(server.folder.rglob("escaped*"))
    assert not [path for path in server.folder.rglob("uploads/*") if path.is_file()]
    health = requests.get(f"{server.url}/health", timeout=60).json()
    assert health["status"] == "ok" and health["waiting"] == 0


def test_uploads_that_are_too_large_are_refused_whatever_they_say_of_their_size(server):
    data = bytes(MAX_UPLOAD_MB * 1_000_000 + 100_000)
    answer = requests.post(f"{server.url}/cases", files={"file": ("a.nii", data)}, timeout=60)
    assert answer.status_code == 413 and "at most 3 MB" in answer.json()["detail"]

    def chunks() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.nii"\r\n\r\n'
        for _ in range(40):
            yield bytes(100_000)
        yield b"\r\n--x--\r\n"

    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    answer = requests.post(f"{server.url}/cases", data=chunks(), headers=headers, timeout=60)
    assert answer.status_code == 413
    assert not [path for path in server.folder.rglob("uploads/*") if path.is_file()]


@pytest.mark.parametrize("name", ["scan.exe", "scan", "scan.mhd", "scan.pth", ".."])
def test_a_file_of_another_format_is_refused_at_once(server, tmp_path, name):
    (tmp_path / "file").write_bytes(b"x")
    answer = server.upload(tmp_path / "file", name)
    assert answer.status_code == 415 and "expected one that ends in" in answer.json()["detail"]


def raw_request(server: Server, method: str, path: str, **headers: str) -> int:
    """Status of a request whose path and headers are sent as they are."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    status = connection.getresponse().status
    connection.close()
    return status


def test_no_path_leads_out_of_a_case(server, nifti):
    first, second = (server.result(server.upload(nifti))["id"] for _ in range(2))
    base = f"/cases/{first}/files"
    assert raw_request(server, "GET", f"{base}/index.html") == 200
    for path in (
        f"{base}/../{second}/index.html",
        f"{base}/..%2f{second}%2findex.html",
        f"{base}/%2e%2e/{second}/index.html",
        f"{base}//etc/passwd",
        f"{base}/%2fetc%2fpasswd",
        f"{base}/index.html%00.json",
        f"/cases/..%2fresults%2f{first}",
    ):
        assert raw_request(server, "GET", path) in (404, 405), path


def test_other_pages_and_names_do_not_reach_the_server(server):
    assert raw_request(server, "GET", "/health", Host=f"localhost:{server.port}") == 200
    for host in ("evil.example", f"evil.example:{server.port}", "127.0.0.1.evil.example", "[::"):
        assert raw_request(server, "GET", "/health", Host=host) == 421
    for origin in ("https://evil.example", "null", f"http://localhost:{server.port + 1}"):
        assert raw_request(server, "DELETE", "/cases/x", Origin=origin) == 403
        assert raw_request(server, "POST", "/cases", Origin=origin, Content_Length="0") == 403
    assert raw_request(server, "DELETE", "/cases/x", Origin=server.url) == 404
    assert raw_request(server, "DELETE", "/cases/x", Sec_Fetch_Site="cross-site") == 403


def test_the_api_is_described_and_the_page_needs_no_other_server(server):
    paths = requests.get(f"{server.url}/openapi.json", timeout=60).json()["paths"]
    assert set(paths) == {
        *("/health", "/cases", "/cases/{case_id}"),
        *("/cases/{case_id}/files/{name}", "/cases/{case_id}/files.zip"),
    }
    page = requests.get(server.url, timeout=60)
    assert "Drop a CT here" in page.text and "at most 3 MB" in page.text
    assert not re.search(r"https?://", page.text)


def test_a_port_that_does_not_exist_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"127\.0\.0\.1:70000 cannot be listened on \(.*65535"):
        _listen(ServeOptions(Path("model"), port=70_000))


def test_beyond_this_machine_a_token_is_required(tmp_path, capsys, monkeypatch):
    command = ["serve", str(tmp_path), "--host", "0.0.0.0"]
    monkeypatch.delenv("RECTVLM_TOKEN", raising=False)
    assert main(command) == 2
    assert "expected a secret in RECTVLM_TOKEN" in capsys.readouterr().err
    monkeypatch.setenv("RECTVLM_TOKEN", "short")
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "at least 16 letters" in error and "short;" not in error
    monkeypatch.setenv("RECTVLM_TOKEN", "long-enough-for-a-secret")
    assert main(command) == 2
    assert "No checkpoint" in capsys.readouterr().err
