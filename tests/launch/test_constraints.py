"""The locked versions are those that pyproject.toml allows, and `make setup` installs them."""

import importlib.metadata
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

CHECKOUT = Path(__file__).parents[2]
LOCK = CHECKOUT / "launch/constraints.txt"
FAKE_PYTHON = """#!/bin/sh
[ "$2" = pip ] && echo "$@" >> calls
exit 0
"""


def read_lock() -> dict[str, str]:
    lines = [line for line in LOCK.read_text().splitlines() if not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def list_dependencies() -> list[Requirement]:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"]]
    for packages in project["optional-dependencies"].values():
        texts += packages
    return [requirement for requirement in map(Requirement, texts) if requirement.name != "rectvlm"]


def test_every_dependency_is_locked_to_a_version_that_it_allows() -> None:
    lock = read_lock()
    for requirement in list_dependencies():
        if str(requirement.specifier).startswith("=="):
            continue  # pyproject.toml locks it
        name = canonicalize_name(requirement.name)
        assert name in lock, f"{requirement} has no line in {LOCK.name}"
        assert lock[name] in requirement.specifier, f"{LOCK.name}: {name}=={lock[name]}"


def test_the_lock_suits_cpu_and_gpu() -> None:
    lock = read_lock()
    assert [canonicalize_name(name) for name in lock] == sorted(lock), "sorted, canonical names"
    for name, version in lock.items():
        assert Version(version).local is None and "nvidia" not in name and name != "triton"
    (torch,) = re.findall(r"TORCH \?= .*(torch==[\d.]+)", (CHECKOUT / "Makefile").read_text())
    assert torch == f"torch=={lock['torch']}"


def test_every_locked_version_installs_on_the_oldest_python_that_the_project_allows() -> None:
    """Debian's Python is 3.11.2. A lock that it cannot install keeps pip searching for an hour."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    oldest = f"{project['requires-python'].removeprefix('>=')}.0"
    lock, seen = read_lock(), 0
    for distribution in importlib.metadata.distributions():
        name = canonicalize_name(distribution.name)
        if lock.get(name) == distribution.version:
            wanted = distribution.metadata.get("Requires-Python") or ""
            assert SpecifierSet(wanted).contains(oldest), f"{name} {lock[name]} wants {wanted}"
            seen += 1
    assert seen, "no installed package has its locked version"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose environment has a python that notes what it is to install."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / "launch").mkdir()
    for name in ("Makefile", "pyproject.toml", "launch/constraints.txt"):
        (tmp_path / name).write_bytes((CHECKOUT / name).read_bytes())
    python = tmp_path / ".venv/bin/python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    return tmp_path


def setup(checkout: Path, *variables: str) -> list[str]:
    """Run `make setup`; return the arguments of pip's calls."""
    calls = checkout / "calls"
    calls.unlink(missing_ok=True)
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    subprocess.run(["make", "setup", *variables], cwd=checkout, env=environment, check=True)
    return calls.read_text().splitlines() if calls.exists() else []


def test_setup_installs_the_locked_versions_and_latest_the_newest(checkout: Path) -> None:
    locked = setup(checkout)
    assert len(locked) == 2 and all("-c .venv/constraints.txt" in call for call in locked)
    assert f"torch=={read_lock()['torch']}" in locked[1] and ".[dev]" in locked[1]
    assert setup(checkout) == [], "what is installed is not installed again"

    newest = setup(checkout, "LATEST=1")
    assert len(newest) == 2 and not any("-c " in call or "==" in call for call in newest)
    assert all("--upgrade-strategy eager" in call for call in newest)
    assert setup(checkout, "LATEST=1") == []

    assert len(setup(checkout)) == 2, "back to the locked versions"
    # A clock that ticks every few milliseconds would give the stamp the same time.
    for stamp in (checkout / ".venv").glob(".installed*"):
        os.utime(stamp, (0, 0))
    assert len(setup(checkout)) == 2, "a new lock is installed"


def test_another_torch_is_not_held_back_by_the_lock(checkout: Path) -> None:
    calls = setup(checkout, "TORCH=torch==2.11.0")
    assert all("torch==2.11.0" in call for call in calls)
    constraints = (checkout / ".venv/constraints.txt").read_text()
    assert "\ntorch==" not in constraints and "\ntransformers==" in constraints
