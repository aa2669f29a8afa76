"""The containers: what is copied exists and suffices, and the challenge's entry point runs."""

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_nifti

from rectvlm.checkpoint.export import export_checkpoint
from rectvlm.cli import main
from rectvlm.labels import FINDINGS
from tests.small_cases import AFFINE, body

CHECKOUT = Path(__file__).resolve().parents[2]
FOLDER = CHECKOUT / "launch" / "docker"
DOCKERFILE = FOLDER / "challenge.Dockerfile"
SERVER_DOCKERFILE = FOLDER / "serve.Dockerfile"
SCRIPT = FOLDER / "challenge.sh"
NO_NETWORK = ["unshare", "--map-root-user", "--net", "--mount"]


every_dockerfile = pytest.mark.parametrize(
    "dockerfile", [DOCKERFILE, SERVER_DOCKERFILE], ids=lambda path: path.name
)


def read_instructions(dockerfile: Path = DOCKERFILE) -> list[list[str]]:
    """Words of each instruction, with continued lines joined and comments left out."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.strip()]


def read_environment() -> dict[str, str]:
    words = [words[1:] for words in read_instructions() if words[0] == "ENV"]
    return dict(pair.split("=", 1) for pairs in words for pair in pairs)


def copied_paths(dockerfile: Path = DOCKERFILE) -> list[tuple[list[str], str]]:
    """Sources and target of each COPY, without its options."""
    copies = [words[1:] for words in read_instructions(dockerfile) if words[0] == "COPY"]
    plain = [[word for word in words if not word.startswith("--")] for words in copies]
    return [(words[:-1], words[-1]) for words in plain]


def can_unshare() -> bool:
    found = shutil.which("unshare")
    return found is not None and subprocess.run([*NO_NETWORK, "true"], check=False).returncode == 0


@every_dockerfile
def test_every_copied_path_exists_and_is_not_ignored(dockerfile: Path) -> None:
    rules = (FOLDER / f"{dockerfile.name}.dockerignore").read_text().splitlines()
    assert "*" in rules
    kept = [rule[1:] for rule in rules if rule.startswith("!")]
    sources = [source for names, _ in copied_paths(dockerfile) for source in names]
    assert len(sources) >= 5 and sorted(sources) == sorted(kept)
    for source in sources:
        assert (CHECKOUT / source).exists(), source
    assert not any(fnmatch.fnmatch(source, "**/__pycache__") for source in sources)


@every_dockerfile
def test_torch_is_the_version_that_make_installs(dockerfile: Path) -> None:
    makefile = (CHECKOUT / "Makefile").read_text()
    version = re.search(r"^TORCH \?= \$\(if \$\(LATEST\),torch,(\S+)\)$", makefile, re.M)
    assert version is not None and ["ARG", f"TORCH={version[1]}"] in read_instructions(dockerfile)


def test_the_server_s_container_starts_the_command_and_not_as_root(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    *_, user, _, _, entry_point = read_instructions(SERVER_DOCKERFILE)
    assert user == ["USER", "1000"] and entry_point[0] == "ENTRYPOINT"
    program, *arguments = [word.strip("[],") for word in entry_point[1:]]
    monkeypatch.delenv("RECTVLM_TOKEN", raising=False)
    assert program == "rectvlm" and main(arguments) == 2
    assert "expected a secret in RECTVLM_TOKEN" in capsys.readouterr().err


def test_the_container_runs_offline_and_not_as_root() -> None:
    instructions = read_instructions()
    assert instructions[0][0] == "FROM" and ["USER", "1000"] in instructions
    environment = read_environment()
    assert environment["HF_HUB_OFFLINE"] == "1" and environment["HOME"] == "/tmp"
    (target,) = [target for names, target in copied_paths() if names[0].endswith(SCRIPT.name)]
    assert instructions[-1] == ["ENTRYPOINT", f"[{target}]"]
    assert os.access(SCRIPT, os.X_OK)


def test_the_entry_point_is_a_sound_script() -> None:
    shellcheck = [shutil.which("shellcheck") or "shellcheck", "--shell=sh", str(SCRIPT)]
    for command in (["sh", "-n", str(SCRIPT)], shellcheck):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not can_unshare(), reason="namespaces of the kernel are not allowed here")
def test_the_entry_point_needs_no_network_and_no_writable_input(tiny_run, tmp_path: Path) -> None:
    """As in the container: the copied files alone, read-only mounts, no network."""
    image = tmp_path / "opt"
    for names, _ in copied_paths():
        for name in names:
            (image / name).parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", "-a", str(CHECKOUT / name), str(image / name)], check=True)
    for folder in ("input", "weights", "output", "bin"):
        (tmp_path / folder).mkdir()
    write_nifti(body(1)[0], AFFINE, tmp_path / "input" / "case.nii.gz")
    export_checkpoint(tiny_run(1), tmp_path / "weights" / "model")
    program = tmp_path / "bin" / "rectvlm"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m rectvlm "$@"\n')
    program.chmod(0o755)
    places = {name: str(tmp_path / name.lower()) for name in ("INPUT", "OUTPUT")}
    environment = read_environment() | places | {"MODEL": str(tmp_path / "weights" / "model")}
    environment |= {"HF_HUB_CACHE": str(tmp_path / "weights" / "hub"), "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(image)}
    mounts = "".join(
        f"mount --bind '{tmp_path / name}' '{tmp_path / name}' && "
        f"mount -o remount,bind,ro '{tmp_path / name}' && "
        for name in ("input", "weights", "opt")
    )
    refused = f"! touch '{tmp_path}/input/x' 2>/dev/null && "
    script = image / "launch" / "docker" / SCRIPT.name
    command = [*NO_NETWORK, "sh", "-c", f"{mounts}{refused}exec '{script}' --device cpu"]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert os.listdir(tmp_path / "output") == ["results.json"]
    (row,) = json.loads((tmp_path / "output" / "results.json").read_text())["predictions"]
    assert row["input_image_name"] == "case" and list(row["probabilities"]) == list(FINDINGS)
