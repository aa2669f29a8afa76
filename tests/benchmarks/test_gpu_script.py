"""The script for a lent GPU, tried on this machine at the smallest size."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"


def test_the_script_has_no_fault_that_shellcheck_knows() -> None:
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    checked = subprocess.run([shellcheck, str(SCRIPT)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def run_script(out: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"SIZE": "tiny", "PYTHON": sys.executable, **variables}
    return subprocess.run(
        [str(SCRIPT), str(out)], env=environment, capture_output=True, text=True, check=False
    )


def test_without_time_left_nothing_starts_and_the_script_says_so(tmp_path: Path) -> None:
    done = run_script(tmp_path / "out", SECONDS_IN_ALL="0")
    assert done.returncode == 1
    assert done.stdout.count("failed: no time left: ") == 8
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.slow
def test_every_measurement_leaves_its_folder(tmp_path: Path) -> None:
    done = run_script(tmp_path, OMP_NUM_THREADS="1", SECONDS_IN_ALL="3000")
    failures = [line for line in done.stdout.splitlines() if line.startswith("failed: ")]
    # Where there is no GPU, its tests are skipped, which is no failure.
    assert not failures, done.stdout + done.stderr
    names: list[str] = []
    for folder in tmp_path.iterdir():
        names.append(json.loads((folder / "results.json").read_text())["name"])
    expected = ["attention", "encoder", "engine-step", "generation", "machine-limits"]
    assert sorted(set(names)) == expected and names.count("engine-step") == 3
