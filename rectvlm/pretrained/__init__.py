"""Weights: where a model reference leads, and how weights come from and go to a hub, checked and resumable.

`references` answers what a name in a configuration means; `catalog` knows the names of the command `rectvlm weights`;
`manifest` holds the checksums of a folder; `sources` reads a hub, a mirror or a folder; `transfer` makes files whole;
`pulling` and `pushing` are the two directions. Only `bundled` needs torch and Transformers.
"""

from rectvlm.pretrained.model_references import (
    BUNDLED_SCHEME,
    models_folder,
    read_model_config,
    resolve_model,
)

__all__ = ["BUNDLED_SCHEME", "models_folder", "read_model_config", "resolve_model"]
