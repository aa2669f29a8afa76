"""Freed memory that is kept, in a process of its own: the settings hold until its end."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource
import torch
from rectvlm.allocator import keep_freed_memory

def count_page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(16 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(count_page_faults(), int(keep_freed_memory()), count_page_faults(), count_page_faults())
"""


def test_freed_memory_is_used_again_without_page_faults() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    before, taken, _first_use, after = map(int, done.stdout.split())
    if not taken:
        pytest.skip("the allocator is not glibc's")
    # 64 MiB are 16,384 pages of 4 KiB, or 32 of 2 MiB.
    assert before >= 8 * 32
    # The heap may grow by a block more; without the settings every use faults, as before.
    assert after < before / 4
