"""The word embeddings of a language model whose layers run elsewhere, such as in a server.

Prompts of reports are made from them; the memory of the layers is left to others.
"""

from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig, PretrainedConfig

from rectvlm.models.language_model import (
    LanguageModel,
    load_tokenizer,
    measure_embedding_std,
    read_model_config,
)
from rectvlm.models.load_quantized import (
    SafetensorsCheckpoint,
    build_meta_causal_lm,
    has_all_tensors,
    materialize_weights,
    read_generation_tokens,
)
from rectvlm.models.report_prompt import check_tokenizer
from rectvlm.pretrained import explain_model_errors, require_safetensors
from rectvlm.types import UserError


class WordEmbeddings(nn.Module):
    """What is left of a causal LM without its layers."""

    def __init__(
        self, embedding: nn.Module, config: PretrainedConfig, generation_config: GenerationConfig
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.config, self.generation_config = config, generation_config

    def get_input_embeddings(self) -> nn.Module:
        """The module that embeds token ids."""
        return self.embedding


def load_word_embeddings(folder: str | Path, device: torch.device) -> LanguageModel:
    """Load the word embeddings and the tokenizer of a causal LM.

    Args:
        folder: local folder or hub id.
        device: where to keep them.

    Raises:
        UserError: the model cannot be used (see `load_language_model`), or its file of weights has
            no word embeddings under the name that Transformers gives them.
    """
    with explain_model_errors(str(folder)):
        require_safetensors(str(folder))
        config = read_model_config(folder)
        tokenizer = load_tokenizer(folder)
        checkpoint = SafetensorsCheckpoint.from_reference(str(folder))
        causal_lm = build_meta_causal_lm(config)
        embedding = causal_lm.get_input_embeddings()
        check_tokenizer(tokenizer, embedding.num_embeddings, folder)
        if checkpoint is None or not has_all_tensors(causal_lm, checkpoint, embedding):
            raise UserError(
                f"The word embeddings of {folder} were not found among its weights: expected "
                "safetensors with Transformers' own names; save it with `save_pretrained`."
            )
        materialize_weights(causal_lm, checkpoint, device, lambda module: None, embedding)
        generation_config = read_generation_tokens(str(folder), config, tokenizer)
    std = measure_embedding_std(embedding)
    model = WordEmbeddings(embedding, config, generation_config)
    return LanguageModel(model, tokenizer, embedding.embedding_dim, std)
