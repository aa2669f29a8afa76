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
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import CHECKOUT, RESULTS, header, positive, publish, quiet_main
from benchmarks.report_step import Masters
from benchmarks.train_step import make_shards
from rectvlm.types import Batch

BATCHES = 4
MOST = 0.03
"""Share of a step that the trainer may cost."""


class Together:
    """Batches for the trainer, and a step of each of the others before every one of them.

    `seed` takes the number of a step, from 0, and has the others draw what the trainer will draw in it: an elastic
    deformation that one of them alone computes would count as its overhead.
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        others: dict[str, Callable[[Batch], None]],
        device: torch.device,
        seed: Callable[[int], None],
    ) -> None:
        self.batches, self.others, self.device, self.seed = batches, others, device, seed
        self.seconds: dict[str, list[float]] = {name: [] for name in (*others, "trainer")}

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(itertools.cycle(self.batches)):
            names = list(self.others)
            for name in names if number % 2 else reversed(names):
                self.seed(number)
                self.seconds[name].append(self._timed(lambda name=name, batch=batch: self.others[name](batch)))  # type: ignore[misc]
            begin = time.perf_counter()
            yield batch
            self._wait()
            self.seconds["trainer"].append(time.perf_counter() - begin)

    def _timed(self, step: Callable[[], None]) -> float:
        begin = time.perf_counter()
        step()
        self._wait()
        return time.perf_counter() - begin

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(size: str, number: int, micro_batch: int, steps: int, warmup: int, work: Path) -> dict[str, Any]:
    """Figures of one phase at a number of cases a step, with random weights: what they are changes nothing in what is
    computed."""
    from rectvlm.config import load
    from rectvlm.data.augment import augment
    from rectvlm.data.loader import train_loader
    from rectvlm.train.engine import Engine
    from rectvlm.train.loop import train
    from rectvlm.train.objectives import losses, total
    from rectvlm.train.optim import build_optimizer, freeze_all_but
    from rectvlm.train.phases import PHASES
    from rectvlm.train.position import Position, seed_micro_batch
    from rectvlm.train.run import build
    from rectvlm.train.signals import Signals

    shards, phase = work / "shards", PHASES[number]
    # One step more: the trainer's time of a step ends when it asks for the next batch.
    count, key = warmup + steps + 1, f"train.phases.{number}"
    chosen = {"steps": count, "micro_batch": micro_batch, "accumulation": 1, "save_every": 10**9}
    short = [f"{key}.{name}={value}" for name, value in chosen.items()]
    quiet = [f"{key}.validation.every=0", f"{key}.ema=0", "train.guard.patience=1000000"]
    config = load(size, [f"data.shards={shards}", f"train.runs={work / 'runs'}", "data.workers=0", *short, *quiet])
    settings, folder = phase.settings(config), work / "runs" / phase.folder
    folder.mkdir(parents=True)
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints which op it has built
        engine = Engine(CHECKOUT / "ds_configs" / f"phase{number}.json", settings, config.train.clip, folder)
    batches = list(itertools.islice(train_loader(config.data, settings.micro_batch, 0, 1, config.train.seed), BATCHES))

    plain = build(phase, config, None, engine)
    freeze_all_but(plain, settings.lr)
    plain.to(engine.device, torch.bfloat16).train()
    masters = Masters([p for p in plain.parameters() if p.requires_grad], config.train.clip)
    model = build(phase, config, None, engine)
    freeze_all_but(model, settings.lr)
    engine.prepare(model, build_optimizer(model, config.train, settings))

    def loss_of(module: Any, batch: Batch) -> torch.Tensor:
        batch = augment(batch.to(engine.device), config.data.augment)
        return total(losses(module(batch), batch, phase.tasks, config.train.localization), config.train.losses)

    def bare(batch: Batch) -> None:
        loss_of(plain, batch).backward()
        masters.step()

    def alone(batch: Batch) -> None:
        engine.backward(loss_of(engine.model, batch))
        engine.step()

    def seed(step: int) -> None:
        seed_micro_batch(config.train.seed, step * micro_batch)

    together = Together(batches, {"bare": bare, "engine": alone}, engine.device, seed)
    with Signals() as signals:
        train(engine, together, phase, config, folder, [], Position(0, 0), signals)
    engine.close()
    kept = {name: times[warmup : warmup + steps] for name, times in together.seconds.items()}
    return {"size": size, "phase": number, "micro_batch": micro_batch} | compare(kept)


def compare(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and by how much the trainer's step is longer than those taken just before it: the median of the steps'
    own shares, so that a slow moment of the machine counts on both sides."""
    found: dict[str, Any] = {"steps": len(seconds["trainer"]), "seconds": {}, "overhead": {}}
    for name, times in seconds.items():
        found["seconds"][name] = statistics.median(times)
        if name != "trainer":
            shares = [mine / theirs - 1 for mine, theirs in zip(seconds["trainer"], times, strict=True)]
            found["overhead"][name] = {
                "median": statistics.median(shares),
                "quartiles": statistics.quantiles(shares, n=4)[::2] if len(shares) > 1 else [shares[0]] * 2,
            }
    return found


def to_markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    head = header("Trainer overhead", "python -m benchmarks.overhead", result)
    head += (
        "Seconds of a step (medians), and by how much the trainer's is longer than the step of the other that was "
        "taken just before it (median over the steps, quartiles in brackets). `bare` is PyTorch alone, `engine` adds "
        f"DeepSpeed, `trainer` is the whole loop. At most {MOST:.0%} against `bare` is what is asked for.\n\n"
    )
    columns = ["size", "phase", "micro-batch", "steps", "bare", "engine", "trainer", "against bare", "against engine"]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in result["rows"]:
        seconds = " | ".join(f"{row['seconds'][name]:.4f}" for name in ("bare", "engine", "trainer"))
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
    options = _parse(arguments)
    os.environ.setdefault("RECTVLM_TRACKERS", "none")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from rectvlm import checkpoint

    begin = time.monotonic()
    rows = []
    for number, micro_batch in itertools.product(options.phases, options.micro_batch):
        with tempfile.TemporaryDirectory(prefix="rectvlm-bench-") as work:
            make_shards(options.size, Path(work) / "shards")
            # A process holds one engine in its life.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
                what = (options.size, number, micro_batch, options.steps, options.warmup, Path(work))
                rows.append(fresh.submit(measure, *what).result())
    facts = {
        "versions": checkpoint.versions(),
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    publish(options.out, "overhead", begin, facts, to_markdown)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overhead", description="The trainer's loop against a bare PyTorch loop."
    )
    parser.add_argument("--size", default="demo", help="name of a configuration (default demo)")
    parser.add_argument("--phases", type=int, nargs="+", choices=(1, 2), default=[1, 2], metavar="N")
    parser.add_argument(
        "--micro-batch", type=positive, nargs="+", default=[1, 8], metavar="N", help="cases of a step (default 1 and 8)"
    )
    parser.add_argument("--steps", type=positive, default=20, help="steps that count (default 20)")
    parser.add_argument("--warmup", type=positive, default=3, help="steps before them (default 3)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
