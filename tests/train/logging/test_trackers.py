"""What a training run reports to others.

W&B's and TensorBoard's own files read back, pictures, and where the run came from.
"""

import json
import os
import re
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launches import CHECKOUT, GLOBAL_BATCH, LAUNCH, TIMEOUT, environment, length, metrics, settings
from PIL import Image

from rectvlm import cli
from rectvlm.data.shards import read_index

STEPS, VALID = 4, ("phantom_6", "phantom_7", "phantom_8")


def train(folder: Path, shards: Path, *more: str) -> str:
    """Phase 1 on one process with both trackers; what it said."""
    told = {
        "RECTVLM_TRACKERS": "wandb,tensorboard",
        "WANDB_MODE": "offline",
        "RECTVLM_PEAK_TFLOPS": "0.25",
    }
    arguments = ["launch/phase1.py", *settings(1, shards, folder, STEPS)]
    validation = [
        "train.phases.phase1.validation.every=1",
        "train.phases.phase1.validation.shown_cases=1",
    ]
    done = subprocess.run(
        [*LAUNCH, "--num_processes", "1", *arguments, *validation, *more],
        cwd=CHECKOUT,
        env=environment(folder) | told,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, phantom_shards: Path) -> tuple[Path, str]:
    """A phase folder, and what the run said."""
    folder = tmp_path_factory.mktemp("seen")
    said = train(folder, phantom_shards)
    return folder / "tiny/phase1", said


def test_the_last_line_says_it_all(seen: tuple[Path, str]) -> None:
    folder, said = seen
    (line,) = (line for line in said.splitlines() if "step 4 of 4" in line)
    number = r"\d+(\.\d+)?(e[+-]\d+)?"
    assert re.search(
        rf"phase 1: step 4 of 4, loss {number} \(classification {number}\), "
        rf"{number} samples/s, {number}k? tokens/s, "
        rf"MFU {number}%, data wait {number}%, memory {number} GB, 0:00 left",
        line,
    )
    lines = metrics(folder)[1:]  # without the first step
    rate = GLOBAL_BATCH * len(lines) / sum(line["seconds"]["total"] for line in lines)
    told = re.search(r"([\d.e+]+) samples/s", line)
    assert told is not None and float(told[1]) == pytest.approx(rate, rel=0.01)


def test_tensorboard_reads_its_file(seen: tuple[Path, str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = seen
    events = EventAccumulator(
        str(folder / "tensorboard/rectvlm"), size_guidance={"images": 0, "tensors": 0}
    )
    events.Reload()
    for name, value in (
        ("loss", lambda line: line["loss"]),
        ("losses/classification", lambda line: line["losses"]["classification"]),
        ("lr/encoder", lambda line: line["lr"]["encoder"]),
        ("seconds/data", lambda line: line["seconds"]["data"]),
    ):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [
            (line["step"], pytest.approx(value(line), rel=1e-5)) for line in metrics(folder)
        ]
    validations = [
        json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()
    ]
    assert [event.value for event in events.Scalars("validation/loss")] == [
        pytest.approx(line["metrics"]["loss"], rel=1e-5) for line in validations
    ]
    assert events.Scalars("recent/mfu")[-1].value > 0
    shown = events.Images(f"validation/{VALID[0]}")
    assert [image.step for image in shown] == [STEPS]
    assert (
        "encoder:" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    )


def records(path: Path) -> Iterator[Any]:
    """Records of W&B's own file, in LevelDB's log format.

    Blocks of 32 KiB, each record in one piece or several.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    place, pieces = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # no room for a header: padding up to the next block
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        pieces += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(pieces)
            pieces = b""


def test_wandb_has_written_the_run(seen: tuple[Path, str]) -> None:
    folder, _ = seen
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    history: dict[int, dict[str, Any]] = {}
    runs = []
    for record in records(file):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            items = {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                for item in record.history.item
            }
            history.setdefault(items["_step"], {}).update(items)
        elif kind == "run":
            runs.append(record.run)
    assert [history[line["step"]]["losses/classification"] for line in metrics(folder)] == [
        pytest.approx(line["losses"]["classification"]) for line in metrics(folder)
    ]
    assert history[STEPS]["validation/loss"] > 0
    assert runs[0].project == "rectvlm" and runs[0].display_name == "tiny-phase1"
    pictures = list(folder.glob("wandb/offline-run-*/files/media/images/validation/*.png"))
    assert len(pictures) == 1


def test_pictures_and_words_of_a_validation(seen: tuple[Path, str], phantom_shards: Path) -> None:
    folder, _ = seen
    assert {entry.key for entry in read_index(phantom_shards).select_split("valid")} == set(VALID)
    left = folder / f"validation/step-{STEPS:06d}"
    assert {path.name for path in left.iterdir()} == {f"{VALID[0]}.png", f"{VALID[0]}.md"}
    with Image.open(left / f"{VALID[0]}.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 20
    assert "| finding | probability | truth |" in (left / f"{VALID[0]}.md").read_text()


def test_the_run_says_where_it_came_from(seen: tuple[Path, str]) -> None:
    folder, _ = seen
    (session,) = json.loads((folder / "run.json").read_text())["sessions"]
    assert (session["state"], session["from_step"], session["last_step"]) == ("finished", 0, STEPS)
    assert (session["world_size"], session["nodes"], session["name"], session["phase"]) == (
        1,
        1,
        "tiny",
        1,
    )
    assert (
        "launch/phase1.py --config tiny" in session["command"]
        and "accelerate" in session["launcher"]
    )
    assert session["directory"] == str(CHECKOUT) and session["machine"]["cores"] == os.cpu_count()
    assert session["start"] <= session["end"] and session["work"]["peak"]["tflops"] == 0.25
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    if head.returncode == 0:  # not where the tests run on a copy without its history
        assert re.fullmatch("[0-9a-f]{40}", session["git"]["commit"])
        assert session["git"]["dirty"] == ("patch" in session["git"])


def test_the_time_to_the_first_step_is_logged_and_recorded(seen: tuple[Path, str]) -> None:
    folder, said = seen
    (session,) = json.loads((folder / "run.json").read_text())["sessions"]
    seconds = session["startup_seconds"]
    assert set(seconds) == {"imports", "checks", "engine", "data", "model", "first step"}
    assert min(seconds.values()) >= 0 and seconds["imports"] > 0
    first_step = metrics(folder)[0]["seconds"]
    assert seconds["data"] >= first_step["data"]
    assert seconds["first step"] >= 0.99 * (first_step["total"] - first_step["data"])
    (line,) = (line for line in said.splitlines() if "the first step ended after" in line)
    assert f"after {sum(seconds.values()):.1f} s (imports {seconds['imports']:.1f}, " in line


@pytest.mark.slow
def test_a_resumed_run_goes_on_everywhere(
    seen: tuple[Path, str], phantom_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Last: it changes what the others look at."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = seen
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    train(folder.parents[1], phantom_shards, "--resume", *length("phase1", STEPS + 2))
    sessions = json.loads((folder / "run.json").read_text())["sessions"]
    assert [session["state"] for session in sessions] == ["finished", "finished"]
    assert [(session["from_step"], session["last_step"]) for session in sessions] == [
        (0, STEPS),
        (STEPS, STEPS + 2),
    ]
    assert [line["step"] for line in metrics(folder)] == list(range(1, STEPS + 3))
    events = EventAccumulator(str(folder / "tensorboard/rectvlm"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, STEPS + 3))
    identities = {
        path.parent.name.rpartition("-")[2] for path in folder.glob("wandb/offline-run-*/*.wandb")
    }
    assert len(identities) == 1 and len(list(folder.glob("wandb/offline-run-*/*.wandb"))) == 2
    assert cli.main(["runs", "list", str(folder), "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert told["sessions"] == 2 and told["state"] == "finished" and told["mfu"] > 0
