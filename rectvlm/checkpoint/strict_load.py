"""Strict loading: tensors fit the model, or every fault is named and nothing is loaded."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rectvlm.types import UserError

MAX_LISTED_NAMES = 8


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a model, by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


DEFAULT_REMEDY = "use the configuration they came from"
"""Advice where tensors do not fit."""


def load_tensors(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    expected: Iterable[str],
    where: Path,
    remedy: str = DEFAULT_REMEDY,
) -> None:
    """Copy tensors into a model.

    Args:
        model: receives them, in its own dtypes.
        tensors: by name.
        expected: names that must be there, and no others.
        where: the tensors' file or folder, for the message.
        remedy: what the user can do where they do not fit, as the end of a sentence.

    Raises:
        UserError: naming what is missing, what is unexpected and what has another shape.
    """
    expected = set(expected)
    check_tensors(model, tensors, expected, where, remedy)
    targets = named_tensors(model)
    with torch.no_grad():
        for name in expected:
            targets[name].copy_(tensors[name])


def check_tensors(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    expected: Iterable[str],
    where: Path,
    remedy: str = DEFAULT_REMEDY,
) -> None:
    """Check that tensors fit a model, which may lie on the meta device.

    Raises:
        UserError: naming what is missing, what is unexpected and what has another shape.
    """
    expected = set(expected)
    targets = named_tensors(model)
    reshaped = []
    for name in sorted(expected & tensors.keys()):
        # ZeRO-3 leaves a sharded parameter without entries and keeps its shape here.
        shape = tuple(getattr(targets[name], "ds_shape", targets[name].shape))
        if tuple(tensors[name].shape) != shape:
            reshaped.append(f"{name} {tuple(tensors[name].shape)} instead of {shape}")
    faults = {
        "missing": sorted(expected - tensors.keys()),
        "unexpected": sorted(tensors.keys() - expected),
        "of another shape": reshaped,
    }
    phrases = [f"{fault}: {_join_names(names)}" for fault, names in faults.items() if names]
    if phrases:
        raise UserError(
            f"The weights in {where} do not fit the model: {'; '.join(phrases)}; {remedy}."
        )


def find_differing_tensors(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that are in one only, or that differ in dtype, shape or any bit."""
    names = set(first.keys() ^ second.keys())
    for name in first.keys() & second.keys():
        if not _is_identical(first[name], second[name]):
            names.add(name)
    return sorted(names)


def _is_identical(first: Tensor, second: Tensor) -> bool:
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    # As bytes: NaN differs from itself, and −0 equals 0.
    return torch.equal(_as_bytes(first), _as_bytes(second))


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _join_names(names: Sequence[str]) -> str:
    rest = len(names) - MAX_LISTED_NAMES
    return ", ".join(names[:MAX_LISTED_NAMES]) + (f" and {rest} more" if rest > 0 else "")
