"""Options of `rectvlm serve`."""

import importlib.util
import os
from dataclasses import dataclass, field
from pathlib import Path

from rectvlm.cli_options import argument
from rectvlm.predict.dicomweb import is_loopback
from rectvlm.types import UserError

TOKEN_VARIABLE = "RECTVLM_TOKEN"
_MIN_TOKEN_LETTERS = 16
_PACKAGES = ("fastapi", "uvicorn", "python_multipart")


@dataclass(frozen=True)
class ServeOptions:
    """Options of the server, as the command line gives them."""

    checkpoint: Path = field(metadata=argument(is_positional=True, metavar="CHECKPOINT"))
    """A run's phase folder, or an exported model."""
    host: str = field(default="127.0.0.1", metadata=argument(metavar="ADDRESS"))
    """Address to listen on. Any but this machine's own needs RECTVLM_TOKEN."""
    port: int = field(default=8000, metadata=argument(metavar="N", minimum=0))
    """Port to listen on; 0 takes a free one."""
    device: str | None = None
    """Cpu, cuda, cuda:1, …; by default the GPU if there is one."""
    max_upload_mb: int = field(default=2048, metadata=argument(metavar="MB", minimum=1))
    """Largest upload, MB of 10⁶ bytes."""
    max_waiting: int = field(default=20, metadata=argument(metavar="N", minimum=1))
    """Largest number of cases that wait at the same time."""
    keep_hours: float = field(default=24.0, metadata=argument(metavar="HOURS", minimum=0))
    """Time after which the results of a case are deleted, hours."""

    @property
    def max_upload_bytes(self) -> int:
        """Largest upload, bytes."""
        return self.max_upload_mb * 1_000_000


def require_server_packages() -> None:
    """Make sure that the packages of the extra `serve` are installed.

    Raises:
        UserError: one is not.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'The server needs {", ".join(missing)}: pip install "rectvlm[serve]".')


def read_token(host: str) -> str | None:
    """The server's token from the environment; None for a server of this machine without one.

    Raises:
        UserError: it is too short, or missing where other machines reach the server.
    """
    token = os.environ.get(TOKEN_VARIABLE) or None
    if token is not None and len(token) < _MIN_TOKEN_LETTERS:
        raise UserError(
            f"{TOKEN_VARIABLE} is too short: expected at least {_MIN_TOKEN_LETTERS} letters, found "
            f"{len(token)}; make one with `openssl rand -hex 16`."
        )
    if token is None and not is_loopback(host):
        raise UserError(
            f"On {host} other machines reach the server: expected a secret in {TOKEN_VARIABLE}, "
            "found none; set it (`openssl rand -hex 16`), or leave --host out."
        )
    return token
