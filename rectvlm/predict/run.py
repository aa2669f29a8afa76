"""Prediction on one CT or on a folder of CTs: each gets a folder with its results.

Command: `rectvlm predict FILE_OR_FOLDER --checkpoint runs/demo/phase3 --out predictions`
"""

import errno
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rectvlm.checkpoint import Checkpoint
from rectvlm.data.volume import detect_format
from rectvlm.file_search import SkippedPath
from rectvlm.files import (
    atomic_file,
    encode_json_text,
    explain_write_error,
    printable_line,
    require_writable_folder,
    write_json,
)
from rectvlm.finding_thresholds import FindingThresholds
from rectvlm.predict.case import LoadedModel, predict_case
from rectvlm.predict.case_folder import (
    PAGE_FILE,
    refuse_to_replace,
    remove_stale_folders,
    write_case_folder,
)
from rectvlm.predict.ct_source import CtSource
from rectvlm.predict.find_volumes import (
    FAILED_FILE,
    RUN_SUMMARY_FILE,
    case_names,
    find_volumes,
)
from rectvlm.types import InputError, UserError

log = logging.getLogger(__name__)

MAX_LOGGED_PATHS = 10
"""Skipped paths that the log names; the summary has them all."""
_CASE_ERRNOS = (errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL)
"""Answers of a file system to the name of one case. Any other means that no case can be written."""


@dataclass(frozen=True)
class PredictedFile:
    """One CT in `predict-summary.json`."""

    name: str
    """Name of the case's folder."""
    file: str
    """Path of the CT, with the number of a DICOM series."""


@dataclass(frozen=True)
class FailedFile:
    """One line of `failed.jsonl`, and one CT in `predict-summary.json`."""

    file: str
    reason: str
    kind: str
    """Kind of fault, in the same words for every file that has it."""

    @classmethod
    def from_error(cls, file: str, error: Exception) -> "FailedFile":
        """Describe a file by the exception that it raised."""
        if isinstance(error, InputError):
            return cls(file, str(error), error.reason)
        if isinstance(error, UserError):
            return cls(file, str(error), "cannot be used")
        message = " ".join(str(error).split()).removesuffix(".") or "no message"
        if isinstance(error, MemoryError):
            kind, remedy = "needs too much memory", "look at its size and its header"
        else:
            kind = f"met an unexpected {type(error).__name__}"
            remedy = "--verbose shows where; report it if the file is sound"
        return cls(file, f"{file} {kind} ({message}): {remedy}.", kind)


@dataclass
class PredictSummary:
    """Content of `predict-summary.json`: what became of every file of a folder."""

    source: str
    checkpoint: str
    files: int
    """Number of CTs that were found."""
    predicted: list[PredictedFile] = field(default_factory=list)
    failed: list[FailedFile] = field(default_factory=list)
    skipped: list[SkippedPath] = field(default_factory=list)


def predict_cases(
    source: str | Path,
    checkpoint: str | Path,
    out: str | Path,
    device: str | None = None,
    thresholds: str | Path | None = None,
    series: str | None = None,
    origin: str | None = None,
) -> list[Path]:
    """Predict on one CT or on every CT below a folder.

    Each case gets a folder in `out`, complete or not at all, with `findings.json`, `index.html`,
    `report.md` and `fhir.json`; with masks, `lesions.csv` and `report.txt` if the model has these
    parts; and with DICOM SEG and SR of them if the CT is DICOM. In a folder of CTs,
    whatever a file raises is logged and listed in `out/failed.jsonl`, and the rest goes on;
    `out/predict-summary.json` names the predicted, failed and skipped files.

    Args:
        source: a CT (NIfTI, DICOM, MetaImage, NRRD, NumPy archive, zip of DICOM), or a folder that
            is searched through.
        checkpoint: a run's phase folder, a checkpoint or an exported model.
        out: folder of the results.
        device: device of the model, by default the GPU if there is one.
        thresholds: file of thresholds for calls and prompts; by default those of the model.
        series: number or SeriesInstanceUID of the DICOM series of each study; by default the chest
            CT is chosen.
        origin: name of the source in the log and in the summary, by default its path.

    Returns:
        The folders of the cases.

    Raises:
        UserError: there is nothing to read or no such checkpoint, `out` cannot be written to, a
            single file cannot be used, no file of a folder can be used, or a case's folder exists
            and holds something else.
    """
    source, out = Path(source), Path(out)
    found = find_volumes(source, out, series)
    if origin is not None:
        found = found.named(source, origin)
    _log_skipped_paths(found.skipped, out)
    names = case_names(found.sources)
    for name in names:
        refuse_to_replace(out / name)
    opened = Checkpoint.open(checkpoint)
    own_thresholds = None if thresholds is None else FindingThresholds.read(Path(thresholds))
    require_writable_folder(out)
    remove_stale_folders(out)
    loaded = LoadedModel.open(opened, device, own_thresholds)
    is_one_file = source.is_file() and detect_format(source) != "zip"
    if is_one_file and source.name.upper() != "DICOMDIR":
        return [_predict_single_file(loaded, names[0], found.sources[0], out)]

    summary = PredictSummary(origin or str(source), str(opened.folder), len(found.sources))
    summary.skipped = found.skipped
    try:
        case_folders = _predict_folder(loaded, found.sources, names, out, summary)
        write_json(out / RUN_SUMMARY_FILE, asdict(summary))
    except OSError as error:
        raise UserError(
            f"{explain_write_error(out, error)} The results of {len(summary.predicted)} of "
            f"{summary.files} files are complete."
        ) from error
    _log_summary(summary, out)
    if not case_folders:
        raise UserError(
            f"None of the {summary.files} files in {source} is a chest CT in HU: see "
            f"{out / FAILED_FILE} for why."
        )
    return case_folders


def _predict_single_file(loaded: LoadedModel, name: str, source: CtSource, out: Path) -> Path:
    try:
        case = predict_case(loaded, name, source)
    except UserError:
        raise
    except Exception as error:
        log.debug("%s failed", source.place, exc_info=True)
        raise UserError(FailedFile.from_error(source.place, error).reason) from error
    try:
        return write_case_folder(loaded, case, out)
    except OSError as error:
        raise UserError(explain_write_error(out, error)) from error


def _predict_folder(
    loaded: LoadedModel,
    sources: Sequence[CtSource],
    names: Sequence[str],
    out: Path,
    summary: PredictSummary,
) -> list[Path]:
    """Predict on each file, and note in the summary what became of it.

    Raises:
        OSError: nothing more can be written to `out`.
    """
    for former_file in (FAILED_FILE, RUN_SUMMARY_FILE):
        (out / former_file).unlink(missing_ok=True)
    case_folders: list[Path] = []
    for number, (name, source) in enumerate(zip(names, sources, strict=True), start=1):
        is_predicted = False
        try:
            case = predict_case(loaded, name, source)
            is_predicted = True
            case_folders.append(write_case_folder(loaded, case, out))
        except Exception as error:
            is_output_error = isinstance(error, OSError) and error.errno not in _CASE_ERRNOS
            if is_predicted and is_output_error:
                raise
            failure = FailedFile.from_error(source.place, error)
            log.error("%d of %d: %s", number, len(sources), printable_line(failure.reason))
            log.debug("%s failed", source.place, exc_info=True)
            summary.failed.append(failure)
            _write_failed(out, summary.failed)
        else:
            summary.predicted.append(PredictedFile(name, source.place))
            page = printable_line(case_folders[-1] / PAGE_FILE)
            log.info("%d of %d: %s", number, len(sources), page)
    return case_folders


def _log_skipped_paths(skipped: Sequence[SkippedPath], out: Path) -> None:
    for path in skipped[:MAX_LOGGED_PATHS]:
        log.warning("skipped: %s %s", printable_line(path.path), printable_line(path.reason))
    n_more = len(skipped) - MAX_LOGGED_PATHS
    if n_more > 0:
        log.warning("skipped: %d more, all listed in %s", n_more, out / RUN_SUMMARY_FILE)


def _log_summary(summary: PredictSummary, out: Path) -> None:
    counts = Counter(failure.kind for failure in summary.failed)
    for kind, count in counts.most_common():
        log.warning("%6d: %s", count, printable_line(kind))
    log.info(
        "%d of %d files predicted, %d failed, %d paths skipped: see %s",
        len(summary.predicted),
        summary.files,
        len(summary.failed),
        len(summary.skipped),
        printable_line(out / RUN_SUMMARY_FILE),
    )


def _write_failed(out: Path, failed: Sequence[FailedFile]) -> None:
    lines = [json.dumps(asdict(failure), ensure_ascii=False) + "\n" for failure in failed]
    with atomic_file(out / FAILED_FILE) as file:
        file.write(encode_json_text("".join(lines)))
