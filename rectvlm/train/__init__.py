"""Training: three phases as rows of a table over one loop."""

import logging
import os
import sys
from collections.abc import Sequence

from rectvlm.train.phases import PHASES, Phase, SettingsResolver

__all__ = ["PHASES", "Phase", "main"]

log = logging.getLogger(__name__)


def main(
    phase_number: int,
    argv: Sequence[str] | None = None,
    resolve_settings: SettingsResolver | None = None,
) -> None:
    """Run a phase as a command, with the log set up before libraries are imported.

    Without a launcher it starts the phase's processes itself, where there are several.

    Args:
        phase_number: number of the phase.
        argv: arguments; by default the process's.
        resolve_settings: replaces `auto` in the configuration; without it `auto` counts as true.
    """
    from rectvlm.allocator import keep_freed_memory
    from rectvlm.train.engine.cache_folders import replace_unwritable_caches
    from rectvlm.train.engine.launcher_settings import follow_use_cpu, is_started_by_launcher
    from rectvlm.train.logging.logging_setup import choose_deepspeed_device, configure_logging

    configure_logging()
    # Imported here: it imports huggingface_hub, which reads its variables once.
    from rectvlm.train.preflight import check_launch

    follow_use_cpu()
    check_launch(phase_number, argv)
    if not is_started_by_launcher():
        from rectvlm.train.launch import launch_phase

        exit_code = launch_phase(phase_number, sys.argv[1:] if argv is None else argv)
        if exit_code is not None:
            sys.exit(exit_code)
        follow_use_cpu()  # as an Accelerate config file may ask
    replace_unwritable_caches()
    if os.environ.get("RANK", "0") == "0":
        log.info("phase %d: loading torch, transformers and DeepSpeed", phase_number)
    choose_deepspeed_device()
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        keep_freed_memory()
    # Imported here: libraries that the engine imports log messages unless they are silenced.
    from rectvlm.train import run

    run.main(phase_number, argv, resolve_settings)
