"""The folder of a predicted case: findings, page, masks, lesion table, report, DICOM objects.

A folder appears complete or not at all, and replaces nothing but an earlier result.
"""

import os
import platform
import shutil
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import psutil
from nibabel.orientations import (
    apply_orientation,
    axcodes2ornt,
    inv_ornt_aff,
    io_orientation,
    ornt_transform,
)
from numpy.typing import NDArray

from rectvlm.data.coarse_regions import estimate_coarse_regions
from rectvlm.data.nifti_affine import copy_position
from rectvlm.data.nifti_file import parse_header
from rectvlm.data.report_text import split_report_sections
from rectvlm.data.voxel_size import voxel_spacing_mm, voxel_volume_ml
from rectvlm.files import printable_text, write_json
from rectvlm.labels import LESIONS
from rectvlm.lesion_bits import lesion_mask
from rectvlm.lesion_places import LesionLocator, LesionPlace
from rectvlm.predict.case import LoadedModel, PredictedCase
from rectvlm.predict.case_page import DISCLAIMER, CaseTruth, CaseView, render_page
from rectvlm.predict.case_summary import (
    CaseSummary,
    FindingSummary,
    LesionSummary,
    ThresholdsSummary,
)
from rectvlm.predict.contradictions import find_contradictions
from rectvlm.predict.dicom_results import DICOM_FILES, write_dicom_results
from rectvlm.predict.fhir import make_diagnostic_report
from rectvlm.predict.findings_schema import SCHEMA_ID
from rectvlm.predict.lesion_files import LESION_FILES, save_lesion_files
from rectvlm.predict.lesion_lobes import LOBES_NOTE, LobeFinder
from rectvlm.predict.lesion_table import LesionTable, measure_lesions, write_lesion_csv
from rectvlm.predict.markdown_report import render_markdown
from rectvlm.types import Affine, Int16Volume, MaskVolume, UserError, Volume

SUMMARY_FILE = "findings.json"
PAGE_FILE = "index.html"
MASK_FILE = "lesions.nii.gz"
REPORT_FILE = "report.txt"
MARKDOWN_FILE = "report.md"
TABLE_FILE = "lesions.csv"
FHIR_FILE = "fhir.json"
CASE_FILES = frozenset(
    {SUMMARY_FILE, PAGE_FILE, MASK_FILE, REPORT_FILE, MARKDOWN_FILE, TABLE_FILE, FHIR_FILE}
    | set(LESION_FILES.values())
    | set(DICOM_FILES)
)
"""Files of a case's folder, which holds no others."""
MASK_BITS_NOTE = "bits: " + ", ".join(f"{lesion.mask_value} {lesion.key}" for lesion in LESIONS)


def is_case_folder(folder: Path) -> bool:
    """Whether a folder is a case's and holds nothing else."""
    if not folder.is_dir() or folder.is_symlink():
        return False
    names = {path.name for path in folder.iterdir()}
    return SUMMARY_FILE in names and names <= CASE_FILES


def refuse_to_replace(folder: Path) -> None:
    """Stop before a folder that is not an earlier result is replaced: the CT itself may lie in it.

    Raises:
        UserError: it exists and holds other files, or lacks those of a result.
    """
    if (folder.exists() or folder.is_symlink()) and not is_case_folder(folder):
        raise UserError(
            f"{folder} would be replaced by a case's results, but it is not an earlier result: "
            f"expected a new name or a folder with {SUMMARY_FILE} and only the files of a case. "
            "Choose another --out, or move it away."
        )


def remove_stale_folders(out: Path) -> None:
    """Remove the temporary folders that killed processes of this machine left in `out`."""
    for folder in out.glob(f".case.{platform.node()}.*.tmp"):
        pid = folder.name.split(".")[-2]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def write_case_folder(
    loaded: LoadedModel, case: PredictedCase, out: Path, truth: CaseTruth | None = None
) -> Path:
    """Write a case's folder under a temporary name and rename it; return the folder.

    Args:
        loaded: model that predicted.
        case: the case.
        out: folder in which the case's folder appears.
        truth: what is known to be true of the case, for its page.

    Raises:
        UserError: the folder exists and holds something else.
    """
    folder, work = out / case.name, out / f".case.{platform.node()}.{os.getpid()}.tmp"
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir()
        _write_case_files(loaded, case, work, truth)
        refuse_to_replace(folder)
        if folder.exists():
            shutil.rmtree(folder)
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _write_case_files(
    loaded: LoadedModel, case: PredictedCase, work: Path, truth: CaseTruth | None
) -> None:
    view, summary = _describe_case(loaded, case)
    view = replace(view, truth=truth)
    write_json(work / SUMMARY_FILE, {"$schema": SCHEMA_ID, **asdict(summary)})
    write_json(work / FHIR_FILE, make_diagnostic_report(case.name, summary))
    markdown = render_markdown(case.name, summary)
    (work / MARKDOWN_FILE).write_text(printable_text(markdown), encoding="utf-8")
    if case.lesion_bits is not None:
        save_mask(case.lesion_bits, case.volume, work / MASK_FILE)
        write_lesion_csv(summary.components or [], work / TABLE_FILE)
    write_dicom_results(case, summary, work)
    if case.report is not None:
        note = f"Generated by rectvlm from {_file_name(case.volume)}. {DISCLAIMER}"
        text = printable_text(f"{case.report.strip()}\n\n[{note}]\n")
        (work / REPORT_FILE).write_text(text, encoding="utf-8")
    (work / PAGE_FILE).write_text(printable_text(render_page(view)), encoding="utf-8")


def _file_name(volume: Volume) -> str:
    """Name of a CT in results. A DICOM series has its pseudonym: paths may name the patient."""
    return volume.pseudonym or Path(volume.where).name


def save_mask(bits: MaskVolume, volume: Volume, path: Path) -> None:
    """Save lesion bits (i, j, k) as one 3-D uint8 NIfTI, whose header extension names the bits.

    It lies where its CT lies in every program: the CT's header has position and unit.
    """
    if volume.nifti_header is None:
        image = nib.Nifti1Image(bits, volume.affine, dtype=np.uint8)
        image.header.set_xyzt_units("mm")
    else:
        source = parse_header(volume.nifti_header)
        is_nifti2 = isinstance(source, nib.Nifti2Header)
        image_class = nib.Nifti2Image if is_nifti2 else nib.Nifti1Image
        # Given an affine, nibabel would write both forms and their codes anew; given the header,
        # it would mend fields that do not decide.
        image = image_class(bits, None, type(source)(endianness=source.endianness))
        image.set_data_dtype(np.uint8)
        copy_position(source, image.header)
    image.header["descrip"] = "rectvlm lesion bits, see findings.json"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", MASK_BITS_NOTE.encode()))
    nib.save(image, path)
    save_lesion_files(bits, image, path.parent)


def canonical_view(array: NDArray[Any], affine: Affine) -> tuple[NDArray[Any], Affine]:
    """A native array (i, j, k) as a view (z, y, x) on the nearest canonical axes, and its affine.

    Axes become inferior → superior, anterior → posterior, patient right → left. Nothing is
    resampled.
    """
    transform = ornt_transform(io_orientation(affine), axcodes2ornt(("S", "P", "L")))
    return apply_orientation(array, transform), affine @ inv_ornt_aff(transform, array.shape)


def _describe_case(loaded: LoadedModel, case: PredictedCase) -> tuple[CaseView, CaseSummary]:
    """The case for the page and for `findings.json`."""
    ct, affine = canonical_view(case.hu, case.volume.affine)
    lesion_bits = np.zeros_like(ct, np.uint8)
    if case.lesion_bits is not None:
        lesion_bits, _ = canonical_view(case.lesion_bits, case.volume.affine)
    spacing_mm = voxel_spacing_mm(affine)
    locator = LesionLocator(ct, None, spacing_mm)
    places = locator.locate_all(lesion_bits)
    lobe_finder = LobeFinder(lambda: estimate_coarse_regions(ct, spacing_mm), spacing_mm)
    table = measure_lesions(lesion_bits, ct, affine, locator, lobe_finder)
    lesions = None
    if case.lesion_bits is not None:
        lesions = summarize_lesions(lesion_bits, affine, places, lobe_finder)
    summary = _summarize_case(loaded, case, lesion_bits, places, lesions, table, affine)

    volumes_ml = None
    if summary.lesions is not None:
        volumes_ml = {lesion.key: lesion.volume_ml for lesion in summary.lesions}
    report_sections = None
    if summary.report is not None:
        report_sections = [(title.title(), text) for title, text in summary.report.items() if text]
    view = CaseView(
        name=case.name,
        ct=ct,
        lesion_bits=lesion_bits,
        affine=affine,
        finding_probabilities=case.finding_probabilities,
        thresholds=loaded.model.thresholds,
        volumes_ml=volumes_ml,
        places={place.lesion: place for place in places},
        lobes={lesion.key: lesion.approximate_lobes for lesion in lesions or []},
        contradictions=summary.contradictions,
        report_sections=report_sections,
        facts=_list_facts(loaded, case, ct, affine),
    )
    return view, summary


def _summarize_case(
    loaded: LoadedModel,
    case: PredictedCase,
    canonical_bits: MaskVolume,
    places: list[LesionPlace],
    lesions: list[LesionSummary] | None,
    table: LesionTable,
    affine: Affine,
) -> CaseSummary:
    """The case for `findings.json`, with its contradictions."""
    thresholds = loaded.model.thresholds
    findings = {}
    for name, threshold in thresholds.by_finding().items():
        probability = case.finding_probabilities[name]
        is_present = probability >= threshold
        findings[name] = FindingSummary(round(probability, 4), threshold, is_present)
    report = None
    if case.report is not None:
        findings_text, impression_text = split_report_sections(case.report)
        report = {"findings": findings_text, "impression": impression_text}
    return CaseSummary(
        disclaimer=DISCLAIMER,
        file=case.volume.pseudonym or case.volume.where,
        shape=list(case.volume.array.shape),
        spacing_zyx_mm=[round(step, 4) for step in voxel_spacing_mm(affine)],
        hu=case.hu_decision,
        checkpoint=str(loaded.checkpoint.folder),
        config=loaded.checkpoint.config.name,
        step=loaded.checkpoint.training.step,
        version=version("rectvlm"),
        thresholds=ThresholdsSummary(thresholds.source, thresholds.n_cases, thresholds.not_fitted),
        findings=findings,
        lesions=lesions,
        components=None if case.lesion_bits is None else table.components,
        components_left_out=table.n_left_out,
        components_left_out_ml=table.left_out_ml,
        lobes_note=LOBES_NOTE,
        report=report,
        contradictions=find_contradictions(
            calls={name: finding.present for name, finding in findings.items()},
            lesion_bits=None if case.lesion_bits is None else canonical_bits,
            places=places,
            affine=affine,
            report=case.report,
        ),
    )


def summarize_lesions(
    lesion_bits: MaskVolume, affine: Affine, places: list[LesionPlace], lobe_finder: LobeFinder
) -> list[LesionSummary]:
    """Summarize all five kinds of lesions, with their volumes on the native grid.

    Args:
        lesion_bits: lesion bits (Z, Y, X).
        affine: 4 × 4, index (z, y, x, 1) to world, mm.
        places: of the lesions that are large enough to have one.
        lobe_finder: of lobes in this CT.
    """
    voxel_ml = voxel_volume_ml(affine)
    places_by_key = {place.lesion: place for place in places}
    summaries = []
    for lesion in LESIONS:
        voxels = np.flatnonzero(lesion_mask(lesion_bits, lesion))
        place = places_by_key.get(lesion.key)
        summaries.append(
            LesionSummary(
                key=lesion.key,
                name=lesion.name,
                mask_value=lesion.mask_value,
                voxels=voxels.size,
                volume_ml=voxels.size * voxel_ml,
                place=place.wording if place else None,
                side=place.side if place else None,
                basis=place.basis if place else None,
                plausible=place.is_plausible if place else None,
                approximate_lobes=lobe_finder.find_lobes(lesion, place, voxels),
            )
        )
    return summaries


def _list_facts(
    loaded: LoadedModel, case: PredictedCase, ct: Int16Volume, affine: Affine
) -> list[tuple[str, str]]:
    """Names and values of the facts at the end of the page."""
    config, step = loaded.checkpoint.config, loaded.checkpoint.training.step
    z, y, x = voxel_spacing_mm(affine)
    shape = " × ".join(map(str, ct.shape[::-1]))
    grid = " × ".join(map(str, config.data.grid))
    spacing = " × ".join(f"{mm:g}" for mm in config.data.spacing)
    slices = _describe_seen_slices(ct, affine, case.grid_affine, config.data.grid)
    reason = case.hu_decision.reason
    checkpoint = f"{config.name}, {loaded.checkpoint.folder}, step {step}"
    return [
        ("File", _file_name(case.volume)),
        ("Volume", f"{shape} voxels of {x:.2f} × {y:.2f} × {z:.2f} mm (x, y, z)"),
        ("Hounsfield units", reason[:1].upper() + reason[1:]),
        ("Seen by the model", f"{slices}, on a grid of {grid} voxels of {spacing} mm (z, y, x)"),
        ("Model", f"{checkpoint}, rectvlm {version('rectvlm')}"),
    ]


def _describe_seen_slices(
    ct: Int16Volume, affine: Affine, grid_affine: Affine, grid: tuple[int, int, int]
) -> str:
    """The slices whose centres lie in the model's grid, in words: a longer scan is cut."""
    depth, height, width = ct.shape
    centres = np.array([[z, (height - 1) / 2, (width - 1) / 2, 1] for z in range(depth)]).T
    z_on_grid = (np.linalg.inv(grid_affine) @ affine @ centres)[0]
    inside = np.flatnonzero((z_on_grid > -0.5) & (z_on_grid < grid[0] - 0.5))
    if not inside.size:
        return f"none of the {depth} slices"
    return f"slices {inside[0] + 1} to {inside[-1] + 1} of {depth}"
