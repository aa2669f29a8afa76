"""Planned time of the validation volumes' reports, by hand."""

import pytest
from transformers import LlamaConfig

from rectvlm.plan.generation_time import DecodedModel, plan_generation
from rectvlm.plan.hardware import HardwareRates
from rectvlm.train.dry_run.dry_run import PROMPT_TOKENS

LLAMA_70B = LlamaConfig(
    hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
)
HARDWARE = HardwareRates()
PACKED = DecodedModel(LLAMA_70B, 70_000_000_000, 39_000_000_000, is_packed=True)


def test_a_step_of_a_packed_70b_is_bound_by_memory() -> None:
    plan = plan_generation(PACKED, 256, 768, 0.1, 2, 141.0, HARDWARE)
    assert plan is not None and plan.reports == 2 * 3039 and plan.reports_at_once == 128
    positions = 256 + PROMPT_TOKENS + 384
    traffic = 39e9 + 4 * 70e9 + 128 * positions * 327_680
    assert plan.step_seconds == pytest.approx(traffic / (4.8e12 * 0.7))
    prompt_seconds = 2 * 70e9 * 128 * (256 + PROMPT_TOKENS) / (989e12 * 0.5)
    assert plan.prompt_seconds == pytest.approx(prompt_seconds)
    batch_seconds = prompt_seconds + 768 * plan.step_seconds
    seconds = 6078 / 128 * batch_seconds + 3039 * 0.1
    assert plan.hours == pytest.approx(seconds / 2 / 3600)
    assert plan.tokens_per_second_per_gpu == pytest.approx(128 * 768 / batch_seconds)


def test_more_gpus_share_the_volumes_and_less_memory_takes_fewer_reports_at_once() -> None:
    plans = [
        plan_generation(PACKED, 256, 768, 0.1, gpus, memory_gb, HARDWARE)
        for gpus, memory_gb in ((2, 141.0), (4, 141.0), (2, 80.0))
    ]
    two, four, smaller = plans
    assert two is not None and four is not None and smaller is not None
    assert four.hours == pytest.approx(two.hours / 2)
    assert smaller.reports_at_once < 128 and smaller.hours > two.hours
    assert plan_generation(PACKED, 256, 768, 0.1, 2, 24.0, HARDWARE) is None


def test_a_small_model_is_bound_by_launches() -> None:
    small = LlamaConfig(
        hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3
    )
    model = DecodedModel(small, 135_000_000, 270_000_000, is_packed=False)
    plan = plan_generation(model, 8, 160, 0.0, 1, 141.0, HARDWARE)
    assert plan is not None
    assert plan.step_seconds == pytest.approx(30 * 50 * HARDWARE.launch)
