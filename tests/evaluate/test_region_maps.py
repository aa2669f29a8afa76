"""Region maps in an evaluation: counted, and hidden where it is to see what prediction sees."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import phantom_sample

from rectvlm import cli
from rectvlm.config import Config
from rectvlm.data.shards import write_shards
from rectvlm.evaluate import thresholds
from rectvlm.evaluate.options import EvaluationOptions
from rectvlm.evaluate.run import evaluate_checkpoint
from rectvlm.types import COARSE_REGIONS_SOURCE, Sample, Split


def without_map(sample: Sample) -> Sample:
    """As `rectvlm predict` reads a CT."""
    return replace(
        sample,
        regions=np.zeros_like(sample.regions),
        meta=replace(sample.meta, regions_source=None),
    )


@pytest.fixture(scope="module")
def samples(tiny: Config) -> list[Sample]:
    """Six cases to fit on, three to evaluate: with a map, with a coarse map, without one."""
    splits: list[Split] = ["train"] * 6 + ["valid"] * 3
    made = [phantom_sample(seed, tiny, split) for seed, split in enumerate(splits)]
    made[7] = replace(made[7], meta=replace(made[7].meta, regions_source=COARSE_REGIONS_SOURCE))
    made[8] = without_map(made[8])
    return made


def copied(run: Path, folder: Path) -> Path:
    shutil.rmtree(folder / "run", ignore_errors=True)
    shutil.copytree(run, folder / "run")
    return folder / "run"


def evaluated(run: Path, samples: list[Sample], folder: Path, **options: Any) -> dict[str, Any]:
    """Results of an evaluation on a copy of the run."""
    run = copied(run, folder)
    shards = folder / "shards"
    if not shards.exists():
        write_shards(samples, shards)
    out = folder / "metrics.json"
    result = evaluate_checkpoint(
        run,
        shards,
        out,
        device="cpu",
        options=EvaluationOptions(plots=False, bootstrap=0, **options),
    )
    assert result is not None
    rows = [json.loads(line) for line in (folder / "cases.jsonl").read_text().splitlines()]
    reports = folder / "reports.jsonl"
    return {
        "metrics": result.as_dict(),
        "page": out.with_name("metrics.md").read_text(),
        "probabilities": [row["probabilities"] for row in rows],
        "lesions": [row["lesions"] for row in rows],
        "regions": [row["regions"] for row in rows],
        "reports": reports.read_text() if reports.exists() else None,
    }


def test_region_maps_are_counted(
    tiny_run: Callable[[int], Path],
    samples: list[Sample],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(thresholds, "MIN_CASES_TO_FIT", 1)
    found = evaluated(tiny_run(1), samples, tmp_path)
    metrics = found["metrics"]
    assert (
        metrics["n_cases"],
        metrics["n_with_region_map"],
        metrics["n_with_coarse_region_map"],
    ) == (3, 2, 1)
    assert metrics["regions_hidden"] is False and found["regions"] == [
        "phantom",
        COARSE_REGIONS_SOURCE,
        None,
    ]
    assert "Region maps: 2 volumes, 1 of them coarse." in found["page"]
    assert "region maps: 6 volumes" in metrics["thresholds"]["source"]


@pytest.mark.slow
def test_hidden_maps_give_what_prediction_sees(
    tiny_run: Callable[[int], Path], samples: list[Sample], tmp_path: Path
) -> None:
    """The results are those of the same CTs without maps, and mix with none with maps."""
    run = tiny_run(3)
    shown = evaluated(run, samples, tmp_path / "one", limit=2)
    hidden = evaluated(run, samples, tmp_path / "one", limit=2, hide_regions=True)
    bare = evaluated(run, [without_map(sample) for sample in samples], tmp_path / "bare", limit=2)
    for name in ("probabilities", "lesions", "regions", "reports"):
        assert hidden[name] == bare[name]
    assert hidden["probabilities"] != shown["probabilities"]
    ours, other = hidden["metrics"]["fingerprint"], shown["metrics"]["fingerprint"]
    assert ours["options"]["hide_regions"] is True and ours != other
    assert len(list((tmp_path / "one" / "cases").iterdir())) == 2
    metrics = hidden["metrics"]
    assert (metrics["n_with_region_map"], metrics["regions_hidden"]) == (0, True)
    assert "Region maps: hidden, as in prediction." in hidden["page"]
    assert metrics["thresholds"]["values"] == bare["metrics"]["thresholds"]["values"]


def test_the_command_hides_them(
    tiny_run: Callable[[int], Path], phantom_shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "metrics.json"
    command = [
        "evaluate",
        "--checkpoint",
        str(copied(tiny_run(1), tmp_path)),
        "--shards",
        str(phantom_shards),
    ]
    more = [
        "--out",
        str(out),
        "--device",
        "cpu",
        "--no-plots",
        "--bootstrap",
        "0",
        "--hide-regions",
    ]
    assert cli.main([*command, *more]) == 0
    assert json.loads(out.read_text())["regions_hidden"] is True
