"""How long the reports of CT-RATE's validation volumes take, with their control.

Each GPU holds the whole model, as in evaluation, and writes batches of reports to the end of the
longest. A step of decoding takes the longest of memory, matrix products and launches of kernels; of
a large model it is memory: bitsandbytes unpacks every 4-bit weight to bf16 for more than one row,
so a weight is read as 0.5 bytes and written and read as 2 bytes, and the keys and values of all
rows are read. Nothing of this was measured on a GPU.
"""

from dataclasses import dataclass
from typing import Any

from rectvlm.models.report_decoding import count_cache_bytes, count_decoded_reports
from rectvlm.plan.hardware import HardwareRates
from rectvlm.plan.static_memory import BF16_BYTES
from rectvlm.train.dry_run.dry_run import PROMPT_TOKENS

CT_RATE_VALIDATION_VOLUMES = 3_039
"""Validation volumes of CT-RATE."""
REPORTS_A_VOLUME = 2
"""Reports of a volume: one with its image, one without it. Where indications differ, no two volumes
have the same control."""
OPERATIONS_A_LAYER = 50
"""Operations of a layer in a step of decoding, of 7 matrices with their unpacking and adapters,
norms, rotary positions and attention: assumed."""


@dataclass(frozen=True)
class DecodedModel:
    """What decoding reads of a language model."""

    model_config: Any
    """Transformers configuration."""
    weights: int
    """Number of weights, frozen and of the adapter."""
    weight_bytes: int
    """Bytes of the weights as they are stored."""
    is_packed: bool
    """Whether the weights are in 4 bits."""


@dataclass(frozen=True)
class GenerationPlan:
    """Time in which the validation volumes get their reports."""

    volumes: int
    reports: int
    """Number of reports, those of the control included."""
    reports_at_once: int
    """Reports that a GPU decodes together."""
    report_tokens: int
    """Tokens to which every batch is decoded: the longest report that is allowed."""
    step_seconds: float
    """Time of a step of decoding, which gives one token of each report, seconds."""
    bound: str
    """What a step of decoding waits for."""
    prompt_seconds: float
    """Time of reading the prompts of a batch, seconds."""
    image_seconds: float
    """Time of encoder, classifier and localizer for one volume, seconds."""
    tokens_per_second_per_gpu: float
    hours: float
    """Time of all volumes on all GPUs, hours, without metrics on the host."""


def plan_generation(
    language_model: DecodedModel,
    visual_tokens: int,
    report_tokens: int,
    image_seconds: float,
    gpus: int,
    memory_gb: float,
    hardware: HardwareRates,
) -> GenerationPlan | None:
    """Plan the reports of CT-RATE's validation volumes.

    Args:
        language_model: the language model.
        visual_tokens: visual tokens of a prompt.
        report_tokens: longest report that is allowed.
        image_seconds: time of the image's parts for one volume.
        gpus: number of GPUs, which share the volumes.
        memory_gb: memory of each, GB.
        hardware: rates of a GPU.

    Returns:
        None where the whole language model does not fit on a GPU.
    """
    weight_bytes = language_model.weight_bytes
    if weight_bytes >= memory_gb * 1e9:
        return None
    prompt_positions = visual_tokens + PROMPT_TOKENS
    rows = count_decoded_reports(
        language_model.model_config,
        prompt_positions + report_tokens,
        memory_gb * 1e9,
        weight_bytes,
    )
    byte_rate = hardware.bandwidth * 1e12 * hardware.bandwidth_efficiency
    flop_rate = hardware.tflops * 1e12 * hardware.efficiency
    weight_traffic = weight_bytes
    if language_model.is_packed:
        weight_traffic += 2 * BF16_BYTES * language_model.weights
    cache_positions = prompt_positions + report_tokens / 2
    cache_traffic = rows * cache_positions * count_cache_bytes(language_model.model_config)
    layers = language_model.model_config.get_text_config().num_hidden_layers
    seconds_by_bound = {
        "memory": (weight_traffic + cache_traffic) / byte_rate,
        "matrix products": 2 * language_model.weights * rows / flop_rate,
        "launches of kernels": layers * OPERATIONS_A_LAYER * hardware.launch,
    }
    bound = max(seconds_by_bound, key=seconds_by_bound.__getitem__)
    step_seconds = seconds_by_bound[bound]
    prompt_flops = 2 * language_model.weights * rows * prompt_positions
    prompt_seconds = max(prompt_flops / flop_rate, weight_traffic / byte_rate)

    batch_seconds = prompt_seconds + report_tokens * step_seconds
    reports = REPORTS_A_VOLUME * CT_RATE_VALIDATION_VOLUMES
    # Of the control the image is seen once.
    seconds = reports / rows * batch_seconds + CT_RATE_VALIDATION_VOLUMES * image_seconds
    return GenerationPlan(
        volumes=CT_RATE_VALIDATION_VOLUMES,
        reports=reports,
        reports_at_once=rows,
        report_tokens=report_tokens,
        step_seconds=step_seconds,
        bound=bound,
        prompt_seconds=prompt_seconds,
        image_seconds=image_seconds,
        tokens_per_second_per_gpu=rows * report_tokens / batch_seconds,
        hours=seconds / gpus / 3600,
    )
