"""Journal of an evaluation: case records, appended at once, to resume after a kill.

    OUT/cases/FINGERPRINT/fingerprint.json    what the records in this folder have in common
    OUT/cases/FINGERPRINT/rank-0000.jsonl     one line a case, written by one process

Processes share this folder and nothing else: each appends to a file of its own, and the first one
reads them all. A line that was cut off by a kill has no end and does not count. Records of another
checkpoint, other shards, options or code have another fingerprint, hence another folder, and never
mix with these.
"""

import json
import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from rectvlm.evaluate.case_records import CASE_RECORD_ADAPTER, CasePurpose, CaseRecord
from rectvlm.evaluate.fingerprint import hash_fingerprint
from rectvlm.files import encode_json_text, write_json
from rectvlm.types import JsonObject, UserError

log = logging.getLogger(__name__)

CaseId = tuple[CasePurpose, int]
"""Purpose of a case and its number in its split."""
POLL_SECONDS = 0.5
STALL_TIMEOUT_SECONDS = 7200.0
"""Silence of all processes after which the first one gives up; the reports of a group of cases take
minutes, on a CPU more."""


class EvaluationJournal:
    """The case records of one fingerprint: those of this process and of all others."""

    def __init__(self, out: Path, fingerprint: JsonObject, rank: int) -> None:
        """Name the folder of the records, without writing yet.

        Args:
            out: folder of the evaluation.
            fingerprint: fingerprint that the records have in common.
            rank: number of this process.
        """
        self.folder = out / "cases" / hash_fingerprint(fingerprint)
        self.fingerprint = fingerprint
        self.rank_file = self.folder / f"rank-{rank:04d}.jsonl"
        self._read_offsets: dict[Path, int] = {}
        self._records: dict[CaseId, CaseRecord] = {}
        self._is_open = False

    def append_records(self, records: Iterable[CaseRecord]) -> None:
        """Append records to this process's file and flush it to disk (fsync)."""
        if not self._is_open:
            self._open_for_append()
            self._is_open = True
        lines = []
        for record in records:
            lines.append(json.dumps(record.as_dict(), ensure_ascii=False, allow_nan=False) + "\n")
        with self.rank_file.open("ab") as file:
            file.write(encode_json_text("".join(lines)))
            file.flush()
            os.fsync(file.fileno())

    def read_records(self) -> dict[CaseId, CaseRecord]:
        """Read the records of all processes so far, each file from where the last call ended."""
        for path in sorted(self.folder.glob("rank-*.jsonl")):
            for line in self._read_new_lines(path):
                try:
                    record = CASE_RECORD_ADAPTER.validate_json(line)
                except ValidationError:
                    log.warning("A line of %s is damaged; its case is done again.", path)
                    continue
                self._records.setdefault((record.purpose, record.position), record)
        return self._records

    def wait_for_records(
        self, expected: Iterable[CaseId], timeout_seconds: float = STALL_TIMEOUT_SECONDS
    ) -> dict[CaseId, CaseRecord]:
        """Wait until other processes have written theirs, and return the records.

        Args:
            expected: cases that must have a record.
            timeout_seconds: silence of all processes that counts as an end.

        Raises:
            UserError: No process wrote a record for `timeout_seconds`.
        """
        case_ids = list(expected)
        last_change, n_records, is_announced = time.monotonic(), -1, False
        while True:
            records = self.read_records()
            missing = [case_id for case_id in case_ids if case_id not in records]
            if not missing:
                return records
            if len(records) != n_records:
                last_change, n_records = time.monotonic(), len(records)
            elif time.monotonic() - last_change > timeout_seconds:
                raise UserError(
                    f"{len(missing)} of {len(case_ids)} cases are missing in {self.folder} and no "
                    f"process has written any for {timeout_seconds:.0f} s: give the same command "
                    "again, it goes on with these."
                )
            if not is_announced:
                log.info("Waiting for %d cases of the other processes", len(missing))
                is_announced = True
            time.sleep(POLL_SECONDS)

    def _open_for_append(self) -> None:
        """Make the folder with its fingerprint, and remove what a kill left of a last line."""
        if not self.rank_file.exists():
            write_json(self.folder / "fingerprint.json", self.fingerprint)
            return
        data = self.rank_file.read_bytes()
        if data and not data.endswith(b"\n"):
            os.truncate(self.rank_file, data.rfind(b"\n") + 1)

    def _read_new_lines(self, path: Path) -> list[bytes]:
        """Whole lines of a file that the last call did not see."""
        start = self._read_offsets.get(path, 0)
        with path.open("rb") as file:
            file.seek(start)
            data = file.read()
        end = data.rfind(b"\n") + 1
        self._read_offsets[path] = start + end
        return data[:end].splitlines()
