"""Predictions for the VLM3D challenge: a folder of CTs to one `results.json`.

Command: `rectvlm challenge /input --task classification --checkpoint MODEL --out results.json`

The formats are those of the challenge's published examples and evaluation
(github.com/forithmus/VLM3D-Dockers). Nothing is written beside the file, and no network is used.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from rectvlm.checkpoint import Checkpoint
from rectvlm.config import ModelPart
from rectvlm.data.volume import strip_suffix
from rectvlm.files import printable_line, require_writable_file, write_json
from rectvlm.labels import LESIONS
from rectvlm.lesion_bits import lesion_mask
from rectvlm.models import RectVLM
from rectvlm.predict.case import LoadedModel, PredictedCase, predict_case
from rectvlm.predict.find_volumes import find_volumes
from rectvlm.types import Affine, JsonObject, UserError

log = logging.getLogger(__name__)

ChallengeTask = Literal["classification", "localization", "reports"]
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_LPS_FROM_RAS = np.array([[-1.0], [-1.0], [1.0]])


@dataclass(frozen=True)
class TaskFormat:
    """How a task's results are written."""

    part: ModelPart
    """Part of the model that the task needs."""
    name_case: Callable[[Path], str]
    """`input_image_name` of a CT."""
    describe_case: Callable[[PredictedCase], JsonObject]
    """Content of a case beside its name."""
    wrap_cases: Callable[[list[JsonObject]], object]
    """Content of the file."""


def write_challenge_results(
    source: Path, checkpoint: str | Path, out: Path, task: ChallengeTask, device: str | None = None
) -> None:
    """Predict on every CT below a folder and write the results of a task.

    The first CT that cannot be used ends the run: the challenge's evaluation fails where a case is
    missing, and a made-up prediction would hide it.

    Args:
        source: a folder of CTs, or a single one; it is only read.
        checkpoint: a run's phase folder, a checkpoint or an exported model.
        out: the file to write.
        task: task of the challenge.
        device: device of the model, by default the GPU if there is one.

    Raises:
        UserError: there is no CT or no such checkpoint, the model lacks the part that the task
            needs, two CTs have one name, or a CT cannot be used.
    """
    task_format = TASK_FORMATS[task]
    found = find_volumes(source, out)
    for path in found.skipped:
        log.warning("skipped: %s %s", printable_line(path.path), printable_line(path.reason))
    names = [task_format.name_case(ct.path) for ct in found.sources]
    _require_unique_names(names, source)
    opened = Checkpoint.open(checkpoint)
    if task_format.part not in opened.parts:
        raise UserError(
            f"{opened.folder} has no {task_format.part}, which the task {task} needs: expected a "
            f"model with it, found {', '.join(opened.parts)}; give one of a later phase."
        )
    require_writable_file(out)
    parts = [part for part in opened.parts if part != "generator" or task == "reports"]
    loaded = LoadedModel(RectVLM.from_checkpoint(opened, device, parts), opened)
    cases = []
    for number, (name, ct) in enumerate(zip(names, found.sources, strict=True), start=1):
        case = predict_case(loaded, name, ct)
        cases.append({"input_image_name": name} | task_format.describe_case(case))
        log.info("%d of %d: %s", number, len(names), printable_line(name))
    write_json(out, task_format.wrap_cases(cases))


def _require_unique_names(names: list[str], source: Path) -> None:
    """Refuse a name that two CTs have, as one of the two predictions would be lost."""
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise UserError(
            f"{source} holds {count} CTs called {name}: expected names that differ, by which the "
            "challenge tells its cases; rename or remove one."
        )


# Names


def _plain_name(path: Path) -> str:
    return strip_suffix(path.name)


def _series_name(path: Path) -> str:
    """Last part of the name that is a UUID: files are called BATCH_PATIENT_SERIES."""
    name = strip_suffix(path.name)
    series = [part for part in name.split("_") if _UUID.fullmatch(part)]
    return series[-1] if series else name


def _file_name(path: Path) -> str:
    return path.name


# Cases


def _describe_findings(case: PredictedCase) -> JsonObject:
    return {"probabilities": case.finding_probabilities}


def _describe_report(case: PredictedCase) -> JsonObject:
    """The report in one line: the evaluation deletes line ends without leaving a space."""
    assert case.report is not None
    return {"report": " ".join(case.report.split())}


def _describe_boxes(case: PredictedCase) -> JsonObject:
    """Boxes around the parts of each lesion, with the probability of the lesion's finding."""
    assert case.lesion_bits is not None
    boxes: JsonObject = {}
    for lesion in LESIONS:
        mask = lesion_mask(case.lesion_bits, lesion)
        probability = case.finding_probabilities[lesion.finding]
        boxes[lesion.name.capitalize().replace("-", " ")] = [
            {"bbox_mm": box, "probability": probability}
            for box in lesion_boxes(mask, case.volume.affine)
        ]
    return boxes


def lesion_boxes(mask: NDArray[np.bool_], affine: Affine) -> list[list[float]]:
    """Boxes around the connected parts of a mask.

    Voxels are connected by their faces. A box encloses the voxels' outer corners along the axes of
    DICOM's world (LPS); its position counts from the lowest corner of the whole volume.

    Args:
        mask: where the lesion is, (i, j, k).
        affine: 4 × 4, index to RAS+ mm.

    Returns:
        Six numbers a box, mm: position x, y, z of its lowest corner, then its sides.
    """
    axes = affine[:3, :3] * _LPS_FROM_RAS
    lowest = np.minimum(0, axes * mask.shape).sum(axis=1)
    parts, _ = ndimage.label(mask)
    boxes = []
    for slices in ndimage.find_objects(parts):
        starts = axes * [index.start for index in slices]
        stops = axes * [index.stop for index in slices]
        low = np.minimum(starts, stops).sum(axis=1)
        high = np.maximum(starts, stops).sum(axis=1)
        boxes.append([*(low - lowest).tolist(), *(high - low).tolist()])
    return boxes


# Files


def _wrap_findings(cases: list[JsonObject]) -> object:
    return {
        "name": "Generated probabilities",
        "type": "Abnormality Classification",
        "version": {"major": 1, "minor": 0},
        "predictions": cases,
    }


def _wrap_boxes(cases: list[JsonObject]) -> object:
    return [{"outputs": [{"type": "predictions", "value": {"predictions": cases}}]}]


def _wrap_reports(cases: list[JsonObject]) -> object:
    content = {
        "name": "Generated reports",
        "type": "Report generation",
        "version": "1.0",
        "generated_reports": cases,
    }
    return [{"outputs": [{"value": content}]}]


TASK_FORMATS: dict[ChallengeTask, TaskFormat] = {
    "classification": TaskFormat("classifier", _plain_name, _describe_findings, _wrap_findings),
    "localization": TaskFormat("localizer", _file_name, _describe_boxes, _wrap_boxes),
    "reports": TaskFormat("generator", _series_name, _describe_report, _wrap_reports),
}
"""Formats as the published example of each task writes them: the platform itself wraps the results
of classification in `outputs`, and those of the others are wrapped in the file."""
