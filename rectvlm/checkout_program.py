"""Programs of the checkout that are no part of the package, run as commands of `rectvlm`."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rectvlm.types import UserError


def run_preprocessing(arguments: Sequence[str]) -> int:
    """Run `data_pipeline.preprocess` of the checkout in a process of its own.

    The checkout is the folder beside the package, or the current folder.

    Returns:
        Exit status of the program.

    Raises:
        UserError: there is no checkout.
    """
    folders = [Path(__file__).parents[1], Path.cwd()]
    checkout = next((path for path in folders if (path / "data_pipeline").is_dir()), None)
    if checkout is None:
        raise UserError(
            f"Preprocessing runs from a checkout of the project: expected the folder data_pipeline "
            f"in {' or '.join(map(str, folders))}, found none; clone the project and change to it."
        )
    search_path = [str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])]
    program = subprocess.Popen(
        [sys.executable, "-m", "data_pipeline.preprocess", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(search_path)},
    )
    while True:
        try:
            return program.wait()
        except KeyboardInterrupt:
            continue  # the terminal stopped the program as well, and it says so itself
