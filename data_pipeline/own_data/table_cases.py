"""A table of the user's own cases to `Case`s.

    python -m data_pipeline.preprocess --table cases.csv --out shards

One row is one CT. A column that is not there, and a cell that is empty, is unknown: an unlabelled
finding is not absent, and a lesion without a mask was not annotated.
"""

import logging
import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from data_pipeline.cases import Case, CaseData, file_identity
from data_pipeline.ct_rate.tables import parse_report_section
from data_pipeline.masks.loaded_masks import LoadedMasks
from data_pipeline.masks.mask_files import CaseMaskFiles
from data_pipeline.masks.mask_folders import MaskFolders
from data_pipeline.own_data.case_table import TableCase, count_cases, read_cases, resolve_path
from data_pipeline.own_data.table_columns import recognise_columns
from data_pipeline.own_data.table_mapping import TableMapping, read_table_mapping
from rectvlm.data.report_text import split_report_sections
from rectvlm.data.volume import detect_format, read_volume
from rectvlm.delimited_file import decode_text, read_delimited_file
from rectvlm.files import json_sha256
from rectvlm.labels import LESION_BY_KEY, Lesion
from rectvlm.types import InputError

log = logging.getLogger(__name__)

_TEXT_FILE = re.compile(r"[^\n]{1,1000}\.txt", re.IGNORECASE)
"""Cell that names the file of a report in place of its text."""

TextCell = str | Path
"""Text such as a report, or the file that holds it."""


@dataclass(frozen=True)
class OwnCases:
    """The cases of a table, and what was counted in it."""

    cases: list[Case]
    counts: dict[str, int]


def list_table_cases(
    path: Path, mapping_file: Path | None = None, mask_folders: MaskFolders | None = None
) -> OwnCases:
    """List the cases of a table.

    Args:
        path: CSV with a row for each CT.
        mapping_file: what the table's own column names and words stand for.
        mask_folders: masks beside those that the table names.

    Raises:
        InputError: a table or mapping that cannot be read or meant, or none of its CTs exists.
    """
    mapping = read_table_mapping(mapping_file) if mapping_file is not None else TableMapping()
    table = read_delimited_file(path)
    if table.encoding == "Windows-1252":
        log.info("%s is not UTF-8: read as Windows-1252", path)
    columns = recognise_columns(table.columns, path, mapping)
    table_cases = read_cases(table, path, columns, mapping)
    _report_missing_files(table_cases, path)
    for split in ("train", "valid"):
        if all(case.split != split for case in table_cases):
            log.warning("no case is in %s: name one in a column 'split'", split)
    cases = [_build_case(case, path, mask_folders or MaskFolders()) for case in table_cases]
    return OwnCases(cases, count_cases(table_cases))


def _report_missing_files(cases: Sequence[TableCase], path: Path) -> None:
    """Say how many CTs and masks are missing; their cases end in the quarantine list."""
    missing = [case for case in cases if not os.path.exists(case.ct)]
    if len(missing) == len(cases):
        raise InputError(
            path,
            "names only CTs that do not exist",
            expected="paths relative to the table's folder",
            found=f"no file {missing[0].ct} (row {missing[0].row})",
            remedy="correct the paths",
        )
    if missing:
        log.warning(
            "%d of %d CTs do not exist and will be set aside, such as %s (row %d)",
            len(missing),
            len(cases),
            missing[0].ct,
            missing[0].row,
        )
    masks = [(mask, case.row) for case in cases for mask in case.masks.values()]
    missing_masks = [(mask, row) for mask, row in masks if not os.path.exists(mask)]
    if missing_masks:
        log.warning(
            "%d of %d masks do not exist, so their cases will be set aside, such as %s (row %d)",
            len(missing_masks),
            len(masks),
            *missing_masks[0],
        )


def _build_case(case: TableCase, path: Path, mask_folders: MaskFolders) -> Case:
    masks = mask_folders.find_masks(case.key)
    masks = replace(
        masks,
        lesion_files=(*masks.lesion_files, *case.masks.items()),
        absent_lesions=tuple(case.absent_lesions),
    )
    texts: dict[str, TextCell] = {}
    for name, text in case.texts.items():
        is_file = _TEXT_FILE.fullmatch(text) is not None
        texts[name] = resolve_path(text, path.absolute().parent) if is_file else text
    text_files = [cell for cell in texts.values() if isinstance(cell, Path)]
    assert case.split is not None
    row_digest = json_sha256([case.labels, case.texts, case.absent_lesions, case.split])
    return Case(
        key=case.key,
        split=case.split,
        patient=case.patient,
        source=f"{path.name} {case.ct_text}",
        load=partial(load_table_case, case.ct, case.labels, texts, masks, case.masks),
        identity=(*file_identity(*_ct_paths(case.ct), *masks.paths, *text_files), row_digest),
    )


def _ct_paths(ct: Path) -> list[Path]:
    """What a CT is read from: its file, with the voxels of a `.mhd`, or the folder of a series."""
    if not os.path.exists(ct):
        return [ct]
    if detect_format(ct) == "dicom":
        return [ct if ct.is_dir() else ct.parent]
    if ct.name.lower().endswith(".mhd"):
        return [ct, *sorted(ct.parent.glob("*raw"))]
    return [ct]


# What a worker does


def load_table_case(
    path: Path,
    labels: dict[str, int | None],
    texts: dict[str, TextCell],
    masks: CaseMaskFiles,
    table_masks: dict[str, Path],
) -> CaseData:
    """Read a case from its files.

    Args:
        path: of the CT.
        labels: of all 18 findings.
        texts: cells of the report and of what was known before it, by name of the column.
        masks: mask files of the CT.
        table_masks: those that the table names, by key of the lesion.

    Raises:
        UserError: a file that cannot be used.
    """
    volume = read_volume(path)
    findings = impression = None
    if "report" in texts:
        whole = _read_text_cell(texts["report"])
        findings, impression = split_report_sections(whole) if whole else (None, None)
    else:
        findings = _read_text_cell(texts.get("findings_text", ""))
        impression = _read_text_cell(texts.get("impression", ""))
    loaded_masks = masks.load(volume)
    for key, mask in table_masks.items():
        _require_agreement(LESION_BY_KEY[key], mask, labels, loaded_masks)
    return CaseData(
        **vars(loaded_masks),
        volume=volume,
        labels=labels,
        findings=findings,
        impression=impression,
        indication=_read_text_cell(texts.get("indication", "")),
        technique=_read_text_cell(texts.get("technique", "")),
    )


def _require_agreement(
    lesion: Lesion, mask: Path, labels: dict[str, int | None], masks: LoadedMasks
) -> None:
    """Refuse a drawn lesion whose finding the row denies, and the other way round."""
    is_drawn = any((volume.array & lesion.mask_value).any() for volume in masks.lesions)
    label = labels[lesion.finding]
    is_missing = lesion.is_implied_by_finding and masks.lesions_annotated[lesion.key]
    if (label == 0 and is_drawn) or (label == 1 and is_missing and not is_drawn):
        raise InputError(
            mask,
            "contradicts the label of its row",
            expected="a lesion in the mask where the finding is 1, and none where it is 0",
            found=f"{lesion.finding!r} of {label} and {'a' if is_drawn else 'no'} lesion",
            remedy="correct the label or the mask, or leave one of them empty",
        )


def _read_text_cell(cell: TextCell) -> str | None:
    """Text of a cell with plain line ends and without control characters; None for none."""
    text = cell
    if isinstance(cell, Path):
        try:
            text = decode_text(cell.read_bytes())[0]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                cell,
                "cannot be read",
                expected="the text of a report",
                found=str(error),
                remedy="correct the path in the table, or the file",
            ) from None
    lines = re.sub(r"\r\n?|\v|\f", "\n", str(text))
    plain = "".join(
        " " if unicodedata.category(letter) == "Cc" and letter not in "\n\t" else letter
        for letter in lines
    )
    return parse_report_section(plain)
