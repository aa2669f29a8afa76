"""Training: three phases as rows of a table over one loop."""

from rectvlm.train.phases import PHASES, Phase
from rectvlm.train.run import main

__all__ = ["PHASES", "Phase", "main"]
