"""Folders to publish: a run's checkpoint without its optimizer state, or a model in memory.

    rectvlm export --checkpoint runs/demo/phase3 --out folder
    model.save_pretrained("folder")

Both write a checkpoint (`rectvlm.checkpoint.checkpoint`) with its model card and manifest. The
folder appears complete or not at all.
"""

import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rectvlm.checkpoint.checkpoint import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FOLDER,
    Checkpoint,
    list_model_files,
)
from rectvlm.checkpoint.integrity import (
    MANIFEST_FILE,
    UNLISTED_FILES,
    ManifestEntry,
    has_manifest,
    hash_file,
    hash_files,
    read_manifest,
    write_manifest,
)
from rectvlm.checkpoint.model_card import write_model_card
from rectvlm.checkpoint.run_folder import MODEL_CONFIG_FILE
from rectvlm.files import (
    fsync_file,
    read_json_object,
    require_writable_folder,
    write_json,
)
from rectvlm.finding_thresholds import THRESHOLDS_FILE, FindingThresholds
from rectvlm.types import UserError

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import Tensor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportOptions:
    """What a published folder says beside the weights."""

    base_model: str | None = None
    """Hub id of the language model, where the configuration names a folder of this machine."""
    license_id: str | None = None
    """License for the card, for example `apache-2.0`."""
    datasets: Sequence[str] = ()
    """Hub ids or names of the training data, for the card."""
    metrics: str | Path | None = None
    """JSON of `rectvlm evaluate`, for the card."""
    thresholds: FindingThresholds | None = None
    """Thresholds of the findings, by default those of the checkpoint or the model."""
    overwrite: bool = False
    """Whether to replace the model in a folder that exists; its other files stay."""


def export_checkpoint(checkpoint: str | Path, folder: str | Path, **options: Any) -> Path:
    """Copy a checkpoint into a folder to publish, with its thresholds and metrics, if it has any.

    The language model is not loaded, so any machine can do it.

    Args:
        checkpoint: a run's phase folder, or one checkpoint.
        folder: the folder to write.
        options: fields of `ExportOptions`.

    Returns:
        The folder.

    Raises:
        UserError: there is no checkpoint, it is damaged, or the folder exists.
    """
    source = Checkpoint.open(checkpoint, "give a run's phase folder")
    options.setdefault("thresholds", source.read_thresholds())
    metrics = source.folder / "evaluation-valid" / "metrics.json"
    if metrics.is_file():
        options.setdefault("metrics", metrics)
    settings = ExportOptions(**options)
    with _stage_folder(Path(folder), settings.overwrite) as (work, target):
        copy_files(source.folder, work, list_model_files(source.parts))
        _complete_folder(replace(source, folder=work), target.name, settings)
    return target


def write_model(
    tensors: Mapping[str, "Tensor"],
    description: Checkpoint,
    lora: "LoraConfig | None",
    options: ExportOptions,
) -> Path:
    """Write a model into a folder, read it again and compare every bit.

    Args:
        tensors: by their names in the model.
        description: the folder to write, and what `config.json` says.
        lora: settings of the adapter; needed with the generator.
        options: of the export.

    Returns:
        The folder.

    Raises:
        UserError: the folder exists, or the disk does not hold what was written.
    """
    from rectvlm.checkpoint.strict_load import find_differing_tensors

    with _stage_folder(description.folder, options.overwrite) as (work, target):
        written = replace(description, folder=work)
        written.write_files(tensors, lora)
        _complete_folder(written, target.name, options)
        differing = find_differing_tensors(Checkpoint.open(work).read_tensors(), tensors)
        if differing:
            raise UserError(
                f"{work} does not hold what was written to it ({', '.join(differing[:8])}): check "
                "the disk."
            )
    return target


def copy_files(source: Path, target: Path, names: Iterable[str]) -> dict[str, ManifestEntry]:
    """Copy files of a checkpoint, and compare the copies with its manifest or with the files.

    Returns:
        Manifest entries of the copies.

    Raises:
        UserError: a file is missing or damaged.
    """
    listed = read_manifest(source) if has_manifest(source) else None
    copies: dict[str, ManifestEntry] = {}
    for name in names:
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copy(source / name, path)
        except FileNotFoundError:
            raise UserError(f"{source / name} is missing: use another checkpoint.") from None
        fsync_file(path)
        copies[name] = hash_file(path)
        expected = hash_file(source / name)
        if listed is not None and name not in UNLISTED_FILES:
            expected = listed.get(name, expected)
        if copies[name] != expected:
            raise UserError(
                f"{source} is damaged: {name} has another checksum than when it was written; use "
                "another checkpoint."
            )
    return copies


def _complete_folder(checkpoint: Checkpoint, name: str, options: ExportOptions) -> None:
    """Add to a folder with weights what the options say, the model card and the manifest."""
    if "generator" in checkpoint.parts:
        if options.base_model is not None:
            checkpoint = _rename_base_model(checkpoint, options.base_model)
        base_model = checkpoint.config.generator.model
        if Path(base_model).expanduser().is_dir():
            log.warning(
                "the language model is named as %s, a folder of this machine; base_model gives it "
                "another name",
                base_model,
            )
    if options.thresholds is not None:
        checkpoint.write_thresholds(options.thresholds)
    metrics = None if options.metrics is None else Path(options.metrics)
    write_model_card(checkpoint, name, options.license_id, options.datasets, metrics)
    files = list_model_files(checkpoint.parts)
    write_manifest(checkpoint.folder, hash_files(checkpoint.folder, files))


def _rename_base_model(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """Rename the language model in `config.json` and in the adapter's settings."""
    generator = checkpoint.config.generator.model_copy(update={"model": name})
    config = checkpoint.config.model_copy(update={"generator": generator})
    renamed = replace(checkpoint, config=config)
    renamed.write_config()
    path = checkpoint.folder / ADAPTER_CONFIG_FILE
    adapter = read_json_object(path, "export the model again")
    write_json(path, adapter | {"base_model_name_or_path": name})
    return renamed


@contextmanager
def _stage_folder(folder: Path, overwrite: bool) -> Iterator[tuple[Path, Path]]:
    """Yield an empty folder beside the target and the target, which it replaces at the end."""
    target = folder.expanduser().resolve()  # "." has no name, and a link is not to be replaced
    is_taken = target.exists() and (not target.is_dir() or any(target.iterdir()))
    if is_taken and overwrite and not _holds_model(target):
        raise UserError(
            f"{target} holds no model, and --overwrite replaces nothing else: give a new folder, "
            "or that of a model."
        )
    if is_taken and not overwrite:
        raise UserError(
            f"{target} exists and is not empty: give a new folder, or replace the model in it with "
            "--overwrite."
        )
    require_writable_folder(target.parent)
    work = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        yield work, target
        for path in work.rglob("*"):
            if path.is_file():
                fsync_file(path)
        if is_taken:
            _replace_model_files(work, target)
        else:
            work.replace(target)  # an empty folder gives way
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _holds_model(folder: Path) -> bool:
    """Whether a folder holds files of a model, such as those that a killed export left."""
    names = (MODEL_CONFIG_FILE, MANIFEST_FILE, ADAPTER_FOLDER)
    return any((folder / name).exists() for name in names) or any(folder.glob("*.safetensors"))


def _replace_model_files(work: Path, folder: Path) -> None:
    """Put the files of one model in the place of another's.

    Without `config.json` a folder is no model, so this file goes first and comes last: a kill
    leaves no mixture that loads.
    """
    (folder / MODEL_CONFIG_FILE).unlink(missing_ok=True)
    stale_files = [*folder.glob("*.safetensors"), folder / THRESHOLDS_FILE, folder / MANIFEST_FILE]
    for path in stale_files:
        path.unlink(missing_ok=True)
    shutil.rmtree(folder / ADAPTER_FOLDER, ignore_errors=True)
    for path in sorted(work.iterdir(), key=lambda path: path.name == MODEL_CONFIG_FILE):
        path.replace(folder / path.name)
