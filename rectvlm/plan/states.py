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

from rectvlm.config import PARTS, Config
from rectvlm.models import RectVLM
from rectvlm.plan.rehearsal import packed_layers
from rectvlm.plan.standins import quantization_state_bytes
from rectvlm.train.sharding import persistence_threshold

BF16, FP32 = 2, 4
BUCKET, PREFETCH, LIVE, SUB_GROUP = 500_000_000, 50_000_000, 1_000_000_000, 1_000_000_000
"""DeepSpeed's defaults, in entries, where the JSON is silent."""


@dataclass
class Weight:
    """A parameter as it is stored."""

    name: str
    entries: int
    """Of the stored tensor: a packed weight has fewer than the layer has weights."""
    size: int
    """Bytes of an entry."""
    trains: bool
    packed: bool

    def shard(self, gpus: int) -> int:
        """Bytes of one GPU's share; the last share is padded."""
        return math.ceil(self.entries / gpus) * self.size

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.entries * self.size


def weights_of(model: RectVLM, config: Config) -> list[Weight]:
    """Every parameter, as phase `model` stores it."""
    packed = {id(layer.weight) for layer in packed_layers(model, config)}
    size = torch.empty(0, dtype=getattr(torch, config.generator.storage)).element_size()
    found = []
    for name, p in model.named_parameters():
        if id(p) in packed:
            found.append(Weight(name, math.ceil(math.ceil(p.numel() / 2) / size), size, False, True))
        else:
            found.append(Weight(name, p.numel(), BF16, p.requires_grad, False))
    return found


def parameters(model: RectVLM) -> dict[str, int]:
    """Numbers of parameters by part, as a layer uses them, not as they are packed."""

    def count(module: nn.Module | None, trainable: bool) -> int:
        return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable) if module else 0

    parts = {part: getattr(model, part, None) for part in PARTS}
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
class States:
    """Bytes on each GPU, by kind."""

    held: dict[str, int]
    """All through a step."""
    step: int
    """More, while the optimizer steps."""
    loading: int
    """Peak while the language model is loaded; nothing else is on the GPU then but what `held` says of weights."""
    gathered: int
    """Bytes that all gathers of a micro-batch bring together (0 where nothing is shared out)."""
    gathers: int
    """Calls that bring them: parameters arrive one call a module, and most modules have one that is shared out."""
    reduced: int
    """Bytes of gradients that go out, each time that they do."""


def states(model: RectVLM, config: Config, settings: dict[str, Any], gpus: int, averaged: bool = False) -> States:
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
    weights = weights_of(model, config)
    shared = gpus if stage == 3 else 1
    threshold = zero.get("stage3_param_persistence_threshold", 100_000)
    if threshold == "auto":
        threshold = persistence_threshold(w.entries for w in weights if w.packed)
    kinds = ("weights_4bit", "weights_frozen", "weights_trainable", "weights_resident")
    held: dict[str, int] = dict.fromkeys(kinds, 0)
    for w in weights:
        kind = "weights_4bit" if w.packed else "weights_trainable" if w.trains else "weights_frozen"
        held[kind] += w.shard(shared)
        if stage == 3 and w.entries <= threshold:
            held["weights_resident"] += w.bytes
    held["quantization_state"] = sum(
        quantization_state_bytes(layer.weight.numel(), config.generator.double_quantization)
        for layer in packed_layers(model, config)
    )
    held["buffers"] = sum(buffer.numel() * buffer.element_size() for buffer in _buffers(model))
    trained = [w for w in weights if w.trains]
    entries = sum(w.entries for w in trained)
    part = sum(math.ceil(w.entries / gpus) for w in trained)
    held["gradients"] = BF16 * (entries if stage < 2 else part)
    held["optimizer"] = (3 + averaged) * FP32 * part
    bucket = zero.get("reduce_bucket_size", BUCKET) * BF16
    held["reduce_buckets"] = bucket * (2 if zero.get("overlap_comm", stage == 3) and stage < 3 else 1)
    sharded = [w for w in weights if w.entries > threshold] if stage == 3 and gpus > 1 else []
    held["gather_buffers"] = _gather_buffers(sharded, zero)
    largest = max((w.bytes for w in weights if not w.trains), default=0)
    return States(
        held=held,
        # The gradients in fp32, and the denominator that Adam builds for all tensors of a group at once.
        step=2 * FP32 * min(part, zero.get("sub_group_size", SUB_GROUP)),
        loading=held["weights_4bit"] + held["weights_frozen"] + held["quantization_state"] + 2 * largest,
        gathered=sum(passes(w.name, config) * w.bytes for w in sharded),
        gathers=sum(passes(w.name, config) for w in sharded),
        reduced=BF16 * entries if gpus > 1 else 0,
    )


def passes(name: str, config: Config) -> int:
    """How often a micro-batch passes a parameter or module of this name: forward, backward, and forward again where
    activations are recomputed. ZeRO-3 gathers each time: it lets go of a layer between its recomputation and its
    backward."""
    part = getattr(config, name.partition(".")[0], None)
    return 3 if getattr(part, "checkpointing", False) else 2


def _buffers(model: RectVLM) -> list[Tensor]:
    return list(model.buffers())


def _gather_buffers(sharded: list[Weight], zero: dict[str, Any]) -> int:
    """Gathered parameters at their peak.

    Every module that starts fetches its own parameters and up to a bucket of later ones while fewer than
    `stage3_max_live_parameters` entries are alive. Most modules have few parameters or none, so the fetching runs ahead
    up to that limit, and the parameter that crosses it still comes whole. What arrives is copied out of its bucket.
    """
    if not sharded:
        return 0
    live, bucket = zero.get("stage3_max_live_parameters", LIVE), zero.get("stage3_prefetch_bucket_size", PREFETCH)
    largest = max(sharded, key=lambda w: w.entries)
    entries = min(sum(w.entries for w in sharded), live + largest.entries)
    return entries * largest.size + min(bucket, sum(w.entries for w in sharded)) * BF16
