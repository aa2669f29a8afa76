"""Changes of a configuration that save GPU memory, for a plan that does not fit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rectvlm.config import Config
from rectvlm.plan.planner import ResourcePlan, ResourcePlanner
from rectvlm.types import UserError

MEMORY_SAVING_CHANGES = (
    "generator.activation_checkpointing=true",
    "encoder.activation_checkpointing=true",
    "localizer.activation_checkpointing=true",
    "generator.quantization=nf4",
    "generator.double_quantization=true",
    "train.phases.{phase}.micro_batch=1",
    "generator.max_report_tokens=512",
    "data.grid=[{z},{y},{x}] data.spacing=[{dz},{dy},{dx}]",
    "generator.model=google/gemma-2-27b-it",
    "generator.model=meta-llama/Llama-3.1-8B-Instruct",
)
MIN_SAVING_GB = 0.01


@dataclass
class MemorySaving:
    """A change that saves memory."""

    change: str
    """Arguments of `rectvlm plan`, and of a launch where they are values of the configuration."""
    saved_gb: float
    """Memory of a GPU that the change saves, GB."""
    total_gb: float
    """Memory of a GPU with the change, GB."""
    fits: bool


def find_memory_savings(
    planner: ResourcePlanner,
    gpus: int,
    capacity_gb: float,
    load_config: Callable[[Sequence[str]], Config],
    gpus_per_node: int | None = None,
) -> list[MemorySaving]:
    """Find changes that save memory, the gentlest first, each planned by itself.

    Args:
        planner: planner of the plan that does not fit.
        gpus: number of GPUs of that plan.
        capacity_gb: memory of a GPU.
        load_config: loads the configuration with further overrides.
        gpus_per_node: number of GPUs of a node, where more GPUs come in nodes.
    """
    total_gb = planner.make_plan(gpus, capacity_gb).gpu_memory_gb["total"]
    savings: list[MemorySaving] = []

    def add_saving(change: str, plan: ResourcePlan) -> None:
        changed_gb = plan.gpu_memory_gb["total"]
        if total_gb - changed_gb > MIN_SAVING_GB:
            savings.append(MemorySaving(change, total_gb - changed_gb, changed_gb, plan.fits))

    for change in _list_changes(planner):
        changed_planner = _plan_change(planner, change, load_config)
        if changed_planner is not None:
            add_saving(change, changed_planner.make_plan(gpus, capacity_gb))
    for more_gpus in (2 * gpus, 4 * gpus, 8 * gpus):
        change = f"--gpus {more_gpus}"
        if gpus_per_node is not None:
            change = f"--nodes {more_gpus // gpus_per_node}"
        add_saving(change, planner.make_plan(more_gpus, capacity_gb))
    return savings


def _list_changes(planner: ResourcePlanner) -> list[str]:
    """Fill the configuration's own values into the changes."""
    z, y, x = planner.config.data.grid
    dz, dy, dx = planner.config.data.spacing
    half_grid = {"z": z, "y": y // 2, "x": x // 2, "dz": dz, "dy": 2 * dy, "dx": 2 * dx}
    values = {"phase": planner.phase.key, **half_grid}
    return [template.format(**values) for template in MEMORY_SAVING_CHANGES]


def _plan_change(
    planner: ResourcePlanner, change: str, load_config: Callable[[Sequence[str]], Config]
) -> ResourcePlanner | None:
    """Make a planner of the changed configuration; None where the change does not apply."""
    if "generator" in change and planner.model.generator is None:
        return None
    try:
        config = load_config(change.split())
        if config == planner.config:
            return None
        return ResourcePlanner(
            config,
            planner.phase.number,
            planner.ds_configs,
            planner.hardware,
            planner.workspace_meter,
            planner.phase.stage,
        )
    except UserError:  # the change does not go with the rest of this configuration
        return None
