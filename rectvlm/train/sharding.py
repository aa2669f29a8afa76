"""The DeepSpeed JSON of a phase: read, and its `auto` values filled in. The engine and the planner share it."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rectvlm.config import PhaseConfig
from rectvlm.types import UserError

MOST_RESIDENT = 1_000_000
"""Largest parameter that ZeRO-3 leaves whole on every rank: rank-64 LoRA of a 70B passes, its layers do not."""


def read_settings(path: Path, phase: PhaseConfig, clip: float) -> dict[str, Any]:
    """The settings with batch sizes and clipping filled in.

    Raises:
        UserError: no such file, or not JSON.
    """
    try:
        settings = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"No DeepSpeed configuration at {path}: expected one JSON file a phase in ds_configs/."
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}.") from error
    filled = {
        "train_micro_batch_size_per_gpu": phase.micro_batch,
        "gradient_accumulation_steps": phase.accumulation,
        "gradient_clipping": clip,
    }
    settings.update({key: value for key, value in filled.items() if settings.get(key, "auto") == "auto"})
    return settings


def persistence_threshold(packed: Iterable[int]) -> int:
    """Entries of the largest parameter that stays whole: adapters and norms should, packed weights must not."""
    return min([*packed, MOST_RESIDENT]) - 1
