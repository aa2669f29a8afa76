"""A launch with a mistake in it ends before libraries are imported that take seconds."""

import sys
from pathlib import Path

import pytest
from launches import CHECKOUT, HEAVY_LIBRARIES, imported_libraries

LAUNCHES = {
    "phase1.py --help": (0, "usage: "),
    "phase1.py --config dmo": (2, "No configuration 'dmo'"),
    "phase1.py --config tiny data.shard=x": (2, "did you mean 'shards'"),
    "phase1.py --config tiny data.shards={}/none": (2, "No shards in "),
    "phase1.py --config tiny --ds-config none.json": (2, "none.json cannot be read"),
    "phase1.py --config tiny --resume train.runs={}/none": (2, "there is nothing to resume"),
    "phase1.py --config tiny encoder.init={}/vit": (2, "No weights at "),
    "phase2.py --config tiny train.runs={}/none": (2, "No checkpoint in "),
    "phase3.py --config tiny --from {}/none": (2, "No checkpoint in "),
}


@pytest.mark.parametrize("launch", LAUNCHES)
def test_a_mistake_is_told_before_anything_heavy_is_imported(launch: str, tmp_path: Path) -> None:
    script, *words = launch.format(tmp_path).split()
    command = [sys.executable, "-X", "importtime", f"launch/{script}", *words]
    code, output, libraries = imported_libraries(command, CHECKOUT)
    expected_code, sentence = LAUNCHES[launch]
    assert code == expected_code and sentence in output
    assert not libraries & HEAVY_LIBRARIES
    assert not list(tmp_path.iterdir())
