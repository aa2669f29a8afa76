"""The benchmark of the trainer's overhead: what it makes of its times."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.overhead import (
    InterleavedBatches,
    OverheadSettings,
    _load_config,
    compare_step_times,
    list_comparisons,
    write_text,
)


def test_slow_moments_of_the_machine_count_on_both_sides() -> None:
    slow = [1.0, 1.0, 5.0, 1.0, 3.0]
    found = compare_step_times(
        {"bare": slow, "engine": [2 * s for s in slow], "trainer": [1.1 * s for s in slow]}
    )
    assert found["steps"] == 5
    assert found["seconds"] == {"bare": 1.0, "engine": 2.0, "trainer": pytest.approx(1.1)}
    assert found["overhead"]["bare"]["median"] == pytest.approx(0.1)
    assert found["overhead"]["bare"]["quartiles"] == pytest.approx([0.1, 0.1])
    assert found["overhead"]["engine"]["median"] == pytest.approx(-0.45)


def test_every_step_is_timed_beside_one_of_each_other() -> None:
    order: list[str] = []
    seeded: list[int] = []

    def other(name: str, seconds: float) -> Callable[[Any], None]:
        def step(_: Any) -> None:
            order.append(name)
            time.sleep(seconds)

        return step

    others = {"bare": other("bare", 0.01), "engine": other("engine", 0.02)}
    together = InterleavedBatches(["batch"], others, torch.device("cpu"), seeded.append)  # type: ignore[list-item]
    batches = iter(together)
    for _ in range(3):
        assert next(batches) == "batch"
        order.append("trainer")
        time.sleep(0.03)
    assert order == [
        *("engine", "bare", "trainer"),
        *("bare", "engine", "trainer"),
        *("engine", "bare", "trainer"),
    ]
    assert seeded == [0, 0, 1, 1, 2, 2]
    for name, least in {"bare": 0.01, "engine": 0.02, "trainer": 0.03}.items():
        assert len(together.seconds[name]) == (2 if name == "trainer" else 3)
        assert all(seconds >= least for seconds in together.seconds[name])


def test_the_page_names_what_is_compared() -> None:
    row = {"size": "demo", "phase": 1, "micro_batch": 8} | compare_step_times(
        {"bare": [1.0], "engine": [1.0], "trainer": [1.02]}
    )
    machine = {"cpu": "A CPU", "cores": 2, "memory_gb": 4, "gpus": []}
    result = {"machine": machine, "rows": [row]}
    page = write_text(result)
    assert "| demo | 1 | 8 | 1 | 1.0000 | 1.0000 | 1.0200 | +2.0% (+2.0% to +2.0%) |" in page
    assert "At most 3%" in page
    (comparison,) = list_comparisons(result)
    trainer = comparison.find("trainer", "demo, phase 1, micro-batch 8")
    assert trainer is not None and trainer.values == (1.02,)


def test_the_measured_phase_neither_saves_nor_validates(tmp_path: Path) -> None:
    config = _load_config(OverheadSettings("tiny", 1, micro_batch=2, steps=5, warmup=1), tmp_path)
    settings = config.train.phases["phase1"]
    assert (settings.samples, settings.global_batch, settings.save_every) == (14, 2, 1)
    assert settings.validation.every == 0 and settings.ema_decay == 0
