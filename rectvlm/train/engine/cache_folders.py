"""Cache folders of libraries, elsewhere where the home cannot be written.

A container may have no home, or one that is read-only; Triton's kernels and Matplotlib's fonts then
end training with a traceback.
"""

import atexit
import logging
import os
import shutil
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)

CACHE_VARIABLES = {
    "TRITON_CACHE_DIR": ".triton/cache",
    "MPLCONFIGDIR": ".config/matplotlib",
}
"""Variables that place a cache, each with its default in the home."""


def replace_unwritable_caches() -> None:
    """Place caches that cannot be written in a new temporary folder that this user alone sees.

    Ranks have folders of their own: nothing but the time to compile is lost.
    """
    for variable, default in CACHE_VARIABLES.items():
        folder = Path(os.environ.get(variable) or Path(os.path.expanduser("~")) / default)
        if _can_write(folder.absolute()):
            continue
        replacement = tempfile.mkdtemp(prefix="rectvlm-cache-")
        atexit.register(shutil.rmtree, replacement, ignore_errors=True)
        log.warning("%s cannot be written; %s is %s for this run", folder, variable, replacement)
        os.environ[variable] = replacement


def _can_write(folder: Path) -> bool:
    """Whether a folder, or its nearest parent that exists, can be written."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        # Not `os.access`, which tells root that it may write below /proc.
        with tempfile.TemporaryFile(dir=existing):
            return True
    except OSError:
        return False
