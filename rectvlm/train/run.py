"""One phase, from the command line to its last checkpoint: parse, build, train.

accelerate launch launch/phase3.py [--config demo] [--stage align] [--from PATH | best]
[--resume [auto] | --restart] [part.field=value …]
"""

import argparse
import contextlib
import io
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from rectvlm import checkpoint, weights
from rectvlm.config import Config, load
from rectvlm.data.loader import train_loader
from rectvlm.models import RectVLM
from rectvlm.models.language import load_language_model
from rectvlm.models.text import Prompts
from rectvlm.train.beginning import (
    Resume,
    make_way,
    may_resume,
    newest_whole,
    position_of,
    require_something_to_resume,
    source_of,
)
from rectvlm.train.engine import Engine, is_lost
from rectvlm.train.exits import Ended, Exit, clear_ending, write_ending
from rectvlm.train.loop import train
from rectvlm.train.optim import build_optimizer, freeze_all_but, set_modes
from rectvlm.train.phases import PHASES, STAGES, Phase, planned
from rectvlm.train.signals import Signals, end_with_the_launcher
from rectvlm.train.trackers import chosen
from rectvlm.train.utilization import work_of_a_step
from rectvlm.train.weighting import TaskWeighting
from rectvlm.types import UserError

log = logging.getLogger(__name__)

COLLECTIVES_LATER = 60.0
"""Seconds after the watchdog's timeout in which a collective gives up."""


def main(number: int, checkout: Path, argv: Sequence[str] | None = None) -> None:
    """Run a phase as a command: exit code 2 and one sentence for what the user can mend."""
    phase = PHASES[number]
    args = _parse(phase, argv)
    if args.stage is not None:
        phase = STAGES[args.stage]
    folder = None
    try:
        with Signals() as signals:
            end_with_the_launcher()
            ds_config = args.ds_config or checkout / "ds_configs" / f"phase{phase.number}.json"
            config = load(args.config, args.overrides)
            folder = folder_of(phase, config)
            run(phase, config, ds_config, args.resume, args.restart, signals, args.source)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        if folder is not None:
            write_ending(folder, Exit.MISTAKE, str(error), None)
        sys.exit(Exit.MISTAKE)
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:300]
        if isinstance(error, RuntimeError) and is_lost(error):
            _leave(folder, f"a rank lost the others ({reason})")
        if folder is not None:
            write_ending(folder, Exit.FAILED, f"{type(error).__name__}: {reason}", None)
        raise


def folder_of(phase: Phase, config: Config) -> Path:
    """Where a phase's run is."""
    return Path(config.train.runs) / config.name / phase.folder


def _leave(folder: Path | None, reason: str) -> NoReturn:
    """End a rank that has lost the others, at once: what waits for them would wait for good."""
    sys.stderr.write(f"error: {reason}; go on with --resume auto.\n")
    sys.stderr.flush()
    if folder is not None:
        write_ending(folder, Exit.LOST, reason, None)
    os._exit(Exit.LOST)


def _parse(phase: Phase, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"launch/phase{phase.number}.py",
        description=f"Phase {phase.number}: {', '.join(phase.tasks)}. Trains {', '.join(phase.parts)}.",
    )
    parser.add_argument("--config", default="demo", help="name or path of a configuration (default: demo)")
    stages = [stage for stage, row in STAGES.items() if row.number == phase.number]
    parser.add_argument(
        "--stage",
        choices=stages,
        help=f"a sub-step of the phase, in a run folder of its own (phase {phase.number} has {', '.join(stages)})"
        if stages
        else argparse.SUPPRESS,
    )
    parser.add_argument(
        "--from",
        dest="source",
        metavar="PATH",
        help="start from this run's phase folder or checkpoint, or from the best one of the phase before (`best`)",
    )
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--resume",
        default="no",
        choices=("yes", "auto"),
        metavar="[auto]",
        help="go on from this phase's newest whole checkpoint; with `auto`, begin where there is none",
    )
    start.add_argument("--restart", action="store_true", help="delete this phase's earlier run and begin anew")
    parser.add_argument(
        "--ds-config",
        type=Path,
        metavar="JSON",
        help=f"instead of ds_configs/phase{phase.number}.json",
    )
    parser.add_argument("overrides", nargs="*", metavar="part.field=value", help="change a value of the configuration")
    return parser.parse_intermixed_args(_joined(sys.argv[1:] if argv is None else argv))


def _joined(words: Sequence[str]) -> list[str]:
    """Words of a command line with `--resume` and its value as one, so that it does not swallow an override."""
    found: list[str] = []
    for word in words:
        if found and found[-1] == "--resume=yes" and word == "auto":
            found[-1] = "--resume=auto"
        else:
            found.append("--resume=yes" if word == "--resume" else word)
    return found


def run(
    phase: Phase,
    config: Config,
    ds_config: Path,
    resume: Resume,
    restart: bool,
    signals: Signals,
    source_given: str | None = None,
) -> None:
    """Train one phase.

    Raises:
        Ended: early, in order.
        UserError: missing shards, a missing or unfit checkpoint of the phase before, an earlier run in the way.
    """
    settings = phase.settings(config)
    folder = folder_of(phase, config)
    # What is missing is said before anything is loaded; a run that goes on needs nothing of the phase before.
    source = None if resume != "no" and may_resume(folder) else source_of(phase, config, source_given)
    if resume == "yes":
        require_something_to_resume(folder, phase)
    _prepare_models(phase, config)
    work = work_of_a_step(phase, config)
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints which op it has built
        # The watchdog, which says more, comes before the timeout of a collective.
        timeout = 60 * config.train.guard.timeout + COLLECTIVES_LATER
        engine = Engine(ds_config, settings, config.train.clip, folder, chosen(config), timeout)
    if not engine.is_main:
        logging.getLogger("rectvlm").setLevel(logging.WARNING)
    start = newest_whole(folder, resume, engine)
    if start is None and source is None:
        source = source_of(phase, config, source_given)
    position = position_of(start)
    loader = train_loader(
        config.data,
        settings.micro_batch,
        engine.rank,
        engine.world,
        config.train.seed,
        seen=position.samples_seen,
        pin=engine.device.type == "cuda",
    )
    samples = len(loader.dataset)
    if start is None:
        make_way(folder, phase, config, samples, restart, engine)
    elif engine.is_main:
        clear_ending(folder)
    config = planned(config, phase, samples, engine.world, position.step, position.samples_seen)

    torch.manual_seed(config.train.seed)
    # A run that goes on has all its weights in its own checkpoint, whatever became of the phase before.
    model = build(phase, config, start or source, engine)
    if start is None and source is None and config.encoder.atlas:
        cases = range(min(config.encoder.atlas, samples))  # the same on every rank
        model.encoder.draw_atlas(torch.from_numpy(loader.dataset[number].ct) for number in cases)
    # Before freezing: a part without a learning rate belongs to the checkpoint too.
    names = checkpoint.saved_names(model)
    if config.train.weighting == "uncertainty":
        model.weighting = TaskWeighting(len(phase.tasks))
    freeze_all_but(model, settings.lr, settings.unfreeze, others=["weighting"])
    optimizer = build_optimizer(model, config.train, settings)
    engine.prepare(model, optimizer)
    set_modes(model, settings)
    if start is not None:
        world = checkpoint.read_state(start).world_size
        engine.load_state(start / checkpoint.ENGINE, world, averaged=settings.ema > 0)
        log.info("resumed from %s", start)
    try:
        if engine.largest(signals.received)[0]:
            # Nothing has been done yet that could be lost.
            raise Ended(Exit.RESUME, f"asked to end before step {position.step + 1}: go on with --resume auto")
        train(engine, loader, phase, config, folder, names, position, signals, work)
    except Ended as ended:
        if engine.is_main or not ended.together:
            kind = "stopped" if ended.exit == Exit.RESUME else "error"
            sys.stderr.write(f"{kind}: {ended.reason}.\n")
            write_ending(folder, ended.exit, ended.reason, position.step)
        if ended.together:
            engine.barrier()  # a launcher ends all ranks as soon as one has left
            engine.close()
        raise
    if engine.is_main:
        write_ending(folder, Exit.FINISHED, "finished", position.step)
    engine.close()


def _prepare_models(phase: Phase, config: Config) -> None:
    """Fetch or build bundled models before processes join: from then on Transformers saves on rank 0 alone, whichever
    rank prepares, and under ZeRO-3 it builds what it loads in shards."""
    if phase.init_from is None:
        weights.resolve(config.text.model)
    if "generator" in phase.parts:
        weights.resolve(config.generator.model)


def build(phase: Phase, config: Config, source: Path | None, engine: Engine) -> RectVLM:
    """The model of a phase, with the weights of the phase before; the engine shards the language model as it is read.

    Raises:
        UserError: the weights do not fit, naming what is missing or unexpected.
    """
    language = None
    if "generator" in phase.parts:
        folder = weights.resolve(config.generator.model)
        language = load_language_model(config.generator, folder, engine.device, engine.settle)
    if source is None:
        prompts = Prompts.embed(weights.resolve(config.text.model), config.text.max_tokens)
        return RectVLM(config, phase.parts, prompts, language)
    tensors = checkpoint.read_weights(source)
    model = RectVLM(config, phase.parts, checkpoint.prompts_of(tensors, source), language)
    before = checkpoint.read_state(source).parts
    absent = [part for part in phase.parts if part not in before and part != phase.parts[-1]]
    if absent:
        log.warning("%s has no %s: it begins with random weights", source, " and no ".join(absent))
    expected = [name for name in checkpoint.saved_names(model) if name.partition(".")[0] in (*before, "prompts")]
    checkpoint.load_weights(model, tensors, expected, source)
    log.info("starting from %s", source)
    return model
