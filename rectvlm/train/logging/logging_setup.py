"""Set-up of the log: libraries are silenced that warn of kernels, deprecations and devices.

Users of a command cannot act upon such warnings. `RECTVLM_VERBOSE=1` lets them through.
"""

import logging
import os
import sys
import warnings

from rich.logging import RichHandler

NOISY_LIBRARIES = (
    "bitsandbytes",
    "DeepSpeed",
    "deepspeed",
    "accelerate",
    "transformers",
    "torch",
    "torch.utils.cpp_extension",  # torch resets the levels of its own loggers, not of this one
    "peft",
    "wandb",
)


def configure_logging() -> None:
    """Log rectvlm's messages to stderr and silence libraries.

    To be called before the libraries are imported, since some write messages then.
    """
    handler: logging.Handler = logging.StreamHandler()
    if sys.stderr.isatty():
        handler = RichHandler(show_path=False)
    else:
        # In a file, lines are neither wrapped nor coloured.
        handler.setFormatter(
            logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S")
        )
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("rectvlm").setLevel(logging.INFO)
    if not os.environ.get("RECTVLM_VERBOSE"):
        _silence_libraries()


def _silence_libraries() -> None:
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    for name in NOISY_LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # the library sets its logger's level by it
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def choose_deepspeed_device() -> None:
    """Tell DeepSpeed of a machine without a GPU: it warns when it finds the CPU by itself.

    To be called before DeepSpeed is imported.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
