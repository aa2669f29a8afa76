"""The tutorial of own data does what it says, with phantoms in the place of the user's CTs."""

import csv
import re
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from rectvlm.checkpoint import Checkpoint
from rectvlm.labels import LESION_BY_KEY
from rectvlm.lesion_bits import lesion_mask
from rectvlm.phantom.phantom import make_phantom
from tests.launches import environment, metrics

CHECKOUT = Path(__file__).parents[1]
PAGE = CHECKOUT / "docs/tutorial/own-data.md"


def read_blocks(language: str) -> list[str]:
    """Code blocks of the page in one language, also those inside none."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(), flags=re.M | re.S)
    return [text for name, text in fences if name == language]


def write_own_data(folder: Path) -> None:
    """Write the page's table and, as phantoms, the files that it names."""
    table = read_blocks("")[0]
    folder.mkdir()
    (folder / "cases.csv").write_text(table)
    for seed, row in enumerate(csv.DictReader(table.splitlines())):
        phantom = make_phantom(seed)
        files = {row["ct"]: phantom.hu}
        if row["lung_nodule_mask"] not in ("", "none"):
            bits = lesion_mask(phantom.lesions, LESION_BY_KEY["lung_nodule"])
            files[row["lung_nodule_mask"]] = bits.astype(np.uint8)
        for name, array in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(array, phantom.affine), folder / name)


@pytest.mark.slow
def test_the_tutorial_leads_from_six_files_and_a_table_to_a_trained_phase(tmp_path: Path) -> None:
    write_own_data(tmp_path / "my-data")
    (block,) = read_blocks("bash")
    commands = block.splitlines()
    assert len(commands) <= 6
    expected_lines = read_blocks("")[1].splitlines()
    outputs = []
    for command in commands:
        if not command.startswith(("make", "accelerate")):
            continue
        # The tiny size, and this checkout with its environment instead of a clone.
        command = command.replace("../my-data", str(tmp_path / "my-data"))
        if command.startswith("make"):
            command += " CONFIG=tiny"
        else:
            command += f" --config tiny train.runs={tmp_path / 'runs'}"
        done = subprocess.run(
            command,
            shell=True,
            cwd=CHECKOUT,
            env=environment(tmp_path),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}"
        outputs.append(done.stdout)
    preprocessed, verified, _ = outputs
    assert set(expected_lines) <= set(preprocessed.splitlines()), preprocessed
    assert "no faults, no notes" in verified
    steps = metrics(tmp_path / "runs/own/phase1")
    assert len(steps) == 8
    assert {"encoder", "classifier"} <= set(Checkpoint.open(tmp_path / "runs/own/phase1").parts)
