"""Which of how many processes this one is, as `accelerate launch` and `torchrun` say it in the environment."""

import os
from dataclasses import dataclass

import torch

from rectvlm.types import UserError


@dataclass(frozen=True)
class ProcessRanks:
    """This process among those of one evaluation. They share a folder and nothing else."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Number on this machine: which GPU it takes."""

    @property
    def is_main(self) -> bool:
        """Whether this process gathers and writes the results."""
        return self.rank == 0

    def choose_device(self, asked: str | None) -> str:
        """Where the model goes: as asked, else a GPU of its own if there is one."""
        if asked is not None:
            return asked
        return (
            f"cuda:{self.local_rank % torch.cuda.device_count()}"
            if torch.cuda.is_available()
            else "cpu"
        )


def read_ranks_from_environment() -> ProcessRanks:
    """RANK, WORLD_SIZE and LOCAL_RANK; one process where they are not set.

    Raises:
        UserError: they are set and make no sense.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return ProcessRanks()
    said = {name: os.environ.get(name, "0") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    try:
        rank, world, local = (int(value) for value in said.values())
    except ValueError:
        rank, world, local = -1, 0, 0
    if not 0 <= rank < world or local < 0:
        words = ", ".join(f"{name}={value}" for name, value in said.items())
        raise UserError(
            f"The environment says {words}: expected 0 <= RANK < WORLD_SIZE; unset them for one process."
        )
    return ProcessRanks(rank, world, local)
