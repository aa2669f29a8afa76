"""What makes a checkpoint whole, and how optimizer state moves to another number of ranks."""

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rectvlm.checkpoint import integrity
from rectvlm.train.engine import optimizer_shards
from rectvlm.train.engine.optimizer_shards import (
    FlatGroup,
    OptimizerShardReader,
    ParameterFragment,
    shard_file_name,
    split_evenly,
)
from rectvlm.types import UserError

SIZES = {"encoder.weight": 60, "encoder.bias": 7, "scale": 1, "head.weight": 33}


def sealed(folder: Path) -> Path:
    """A folder of three files with a manifest."""
    work = folder / ".step.partial"
    (work / "engine").mkdir(parents=True)
    names = {"engine/rank-0": 5000, "weights": 3000, "state": 40}
    for name, size in names.items():
        (work / name).write_bytes(random.randbytes(size))
    integrity.finalize_checkpoint(
        work,
        {name: integrity.flush_and_hash(work / name) for name in names},
        folder / "step-000001",
    )
    return folder / "step-000001"


def faults(folder: Path) -> list[str]:
    return integrity.find_faults(folder, integrity.list_manifest_files(folder))


def test_a_sealed_folder_is_whole(tmp_path: Path) -> None:
    folder = sealed(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert integrity.list_manifest_files(folder) == ["engine/rank-0", "weights", "state"]
    (folder / "thresholds.json").write_text("{}")  # what comes later does not count
    assert faults(folder) == []


def truncate(path: Path) -> str:
    # The last byte of a JSON file is a line break, which it does not need.
    size = random.randrange(path.stat().st_size - 1)
    with path.open("r+b") as file:
        file.truncate(size)
    return f"has {size} of"


def flip(path: Path) -> str:
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)
    return "another checksum"


def remove(path: Path) -> str:
    path.unlink()
    return "is missing"


@pytest.mark.parametrize("spoil", [truncate, flip, remove])
@pytest.mark.parametrize("name", ["engine/rank-0", "weights", "state"])
def test_damage_is_named(tmp_path: Path, name: str, spoil: Callable[[Path], str]) -> None:
    folder = sealed(tmp_path)
    said = spoil(folder / name)
    found = faults(folder)
    assert len(found) == 1
    assert found[0].startswith(f"{name} ")
    assert said in found[0]


@pytest.mark.parametrize("spoil", [truncate, remove])
def test_a_damaged_manifest_is_named(tmp_path: Path, spoil: Callable[[Path], str]) -> None:
    folder = sealed(tmp_path)
    spoil(folder / "manifest.json")
    with pytest.raises(UserError, match=r"manifest\.json is (damaged|missing)"):
        integrity.list_manifest_files(folder)


def test_a_whole_checkpoint_is_never_written_over(tmp_path: Path) -> None:
    folder = sealed(tmp_path)
    with pytest.raises(OSError, match="step-000001"):
        sealed(tmp_path)
    assert faults(folder) == []


def test_what_is_removed_is_no_checkpoint_from_the_first_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sealed(tmp_path)

    def cut_off(path: Path) -> None:
        raise OSError("killed")

    monkeypatch.setattr(integrity.shutil, "rmtree", cut_off)
    with pytest.raises(OSError, match="killed"):
        integrity.remove_checkpoint(folder)
    assert [path.name for path in tmp_path.iterdir()] == [
        ".step-000001.partial"
    ]  # which the next start removes


def test_what_is_set_aside_keeps_its_files(tmp_path: Path) -> None:
    places = [integrity.set_damaged_aside(sealed(tmp_path)) for _ in range(3)]
    assert [path.name for path in places] == [
        "damaged-step-000001",
        "damaged-step-000001-2",
        "damaged-step-000001-3",
    ]
    assert all(faults(path) == [] for path in places)


# Partitions


def one_row(rank: int, world: int) -> list[ParameterFragment]:
    """ZeRO-1 and 2: parameters in one row, which is cut into equal parts."""
    total = sum(SIZES.values())
    part = math.ceil(total / world)
    fragments, place = [], 0
    for name, numel in SIZES.items():
        begin, end = max(place, rank * part), min(place + numel, (rank + 1) * part)
        if begin < end:
            fragments.append(
                ParameterFragment(name, numel, begin - place, begin - rank * part, end - begin)
            )
        place += numel
    return fragments


def each_split(rank: int, world: int) -> list[ParameterFragment]:
    """ZeRO-3: every parameter cut into equal parts."""
    return split_evenly(
        [(name, numel, math.ceil(numel / world)) for name, numel in SIZES.items()], rank
    )


def flat_of(fragments: list[ParameterFragment], values: dict[str, Tensor], length: int) -> Tensor:
    flat = torch.full((length,), -1.0)
    for f in fragments:
        flat[f.group_offset : f.group_offset + f.entry_count] = values[f.name][
            f.start : f.start + f.entry_count
        ]
    return flat


Split = Callable[[int, int], list[ParameterFragment]]


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (2, 3), (3, 2), (1, 4), (8, 3)])
@pytest.mark.parametrize(
    ("written", "read"), [(one_row, one_row), (each_split, each_split), (one_row, each_split)]
)
def test_state_finds_its_way_to_any_number_of_ranks(
    tmp_path: Path, written: Split, read: Split, before: int, after: int
) -> None:
    keys = ("weights", "exp_avg", "exp_avg_sq", "ema")
    values = {key: {name: torch.randn(numel) for name, numel in SIZES.items()} for key in keys}
    length = sum(SIZES.values()) + 16
    for rank in range(before):
        fragments = written(rank, before)
        flats = {key: flat_of(fragments, values[key], length) for key in keys}
        weights = flats.pop("weights")
        own: dict[str, Any] = {**flats, "step": torch.tensor(7.0)}
        optimizer_shards.write_optimizer_shard(
            tmp_path / shard_file_name(rank, before),
            [FlatGroup(weights, fragments)],
            {weights: own},
        )
    found: dict[str, dict[str, Tensor]] = {
        key: {name: torch.full((numel,), math.nan) for name, numel in SIZES.items()} for key in keys
    }
    with OptimizerShardReader(tmp_path, before) as saved:
        for rank in range(after):
            group = FlatGroup(torch.full((length,), 5.0), read(rank, after))
            state = saved.fill_group(group)
            if group.fragments:
                assert state.step == 7.0
            for key in keys if group.fragments else ():
                flat = group.flat_weights if key == "weights" else state.tensors[key]
                for f in group.fragments:
                    found[key][f.name][f.start : f.start + f.entry_count] = flat[
                        f.group_offset : f.group_offset + f.entry_count
                    ]
    for key in keys:
        for name in SIZES:
            assert torch.equal(found[key][name], values[key][name]), f"{key} of {name}"


def test_state_of_another_model_is_refused(tmp_path: Path) -> None:
    flat = torch.zeros(4)
    optimizer_shards.write_optimizer_shard(
        tmp_path / shard_file_name(0, 1),
        [FlatGroup(flat, [ParameterFragment("a", 4, 0, 0, 4)])],
        {},
    )
    with OptimizerShardReader(tmp_path, 1) as saved:
        with pytest.raises(UserError, match="holds nothing of b"):
            saved.fill_group(FlatGroup(flat, [ParameterFragment("b", 4, 0, 0, 4)]))
        with pytest.raises(UserError, match="holds 4 entries of a, where the model has 5"):
            saved.fill_group(FlatGroup(torch.zeros(5), [ParameterFragment("a", 5, 0, 0, 5)]))
    with pytest.raises(UserError, match="rank-00001-of-00002"):
        optimizer_shards.write_optimizer_shard(
            tmp_path / shard_file_name(0, 2), [FlatGroup(flat, [])], {}
        )
        OptimizerShardReader(tmp_path, 2)
