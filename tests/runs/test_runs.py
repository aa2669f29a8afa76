"""Runs read back from their folders.

Figures against independent computations, killed and damaged runs, and pictures.
"""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from rectvlm import cli
from rectvlm.config import load_config
from rectvlm.runs.curves import read_total_losses
from rectvlm.runs.phase_summary import summarize_phase
from rectvlm.runs.read_runs import (
    CUT_OFF_AFTER_SECONDS,
    BestValidation,
    RunThroughput,
    TrainingRun,
    compute_throughput,
    find_runs,
)
from rectvlm.types import UserError

STEPS = 12


def a_line(
    step: int, seed: int, rng: np.random.Generator, tasks: tuple[str, ...]
) -> dict[str, Any]:
    losses = {task: float(2 / step + rng.uniform(0, 0.1)) for task in tasks}
    return {
        "step": step,
        "loss": sum(losses.values()),
        "losses": losses,
        "lr": {"encoder": (1 + seed) * 1e-3 / step, "classifier": 2e-3 / step},
        "grad_norm": (1 + seed) / step,
        "samples_seen": 4 * step,
        "tokens": 500,
        "seconds": {"total": 10.0 if step == 1 else 2.0 + 0.3 * seed, "data": 0.5},
        "memory_bytes": (1 + seed) * 1e9,
        "skipped": None,
    }


def a_run(
    folder: Path, seed: int = 0, steps: int = STEPS, overrides: tuple[str, ...] = (), **session: Any
) -> Path:
    """A phase's folder as training leaves it."""
    number = int(folder.name.removeprefix("phase")[0])
    tasks = ("classification", "localization", "report")[:number]
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    lines = [a_line(step, seed, rng, tasks) for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    validations = [
        {
            "step": step,
            "metrics": {"loss": (3 + seed) / step, "macro_auroc": 0.5 + (step - seed) / 100},
        }
        for step in (4, 8, 12)
    ]
    (folder / "validation.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in validations)
    )
    (folder / "best.json").write_text(
        json.dumps({"step": 12, "metric": "macro_auroc", "value": 0.62})
    )
    (folder / "config.yaml").write_text(
        load_config(
            "tiny", [f"train.phases.phase{number}.samples={4 * STEPS}", *overrides]
        ).to_yaml()
    )
    told = {
        "state": "finished",
        "start": "2026-01-02T03:04:05+00:00",
        "end": "2026-01-02T04:04:05+00:00",
        "error": None,
        "from_step": 0,
        "steps": STEPS,
        "world_size": 2,
        "nodes": 1,
        "git": {"commit": "c" * 40, "dirty": False},
        "machine": {"host": socket.gethostname()},
        "versions": {"torch": "2"},
        "work": None,
    } | session
    (folder / "run.json").write_text(json.dumps({"sessions": [told]}))
    return folder


def one(folder: Path) -> TrainingRun:
    (found,) = find_runs([folder])
    return found


def test_a_run_in_figures(tmp_path: Path) -> None:
    run = one(a_run(tmp_path / "demo/phase2"))
    assert (
        run.name,
        run.phase_name,
        run.state,
        run.last_step,
        run.planned_steps,
        run.world_size,
    ) == (
        "demo/phase2",
        "2",
        "finished",
        STEPS,
        STEPS,
        2,
    )
    lines = [json.loads(text) for text in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert run.final_loss("classification") == pytest.approx(
        np.mean([line["losses"]["classification"] for line in lines[-10:]])
    )
    assert run.final_loss() == pytest.approx(np.mean([line["loss"] for line in lines[-10:]]))
    assert run.best == BestValidation(12, "macro_auroc", 0.62)
    assert run.training_seconds == pytest.approx(10 + 2 * (STEPS - 1))
    # The first step builds and tunes: it counts in no rate.
    assert compute_throughput(run) == RunThroughput(
        samples_per_second=pytest.approx(2.0),  # type: ignore[arg-type]
        tokens_per_second=pytest.approx(250.0),  # type: ignore[arg-type]
        data_wait=pytest.approx(0.25),  # type: ignore[arg-type]
        mfu=None,
    )
    assert run.faults == []


def test_mfu_is_that_of_the_progress_line(tmp_path: Path) -> None:
    from rectvlm.train.logging.mfu import DevicePeak, StepFlops

    work = {
        "micro_batches": 2,
        "patches": 100,
        "flops": 5e9,
        "flops_per_position": 1e7,
        "peak": {"tflops": 1.0, "source": "stated"},
        "world": 2,
    }
    run = one(a_run(tmp_path / "demo/phase1", work=work))
    told = StepFlops(2, 100, 5e9, 1e7, DevicePeak(1.0, "stated"), 2).compute_mfu(500, 1, 2.0)
    assert compute_throughput(run).mfu == pytest.approx(told)


def test_resumed_sessions_count_once(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "demo/phase1")
    sessions = json.loads((folder / "run.json").read_text())["sessions"]
    sessions = [sessions[0] | {"state": "cut off"}, sessions[0] | {"from_step": 4, "world_size": 4}]
    (folder / "run.json").write_text(json.dumps({"sessions": sessions}))
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[4]["seconds"]["total"] = 30.0  # the first step after the start
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = one(folder)
    assert run.world_size == 4 and compute_throughput(run).samples_per_second == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("session", "ending", "expected"),
    [
        ({}, {}, ("finished", None)),
        (
            {"state": "stopped", "error": "SIGUSR1"},
            {"code": 75, "reason": "SIGUSR1"},
            ("stopped", "SIGUSR1"),
        ),
        ({"state": "failed", "error": "ValueError: no"}, {}, ("failed", "ValueError: no")),
        ({"state": "running", "pid": 2**22 + 5, "process_start": 0.0}, {}, ("cut off", None)),
        (
            {"state": "running", "pid": 2**22 + 5, "process_start": 0.0},
            {"code": 69, "reason": "rank 1 hangs"},
            ("stopped", "rank 1 hangs"),
        ),
        # Another process has the number by now.
        ({"state": "running", "pid": os.getpid(), "process_start": 1.0}, {}, ("cut off", None)),
        (
            {
                "state": "running",
                "pid": os.getpid(),
                "process_start": psutil.Process().create_time(),
            },
            {},
            ("running", None),
        ),
        ({"state": "running", "machine": {"host": "elsewhere"}}, {}, ("running", None)),
        ({"state": "cut off"}, {}, ("cut off", None)),
    ],
)
def test_states(
    tmp_path: Path, session: dict[str, Any], ending: dict[str, Any], expected: tuple[str, Any]
) -> None:
    folder = a_run(tmp_path / "demo/phase1", **session)
    if ending:
        (folder / "ending.json").write_text(json.dumps(ending))
    run = one(folder)
    assert (run.state, run.reason) == expected


def test_a_run_elsewhere_that_is_silent_is_cut_off(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "demo/phase1", state="running", machine={"host": "elsewhere"})
    long_ago = time.time() - CUT_OFF_AFTER_SECONDS - 60
    os.utime(folder / "metrics.jsonl", (long_ago, long_ago))
    assert one(folder).state == "cut off"


@pytest.mark.parametrize("length", [0, 1, 40, -1, -7])
def test_lines_that_are_cut_off_are_no_fault(tmp_path: Path, length: int) -> None:
    folder = a_run(tmp_path / "demo/phase1")
    text = (folder / "metrics.jsonl").read_text()
    first = text[: text.index("\n") + 1]
    (folder / "metrics.jsonl").write_text(
        (first + text[len(first) :].partition("\n")[0])[: len(first) + length]
    )
    run = one(folder)
    assert run.last_step == (0 if length == -7 else 1)
    assert run.faults == []


def test_damage_is_named_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = a_run(tmp_path / "demo/phase1")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[2], lines[5] = "{broken", '["no", "line"]'
    lines[7] = json.dumps({"step": 8, "loss": float("nan"), "losses": None, "seconds": None})
    (folder / "metrics.jsonl").write_bytes(
        b"\n".join(line.encode() for line in lines) + b"\n\xff\xfe{\n{}\n"
    )
    for name in ("run.json", "best.json", "validation.jsonl"):
        (folder / name).write_bytes(b"\x00\x01")
    (folder / "config.yaml").write_text("a: [")
    run = one(folder)
    assert run.last_step == STEPS and len(run.metrics_lines) == STEPS - 2
    assert {fault.partition(" ")[0].rstrip(":") for fault in run.faults} == {
        "metrics.jsonl",
        "run.json",
        "best.json",
        "config.yaml",
    }
    assert "3 of 14 lines" in run.faults[0]
    assert run.state == "cut off"  # nothing says that it finished
    for action in ("list", "plot"):
        assert cli.main(["runs", action, str(folder)]) == 0
        assert "config.yaml is missing or cannot be read" in capsys.readouterr().err


def test_a_folder_with_nothing_but_a_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    folder = a_run(tmp_path / "demo/phase1", steps=0)
    for name in ("metrics.jsonl", "validation.jsonl", "best.json", "config.yaml"):
        (folder / name).unlink()
    run = one(folder)
    assert (
        run.last_step == 0
        and run.final_loss() is None
        and compute_throughput(run).samples_per_second is None
    )
    assert cli.main(["runs", "list", str(tmp_path)]) == 0 and "0 of 12" in capsys.readouterr().out
    assert cli.main(["runs", "plot", str(folder)]) == 2
    assert "nothing to draw" in capsys.readouterr().err and not (folder / "curves.png").exists()


def test_runs_are_found_at_any_depth(tmp_path: Path) -> None:
    for name in ("demo/phase1", "demo/phase2", "demo/phase1.earlier-1", "other/phase1"):
        a_run(tmp_path / "runs" / name)
    (tmp_path / "runs/demo/phase1/checkpoints/step-000001").mkdir(parents=True)
    (tmp_path / "runs/demo/phase1/checkpoints/step-000001/metrics.jsonl").write_text("")
    names = [run.name for run in find_runs([tmp_path / "runs"])]
    assert names == ["demo/phase1", "demo/phase1.earlier-1", "demo/phase2", "other/phase1"]
    assert [
        run.name for run in find_runs([tmp_path / "runs/demo/phase2", tmp_path / "runs/demo"])
    ] == [
        "demo/phase2",
        "demo/phase1",
        "demo/phase1.earlier-1",
    ]
    a_run(tmp_path / "elsewhere/demo/phase1")
    two = find_runs([tmp_path / "runs/demo/phase1", tmp_path / "elsewhere"])
    assert [run.name for run in two] == [str(run.folder) for run in two]


def test_runs_behind_links_are_found_once(tmp_path: Path) -> None:
    a_run(tmp_path / "other_disk/demo/phase1")
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "demo").symlink_to(tmp_path / "other_disk/demo")
    (runs / "same").symlink_to(tmp_path / "other_disk/demo")
    (runs / "circle").symlink_to(runs)
    assert [run.name for run in find_runs([runs])] == ["demo/phase1"]


@pytest.mark.parametrize("place", ["nowhere", "."])
def test_no_runs_is_one_sentence(tmp_path: Path, place: str) -> None:
    with pytest.raises(UserError, match=r"folder|run"):
        find_runs([tmp_path / place])


def test_the_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    a_run(tmp_path / "demo/phase1")
    a_run(tmp_path / "demo/phase3", steps=5, state="failed", error="OutOfMemoryError: no room")
    assert cli.main(["runs", "list", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for text in (
        "demo/phase1",
        "12 of 12",
        "macro_auroc 0.6200 (step 12)",
        "2026-01-02 03:04",
        "5 of 12",
        "no room",
    ):
        assert text in printed
    assert cli.main(["runs", "list", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["state"] for run in found] == ["finished", "failed"]
    assert found[0]["best"] == {"step": 12, "metric": "macro_auroc", "value": 0.62}
    assert found[1]["losses"].keys() == {"classification", "localization", "report"}


def test_a_comparison_shows_differences_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = a_run(tmp_path / "one/phase1")
    second = a_run(
        tmp_path / "two/phase1",
        1,
        overrides=("encoder.depth=3",),
        versions={"torch": "3"},
        world_size=4,
    )
    assert cli.main(["runs", "compare", str(first), str(second), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runs"] == ["one/phase1", "two/phase1"]
    assert found["differences"] == {
        "configuration": {"encoder.depth": [2, 3]},
        "code and machine": {"ranks": [2, 4], "versions.torch": ["2", "3"]},
    }
    results = found["results"]
    assert results["validation loss, last"] == results["validation loss, best"] == [3 / 12, 4 / 12]
    assert results["validation macro_auroc, best"] == pytest.approx([0.62, 0.61])
    assert results["loss classification"] == [
        run.final_loss("classification") for run in map(one, (first, second))
    ]
    assert cli.main(["runs", "compare", str(first), str(second)]) == 0
    printed = capsys.readouterr().out
    assert "encoder.depth" in printed and "encoder.width" not in printed and "tokens/s" in printed
    assert cli.main(["runs", "compare", str(first)]) == 2
    assert "two runs or more" in capsys.readouterr().err


def test_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every panel of the picture has the colours of the runs that have that quantity."""
    first, second = a_run(tmp_path / "one/phase2"), a_run(tmp_path / "two/phase1", 1, steps=8)
    assert cli.main(["runs", "plot", str(first)]) == 0
    assert capsys.readouterr().out == f"{first / 'curves.png'}\n"
    out = tmp_path / "pictures/both.png"
    assert cli.main(["runs", "plot", str(first), str(second), "--out", str(out)]) == 0
    with Image.open(out) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    # Ten panels, three to a row: loss, its two tasks, two validation metrics, rate, norm, samples,
    # waiting, memory.
    rows = np.array_split(pixels, 4, axis=0)
    panels = [panel for row in rows for panel in np.array_split(row, 3, axis=1)][:10]
    blue, orange = np.array([0x00, 0x72, 0xB2]), np.array([0xD5, 0x5E, 0x00])
    has = [
        [bool((np.abs(panel - colour).sum(-1) < 30).sum() > 20) for colour in (blue, orange)]
        for panel in panels
    ]
    assert all(one for one, _ in has)
    assert [both for _, both in has] == [
        True,
        True,
        False,
        *[True] * 7,
    ]  # phase 1 has no localization


def test_steps_without_targets_count_in_no_mean(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "demo/phase2")
    weights = one(folder).loss_weights
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    known: dict[str, list[float]] = {"classification": [], "localization": []}
    for line in lines:
        line["losses"] = {"classification": 0.5 + line["step"] / 100, "localization": 2.0}
        if line["step"] % 2:
            line["losses"]["classification"] = None
        if line["step"] % 3 == 0:
            line["losses"]["localization"] = None
        line["loss"] = sum(weights[t] * (loss or 0.0) for t, loss in line["losses"].items())
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    window = lines[-10:]
    for line in window:
        for task, loss in line["losses"].items():
            if loss is not None:
                known[task].append(loss)
    run = one(folder)
    expected = sum(weights[task] * np.mean(losses) for task, losses in known.items())
    steps_without_targets = [line for line in window if not any(line["losses"].values())]
    assert steps_without_targets and run.final_loss("classification") == pytest.approx(
        np.mean(known["classification"])
    )
    assert run.final_loss() == pytest.approx(expected, rel=0.02)
    summary = summarize_phase(folder, 2, 1.0)
    assert summary.loss_last is not None and summary.loss_last > 2 * weights["localization"]
    steps, totals = zip(*read_total_losses(run), strict=True)
    assert not {line["step"] for line in lines if not any(line["losses"].values())} & set(steps)
    assert min(totals) > 2 * weights["localization"] + 0.5 * weights["classification"]


def test_a_run_without_labels_has_the_loss_of_its_labelled_steps(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "demo/phase1")
    lines = [{"step": s, "loss": 0.0, "losses": {"classification": None}} for s in (1, 3, 5)]
    lines += [{"step": s, "loss": 0.6, "losses": {"classification": 0.6}} for s in (2, 4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = one(folder)
    assert run.final_loss() == pytest.approx(0.6)
    assert read_total_losses(run) == [(2, 0.6), (4, 0.6)]
