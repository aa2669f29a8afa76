"""Compare what two versions of the project made of the same commands, to the last digit.

    python docs/lab-notes/compare_behaviour.py BEFORE AFTER

Each argument is a checkout in which `make demo` has run. Compared are the arrays and records in
the demo's shards, every line of `metrics.jsonl` and `validation.jsonl` of the three phases (two
processes, ZeRO-3, NF4), the figures of the evaluation, and the prediction of a real CT. What no two
runs share (seconds, memory, times, versions, fingerprints of code) is left out. The exit status is
the number of things that differ.
"""

import gzip
import hashlib
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VOLATILE = {
    "checkpoint",
    "created",
    "fingerprint",
    "machine",
    "memory_bytes",
    "seconds",
    "shards",
    "versions",
}


def find_differences(before: Any, after: Any, where: str = "") -> Iterator[str]:
    """Name every leaf of two trees that differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            if key not in before or key not in after:
                yield f"{where}.{key} is only {'after' if key in after else 'before'}"
            else:
                yield from find_differences(before[key], after[key], f"{where}.{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, pair in enumerate(zip(before, after, strict=True)):
            yield from find_differences(*pair, f"{where}[{index}]")
    elif before != after:
        yield f"{where}: {before} became {after}"


def drop_volatile(tree: dict[str, Any]) -> dict[str, Any]:
    """Leave out what no two runs share."""
    return {key: value for key, value in tree.items() if key not in VOLATILE}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object a line."""
    return [drop_volatile(json.loads(line)) for line in path.read_text().splitlines()]


def hash_shards(folder: Path) -> dict[str, str]:
    """SHA-256 of every member of every tar; of records without the versions that wrote them."""
    hashes = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                data = file.read()
                if member.name.endswith(".json"):
                    data = json.dumps(drop_volatile(json.loads(data)), sort_keys=True).encode()
                hashes[member.name] = hashlib.sha256(data).hexdigest()
    return hashes


def read_predictions(folder: Path) -> dict[str, Any]:
    """Findings and reports as they are, masks as SHA-256 of their uncompressed file."""
    results: dict[str, Any] = {}
    for path in sorted(folder.glob("*/*")):
        name = f"{path.parent.name}/{path.name}"
        if path.suffix == ".json":
            results[name] = drop_volatile(json.loads(path.read_text()))
        elif path.suffix == ".txt":
            results[name] = path.read_text()
        elif path.suffix == ".gz":
            results[name] = hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest()
    return results


def read_demo(checkout: Path) -> dict[str, Any]:
    """Everything that a demo left and that two equal versions share."""
    run = checkout / "runs" / "demo"
    results: dict[str, Any] = {"shards": hash_shards(checkout / "data" / "shards" / "demo")}
    for phase in (1, 2, 3):
        for name in ("metrics.jsonl", "validation.jsonl"):
            results[f"phase {phase}, {name}"] = read_lines(run / f"phase{phase}" / name)
    figures = json.loads((run / "evaluation" / "metrics.json").read_text())
    results["evaluation"] = drop_volatile(figures)
    results["prediction"] = read_predictions(run / "predictions")
    return results


def main(before: Path, after: Path) -> int:
    """Print one line for each thing compared; return how many differ."""
    first, second = read_demo(before), read_demo(after)
    differing = 0
    for name, result in first.items():
        differences = list(find_differences(result, second[name]))
        differing += bool(differences)
        shown = (
            f"{len(differences)} differences, first {differences[:3]}" if differences else "equal"
        )
        sys.stdout.write(f"{name}: {shown}\n")
    return differing


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
