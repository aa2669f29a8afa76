"""Changes that make a step faster where memory is idle, each planned by itself."""

from collections.abc import Callable
from dataclasses import dataclass

from rectvlm.config import Config
from rectvlm.plan.auto_settings import CHECKPOINTED_PARTS, list_micro_batches, set_checkpointing
from rectvlm.plan.planner import ResourcePlan, ResourcePlanner
from rectvlm.train.engine.ds_config import DS_CONFIGS

ZERO2_DS_CONFIG = DS_CONFIGS / "phase3_zero2.json"
"""DeepSpeed JSON of phase 3 whose weights are entire on each GPU."""
MIN_SAVED_SHARE = 0.01
"""Share of a step that a change must save to be listed."""


@dataclass
class Speedup:
    """A change that makes a step faster and fits."""

    change: str
    """Arguments of a launch."""
    saved_seconds: float
    """Time of a step that the change saves, seconds."""
    step_seconds: float
    """Time of a step with the change, seconds."""
    total_gb: float
    """Memory of a GPU with the change, GB."""


def find_speedups(
    planner: ResourcePlanner, plan: ResourcePlan, make_planner: Callable[[Config], ResourcePlanner]
) -> list[Speedup]:
    """Find changes that fit and are faster, the fastest first.

    Args:
        planner: planner of the plan; its configuration has no `auto`.
        plan: a plan that fits.
        make_planner: makes the planner of another configuration.
    """
    planners: dict[str, ResourcePlanner] = {}
    if not plan.auto_decisions:  # otherwise these settings are the fastest that fit
        planners = _plan_larger_settings(planner, plan, make_planner)
    if plan.zero_stage == 3 and planner.phase.number == 3:
        change = f"--ds-config ds_configs/{ZERO2_DS_CONFIG.name}"
        planners[change] = planner.with_ds_config(ZERO2_DS_CONFIG)

    speedups = []
    for change, changed_planner in planners.items():
        changed_plan = changed_planner.make_plan(plan.gpus, plan.capacity_gb)
        step_seconds = changed_plan.time.total
        saved_seconds = plan.time.total - step_seconds
        if changed_plan.fits and saved_seconds > MIN_SAVED_SHARE * plan.time.total:
            total_gb = changed_plan.gpu_memory_gb["total"]
            speedups.append(Speedup(change, saved_seconds, step_seconds, total_gb))
    return sorted(speedups, key=lambda speedup: speedup.step_seconds)


def _plan_larger_settings(
    planner: ResourcePlanner, plan: ResourcePlan, make_planner: Callable[[Config], ResourcePlanner]
) -> dict[str, ResourcePlanner]:
    """Make planners that recompute less or take more samples at once, by the arguments for it."""
    planners: dict[str, ResourcePlanner] = {}
    config, phase = planner.config, planner.phase
    for part in CHECKPOINTED_PARTS:
        if part in phase.parts and getattr(config, part).activation_checkpointing:
            change = f"{part}.activation_checkpointing=false"
            planners[change] = make_planner(set_checkpointing(config, {part: False}))
    doubled = planner.with_micro_batch(2 * plan.speed.micro_batch)
    if list_micro_batches(phase, doubled.config, plan.gpus)[-1] > plan.speed.micro_batch:
        change = f"train.phases.{phase.key}.micro_batch={2 * plan.speed.micro_batch}"
        planners[change] = doubled
    return planners
