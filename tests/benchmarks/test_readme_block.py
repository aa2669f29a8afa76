"""The README's table of a run."""

from pathlib import Path

import pytest

from benchmarks import readme_block

RESULTS = Path(readme_block.__file__).parent / "results"


def test_the_table_shows_ours_beside_others_with_the_command() -> None:
    block = readme_block.make_block(RESULTS / "attention-1x-nvidia-h200-2026-11-27")
    (line,) = [line for line in block.splitlines() if line.startswith("| Attention ")]
    assert "(patches: 16384)" in line and "FlexAttention" in line and "plain, no biases" in line
    assert "`python -m benchmarks.attention`" in line


def test_a_folder_without_these_figures_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    folder = RESULTS / "encoder-1x-nvidia-h200-2026-11-27"
    assert readme_block.main([str(folder)]) == 1
    assert "has none of the README's figures" in capsys.readouterr().err
