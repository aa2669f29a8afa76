"""The model without memory: every parameter with its shape and dtype, on the meta device.

What a configuration costs is read from it, so a plan counts the very modules that train.
"""

from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from rectvlm.config import Config, ModelPart
from rectvlm.labels import N_FINDINGS, N_LESIONS
from rectvlm.models.language_model import LanguageModel, add_lora, check_text_only
from rectvlm.models.prompt_embeddings import PromptEmbeddings
from rectvlm.models.rectvlm import RectVLM


def build_meta_model(
    config: Config, parts: Sequence[ModelPart], text_width: int, language: PretrainedConfig | None
) -> RectVLM:
    """Build a model on the meta device.

    The language model is not packed here: its linear layers have their bf16 shapes.

    Args:
        config: sizes.
        parts: which parts.
        text_width: channels of a prompt embedding.
        language: geometry of the language model; needed with the generator.

    Raises:
        UserError: the language model is more than one.
    """
    with torch.device("meta"):
        prompts = PromptEmbeddings(
            *(torch.empty(n, text_width) for n in (N_FINDINGS, N_FINDINGS, N_LESIONS))
        )
        adapted = None
        if "generator" in parts:
            assert language is not None, "the generator needs the geometry of a language model"
            check_text_only(language, config.generator.model)
            model = AutoModelForCausalLM.from_config(language, dtype=torch.bfloat16)
            adapted = LanguageModel(
                add_lora(model, config.generator), None, language.hidden_size, 0.0
            )
        return RectVLM(config, parts, prompts, adapted)
