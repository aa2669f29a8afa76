"""Command lines, pages and result files of the benchmarks."""

import argparse
import functools
import itertools
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console

from rectvlm.cli_options import CommandParser
from rectvlm.files import write_json
from rectvlm.types import JsonObject, UserError

CHECKOUT = Path(__file__).resolve().parents[1]
RESULTS_FOLDER = CHECKOUT / "benchmarks" / "results"


def make_page_header(title: str, script: str, result: JsonObject) -> str:
    """Write title and circumstances of a result with `date`, `machine`, `versions`, `seconds`."""
    machine = result["machine"]
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"# {title}, {result['date']}\n\n"
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB; {gpus}. "
        f"{versions}. Written by `{script}`, {result['seconds']:.0f} s in all.\n\n"
    )


def make_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def publish_result(
    out: Path,
    name: str,
    start_seconds: float,
    facts: JsonObject,
    to_page: Callable[[JsonObject], str],
) -> None:
    """Write `NAME-MACHINE-DATE.json` and `.md`, and show the page.

    A second result of a day gets a number; none is written over.

    Args:
        out: folder of the results.
        name: name of the benchmark.
        start_seconds: `time.monotonic()` at the start.
        facts: the result, to which date, machine and duration are added.
        to_page: makes the page of the complete result.
    """
    from rectvlm.machine import describe_machine

    date = datetime.now(UTC).date().isoformat()
    result: JsonObject = {"date": date, "machine": describe_machine(), **facts}
    result["seconds"] = round(time.monotonic() - start_seconds, 1)
    page = to_page(result)
    stem = f"{name}-{machine_slug(result['machine'])}-{result['date']}"
    path = next(path for path in _number_paths(out, stem) if not path.exists())
    write_json(path, result)
    page_path = path.with_suffix(".md")
    page_path.write_text(page)
    console = Console(stderr=True)
    console.print(page, markup=False, highlight=False, soft_wrap=True)
    console.print(str(page_path), highlight=False, soft_wrap=True)


def _number_paths(out: Path, stem: str) -> Iterator[Path]:
    yield out / f"{stem}.json"
    for number in itertools.count(2):
        yield out / f"{stem}-{number}.json"


def machine_slug(machine: JsonObject) -> str:
    """Name the GPU, or else the CPU and its cores, for a file name."""
    gpus = machine["gpus"]
    name = f"{len(gpus)}x {gpus[0]}" if gpus else f"{machine['cpu']} {machine['cores']} cores"
    without_marks = re.sub(r"\((r|tm)\)", "", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", without_marks).strip("-")


def make_parser(name: str, description: str) -> argparse.ArgumentParser:
    """Make the parser of a benchmark's command line, with the folder of its results."""
    parser = CommandParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--out", type=Path, default=RESULTS_FOLDER, metavar="DIR")
    return parser


def add_config_options(parser: argparse.ArgumentParser, default_without_gpu: str) -> None:
    """Add `--config` and changes of the configuration; by default it is `large` on a GPU."""
    default = "large" if torch.cuda.is_available() else default_without_gpu
    parser.add_argument(
        "--config", default=default, help=f"default: large on a GPU, else {default_without_gpu}"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="part.field=value", help="changes of the configuration"
    )


def positive_int(text: str) -> int:
    """Read an option's whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, not {text!r}")
    return int(text)


def prepare_engine_environment() -> None:
    """Set the environment of processes with an engine: no trackers, the CPU where no GPU is."""
    os.environ.setdefault("RECTVLM_TRACKERS", "none")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


class LaunchFailed(Exception):
    """A launch ended with an error; the message holds the last lines of its output."""


def quiet_main(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """Silence the libraries of a command line; a user's error is one sentence and status 1."""

    @functools.wraps(main)
    def run_main(arguments: Sequence[str] | None = None) -> int:
        logging.basicConfig(level=logging.ERROR)
        try:
            return main(arguments)
        except (UserError, LaunchFailed) as error:
            console = Console(stderr=True)
            console.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
            return 1

    return run_main
