"""Training: three phases as rows of a table over one loop."""

from collections.abc import Sequence

from rectvlm.train.phases import PHASES, Phase

__all__ = ["PHASES", "Phase", "main"]


def main(phase_number: int, argv: Sequence[str] | None = None) -> None:
    """Run a phase as a command, with the log set up before libraries are imported.

    Args:
        phase_number: number of the phase.
        argv: arguments; by default the process's.
    """
    from rectvlm.train.engine.launcher_settings import follow_use_cpu

    follow_use_cpu()
    from rectvlm.train.logging.logging_setup import configure_logging

    configure_logging()
    # Imported here: libraries that the engine imports log messages unless they are silenced.
    from rectvlm.train import run

    run.main(phase_number, argv)
