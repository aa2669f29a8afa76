"""From a configuration and a number of GPUs to a plan of memory, FLOPs, time and disk."""

import copy
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rectvlm import pretrained
from rectvlm.checkpoint.checkpoint import LANGUAGE_MODEL_PREFIX
from rectvlm.config import Config
from rectvlm.models import RectVLM
from rectvlm.models.meta_model import build_meta_model
from rectvlm.models.slice_region_encoder import SliceRegionEncoder
from rectvlm.plan.generation_time import DecodedModel, GenerationPlan, plan_generation
from rectvlm.plan.hardware import HardwareRates
from rectvlm.plan.options import CT_RATE_SCANS
from rectvlm.plan.static_memory import (
    BF16_BYTES,
    FP32_BYTES,
    ParameterCounts,
    StaticMemory,
    compute_static_memory,
    count_hooked_passes,
    count_parameters,
    list_stored_parameters,
)
from rectvlm.plan.step_time import (
    EngineCalls,
    StepTime,
    estimate_operation_seconds,
    estimate_step_time,
)
from rectvlm.train.budget import PhaseBudget, StepBatch
from rectvlm.train.dry_run.dry_run import (
    LARGEST_CASE,
    USUAL_CASE,
    VISION_PARTS,
    CaseSize,
    DryRunResult,
    apply_phase_settings,
    dry_run_micro_batch,
)
from rectvlm.train.dry_run.kernel_workspace import KernelWorkspaceMeter
from rectvlm.train.dry_run.memory_tracker import WORKSPACE_KIND
from rectvlm.train.engine.ds_config import find_ds_config, read_ds_config
from rectvlm.train.phases import PHASES, STAGES, Stage

GB = 1e9
SECONDS_PER_DAY = 86_400
CUDA_CONTEXT_BYTES = 0.9e9
"""CUDA context and kernels (0.5 GB) and NCCL (0.4 GB), outside torch's allocator: assumed."""
DEFAULT_WORKSPACE_BYTES = 0.1e9
"""Workspace of cuBLAS and cuDNN where none was measured: assumed; convolutions can need far more.
"""
ALLOCATOR_WASTE_SHARE = 0.05
"""Share of activations and gathered weights in blocks of the allocator that nothing fits in:
assumed."""
VOXEL_BYTES = 4
"""Bytes of a voxel in a batch: CT int16, lesion bits and region ids uint8."""
BATCHES_PER_WORKER = 3
"""Batches that a loader worker holds: two ready and one in the making."""
PROCESS_BYTES = 3e9
"""Memory of a rank with torch, DeepSpeed and Transformers loaded, before the model: assumed."""


@dataclass(frozen=True)
class PlannedFlops:
    """TFLOP of one GPU in an optimizer step, by pass."""

    forward: float
    backward: float
    recomputation: float
    model: float
    """TFLOP that the model needs: forward and backward."""
    hardware: float
    """TFLOP that the GPU computes: forward, backward and recomputation."""
    by_part: dict[str, float]


@dataclass(frozen=True)
class PlannedThroughput:
    """How far training comes in a time."""

    samples_per_step: int
    """Samples of all GPUs in an optimizer step."""
    micro_batch: int
    """Samples of a GPU in one forward pass."""
    accumulation: int
    """Micro-batches of a GPU in an optimizer step."""
    lr_factor: float
    """What the configuration's learning rates are multiplied with, for this global batch."""
    tokens_per_second_per_gpu: float
    """Image patches and language-model positions of one GPU in a second."""
    tokens_per_second: float
    """Image patches and language-model positions of all GPUs in a second."""
    language_positions_per_second_per_gpu: float
    samples_per_day: float
    model_tflops_per_gpu: float
    """TFLOP/s that the model needs, for each GPU."""
    hardware_tflops_per_gpu: float
    """TFLOP/s that each GPU computes, recomputation included."""
    steps: int
    """Optimizer steps of the phase."""
    days: float
    """Duration of the phase, days."""
    epochs: float
    """Passes over the training split in the phase."""


@dataclass
class ResourcePlan:
    """What one phase needs on a number of GPUs."""

    config: str
    """Name of the configuration."""
    phase: int
    stage: str | None
    """Stage of the phase; None is the phase itself."""
    gpus: int
    zero_stage: int
    parameters: ParameterCounts
    gpu_memory_gb: dict[str, float]
    """Memory of a GPU by kind, GB. `allocated` is the sum of all that torch allocates, which
    `max_memory_allocated` reports; `total` adds the CUDA context and the allocator's waste."""
    activations_gb: dict[str, float]
    """Activations by part at the moment when most are alive, GB."""
    loading_peak_gb: float
    """Peak memory of a GPU while the language model is loaded, GB."""
    capacity_gb: float
    """Memory that a GPU has, GB."""
    fits: bool
    host_memory_gb: float
    """Main memory that each node needs, GB."""
    checkpoint_gb: float
    """Size of one checkpoint, the files of all ranks together, GB."""
    checkpoint_disk_gb: float
    """Disk space of all checkpoints that exist at the same time, GB."""
    flops_per_step: PlannedFlops
    time: StepTime
    speed: PlannedThroughput
    hardware: HardwareRates
    usual_case: CaseSize
    """What the estimate of time counts with; memory suffices for any case."""
    auto_decisions: list[str] = field(default_factory=list)
    """What was decided where the configuration says `auto`, with the reason, a sentence each."""
    generation: GenerationPlan | None = None
    """Time of the validation volumes' reports; None without a report generator, or where the whole
    language model does not fit on a GPU."""

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain values."""
        return asdict(self)


class ResourcePlanner:
    """Plans one configuration; what does not depend on the number of GPUs is computed once."""

    def __init__(
        self,
        config: Config,
        phase: int,
        ds_configs: Path | None = None,
        hardware: HardwareRates | None = None,
        workspace_meter: KernelWorkspaceMeter | None = None,
        stage: Stage | None = None,
        usual_case: CaseSize = USUAL_CASE,
    ) -> None:
        """Build the model on the meta device and dry-run a micro-batch.

        Args:
            config: the configuration to plan.
            phase: number of the phase, 1 to 3.
            ds_configs: folder of the phases' DeepSpeed JSON, or one such file; by default the
                suite's own.
            hardware: rates for the estimate of time.
            workspace_meter: measures what kernels allocate for themselves on the device that is
                planned for.
            stage: a stage of the phase.
            usual_case: what the estimate of time counts with; memory suffices for any case.

        Raises:
            UserError: a model whose geometry is not known, no DeepSpeed JSON, or no such phase in
                the configuration.
        """
        self.config = config
        self.hardware = hardware or HardwareRates()
        self.workspace_meter = workspace_meter
        self.ds_configs = ds_configs
        self.phase = PHASES[phase] if stage is None else STAGES[stage]
        assert self.phase.number == phase, f"{stage} is no stage of phase {phase}"
        self.settings = self.phase.get_settings(config)
        self.ds_config = find_ds_config(phase, ds_configs)

        text_width = pretrained.read_model_config(config.text.model).hidden_size
        language_config = None
        if "generator" in self.phase.parts:
            language_config = pretrained.read_model_config(config.generator.model)
        model = build_meta_model(config, self.phase.parts, text_width, language_config)
        # Before freezing, as in training: a part that does not learn is in the checkpoint too.
        names = model.checkpoint_tensor_names()
        self.saved_entries = _count_entries(model, names)
        # The prompts are no parameters, so the engine does not round them to bf16.
        prompt_names = [name for name in names if name.startswith("prompts.")]
        self.prompt_entries = _count_entries(model, prompt_names)
        self.model = apply_phase_settings(model, config, self.phase)
        if not isinstance(model.encoder, SliceRegionEncoder):
            usual_case = usual_case._replace(tissue_share=1.0)
        if "generator" not in self.phase.parts:
            usual_case = usual_case._replace(report_tokens=None)
        self.usual_case = usual_case
        self._dry_runs: dict[tuple[int, CaseSize], DryRunResult] = {}

    def with_ds_config(self, ds_config: Path) -> "ResourcePlanner":
        """Copy the planner for another DeepSpeed JSON; the dry runs are shared."""
        planner = copy.copy(self)
        planner.ds_config = ds_config
        return planner

    def with_micro_batch(self, micro_batch: int) -> "ResourcePlanner":
        """Copy the planner for another largest micro-batch; the dry runs are shared."""
        planner = copy.copy(self)
        planner.config = self.phase.set_micro_batch(self.config, micro_batch)
        planner.settings = self.phase.get_settings(planner.config)
        return planner

    def dry_run(self, micro_batch: int, case: CaseSize = LARGEST_CASE) -> DryRunResult:
        """Run a micro-batch without values; the result is kept."""
        key = micro_batch, case
        if key not in self._dry_runs:
            self._dry_runs[key] = dry_run_micro_batch(
                self.config,
                self.phase,
                self.model,
                micro_batch,
                self.workspace_meter if case == LARGEST_CASE else None,
                case,
            )
        return self._dry_runs[key]

    def dry_run_usual_case(self, micro_batch: int) -> DryRunResult:
        """`dry_run` with cases of the usual size."""
        return self.dry_run(micro_batch, self.usual_case)

    def make_plan(
        self, gpus: int, capacity_gb: float, samples: int = CT_RATE_SCANS
    ) -> ResourcePlan:
        """Plan for a number of GPUs with so much memory each, and so many samples an epoch.

        The global batch is cut for them as in training.

        Raises:
            UserError: the DeepSpeed JSON asks for something else than training would do.
        """
        budget = PhaseBudget.plan(self.settings, samples, gpus)
        step_batch = budget.step_batch
        dry_run = self.dry_run(step_batch.micro_batch)
        usual = self.dry_run_usual_case(step_batch.micro_batch)
        ds_settings = read_ds_config(
            self.ds_config, step_batch, self.config.train.gradient_clipping
        )
        static_memory = compute_static_memory(
            self.model, self.config, ds_settings, gpus, has_ema=self.settings.ema_decay > 0
        )
        gpu_memory_gb = self._sum_gpu_memory(static_memory, dry_run)
        parameters = count_parameters(self.model)
        flops = _sum_flops(usual, step_batch.accumulation)
        zero_stage: int = ds_settings["zero_optimization"]["stage"]
        time = self._estimate_time(static_memory, usual, step_batch, zero_stage, gpus)
        checkpoint_gb = self._count_checkpoint_bytes(parameters.trainable) / GB
        loading_peak_gb = (static_memory.loading_peak_bytes + CUDA_CONTEXT_BYTES) / GB
        return ResourcePlan(
            config=self.config.name,
            phase=self.phase.number,
            stage=self.phase.stage,
            gpus=gpus,
            zero_stage=zero_stage,
            parameters=parameters,
            gpu_memory_gb=gpu_memory_gb,
            activations_gb=_list_activations(dry_run),
            loading_peak_gb=loading_peak_gb,
            capacity_gb=capacity_gb,
            fits=max(gpu_memory_gb["total"], loading_peak_gb) <= capacity_gb,
            host_memory_gb=self._estimate_host_bytes(step_batch.micro_batch, gpus) / GB,
            checkpoint_gb=checkpoint_gb,
            checkpoint_disk_gb=self._count_kept_checkpoints() * checkpoint_gb,
            flops_per_step=flops,
            time=time,
            speed=_compute_throughput(budget, usual, time, flops, gpus, samples),
            hardware=self.hardware,
            usual_case=self.usual_case,
            generation=self._plan_generation(usual, step_batch.micro_batch, gpus, capacity_gb),
        )

    def _plan_generation(
        self, usual: DryRunResult, micro_batch: int, gpus: int, capacity_gb: float
    ) -> GenerationPlan | None:
        generator = self.model.generator
        if generator is None:
            return None
        stored = [
            parameter
            for parameter in list_stored_parameters(self.model, self.config)
            if parameter.name.startswith(LANGUAGE_MODEL_PREFIX)
        ]
        language_model = DecodedModel(
            model_config=generator.language_model.config,
            weights=sum(parameter.numel() for parameter in generator.language_model.parameters()),
            weight_bytes=sum(parameter.total_bytes for parameter in stored),
            is_packed=any(parameter.is_quantized for parameter in stored),
        )
        image_seconds = 0.0
        for (part, step_pass), costs in usual.costs.items():
            if part in VISION_PARTS and step_pass == "forward":
                image_seconds += estimate_operation_seconds(costs, self.hardware) / micro_batch
        return plan_generation(
            language_model,
            self.config.generator.queries,
            self.config.generator.max_report_tokens,
            image_seconds,
            gpus,
            capacity_gb,
            self.hardware,
        )

    def _sum_gpu_memory(
        self, static_memory: StaticMemory, dry_run: DryRunResult
    ) -> dict[str, float]:
        """Add up the memory of a GPU by kind, GB."""
        activations = dict(dry_run.peak_bytes_by_kind)
        inputs = activations.pop("inputs", 0)
        logits = activations.pop("logits", 0)
        workspace: float = activations.pop(WORKSPACE_KIND, 0)
        if self.workspace_meter is None:
            workspace = DEFAULT_WORKSPACE_BYTES
        bytes_by_kind: dict[str, float] = dict(static_memory.bytes_by_kind)
        bytes_by_kind["activations"] = sum(activations.values())
        bytes_by_kind["logits"] = logits
        bytes_by_kind["inputs"] = inputs
        bytes_by_kind["workspace"] = workspace
        # Activations are gone when the optimizer steps; the larger of the two counts.
        optimizer_excess = static_memory.optimizer_step_bytes - dry_run.peak_bytes
        bytes_by_kind["optimizer_step"] = max(0, optimizer_excess)
        allocated = sum(bytes_by_kind.values())

        bytes_by_kind["context"] = CUDA_CONTEXT_BYTES
        bytes_by_kind["waste"] = ALLOCATOR_WASTE_SHARE * (
            dry_run.peak_bytes + static_memory.bytes_by_kind["gather_buffers"]
        )
        memory_gb = {kind: size / GB for kind, size in bytes_by_kind.items()}
        return memory_gb | {"allocated": allocated / GB, "total": sum(memory_gb.values())}

    def _estimate_host_bytes(self, micro_batch: int, gpus: int) -> float:
        """Estimate a node's main memory.

        It holds the batches of the loader's workers, the processes, the parts as they are built in
        fp32, and a checkpoint that is being gathered.
        """
        ranks = min(gpus, self.hardware.gpus_per_node)
        batch_bytes = micro_batch * math.prod(self.config.data.grid) * VOXEL_BYTES
        loader_bytes = (self.config.data.workers * BATCHES_PER_WORKER + 1) * batch_bytes
        rank_bytes = loader_bytes + PROCESS_BYTES + FP32_BYTES * self.saved_entries
        return ranks * rank_bytes + BF16_BYTES * self.saved_entries

    def _count_checkpoint_bytes(self, trainable: int) -> int:
        """Count the bytes of a checkpoint.

        It holds the prompts in fp32, all weights in bf16, and of each trainable one the fp32
        weight, two moments and the moving average where there is one. Names, layouts and
        configuration are left out: tens of KB a rank.
        """
        states = 3 + (self.settings.ema_decay > 0)
        weight_bytes = BF16_BYTES * (self.saved_entries - self.prompt_entries)
        return weight_bytes + FP32_BYTES * (self.prompt_entries + states * trainable)

    def _count_kept_checkpoints(self) -> int:
        """Count the checkpoints that exist at the same time.

        The next one is complete before an older one goes, and validation keeps the best.
        """
        return self.config.train.keep_checkpoints + 1 + (self.settings.validation.every > 0)

    def _estimate_time(
        self,
        static_memory: StaticMemory,
        dry_run: DryRunResult,
        step_batch: StepBatch,
        zero_stage: int,
        gpus: int,
    ) -> StepTime:
        bucket_bytes = max(1, static_memory.bytes_by_kind["reduce_buckets"])
        module_passes = 0
        if zero_stage == 3:
            module_passes = count_hooked_passes(self.model, self.config)
        parameters = list_stored_parameters(self.model, self.config)
        calls = EngineCalls(
            zero_stage=zero_stage,
            reductions=math.ceil(static_memory.reduced_bytes / bucket_bytes),
            module_passes=module_passes,
            trained_tensors=sum(parameter.is_trainable for parameter in parameters),
        )
        return estimate_step_time(
            dry_run.costs,
            static_memory,
            step_batch.accumulation,
            gpus,
            self.hardware,
            calls,
        )


def _list_activations(dry_run: DryRunResult) -> dict[str, float]:
    activations_gb: dict[str, float] = {}
    for kind, size_bytes in dry_run.peak_bytes_by_kind.items():
        if size_bytes and kind != WORKSPACE_KIND:
            activations_gb[kind] = size_bytes / GB
    return activations_gb


def _sum_flops(dry_run: DryRunResult, accumulation: int) -> PlannedFlops:
    tflop_by_pass: dict[str, float] = defaultdict(float)
    tflop_by_part: dict[str, float] = defaultdict(float)
    for (part, step_pass), costs in dry_run.costs.items():
        tflop = sum(costs.flops) * accumulation / 1e12
        tflop_by_pass[step_pass] += tflop
        tflop_by_part[part] += tflop
    model_tflop = tflop_by_pass["forward"] + tflop_by_pass["backward"]
    return PlannedFlops(
        forward=tflop_by_pass["forward"],
        backward=tflop_by_pass["backward"],
        recomputation=tflop_by_pass["recomputation"],
        model=model_tflop,
        hardware=model_tflop + tflop_by_pass["recomputation"],
        by_part={part: tflop for part, tflop in tflop_by_part.items() if tflop > 0},
    )


def _compute_throughput(
    budget: PhaseBudget,
    dry_run: DryRunResult,
    time: StepTime,
    flops: PlannedFlops,
    gpus: int,
    samples: int,
) -> PlannedThroughput:
    steps, batch = budget.count_steps_left(0), budget.step_batch
    tokens_per_second = dry_run.positions * batch.accumulation / time.total
    language_share = 1 - dry_run.patches / dry_run.positions
    return PlannedThroughput(
        samples_per_step=batch.global_batch,
        micro_batch=batch.micro_batch,
        accumulation=batch.accumulation,
        lr_factor=budget.lr_factor,
        tokens_per_second_per_gpu=tokens_per_second,
        tokens_per_second=tokens_per_second * gpus,
        language_positions_per_second_per_gpu=tokens_per_second * language_share,
        samples_per_day=batch.global_batch * SECONDS_PER_DAY / time.total,
        model_tflops_per_gpu=flops.model / time.total,
        hardware_tflops_per_gpu=flops.hardware / time.total,
        steps=steps,
        days=steps * time.total / SECONDS_PER_DAY,
        epochs=steps * batch.global_batch / samples,
    )


def _count_entries(model: RectVLM, names: Sequence[str]) -> int:
    """Count the entries of the parameters and buffers of these names."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return sum(tensors[name].numel() for name in names)
