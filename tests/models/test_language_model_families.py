"""Families of language models, each tiny and random: none is known by name, all must work.

The chat templates have the forms of the families' own: with and without a system role, with turns
that must alternate.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from rectvlm import pretrained
from rectvlm.config import Config
from rectvlm.models.image_features import ImageFeatures
from rectvlm.models.language_model import (
    compute_head_logits,
    load_language_model,
    load_tokenizer,
    unwrap_causal_lm,
)
from rectvlm.models.report_generator import IGNORE_INDEX, ReportGenerator
from rectvlm.models.report_prompt import REQUEST_TEXT, SYSTEM_TEXT, VOLUME_MARKER
from rectvlm.types import UserError

WIDTH = 48
STEPS = 12
"""In which a batch is partly learnt by heart."""
CUES = ["No findings suggested.", "Findings suggested: emphysema, lung nodule. " * 3]
REPORTS = [
    "Findings: The heart is enlarged. Impression: cardiomegaly.",
    "Findings: There is a nodule in the right upper lobe, and the lungs are clear. "
    "Impression: lung nodule.",
]
LLAMA = (
    "{{ bos_token }}"
    "{% for m in messages %}<|{{ m['role'] }}|>\n\n{{ m['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
QWEN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}"
    "{% set turns = messages %}"
    "{% endif %}"
    "{{ bos_token }}"
    "{% for m in turns %}"
    "{% if m['role'] == 'user' %}"
    "[INST] {% if loop.last and system is defined %}{{ system }}\n\n{% endif %}"
    "{{ m['content'] }}[/INST]"
    "{% else %}"
    " {{ m['content'] }}{{ eos_token }}"
    "{% endif %}"
    "{% endfor %}"
)
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
WINDOW = {"head_dim": 16, "sliding_window": 32, "tie_word_embeddings": True}
FAMILIES: dict[str, tuple[Callable[..., Any], str, dict[str, Any]]] = {
    "llama": (LlamaConfig, LLAMA, {}),
    "gemma2": (
        Gemma2Config,
        GEMMA,
        WINDOW
        | {
            "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 5.0,
            "query_pre_attn_scalar": 16,
        },
    ),
    "gemma3": (Gemma3TextConfig, GEMMA, WINDOW | {"query_pre_attn_scalar": 16}),
    "qwen2": (Qwen2Config, QWEN, {}),
    "qwen3": (Qwen3Config, QWEN, {"head_dim": 16}),
    "mistral": (MistralConfig, MISTRAL, {"sliding_window": 32}),
}
OTHERS: dict[str, tuple[Callable[..., Any], str, dict[str, Any]]] = {
    "phi3": (Phi3Config, LLAMA, {}),
    "granite": (GraniteConfig, LLAMA, {"logits_scaling": 7.0, "embedding_multiplier": 5.0}),
    "cohere": (CohereConfig, LLAMA, {"logit_scale": 0.3}),
    "gpt_neox": (GPTNeoXConfig, LLAMA, {}),
}
"""Other heads and other trees: fused projections, scaled logits, embeddings scaled inside the
model, a decoder that is not called `model`."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, models_folder: None) -> Callable[[str], Path]:
    """The saved model of a family."""
    root = tmp_path_factory.mktemp("families")

    def save(family: str) -> Path:
        if not (root / family).is_dir():
            kind, template, changes = (FAMILIES | OTHERS)[family]
            tokenizer = AutoTokenizer.from_pretrained(
                pretrained.resolve_model("bundled:tiny-llama")
            )
            tokenizer.add_special_tokens({"bos_token": "<s>"})
            tokenizer.chat_template = template
            special = {
                name: getattr(tokenizer, name)
                for name in ("pad_token_id", "eos_token_id", "bos_token_id")
            }
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(
                kind(vocab_size=len(tokenizer), **SIZES | special | changes)
            )
            with torch.no_grad():
                for (
                    parameter
                ) in model.parameters():  # larger than usual, so that scales and caps show
                    parameter.mul_(3) if parameter.ndim > 1 else parameter.add_(
                        torch.randn_like(parameter) * 0.1
                    )
            model.bfloat16().save_pretrained(root / family)
            tokenizer.save_pretrained(root / family)
        return root / family

    return save


def build(tiny: Config, path: Path, **changes: Any) -> ReportGenerator:
    config = tiny.generator.model_copy(update=changes)
    torch.manual_seed(0)
    return ReportGenerator(config, WIDTH, load_language_model(config, path)).eval()


def features(count: int, dtype: torch.dtype = torch.float32) -> ImageFeatures:
    torch.manual_seed(0)
    global_token, patches, regions = (
        torch.randn(count, *shape, WIDTH, dtype=dtype) for shape in ((), (12,), (20,))
    )
    return ImageFeatures(global_token, patches, regions, (3, 2, 2), patches)


EACH = pytest.mark.parametrize("family", FAMILIES)
EVERY = pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])


@EVERY
def test_the_adapted_model_is_the_one_of_transformers(
    tiny: Config, folder: Callable[[str], Path], family: str
) -> None:
    """Far from the first position too, where rotary frequencies in bfloat16 would be off by whole
    turns. Both are loaded in bfloat16 and compared in float32: two sums in bfloat16 can round
    differently, depending on the processor and on where the weights lie in memory."""
    path = folder(family)
    torch.manual_seed(0)
    ids = torch.randint(5, 500, (1, 900))
    config = tiny.generator.model_copy(update={"quantization": "none"})
    adapted = load_language_model(config, path).model.eval().float()
    original = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval().float()
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, original(ids).logits, rtol=1e-3, atol=1e-3)


@EVERY
def test_words_and_visual_tokens_enter_alike(
    tiny: Config, folder: Callable[[str], Path], family: str
) -> None:
    """Some families scale embeddings in the embedding module, some inside the model; what is placed
    beside them starts with their spread, and words given as embeddings act as ids do."""
    generator = build(tiny, folder(family), quantization="none").float()
    model = unwrap_causal_lm(generator.language_model)
    ids = torch.randint(5, 500, (1, 40))
    with torch.no_grad():
        words = generator.language_model.get_input_embeddings()
        torch.testing.assert_close(
            model(inputs_embeds=words(ids)).logits,
            model(input_ids=ids).logits,
            rtol=1e-4,
            atol=1e-4,
        )
        spread = words(torch.arange(words.num_embeddings)).std().item()
        assert generator.resampler(features(2)).std().item() == pytest.approx(spread, rel=0.05)


@EVERY
def test_the_head_is_the_models_own(
    tiny: Config, folder: Callable[[str], Path], family: str
) -> None:
    model = build(tiny, folder(family), quantization="none").double().language_model
    states: list[Tensor] = []
    with torch.no_grad():
        handle = unwrap_causal_lm(model).base_model.register_forward_hook(
            lambda _, __, out: states.append(out[0])
        )
        wanted = model(torch.randint(5, 500, (2, 30))).logits
        handle.remove()
        assert torch.equal(compute_head_logits(model, states[0]), wanted)
    assert "model" not in vars(model)
    assert wanted.std() > 0.05


def full_losses(generator: ReportGenerator, hidden: Tensor, labels: Tensor, chunks: int) -> Tensor:
    """The plain computation, in the place of the one in chunks."""
    logits = compute_head_logits(generator.language_model, hidden[None])[0]
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")


@pytest.mark.parametrize(
    ("family", "chunk"),
    [
        *((family, 7) for family in (*FAMILIES, *OTHERS)),
        ("llama", 1),
        ("llama", 50),
        ("llama", 120),
    ],
)
def test_chunks_change_nothing(
    tiny: Config,
    folder: Callable[[str], Path],
    family: str,
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Loss and all gradients against the plain computation, in float64; the output layer trains
    here too."""
    results = []
    # Attention with soft caps takes its softmax in float32, where the mask of float64 is infinite.
    exact = (FAMILIES | OTHERS)[family][-1].get("attn_logit_softcapping") is None
    dtype, close = (torch.float64, 1e-9) if exact else (torch.float32, 1e-4)
    if exact:
        cast, words = Tensor.float, pretrained.read_model_config(str(folder(family))).vocab_size
        # The cast of the logits would round; what a family casts within stays as it is.
        monkeypatch.setattr(Tensor, "float", lambda t: t if t.shape[-1:] == (words,) else cast(t))
    for plain in (True, False):
        generator = build(
            tiny, folder(family), quantization="none", loss_chunk=chunk, max_report_tokens=60
        )
        generator = generator.to(dtype).train()
        for name, parameter in generator.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        unwrap_causal_lm(generator.language_model).get_output_embeddings().weight.requires_grad_(
            True
        )
        with monkeypatch.context() as patch:
            if plain:
                patch.setattr(ReportGenerator, "_token_losses", full_losses)
            torch.manual_seed(1)
            loss = generator(features(2, dtype), CUES, REPORTS)
        (loss.per_sample * torch.tensor([1.0, 0.3])).sum().backward()
        gradients = {n: p.grad for n, p in generator.named_parameters() if p.requires_grad}
        results.append((loss.log_likelihood, gradients))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=close, atol=close / 100)
    assert results[0][1].keys() == results[1][1].keys()
    for name, wanted in results[0][1].items():
        assert wanted is not None and wanted.abs().sum() > 0, name
        torch.testing.assert_close(
            results[1][1][name], wanted, rtol=close, atol=close * wanted.abs().max().item()
        )


class Largest(TorchDispatchMode):
    """Positions of the largest tensor with a vocabulary's width that any operation makes."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.vocabulary, self.weight = len(weight), weight.untyped_storage().data_ptr()
        self.positions, self.calls = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            wide = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[-1] == self.vocabulary
            if wide and leaf.untyped_storage().data_ptr() != self.weight:
                self.positions = max(self.positions, leaf.numel() // self.vocabulary)
                self.calls += 1
        return out


@pytest.mark.parametrize("chunk", [1, 8, 64])
def test_logits_of_one_chunk_exist_at_a_time(
    tiny: Config, folder: Callable[[str], Path], chunk: int
) -> None:
    """In the forward and in the backward pass, by every tensor that is made; and none is kept
    between the two."""
    generator = build(tiny, folder("llama"), quantization="none", loss_chunk=chunk).train()
    weight = unwrap_causal_lm(generator.language_model).get_output_embeddings().weight
    vocabulary = len(weight)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        is_activation = tensor.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()
        kept.append(tensor.shape[-1] if tensor.ndim and is_activation else 0)
        return tensor

    with (
        Largest(weight) as largest,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        loss = generator(features(2), CUES, REPORTS).per_sample.sum()
        made = largest.calls
        loss.backward()
    assert vocabulary not in kept
    assert 0 < largest.positions <= chunk
    assert largest.calls > made > 0


def test_logits_of_a_single_chunk_are_computed_once(
    tiny: Config, folder: Callable[[str], Path]
) -> None:
    """There is nothing to save by computing them again in the backward pass."""
    calls = {}
    for chunk in (96, 192):  # two reports of at most 96 tokens
        generator = build(tiny, folder("llama"), quantization="none", loss_chunk=chunk).train()
        head = unwrap_causal_lm(generator.language_model).get_output_embeddings()
        calls[chunk] = 0

        def count(*_: object, chunk: int = chunk) -> None:
            calls[chunk] += 1

        head.register_forward_hook(count)
        generator(features(2), CUES, REPORTS).per_sample.sum().backward()
    assert calls == {96: 4, 192: 1}


@EACH
def test_only_report_tokens_carry_loss(
    tiny: Config, folder: Callable[[str], Path], family: str
) -> None:
    """The gradient at the decoder's output: padding, prompt and visual tokens have none, each
    report token has one."""
    generator = build(tiny, folder(family), quantization="none").float().train()
    states: list[Tensor] = []

    def keep(_: Any, __: Any, out: Any) -> None:
        out[0].retain_grad()
        states.append(out[0])

    unwrap_causal_lm(generator.language_model).base_model.register_forward_hook(keep)
    loss = generator(features(3), [*CUES, CUES[0]], [*REPORTS, None])
    loss.per_sample.sum().backward()
    assert states[0].grad is not None
    carries = states[0].grad.abs().sum(-1) > 0
    for row in range(3):
        count = int(loss.token_counts[row])
        wanted = torch.zeros_like(carries[row])
        if count:
            wanted[-count - 1 : -1] = True  # each position predicts the next
        assert torch.equal(carries[row], wanted)
    assert loss.token_counts[2] == 0


@EACH
def test_it_learns_one_batch_and_writes(
    tiny: Config, folder: Callable[[str], Path], family: str
) -> None:
    """In NF4, recomputing activations; then reports are written greedily, with beams and by
    sampling."""
    generator = build(
        tiny, folder(family), lora_rank=16, lora_targets="all-linear", checkpointing=True
    ).train()
    image = features(2)
    trained = [p for p in generator.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(STEPS):
        loss = generator(image, CUES, REPORTS).per_sample.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    generator.eval()
    ways = [{}, {"num_beams": 2}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9}]
    for options in ways:
        texts = generator.generate_reports(image, CUES, max_tokens=8, **options)
        assert len(texts) == 2


@EACH
def test_the_prompt_has_the_familys_form(
    tiny: Config, folder: Callable[[str], Path], family: str
) -> None:
    generator = build(tiny, folder(family), quantization="none")
    before, after = (generator.tokenizer.decode(part) for part in generator.encode_prompt(CUES[0]))
    assert SYSTEM_TEXT in before
    assert CUES[0] in after and REQUEST_TEXT in after
    assert VOLUME_MARKER not in before + after


def test_an_unknown_kind_is_one_sentence(
    tiny: Config, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    for name, kind in (
        ("unknown", {"model_type": "martian"}),
        ("t5", {"model_type": "t5", "d_model": 8}),
    ):
        path = tmp_path / name
        load_tokenizer(folder("llama")).save_pretrained(path)
        (path / "config.json").write_text(json.dumps(kind))
        if name == "t5":
            AutoConfig.from_pretrained(path)  # known to Transformers, but no causal LM
        with pytest.raises(UserError) as caught:
            load_language_model(tiny.generator, path)
        assert "\n" not in str(caught.value)
        assert kind["model_type"] in str(caught.value)
