"""Optimizer and learning rates: parameter groups by part, start and kind; rates set for every step.

A part that begins late (`unfreeze`) has its groups from the start: DeepSpeed lays the optimizer's
groups out in flat, sharded buffers when it starts, and takes no further ones later. Until its
time a group is held:

- its parameters require no gradient, so that the backward pass is spared and the clipped norm does
  not count them;
- its learning rate is 0, so that neither the optimizer nor weight decay moves them;
- the optimizer's step count for them stays 0, so that its bias correction begins when they do.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rectvlm.config import MODEL_PARTS, ModelPart, PhaseConfig, TrainConfig, UnfreezeConfig
from rectvlm.train.budget import PhaseBudget
from rectvlm.train.ema import make_ema_hook

DECAYED_MODULES = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)
"""Layers whose weights have weight decay. What a model learns beside them (positions, offsets,
queries, a bias for each distance) is no product with an input: a decay would pull its values to 0
whether the data use them or not."""

_ENCODER_BLOCK = re.compile(r"encoder\.blocks\.(\d+)\.")

ParameterGroup = dict[str, Any]
"""A parameter group of torch. Beside the entries of AdamW it has `part`, `peak_lr`, `start` (the
share of the phase after which it trains), `is_held` (that is still to come), and `names` of its
parameters."""


def freeze_all_but(
    model: nn.Module,
    parts: Mapping[ModelPart, float],
    unfreeze: Sequence[UnfreezeConfig] = (),
    extra_modules: Iterable[str] = (),
) -> None:
    """Freeze all parameters but those of the parts with a learning rate.

    A part may have frozen parameters of its own: of the generator only LoRA and resampler train.

    Args:
        model: the model.
        parts: learning rates by part.
        unfreeze: late starts. Parameters of a part it names that no entry covers stay frozen.
        extra_modules: names of further modules that train.
    """
    starts = find_starts(model, unfreeze)
    trained_modules = (*parts, *extra_modules)
    for name, parameter in model.named_parameters():
        is_trained = name.partition(".")[0] in trained_modules
        if not is_trained or starts.get(name, 0.0) is None:
            parameter.requires_grad_(False)


def find_starts(model: nn.Module, unfreeze: Sequence[UnfreezeConfig]) -> dict[str, float | None]:
    """Share of the phase after which each parameter of the parts in `unfreeze` trains, by name.

    None stands for never.
    """
    names = [name for name, _ in model.named_parameters()]
    depths_by_name = _find_block_depths(names)
    block_count = 1 + max(depths_by_name.values(), default=-1)
    first_block = next((i for i, name in enumerate(names) if name in depths_by_name), len(names))
    starts: dict[str, float | None] = {}
    for i, name in enumerate(names):
        entries = [entry for entry in unfreeze if entry.part == name.partition(".")[0]]
        if not entries:
            continue
        # What is registered before the blocks feeds them (patches, positions) and is the first of
        # all layers; what is registered after them reads their output and is the last.
        depth = depths_by_name.get(name, block_count if i > first_block else -1)
        covering = []
        for entry in entries:
            if entry.last_blocks is None or depth >= block_count - entry.last_blocks:
                covering.append(entry.start)
        starts[name] = min(covering, default=None)
    return starts


def _find_block_depths(names: Iterable[str]) -> dict[str, int]:
    """Number of the encoder block that each parameter is in, by name."""
    depths = {}
    for name in names:
        match = _ENCODER_BLOCK.match(name)
        if match:
            depths[name] = int(match[1])
    return depths


def find_decayed_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters with weight decay: the weights of linear and convolution layers.

    The kind of the layer decides, not the shape: position embeddings are matrices too.
    """
    names = set()
    for prefix, module in model.named_modules():
        if isinstance(module, DECAYED_MODULES):
            for name, _ in module.named_parameters(prefix, recurse=False):
                if name.endswith("weight"):
                    names.add(name)
    return names


def build_optimizer(
    model: nn.Module, config: TrainConfig, phase: PhaseConfig, budget: PhaseBudget
) -> torch.optim.AdamW:
    """Build AdamW with a parameter group for each part, start and kind.

    The weights of linear and convolution layers have weight decay, all else has none.
    """
    decayed_names = find_decayed_parameters(model)
    starts = find_starts(model, phase.unfreeze)
    peak_rates: dict[str, float] = {str(part): rate for part, rate in phase.lr.items()}
    if hasattr(model, "weighting"):
        peak_rates["weighting"] = config.weighting_lr
    part_order = list(peak_rates)
    groups: dict[tuple[int, float, bool], ParameterGroup] = {}
    for name, parameter in model.named_parameters():
        part = name.partition(".")[0]
        if not parameter.requires_grad or part not in peak_rates:
            continue
        start = starts.get(name) or 0.0
        is_decayed = name in decayed_names
        key = (part_order.index(part), start, not is_decayed)
        if key not in groups:
            groups[key] = {
                "part": part,
                "peak_lr": peak_rates[part],
                "start": start,
                "is_held": start > 0,
                "names": [],
                "params": [],
                "weight_decay": config.weight_decay if is_decayed else 0.0,
                "lr": peak_rates[part],
            }
        groups[key]["names"].append(name)
        groups[key]["params"].append(parameter)
    optimizer = torch.optim.AdamW([groups[key] for key in sorted(groups)], betas=config.betas)
    if phase.unfreeze:
        optimizer.register_step_post_hook(_reset_held_groups)
    if phase.ema_decay:
        optimizer.register_step_post_hook(make_ema_hook(budget.scale_ema_decay(phase.ema_decay)))
    return optimizer


def _reset_held_groups(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Set the optimizer's state of held groups to zero, its step count included."""
    for group in optimizer.param_groups:
        if group["is_held"]:
            for parameter in group["params"]:
                for value in optimizer.state[parameter].values():
                    value.zero_()


def learning_rate_factor(phase: PhaseConfig, budget: PhaseBudget, samples_seen: int) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then the schedule's decay.

    It follows the samples, so that a run which goes on with another number of ranks, and with other
    steps, goes on where it was. The phase's last step has `final_lr_ratio`.

    Args:
        phase: settings with the schedule.
        budget: the phase's samples and steps.
        samples_seen: samples seen before the step.
    """
    warmup_samples = budget.samples_after(phase.warmup)
    if samples_seen < warmup_samples:
        return _warmup_factor(phase, budget, samples_seen)
    global_batch = budget.step_batch.global_batch
    last_step = samples_seen + (budget.count_steps_left(samples_seen) - 1) * global_batch
    decay_samples = max(global_batch, last_step - warmup_samples)
    progress = min(1.0, (samples_seen - warmup_samples) / decay_samples)
    decay_by_schedule = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "constant": 1.0,
    }
    decay = decay_by_schedule[phase.schedule]
    return phase.final_lr_ratio + (1 - phase.final_lr_ratio) * decay


def _warmup_factor(phase: PhaseConfig, budget: PhaseBudget, samples: int) -> float:
    """Share of the rate in the step that begins after some samples, and trains on those that
    follow; 1 where there is no warm-up."""
    warmup_samples = budget.samples_after(phase.warmup)
    samples_after = samples + budget.step_batch.global_batch
    return min(1.0, samples_after / warmup_samples) if warmup_samples else 1.0


def set_learning_rates(
    groups: list[ParameterGroup], phase: PhaseConfig, budget: PhaseBudget, samples_seen: int
) -> dict[str, float]:
    """Set every group's learning rate for a step.

    Args:
        groups: groups of the optimizer.
        phase: settings with rates and schedule.
        budget: the phase's samples and steps.
        samples_seen: samples seen before the step.

    Returns:
        The learning rate of each part, or of what of it trains already.
    """
    schedule_factor = budget.lr_factor * learning_rate_factor(phase, budget, samples_seen)
    rates_by_part: dict[str, float] = {}
    for group in groups:
        part, start_samples = group["part"], budget.samples_after(group["start"])
        group["is_held"] = samples_seen < start_samples
        factor = 0.0 if group["is_held"] else schedule_factor
        if group["start"] and not group["is_held"]:
            # A late group has a warm-up of its own.
            factor *= _warmup_factor(phase, budget, samples_seen - start_samples)
        peak_rate = phase.lr[part] if part in phase.lr else group["peak_lr"]
        group["lr"] = peak_rate * factor
        rates_by_part[part] = max(rates_by_part.get(part, 0.0), group["lr"])
    return rates_by_part


def set_requires_grad(model: nn.Module, groups: list[ParameterGroup]) -> None:
    """Let all parameters but those of held groups require gradients; after `set_learning_rates`."""
    if any(group["start"] for group in groups):
        parameters = dict(model.named_parameters())
        for group in groups:
            for name in group["names"]:
                parameters[name].requires_grad_(not group["is_held"])


def set_training_modes(model: nn.Module, phase: PhaseConfig) -> None:
    """Set training mode, but eval mode for parts that do not train: they have no noise or dropout.

    The engine keeps bitsandbytes from repacking the 4-bit weights of a generator in eval mode.
    """
    model.train()
    for part in MODEL_PARTS:
        module = getattr(model, part, None)
        if module is not None and part not in phase.lr:
            module.eval()
            # Transformers checkpoints the activations of layers in training mode only. Gradients
            # pass through a frozen language model too, which would keep all its activations:
            # 118 GB at `large` instead of 7.
            for layer in module.modules():
                if getattr(layer, "gradient_checkpointing", False):
                    layer.training = True
