"""The report generator on a tiny Llama: where the image enters, what carries loss, what LoRA and 4
bits touch."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    GPT2Config,
    GPT2LMHeadModel,
)

from rectvlm import pretrained
from rectvlm.config import Config, GeneratorConfig
from rectvlm.models.image_features import ImageFeatures
from rectvlm.models.language_model import find_lora_targets, load_language_model, unwrap_causal_lm
from rectvlm.models.meta_model import build_meta_model
from rectvlm.models.report_generator import ReportGenerator
from rectvlm.models.report_prompt import REQUEST_TEXT, SYSTEM_TEXT, VOLUME_MARKER
from rectvlm.train.optimizer import set_training_modes
from rectvlm.train.phases import PHASES
from rectvlm.types import UserError

WIDTH = 48
SHORT, LONG = (
    "No findings suggested.",
    "Findings suggested: emphysema, lung nodule, atelectasis. " * 4,
)
REPORT = "Findings: The heart is enlarged. Impression: cardiomegaly."
OTHER = (
    "Findings: There is a nodule in the right upper lobe, and the lungs are clear. "
    "Impression: lung nodule."
)
ROUNDING = 0.02
"""What bfloat16 may do to a loss of about 7."""


@pytest.fixture(scope="module")
def llama(models_folder: None) -> str:
    return pretrained.resolve_model("bundled:tiny-llama")


def build(tiny: Config, folder: str | Path, **changes: Any) -> ReportGenerator:
    config: GeneratorConfig = tiny.generator.model_copy(update=changes)
    torch.manual_seed(0)
    return ReportGenerator(config, WIDTH, load_language_model(config, folder)).eval()


@pytest.fixture(scope="module", params=["nf4", "none"])
def generator(request: pytest.FixtureRequest, tiny: Config, llama: str) -> ReportGenerator:
    return build(tiny, llama, quantization=request.param)


def features(count: int, seed: int = 0) -> ImageFeatures:
    torch.manual_seed(seed)
    global_token, patches, regions = (
        torch.randn(count, *shape, WIDTH) for shape in ((), (12,), (20,))
    )
    return ImageFeatures(global_token, patches, regions, (3, 2, 2), patches)


def only(image: ImageFeatures, row: int) -> ImageFeatures:
    global_token, patches, regions = (part[row : row + 1] for part in image[:3])
    return ImageFeatures(global_token, patches, regions, image.patch_grid, patches)


def wake(generator: ReportGenerator) -> None:
    """LoRA's B starts at zero, which keeps the gradient of A at zero until B has moved."""
    torch.manual_seed(1)
    for name, parameter in generator.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)


def what_the_model_sees(generator: ReportGenerator, act: Callable[[], Any]) -> dict[str, Tensor]:
    """The arguments of the first call of the language model's decoder."""
    calls: list[dict[str, Tensor]] = []
    handle = unwrap_causal_lm(generator.language_model).base_model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(dict(kwargs)), with_kwargs=True
    )
    try:
        with torch.no_grad():
            act()
    finally:
        handle.remove()
    return calls[0]


def test_visual_tokens_land_at_the_marker(generator: ReportGenerator) -> None:
    image = features(2)
    seen = what_the_model_sees(generator, lambda: generator(image, [SHORT, LONG], [REPORT, OTHER]))
    words = generator.language_model.get_input_embeddings()
    tokenizer = generator.tokenizer
    with torch.no_grad():
        visual = generator.resampler(image).to(torch.bfloat16)
    for row, (cue, report) in enumerate(((SHORT, REPORT), (LONG, OTHER))):
        messages = [
            {"role": "system", "content": SYSTEM_TEXT},
            {"role": "user", "content": f"{VOLUME_MARKER}\n{cue}\n{REQUEST_TEXT}"},
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        start, end = (
            tokenizer.encode(part, add_special_tokens=False) for part in text.split(VOLUME_MARKER)
        )
        end += [*tokenizer.encode(report, add_special_tokens=False), tokenizer.eos_token_id]
        with torch.no_grad():
            wanted = torch.cat([words(torch.tensor(start)), visual[row], words(torch.tensor(end))])
        length = len(wanted)
        assert torch.equal(seen["inputs_embeds"][row, -length:], wanted)
        mask = seen["attention_mask"][row]
        assert mask.sum() == length
        assert mask[-length:].all()
        assert seen["position_ids"][row, -length:].tolist() == list(range(length))


def test_loss_is_that_of_the_report_tokens(generator: ReportGenerator) -> None:
    """Against a plain forward of one unpadded row, with the log-likelihoods summed by hand."""
    image = features(2)
    with torch.no_grad():
        loss = generator(image, [SHORT, LONG], [REPORT, OTHER])
    for row, (cue, report) in enumerate(((SHORT, REPORT), (LONG, OTHER))):
        target = [
            *generator.tokenizer.encode(report, add_special_tokens=False),
            generator.tokenizer.eos_token_id,
        ]
        before, after = generator.encode_prompt(cue)
        words = generator.language_model.get_input_embeddings()
        with torch.no_grad():
            parts = [
                words(torch.tensor(before)),
                generator.resampler(only(image, row))[0].bfloat16(),
            ]
            parts.append(words(torch.tensor(after + target)))
            logits = generator.language_model(inputs_embeds=torch.cat(parts)[None]).logits[0]
        likelihood = logits[-len(target) - 1 : -1].float().log_softmax(-1)
        wanted = -likelihood.gather(1, torch.tensor(target)[:, None]).mean()
        assert loss.token_counts[row] == len(target)
        assert loss.per_sample[row].item() == pytest.approx(wanted.item(), abs=ROUNDING)
        assert (loss.log_likelihood[row] != 0).sum() == len(target)
        assert (loss.log_likelihood[row, : -len(target)] == 0).all()


def test_padding_and_neighbours_do_not_change_a_loss(generator: ReportGenerator) -> None:
    image = features(2)
    with torch.no_grad():
        alone = generator(only(image, 0), [SHORT], [REPORT]).per_sample[0].item()
        for cue, report in ((LONG, OTHER), (LONG, None), (SHORT, OTHER)):
            beside = generator(image, [SHORT, cue], [REPORT, report]).per_sample[0].item()
            assert beside == pytest.approx(alone, abs=ROUNDING)


def test_micro_batches_of_like_length_give_the_losses_of_one_padded_batch(
    tiny: Config, llama: str
) -> None:
    """In float32, where padding does not change how sums are rounded by more than the last bits."""
    generator = build(tiny, llama, quantization="none").float()
    cues, reports = [SHORT, LONG, SHORT, LONG], [OTHER, REPORT, REPORT, OTHER]
    image = features(4)
    with torch.no_grad():
        padded = generator(image, cues, reports)
        buckets = []
        for rows in ([1, 2], [0, 3]):
            global_token, patches, regions = (part[rows] for part in image[:3])
            part = ImageFeatures(global_token, patches, regions, image.patch_grid, patches)
            bucket_cues, bucket_reports = (
                [texts[row] for row in rows] for texts in (cues, reports)
            )
            buckets.append((rows, generator(part, bucket_cues, bucket_reports)))
    for rows, bucket in buckets:
        assert torch.allclose(bucket.per_sample, padded.per_sample[rows], rtol=0, atol=1e-5)
        assert torch.equal(bucket.token_counts, padded.token_counts[rows])
    assert buckets[0][1].log_likelihood.shape[1] <= padded.log_likelihood.shape[1]
    assert sum(bucket.position_count for _, bucket in buckets) == padded.position_count


def test_without_a_report_there_is_no_loss_but_a_graph(generator: ReportGenerator) -> None:
    loss = generator(features(2), [SHORT, LONG], [REPORT, None])
    assert (loss.per_sample[1], loss.token_counts[1]) == (0, 0)
    assert loss.per_sample[0] > 1
    nothing = generator(features(2), [SHORT, LONG], [None, None])
    assert nothing.token_counts.tolist() == [0, 0]
    assert nothing.per_sample.tolist() == [0, 0]
    generator.zero_grad()
    nothing.per_sample.sum().backward()
    reached = [p for p in generator.parameters() if p.requires_grad and p.grad is not None]
    assert reached
    assert not any(p.grad.any() for p in reached)
    generator.zero_grad()


def test_a_report_that_is_cut_does_not_teach_its_end(generator: ReportGenerator) -> None:
    most = generator.config.max_report_tokens
    embed = generator.language_model.get_input_embeddings()
    end = embed(torch.tensor(generator.tokenizer.eos_token_id))
    words = generator.tokenizer.encode(OTHER * 20, add_special_tokens=False)
    long, short = OTHER * 20, generator.tokenizer.decode(words[: most // 2])
    last_embeddings = []
    for report in (long, short):
        seen = what_the_model_sees(
            generator, lambda report=report: generator(features(1), [SHORT], [report])
        )
        last_embeddings.append(seen["inputs_embeds"][0, -1])
    assert torch.equal(last_embeddings[0], embed(torch.tensor(words[most - 1])))
    assert torch.equal(last_embeddings[1], end)
    assert not torch.equal(last_embeddings[0], end)
    assert [generator.is_cut(report) for report in (long, short)] == [True, False]
    with torch.no_grad():
        assert generator(features(1), [SHORT], [long]).token_counts.tolist() == [most]


def test_another_image_changes_the_token_probabilities(generator: ReportGenerator) -> None:
    with torch.no_grad():
        first, again, other_image = (
            generator(features(1, seed), [SHORT], [REPORT]).log_likelihood for seed in (0, 0, 1)
        )
    assert torch.equal(first, again)
    assert (first - other_image).abs().max() > 0.01


def test_other_cues_change_the_token_probabilities(generator: ReportGenerator) -> None:
    with torch.no_grad():
        short, long = (
            generator(features(1), [cue], [REPORT]).log_likelihood for cue in (SHORT, LONG)
        )
    assert (short - long).abs().max() > 10 * torch.finfo(torch.bfloat16).eps


def test_generate_repeats_itself_and_ignores_neighbours(tiny: Config, llama: str) -> None:
    generator = build(tiny, llama, quantization="none").float()
    image = features(2)
    first = generator.generate_reports(image, [SHORT, LONG], max_tokens=12)
    assert first == generator.generate_reports(image, [SHORT, LONG], max_tokens=12)
    alone = generator.generate_reports(only(image, 0), [SHORT], max_tokens=12)
    assert first[0] == alone[0]
    assert len(first) == 2
    assert all(isinstance(text, str) and text for text in first)
    assert REQUEST_TEXT not in first[0]


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_gradients_reach_resampler_and_lora_alone(
    tiny: Config, llama: str, quantization: str
) -> None:
    generator = build(tiny, llama, quantization=quantization).train()
    trains = {name for name, p in generator.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.startswith("resampler.") for name in trains)
    assert (
        len([name for name in trains if "lora_" in name]) == 2 * 4 * 2
    )  # A and B of q, k, v, o in two layers
    wake(generator)
    generator(features(2), [SHORT, LONG], [REPORT, OTHER]).per_sample.sum().backward()
    silent = [
        name
        for name, p in generator.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert silent == []


def test_nf4_packs_and_none_does_not(tiny: Config, llama: str) -> None:
    kinds = {}
    sizes = {}
    for quantization in ("nf4", "none"):
        model = build(tiny, llama, quantization=quantization).language_model
        packed = [p for p in model.parameters() if type(p).__name__ == "Params4bit"]
        kinds[quantization] = len(packed)
        sizes[quantization] = sum(
            p.numel() * p.element_size() for n, p in model.named_parameters() if "base_layer" in n
        )
        for parameter in packed:
            assert parameter.quant_state.quant_type == "nf4"
            assert parameter.quant_state.nested == tiny.generator.double_quantization
            assert parameter.dtype == getattr(torch, tiny.generator.quant_storage)
    assert kinds["none"] == 0
    assert kinds["nf4"] == 2 * 7
    assert sizes["nf4"] == sizes["none"] / 4  # 4 bits for 16; LoRA sits on the attention layers


def test_gradients_through_nf4_are_those_of_its_dequantized_weights(
    tiny: Config, llama: str
) -> None:
    packed, plain = (
        build(tiny, llama, quantization=quantization).train() for quantization in ("nf4", "none")
    )
    unpacked_modules = dict(plain.language_model.named_modules())
    for name, module in packed.language_model.named_modules():
        if isinstance(module, Linear4bit):
            values = dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert not torch.equal(unpacked_modules[name].weight, values)
            unpacked_modules[name].weight.data.copy_(values)
    results = []
    for generator in (packed, plain):
        wake(generator)
        loss = generator(features(2), [SHORT, LONG], [REPORT, OTHER]).per_sample.sum()
        loss.backward()
        gradients = [p.grad.float().flatten() for p in generator.parameters() if p.grad is not None]
        results.append((loss.item(), torch.cat(gradients)))
    assert results[0][0] == pytest.approx(results[1][0], abs=ROUNDING)
    assert (results[0][1] - results[1][1]).norm() < 0.02 * results[1][1].norm()


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (
            "all-linear",
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        ),
    ],
)
def test_lora_targets(llama: str, choice: str, wanted: set[str]) -> None:
    names = find_lora_targets(AutoModelForCausalLM.from_pretrained(llama), choice)
    assert {name.rpartition(".")[2] for name in names} == wanted
    assert len(names) == 2 * len(wanted)


def test_a_model_without_linear_attention_is_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=8))
    with pytest.raises(UserError, match=r"GPT2LMHeadModel.*lora_targets"):
        find_lora_targets(model, "attention")


def copied(llama: str, folder: Path, template: str | None) -> Path:
    """The tiny Llama with another chat template, or none."""
    shutil.copytree(llama, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def test_no_chat_template_is_one_sentence(tiny: Config, llama: str, tmp_path: Path) -> None:
    folder = copied(llama, tmp_path / "plain", None)
    with pytest.raises(UserError, match="no chat template") as caught:
        load_language_model(tiny.generator, folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_template_that_knows_no_system_role_keeps_the_instruction(
    tiny: Config, llama: str, tmp_path: Path
) -> None:
    """Gemma 2's template raises at a system turn."""
    template = (
        "{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}"
        "{% endif %}"
        "{% for message in messages %}"
        "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
        "{% endfor %}"
    )
    generator = build(tiny, copied(llama, tmp_path / "gemma", template), quantization="none")
    before, after = (generator.tokenizer.decode(part) for part in generator.encode_prompt(SHORT))
    assert SYSTEM_TEXT in before
    assert SHORT in after
    with torch.no_grad():
        assert generator(features(1), [SHORT], [REPORT]).per_sample[0] > 1


OF_PARTS = "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}"
"""A turn's content as multimodal templates expect it: a list of parts."""


@pytest.mark.parametrize(
    "template",
    [
        # Does not parse.
        "{% for m in messages %}{{ m['content']",
        # Expects lists, and there are none.
        "{% for m in messages %}" + OF_PARTS + "{% endfor %}",
        # Drops the turn.
        "{% for m in messages if m['role'] == 'assistant' %}{{ m['content'] }}{% endfor %}<|end|>",
        # Escapes the marker.
        "{% for m in messages %}{{ m['content'] | e }}{% endfor %}",
    ],
)
def test_a_template_that_cannot_make_the_prompt_is_one_sentence(
    tiny: Config, llama: str, tmp_path: Path, template: str
) -> None:
    folder = copied(llama, tmp_path / "other", template)
    with pytest.raises(UserError, match=r"chat template.*report prompt") as caught:
        load_language_model(tiny.generator, folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_token_that_the_model_lacks_is_one_sentence(
    tiny: Config, llama: str, tmp_path: Path
) -> None:
    """Fine-tuned models come with a padding token that was added to the tokenizer alone."""
    folder = tmp_path / "padded"
    shutil.copytree(llama, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<added>"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=rf"the token {len(tokenizer) - 1} \(padding\)"):
        load_language_model(tiny.generator, folder)


def test_a_tokenizer_without_an_end_is_one_sentence(
    tiny: Config, llama: str, tmp_path: Path
) -> None:
    folder = tmp_path / "endless"
    shutil.copytree(llama, folder)
    change(folder / "tokenizer_config.json", eos_token=None, pad_token=None)
    with pytest.raises(UserError, match="no token that ends a text"):
        load_language_model(tiny.generator, folder)


def test_a_model_that_reads_images_itself_is_one_sentence(tiny: Config, tmp_path: Path) -> None:
    Gemma3Config(
        text_config={"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 8},
        vision_config={"hidden_size": 8},
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"more than one \(a gemma3 reads images"):
        load_language_model(tiny.generator, tmp_path)
    with pytest.raises(UserError, match="more than one"):
        build_meta_model(tiny, PHASES[3].parts, 8, Gemma3Config.from_pretrained(tmp_path))


def test_reports_end_where_training_ends_them(tiny: Config, llama: str, tmp_path: Path) -> None:
    """Whatever generation_config.json says: its tokens end a report too, its penalties and lengths
    do not count."""
    folder = tmp_path / "settings"
    shutil.copytree(llama, folder)
    plain = build(tiny, llama, quantization="none")
    end = plain.tokenizer.eos_token_id
    change(
        folder / "generation_config.json",
        eos_token_id=5,
        repetition_penalty=9.0,
        min_new_tokens=40,
        do_sample=True,
    )
    reloaded = build(tiny, folder, quantization="none")
    settings = reloaded.language_model.generation_config
    assert settings.eos_token_id == sorted({5, end})
    assert settings.repetition_penalty in (None, 1.0)

    def steps(generator: ReportGenerator, token: int) -> int:
        """Of the decoder after the common prefix, when the model says this token at once."""
        calls = []
        head = unwrap_causal_lm(generator.language_model).get_output_embeddings()
        decoder = unwrap_causal_lm(generator.language_model).base_model
        sure = torch.full((head.out_features,), 0.0).index_fill(0, torch.tensor([token]), 9.0)
        handles = (
            decoder.register_forward_hook(lambda *_: calls.append(1)),
            head.register_forward_hook(lambda m, a, out: out + sure),
        )
        try:
            assert generator.generate_reports(features(1), [SHORT], max_tokens=8) == [""]
        finally:
            for handle in handles:
                handle.remove()
        return len(calls) - 1

    assert steps(plain, end) == steps(reloaded, end) == 1
    reloaded.tokenizer.add_special_tokens(
        {"additional_special_tokens": [reloaded.tokenizer.decode([5])]}
    )
    assert steps(reloaded, 5) == 1


def test_the_loss_is_the_same_for_any_chunk(tiny: Config, llama: str) -> None:
    """Also when nearly every position of a long report that is not there has a chunk of its own."""
    losses = []
    for chunk in (1, 10_000):
        generator = build(tiny, llama, quantization="none", loss_chunk=chunk, max_report_tokens=700)
        with torch.no_grad():
            losses.append(generator(features(2), [SHORT, SHORT], [REPORT, None]).per_sample)
    torch.testing.assert_close(*losses, rtol=0, atol=ROUNDING)


def test_images_and_prompts_must_be_as_many(tiny: Config, llama: str) -> None:
    generator = build(tiny, llama, quantization="none")
    with pytest.raises(AssertionError, match="3 images, but prompts of 2"):
        generator(features(3), [SHORT, LONG], [REPORT, OTHER])


def test_a_frozen_language_model_recomputes_too(tiny: Config, llama: str) -> None:
    """Gradients pass through it to the image; in eval mode Transformers would keep what each layer
    computed."""
    model = nn.Module()
    model.generator = build(tiny, llama, quantization="none", checkpointing=True, lora_dropout=0.5)
    set_training_modes(model, tiny.train.phases["phase1"])
    calls: list[int] = []
    layers = [m for m in model.modules() if type(m).__name__ == "LlamaDecoderLayer"]
    handles = [layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1)) for layer in layers]
    first, again = (
        model.generator(features(1), [SHORT], [REPORT]).per_sample.sum() for _ in range(2)
    )
    assert first.item() == again.item()  # no dropout
    before = len(calls)
    first.backward()
    assert len(calls) - before == len(layers) == 2
    for handle in handles:
        handle.remove()
