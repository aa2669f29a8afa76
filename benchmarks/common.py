"""What the benchmarks share: where results go, how a machine is named, and the head of a page."""

import json
import re
from pathlib import Path
from typing import Any

from rich.console import Console

CHECKOUT = Path(__file__).resolve().parents[1]
RESULTS = CHECKOUT / "benchmarks" / "results"


def header(title: str, script: str, result: dict[str, Any]) -> str:
    """Title and circumstances of a result with `date`, `machine`, `versions` and `seconds`."""
    where = result["machine"]
    gpus = ", ".join(where["gpus"]) or "no GPU"
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"# {title}, {result['date']}\n\n"
        f"{where['cpu']}, {where['cores']} cores, {where['memory_gb']} GB; {gpus}. {versions}. Written by "
        f"`{script}`, {result['seconds']:.0f} s in all.\n\n"
    )


def save(out: Path, name: str, result: dict[str, Any], page: str) -> Path:
    """Write `NAME-MACHINE-DATE.json` and `.md`; the path of the page."""
    out.mkdir(parents=True, exist_ok=True)
    stem = f"{name}-{machine_slug(result['machine'])}-{result['date']}"
    (out / f"{stem}.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    path = out / f"{stem}.md"
    path.write_text(page)
    return path


def publish(out: Path, name: str, result: dict[str, Any], page: str) -> None:
    """Save a result and show its page and where it lies."""
    path = save(out, name, result, page)
    console = Console(stderr=True)
    console.print(page, markup=False, highlight=False, soft_wrap=True)
    console.print(str(path), highlight=False, soft_wrap=True)


def machine_slug(where: dict[str, Any]) -> str:
    """The GPU, or else the CPU and its cores, as part of a file name."""
    name = f"{len(where['gpus'])}x {where['gpus'][0]}" if where["gpus"] else f"{where['cpu']} {where['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")
