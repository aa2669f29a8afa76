"""Reports in batches over a shared prefix are those of each prompt alone."""

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.cache_utils import DynamicCache

from rectvlm import pretrained
from rectvlm.config import Config
from rectvlm.models import report_decoding, report_generator
from rectvlm.models.image_features import ImageFeatures
from rectvlm.models.language_model import load_language_model
from rectvlm.models.report_decoding import (
    MAX_DECODED_REPORTS,
    PrefixCache,
    ReportPrompt,
    batch_by_length,
    count_cache_bytes,
    count_decoded_reports,
    find_common_prefix,
)
from rectvlm.models.report_generator import ReportGenerator

WIDTH = 48
CUES = [
    "No findings suggested.",
    "Findings suggested: emphysema, lung nodule, atelectasis. " * 4,
    "Certain findings: consolidation.",
    "Likely findings: lung nodule, lymphadenopathy. " * 2,
    "Possible findings: arterial wall calcification.",
]
TOKENS = 16
SIZES: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


@pytest.fixture(scope="module")
def generator(tiny: Config, models_folder: None) -> ReportGenerator:
    """In float32, where batches do not round otherwise than single rows."""
    config = tiny.generator.model_copy(update={"quantization": "none"})
    torch.manual_seed(0)
    language = load_language_model(config, pretrained.resolve_model("bundled:tiny-llama"))
    return ReportGenerator(config, WIDTH, language).eval().float()


@pytest.fixture(scope="module")
def prompts(generator: ReportGenerator) -> list[ReportPrompt]:
    torch.manual_seed(1)
    parts = (torch.randn(len(CUES), *shape, WIDTH) for shape in ((), (12,), (20,)))
    global_token, patches, regions = parts
    features = ImageFeatures(global_token, patches, regions, (3, 2, 2), patches)
    return generator.make_prompts(features, CUES)


@pytest.fixture(scope="module")
def plain_reports(generator: ReportGenerator, prompts: list[ReportPrompt]) -> list[str]:
    """Each report from its own whole prompt, by Transformers alone."""
    reports = []
    words = generator.language_model.get_input_embeddings()
    with torch.no_grad():
        for prompt in prompts:
            before, after = generator.encode_prompt(prompt.cues)
            parts = [words(torch.tensor(before)), prompt.visual, words(torch.tensor(after))]
            tokens = generator.language_model.generate(
                inputs_embeds=torch.cat(parts)[None],
                attention_mask=torch.ones(1, sum(map(len, parts)), dtype=torch.long),
                max_new_tokens=TOKENS,
                do_sample=False,
                pad_token_id=generator.tokenizer.pad_token_id,
            )
            reports.append(generator.tokenizer.decode(tokens[0], skip_special_tokens=True).strip())
    assert len(set(reports)) > 1
    return reports


@pytest.fixture
def generate_calls(
    generator: ReportGenerator, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[dict[str, Any]]]:
    """Arguments of each call of `generate` of Transformers."""
    calls: list[dict[str, Any]] = []
    generate = generator.language_model.generate

    def record(**arguments: Any) -> Any:
        calls.append(arguments)
        return generate(**arguments)

    monkeypatch.setattr(generator.language_model, "generate", record)
    return calls


def test_batches_over_a_shared_prefix_write_what_each_prompt_gives_alone(
    generator: ReportGenerator, prompts: list[ReportPrompt], plain_reports: list[str]
) -> None:
    assert generator.write_reports(prompts, TOKENS) == plain_reports
    backwards = generator.write_reports(prompts[::-1], TOKENS)
    assert backwards == plain_reports[::-1]


def test_small_batches_keep_the_order_and_share_the_prefix(
    generator: ReportGenerator,
    prompts: list[ReportPrompt],
    plain_reports: list[str],
    generate_calls: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(report_decoding, "MAX_DECODED_REPORTS", 2)
    assert generator.write_reports(prompts, TOKENS) == plain_reports
    assert [len(call["inputs_embeds"]) for call in generate_calls] == [2, 2, 1]
    lengths = [call["inputs_embeds"].shape[1] for call in generate_calls]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[-1]
    before = generator.encode_prompt(CUES[0])[0]
    for call in generate_calls:
        (cache,) = (value for value in call.values() if isinstance(value, DynamicCache))
        assert cache.get_seq_length() > len(before) > 10
        assert call["attention_mask"][:, : len(before)].all()


def test_the_prefix_is_computed_once(
    generator: ReportGenerator, prompts: list[ReportPrompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_decoding, "MAX_DECODED_REPORTS", 1)
    before = len(generator.encode_prompt(CUES[0])[0])
    positions = []
    decoder = generator.language_model.get_base_model().base_model
    handle = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: positions.append(_count_positions(kwargs)), with_kwargs=True
    )
    try:
        generator.write_reports(prompts, 2)
    finally:
        handle.remove()
    assert positions.count(before) == 1 and positions[0] == before
    for cues in CUES:
        after = len(generator.encode_prompt(cues)[1])
        assert generator.config.queries + after in positions


def _count_positions(arguments: dict[str, Any]) -> int:
    embeds = arguments.get("inputs_embeds")
    return int((arguments["input_ids"] if embeds is None else embeds).shape[1])


def test_a_sharded_model_writes_one_batch_without_a_prefix(
    generator: ReportGenerator,
    prompts: list[ReportPrompt],
    plain_reports: list[str],
    generate_calls: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All ranks must call the model equally often, whatever their prompts are."""
    monkeypatch.setattr(report_decoding, "MAX_DECODED_REPORTS", 2)
    monkeypatch.setattr(report_generator, "is_sharded", lambda model: True)
    assert generator.write_reports(prompts, TOKENS, synced_gpus=False) == plain_reports
    assert len(generate_calls) == 1
    assert not any(isinstance(value, DynamicCache) for value in generate_calls[0].values())


@pytest.mark.parametrize(
    ("make_model", "window_fits"),
    [
        (lambda: LlamaForCausalLM(LlamaConfig(**SIZES)), True),
        (lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=64)), True),
        (lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)), False),
        (lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, sliding_window=8)), False),
    ],
)
def test_a_sliding_window_that_is_too_short_shares_nothing(
    make_model: Any, window_fits: bool
) -> None:
    """Padding between the prefix and the image would push the prefix out of the window."""
    causal_lm = make_model().eval()
    causal_lm.get_base_model = lambda: causal_lm
    prefix = PrefixCache(causal_lm, [([1, 2, 3], [4]), ([1, 2, 5], [])], positions=32)
    assert prefix.tokens == ([1, 2] if window_fits else [])
    assert bool(prefix.arguments(2)) == window_fits


def test_prefix_and_batches_by_length() -> None:
    assert find_common_prefix([[1, 2, 3], [1, 2], [1, 2, 9, 9]]) == [1, 2]
    assert find_common_prefix([[1], [2]]) == []
    assert find_common_prefix([[4, 5]]) == [4, 5]
    assert batch_by_length([5, 9, 7, 9, 1], 2) == [[1, 3], [2, 0], [4]]


def test_as_many_reports_as_the_cache_has_memory_for() -> None:
    """Llama-3.1-70B: 80 layers of 8 key and value heads of 128 in bf16, 328 kB a position."""
    llama_70b = LlamaConfig(
        hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
    )
    assert count_cache_bytes(llama_70b) == 2 * 80 * 8 * 128 * 2
    packed_bytes = 40_000_000_000
    assert count_decoded_reports(llama_70b, 1200, math.inf, packed_bytes) == MAX_DECODED_REPORTS
    assert count_decoded_reports(llama_70b, 1200, 141e9, packed_bytes) == MAX_DECODED_REPORTS
    expected = int(0.6 * 40e9 / (1200 * 327_680))
    assert count_decoded_reports(llama_70b, 1200, 80e9, packed_bytes) == expected == 61
    assert count_decoded_reports(llama_70b, 1200, 40.1e9, packed_bytes) == 1
    assert count_decoded_reports(llama_70b, 1200, 24e9, packed_bytes) == 1
    multi_head = SimpleNamespace(
        num_attention_heads=4, num_hidden_layers=2, hidden_size=32, get_text_config=lambda: None
    )
    multi_head.get_text_config = lambda: multi_head
    assert count_cache_bytes(multi_head) == 2 * 2 * 32 * 2
