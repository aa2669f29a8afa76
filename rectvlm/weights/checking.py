"""What is here, and whether it is whole: `rectvlm weights verify` and `rectvlm weights list`."""

from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CachedRepoInfo, constants, scan_cache_dir
from huggingface_hub.errors import CacheNotFound

from rectvlm.types import UserError
from rectvlm.weights import manifest
from rectvlm.weights.catalog import BUNDLED, EXTERNAL, PUBLISHED, SIZES
from rectvlm.weights.references import models_folder
from rectvlm.weights.sources import open_source


def faults(target: str) -> tuple[Path, list[str]]:
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
        return folder, manifest.faults(folder)
    if target in BUNDLED:
        raise UserError(
            f"{target} is checked when it is prepared and has no {manifest.FILE}: to prepare it again, remove "
            f"{models_folder() / target} and pull it."
        )
    if target in SIZES:
        folder = models_folder() / f"rectvlm-{target}"
        if folder.is_dir():
            return folder, manifest.faults(folder)
    repository = EXTERNAL[target].repository if target in EXTERNAL else target
    copy = models_folder() / repository.replace("/", "--")
    if copy.is_dir():
        return copy, manifest.faults(copy)
    cached = _cached(repository)
    if cached is None:
        raise UserError(f"Nothing called {target!r} is here: give a folder, or `rectvlm weights pull {target}` first.")
    return cached.repo_path, _cache_faults(cached)


def _cached(repository: str) -> CachedRepoInfo | None:
    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return None
    return next((repo for repo in repositories if repo.repo_id == repository and repo.repo_type == "model"), None)


def _cache_faults(cached: CachedRepoInfo) -> list[str]:
    """In the hub's cache a content's name is its digest: SHA-256 of large files, git's SHA-1 of small ones."""
    found = set()
    for revision in cached.revisions:
        for file in revision.files:
            name, blob = file.file_path.relative_to(revision.snapshot_path).as_posix(), Path(file.blob_path)
            actual = manifest.digest(blob) if len(blob.name) == 64 else manifest.git_digest(blob)
            if actual != blob.name:
                found.add(f"differs: {name} (its digest is {actual}, expected {blob.name})")
        found |= {f"missing: {name}" for name in manifest.missing_shards(revision.snapshot_path)}
    return sorted(found)


class Row(NamedTuple):
    """One line of the list."""

    name: str
    kind: str
    repository: str
    state: str


def rows(where: str | None = None) -> list[Row]:
    """Every name, and what can be had of it now.

    Args:
        where: a mirror or a folder that is asked; without one only this machine is looked at.
    """
    listed = []
    for name, repository in SIZES.items():
        here = models_folder() / f"rectvlm-{name}"
        state = f"here: {here}" if (here / manifest.FILE).is_file() else "published" if name in PUBLISHED else ""
        listed.append(Row(name, "rectvlm", repository, _state(state or "not published", where, repository)))
    for name, model in EXTERNAL.items():
        copy = models_folder() / model.repository.replace("/", "--")
        cached = _cached(model.repository)
        terms = "not here; gated: accept its terms and log in first" if model.gated else "not here; open to all"
        state = f"here: {copy}" if copy.is_dir() else f"here: {cached.repo_path}" if cached else terms
        kind = f"{model.role}, {model.gigabytes:g} GB"
        listed.append(Row(name, kind, model.repository, _state(state, where, model.repository)))
    for name, role in BUNDLED.items():
        folder = models_folder() / name
        built = "built on first use" if name.startswith("tiny") else "fetched from the package index on first use"
        state = f"here: {folder}" if (folder / "config.json").is_file() else built
        listed.append(Row(name, role, "", state))
    return listed


def _state(state: str, where: str | None, repository: str) -> str:
    if where is None or state.startswith("here"):
        return state
    try:
        files = open_source(where, repository).files()
    except UserError as error:
        return f"not at {where} ({error})" if where.startswith("http") else f"not in {where}"
    return f"at {where}: {sum(file.size for file in files.values()) / 1e6:.1f} MB"
