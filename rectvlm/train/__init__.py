"""Training: three phases as rows of a table over one loop."""

from collections.abc import Sequence
from pathlib import Path

from rectvlm.train.phases import PHASES, Phase

__all__ = ["PHASES", "Phase", "main"]


def main(phase_number: int, checkout: Path, argv: Sequence[str] | None = None) -> None:
    """Run a phase as a command; `rectvlm.train.run` has the rest.

    Args:
        number: of the phase.
        checkout: folder that holds `ds_configs/`.
        argv: arguments; by default those of the process.
    """
    from rectvlm.train.logging.logging_setup import configure_logging

    configure_logging()
    from rectvlm.train.run import (
        main as run_phase,  # imports the engine, which speaks unless it was told not to
    )

    run_phase(phase_number, checkout, argv)
