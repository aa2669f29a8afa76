"""One phase, from the command line to its last checkpoint: parse, build, train.

accelerate launch launch/phase3.py [--config demo] [--stage align] [--from PATH | best]
[--resume [auto] | --restart] [part.field=value …]
"""

import contextlib
import io
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from rectvlm import pretrained
from rectvlm.checkpoint import Checkpoint
from rectvlm.checkpoint.strict_load import load_tensors
from rectvlm.config import Config, load_config
from rectvlm.data.loader import BatchLoader, build_train_loader
from rectvlm.models import RectVLM
from rectvlm.models.language_model import LanguageModel, load_language_model
from rectvlm.models.prompt_embeddings import PromptEmbeddings
from rectvlm.train.arguments import parse_arguments, require_own_launcher
from rectvlm.train.budget import PhaseBudget, StepBatch, read_world_size, split_step
from rectvlm.train.engine.ds_config import find_ds_config
from rectvlm.train.engine.engine import Engine, is_lost_peer_error
from rectvlm.train.errors_of_ranks import claim_error
from rectvlm.train.logging.mfu import StepFlops, count_step_flops
from rectvlm.train.logging.startup_clock import StartupClock
from rectvlm.train.logging.trackers import choose_trackers
from rectvlm.train.loop import run_training_loop
from rectvlm.train.optimizer import build_optimizer, freeze_all_but, set_training_modes
from rectvlm.train.phases import PHASES, STAGES, Phase, SettingsResolver, get_run_folder
from rectvlm.train.preflight import check_start
from rectvlm.train.recovery.exit_codes import ExitCode, RunEnded, clear_ending, write_ending
from rectvlm.train.recovery.position import TrainingPosition
from rectvlm.train.recovery.resume import (
    ResumeMode,
    find_newest_intact_checkpoint,
    find_source_checkpoint,
    has_checkpoints,
    prepare_run_folder,
    read_position,
)
from rectvlm.train.recovery.run_session import first_line, lock_run_folder, record_failure
from rectvlm.train.recovery.signals import StopSignals, terminate_with_launcher
from rectvlm.train.starting_weights import (
    check_encoder_init,
    check_image_parts,
    check_source_fits,
    choose_parts,
    explain_misfit,
    log_parts,
    select_names,
    set_label_prior,
    start_encoder,
)
from rectvlm.train.task_samples import log_cut_reports, require_something_to_learn
from rectvlm.train.uncertainty_weighting import UncertaintyWeighting
from rectvlm.types import UserError

log = logging.getLogger(__name__)

COLLECTIVE_GRACE_SECONDS = 60.0
"""Time after the watchdog's timeout after which a collective gives up, seconds."""


def main(
    phase_number: int,
    argv: Sequence[str] | None = None,
    resolve_settings: SettingsResolver | None = None,
) -> None:
    """Run a phase as a command; a mistake of the user ends it with code 2 and one sentence."""
    startup = StartupClock()
    startup.end_part("imports")
    phase = PHASES[phase_number]
    args = parse_arguments(phase, argv)
    if args.stage is not None:
        phase = STAGES[args.stage]
    try:
        with StopSignals() as signals:
            terminate_with_launcher()
            require_own_launcher(args)
            ds_config = find_ds_config(phase.number, args.ds_config)
            config = load_config(args.config, args.overrides)
            train_phase(
                phase,
                config,
                ds_config,
                args.resume,
                args.restart,
                signals,
                args.source,
                resolve_settings,
                startup,
            )
    except UserError as error:
        if claim_error(str(error)):
            sys.stderr.write(f"error: {error}\n")
        sys.exit(ExitCode.USER_ERROR)
    except Exception as error:
        if isinstance(error, RuntimeError) and is_lost_peer_error(error):
            _exit_after_losing_ranks(error)
        raise


def _exit_after_losing_ranks(error: RuntimeError) -> NoReturn:
    """End a rank that has lost the others at once; its threads would wait for them for ever."""
    reason = f"a rank lost the others ({first_line(error)})"
    sys.stderr.write(f"error: {reason}; go on with --resume auto.\n")
    sys.stderr.flush()
    os._exit(ExitCode.RANK_LOST)


def train_phase(
    phase: Phase,
    config: Config,
    ds_config: Path,
    resume: ResumeMode,
    restart: bool,
    signals: StopSignals,
    requested_source: str | None = None,
    resolve_settings: SettingsResolver | None = None,
    startup: StartupClock | None = None,
) -> None:
    """Train one phase.

    Raises:
        RunEnded: the run ends early and in order.
        UserError: shards are missing or teach the phase nothing, the previous phase's checkpoint is
            missing or does not fit, or an earlier run is in the way.
    """
    startup = startup or StartupClock()
    choose_trackers(config)  # a name that is no tracker's ends the run before it begins
    folder = get_run_folder(phase, config)
    source = check_start(phase, config, resume, requested_source)  # before anything is loaded
    require_something_to_learn(phase, config)
    if source is not None:
        check_source_fits(phase, config, source)
    elif resume == "no" or not has_checkpoints(folder):
        check_encoder_init(config)
    _fetch_frozen_models(phase, config)
    if resolve_settings is not None:
        config = resolve_settings(phase, config, ds_config)
    settings = phase.get_settings(config)
    step_flops = count_step_flops(phase, config)
    step_batch = split_step(settings, read_world_size())
    startup.end_part("checks")
    engine = _start_engine(ds_config, step_batch, config, folder)
    _check_ranks_agree(config, engine)
    startup.end_part("engine")
    if not engine.is_main:
        logging.getLogger("rectvlm").setLevel(logging.WARNING)
    with lock_run_folder(folder, engine):
        start = find_newest_intact_checkpoint(folder, resume, engine)
        if start is None and source is None:
            source = find_source_checkpoint(phase, config, requested_source)
            if source is not None:
                check_source_fits(phase, config, source)
        position = read_position(start)
        loader = build_train_loader(
            config.data,
            step_batch.micro_batch,
            engine.rank,
            engine.world_size,
            config.train.seed,
            samples_seen=position.samples_seen,
            pin_memory=engine.device.type == "cuda",
            repeat_threshold=settings.repeat_threshold,
            accumulation=step_batch.accumulation,
            sort_by_length="generator" in phase.parts,
        )
        budget = PhaseBudget.plan(settings, len(loader.dataset), engine.world_size)
        assert budget.step_batch == step_batch
        if start is None:
            prepare_run_folder(folder, phase, config, budget, restart, engine)
        elif engine.is_main:
            clear_ending(folder)
        startup.end_part("data")
        with record_failure(folder):
            _train_in_run_folder(
                phase,
                config,
                budget,
                folder,
                engine,
                loader,
                start,
                source,
                position,
                signals,
                step_flops,
                startup,
            )


def _train_in_run_folder(
    phase: Phase,
    config: Config,
    budget: PhaseBudget,
    folder: Path,
    engine: Engine,
    loader: BatchLoader,
    start: Path | None,
    source: Path | None,
    position: TrainingPosition,
    signals: StopSignals,
    step_flops: StepFlops | None,
    startup: StartupClock,
) -> None:
    """Train in a folder that this session holds.

    Args:
        phase: the phase that trains.
        config: the configuration.
        budget: the phase's samples and steps.
        folder: the phase's run folder.
        engine: the engine.
        loader: endless micro-batches of this rank, from the position on.
        start: checkpoint to resume from; None begins anew.
        source: checkpoint whose weights a run begins with; None begins with random ones.
        position: where to begin.
        signals: open; a signal that has arrived ends the run.
        step_flops: FLOPs of a step, for the MFU.
        startup: clock of the start, until the first step has ended.

    Raises:
        RunEnded: the run ends early and in order.
        UserError: weights do not fit, or a sample cannot be read.
    """
    if engine.is_main:
        _log_step_batch(budget, phase.get_settings(config).global_batch)
    if engine.is_main and budget.is_finished(position.samples_seen):
        log.info("%s is finished at step %d: no step is left to train", folder, position.step)

    torch.manual_seed(config.train.seed)
    # A run that resumes has all weights in its own checkpoint, whatever became of the phase before.
    model = build_model(phase, config, start or source, engine)
    taken_parts = () if source is None else choose_parts(phase, Checkpoint.open(source))
    if start is None and "classifier" not in taken_parts:
        set_label_prior(model, config.data.shards)
    if start is None and "encoder" not in taken_parts:
        start_encoder(model, config, loader.dataset)
    if engine.is_main and model.generator is not None and start is None:
        log_cut_reports(loader.dataset, model.generator)
    # Before freezing: a part without a learning rate belongs to the checkpoint too.
    tensor_names = model.checkpoint_tensor_names()
    startup.end_part("model")
    _prepare_training(model, phase, config, budget, engine, start)
    startup.end_part("engine")

    try:
        if engine.all_reduce_max(signals.received_signal)[0]:
            # Nothing has been done yet that could be lost.
            raise RunEnded(
                ExitCode.STOPPED_BY_SIGNAL,
                f"asked to end before step {position.step + 1}: go on with --resume auto",
            )
        run_training_loop(
            engine,
            loader,
            phase,
            config,
            budget,
            folder,
            tensor_names,
            position,
            signals,
            step_flops,
            startup,
        )
    except RunEnded as ended:
        if engine.is_main or not ended.on_all_ranks:
            kind = "stopped" if ended.exit_code == ExitCode.STOPPED_BY_SIGNAL else "error"
            sys.stderr.write(f"{kind}: {ended.reason}.\n")
            write_ending(folder, ended.exit_code, ended.reason, position.step)
        if ended.on_all_ranks:
            engine.barrier()  # a launcher ends all ranks as soon as one has left
            engine.close()
        raise
    if engine.is_main:
        write_ending(folder, ExitCode.FINISHED, "finished", position.step)
    engine.close()


def _log_step_batch(budget: PhaseBudget, configured_batch: int) -> None:
    """Log where a step is larger than configured, and rates are not the configured ones."""
    step_batch = budget.step_batch
    if step_batch.global_batch != configured_batch:
        log.warning(
            "a step has %d samples: the ranks cannot share global_batch = %d in equal parts",
            step_batch.global_batch,
            configured_batch,
        )
    if budget.lr_factor != 1:
        log.info(
            "all learning rates are multiplied with %.3g = √(%d / %d), for steps of this size",
            budget.lr_factor,
            step_batch.global_batch,
            budget.lr_batch,
        )


def _start_engine(ds_config: Path, step_batch: StepBatch, config: Config, folder: Path) -> Engine:
    # The watchdog, which says more, comes before the timeout of a collective.
    timeout_seconds = 60 * config.train.limits.timeout_minutes + COLLECTIVE_GRACE_SECONDS
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints which op it has built
        return Engine(
            ds_config,
            step_batch,
            config.train.gradient_clipping,
            folder,
            timeout_seconds,
        )


def _check_ranks_agree(config: Config, engine: Engine) -> None:
    """Stop where ranks have resolved `auto` differently: they would wait for each other for ever.

    Raises:
        UserError: they have.
    """
    if len(set(engine.all_gather_object(config.to_yaml()))) > 1:
        raise UserError(
            "The GPUs of this run differ in memory, so `auto` stands for different settings on "
            "them: give every activation_checkpointing as true or false, and micro_batch."
        )


def _prepare_training(
    model: RectVLM,
    phase: Phase,
    config: Config,
    budget: PhaseBudget,
    engine: Engine,
    resumed_from: Path | None,
) -> None:
    """Freeze what does not train, hand model and optimizer to the engine, and load the optimizer's
    state of a run that resumes."""
    settings = phase.get_settings(config)
    if config.train.weighting == "uncertainty":
        model.weighting = UncertaintyWeighting(len(phase.tasks))
    freeze_all_but(model, settings.lr, settings.unfreeze, extra_modules=["weighting"])
    engine.prepare(model, build_optimizer(model, config.train, settings, budget))
    set_training_modes(model, settings)
    if resumed_from is None:
        return
    checkpoint = Checkpoint.open(resumed_from)
    engine.load_optimizer_shards(
        checkpoint.engine_folder,
        checkpoint.training.world_size,
        keeps_ema=settings.ema_decay > 0,
    )
    log.info("resumed from %s", resumed_from)


def _fetch_frozen_models(phase: Phase, config: Config) -> None:
    """Fetch or build bundled models before the processes join, and see that others are in reach.

    From then on Transformers saves on rank 0 only, whichever rank prepares a model, and under
    ZeRO-3 it builds every model in shards.
    """
    if phase.previous_phase is None:
        pretrained.require_model(config.text.model)
    if "generator" in phase.parts:
        pretrained.require_model(config.generator.model)


def build_model(phase: Phase, config: Config, source: Path | None, engine: Engine) -> RectVLM:
    """Build the model of a phase with the weights of a checkpoint.

    The engine shards the language model while it is read.

    Raises:
        UserError: the checkpoint has nothing that the phase needs, or its weights do not fit.
    """
    if source is None:
        prompts = PromptEmbeddings.from_text_encoder(
            pretrained.resolve_model(config.text.model), config.text.max_tokens
        )
        return RectVLM(config, phase.parts, prompts, _load_language_model(phase, config, engine))
    checkpoint = Checkpoint.open(source)
    parts = choose_parts(phase, checkpoint)
    tensors = checkpoint.read_tensors(parts)
    prompts = PromptEmbeddings.from_tensors(tensors, source)
    check_image_parts(config, checkpoint, tensors)
    model = RectVLM(config, phase.parts, prompts, _load_language_model(phase, config, engine))
    with explain_misfit(config, checkpoint):
        load_tensors(model, tensors, select_names(model, parts), source)
    if "classifier" in parts:
        model.thresholds = checkpoint.read_thresholds()
    if engine.is_main:
        log_parts(phase, checkpoint, parts)
    return model


def _load_language_model(phase: Phase, config: Config, engine: Engine) -> LanguageModel | None:
    if "generator" not in phase.parts:
        return None
    folder = pretrained.resolve_model(config.generator.model)
    return load_language_model(config.generator, folder, engine.device, engine.shard_module)
