"""The programs and the notebooks of docs/examples run."""

import importlib.util
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
every_notebook = pytest.mark.parametrize(
    "path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.stem
)


def load_program(path: Path) -> ModuleType:
    """A program of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plain_training_trains_both_phases_and_scores_them(
    phantom_shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = tmp_path / "weights.safetensors"
    arguments = ["--config", "tiny", "--steps", "4", "--out", str(weights)]
    with caplog.at_level("INFO"):
        scores = load_program(EXAMPLES / "train_plain.py").main(
            [*arguments, f"data.shards={phantom_shards}"]
        )
    assert scores["macro_auroc"] is not None and 0 <= scores["macro_auroc"] <= 1
    assert scores["mean_dice"] is not None and 0 <= scores["mean_dice"] <= 1
    parts = {name.partition(".")[0] for name in load_file(weights)}
    assert parts == {"encoder", "classifier", "localizer", "prompts"}
    for phase in (1, 2):
        assert f"phase {phase} step 4 of 4" in caplog.text


@every_notebook
def test_notebooks_are_kept_without_outputs(path: Path) -> None:
    """A difference between two versions is then code and words, and no figure is out of date."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


@pytest.mark.slow
@every_notebook
def test_notebooks_run_from_the_first_cell_to_the_last(path: Path) -> None:
    notebook = load_program(EXAMPLES.parent / "build_site.py").run_notebook(path)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    text = "".join(output.get("text", "") for output in outputs)
    expected = {"first-look": "lesions  (1, 5, 16, 48, 48)", "train-on-own-data": "probability"}
    assert expected[path.stem] in text
