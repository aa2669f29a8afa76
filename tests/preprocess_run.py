"""A run of preprocessing in a process of its own, for tests that kill it or take its disk away."""

import os
import resource
import sys
from pathlib import Path

from data_pipeline.cases import Case
from data_pipeline.make_shards.shard_folder import preprocess
from rectvlm.types import UserError
from tests.small_cases import GRID, SPACING


def preprocess_small(
    cases: list[Case], out: Path, log: Path, samples_per_shard: int, limit: int | None
) -> None:
    """A run that says what it has to say in a log, and exits with 1 after an error that the user is
    told.

    Args:
        limit: bytes that a file may have.
    """
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        preprocess(cases, out, GRID, SPACING, samples_per_shard=samples_per_shard)
    except UserError as error:
        sys.exit(str(error))
