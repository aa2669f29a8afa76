"""Options of the command `rectvlm plan`, besides the rates of the hardware."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rectvlm.cli_options import argument
from rectvlm.plan.hardware import H200_MEMORY_GB
from rectvlm.train.phases import PhaseNumber, Stage

CT_RATE_SCANS = 24_128
"""Training scans of CT-RATE, the default length of an epoch."""
DEFAULT_GPUS = 2
"""GPUs that are planned for where neither their number nor that of nodes is given."""


@dataclass(frozen=True)
class PlanOptions:
    """What is planned, and for how many GPUs."""

    config: str = "demo"
    """Name or path of a configuration."""
    phase: PhaseNumber = field(default=3, metadata=argument(exclusive_group="phase"))
    """Number of the phase."""
    stage: Stage | None = field(default=None, metadata=argument(exclusive_group="phase"))
    """Stage of phase 2 or 3, instead of --phase."""
    all_phases: bool = field(default=False, metadata=argument(exclusive_group="phase"))
    """Plan the three phases one after the other and add up their time."""
    gpus: str | None = field(
        default=None, metadata=argument(exclusive_group="gpus", metavar="N[,N…]")
    )
    """Number of GPUs, by default 2; several numbers give a row each."""
    nodes: int | None = field(default=None, metadata=argument(exclusive_group="gpus", metavar="N"))
    """Number of full nodes, instead of --gpus."""
    gpu_memory: float = field(default=H200_MEMORY_GB, metadata=argument(metavar="GB"))
    """Memory of each GPU, GB."""
    work_areas: Literal["cpu", "cuda"] | None = None
    """Device on which each kind of product and convolution runs once, to count what kernels
    allocate for themselves."""
    samples: int = field(default=CT_RATE_SCANS, metadata=argument(metavar="N"))
    """Number of samples in an epoch, as in CT-RATE."""
    ds_configs: Path | None = field(default=None, metadata=argument(metavar="PATH"))
    """Path of the DeepSpeed JSON, or of a folder with one for each phase."""
    as_json: bool = field(
        default=False, metadata=argument(flag="--json", help="print the plan as JSON, for programs")
    )
    """Whether the plan is printed as JSON, for programs."""
    overrides: tuple[str, ...] = field(
        default=(), metadata=argument(is_positional=True, metavar="part.field=value")
    )
    """Changes of the configuration."""
