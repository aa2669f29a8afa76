"""The HTTP API of the server, described at `/openapi.json`, and its page."""

import tempfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import IO, Annotated

import anyio
from fastapi import FastAPI, HTTPException, Response, UploadFile
from fastapi.responses import FileResponse, HTMLResponse, StreamingResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import BaseModel, Field

from rectvlm.predict.case_page import DISCLAIMER
from rectvlm.serve.case_queue import CaseQueue, CaseState, QueueFullError, ServedCase
from rectvlm.serve.guard import RequestGuard
from rectvlm.serve.predictor import UPLOAD_SUFFIXES, upload_suffix
from rectvlm.types import UserError

_CHUNK_BYTES = 1 << 20
_NO_CASE = "There is no case of this id: it was deleted, or its time is over."


class CaseAnswer(BaseModel):
    """A case as programs see it."""

    id: str
    state: CaseState
    stage: Annotated[str, Field(description="waiting, reading, predicting, writing, done, failed")]
    cases_before: Annotated[int, Field(description="Cases that will be predicted before it")]
    error: Annotated[str | None, Field(description="Why it failed, in a sentence")]
    files: Annotated[list[str], Field(description="Names below /cases/ID/files/")]

    @classmethod
    def of(cls, case: ServedCase, cases: CaseQueue) -> "CaseAnswer":
        """Describe a case."""
        return cls(
            id=case.id,
            state=case.state,
            stage=case.stage,
            cases_before=cases.position(case),
            error=case.error,
            files=list(case.files()),
        )


class HealthAnswer(BaseModel):
    """State of the server."""

    status: str
    version: str
    waiting: Annotated[int, Field(description="Cases that wait")]


def make_app(cases: CaseQueue, token: str | None, max_upload_bytes: int) -> FastAPI:
    """Build the application around a queue of cases.

    Args:
        cases: queue, which the caller starts.
        token: secret of the server; None on a server of this machine only.
        max_upload_bytes: size of the largest file that is taken.
    """
    app = FastAPI(
        title="rectvlm",
        version=version("rectvlm"),
        summary=DISCLAIMER,
        docs_url=None,  # its scripts would come from another server
        redoc_url=None,
    )
    app.add_middleware(RequestGuard, token=token, max_upload_bytes=max_upload_bytes)
    page = _render_upload_page(cases, max_upload_bytes)

    def find_case(case_id: str) -> ServedCase:
        case = cases.get(case_id)
        if case is None:
            raise HTTPException(404, _NO_CASE)
        return case

    @app.get("/", include_in_schema=False)
    def show_upload_page() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/health")
    def tell_health() -> HealthAnswer:
        """Whether the server is up. Needs no token."""
        return HealthAnswer(status="ok", version=version("rectvlm"), waiting=cases.count_waiting())

    @app.post("/cases", status_code=202, responses={413: {}, 415: {}, 503: {}})
    async def upload_case(file: UploadFile, response: Response) -> CaseAnswer:
        """Upload one CT: NIfTI, MHA, NRRD, NPZ, or a DICOM series as zip."""
        case = await anyio.to_thread.run_sync(_take_upload, cases, file)
        response.headers["Location"] = f"/cases/{case.id}"
        return CaseAnswer.of(case, cases)

    @app.get("/cases/{case_id}", responses={404: {}})
    def tell_case(case_id: str) -> CaseAnswer:
        """State of a case, and the names of its files once it is done."""
        return CaseAnswer.of(find_case(case_id), cases)

    @app.get("/cases/{case_id}/files/{name:path}", responses={404: {}})
    def download_file(case_id: str, name: str) -> FileResponse:
        """One file of a case; `index.html` is its page."""
        path = find_case(case_id).files().get(name)  # a name of the list, never a path
        if path is None:
            raise HTTPException(404, "This case has no such file.")
        is_page = path.suffix == ".html"
        return FileResponse(
            path,
            filename=path.name,
            media_type="text/html" if is_page else "application/octet-stream",
            content_disposition_type="inline" if is_page else "attachment",
        )

    @app.get("/cases/{case_id}/files.zip", responses={404: {}})
    def download_all(case_id: str) -> StreamingResponse:
        """All files of a case as a zip archive."""
        case_files = find_case(case_id).files()
        if not case_files:
            raise HTTPException(404, "This case has no files yet.")
        headers = {"Content-Disposition": 'attachment; filename="case.zip"'}
        stream = _read_chunks(_zip_files(case_files))
        return StreamingResponse(stream, media_type="application/zip", headers=headers)

    @app.delete("/cases/{case_id}", status_code=204, responses={404: {}})
    def delete_case(case_id: str) -> None:
        """Delete upload and results of a case."""
        if not cases.delete(case_id):
            raise HTTPException(404, _NO_CASE)

    return app


def _render_upload_page(cases: CaseQueue, max_upload_bytes: int) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("upload_page.html.j2").render(
        disclaimer=DISCLAIMER,
        suffixes=UPLOAD_SUFFIXES,
        max_upload_mb=f"{max_upload_bytes / 1e6:g}",
        kept=f"after {cases.keep_seconds / 3600:.3g} hours",
    )


def _take_upload(cases: CaseQueue, file: UploadFile) -> ServedCase:
    """Store an upload under a random name and let it wait.

    Raises:
        HTTPException: too many cases wait, the format is unknown, or the disk is full.
    """
    busy = HTTPException(503, "Too many cases wait: try again later.", {"Retry-After": "60"})
    try:
        suffix = upload_suffix(file.filename or "")
        cases.require_room()
        path = cases.new_upload_path(suffix)
        try:
            _store(file.file, path)
        except BaseException:
            cases.remove_upload(path)
            raise
        return cases.add(path)
    except UserError as error:
        raise HTTPException(415, str(error)) from None
    except QueueFullError:
        raise busy from None


def _store(source: IO[bytes], path: Path) -> None:
    try:
        with path.open("xb") as target:
            while chunk := source.read(_CHUNK_BYTES):
                target.write(chunk)
    except OSError:
        raise HTTPException(507, "The server's disk is full: try again later.") from None


def _zip_files(case_files: dict[str, Path]) -> IO[bytes]:
    target = tempfile.TemporaryFile()  # noqa: SIM115 - closed when it has been sent
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, path in case_files.items():
            archive.write(path, name)
    target.seek(0)
    return target


def _read_chunks(source: IO[bytes]) -> Iterator[bytes]:
    with source:
        while chunk := source.read(_CHUNK_BYTES):
            yield chunk
