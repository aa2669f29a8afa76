"""The commands that lead to a model: `preprocess`, `train`, `plan` and `init`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from rectvlm.cli_options import add_options


def add_programs(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add the commands that hand all their words on to another program."""
    # Every word is the program's, also `--help`: no prefix makes an option here.
    preprocess = commands.add_parser(
        "preprocess",
        help="shards of your own cases (--table), of CT-RATE or of phantoms",
        add_help=False,
        prefix_chars="\0",
    )
    preprocess.add_argument("arguments", nargs=argparse.REMAINDER)
    preprocess.set_defaults(run=_run_preprocess, extra="train")

    train = commands.add_parser(
        "train",
        help="train a phase, on one process or several; `rectvlm train N --help` has its options",
    )
    train.add_argument("phase", type=int, choices=(1, 2, 3), metavar="N", help="1, 2 or 3")
    train.add_argument("arguments", nargs=argparse.REMAINDER, metavar="…", help="of the phase")
    train.set_defaults(run=run_train, extra="train")


def add_plan_arguments(plan: argparse.ArgumentParser) -> None:
    """Add the options of `plan`."""
    from rectvlm.plan.hardware import MEASURED_RATES, HardwareRates
    from rectvlm.plan.options import PlanOptions

    add_options(plan, PlanOptions)
    add_options(plan, HardwareRates, exclude=MEASURED_RATES)
    plan.set_defaults(run=_run_plan)


def add_init_arguments(init: argparse.ArgumentParser) -> None:
    """Add the options of `init`."""
    init.add_argument("path", type=Path, metavar="FILE.yaml", help="file to write")
    init.add_argument(
        "--from",
        dest="config",
        default="small",
        metavar="NAME",
        help="configuration to start from: tiny, demo, learn, small, medium, large, or a YAML file "
        "(default: small)",
    )
    init.set_defaults(run=_run_init)


def _run_preprocess(options: argparse.Namespace) -> None:
    from rectvlm.checkout_program import run_preprocessing

    sys.exit(run_preprocessing(options.arguments))


def run_train(options: argparse.Namespace) -> None:
    """Train a phase."""
    from rectvlm.plan.auto_settings import resolve_auto_settings
    from rectvlm.train import main as train_phase

    train_phase(options.phase, options.arguments, resolve_auto_settings)


def _run_plan(options: argparse.Namespace) -> None:
    from rectvlm.plan.command import run

    run(options)


def _run_init(options: argparse.Namespace) -> None:
    from rectvlm.commented_config import write_commented_config

    write_commented_config(options.config, options.path)
    sys.stdout.write(f"{options.path}\n")
