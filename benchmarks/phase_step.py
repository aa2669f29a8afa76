"""A phase with its engine, losses and optimizer, as `launch/` trains it, whose steps are timed.

The language model has its true geometry and random weights, which are drawn, packed to 4 bits and
sharded module by module, so that it is never complete. Its tokenizer is the bundled tiny one;
prompts are random embeddings as wide as those of the configured text encoder.
"""

import contextlib
import io
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.publishing import CHECKOUT
from benchmarks.report_step import build_language_model
from benchmarks.timing import SectionTimer, synchronized_time
from rectvlm.config import Config, load_config
from rectvlm.labels import N_FINDINGS, N_LESIONS
from rectvlm.machine import count_cores
from rectvlm.train.engine.peak_memory import peak_memory_bytes, reset_peak_memory
from rectvlm.train.phases import PHASE_TABLE, Phase
from rectvlm.types import Batch, JsonObject

SECTIONS = ("data", "augment", "forward", "backward", "optimizer", "host")
"""Sections of a step; `host` reads the losses, as the trainer does."""
WARMUP_STEPS = 2
"""The first step makes the optimizer's state; the second records ZeRO-3's order of gathers."""
COMMUNICATION_STEPS = 2
PHASE_NAMES = tuple(phase.key.removeprefix("phase") for phase in PHASE_TABLE)
CHECKPOINTING = {"configured": None, "on": True, "off": False}
_COLLECTIVES = ("all_reduce", "reduce", "broadcast", "reduce_scatter", "all_gather", "all_to_all")
_MAX_GPU_WORKERS = 4


@dataclass(frozen=True)
class Variant:
    """A way to run a phase."""

    ds_config: str | None = None
    """Name of the file in ds_configs/; None is the phase's own."""
    has_leaf_modules: bool = True
    """Whether ZeRO-3 gathers every block at once; plans assume that it does."""
    overrides: tuple[str, ...] = ()


VARIANTS = {
    "zero3": Variant("phase3"),
    "zero3-no-leaf": Variant("phase3", has_leaf_modules=False),
    "zero2": Variant("phase3_zero2"),
    "bf16-zero3": Variant("phase3", overrides=("generator.quantization=none",)),
}


@dataclass(frozen=True)
class StepSettings:
    """What one measurement runs."""

    size: str
    """Name of the configuration."""
    overrides: tuple[str, ...]
    phase: str
    """One of `PHASE_NAMES`."""
    variant: str
    """One of `VARIANTS`; empty for a phase without a report generator."""
    micro_batch: int
    processes: int
    checkpointing: str
    rounds: int
    shards: str = ""
    """Folder of the shards."""

    @property
    def label(self) -> str:
        """Name of the measurement in tables and plots."""
        parts = [f"phase {self.phase}", self.variant, f"micro-batch {self.micro_batch}"]
        if self.processes > 1:
            parts.append(f"{self.processes} processes")
        if self.checkpointing != "configured":
            parts.append(f"checkpointing {self.checkpointing}")
        return ", ".join(filter(None, parts))

    @property
    def ds_config(self) -> Path:
        """DeepSpeed's JSON."""
        name = self.get_variant().ds_config or f"phase{self.phase[0]}"
        return CHECKOUT / "ds_configs" / f"{name}.json"

    def get_variant(self) -> Variant:
        """Find the variant."""
        return VARIANTS[self.variant] if self.variant else Variant()

    def find_phase(self) -> Phase:
        """Find the phase."""
        return next(phase for phase in PHASE_TABLE if phase.key == f"phase{self.phase}")

    def load_config(self) -> Config:
        """Load the configuration with all changes."""
        key = f"train.phases.phase{self.phase}"
        changes: dict[str, object] = {
            f"{key}.micro_batch": self.micro_batch,
            f"{key}.global_batch": self.micro_batch * self.processes,
        }
        if self.shards:
            workers = min(_MAX_GPU_WORKERS, count_cores() - 1) if torch.cuda.is_available() else 0
            changes |= {"data.shards": self.shards, "data.workers": workers}
        if (is_on := CHECKPOINTING[self.checkpointing]) is not None:
            for part in ("encoder", "localizer", "generator"):
                changes[f"{part}.activation_checkpointing"] = str(is_on).lower()
        overrides = [f"{name}={value}" for name, value in changes.items()]
        return load_config(self.size, [*self.overrides, *self.get_variant().overrides, *overrides])


@dataclass
class CommunicationMeter:
    """Stands before DeepSpeed's backend and times its collectives, each of which it waits for."""

    backend: Any
    device: torch.device
    seconds: float = 0.0

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.backend, name)
        if not name.startswith(_COLLECTIVES) or not callable(attribute):
            return attribute

        def run_timed(*arguments: Any, **options: Any) -> Any:
            start_seconds = synchronized_time(self.device)
            result = attribute(*arguments, **options)
            if hasattr(result, "wait"):
                result.wait()
            self.seconds += synchronized_time(self.device) - start_seconds
            return result

        return run_timed


@dataclass
class EngineSteps:
    """A phase with its engine and its batches, ready to take steps."""

    settings: StepSettings
    engine: Any
    model: Any
    batches: Iterator[Batch]
    facts: JsonObject = field(default_factory=dict)
    """Figures of the start and of the last step."""
    losses: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def start(cls, settings: StepSettings, folder: Path) -> "EngineSteps":
        """Start the engine, build the model, prepare both and open the shards."""
        from rectvlm.data.loader import build_train_loader
        from rectvlm.train.budget import PhaseBudget
        from rectvlm.train.engine.engine import Engine
        from rectvlm.train.optimizer import build_optimizer, freeze_all_but, set_training_modes

        config, phase = settings.load_config(), settings.find_phase()
        phase_settings = phase.get_settings(config)
        sample_count = settings.micro_batch * settings.processes
        budget = PhaseBudget.plan(phase_settings, sample_count, settings.processes)
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints which op it has built
            clipping = config.train.gradient_clipping
            engine = Engine(settings.ds_config, budget.step_batch, clipping, folder)
        loader = build_train_loader(
            config.data,
            settings.micro_batch,
            engine.rank,
            engine.world_size,
            config.train.seed,
            pin_memory=engine.device.type == "cuda",
        )
        facts: JsonObject = {}
        model = _build_model(config, phase, engine, facts)
        freeze_all_but(model, phase_settings.lr)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        facts["trainable"] = sum(getattr(p, "ds_numel", p.numel()) for p in trained)
        optimizer = build_optimizer(model, config.train, phase_settings, budget)
        no_leaf = patch("rectvlm.train.engine.engine.find_leaf_modules", return_value={})
        has_leaf = settings.get_variant().has_leaf_modules
        with contextlib.nullcontext() if has_leaf else no_leaf:
            engine.prepare(model, optimizer)
        set_training_modes(model, phase_settings)
        return cls(settings, engine, model, iter(loader), facts)

    def take_step(self, end_section: Callable[[str], None]) -> None:
        """Take one step; `end_section` is called at the end of each of `SECTIONS`."""
        from rectvlm.data.augment import augment_batch
        from rectvlm.train.objectives import combine_losses, compute_losses

        config, phase = self.settings.load_config(), self.settings.find_phase()
        loaded_batch = next(self.batches)
        end_section("data")
        batch = augment_batch(loaded_batch.to(self.engine.device), config.data.augment)
        end_section("augment")
        outputs = self.engine.model(batch)
        weights = config.train.localization_loss_weights
        task_losses = compute_losses(outputs, batch, phase.tasks, weights)
        loss = combine_losses(task_losses, config.train.loss_weights)
        end_section("forward")
        self.engine.backward(loss)
        end_section("backward")
        self.engine.step()
        end_section("optimizer")
        self.losses.append({task: part.value.item() for task, part in task_losses.items()})
        report_loss = outputs.report_loss
        self.facts["tokens"] = outputs.token_count
        self.facts["language_positions"] = report_loss.position_count if report_loss else 0
        end_section("host")

    def measure_communication(self) -> dict[str, float]:
        """Take steps in which every collective is waited for; its seconds a step, by section."""
        from deepspeed.comm import comm

        meter = CommunicationMeter(comm.cdb, self.engine.device)
        seconds = dict.fromkeys(SECTIONS, 0.0)

        def end_section(section: str) -> None:
            seconds[section] += meter.seconds / COMMUNICATION_STEPS
            meter.seconds = 0.0

        with patch.object(comm, "cdb", meter):
            for _ in range(COMMUNICATION_STEPS):
                self.take_step(end_section)
        return seconds


def _build_model(config: Config, phase: Phase, engine: Any, facts: JsonObject) -> Any:
    """Build the model with random weights; note time and memory of the language model's."""
    from rectvlm import pretrained
    from rectvlm.models import RectVLM
    from rectvlm.models.prompt_embeddings import PromptEmbeddings

    reset_peak_memory()
    start_seconds = synchronized_time(engine.device)
    language_model = None
    if "generator" in phase.parts:
        shard = engine.shard_module
        language_model, _ = build_language_model(config, None, engine.device, shard)
    facts["load_seconds"] = synchronized_time(engine.device) - start_seconds
    facts["load_peak_bytes"] = peak_memory_bytes()
    text_width = pretrained.read_model_config(config.text.model).hidden_size
    counts = (N_FINDINGS, N_FINDINGS, N_LESIONS)
    prompts = PromptEmbeddings(*(torch.randn(count, text_width) for count in counts))
    return RectVLM(config, phase.parts, prompts, language_model)


def measure_step(settings: StepSettings) -> JsonObject:
    """Build the model, warm up, and time the other steps, on this rank."""
    with tempfile.TemporaryDirectory(prefix="rectvlm-bench-") as folder:
        steps = EngineSteps.start(settings, Path(folder))
    engine = steps.engine
    reset_peak_memory()
    timer = SectionTimer(SECTIONS, engine.device)
    for turn in range(WARMUP_STEPS + settings.rounds):
        if turn == WARMUP_STEPS:
            reset_peak_memory()
            timer.drop_steps()
        timer.start_step()
        steps.take_step(timer.end_section)
    peak_bytes = peak_memory_bytes()
    communication = dict.fromkeys(SECTIONS, 0.0)
    if settings.processes > 1:
        communication = steps.measure_communication()
    static_bytes = engine.describe_ranks().ranks[0].bytes
    engine.close()
    step_seconds = timer.step_seconds
    tokens, positions = steps.facts["tokens"], steps.facts["language_positions"]
    return steps.facts | {
        "peak_bytes": peak_bytes,
        "bytes": static_bytes,
        "seconds": timer.seconds,
        "communication": communication,
        "step_seconds": step_seconds,
        "samples_per_second": settings.micro_batch * settings.processes / step_seconds,
        "tokens_per_second": tokens * settings.processes / step_seconds,
        "language_positions_per_second": positions * settings.processes / step_seconds,
        "losses": steps.losses,
    }


def write_long_report_shards(config: Config, folder: Path, count: int) -> None:
    """Write shards of copies of a phantom, with a report that is longer than the limit."""
    from data_pipeline.cases import case_to_sample
    from data_pipeline.demo_cases import list_demo_cases
    from rectvlm.data.shards import write_shards

    (case,) = list_demo_cases(1, 0, None)
    sample = case_to_sample(case, config.data.grid, config.data.spacing)
    report = "The lungs are clear. " * config.generator.max_report_tokens
    metas = [replace(sample.meta, key=f"{i}", findings=report) for i in range(count)]
    write_shards((replace(sample, meta=meta) for meta in metas), folder)
