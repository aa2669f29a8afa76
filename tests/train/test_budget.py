"""How the samples of a phase are cut into steps, on any number of ranks."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rectvlm.config import Config, PhaseConfig, load_config
from rectvlm.train.budget import PhaseBudget, StepBatch, split_step


def settings_of(global_batch: int, micro_batch: int, samples: int = 100) -> PhaseConfig:
    values = {"global_batch": global_batch, "micro_batch": micro_batch, "samples": samples}
    overrides = [f"train.phases.phase1.{name}={value}" for name, value in values.items()]
    return load_config("tiny", overrides).train.phases["phase1"]


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (1, StepBatch(16, 4, 4)),
        (2, StepBatch(16, 4, 2)),
        (3, StepBatch(18, 3, 2)),  # as few passes as with 4 and 2
        (8, StepBatch(16, 2, 1)),
        (64, StepBatch(64, 1, 1)),
    ],
)
def test_a_step_is_shared_by_the_ranks(ranks: int, expected: StepBatch) -> None:
    assert split_step(settings_of(16, 4), ranks) == expected


@given(st.integers(1, 300), st.integers(1, 9), st.integers(1, 70), st.integers(1, 5000), st.data())
def test_every_sample_is_seen_and_no_rank_takes_more_at_once_than_it_may(
    global_batch: int, micro_batch: int, ranks: int, samples: int, data: st.DataObject
) -> None:
    settings = _SETTINGS.model_copy(
        update={"global_batch": global_batch, "micro_batch": micro_batch, "samples": samples}
    )
    budget = PhaseBudget.plan(settings, sample_count=7, world_size=ranks)
    step = budget.step_batch
    assert step.global_batch == step.micro_batch * step.accumulation * ranks
    assert step.micro_batch <= micro_batch
    # No larger than it must be for whole micro-batches of one size.
    assert global_batch <= step.global_batch < global_batch + ranks * (step.accumulation + 1)
    if global_batch % (ranks * micro_batch) == 0:
        assert step.global_batch == global_batch

    steps = budget.count_steps_left(0)
    assert (steps - 1) * step.global_batch < samples <= steps * step.global_batch
    assert budget.is_finished(steps * step.global_batch)
    assert not budget.is_finished((steps - 1) * step.global_batch)

    every = data.draw(st.floats(1e-4, 1.0))
    due = [n for n in range(1, steps + 1) if budget.is_due(every, n * step.global_batch)]
    times = math.floor(steps * step.global_batch / (every * samples) + 1e-9)
    assert len(due) == min(times, len(due)) and (times == 0 or due)
    if every * samples >= step.global_batch:  # no two of them fall into one step
        assert len(due) == times


_SETTINGS = load_config("tiny").train.phases["phase1"]


def test_epochs_count_the_samples_of_the_training_split(tiny: Config) -> None:
    settings = tiny.train.phases["phase2"].model_copy(update={"epochs": 2.5})
    two, one = (PhaseBudget.plan(settings, 101, ranks) for ranks in (2, 1))
    assert two.samples == one.samples == math.ceil(252.5)
    assert two.count_steps_left(0) == math.ceil(253 / 4)
    # Half-way on two ranks, then on one: as many samples in all.
    assert one.count_steps_left(120) == math.ceil(133 / 4)
    assert one.count_steps_left(256) == 0


def test_a_third_of_a_phase_falls_on_a_third_of_its_steps() -> None:
    budget = PhaseBudget.plan(settings_of(4, 2, samples=48), 6, world_size=2)
    assert [n for n in range(1, 13) if budget.is_due(4 / 12, 4 * n)] == [4, 8, 12]
    assert [n for n in range(1, 13) if budget.is_due(1 / 12, 4 * n)] == list(range(1, 13))
    assert [n for n in range(1, 13) if budget.is_due(1.0, 4 * n)] == [12]
    # 12 / (0.2 · 12) is less than 5 in floating point.
    single = PhaseBudget.plan(settings_of(1, 1, samples=12), 6, world_size=1)
    assert [n for n in range(1, 13) if single.is_due(0.2, n)] == [3, 5, 8, 10, 12]


def test_an_average_keeps_its_span_in_samples() -> None:
    budget = PhaseBudget.plan(settings_of(16, 4), 6, world_size=2)  # lr_batch is 4
    assert budget.batch_ratio == 4 and budget.lr_factor == 2
    # What is left of a weight after 160 samples is the same.
    assert budget.scale_ema_decay(0.99) ** 10 == pytest.approx(0.99**40)
    assert budget.scale_ema_decay(0.0) == 0
