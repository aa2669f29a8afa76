"""What a command checks before seconds go into imports."""

import logging
import os
import re
import signal
from pathlib import Path

from rectvlm.cli_options import read_path

log = logging.getLogger(__name__)

DEVICE_PATTERN = r"(cpu|cuda|mps|xpu)(:\d+)?"


def end_by_sigterm_as_by_ctrl_c() -> None:
    """Let SIGTERM raise KeyboardInterrupt, so that temporary copies of patients' files go."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def existing_path(text: str) -> Path:
    """Read a path of a CT or a folder, which must exist."""
    from rectvlm.types import UserError

    path = read_path(text)
    if not path.exists():
        raise UserError(
            f"{path} does not exist: give a CT (DICOM, .nii.gz, …) or a folder of them."
        )
    return path


def check_checkpoint(folder: Path) -> None:
    """Find a checkpoint and read its `config.json` before seconds go into imports."""
    from rectvlm.checkpoint import Checkpoint

    Checkpoint.open(folder)


def prepare_device(name: str | None) -> None:
    """Import torch and try a device; from here on a command is known to be right.

    On a machine without a GPU freed memory is kept for the next activations.
    """
    from rectvlm.allocator import keep_freed_memory
    from rectvlm.types import UserError

    if name is not None and not re.fullmatch(DEVICE_PATTERN, name):
        raise UserError(f"Device {name!r} is unknown: give cpu, cuda, cuda:1, or leave it out.")
    if os.environ.get("RANK", "0") == "0":
        log.info("loading torch, transformers and the model")
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"Device {name!r} cannot be used ({reason}): give cpu, or leave --device out."
        ) from None
    if not torch.cuda.is_available():
        keep_freed_memory()
