"""Compiled extensions, loaded so that a process that dies meanwhile does not block all later ones.

torch guards the folder of an extension with a lock file that the builder makes and removes. A
builder that is killed leaves it behind, and the next process waits for ever, without a word.
"""

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
        with _library_path_without_spaces():
            load()


@contextmanager
def _library_path_without_spaces() -> Iterator[None]:
    """Name torch's libraries by a link where their path holds a space.

    torch does not quote that path for the linker, which ends where the project's folder has a space
    in its name. The link keeps its name, since another one would link the extension again.
    """
    folder = cpp_extension.TORCH_LIB_PATH
    if not any(character.isspace() for character in folder):
        yield
        return
    digest = hashlib.sha256(folder.encode()).hexdigest()[:12]
    link = Path(tempfile.gettempdir()) / f"rectvlm-torch-{os.getuid()}-{digest}"
    if not link.is_symlink():
        link.symlink_to(folder)
    if os.readlink(link) != folder:  # not ours
        link = Path(tempfile.mkdtemp(prefix="rectvlm-torch-")) / "lib"
        link.symlink_to(folder)
    cpp_extension.TORCH_LIB_PATH = str(link)
    try:
        yield
    finally:
        cpp_extension.TORCH_LIB_PATH = folder


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
