"""The Makefile in checkouts whose path holds what a shell or make would read."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
TARGETS = ("preprocess", "verify", "demo", "learn", "test", "test-slow", "bench", "docs")


def make(folder: Path, *arguments: str) -> str:
    """Run make as a user does, outside an environment; return what it printed."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = subprocess.run(
        ["make", *arguments],
        cwd=folder,
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["a b", "it's", "x$y", "Müller 胸", 'p(q)&r;"s"'])
def test_targets_run_in_a_checkout_of_any_name(name: str, tmp_path: Path) -> None:
    """Programs are those of the checkout's own environment, which is there already."""
    checkout = tmp_path / name
    environment = checkout / ".venv"
    environment.mkdir(parents=True)
    for entry in ("Makefile", "pyproject.toml", "data_pipeline", "rectvlm", "launch", "benchmarks"):
        (checkout / entry).symlink_to(CHECKOUT / entry)
    for entry in Path(sys.prefix).iterdir():
        if entry.name != ".installed":
            (environment / entry.name).symlink_to(entry)
    (environment / ".installed").touch()

    assert "make TARGET" in make(checkout)
    assert make(checkout, "setup") == "", "what is installed is not installed again"
    for target in TARGETS:
        assert ".venv/bin/python" in make(checkout, "--dry-run", target)
    if name == "a b":
        assert "usage: python -m data_pipeline.verify" in make(checkout, "verify", "ARGS=--help")
    show_path = "show-path: ; @printf '%s\\n' \"$$PATH\""
    first = make(checkout, "--eval", show_path, "show-path").split(":")[0]
    assert first == str(environment / "bin")
