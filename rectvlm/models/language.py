"""The language model: any causal LM of Transformers, 4-bit and frozen, with LoRA.

Nothing here knows a family by name: which layers carry LoRA is read from the module tree.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from rectvlm.config import GeneratorConfig
from rectvlm.types import UserError


@dataclass
class LanguageModel:
    """A loaded language model with its tokenizer."""

    model: Any
    tokenizer: Any
    width: int
    """Channels of a word embedding."""
    embedding_std: float
    """Standard deviation of the word embeddings."""


def load_language_model(config: GeneratorConfig, folder: str | Path) -> LanguageModel:
    """Load, quantize and adapt a language model.

    Args:
        config: quantization and LoRA.
        folder: a local folder or a hub id.

    Raises:
        UserError: the model has no chat template or no attention layers that LoRA can adapt.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template is None:
        raise UserError(
            f"The language model {folder} has no chat template, which the report prompt needs; choose an instruction-"
            "tuned model, or add `chat_template` to its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=quantization(config), low_cpu_mem_usage=True
    )
    # `generate` warns about sampling settings that greedy decoding ignores; the caller chooses them anew.
    model.generation_config.update(do_sample=False, temperature=None, top_p=None, top_k=None)
    embedding: torch.Tensor = model.get_input_embeddings().weight
    width, std = embedding.shape[1], embedding.float().std().item()
    return LanguageModel(adapt(model, config), tokenizer, width, std)


def adapt(model: Any, config: GeneratorConfig) -> Any:
    """Freeze a causal LM and put LoRA on it, in bf16: one dtype is what ZeRO-3 can shard together."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if config.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=lora_targets(model, config.lora_targets),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora, autocast_adapter_dtype=False).to(torch.bfloat16)


def quantization(config: GeneratorConfig) -> BitsAndBytesConfig | None:
    """The 4-bit settings, or None for bf16 weights."""
    if config.quantization == "none":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quantization,
        bnb_4bit_use_double_quant=config.double_quantization,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=getattr(torch, config.storage),
    )


def lora_targets(model: nn.Module, choice: str) -> list[str]:
    """Names of the linear layers that LoRA adapts: those inside attention modules, or all but the output layer.

    Raises:
        UserError: none found.
    """
    output = model.get_output_embeddings()  # type: ignore[operator]
    names = []
    for parent_name, parent in model.named_modules():
        in_attention = type(parent).__name__.endswith("Attention")
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear) and child is not output and (choice == "all-linear" or in_attention):
                names.append(f"{parent_name}.{name}" if parent_name else name)
    if not names:
        raise UserError(
            f"{type(model).__name__} has no linear layers inside a module named …Attention, which "
            "generator.lora_targets=attention needs; set generator.lora_targets=all-linear."
        )
    return names
