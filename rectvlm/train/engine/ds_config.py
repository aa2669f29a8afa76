"""The DeepSpeed JSON of a phase: read, and its `auto` values filled in. The engine and the planner share it."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rectvlm.config import PhaseConfig
from rectvlm.types import UserError

MAX_PERSISTENT_NUMEL = 1_000_000
"""Largest parameter that ZeRO-3 leaves whole on every rank: rank-64 LoRA of a 70B passes, its layers do not."""


SIZE_SETTINGS = (
    "reduce_bucket_size",
    "sub_group_size",
    "stage3_prefetch_bucket_size",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_param_persistence_threshold",
)
"""Settings in entries. Only the last may be `auto`: the others would be filled by a launcher that is not used here."""


def read_ds_config(path: Path, phase: PhaseConfig, max_gradient_norm: float) -> dict[str, Any]:
    """The settings with batch sizes and clipping filled in.

    Raises:
        UserError: no such file, not JSON, or settings that training would not follow.
    """
    try:
        settings = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}.") from error
    except OSError as error:
        raise UserError(
            f"No DeepSpeed configuration can be read at {path} ({error.strerror}): expected one JSON file a phase, as "
            "in ds_configs/."
        ) from None
    zero = settings.get("zero_optimization") if isinstance(settings, dict) else None
    if (
        not isinstance(zero, dict)
        or zero.get("stage") not in (1, 2, 3)
        or isinstance(zero["stage"], bool)
    ):
        found = zero.get("stage") if isinstance(zero, dict) else zero
        raise UserError(f"{path} must say zero_optimization.stage 1, 2 or 3; found {found!r}.")
    _check_zero_settings(path, zero)
    filled = {
        "train_micro_batch_size_per_gpu": (phase.micro_batch, "train.phases.phaseN.micro_batch"),
        "gradient_accumulation_steps": (phase.accumulation, "train.phases.phaseN.accumulation"),
        "gradient_clipping": (max_gradient_norm, "train.gradient_clipping"),
    }
    for key, (value, where) in filled.items():
        if settings.get(key, "auto") not in ("auto", value):
            raise UserError(
                f'{path} sets {key} to {settings[key]!r}, the configuration {where} to {value}: write "auto" there, '
                "and set the configuration."
            )
        settings[key] = value
    return settings


def _check_zero_settings(path: Path, zero: dict[str, Any]) -> None:
    offloaded = [
        key
        for key in zero
        if key.startswith("offload_") and zero[key] not in (None, {"device": "none"})
    ]
    if offloaded:
        raise UserError(
            f"{path} asks for {' and '.join(offloaded)}: neither training nor `rectvlm plan` keeps states outside GPU "
            "memory; remove it, and share them among more GPUs."
        )
    for key in SIZE_SETTINGS:
        value = zero.get(key, 0)
        if value == "auto" and key == SIZE_SETTINGS[-1]:
            continue
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not 0 <= value < math.inf
        ):
            raise UserError(
                f"{path} sets {key} to {value!r}: expected a number of entries, 0 or more."
            )


def choose_persistence_threshold(packed: Iterable[int]) -> int:
    """Entries of the largest parameter that stays whole: adapters and norms should, packed weights must not."""
    return min([*packed, MAX_PERSISTENT_NUMEL]) - 1
