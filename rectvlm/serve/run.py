"""Start the server: `rectvlm serve runs/demo/phase3`."""

import functools
import logging
import os
import platform
import shutil
import signal
import socket
import tempfile
from pathlib import Path

import psutil
import uvicorn

from rectvlm.checkpoint import Checkpoint
from rectvlm.models import RectVLM
from rectvlm.predict.case import LoadedModel
from rectvlm.serve.app import make_app
from rectvlm.serve.case_queue import CaseQueue
from rectvlm.serve.options import ServeOptions
from rectvlm.serve.predictor import predict_upload
from rectvlm.types import UserError

log = logging.getLogger(__name__)

_SECONDS_PER_HOUR = 3600.0
_MAX_CONNECTIONS = 64
_SHUTDOWN_SECONDS = 10


def serve(options: ServeOptions, token: str | None) -> None:
    """Load the model once and answer requests until the process is stopped.

    Uploads and results lie in a private temporary folder that goes with the server.

    Args:
        options: of the server.
        token: see `read_token`.

    Raises:
        UserError: no such checkpoint, or the port cannot be listened on.
    """
    checkpoint = Checkpoint.open(options.checkpoint)
    loaded = LoadedModel(RectVLM.from_checkpoint(checkpoint, options.device), checkpoint)
    _remove_stale_folders()
    # uvicorn raises a signal again when it has shut down: as Ctrl-C it lets this function clean up.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    prefix = f"rectvlm-serve.{platform.node()}.{os.getpid()}."
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as folder:
        # Archives of patients are unpacked in it too, and go with it.
        tempfile.tempdir = folder
        predict = functools.partial(predict_upload, loaded)
        keep_seconds = options.keep_hours * _SECONDS_PER_HOUR
        cases = CaseQueue(Path(folder), predict, options.max_waiting, keep_seconds)
        config = uvicorn.Config(
            make_app(cases, token, options.max_upload_bytes),
            log_level="warning",
            access_log=False,  # addresses hold the ids of cases
            server_header=False,
            limit_concurrency=_MAX_CONNECTIONS,
            timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
        )
        listener = _listen(options)
        cases.start()
        try:
            log.info("serving on http://%s:%d", options.host, listener.getsockname()[1])
            uvicorn.Server(config).run(sockets=[listener])
        finally:
            tempfile.tempdir = None
            cases.stop()


def _listen(options: ServeOptions) -> socket.socket:
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        return socket.create_server((options.host, options.port), family=family)
    except (OSError, OverflowError) as error:  # a port above 65535 is no OSError
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{options.host}:{options.port} cannot be listened on ({reason}): give another "
            "--host or --port."
        ) from None


def _remove_stale_folders() -> None:
    """Remove what killed servers of this machine left: it is of patients."""
    for folder in Path(tempfile.gettempdir()).glob(f"rectvlm-serve.{platform.node()}.*"):
        pid = folder.name.removeprefix(f"rectvlm-serve.{platform.node()}.").partition(".")[0]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)
