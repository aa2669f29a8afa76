"""From an exported folder to a repository: whole or by part, in one commit, private unless told otherwise."""

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from rectvlm.checkpoint import manifest
from rectvlm.checkpoint.manifest import CheckpointManifest
from rectvlm.pretrained import transfer
from rectvlm.pretrained.catalog import WEIGHTS_FILE
from rectvlm.pretrained.pull import pull_model, whole_file
from rectvlm.pretrained.sources import Folder, Hub, RemoteFile, explain_hub_errors
from rectvlm.types import UserError

log = logging.getLogger(__name__)


def seal(folder: Path) -> CheckpointManifest:
    """The manifest of an exported folder that is fit to be given away, written beside the files when there is none.

    Raises:
        UserError: no model of rectvlm, pickles, a damaged file, or files that differ from the manifest that is there.
    """
    if not (folder / "config.json").is_file():
        raise UserError(
            f"No exported model in {folder}: expected config.json and {WEIGHTS_FILE} there."
        )
    if (folder / manifest.MANIFEST_FILE).is_file():
        found = manifest.find_manifest_faults(folder)
        if found:
            raise UserError(f"{folder} does not verify, so it is not pushed: {'; '.join(found)}.")
        return manifest.read_manifest(folder)
    made = manifest.build_manifest(folder, tensors=True)
    pickles = [
        name
        for name in made.files
        if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"))
    ]
    if pickles:
        raise UserError(
            f"{folder} holds {', '.join(pickles)}, which are pickles: only safetensors are pushed."
        )
    if not made.parts:
        raise UserError(
            f"{folder} holds no weights of rectvlm: export a model with `save_pretrained` first."
        )
    manifest.write_manifest(folder, made)
    return made


def push(
    folder: Path,
    repository: str,
    parts: Sequence[str] = (),
    where: str | None = None,
    public: bool = False,
    message: str | None = None,
) -> str:
    """Publish an exported folder.

    Args:
        folder: as `save_pretrained` writes it.
        repository: `OWNER/NAME`; made if it is not there.
        parts: these alone; by default all.
        where: the address of another hub, or a folder that gets `OWNER/NAME`.
        public: make the repository public; by default it is private.
        message: of the commit.

    Returns:
        Where it went.

    Raises:
        UserError: the folder does not verify, the repository is public or holds other parts, or no access.
    """
    listed = seal(folder)
    wrong = sorted(set(parts) - set(listed.parts))
    if wrong:
        raise UserError(f"{folder} holds no {', '.join(wrong)}: it has {', '.join(listed.parts)}.")
    if parts and set(parts) != set(listed.parts):
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as work:
            pull_model(Folder(folder), Path(work), parts)
            return push(
                Path(work), repository, (), where, public, message or f"Weights: {', '.join(parts)}"
            )
    if where is not None and not where.startswith(("http://", "https://")):
        return str(_push_to_folder(folder, Path(where).expanduser() / repository, listed))
    return _push_to_hub(
        folder, Hub(repository, endpoint=where), listed, public, message or "Weights"
    )


def _push_to_folder(folder: Path, target: Path, listed: CheckpointManifest) -> Path:
    _refuse_loss(target / manifest.MANIFEST_FILE, listed, str(target))
    source = Folder(folder)
    jobs = [whole_file(name, file, target / name) for name, file in source.files().items()]
    transfer.run(jobs, source, target)
    for fault in manifest.find_manifest_faults(target):
        if fault.startswith("extra: ") and fault.endswith(
            (".safetensors", ".safetensors.index.json")
        ):
            (target / fault.removeprefix("extra: ")).unlink()
    return target


def _refuse_loss(path: Path, listed: CheckpointManifest, where: str) -> None:
    if path.is_file():
        _check_loss(manifest.parse_manifest(path.read_bytes(), str(path)), listed, where)


def _check_loss(there: CheckpointManifest, listed: CheckpointManifest, where: str) -> None:
    lost = sorted(set(there.parts) - set(listed.parts))
    if lost:
        raise UserError(
            f"{where} holds {', '.join(lost)}, which this push would remove: push the whole model, or the part to a "
            "repository of its own."
        )


def _push_to_hub(
    folder: Path, hub: Hub, listed: CheckpointManifest, public: bool, message: str
) -> str:
    there = _prepare(hub, listed, public)
    names = [
        *listed.files,
        manifest.MANIFEST_FILE,
        *(name for name in ("README.md",) if (folder / name).is_file()),
    ]
    additions = [CommitOperationAdd(name, folder / name) for name in names]
    stale = [name for name in there if name.endswith((".safetensors", ".safetensors.index.json"))]
    removals = [CommitOperationDelete(name) for name in stale if name not in listed.files]
    with explain_hub_errors(hub):
        try:
            commit = hub.api.create_commit(
                hub.repository, [*additions, *removals], commit_message=message
            )
        except RuntimeError as error:  # an upload failed in a thread of the library
            raise error.__cause__ or error from None
        except ValueError as error:
            if isinstance(error, HfHubHTTPError):
                raise
            raise UserError(f"{hub.name} does not take the push ({_line(error)}).") from None
    _check_arrival(Hub(hub.repository, commit.oid, hub.endpoint), listed)
    return f"{hub.name}/tree/{commit.oid}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _prepare(hub: Hub, listed: CheckpointManifest, public: bool) -> dict[str, RemoteFile]:
    """Make the repository where there is none; the files that it has."""
    with explain_hub_errors(hub):
        try:
            found = hub.api.model_info(hub.repository)
        except RepositoryNotFoundError:
            hub.api.create_repo(hub.repository, private=not public, exist_ok=True)
            return {}
    if not found.private and not public:
        raise UserError(
            f"{hub.name} is public: say --public to push there, or push to another repository."
        )
    there = hub.files()
    if manifest.MANIFEST_FILE in there:
        data = transfer.small(
            whole_file(
                manifest.MANIFEST_FILE, there[manifest.MANIFEST_FILE], Path(manifest.MANIFEST_FILE)
            ),
            hub,
        )
        _check_loss(
            manifest.parse_manifest(data, f"{manifest.MANIFEST_FILE} of {hub.name}"),
            listed,
            hub.name,
        )
    return there


def _check_arrival(hub: Hub, listed: CheckpointManifest) -> None:
    """What the hub says that it holds, against what was sent."""
    there = hub.files()
    for name, entry in listed.files.items():
        found = there.get(name)
        if (
            found is None
            or found.size != entry.size
            or (found.sha256 and found.sha256 != entry.sha256)
        ):
            raise UserError(f"{hub.name} did not get {name} as it was sent: push again.")
