"""Where a model reference leads: a folder, a hub id, or a bundled model that is fetched or built once."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from rectvlm.pretrained.catalog import BUNDLED_MODELS
from rectvlm.types import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BUNDLED_SCHEME = "bundled:"
MODEL_CONFIGS_FOLDER = Path(__file__).parent.parent / "configs" / "models"


def models_folder() -> Path:
    """Where models are kept that no cache of the hub holds: `$RECTVLM_MODELS`, or `data/models`."""
    return Path(os.environ.get("RECTVLM_MODELS", "data/models"))


def resolve_model(reference: str) -> str:
    """The folder or hub id of a model reference; a bundled model is fetched or built on first use.

    Raises:
        UserError: an unknown bundled name, or a path that does not exist.
    """
    names = ", ".join(BUNDLED_SCHEME + name for name in BUNDLED_MODELS)
    if reference.startswith(BUNDLED_SCHEME):
        name = reference.removeprefix(BUNDLED_SCHEME)
        if name not in BUNDLED_MODELS:
            raise UserError(f"No bundled model {name!r}: choose one of {names}.")
        from rectvlm.pretrained import bundled

        return str(bundled.prepare_bundled_model(name, models_folder()))
    looks_like_path = reference.startswith((".", "/", "~")) or reference.count("/") > 1
    path = Path(reference).expanduser()
    if looks_like_path and not (path / "config.json").is_file():
        raise UserError(
            f"No model at {path}: expected a folder with config.json, a hub id, or one of {names}."
        )
    return str(path) if path.is_dir() else reference


def read_model_config(reference: str) -> "PretrainedConfig":
    """Layers and widths of a text or language model, without its weights.

    Those that the configurations name are kept in `rectvlm/configs/models`, so that planning needs no network and no
    licence.

    Raises:
        UserError: a model that is neither known nor in a folder nor on the hub within reach.
    """
    from transformers import AutoConfig

    for path in sorted(MODEL_CONFIGS_FOLDER.glob("*.json")):
        tree = json.loads(path.read_text())
        if tree.pop("_source") == reference:
            return AutoConfig.for_model(**tree)
    try:
        return AutoConfig.from_pretrained(resolve_model(reference))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"The configuration of the model {reference!r} cannot be read ({reason})."
        ) from None
