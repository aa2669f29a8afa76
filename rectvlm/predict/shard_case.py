"""Prediction on a case of a shard, whose truth is known: its page shows both side by side."""

import numpy as np

from rectvlm.data.canonical_grid import mask_to_native
from rectvlm.data.dataset import collate_samples
from rectvlm.labels import FINDINGS
from rectvlm.predict.case import LoadedModel, PredictedCase
from rectvlm.predict.case_page import CaseTruth
from rectvlm.types import Sample, Volume


def predict_sample(loaded: LoadedModel, sample: Sample) -> tuple[PredictedCase, CaseTruth]:
    """Predict on a sample; the case's CT is the sample's, on the canonical grid.

    Raises:
        UserError: the model's probabilities are not finite.
    """
    device = next(loaded.model.parameters()).device
    prediction = loaded.model.predict_batch(collate_samples([sample]).to(device))
    prediction.require_finite([sample.meta.key])
    affine = np.array(sample.meta.geometry.grid_affine)
    lesion_bits = None
    if loaded.model.localizer is not None:
        probabilities = prediction.lesion_probabilities[0].cpu().numpy()
        lesion_bits = mask_to_native(probabilities, affine, sample.ct.shape, affine)
    case = PredictedCase(
        name=sample.meta.key,
        volume=Volume(sample.ct, affine, sample.meta.key),
        hu=sample.ct,
        hu_decision=sample.meta.hu,
        grid_affine=affine,
        finding_probabilities=dict(
            zip(FINDINGS, prediction.finding_probabilities[0].tolist(), strict=True)
        ),
        lesion_bits=lesion_bits,
        report=None if prediction.reports is None else prediction.reports[0],
    )
    return case, describe_truth(sample)


def describe_truth(sample: Sample) -> CaseTruth:
    """The outlines, labels and report of a sample, for the page of its case."""
    sections = (("Findings", sample.meta.findings), ("Impression", sample.meta.impression))
    return CaseTruth(
        lesion_bits=sample.lesions,
        lesions_annotated=sample.meta.lesions_annotated,
        labels=sample.meta.labels,
        report_sections=[(title, text) for title, text in sections if text],
    )
