"""The command line of `launch/phaseN.py`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rectvlm.cli_options import CommandParser
from rectvlm.train.phases import STAGES, Phase
from rectvlm.train.recovery.signals import LAUNCHER_VARIABLE
from rectvlm.types import UserError


def parse_arguments(phase: Phase, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a phase's command line, by default that of the process."""
    parser = CommandParser(
        prog=name_command(phase.number),
        description=f"Phase {phase.number}: {', '.join(phase.tasks)}. "
        f"Trains {', '.join(phase.parts)}.",
    )
    parser.add_argument(
        "--config", default="demo", help="name or path of a configuration (default: demo)"
    )
    stages = [stage for stage, row in STAGES.items() if row.number == phase.number]
    stage_help = (
        f"a stage of the phase, in a run folder of its own (phase {phase.number} has "
        f"{', '.join(stages)})"
    )
    parser.add_argument("--stage", choices=stages, help=stage_help if stages else argparse.SUPPRESS)
    parser.add_argument(
        "--from",
        dest="source",
        metavar="PATH",
        help="start from this run's phase folder, checkpoint, exported or pulled model, or hub id; "
        "`best` is the best checkpoint of the phase before",
    )
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--resume",
        default="no",
        choices=("yes", "auto"),
        metavar="[auto]",
        help="go on from this phase's newest intact checkpoint; with `auto`, begin where there is "
        "none",
    )
    start.add_argument(
        "--restart", action="store_true", help="delete this phase's earlier run and begin anew"
    )
    parser.add_argument(
        "--ds-config",
        type=Path,
        metavar="JSON",
        help=f"instead of ds_configs/phase{phase.number}.json",
    )
    _add_process_options(parser)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="part.field=value",
        help="change a value of the configuration",
    )
    words = sys.argv[1:] if argv is None else argv
    return parser.parse_intermixed_args(_join_resume_value(words))


def name_command(phase_number: int) -> str:
    """How a phase was started: `launch/phaseN.py` or `rectvlm train N`."""
    script = f"phase{phase_number}.py"
    if Path(sys.argv[0]).name == script:
        return f"launch/{script}"
    return f"rectvlm train {phase_number}"


def _add_process_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `rectvlm.train.launch`; a rank that a launcher started skips them."""
    group = parser.add_argument_group("processes", "not under `accelerate launch`")
    group.add_argument(
        "--processes",
        type=int,
        metavar="COUNT",
        help="on this machine (default: one a GPU, or one)",
    )
    group.add_argument(
        "--accelerate-config",
        type=Path,
        metavar="YAML",
        help="an Accelerate config file, for the numbers that are not given here",
    )
    group.add_argument("--machines", type=int, metavar="COUNT", help="of a run on several")
    group.add_argument("--machine-rank", type=int, metavar="NUMBER", help="this one's, from 0")
    group.add_argument("--main-address", metavar="HOST", help="of machine 0")
    group.add_argument("--main-port", type=int, metavar="PORT", help="of machine 0")


def require_own_launcher(args: argparse.Namespace) -> None:
    """Refuse the options of processes where another launcher has started them.

    Raises:
        UserError: there are some.
    """
    options = ("processes", "accelerate_config", "machines", "machine_rank")
    given = [f"--{name.replace('_', '-')}" for name in options if getattr(args, name) is not None]
    if given and LAUNCHER_VARIABLE not in os.environ:
        raise UserError(
            f"{' and '.join(given)} cannot be followed, since another launcher has started this "
            "process: give its own options (--num_processes of `accelerate launch`), or start "
            "with `rectvlm train N`."
        )


def _join_resume_value(words: Sequence[str]) -> list[str]:
    """Join `--resume` and its value to one word, so that it does not take an override for it."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] == "--resume=yes" and word == "auto":
            joined[-1] = "--resume=auto"
        else:
            joined.append("--resume=yes" if word == "--resume" else word)
    return joined
