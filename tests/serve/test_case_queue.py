"""The queue of the server: order, progress, deletion; and the guard before it."""

import base64
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from rectvlm.serve.app import make_app
from rectvlm.serve.case_queue import CaseQueue, QueueFullError, ServedCase
from rectvlm.types import UserError

TOKEN = "a-secret-of-the-server"


class Predictor:
    """Writes a page, or fails, when it is let go; tells what it was asked for."""

    def __init__(self) -> None:
        self.may_go = threading.Event()
        self.may_go.set()
        self.contents: list[str] = []

    def __call__(
        self, name: str, upload: Path, out: Path, report_stage: Callable[[str], None]
    ) -> Path:
        report_stage("predicting")
        assert self.may_go.wait(20)
        content = upload.read_text()
        self.contents.append(content)
        if content == "bad":
            raise UserError("The uploaded file is bad.")
        (out / name).mkdir()
        (out / name / "index.html").write_text(content)
        return out / name


@pytest.fixture
def predictor() -> Predictor:
    return Predictor()


def start_queue(folder: Path, predictor: Predictor, keep_seconds: float = 1000) -> CaseQueue:
    cases = CaseQueue(folder, predictor, max_waiting=3, keep_seconds=keep_seconds)
    cases.start()
    return cases


@pytest.fixture
def cases(tmp_path: Path, predictor: Predictor) -> Iterator[CaseQueue]:
    cases = start_queue(tmp_path, predictor)
    yield cases
    predictor.may_go.set()
    cases.stop()


def add(cases: CaseQueue, content: str) -> ServedCase:
    path = cases.new_upload_path(".nii")
    path.write_text(content)
    return cases.add(path)


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(400):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come to pass")


def test_cases_are_predicted_one_by_one_in_their_order(cases, predictor):
    predictor.may_go.clear()
    first = add(cases, "a")
    wait_for(lambda: first.stage == "predicting")
    second, third = add(cases, "bad"), add(cases, "c")
    assert [cases.position(case) for case in (first, second, third)] == [0, 1, 2]
    assert first.files() == {}
    predictor.may_go.set()
    wait_for(lambda: third.finished is not None)
    assert predictor.contents == ["a", "bad", "c"]
    assert (second.state, second.error) == ("failed", "The uploaded file is bad.")
    assert third.files()["index.html"].read_text() == "c"
    assert not list(cases.uploads.iterdir())


def test_no_upload_lies_beside_another(cases, predictor):
    """A DICOM file is read with the slices beside it."""
    predictor.may_go.clear()
    uploads = [add(cases, name).upload for name in ("one", "two")]
    assert all(list(upload.parent.iterdir()) == [upload] for upload in uploads)
    predictor.may_go.set()
    wait_for(lambda: not any(upload.parent.exists() for upload in uploads))


def test_no_more_cases_wait_than_may(cases, predictor):
    predictor.may_go.clear()
    running = add(cases, "a")
    wait_for(lambda: running.state == "running")
    for _ in range(3):
        add(cases, "b")
    with pytest.raises(QueueFullError):
        cases.require_room()
    with pytest.raises(QueueFullError):
        add(cases, "c")
    assert len(list(cases.uploads.iterdir())) == 4


def test_a_case_can_be_deleted_while_it_waits_or_runs(cases, predictor):
    predictor.may_go.clear()
    running = add(cases, "a")
    wait_for(lambda: running.state == "running")
    waiting = add(cases, "b")
    assert cases.delete(waiting.id) and not waiting.upload.exists()
    assert cases.delete(running.id) and not cases.delete(running.id)
    predictor.may_go.set()
    wait_for(lambda: running.finished is not None)
    last = add(cases, "c")
    wait_for(lambda: last.finished is not None)
    assert predictor.contents == ["a", "c"]
    assert [path.name for path in cases.results.iterdir()] == [last.id]
    assert not list(cases.uploads.iterdir())


def test_results_are_deleted_after_their_time_also_when_nobody_asks(tmp_path, predictor):
    cases = start_queue(tmp_path, predictor, keep_seconds=0.4)
    case = add(cases, "a")
    wait_for(lambda: case.finished is not None)
    wait_for(lambda: not case.folder.exists())
    assert cases.get(case.id) is None
    cases.stop()


def test_stopping_deletes_everything(tmp_path, predictor):
    cases = start_queue(tmp_path, predictor)
    case = add(cases, "a")
    wait_for(lambda: case.finished is not None)
    cases.stop()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.fixture
def client(cases: CaseQueue) -> TestClient:
    app = make_app(cases, TOKEN, max_upload_bytes=1000)
    return TestClient(app, base_url="http://ct.example")


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"anyone:{password}".encode()).decode()


@pytest.mark.parametrize(
    "authorization",
    ["", "Bearer", "Bearer wrong", f"Bearer {TOKEN}x", "Basic %%%", basic("wrong"), basic("é")],
)
def test_without_the_token_nothing_but_health_is_told(client, authorization):
    headers = {"Authorization": authorization.encode()} if authorization else {}
    for path in ("/", "/openapi.json", "/cases/x", "/cases/x/files/index.html"):
        answer = client.get(path, headers=headers)
        assert answer.status_code == 401 and TOKEN not in answer.text
        assert answer.headers["www-authenticate"].startswith("Basic")
    assert client.post("/cases", headers=headers, files={"file": ("a.nii", b"a")}).is_error
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize("authorization", [f"Bearer {TOKEN}", basic(TOKEN)])
def test_with_the_token_cases_are_taken(client, authorization, cases):
    headers = {"Authorization": authorization}
    answer = client.post("/cases", headers=headers, files={"file": ("a.nii", b"a")})
    assert answer.status_code == 202
    address = answer.headers["location"]
    wait_for(lambda: client.get(address, headers=headers).json()["state"] == "done")
    page = client.get(f"{address}/files/index.html", headers=headers)
    assert page.text == "a" and page.headers["cache-control"] == "no-store"


def test_a_full_queue_answers_503(client, cases, predictor):
    predictor.may_go.clear()
    headers = {"Authorization": f"Bearer {TOKEN}"}
    files = {"file": ("a.nii", b"a")}
    running = add(cases, "a")
    wait_for(lambda: running.state == "running")
    statuses = [client.post("/cases", headers=headers, files=files).status_code for _ in range(4)]
    assert statuses == [202, 202, 202, 503]
