"""The language model: any causal LM of Transformers, 4-bit and frozen, with LoRA.

No model family is known here by name. The module tree says which layers carry LoRA, the prompt is
the model's own chat template, and the layers after its last hidden state run as its own code
(`compute_head_logits`).

Shapes: B samples, T text positions, P positions with logits, E width, V vocabulary.
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
from rectvlm.pretrained import explain_model_errors, require_safetensors
from rectvlm.types import UserError

EMBEDDING_CHUNK_ROWS = 2048
"""Word embeddings that are measured at a time."""


@dataclass
class LanguageModel:
    """A loaded causal LM with LoRA, and its tokenizer."""

    model: Any
    tokenizer: Any
    embedding_width: int
    """Channels of a word embedding."""
    embedding_std: float
    """Standard deviation of the word embeddings as they enter the first layer."""


def load_language_model(
    config: GeneratorConfig,
    folder: str | Path,
    device: torch.device | None = None,
    shard_module: ShardModule | None = None,
) -> LanguageModel:
    """Load and quantize a causal LM, one module at a time, and add LoRA.

    Args:
        config: quantization and LoRA.
        folder: local folder or hub id.
        device: device on which weights are packed and kept, a GPU with its number
            (`resolve_device`). By default the GPU if there is one and weights are packed.
        shard_module: called for each module as soon as its weights are complete; an engine shards
            it there.

    Raises:
        UserError: Transformers does not know the architecture, the model reads more than text, it
            has no chat template or one that cannot render the report prompt, it has no attention
            layers for LoRA, its weights are pickles or packed in another way than the configuration
            says, or a file is missing or damaged.
    """
    with explain_model_errors(str(folder)):
        require_safetensors(str(folder))
        return _load_and_adapt(config, folder, device, shard_module)


def _load_and_adapt(
    config: GeneratorConfig,
    folder: str | Path,
    device: torch.device | None,
    shard_module: ShardModule | None,
) -> LanguageModel:
    model_config = read_model_config(folder)
    tokenizer = load_tokenizer(folder)
    checkpoint = SafetensorsCheckpoint.from_reference(str(folder))
    _check_quantization(config, model_config, folder, checkpoint)
    quantization = build_quantization_config(config)
    model = build_meta_causal_lm(model_config)
    check_tokenizer(tokenizer, model.get_input_embeddings().num_embeddings, folder)

    device = device or _default_device(config)
    if checkpoint is None or not has_all_tensors(model, checkpoint):
        # Names that Transformers converts, or a hub id without safetensors, which it refuses. It
        # loads the whole model on every rank. An engine that shards places it afterwards, and
        # under ZeRO-3 Transformers accepts no device.
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.bfloat16,
            quantization_config=quantization,
            device_map=device if shard_module is None else None,
            use_safetensors=True,
        )
        std = measure_embedding_std(model.get_input_embeddings())
    else:
        if quantization is not None:
            replace_linear_with_4bit(model, quantization, checkpoint.packed_weights)
        std = materialize_and_measure(model, checkpoint, device, shard_module)

    # Of the file's generation settings only the tokens count: a penalty on repetition would tell
    # against a report that says "no" ten times. Training ends reports with the tokenizer's token,
    # which the file may not know.
    model.generation_config = read_generation_tokens(str(folder), model_config, tokenizer)
    width = model.get_input_embeddings().embedding_dim
    return LanguageModel(add_lora(model, config), tokenizer, width, std)


def load_tokenizer(folder: str | Path) -> Any:
    """Load the tokenizer of a language model, with a padding token.

    Raises:
        UserError: it has no chat template, or no token that ends a text.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template is None:
        raise UserError(
            f"The language model {folder} has no chat template, which the report prompt needs; "
            "choose an instruction-tuned model, or add `chat_template` to its "
            "tokenizer_config.json."
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"The tokenizer of the language model {folder} has no token that ends a text, which "
            "every report needs; add `eos_token` to its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_model_config(folder: str | Path) -> Any:
    """Read the configuration of a language model.

    Raises:
        UserError: Transformers does not know the architecture, or the model reads more than text.
    """
    try:
        model_config = AutoConfig.from_pretrained(folder)
    except ValueError as error:  # an OSError names a missing folder or hub id well enough itself
        raise UserError(
            f"The language model {folder} is of a kind that this Transformers does not know "
            f"({str(error).splitlines()[0]}); choose another, or update Transformers."
        ) from error
    check_text_only(model_config, folder)
    return model_config


def check_text_only(model_config: PretrainedConfig, where: object) -> None:
    """Refuse a model with parts beside its text decoder, which nothing here would feed or train.

    Raises:
        UserError: it has such parts.
    """
    if model_config.get_text_config() is not model_config:
        raise UserError(
            f"The language model {where} is more than one (a {model_config.model_type} reads "
            "images or sounds itself); give a model of text alone, such as its text decoder saved "
            "by itself."
        )


def _check_quantization(
    config: GeneratorConfig,
    model_config: Any,
    folder: str | Path,
    checkpoint: SafetensorsCheckpoint | None,
) -> None:
    """Refuse packed weights that are not packed as the configuration says."""
    stored = getattr(model_config, "quantization_config", None)
    if stored is None:
        return
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    kind = stored.get("bnb_4bit_quant_type" if stored.get("load_in_4bit") else "quant_method")
    if kind == config.quantization and checkpoint is not None and checkpoint.packed_weights:
        return
    remedy = "choose a model in bfloat16, or packed to nf4 by bitsandbytes."
    if kind == "nf4":
        remedy = "set it to nf4."
    raise UserError(
        f"The weights of {folder} are quantized already ({kind}), but generator.quantization is "
        f"{config.quantization}; {remedy}"
    )


def resolve_device(device: torch.device | str | None) -> torch.device:
    """A device with its number; by default the current GPU if there is one, else the CPU.

    A GPU without a number is the current one. (To safetensors it would be the first GPU, to torch
    it is the current one.)
    """
    resolved = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if resolved == torch.device("cuda"):
        return torch.device("cuda", torch.cuda.current_device())
    return resolved


def _default_device(config: GeneratorConfig) -> torch.device:
    return resolve_device("cpu" if config.quantization == "none" else None)


def materialize_and_measure(
    model: Any, source: Any, device: torch.device, shard_module: ShardModule | None
) -> float:
    """Call `materialize_weights` and measure the word embeddings before they are sharded.

    Returns:
        Standard deviation of the word embeddings.
    """
    word_embeddings = model.get_input_embeddings()
    stds: list[float] = []

    def measure_and_shard(module: nn.Module) -> None:
        if module is word_embeddings:
            stds.append(measure_embedding_std(word_embeddings))
        if shard_module is not None:
            shard_module(module)

    materialize_weights(model, source, device, measure_and_shard)
    return stds[0]


@torch.no_grad()
def measure_embedding_std(word_embeddings: Any) -> float:
    """Standard deviation of all word embeddings, as the module's own forward gives them: some
    families scale them there."""
    total, squares = 0.0, 0.0
    all_ids = torch.arange(word_embeddings.num_embeddings, device=word_embeddings.weight.device)
    for ids in all_ids.split(EMBEDDING_CHUNK_ROWS):
        rows = word_embeddings(ids).float()
        total += rows.sum(dtype=torch.float64).item()
        squares += rows.square().sum(dtype=torch.float64).item()
    count = word_embeddings.num_embeddings * word_embeddings.embedding_dim
    return max(0.0, (squares - total * total / count) / (count - 1)) ** 0.5


def add_lora(model: Any, config: GeneratorConfig) -> Any:
    """Freeze a causal LM and add LoRA in bf16: ZeRO-3 shards parameters of one dtype together."""
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
    """The 4-bit settings of bitsandbytes, or None for bf16 weights."""
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
    """Names of the linear layers that LoRA adapts.

    Args:
        model: causal LM.
        choice: "attention" takes linear layers inside attention modules, "all-linear" all but the
            output layer.

    Raises:
        UserError: the model has no such layers.
    """
    output_layer = model.get_output_embeddings()  # type: ignore[operator]
    names = []
    for parent_name, parent in model.named_modules():
        if choice != "all-linear" and not type(parent).__name__.endswith("Attention"):
            continue
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear) and child is not output_layer:
                names.append(f"{parent_name}.{name}" if parent_name else name)
    if not names:
        raise UserError(
            f"{type(model).__name__} has no linear layers inside a module named …Attention, which "
            "generator.lora_targets=attention needs; set generator.lora_targets=all-linear."
        )
    return names


def unwrap_causal_lm(model: Any) -> Any:
    """The causal LM inside its LoRA adapter."""
    return model.get_base_model()


def compute_hidden_states(model: Any, embeds: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """Last hidden states of the decoder, (B, T, E), from embeddings (B, T, E)."""
    decoder = unwrap_causal_lm(model).base_model
    outputs = decoder(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
    )
    return outputs[0]


class _PrecomputedDecoder(nn.Module):
    """A decoder that returns its input as its last hidden states."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)


def compute_head_logits(model: Any, hidden: Tensor) -> Tensor:
    """Logits (B, P, V) of hidden states (B, P, E), by the model's own forward without its decoder.

    Scales, soft caps and biases after the decoder are the family's own code. The output layer is
    called as a module, so that an engine which shards gathers it.
    """
    causal_lm = unwrap_causal_lm(model)
    assert causal_lm.base_model is not causal_lm, (
        f"{type(causal_lm).__name__} has no decoder of its own"
    )
    head = copy.copy(causal_lm)
    head._modules = {**causal_lm._modules, causal_lm.base_model_prefix: _PrecomputedDecoder()}
    # `forward`, not a call, so that hooks of the causal LM do not run.
    return head.forward(inputs_embeds=hidden, use_cache=False).logits
