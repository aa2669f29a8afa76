"""Completion in real shells, which read the script that `rectvlm completion` prints."""

import shutil
import subprocess
from pathlib import Path

import pytest

from rectvlm.cli import main

COMPLETE = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
function_name=$(complete -p rectvlm | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
"$function_name"
printf '%s\\n' "${COMPREPLY[@]}"
"""
"""What bash does at a tab: it calls the function that is registered for the command."""


def write_script(shell: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["completion", shell]) == 0
    script = folder / f"rectvlm.{shell}"
    script.write_text(capsys.readouterr().out)
    return script


def test_bash_completes_commands_options_choices_and_files(tmp_path, capsys):
    script = write_script("bash", tmp_path, capsys)
    (tmp_path / "scan.nii.gz").touch()
    cases = {
        "pre": {"predict", "preprocess"},
        "predict --che": {"--checkpoint"},
        "predict sc": {"scan.nii.gz"},
        "export --checkpoint sc": {"scan.nii.gz"},
        "evaluate --split va": {"valid"},
        "weights pu": {"pull", "push"},
    }
    for words, expected in cases.items():
        done = subprocess.run(
            ["bash", "-c", COMPLETE, "bash", str(script), "rectvlm", *words.split()],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        assert set(done.stdout.split()) == expected, words


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_has_every_option_and_the_shell_reads_it(shell, tmp_path, capsys):
    script = write_script(shell, tmp_path, capsys)
    for word in ("thresholds", "ds-configs", "max-upload-mb", "doctor"):
        assert word in script.read_text()
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shell, "-n", str(script)], check=True)
