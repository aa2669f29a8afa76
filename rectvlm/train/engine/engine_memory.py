"""What the engine really runs, for `engine.json`: kind, ZeRO stage, and the bytes on every rank."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from rectvlm.train.engine.launcher_settings import LauncherSettings


@dataclass(frozen=True)
class RankDescription:
    """What one rank holds; the field names are keys of `engine.json`."""

    rank: int
    device: str
    packed_bytes: int
    """Packed 4-bit weights on this rank, bytes."""
    packed_bytes_of_model: int
    """Packed 4-bit weights of the entire model, bytes."""
    bytes: dict[str, int]
    """Bytes held between steps, by kind."""
    peak_memory_bytes: int
    """Largest memory held since the start, bytes."""


@dataclass(frozen=True)
class EngineDescription:
    """What runs; the field names are keys of `engine.json`."""

    distributed_type: str
    """Name that Accelerate gives to the kind of training."""
    zero_stage: int
    world_size: int
    mixed_precision: str
    """Precision in which Accelerate and DeepSpeed compute."""
    dynamo_backend: str
    """Compiler of the model; `NO` for none."""
    launcher: LauncherSettings
    """What the launcher asked for, and which of it training follows."""
    ranks: list[RankDescription]


def count_bytes_by_kind(module: nn.Module, packed_names: Collection[str]) -> dict[str, int]:
    """Bytes of weights that this rank holds between steps, by the kinds of `rectvlm.plan`.

    Args:
        module: the prepared model.
        packed_names: names of the packed 4-bit weights.
    """
    kinds = ("weights_4bit", "weights_frozen", "weights_trainable", "weights_resident")
    bytes_by_kind = dict.fromkeys(kinds, 0)
    for name, parameter in module.named_parameters():
        kind = "weights_trainable" if parameter.requires_grad else "weights_frozen"
        if name in packed_names:
            kind = "weights_4bit"
        shard = getattr(parameter, "ds_tensor", parameter)
        bytes_by_kind[kind] += shard.numel() * shard.element_size()
        if _is_gathered(parameter):
            bytes_by_kind["weights_resident"] += _count_gathered_bytes(parameter)
    bytes_by_kind["quantization_state"] = 0
    for layer in module.modules():
        if isinstance(layer, Linear4bit):
            weight: Any = layer.weight
            tensors = _list_quantization_tensors(weight.quant_state)
            bytes_by_kind["quantization_state"] += sum(tensor.nbytes for tensor in tensors)
    return bytes_by_kind


def count_packed_bytes(module: nn.Module, packed_names: Collection[str], local: bool) -> int:
    """Bytes of packed 4-bit weights: of this rank's shard, or of the entire model."""
    total = 0
    parameters = dict(module.named_parameters())
    for name in packed_names:
        parameter = parameters[name]
        if not hasattr(parameter, "ds_tensor"):
            total += parameter.numel() * parameter.element_size()
        # A gathered parameter lies entire on this rank, whatever its shard.
        elif local and not _is_gathered(parameter):
            total += parameter.ds_tensor.numel() * parameter.ds_tensor.element_size()
        else:
            total += _count_gathered_bytes(parameter)
    return total


def _is_gathered(parameter: Any) -> bool:
    """Whether ZeRO-3 holds an entire parameter on this rank now."""
    return hasattr(parameter, "ds_tensor") and parameter.ds_status.name == "AVAILABLE"


def _count_gathered_bytes(parameter: Any) -> int:
    """Bytes of a parameter that ZeRO-3 shards, when it is gathered."""
    return int(parameter.ds_numel * parameter.ds_tensor.element_size())


def _list_quantization_tensors(state: Any) -> list[Tensor]:
    """Tensors of a weight's quantization state, with those of its second level."""
    values = (state.absmax, state.code, state.offset)
    tensors = [value for value in values if isinstance(value, Tensor)]
    if state.state2 is not None:
        tensors += _list_quantization_tensors(state.state2)
    return tensors
