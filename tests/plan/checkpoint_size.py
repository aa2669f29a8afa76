"""Size of a checkpoint's tensors, beside the plan."""

from pathlib import Path

import pytest

from rectvlm.plan.planner import ResourcePlan

_LENGTH_BYTES = 8
"""Size of the length of a safetensors file's header, bytes."""
_DESCRIPTION_LIMIT_BYTES = 250_000


def check_checkpoint_size(folder: Path, plan: ResourcePlan) -> None:
    """The tensors have the planned size; names, layouts and texts are tens of KB a rank more."""
    tensor_bytes = description_bytes = 0
    for path in folder.rglob("*"):
        if path.suffix == ".safetensors":
            with path.open("rb") as file:
                header_bytes = _LENGTH_BYTES + int.from_bytes(file.read(_LENGTH_BYTES), "little")
            tensor_bytes += path.stat().st_size - header_bytes
            description_bytes += header_bytes
        elif path.is_file():
            description_bytes += path.stat().st_size
    assert plan.checkpoint_gb * 1e9 == pytest.approx(tensor_bytes, rel=0.003)
    assert description_bytes < _DESCRIPTION_LIMIT_BYTES
