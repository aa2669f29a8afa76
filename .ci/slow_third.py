"""A pytest plugin for `.ci/run`: a third of the collected tests, and no new one after 25 minutes.

Which third follows from the number of commits, so three landings in a row run all of them. Every
third test is taken, not a third of the files, since one file has most of the minutes. A test that
begins after the limit is skipped and named ("not reached"); one that has begun by then may end,
which keeps the whole below 30 minutes.
"""

import os
import subprocess
import time
from pathlib import Path

import pytest

LIMIT_SECONDS = 25 * 60
START = "RECTVLM_SLOW_TESTS_START"
"""Environment variable that tells the processes of pytest-xdist when the first of them began."""


def count_commits() -> int:
    """Commits that lead to the one that is tested."""
    command = ["git", "rev-list", "--count", "HEAD"]
    return int(
        subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, check=True).stdout
    )


def pytest_configure() -> None:
    """Start the clock, in the first process alone."""
    os.environ.setdefault(START, str(time.time()))


@pytest.hookimpl(trylast=True)  # after `-m` has taken its choice
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep every third test."""
    third = count_commits() % 3
    chosen = items[third::3]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what would begin too late."""
    if time.time() - float(os.environ[START]) > LIMIT_SECONDS:
        pytest.skip(f"not reached within {LIMIT_SECONDS // 60} minutes")
