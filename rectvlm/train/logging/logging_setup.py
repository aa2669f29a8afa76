"""A calm log: libraries speak of kernels, deprecations and devices that the user of a command cannot act upon.

`RECTVLM_VERBOSE=1` lets them speak.
"""

import logging
import os
import sys
import warnings

import torch
from rich.logging import RichHandler

NOISY_LIBRARIES = (
    "bitsandbytes",
    "DeepSpeed",
    "deepspeed",
    "accelerate",
    "transformers",
    "torch",
    "peft",
    "wandb",
)


def configure_logging() -> None:
    """Our own log on stderr, without those of the libraries; before these are imported, since some speak then."""
    verbose = bool(os.environ.get("RECTVLM_VERBOSE"))
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
    if verbose:
        return
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    for name in NOISY_LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not torch.cuda.is_available():
        # DeepSpeed warns when it finds the CPU by itself.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
