"""The package as a wheel, in a folder without a checkout."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
BUILT_FROM = ("rectvlm", "ds_configs", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel_contents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel from a copy of the sources and unpack it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    copied = [str(CHECKOUT / name) for name in BUILT_FROM]
    subprocess.run(["cp", "-a", *copied, str(source)], check=True)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(folder), str(source)], check=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "installed")
    return folder / "installed"


def run_installed(contents: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `rectvlm` from the wheel in a folder that holds nothing else."""
    folder = contents.parent / "elsewhere"
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(contents), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-m", "rectvlm", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_file_of_the_package_is_in_the_wheel(wheel_contents: Path) -> None:
    """Files that git ignores are left out; a DeepSpeed JSON is as much a file of it as a module."""
    listed = subprocess.run(
        ["git", "ls-files", "rectvlm", "ds_configs"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=True,
    )
    names = [name for name in listed.stdout.split() if name != "rectvlm/ds_configs"]
    missing: list[str] = []
    for name in names:
        installed = name if name.startswith("rectvlm/") else f"rectvlm/{name}"
        if not (wheel_contents / installed).is_file():
            missing.append(installed)
    assert len(names) > 100 and not missing


@pytest.mark.slow
def test_a_plan_needs_no_checkout(wheel_contents: Path) -> None:
    done = run_installed(wheel_contents, "plan", "--config", "tiny", "--phase", "1", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["zero_stage"] == 1 and plan["config"] == "tiny"
