"""Figures of a run against independent computations, its origin, and validation pictures."""

import io
import json
import logging
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import phantom_sample
from PIL import Image
from rich.console import Console
from rich.logging import RichHandler

from rectvlm import pretrained
from rectvlm.config import Config
from rectvlm.figures import DARK_COLOUR
from rectvlm.labels import FINDINGS, LESION_BY_KEY, LESIONS
from rectvlm.train.logging import console, mfu, run_metadata
from rectvlm.train.logging.console import (
    RECENT_STEPS,
    ProgressDisplay,
    ProgressFigures,
    ProgressMeter,
)
from rectvlm.train.logging.git_state import GitState, read_git_state
from rectvlm.train.logging.mfu import (
    DevicePeak,
    StepFlops,
    count_step_flops,
    find_device_peak,
    find_peak_by_name,
)
from rectvlm.train.logging.run_metadata import SessionLog
from rectvlm.train.logging.trackers import choose_trackers, flatten_numbers
from rectvlm.train.logging.validation_figures import write_validation_figures
from rectvlm.train.phases import PHASES
from rectvlm.train.step_result import StepResult
from rectvlm.train.validation_cases import ValidationExample
from rectvlm.types import UserError


def step_result(step: int, total_seconds: float = 2.0, **changes: Any) -> StepResult:
    result = StepResult(
        step=step,
        loss=3.0,
        losses_by_task={"classification": 1.0, "report": None},
        learning_rates={"encoder": 1e-4},
        gradient_norm=1.0,
        skipped=None,
        samples_seen=4 * step,
        token_count=600,
        total_seconds=total_seconds,
        seconds_by_operation={"data": 0.5},
        peak_memory_bytes=4e9,
        task_weights=None,
        sample_keys=["a", "b"],
        stop_signal=0,
    )
    return replace(result, **changes)


# Figures


def test_figures_are_those_of_the_last_steps_without_the_first() -> None:
    meter = ProgressMeter(100, None, {})
    first = meter.add_step(step_result(1, total_seconds=50.0), 4, now=0.0)
    assert (
        first.samples_per_second == 4 / 50 and first.seconds_left is None
    )  # nothing else is known yet
    for step in range(2, 2 + RECENT_STEPS):
        figures = meter.add_step(step_result(step), 4, now=2.0 * (step - 1))
    assert figures.samples_per_second == pytest.approx(4 / 2)
    assert figures.tokens_per_second == pytest.approx(600 / 2)
    assert figures.data_wait_share == pytest.approx(0.25)
    assert figures.seconds_left == pytest.approx((100 - figures.step) * 2.0)
    for step in range(2 + RECENT_STEPS, 2 + 2 * RECENT_STEPS):
        figures = meter.add_step(
            step_result(step, total_seconds=4.0, loss=1.0), 4, now=100.0 + 4 * step
        )
    assert figures.samples_per_second == pytest.approx(1.0)  # what lies further back counts no more
    assert figures.loss == pytest.approx(1.0)


def test_time_left_counts_what_lies_between_the_steps() -> None:
    meter = ProgressMeter(10, None, {})
    meter.add_step(step_result(1), 4, now=7.0)
    meter.add_step(step_result(2), 4, now=9.0)
    figures = meter.add_step(step_result(3), 4, now=14.0)  # a checkpoint took three seconds
    assert figures.seconds_left == pytest.approx(7 * (2.0 + 1.5))
    assert ProgressMeter(3, None, {}).add_step(step_result(3), 4, now=0.0).seconds_left == 0.0


def test_a_step_without_targets_counts_in_no_mean() -> None:
    meter = ProgressMeter(10, None, {"classification": 1.0, "report": 2.0})
    meter.add_step(step_result(1), 4, 0.0)
    for step, classification, report, loss in (
        (2, 1.0, 3.0, 7.0),
        (3, None, None, None),
        (4, 2.0, None, 2.0),
        (5, None, 5.0, 10.0),
    ):
        losses = {"classification": classification, "report": report}
        figures = meter.add_step(step_result(step, loss=loss, losses_by_task=losses), 4, 2.0 * step)
    assert figures.losses == {"classification": 1.5, "report": 4.0}
    assert figures.loss == pytest.approx(1.5 + 2 * 4.0)


def test_a_spoilt_step_spoils_no_figure() -> None:
    meter = ProgressMeter(10, None, {})
    meter.add_step(step_result(1), 4, 0.0)
    meter.add_step(
        step_result(2, loss=None, losses_by_task={"classification": None, "report": None}), 4, 2.0
    )
    figures = meter.add_step(
        step_result(
            3, loss=float("inf"), losses_by_task={"classification": 2.0, "report": float("nan")}
        ),
        4,
        4.0,
    )
    assert figures.loss is None and figures.losses == {"classification": 2.0, "report": None}
    assert "loss – (classification 2.000 report –)" in str(figures)


def test_the_line_says_all_that_was_promised() -> None:
    figures = ProgressFigures(
        5, 10, 1.25, {"classification": 0.5}, 12.3, 45_600.0, None, 0.031, 61.2e9, 93_784.0
    )
    assert str(figures) == (
        "loss 1.250 (classification 0.500), 12.3 samples/s, 45.6k tokens/s, MFU –, "
        "data wait 3%, memory 61.2 GB, 1 d 2:03:04 left"
    )
    assert "MFU 41.5%" in str(replace(figures, mfu=0.4149))


def test_a_log_gets_a_line_now_and_then(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, logger="rectvlm")
    monkeypatch.setattr(console, "_find_log_console", lambda: Console(file=io.StringIO()))
    figures = [
        ProgressFigures(step, 3, 1.0, {}, 1.0, 1.0, None, 0.0, 1e9, 1.0) for step in (1, 2, 3)
    ]
    display = ProgressDisplay("phase 1", 3, 0)
    for entry in figures:
        display.show_progress(entry)
    assert [record.getMessage().partition(",")[0] for record in caplog.records] == [
        "phase 1: step 3 of 3"
    ]
    monkeypatch.setattr(console, "LOG_INTERVAL_SECONDS", 0.0)
    display.show_progress(figures[0])
    assert "step 1 of 3" in caplog.records[-1].getMessage()


def test_a_terminal_gets_a_bar_and_the_log_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    handler = RichHandler(console=console, show_path=False)
    monkeypatch.setattr(
        logging.getLogger(), "handlers", [handler]
    )  # tests before this one have left some
    display = ProgressDisplay("phase 2", 7, 3)
    display.show_progress(
        ProgressFigures(4, 7, 1.0, {"report": 2.5}, 1.0, 1.0, 0.5, 0.0, 1e9, 60.0)
    )
    logging.getLogger("rectvlm").warning("saved")
    display.close()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert "phase 2" in text and "4/7" in text and "MFU 50.0%" in text and "1:00 left" in text
    assert text.index("saved") < text.rindex("4/7")


# MFU


def test_rates_are_known_by_name_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {
        "NVIDIA H200": 989,
        "NVIDIA H100 80GB HBM3": 989,
        "NVIDIA H100 PCIe": 756,
        "NVIDIA H200 NVL": 835,
        "NVIDIA A100-SXM4-80GB": 312,
    }
    for name, tflops in rates.items():
        found = find_peak_by_name(name)
        assert found is not None and found.tflops == tflops and name in found.source
    for name in (
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "NVIDIA GeForce RTX 4090",
        "AMD Instinct MI300X",
    ):
        assert find_peak_by_name(name) is None
    monkeypatch.delenv(mfu.PEAK_TFLOPS_VARIABLE, raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert find_device_peak() is None
    monkeypatch.setenv(mfu.PEAK_TFLOPS_VARIABLE, "12.5")
    assert find_device_peak() == DevicePeak(12.5, "stated in RECTVLM_PEAK_TFLOPS")
    for nonsense in ("fast", "-1", "nan", "inf"):
        monkeypatch.setenv(mfu.PEAK_TFLOPS_VARIABLE, nonsense)
        with pytest.raises(UserError, match="RECTVLM_PEAK_TFLOPS"):
            find_device_peak()


def test_the_work_of_a_step_is_that_of_its_matrices(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The FLOPs of a frozen language model, position by position.

    Each position multiplies every matrix once forward and once backward, with two FLOPs an entry,
    and attends to all others: two products forward, four backward.
    """
    monkeypatch.setenv(mfu.PEAK_TFLOPS_VARIABLE, "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    work = count_step_flops(PHASES[3], tiny)
    assert work is not None and work.world == 4 and work.micro_batches == 4
    assert work.patches == 4 * 6 * 6  # of one sample: four ranks share the four of a step
    geometry = pretrained.read_model_config(tiny.generator.model)
    d, f, layers = geometry.hidden_size, geometry.intermediate_size, geometry.num_hidden_layers
    keys = d // geometry.num_attention_heads * geometry.num_key_value_heads
    rank = tiny.generator.lora_rank
    entries = layers * (2 * d * d + 2 * d * keys + 3 * d * f) + d * geometry.vocab_size
    adapters = layers * rank * (2 * (d + d) + 2 * (d + keys))  # these learn: three products
    # As the dry run assumes
    length = 192 + tiny.generator.queries + tiny.generator.max_report_tokens
    expected = 4 * entries + 6 * adapters + layers * 6 * 2 * length * d
    assert work.flops_per_position == pytest.approx(expected, rel=0.15)
    positions = 100
    tokens = work.micro_batches * work.patches + positions
    done = work.micro_batches * work.flops + positions * work.flops_per_position
    assert work.compute_mfu(tokens, 1, 2.0) == pytest.approx(done / 2.0 / 4e12)
    monkeypatch.setenv("RANK", "1")
    assert count_step_flops(PHASES[3], tiny) is None  # another rank has nothing to show
    monkeypatch.delenv("RANK")
    monkeypatch.delenv(mfu.PEAK_TFLOPS_VARIABLE)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert count_step_flops(PHASES[3], tiny) is None


def test_mfu_of_several_steps_is_that_of_one() -> None:
    work = StepFlops(2, 100, 5e9, 1e7, DevicePeak(1.0, "stated"), 2)
    assert work.compute_mfu(300, 1, 0.5) == pytest.approx((2 * 5e9 + 100 * 1e7) / (0.5 * 2e12))
    assert work.compute_mfu(3000, 10, 5.0) == pytest.approx(work.compute_mfu(300, 1, 0.5))


# Where a run came from


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    return subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    (folder / "rectvlm").mkdir(parents=True)
    (folder / "rectvlm/__init__.py").write_text("first = 1\n")
    (folder / "picture.bin").write_bytes(bytes(range(256)))
    git(folder, "init", "-q", "-b", "main")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "all")
    return folder


def test_a_patch_restores_the_code_that_ran(checkout: Path, tmp_path: Path) -> None:
    clean = read_git_state(checkout)
    assert not clean.patch
    assert clean.to_json() == {
        "commit": git(checkout, "rev-parse", "HEAD").strip(),
        "branch": "main",
        "dirty": False,
        "untracked": [],
        "untracked_files": 0,
    }
    (checkout / "rectvlm/__init__.py").write_text("first = 2\n")
    (checkout / "picture.bin").write_bytes(bytes(reversed(range(256))))
    (checkout / "rectvlm/new ä.py").write_text("second = 3\n")
    (checkout / "volume.nii").write_bytes(b"\0" * 1000)
    state = read_git_state(checkout)
    assert state.to_json()["dirty"] and state.untracked == ("rectvlm/new ä.py", "volume.nii")
    git(tmp_path, "clone", "-q", str(checkout), "again")
    (tmp_path / "code.patch").write_bytes(state.patch)
    git(tmp_path / "again", "apply", "../code.patch")
    for name in ("rectvlm/__init__.py", "picture.bin", "rectvlm/new ä.py"):
        assert (tmp_path / "again" / name).read_bytes() == (checkout / name).read_bytes()
    assert not (tmp_path / "again/volume.nii").exists()


def test_a_package_in_another_projects_checkout_has_no_commit(
    checkout: Path, tmp_path: Path
) -> None:
    installed = checkout / ".venv/site-packages"
    (installed / "rectvlm").mkdir(parents=True)
    (installed / "rectvlm/__init__.py").write_text("")
    for folder in (installed, tmp_path / "nowhere"):
        state = read_git_state(folder)
        assert state.commit is None and state.reason and not state.patch


def test_sessions_are_appended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patches = iter([b"x" * 100, b"x" * 100, b"y" * 100])
    monkeypatch.setattr(run_metadata, "read_git_state", lambda: GitState("c", patch=next(patches)))
    monkeypatch.setattr(run_metadata, "MAX_PATCH_BYTES", 60)
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    for name in ("WANDB_API_KEY", "RECTVLM_TOKEN", "RECTVLM_DICOMWEB_PASSWORD"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setattr(sys, "orig_argv", ["python", "launch/phase1.py", "--config", "tiny"])
    for start, state in ((0, "stopped"), (4, None), (4, "finished")):
        sessions = SessionLog(tmp_path)
        sessions.start_session(start, 12, {"world_size": 2})
        if state is not None:
            sessions.end_session(state, 8, "why" if state == "stopped" else None)
    text = (tmp_path / "run.json").read_text()
    found = json.loads(text)["sessions"]
    assert [one["state"] for one in found] == ["stopped", "cut off", "finished"]
    assert [one["from_step"] for one in found] == [0, 4, 4] and [
        one["last_step"] for one in found
    ] == [8, 4, 8]
    assert (
        found[0]["error"] == "why"
        and found[0]["end"] >= found[0]["start"]
        and found[1]["end"] is None
    )
    assert [one["git"]["patch"]["file"] for one in found] == [
        "code-1.patch",
        "code-1.patch",
        "code-3.patch",
    ]
    assert (tmp_path / "code-3.patch").read_bytes() == b"y" * 60 and found[2]["git"]["patch"][
        "cut_off"
    ]
    assert found[0]["versions"]["torch"] and found[0]["packages"]["numpy"] == np.__version__
    assert (
        found[0]["pid"] == os.getpid()
        and found[0]["command"] == "python launch/phase1.py --config tiny"
    )
    assert found[0]["environment"]["NCCL_DEBUG"] == "INFO" and "secret" not in text
    assert sessions.first_start == found[0]["start"]


def test_a_damaged_record_of_sessions_is_kept_aside(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"sessions": [{"sta')
    sessions = SessionLog(tmp_path)
    sessions.start_session(0, 1, {})
    assert len(json.loads((tmp_path / "run.json").read_text())["sessions"]) == 1
    assert (tmp_path / "run.damaged.json").read_text() == '{"sessions": [{"sta'


# Trackers


def test_trackers_are_chosen(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RECTVLM_TRACKERS", raising=False)
    assert choose_trackers(tiny) == ["wandb", "tensorboard"]
    for text, names in (
        ("tensorboard", ["tensorboard"]),
        ("none", []),
        ("", []),
        ("wandb, tensorboard", choose_trackers(tiny)),
    ):
        monkeypatch.setenv("RECTVLM_TRACKERS", text)
        assert choose_trackers(tiny) == names
    monkeypatch.setenv("RECTVLM_TRACKERS", "tensorbord")
    with pytest.raises(UserError, match="tensorbord"):
        choose_trackers(tiny)


def test_trackers_get_numbers() -> None:
    tree = {"a": 1, "b": {"c": 2.5, "d": None, "e": {"f": 3}}, "g": "text", "h": [1]}
    assert flatten_numbers(tree) == {"a": 1, "b/c": 2.5, "b/e/f": 3}


# Pictures


def sample_of(config: Config, **changes: Any) -> ValidationExample:
    found = phantom_sample(3, config)
    return ValidationExample(
        key="case/1 ä",
        ct=found.ct,
        spacing_mm=config.data.spacing,
        labels=np.array([1, 0, np.nan] * 6, dtype=np.float32),
        finding_probabilities=np.linspace(0, 1, 18, dtype=np.float32),
        lesions_annotated=np.array([True, True, True, True, False]),
        true_lesions=np.zeros_like(found.lesions),
        predicted_lesions=np.zeros_like(found.lesions),
        true_report="A cyst.",
        predicted_report=None,
    )._replace(**changes)


def coloured(picture: np.ndarray, lesion: str) -> np.ndarray:
    """Where a picture above its legend has about a lesion's colour, (n, 2) rows and columns."""
    colour = np.array([int(LESION_BY_KEY[lesion].colour[i : i + 2], 16) for i in (1, 3, 5)])
    return np.argwhere(np.abs(picture[:-65].astype(int) - colour).sum(-1) < 40)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_patients_right_is_at_the_left(tiny: Config, tmp_path: Path, side: str) -> None:
    """The truth on one side, what the model found on the other.

    Both are in the same slices, with x growing to the left.
    """
    true, found = (np.zeros(tiny.data.grid, dtype=np.uint8) for _ in range(2))
    towards_left, towards_right = slice(32, 40), slice(8, 16)
    here, there = (towards_left, towards_right) if side == "left" else (towards_right, towards_left)
    true[6:9, 20:28, here] = 1 << LESION_BY_KEY["consolidation"].bit
    found[6:9, 20:28, there] = 1 << LESION_BY_KEY["pleural_effusion"].bit
    sample = sample_of(tiny, true_lesions=true, predicted_lesions=found)
    shown = write_validation_figures([sample], tmp_path)
    picture, _ = shown["case/1 ä"]
    with Image.open(tmp_path / "case_1_ä.png") as file:
        assert np.array_equal(np.asarray(file.convert("RGB")), picture)
    panels = np.split(
        picture, [round(picture.shape[1] / 2)], axis=1
    )  # an axial slice and a coronal one
    for panel in panels:
        truth, drawn = coloured(panel, "consolidation"), coloured(panel, "pleural_effusion")
        middle = panel.shape[1] / 2
        assert len(truth) > 30 and len(drawn) > 10
        assert len(truth) > 1.15 * len(drawn)  # solid and dashed
        left_of_picture = truth if side == "right" else drawn
        right_of_picture = drawn if side == "right" else truth
        assert (left_of_picture[:, 1] < middle).all() and (right_of_picture[:, 1] > middle).all()


def test_slices_show_truth_and_what_only_the_model_found(tiny: Config, tmp_path: Path) -> None:
    true, found = (np.zeros(tiny.data.grid, dtype=np.uint8) for _ in range(2))
    true[3, 10:20, 10:20] = 1
    found[12, 10:20, 10:20] = 1 << 4
    picture, _ = write_validation_figures(
        [sample_of(tiny, true_lesions=true, predicted_lesions=found)], tmp_path
    )["case/1 ä"]
    first, second, _ = np.split(picture, 3, axis=1)
    assert len(coloured(first, LESIONS[0].key)) and not len(coloured(first, LESIONS[4].key))
    assert len(coloured(second, LESIONS[4].key)) and not len(coloured(second, LESIONS[0].key))


def test_words_of_a_case(tiny: Config, tmp_path: Path) -> None:
    true, found = (np.zeros(tiny.data.grid, dtype=np.uint8) for _ in range(2))
    true[2:4, 10:20, 10:20] = 1 << 2
    found[2:4, 10:20, 15:25] = 1 << 2 | 1 << 4
    sample = sample_of(
        tiny, true_lesions=true, predicted_lesions=found, predicted_report="No cyst.\n"
    )
    write_validation_figures([sample], tmp_path)
    text = (tmp_path / "case_1_ä.md").read_text()
    ml = 200 * 16.0 * 7.2 * 7.2 / 1000
    assert f"| consolidation | {ml:.1f} | {ml:.1f} | 0.500 |" in text
    assert f"| lung nodule | not annotated | {ml:.1f} | – |" in text  # unknown is not absent
    assert "| pleural effusion | 0.0 | 0.0 | – |" in text
    assert (
        f"| {FINDINGS[17]} | 1.000 | unknown |" in text
        and f"| {FINDINGS[0]} | 0.000 | present |" in text
    )
    assert text.endswith("## Report\n\nA cyst.\n\n## Report of the model\n\nNo cyst.\n")


def test_a_case_without_a_localizer_has_a_picture_too(tiny: Config, tmp_path: Path) -> None:
    picture, words = write_validation_figures([sample_of(tiny, predicted_lesions=None)], tmp_path)[
        "case/1 ä"
    ]
    background = np.array([int(DARK_COLOUR[i : i + 2], 16) for i in (1, 3, 5)])
    assert (picture != background).any() and "lesion" not in words
