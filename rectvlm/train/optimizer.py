"""Optimizer and learning rates: parameter groups by part, beginning and kind, the rate a function of the step alone.

A part that begins late (`unfreeze`) has its groups from the start: DeepSpeed lays the optimizer's groups out in flat,
sharded buffers when it starts, and takes no further ones later. Until its step, a group's parameters ask for no
gradient, so that the backward pass is spared and the clipped norm does not count them; its rate is 0, so that neither
the optimizer nor weight decay moves them; and the optimizer's step count for them stays 0, so that its bias correction
begins when they do.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rectvlm.config import MODEL_PARTS, ModelPart, PhaseConfig, TrainConfig, UnfreezeConfig
from rectvlm.train.ema import make_ema_hook

_ENCODER_BLOCK = re.compile(r"encoder\.blocks\.(\d+)\.")


def freeze_all_but(
    model: nn.Module,
    parts: Mapping[ModelPart, float],
    unfreeze: Sequence[UnfreezeConfig] = (),
    extra_modules: Iterable[str] = (),
) -> None:
    """Leave gradients to the parts with a learning rate (of the generator: LoRA and resampler, as it was built).

    Args:
        model: any.
        parts: with a learning rate.
        unfreeze: what no row covers, of a part that has one, is frozen for good.
        others: further modules that train.
    """
    starts = find_unfreeze_steps(model, unfreeze)
    for name, parameter in model.named_parameters():
        if name.partition(".")[0] not in (*parts, *extra_modules) or starts.get(name, 0) is None:
            parameter.requires_grad_(False)


def find_unfreeze_steps(
    model: nn.Module, unfreeze: Sequence[UnfreezeConfig]
) -> dict[str, int | None]:
    """The step that each parameter trains from, by name, for the parts that `unfreeze` names; None is never."""
    names = [name for name, _ in model.named_parameters()]
    depth = 1 + max(
        (int(found[1]) for name in names if (found := _ENCODER_BLOCK.match(name))), default=-1
    )
    first_block = next(
        (i for i, name in enumerate(names) if _ENCODER_BLOCK.match(name)), len(names)
    )
    starts: dict[str, int | None] = {}
    for i, name in enumerate(names):
        part = name.partition(".")[0]
        rows = [row for row in unfreeze if row.part == part]
        if not rows:
            continue
        found = _ENCODER_BLOCK.match(name)
        # What is registered before the blocks feeds them (patches, positions), what comes after reads them.
        place = int(found[1]) if found else depth if i > first_block else -1
        steps = [
            row.step for row in rows if row.last_blocks is None or place >= depth - row.last_blocks
        ]
        starts[name] = min(steps, default=None)
    return starts


def build_optimizer(model: nn.Module, config: TrainConfig, phase: PhaseConfig) -> torch.optim.AdamW:
    """AdamW; vectors (norms, biases, offsets) have no weight decay.

    A group has, beside what AdamW knows: `part`, `peak` (its peak rate), `start` (the step that it trains from), `held`
    (whether that is still to come) and `names` of its parameters.
    """
    starts = find_unfreeze_steps(model, phase.unfreeze)
    rates: dict[str, float] = {str(part): rate for part, rate in phase.lr.items()}
    if hasattr(model, "weighting"):
        rates["weighting"] = config.weighting_lr
    groups: dict[tuple[str, int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        part = name.partition(".")[0]
        if not parameter.requires_grad or part not in rates:
            continue
        start, decays = starts.get(name) or 0, parameter.ndim > 1
        new: dict[str, Any] = {
            "part": part,
            "peak": rates[part],
            "start": start,
            "names": [],
            "params": [],
        }
        new["held"] = start > 0
        new |= {"weight_decay": config.weight_decay if decays else 0.0, "lr": rates[part]}
        group = groups.setdefault((part, start, not decays), new)
        group["names"].append(name)
        group["params"].append(parameter)
    order = [*rates]
    optimizer = torch.optim.AdamW(
        [groups[key] for key in sorted(groups, key=lambda key: (order.index(key[0]), *key[1:]))],
        betas=config.betas,
    )
    if phase.unfreeze:
        optimizer.register_step_post_hook(_reset_held_groups)
    if phase.ema_decay:
        optimizer.register_step_post_hook(make_ema_hook(phase.ema_decay))
    return optimizer


def _reset_held_groups(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """A group that has not begun forgets that the optimizer stepped."""
    for group in optimizer.param_groups:
        if group["held"]:
            for parameter in group["params"]:
                for value in optimizer.state[parameter].values():
                    value.zero_()


def learning_rate_factor(step: float, phase: PhaseConfig, steps: float | None = None) -> float:
    """Share of the peak rate at a step (0 is the first) of `steps`, by default those of the phase: linear warm-up, then
    down to `final_lr_ratio` or not at all."""
    if step < phase.warmup:
        return min(1.0, (step + 1) / phase.warmup)
    steps = phase.steps if steps is None else steps
    done = min(1.0, (step - phase.warmup) / max(1, steps - phase.warmup - 1))
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[
        phase.schedule
    ]
    return phase.final_lr_ratio + (1 - phase.final_lr_ratio) * left


def set_learning_rates(
    groups: list[dict[str, Any]], step: int, phase: PhaseConfig, scheduled: float | None = None
) -> dict[str, float]:
    """Set every group's rate for a step.

    Args:
        groups: of the optimizer.
        step: steps done.
        phase: its schedule.
        scheduled: where the schedule stands, in steps, if that is not `step`: with as many to come.

    Returns:
        The rate of each part (of what of it trains already).
    """
    found: dict[str, float] = {}
    at = step if scheduled is None else scheduled
    share = learning_rate_factor(at, phase, at + phase.steps - step)
    for group in groups:
        part, late = group["part"], step - group["start"]
        group["held"] = late < 0
        factor = 0.0 if late < 0 else share
        if group["start"] and late >= 0:
            factor *= min(1.0, (late + 1) / max(1, phase.warmup))
        group["lr"] = phase.lr.get(part, group["peak"]) * factor
        found[part] = max(found.get(part, 0.0), group["lr"])
    return found


def set_requires_grad(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    """Let those parameters have gradients whose groups have begun; after `set_rates`."""
    if any(group["start"] for group in groups):
        own = dict(model.named_parameters())
        for group in groups:
            for name in group["names"]:
                own[name].requires_grad_(not group["held"])


def set_training_modes(model: nn.Module, phase: PhaseConfig) -> None:
    """Training mode, but for parts that do not train: what they say has neither noise nor dropout.

    The engine must keep bitsandbytes from repacking the 4-bit weights of a generator in eval mode.
    """
    model.train()
    for part in MODEL_PARTS:
        module = getattr(model, part, None)
        if module is not None and part not in phase.lr:
            module.eval()
            # Transformers recomputes the activations of layers in training mode alone. Gradients pass through a frozen
            # language model too, and would leave all of them behind: 118 GB at `large` instead of 7.
            for layer in module.modules():
                if getattr(layer, "gradient_checkpointing", False):
                    layer.training = True
