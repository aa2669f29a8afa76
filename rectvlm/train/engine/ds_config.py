"""A phase's DeepSpeed JSON: read, checked and completed, for the engine and the planner."""

import math
from pathlib import Path
from typing import Any

from rectvlm.files import read_json_object
from rectvlm.train.budget import StepBatch
from rectvlm.types import UserError

SIZE_SETTINGS = (
    "reduce_bucket_size",
    "sub_group_size",
    "stage3_prefetch_bucket_size",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_param_persistence_threshold",
)
"""Settings in entries. None may be `auto`: it would need a launcher to fill them in, which is not
used here."""


DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
"""Folder of the phases' DeepSpeed JSON: a link to `ds_configs/` in the checkout, installed with the
package."""


def find_ds_config(phase_number: int, chosen: Path | None = None) -> Path:
    """Return the path of a phase's DeepSpeed JSON.

    Args:
        phase_number: number of the phase.
        chosen: a JSON file, or a folder with one for each phase; by default the suite's own.
    """
    folder = DS_CONFIGS if chosen is None else chosen
    return folder if folder.suffix == ".json" else folder / f"phase{phase_number}.json"


def read_ds_config(path: Path, step_batch: StepBatch, max_gradient_norm: float) -> dict[str, Any]:
    """Read a DeepSpeed JSON and fill in batch sizes and gradient clipping.

    Raises:
        UserError: the file is missing or not JSON, or has settings that training would not follow.
    """
    settings = read_json_object(path, "give a DeepSpeed JSON, such as those in ds_configs/")
    _check_zero_settings(path, settings.get("zero_optimization"))
    section = "train.phases.phaseN"
    batch_fields = f"{section}.global_batch, {section}.micro_batch and the number of ranks"
    values_by_key = {
        "train_micro_batch_size_per_gpu": (step_batch.micro_batch, batch_fields),
        "gradient_accumulation_steps": (step_batch.accumulation, batch_fields),
        "gradient_clipping": (max_gradient_norm, "train.gradient_clipping"),
    }
    for key, (value, decided_by) in values_by_key.items():
        if settings.get(key, "auto") not in ("auto", value):
            raise UserError(
                f"{path} sets {key} to {settings[key]!r}, the configuration makes it {value} "
                f'({decided_by}): write "auto" there, and set the configuration.'
            )
        settings[key] = value
    return settings


def _check_zero_settings(path: Path, zero: Any) -> None:
    stage = zero.get("stage") if isinstance(zero, dict) else zero
    if not isinstance(zero, dict) or isinstance(stage, bool) or stage not in (1, 2, 3):
        raise UserError(f"{path} must say zero_optimization.stage 1, 2 or 3; found {stage!r}.")

    offload_keys = [key for key in zero if key.startswith("offload_")]
    offloaded = [key for key in offload_keys if zero[key] not in (None, {"device": "none"})]
    if offloaded:
        raise UserError(
            f"{path} asks for {' and '.join(offloaded)}: neither training nor `rectvlm plan` keeps "
            "states outside GPU memory; remove it, and share them among more GPUs."
        )

    for key in SIZE_SETTINGS:
        value = zero.get(key, 0)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value < math.inf:
            raise UserError(
                f"{path} sets {key} to {value!r}: expected a number of entries, 0 or more."
            )
