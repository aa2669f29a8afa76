"""What the trainer costs beside the model: its whole loop against a bare PyTorch loop, step by step.

    python -m benchmarks.overhead [--size demo] [--phases 1 2] [--micro-batch 1 8] [--steps 20] [--warmup 3] [--out DIR]

One process trains the same model twice, side by side, on the same batches, which lie in memory. Before every step of
the trainer a step of each of the others is taken and timed, in turn, with the same random draws, so that whatever else
the machine does meets all of them alike:

bare      PyTorch alone: augment, forward, losses, backward, clip, AdamW on 32-bit copies of the bfloat16 weights. No
          DeepSpeed, nothing recorded.
engine    the trainer's engine alone: the same, with DeepSpeed's forward, backward and step.
trainer   all that `rectvlm.train.loop.train` does from one batch to the next: learning rates, seeds, the guard against
          bad steps, agreeing with other ranks, the clock of each part, memory, metrics.jsonl, the trace, the watchdog.

Checkpoints and validation are not part of a step and take none. Results go to benchmarks/results/overhead-….
"""

import argparse
import contextlib
import io
import itertools
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.publishing import (
    CHECKOUT,
    RESULTS_FOLDER,
    make_page_header,
    positive_int,
    publish_result,
    quiet_main,
)
from benchmarks.report_step import MasterWeightAdamW
from benchmarks.train_step import make_phantom_shards
from rectvlm.types import Batch

BATCH_COUNT = 4
MAX_OVERHEAD_SHARE = 0.03
"""Share of a step that the trainer may cost."""


class InterleavedBatches:
    """Batches for the trainer, and a step of each of the others before every one of them.

    `seed` takes the number of a step, from 0, and has the others draw what the trainer will draw in it: an elastic
    deformation that one of them alone computes would count as its overhead.
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        other_steps: dict[str, Callable[[Batch], None]],
        device: torch.device,
        seed_step: Callable[[int], None],
    ) -> None:
        self.batches, self.other_steps, self.device, self.seed_step = (
            batches,
            other_steps,
            device,
            seed_step,
        )
        self.seconds: dict[str, list[float]] = {name: [] for name in (*other_steps, "trainer")}

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(itertools.cycle(self.batches)):
            names = list(self.other_steps)
            for name in names if number % 2 else reversed(names):
                self.seed_step(number)
                step = partial(self.other_steps[name], batch)
                self.seconds[name].append(self._time_step(step))
            begin = time.perf_counter()
            yield batch
            self._synchronize()
            self.seconds["trainer"].append(time.perf_counter() - begin)

    def _time_step(self, step: Callable[[], None]) -> float:
        begin = time.perf_counter()
        step()
        self._synchronize()
        return time.perf_counter() - begin

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure_overhead(
    size: str, number: int, micro_batch: int, steps: int, warmup: int, work: Path
) -> dict[str, Any]:
    """Figures of one phase at a number of cases a step, with random weights: what they are changes nothing in what is
    computed."""
    from rectvlm.config import load_config
    from rectvlm.data.augment import augment_batch
    from rectvlm.data.loader import build_train_loader
    from rectvlm.train.engine.engine import Engine
    from rectvlm.train.loop import run_training_loop
    from rectvlm.train.objectives import combine_losses, compute_losses
    from rectvlm.train.optimizer import build_optimizer, freeze_all_but
    from rectvlm.train.phases import PHASES
    from rectvlm.train.recovery.position import TrainingPosition, seed_micro_batch
    from rectvlm.train.recovery.signals import StopSignals
    from rectvlm.train.run import build_model

    shards, phase = work / "shards", PHASES[number]
    # One step more: the trainer's time of a step ends when it asks for the next batch.
    count, key = warmup + steps + 1, f"train.phases.phase{number}"
    chosen = {"steps": count, "micro_batch": micro_batch, "accumulation": 1, "save_every": 10**9}
    short = [f"{key}.{name}={value}" for name, value in chosen.items()]
    quiet = [f"{key}.validation.every=0", f"{key}.ema=0", "train.limits.max_bad_steps=1000000"]
    config = load_config(
        size,
        [f"data.shards={shards}", f"train.runs={work / 'runs'}", "data.workers=0", *short, *quiet],
    )
    settings, folder = phase.get_settings(config), work / "runs" / phase.key
    folder.mkdir(parents=True)
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints which op it has built
        engine = Engine(
            CHECKOUT / "ds_configs" / f"phase{number}.json",
            settings,
            config.train.gradient_clipping,
            folder,
        )
    batches = list(
        itertools.islice(
            build_train_loader(config.data, settings.micro_batch, 0, 1, config.train.seed),
            BATCH_COUNT,
        )
    )

    plain = build_model(phase, config, None, engine)
    freeze_all_but(plain, settings.lr)
    plain.to(engine.device, torch.bfloat16).train()
    masters = MasterWeightAdamW(
        [p for p in plain.parameters() if p.requires_grad], config.train.gradient_clipping
    )
    model = build_model(phase, config, None, engine)
    freeze_all_but(model, settings.lr)
    engine.prepare(model, build_optimizer(model, config.train, settings))

    def loss_of(module: Any, batch: Batch) -> torch.Tensor:
        batch = augment_batch(batch.to(engine.device), config.data.augment)
        return combine_losses(
            compute_losses(
                module(batch), batch, phase.tasks, config.train.localization_loss_weights
            ),
            config.train.loss_weights,
        )

    def bare(batch: Batch) -> None:
        loss_of(plain, batch).backward()
        masters.step()

    def alone(batch: Batch) -> None:
        engine.backward(loss_of(engine.model, batch))
        engine.step()

    def seed(step: int) -> None:
        seed_micro_batch(config.train.seed, step * micro_batch)

    together = InterleavedBatches(batches, {"bare": bare, "engine": alone}, engine.device, seed)
    with StopSignals() as signals:
        run_training_loop(
            engine, together, phase, config, folder, [], TrainingPosition(0, 0), signals
        )
    engine.close()
    kept = {name: times[warmup : warmup + steps] for name, times in together.seconds.items()}
    return {"size": size, "phase": number, "micro_batch": micro_batch} | compare_step_times(kept)


def compare_step_times(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and by how much the trainer's step is longer than those taken just before it: the median of the steps'
    own shares, so that a slow moment of the machine counts on both sides."""
    found: dict[str, Any] = {"steps": len(seconds["trainer"]), "seconds": {}, "overhead": {}}
    for name, times in seconds.items():
        found["seconds"][name] = statistics.median(times)
        if name != "trainer":
            shares = [
                mine / theirs - 1 for mine, theirs in zip(seconds["trainer"], times, strict=True)
            ]
            found["overhead"][name] = {
                "median": statistics.median(shares),
                "quartiles": statistics.quantiles(shares, n=4)[::2]
                if len(shares) > 1
                else [shares[0]] * 2,
            }
    return found


def to_markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    head = make_page_header("Trainer overhead", "python -m benchmarks.overhead", result)
    head += (
        "Seconds of a step (medians), and by how much the trainer's is longer than the step of the other that was "
        "taken just before it (median over the steps, quartiles in brackets). `bare` is PyTorch alone, `engine` adds "
        f"DeepSpeed, `trainer` is the whole loop. At most {MAX_OVERHEAD_SHARE:.0%} against `bare` is what is asked for.\n\n"
    )
    columns = [
        "size",
        "phase",
        "micro-batch",
        "steps",
        "bare",
        "engine",
        "trainer",
        "against bare",
        "against engine",
    ]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in result["rows"]:
        seconds = " | ".join(
            f"{row['seconds'][name]:.4f}" for name in ("bare", "engine", "trainer")
        )
        shares = " | ".join(
            f"{row['overhead'][name]['median']:+.1%} ({row['overhead'][name]['quartiles'][0]:+.1%} to "
            f"{row['overhead'][name]['quartiles'][1]:+.1%})"
            for name in ("bare", "engine")
        )
        what = f"{row['size']} | {row['phase']} | {row['micro_batch']} | {row['steps']}"
        lines.append(f"| {what} | {seconds} | {shares} |")
    return head + "\n".join(lines) + "\n"


@quiet_main
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    options = _parse_arguments(arguments)
    os.environ.setdefault("RECTVLM_TRACKERS", "none")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from rectvlm.machine import package_versions

    begin = time.monotonic()
    rows = []
    for number, micro_batch in itertools.product(options.phases, options.micro_batch):
        with tempfile.TemporaryDirectory(prefix="rectvlm-bench-") as work:
            make_phantom_shards(options.size, Path(work) / "shards")
            # A process holds one engine in its life.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
                what = (
                    options.size,
                    number,
                    micro_batch,
                    options.steps,
                    options.warmup,
                    Path(work),
                )
                rows.append(fresh.submit(measure_overhead, *what).result())
    facts = {
        "versions": package_versions(),
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    publish_result(options.out, "overhead", begin, facts, to_markdown)
    return 0


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overhead",
        description="The trainer's loop against a bare PyTorch loop.",
    )
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
    parser.add_argument("--out", type=Path, default=RESULTS_FOLDER, metavar="DIR")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
