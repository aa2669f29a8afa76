import subprocess
import sys


def test_a_library_stays_silent_though_torch_sets_up_its_own_log() -> None:
    code = """
import logging
from rectvlm.train.logging.logging_setup import configure_logging
configure_logging()
import torch
logging.getLogger("torch.utils.cpp_extension").warning("No CUDA runtime is found")
logging.getLogger("rectvlm.train").warning("ours")
"""
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "ours" in process.stderr and "CUDA" not in process.stderr
