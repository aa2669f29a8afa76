"""Compiled extensions, loaded so that a process that dies meanwhile does not block all later ones.

torch guards the folder of an extension with a lock file that the builder makes and removes. A
builder that is killed leaves it behind, and the next process waits for ever, without a word.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import psutil
from torch.utils import cpp_extension

from rectvlm.files import exclusive_lock

log = logging.getLogger(__name__)


def load_extension_exclusively(name: str, load: Callable[[], object]) -> None:
    """Compile or load an extension while no other process of this project does.

    Processes take turns, so a lock file whose holder is not alive was left by a dead one.

    Args:
        name: name of the extension in torch.
        load: loads the extension, and compiles it where that has not been done.
    """
    folder = Path(cpp_extension._get_build_directory(name, verbose=False))
    with exclusive_lock(folder.with_name(f"{folder.name}.turn")):
        remove_stale_lock(folder / "lock")
        load()


def remove_stale_lock(lock: Path) -> bool:
    """Remove torch's lock file unless a process has it open, as its builder does.

    Returns:
        Whether it was removed.
    """
    if not lock.exists():
        return False
    # The kernel names open files without links, such as a home on another disk.
    real_path = str(lock.resolve())
    if any(real_path in _list_open_files(process) for process in psutil.process_iter()):
        return False
    log.warning("%s was left by a process that died; it is removed", lock)
    lock.unlink(missing_ok=True)
    return True


def _list_open_files(process: psutil.Process) -> set[str]:
    try:
        return {file.path for file in process.open_files()}
    except psutil.Error:  # it has ended, or belongs to another user
        return set()
