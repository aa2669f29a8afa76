"""What the trainer costs beside the model: its loop against a bare PyTorch loop, step by step.

    python -m benchmarks.overhead [--size demo] [--phases 1 2] [--micro-batch 1 8] [--steps 20]
        [--warmup 3] [--out DIR]

One process trains the same model twice, side by side, on the same batches, which lie in memory.
Before every step of the trainer a bare step and a step of the engine are taken and timed, in turn,
with the same random draws, so that whatever else the machine does meets all of them alike:

bare      PyTorch alone: augment, forward, losses, backward, clip, AdamW on 32-bit copies of the
          bfloat16 weights. No DeepSpeed, nothing recorded.
engine    the trainer's engine alone: the same, with DeepSpeed's forward, backward and step.
trainer   all that `rectvlm.train.loop.run_training_loop` does from one batch to the next: learning
          rates, seeds, the guard against bad steps, agreeing with other ranks, the clock of each
          part, memory, metrics.jsonl, the trace, the watchdog.

Checkpoints and validation are not part of a step: the only checkpoint follows the last step, which
does not count.
"""

import argparse
import contextlib
import io
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measurements import Comparison, Repetitions, make_table
from benchmarks.publishing import (
    CHECKOUT,
    Program,
    make_parser,
    positive_int,
    prepare_engine_environment,
    publish_result,
    quiet_main,
)
from benchmarks.report_step import MasterWeightAdamW
from benchmarks.timing import run_in_new_process, synchronize
from benchmarks.train_step import make_phantom_shards
from rectvlm.config import Config
from rectvlm.types import Batch, JsonObject

BATCH_COUNT = 4
MAX_OVERHEAD_SHARE = 0.03
"""Share of a step that the trainer may cost."""
LOOPS = ("bare", "engine", "trainer")


@dataclass(frozen=True)
class OverheadSettings:
    """What is measured."""

    size: str
    """Name of the configuration."""
    phase: int
    micro_batch: int
    steps: int
    """Number of steps that count."""
    warmup: int
    """Number of steps before them."""


class InterleavedBatches:
    """Batches for the trainer, with a step of each other loop before every one of them."""

    def __init__(
        self,
        batches: Sequence[Batch],
        other_steps: Mapping[str, Callable[[Batch], None]],
        device: torch.device,
        seed_step: Callable[[int], None],
    ) -> None:
        """Start with no step timed.

        Args:
            batches: the batches, which are repeated.
            other_steps: a step of each other loop, by its name.
            device: the device of the steps.
            seed_step: seeds a step by its number, from 0, as the trainer will seed it: an elastic
                deformation that one loop alone computes would count as its overhead.
        """
        self.batches, self.other_steps = batches, other_steps
        self.device, self.seed_step = device, seed_step
        self.seconds: dict[str, list[float]] = {name: [] for name in (*other_steps, "trainer")}

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(itertools.cycle(self.batches)):
            names = list(self.other_steps)
            for name in names if number % 2 else reversed(names):
                self.seed_step(number)
                step = partial(self.other_steps[name], batch)
                self.seconds[name].append(self._time_step(step))
            start_seconds = time.perf_counter()
            yield batch
            synchronize(self.device)
            self.seconds["trainer"].append(time.perf_counter() - start_seconds)

    def _time_step(self, step: Callable[[], None]) -> float:
        start_seconds = time.perf_counter()
        step()
        synchronize(self.device)
        return time.perf_counter() - start_seconds


def measure_overhead(settings: OverheadSettings, work: Path) -> JsonObject:
    """Measure one phase with random weights, whose values change nothing in what is computed."""
    from rectvlm.data.augment import augment_batch
    from rectvlm.data.loader import build_train_loader
    from rectvlm.train.budget import PhaseBudget
    from rectvlm.train.engine.engine import Engine
    from rectvlm.train.loop import run_training_loop
    from rectvlm.train.objectives import combine_losses, compute_losses
    from rectvlm.train.optimizer import build_optimizer, freeze_all_but
    from rectvlm.train.phases import PHASES
    from rectvlm.train.recovery.position import TrainingPosition, seed_micro_batch
    from rectvlm.train.recovery.signals import StopSignals
    from rectvlm.train.run import build_model

    config, phase = _load_config(settings, work), PHASES[settings.phase]
    phase_settings, folder = phase.get_settings(config), work / "runs" / phase.key
    budget = PhaseBudget.plan(phase_settings, sample_count=1, world_size=1)
    folder.mkdir(parents=True)
    clipping, seed = config.train.gradient_clipping, config.train.seed
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints which op it has built
        ds_config = CHECKOUT / "ds_configs" / f"phase{settings.phase}.json"
        engine = Engine(ds_config, budget.step_batch, clipping, folder)
    loader = build_train_loader(config.data, settings.micro_batch, 0, 1, seed)
    batches = list(itertools.islice(loader, BATCH_COUNT))

    bare_model = build_model(phase, config, None, engine)
    freeze_all_but(bare_model, phase_settings.lr)
    bare_model.to(engine.device, torch.bfloat16).train()
    trainable = [parameter for parameter in bare_model.parameters() if parameter.requires_grad]
    bare_optimizer = MasterWeightAdamW(trainable, clipping)
    model = build_model(phase, config, None, engine)
    saved_names = model.checkpoint_tensor_names()
    freeze_all_but(model, phase_settings.lr)
    engine.prepare(model, build_optimizer(model, config.train, phase_settings, budget))

    def compute_loss(module: Any, batch: Batch) -> torch.Tensor:
        batch = augment_batch(batch.to(engine.device), config.data.augment)
        localization_weights = config.train.localization_loss_weights
        losses = compute_losses(module(batch), batch, phase.tasks, localization_weights)
        return combine_losses(losses, config.train.loss_weights)

    def run_bare_step(batch: Batch) -> None:
        compute_loss(bare_model, batch).backward()
        bare_optimizer.step()

    def run_engine_step(batch: Batch) -> None:
        engine.backward(compute_loss(engine.model, batch))
        engine.step()

    def seed_step(step: int) -> None:
        seed_micro_batch(seed, step * settings.micro_batch)

    other_steps = {"bare": run_bare_step, "engine": run_engine_step}
    interleaved = InterleavedBatches(batches, other_steps, engine.device, seed_step)
    start = TrainingPosition(0, 0)
    with StopSignals() as signals:
        run_training_loop(
            engine, interleaved, phase, config, budget, folder, saved_names, start, signals
        )
    engine.close()
    counted = slice(settings.warmup, settings.warmup + settings.steps)
    seconds = {name: times[counted] for name, times in interleaved.seconds.items()}
    row = {"size": settings.size, "phase": settings.phase, "micro_batch": settings.micro_batch}
    return row | compare_step_times(seconds)


def _load_config(settings: OverheadSettings, work: Path) -> Config:
    """Load the configuration of a phase that neither saves nor validates."""
    from rectvlm.config import load_config

    key = f"train.phases.phase{settings.phase}"
    changes: dict[str, object] = {
        "data.shards": work / "shards",
        "train.runs": work / "runs",
        "data.workers": 0,
        # One step more: the trainer's time of a step ends when it asks for the next batch.
        f"{key}.samples": (settings.warmup + settings.steps + 1) * settings.micro_batch,
        f"{key}.micro_batch": settings.micro_batch,
        f"{key}.global_batch": settings.micro_batch,
        f"{key}.save_every": 1,
        f"{key}.validation.every": 0,
        f"{key}.ema_decay": 0,
        "train.limits.max_bad_steps": 1_000_000,
    }
    return load_config(settings.size, [f"{name}={value}" for name, value in changes.items()])


def compare_step_times(seconds: dict[str, list[float]]) -> JsonObject:
    """Compute medians, and by how much the trainer's step is longer than those just before it.

    That is the median of the steps' own shares, so that a slow moment of the machine counts on both
    sides.
    """
    trainer_seconds = seconds["trainer"]
    overheads: dict[str, JsonObject] = {}
    for name, times in seconds.items():
        if name == "trainer":
            continue
        pairs = zip(trainer_seconds, times, strict=True)
        shares = [trainer_time / time - 1 for trainer_time, time in pairs]
        quartiles = [shares[0], shares[0]]
        if len(shares) > 1:
            quartiles = statistics.quantiles(shares, n=4)[::2]
        overheads[name] = {"median": statistics.median(shares), "quartiles": quartiles}
    return {
        "steps": len(trainer_seconds),
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "step_seconds": seconds,
        "overhead": overheads,
    }


def list_comparisons(result: JsonObject) -> list[Comparison]:
    """List the steps of the three loops, by phase and micro-batch."""
    steps = Repetitions()
    for row in result["rows"]:
        at = f"{row['size']}, phase {row['phase']}, micro-batch {row['micro_batch']}"
        for name in LOOPS:
            steps.add(name, row["step_seconds"][name], at)
    label = "size, phase and micro-batch"
    title, measurements = "Step of the trainer and of bare loops", steps.to_measurements()
    return [Comparison(title, "s", measurements, at_label=label, baseline="bare")]


def write_text(result: JsonObject) -> str:
    """Write a table by phase and micro-batch."""
    columns = ["size", "phase", "micro-batch", "steps", *LOOPS, "against bare", "against engine"]
    rows: list[list[str]] = []
    for row in result["rows"]:
        cells = [str(row[name]) for name in ("size", "phase", "micro_batch", "steps")]
        cells += [f"{row['seconds'][name]:.4f}" for name in LOOPS]
        for name in ("bare", "engine"):
            overhead = row["overhead"][name]
            low, high = overhead["quartiles"]
            cells.append(f"{overhead['median']:+.1%} ({low:+.1%} to {high:+.1%})")
        rows.append(cells)
    return (
        "Seconds of a step (medians), and by how much the trainer's is longer than the step of "
        "the other loop that was taken just before it (median over the steps, quartiles in "
        "brackets). `bare` is PyTorch alone, `engine` adds DeepSpeed, `trainer` is the complete "
        f"loop. At most {MAX_OVERHEAD_SHARE:.0%} against `bare` is what is asked for.\n\n"
        + make_table(columns, rows)
    )


PROGRAM = Program("overhead", "Trainer overhead", write_text, list_comparisons)


@quiet_main
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parse_arguments(arguments)
    prepare_engine_environment()
    from rectvlm.machine import package_versions

    start_seconds = time.monotonic()
    rows: list[JsonObject] = []
    for phase, micro_batch in itertools.product(options.phases, options.micro_batch):
        settings = OverheadSettings(options.size, phase, micro_batch, options.steps, options.warmup)
        with tempfile.TemporaryDirectory(prefix="rectvlm-bench-") as work:
            make_phantom_shards(options.size, Path(work) / "shards")
            # A process holds one engine in its life.
            rows.append(run_in_new_process(measure_overhead, settings, Path(work)))
    facts = {
        "versions": package_versions(),
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    publish_result(options.out, PROGRAM, arguments, start_seconds, facts)
    return 0


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("overhead", "The trainer's loop against a bare PyTorch loop.")
    parser.add_argument("--size", default="demo", help="name of a configuration (default demo)")
    parser.add_argument(
        "--phases", type=int, nargs="+", choices=(1, 2), default=[1, 2], metavar="N"
    )
    parser.add_argument(
        "--micro-batch",
        type=positive_int,
        nargs="+",
        default=[1, 8],
        metavar="N",
        help="cases of a step (default 1 and 8)",
    )
    parser.add_argument(
        "--steps", type=positive_int, default=20, help="steps that count (default 20)"
    )
    parser.add_argument(
        "--warmup", type=positive_int, default=3, help="steps before them (default 3)"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
