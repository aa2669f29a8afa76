"""One case: what the model says of it, beside what is true, reduced to what the metrics need. A line of JSON each."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter

from rectvlm import metrics
from rectvlm.evaluate.native_grid import TruthSource, lesions_to_native_grid
from rectvlm.evaluate.options import LESION_THRESHOLD, EvaluationOptions
from rectvlm.labels import FINDINGS, LESIONS
from rectvlm.metrics import LesionComparison
from rectvlm.models import RectVLM
from rectvlm.types import Batch, MaskVolume, SampleMeta, UserError

CasePurpose = Literal["fit", "evaluate"]
"""`fit`: a case of the train split, whose probabilities thresholds are fitted on."""


@dataclass(frozen=True)
class LesionRecord:
    """One annotated lesion of a case."""

    native: LesionComparison
    """On the native grid, in mm."""
    grid: tuple[int, int, int]
    """Voxels in the intersection, the prediction and the truth on the model's grid."""
    truth: TruthSource


@dataclass(frozen=True)
class CaseRecord:
    """One volume."""

    purpose: CasePurpose
    position: int
    """Number in its split."""
    key: str
    scan: str
    patient: str
    probabilities: list[float]
    """(18,)."""
    labels: list[int | None]
    """(18,), None where unknown."""
    lesions: list[LesionRecord | None]
    """Five, None where not annotated; empty where the model has no localizer."""
    reference: str | None
    generated: str | None
    """None where no report was asked for."""
    without_image: str | None
    """The same from a volume of air."""
    regions: str | None
    """Where the region map that the model was given came from; None where it had none."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


CASE_RECORD_ADAPTER = TypeAdapter(CaseRecord)


def evaluate_batch(
    model: RectVLM,
    batch: Batch,
    positions: list[int],
    purpose: CasePurpose,
    options: EvaluationOptions,
) -> list[CaseRecord]:
    """Predict on a batch and compare.

    Args:
        model: in eval mode, on its device.
        batch: on the CPU.
        positions: number of each of its samples in the split.
        purpose: with `fit` lesions and reports are left out.
        options: of the evaluation.

    Raises:
        UserError: the model's output is not finite, or a file of outlines cannot be used.
    """
    device = next(model.parameters()).device
    if options.hide_regions:
        batch = replace(batch, regions_known=torch.zeros_like(batch.regions_known))
    on_device = batch.to(device)
    evaluating = purpose == "evaluate"
    wanted = options.reports and model.has_generator and evaluating
    # Of the whole batch or of none, so that what a batch holds does not depend on what was there before.
    limit = options.report_limit
    generate = wanted and (limit is None or positions[0] < limit)
    localize = evaluating and model.localizer is not None
    prediction = model.predict_batch(on_device, generate=generate, localize=localize)
    control = model.predict_batch(on_device, generate=True, ablate_image=True) if generate else None
    prediction.require_finite(batch.keys)
    findings = prediction.finding_probabilities.float().cpu().numpy()
    records = []
    for i, meta in enumerate(batch.metas):
        lesions: list[LesionRecord | None] = []
        if localize:
            lesions = _compare_lesions(
                prediction.lesion_probabilities[i].float().cpu().numpy(),
                batch.lesions[i].numpy(),
                meta,
                options,
            )
        written = generate and (limit is None or positions[i] < limit)
        assert not written or (
            prediction.reports is not None and control is not None and control.reports is not None
        )
        records.append(
            CaseRecord(
                purpose=purpose,
                position=positions[i],
                key=meta.key,
                scan=meta.scan,
                patient=meta.patient,
                probabilities=findings[i].tolist(),
                labels=[meta.labels[name] for name in FINDINGS],
                lesions=lesions,
                reference=batch.reports[i],
                generated=prediction.reports[i] if written and prediction.reports else None,
                without_image=control.reports[i]
                if written and control and control.reports
                else None,
                regions=meta.regions_source if batch.regions_known[i] else None,
            )
        )
    return records


def _compare_lesions(
    probabilities: NDArray[np.float32],
    truth: MaskVolume,
    meta: SampleMeta,
    options: EvaluationOptions,
) -> list[LesionRecord | None]:
    """The annotated lesions of one case, compared on the model's grid and on its native one."""
    wanted = [lesion for lesion in LESIONS if meta.lesions_annotated[lesion.key]]
    if not wanted:
        return [None] * len(LESIONS)
    grid = metrics.count_lesion_voxels(probabilities >= LESION_THRESHOLD, truth)
    native = lesions_to_native_grid(probabilities, truth, meta, wanted, options.truth)
    found: list[LesionRecord | None] = [None] * len(LESIONS)
    for lesion in wanted:
        measured = metrics.compare_lesion_masks(
            *native.extract_masks(lesion), native.spacing_mm, options.surface_tolerance
        )
        both, predicted, true = (int(count) for count in grid[lesion.bit])
        found[lesion.bit] = LesionRecord(
            measured, (both, predicted, true), native.truth_sources[lesion.key]
        )
    return found


def require_truth_folder(folder: Path | None) -> None:
    """Whether the folder of outlines is there.

    Raises:
        UserError: it is not.
    """
    if folder is not None and not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder: --truth expects KEY/LESION.nii.gz in one, as --lesions of preprocessing."
        )
