"""The loop that all phases share: steps, what is recorded and saved after them, and the ways in which it ends."""

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import Signals as Signal
from typing import Any

import torch

from rectvlm.config import Config, GuardConfig
from rectvlm.data.augment import augment
from rectvlm.train.engine import Engine
from rectvlm.train.exits import Ended, Exit
from rectvlm.train.guard import FILE as BAD_STEPS
from rectvlm.train.guard import BadSteps, Seen, finite, judge, reason_of, shorten
from rectvlm.train.memory import peak_memory_bytes
from rectvlm.train.objectives import losses, total
from rectvlm.train.optim import set_gradients, set_rates
from rectvlm.train.phases import Phase
from rectvlm.train.position import Position, seed_micro_batch
from rectvlm.train.record import Record
from rectvlm.train.saving import save
from rectvlm.train.signals import Signals
from rectvlm.train.utilization import StepWork
from rectvlm.train.validation import Validator
from rectvlm.train.watchdog import Doing, Watchdog
from rectvlm.types import Batch
from rectvlm.whole import is_full

log = logging.getLogger(__name__)


class Stopwatch:
    """Seconds by part of a step, as the host sees them with the device waited for."""

    def __init__(self, device: torch.device, doing: Doing) -> None:
        self.device, self.doing = device, doing
        self.seconds = dict.fromkeys(("data", "augment", "forward", "backward", "optimizer"), 0.0)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of a block to a part."""
        self.doing.part = name
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
    signals: Signals,
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
        signals: open; one that has arrived ends the run after its next step.
        work: FLOPs of a step, for the record.
    """
    settings, guard = phase.settings(config), config.train.guard
    doing = Doing()
    with (
        _room(folder),
        Watchdog(doing, engine.rank, folder, 60 * guard.timeout) as watchdog,
        ExitStack() as opened,
    ):
        validator = Validator(engine, phase, config, folder, position.step)
        bad_steps = BadSteps(folder, position.step) if engine.is_main else None
        record = opened.enter_context(Record(engine, phase, config, folder, position.step, work))
        after = _After(engine, phase, config, folder, saved_names, position, validator, record, watchdog, position.step)
        if validator.is_due(position.step):  # the run was asked to end before it could validate
            after.save_and_validate(signal=0)
        batches = iter(loader)
        while position.step < settings.steps and not validator.stopped:
            watchdog.beat()
            line, samples, signal = _step(engine, batches, phase, config, position, doing, signals)
            if line["skipped"] is not None:
                _note(bad_steps, engine, line, guard)
            record.write(line, samples)
            if position.bad_in_a_row >= guard.patience:
                raise Ended(Exit.DIVERGED, _diverged(line, folder))
            after.save_and_validate(signal)


@dataclass
class _After:
    """What follows a step."""

    engine: Engine
    phase: Phase
    config: Config
    folder: Path
    saved_names: list[str]
    position: Position
    validator: Validator
    record: Record
    watchdog: Watchdog
    saved: int
    """Step of the newest checkpoint, which is never written over."""

    def save_and_validate(self, signal: int) -> None:
        """Save and validate where it is time, in this order: a validation takes longer than the notice that a machine
        gives before it vanishes. With a signal, save and end: whoever goes on makes the validation up.

        Raises:
            Ended: asked to end, or the last checkpoint could not be written.
        """
        step, settings = self.position.step, self.phase.settings(self.config)
        if step % settings.save_every == 0 or step == settings.steps or signal:
            self._save()
        if not signal:
            self._validate()
        last = step == settings.steps or self.validator.stopped
        if (last or signal) and self.saved != step:
            raise Ended(Exit.DISK, f"the checkpoint of step {step} could not be written")
        if signal and (not last or self.validator.is_due(step)):
            raise Ended(Exit.RESUME, f"{Signal(signal).name}: saved after step {step}, go on with --resume auto")

    def _save(self) -> None:
        if self.saved == self.position.step:
            return
        self._begin("saving")
        self.record.settle()
        if save(self.engine, self.phase, self.config, self.folder, self.saved_names, self.position):
            self.saved = self.position.step

    def _validate(self) -> None:
        self._begin("validation")
        found = self.validator.after(self.position.step, self.watchdog.beat)
        if found is None:
            return
        self.record.validated(found.step, found.metrics, found.samples)
        if found.best is not None or self.validator.stopped:
            self._save()
        if found.best is not None and self.saved == found.step:
            self.validator.keep(found)

    def _begin(self, part: str) -> None:
        doing = self.watchdog.doing
        doing.part, doing.samples = part, []
        self.watchdog.beat()


def _step(
    engine: Engine,
    batches: Iterator[Batch],
    phase: Phase,
    config: Config,
    position: Position,
    doing: Doing,
    signals: Signals,
) -> tuple[dict[str, Any], list[str], int]:
    """One optimizer step: what `metrics.jsonl` says of it, the samples that this rank took, and the number of a signal
    that some rank has received, 0 for none."""
    settings, guard = phase.settings(config), config.train.guard
    begin = time.perf_counter()
    watch = Stopwatch(engine.device, doing)
    doing.step, doing.samples = position.step + 1, []
    groups = engine.optimizer.param_groups
    samples_a_step = settings.micro_batch * settings.accumulation * engine.world
    # Where epochs count, the schedule follows the samples: another number of ranks has other steps.
    scheduled = position.samples_seen / samples_a_step if settings.epochs else None
    rates = set_rates(groups, position.step, settings, scheduled)
    set_gradients(engine.model.module, groups)
    weighting = getattr(engine.model.module, "weighting", None)
    sums = torch.zeros(len(phase.tasks), 2)
    values: list[float] = []
    keys: list[str] = []
    tokens, stepped = 0, None
    for number in range(settings.accumulation):
        first = position.samples_seen + (number * engine.world + engine.rank) * settings.micro_batch
        seed_micro_batch(config.train.seed, first)
        with watch.part("data"):
            raw = next(batches)
        doing.samples = raw.keys
        with watch.part("augment"):
            batch = augment(raw.to(engine.device), config.data.augment)
        with watch.part("forward"):
            outputs = engine.model(batch)
            found = losses(outputs, batch, phase.tasks, config.train.localization)
            loss = total(found, config.train.losses, weighting)
        with watch.part("backward"):
            engine.backward(loss)
            values.append(loss.item())
        with watch.part("optimizer"):
            last = number == settings.accumulation - 1
            # A loss that is not normal is refused by all ranks or by none.
            refuse = last and engine.largest(judge(values, guard))[0] > 0
            stepped = engine.step(refuse, guard.norm)
        for row, task in enumerate(found.values()):
            known = float(task.count > 0)
            sums[row] += torch.tensor([known * task.value.item(), known])
        keys += batch.keys
        tokens += outputs.tokens
    assert stepped is not None
    doing.part = "agreeing"
    skipped = None if stepped.applied else _skipped(engine, values, keys, stepped.norm, position, guard)
    position.bad_in_a_row = skipped["in_a_row"] if skipped else 0
    position.step += 1
    position.samples_seen += samples_a_step
    means = engine.mean(sums[:, 0], sums[:, 1])
    by_task = {task: finite(value) for task, value in zip(phase.tasks, means.tolist(), strict=True)}
    memory, signal = engine.largest(peak_memory_bytes(), signals.received)
    line = {
        "step": position.step,
        "loss": sum(getattr(config.train.losses, task) * (value or 0.0) for task, value in by_task.items()),
        "losses": by_task,
        "lr": rates,
        "grad_norm": finite(stepped.norm),
        "skipped": skipped,
        "samples_seen": position.samples_seen,
        "tokens": engine.sum(tokens),
        "seconds": {"total": time.perf_counter() - begin, **watch.seconds},
        "memory_bytes": memory,
    }
    if skipped is not None and any(None in seen["losses"] for seen in skipped["ranks"]):
        line["loss"] = None
    if weighting is not None:
        factors = zip(phase.tasks, weighting.factors().tolist(), strict=True)
        line["task_weights"] = {task: getattr(config.train.losses, task) * factor for task, factor in factors}
    return line, keys, int(signal)


def _skipped(
    engine: Engine, values: list[float], keys: list[str], norm: float | None, position: Position, guard: GuardConfig
) -> dict[str, Any]:
    """Why the step was skipped, and what every rank saw of it; every rank must call it."""
    own: Seen = {"rank": engine.rank, "losses": [finite(value) for value in values], "samples": keys}
    ranks: list[Seen] = engine.everyone(own)
    names = [name for rank in ranks for name in rank["samples"]]
    reason = reason_of(ranks, norm, guard)
    return {"reason": reason, "in_a_row": position.bad_in_a_row + 1, "samples": names, "ranks": ranks}


def _note(bad_steps: BadSteps | None, engine: Engine, line: dict[str, Any], guard: GuardConfig) -> None:
    """Write a skipped step down, by rank, and say so."""
    ranks = line["skipped"].pop("ranks")
    if bad_steps is None:
        return
    skipped = line["skipped"]
    bad_steps.append(line["step"], skipped["reason"], line["grad_norm"], ranks)
    log.warning(
        "step %d skipped, %d of at most %d in a row: %s; samples %s",
        line["step"],
        skipped["in_a_row"],
        guard.patience,
        skipped["reason"],
        shorten(skipped["samples"]),
    )


def _diverged(line: dict[str, Any], folder: Path) -> str:
    skipped = line["skipped"]
    return (
        f"{skipped['in_a_row']} steps in a row were skipped, the last, {line['step']}, because {skipped['reason']}; "
        f"{folder / BAD_STEPS} names the samples of each: look at them, or lower the learning rate and go on from the "
        "last checkpoint with --resume"
    )


@contextmanager
def _room(folder: Path) -> Iterator[None]:
    """End in order when the log files cannot grow."""
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        reason = f"no room to write to {folder} ({error}): make room, go on with --resume auto"
        raise Ended(Exit.DISK, reason, together=False) from error
