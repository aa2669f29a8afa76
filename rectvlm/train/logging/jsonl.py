"""Files of one JSON object a line that grow while a run goes on, and are cut back when it goes on from earlier."""

import json
import os
from pathlib import Path

from rectvlm.files import atomic_file


def truncate_after_step(path: Path, step: int) -> None:
    """Keep the lines of steps up to `step`; the last line may be cut off by a kill.

    What is kept is the file's beginning, so the file is cut and never written anew: a kill in the middle loses nothing.
    """
    if not path.exists():
        return
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    kept = [line for line in lines if _read_step(line) <= step]
    beginning = b"".join(kept)
    if whole.startswith(beginning):
        os.truncate(path, len(beginning))
        return
    with atomic_file(path) as file:  # a line in the middle was damaged by something else
        file.write(beginning)


def _read_step(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")
