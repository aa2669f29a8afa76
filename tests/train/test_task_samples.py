"""Runs that would learn nothing are refused before they start, with counts."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from launches import CHECKOUT, environment, settings

from rectvlm.config import load_config
from rectvlm.data.dataset import ShardDataset
from rectvlm.data.shards import write_shards
from rectvlm.models.language_model import load_language_model
from rectvlm.models.report_generator import ReportGenerator
from rectvlm.pretrained import resolve_model
from rectvlm.train.phases import PHASES, STAGES
from rectvlm.train.task_samples import log_cut_reports, require_something_to_learn
from rectvlm.types import Sample, SampleMeta, Split, UserError


@pytest.fixture
def samples(phantom_shards: Path) -> list[Sample]:
    """Six samples to train on and three to validate."""
    config = load_config("tiny", [f"data.shards={phantom_shards}"])
    samples = []
    for split in ("train", "valid"):
        dataset = ShardDataset(config.data, split)
        samples += [dataset[number] for number in range(len(dataset))]
    return samples


def without_labels(meta: SampleMeta) -> SampleMeta:
    return replace(meta, labels=dict.fromkeys(meta.labels))


def without_masks(meta: SampleMeta) -> SampleMeta:
    return replace(meta, lesions_annotated=dict.fromkeys(meta.lesions_annotated, False))


def with_blank_reports(meta: SampleMeta) -> SampleMeta:
    return replace(meta, findings=" \n", impression="")


@pytest.fixture
def make_shards(
    samples: list[Sample], tmp_path: Path
) -> Callable[[Callable[[SampleMeta], SampleMeta], tuple[Split, ...]], Path]:
    """Shards whose samples of some splits lack something."""

    def make(change: Callable[[SampleMeta], SampleMeta], splits: tuple[Split, ...]) -> Path:
        changed = []
        for sample in samples:
            meta = change(sample.meta) if sample.meta.split in splits else sample.meta
            changed.append(replace(sample, meta=meta))
        write_shards(changed, tmp_path)
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("change", "phase", "expected"),
    [
        (without_labels, PHASES[1], "0 have a known label, so phase 1 has nothing to learn "),
        (
            without_masks,
            PHASES[2],
            "6 have a known label, 0 have outlined lesions, so phase 2 has nothing to learn "
            "localization from: give shards that have them, or train without with "
            "train.loss_weights.localization=0.",
        ),
        (without_masks, STAGES["localize"], "0 have outlined lesions, so phase 2 has nothing"),
        (
            lambda meta: without_masks(without_labels(meta)),
            STAGES["labels"],
            "0 have a known label, 0 have a label of a lesion's finding, so phase 2 has nothing",
        ),
        (with_blank_reports, STAGES["align"], "0 have a report, so phase 3 has nothing to learn"),
        (
            lambda meta: with_blank_reports(without_labels(meta)),
            PHASES[3],
            "0 have a known label, 6 have outlined lesions, 0 have a report, so phase 3 has "
            "nothing to learn classification and report from",
        ),
    ],
)
def test_a_split_without_what_a_task_needs_is_refused_with_counts(
    change: Callable[[SampleMeta], SampleMeta], phase: object, expected: str, make_shards: Callable
) -> None:
    config = load_config("tiny", [f"data.shards={make_shards(change, ('train',))}"])
    with pytest.raises(UserError) as refusal:
        require_something_to_learn(phase, config)
    assert str(refusal.value).startswith("Of the 6 samples of the split 'train' in ")
    assert expected in str(refusal.value)


def test_a_task_of_weight_0_needs_nothing_and_one_sample_is_enough(make_shards: Callable) -> None:
    shards = make_shards(
        lambda meta: meta if meta.key == "phantom_2" else without_masks(meta), ("train",)
    )
    require_something_to_learn(PHASES[2], load_config("tiny", [f"data.shards={shards}"]))
    shards = make_shards(without_masks, ("train",))
    require_something_to_learn(STAGES["labels"], load_config("tiny", [f"data.shards={shards}"]))
    shards = make_shards(without_masks, ("train", "valid"))
    overrides = [
        f"data.shards={shards}",
        "train.loss_weights.localization=0",
        "train.phases.phase2.validation.best_metric=macro_auroc",
    ]
    require_something_to_learn(PHASES[2], load_config("tiny", overrides))


def test_a_validation_that_measures_nothing_is_refused(make_shards: Callable) -> None:
    shards = make_shards(without_labels, ("valid",))
    overrides = [f"data.shards={shards}", "train.phases.phase1.validation.every=0.5"]
    with pytest.raises(
        UserError, match=r"Of the 3 samples of the split 'valid' .*, 0 have a known label, which "
    ):
        require_something_to_learn(PHASES[1], load_config("tiny", overrides))
    overrides[1] = "train.phases.phase1.validation.every=0"
    require_something_to_learn(PHASES[1], load_config("tiny", overrides))


def test_validation_measures_on_the_dev_split_where_there_is_one(
    samples: list[Sample], tmp_path: Path
) -> None:
    """Labels of valid are no help when dev, which validation reads, has none."""
    changed = []
    for sample in samples:
        meta = sample.meta
        if meta.split == "train" and meta.key in ("phantom_4", "phantom_5"):
            meta = without_labels(replace(meta, split="dev"))
        changed.append(replace(sample, meta=meta))
    write_shards(changed, tmp_path)
    overrides = [f"data.shards={tmp_path}", "train.phases.phase1.validation.every=0.5"]
    config = load_config("tiny", overrides)
    assert ShardDataset.open_selection_split(config.data).split == "dev"
    words = r"Of the 2 samples of the split 'dev'.*0 have a known label"
    with pytest.raises(UserError, match=words):
        require_something_to_learn(PHASES[1], config)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.loss_weights.classification=0", "is 0 for classification, all that phase 1 learns"),
        ("train.phases.phase1.lr={encoder: 0, classifier: 0}", "let no part train within"),
        (
            "train.phases.phase1={unfreeze}",
            "let no part train within",
        ),
    ],
)
def test_weights_and_rates_that_teach_nothing_are_refused(
    override: str, expected: str, phantom_shards: Path
) -> None:
    overrides = [f"data.shards={phantom_shards}", override]
    if "unfreeze" in override:
        late = "{part: encoder, last_blocks: null, start: 0.99}"
        overrides[1:] = [
            "train.phases.phase1.lr={encoder: 0.001}",
            "train.phases.phase1.warmup=0",
            f"train.phases.phase1.unfreeze=[{late}]",
        ]
    with pytest.raises(UserError, match=expected):
        require_something_to_learn(PHASES[1], load_config("tiny", overrides))


@pytest.mark.slow
def test_the_command_ends_with_2_before_anything_is_written(
    make_shards: Callable, tmp_path: Path
) -> None:
    shards = make_shards(without_labels, ("train", "valid"))
    runs = tmp_path / "runs"
    done = subprocess.run(
        [sys.executable, "launch/phase1.py", *settings(1, shards, runs)],
        cwd=CHECKOUT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "\nerror: Of the 6 samples of the split 'train' in " in done.stderr
    assert not runs.exists()


def test_reports_that_are_cut_are_counted_once_before_training(
    samples: list[Sample], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for i, sample in enumerate(samples):
        findings = {0: "The lungs are clear. " * 100, 1: None}.get(i, "Clear lungs.")
        meta = replace(sample.meta, findings=findings, impression=None)
        samples[i] = replace(sample, meta=meta)
    write_shards(samples, tmp_path)
    config = load_config("tiny", [f"data.shards={tmp_path}"])
    language = load_language_model(config.generator, resolve_model(config.generator.model))
    generator = ReportGenerator(config.generator, config.encoder.width, language)
    with caplog.at_level("INFO", "rectvlm"):
        log_cut_reports(ShardDataset(config.data, "train"), generator)
        log_cut_reports(ShardDataset(config.data, "valid"), generator)  # nothing is cut there
    # Loading a language model may log too, by what ran before.
    (record,) = (one for one in caplog.records if one.name == "rectvlm.train.task_samples")
    assert record.getMessage().startswith(
        "1 of 5 reports are longer than generator.max_report_tokens (96)"
    )
