"""What `auto` stands for: the fastest setting that fits the memory of a GPU.

Recomputed activations cost time and save memory; so do small micro-batches. Neither changes what
is learned: recomputation computes the same numbers again, and a step has the same samples however
they are cut. So the choice may differ from machine to machine, and a run may go on on another one.

Two dry runs, with every part recomputed and with none, tell what each part costs and saves. They
rank all settings; the fastest is dry-run itself, and the next one where it does not fit after all.
"""

import itertools
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rectvlm.config import Config
from rectvlm.plan.options import CT_RATE_SCANS
from rectvlm.train.budget import read_world_size, split_step
from rectvlm.train.phases import Phase
from rectvlm.types import UserError

if TYPE_CHECKING:
    from rectvlm.plan.planner import ResourcePlan, ResourcePlanner
    from rectvlm.train.dry_run.dry_run import DryRunResult
    from rectvlm.train.dry_run.memory_tracker import OperationCosts

log = logging.getLogger(__name__)

CheckpointedPart = Literal["encoder", "localizer", "generator"]
CHECKPOINTED_PARTS: tuple[CheckpointedPart, ...] = ("encoder", "localizer", "generator")
"""Parts that can recompute their activations."""
DRY_RUN_NAMES: dict[CheckpointedPart, str] = {
    "encoder": "encoder",
    "localizer": "localizer",
    "generator": "language model",
}
"""Names of the parts in a dry run's figures. The generator's resampler is never recomputed."""
MEMORY_SHARE = 0.9
"""Share of a GPU's memory that a chosen setting may be planned to fill. The rest is for what a plan
does not see: without measured work areas a plan was up to 6% below what a machine needed."""
RANKING_TOLERANCE = 1.1
"""Memory estimated while ranking, as a multiple of what a setting may fill, above which it is not
dry-run. The estimate adds up what parts save at different moments, so it is not exact."""


def list_auto_parts(phase: Phase, config: Config) -> list[CheckpointedPart]:
    """List the parts of a phase whose checkpointing is left to the planner."""
    auto_parts: list[CheckpointedPart] = []
    for part in CHECKPOINTED_PARTS:
        if part in phase.parts and getattr(config, part).activation_checkpointing == "auto":
            auto_parts.append(part)
    return auto_parts


def set_checkpointing(config: Config, recomputed_by_part: dict[CheckpointedPart, bool]) -> Config:
    """Copy a configuration with other values of `activation_checkpointing`."""
    sections: dict[str, Any] = {}
    for part, is_recomputed in recomputed_by_part.items():
        section = getattr(config, part)
        sections[part] = section.model_copy(update={"activation_checkpointing": is_recomputed})
    return config.model_copy(update=sections)


def list_micro_batches(phase: Phase, config: Config, gpus: int) -> list[int]:
    """List the micro-batches up to the configured one that make the same global batch."""
    settings = phase.get_settings(config)
    global_batch = split_step(settings, gpus).global_batch
    sizes = set()
    for size in range(1, settings.micro_batch + 1):
        step_batch = split_step(settings.model_copy(update={"micro_batch": size}), gpus)
        if step_batch.global_batch == global_batch:
            sizes.add(step_batch.micro_batch)
    return sorted(sizes)


@dataclass(frozen=True)
class AutoChoice:
    """A configuration without `auto`, and its plan."""

    config: Config
    plan: "ResourcePlan"
    """Plan of `config`, with the decisions."""
    planner: "ResourcePlanner"
    """Planner of `config`."""


@dataclass(frozen=True)
class _Candidate:
    """A setting, and what the ranking expects of it."""

    micro_batch: int
    kept_parts: tuple[CheckpointedPart, ...]
    """Parts that keep their activations; the other `auto` parts recompute them."""
    step_seconds: float
    total_gb: float

    def needs_no_less_than(self, other: "_Candidate") -> bool:
        """Whether this setting needs at least the memory of another one."""
        keeps_all = set(self.kept_parts) >= set(other.kept_parts)
        return self.micro_batch >= other.micro_batch and keeps_all


class SettingsSearch:
    """Chooses among the settings of one configuration and phase; dry runs are kept."""

    def __init__(
        self, config: Config, phase: Phase, make_planner: "Callable[[Config], ResourcePlanner]"
    ) -> None:
        """Prepare to search.

        Args:
            config: the configuration, with `auto` in it.
            phase: the phase.
            make_planner: makes the planner of a configuration.
        """
        self.config, self.phase, self.make_planner = config, phase, make_planner
        self.auto_parts = list_auto_parts(phase, config)
        self._planners: dict[tuple[CheckpointedPart, ...], ResourcePlanner] = {}

    def choose(self, gpus: int, capacity_gb: float, samples: int = CT_RATE_SCANS) -> AutoChoice:
        """Choose the fastest setting that fits; the smallest one where none does.

        Args:
            gpus: number of GPUs.
            capacity_gb: memory of each GPU, GB.
            samples: number of samples in an epoch.
        """
        limit_gb = MEMORY_SHARE * capacity_gb
        ranked = self._rank(gpus, capacity_gb)
        too_large: list[_Candidate] = []
        for candidate in ranked:
            is_hopeless = candidate.total_gb > RANKING_TOLERANCE * limit_gb
            if is_hopeless or any(map(candidate.needs_no_less_than, too_large)):
                continue
            plan = self._plan(candidate.kept_parts, candidate.micro_batch, gpus, capacity_gb)
            if max(plan.gpu_memory_gb["total"], plan.loading_peak_gb) <= limit_gb:
                return self._finish(candidate, ranked, gpus, capacity_gb, samples)
            too_large.append(candidate)
        smallest = min(ranked, key=lambda candidate: candidate.total_gb)
        return self._finish(smallest, ranked, gpus, capacity_gb, samples)

    def _planner(self, kept_parts: tuple[CheckpointedPart, ...]) -> "ResourcePlanner":
        if kept_parts not in self._planners:
            recomputed = {part: part not in kept_parts for part in self.auto_parts}
            self._planners[kept_parts] = self.make_planner(
                set_checkpointing(self.config, recomputed)
            )
        return self._planners[kept_parts]

    def _plan(
        self,
        kept_parts: tuple[CheckpointedPart, ...],
        micro_batch: int,
        gpus: int,
        capacity_gb: float,
    ) -> "ResourcePlan":
        planner = self._planner(kept_parts).with_micro_batch(micro_batch)
        return planner.make_plan(gpus, capacity_gb)

    def _rank(self, gpus: int, capacity_gb: float) -> list[_Candidate]:
        """List all settings, the fastest first; of equally fast ones the largest micro-batch."""
        sizes = list_micro_batches(self.phase, self.config, gpus)
        base = self._plan((), sizes[0], gpus, capacity_gb)
        planners = (self._planner(()), self._planner(tuple(self.auto_parts)))
        dry_runs = _DryRunPair(*(planner.dry_run(sizes[0]) for planner in planners))
        usual = _DryRunPair(*(planner.dry_run_usual_case(sizes[0]) for planner in planners))
        candidates = []
        for size, count in itertools.product(sizes, range(len(self.auto_parts) + 1)):
            for kept_parts in itertools.combinations(self.auto_parts, count):
                costs = usual.list_costs(kept_parts)
                kept_bytes = dry_runs.count_kept_bytes(kept_parts)
                candidates.append(_estimate_candidate(base, costs, kept_bytes, size, kept_parts))
        return sorted(candidates, key=lambda c: (round(c.step_seconds, 4), -c.micro_batch))

    def _finish(
        self,
        chosen: _Candidate,
        ranked: Sequence[_Candidate],
        gpus: int,
        capacity_gb: float,
        samples: int,
    ) -> AutoChoice:
        """Make the configuration of a chosen setting, and its plan with the decisions."""
        planner = self._planner(chosen.kept_parts).with_micro_batch(chosen.micro_batch)
        plan = planner.make_plan(gpus, capacity_gb, samples)
        plan.auto_decisions = self._describe_decisions(plan, chosen, ranked)
        return AutoChoice(planner.config, plan, planner)

    def _describe_decisions(
        self, plan: "ResourcePlan", chosen: _Candidate, ranked: Sequence[_Candidate]
    ) -> list[str]:
        """Say what was chosen and why, a sentence a decision."""
        limit_gb = MEMORY_SHARE * plan.capacity_gb
        total_gb = plan.gpu_memory_gb["total"]
        available = f"{limit_gb:.1f} GB, {MEMORY_SHARE:g} of a GPU"
        by_setting = {(c.micro_batch, c.kept_parts): c for c in ranked}
        decisions = []
        for part in self.auto_parts:
            is_kept = part in chosen.kept_parts
            flipped = tuple(p for p in self.auto_parts if (p in chosen.kept_parts) != (p == part))
            other = by_setting[chosen.micro_batch, flipped]
            seconds = abs(other.step_seconds - chosen.step_seconds)
            why = f"recomputing takes about {seconds:.2f} s more a step"
            if not is_kept:
                why = f"keeping them needs about {other.total_gb:.1f} GB"
            value = "false" if is_kept else "true"
            decisions.append(f"auto: {part}.activation_checkpointing={value}: {why}")
        limit = self.phase.get_settings(self.config).micro_batch
        decisions.append(
            f"auto: train.phases.{self.phase.key}.micro_batch={chosen.micro_batch} of at most "
            f"{limit}: {total_gb:.1f} GB are planned of {available}, "
            f"{plan.time.total:.2f} s a step of {plan.speed.samples_per_step} samples"
        )
        if total_gb > limit_gb:
            decisions.append(f"auto: nothing fits {available}: the smallest setting was taken")
        return decisions


@dataclass(frozen=True)
class _DryRunPair:
    """Dry runs of the smallest micro-batch."""

    recomputing: "DryRunResult"
    """All `auto` parts recompute their activations."""
    keeping: "DryRunResult"
    """None does."""

    def list_costs(self, kept_parts: Sequence[CheckpointedPart]) -> "list[OperationCosts]":
        """List the operations of a setting."""
        kept_names = {DRY_RUN_NAMES[part] for part in kept_parts}
        costs = []
        for dry_run, is_keeping in ((self.recomputing, False), (self.keeping, True)):
            for (name, _), part_costs in dry_run.costs.items():
                if (name in kept_names) == is_keeping:
                    costs.append(part_costs)
        return costs

    def count_kept_bytes(self, kept_parts: Sequence[CheckpointedPart]) -> int:
        """Count the bytes that parts keep for the backward pass beyond what recomputing keeps."""
        kept_bytes = 0
        for part in kept_parts:
            name = DRY_RUN_NAMES[part]
            kept_bytes += self.keeping.saved_bytes_by_part.get(name, 0)
            kept_bytes -= self.recomputing.saved_bytes_by_part.get(name, 0)
        return kept_bytes


def _estimate_candidate(
    base: "ResourcePlan",
    costs: "Sequence[OperationCosts]",
    kept_bytes: int,
    micro_batch: int,
    kept_parts: tuple[CheckpointedPart, ...],
) -> _Candidate:
    """Estimate a setting from the plan of the smallest one; operations grow with the samples.

    Args:
        base: plan of the smallest micro-batch where all parts recompute.
        costs: operations of the setting in such a micro-batch.
        kept_bytes: what its parts keep beyond that plan.
        micro_batch: its micro-batch.
        kept_parts: parts that keep their activations.
    """
    from rectvlm.plan.planner import ALLOCATOR_WASTE_SHARE, GB
    from rectvlm.plan.step_time import estimate_operation_seconds

    time, speed = base.time, base.speed
    ratio = micro_batch / speed.micro_batch
    accumulation = speed.accumulation / ratio
    compute = sum(estimate_operation_seconds(cost, base.hardware, ratio) for cost in costs)
    overhead = (time.reductions + time.hooks) / speed.accumulation
    forward_and_backward = max(compute, time.gathers / speed.accumulation)

    memory = base.gpu_memory_gb
    base_gb = memory["activations"] + memory["logits"] + memory["inputs"]
    activations_gb = ratio * (base_gb + kept_bytes / GB)
    # The optimizer's step comes when the activations are gone; the larger of the two counts.
    growth_gb = max(0.0, activations_gb - base_gb - memory["optimizer_step"])
    return _Candidate(
        micro_batch=micro_batch,
        kept_parts=kept_parts,
        step_seconds=accumulation * (forward_and_backward + overhead) + time.optimizer,
        total_gb=memory["total"] + (1 + ALLOCATOR_WASTE_SHARE) * growth_gb,
    )


def resolve_auto_settings(phase: Phase, config: Config, ds_config: Path) -> Config:
    """Replace `auto` for the GPU of this process, before the engine starts.

    Where there is no GPU, or no plan can be made, the setting that needs the least memory is taken:
    every part recomputes, in the smallest micro-batches.

    Args:
        phase: the phase that starts.
        config: its configuration.
        ds_config: its DeepSpeed JSON.

    Returns:
        The configuration without `auto` in the parts of the phase.

    """
    if not list_auto_parts(phase, config):
        return config
    is_main = os.environ.get("RANK", "0") == "0"
    capacity_gb = _read_gpu_memory_gb()
    if capacity_gb is None:
        if is_main:
            log.info("auto: the smallest setting is taken, since there is no GPU")
        return _take_smallest_setting(phase, config)

    from rectvlm.plan.planner import ResourcePlanner

    if is_main:
        log.info("auto: planning what fits %.0f GB; dry runs take a minute or more", capacity_gb)

    def make_planner(config: Config) -> ResourcePlanner:
        return ResourcePlanner(config, phase.number, ds_config, stage=phase.stage)

    try:
        choice = SettingsSearch(config, phase, make_planner).choose(read_world_size(), capacity_gb)
    except (UserError, RuntimeError, ValueError) as error:
        log.warning("auto: the smallest setting is taken, since no plan can be made: %s", error)
        return _take_smallest_setting(phase, config)
    if is_main:
        for decision in choice.plan.auto_decisions:
            log.info("%s", decision)
    return choice.config


def _take_smallest_setting(phase: Phase, config: Config) -> Config:
    smallest = list_micro_batches(phase, config, read_world_size())[0]
    config = set_checkpointing(config, dict.fromkeys(list_auto_parts(phase, config), True))
    return phase.set_micro_batch(config, smallest)


def _read_gpu_memory_gb() -> float | None:
    """Read the memory of this process's GPU, GB; None where there is none."""
    import torch

    if not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu":
        return None
    device = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.cuda.get_device_properties(device).total_memory / 1e9
