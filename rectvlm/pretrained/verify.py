"""`rectvlm weights verify` and `rectvlm weights list`: the models here, and their integrity."""

import json
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CachedRepoInfo, constants, scan_cache_dir
from huggingface_hub.errors import CacheNotFound

from rectvlm.checkpoint.checkpoint import PROMPTS_FILE, list_model_files, part_file
from rectvlm.checkpoint.integrity import MANIFEST_FILE, find_faults, has_manifest
from rectvlm.checkpoint.run_folder import list_checkpoints
from rectvlm.config import MODEL_PARTS
from rectvlm.files import file_sha256
from rectvlm.pretrained.catalog import (
    BUNDLED_MODELS,
    EXTERNAL_MODELS,
    PUBLISHED_SIZES,
    SIZE_REPOSITORIES,
)
from rectvlm.pretrained.hub_repository import git_sha1, read_repository
from rectvlm.pretrained.model_references import models_folder
from rectvlm.pretrained.pull import find_model_in, is_address
from rectvlm.types import UserError

SHA256_DIGITS = 64


def find_model_faults(target: str) -> tuple[Path, list[str]]:
    """Recompute every checksum of a model.

    Args:
        target: a folder, where a run's phase folder means its newest checkpoint, or a name whose
            model was pulled to where `pull_model` puts it.

    Returns:
        The folder, and one phrase for each file that differs or is missing.

    Raises:
        UserError: there is no such model, or nothing that says what should be there.
    """
    folder = Path(target).expanduser()
    if folder.is_dir():
        checkpoints = [] if has_manifest(folder) else list_checkpoints(folder)
        if checkpoints:  # a run's phase folder means its newest
            folder = checkpoints[-1]
        return folder, _find_folder_faults(folder)
    if target in BUNDLED_MODELS:
        raise UserError(
            f"{target} is checked when it is prepared and has no {MANIFEST_FILE}: to prepare it "
            f"again, remove {models_folder() / target} and pull it."
        )
    folder = models_folder() / f"rectvlm-{target}"
    if target in SIZE_REPOSITORIES and folder.is_dir():
        return folder, _find_folder_faults(folder)
    repository = EXTERNAL_MODELS[target].repository if target in EXTERNAL_MODELS else target
    folder = models_folder() / repository.replace("/", "--")
    if folder.is_dir():
        return folder, _find_folder_faults(folder)
    cached = _find_cached_repository(repository)
    if cached is None:
        raise UserError(
            f"Nothing called {target!r} is here: give a folder, or `rectvlm weights pull {target}` "
            "first."
        )
    return cached.repo_path, _find_cache_faults(cached)


def _find_folder_faults(folder: Path) -> list[str]:
    faults = find_faults(folder)
    known_missing = {fault for fault in faults if fault.endswith(" is missing")}
    missing = {f"{name} is missing" for name in _find_missing_files(folder)}
    return faults + sorted(missing - known_missing)


def _find_missing_files(folder: Path) -> list[str]:
    """Files without which others of the folder do not load, whatever a manifest lists."""
    missing = set(_find_missing_shards(folder))
    for part in MODEL_PARTS:
        if (folder / PROMPTS_FILE).is_file() and (folder / part_file(part)).is_file():
            missing.update(
                name for name in list_model_files([part]) if not (folder / name).is_file()
            )
    return sorted(missing)


def _find_cached_repository(repository: str) -> CachedRepoInfo | None:
    try:
        cached_repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return None
    for cached in cached_repositories:
        if cached.repo_id == repository and cached.repo_type == "model":
            return cached
    return None


def _find_cache_faults(cached: CachedRepoInfo) -> list[str]:
    """Compare contents with their names in the cache: SHA-256 if large, git's SHA-1 if small."""
    faults = set()
    for revision in cached.revisions:
        for file in revision.files:
            name = file.file_path.relative_to(revision.snapshot_path).as_posix()
            blob = Path(file.blob_path)
            digest = file_sha256(blob) if len(blob.name) == SHA256_DIGITS else git_sha1(blob)
            if digest != blob.name:
                faults.add(f"{name} has another checksum than the hub stated")
        faults.update(f"{name} is missing" for name in _find_missing_files(revision.snapshot_path))
    return sorted(faults)


def _find_missing_shards(folder: Path) -> list[str]:
    """Files that a safetensors index of the folder names and that are not there."""
    named: set[str] = set()
    for path in folder.glob("*.safetensors.index.json"):
        named.update(json.loads(path.read_text())["weight_map"].values())
    return sorted(name for name in named if not (folder / name).is_file())


@dataclass(frozen=True)
class AvailableModel:
    """One row of `rectvlm weights list`."""

    name: str
    kind: str
    repository: str
    availability: str


def list_available_models(where: str | None = None) -> list[AvailableModel]:
    """Every name, and what can be had of it now.

    Args:
        where: a mirror or a folder to ask; without one only this machine is looked at.
    """
    models = []
    for name, repository in SIZE_REPOSITORIES.items():
        folder = models_folder() / f"rectvlm-{name}"
        state = "published" if name in PUBLISHED_SIZES else "not published"
        if has_manifest(folder):
            state = f"here: {folder}"
        models.append(
            AvailableModel(
                name, "rectvlm", repository, _describe_availability(state, where, repository)
            )
        )
    for name, external in EXTERNAL_MODELS.items():
        state = "not here; open to all"
        if external.is_gated:
            state = "not here; gated: accept its terms and log in first"
        folder = models_folder() / external.repository.replace("/", "--")
        cached = _find_cached_repository(external.repository)
        if folder.is_dir():
            state = f"here: {folder}"
        elif cached is not None:
            state = f"here: {cached.repo_path}"
        kind = f"{external.role}, {external.gigabytes:g} GB"
        state = _describe_availability(state, where, external.repository)
        models.append(AvailableModel(name, kind, external.repository, state))
    for name, role in BUNDLED_MODELS.items():
        folder = models_folder() / name
        state = "fetched from the package index on first use"
        if name.startswith("tiny"):
            state = "built on first use"
        if (folder / "config.json").is_file():
            state = f"here: {folder}"
        models.append(AvailableModel(name, role, "", state))
    return models


def _describe_availability(state: str, where: str | None, repository: str) -> str:
    """The state of a model, or, if it is not here, what a mirror or a folder has of it."""
    if where is None or state.startswith("here"):
        return state
    if not is_address(where):
        try:
            folder = find_model_in(where, repository)
        except UserError:
            return f"not in {where}"
        sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
        return f"at {where}: {sum(sizes) / 1e6:.1f} MB"
    try:
        files = read_repository(repository, None, where).files
    except UserError as error:
        return f"not at {where} ({error})"
    return f"at {where}: {sum(file.size for file in files.values()) / 1e6:.1f} MB"
