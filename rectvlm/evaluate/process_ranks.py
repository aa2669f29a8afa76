"""Rank of this process, as `accelerate launch` and `torchrun` state it in the environment."""

import os
from dataclasses import dataclass

import torch

from rectvlm.types import UserError

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@dataclass(frozen=True)
class ProcessRanks:
    """This process among those of one evaluation. They share a folder and nothing else."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Number of the process on this machine, which chooses its GPU."""

    @property
    def is_main(self) -> bool:
        """Whether this process gathers and writes the results."""
        return self.rank == 0

    def choose_device(self, requested: str | None) -> str:
        """Device of the model: the requested one, else this process's GPU, else the CPU."""
        if requested is not None:
            return requested
        if not torch.cuda.is_available():
            return "cpu"
        return f"cuda:{self.local_rank % torch.cuda.device_count()}"


def read_ranks_from_environment() -> ProcessRanks:
    """Read RANK, WORLD_SIZE and LOCAL_RANK; one process where they are not set.

    Raises:
        UserError: They are set and contradict each other.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return ProcessRanks()
    values = {name: os.environ.get(name, "0") for name in RANK_VARIABLES}
    try:
        rank, world_size, local_rank = map(int, values.values())
    except ValueError:
        rank, world_size, local_rank = -1, 0, 0
    if not 0 <= rank < world_size or local_rank < 0:
        setting = ", ".join(f"{name}={value}" for name, value in values.items())
        raise UserError(
            f"The environment says {setting}: expected 0 <= RANK < WORLD_SIZE; unset them for one "
            "process."
        )
    return ProcessRanks(rank, world_size, local_rank)
