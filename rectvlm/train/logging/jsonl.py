"""JSONL files that grow with a run and are cut back when it resumes from an earlier step."""

import json
import os
from pathlib import Path

from rectvlm.files import atomic_file


def truncate_after_step(path: Path, step: int) -> None:
    """Keep the lines of steps up to `step`; a kill may have cut off the last line.

    The lines to keep are the beginning of the file, so the file is truncated and not rewritten: a
    kill in the middle loses nothing.
    """
    if not path.exists():
        return
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    kept_content = b"".join(line for line in lines if _read_step(line) <= step)
    if content.startswith(kept_content):
        os.truncate(path, len(kept_content))
        return
    with atomic_file(path) as file:  # a line in the middle was damaged by something else
        file.write(kept_content)


def _read_step(line: bytes) -> float:
    """Step of a complete line; infinity where the line is cut off or damaged."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")
