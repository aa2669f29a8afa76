"""Prediction on cases of shards, whose truth is known: their pages show both side by side.

Command: `rectvlm predict data/shards/demo --keys phantom_100001 --checkpoint … --out …`
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rectvlm.checkpoint import Checkpoint
from rectvlm.data.canonical_grid import mask_to_native
from rectvlm.data.dataset import collate_samples
from rectvlm.data.shards import SampleLocation, ShardIndex, read_index, read_sample
from rectvlm.data.store import ShardStore
from rectvlm.files import require_writable_folder
from rectvlm.finding_thresholds import FindingThresholds
from rectvlm.labels import FINDINGS
from rectvlm.predict.case import LoadedModel, PredictedCase
from rectvlm.predict.case_folder import (
    refuse_to_replace,
    remove_stale_folders,
    write_case_folder,
)
from rectvlm.predict.case_page import CaseTruth
from rectvlm.types import Sample, UserError, Volume


def predict_shard_cases(
    shards: str,
    keys: Sequence[str],
    checkpoint: str | Path,
    out: str | Path,
    device: str | None = None,
    thresholds: str | Path | None = None,
) -> list[Path]:
    """Predict on cases of shards; write their folders, whose pages show the truth too.

    Args:
        shards: folder or URL of shards.
        keys: keys of the cases.
        checkpoint: a run's phase folder, a checkpoint or an exported model.
        out: folder of the results.
        device: device of the model, by default the GPU if there is one.
        thresholds: file of thresholds for calls and prompts; by default those of the model.

    Returns:
        The folders of the cases.

    Raises:
        UserError: there are no shards, no such case or no such checkpoint, the shards have another
            grid than the model, or a folder exists and holds something else.
    """
    store, out = ShardStore(shards), Path(out)
    index = read_index(store)
    locations = [_find_location(index, key, store) for key in keys]
    for key in keys:
        refuse_to_replace(out / key)
    opened = Checkpoint.open(checkpoint)
    data = opened.config.data
    if tuple(index.grid) != data.grid or not np.allclose(index.spacing, data.spacing):
        raise UserError(
            f"Shards in {store} have grid {tuple(index.grid)} at {tuple(index.spacing)} mm, but "
            f"the model was trained on {data.grid} at {data.spacing} mm: give the shards that it "
            "was trained on."
        )
    own_thresholds = None if thresholds is None else FindingThresholds.read(Path(thresholds))
    require_writable_folder(out)
    remove_stale_folders(out)
    loaded = LoadedModel.open(opened, device, own_thresholds)
    folders = []
    for location in locations:
        case, truth = predict_sample(loaded, read_sample(store, location))
        folders.append(write_case_folder(loaded, case, out, truth))
    return folders


def _find_location(index: ShardIndex, key: str, store: ShardStore) -> SampleLocation:
    for location in index.select_split(None):
        if location.key == key:
            return location
    raise UserError(
        f"Shards in {store} have no case {key!r}: expected a key such as "
        f"{index.select_split(None)[0].key}; the cases.jsonl of an evaluation lists them."
    )


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
