"""Whether a checkpoint was chosen on the cases that it is evaluated on."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import phantom_sample

from rectvlm.checkpoint import Checkpoint, TrainingState, run_folder
from rectvlm.config import Config, load_config
from rectvlm.data.shards import write_shards
from rectvlm.evaluate.options import EvaluationOptions
from rectvlm.evaluate.run import evaluate_checkpoint
from rectvlm.evaluate.selection import are_same_shards, was_selected_on
from rectvlm.evaluate.tables import render_markdown

PLANNED = 12
EVERY = [
    f"train.phases.phase1.{value}" for value in ("validation.every=0.33", "validation.patience=2")
]


def state_of(step: int) -> TrainingState:
    return TrainingState(phase=1, step=step, samples_seen=step, world_size=1)


def a_run(
    folder: Path, last: int, best: int | None, config: Config, state: str = "finished"
) -> Path:
    """A phase's folder with a checkpoint every four steps, as training leaves it."""
    steps = range(4, last + 1, 4)
    for step in steps:
        run_folder.step_folder(folder, step).mkdir(parents=True)
        (run_folder.step_folder(folder, step) / run_folder.MODEL_CONFIG_FILE).write_text("{}")
    for name in ("metrics.jsonl", "validation.jsonl"):
        (folder / name).write_text(
            "".join(json.dumps({"step": step, "metrics": {}}) + "\n" for step in steps)
        )
    if best is not None:
        run_folder.record_best_checkpoint(folder, best, "loss", 0.5)
    (folder / "config.yaml").write_text(config.to_yaml())
    (folder / "run.json").write_text(json.dumps({"sessions": [{"state": state, "steps": PLANNED}]}))
    return folder


def chosen(folder: Path, step: int, config: Config, **other: Any) -> bool | None:
    asked: dict[str, Any] = {"split": "valid", "has_training_shards": True} | other
    return was_selected_on(run_folder.step_folder(folder, step), config, state_of(step), **asked)


@pytest.fixture(scope="module")
def validating() -> Config:
    return load_config("tiny", EVERY)


def test_the_best_of_a_run_was_chosen_on_the_valid_split(
    validating: Config, tmp_path: Path
) -> None:
    run = a_run(tmp_path / "phase1", PLANNED, best=8, config=validating)
    assert [chosen(run, step, validating) for step in (4, 8, 12)] == [False, True, False]
    assert chosen(run, 8, validating, split="train") is False
    # Other shards have another valid split; where they cannot be compared, only what was not
    # chosen is known.
    assert chosen(run, 8, validating, has_training_shards=False) is False
    assert (
        chosen(run, 8, validating, has_training_shards=None) is None
        and chosen(run, 4, validating, has_training_shards=None) is False
    )


def test_where_there_is_a_dev_split_it_alone_chose(validating: Config, tmp_path: Path) -> None:
    run = a_run(tmp_path / "phase1", PLANNED, best=8, config=validating)
    for split, is_chosen in (("dev", True), ("valid", False), ("grounding", False)):
        asked = {"split": split, "selection_split": "dev"}
        assert chosen(run, 8, validating, **asked) is is_chosen
        # Shards that cannot be compared may have been validated on either.
        expected = None if split != "grounding" else False
        assert chosen(run, 8, validating, **asked, has_training_shards=None) is expected


def test_the_last_of_a_run_that_patience_ended_was_chosen(
    validating: Config, tmp_path: Path
) -> None:
    run = a_run(tmp_path / "phase1", 8, best=None, config=validating)
    assert [chosen(run, step, validating) for step in (4, 8)] == [False, True]
    without = load_config("tiny", [*EVERY, "train.phases.phase1.validation.patience=0"])
    assert chosen(run, 8, without) is False
    killed = a_run(tmp_path / "killed" / "phase1", 8, best=None, config=validating, state="stopped")
    assert chosen(killed, 8, validating) is False


def test_without_validation_nothing_was_chosen_and_without_its_run_it_is_not_known(
    validating: Config, tmp_path: Path
) -> None:
    run = a_run(tmp_path / "phase1", PLANNED, best=8, config=validating)
    silent = load_config("tiny", [*EVERY, "train.phases.phase1.validation.every=0"])
    copy = tmp_path / "copy"
    shutil.copytree(run_folder.step_folder(run, 8), copy)
    assert was_selected_on(copy, validating, state_of(8), "valid", True) is None
    assert was_selected_on(copy, silent, state_of(8), "valid", True) is False
    (run / "validation.jsonl").unlink()
    assert chosen(run, 8, validating) is None


def test_a_folder_named_from_within_is_the_same(
    validating: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(tmp_path / "phase1", PLANNED, best=8, config=validating)
    monkeypatch.chdir(run_folder.step_folder(run, 8))
    assert was_selected_on(Path(), validating, state_of(8), "valid", True) is True
    monkeypatch.chdir(tmp_path)
    assert chosen(Path("phase1"), 8, validating) is True


def test_shards_that_were_moved_are_the_same(tiny: Config, tmp_path: Path) -> None:
    for name, seed in (("one", 8), ("other", 9)):
        write_shards([phantom_sample(seed, tiny, "valid")], tmp_path / name)
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    one = str(tmp_path / "one")
    assert are_same_shards(one, one) and are_same_shards("unread://", "unread://")
    assert (
        are_same_shards(str(tmp_path / "moved"), one) is True
        and are_same_shards(str(tmp_path / "other"), one) is False
    )
    assert (
        are_same_shards(one, str(tmp_path / "gone")) is None
        and are_same_shards(one, "unread://x") is None
    )


def test_the_metrics_say_so(
    tiny_run: Callable[[int], Path], tiny: Config, phantom_shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "phase1"
    shutil.copytree(tiny_run(1), run)
    folder = run_folder.find_checkpoint(run, "")
    config = load_config("tiny", [*EVERY, f"data.shards={phantom_shards}"])
    replace(Checkpoint.open(folder), config=config).write_config()
    (folder / "manifest.json").unlink()
    (run / "validation.jsonl").write_text("")
    run_folder.record_best_checkpoint(run, Checkpoint.open(folder).training.step, "loss", 0.5)

    def said(where: Path, **options: Any) -> tuple[Any, str]:
        result = evaluate_checkpoint(
            where,
            out=tmp_path / "m.json",
            device="cpu",
            options=EvaluationOptions(fit_limit=2, plots=False, bootstrap=0, limit=1, **options),
        )
        assert result is not None
        assert (
            json.loads((tmp_path / "m.json").read_text())["selected_on_this_split"]
            == result.selected_on_this_split
        )
        return result.selected_on_this_split, render_markdown(result)

    yes, page = said(run / run_folder.BEST_CHECKPOINT)
    assert yes is True and "chose this checkpoint on cases of this split" in page
    no, page = said(run, split="train")
    assert no is False and "chose this checkpoint" not in page
    shutil.copytree(folder, tmp_path / "copy")
    unknown, page = said(tmp_path / "copy")
    assert unknown is None and "is not known" in page
