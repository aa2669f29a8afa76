"""What the optimizer holds, on disk: each rank's share of 32-bit weights and moments, for any number of ranks to read.

    engine/rank-00000-of-00002.safetensors    tensors `G.weights`, `G.exp_avg`, `G.exp_avg_sq`, … of flat group G
        metadata `layout`   per group: which entries of which parameter lie where, and the optimizer's step count

ZeRO lays the parameters that train out in flat groups and gives every rank a part. A fragment says where a piece of a
parameter lies in such a part. With the fragments in the file, another number of ranks finds every piece by the name of
its parameter and reads just the bytes that it needs: no conversion, no whole tensor anywhere, and no pickle.

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
    parameter_numel: int
    """Entries of the whole parameter."""
    start: int
    """First entry of the piece, in the flattened parameter."""
    group_offset: int
    """Its place in the group."""
    entry_count: int


@dataclass(frozen=True)
class FlatGroup:
    """A flat group of one rank."""

    flat_weights: Tensor
    """32-bit weights, with padding."""
    fragments: list[ParameterFragment]


def shard_file_name(rank: int, world_size: int) -> str:
    """Name of a rank's file."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def split_evenly(parameters: Iterable[tuple[str, int, int]], rank: int) -> list[ParameterFragment]:
    """Fragments where every parameter is split evenly over the ranks, as ZeRO-3 does it.

    Args:
        parameters: name, entries of the whole, and entries of each rank's part with its padding, in order.
        rank: whose.
    """
    fragments, offset = [], 0
    for name, numel, part in parameters:
        count = max(0, min(part, numel - rank * part))
        if count:
            fragments.append(ParameterFragment(name, numel, rank * part, offset, count))
        offset += part
    return fragments


def write_optimizer_shard(
    path: Path, groups: list[FlatGroup], state: Mapping[Tensor, Mapping[str, Any]]
) -> None:
    """Write a rank's file.

    Args:
        path: of the file.
        groups: of this rank.
        state: of the optimizer, by the groups' flat tensors.
    """
    tensors, layout = {}, []
    for number, group in enumerate(groups):
        own = state.get(group.flat_weights, {})
        tensors[f"{number}.{WEIGHTS_KEY}"] = group.flat_weights.detach()
        for key, value in own.items():
            if isinstance(value, Tensor) and value.shape == group.flat_weights.shape:
                tensors[f"{number}.{key}"] = value.detach()
        step = own.get(STEP_KEY)
        layout.append(
            {STEP_KEY: None if step is None else float(step), "fragments": group.fragments}
        )
    save_file(
        {name: t.contiguous() for name, t in tensors.items()},
        path,
        metadata={LAYOUT_KEY: json.dumps(layout)},
    )


class _SavedFragment(NamedTuple):
    """Where entries of a parameter lie in the files."""

    file: Any
    group_number: int
    tensor_keys: tuple[str, ...]
    """Of the group's tensors."""
    start: int
    group_offset: int
    entry_count: int
    step: float | None


class OptimizerShardReader:
    """The files of all ranks of a checkpoint, open for reading."""

    def __init__(self, folder: Path, world: int) -> None:
        """Open.

        Raises:
            UserError: a file is missing or damaged.
        """
        self.folder = folder
        self._open = ExitStack()
        self._pieces: dict[str, list[_SavedFragment]] = defaultdict(list)
        self._numel: dict[str, int] = {}
        for rank in range(world):
            self._open_shard(folder / shard_file_name(rank, world), rank)

    def _open_shard(self, path: Path, rank: int) -> None:
        try:
            file = self._open.enter_context(safe_open(path, "pt"))
            layout = json.loads(file.metadata()[LAYOUT_KEY])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} cannot be read ({error}); resume from another checkpoint."
            ) from error
        tensors = [name.partition(".") for name in file.keys()]  # noqa: SIM118 (it is no dict)
        for number, group in enumerate(layout):
            keys = tuple(key for found, _, key in tensors if found == str(number))
            for name, numel, start, offset, count in group["fragments"]:
                self._pieces[name].append(
                    _SavedFragment(file, number, keys, start, offset, count, group[STEP_KEY])
                )
                self._numel[name] = numel

    def __enter__(self) -> "OptimizerShardReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def fill_group(self, group: FlatGroup) -> dict[str, Tensor | float | None]:
        """Fill a group's weights in place; the optimizer's tensors for it, and its step count.

        Raises:
            UserError: a parameter is missing or has another size.
        """
        state: dict[str, Any] = {}
        steps = set()
        with torch.no_grad():
            group.flat_weights.zero_()
            for fragment in group.fragments:
                for piece, begin, end in self._find_overlaps(fragment):
                    place = fragment.group_offset + begin - fragment.start
                    source = piece.group_offset + begin - piece.start
                    for key, tensor in self._read_slices(piece, source, end - begin):
                        if key != WEIGHTS_KEY and key not in state:
                            state[key] = torch.zeros_like(group.flat_weights)
                        target = group.flat_weights if key == WEIGHTS_KEY else state[key]
                        target[place : place + end - begin].copy_(tensor)
                    steps.add(piece.step)
        assert len(steps) <= 1, f"parameters of one group took {sorted(map(str, steps))} steps"
        return {**state, STEP_KEY: steps.pop() if steps else None}

    def _find_overlaps(
        self, wanted: ParameterFragment
    ) -> Iterator[tuple[_SavedFragment, int, int]]:
        """Saved pieces with what of them lies in a fragment, as entries of the parameter."""
        if self._numel.get(wanted.name) != wanted.parameter_numel:
            found = (
                f"{self._numel[wanted.name]} entries" if wanted.name in self._numel else "nothing"
            )
            raise UserError(
                f"{self.folder} holds {found} of {wanted.name}, where the model has {wanted.parameter_numel}: resume with the "
                "configuration that the run was started with."
            )
        left = wanted.entry_count
        for piece in self._pieces[wanted.name]:
            begin = max(piece.start, wanted.start)
            end = min(piece.start + piece.entry_count, wanted.start + wanted.entry_count)
            if begin < end:
                left -= end - begin
                yield piece, begin, end
        assert left == 0, f"{left} entries of {wanted.name} are in no file, or in two"

    def _read_slices(
        self, piece: _SavedFragment, start: int, count: int
    ) -> Iterator[tuple[str, Tensor]]:
        for key in piece.tensor_keys:
            yield key, piece.file.get_slice(f"{piece.group_number}.{key}")[start : start + count]
