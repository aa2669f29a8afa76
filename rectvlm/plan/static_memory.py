"""Bytes on one GPU that do not change within a micro-batch: weights, gradients, optimizer state.

N trainable and F frozen bf16 parameters, P bytes of 4-bit weights, W GPUs. ZeRO (Rajbhandari et
al., 2020):

    ZeRO    bf16 weights      gradients   master and Adam, fp32
    1       2 N               2 N         12 N / W
    2       2 N               2 N / W     12 N / W
    3       2 N / W           2 N / W     12 N / W

Under ZeRO-3 the frozen and the 4-bit weights are sharded too, and parameters up to the persistence
threshold stay complete beside their shards. With `zero_hpz_partition_size` (hpZ, ZeRO++: Wang et
al., 2023) each node holds a second, complete copy of the sharded ones. Scales of 4-bit weights are
no parameters: every GPU holds all of them.
"""

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rectvlm.config import MODEL_PARTS, Config
from rectvlm.models import RectVLM
from rectvlm.train.dry_run.dry_run import find_quantized_layers
from rectvlm.train.dry_run.meta_ops import count_quantization_state_bytes
from rectvlm.train.engine.leaf_modules import find_leaf_modules, is_gathered_whole

BF16_BYTES, FP32_BYTES = 2, 4

# DeepSpeed's defaults, in entries, where the JSON is silent.
DEFAULT_REDUCE_BUCKET = 500_000_000
DEFAULT_PREFETCH_BUCKET = 50_000_000
DEFAULT_MAX_LIVE_PARAMETERS = 1_000_000_000
DEFAULT_SUB_GROUP = 1_000_000_000
DEFAULT_PERSISTENCE_THRESHOLD = 100_000


@dataclass
class StoredParameter:
    """A parameter as it is stored."""

    name: str
    entries: int
    """Entries of the stored tensor: a 4-bit weight has fewer than the layer has weights."""
    entry_bytes: int
    """Size of an entry, bytes."""
    is_trainable: bool
    is_quantized: bool

    def shard_bytes(self, gpus: int) -> int:
        """Return the size of one GPU's shard; the last shard is padded."""
        return math.ceil(self.entries / gpus) * self.entry_bytes

    @property
    def total_bytes(self) -> int:
        """Size of the complete tensor, bytes."""
        return self.entries * self.entry_bytes

    @property
    def memory_kind(self) -> str:
        """Kind of memory that the tensor counts for."""
        if self.is_quantized:
            return "weights_4bit"
        return "weights_trainable" if self.is_trainable else "weights_frozen"


def list_stored_parameters(model: RectVLM, config: Config) -> list[StoredParameter]:
    """List every parameter of a meta model as it will be stored."""
    quantized_ids = {id(layer.weight) for layer in find_quantized_layers(model, config)}
    storage_dtype = getattr(torch, config.generator.quant_storage)
    storage_bytes = torch.empty(0, dtype=storage_dtype).element_size()
    stored: list[StoredParameter] = []
    for name, parameter in model.named_parameters():
        weights = parameter.numel()
        if id(parameter) in quantized_ids:
            entries = math.ceil(math.ceil(weights / 2) / storage_bytes)
            stored.append(StoredParameter(name, entries, storage_bytes, False, True))
        else:
            is_trainable = parameter.requires_grad
            stored.append(StoredParameter(name, weights, BF16_BYTES, is_trainable, False))
    return stored


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters, as a layer uses them and not as 4-bit weights are packed."""

    encoder: int
    classifier_trainable: int
    localizer: int
    generator_trainable: int
    language_model_frozen: int
    trainable: int
    """Number of all trainable parameters."""
    total: int
    """Number of all parameters, frozen ones included."""


def count_parameters(model: RectVLM) -> ParameterCounts:
    """Count the parameters of a model by part."""
    parts = {part: getattr(model, part, None) for part in MODEL_PARTS}
    generator_trainable = _count_entries(parts["generator"], trainable_only=True)
    return ParameterCounts(
        encoder=_count_entries(parts["encoder"]),
        classifier_trainable=_count_entries(parts["classifier"], trainable_only=True),
        localizer=_count_entries(parts["localizer"]),
        generator_trainable=generator_trainable,
        language_model_frozen=_count_entries(parts["generator"]) - generator_trainable,
        trainable=_count_entries(model, trainable_only=True),
        total=_count_entries(model),
    )


def _count_entries(module: nn.Module | None, trainable_only: bool = False) -> int:
    entries = 0
    for parameter in () if module is None else module.parameters():
        if parameter.requires_grad or not trainable_only:
            entries += parameter.numel()
    return entries


@dataclass
class StaticMemory:
    """Bytes on each GPU and bytes that GPUs exchange, apart from activations."""

    bytes_by_kind: dict[str, int]
    """Bytes held throughout a step, by kind."""
    optimizer_step_bytes: int
    """Additional bytes while the optimizer steps."""
    loading_peak_bytes: int
    """Peak bytes while the language model is loaded, when the GPU holds its weights alone."""
    gathered_bytes: int
    """Bytes that all gathers of a micro-batch collect; 0 where nothing is sharded."""
    gathered_in_node_bytes: int
    """Those of `gathered_bytes` that come from a node's own copy (hpZ)."""
    gather_calls: int
    """Number of those gathers: one for each pass of a leaf module or of another parameter."""
    reduced_bytes: int
    """Bytes of gradients in each reduction of all of them."""


def compute_static_memory(
    model: RectVLM, config: Config, ds_settings: dict[str, Any], gpus: int, has_ema: bool = False
) -> StaticMemory:
    """Compute what each GPU holds apart from activations.

    Args:
        model: a model from `build_phase_meta_model`.
        config: the configuration that the model was built from.
        ds_settings: the phase's DeepSpeed JSON, filled in.
        gpus: number of GPUs that share the states.
        has_ema: whether a moving average of the weights is kept: 4 bytes a weight more in the
            optimizer.
    """
    zero = ds_settings["zero_optimization"]
    zero_stage = zero["stage"]
    parameters = list_stored_parameters(model, config)
    trainable = [parameter for parameter in parameters if parameter.is_trainable]
    threshold = zero.get("stage3_param_persistence_threshold", DEFAULT_PERSISTENCE_THRESHOLD)
    sharded: list[StoredParameter] = []
    if zero_stage == 3 and gpus > 1:
        sharded = [parameter for parameter in parameters if parameter.entries > threshold]

    bytes_by_kind = _count_weight_bytes(parameters, zero_stage, gpus, threshold)
    bytes_by_kind["quantization_state"] = _count_all_quantization_state_bytes(model, config)
    bytes_by_kind["buffers"] = sum(b.numel() * b.element_size() for b in model.buffers())

    entries = sum(parameter.entries for parameter in trainable)
    sharded_entries = sum(math.ceil(parameter.entries / gpus) for parameter in trainable)
    gradient_entries = entries if zero_stage < 2 else sharded_entries
    bytes_by_kind["gradients"] = BF16_BYTES * gradient_entries
    bytes_by_kind["optimizer"] = (3 + has_ema) * FP32_BYTES * sharded_entries
    bytes_by_kind["reduce_buckets"] = _count_reduce_bucket_bytes(zero)
    leaf_modules = find_leaf_modules(model)
    largest_unit = _count_largest_gathered_unit(sharded, leaf_modules)
    copies = zero.get("zero_hpz_partition_size", 1)
    if copies > 1:
        shards_in_node = min(copies, gpus)
        bytes_by_kind["weights_in_node"] = sum(p.shard_bytes(shards_in_node) for p in sharded)
    bytes_by_kind["gather_buffers"] = _count_gather_buffer_bytes(sharded, largest_unit, zero)

    frozen_sizes = [parameter.total_bytes for parameter in parameters if not parameter.is_trainable]
    loaded_kinds = ("weights_4bit", "weights_frozen", "quantization_state")
    loaded_bytes = sum(bytes_by_kind[kind] for kind in loaded_kinds)
    sub_group_entries = min(sharded_entries, zero.get("sub_group_size", DEFAULT_SUB_GROUP))
    gathered_bytes = gathered_in_node_bytes = 0
    gathered_units: set[str] = set()
    for parameter in sharded:
        unit = _name_gathered_unit(parameter.name, leaf_modules)
        gathered_units.add(unit)
        passes = count_passes(unit, config, leaf_modules)
        gathered_bytes += passes * parameter.total_bytes
        if copies > 1:
            # A weight that was updated comes from all nodes in the forward pass.
            gathered_in_node_bytes += (passes - parameter.is_trainable) * parameter.total_bytes
    gather_calls = sum(count_passes(unit, config, leaf_modules) for unit in gathered_units)
    return StaticMemory(
        bytes_by_kind=bytes_by_kind,
        # Gradients in fp32, and the denominator that Adam builds for all tensors of a group.
        optimizer_step_bytes=2 * FP32_BYTES * sub_group_entries,
        loading_peak_bytes=loaded_bytes + 2 * max(frozen_sizes, default=0),
        gathered_bytes=gathered_bytes,
        gathered_in_node_bytes=gathered_in_node_bytes,
        gather_calls=gather_calls,
        reduced_bytes=BF16_BYTES * entries if gpus > 1 else 0,
    )


def _count_weight_bytes(
    parameters: Sequence[StoredParameter], zero_stage: int, gpus: int, threshold: float
) -> dict[str, int]:
    kinds = ("weights_4bit", "weights_frozen", "weights_trainable", "weights_resident")
    bytes_by_kind = dict.fromkeys(kinds, 0)
    shards = gpus if zero_stage == 3 else 1
    for parameter in parameters:
        bytes_by_kind[parameter.memory_kind] += parameter.shard_bytes(shards)
        if zero_stage == 3 and parameter.entries <= threshold:
            bytes_by_kind["weights_resident"] += parameter.total_bytes
    return bytes_by_kind


def _count_all_quantization_state_bytes(model: RectVLM, config: Config) -> int:
    double_quantization = config.generator.double_quantization
    state_bytes = 0
    for layer in find_quantized_layers(model, config):
        weights = layer.weight.numel()
        state_bytes += count_quantization_state_bytes(weights, double_quantization)
    return state_bytes


def count_passes(name: str, config: Config, leaf_modules: Mapping[str, nn.Module]) -> int:
    """Count how often a micro-batch passes a parameter or module of this name.

    It does so forward, backward, and forward again where activations are recomputed. ZeRO-3
    gathers each time: it frees a layer between its recomputation and its backward pass. A module
    that `is_gathered_whole` recomputes within itself, in its backward pass.
    """
    part = getattr(config, name.partition(".")[0], None)
    is_recomputed = getattr(part, "activation_checkpointing", False)
    return 3 if is_recomputed and not is_gathered_whole(leaf_modules.get(name)) else 2


def _count_reduce_bucket_bytes(zero: dict[str, Any]) -> int:
    zero_stage = zero["stage"]
    overlaps = zero.get("overlap_comm", zero_stage == 3) and zero_stage < 3
    bucket_bytes: int = zero.get("reduce_bucket_size", DEFAULT_REDUCE_BUCKET) * BF16_BYTES
    return bucket_bytes * (2 if overlaps else 1)


def count_hooked_passes(model: RectVLM, config: Config) -> int:
    """Count the passes of a micro-batch for which ZeRO-3 runs hooks: those of leaf modules and of
    modules with weights outside them."""
    leaf_modules = find_leaf_modules(model)
    passes = sum(count_passes(name, config, leaf_modules) for name in leaf_modules)
    for name, module in model.named_modules():
        has_weights = next(module.parameters(recurse=False), None) is not None
        if has_weights and _name_gathered_unit(f"{name}.", leaf_modules) not in leaf_modules:
            passes += count_passes(name, config, leaf_modules)
    return passes


def _name_gathered_unit(parameter_name: str, leaf_modules: Collection[str]) -> str:
    """Name of the leaf module that a parameter is gathered with; its own outside of them."""
    path = parameter_name
    while path := path.rpartition(".")[0]:
        if path in leaf_modules:
            return path
    return parameter_name


def _count_largest_gathered_unit(
    sharded: Sequence[StoredParameter], leaf_modules: Collection[str]
) -> int:
    """Count the entries of the largest leaf module or parameter that is gathered at once."""
    entries_by_unit: dict[str, int] = defaultdict(int)
    for parameter in sharded:
        entries_by_unit[_name_gathered_unit(parameter.name, leaf_modules)] += parameter.entries
    return max(entries_by_unit.values(), default=0)


def _count_gather_buffer_bytes(
    sharded: Sequence[StoredParameter], largest_unit: int, zero: dict[str, Any]
) -> int:
    """Count the bytes of gathered parameters at their peak.

    Every module that starts fetches its own parameters, a leaf module all within it, and up to a
    bucket of later ones while fewer than `stage3_max_live_parameters` entries are alive. The
    fetching runs ahead up to that limit, and what crosses it still comes complete. What arrives is
    copied out of its bucket.
    """
    if not sharded:
        return 0
    max_live = zero.get("stage3_max_live_parameters", DEFAULT_MAX_LIVE_PARAMETERS)
    bucket = zero.get("stage3_prefetch_bucket_size", DEFAULT_PREFETCH_BUCKET)
    largest = max(sharded, key=lambda parameter: parameter.entries)
    sharded_entries = sum(parameter.entries for parameter in sharded)
    live_entries = min(sharded_entries, max_live + largest_unit)
    buffer_bytes: int = live_entries * largest.entry_bytes
    return buffer_bytes + min(bucket, sharded_entries) * BF16_BYTES
