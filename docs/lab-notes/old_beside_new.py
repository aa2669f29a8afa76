"""An experiment: seconds a sample of phases 2 and 3 in two checkouts, one after the other in turn.

    python docs/lab-notes/old_beside_new.py OLD NEW [--config demo] [--rounds 2]
        [--samples2 96] [--samples3 64] [--old part.field=value …] [--new part.field=value …]
        [part.field=value …]

Each checkout preprocesses its phantoms and trains with its own code and configuration on two
processes (`launch/accelerate/cpu2.yaml`), with the same Python. The first quarter of a run's steps
is left out. It prints the median of a run's steps by the samples of a step.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

PROGRAMS = Path(sys.executable).parent
CASES = ("--phantoms", "48", "--valid-phantoms", "16", "--no-samples")


def run(checkout: Path, *command: str) -> None:
    """Run a command in a checkout, which is the one that it imports from."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=checkout, env=environment, check=True, capture_output=True)


def train(checkout: Path, phase: int, samples: int, options: list[str]) -> float:
    """Train a phase; the median seconds of a sample."""
    run(
        checkout,
        str(PROGRAMS / "accelerate"),
        *("launch", "--config_file", "launch/accelerate/cpu2.yaml"),
        *(f"launch/phase{phase}.py", "--restart"),
        *(*options, f"train.phases.phase{phase}.samples={samples}"),
    )
    lines = (checkout / f"runs/beside/phase{phase}/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    samples_a_step = steps[0]["samples_seen"]
    counted = steps[len(steps) // 4 :]
    return statistics.median(step["seconds"]["total"] for step in counted) / samples_a_step


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkouts", nargs=2, type=Path, metavar=("OLD", "NEW"))
    parser.add_argument("--config", default="demo")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--samples2", type=int, default=96)
    parser.add_argument("--samples3", type=int, default=64)
    parser.add_argument("--old", nargs="*", default=[])
    parser.add_argument("--new", nargs="*", default=[])
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    own = dict(zip(map(Path.resolve, options.checkouts), (options.old, options.new), strict=True))
    shared = ["--config", options.config, "name=beside", "data.shards=data/shards/beside"]
    arguments = {checkout: [*shared, *options.overrides, *more] for checkout, more in own.items()}
    for checkout, words in arguments.items():
        run(checkout, sys.executable, "-m", "data_pipeline.preprocess", *words, *CASES)
        train(checkout, 1, 16, words)
    for phase, samples in ((2, options.samples2), (3, options.samples3)):
        for number in range(options.rounds):
            old, new = (train(checkout, phase, samples, arguments[checkout]) for checkout in own)
            line = f"phase {phase}, round {number}: old {old:.3f}, new {new:.3f} s a sample"
            print(f"{line}, {old / new:.2f} times", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
