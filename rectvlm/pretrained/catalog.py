"""The names that `rectvlm weights` knows: our sizes, models of others, and bundled models."""

from dataclasses import dataclass

SIZE_REPOSITORIES: dict[str, str] = {
    name: f"rectvlm/rectvlm-{name}" for name in ("small", "medium", "large")
}
"""Repository of each size; `--repo` gives another one, and a mirror keeps these names."""

PUBLISHED_SIZES: frozenset[str] = frozenset()
"""Sizes whose weights are published in `SIZE_REPOSITORIES`.

The name of an unpublished one could be taken by anyone on the public Hub, so it is not asked for.
"""


@dataclass(frozen=True)
class ExternalModel:
    """A model of others that a configuration builds on."""

    repository: str
    """Hub id OWNER/NAME."""
    role: str
    """Use of the model in rectvlm, in words."""
    is_gated: bool
    """Whether its owner wants terms accepted before a download."""
    gigabytes: float
    """Size of its weights as published, GB."""


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
    "smollm2-135m-instruct": "language model of learn",
    "smollm2-20-layers": "language model of demo, without the middle layers of SmolLM2-135M",
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
"""Files in the top folder of a model of others that are needed to load it, and no pickle."""
