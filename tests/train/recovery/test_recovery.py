"""Runs that are killed, stopped, starved of disk, or fed with nonsense.

What they leave, and how they go on. `test_training` has the kill of phase 3 that always runs; here
are the small parts by themselves and, marked slow, everything else that can happen to a run.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from launches import (
    CHECKOUT,
    LAUNCH,
    MICRO_BATCH,
    SAVE_EVERY,
    STEPS,
    TWO,
    WORLD,
    comparable,
    ending,
    finish,
    kill,
    length,
    lines,
    metrics,
    ranks,
    run,
    settings,
    start,
    steps_done,
    traces,
    wait_for,
    weights_of,
)

from rectvlm.checkpoint import Checkpoint, integrity, run_folder
from rectvlm.config import TrainingLimitsConfig
from rectvlm.train.logging.jsonl import truncate_after_step
from rectvlm.train.recovery.bad_steps import (
    BadStepsLog,
    LossVerdict,
    RankObservation,
    SkippedStep,
    explain_skipped_step,
    judge_losses,
)
from rectvlm.train.recovery.exit_codes import ExitCode, write_ending
from rectvlm.train.recovery.position import seed_micro_batch
from rectvlm.train.recovery.signals import StopSignals

LIMITS = TrainingLimitsConfig(
    max_loss=10.0, max_gradient_norm=5.0, max_bad_steps=3, timeout_minutes=1.0
)
ENOUGH = 400
"""Steps of a run that is to be interrupted, not to end."""
ONE = [*LAUNCH, "--use_deepspeed", "--num_processes", "1", "--mixed_precision", "bf16"]


# The parts by themselves


def test_lines_are_cut_back_and_not_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    text = [json.dumps({"step": step, "loss": 0.1 * step}) for step in (1, 2, 3, 5)]
    path.write_text("\n".join(text) + '\n{"step": 6, "lo')
    inode = path.stat().st_ino
    truncate_after_step(path, 3)
    assert path.read_text() == "\n".join(text[:3]) + "\n" and path.stat().st_ino == inode
    path.write_text(f"{text[0]}\nnonsense\n{text[1]}\n{text[3]}\n")
    truncate_after_step(path, 3)
    assert path.read_text() == f"{text[0]}\n{text[1]}\n"
    truncate_after_step(tmp_path / "nothing.jsonl", 3)
    assert not (tmp_path / "nothing.jsonl").exists()


def test_who_lost_the_others_does_not_hide_why_they_went(tmp_path: Path) -> None:
    write_ending(tmp_path, ExitCode.RANK_LOST, "alone", 3)
    assert ending(tmp_path)["code"] == ExitCode.RANK_LOST
    write_ending(tmp_path, ExitCode.WRITE_FAILED, "full", 4)
    write_ending(tmp_path, ExitCode.RANK_LOST, "alone", 4)
    assert (ending(tmp_path)["code"], ending(tmp_path)["reason"]) == (ExitCode.WRITE_FAILED, "full")
    assert [path.name for path in tmp_path.iterdir()] == ["ending.json"]
    write_ending(
        tmp_path / "nowhere", ExitCode.WRITE_FAILED, "full", 4
    )  # says nothing where there is no folder


def test_a_loss_is_judged_by_its_size() -> None:
    assert judge_losses([0.1, -9.9], LIMITS) is LossVerdict.NORMAL
    assert judge_losses([0.1, -10.1], LIMITS) is LossVerdict.TOO_LARGE
    assert judge_losses([11.0, float("nan")], LIMITS) is LossVerdict.NOT_FINITE
    assert judge_losses([float("inf")], LIMITS) is LossVerdict.NOT_FINITE


def test_reasons_name_the_rank_and_the_limit() -> None:
    fine = RankObservation(0, [1.0], ["a"])
    large = RankObservation(1, [1.0, 12.5], ["b"])
    spoilt = RankObservation(2, [None], ["c"])
    assert (
        explain_skipped_step([fine, large, spoilt], None, LIMITS)
        == "the loss of rank 2 is not finite"
    )
    assert (
        explain_skipped_step([fine, large], 1.0, LIMITS)
        == "the loss of rank 1 is 12.5, above train.limits.max_loss = 10"
    )
    assert (
        explain_skipped_step([fine], 7.0, LIMITS)
        == "the norm of the gradient is 7, above train.limits.max_gradient_norm = 5"
    )
    assert explain_skipped_step([fine], None, LIMITS) == "the gradient is not finite"


def test_bad_steps_that_are_done_again_are_dropped(tmp_path: Path) -> None:
    for step in (3, 5, 9):
        BadStepsLog(tmp_path, step).append_step(step, float("inf"), SkippedStep("because", 1, []))
    with (tmp_path / "bad-steps.jsonl").open("a") as handle:
        handle.write('{"step": 1')  # cut off by a kill
    BadStepsLog(tmp_path, 5)
    assert [line["step"] for line in lines(tmp_path / "bad-steps.jsonl")] == [3, 5]
    assert lines(tmp_path / "bad-steps.jsonl")[0]["grad_norm"] is None


def test_draws_depend_on_the_sample_and_the_seed_alone() -> None:
    def draw(seed: int, first: int) -> list[float]:
        seed_micro_batch(seed, first)
        return torch.rand(3).tolist()

    assert draw(0, 4) == draw(0, 4)
    assert len({tuple(draw(seed, first)) for seed in (0, 1) for first in range(4)}) == 8


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_noted_and_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert signals.received_signal == 0
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # a launcher forwards what the terminal has sent already
        deadline = time.monotonic() + 5
        while not signals.received_signal and time.monotonic() < deadline:
            time.sleep(0.001)
        assert signals.received_signal == number
    assert signal.getsignal(number) is before


def python(program: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=CHECKOUT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


DEAF = """
import ctypes, signal, sys, time
from rectvlm.train.recovery import signals
signals.REPEAT_AFTER_SECONDS = 0.3
with signals.StopSignals():
    sys.stdout.write("ready\\n"); sys.stdout.flush()
    for _ in range(100):
        ctypes.CDLL(None).sleep(30)  # C that does not come back for handlers of Python's
"""


def test_a_second_signal_ends_at_once_whatever_the_main_thread_does() -> None:
    process = python(DEAF)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGTERM
    assert "again: ending at once" in stderr


STUCK = """
import ctypes, sys, time
from pathlib import Path
from rectvlm.train.recovery.watchdog import RankActivity, Watchdog
def the_place_where_it_hangs():
    {hang}
activity = RankActivity(step=17, operation="data", sample_keys=["case_a", "case_b"])
with Watchdog(activity, 1, Path(sys.argv[1]), 0.6) as watchdog:
    for _ in range(4):
        time.sleep(0.3)
        watchdog.record_heartbeat()
    the_place_where_it_hangs()
"""


@pytest.mark.parametrize("holds_the_lock", [False, True])
def test_what_hangs_ends_with_its_stack(tmp_path: Path, holds_the_lock: bool) -> None:
    hang = "ctypes.PyDLL(None).sleep(60)" if holds_the_lock else "time.sleep(60)"
    process = python(STUCK.format(hang=hang), tmp_path)
    _, stderr = process.communicate(timeout=30)
    assert "the_place_where_it_hangs" in stderr
    if holds_the_lock:  # no thread of Python's runs any more: the interpreter's own timer ends it
        assert process.returncode == 1
        return
    assert process.returncode == ExitCode.RANK_LOST
    assert "rank 1 made no progress for 1 s: step 17, data, samples case_a, case_b" in stderr
    assert ending(tmp_path)["code"] == ExitCode.RANK_LOST


# A run that is asked to end


@pytest.fixture
def interrupted(
    trained: Callable[[int], Path], phantom_shards: Path, tmp_path: Path
) -> Iterator[Any]:
    """Starts runs that are to be interrupted, and leaves none behind."""
    started: list[subprocess.Popen[str]] = []

    def begin(
        phase: int, *more: str, launcher: list[str] = TWO
    ) -> tuple[subprocess.Popen[str], Path, list[str]]:
        if phase > 1 and not (tmp_path / "tiny" / f"phase{phase - 1}").exists():
            shutil.copytree(trained(phase - 1), tmp_path / "tiny" / f"phase{phase - 1}")
        command = [
            *launcher,
            f"launch/phase{phase}.py",
            *settings(phase, phantom_shards, tmp_path, ENOUGH),
            *more,
        ]
        started.append(start(command, tmp_path))
        return started[-1], tmp_path / "tiny" / f"phase{phase}", command

    yield begin
    for process in started:
        if process.poll() is None:
            kill(process)


def check_it_stopped_in_order(folder: Path, stderr: str, name: str) -> int:
    """After a signal: the step at which it was saved."""
    newest = run_folder.list_checkpoints(folder)[-1]
    step = Checkpoint.open(newest).training.step
    assert ending(folder)["code"] == ExitCode.STOPPED_BY_SIGNAL, stderr[-3000:]
    assert ending(folder)["step"] == step == steps_done(folder) < ENOUGH
    assert f"{name}: saved after step {step}" in stderr
    assert integrity.find_faults(newest, integrity.list_manifest_files(newest)) == []
    assert [line["step"] for line in metrics(folder)] == list(range(1, step + 1))
    return step


@pytest.mark.slow
def test_one_rank_is_asked_to_end_and_all_save(
    trained: Callable[[int], Path], interrupted: Any
) -> None:
    """A gradient above the limit is skipped on the way."""
    norms = [line["grad_norm"] for line in metrics(trained(1))]
    largest = max(norms)
    limit = (largest + max(norm for norm in norms if norm != largest)) / 2
    process, folder, _ = interrupted(
        1,
        f"train.limits.max_gradient_norm={limit}",
        "train.limits.max_bad_steps=1000",
        f"train.phases.phase1.warmup={0.25 * STEPS / ENOUGH}",  # as many steps as in the other run
    )
    first = norms.index(largest) + 1
    wait_for(lambda: steps_done(folder) > max(first, SAVE_EVERY), process)
    ranks(process)[1].send_signal(signal.SIGUSR1)
    code, stderr = finish(process)
    assert code == 1  # the launcher's, whatever its ranks end with
    check_it_stopped_in_order(folder, stderr, "SIGUSR1")
    skipped = {line["step"]: line for line in metrics(folder) if line["skipped"]}
    assert min(skipped) == first
    line = skipped[first]
    assert line["grad_norm"] == pytest.approx(
        largest, rel=0.01
    )  # a longer run's rates fall more slowly
    assert line["skipped"]["reason"].endswith(f"above train.limits.max_gradient_norm = {limit:g}")
    assert line["skipped"]["in_a_row"] == 1
    assert line["skipped"]["samples"] == [
        key for rank in traces(folder) for key in rank[first - 1]["samples"]
    ]
    bad = lines(folder / "bad-steps.jsonl")
    assert [row["step"] for row in bad] == sorted(skipped)
    assert [seen["rank"] for seen in bad[0]["ranks"]] == [0, 1]


# Everything else that can happen


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["launcher", "everyone", "launcher is killed", "one process"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_as_they_come(interrupted: Any, whom: str, number: signal.Signals) -> None:
    """To the launcher, as a scheduler sends it, or to every process at once, as a terminal does.

    Or the launcher dies.
    """
    workers = "data.workers=1"
    process, folder, command = interrupted(
        1, workers, launcher=ONE if whom == "one process" else TWO
    )
    wait_for(lambda: steps_done(folder) > SAVE_EVERY, process)
    everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    if whom in ("launcher", "one process"):
        process.send_signal(number)
    elif whom == "everyone":
        for member in everyone:
            member.send_signal(number)
    else:
        process.kill()
    _, stderr = process.communicate(timeout=120)
    psutil.wait_procs(everyone, timeout=60)
    assert not [member for member in everyone if member.is_running()]
    done = Checkpoint.open(run_folder.list_checkpoints(folder)[-1]).training.step
    assert ending(folder)["code"] == ExitCode.STOPPED_BY_SIGNAL, stderr[-3000:]
    assert done == steps_done(folder)
    # Ranks of a launcher that is gone receive SIGTERM, whatever it died of.
    assert (
        f"SIGTERM: saved after step {done}" in stderr
        or f"{number.name}: saved after step {done}" in stderr
    )
    run([*command, "--resume", "auto", *length("phase1", done + 2)], folder)
    assert ending(folder)["code"] == ExitCode.FINISHED
    assert steps_done(folder) == done + 2


@pytest.mark.slow
@pytest.mark.parametrize("phase", [1, 2, 3])
def test_a_run_that_is_killed_again_and_again_equals_one_that_is_not(
    trained: Callable[[int], Path], phase: int, phantom_shards: Path, tmp_path: Path
) -> None:
    """Kill −9 at ten random steps, of the whole run and of one rank in turn.

    With ZeRO-3 over two ranks, and NF4 in phase 3.
    """
    steps = 24
    if phase > 1:
        shutil.copytree(trained(phase - 1), tmp_path / "tiny" / f"phase{phase - 1}")
    more = [*length(f"phase{phase}", steps, save_every=3), "--ds-config", "ds_configs/phase3.json"]
    script = f"launch/phase{phase}.py"
    command = [*TWO, script, *settings(phase, phantom_shards, tmp_path, steps), *more]
    folder = tmp_path / "tiny" / f"phase{phase}"
    run(command, tmp_path)
    unbroken = folder.rename(tmp_path / "unbroken")
    moments = sorted(random.sample(range(1, steps), 10))
    for number, moment in enumerate(moments):
        process = start([*command, "--resume", "auto"], tmp_path)
        wait_for(lambda moment=moment: steps_done(folder) >= moment, process)  # type: ignore[misc]
        if number % 2:
            ranks(process)[random.randrange(WORLD)].kill()
            begin = time.monotonic()
            code, _ = finish(process)
            assert code == 1
            assert time.monotonic() - begin < 60
        else:
            kill(process)
        assert steps_done(folder) < steps, f"killed too late: {moments}"
    run([*command, "--resume", "auto"], tmp_path)
    assert comparable(folder) == comparable(unbroken), f"killed at {moments}"
    assert traces(folder) == traces(unbroken)
    ours, theirs = weights_of(folder), weights_of(unbroken)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut off at a random byte", "without a rank's file"])
def test_a_damaged_checkpoint_sends_a_run_back_to_the_one_before(
    trained: Callable[[int], Path], damage: str, tmp_path: Path, phantom_shards: Path
) -> None:
    """A finished run whose newest checkpoint is not whole repeats the last steps and says why."""
    unbroken = trained(3)
    shutil.copytree(unbroken.parent, tmp_path / "tiny")
    folder = tmp_path / "tiny" / "phase3"
    before, newest = run_folder.list_checkpoints(folder)[-2:]
    if damage == "without a rank's file":
        victim = newest / "engine" / "rank-00001-of-00002.safetensors"
        victim.unlink()
    else:
        victim = newest / random.choice(integrity.list_manifest_files(newest))
        os.truncate(victim, random.randrange(victim.stat().st_size))
    command = [*TWO, "launch/phase3.py", *settings(3, phantom_shards, tmp_path), "--resume", "auto"]
    code, stderr = finish(start(command, tmp_path))
    assert code == 0, stderr[-4000:]
    assert f"{newest.name} is damaged" in stderr and victim.name in stderr
    assert before.name in stderr
    assert (newest.parent / f"damaged-{newest.name}").is_dir()
    assert comparable(folder) == comparable(unbroken), victim
    assert traces(folder) == traces(unbroken)
    ours, theirs = weights_of(folder), weights_of(unbroken)
    assert ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


@pytest.mark.slow
@pytest.mark.parametrize("phase", [1, 2, 3])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(
    trained: Callable[[int], Path],
    phase: int,
    before: int,
    after: int,
    phantom_shards: Path,
    tmp_path: Path,
) -> None:
    """With as many samples a step.

    The moving average, learned weights and a part that begins late come along.
    """
    if phase > 1:
        shutil.copytree(trained(phase - 1), tmp_path / "tiny" / f"phase{phase - 1}")
    late = "classifier" if phase == 1 else "localizer"
    more = [
        f"train.phases.phase{phase}.ema_decay=0.8",
        "train.weighting=uncertainty",
        f"train.phases.phase{phase}.unfreeze=[{{part: {late}, last_blocks: null, start: 0.5}}]",
    ]

    def command(world: int) -> list[str]:
        launcher = {1: ONE, 2: TWO}[world]
        return [
            *launcher,
            f"launch/phase{phase}.py",
            *settings(phase, phantom_shards, tmp_path),
            *more,
        ]

    folder = tmp_path / "tiny" / f"phase{phase}"
    run(command(before), tmp_path)
    unbroken = tmp_path / "unbroken"
    shutil.copytree(folder, unbroken)
    shutil.rmtree(run_folder.step_folder(folder, STEPS))
    run([*command(after), "--resume"], tmp_path)
    assert json.loads((folder / "engine.json").read_text())["world_size"] == after
    found, expected = metrics(folder), metrics(unbroken)
    assert [line["samples_seen"] for line in found] == [line["samples_seen"] for line in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-3)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)

    def row(of: Path) -> list[list[str]]:
        by_step: dict[int, list[str]] = {}
        for rank in traces(of):
            for line in rank:
                by_step.setdefault(line["step"], []).extend(line["samples"])
        return [sorted(by_step[step]) for step in sorted(by_step)]

    assert row(folder) == row(unbroken)
    ours, theirs = weights_of(folder), weights_of(unbroken)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0.02, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("phase", [1, 2, 3])
def test_nonsense_in_the_images_is_skipped(
    trained: Callable[[int], Path], phase: int, phantom_shards: Path, tmp_path: Path
) -> None:
    """One voxel that is not a number spoils the step of both ranks.

    Weights and optimizer stay as they were.
    """
    if phase > 1:
        shutil.copytree(trained(phase - 1), tmp_path / "tiny" / f"phase{phase - 1}")
    more = ["train.keep_checkpoints=100", *length(f"phase{phase}", STEPS, save_every=1)]
    if phase == 3:  # weights that are learnt are read after every step, whatever became of it
        more.append("train.weighting=uncertainty")
    run(
        [
            *TWO,
            "tests/train/recovery/spoilt_launch.py",
            str(phase),
            *settings(phase, phantom_shards, tmp_path),
            *more,
        ],
        tmp_path,
    )
    folder = tmp_path / "tiny" / f"phase{phase}"
    found = metrics(folder)
    skipped = [line["step"] for line in found if line["skipped"]]
    assert skipped == [step for step in range(1, STEPS + 1) if step % 3 == 0]
    bad = lines(folder / "bad-steps.jsonl")
    assert [line["step"] for line in bad] == skipped
    assert all(
        None in line["ranks"][1]["losses"] and None not in line["ranks"][0]["losses"]
        for line in bad
    )
    for line in found:
        if line["skipped"]:
            assert "is not finite" in line["skipped"]["reason"]
            assert line["grad_norm"] is None
            assert len(line["skipped"]["samples"]) == WORLD * MICRO_BATCH
        else:
            assert line["loss"] is not None
            assert line["grad_norm"] > 0
        assert line["samples_seen"] == line["step"] * WORLD * MICRO_BATCH
    for step in range(2, STEPS + 1):
        ours, before = (run_folder.step_folder(folder, number) for number in (step, step - 1))
        same = [
            (ours / name).read_bytes() == (before / name).read_bytes()
            for name in [
                "encoder.safetensors",
                *(f"engine/rank-0000{rank}-of-00002.safetensors" for rank in range(2)),
            ]
        ]
        assert all(same) if step in skipped else not any(same), f"step {step} of {skipped}"


@pytest.mark.slow
@pytest.mark.parametrize("phase", [1, 3])
def test_a_run_that_diverges_stops_and_names_its_samples(
    trained: Callable[[int], Path], phase: int, phantom_shards: Path, tmp_path: Path
) -> None:
    if phase > 1:
        shutil.copytree(trained(phase - 1), tmp_path / "tiny" / f"phase{phase - 1}")
    arguments = [*settings(phase, phantom_shards, tmp_path), "train.limits.max_bad_steps=3"]
    rates = f"train.phases.phase{phase}.lr={{encoder: 1.0e+30, classifier: 1.0e+30}}"
    code, stderr = finish(start([*TWO, f"launch/phase{phase}.py", *arguments, rates], tmp_path))
    folder = tmp_path / "tiny" / f"phase{phase}"
    assert code == 1
    assert ending(folder)["code"] == ExitCode.DIVERGED
    said = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert "3 steps in a row were skipped" in said[0]
    assert "bad-steps.jsonl" in said[0]
    bad = lines(folder / "bad-steps.jsonl")
    assert len(bad) == 3
    assert all(len(seen["samples"]) == MICRO_BATCH for line in bad for seen in line["ranks"])
    assert [line["skipped"]["in_a_row"] for line in metrics(folder)[-3:]] == [1, 2, 3]


@pytest.mark.slow
def test_a_rank_that_stops_ends_the_run(interrupted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "5"
    )  # until the launcher kills what does not end
    process, folder, command = interrupted(1, "train.limits.timeout_minutes=0.15")
    wait_for(lambda: steps_done(folder) > SAVE_EVERY, process)
    stopped = ranks(process)[1]
    stopped.suspend()
    begin = time.monotonic()
    code, stderr = finish(process)
    assert time.monotonic() - begin < 60
    assert code == 1
    assert not stopped.is_running() or stopped.status() == psutil.STATUS_ZOMBIE
    assert "rank 0 made no progress for 9 s: step " in stderr
    assert "loop.py" in stderr  # a stack
    assert ending(folder)["code"] == ExitCode.RANK_LOST
    last = steps_done(folder)
    run([*command, "--resume", "auto", *length("phase1", last + 2)], folder)
    assert steps_done(folder) == last + 2


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoints_before(interrupted: Any) -> None:
    """As on a full disk: no file may exceed a size that fits the log but not a checkpoint."""
    process, folder, command = interrupted(2, *length("phase2", 3 * STEPS))
    wait_for(lambda: run_folder.list_checkpoints(folder), process)
    for rank in ranks(process):
        rank.rlimit(psutil.RLIMIT_FSIZE, (60_000, 60_000))
    code, stderr = finish(process)
    assert code == 1
    assert "could not be written" in stderr
    assert "saving is tried again" in stderr
    assert ending(folder)["code"] == ExitCode.WRITE_FAILED
    assert steps_done(folder) == 3 * STEPS  # training itself went on
    assert not list(folder.glob("checkpoints/.*"))
    left = run_folder.list_checkpoints(folder)
    assert left
    for path in left:
        assert integrity.find_faults(path, integrity.list_manifest_files(path)) == []
    assert Checkpoint.open(left[-1]).training.step < 3 * STEPS
    run([*command, "--resume", "auto"], folder)
    assert steps_done(folder) == 3 * STEPS
    assert ending(folder)["code"] == ExitCode.FINISHED


@pytest.mark.slow
def test_a_full_disk_ends_a_run_whose_log_cannot_grow(interrupted: Any) -> None:
    process, folder, _ = interrupted(1)
    wait_for(lambda: run_folder.list_checkpoints(folder), process)
    for rank in ranks(process):
        rank.rlimit(psutil.RLIMIT_FSIZE, (4096, 4096))
    code, stderr = finish(process)
    assert code == 1
    assert "no room to write to" in stderr
    assert (
        ending(folder)["code"] == ExitCode.WRITE_FAILED
    )  # whatever the rank that was left alone made of it
    newest = run_folder.list_checkpoints(folder)[-1]
    assert integrity.find_faults(newest, integrity.list_manifest_files(newest)) == []


@pytest.mark.slow
def test_auto_begins_where_there_is_nothing_and_ends_where_all_is_done(
    phantom_shards: Path, tmp_path: Path
) -> None:
    command = [
        *ONE,
        "launch/phase1.py",
        *settings(1, phantom_shards, tmp_path, steps=2),
        "--resume",
        "auto",
    ]
    run(command, tmp_path)
    folder = tmp_path / "tiny" / "phase1"
    before = comparable(folder)
    run(command, tmp_path)
    assert comparable(folder) == before
    assert not (tmp_path / "tiny" / "phase1.earlier-1").exists()
    (run_folder.find_checkpoint(folder, "") / "manifest.json").unlink()
    code, stderr = finish(start(command[:-1], tmp_path))
    assert code == 1
    assert "None of the 1 checkpoints" in stderr
    run(command, tmp_path)  # damaged ones are moved aside with the run
    assert comparable(folder) == before
    assert (tmp_path / "tiny" / "phase1.earlier-1" / "checkpoints" / "damaged-step-000002").is_dir()
