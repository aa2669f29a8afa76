"""A session of a run: what one start does with the run's folder, from its lock to its ending.

Only a session writes to the folder. A start that is refused, because another session is at work or
an unfinished run is in the way, leaves all files there as they are.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

from rectvlm.folder_lock import FolderLock
from rectvlm.train.recovery.exit_codes import ExitCode, RunEnded, write_ending
from rectvlm.types import UserError

if TYPE_CHECKING:
    from rectvlm.train.engine.engine import Engine

_T = TypeVar("_T")


@contextmanager
def lock_run_folder(folder: Path, engine: Engine) -> Iterator[None]:
    """Keep other starts off a phase's run folder; every rank must enter it.

    The lock lies beside the folder, which may be removed, and beside what it links to: one folder
    has one lock under all its names.

    Raises:
        UserError: another process holds it, or it cannot be written.
    """
    place = folder.resolve()
    lock = FolderLock(
        place.with_name(f".{place.name}.lock"),
        in_use=f"{folder} is in use",
        remedy="wait for its end, stop it, or write elsewhere with name=NEW",
        on_lost=_end_without_lock,
    )

    def acquire() -> None:
        try:
            lock.acquire()
        except OSError as error:
            raise UserError(
                f"{folder} cannot be written ({error.strerror}: {error.filename or lock.path}): "
                "make its folder writable, or name another with train.runs=FOLDER."
            ) from None

    is_main = engine.is_main  # a closed engine does not know
    on_main_rank(engine, acquire)
    try:
        yield
    finally:
        if is_main:
            lock.release()


def on_main_rank(engine: Engine, action: Callable[[], _T]) -> _T:
    """Do something on rank 0 and give its result to all ranks; every rank must call it.

    Raises:
        UserError: on rank 0, by the action.
        RunEnded: on the other ranks then, so that one rank alone says why.
    """
    outcome: tuple[_T | None, str | None] = None, None
    is_main = engine.is_main
    if is_main:
        try:
            outcome = action(), None
        except UserError as error:
            outcome = None, str(error)
    result, refusal = engine.all_gather_object(outcome)[0]
    if refusal is None:
        return result
    engine.close()
    if is_main:
        raise UserError(refusal)
    raise RunEnded(ExitCode.USER_ERROR, refusal)


@contextmanager
def record_failure(folder: Path) -> Iterator[None]:
    """Write `ending.json` when an error ends the block; `RunEnded` has its own words."""
    from rectvlm.train.engine.engine import is_lost_peer_error

    try:
        yield
    except UserError as error:
        write_ending(folder, ExitCode.USER_ERROR, str(error), None)
        raise
    except Exception as error:
        reason = first_line(error)
        if isinstance(error, RuntimeError) and is_lost_peer_error(error):
            write_ending(folder, ExitCode.RANK_LOST, f"a rank lost the others ({reason})", None)
        else:
            write_ending(folder, ExitCode.FAILED, f"{type(error).__name__}: {reason}", None)
        raise


def first_line(error: Exception) -> str:
    """First line of an error's message, of 300 characters at most."""
    return (str(error).splitlines() or [""])[0][:300]


def _end_without_lock(reason: str) -> NoReturn:
    """End a session whose folder another one has taken: two would mix their files."""
    sys.stderr.write(f"error: {reason}.\n")
    sys.stderr.flush()
    os._exit(ExitCode.RANK_LOST)
