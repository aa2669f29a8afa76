"""Optimizer and learning rates: one parameter group a part and kind, the rate a function of the step alone."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rectvlm.config import Part, PhaseConfig, TrainConfig


def freeze_all_but(model: nn.Module, parts: Mapping[Part, float]) -> None:
    """Leave gradients to the parts with a learning rate (of the generator: LoRA and resampler, as it was built)."""
    for name, parameter in model.named_parameters():
        if name.partition(".")[0] not in parts:
            parameter.requires_grad_(False)


def build_optimizer(model: nn.Module, config: TrainConfig, phase: PhaseConfig) -> torch.optim.AdamW:
    """AdamW; vectors (norms, biases, offsets) have no weight decay."""
    groups: list[dict[str, Any]] = []
    for part in phase.lr:
        parameters = [p for p in model.get_submodule(part).parameters() if p.requires_grad]
        for decay, members in (
            (config.weight_decay, [p for p in parameters if p.ndim > 1]),
            (0.0, [p for p in parameters if p.ndim <= 1]),
        ):
            if members:
                groups.append({"params": members, "part": part, "weight_decay": decay, "lr": phase.lr[part]})
    return torch.optim.AdamW(groups, betas=config.betas)


def rate_factor(step: int, phase: PhaseConfig) -> float:
    """Share of the peak rate at a step (0 is the first): linear warm-up, then a cosine down to `final_lr`."""
    if step < phase.warmup:
        return (step + 1) / phase.warmup
    done = (step - phase.warmup) / max(1, phase.steps - phase.warmup - 1)
    return phase.final_lr + (1 - phase.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def set_rates(groups: list[dict[str, Any]], step: int, phase: PhaseConfig) -> dict[str, float]:
    """Set every group's rate for a step; returns the rate of each part."""
    factor = rate_factor(step, phase)
    for group in groups:
        group["lr"] = phase.lr[group["part"]] * factor
    return {part: peak * factor for part, peak in phase.lr.items()}
