"""Validation while training.

What it measures, what it leaves alone, the best checkpoint, and ending early.
"""

import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import phantom_sample
from launches import (
    LAUNCH,
    STEPS,
    TWO,
    comparable,
    finish,
    kill,
    length,
    lines,
    metrics,
    run,
    settings,
    start,
    steps_done,
    wait_for,
)

from rectvlm.checkpoint import Checkpoint, TrainingState, run_folder
from rectvlm.checkpoint.integrity import UNLISTED_FILES
from rectvlm.config import Config, ValidationConfig, load_config
from rectvlm.data.dataset import ShardDataset, collate_samples
from rectvlm.data.loader import build_eval_loader
from rectvlm.data.shards import write_shards
from rectvlm.finding_thresholds import MIN_CASES_TO_FIT, NOT_FITTED, THRESHOLDS_FILE
from rectvlm.labels import FINDINGS, N_FINDINGS, N_LESIONS
from rectvlm.models import RectVLM
from rectvlm.train import loop
from rectvlm.train.budget import PhaseBudget
from rectvlm.train.early_stopping import has_stopped_early
from rectvlm.train.objectives import compute_losses
from rectvlm.train.phases import PHASES
from rectvlm.train.recovery.exit_codes import ExitCode, RunEnded
from rectvlm.train.recovery.position import TrainingPosition
from rectvlm.train.recovery.watchdog import RankActivity
from rectvlm.train.validation import ValidationResult
from rectvlm.train.validation_cases import (
    ScoredCase,
    compute_validation_metrics,
    fit_case_thresholds,
    read_reports,
    score_written_reports,
)
from rectvlm.types import Batch, Split, UserError

ONE = [*LAUNCH, "--num_processes", "1"]


def validation(phase: int | str, **choices: Any) -> list[str]:
    key = f"phase{phase}" if isinstance(phase, int) else phase
    return [f"train.phases.{key}.validation.{name}={value}" for name, value in choices.items()]


def write_history(folder: Path, values: list[float | None], metric: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(
        json.dumps({"step": 2 * k + 2, "metrics": {metric: v}}) + "\n" for k, v in enumerate(values)
    )
    (folder / "validation.jsonl").write_text(text + '{"step": 99, "met')


@pytest.mark.parametrize(
    ("metric", "values", "patience", "stops"),
    [
        ("loss", [3.0, 2.0, 2.5, 2.2], 2, True),
        ("loss", [3.0, 2.0, 2.5, 1.9], 2, False),
        ("loss", [3.0, 2.0, 2.5, 2.2], 3, False),
        ("loss", [3.0, 2.0, 2.5, 2.2], 0, False),
        ("macro_auroc", [0.5, 0.6, 0.6, 0.59], 2, True),  # as good is not better
        ("macro_auroc", [0.5, 0.6, 0.7, 0.8], 1, False),
        ("mean_dice", [None, None], 2, True),
        ("mean_dice", [None, 0.1, None], 2, False),
        ("loss", [], 1, False),
    ],
)
def test_patience(
    tmp_path: Path, metric: Any, values: list[float | None], patience: int, stops: bool
) -> None:
    write_history(tmp_path, values, metric)
    plan = ValidationConfig(
        every=0.5, cases=1, shown_cases=0, report_cases=0, best_metric=metric, patience=patience
    )
    assert has_stopped_early(tmp_path, plan) is stops
    assert not has_stopped_early(tmp_path / "elsewhere", plan)


def make_checkpoints(folder: Path, steps: list[int]) -> None:
    for step in steps:
        path = run_folder.step_folder(folder, step)
        path.mkdir(parents=True)
        state = TrainingState(phase=1, step=step, samples_seen=4 * step, world_size=1)
        Checkpoint(path, PHASES[1].parts, load_config("tiny"), state, {}).write_files({}, None)


def make_case(case_index: int, loss: float, probability: float) -> ScoredCase:
    """A case with one of the first two findings."""
    labels = np.zeros(N_FINDINGS, np.float32)
    labels[case_index % 2] = 1
    return ScoredCase(
        case_index=case_index,
        losses_by_task={"classification": loss},
        probabilities=np.full(N_FINDINGS, probability, np.float32),
        labels=labels,
        labels_known=np.ones(N_FINDINGS, bool),
        overlap_counts=None,
        lesions_annotated=np.zeros(N_LESIONS, bool),
    )


def test_one_case_that_gives_no_number_leaves_a_validation_without_figures(tiny: Config) -> None:
    """The others' mean would look better than the model is.

    And such a validation never beats the best so far.
    """

    def compute_metrics(*cases: ScoredCase) -> dict[str, float | None]:
        return compute_validation_metrics(cases, PHASES[1].tasks, tiny.train.loss_weights)

    good_case = make_case(0, 1.0, 0.5)
    good = compute_metrics(good_case, make_case(1, 2.0, 0.5))
    assert good["loss"] == pytest.approx(1.5) and good["macro_auroc"] is not None
    for bad_case in (make_case(1, math.nan, 0.5), make_case(1, 2.0, math.nan)):
        metrics = compute_metrics(good_case, bad_case)
        assert metrics.keys() == good.keys() and set(metrics.values()) == {None}


def test_thresholds_are_fitted_to_enough_cases_alone() -> None:
    """The third finding is never present, so that no case decides its threshold."""
    count = 2 * MIN_CASES_TO_FIT
    cases = [make_case(i, 1.0, 0.2 if i % 2 else 0.8) for i in range(count)]
    assert fit_case_thresholds(cases[1:], NOT_FITTED, "cases") is NOT_FITTED  # one too few
    fitted = fit_case_thresholds(cases, NOT_FITTED, "cases")
    # Present where the probability is high; else it is best to call all.
    assert fitted.values[:3].tolist() == pytest.approx([0.5, 0.2, 0.5])
    assert fitted.is_fitted.tolist() == [True, True] + [False] * (N_FINDINGS - 2)
    assert (fitted.source, fitted.n_cases) == ("cases", count)
    fewer = fit_case_thresholds(cases[:4], fitted, "fewer")
    assert fewer is fitted
    bad = [*cases, make_case(count, 1.0, math.nan)]
    assert fit_case_thresholds(bad, fitted, "bad") is fitted


def test_clinical_f1_reads_reports_and_counts_known_labels(tiny: Config) -> None:
    batch = collate_samples([phantom_sample(seed, tiny, "valid") for seed in (0, 1)])
    lung_nodule = FINDINGS.index("Lung nodule")
    batch.labels.zero_()
    batch.labels_known.fill_(True)
    batch.labels[:, lung_nodule] = 1
    texts = ["Findings: There is a nodule in the left lung.", "Findings: No pulmonary nodule."]
    reports = read_reports([4, 7], batch, texts)
    assert [report.case_index for report in reports] == [4, 7]
    assert [report.stated.nonzero()[0].tolist() for report in reports] == [[lung_nodule], []]
    assert score_written_reports(reports) == pytest.approx(2 / 3)  # one hit, one miss
    batch.labels_known[1, lung_nodule] = False
    assert score_written_reports(read_reports([4, 7], batch, texts)) == 1


def test_prompts_of_a_validation_hold_no_truth(
    tiny_run: Callable[[int], Path], tiny: Config
) -> None:
    """Other labels and outlines change the loss of a report in training, not in eval mode."""
    model = RectVLM.from_pretrained(tiny_run(3), "cpu")
    batch = collate_samples([phantom_sample(1, tiny, "valid")])
    batch.labels_known.fill_(True)
    batch.lesions_annotated.fill_(True)
    other = replace(
        batch, labels=1 - batch.labels, lesions=torch.where(batch.ct > 0, 31, 0).to(torch.uint8)
    )

    def compute_report_loss(batch: Batch, true_cue_share: float, training: bool) -> float:
        generator = model.config.generator.model_copy(update={"true_cue_share": true_cue_share})
        model.config = model.config.model_copy(update={"generator": generator})
        # The parts have no dropout and noise in eval mode; the cues depend on the model's mode.
        model.training = training
        with torch.no_grad():
            report_loss = model(batch).report_loss
        assert report_loss is not None
        return float(report_loss.per_sample)

    assert compute_report_loss(batch, 1.0, False) == compute_report_loss(other, 1.0, False)
    assert compute_report_loss(batch, 0.0, True) == compute_report_loss(batch, 1.0, False)
    assert compute_report_loss(batch, 1.0, True) != compute_report_loss(other, 1.0, True)


def test_reports_must_be_written_for_the_metric_that_reads_them() -> None:
    choices = [
        f"train.phases.phase3.validation.{choice}"
        for choice in ("every=1", "report_cases=0", "best_metric=clinical_f1")
    ]
    with pytest.raises(UserError, match="report_cases must be at least 1, not 0"):
        load_config("tiny", choices)


@pytest.mark.slow
def test_fitted_thresholds_reach_checkpoints_a_resumed_run_and_the_next_phase(
    tiny: Config, tmp_path: Path
) -> None:
    shards, runs = tmp_path / "shards", tmp_path / "runs"
    splits: list[Split] = ["train"] * 4 + ["valid"] * 40
    write_shards([phantom_sample(seed, tiny, split) for seed, split in enumerate(splits)], shards)
    choices = validation(1, every=0.3333, cases=40, shown_cases=0)
    command = [*TWO, "launch/phase1.py", *settings(1, shards, runs, 6), *choices]
    run(command, tmp_path)
    folder = runs / "tiny" / "phase1"
    last = run_folder.step_folder(folder, 6)
    thresholds = Checkpoint.open(last).read_thresholds()
    assert thresholds.is_fitted.sum() > 3 and thresholds.n_cases == 40
    assert "40 validation cases (tiny, phase phase1, step 6)" in thresholds.source
    assert thresholds.source in (last / "README.md").read_text()
    middle = Checkpoint.open(run_folder.step_folder(folder, 4)).read_thresholds()
    assert "step 4" in middle.source

    before = (last / THRESHOLDS_FILE).read_bytes()
    shutil.rmtree(last)
    run([*command, "--resume"], tmp_path)
    assert (last / THRESHOLDS_FILE).read_bytes() == before

    # Without validation a phase keeps the thresholds that it starts with.
    run([*TWO, "launch/phase2.py", *settings(2, shards, runs, 1)], tmp_path)
    second = Checkpoint.open(runs / "tiny" / "phase2")
    assert (second.folder / THRESHOLDS_FILE).read_bytes() == before


def test_the_best_is_kept_beside_the_newest(tmp_path: Path) -> None:
    make_checkpoints(tmp_path, [2, 4, 6, 8])
    assert run_folder.best_checkpoint(tmp_path) is None
    with pytest.raises(UserError, match=r"best\.json.*train more") as caught:
        run_folder.find_checkpoint(tmp_path / "best", "train more")
    assert "\n" not in str(caught.value)
    run_folder.record_best_checkpoint(tmp_path, 4, "loss", 1.5)
    run_folder.prune_checkpoints(tmp_path, 1)
    assert [path.name for path in run_folder.list_checkpoints(tmp_path)] == [
        "step-000004",
        "step-000008",
    ]
    assert run_folder.find_checkpoint(tmp_path, "").name == "step-000008"
    assert (
        run_folder.find_checkpoint(tmp_path / "best", "")
        == run_folder.best_checkpoint(tmp_path)
        == run_folder.step_folder(tmp_path, 4)
    )
    run_folder.record_best_checkpoint(tmp_path, None, "loss", None)
    assert run_folder.best_checkpoint(tmp_path) is None
    for damage in ("", "{", "[]", '{"step": "x"}', '{"step": 7}'):
        (tmp_path / "best.json").write_text(damage)
        assert run_folder.best_checkpoint(tmp_path) is None


def test_a_copy_is_no_checkpoint_and_what_cannot_be_removed_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_checkpoints(tmp_path, [2, 4, 6])
    shutil.copytree(
        run_folder.step_folder(tmp_path, 4), tmp_path / "checkpoints" / "step-000004-copy"
    )
    (tmp_path / "checkpoints" / ".step-000002.partial" / "held").mkdir(parents=True)
    run_folder.prune_checkpoints(tmp_path, 1)
    assert [path.name for path in run_folder.list_checkpoints(tmp_path)] == [
        "step-000002",
        "step-000006",
    ]
    assert "step-000002 could not be removed" in caplog.text
    assert (tmp_path / "checkpoints" / "step-000004-copy").is_dir()


class Order(NamedTuple):
    """What follows a step, in the order in which it happens."""

    did: list[str]
    ended: ExitCode | None


@pytest.mark.parametrize(
    ("step", "signal", "room", "better", "expected"),
    [
        (4, 0, True, True, Order(["save", "validate", "thresholds", "best"], None)),
        (4, 15, True, True, Order(["save"], ExitCode.STOPPED_BY_SIGNAL)),
        (2, 0, True, True, Order(["validate", "save", "best"], None)),
        (2, 0, True, False, Order(["validate"], None)),
        (
            2,
            0,
            False,
            True,
            Order(["validate", "full"], None),
        ),  # a best that is not on the disk is none
        (8, 0, True, False, Order(["save", "validate", "thresholds"], None)),
        (
            8,
            15,
            True,
            True,
            Order(["save"], ExitCode.STOPPED_BY_SIGNAL),
        ),  # the validation after the last step is made up too
        (8, 0, False, False, Order(["full", "validate"], ExitCode.WRITE_FAILED)),
        (3, 15, True, True, Order(["save"], ExitCode.STOPPED_BY_SIGNAL)),
        (3, 0, True, True, Order([], None)),
    ],
)
def test_weights_are_saved_before_they_are_validated(
    step: int,
    signal: int,
    room: bool,
    better: bool,
    expected: Order,
    tiny: Config,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Eight steps, a checkpoint every fourth, a validation every second.

    The thresholds that a validation fits are put into a checkpoint that was saved before it.
    """
    did: list[str] = []
    phase = tiny.train.phases["phase1"].model_copy(update={"samples": 32, "save_every": 0.5})
    config = tiny.model_copy(
        update={"train": tiny.train.model_copy(update={"phases": {"phase1": phase}})}
    )

    class FakeValidator:
        should_stop, is_done = False, False

        def is_due(self, position: TrainingPosition) -> bool:
            return position.step % 2 == 0 and not self.is_done

        def validate_if_due(
            self, position: TrainingPosition, heartbeat: Any
        ) -> ValidationResult | None:
            if not self.is_due(position):
                return None
            did.append("validate")
            self.is_done = True
            return ValidationResult(position.step, {}, [], 1.0 if better else None)

        def keep_best(self, result: ValidationResult) -> None:
            did.append("best")

    def save(*_: Any) -> bool:
        did.append("save" if room else "full")
        return room

    monkeypatch.setattr(loop, "save_checkpoint", save)
    monkeypatch.setattr(loop, "save_thresholds", lambda *_: did.append("thresholds"))
    fakes: dict[str, Any] = {
        "validator": FakeValidator(),
        "engine": SimpleNamespace(
            is_main=True, model=SimpleNamespace(module=SimpleNamespace(thresholds=NOT_FITTED))
        ),
        "run_log": SimpleNamespace(fsync_logs=lambda: None, log_validation=lambda _: None),
        "watchdog": SimpleNamespace(record_heartbeat=lambda: None, activity=RankActivity()),
    }
    unused = dict.fromkeys(("trainer", "bad_steps_log"))
    training = loop.TrainingLoop(
        phase=PHASES[1],
        config=config,
        budget=PhaseBudget.plan(phase, sample_count=6, world_size=2),
        folder=Path(),
        saved_names=[],
        position=TrainingPosition(step, 4 * step),
        saved_step=0,
        **fakes,
        **unused,
    )
    ended = None
    try:
        training.save_and_validate(signal)
    except RunEnded as error:
        ended = error.exit_code
    assert Order(did, ended) == expected


@pytest.mark.slow
def test_validation_leaves_the_training_alone(
    launched_phase1: Path, phantom_shards: Path, tmp_path: Path
) -> None:
    """The run of the fixture again, with validation and an average of the weights.

    It keeps one checkpoint.
    """
    short = [
        "train.phases.phase1.samples=12",
        "train.phases.phase1.global_batch=2",
        "train.phases.phase1.save_every=1",
        f"data.shards={phantom_shards}",
        "train.keep_checkpoints=1",
    ]
    choices = [
        *validation(1, every=0.3333, cases=8, best_metric="loss"),
        "train.phases.phase1.ema_decay=0.5",
    ]
    run(
        [*ONE, "launch/phase1.py", "--config", "tiny", f"train.runs={tmp_path}", *short, *choices],
        tmp_path,
    )
    folder = tmp_path / "tiny" / "phase1"
    assert comparable(folder) == comparable(launched_phase1)

    found = lines(folder / "validation.jsonl")
    assert [line["step"] for line in found] == [2, 4, 6]
    best = min(found, key=lambda line: line["metrics"]["loss"])
    noted = json.loads((folder / "best.json").read_text())
    assert noted == {"step": best["step"], "metric": "loss", "value": best["metrics"]["loss"]}
    assert {path.name for path in run_folder.list_checkpoints(folder)} == {
        f"step-{best['step']:06d}",
        "step-000006",
    }
    ours, plain = (Checkpoint.open(f).read_tensors() for f in (folder, launched_phase1))
    assert any(
        not torch.equal(ours[name], plain[name]) for name in ours
    )  # the average, not the last weights

    # The last line is what the saved weights say.
    model = RectVLM.from_pretrained(folder, "cpu")
    config = model.config
    each = []
    with torch.no_grad():
        for batch in build_eval_loader(config.data, "valid", 1):
            loss = compute_losses(
                model(batch), batch, ("classification",), config.train.localization_loss_weights
            )["classification"]
            each.append(loss.value.item())
    assert len(each) == len(ShardDataset(config.data, "valid"))
    # The run computes in bf16.
    assert found[-1]["metrics"]["loss_classification"] == pytest.approx(
        sum(each) / len(each), abs=0.01
    )


@pytest.mark.slow
def test_a_validation_that_was_left_out_is_made_up(phantom_shards: Path, tmp_path: Path) -> None:
    """A run asked to end after step 4 saved first; the one that goes on validates before step 5."""
    command = [
        *ONE,
        "launch/phase1.py",
        *settings(1, phantom_shards, tmp_path, 8),
        *validation(1, every=0.5, shown_cases=0),
    ]
    run(command, tmp_path)
    folder = tmp_path / "tiny" / "phase1"
    unbroken = lines(folder / "validation.jsonl")
    before = comparable(folder)
    shutil.rmtree(run_folder.step_folder(folder, 8))
    (folder / "validation.jsonl").write_text("")
    kept = run_folder.step_folder(folder, 4)

    def inodes() -> dict[Path, int]:
        """Of all but the card, which names the thresholds that the validation fits."""
        files = [path for path in kept.rglob("*") if path.name not in UNLISTED_FILES]
        return {path: path.stat().st_ino for path in files}

    saved = inodes()
    run([*command, "--resume"], tmp_path)
    assert inodes() == saved  # never written over
    assert lines(folder / "validation.jsonl") == unbroken and [
        line["step"] for line in unbroken
    ] == [4, 8]
    assert comparable(folder) == before


@pytest.mark.slow
def test_patience_ends_a_run_and_the_next_begins_anew(phantom_shards: Path, tmp_path: Path) -> None:
    # Of one case no AUROC is known, so no validation is ever better.
    choices = [*validation(1, every=2 / STEPS, cases=1, best_metric="macro_auroc", patience=2)]
    command = [*TWO, "launch/phase1.py", *settings(1, phantom_shards, tmp_path), *choices]
    run(command, tmp_path)
    folder = tmp_path / "tiny" / "phase1"
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3, 4]
    assert run_folder.find_checkpoint(folder, "").name == "step-000004"
    assert not (folder / "best.json").exists()
    run([*command, "--resume"], tmp_path)  # it has ended, and stays so
    assert len(metrics(folder)) == 4
    run(command, tmp_path)
    assert len(metrics(folder.with_name("phase1.earlier-1"))) == len(metrics(folder)) == 4


@pytest.fixture(scope="module")
def outlined(tmp_path_factory: pytest.TempPathFactory, phantom_shards: Path) -> Path:
    """A folder of runs with phases 1 and 2, on two processes."""
    folder = tmp_path_factory.mktemp("outlined")
    for phase in (1, 2):
        run(
            [*TWO, f"launch/phase{phase}.py", *settings(phase, phantom_shards, folder, steps=4)],
            folder,
        )
    return folder


CHOICES = [
    *validation(3, every=0.5, cases=3, shown_cases=1, report_cases=3, best_metric="clinical_f1"),
    "train.phases.phase3.ema_decay=0.8",
    "train.weighting=uncertainty",
    "train.phases.phase3.unfreeze=[{part: encoder, last_blocks: 1, start: 0.5}]",
    "generator.max_report_tokens=24",  # of which validation writes all
]


@pytest.mark.slow
def test_everything_at_once_resumes_to_the_last_digit(
    outlined: Path, phantom_shards: Path, tmp_path: Path
) -> None:
    """ZeRO-3 and NF4 on two ranks: average, learned weights, late parts, validation.

    Unbroken, cut off, and unvalidated.
    """
    folders = {}
    for name in ("whole", "cut", "blind"):
        folders[name] = tmp_path / name / "tiny" / "phase3"
        shutil.copytree(outlined / "tiny" / "phase2", tmp_path / name / "tiny" / "phase2")
    steps = 6
    run(
        [
            *TWO,
            "launch/phase3.py",
            *settings(3, phantom_shards, tmp_path / "whole", steps),
            *CHOICES,
        ],
        tmp_path,
    )
    blind = [
        *settings(3, phantom_shards, tmp_path / "blind", steps),
        *CHOICES,
        *validation(3, every=0),
    ]
    run([*TWO, "launch/phase3.py", *blind], tmp_path)
    command = [
        *TWO,
        "launch/phase3.py",
        *settings(3, phantom_shards, tmp_path / "cut", steps),
        *CHOICES,
    ]
    process, cut = start(command, tmp_path), folders["cut"]
    wait_for(lambda: steps_done(cut) >= 5, process)
    kill(process)
    run([*command, "--resume"], tmp_path)

    whole = comparable(folders["whole"])
    assert comparable(cut) == whole
    assert comparable(folders["blind"]) == whole
    assert lines(cut / "validation.jsonl") == lines(folders["whole"] / "validation.jsonl")
    assert [line["step"] for line in lines(cut / "validation.jsonl")] == [3, 6]
    names = [
        "loss",
        *(f"loss_{task}" for task in PHASES[3].tasks),
        "macro_auroc",
        "macro_average_precision",
    ]
    validated = lines(cut / "validation.jsonl")[0]["metrics"]
    assert set(validated) == {*names, "mean_dice", "clinical_f1"}
    assert 0 <= validated["clinical_f1"] <= 1
    assert (cut / "best.json").read_text() == (folders["whole"] / "best.json").read_text()
    weights = [Checkpoint.open(folder).read_tensors() for folder in folders.values()]
    assert not any("weighting" in name for name in weights[0])
    for other in weights[1:]:
        assert other.keys() == weights[0].keys()
        assert all(torch.equal(other[name], weights[0][name]) for name in other)

    factors = [line["task_weights"] for line in whole]
    assert factors[0] != factors[-1]
    before = Checkpoint.open(folders["whole"].with_name("phase2")).read_tensors()
    moved = {name for name in before if not torch.equal(before[name], weights[0][name])}
    assert not any(name.startswith("encoder.blocks.0.") for name in moved)
    assert any(name.startswith("encoder.blocks.1.") for name in moved)


@pytest.mark.slow
def test_sub_steps_train_their_part_alone_and_the_joint_phases_start_from_them(
    outlined: Path, phantom_shards: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(outlined / "tiny" / "phase1", folder / "phase1")

    def go(phase: int, key: str, *more: str) -> Path:
        short = [
            *length(key, 2),
            *validation(key, every=1, cases=2),
        ]
        common = ["--config", "tiny", f"data.shards={phantom_shards}", f"train.runs={tmp_path}"]
        run([*TWO, f"launch/phase{phase}.py", *common, *short, *more], tmp_path)
        return folder / key

    def changed(before: Path, after: Path) -> set[str]:
        old, new = (Checkpoint.open(path).read_tensors() for path in (before, after))
        return {name.partition(".")[0] for name in old if not torch.equal(old[name], new[name])}

    localize = go(2, "phase2-localize", "--stage", "localize")
    assert localize.name == "phase2-localize"
    assert changed(folder / "phase1", localize) == set()
    assert list(metrics(localize)[0]["losses"]) == ["localization"]
    joint = go(2, "phase2", "--from", str(localize))
    assert changed(localize, joint) == {"encoder", "classifier", "localizer"}
    align = go(3, "phase3-align", "--stage", "align", "--from", "best")
    assert changed(joint, align) == set()
    assert list(metrics(align)[0]["losses"]) == ["report"]
    aligned = Checkpoint.open(align)
    assert (aligned.training.phase, aligned.training.stage) == (3, "align")
    assert aligned.parts == PHASES[3].parts
    last = go(3, "phase3", "--from", str(align / "best"))
    assert changed(align, last) == {"encoder", "classifier", "localizer", "generator"}


@pytest.mark.slow
def test_mistakes_with_sub_steps_are_one_sentence(phantom_shards: Path, tmp_path: Path) -> None:
    common = ["--config", "tiny", f"data.shards={phantom_shards}", f"train.runs={tmp_path}"]
    mistakes = {
        "Phase 1 has no phase before it": ["launch/phase1.py", "--from", "best"],
        "best.json": ["launch/phase2.py", "--from", "best"],
        "No checkpoint in nowhere": ["launch/phase2.py", "--from", "nowhere"],
    }
    running = {
        said: start([sys.executable, *command, *common], tmp_path)
        for said, command in mistakes.items()
    }
    for said, process in running.items():
        code, stderr = finish(process)
        assert code == 2, stderr
        sentences = [line for line in stderr.splitlines() if line.startswith("error: ")]
        assert len(sentences) == 1, stderr
        assert said in sentences[0]
