"""Weights of others in safetensors, and the files beside them: found here, or fetched."""

import json
from pathlib import Path

from rectvlm.pretrained.model_references import BUNDLED_SCHEME, resolve_model
from rectvlm.types import UserError

WEIGHT_FILES = ("model.safetensors", "open_clip_model.safetensors")
INDEX_FILE = "model.safetensors.index.json"
SETTINGS_FILES = ("config.json", "preprocessor_config.json", "open_clip_config.json")
"""Files beside weights that say more of a model."""
MAX_LISTED_NAMES = 8


def find_weight_files(reference: str) -> list[Path]:
    """Find safetensors files here, or fetch them from the Hub.

    Args:
        reference: a file, a folder with `model.safetensors` or its shards, or a hub id.

    Raises:
        UserError: there is no such file, folder or repository, or it has no safetensors.
    """
    if reference.startswith(BUNDLED_SCHEME):
        reference = resolve_model(reference)
    path = Path(reference).expanduser()
    if path.is_file():
        return [path]
    looks_like_path = reference.startswith((".", "/", "~")) or reference.count("/") != 1
    if path.is_dir():
        return _list_weight_files(path)
    if looks_like_path or path.suffix == ".safetensors":
        raise UserError(
            f"No weights at {path} for encoder.init: give a safetensors file, a folder with "
            f"{WEIGHT_FILES[0]}, or a hub id."
        )
    return _list_weight_files(_fetch_from_hub(reference))


def _fetch_from_hub(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    from rectvlm.checkpoint.hub import explain_hub_errors

    files = [*WEIGHT_FILES, INDEX_FILE, "model-*-of-*.safetensors", *SETTINGS_FILES]
    with explain_hub_errors(repository):
        folder = snapshot_download(repository, allow_patterns=files, library_name="rectvlm")
    return Path(folder)


def _list_weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if index.is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
        return [folder / name for name in sorted(names)]
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return [folder / name]
    present = ", ".join(sorted(path.name for path in folder.iterdir())[:MAX_LISTED_NAMES])
    raise UserError(
        f"{folder} has no weights in safetensors: expected {' or '.join(WEIGHT_FILES)}, found "
        f"{present or 'nothing'}; a pickle is never read, so save the model as safetensors."
    )
