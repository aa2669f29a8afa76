"""What a launcher put into the environment: the part that training follows, and the part it does
not.

`accelerate launch` passes on what a config file says, also the user's default file, which was
written for other programs. Here the phase's DeepSpeed JSON and the configuration decide precision,
sharding and accumulation, and nothing is compiled.

| variables                                          | become                                    |
|----------------------------------------------------|-------------------------------------------|
| ranks, MASTER_ADDR, OMP_NUM_THREADS, NCCL_, KMP_   | followed, by torch                        |
| CUDA_VISIBLE_DEVICES (`gpu_ids`)                   | followed, by torch                        |
| ACCELERATE_USE_CPU                                 | followed: GPUs are hidden                 |
| ACCELERATE_DEBUG_MODE, _CPU_AFFINITY, _LOG_LEVEL   | followed, by Accelerate                   |
| all other ACCELERATE_, and FSDP_, MEGATRON_LM_,    | removed before Accelerate reads them, and |
| PARALLELISM_CONFIG_                                | named in the log and in `engine.json`     |
| several processes without ranks                    | refused                                   |

This module does not import torch, so that GPUs can be hidden before it looks for them.
"""

import os
from dataclasses import dataclass

from rectvlm.types import UserError

LAUNCHER_PREFIXES = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")
FOLLOWED_VARIABLES = (
    "ACCELERATE_USE_CPU",
    "ACCELERATE_DEBUG_MODE",
    "ACCELERATE_CPU_AFFINITY",
    "ACCELERATE_LOG_LEVEL",
)
IMPLIED_PREFIXES = (
    "ACCELERATE_CONFIG_DS_",
    "ACCELERATE_DYNAMO_MODE",
    "ACCELERATE_DYNAMO_USE_",
    "ACCELERATE_FP8_",
    "FSDP_",
    "MEGATRON_LM_",
    "PARALLELISM_CONFIG_",
)
"""Details of a setting that has a variable of its own; they are not named to the user."""
DEFAULT_VALUES = ("", "no", "none", "false", "0")
"""Values, in lower case, with which a variable asks for nothing."""
DEFAULT_SETTINGS = (
    ("ACCELERATE_MIXED_PRECISION", "bf16"),
    ("ACCELERATE_USE_DEEPSPEED", "true"),
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"),
)
"""Variables and values, in lower case, that ask for what training does by default."""
PROCESS_COUNT_VARIABLES = (
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "MV2_COMM_WORLD_SIZE",
    "SLURM_STEP_NUM_TASKS",
)
"""Variables in which MPI's launchers and `srun` tell a process how many there are."""


@dataclass(frozen=True)
class LauncherSettings:
    """A launcher's settings; the field names are keys of `engine.json`."""

    followed: dict[str, str]
    """Variables that training follows."""
    ignored: dict[str, str]
    """Variables that were removed: the DeepSpeed JSON and the configuration decide."""

    def describe_ignored(self) -> str:
        """The ignored settings that ask for something else than what is done; may be empty."""
        descriptions = [
            f"{name.removeprefix('ACCELERATE_').lower()} {value}"
            for name, value in self.ignored.items()
            if _asks_for_something(name, value.lower())
        ]
        return ", ".join(descriptions)


def _asks_for_something(name: str, value: str) -> bool:
    if name.startswith(IMPLIED_PREFIXES) or value in DEFAULT_VALUES:
        return False
    return (name, value) not in DEFAULT_SETTINGS


def take_launcher_settings() -> LauncherSettings:
    """Remove from the environment what training does not follow; return what was there."""
    settings = LauncherSettings({}, {})
    for name in sorted(os.environ):
        if name in FOLLOWED_VARIABLES:
            settings.followed[name] = os.environ[name]
        elif name.startswith(LAUNCHER_PREFIXES):
            settings.ignored[name] = os.environ.pop(name)
    # Accelerate would leave out DeepSpeed too; the GPUs are hidden already (`follow_use_cpu`).
    os.environ.pop("ACCELERATE_USE_CPU", None)
    return settings


def follow_use_cpu() -> None:
    """Hide the GPUs where the launcher was told to use the CPU; before torch looks for them."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on"):
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


def is_started_by_launcher() -> bool:
    """Whether a launcher started this process: it has a rank, or `accelerate launch` set it up."""
    return "RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def check_process_count(gpu_count: int) -> None:
    """Refuse processes that would train side by side without a word of each other.

    Args:
        gpu_count: number of GPUs that torch sees on this machine.

    Raises:
        UserError: several processes were started and have no ranks, or more than there are GPUs.
    """
    if "RANK" in os.environ:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if gpu_count and local_rank >= gpu_count:
            started = os.environ.get("LOCAL_WORLD_SIZE", f"at least {local_rank + 1}")
            raise UserError(
                f"{started} processes were started on a machine where {gpu_count} GPUs are "
                f"visible: start one a GPU (--num_processes {gpu_count} of `accelerate launch`, "
                f"--processes {gpu_count} of `rectvlm train`)."
            )
        return
    for name in PROCESS_COUNT_VARIABLES:
        if os.environ.get(name, "1") not in ("", "0", "1"):
            raise UserError(
                f"{os.environ[name]} processes were started ({name}), but none has a RANK, so each "
                "would train alone: start the phase with `rectvlm train N --processes COUNT` or "
                "`accelerate launch`."
            )
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    if "ACCELERATE_MIXED_PRECISION" in os.environ and address not in ("127.0.0.1", "localhost"):
        raise UserError(
            f"`accelerate launch` was told of several machines (the first is {address}), but "
            "started this process without a rank, so each machine would train alone: use "
            "launch/accelerate/nodes.yaml, or `rectvlm train N --machines COUNT`."
        )


def lacks_processes() -> bool:
    """Whether `accelerate launch` was told of several processes and started one, without a rank.

    It does so on CPUs unless it is given DeepSpeed or MPI.
    """
    names = ("ACCELERATE_MIXED_PRECISION", "MASTER_ADDR")
    return "RANK" not in os.environ and all(name in os.environ for name in names)
