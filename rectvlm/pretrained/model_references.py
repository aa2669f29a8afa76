"""Model references in configurations: a folder, a hub id, or `bundled:NAME`."""

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
    """Folder of models outside the Hub's cache: `$RECTVLM_MODELS`, or `data/models`."""
    return Path(os.environ.get("RECTVLM_MODELS", "data/models"))


def resolve_model(reference: str) -> str:
    """Resolve a reference to a folder or a hub id.

    A bundled model is fetched or built on first use.

    Raises:
        UserError: the bundled name is unknown, or the path does not exist.
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
    """Read the layers and widths of a text or language model, without its weights.

    For the models that our configurations name they are kept in `rectvlm/configs/models`, so that
    planning needs no network and no license.

    Raises:
        UserError: the model is neither known nor in a folder nor on a hub within reach.
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
