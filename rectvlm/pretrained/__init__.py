"""Models that are fetched: language models, text encoders, and published weights of rectvlm.

`model_references` says what a name in a configuration means, `catalog` which names
`rectvlm weights` knows, and `pull`, `push` and `verify` are its actions.
"""

from rectvlm.pretrained.model_references import (
    BUNDLED_SCHEME,
    explain_model_errors,
    models_folder,
    read_model_config,
    require_model,
    require_safetensors,
    resolve_model,
)

__all__ = [
    "BUNDLED_SCHEME",
    "explain_model_errors",
    "models_folder",
    "read_model_config",
    "require_model",
    "require_safetensors",
    "resolve_model",
]
