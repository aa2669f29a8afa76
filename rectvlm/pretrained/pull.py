"""`rectvlm weights pull`: models from a hub, a mirror or a folder, checked file by file.

What is there already is checked, completed and repaired.
"""

import fnmatch
import logging
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from huggingface_hub import constants

from rectvlm.checkpoint.checkpoint import (
    CARD_FILE,
    PROMPTS_FILE,
    Checkpoint,
    list_model_files,
)
from rectvlm.checkpoint.export import copy_files
from rectvlm.checkpoint.integrity import (
    MANIFEST_FILE,
    ManifestEntry,
    find_faults,
    hash_files,
    read_manifest,
    write_manifest,
)
from rectvlm.checkpoint.run_folder import MODEL_CONFIG_FILE
from rectvlm.config import ModelPart
from rectvlm.files import require_writable_folder
from rectvlm.finding_thresholds import THRESHOLDS_FILE
from rectvlm.pretrained.catalog import (
    BUNDLED_MODELS,
    EXTERNAL_MODELS,
    MODEL_FILE_PATTERNS,
    PUBLISHED_SIZES,
    SIZE_REPOSITORIES,
)
from rectvlm.pretrained.hub_repository import HubRepository, read_repository
from rectvlm.pretrained.model_references import BUNDLED_SCHEME, models_folder, resolve_model
from rectvlm.types import UserError

log = logging.getLogger(__name__)

OPTIONAL_FILES = (THRESHOLDS_FILE, CARD_FILE)
PUBLIC_HUB = "https://huggingface.co"


def pull_model(
    name: str,
    parts: Sequence[ModelPart] = (),
    where: str | None = None,
    repository: str | None = None,
    revision: str | None = None,
    out: Path | None = None,
) -> Path:
    """Bring one model here, or complete and repair it.

    Args:
        name: a size, a bundled model, or a model of others by its short name or hub id.
        parts: parts of a model of rectvlm to bring; by default all.
        where: address of a mirror, or a folder, instead of the hub.
        repository: `OWNER/NAME` instead of the one that the name stands for.
        revision: branch, tag or commit.
        out: folder for the files; by default a model of rectvlm goes to `data/models`, and a model
            of others to the hub's cache, where Transformers finds it.

    Returns:
        The folder with the model.

    Raises:
        UserError: with what is wrong and what to do.
    """
    bundled_name = name.removeprefix(BUNDLED_SCHEME)
    if bundled_name in BUNDLED_MODELS:
        return Path(resolve_model(BUNDLED_SCHEME + bundled_name))
    if out is not None:
        require_writable_folder(out)
    if name in SIZE_REPOSITORIES:
        has_own_source = repository or where or constants.ENDPOINT != PUBLIC_HUB
        if name not in PUBLISHED_SIZES and not has_own_source:
            raise UserError(
                f"No weights of size {name} are published yet: name a repository that has some "
                "with --repo OWNER/NAME, or a folder or mirror with --from."
            )
        folder = out or models_folder() / f"rectvlm-{name}"
        return _pull_checkpoint(
            repository or SIZE_REPOSITORIES[name], where, revision, folder, parts
        )
    if name not in EXTERNAL_MODELS and name.count("/") != 1:
        names = ", ".join([*SIZE_REPOSITORIES, *EXTERNAL_MODELS, *BUNDLED_MODELS])
        raise UserError(
            f"No weights called {name!r}: choose one of {names}, or give a hub id OWNER/NAME."
        )
    if repository is None:
        repository = EXTERNAL_MODELS[name].repository if name in EXTERNAL_MODELS else name
    if _is_ours(repository, where, revision):
        folder = out or models_folder() / repository.replace("/", "--")
        return _pull_checkpoint(repository, where, revision, folder, parts)
    if parts:
        raise UserError(f"{name} has no parts: --part is for models of rectvlm.")
    return _pull_external_model(repository, where, revision, out)


def is_address(where: str | None) -> bool:
    """Whether `--from` or `--to` means a hub or a mirror, and not a folder."""
    return where is None or where.startswith(("http://", "https://"))


def find_model_in(where: str, repository: str) -> Path:
    """The folder of a model that `--from FOLDER` means: the folder itself, or `OWNER/NAME` in it.

    Raises:
        UserError: neither holds a model.
    """
    root = Path(where).expanduser()
    for folder in (root / repository, root):
        if (folder / MODEL_CONFIG_FILE).is_file():
            return folder
    raise UserError(
        f"No model in {root}: expected {repository}/{MODEL_CONFIG_FILE} or {MODEL_CONFIG_FILE} "
        "there; give --from a folder that has one of them, or the address of a mirror (http…)."
    )


def copy_model(source: Path, target: Path, parts: Sequence[ModelPart] = ()) -> Path:
    """Copy a model, or some parts of it, from one folder to another.

    Raises:
        UserError: the source is no model, lacks a part, or is damaged.
    """
    checkpoint = Checkpoint.open(source)
    checkpoint.require_parts(parts)
    former_files = _list_former_files(target)
    entries = copy_files(checkpoint.folder, target, list_model_files(parts or checkpoint.parts))
    optional_files = _existing_files(checkpoint.folder, OPTIONAL_FILES)
    copy_files(checkpoint.folder, target, optional_files)
    _finish_pull(target, entries, former_files, optional_files)
    return target


def _is_ours(repository_name: str, where: str | None, revision: str | None) -> bool:
    """Whether a repository holds a model of rectvlm: no other has embeddings of its prompts."""
    if where is not None and not is_address(where):
        return (find_model_in(where, repository_name) / PROMPTS_FILE).is_file()
    return PROMPTS_FILE in read_repository(repository_name, revision, where).files


def _pull_checkpoint(
    repository_name: str,
    where: str | None,
    revision: str | None,
    folder: Path,
    parts: Sequence[ModelPart],
) -> Path:
    if where is not None and not is_address(where):
        return copy_model(find_model_in(where, repository_name), folder, parts)
    repository = read_repository(repository_name, revision, where)
    for name in (MODEL_CONFIG_FILE, MANIFEST_FILE):
        if name not in repository.files:
            raise UserError(
                f"{repository.address} holds no {name}, so it is no model that `rectvlm weights "
                "push` has published."
            )
    former_files = _list_former_files(folder)
    # Until all files are here, the new manifest keeps the folder from being read.
    repository.download_files([MODEL_CONFIG_FILE, MANIFEST_FILE], folder)
    checkpoint = Checkpoint.open(folder)
    checkpoint.require_parts(parts)
    names = list_model_files(parts or checkpoint.parts)
    _require_files(repository, names)
    optional_files = [name for name in OPTIONAL_FILES if name in repository.files]
    repository.download_files([*names, *optional_files], folder)
    faults = find_faults(folder, names)
    if faults:
        raise UserError(
            f"{repository.address} contradicts its {MANIFEST_FILE}: {'; '.join(faults)}; push it "
            "again."
        )
    entries = read_manifest(folder)
    _finish_pull(folder, {name: entries[name] for name in names}, former_files, optional_files)
    return folder


def _pull_external_model(
    repository_name: str, where: str | None, revision: str | None, out: Path | None
) -> Path:
    folder = out or models_folder() / repository_name.replace("/", "--")
    if where is not None and not is_address(where):
        source = find_model_in(where, repository_name)
        names = _choose_external_files(
            [path.name for path in source.iterdir() if path.is_file()], str(source)
        )
        former_files = _list_former_files(folder)
        copy_files(source, folder, names)
    else:
        repository = read_repository(repository_name, revision, where)
        names = _choose_external_files(repository.files, repository.address)
        if out is None:
            return repository.download_files(names)
        former_files = _list_former_files(folder)
        repository.download_files(names, folder)
    _finish_pull(folder, hash_files(folder, names), former_files)
    return folder


def _choose_external_files(names: Iterable[str], where: str) -> list[str]:
    """The files of a model of others that are needed.

    Raises:
        UserError: there is no configuration, or no weights but pickled ones.
    """
    needed, pickles = [], []
    for name in names:
        if name.endswith((".bin", ".pt", ".pth", ".h5", ".msgpack")):
            pickles.append(name)
        if "/" not in name and _matches_any(name, MODEL_FILE_PATTERNS):
            needed.append(name)
    if MODEL_CONFIG_FILE not in needed:
        raise UserError(
            f"{where} holds no {MODEL_CONFIG_FILE}, so it is no model that Transformers loads."
        )
    if not _matches_any("\n".join(needed), ("*.safetensors*",)):
        raise UserError(
            f"{where} has its weights in {', '.join(sorted(pickles)) or 'no file'} and not in "
            "safetensors, which alone are read: give --revision of one that has them (the hub's "
            "conversions are refs/pr/NUMBER), or another repository with --repo."
        )
    return needed


def _matches_any(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _require_files(repository: HubRepository, names: Iterable[str]) -> None:
    missing = [name for name in names if name not in repository.files]
    if missing:
        raise UserError(f"{repository.address} lacks {', '.join(missing)}: push it again.")


def _existing_files(folder: Path, names: Iterable[str]) -> list[str]:
    return [name for name in names if (folder / name).is_file()]


def _list_former_files(folder: Path) -> Collection[str]:
    """Files that an earlier pull brought to a folder; none without a readable manifest."""
    try:
        return read_manifest(folder).keys()
    except UserError:
        return ()


def _finish_pull(
    folder: Path,
    entries: dict[str, ManifestEntry],
    former_files: Collection[str],
    optional_files: Collection[str] = (),
) -> None:
    """Remove what an earlier pull brought and this one does not, and write the manifest.

    `optional_files` are those of this pull that no manifest lists. The thresholds of another model
    would be taken for this one's.
    """
    outdated = set(former_files) - entries.keys()
    if former_files and (folder / THRESHOLDS_FILE).is_file():
        outdated |= {THRESHOLDS_FILE} - set(optional_files)
    for name in sorted(outdated):
        log.info("%s is removed: it belongs to what was pulled here before", folder / name)
        (folder / name).unlink(missing_ok=True)
    write_manifest(folder, entries)
