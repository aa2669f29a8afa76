"""Bytes that do not come and go with a micro-batch: weights, gradients, optimizer state, buffers; for one GPU.

N trainable and F frozen bf16 parameters, P packed bytes, W GPUs. ZeRO (Rajbhandari et al., 2020):

    stage   bf16 weights      gradients   master and Adam, fp32
    1       2 N               2 N         12 N / W
    2       2 N               2 N / W     12 N / W
    3       2 N / W           2 N / W     12 N / W

Under stage 3 the frozen and the packed weights are shared out too, and parameters up to the persistence threshold stay
whole beside their shards. Scales of packed weights are no parameters: every GPU holds them all.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rectvlm.config import MODEL_PARTS, Config
from rectvlm.models import RectVLM
from rectvlm.train.dry_run.dry_run import find_quantized_layers
from rectvlm.train.dry_run.meta_ops import count_quantization_state_bytes
from rectvlm.train.engine.ds_config import choose_persistence_threshold

BF16_BYTES, FP32_BYTES = 2, 4
DEFAULT_REDUCE_BUCKET, DEFAULT_PREFETCH_BUCKET, DEFAULT_MAX_LIVE_PARAMETERS, DEFAULT_SUB_GROUP = (
    500_000_000,
    50_000_000,
    1_000_000_000,
    1_000_000_000,
)
"""DeepSpeed's defaults, in entries, where the JSON is silent."""


@dataclass
class StoredParameter:
    """A parameter as it is stored."""

    name: str
    entries: int
    """Of the stored tensor: a packed weight has fewer than the layer has weights."""
    entry_bytes: int
    """Bytes of an entry."""
    is_trainable: bool
    is_quantized: bool

    def shard_bytes(self, gpus: int) -> int:
        """Bytes of one GPU's share; the last share is padded."""
        return math.ceil(self.entries / gpus) * self.entry_bytes

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.entries * self.entry_bytes


def list_stored_parameters(model: RectVLM, config: Config) -> list[StoredParameter]:
    """Every parameter, as phase `model` stores it."""
    packed = {id(layer.weight) for layer in find_quantized_layers(model, config)}
    size = torch.empty(0, dtype=getattr(torch, config.generator.quant_storage)).element_size()
    found = []
    for name, p in model.named_parameters():
        if id(p) in packed:
            found.append(
                StoredParameter(name, math.ceil(math.ceil(p.numel() / 2) / size), size, False, True)
            )
        else:
            found.append(StoredParameter(name, p.numel(), BF16_BYTES, p.requires_grad, False))
    return found


def count_parameters(model: RectVLM) -> dict[str, int]:
    """Numbers of parameters by part, as a layer uses them, not as they are packed."""

    def count(module: nn.Module | None, trainable: bool) -> int:
        return (
            sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)
            if module
            else 0
        )

    parts = {part: getattr(model, part, None) for part in MODEL_PARTS}
    return {
        "encoder": count(parts["encoder"], False),
        "classifier_trainable": count(parts["classifier"], True),
        "localizer": count(parts["localizer"], False),
        "generator_trainable": count(parts["generator"], True),
        "language_model_frozen": count(parts["generator"], False) - count(parts["generator"], True),
        "trainable": count(model, True),
        "total": count(model, False),
    }


@dataclass
class StaticMemory:
    """Bytes on each GPU, by kind."""

    bytes_by_kind: dict[str, int]
    """All through a step."""
    optimizer_step_bytes: int
    """More, while the optimizer steps."""
    loading_peak_bytes: int
    """Peak while the language model is loaded; nothing else is on the GPU then but what `held` says of weights."""
    gathered_bytes: int
    """Bytes that all gathers of a micro-batch bring together (0 where nothing is shared out)."""
    gather_calls: int
    """Calls that bring them: parameters arrive one call a module, and most modules have one that is shared out."""
    reduced_bytes: int
    """Bytes of gradients that go out, each time that they do."""


def compute_static_memory(
    model: RectVLM, config: Config, settings: dict[str, Any], gpus: int, has_ema: bool = False
) -> StaticMemory:
    """What each GPU holds.

    Args:
        model: from `rehearsal.build`.
        config: of the model.
        settings: DeepSpeed JSON of the phase, filled in.
        gpus: that share the states.
        averaged: whether a moving average of the weights is kept, 4 bytes a weight more in the optimizer.
    """
    zero = settings["zero_optimization"]
    stage = zero["stage"]
    weights = list_stored_parameters(model, config)
    shared = gpus if stage == 3 else 1
    threshold = zero.get("stage3_param_persistence_threshold", 100_000)
    if threshold == "auto":
        threshold = choose_persistence_threshold(w.entries for w in weights if w.is_quantized)
    kinds = ("weights_4bit", "weights_frozen", "weights_trainable", "weights_resident")
    held: dict[str, int] = dict.fromkeys(kinds, 0)
    for w in weights:
        kind = (
            "weights_4bit"
            if w.is_quantized
            else "weights_trainable"
            if w.is_trainable
            else "weights_frozen"
        )
        held[kind] += w.shard_bytes(shared)
        if stage == 3 and w.entries <= threshold:
            held["weights_resident"] += w.total_bytes
    held["quantization_state"] = sum(
        count_quantization_state_bytes(layer.weight.numel(), config.generator.double_quantization)
        for layer in find_quantized_layers(model, config)
    )
    held["buffers"] = sum(buffer.numel() * buffer.element_size() for buffer in _list_buffers(model))
    trained = [w for w in weights if w.is_trainable]
    entries = sum(w.entries for w in trained)
    part = sum(math.ceil(w.entries / gpus) for w in trained)
    held["gradients"] = BF16_BYTES * (entries if stage < 2 else part)
    held["optimizer"] = (3 + has_ema) * FP32_BYTES * part
    bucket = zero.get("reduce_bucket_size", DEFAULT_REDUCE_BUCKET) * BF16_BYTES
    held["reduce_buckets"] = bucket * (
        2 if zero.get("overlap_comm", stage == 3) and stage < 3 else 1
    )
    sharded = [w for w in weights if w.entries > threshold] if stage == 3 and gpus > 1 else []
    held["gather_buffers"] = _count_gather_buffer_bytes(sharded, zero)
    largest = max((w.total_bytes for w in weights if not w.is_trainable), default=0)
    return StaticMemory(
        bytes_by_kind=held,
        # The gradients in fp32, and the denominator that Adam builds for all tensors of a group at once.
        optimizer_step_bytes=2
        * FP32_BYTES
        * min(part, zero.get("sub_group_size", DEFAULT_SUB_GROUP)),
        loading_peak_bytes=held["weights_4bit"]
        + held["weights_frozen"]
        + held["quantization_state"]
        + 2 * largest,
        gathered_bytes=sum(count_passes(w.name, config) * w.total_bytes for w in sharded),
        gather_calls=sum(count_passes(w.name, config) for w in sharded),
        reduced_bytes=BF16_BYTES * entries if gpus > 1 else 0,
    )


def count_passes(name: str, config: Config) -> int:
    """How often a micro-batch passes a parameter or module of this name: forward, backward, and forward again where
    activations are recomputed. ZeRO-3 gathers each time: it lets go of a layer between its recomputation and its
    backward."""
    part = getattr(config, name.partition(".")[0], None)
    return 3 if getattr(part, "activation_checkpointing", False) else 2


def _list_buffers(model: RectVLM) -> list[Tensor]:
    return list(model.buffers())


def _count_gather_buffer_bytes(sharded: list[StoredParameter], zero: dict[str, Any]) -> int:
    """Gathered parameters at their peak.

    Every module that starts fetches its own parameters and up to a bucket of later ones while fewer than
    `stage3_max_live_parameters` entries are alive. Most modules have few parameters or none, so the fetching runs ahead
    up to that limit, and the parameter that crosses it still comes whole. What arrives is copied out of its bucket.
    """
    if not sharded:
        return 0
    live, bucket = (
        zero.get("stage3_max_live_parameters", DEFAULT_MAX_LIVE_PARAMETERS),
        zero.get("stage3_prefetch_bucket_size", DEFAULT_PREFETCH_BUCKET),
    )
    largest = max(sharded, key=lambda w: w.entries)
    entries = min(sum(w.entries for w in sharded), live + largest.entries)
    return entries * largest.entry_bytes + min(bucket, sum(w.entries for w in sharded)) * BF16_BYTES
