"""The language model: any causal LM of Transformers, 4-bit and frozen, with LoRA.

Nothing here knows a family by name: which layers carry LoRA is read from the module tree, the prompt is the model's own
chat template, and what follows its last hidden state is its own code (`head_logits`).
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
)
from transformers.modeling_outputs import MoeModelOutputWithPast

from rectvlm.config import GeneratorConfig
from rectvlm.models.load_quantized import (
    SafetensorsCheckpoint,
    ShardModule,
    build_meta_causal_lm,
    has_all_tensors,
    materialize_weights,
    read_generation_tokens,
    replace_linear_with_4bit,
)
from rectvlm.models.report_prompt import check_tokenizer
from rectvlm.types import UserError

EMBEDDING_CHUNK_ROWS = 2048
"""Word embeddings that are measured at once."""


@dataclass
class LanguageModel:
    """A loaded language model with its tokenizer."""

    model: Any
    tokenizer: Any
    embedding_width: int
    """Channels of a word embedding."""
    embedding_std: float
    """Standard deviation of the word embeddings, as they enter the first layer."""


def load_language_model(
    config: GeneratorConfig,
    folder: str | Path,
    device: torch.device | None = None,
    shard_module: ShardModule | None = None,
) -> LanguageModel:
    """Load, quantize and adapt a language model, one module at a time.

    Args:
        config: quantization and LoRA.
        folder: a local folder or a hub id.
        device: where weights are packed and kept, a GPU with its number (`device_of`); by default the GPU if there is
            one and they are packed.
        settle: called for each module as soon as it is whole; an engine shards it there.

    Raises:
        UserError: an architecture that Transformers does not know or that reads images itself, no chat template or one
            that cannot make the report prompt, no attention layers that LoRA can adapt, or weights that are packed in
            another way than the configuration says.
    """
    geometry = _read_model_config(folder)
    tokenizer = load_tokenizer(folder)
    checkpoint = SafetensorsCheckpoint.from_reference(str(folder))
    _check_quantization(config, geometry, folder, checkpoint)
    settings = build_quantization_config(config)
    model = build_meta_causal_lm(geometry)
    check_tokenizer(tokenizer, model.get_input_embeddings().num_embeddings, folder)
    if checkpoint is None or not has_all_tensors(model, checkpoint):
        # Another file format, or names that Transformers converts: it loads the whole model on every rank.
        # An engine that shards places it afterwards; under ZeRO-3 Transformers refuses to be told a device.
        place = (device or _default_device(config)) if shard_module is None else None
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, quantization_config=settings, device_map=place
        )
        std = measure_embedding_std(model.get_input_embeddings())
    else:
        if settings is not None:
            replace_linear_with_4bit(model, settings, checkpoint.packed_weights)
        std = materialize_and_measure(
            model, checkpoint, device or _default_device(config), shard_module
        )
    # Of the file's settings only the tokens count: a penalty on what is repeated would tell against a report that says
    # "no" ten times. Training ends reports with the tokenizer's token, which the file may not know.
    model.generation_config = read_generation_tokens(str(folder), geometry, tokenizer)
    width = model.get_input_embeddings().embedding_dim
    return LanguageModel(add_lora(model, config), tokenizer, width, std)


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a language model, able to pad.

    Raises:
        UserError: it has no chat template, or no token that ends a text.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template is None:
        raise UserError(
            f"The language model {folder} has no chat template, which the report prompt needs; choose an instruction-"
            "tuned model, or add `chat_template` to its tokenizer_config.json."
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"The tokenizer of the language model {folder} has no token that ends a text, which every report needs; "
            "add `eos_token` to its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _read_model_config(folder: str | Path) -> Any:
    try:
        found = AutoConfig.from_pretrained(folder)
    except (
        ValueError
    ) as error:  # OSError speaks of a folder or hub id that is not there, in words of its own
        raise UserError(
            f"The language model {folder} is of a kind that this Transformers does not know "
            f"({str(error).splitlines()[0]}); choose another, or update Transformers."
        ) from error
    check_text_only(found, folder)
    return found


def check_text_only(geometry: PretrainedConfig, where: object) -> None:
    """Stop at a model with parts beside its text decoder, which nothing here would feed or train as one.

    Raises:
        UserError: it has such parts.
    """
    if geometry.get_text_config() is not geometry:
        raise UserError(
            f"The language model {where} is more than one (a {geometry.model_type} reads images or sounds itself); "
            "give a model of text alone, such as its text decoder saved by itself."
        )


def _check_quantization(
    config: GeneratorConfig,
    geometry: Any,
    folder: str | Path,
    checkpoint: SafetensorsCheckpoint | None,
) -> None:
    """Weights that come packed must be packed as the configuration says."""
    stored = getattr(geometry, "quantization_config", None)
    if stored is None:
        return
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    kind = (
        stored.get("bnb_4bit_quant_type")
        if stored.get("load_in_4bit")
        else stored.get("quant_method")
    )
    if kind != config.quantization or checkpoint is None or not checkpoint.packed_weights:
        raise UserError(
            f"The weights of {folder} are quantized already ({kind}), but generator.quantization is "
            f"{config.quantization}; "
            + (
                "set it to nf4."
                if kind == "nf4"
                else "choose a model in bfloat16, or packed to nf4 by bitsandbytes."
            )
        )


def resolve_device(device: torch.device | str | None) -> torch.device:
    """The device that is asked for, by default the GPU if there is one.

    A GPU without a number is the current one: to safetensors it would be the first, to the rest the current one.
    """
    found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return (
        torch.device("cuda", torch.cuda.current_device())
        if found == torch.device("cuda")
        else found
    )


def _default_device(config: GeneratorConfig) -> torch.device:
    on_gpu = config.quantization != "none" and torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def materialize_and_measure(
    model: Any, source: Any, device: torch.device, shard_module: ShardModule | None
) -> float:
    """`fill`, and the spread of the word embeddings, which is known only while they are whole."""
    words, found = model.get_input_embeddings(), []

    def measured(module: nn.Module) -> None:
        if module is words:
            found.append(measure_embedding_std(words))
        if shard_module is not None:
            shard_module(module)

    materialize_weights(model, source, device, measured)
    return found[0]


@torch.no_grad()
def measure_embedding_std(words: Any) -> float:
    """Standard deviation of all word embeddings, by the module's own forward: some families scale there."""
    total, squares = 0.0, 0.0
    for ids in torch.arange(words.num_embeddings, device=words.weight.device).split(
        EMBEDDING_CHUNK_ROWS
    ):
        rows = words(ids).float()
        total += rows.sum(dtype=torch.float64).item()
        squares += rows.square().sum(dtype=torch.float64).item()
    count = words.num_embeddings * words.embedding_dim
    return max(0.0, (squares - total * total / count) / (count - 1)) ** 0.5


def add_lora(model: Any, config: GeneratorConfig) -> Any:
    """Freeze a causal LM and put LoRA on it, in bf16: one dtype is what ZeRO-3 can shard together."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=find_lora_targets(model, config.lora_targets),
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, lora, autocast_adapter_dtype=False)
    for parameter in adapted.parameters():
        # Parameters alone: in bf16, the frequencies of rotary positions would be wrong by 0.4%.
        if parameter.is_floating_point() and parameter.dtype != torch.bfloat16:
            parameter.data = parameter.data.to(torch.bfloat16)
    return adapted


def build_quantization_config(config: GeneratorConfig) -> BitsAndBytesConfig | None:
    """The 4-bit settings, or None for bf16 weights."""
    if config.quantization == "none":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quantization,
        bnb_4bit_use_double_quant=config.double_quantization,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=getattr(torch, config.quant_storage),
    )


def find_lora_targets(model: nn.Module, choice: str) -> list[str]:
    """Names of the linear layers that LoRA adapts: those inside attention modules, or all but the output layer.

    Raises:
        UserError: none found.
    """
    output = model.get_output_embeddings()  # type: ignore[operator]
    names = []
    for parent_name, parent in model.named_modules():
        in_attention = type(parent).__name__.endswith("Attention")
        for name, child in parent.named_children():
            if (
                isinstance(child, nn.Linear)
                and child is not output
                and (choice == "all-linear" or in_attention)
            ):
                names.append(f"{parent_name}.{name}" if parent_name else name)
    if not names:
        raise UserError(
            f"{type(model).__name__} has no linear layers inside a module named …Attention, which "
            "generator.lora_targets=attention needs; set generator.lora_targets=all-linear."
        )
    return names


def unwrap_causal_lm(model: Any) -> Any:
    """The causal LM inside its adapter."""
    return model.get_base_model()


def compute_hidden_states(model: Any, embeds: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """What the decoder says, before the output layer: (B, T, E) from embeddings (B, T, E)."""
    decoder = unwrap_causal_lm(model).base_model
    found = decoder(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
    )
    return found[0]


class _PrecomputedDecoder(nn.Module):
    """Stands where the decoder stood."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)


def compute_head_logits(model: Any, hidden: Tensor) -> Tensor:
    """Logits (B, P, V) of hidden states (B, P, E), by the model's own forward with its decoder left out.

    Scales, soft caps and biases after the decoder are the family's own code, and its output layer is called as a
    module, so that an engine which shards gathers it.
    """
    whole = unwrap_causal_lm(model)
    assert whole.base_model is not whole, f"{type(whole).__name__} has no decoder of its own"
    head = copy.copy(whole)
    head._modules = {**whole._modules, whole.base_model_prefix: _PrecomputedDecoder()}
    # `forward`, not a call: hooks of the whole model stay out of it.
    return head.forward(inputs_embeds=hidden, use_cache=False).logits
