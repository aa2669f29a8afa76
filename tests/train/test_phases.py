"""The table of phases and its choices.

Stages, schedules, averages, late parts, learned task weights.
"""

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launches import CHECKOUT, LAUNCH, TIMEOUT, TWO, environment, length
from torch import nn

from rectvlm.checkpoint import Checkpoint
from rectvlm.config import MODEL_PARTS, Config, PhaseConfig, load_config
from rectvlm.data.dataset import ShardDataset
from rectvlm.data.shards import write_shards
from rectvlm.models.slice_region_encoder import SliceRegionEncoder
from rectvlm.train.budget import PhaseBudget
from rectvlm.train.ema import EMA_KEY, ema_decay_at
from rectvlm.train.objectives import combine_losses
from rectvlm.train.optimizer import (
    build_optimizer,
    find_starts,
    freeze_all_but,
    learning_rate_factor,
    set_learning_rates,
    set_requires_grad,
    set_training_modes,
)
from rectvlm.train.phases import PHASE_TABLE, PHASES, STAGES
from rectvlm.train.task_loss import TaskLoss
from rectvlm.train.uncertainty_weighting import UncertaintyWeighting
from rectvlm.types import Split, UserError, no_lesions_source


def test_every_row_has_a_section_and_a_folder_of_its_own(tiny: Config) -> None:
    assert {row.key for row in PHASE_TABLE} == set(tiny.train.phases)
    assert len({row.key for row in PHASE_TABLE}) == len(PHASE_TABLE)
    for row in PHASE_TABLE:
        able = row.parts if row.may_train is None else row.may_train
        assert set(row.get_settings(tiny).lr) == set(able)
    assert STAGES["localize"].previous_phase == 1
    assert STAGES["align"].previous_phase == 2
    for stage in STAGES.values():  # the joint phase can start from its stage
        assert stage.parts == PHASES[stage.number].parts


def test_a_sub_step_refuses_to_train_what_it_freezes() -> None:
    config = load_config("tiny", ["train.phases.phase3-align.lr={generator: 0.1, encoder: 0.1}"])
    with pytest.raises(
        UserError,
        match=r"train\.phases\.phase3-align\.lr names encoder; phase 3 with --stage align",
    ):
        STAGES["align"].get_settings(config)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("repeat_threshold=0.4", "repeat_threshold reads outlines, and this row learns from"),
        ("validation.best_metric=mean_dice", "expected another metric than mean_dice; correct"),
    ],
)
def test_a_row_of_labels_alone_refuses_what_reads_outlines(setting: str, sentence: str) -> None:
    config = load_config("tiny", [f"train.phases.phase2-labels.{setting}"])
    with pytest.raises(UserError, match=sentence):
        STAGES["labels"].get_settings(config)


def remove_outlines(shards: Path, tiny: Config, folder: Path) -> Path:
    """The same shards as if no one had annotated a lesion."""
    data = tiny.data.model_copy(update={"shards": str(shards)})
    samples = []
    splits: tuple[Split, ...] = ("train", "valid")
    for split in splits:
        dataset = ShardDataset(data, split)
        for sample in (dataset[number] for number in range(len(dataset))):
            assert any(sample.meta.lesions_annotated.values())
            annotated = dict.fromkeys(sample.meta.lesions_annotated, False)
            meta = replace(
                sample.meta, lesions_annotated=annotated, lesions_source=no_lesions_source()
            )
            samples.append(replace(sample, meta=meta, lesions=np.zeros_like(sample.lesions)))
    write_shards(samples, folder)
    return folder


@pytest.mark.slow
def test_labels_alone_train_the_same_model_whatever_is_outlined(
    tiny_run: Callable[[int], Path], phantom_shards: Path, tiny: Config, tmp_path: Path
) -> None:
    without = remove_outlines(phantom_shards, tiny, tmp_path / "without")
    key = "phase2-labels"
    runs = []
    for shards in (phantom_shards, without):
        folder = tmp_path / f"runs-{shards.name}"
        words = [*LAUNCH, "--num_processes", "1", "launch/phase2.py", "--config", "tiny"]
        words += ["--stage", "labels", "--from", str(tiny_run(1)), *length(key, 3)]
        words += [f"data.shards={shards}", f"train.runs={folder}"]
        words += [f"train.phases.{key}.validation.every=1"]
        done = subprocess.run(
            words, cwd=CHECKOUT, env=environment(tmp_path), capture_output=True, text=True,
            timeout=TIMEOUT, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        runs.append(folder / "tiny" / key)
    first, second = (Checkpoint.open(run) for run in runs)
    assert (first.training.phase, first.training.stage) == (2, "labels")
    before = Checkpoint.open(tiny_run(1)).read_tensors()
    tensors, others = first.read_tensors(), second.read_tensors()
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
    changed = [name for name in before if not torch.equal(before[name], tensors[name])]
    moved = {name.partition(".")[0] for name in changed}
    assert moved == {"encoder", "classifier"} and "localizer" in first.parts
    losses = [json.loads(line)["losses"] for line in (runs[0] / "metrics.jsonl").open()]
    assert all(row["localization"] > 0 for row in losses)
    validations = [json.loads((run / "validation.jsonl").read_text()) for run in runs]
    assert validations[0]["metrics"] == validations[1]["metrics"]
    assert validations[0]["metrics"]["mean_dice"] is None


def budget_of(settings: PhaseConfig) -> PhaseBudget:
    return PhaseBudget.plan(settings, sample_count=6, world_size=2)


def test_schedules(tiny: Config) -> None:
    plan = tiny.train.phases["phase1"].model_copy(
        update={"samples": 48, "warmup": 1 / 6, "final_lr_ratio": 0.2}
    )
    shapes = {}
    for kind in ("cosine", "linear", "constant"):
        row = plan.model_copy(update={"schedule": kind})
        shapes[kind] = [learning_rate_factor(row, budget_of(row), 4 * k) for k in range(12)]
    for factors in shapes.values():
        assert factors[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert shapes["constant"] == pytest.approx([0.5] + [1.0] * 11)
    assert shapes["linear"][2:] == pytest.approx([1 - 0.8 * k / 9 for k in range(10)])
    assert shapes["cosine"][-1] == pytest.approx(0.2)
    assert shapes["cosine"][4] > shapes["linear"][4]
    assert shapes["cosine"][-3] < shapes["linear"][-3]


class Toy(nn.Module):
    """Named as the model is."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.encoder = SliceRegionEncoder(config.encoder, config.data)
        self.classifier = nn.Linear(4, 2)
        self.localizer = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))


UNFREEZE = (
    "[{part: encoder, last_blocks: 1, start: 0.15}, {part: encoder, last_blocks: null, start: 0.3}]"
)


def test_the_end_of_the_encoder_begins_before_the_rest(tiny: Config) -> None:
    plan = load_config("tiny", [f"train.phases.phase1.unfreeze={UNFREEZE}"]).train.phases["phase1"]
    starts = find_starts(Toy(tiny), plan.unfreeze)
    assert {name.partition(".")[0] for name in starts} == {"encoder"}
    last = tiny.encoder.depth - 1
    early = {name for name, start in starts.items() if start == 0.15}
    assert early == {
        n for n in starts if n.startswith((f"encoder.blocks.{last}.", "encoder.norm."))
    }
    assert {start for name, start in starts.items() if name not in early} == {0.3}
    assert {"encoder.embed.weight", "encoder.position_x", "encoder.blocks.0.norm1.weight"} <= set(
        starts
    ) - early


def test_what_no_row_covers_stays_frozen(tiny: Config) -> None:
    config = load_config(
        "tiny", ["train.phases.phase1.unfreeze=[{part: encoder, last_blocks: 1, start: 0.5}]"]
    )
    model, plan = Toy(tiny), config.train.phases["phase1"]
    freeze_all_but(model, plan.lr, plan.unfreeze)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    last = tiny.encoder.depth - 1
    assert trains == {
        name
        for name, _ in model.named_parameters()
        if name.startswith((f"encoder.blocks.{last}.", "encoder.norm.", "classifier."))
    }
    optimizer = build_optimizer(model, config.train, plan, budget_of(plan))
    assert {name for group in optimizer.param_groups for name in group["names"]} == trains


def test_rates_of_a_late_part_rise_when_it_begins(tiny: Config) -> None:
    config = load_config(
        "tiny",
        [
            f"train.phases.phase1.unfreeze={UNFREEZE}",
            "train.phases.phase1.samples=80",
            "train.phases.phase1.warmup=0.2",
        ],
    )
    model, plan = Toy(tiny), config.train.phases["phase1"]
    freeze_all_but(model, plan.lr, plan.unfreeze)
    groups = build_optimizer(model, config.train, plan, budget_of(plan)).param_groups
    own = dict(model.named_parameters())
    for step in range(20):
        told = set_learning_rates(groups, plan, budget_of(plan), 4 * step)
        set_requires_grad(model, groups)
        for group in groups:
            late = step - round(20 * group["start"])
            asks = {own[name].requires_grad for name in group["names"]}
            assert asks == {late >= 0}
            rise = min(1.0, (late + 1) / 4) if group["start"] else 1.0
            assert group["lr"] == pytest.approx(
                max(0.0, rise)
                * plan.lr[group["part"]]
                * learning_rate_factor(plan, budget_of(plan), 4 * step)
            )
        assert told["encoder"] == max(group["lr"] for group in groups if group["part"] == "encoder")
        assert (told["encoder"] > 0) == (step >= 3)


def test_parts_that_do_not_train_are_in_eval_mode(tiny: Config) -> None:
    model = Toy(tiny)
    set_training_modes(model, STAGES["localize"].get_settings(tiny))
    assert {
        part: getattr(model, part).training for part in MODEL_PARTS if hasattr(model, part)
    } == {
        "encoder": False,
        "classifier": False,
        "localizer": True,
    }


def test_the_average_is_the_one_by_hand(tiny: Config) -> None:
    plan = tiny.train.phases["phase1"].model_copy(update={"ema_decay": 0.5})
    torch.manual_seed(0)
    model = nn.ModuleDict({"encoder": nn.Linear(3, 4), "classifier": nn.Linear(4, 2)})
    optimizer = build_optimizer(model, tiny.train, plan, budget_of(plan))
    by_hand: dict[str, torch.Tensor] = {}
    for step in range(1, 13):
        model["classifier"](model["encoder"](torch.randn(5, 3))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        d = min(0.5, (step - 1) / (step + 8))
        for name, p in model.named_parameters():
            by_hand[name] = (
                p.detach().clone() if step == 1 else d * by_hand[name] + (1 - d) * p.detach()
            )
            torch.testing.assert_close(
                optimizer.state[p][EMA_KEY], by_hand[name], rtol=1e-5, atol=1e-7
            )
    assert ema_decay_at(12, 0.5) == 0.5 > ema_decay_at(9, 0.5)
    without = tiny.train.phases["phase1"]
    assert EMA_KEY not in next(
        iter(build_optimizer(model, tiny.train, without, budget_of(without)).state.values()), {}
    )


def test_learned_weights_settle_where_tasks_count_the_same() -> None:
    weighting = UncertaintyWeighting(3)
    fixed = torch.tensor([1.0, 8.0, 0.25])
    optimizer = torch.optim.SGD(weighting.parameters(), lr=0.5)
    for _ in range(400):
        optimizer.zero_grad()
        weighting(fixed, torch.tensor([True, True, True])).backward()
        optimizer.step()
    torch.testing.assert_close(
        weighting.log_variance.detach(), torch.log(2 * fixed), rtol=1e-3, atol=1e-3
    )
    torch.testing.assert_close(
        weighting.compute_factors() * fixed, torch.full((3,), 0.5), rtol=1e-3, atol=1e-3
    )


def test_a_task_of_which_nothing_is_known_keeps_its_weight(tiny: Config) -> None:
    weighting = UncertaintyWeighting(2)
    found: dict[Any, TaskLoss] = {
        "classification": TaskLoss(torch.tensor(2.0), torch.tensor(5)),
        "localization": TaskLoss(torch.tensor(0.5), torch.tensor(0)),  # denoising needs no outline
    }
    value = combine_losses(found, tiny.train.loss_weights, weighting)
    assert (
        value.item() == combine_losses(found, tiny.train.loss_weights).item() == 3.0
    )  # at the start they are the configured weights
    value.backward()
    assert weighting.log_variance.grad is not None
    assert weighting.log_variance.grad.tolist() == [0.5 - 2.0, 0.0]


def by_hand(tmp_path: Path, stage: int, launcher: list[str], ranks: int) -> None:
    command = [*launcher, "--module", "tests.train_by_hand", str(tmp_path), str(stage)]
    done = subprocess.run(
        command,
        cwd=CHECKOUT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in range(ranks)] == [
        str(stage)
    ] * ranks


@pytest.mark.parametrize(
    "stage", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3]
)
def test_two_ranks_train_as_by_hand(tmp_path: Path, stage: int) -> None:
    """Averages, late parts and learned weights, sharded, saved and resumed.

    See `tests/train_by_hand.py`.
    """
    by_hand(tmp_path, stage, TWO, 2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_one_rank_trains_as_by_hand(tmp_path: Path, stage: int) -> None:
    by_hand(tmp_path, stage, [*LAUNCH, "--num_processes", "1"], 1)
