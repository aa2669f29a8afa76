"""The loop that all phases share.

Everything random in a step is drawn after seeding with (seed, step, rank), so a resumed run repeats an unbroken one
without stored random states.
"""

import logging
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rectvlm import checkpoint
from rectvlm.config import Config, PhaseConfig
from rectvlm.data.augment import augment
from rectvlm.train.engine import Engine
from rectvlm.train.memory import peak_memory_bytes
from rectvlm.train.objectives import losses, total
from rectvlm.train.optim import allow_all_gradients, set_gradients, set_rates
from rectvlm.train.phases import Phase
from rectvlm.train.record import Record
from rectvlm.train.utilization import StepWork
from rectvlm.train.validation import Validator
from rectvlm.types import Batch

log = logging.getLogger(__name__)


@dataclass
class Position:
    """How far a run has come."""

    step: int
    """Optimizer steps done."""
    samples_seen: int
    """By all ranks together."""


class Stopwatch:
    """Seconds by part of a step, as the host sees them with the device waited for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(("data", "forward", "backward", "optimizer"), 0.0)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of a block to a part."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] += time.perf_counter() - start


def train(
    engine: Engine,
    loader: Iterable[Batch],
    phase: Phase,
    config: Config,
    folder: Path,
    saved_names: list[str],
    position: Position,
    work: StepWork | None = None,
) -> None:
    """Train from a position to the phase's last step, recording every step and saving checkpoints.

    Args:
        engine: prepared.
        loader: endless micro-batches of this rank, from the position on.
        phase: which tasks.
        config: everything else.
        folder: of the phase's run.
        saved_names: of the tensors that a checkpoint holds.
        position: where to begin; it moves along.
        work: FLOPs of a step, for the record.
    """
    settings = phase.settings(config)
    batches = iter(loader)
    validator = Validator(engine, phase, config, folder, position.step)
    with Record(engine, phase, config, folder, position.step, work) as record:
        while position.step < settings.steps and not validator.stopped:
            line, samples = _step(engine, batches, phase, config, settings, position)
            record.write(line, samples)
            found = validator.after(position.step)
            if found is not None:
                record.validated(position.step, found.metrics, found.samples)
            best = found is not None and found.best is not None
            last = position.step == settings.steps or validator.stopped
            if position.step % settings.save_every == 0 or last or best:
                save(engine, phase, config, folder, saved_names, position, found.best if found else None)


def _step(
    engine: Engine,
    batches: Iterator[Batch],
    phase: Phase,
    config: Config,
    settings: PhaseConfig,
    position: Position,
) -> tuple[dict[str, Any], list[str]]:
    """One optimizer step: what `metrics.jsonl` says of it, and the samples that this rank took."""
    begin = time.perf_counter()
    watch = Stopwatch(engine.device)
    seed_step(config.train.seed, position.step, engine.rank)
    groups = engine.optimizer.param_groups
    rates = set_rates(groups, position.step, settings)
    set_gradients(engine.model.module, groups)
    weighting = getattr(engine.model.module, "weighting", None)
    sums = torch.zeros(len(phase.tasks), 2)
    keys: list[str] = []
    tokens, norm = 0, None
    for _ in range(settings.accumulation):
        with watch.part("data"):
            batch = augment(next(batches).to(engine.device), config.data.augment)
        with watch.part("forward"):
            outputs = engine.model(batch)
            found = losses(outputs, batch, phase.tasks, config.train.localization)
            loss = total(found, config.train.losses, weighting)
        with watch.part("backward"):
            engine.backward(loss)
        with watch.part("optimizer"):
            norm = engine.step()
        for row, task in enumerate(found.values()):
            known = float(task.count > 0)
            sums[row] += torch.tensor([known * task.value.item(), known])
        keys += batch.keys
        tokens += outputs.tokens
    position.step += 1
    position.samples_seen += settings.micro_batch * settings.accumulation * engine.world
    values = engine.mean(sums[:, 0] / sums[:, 1].clamp_min(1), sums[:, 1])
    by_task = {task: None if v != v else v for task, v in zip(phase.tasks, values.tolist(), strict=True)}
    line = {
        "step": position.step,
        "loss": sum(getattr(config.train.losses, task) * (value or 0.0) for task, value in by_task.items()),
        "losses": by_task,
        "lr": rates,
        "grad_norm": norm,
        "samples_seen": position.samples_seen,
        "tokens": engine.sum(tokens),
        "seconds": {"total": time.perf_counter() - begin, **watch.seconds},
        "memory_bytes": engine.largest(peak_memory_bytes()),
    }
    if weighting is not None:
        factors = zip(phase.tasks, weighting.factors().tolist(), strict=True)
        line["task_weights"] = {task: getattr(config.train.losses, task) * factor for task, factor in factors}
    return line, keys


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch with a number that is a function of seed, step and rank."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1))


def save(
    engine: Engine,
    phase: Phase,
    config: Config,
    folder: Path,
    saved_names: list[str],
    position: Position,
    best: float | None = None,
) -> None:
    """Write a whole checkpoint or none: under a temporary name, renamed at the end.

    Its weights are the moving averages where the phase keeps some. `best` is the value of the metric that makes this
    checkpoint the best so far.
    """
    target = checkpoint.step_folder(folder, position.step)
    work = target.with_name(f".{target.name}.partial")
    if engine.is_main:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    engine.barrier()
    allow_all_gradients(engine.model.module, engine.optimizer.param_groups)
    engine.save_state(work / checkpoint.ENGINE)
    with engine.averaged():
        tensors = engine.gather(saved_names)
    if engine.is_main:
        state = checkpoint.State(
            phase=phase.number,
            parts=phase.parts,
            step=position.step,
            samples_seen=position.samples_seen,
            world_size=engine.world,
            versions=checkpoint.versions(),
            stage=phase.stage,
        )
        checkpoint.write(work, tensors, config, state)
    engine.barrier()  # every rank's file is there
    if engine.is_main:
        shutil.rmtree(target, ignore_errors=True)
        work.rename(target)
        if best is not None:
            checkpoint.note_best(folder, position.step, phase.settings(config).validation.best, best)
        checkpoint.prune(folder, config.train.keep)
        log.info("saved %s", target)
    engine.barrier()
