"""What was found of each case, appended to a file as soon as it is known, so that a killed evaluation goes on.

    OUT/cases/FINGERPRINT/fingerprint.json    what the results in this folder have in common
    OUT/cases/FINGERPRINT/rank-0000.jsonl     one line a case, written by one process

Processes share this folder and nothing else: each appends to a file of its own, the first one reads them all. A line
that was cut off by a kill has no end and does not count. Results of another checkpoint, other shards, options or code
have another fingerprint, hence another folder, and never mix with these.
"""

import json
import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rectvlm.evaluate.case_records import CASE_RECORD_ADAPTER, CasePurpose, CaseRecord
from rectvlm.evaluate.options import hash_fingerprint
from rectvlm.files import atomic_file
from rectvlm.types import UserError

log = logging.getLogger(__name__)

CaseId = tuple[CasePurpose, int]
"""Purpose and position of a case."""
POLL_SECONDS = 0.5
STALL_TIMEOUT_SECONDS = 1800.0
"""Silence of all other processes after which the first one gives up; a batch of long reports takes minutes."""


class EvaluationJournal:
    """The results of one fingerprint: those of this process, and what others left."""

    def __init__(self, out: Path, fingerprint: dict[str, Any], rank: int) -> None:
        """Open the folder in `out`, without writing yet."""
        self.folder = out / "cases" / hash_fingerprint(fingerprint)
        self.fingerprint = fingerprint
        self.rank_file = self.folder / f"rank-{rank:04d}.jsonl"
        self._read: dict[Path, int] = {}
        self._found: dict[CaseId, CaseRecord] = {}
        self._begun = False

    def append_records(self, records: Iterable[CaseRecord]) -> None:
        """Write results, forced to the disk."""
        if not self.rank_file.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(self.folder / "fingerprint.json") as file:
                file.write((json.dumps(self.fingerprint, indent=2) + "\n").encode())
        if not self._begun:
            _truncate_partial_line(self.rank_file)
            self._begun = True
        lines = [
            json.dumps(record.as_dict(), ensure_ascii=False, allow_nan=False) + "\n"
            for record in records
        ]
        with self.rank_file.open("ab") as file:
            file.write("".join(lines).encode())
            file.flush()
            os.fsync(file.fileno())

    def read_records(self) -> dict[CaseId, CaseRecord]:
        """All results so far, of all processes; files are read from where the last call ended."""
        for path in sorted(self.folder.glob("rank-*.jsonl")):
            start = self._read.get(path, 0)
            with path.open("rb") as file:
                file.seek(start)
                data = file.read()
            end = data.rfind(b"\n") + 1
            self._read[path] = start + end
            for line in data[:end].splitlines():
                try:
                    record = CASE_RECORD_ADAPTER.validate_json(line)
                except ValidationError:
                    log.warning("A line of %s is damaged; its case is done again.", path)
                    continue
                self._found.setdefault((record.purpose, record.position), record)
        return self._found

    def wait_for_records(
        self, expected: Iterable[CaseId], timeout_seconds: float = STALL_TIMEOUT_SECONDS
    ) -> dict[CaseId, CaseRecord]:
        """All expected results, as soon as other processes have written theirs.

        Raises:
            UserError: nothing was written by anyone for `stalled` seconds.
        """
        slots = list(expected)
        last, count, told = time.monotonic(), -1, False
        while True:
            found = self.read_records()
            missing = [slot for slot in slots if slot not in found]
            if not missing:
                return found
            if len(found) != count:
                last, count = time.monotonic(), len(found)
            elif time.monotonic() - last > timeout_seconds:
                raise UserError(
                    f"{len(missing)} of {len(slots)} cases are missing in {self.folder} and no process has written any "
                    f"for {timeout_seconds:.0f} s: give the same command again, it goes on with these."
                )
            if not told:
                log.info("Waiting for %d cases of the other processes", len(missing))
                told = True
            time.sleep(POLL_SECONDS)


def _truncate_partial_line(path: Path) -> None:
    """Remove what a kill left of a last line, so that the next one does not join it."""
    if not path.is_file():
        return
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)
