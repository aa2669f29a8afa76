"""The command `rectvlm`: its subcommands, from `preprocess` and `train` to `version`.

Heavy modules are imported when a command needs them, so that `rectvlm --help` answers at once.
"""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import rectvlm
from rectvlm.cli.evaluation import (
    add_embed_arguments,
    add_evaluate_arguments,
    add_probe_arguments,
    add_runs_actions,
)
from rectvlm.cli.prediction import (
    add_challenge_arguments,
    add_predict_arguments,
    add_serve_arguments,
)
from rectvlm.cli.training import (
    add_init_arguments,
    add_plan_arguments,
    add_programs,
    run_train,
)
from rectvlm.cli.weights import add_export_arguments, add_weights_actions
from rectvlm.cli_options import CommandParser, print_names_as_bytes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. A user's error is one sentence on stderr and exit code 2."""
    _replace_closed_streams()
    print_names_as_bytes()
    options = _build_parser().parse_args(arguments)
    if options.run is not run_train:  # a phase has a log of its own
        _start_logging(options.verbose, getattr(options, "progress", False))
    from rectvlm.files import explain_os_error, printable_text
    from rectvlm.optional_packages import require_extra
    from rectvlm.types import UserError

    try:
        if hasattr(options, "extra"):
            require_extra(options.extra)
        options.run(options)
    except UserError as error:
        sys.stderr.write(f"rectvlm: {printable_text(error)}\n")
        return 2
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        sys.stderr.write(f"rectvlm: {printable_text(explain_os_error(error))}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("rectvlm: stopped\n")
        return 130
    return 0


def _replace_closed_streams() -> None:
    """Let a command that was started without stdout or stderr (`>&-`) write to nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - open until the end


def _build_parser() -> CommandParser:
    parser = CommandParser(prog="rectvlm", description="3D chest-CT vision-language models.")
    parser.add_argument("--verbose", action="store_true", help="log details")
    parser.add_argument("--version", action="version", version=f"rectvlm {rectvlm.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    commands.add_parser(
        "predict",
        help="findings, lesion masks, report and a page for a CT or a folder",
        add_arguments=add_predict_arguments,
    )
    commands.add_parser(
        "serve",
        help="a page and an HTTP API that take CTs and show their cases",
        add_arguments=add_serve_arguments,
    )
    commands.add_parser(
        "challenge",
        help="results.json of a folder of CTs for a task of the VLM3D challenge",
        add_arguments=add_challenge_arguments,
    )
    commands.add_parser(
        "evaluate",
        help="metrics of a checkpoint on shards: JSON, tables and plots",
        add_arguments=add_evaluate_arguments,
    )

    commands.add_parser(
        "embed",
        help="features of CTs or shards by an encoder, for models of your own",
        add_arguments=add_embed_arguments,
    )
    commands.add_parser(
        "probe",
        help="a linear probe of features: which findings an encoder tells apart",
        add_arguments=add_probe_arguments,
    )

    add_programs(commands)
    add_weights_actions(
        commands.add_parser("weights", help="fetch, publish, check and list weights")
    )

    commands.add_parser(
        "export",
        help="a checkpoint as a folder to publish, without its optimizer state",
        add_arguments=add_export_arguments,
    )
    commands.add_parser(
        "plan",
        help="memory, FLOPs and time of a configuration, before a GPU is rented",
        add_arguments=add_plan_arguments,
    )

    runs = commands.add_parser("runs", help="list, compare and plot runs; test two evaluations")
    add_runs_actions(runs)

    commands.add_parser(
        "init",
        help="a configuration to edit, with a comment on each field",
        add_arguments=add_init_arguments,
    )
    completion = commands.add_parser(
        "completion", help="a script that lets a shell complete commands and options"
    )
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))
    completion.set_defaults(run=_run_completion)
    commands.add_parser(
        "doctor", help="what this machine has and lacks, and what to do about each"
    ).set_defaults(run=_run_doctor)
    commands.add_parser("version", help="versions of rectvlm, Python and torch").set_defaults(
        run=_print_versions
    )
    return parser


def _start_logging(verbose: bool, progress: bool = False) -> None:
    from rich.console import Console
    from rich.logging import RichHandler

    handler = RichHandler(console=Console(stderr=True), show_path=False, log_time_format="%H:%M:%S")
    # Libraries warn about kernels and layers that the user of a command cannot act upon.
    library_level = logging.WARNING if verbose else logging.ERROR
    logging.basicConfig(level=library_level, format="%(message)s", handlers=[handler], force=True)
    logging.getLogger("rectvlm").setLevel(logging.DEBUG if verbose else logging.INFO)
    if not verbose:
        warnings.filterwarnings("ignore", category=FutureWarning)
        # Progress bars of weights that load in a second are noise between two log lines.
        if not (progress and sys.stderr.isatty()):
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _run_completion(options: argparse.Namespace) -> None:
    from rectvlm.shell_completion import make_completion_script

    sys.stdout.write(make_completion_script(_build_parser(), options.shell))


def _run_doctor(_options: argparse.Namespace) -> None:
    from rectvlm.doctor.checks import run_checks
    from rectvlm.doctor.table import make_doctor_table
    from rectvlm.terminal_tables import make_stdout_console

    checks = run_checks()
    make_stdout_console().print(make_doctor_table(checks))
    if any(check.state == "failed" for check in checks):
        sys.exit(1)


def _print_versions(_options: argparse.Namespace) -> None:
    for name in ("rectvlm", "torch"):
        sys.stdout.write(f"{name} {version(name)}\n")
    sys.stdout.write(f"python {sys.version.split()[0]}\n")
