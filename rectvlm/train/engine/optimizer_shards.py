"""Optimizer shards on disk: 32-bit weights and moments, readable by any number of ranks.

    engine/rank-00000-of-00002.safetensors
        tensors             `G.weights`, `G.exp_avg`, `G.exp_avg_sq`, … of flat group G
        metadata `layout`   for each group its fragments and the optimizer's step count

ZeRO lays the trained parameters out in flat groups and gives every rank a part of each. A fragment
says where a piece of a parameter lies in such a part. Since the fragments are in the file, another
number of ranks finds every piece by the name of its parameter and reads only the bytes that it
needs: no conversion, no entire tensor anywhere, and no pickle.

The 16-bit weights that the model computes with are the 32-bit ones rounded, so they are not stored.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rectvlm.types import UserError

WEIGHTS_KEY, STEP_KEY, LAYOUT_KEY = "weights", "step", "layout"


class ParameterFragment(NamedTuple):
    """A piece of a parameter in a flat group of one rank."""

    name: str
    """Name of the parameter."""
    parameter_numel: int
    """Number of entries of the entire parameter."""
    start: int
    """First entry of the piece in the flattened parameter."""
    group_offset: int
    """First entry of the piece in the flat group."""
    entry_count: int
    """Number of entries of the piece."""


@dataclass(frozen=True)
class FlatGroup:
    """One rank's part of a flat group of parameters."""

    flat_weights: Tensor
    """32-bit weights, with padding."""
    fragments: list[ParameterFragment]


class FlatGroupState(NamedTuple):
    """The optimizer's state of a flat group."""

    tensors: dict[str, Tensor]
    """Tensors of the group's shape by their key in the optimizer, such as `exp_avg`."""
    step: float | None
    """Number of steps that the optimizer counts; None before the first."""


def shard_file_name(rank: int, world_size: int) -> str:
    """Name of a rank's file."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def split_evenly(parameters: Iterable[tuple[str, int, int]], rank: int) -> list[ParameterFragment]:
    """A rank's fragments where every parameter is split evenly over the ranks, as ZeRO-3 does.

    Args:
        parameters: for each its name, its number of entries, and the number of entries of a rank's
            part with padding, in the order of the group.
        rank: number of the rank.
    """
    fragments, group_offset = [], 0
    for name, numel, part_numel in parameters:
        start = rank * part_numel
        entry_count = max(0, min(part_numel, numel - start))
        if entry_count:
            fragments.append(ParameterFragment(name, numel, start, group_offset, entry_count))
        group_offset += part_numel
    return fragments


def write_optimizer_shard(
    path: Path, groups: list[FlatGroup], states: Mapping[Tensor, Mapping[str, Any]]
) -> None:
    """Write a rank's file.

    Args:
        path: the file.
        groups: the rank's flat groups.
        states: the optimizer's state, by the groups' flat weights.
    """
    tensors, layout = {}, []
    for number, group in enumerate(groups):
        state = states.get(group.flat_weights, {})
        tensors[f"{number}.{WEIGHTS_KEY}"] = group.flat_weights.detach().contiguous()
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == group.flat_weights.shape:
                tensors[f"{number}.{key}"] = value.detach().contiguous()
        step = state.get(STEP_KEY)
        layout.append(
            {STEP_KEY: None if step is None else float(step), "fragments": group.fragments}
        )
    save_file(tensors, path, metadata={LAYOUT_KEY: json.dumps(layout)})


class _SavedFragment(NamedTuple):
    """A piece of a parameter in one of the files."""

    file: Any
    """The opened safetensors file."""
    group_number: int
    tensor_keys: tuple[str, ...]
    """Keys of the group's tensors."""
    start: int
    """First entry of the piece in the flattened parameter."""
    group_offset: int
    """First entry of the piece in the flat group."""
    entry_count: int
    """Number of entries of the piece."""
    step: float | None
    """Number of steps that the optimizer has counted for the group."""

    def read_slices(self, start: int, count: int) -> Iterator[tuple[str, Tensor]]:
        """`count` entries from `start` of each of the group's tensors, with their keys."""
        for key in self.tensor_keys:
            tensor = self.file.get_slice(f"{self.group_number}.{key}")
            yield key, tensor[start : start + count]


class OptimizerShardReader:
    """The files of all ranks of a checkpoint, open for reading."""

    def __init__(self, folder: Path, world_size: int) -> None:
        """Open the files of `world_size` ranks.

        Raises:
            UserError: a file is missing or damaged.
        """
        self.folder = folder
        self._open_files = ExitStack()
        self._fragments: dict[str, list[_SavedFragment]] = defaultdict(list)
        self._numels: dict[str, int] = {}
        for rank in range(world_size):
            self._open_shard(folder / shard_file_name(rank, world_size))

    def _open_shard(self, path: Path) -> None:
        try:
            file = self._open_files.enter_context(safe_open(path, "pt"))
            layout = json.loads(file.metadata()[LAYOUT_KEY])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} cannot be read ({error}); resume from another checkpoint."
            ) from error
        keys_by_group: dict[str, list[str]] = defaultdict(list)
        for tensor_name in file.keys():  # noqa: SIM118 (it is no dict)
            group_number, _, key = tensor_name.partition(".")
            keys_by_group[group_number].append(key)
        for number, group in enumerate(layout):
            keys = tuple(keys_by_group[str(number)])
            for name, numel, start, group_offset, entry_count in group["fragments"]:
                self._fragments[name].append(
                    _SavedFragment(
                        file, number, keys, start, group_offset, entry_count, group[STEP_KEY]
                    )
                )
                self._numels[name] = numel

    def __enter__(self) -> "OptimizerShardReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._open_files.close()

    def fill_group(self, group: FlatGroup) -> FlatGroupState:
        """Fill a group's weights in place and read the optimizer's state of it.

        Raises:
            UserError: a parameter is missing or has another size.
        """
        state: dict[str, Tensor] = {}
        steps = set()
        with torch.no_grad():
            group.flat_weights.zero_()
            for fragment in group.fragments:
                for saved, begin, end in self._find_overlaps(fragment):
                    target_start = fragment.group_offset + begin - fragment.start
                    target_slice = slice(target_start, target_start + end - begin)
                    source_start = saved.group_offset + begin - saved.start
                    for key, values in saved.read_slices(source_start, end - begin):
                        if key != WEIGHTS_KEY and key not in state:
                            state[key] = torch.zeros_like(group.flat_weights)
                        target = group.flat_weights if key == WEIGHTS_KEY else state[key]
                        target[target_slice].copy_(values)
                    steps.add(saved.step)
        assert len(steps) <= 1, f"parameters of one group took {sorted(map(str, steps))} steps"
        return FlatGroupState(state, steps.pop() if steps else None)

    def _find_overlaps(
        self, fragment: ParameterFragment
    ) -> Iterator[tuple[_SavedFragment, int, int]]:
        """Saved fragments that overlap a fragment; begin and end are entries of the parameter."""
        saved_numel = self._numels.get(fragment.name)
        if saved_numel != fragment.parameter_numel:
            held = "nothing" if saved_numel is None else f"{saved_numel} entries"
            raise UserError(
                f"{self.folder} holds {held} of {fragment.name}, where the model has "
                f"{fragment.parameter_numel}: resume with the configuration that the run was "
                "started with."
            )
        missing = fragment.entry_count
        for saved in self._fragments[fragment.name]:
            begin = max(saved.start, fragment.start)
            end = min(saved.start + saved.entry_count, fragment.start + fragment.entry_count)
            if begin < end:
                missing -= end - begin
                yield saved, begin, end
        assert missing == 0, f"{missing} entries of {fragment.name} are in no file, or in two"
