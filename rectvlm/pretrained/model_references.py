"""Model references in configurations: a folder, a hub id, or `bundled:NAME`."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from rectvlm.pretrained.catalog import BUNDLED_MODELS
from rectvlm.types import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BUNDLED_SCHEME = "bundled:"
CONFIG_FILE = "config.json"
MODEL_ERRORS = (OSError, ValueError, ImportError, KeyError)
"""Errors that Transformers raises for files that are missing, damaged or of an unknown kind."""
PICKLE_PATTERNS = ("*.bin", "*.bin.index.json", "*.pt", "*.pth")
"""Weights of Transformers and PyTorch that a program could hide in: they are never read."""
DATA_MODELS = Path("data/models")
CHECKOUT = Path(__file__).parents[2]
MODEL_CONFIGS_FOLDER = Path(__file__).parent.parent / "configs" / "models"


def models_folder() -> Path:
    """Folder that models are fetched to, outside the Hub's cache.

    It is `$RECTVLM_MODELS`, or `data/models` in the checkout or where it is there already, or else
    the user's cache: nothing is written into a folder that a command happens to be called from.
    """
    named = os.environ.get("RECTVLM_MODELS")
    if named:
        return Path(named)
    if DATA_MODELS.is_dir() or CHECKOUT.samefile(Path.cwd()):
        return DATA_MODELS
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "rectvlm" / "models"


def _find_prepared_model(name: str, near: Path | None) -> Path | None:
    """Find a bundled model that is prepared: beside a run, unless `$RECTVLM_MODELS` is set."""
    if near is None or os.environ.get("RECTVLM_MODELS"):
        return None
    for folder in near.resolve().parents:
        model = folder / DATA_MODELS / name
        if (model / "config.json").is_file():
            return model
    return None


def resolve_model(reference: str, near: Path | None = None) -> str:
    """Resolve a reference to a folder or a hub id.

    A bundled model is fetched or built on first use.

    Args:
        reference: a folder, a hub id, or `bundled:NAME`.
        near: folder of the checkpoint that names it; `data/models` beside or above it is looked
            at first.

    Raises:
        UserError: the bundled name is unknown, or the path does not exist.
    """
    names = ", ".join(BUNDLED_SCHEME + name for name in BUNDLED_MODELS)
    if reference.startswith(BUNDLED_SCHEME):
        name = reference.removeprefix(BUNDLED_SCHEME)
        if name not in BUNDLED_MODELS:
            raise UserError(f"No bundled model {name!r}: choose one of {names}.")
        prepared = _find_prepared_model(name, near)
        if prepared is not None:
            return str(prepared)
        from rectvlm.pretrained import bundled

        return str(bundled.prepare_bundled_model(name, models_folder()))
    looks_like_path = reference.startswith((".", "/", "~")) or reference.count("/") > 1
    path = Path(reference).expanduser()
    if looks_like_path and not (path / CONFIG_FILE).is_file():
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
    where = _fetch_config_file(reference)
    with explain_model_errors(reference):
        return AutoConfig.from_pretrained(where)


def require_model(reference: str) -> str:
    """Resolve a reference as `resolve_model` does, and see that the model is within reach.

    Of a model on a hub its configuration file is fetched: that finds a wrong name, a missing login
    and a missing network before anything is loaded.

    Raises:
        UserError: the model is not within reach, or Transformers does not know its kind.
    """
    from transformers import AutoConfig

    where = _fetch_config_file(reference)
    with explain_model_errors(reference):
        AutoConfig.from_pretrained(where)
    return where


def _fetch_config_file(reference: str) -> str:
    where = resolve_model(reference)
    if not Path(where).is_dir():
        from huggingface_hub import hf_hub_download

        from rectvlm.checkpoint.hub import explain_hub_errors

        with explain_hub_errors(where):
            hf_hub_download(where, CONFIG_FILE)
    return where


def require_safetensors(reference: str) -> None:
    """Refuse a folder whose weights are pickles alone.

    Transformers is told `use_safetensors` too: it refuses a hub id, where nothing is local yet.

    Raises:
        UserError: the folder holds pickled weights and no safetensors.
    """
    folder = Path(reference)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickles = sorted({path.name for pattern in PICKLE_PATTERNS for path in folder.glob(pattern)})
    if pickles:
        raise UserError(
            f"The model {reference} has its weights in {', '.join(pickles)} and not in "
            "safetensors, which alone are read: fetch it with `rectvlm weights pull`, or convert "
            "it with `save_pretrained` of Transformers."
        )


@contextmanager
def explain_model_errors(reference: str) -> Iterator[None]:
    """Turn what Transformers raises for a damaged or unknown model into one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # tokenizers raises bare `Exception`.
        if not isinstance(error, (*MODEL_ERRORS, SafetensorError)) and type(error) is not Exception:
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
        raise UserError(
            f"The model {reference} cannot be loaded ({reason}): fetch it again, or choose one "
            "that this Transformers knows."
        ) from error
