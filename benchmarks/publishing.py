"""Command lines, reports and result folders of the benchmarks."""

import argparse
import functools
import importlib.util
import itertools
import json
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.measurements import (
    Comparison,
    MissingPeer,
    SectionResult,
    make_comparison_table,
)
from rectvlm.cli_options import CommandParser
from rectvlm.files import write_json
from rectvlm.types import JsonObject, UserError

CHECKOUT = Path(__file__).resolve().parents[1]
RESULTS_FOLDER = CHECKOUT / "benchmarks" / "results"
RESULTS_FILE, REPORT_FILE = "results.json", "report.md"


@dataclass(frozen=True)
class Program:
    """A benchmark as a program: its names, and what it makes of its facts.

    Facts hold `versions` and what was measured; the functions also see `machine`.
    """

    name: str
    """Name of the module and, with hyphens, of the result folder."""
    title: str
    write_text: Callable[[JsonObject], str]
    """Writes circumstances and tables as Markdown."""
    list_comparisons: Callable[[JsonObject], Sequence[Comparison]]
    """Lists what was compared, with every repetition."""

    def make_section(
        self,
        result: JsonObject,
        arguments: Sequence[str],
        seconds: float,
        missing_peers: Sequence[MissingPeer] = (),
    ) -> SectionResult:
        """Make the section of a result: facts with `machine` and `versions`."""
        command = shlex.join(["python", "-m", f"benchmarks.{self.name}", *_drop_out(arguments)])
        facts = {key: value for key, value in result.items() if key not in ("machine", "versions")}
        return SectionResult(
            name=self.name,
            title=self.title,
            command=command,
            seconds=round(seconds, 1),
            facts=facts,
            comparisons=tuple(self.list_comparisons(result)),
            text=self.write_text(result),
            missing_peers=tuple(missing_peers),
        )


def _drop_out(arguments: Sequence[str]) -> list[str]:
    """Arguments without the folder of the results."""
    if "--out" not in arguments:
        return list(arguments)
    position = list(arguments).index("--out")
    return [*arguments[:position], *arguments[position + 2 :]]


def publish_result(
    out: Path,
    program: Program,
    arguments: Sequence[str] | None,
    start_seconds: float,
    facts: JsonObject,
    missing_peers: Sequence[MissingPeer] = (),
) -> Path:
    """Write the result folder of one program, and show the report.

    Args:
        out: folder of the results.
        program: the program.
        arguments: its command line; None is that of this process.
        start_seconds: `time.monotonic()` at the start.
        facts: what was measured, with `versions`.
        missing_peers: packages that would have been compared.
    """
    from rectvlm.machine import describe_machine

    result = {"machine": describe_machine(), **facts}
    used_arguments = sys.argv[1:] if arguments is None else arguments
    seconds = time.monotonic() - start_seconds
    section = program.make_section(result, used_arguments, seconds, missing_peers)
    name = program.name.replace("_", "-")
    return publish_sections(out, name, program.title, [section], facts["versions"], seconds)


def publish_sections(
    out: Path,
    name: str,
    title: str,
    sections: Sequence[SectionResult],
    versions: dict[str, str],
    seconds: float,
) -> Path:
    """Write `NAME-MACHINE-DATE/` with `results.json`, `report.md` and plots; show the report.

    A second result of a day gets a number; none is written over.
    """
    from rectvlm.machine import describe_machine
    from rectvlm.train.logging.git_state import read_git_state

    machine, date = describe_machine(), datetime.now(UTC).date().isoformat()
    results: JsonObject = {
        "name": name,
        "title": title,
        "date": date,
        "machine": machine,
        "versions": versions,
        "git": read_git_state().to_json(),
        "seconds": round(seconds, 1),
        "sections": [section.to_json() for section in sections],
    }
    out.mkdir(parents=True, exist_ok=True)
    stem = f"{name}-{machine_slug(machine)}-{date}"
    folder = next(path for path in _number_paths(out, stem) if not path.exists())
    write_result_folder(folder, results)
    console = Console(stderr=True)
    report = (folder / REPORT_FILE).read_text()
    console.print(report, markup=False, highlight=False, soft_wrap=True)
    console.print(str(folder), highlight=False, soft_wrap=True)
    return folder


def write_result_folder(folder: Path, results: JsonObject) -> None:
    """Write results, report and plots into a new folder."""
    folder.mkdir()
    write_json(folder / RESULTS_FILE, results)
    sections = [SectionResult.from_json(section) for section in results["sections"]]
    parts = [_make_report_header(results)]
    parts += [_write_section(section, folder, len(sections) > 1) for section in sections]
    (folder / REPORT_FILE).write_text("\n".join(parts))


def read_sections(folder: Path) -> tuple[JsonObject, list[SectionResult]]:
    """Read a result folder.

    Raises:
        UserError: it holds no results.
    """
    path = folder / RESULTS_FILE
    try:
        results = json.loads(path.read_text())
        return results, [SectionResult.from_json(section) for section in results["sections"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} is no result folder of a benchmark: expected a readable {RESULTS_FILE} in "
            f"it, found {error!r}; name a folder such as those in benchmarks/results."
        ) from None


def _make_report_header(results: JsonObject) -> str:
    machine, git = results["machine"], results["git"]
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    commit = git["commit"][:12] if git["commit"] else f"unknown ({git['reason']})"
    state = ", with changes that are not committed" if git.get("dirty") else ""
    return (
        f"# {results['title']}, {results['date']}\n\n"
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB; {gpus}. "
        f"{versions}. Commit {commit}{state}. {results['seconds']:.0f} s in all.\n"
    )


def _write_section(section: SectionResult, folder: Path, has_siblings: bool) -> str:
    parts = [f"## {section.title}\n"] if has_siblings else []
    parts.append(f"`{section.command}`, {section.seconds:.0f} s.\n")
    if section.failure is not None:
        parts.append(f"No figures: {section.failure}\n")
    if section.text:
        parts.append(section.text)
    for comparison in section.comparisons:
        parts.append(f"**{comparison.title}**\n")
        if comparison.note:
            parts.append(f"{comparison.note}\n")
        parts.append(make_comparison_table(comparison))
        if (plot := _draw_plot(comparison, folder, section.name)) is not None:
            parts.append(f"![{comparison.title}]({plot.name})\n")
    for peer in section.missing_peers:
        parts.append(f"Not compared, since it is not installed: {peer.name} (`{peer.install}`).\n")
    return "\n".join(parts)


def _draw_plot(comparison: Comparison, folder: Path, stem: str) -> Path | None:
    """Draw a comparison; None without matplotlib, which the image of a lent GPU may lack."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from benchmarks.plots import write_plot

    return write_plot(comparison, folder, stem)


def find_missing_peers(install_by_module: dict[str, str]) -> list[MissingPeer]:
    """Packages that are not installed, of those given as module and name for pip."""
    missing: list[MissingPeer] = []
    for module, package in install_by_module.items():
        if importlib.util.find_spec(module) is None:
            missing.append(MissingPeer(module, f"pip install {package}"))
    return missing


def _number_paths(out: Path, stem: str) -> Iterator[Path]:
    yield out / stem
    for number in itertools.count(2):
        yield out / f"{stem}-{number}"


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
