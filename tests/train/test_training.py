"""Training as users run it: real processes, real shards, kills, and what is left on the disk."""

import itertools
import json
import math
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from launches import (
    GLOBAL_BATCH,
    LAUNCH,
    MICRO_BATCH,
    SAVE_EVERY,
    STEPS,
    TWO,
    WORLD,
    comparable,
    finish,
    kill,
    metrics,
    run,
    settings,
    start,
    steps_done,
    traces,
    wait_for,
    weights_of,
)

from rectvlm.checkpoint import Checkpoint, TrainingState, run_folder
from rectvlm.checkpoint.export import export_checkpoint
from rectvlm.checkpoint.strict_load import find_differing_tensors, named_tensors
from rectvlm.config import Config, load_config, phase_key
from rectvlm.data.loader import build_eval_loader
from rectvlm.data.shards import read_index
from rectvlm.models import RectVLM
from rectvlm.train.budget import PhaseBudget
from rectvlm.train.optimizer import learning_rate_factor
from rectvlm.train.phases import PHASES
from rectvlm.types import Batch

EACH_PHASE = pytest.mark.parametrize("phase", [1, 2, 3])


@EACH_PHASE
def test_what_runs_is_what_was_asked_for(trained: Callable[[int], Path], phase: int) -> None:
    found = json.loads((trained(phase) / "engine.json").read_text())
    assert found["distributed_type"] == "DEEPSPEED"
    assert found["zero_stage"] == phase
    assert found["world_size"] == WORLD
    assert [rank["rank"] for rank in found["ranks"]] == [0, 1]
    assert found["llm_quantization"] == ("nf4" if phase == 3 else None)
    for rank in found["ranks"]:
        if phase == 3:
            assert rank["packed_bytes_of_model"] > 0
            assert 0.45 < rank["packed_bytes"] / rank["packed_bytes_of_model"] < 0.55
        else:
            assert rank["packed_bytes_of_model"] == 0


@EACH_PHASE
def test_one_whole_line_a_step(trained: Callable[[int], Path], phase: int, tiny: Config) -> None:
    found = metrics(trained(phase))
    plan = tiny.train.phases[phase_key(phase)].model_copy(update={"samples": STEPS * GLOBAL_BATCH})
    budget = PhaseBudget.plan(plan, sample_count=6, world_size=WORLD)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    for line in found:
        assert line["samples_seen"] == line["step"] * WORLD * MICRO_BATCH
        assert set(line["losses"]) == set(PHASES[phase].tasks)
        weighted = sum(
            getattr(tiny.train.loss_weights, task) * value for task, value in line["losses"].items()
        )
        assert line["loss"] == pytest.approx(weighted)
        assert math.isfinite(line["loss"])
        assert line["grad_norm"] > 0
        assert line["skipped"] is None
        factor = learning_rate_factor(plan, budget, (line["step"] - 1) * GLOBAL_BATCH)
        assert line["lr"] == pytest.approx({part: peak * factor for part, peak in plan.lr.items()})
        least = WORLD * MICRO_BATCH * 4 * 6 * 6  # patches of every sample; phase 3 adds words
        assert line["tokens"] == least if phase < 3 else line["tokens"] > least
        assert (
            line["seconds"]["total"] >= line["seconds"]["forward"] + line["seconds"]["backward"] > 0
        )


@EACH_PHASE
def test_loss_falls(trained: Callable[[int], Path], phase: int) -> None:
    found = [line["loss"] for line in metrics(trained(phase))]
    quarter = STEPS // 4
    assert sum(found[-quarter:]) < sum(found[:quarter])


def test_report_loss_falls(trained: Callable[[int], Path]) -> None:
    found = [line["losses"]["report"] for line in metrics(trained(3))]
    assert found[-1] < found[0] - 0.05


@EACH_PHASE
def test_ranks_share_each_epoch(
    trained: Callable[[int], Path], phase: int, phantom_shards: Path
) -> None:
    ranks = traces(trained(phase))
    assert len(ranks) == WORLD
    row = []
    for step, both in enumerate(zip(*ranks, strict=True), start=1):
        assert [line["step"] for line in both] == [step] * WORLD
        assert both[0]["samples"] != both[1]["samples"]
        row += [key for line in both for key in line["samples"]]
    everyone = sorted(entry.key for entry in read_index(phantom_shards).select_split("train"))
    count = 1
    if phase == 3:
        # A global batch is sorted by length, so where it crosses an epoch's end both are mixed.
        count = math.lcm(len(everyone), GLOBAL_BATCH) // len(everyone)
    size = count * len(everyone)
    epochs = [row[k : k + size] for k in range(0, len(row), size)]
    assert len(row) == STEPS * WORLD * MICRO_BATCH
    assert all(sorted(epoch) == sorted(count * everyone) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


@EACH_PHASE
def test_checkpoints_hold_what_trained(trained: Callable[[int], Path], phase: int) -> None:
    folder = trained(phase)
    kept = run_folder.list_checkpoints(folder)
    assert [path.name for path in kept] == ["step-000008", "step-000012"]
    state = Checkpoint.open(kept[-1]).training
    assert (state.phase, state.step, state.world_size) == (phase, STEPS, WORLD)
    assert state.samples_seen == STEPS * WORLD * MICRO_BATCH
    length = Checkpoint.open(kept[-1]).config.train.phases[phase_key(phase)].samples
    assert length == STEPS * GLOBAL_BATCH
    earlier, last = (Checkpoint.open(path).read_tensors() for path in kept)
    assert earlier.keys() == last.keys()
    assert not any("base_layer" in name for name in last)  # frozen weights stay where they are
    assert all(tensor.isfinite().all() for tensor in last.values())
    parts = {name.partition(".")[0] for name in last}
    assert parts == {*PHASES[phase].parts, "prompts"}
    for part in PHASES[phase].parts:
        moved = [n for n in last if n.startswith(part) and not torch.equal(last[n], earlier[n])]
        assert len(moved) > 0.5 * sum(name.startswith(part) for name in last), f"{part} stood still"


def test_a_phase_starts_from_the_weights_of_the_one_before(
    trained: Callable[[int], Path],
) -> None:
    """The first loss of a task learned before is near its last, not near that of random weights.

    Outlines show it: the loss of the findings is low at once, since their bias starts at the
    prevalences.
    """
    before, after = metrics(trained(2)), metrics(trained(3))
    task = "localization"
    first, last = before[0]["losses"][task], sum(line["losses"][task] for line in before[-3:]) / 3
    assert after[0]["losses"][task] < (first + last) / 2


@pytest.mark.slow
@pytest.mark.parametrize("phase", [2, 3])
def test_what_a_phase_does_not_train_is_what_the_one_before_left(
    trained: Callable[[int], Path], phase: int, phantom_shards: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained(phase - 1), tmp_path / "tiny" / f"phase{phase - 1}")
    new_part = PHASES[phase].parts[-1]
    rates = f"train.phases.phase{phase}.lr={{{new_part}: 1.0e-3}}"
    arguments = [*settings(phase, phantom_shards, tmp_path, steps=1), rates]
    run([*TWO, f"launch/phase{phase}.py", *arguments], tmp_path)
    before = Checkpoint.open(trained(phase - 1)).read_tensors()
    after = Checkpoint.open(tmp_path / "tiny" / f"phase{phase}").read_tensors()
    assert {name.partition(".")[0] for name in before} == {*PHASES[phase - 1].parts, "prompts"}
    assert find_differing_tensors({name: after[name] for name in before}, before) == []


@pytest.mark.slow
def test_one_process_sees_the_samples_and_the_losses_of_two(
    trained: Callable[[int], Path], phantom_shards: Path, tmp_path: Path
) -> None:
    """With the same global batch, which one process takes in twice as many micro-batches."""
    arguments = settings(1, phantom_shards, tmp_path)
    run([*LAUNCH, "--num_processes", "1", "launch/phase1.py", *arguments], tmp_path)
    alone, shared = metrics(tmp_path / "tiny" / "phase1"), metrics(trained(1))
    for key in ("samples_seen", "lr"):
        assert [line[key] for line in alone] == [line[key] for line in shared]
    for ours, theirs in zip(alone, shared, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-3)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)
    samples = []
    for folder in (tmp_path / "tiny" / "phase1", trained(1)):
        by_step: dict[int, list[str]] = {}
        for line in itertools.chain(*traces(folder)):
            by_step.setdefault(line["step"], []).extend(line["samples"])
        samples.append({step: sorted(keys) for step, keys in by_step.items()})
    assert samples[0] == samples[1]


def test_the_loaded_model_is_the_checkpoint(trained: Callable[[int], Path]) -> None:
    newest = run_folder.find_checkpoint(trained(3), "")
    model = RectVLM.from_pretrained(newest, "cpu")
    config = model.config
    assert config.data.grid == load_config("tiny").data.grid
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    saved = Checkpoint.open(newest).read_tensors()
    assert set(model.checkpoint_tensor_names()) == set(saved)
    for name, tensor in saved.items():
        assert torch.equal(own[name].to(tensor.dtype), tensor), name


def test_a_checkpoint_of_two_processes_exports_and_reloads(
    trained: Callable[[int], Path], tmp_path: Path
) -> None:
    """The exported folder has, to the last bit, what ZeRO-3 sharded and the engine gathered."""
    source = Checkpoint.open(trained(3)).read_tensors()
    folder = export_checkpoint(trained(3), tmp_path / "model")
    assert find_differing_tensors(Checkpoint.open(folder).read_tensors(), source) == []
    assert Checkpoint.open(folder).training.world_size == WORLD
    model = RectVLM.from_pretrained(folder, "cpu")
    whole = RectVLM.from_pretrained(trained(3), "cpu")
    names = whole.checkpoint_tensor_names()
    ours, theirs = named_tensors(model), named_tensors(whole)
    assert find_differing_tensors({n: ours[n] for n in names}, {n: theirs[n] for n in names}) == []


@pytest.fixture(scope="session")
def final(trained: Callable[[int], Path]) -> tuple[RectVLM, Batch]:
    """The model after phase 3 and two samples that it has not seen."""
    model = RectVLM.from_pretrained(trained(3), "cpu")
    config = model.config
    batch: Any = next(iter(build_eval_loader(config.data, "valid", 2)))
    return model, batch


def test_the_image_decides_what_the_trained_model_says(final: tuple[RectVLM, Batch]) -> None:
    model, batch = final
    other = replace(batch, ct=batch.ct.flip(0), regions=batch.regions.flip(0))
    with torch.no_grad():
        own, swapped = (
            model.predict_batch(batch, generate=False),
            model.predict_batch(other, generate=False),
        )
        torch.testing.assert_close(
            swapped.finding_probabilities.flip(0), own.finding_probabilities, rtol=1e-3, atol=1e-4
        )
        assert (swapped.finding_probabilities - own.finding_probabilities).abs().max() > 1e-3
        assert (swapped.lesion_probabilities - own.lesion_probabilities).abs().max() > 1e-3
        assert model.generator is not None
        cues, reports = ["No findings suggested."] * 2, [batch.reports[0]] * 2
        told = [
            model.generator(
                model.encoder(b.ct, b.regions, b.regions_known), cues, reports
            ).log_likelihood
            for b in (batch, other)
        ]
    assert (told[0] - told[1]).abs().max() > 1e-3


def test_the_trained_model_writes_the_same_report_twice(final: tuple[RectVLM, Batch]) -> None:
    model, batch = final
    first = model.predict_batch(batch).reports
    assert first is not None
    assert len(first) == 2
    assert model.predict_batch(batch).reports == first


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_last_digit(
    trained: Callable[[int], Path], phantom_shards: Path, tmp_path: Path
) -> None:
    """Phase 3, ZeRO-3 with NF4, killed after two checkpoints; then the disk spoils the newer one.

    `test_recovery` kills every phase many times.
    """
    whole = trained(3)
    shutil.copytree(trained(2), tmp_path / "tiny" / "phase2")
    command = [*TWO, "launch/phase3.py", *settings(3, phantom_shards, tmp_path)]
    cut = tmp_path / "tiny" / "phase3"
    process = start(command, tmp_path)
    wait_for(lambda: steps_done(cut) > 2 * SAVE_EVERY, process)
    kill(process)
    with (cut / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 6, "lo')  # what a kill within a write leaves
    spoilt = run_folder.list_checkpoints(cut)[-1]
    assert spoilt.name == "step-000008"
    victim = spoilt / "engine" / "rank-00001-of-00002.safetensors"
    size = random.randrange(victim.stat().st_size)
    with victim.open("r+b") as file:
        file.truncate(size)
    shutil.rmtree(tmp_path / "tiny" / "phase2")  # what goes on needs nothing of the phase before
    code, stderr = finish(start([*command, "--resume"], tmp_path))
    assert code == 0, stderr[-4000:]
    assert f"engine/{victim.name} has {size} of" in stderr
    assert f"resumed from {cut / 'checkpoints' / 'step-000004'}" in stderr
    assert (cut / "checkpoints" / "damaged-step-000008" / "config.json").is_file()
    assert comparable(cut) == comparable(whole)
    assert traces(cut) == traces(whole)
    ours, theirs = weights_of(cut), weights_of(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_a_plain_launch_trains_on_one_process(phantom_shards: Path, tmp_path: Path) -> None:
    """`accelerate launch launch/phase1.py`, with no configuration of Accelerate anywhere.

    The encoder is frozen here: it belongs to the checkpoint all the same.
    """
    frozen = "train.phases.phase1.lr={classifier: 1.0e-3}"
    run(
        [*LAUNCH, "launch/phase1.py", *settings(1, phantom_shards, tmp_path, steps=2), frozen],
        tmp_path,
    )
    folder = tmp_path / "tiny" / "phase1"
    found = json.loads((folder / "engine.json").read_text())
    assert (found["distributed_type"], found["world_size"], found["zero_stage"]) == (
        "DEEPSPEED",
        1,
        1,
    )
    assert [line["samples_seen"] for line in metrics(folder)] == [GLOBAL_BATCH, 2 * GLOBAL_BATCH]
    model = RectVLM.from_pretrained(folder, "cpu")
    assert model.parts == ("encoder", "classifier")


@pytest.mark.slow
def test_mistakes_end_in_one_sentence(phantom_shards: Path, tmp_path: Path) -> None:
    """Run beside each other, since most of their time is Python's imports."""
    unfinished = tmp_path / "unfinished"
    folder = run_folder.step_folder(unfinished / "tiny" / "phase1", 1)
    folder.mkdir(parents=True)
    state = TrainingState(phase=1, step=1, samples_seen=4, world_size=2)
    Checkpoint(folder, PHASES[1].parts, load_config("tiny"), state, {}).write_files({}, None)
    mistakes = {
        "index.json": ["launch/phase1.py", *settings(1, tmp_path / "nowhere", tmp_path / "a")],
        "phase1": ["launch/phase2.py", *settings(2, phantom_shards, tmp_path / "b")],
        "'width'": [
            "launch/phase1.py",
            *settings(1, phantom_shards, tmp_path / "c"),
            "encoder.witdh=3",
        ],
        "--restart": ["launch/phase1.py", *settings(1, phantom_shards, unfinished)],
        "nothing to resume": [
            "launch/phase1.py",
            *settings(1, phantom_shards, tmp_path / "d"),
            "--resume",
        ],
    }
    started = {
        said: start([sys.executable, *command], tmp_path) for said, command in mistakes.items()
    }
    for said, process in started.items():
        code, stderr = finish(process)
        assert code == 2, stderr
        assert "Traceback" not in stderr
        sentences = [line for line in stderr.splitlines() if line.startswith("error: ")]
        assert len(sentences) == 1, stderr
        assert said in sentences[0]
        assert sentences[0].endswith(".")
    assert folder.is_dir()
