"""Options of a comparison, which are the arguments of `rectvlm runs test`."""

from dataclasses import dataclass, field
from pathlib import Path

from rectvlm.cli_options import argument


@dataclass(frozen=True)
class ComparisonOptions:
    """Two evaluations, and how they are compared; the arguments of `rectvlm runs test`."""

    a: Path = field(metadata=argument(is_positional=True, metavar="A"))
    """Folder that `rectvlm evaluate` wrote, its metrics.json, or a run with one evaluation."""
    b: Path = field(metadata=argument(is_positional=True, metavar="B"))
    """The same of another model on the same cases."""
    out: Path | None = field(default=None, metadata=argument(metavar="FILE"))
    """JSON file of all figures."""
    bootstrap: int = field(default=1000, metadata=argument(metavar="N", minimum=1))
    """Number of bootstrap resamples for the intervals."""
    permutations: int = field(default=2000, metadata=argument(metavar="N", minimum=100))
    """Number of exchanges of A and B for the p-values."""
    seed: int = 0
    """Seed of resamples and exchanges."""
