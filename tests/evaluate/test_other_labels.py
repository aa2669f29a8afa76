"""Labels of another table beside those of the shards, on the same predictions."""

import csv
import json
from pathlib import Path

import pytest

from rectvlm.data.shards import read_index, read_sample
from rectvlm.data.store import ShardStore
from rectvlm.evaluate.options import EvaluationOptions
from rectvlm.evaluate.run import evaluate_checkpoint
from rectvlm.files import file_sha256
from rectvlm.labels import FINDINGS
from rectvlm.types import UserError


@pytest.fixture
def table(phantom_shards: Path, tmp_path: Path) -> Path:
    """The labels of the shards' valid split, with the first finding inverted where it is known."""
    path = tmp_path / "refined.csv"
    store = ShardStore(str(phantom_shards))
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["VolumeName", *FINDINGS])
        for location in read_index(phantom_shards).select_split("valid"):
            labels = dict(read_sample(store, location).meta.labels)
            if labels[FINDINGS[0]] is not None:
                labels[FINDINGS[0]] = 1 - labels[FINDINGS[0]]
            writer.writerow([location.key, *labels.values()])
    return path


def test_both_sets_of_labels_stand_side_by_side(tiny_run, table: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "metrics.json"
    options = EvaluationOptions(labels=table, reports=False, plots=False, bootstrap=20)
    evaluate_checkpoint(tiny_run(1), out=out, device="cpu", options=options)
    result = json.loads(out.read_text())
    other = result["other_labels"]
    assert (other["file"], other["sha256"]) == ("refined.csv", file_sha256(table))
    of_shards = result["classification"]["per_finding"]
    of_file = other["classification"]["per_finding"]
    first, *unchanged = FINDINGS
    assert all(of_file[finding] == of_shards[finding] for finding in unchanged)
    n_known = of_shards[first]["n_known"]
    assert of_file[first]["n_positive"] == n_known - of_shards[first]["n_positive"]
    assert other["agreement"][first] == {"n_known": n_known, "n_alike": 0}
    assert other["agreement"][unchanged[0]]["n_alike"] == of_shards[unchanged[0]]["n_known"]
    page = out.with_name("metrics.md").read_text()
    assert f"`refined.csv` (SHA-256 {other['sha256']})" in page and f"| 0 of {n_known} |" in page


def test_a_case_without_labels_is_refused_before_any_prediction(
    tiny_run, table: Path, tmp_path: Path
) -> None:
    header, _, *others = table.read_text().splitlines(keepends=True)
    table.write_text("".join([header, *others]))
    options = EvaluationOptions(labels=table, reports=False)
    with pytest.raises(UserError, match=r"refined\.csv lacks 1 of 3 cases"):
        evaluate_checkpoint(tiny_run(1), out=tmp_path / "o.json", device="cpu", options=options)
    assert not (tmp_path / "cases").exists()
