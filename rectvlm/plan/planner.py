"""From a configuration and a number of GPUs to a plan."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rectvlm import pretrained
from rectvlm.config import Config
from rectvlm.models import RectVLM
from rectvlm.models.meta_model import build_meta_model
from rectvlm.plan.static_memory import (
    BF16_BYTES,
    FP32_BYTES,
    StaticMemory,
    compute_static_memory,
    count_parameters,
    count_passes,
    list_stored_parameters,
)
from rectvlm.plan.step_time import EngineCalls, HardwareRates, StepTime, estimate_step_time
from rectvlm.train.dry_run.dry_run import DryRunResult, apply_phase_settings, dry_run_micro_batch
from rectvlm.train.dry_run.kernel_workspace import KernelWorkspaceMeter
from rectvlm.train.dry_run.memory_tracker import WORKSPACE_KIND
from rectvlm.train.engine.ds_config import read_ds_config
from rectvlm.train.phases import PHASES, STAGES, Stage, with_step_count
from rectvlm.types import UserError

GB = 1e9
CUDA_CONTEXT_BYTES = 0.9e9
"""CUDA context and kernels (0.5 GB) and NCCL (0.4 GB), outside the allocator of torch: assumed, not measured here."""
DEFAULT_WORKSPACE_BYTES = 0.1e9
"""Work areas of cuBLAS and cuDNN where none were measured: assumed, and convolutions can need far more."""
ALLOCATOR_WASTE_SHARE = 0.05
"""Share of activations and gathered weights that the allocator holds in blocks that nothing fits in: assumed."""
VOXEL_BYTES = 4
"""CT int16, lesion bits and region ids uint8."""
BATCHES_PER_WORKER = 3
"""Batches of a loader worker: two ready and one in the making."""
PROCESS_BYTES = 3e9
"""Memory of a rank with torch, DeepSpeed and Transformers loaded, before the model: assumed."""
CT_RATE_SCANS = 24_128
"""Training scans of CT-RATE: what an epoch is, unless it is told otherwise."""


@dataclass
class ResourcePlan:
    """One phase on a number of GPUs."""

    config: str
    phase: int
    stage: str | None
    """The sub-step of the phase."""
    gpus: int
    zero_stage: int
    parameters: dict[str, int]
    gpu_memory_gb: dict[str, float]
    """By kind; `total` is their sum, `allocated` that without context and waste (what torch reports as its peak)."""
    activations_gb: dict[str, float]
    """By part, at the moment when most are alive."""
    loading_peak_gb: float
    capacity_gb: float
    fits: bool
    host_memory_gb: float
    """Of each node."""
    checkpoint_gb: float
    """Of one checkpoint, the files of all ranks together."""
    checkpoint_disk_gb: float
    """Of as many as there are at once."""
    flops_per_step: dict[str, Any]
    """TFLOP of one GPU in an optimizer step."""
    time: dict[str, float]
    speed: dict[str, float]
    hardware: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


class ResourcePlanner:
    """Plans of one configuration; what does not depend on the number of GPUs is computed once."""

    def __init__(
        self,
        config: Config,
        phase: int,
        ds_configs: Path,
        hardware: HardwareRates | None = None,
        workspace_meter: KernelWorkspaceMeter | None = None,
        stage: Stage | None = None,
    ) -> None:
        """Build the skeleton and rehearse a micro-batch.

        Args:
            config: what is planned.
            phase: 1 to 3.
            ds_configs: folder of the phases' DeepSpeed JSON, or one of them.
            hardware: rates for the estimate of time.
            areas: measures what kernels allocate for themselves, on the device that is planned for.
            stage: a sub-step of the phase.

        Raises:
            UserError: a model whose geometry is not known, no DeepSpeed JSON, or no such phase in the configuration.
        """
        self.config, self.hardware, self.workspace_meter = (
            config,
            hardware or HardwareRates(),
            workspace_meter,
        )
        self.ds_configs, self.phase = ds_configs, PHASES[phase] if stage is None else STAGES[stage]
        assert self.phase.number == phase, f"{stage} is no step of phase {phase}"
        self.settings = self.phase.get_settings(config)
        ds_config = (
            ds_configs if ds_configs.suffix == ".json" else ds_configs / f"phase{phase}.json"
        )
        self.ds_settings = read_ds_config(ds_config, self.settings, config.train.gradient_clipping)
        text = pretrained.read_model_config(config.text.model)
        language = (
            pretrained.read_model_config(config.generator.model)
            if "generator" in self.phase.parts
            else None
        )
        model = build_meta_model(config, self.phase.parts, text.hidden_size, language)
        # Before freezing, as in training: a part that does not learn belongs to the checkpoint too.
        self.saved_entries = _count_entries(model, model.checkpoint_tensor_names())
        self.model = apply_phase_settings(model, config, self.phase)
        self.dry_run: DryRunResult = dry_run_micro_batch(
            config, self.phase, self.model, self.settings.micro_batch, workspace_meter
        )

    def make_plan(
        self, gpus: int, capacity_gb: float, samples: int = CT_RATE_SCANS
    ) -> ResourcePlan:
        """The plan for a number of GPUs with so much memory each, and so many samples in an epoch."""
        held = compute_static_memory(
            self.model, self.config, self.ds_settings, gpus, has_ema=self.settings.ema_decay > 0
        )
        memory = self._sum_gpu_memory(held)
        counts = count_parameters(self.model)
        flops = self._sum_flops()
        time = self._estimate_time(held, gpus)
        steps = self.phase.get_settings(
            with_step_count(self.config, self.phase, samples, gpus)
        ).steps
        on_disk = self._count_checkpoint_bytes(counts["trainable"]) / GB
        loading = (held.loading_peak_bytes + CUDA_CONTEXT_BYTES) / GB
        peak = max(memory["total"], loading)
        return ResourcePlan(
            config=self.config.name,
            phase=self.phase.number,
            stage=self.phase.stage,
            gpus=gpus,
            zero_stage=self.ds_settings["zero_optimization"]["stage"],
            parameters=counts,
            gpu_memory_gb=memory,
            activations_gb={
                kind: size / GB
                for kind, size in self.dry_run.peak_bytes_by_kind.items()
                if size and kind != WORKSPACE_KIND
            },
            loading_peak_gb=loading,
            capacity_gb=capacity_gb,
            fits=peak <= capacity_gb,
            host_memory_gb=self._estimate_host_bytes(gpus) / GB,
            checkpoint_gb=on_disk,
            checkpoint_disk_gb=self._count_kept_checkpoints() * on_disk,
            flops_per_step=flops,
            time=asdict(time),
            speed=self._compute_throughput(time, flops, gpus, samples, steps),
            hardware=asdict(self.hardware),
        )

    def _sum_gpu_memory(self, static_memory: StaticMemory) -> dict[str, float]:
        peak = dict(self.dry_run.peak_bytes_by_kind)
        inputs, logits = peak.pop("inputs", 0), peak.pop("logits", 0)
        measured = peak.pop(WORKSPACE_KIND, 0)
        workspace = DEFAULT_WORKSPACE_BYTES if self.workspace_meter is None else measured
        kinds: dict[str, float] = dict(static_memory.bytes_by_kind)
        kinds |= {
            "activations": sum(peak.values()),
            "logits": logits,
            "inputs": inputs,
            "workspace": workspace,
        }
        # Activations are gone when the optimizer steps; the larger of the two counts.
        kinds["optimizer_step"] = max(
            0, static_memory.optimizer_step_bytes - self.dry_run.peak_bytes
        )
        allocated = sum(kinds.values())
        kinds["context"] = CUDA_CONTEXT_BYTES
        kinds["waste"] = ALLOCATOR_WASTE_SHARE * (
            self.dry_run.peak_bytes + static_memory.bytes_by_kind["gather_buffers"]
        )
        found = {kind: size / GB for kind, size in kinds.items()}
        return found | {"allocated": allocated / GB, "total": sum(found.values())}

    def _estimate_host_bytes(self, gpus: int) -> float:
        """Loader workers' batches, the processes, the parts as they are built (fp32), a checkpoint being gathered."""
        ranks = min(gpus, self.hardware.gpus_per_node)
        batch = self.settings.micro_batch * math.prod(self.config.data.grid) * VOXEL_BYTES
        loader = (self.config.data.workers * BATCHES_PER_WORKER + 1) * batch
        return (
            ranks * (loader + PROCESS_BYTES + FP32_BYTES * self.saved_entries)
            + BF16_BYTES * self.saved_entries
        )

    def _count_checkpoint_bytes(self, trainable: int) -> int:
        """All weights in bf16, and of what trains fp32 weights, two moments and the moving average where there is one.

        Names, layouts and configuration are left out: tens of KB.
        """
        return (
            BF16_BYTES * self.saved_entries
            + (3 + (self.settings.ema_decay > 0)) * FP32_BYTES * trainable
        )

    def _count_kept_checkpoints(self) -> int:
        """How many there are at once: the next one is whole before an older one goes, and validation keeps the best."""
        return self.config.train.keep_checkpoints + 1 + (self.settings.validation.every > 0)

    def _sum_flops(self) -> dict[str, Any]:
        stages: dict[str, float] = defaultdict(float)
        parts: dict[str, float] = defaultdict(float)
        for (part, stage), work in self.dry_run.costs.items():
            done = sum(work.flops) * self.settings.accumulation / 1e12
            stages[stage] += done
            parts[part] += done
        model = stages["forward"] + stages["backward"]
        return {
            "forward": stages["forward"],
            "backward": stages["backward"],
            "recomputation": stages["recomputation"],
            "model": model,
            "hardware": model + stages["recomputation"],
            "by_part": {part: done for part, done in parts.items() if done > 0},
        }

    def _estimate_time(self, static_memory: StaticMemory, gpus: int) -> StepTime:
        found = list_stored_parameters(self.model, self.config)
        stage = self.ds_settings["zero_optimization"]["stage"]
        holders = [
            name
            for name, m in self.model.named_modules()
            if next(m.parameters(recurse=False), None) is not None
        ]
        calls = EngineCalls(
            zero_stage=stage,
            reductions=math.ceil(
                static_memory.reduced_bytes / max(1, static_memory.bytes_by_kind["reduce_buckets"])
            ),
            module_passes=sum(count_passes(name, self.config) for name in holders)
            if stage == 3
            else 0,
            trained_tensors=sum(1 for w in found if w.is_trainable),
        )
        return estimate_step_time(
            self.dry_run.costs,
            static_memory,
            self.settings.accumulation,
            gpus,
            self.hardware,
            calls,
        )

    def _compute_throughput(
        self, time: StepTime, flops: dict[str, Any], gpus: int, samples: int, steps: int
    ) -> dict[str, float]:
        batch = self.settings.micro_batch * self.settings.accumulation * gpus
        tokens = self.dry_run.positions * self.settings.accumulation / time.total
        return {
            "samples_per_step": batch,
            "tokens_per_second_per_gpu": tokens,
            "tokens_per_second": tokens * gpus,
            "language_positions_per_second_per_gpu": tokens
            * (1 - self.dry_run.patches / self.dry_run.positions),
            "samples_per_day": batch * 86_400 / time.total,
            "model_tflops_per_gpu": flops["model"] / time.total,
            "hardware_tflops_per_gpu": flops["hardware"] / time.total,
            "steps": steps,
            "days": steps * time.total / 86_400,
            "epochs": steps * batch / samples,
        }


def _count_entries(model: RectVLM, names: Sequence[str]) -> int:
    """Of parameters and buffers by name."""
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return sum(own[name].numel() for name in names)


@dataclass
class MemorySaving:
    """A change that saves memory."""

    change: str
    """Arguments of `rectvlm plan`, and of a launch where they are values of the configuration."""
    saved_gb: float
    total_gb: float
    fits: bool


MEMORY_SAVING_CHANGES = (
    "generator.activation_checkpointing=true",
    "encoder.activation_checkpointing=true",
    "localizer.activation_checkpointing=true",
    "generator.quantization=nf4",
    "generator.double_quantization=true",
    "train.phases.{phase}.micro_batch=1 train.phases.{phase}.accumulation={accumulation}",
    "generator.max_report_tokens=512",
    "data.grid=[{z},{y},{x}] data.spacing=[{dz},{dy},{dx}]",
    "generator.model=google/gemma-2-27b-it",
    "generator.model=meta-llama/Llama-3.1-8B-Instruct",
)


def find_memory_savings(
    planner: ResourcePlanner,
    gpus: int,
    capacity_gb: float,
    load_config: Callable[[Sequence[str]], Config],
    gpus_per_node: int | None = None,
) -> list[MemorySaving]:
    """Changes that save memory, the gentlest first, each planned anew.

    Args:
        planner: of the plan that does not fit.
        gpus: of that plan.
        capacity_gb: of a GPU.
        load: gives the configuration with overrides on top.
        nodes_of: GPUs of a node, where more of them come in nodes.
    """
    before = planner.make_plan(gpus, capacity_gb).gpu_memory_gb["total"]
    found = []
    (z, y, x), (dz, dy, dx) = planner.config.data.grid, planner.config.data.spacing
    samples = planner.settings.micro_batch * planner.settings.accumulation
    values = {
        "z": z,
        "y": y // 2,
        "x": x // 2,
        "dz": dz,
        "dy": 2 * dy,
        "dx": 2 * dx,
        "accumulation": samples,
    }
    for template in MEMORY_SAVING_CHANGES:
        change = template.format(phase=planner.phase.key, **values)
        try:
            config = load_config(change.split())
            if config == planner.config or (
                "generator" in change and planner.model.generator is None
            ):
                continue
            row = planner.phase
            other = ResourcePlanner(
                config,
                row.number,
                planner.ds_configs,
                planner.hardware,
                planner.workspace_meter,
                row.stage,
            )
        except UserError:  # the change does not go with the rest of this configuration
            continue
        plan = other.make_plan(gpus, capacity_gb)
        total = plan.gpu_memory_gb["total"]
        if before - total > 0.01:
            found.append(MemorySaving(change, before - total, total, plan.fits))
    for more in (2 * gpus, 4 * gpus, 8 * gpus):
        plan = planner.make_plan(more, capacity_gb)
        total = plan.gpu_memory_gb["total"]
        if before - total > 0.01:
            change = (
                f"--gpus {more}" if gpus_per_node is None else f"--nodes {more // gpus_per_node}"
            )
            found.append(MemorySaving(change, before - total, total, plan.fits))
    return found
