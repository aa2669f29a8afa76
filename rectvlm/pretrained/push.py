"""`rectvlm weights push`: a checkpoint, or parts of it, to a repository in one commit."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from rectvlm.checkpoint.checkpoint import (
    CARD_FILE,
    Checkpoint,
    list_model_files,
    part_file,
)
from rectvlm.checkpoint.hub import explain_hub_errors
from rectvlm.checkpoint.integrity import (
    MANIFEST_FILE,
    CheckpointManifest,
    find_faults,
    has_manifest,
    hash_files,
    read_manifest,
    write_manifest,
)
from rectvlm.config import MODEL_PARTS, ModelPart
from rectvlm.finding_thresholds import THRESHOLDS_FILE
from rectvlm.pretrained.hub_repository import HubRepository, read_repository
from rectvlm.pretrained.pull import copy_model, is_address
from rectvlm.types import UserError


def push_model(
    folder: Path,
    repository: str,
    parts: Sequence[ModelPart] = (),
    where: str | None = None,
    public: bool = False,
    message: str | None = None,
) -> str:
    """Publish a checkpoint without its optimizer state.

    Args:
        folder: of an exported model or a checkpoint.
        repository: `OWNER/NAME`; made if it is not there.
        parts: parts to publish; by default all.
        where: address of another hub, or a folder that gets `OWNER/NAME`.
        public: whether to make the repository public; by default it is private.
        message: message of the commit.

    Returns:
        Where it went.

    Raises:
        UserError: the folder is damaged, the name is no `OWNER/NAME`, the repository is public or
            holds other parts, or there is no access.
    """
    with explain_hub_errors(repository):  # a path would lead out of a folder, too
        validate_repo_id(repository)
    checkpoint = Checkpoint.open(folder, "export a model with `rectvlm export` first")
    checkpoint.require_parts(parts)
    parts = parts or checkpoint.parts
    _require_intact(checkpoint, parts)
    if where is not None and not is_address(where):
        target = Path(where).expanduser() / repository
        if has_manifest(target):
            _refuse_loss(read_manifest(target), parts, str(target))
        return str(copy_model(checkpoint.folder, target, parts))
    default_message = "Weights" if parts == checkpoint.parts else f"Weights: {', '.join(parts)}"
    endpoint = (where or constants.ENDPOINT).rstrip("/")
    return _push_to_hub(checkpoint, parts, repository, endpoint, public, message or default_message)


def _require_intact(checkpoint: Checkpoint, parts: Sequence[ModelPart]) -> None:
    """Check a checkpoint against its manifest, or write one where there is none.

    Raises:
        UserError: a file differs.
    """
    folder = checkpoint.folder
    if not has_manifest(folder):
        write_manifest(folder, hash_files(folder, list_model_files(checkpoint.parts)))
    faults = find_faults(folder, list_model_files(parts))
    if faults:
        raise UserError(f"{folder} does not verify, so it is not pushed: {'; '.join(faults)}.")


def _refuse_loss(remote_files: Iterable[str], parts: Sequence[ModelPart], where: str) -> None:
    """Stop a push that would remove parts that a repository holds.

    Raises:
        UserError: naming them.
    """
    names = set(remote_files)
    lost = [part for part in MODEL_PARTS if part_file(part) in names and part not in parts]
    if lost:
        raise UserError(
            f"{where} holds {', '.join(lost)}, which this push would remove: push the whole model, "
            "or the part to a repository of its own."
        )


def _push_to_hub(
    checkpoint: Checkpoint,
    parts: Sequence[ModelPart],
    repository_name: str,
    endpoint: str,
    public: bool,
    message: str,
) -> str:
    remote = _prepare_repository(repository_name, endpoint, public)
    _refuse_loss(remote.files, parts, remote.address)
    entries = read_manifest(checkpoint.folder)
    manifest = CheckpointManifest({name: entries[name] for name in list_model_files(parts)})
    manifest_json = json.dumps(asdict(manifest), indent=2) + "\n"
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(MANIFEST_FILE, manifest_json.encode())
    ]
    for name in (*manifest.files, CARD_FILE, THRESHOLDS_FILE):
        path = checkpoint.folder / name
        if path.is_file():
            operations.append(CommitOperationAdd(name, path))
    for name in remote.files:
        is_stale_part = name.endswith(".safetensors") and name not in manifest.files
        is_stale_file = name == THRESHOLDS_FILE and not (checkpoint.folder / name).is_file()
        if is_stale_part or is_stale_file:
            operations.append(CommitOperationDelete(name))
    api = HfApi(endpoint=endpoint, library_name="rectvlm")
    with explain_hub_errors(repository_name, None, endpoint):
        commit = api.create_commit(repository_name, operations, commit_message=message)
    _check_arrival(read_repository(repository_name, commit.oid, endpoint), manifest)
    return f"{remote.address}/tree/{commit.oid}"


def _prepare_repository(name: str, endpoint: str, public: bool) -> HubRepository:
    """Read a repository, which is made where there is none.

    Raises:
        UserError: it is public and `public` is not given, or there is no access.
    """
    api = HfApi(endpoint=endpoint, library_name="rectvlm")
    with explain_hub_errors(name, None, endpoint):
        try:
            api.model_info(name)
        except RepositoryNotFoundError:
            api.create_repo(name, private=not public, exist_ok=True)
    repository = read_repository(name, None, endpoint)
    if not repository.is_private and not public:
        raise UserError(
            f"{repository.address} is public: say --public to push there, or push to another "
            "repository."
        )
    return repository


def _check_arrival(remote: HubRepository, manifest: CheckpointManifest) -> None:
    """Compare what the hub says that it holds with what was sent."""
    for name, entry in manifest.files.items():
        file = remote.files.get(name)
        is_same = file is not None and file.size == entry.size
        if file is None or not is_same or file.sha256 not in (None, entry.sha256):
            raise UserError(f"{remote.address} did not get {name} as it was sent: push again.")
