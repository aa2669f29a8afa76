"""The names that `rectvlm weights` knows: our sizes, the models they build on, and the bundled ones."""

from typing import NamedTuple

SIZE_REPOSITORIES: dict[str, str] = {
    name: f"rectvlm/rectvlm-{name}" for name in ("small", "medium", "large")
}
"""Repository of each size. Another one is given with `--repo`, and a mirror keeps these names."""

PUBLISHED_SIZES: frozenset[str] = frozenset()
"""Sizes whose weights are published under the name in `SIZES`. The name of an unpublished one could be taken by anyone
on the public Hub, so it is not asked for there."""


class ExternalModel(NamedTuple):
    """A model of others that a configuration builds on."""

    repository: str
    role: str
    is_gated: bool
    """Whether its owner wants terms accepted before it can be downloaded."""
    gigabytes: float
    """Its weights, in the type in which they are published."""


EXTERNAL_MODELS: dict[str, ExternalModel] = {
    "bio-clinicalbert": ExternalModel(
        "emilyalsentzer/Bio_ClinicalBERT", "text encoder", False, 0.4
    ),
    "llama-3.1-8b": ExternalModel(
        "meta-llama/Llama-3.1-8B-Instruct", "language model of small", True, 16.1
    ),
    "gemma-2-27b": ExternalModel("google/gemma-2-27b-it", "language model of medium", True, 54.5),
    "llama-3.1-70b": ExternalModel(
        "meta-llama/Llama-3.1-70B-Instruct", "language model of large", True, 141.1
    ),
}

BUNDLED_MODELS: dict[str, str] = {
    "minilm-l6-v2": "text encoder of demo",
    "smollm2-135m-instruct": "language model of demo",
    "tiny-bert": "text encoder of tiny, random weights",
    "tiny-llama": "language model of tiny, random weights",
}

MODEL_FILE_PATTERNS = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)
"""What a model of others needs to load, in its top folder: no pickle, no weights of other frameworks."""
