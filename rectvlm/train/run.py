"""One phase, from the command line to its last checkpoint: parse, build, train.

accelerate launch launch/phase3.py [--config demo] [--stage align] [--from PATH | best] [--resume | --restart]
[part.field=value …]
"""

import argparse
import contextlib
import io
import logging
import shutil
import sys
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import torch

from rectvlm import checkpoint, weights
from rectvlm.config import Config, PhaseConfig, load
from rectvlm.data.loader import train_loader
from rectvlm.models import RectVLM
from rectvlm.models.language import load_language_model
from rectvlm.models.text import Prompts
from rectvlm.train.engine import Engine
from rectvlm.train.loop import Position, train
from rectvlm.train.optim import build_optimizer, freeze_all_but, set_modes
from rectvlm.train.phases import PHASES, STAGES, Phase, planned
from rectvlm.train.trackers import chosen
from rectvlm.train.utilization import work_of_a_step
from rectvlm.train.validation import has_stopped
from rectvlm.train.weighting import TaskWeighting
from rectvlm.types import UserError

log = logging.getLogger(__name__)


def main(number: int, checkout: Path, argv: Sequence[str] | None = None) -> None:
    """Run a phase as a command: exit code 2 and one sentence for what the user can mend."""
    phase = PHASES[number]
    args = _parse(phase, argv)
    if args.stage is not None:
        phase = STAGES[args.stage]
    try:
        ds_config = args.ds_config or checkout / "ds_configs" / f"phase{phase.number}.json"
        run(phase, load(args.config, args.overrides), ds_config, args.resume, args.restart, args.source)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


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
    start.add_argument("--resume", action="store_true", help="go on from this phase's newest checkpoint")
    start.add_argument("--restart", action="store_true", help="delete this phase's earlier run and begin anew")
    parser.add_argument(
        "--ds-config",
        type=Path,
        metavar="JSON",
        help=f"instead of ds_configs/phase{phase.number}.json",
    )
    parser.add_argument("overrides", nargs="*", metavar="part.field=value", help="change a value of the configuration")
    return parser.parse_intermixed_args(argv)


def run(
    phase: Phase, config: Config, ds_config: Path, resume: bool, restart: bool, source_given: str | None = None
) -> None:
    """Train one phase.

    Raises:
        UserError: missing shards, a missing or unfit checkpoint of the phase before, an earlier run in the way.
    """
    settings = phase.settings(config)
    folder = Path(config.train.runs) / config.name / phase.folder
    source = _source(phase, config, source_given)
    start = _start(folder, phase, resume)
    _prepare_models(phase, config)
    work = work_of_a_step(phase, config)
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints which op it has built
        engine = Engine(ds_config, settings, config.train.clip, folder, chosen(config))
    if not engine.is_main:
        logging.getLogger("rectvlm").setLevel(logging.WARNING)
    position = Position(step=0, samples_seen=0)
    if start is not None:
        state = checkpoint.read_state(start)
        position = Position(state.step, state.samples_seen)
    loader = train_loader(
        config.data,
        settings.micro_batch,
        engine.rank,
        engine.world,
        config.train.seed,
        seen=position.samples_seen,
        pin=engine.device.type == "cuda",
    )
    config = planned(config, phase, len(loader.dataset), engine.world, position.step, position.samples_seen)
    if not resume:
        _clear(folder, phase.settings(config), restart, engine)

    torch.manual_seed(config.train.seed)
    model = build(phase, config, source, engine)
    # Before freezing: a part without a learning rate belongs to the checkpoint too.
    names = checkpoint.saved_names(model)
    if config.train.weighting == "uncertainty":
        model.weighting = TaskWeighting(len(phase.tasks))
    freeze_all_but(model, settings.lr, settings.unfreeze, others=["weighting"])
    optimizer = build_optimizer(model, config.train, settings)
    engine.prepare(model, optimizer)
    set_modes(model, settings)
    if start is not None:
        engine.load_state(start / checkpoint.ENGINE)
        log.info("resumed from %s", start)
    train(engine, loader, phase, config, folder, names, position, work)
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


def _source(phase: Phase, config: Config, given: str | None) -> Path | None:
    """The checkpoint to start from: the one given, or that of the phase before."""
    if given not in (None, checkpoint.BEST):
        return checkpoint.find(given, "give --from a run's phase folder, one checkpoint in it, or an exported model")
    if phase.init_from is None:
        if given is not None:
            raise UserError("Phase 1 has no phase before it: give --from the path of a checkpoint, or leave it out.")
        return None
    folder = Path(config.train.runs) / config.name / f"phase{phase.init_from}"
    if given is not None:
        folder /= checkpoint.BEST
    remedy = (
        f"phase {phase.number} starts from phase {phase.init_from}'s, so run "
        f"`accelerate launch launch/phase{phase.init_from}.py --config {config.name}` first"
    )
    return checkpoint.find(folder, remedy)


def _start(folder: Path, phase: Phase, resume: bool) -> Path | None:
    if not resume:
        return None
    return checkpoint.find(folder, f"there is nothing to resume, so run phase {phase.number} without --resume")


def _clear(folder: Path, settings: PhaseConfig, restart: bool, engine: Engine) -> None:
    """Never write over an earlier run unasked: a finished one is moved aside, one that was cut off can go on."""
    earlier = checkpoint.all_checkpoints(folder)
    engine.barrier()  # all ranks have looked before any removes
    steps = settings.steps
    finished = bool(earlier) and (
        checkpoint.read_state(earlier[-1]).step >= steps or has_stopped(folder, settings.validation)
    )
    if earlier and not finished and not restart:
        raise UserError(
            f"{folder} already holds an unfinished run (up to {earlier[-1].name} of {steps} steps): go on with "
            "--resume, begin anew with --restart, or write elsewhere with name=NEW."
        )
    engine.barrier()  # all have read what moves now
    if engine.is_main:
        if finished and not restart:
            aside = next(
                path for n in count(1) if not (path := folder.with_name(f"{folder.name}.earlier-{n}")).exists()
            )
            folder.rename(aside)
            log.info("the earlier run of phase %s is now in %s", folder.name.removeprefix("phase"), aside)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    engine.barrier()
