"""From a configuration and a number of GPUs to a plan."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rectvlm import checkpoint, weights
from rectvlm.config import Config
from rectvlm.models import RectVLM
from rectvlm.models.skeleton import skeleton
from rectvlm.plan.ledger import WORK_AREAS
from rectvlm.plan.rehearsal import Rehearsal, as_trained, rehearse
from rectvlm.plan.speed import Calls, Hardware, StepTime, step_time
from rectvlm.plan.states import BF16, FP32, States, parameters, passes, states, weights_of
from rectvlm.plan.workarea import WorkAreas
from rectvlm.train.phases import PHASES, STAGES, Stage, planned
from rectvlm.train.sharding import read_settings
from rectvlm.types import UserError

GB = 1e9
CONTEXT = 0.9e9
"""CUDA context and kernels (0.5 GB) and NCCL (0.4 GB), outside the allocator of torch: assumed, not measured here."""
WORKSPACE = 0.1e9
"""Work areas of cuBLAS and cuDNN where none were measured: assumed, and convolutions can need far more."""
WASTE = 0.05
"""Share of activations and gathered weights that the allocator holds in blocks that nothing fits in: assumed."""
VOXEL_BYTES = 4
"""CT int16, lesion bits and region ids uint8."""
READY = 3
"""Batches of a loader worker: two ready and one in the making."""
PROCESS = 3e9
"""Memory of a rank with torch, DeepSpeed and Transformers loaded, before the model: assumed."""
CT_RATE_SCANS = 24_128
"""Training scans of CT-RATE: what an epoch is, unless it is told otherwise."""


@dataclass
class Plan:
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


class Planner:
    """Plans of one configuration; what does not depend on the number of GPUs is computed once."""

    def __init__(
        self,
        config: Config,
        phase: int,
        ds_configs: Path,
        hardware: Hardware | None = None,
        areas: WorkAreas | None = None,
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
        self.config, self.hardware, self.areas = config, hardware or Hardware(), areas
        self.ds_configs, self.phase = ds_configs, PHASES[phase] if stage is None else STAGES[stage]
        assert self.phase.number == phase, f"{stage} is no step of phase {phase}"
        self.settings = self.phase.settings(config)
        ds_config = ds_configs if ds_configs.suffix == ".json" else ds_configs / f"phase{phase}.json"
        self.ds = read_settings(ds_config, self.settings, config.train.clip)
        text = weights.geometry(config.text.model)
        language = weights.geometry(config.generator.model) if "generator" in self.phase.parts else None
        model = skeleton(config, self.phase.parts, text.hidden_size, language)
        # Before freezing, as in training: a part that does not learn belongs to the checkpoint too.
        self.saved = _entries(model, checkpoint.saved_names(model))
        self.model = as_trained(model, config, self.phase)
        self.rehearsal: Rehearsal = rehearse(config, self.phase, self.model, self.settings.micro_batch, areas)

    def plan(self, gpus: int, capacity_gb: float, samples: int = CT_RATE_SCANS) -> Plan:
        """The plan for a number of GPUs with so much memory each, and so many samples in an epoch."""
        held = states(self.model, self.config, self.ds, gpus, averaged=self.settings.ema > 0)
        memory = self._memory(held)
        counts = parameters(self.model)
        flops = self._flops()
        time = self._time(held, gpus)
        steps = self.phase.settings(planned(self.config, self.phase, samples, gpus)).steps
        on_disk = self._checkpoint(counts["trainable"]) / GB
        loading = (held.loading + CONTEXT) / GB
        peak = max(memory["total"], loading)
        return Plan(
            config=self.config.name,
            phase=self.phase.number,
            stage=self.phase.stage,
            gpus=gpus,
            zero_stage=self.ds["zero_optimization"]["stage"],
            parameters=counts,
            gpu_memory_gb=memory,
            activations_gb={
                kind: size / GB for kind, size in self.rehearsal.at_peak.items() if size and kind != WORK_AREAS
            },
            loading_peak_gb=loading,
            capacity_gb=capacity_gb,
            fits=peak <= capacity_gb,
            host_memory_gb=self._host(gpus) / GB,
            checkpoint_gb=on_disk,
            checkpoint_disk_gb=self._checkpoints() * on_disk,
            flops_per_step=flops,
            time=asdict(time),
            speed=self._speed(time, flops, gpus, samples, steps),
            hardware=asdict(self.hardware),
        )

    def _memory(self, held: States) -> dict[str, float]:
        peak = dict(self.rehearsal.at_peak)
        inputs, logits = peak.pop("inputs", 0), peak.pop("logits", 0)
        measured = peak.pop(WORK_AREAS, 0)
        workspace = WORKSPACE if self.areas is None else measured
        kinds: dict[str, float] = dict(held.held)
        kinds |= {"activations": sum(peak.values()), "logits": logits, "inputs": inputs, "workspace": workspace}
        # Activations are gone when the optimizer steps; the larger of the two counts.
        kinds["optimizer_step"] = max(0, held.step - self.rehearsal.peak)
        allocated = sum(kinds.values())
        kinds["context"] = CONTEXT
        kinds["waste"] = WASTE * (self.rehearsal.peak + held.held["gather_buffers"])
        found = {kind: size / GB for kind, size in kinds.items()}
        return found | {"allocated": allocated / GB, "total": sum(found.values())}

    def _host(self, gpus: int) -> float:
        """Loader workers' batches, the processes, the parts as they are built (fp32), a checkpoint being gathered."""
        ranks = min(gpus, self.hardware.gpus_per_node)
        batch = self.settings.micro_batch * math.prod(self.config.data.grid) * VOXEL_BYTES
        loader = (self.config.data.workers * READY + 1) * batch
        return ranks * (loader + PROCESS + FP32 * self.saved) + BF16 * self.saved

    def _checkpoint(self, trainable: int) -> int:
        """All weights in bf16, and of what trains fp32 weights, two moments and the moving average where there is one.

        Names, layouts and configuration are left out: tens of KB.
        """
        return BF16 * self.saved + (3 + (self.settings.ema > 0)) * FP32 * trainable

    def _checkpoints(self) -> int:
        """How many there are at once: the next one is whole before an older one goes, and validation keeps the best."""
        return self.config.train.keep + 1 + (self.settings.validation.every > 0)

    def _flops(self) -> dict[str, Any]:
        stages: dict[str, float] = defaultdict(float)
        parts: dict[str, float] = defaultdict(float)
        for (part, stage), work in self.rehearsal.work.items():
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

    def _time(self, held: States, gpus: int) -> StepTime:
        found = weights_of(self.model, self.config)
        stage = self.ds["zero_optimization"]["stage"]
        holders = [
            name for name, m in self.model.named_modules() if next(m.parameters(recurse=False), None) is not None
        ]
        calls = Calls(
            stage=stage,
            reductions=math.ceil(held.reduced / max(1, held.held["reduce_buckets"])),
            hooks=sum(passes(name, self.config) for name in holders) if stage == 3 else 0,
            tensors=sum(1 for w in found if w.trains),
        )
        return step_time(self.rehearsal.work, held, self.settings.accumulation, gpus, self.hardware, calls)

    def _speed(self, time: StepTime, flops: dict[str, Any], gpus: int, samples: int, steps: int) -> dict[str, float]:
        batch = self.settings.micro_batch * self.settings.accumulation * gpus
        tokens = self.rehearsal.positions * self.settings.accumulation / time.total
        return {
            "samples_per_step": batch,
            "tokens_per_second_per_gpu": tokens,
            "tokens_per_second": tokens * gpus,
            "language_positions_per_second_per_gpu": tokens * (1 - self.rehearsal.patches / self.rehearsal.positions),
            "samples_per_day": batch * 86_400 / time.total,
            "model_tflops_per_gpu": flops["model"] / time.total,
            "hardware_tflops_per_gpu": flops["hardware"] / time.total,
            "steps": steps,
            "days": steps * time.total / 86_400,
            "epochs": steps * batch / samples,
        }


def _entries(model: RectVLM, names: Sequence[str]) -> int:
    """Of parameters and buffers by name."""
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return sum(own[name].numel() for name in names)


@dataclass
class Knob:
    """A change that saves memory."""

    change: str
    """Arguments of `rectvlm plan`, and of a launch where they are values of the configuration."""
    saved_gb: float
    total_gb: float
    fits: bool


CHANGES = (
    "generator.checkpointing=true",
    "encoder.checkpointing=true",
    "localizer.checkpointing=true",
    "generator.quantization=nf4",
    "generator.double_quantization=true",
    "train.phases.{phase}.micro_batch=1 train.phases.{phase}.accumulation={accumulation}",
    "generator.max_report_tokens=512",
    "data.grid=[{z},{y},{x}] data.spacing=[{dz},{dy},{dx}]",
    "generator.model=google/gemma-2-27b-it",
    "generator.model=meta-llama/Llama-3.1-8B-Instruct",
)


def knobs(
    planner: Planner,
    gpus: int,
    capacity_gb: float,
    load: Callable[[Sequence[str]], Config],
    nodes_of: int | None = None,
) -> list[Knob]:
    """Changes that save memory, the gentlest first, each planned anew.

    Args:
        planner: of the plan that does not fit.
        gpus: of that plan.
        capacity_gb: of a GPU.
        load: gives the configuration with overrides on top.
        nodes_of: GPUs of a node, where more of them come in nodes.
    """
    before = planner.plan(gpus, capacity_gb).gpu_memory_gb["total"]
    found = []
    (z, y, x), (dz, dy, dx) = planner.config.data.grid, planner.config.data.spacing
    samples = planner.settings.micro_batch * planner.settings.accumulation
    values = {"z": z, "y": y // 2, "x": x // 2, "dz": dz, "dy": 2 * dy, "dx": 2 * dx, "accumulation": samples}
    for template in CHANGES:
        change = template.format(phase=planner.phase.key, **values)
        try:
            config = load(change.split())
            if config == planner.config or ("generator" in change and planner.model.generator is None):
                continue
            row = planner.phase
            other = Planner(config, row.number, planner.ds_configs, planner.hardware, planner.areas, row.stage)
        except UserError:  # the change does not go with the rest of this configuration
            continue
        plan = other.plan(gpus, capacity_gb)
        total = plan.gpu_memory_gb["total"]
        if before - total > 0.01:
            found.append(Knob(change, before - total, total, plan.fits))
    for more in (2 * gpus, 4 * gpus, 8 * gpus):
        plan = planner.plan(more, capacity_gb)
        total = plan.gpu_memory_gb["total"]
        if before - total > 0.01:
            change = f"--gpus {more}" if nodes_of is None else f"--nodes {more // nodes_of}"
            found.append(Knob(change, before - total, total, plan.fits))
    return found
