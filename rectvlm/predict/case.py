"""Prediction on one CT: the file on the model's grid, and the results on the grid of the file.

Index order: (i, j, k) as in the file, (z, y, x) canonical.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from rectvlm.checkpoint import Checkpoint
from rectvlm.config import Config
from rectvlm.data.canonical_grid import canonical_affine, mask_to_native, resample_to_grid
from rectvlm.data.dataset import collate_samples
from rectvlm.data.hounsfield import to_hu
from rectvlm.finding_thresholds import FindingThresholds
from rectvlm.labels import FINDINGS, LESIONS
from rectvlm.models import RectVLM
from rectvlm.predict.chest_limits import clear_outside_chest
from rectvlm.predict.ct_source import CtSource
from rectvlm.types import (
    Affine,
    GridGeometry,
    HuConversion,
    Int16Volume,
    MaskVolume,
    Sample,
    SampleMeta,
    Volume,
)


@dataclass(frozen=True)
class LoadedModel:
    """A model with its checkpoint."""

    model: RectVLM
    checkpoint: Checkpoint

    @classmethod
    def open(
        cls,
        checkpoint: Checkpoint,
        device: str | None = None,
        thresholds: FindingThresholds | None = None,
    ) -> Self:
        """Load a model.

        Args:
            checkpoint: of a run or of an exported model.
            device: device of the model, by default the GPU if there is one.
            thresholds: thresholds for calls and prompts; by default those of the model.

        Raises:
            UserError: the weights do not fit.
        """
        model = RectVLM.from_checkpoint(checkpoint, device)
        if thresholds is not None:
            model.thresholds = thresholds
        return cls(model, checkpoint)


@dataclass(frozen=True)
class PredictedCase:
    """One CT and the predictions for it."""

    name: str
    volume: Volume
    hu: Int16Volume
    """HU (i, j, k)."""
    hu_decision: HuConversion
    grid_affine: Affine
    """4 × 4, index (z, y, x, 1) of the model's grid to world, mm."""
    finding_probabilities: dict[str, float]
    lesion_bits: MaskVolume | None
    """Lesion bits (i, j, k); None when the model has no localizer."""
    report: str | None
    """Generated text; None when the model has no report generator."""


def predict_case(loaded: LoadedModel, name: str, source: CtSource) -> PredictedCase:
    """Predict on one CT.

    Raises:
        UserError: the source is no chest CT in HU, or the model's probabilities are not finite.
    """
    volume = source.read(with_headers=True)
    hu, decision = to_hu(volume)
    sample = make_sample(name, volume, hu, decision, loaded.checkpoint.config)
    device = next(loaded.model.parameters()).device
    prediction = loaded.model.predict_batch(collate_samples([sample]).to(device))
    prediction.require_finite([name])

    grid_affine = np.array(sample.meta.geometry.grid_affine)
    lesion_bits = None
    if loaded.model.localizer is not None:
        probabilities = prediction.lesion_probabilities[0].cpu().numpy()
        lesion_bits = mask_to_native(probabilities, grid_affine, volume.array.shape, volume.affine)
        clear_outside_chest(lesion_bits, hu, volume.affine)
    finding_probabilities = prediction.finding_probabilities[0].tolist()
    return PredictedCase(
        name,
        volume,
        hu,
        decision,
        grid_affine,
        dict(zip(FINDINGS, finding_probabilities, strict=True)),
        lesion_bits,
        None if prediction.reports is None else prediction.reports[0],
    )


def make_sample(
    name: str, volume: Volume, hu: Int16Volume, decision: HuConversion, config: Config
) -> Sample:
    """Put a CT on the model's grid, without labels, masks and regions.

    Args:
        name: key of the sample, and of its patient and scan.
        volume: CT as it was read.
        hu: its HU (i, j, k).
        decision: conversion that gave the HU.
        config: configuration with the grid.

    Raises:
        UserError: the volume shows no chest.
    """
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
