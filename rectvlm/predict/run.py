"""Prediction on one CT or on a folder of CTs: each gets a folder with its results.

Command: `rectvlm predict FILE_OR_FOLDER --checkpoint runs/demo/phase3 --out predictions`
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rectvlm.checkpoint import Checkpoint
from rectvlm.evaluate.stored_thresholds import read_thresholds
from rectvlm.files import atomic_file
from rectvlm.models import RectVLM
from rectvlm.predict.case import LoadedModel, predict_case
from rectvlm.predict.case_folder import (
    PAGE_FILE,
    is_case_folder,
    refuse_to_replace,
    write_case_folder,
)
from rectvlm.types import UserError

log = logging.getLogger(__name__)

NIFTI_SUFFIXES = (".nii.gz", ".nii")
FAILED_FILE = "failed.jsonl"


@dataclass(frozen=True)
class FailedFile:
    """One line of `failed.jsonl`."""

    file: str
    reason: str


def predict_cases(
    source: str | Path, checkpoint: str | Path, out: str | Path, device: str | None = None
) -> list[Path]:
    """Predict on one CT or on every CT below a folder.

    Each case gets a folder in `out`, complete or not at all, with `findings.json` and `index.html`,
    and with `lesions.nii.gz` and `report.txt` if the model has these parts. In a folder of CTs, a
    file that cannot be used is logged and listed with its reason in `out/failed.jsonl`.

    Args:
        source: a .nii or .nii.gz, or a folder that is searched through.
        checkpoint: a run's phase folder, a checkpoint or an exported model.
        out: folder of the results.
        device: device of the model, by default the GPU if there is one.

    Returns:
        The folders of the cases.

    Raises:
        UserError: there is nothing to read or no such checkpoint, a single file cannot be used, no
            file of a folder can be used, or a case's folder exists and holds something else.
    """
    source, out = Path(source), Path(out)
    files = find_volumes(source, leave_out=out)
    names = case_names(files)
    for name in names:
        refuse_to_replace(out / name)
    opened = Checkpoint.open(checkpoint)
    model = RectVLM.from_checkpoint(opened, device)
    loaded = LoadedModel(model, opened, read_thresholds(opened.folder))

    case_folders: list[Path] = []
    failed: list[FailedFile] = []
    out.mkdir(parents=True, exist_ok=True)
    for name, file in zip(names, files, strict=True):
        try:
            case = predict_case(loaded, name, file)
        except UserError as error:
            if source.is_file():
                raise
            log.error("%s", error)
            failed.append(FailedFile(str(file), str(error)))
            _write_failed(out, failed)
            continue
        case_folders.append(write_case_folder(loaded, case, out))
        number = len(case_folders) + len(failed)
        log.info("%d of %d: %s", number, len(files), case_folders[-1] / PAGE_FILE)

    if not failed:
        (out / FAILED_FILE).unlink(missing_ok=True)
    if not case_folders:
        raise UserError(
            f"None of the {len(files)} files in {source} is a chest CT in HU: see "
            f"{out / FAILED_FILE} for why."
        )
    return case_folders


def find_volumes(source: Path, leave_out: Path) -> list[Path]:
    """Find the NIfTI files that a path means, sorted.

    Args:
        source: a file, or a folder that is searched through.
        leave_out: folder of earlier results, whose files are left out; where it is the source
            itself, those in the folder of a case are.

    Raises:
        UserError: there is no such path, or a folder without a NIfTI file.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UserError(
            f"{source} does not exist: give a CT (.nii or .nii.gz) or a folder of them."
        )
    results = leave_out.resolve()
    is_among_results = results == source.resolve()
    files = []
    for path in sorted(source.rglob("*")):
        if not path.name.lower().endswith(NIFTI_SUFFIXES) or not path.is_file():
            continue
        if is_among_results:
            is_result = is_case_folder(path.parent)
        else:
            is_result = results in path.resolve().parents
        if not is_result:
            files.append(path)
    if not files:
        raise UserError(
            f"No .nii or .nii.gz in {source}: convert DICOM series to NIfTI first, for example "
            "with dcm2niix."
        )
    return files


def case_names(files: Sequence[Path]) -> list[str]:
    """Name each case after its file, and after the file's folders too where names are equal."""
    short_names = [_strip_nifti_suffix(file) for file in files]
    counts = Counter(short_names)
    base = Path(os.path.commonpath([file.parent for file in files]))
    used: Counter[str] = Counter()
    names = []
    for file, name in zip(files, short_names, strict=True):
        if counts[name] > 1:
            name = "_".join([*file.parent.relative_to(base).parts, name])
        used[name] += 1
        names.append(name if used[name] == 1 else f"{name}-{used[name]}")
    return names


def _strip_nifti_suffix(file: Path) -> str:
    for suffix in NIFTI_SUFFIXES:
        if file.name.lower().endswith(suffix):
            return file.name[: -len(suffix)] or file.parent.name
    return file.name


def _write_failed(out: Path, failed: Sequence[FailedFile]) -> None:
    lines = [json.dumps(asdict(failure), ensure_ascii=False) + "\n" for failure in failed]
    with atomic_file(out / FAILED_FILE) as file:
        file.write("".join(lines).encode())
