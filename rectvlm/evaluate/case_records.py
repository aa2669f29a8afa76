"""Case records: prediction and truth of one volume, reduced to what the metrics need."""

from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter

from rectvlm.evaluate.native_grid import TruthSource, lesions_to_native_grid
from rectvlm.evaluate.options import LESION_THRESHOLD, EvaluationOptions
from rectvlm.labels import FINDINGS, LESIONS
from rectvlm.metrics.lesion_overlap import count_lesion_voxels
from rectvlm.metrics.lesions import LesionComparison, compare_lesion_masks
from rectvlm.models import RectVLM
from rectvlm.types import (
    OWN_OUTLINES,
    UNKNOWN_OUTLINES,
    Batch,
    JsonObject,
    MaskVolume,
    SampleMeta,
)

CasePurpose = Literal["fit", "neighbor", "evaluate"]
"""Use of a case: `fit` is a case of the dev or train split on which thresholds are fitted;
`neighbor` one of the train split whose report stands for an evaluated case with like features."""


@dataclass(frozen=True)
class LesionRecord:
    """One annotated lesion of a case."""

    native: LesionComparison
    """Comparison on the native grid, in mm."""
    grid: tuple[int, int, int]
    """Voxels in the intersection, the prediction and the truth on the model's grid."""
    truth: TruthSource
    """Place where the true outline was read."""
    source: str
    """Who or what drew the true outline, in the words of `SampleMeta.lesions_source`."""


@dataclass(frozen=True)
class CaseRecord:
    """One volume of an evaluation; a line of `cases.jsonl`."""

    purpose: CasePurpose
    position: int
    """Number of the case in its split."""
    key: str
    scan: str
    patient: str
    probabilities: list[float]
    """Predicted probabilities of the findings, (18,)."""
    labels: list[int | None]
    """Labels of the findings, (18,), None where unknown."""
    lesions: list[LesionRecord | None]
    """Five lesions, None where not annotated; empty where the model has no localizer."""
    reference: str | None
    """Report of the radiologist."""
    generated: str | None
    """Report of the model; None where no report was asked for."""
    without_image: str | None
    """Report of the model on a volume of air."""
    regions: str | None
    """Source of the region map that the model was given; None where it had none."""
    features: list[float] | None = None
    """Global token of the encoder, (C,); None where no reports are evaluated."""

    def as_dict(self) -> JsonObject:
        """Tree for JSON."""
        return asdict(self)


CASE_RECORD_ADAPTER = TypeAdapter(CaseRecord)


def evaluate_batch(
    model: RectVLM,
    batch: Batch,
    positions: list[int],
    purpose: CasePurpose,
    options: EvaluationOptions,
) -> list[CaseRecord]:
    """Predict a batch and compare it with the truth.

    Args:
        model: in eval mode, on its device.
        batch: on the CPU.
        positions: number of each of its samples in the split.
        purpose: with any but `evaluate`, lesions and reports are left out.
        options: options of the evaluation.

    Raises:
        UserError: The model's output is not finite, or a file of outlines cannot be used.
    """
    if options.hide_regions:
        batch = replace(batch, regions_known=torch.zeros_like(batch.regions_known))
    device_batch = batch.to(next(model.parameters()).device)
    limit = options.report_limit
    is_evaluated = purpose == "evaluate"
    localize = is_evaluated and model.localizer is not None
    # Reports are generated for the whole batch or for none of it, so that what a batch holds does
    # not depend on the cases that were evaluated before.
    generate = is_evaluated and options.reports and model.has_generator
    generate = generate and (limit is None or positions[0] < limit)
    prediction = model.predict_batch(device_batch, generate=generate, localize=localize)
    prediction.require_finite(batch.keys)
    generated = prediction.reports
    without_image = None
    if generate:
        control = model.predict_batch(device_batch, generate=True, ablate_image=True)
        without_image = control.reports

    has_baselines = options.reports and model.has_generator
    probabilities = prediction.finding_probabilities.float().cpu().numpy()
    records = []
    for i, meta in enumerate(batch.metas):
        lesions: list[LesionRecord | None] = []
        if localize:
            lesion_probabilities = prediction.lesion_probabilities[i].float().cpu().numpy()
            lesions = _compare_lesions(
                lesion_probabilities, batch.lesions[i].numpy(), meta, options
            )
        has_report = generate and (limit is None or positions[i] < limit)
        record = CaseRecord(
            purpose=purpose,
            position=positions[i],
            key=meta.key,
            scan=meta.scan,
            patient=meta.patient,
            probabilities=probabilities[i].tolist(),
            labels=[meta.labels[name] for name in FINDINGS],
            lesions=lesions,
            reference=batch.reports[i],
            generated=generated[i] if has_report and generated else None,
            without_image=without_image[i] if has_report and without_image else None,
            regions=meta.regions_source if batch.regions_known[i] else None,
            features=prediction.global_tokens[i].tolist() if has_baselines else None,
        )
        records.append(record)
    return records


def _compare_lesions(
    probabilities: NDArray[np.float32],
    truth: MaskVolume,
    meta: SampleMeta,
    options: EvaluationOptions,
) -> list[LesionRecord | None]:
    """Compare the annotated lesions of one case on the model's grid and on its native one."""
    records: list[LesionRecord | None] = [None] * len(LESIONS)
    annotated = [lesion for lesion in LESIONS if meta.lesions_annotated[lesion.key]]
    if not annotated:
        return records

    voxel_counts = count_lesion_voxels(probabilities >= LESION_THRESHOLD, truth)
    native = lesions_to_native_grid(probabilities, truth, meta, annotated, options.truth)
    for lesion in annotated:
        predicted_mask, true_mask = native.extract_masks(lesion)
        comparison = compare_lesion_masks(
            predicted_mask, true_mask, native.spacing_mm, options.surface_tolerance
        )
        both, predicted, true = (int(count) for count in voxel_counts[lesion.bit])
        place = native.truth_sources[lesion.key]
        source = meta.lesions_source[lesion.key] or UNKNOWN_OUTLINES
        if place == "file":
            source = OWN_OUTLINES
        records[lesion.bit] = LesionRecord(comparison, (both, predicted, true), place, source)
    return records
