"""The CTs that a path means, what else lies beside them, and the names of their results."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rectvlm.data.volume import SUFFIXES, detect_format, has_dicom_magic, strip_suffix
from rectvlm.file_search import SkippedPath, list_files
from rectvlm.predict.case_folder import CASE_FILES, SUMMARY_FILE
from rectvlm.predict.ct_source import CtSource
from rectvlm.types import InputError, UserError

if TYPE_CHECKING:
    from rectvlm.data.dicom.series import DicomListing, DicomSeries  # loads pydicom

FORMATS = "DICOM, .nii, .nii.gz, .mha, .mhd, .nrrd, .npz or .zip of DICOM"
FAILED_FILE = "failed.jsonl"
RUN_SUMMARY_FILE = "predict-summary.json"
MAX_NAME_BYTES = 200
"""Longest name of a case, bytes: file systems take 255, and its folder has a longer one at first.
"""


@dataclass
class FoundCts:
    """CTs that a path means, and what was left out."""

    sources: list[CtSource] = field(default_factory=list)
    skipped: list[SkippedPath] = field(default_factory=list)

    def named(self, source: Path, origin: str) -> "FoundCts":
        """The same, with another name than its path for the source that they were found in."""
        sources = [replace(ct, origin=origin) for ct in self.sources]
        skipped = [
            SkippedPath(path.path.replace(str(source), origin), path.reason)
            for path in self.skipped
        ]
        return FoundCts(sources, skipped)


def find_volumes(source: Path, out: Path, wanted_series: str | None = None) -> FoundCts:
    """Find the CTs that a path means, sorted, and list all that is not used.

    Of the DICOM series of a study, the chest CT is used: see `choose_chest_ct`.

    Args:
        source: a file, or a folder that is searched through. Links are followed; a file that is
            reached twice is used once. A DICOMDIR stands for its folder.
        out: folder of the results, which are no inputs.
        wanted_series: number or SeriesInstanceUID of the DICOM series that is used in its place;
            other formats are then left out.

    Raises:
        UserError: there is no such path, a folder without a CT, or no series that is wanted.
    """
    if source.is_file() and source.name.upper() != "DICOMDIR":
        return _find_in_file(source, wanted_series)
    folder = source.parent if source.is_file() else source
    if not folder.is_dir():
        fault = "does not exist"
        if source.exists():
            fault = "is neither a file nor a folder"
        elif source.is_symlink():
            fault = f"is a broken link to {os.readlink(source)}"
        raise UserError(f"{source} {fault}: give a CT ({FORMATS}) or a folder of them.")
    content = list_files(folder)
    files, results = _drop_results(content.files, folder, out)
    files, others = _drop_other_formats(files)
    files, repeated = _drop_repeated_files(files)
    found = _sort_by_format(files, wanted_series)
    skipped = [*found.skipped, *repeated, *others, *content.skipped, *results]
    skipped.sort(key=lambda path: path.reason.startswith("is hidden"))
    if not found.sources:
        details = "".join(f"; {path.path} {path.reason}" for path in skipped[:3])
        more = f"; and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        wanted = "" if wanted_series is None else f" that --series {wanted_series} asks for"
        raise UserError(
            f"No CT{wanted} in {source}: expected {FORMATS}, found none{details}{more}; give the "
            "folder of the scan."
        )
    return FoundCts(sorted(found.sources, key=lambda ct: (ct.path, ct.label)), skipped)


def _find_in_file(file: Path, wanted_series: str | None) -> FoundCts:
    """The CT in a file, the series that it belongs to, or the series in an archive."""
    file_format = detect_format(file)
    if file_format == "zip":
        found = _find_in_archive(file, wanted_series)
        if found.sources:
            return found
        reasons = "; ".join(path.reason for path in found.skipped[:3]) or "no DICOM files"
        wanted = "" if wanted_series is None else f" that --series {wanted_series} asks for"
        raise UserError(
            f"No CT{wanted} in {file}: expected a DICOM series of a CT, found {reasons}; give the "
            "archive of the scan."
        )
    if file_format == "dicom":
        from rectvlm.data.dicom.series import is_wanted
        from rectvlm.data.dicom.volume import series_of_file

        series = series_of_file(file)
        if wanted_series is None or is_wanted(series, wanted_series):
            return FoundCts([_series_source(series, file)])
    elif wanted_series is None:
        return FoundCts([CtSource(file)])
    raise UserError(
        f"{file} is not of the series that --series {wanted_series} asks for: give the folder of "
        "the DICOM study."
    )


def _sort_by_format(files: Sequence[Path], wanted_series: str | None) -> FoundCts:
    """CTs in files of the formats that are read, DICOM ones sorted into series."""
    found = FoundCts()
    dicom_files = []
    for file in files:
        file_format = detect_format(file)
        if file_format == "dicom":
            dicom_files.append(file)
        elif file_format == "zip":
            found = _join(found, _find_in_damaged_archive(file, wanted_series))
        elif wanted_series is None:
            found.sources.append(CtSource(file))
        else:
            reason = f"is no DICOM series, and --series {wanted_series} asks for one"
            found.skipped.append(SkippedPath(str(file), reason))
    if dicom_files:
        from rectvlm.data.dicom.series import list_series

        listing = list_series(dicom_files)
        chosen, skipped = _select_series(listing, wanted_series)
        sources = [_series_source(series, series.folder) for series in chosen]
        found = _join(found, FoundCts(sources, skipped))
    return found


def _find_in_damaged_archive(file: Path, wanted_series: str | None) -> FoundCts:
    """`_find_in_archive`; what is wrong with an archive is told when its turn comes."""
    try:
        return _find_in_archive(file, wanted_series)
    except InputError:
        return FoundCts([CtSource(file)])


def _find_in_archive(file: Path, wanted_series: str | None) -> FoundCts:
    from rectvlm.data.dicom.series import list_series
    from rectvlm.data.zip_archive import unpacked_dicom

    with unpacked_dicom(file) as files:
        chosen, skipped = _select_series(list_series(files), wanted_series)
    sources = [
        CtSource(file, archived_uid=series.uid, pseudonym=series.pseudonym, label=series.label)
        for series in chosen
    ]
    return FoundCts(sources, [SkippedPath(str(file), path.reason) for path in skipped])


def _series_source(series: "DicomSeries", path: Path) -> CtSource:
    return CtSource(path, series, pseudonym=series.pseudonym, label=series.label)


def _join(found: FoundCts, more: FoundCts) -> FoundCts:
    return FoundCts([*found.sources, *more.sources], [*found.skipped, *more.skipped])


def _select_series(
    listing: "DicomListing", wanted_series: str | None
) -> tuple[list["DicomSeries"], list[SkippedPath]]:
    """One series of each study: the chest CT, or the one that is wanted."""
    from rectvlm.data.dicom.series import choose_chest_ct, group_by_study, is_wanted

    chosen: list[DicomSeries] = []
    skipped: list[SkippedPath] = []
    for study in group_by_study(listing.series):
        candidates = study
        if wanted_series is not None:
            candidates = [series for series in study if is_wanted(series, wanted_series)]
            for series in study:
                if series not in candidates:
                    reason = f"and --series {wanted_series} asks for another"
                    skipped.append(_skip_series(series, reason))
        if not candidates:
            continue
        (best, _), *others = choose_chest_ct(candidates)
        chosen.append(best)
        skipped += [_skip_series(other, f"but {reason}") for other, reason in others]
    skipped += [SkippedPath(str(place), reason) for place, reason in listing.describe_skipped()]
    return chosen, skipped


def _skip_series(series: "DicomSeries", reason: str) -> SkippedPath:
    return SkippedPath(str(series.folder), f"also holds {series.describe()}, {reason}")


def _drop_results(
    files: Sequence[Path], source: Path, out: Path
) -> tuple[list[Path], list[SkippedPath]]:
    """Leave out the results of predictions: all below `out`, unless the source does too, and cases.

    A case's folder is one that holds `findings.json` and only the files of a case.
    """
    results, is_among_results = out.resolve(), out.resolve() == source.resolve()
    holds_source = results in (source.resolve(), *source.resolve().parents)
    own_files = {FAILED_FILE, RUN_SUMMARY_FILE}
    names_by_folder: dict[Path, set[str]] = {}
    for file in files:
        names_by_folder.setdefault(file.parent, set()).add(file.name)
    skipped: dict[Path, SkippedPath] = {}
    inputs = []
    for file in files:
        names = names_by_folder[file.parent]
        if not holds_source and results in file.resolve().parents:
            skipped[out] = SkippedPath(str(out), "is the folder of the results")
        elif is_among_results and file.parent == source and file.name in own_files:
            continue
        elif SUMMARY_FILE in names and names <= CASE_FILES:
            skipped[file.parent] = SkippedPath(str(file.parent), "is the result of a prediction")
        else:
            inputs.append(file)
    return inputs, list(skipped.values())


def _drop_other_formats(files: Sequence[Path]) -> tuple[list[Path], list[SkippedPath]]:
    """Leave out files of other formats, by name, or by content where a name says nothing."""
    known: list[Path] = []
    others: list[SkippedPath] = []
    for file in files:
        name = file.name.lower()
        if name == "dicomdir":
            continue
        if name.endswith(tuple(SUFFIXES)) or has_dicom_magic(file):
            known.append(file)
        else:
            others.append(SkippedPath(str(file), f"has another format than {FORMATS}"))
    return known, others


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


def case_names(sources: Sequence[CtSource]) -> list[str]:
    """Name each case after its file, and after the file's folders too where names are equal.

    A DICOM series is named by its pseudonym. All names differ, also from those of the files beside
    the cases.
    """
    short_names = [_short_name(source) for source in sources]
    counts = Counter(short_names)
    base = Path(os.path.commonpath([source.path.parent for source in sources]))
    used = {FAILED_FILE, RUN_SUMMARY_FILE}
    names = []
    for source, name in zip(sources, short_names, strict=True):
        if counts[name] > 1 and source.pseudonym is None:
            name = "_".join([*source.path.parent.relative_to(base).parts, name])
        name = unique = os.fsdecode(os.fsencode(name)[-MAX_NAME_BYTES:])
        number = 1
        while unique in used:
            number += 1
            unique = f"{name}-{number}"
        used.add(unique)
        names.append(unique)
    return names


def _short_name(source: CtSource) -> str:
    if source.pseudonym is not None:
        return source.pseudonym
    return strip_suffix(source.path.name) or source.path.parent.name
