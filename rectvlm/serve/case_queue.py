"""Cases of the server: they wait, are predicted by one worker, and are deleted after a time."""

import logging
import queue
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rectvlm.types import UserError

log = logging.getLogger(__name__)

CaseState = Literal["waiting", "running", "done", "failed"]
Predict = Callable[[str, Path, Path, Callable[[str], None]], Path]
"""Predicts: id of the case, upload, folder of all cases, and a function that is told the stage."""
_MAX_PAUSE_SECONDS = 60.0
_STOP_SECONDS = 5.0
"""Time for a running prediction to end when the server stops; then the process ends it."""
_LOGGED_ID_LETTERS = 6
"""Letters of an id that the log shows: who knows a whole one may read the case."""


class QueueFullError(Exception):
    """So many cases wait that no other is taken."""


@dataclass
class ServedCase:
    """One uploaded CT and what became of it."""

    id: str
    """Random name of the case; who knows it may read and delete the case."""
    upload: Path
    """Uploaded file, which is deleted after the prediction."""
    folder: Path
    """Folder of the results."""
    state: CaseState = "waiting"
    stage: str = "waiting"
    """What is done now: waiting, reading, predicting, writing, done, failed."""
    error: str | None = None
    """Why the case failed, in a sentence; None for the others."""
    created: float = field(default_factory=time.time)
    """Time of the upload, seconds since 1970."""
    finished: float | None = None
    """Time of the end, seconds since 1970; None before it."""
    is_deleted: bool = False

    def files(self) -> dict[str, Path]:
        """Result files by their name relative to the folder, sorted; none before the end."""
        if self.state != "done":
            return {}
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path for path in paths}


class CaseQueue:
    """All cases, and the thread that predicts them in the order of their uploads."""

    def __init__(
        self, folder: Path, predict: Predict, max_waiting: int, keep_seconds: float
    ) -> None:
        """Make an empty queue; `start` begins its work.

        Args:
            folder: of uploads and results.
            predict: makes the results of one case.
            max_waiting: number of cases that may wait.
            keep_seconds: time after its end at which a case is deleted.
        """
        self.uploads, self.results = folder / "uploads", folder / "results"
        self.uploads.mkdir()
        self.results.mkdir()
        self._predict, self._max_waiting, self.keep_seconds = predict, max_waiting, keep_seconds
        self._cases: dict[str, ServedCase] = {}
        self._lock = threading.Lock()
        self._waiting: queue.SimpleQueue[ServedCase | None] = queue.SimpleQueue()
        self._worker = threading.Thread(target=self._work, name="predict", daemon=True)

    def start(self) -> None:
        """Begin to predict."""
        self._worker.start()

    def stop(self) -> None:
        """Delete all cases and end, if need be in the midst of a prediction."""
        for case in self._list_cases():
            self.delete(case.id)
        self._waiting.put(None)
        self._worker.join(_STOP_SECONDS)

    def count_waiting(self) -> int:
        """Number of cases that wait."""
        return sum(case.state == "waiting" for case in self._list_cases())

    def require_room(self) -> None:
        """Refuse a case before its file is stored.

        Raises:
            QueueFullError: as many as may wait are waiting.
        """
        if self.count_waiting() >= self._max_waiting:
            raise QueueFullError

    def new_upload_path(self, suffix: str) -> Path:
        """A path for an upload; see `add`.

        It lies in a new folder of its own: what lies beside a DICOM file belongs to its series.
        """
        folder = self.uploads / secrets.token_urlsafe(16)
        folder.mkdir()
        return folder / f"ct{suffix}"

    def remove_upload(self, upload: Path) -> None:
        """Delete an upload, if it is there, and its folder."""
        shutil.rmtree(upload.parent, ignore_errors=True)

    def add(self, upload: Path) -> ServedCase:
        """Let an uploaded file wait for its prediction.

        Raises:
            QueueFullError: as many as may wait are waiting; the file is deleted.
        """
        case_id = secrets.token_urlsafe(16)
        case = ServedCase(case_id, upload, self.results / case_id)
        with self._lock:
            n_waiting = sum(other.state == "waiting" for other in self._cases.values())
            if n_waiting >= self._max_waiting:
                self.remove_upload(upload)
                raise QueueFullError
            self._cases[case_id] = case
        self._waiting.put(case)
        log.info("case %s: uploaded, %d before it", _short(case), n_waiting)
        return case

    def get(self, case_id: str) -> ServedCase | None:
        """The case of an id; None if there is none, or none any more."""
        self.delete_expired()
        return self._cases.get(case_id)

    def position(self, case: ServedCase) -> int:
        """Number of cases that will be predicted before this one."""
        if case.state != "waiting":
            return 0
        others = self._list_cases()
        return sum(
            other.state in ("waiting", "running") and other.created < case.created
            for other in others
        )

    def delete(self, case_id: str) -> bool:
        """Delete upload and results of a case; whether there was such a case."""
        with self._lock:
            case = self._cases.pop(case_id, None)
        if case is None:
            return False
        case.is_deleted = True
        self._remove_files(case)
        log.info("case %s: deleted", _short(case))
        return True

    def delete_expired(self) -> None:
        """Delete the cases whose time is over."""
        now = time.time()
        for case in self._list_cases():
            if case.finished is not None and now - case.finished > self.keep_seconds:
                self.delete(case.id)

    def _list_cases(self) -> list[ServedCase]:
        with self._lock:
            return list(self._cases.values())

    def _work(self) -> None:
        pause_seconds = min(_MAX_PAUSE_SECONDS, max(0.1, self.keep_seconds / 4))
        while True:
            try:
                case = self._waiting.get(timeout=pause_seconds)
            except queue.Empty:
                self.delete_expired()
                continue
            if case is None:
                return
            if not case.is_deleted:
                self._run_case(case)

    def _run_case(self, case: ServedCase) -> None:
        def report_stage(stage: str) -> None:
            case.stage = stage

        case.state = "running"
        try:
            self._predict(case.id, case.upload, self.results, report_stage)
            case.stage = case.state = "done"
        except UserError as error:
            case.error = str(error)
            case.stage = case.state = "failed"
        case.finished = time.time()
        self.remove_upload(case.upload)
        if case.is_deleted:
            self._remove_files(case)
        log.info("case %s: %s", _short(case), case.state)

    def _remove_files(self, case: ServedCase) -> None:
        if case.state != "running":
            self.remove_upload(case.upload)
        shutil.rmtree(case.folder, ignore_errors=True)


def _short(case: ServedCase) -> str:
    return case.id[:_LOGGED_ID_LETTERS] + "…"
