"""What the benchmarks share: where results go, what each result says of its circumstances, and how errors are told."""

import argparse
import functools
import itertools
import json
import logging
import re
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from rectvlm.types import UserError

CHECKOUT = Path(__file__).resolve().parents[1]
RESULTS_FOLDER = CHECKOUT / "benchmarks" / "results"


def make_page_header(title: str, script: str, result: dict[str, Any]) -> str:
    """Title and circumstances of a result with `date`, `machine`, `versions` and `seconds`."""
    where = result["machine"]
    gpus = ", ".join(where["gpus"]) or "no GPU"
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"# {title}, {result['date']}\n\n"
        f"{where['cpu']}, {where['cores']} cores, {where['memory_gb']} GB; {gpus}. {versions}. Written by "
        f"`{script}`, {result['seconds']:.0f} s in all.\n\n"
    )


def publish_result(
    out: Path,
    name: str,
    start_time: float,
    facts: dict[str, Any],
    to_page: Callable[[dict[str, Any]], str],
) -> None:
    """Write `NAME-MACHINE-DATE.json` and `.md` and show the page: `facts` with date, machine and seconds since `began`
    (`time.monotonic`). A second result of a day gets a number; none is written over."""
    from rectvlm.machine import describe_machine  # imports torch

    result = {"date": datetime.now(UTC).date().isoformat(), "machine": describe_machine()} | facts
    result["seconds"] = round(time.monotonic() - start_time, 1)
    text = to_page(result)
    out.mkdir(parents=True, exist_ok=True)
    first = f"{name}-{machine_slug(result['machine'])}-{result['date']}"
    stems = itertools.chain([first], (f"{first}-{number}" for number in itertools.count(2)))
    stem = next(stem for stem in stems if not (out / f"{stem}.json").exists())
    (out / f"{stem}.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    path = out / f"{stem}.md"
    path.write_text(text)
    console = Console(stderr=True)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.print(str(path), highlight=False, soft_wrap=True)


def positive_int(text: str) -> int:
    """An option's whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, not {text!r}")
    return int(text)


class LaunchFailed(Exception):
    """A launch ended with an error; the message holds the last lines of its output."""


def quiet_main(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """A command line whose libraries keep quiet, and whose user errors are one sentence and status 1."""

    @functools.wraps(main)
    def run(arguments: Sequence[str] | None = None) -> int:
        logging.basicConfig(level=logging.ERROR)
        try:
            return main(arguments)
        except (UserError, LaunchFailed) as error:
            Console(stderr=True).print(
                f"error: {error}", markup=False, highlight=False, soft_wrap=True
            )
            return 1

    return run


def machine_slug(where: dict[str, Any]) -> str:
    """The GPU, or else the CPU and its cores, as part of a file name."""
    name = (
        f"{len(where['gpus'])}x {where['gpus'][0]}"
        if where["gpus"]
        else f"{where['cpu']} {where['cores']} cores"
    )
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")
