"""Compiled extensions, loaded so that a process which dies meanwhile does not stop all later ones.

torch guards the folder of an extension with a file that the builder makes and removes. A builder that is killed leaves
it behind, and whoever comes next waits for ever, without a word.
"""

import fcntl
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from torch.utils import cpp_extension

log = logging.getLogger(__name__)


def load_extension_exclusively(name: str, load: Callable[[], object]) -> None:
    """Compile or load an extension while no other process of this project does.

    Processes come one after the other, so the guard of one that is not among them and not alive is a dead one's.

    Args:
        name: of the extension, as torch knows it.
        load: compiles it where that has not been done.
    """
    folder = Path(cpp_extension._get_build_directory(name, verbose=False))
    with _hold_exclusive_lock(folder.with_name(f"{folder.name}.turn")):
        remove_stale_lock(folder / "lock")
        load()


def remove_stale_lock(lock: Path) -> bool:
    """Remove torch's guard of a folder if no process has it open, as its builder does; whether it was removed."""
    # The kernel names open files without links, such as a home on another disk.
    real = str(lock.resolve())
    if not lock.exists() or any(
        real in _list_open_files(process) for process in psutil.process_iter()
    ):
        return False
    log.warning("%s was left by a process that died; it is removed", lock)
    lock.unlink(missing_ok=True)
    return True


def _list_open_files(process: psutil.Process) -> set[str]:
    try:
        return {file.path for file in process.open_files()}
    except psutil.Error:  # it has ended, or is another user's
        return set()


@contextmanager
def _hold_exclusive_lock(path: Path) -> Iterator[None]:
    """Wait for one's turn, which the kernel takes back from a process that dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
