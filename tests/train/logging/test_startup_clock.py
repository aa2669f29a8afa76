"""Seconds of a start, by part."""

import time

import psutil
import pytest

from rectvlm.train.logging.startup_clock import StartupClock


def test_parts_add_up_to_the_time_since_the_process_began(monkeypatch: pytest.MonkeyPatch) -> None:
    start = psutil.Process().create_time()
    clock = StartupClock()
    clock.end_part("imports")
    assert clock.total_seconds == pytest.approx(time.time() - start, abs=1.0)

    now = start + clock.total_seconds
    times = iter([now + 2, now + 5, now + 6, now + 16])
    monkeypatch.setattr(time, "time", lambda: next(times))
    imports = clock.seconds_by_part["imports"]
    clock.end_part("engine")
    clock.end_part("model")
    clock.end_part("engine")
    clock.end_first_step(data_seconds=4.0)
    expected = {"imports": imports, "engine": 3.0, "model": 3.0, "first step": 6.0, "data": 4.0}
    assert clock.seconds_by_part == pytest.approx(expected)
    assert clock.total_seconds == pytest.approx(imports + 16.0)
    assert "engine 3.0, model 3.0, first step 6.0, data 4.0)" in str(clock)


def test_a_clock_that_is_set_back_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = StartupClock()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    clock.end_part("imports")
    assert clock.seconds_by_part == {"imports": 0.0}
