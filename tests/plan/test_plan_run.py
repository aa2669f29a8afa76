"""What a plan says of a whole run.

Steps where the run is given in epochs, what of it trains, and checkpoints on the disk.
"""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from launches import TWO, environment, run, settings

from rectvlm.checkpoint import Checkpoint, run_folder
from rectvlm.config import load_config
from rectvlm.models.meta_model import build_meta_model
from rectvlm.plan.planner import ResourcePlanner
from rectvlm.train.phases import PHASES
from tests.plan.checkpoint_size import check_checkpoint_size

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"
SAMPLES = 100
LATE = "train.phases.phase1.unfreeze=[{part: encoder, last_blocks: 1, start: 0.5}]"


def planner(*overrides: str, phase: int = 1) -> ResourcePlanner:
    return ResourcePlanner(load_config("tiny", overrides), phase, DS_CONFIGS)


def test_epochs_decide_the_steps_and_more_gpus_need_fewer() -> None:
    made = planner(
        "train.phases.phase1.epochs=2.5",
        "train.phases.phase1.micro_batch=2",
        "train.phases.phase1.global_batch=6",
        "train.phases.phase1.lr_batch=6",
    )
    # 250 samples; four GPUs cannot share 6 a step.
    for gpus, batch, steps in ((1, 6, 42), (3, 6, 42), (4, 8, 32), (64, 64, 4), (1024, 1024, 1)):
        plan = made.make_plan(gpus, 1.0, SAMPLES)
        assert (plan.speed.steps, plan.speed.samples_per_step) == (steps, batch)
        assert plan.speed.epochs == pytest.approx(steps * batch / SAMPLES)
        assert plan.speed.days == pytest.approx(steps * plan.time.total / 86_400)
        assert plan.speed.lr_factor == pytest.approx((batch / 6) ** 0.5)
    assert made.make_plan(1, 1.0, 2 * SAMPLES).speed.steps == 84
    speed = planner("train.phases.phase1.samples=28").make_plan(4, 1.0, SAMPLES).speed
    assert speed.steps == 7, "without epochs the configuration says it"


def test_more_gpus_end_sooner_at_the_same_samples() -> None:
    made = planner("train.phases.phase1.global_batch=16", "train.phases.phase1.samples=4800")
    speeds = [made.make_plan(gpus, 1.0).speed for gpus in (1, 2, 4, 8, 64)]
    assert all(after.days < before.days for before, after in pairwise(speeds))
    assert [(speed.micro_batch, speed.accumulation) for speed in speeds] == [
        (2, 8),
        (2, 4),
        (2, 2),
        (2, 1),
        (1, 1),
    ]
    assert [speed.steps for speed in speeds] == [300, 300, 300, 300, 75]


def test_what_no_row_of_unfreeze_covers_is_planned_as_frozen() -> None:
    """The encoder's last block, what follows it, and the classifier are all that ever train."""
    config = load_config("tiny", [LATE])
    whole = build_meta_model(config, PHASES[1].parts, 32, None)
    late = f"encoder.blocks.{config.encoder.depth - 1}."
    trains = {
        name
        for name, _ in whole.named_parameters()
        if name.startswith((late, "encoder.norm.", "classifier."))
    }
    made, before = planner(LATE), planner()
    assert {name for name, p in made.model.named_parameters() if p.requires_grad} == trains
    count = sum(p.numel() for name, p in made.model.named_parameters() if name in trains)
    memory, all_trains = (
        made.make_plan(1, 1.0).gpu_memory_gb,
        before.make_plan(1, 1.0).gpu_memory_gb,
    )
    assert memory["optimizer"] == pytest.approx(12e-9 * count)
    assert memory["weights_frozen"] > all_trains["weights_frozen"] == 0
    assert (
        made.make_plan(1, 1.0).flops_per_step.backward
        < before.make_plan(1, 1.0).flops_per_step.backward
    )


def agrees_on_disk(phase_folder: Path, phase: int) -> None:
    """The newest checkpoint of a real run has the planned size."""
    folder = run_folder.find_checkpoint(phase_folder, "")
    gpus = Checkpoint.open(folder).training.world_size
    plan = ResourcePlanner(Checkpoint.open(folder).config, phase, DS_CONFIGS).make_plan(gpus, 1.0)
    check_checkpoint_size(folder, plan)


def test_a_checkpoint_is_as_large_as_planned(launched_phase1: Path) -> None:
    agrees_on_disk(launched_phase1, 1)


@pytest.mark.slow
def test_a_checkpoint_with_an_average_is_as_large_as_planned(
    phantom_shards: Path, tmp_path: Path
) -> None:
    """Of two ranks, with a part of the encoder that never learns."""
    more = [LATE, "train.phases.phase1.ema_decay=0.9"]
    run(
        [*TWO, "launch/phase1.py", *settings(1, phantom_shards, tmp_path, steps=6), *more], tmp_path
    )
    agrees_on_disk(tmp_path / "tiny" / "phase1", 1)


def test_parts_that_do_not_learn_are_in_a_checkpoint_without_a_state() -> None:
    one, late, averaged = (
        planner(*more).make_plan(2, 1.0)
        for more in ((), (LATE,), (LATE, "train.phases.phase1.ema_decay=0.99"))
    )
    learnt = late.parameters.trainable
    frozen = one.parameters.trainable - learnt
    assert one.checkpoint_gb - late.checkpoint_gb == pytest.approx(12e-9 * frozen)
    assert averaged.checkpoint_gb - late.checkpoint_gb == pytest.approx(4e-9 * learnt)


@pytest.mark.parametrize(("keep", "every"), [(1, 0), (3, 0), (1, 1), (3, 1)])
def test_there_is_room_for_as_many_checkpoints_as_there_are_at_once(
    keep: int, every: int, tmp_path: Path
) -> None:
    """As training saves: the next one is written, then older ones are deleted.

    The best comes early and is never beaten.
    """
    most = 0
    for step in range(1, 8):
        folder = run_folder.step_folder(tmp_path, step)
        folder.mkdir(parents=True)
        (folder / run_folder.MODEL_CONFIG_FILE).write_text("{}")
        most = max(most, len(run_folder.list_checkpoints(tmp_path)))
        if every and step == 1:
            run_folder.record_best_checkpoint(tmp_path, step, "loss", 0.5)
        run_folder.prune_checkpoints(tmp_path, keep)
    plan = planner(
        f"train.keep_checkpoints={keep}", f"train.phases.phase1.validation.every={every}"
    ).make_plan(1, 1.0)
    assert plan.checkpoint_disk_gb == pytest.approx(most * plan.checkpoint_gb)


@pytest.mark.slow
def test_json_stands_alone_where_a_bundled_model_is_prepared_first(tmp_path: Path) -> None:
    """Libraries that are imported on the way write to stdout when they find no GPU."""
    command = [sys.executable, "-m", "rectvlm", "plan", "--config", "tiny", "--phase", "3"]
    done = subprocess.run(
        [*command, "--gpus", "1", "--gpu-memory", "80", "--json"],
        cwd=DS_CONFIGS.parent,
        env=environment(tmp_path) | {"RECTVLM_MODELS": str(tmp_path / "models")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["config"] == "tiny"
