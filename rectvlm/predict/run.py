"""Prediction on CT files: for each one findings, lesion masks on its own grid, the report, and a page to look at.

Command: `rectvlm predict FILE_OR_FOLDER --checkpoint runs/demo/phase3 --out predictions`
"""

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import (
    apply_orientation,
    axcodes2ornt,
    inv_ornt_aff,
    io_orientation,
    ornt_transform,
)
from numpy.typing import NDArray

from rectvlm.checkpoint import Checkpoint
from rectvlm.config import Config
from rectvlm.data.canonical_grid import canonical_affine, mask_to_native, resample_to_grid
from rectvlm.data.dataset import collate_samples
from rectvlm.data.hounsfield import to_hu
from rectvlm.data.report_text import split_report_sections
from rectvlm.data.volume import read_volume
from rectvlm.evaluate.stored_thresholds import read_thresholds
from rectvlm.files import atomic_file
from rectvlm.labels import FINDINGS, LESIONS
from rectvlm.lesion_bits import lesion_mask
from rectvlm.lesion_places import LesionPlace, locate_lesions
from rectvlm.models import RectVLM
from rectvlm.predict.case_page import DISCLAIMER, CaseView, render_page
from rectvlm.types import (
    Affine,
    GridGeometry,
    HuConversion,
    Int16Volume,
    MaskVolume,
    Sample,
    SampleMeta,
    UserError,
    Volume,
)

log = logging.getLogger(__name__)

NIFTI_SUFFIXES = (".nii.gz", ".nii")
FAILED_FILE = "failed.jsonl"
SUMMARY_FILE, PAGE_FILE, MASK_FILE, REPORT_FILE = (
    "findings.json",
    "index.html",
    "lesions.nii.gz",
    "report.txt",
)
"""Files of a case's folder; it holds no others."""
MASK_BITS_NOTE = "bits: " + ", ".join(f"{lesion.mask_value} {lesion.key}" for lesion in LESIONS)


@dataclass(frozen=True)
class _LoadedModel:
    """The model and what it was loaded with."""

    model: RectVLM
    checkpoint: Checkpoint
    thresholds: dict[str, float] | None
    """Of the findings that were fitted; None when none were."""


@dataclass(frozen=True)
class _PredictedCase:
    """One CT and what the model says of it."""

    name: str
    volume: Volume
    hu: Int16Volume
    """HU (i, j, k)."""
    hu_decision: HuConversion
    grid_affine: Affine
    finding_probabilities: dict[str, float]
    lesion_bits: MaskVolume | None
    """Lesion bits (i, j, k); None when the model has no localizer."""
    report: str | None


def predict_cases(
    source: str | Path, checkpoint: str | Path, out: str | Path, device: str | None = None
) -> list[Path]:
    """Predict on one CT or on every CT below a folder.

    Each case gets a folder in `out`, complete or not at all, with `findings.json`, `index.html` and, where the model
    has the part for it, `lesions.nii.gz` and `report.txt`. In a folder, a file that cannot be used is logged, listed
    with its reason in `out/failed.jsonl`, and the rest goes on.

    Args:
        source: a .nii or .nii.gz, or a folder that is searched through.
        checkpoint: a run's phase folder, or one checkpoint in it.
        out: folder of the results.
        device: by default the GPU if there is one.

    Returns:
        The folders of the cases.

    Raises:
        UserError: nothing to read, no such checkpoint, a single file that cannot be used, no usable one in a folder, or
            a result's folder that exists and holds something else.
    """
    source, out = Path(source), Path(out)
    files = find_volumes(source, leave_out=out)
    names = case_names(files)
    for name in names:
        _refuse_to_replace(out / name)
    opened = Checkpoint.open(checkpoint)
    model = RectVLM.from_checkpoint(opened, device)
    reader = _LoadedModel(model, opened, read_thresholds(opened.folder))
    done: list[Path] = []
    failed: list[dict[str, str]] = []
    out.mkdir(parents=True, exist_ok=True)
    for name, file in zip(names, files, strict=True):
        try:
            case = _predict_case(reader, name, file)
        except UserError as error:
            if source.is_file():
                raise
            log.error("%s", error)
            failed.append({"file": str(file), "reason": str(error)})
            _write_failed(out, failed)
            continue
        done.append(_write_case(reader, case, out))
        log.info("%d of %d: %s", len(done) + len(failed), len(files), done[-1] / PAGE_FILE)
    if not failed:
        (out / FAILED_FILE).unlink(missing_ok=True)
    if not done:
        raise UserError(
            f"None of the {len(files)} files in {source} is a chest CT in HU: see {out / FAILED_FILE} for why."
        )
    return done


def find_volumes(source: Path, leave_out: Path) -> list[Path]:
    """The NIfTI files that a path means, sorted; those below `leave_out` are earlier results, or, where that is the
    path itself, those in the folder of a case.

    Raises:
        UserError: no such path, or a folder without a NIfTI file.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UserError(
            f"{source} does not exist: give a CT (.nii or .nii.gz) or a folder of them."
        )
    results = leave_out.resolve()
    found = [
        path
        for path in sorted(source.rglob("*"))
        if path.name.lower().endswith(NIFTI_SUFFIXES) and path.is_file()
    ]
    if results == source.resolve():
        found = [path for path in found if not _is_case_folder(path.parent)]
    else:
        found = [path for path in found if results not in path.resolve().parents]
    if not found:
        raise UserError(
            f"No .nii or .nii.gz in {source}: convert DICOM series to NIfTI first, for example with dcm2niix."
        )
    return found


def case_names(files: Sequence[Path]) -> list[str]:
    """A folder name for each file: its own name, with those of its folders in front where two would be the same."""
    names = [_strip_nifti_suffix(file) for file in files]
    twice = {name for name, count in Counter(names).items() if count > 1}
    base = Path(os.path.commonpath([file.parent for file in files]))
    long = [
        "_".join([*file.parent.relative_to(base).parts, name])
        for file, name in zip(files, names, strict=True)
    ]
    names = [full if name in twice else name for name, full in zip(names, long, strict=True)]
    seen: Counter[str] = Counter()
    unique = []
    for name in names:
        seen[name] += 1
        unique.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return unique


def canonical_view(array: NDArray[Any], affine: Affine) -> tuple[NDArray[Any], Affine]:
    """A native array (i, j, k) as a view (z, y, x) on the nearest canonical axes, and its affine; nothing is resampled.

    Axes become inferior → superior, anterior → posterior, patient right → left.
    """
    turn = ornt_transform(io_orientation(affine), axcodes2ornt(("S", "P", "L")))
    return apply_orientation(array, turn), affine @ inv_ornt_aff(turn, array.shape)


def _is_case_folder(folder: Path) -> bool:
    """Whether this is a case's folder as it is written here, and nothing but that."""
    if not folder.is_dir() or folder.is_symlink():
        return False
    held = {path.name for path in folder.iterdir()}
    return SUMMARY_FILE in held and held <= {SUMMARY_FILE, PAGE_FILE, MASK_FILE, REPORT_FILE}


def _refuse_to_replace(folder: Path) -> None:
    """Stop before a folder that is not an earlier result is replaced: the CT itself may lie in it.

    Raises:
        UserError: it exists and holds other files, or lacks those of a result.
    """
    if (folder.exists() or folder.is_symlink()) and not _is_case_folder(folder):
        raise UserError(
            f"{folder} would be replaced by a case's results, but it is not an earlier result: expected a new name or "
            f"a folder with {SUMMARY_FILE} and only the files of a case. Choose another --out, or move it away."
        )


def _strip_nifti_suffix(file: Path) -> str:
    name = file.name
    for suffix in NIFTI_SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)] or file.parent.name
    return name


def _predict_case(reader: _LoadedModel, name: str, file: Path) -> _PredictedCase:
    volume = read_volume(file)
    hu, decision = to_hu(volume)
    sample = _make_sample(name, volume, hu, decision, reader.checkpoint.config)
    device = next(reader.model.parameters()).device
    prediction = reader.model.predict_batch(collate_samples([sample]).to(device))
    prediction.require_finite([name])
    grid_affine = np.array(sample.meta.geometry.grid_affine)
    lesions = None
    if reader.model.localizer is not None:
        probabilities = prediction.lesion_probabilities[0].cpu().numpy()
        lesions = mask_to_native(probabilities, grid_affine, volume.array.shape, volume.affine)
    findings = dict(zip(FINDINGS, prediction.finding_probabilities[0].tolist(), strict=True))
    report = prediction.reports[0] if prediction.reports is not None else None
    return _PredictedCase(name, volume, hu, decision, grid_affine, findings, lesions, report)


def _make_sample(
    name: str, volume: Volume, hu: Int16Volume, decision: HuConversion, config: Config
) -> Sample:
    """The CT on the model's grid. Nothing is known of it but its voxels: no labels, no masks, no regions."""
    shape = (volume.array.shape[0], volume.array.shape[1], volume.array.shape[2])
    data = config.data
    grid_affine = canonical_affine(volume.affine, shape, hu, data.grid, data.spacing)
    meta = SampleMeta(
        key=name,
        split="valid",
        source=volume.where,
        patient=name,
        scan=name,
        labels=dict.fromkeys(FINDINGS),
        findings=None,
        impression=None,
        spacing=data.spacing,
        geometry=GridGeometry(grid_affine.tolist(), shape, volume.affine.tolist()),
        hu=decision,
        lesions_annotated=dict.fromkeys((lesion.key for lesion in LESIONS), False),
        regions_source=None,
    )
    ct = resample_to_grid(hu, volume.affine, grid_affine, data.grid, "ct")
    return Sample(ct, np.zeros(data.grid, np.uint8), np.zeros(data.grid, np.uint8), meta)


def _write_case(reader: _LoadedModel, case: _PredictedCase, out: Path) -> Path:
    """Write a case's folder under another name and rename it, so that one that exists is complete."""
    ct, affine = canonical_view(case.hu, case.volume.affine)
    bits = (
        np.zeros_like(ct, np.uint8)
        if case.lesion_bits is None
        else canonical_view(case.lesion_bits, case.volume.affine)[0]
    )
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    places = locate_lesions(
        bits, ct, None, (float(spacing[0]), float(spacing[1]), float(spacing[2]))
    )
    summary = _summarize_case(reader, case, places, spacing)
    lesions, report = summary["lesions"], summary["report"]
    view = CaseView(
        name=case.name,
        ct=ct,
        lesion_bits=bits,
        affine=affine,
        finding_probabilities=case.finding_probabilities,
        thresholds=reader.thresholds,
        volumes_ml=None if lesions is None else {row["key"]: row["volume_ml"] for row in lesions},
        places={place.lesion: place.wording for place in places},
        report_sections=None
        if report is None
        else [(title.title(), text) for title, text in report.items() if text],
        facts=_describe_case(reader, case, ct, affine),
    )
    folder, work = out / case.name, out / f".{case.name}.{os.getpid()}.tmp"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    (work / SUMMARY_FILE).write_text(
        json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    if case.lesion_bits is not None:
        save_mask(case.lesion_bits, case.volume.affine, work / MASK_FILE)
    if case.report is not None:
        note = f"Generated by rectvlm from {Path(case.volume.where).name}. {DISCLAIMER}"
        (work / REPORT_FILE).write_text(f"{case.report.strip()}\n\n[{note}]\n", encoding="utf-8")
    (work / PAGE_FILE).write_text(render_page(view), encoding="utf-8")
    _refuse_to_replace(folder)
    if folder.exists():
        shutil.rmtree(folder)
    work.rename(folder)
    return folder


def save_mask(bits: MaskVolume, affine: Affine, path: Path) -> None:
    """Lesion bits (i, j, k) as one 3-D uint8 NIfTI; the header's description names the bits."""
    image = nib.Nifti1Image(bits, affine, dtype=np.uint8)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = "rectvlm lesion bits, see findings.json"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", MASK_BITS_NOTE.encode()))
    nib.save(image, path)


def _summarize_case(
    reader: _LoadedModel,
    case: _PredictedCase,
    places: list[LesionPlace],
    spacing: NDArray[np.float64],
) -> dict[str, Any]:
    """What `findings.json` holds."""
    cuts = reader.thresholds or {}
    report = None
    if case.report is not None:
        findings, impression = split_report_sections(case.report)
        report = {"findings": findings, "impression": impression}
    return {
        "disclaimer": DISCLAIMER,
        "file": case.volume.where,
        "shape": list(case.volume.array.shape),
        "spacing_zyx_mm": [round(float(step), 4) for step in spacing],
        "hu": asdict(case.hu_decision),
        "checkpoint": str(reader.checkpoint.folder),
        "config": reader.checkpoint.config.name,
        "step": reader.checkpoint.training.step,
        "version": version("rectvlm"),
        "findings": {
            name: {
                "probability": round(probability, 4),
                "threshold": cuts.get(name),
                "present": probability >= cuts[name] if name in cuts else None,
            }
            for name, probability in case.finding_probabilities.items()
        },
        "lesions": None if case.lesion_bits is None else _lesion_rows(case, places),
        "report": report,
    }


def _lesion_rows(case: _PredictedCase, places: list[LesionPlace]) -> list[dict[str, Any]]:
    """One row a lesion, with its volume on the native grid; a speck too small to place has no place."""
    assert case.lesion_bits is not None
    voxel_ml = abs(float(np.linalg.det(case.volume.affine[:3, :3]))) / 1000
    by_key = {place.lesion: place for place in places}
    rows = []
    for lesion in LESIONS:
        voxels = int(np.count_nonzero(lesion_mask(case.lesion_bits, lesion)))
        place = by_key.get(lesion.key)
        rows.append(
            {
                "key": lesion.key,
                "name": lesion.name,
                "mask_value": lesion.mask_value,
                "voxels": voxels,
                "volume_ml": voxels * voxel_ml,
                "place": place.wording if place else None,
                "side": place.side if place else None,
                "basis": place.basis if place else None,
            }
        )
    return rows


def _describe_case(
    reader: _LoadedModel, case: _PredictedCase, ct: Int16Volume, affine: Affine
) -> list[tuple[str, str]]:
    data = reader.checkpoint.config.data
    z, y, x = np.linalg.norm(affine[:3, :3], axis=0)
    seen = _describe_seen_slices(ct, affine, case.grid_affine, data.grid)
    grid, step = " × ".join(map(str, data.grid)), " × ".join(f"{mm:g}" for mm in data.spacing)
    return [
        ("File", Path(case.volume.where).name),
        (
            "Volume",
            f"{' × '.join(map(str, ct.shape[::-1]))} voxels of {x:.2f} × {y:.2f} × {z:.2f} mm (x, y, z)",
        ),
        ("Hounsfield units", case.hu_decision.reason[:1].upper() + case.hu_decision.reason[1:]),
        ("Seen by the model", f"{seen}, on a grid of {grid} voxels of {step} mm (z, y, x)"),
        (
            "Model",
            f"{reader.checkpoint.config.name}, {reader.checkpoint.folder}, step {reader.checkpoint.training.step}, rectvlm {version('rectvlm')}",
        ),
    ]


def _describe_seen_slices(
    ct: Int16Volume, affine: Affine, grid_affine: Affine, grid: tuple[int, int, int]
) -> str:
    """Which slices' centres lie in the model's grid: a scan longer than the grid is cut."""
    depth, height, width = ct.shape
    middle = np.array([[z, (height - 1) / 2, (width - 1) / 2, 1] for z in range(depth)]).T
    on_grid = (np.linalg.inv(grid_affine) @ affine @ middle)[0]
    inside = np.flatnonzero((on_grid > -0.5) & (on_grid < grid[0] - 0.5))
    return (
        f"slices {inside[0] + 1} to {inside[-1] + 1} of {depth}"
        if inside.size
        else f"none of the {depth} slices"
    )


def _write_failed(out: Path, failed: list[dict[str, str]]) -> None:
    with atomic_file(out / FAILED_FILE) as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in failed).encode())
