"""The model on the meta device: every parameter with its shape and dtype, without memory.

The planner counts memory and computation on this model, so a plan covers the very modules that
train.
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
    config: Config,
    parts: Sequence[ModelPart],
    text_width: int,
    language_config: PretrainedConfig | None,
) -> RectVLM:
    """Build a model on the meta device.

    The language model is not packed here: its linear layers have their bf16 shapes.

    Args:
        config: configuration of the model.
        parts: parts to build.
        text_width: channels of a prompt embedding.
        language_config: Transformers configuration of the language model; needed with the
            generator.

    Raises:
        UserError: the language model reads more than text.
    """
    with torch.device("meta"):
        present, absent = torch.empty(N_FINDINGS, text_width), torch.empty(N_FINDINGS, text_width)
        prompts = PromptEmbeddings(present, absent, torch.empty(N_LESIONS, text_width))
        language = None
        if "generator" in parts:
            assert language_config is not None, "the generator needs a language model"
            check_text_only(language_config, config.generator.model)
            causal_lm = AutoModelForCausalLM.from_config(language_config, dtype=torch.bfloat16)
            adapted = add_lora(causal_lm, config.generator)
            language = LanguageModel(adapted, None, language_config.hidden_size, 0.0)
        return RectVLM(config, parts, prompts, language)
