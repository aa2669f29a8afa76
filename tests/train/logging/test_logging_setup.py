import os
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


def test_bars_of_hugging_face_are_off_before_its_library_reads_its_variables() -> None:
    code = """
from rectvlm.train import main
try:
    main(1, ["--config", "nowhere.yaml"])
except SystemExit as ended:
    from huggingface_hub import constants
    print(ended.code, constants.HF_HUB_DISABLE_PROGRESS_BARS)
"""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("HF_HUB_")
    }
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert process.stdout.split() == ["2", "True"]
