"""Checks of a launch that need no library which takes seconds to import.

A mistake of the user ends the launch with one sentence before torch, transformers and DeepSpeed are
imported. `rectvlm.train.run` checks again whatever may have changed until then.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from rectvlm.config import Config, load_config
from rectvlm.data.shards import read_index
from rectvlm.optional_packages import require_extra
from rectvlm.pretrained.weight_files import find_weight_files
from rectvlm.train.arguments import parse_arguments
from rectvlm.train.budget import read_world_size, split_step
from rectvlm.train.engine.ds_config import find_ds_config, read_ds_config
from rectvlm.train.phases import PHASES, STAGES, Phase, get_run_folder
from rectvlm.train.recovery.exit_codes import ExitCode
from rectvlm.train.recovery.resume import (
    ResumeMode,
    find_source_checkpoint,
    has_checkpoints,
    require_checkpoint_to_resume,
)
from rectvlm.types import UserError


def check_launch(phase_number: int, argv: Sequence[str] | None) -> None:
    """Check packages, a command line and its files; end with code 2 where one is wrong."""
    args = parse_arguments(PHASES[phase_number], argv)
    phase = PHASES[phase_number] if args.stage is None else STAGES[args.stage]
    try:
        require_extra("train")
        config = load_config(args.config, args.overrides)
        step_batch = split_step(phase.get_settings(config), read_world_size())
        read_ds_config(
            find_ds_config(phase_number, args.ds_config), step_batch, config.train.gradient_clipping
        )
        check_start(phase, config, args.resume, args.source)
        read_index(config.data.shards)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(ExitCode.USER_ERROR)


def check_start(
    phase: Phase, config: Config, resume: ResumeMode, requested_source: str | None
) -> Path | None:
    """Check that the checkpoint that a phase starts from is there.

    Args:
        phase: the phase that trains.
        config: its configuration.
        resume: whether to go on from its newest checkpoint.
        requested_source: `--from`; by default the phase before.

    Returns:
        The checkpoint whose weights the phase starts from; None for phase 1, and for a run that
        goes on, which needs none of the phase before.

    Raises:
        UserError: there is none, or there are no weights at `encoder.init`.
    """
    folder = get_run_folder(phase, config)
    if resume == "yes":
        require_checkpoint_to_resume(folder, phase)
    if resume != "no" and has_checkpoints(folder):
        return None
    source = find_source_checkpoint(phase, config, requested_source)
    if source is None and config.encoder.init is not None:
        find_weight_files(config.encoder.init)
    return source
