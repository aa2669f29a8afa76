"""The CTs that a path means, what else lies beside them, and the names of their results."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rectvlm.file_search import FolderContent, SkippedPath, list_files
from rectvlm.predict.case_folder import CASE_FILES, SUMMARY_FILE
from rectvlm.types import UserError

NIFTI_SUFFIXES = (".nii.gz", ".nii")
FAILED_FILE = "failed.jsonl"
RUN_SUMMARY_FILE = "predict-summary.json"
MAX_NAME_BYTES = 200
"""Longest name of a case, bytes: file systems take 255, and its folder has a longer one at first.
"""
_DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
_DICOM_MAGIC = b"DICM"
_NUMBERED_NAME = re.compile(r"[^.]*|[\d.]+|.*\.\d+")
"""Names without a suffix of letters, as scanners give them to DICOM files."""


def find_volumes(source: Path, out: Path) -> FolderContent:
    """Find the NIfTI files that a path means, sorted, and list all that is not used.

    Args:
        source: a file, or a folder that is searched through. Links are followed; a file that is
            reached twice is used once.
        out: folder of the results, which are no inputs.

    Raises:
        UserError: there is no such path, or a folder without a NIfTI file.
    """
    if source.is_file():
        return FolderContent([source])
    if not source.is_dir():
        fault = "does not exist"
        if source.exists():
            fault = "is neither a file nor a folder"
        elif source.is_symlink():
            fault = f"is a broken link to {os.readlink(source)}"
        raise UserError(f"{source} {fault}: give a CT (.nii or .nii.gz) or a folder of them.")
    content = list_files(source)
    files, skipped = _drop_results(content.files, source, out)
    files, other_files = _split_by_suffix(files)
    files, repeated = _drop_repeated_files(files)
    dicom_folders, others = _describe_other_files(other_files)
    skipped = [*dicom_folders, *repeated, *others, *content.skipped, *skipped]
    skipped.sort(key=lambda path: path.reason.startswith("is hidden"))
    if not files:
        details = "".join(f"; {path.path} {path.reason}" for path in skipped[:3])
        more = f"; and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        raise UserError(
            f"No .nii or .nii.gz in {source}: convert DICOM series to NIfTI first, for example "
            f"with dcm2niix{details}{more}."
        )
    return FolderContent(sorted(files), skipped)


def _drop_results(
    files: Sequence[Path], source: Path, out: Path
) -> tuple[list[Path], list[SkippedPath]]:
    """Leave out the results of predictions: all below `out`, unless CTs lie there too, and cases.

    A case's folder is one that holds `findings.json` and only the files of a case.
    """
    results, is_among_results = out.resolve(), out.resolve() == source.resolve()
    own_files = {FAILED_FILE, RUN_SUMMARY_FILE}
    names_by_folder: dict[Path, set[str]] = {}
    for file in files:
        names_by_folder.setdefault(file.parent, set()).add(file.name)
    skipped: dict[Path, SkippedPath] = {}
    inputs = []
    for file in files:
        names = names_by_folder[file.parent]
        if not is_among_results and results in file.resolve().parents:
            skipped[out] = SkippedPath(str(out), "is the folder of the results")
        elif is_among_results and file.parent == source and file.name in own_files:
            continue
        elif SUMMARY_FILE in names and names <= CASE_FILES:
            skipped[file.parent] = SkippedPath(str(file.parent), "is the result of a prediction")
        else:
            inputs.append(file)
    return inputs, list(skipped.values())


def _split_by_suffix(files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """NIfTI files by their names, and the other files."""
    volumes = [file for file in files if file.name.lower().endswith(NIFTI_SUFFIXES)]
    others = [file for file in files if not file.name.lower().endswith(NIFTI_SUFFIXES)]
    return volumes, others


def _drop_repeated_files(files: Sequence[Path]) -> tuple[list[Path], list[SkippedPath]]:
    """Keep the first path of each file on the disk, so that links to it are not predicted too."""
    first_paths: dict[object, Path] = {}
    skipped = []
    for file in files:
        status = file.stat()
        is_hard_linked = status.st_nlink > 1
        key = (status.st_dev, status.st_ino) if is_hard_linked else os.path.realpath(file)
        first_path = first_paths.setdefault(key, file)
        if first_path != file:
            reason = f"is the same file as {first_path}, which is predicted"
            skipped.append(SkippedPath(str(file), reason))
    return list(first_paths.values()), skipped


def _describe_other_files(files: Sequence[Path]) -> tuple[list[SkippedPath], list[SkippedPath]]:
    """One entry for each folder with DICOM files, and one for each file of another format."""
    dicom_counts: Counter[Path] = Counter()
    others = []
    for file in files:
        if _is_dicom(file):
            dicom_counts[file.parent] += 1
        else:
            others.append(SkippedPath(str(file), "has another format than .nii or .nii.gz"))
    dicom_folders = []
    for folder, count in dicom_counts.items():
        reason = f"holds DICOM ({count} files): convert it to NIfTI, for example with dcm2niix"
        dicom_folders.append(SkippedPath(str(folder), reason))
    return dicom_folders, others


def _is_dicom(file: Path) -> bool:
    """Whether a file is DICOM by its name, or by its content where the name says nothing."""
    name = file.name.lower()
    if name.endswith(_DICOM_SUFFIXES) or name == "dicomdir":
        return True
    if not _NUMBERED_NAME.fullmatch(name):
        return False
    try:
        with file.open("rb") as stream:
            return stream.read(132)[128:] == _DICOM_MAGIC
    except OSError:
        return False


def case_names(files: Sequence[Path]) -> list[str]:
    """Name each case after its file, and after the file's folders too where names are equal.

    All names differ, also from those of the files beside the cases.
    """
    short_names = [_strip_nifti_suffix(file) for file in files]
    counts = Counter(short_names)
    base = Path(os.path.commonpath([file.parent for file in files]))
    used = {FAILED_FILE, RUN_SUMMARY_FILE}
    names = []
    for file, name in zip(files, short_names, strict=True):
        if counts[name] > 1:
            name = "_".join([*file.parent.relative_to(base).parts, name])
        name = unique = os.fsdecode(os.fsencode(name)[-MAX_NAME_BYTES:])
        number = 1
        while unique in used:
            number += 1
            unique = f"{name}-{number}"
        used.add(unique)
        names.append(unique)
    return names


def _strip_nifti_suffix(file: Path) -> str:
    for suffix in NIFTI_SUFFIXES:
        if file.name.lower().endswith(suffix):
            return file.name[: -len(suffix)] or file.parent.name
    return file.name
