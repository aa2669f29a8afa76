"""Lesions on the native grid, in any orientation of the file, with outlines from files."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import phantom_sample, write_nifti
from numpy.typing import NDArray

from rectvlm.config import Config
from rectvlm.data.canonical_grid import mask_to_native
from rectvlm.evaluate.native_grid import lesions_to_native_grid
from rectvlm.labels import LESIONS, N_LESIONS
from rectvlm.lesion_bits import lesion_mask, present_lesions, unpack_lesions
from rectvlm.metrics.lesions import compare_lesion_masks
from rectvlm.phantom.phantom import make_phantom
from rectvlm.types import GridGeometry, Sample, SampleMeta, UserError

SEED = 8
ANNOTATED = LESIONS


def soft(bits: NDArray[np.uint8], seed: int = 0) -> NDArray[np.float32]:
    """Probabilities that are right, mostly: (5, z, y, x)."""
    rng = np.random.default_rng(seed)
    masks = unpack_lesions(bits)
    unsure = rng.normal(0.12, 0.12, masks.shape)
    return np.clip(np.where(masks, 0.7 + unsure, np.minimum(unsure, 0.45)), 0, 1).astype(np.float32)


def turned(
    meta: SampleMeta, axes: tuple[int, int, int], flips: tuple[bool, bool, bool]
) -> SampleMeta:
    """The same CT with the axes of its file in another order and direction."""
    shape, affine = np.array(meta.geometry.native_shape), np.array(meta.geometry.native_affine)
    change = np.zeros((4, 4))
    change[3, 3] = 1
    for new, (old, flip) in enumerate(zip(axes, flips, strict=True)):
        change[old, new] = -1 if flip else 1
        change[old, 3] = shape[old] - 1 if flip else 0
    i, j, k = (int(shape[axis]) for axis in axes)
    return replace(
        meta,
        geometry=GridGeometry(meta.geometry.grid_affine, (i, j, k), (affine @ change).tolist()),
    )


@pytest.fixture(scope="module")
def sample(tiny: Config) -> Sample:
    one = phantom_sample(SEED, tiny, "valid")
    assert np.unique(one.lesions).size > 2, "the phantom should hold several lesions"
    return one


@pytest.mark.parametrize(
    ("axes", "flips"),
    [
        ((0, 1, 2), (False, False, False)),
        ((2, 0, 1), (True, False, True)),
        ((1, 0, 2), (True,) * 3),
    ],
)
def test_the_window_holds_what_prediction_writes(
    sample: Sample, axes: tuple[int, int, int], flips: tuple[bool, bool, bool]
) -> None:
    meta = turned(sample.meta, axes, flips)
    geometry = meta.geometry
    probabilities = soft(sample.lesions)
    affines = (
        np.array(geometry.grid_affine),
        geometry.native_shape,
        np.array(geometry.native_affine),
    )
    whole, true = mask_to_native(probabilities, *affines), mask_to_native(sample.lesions, *affines)
    found = lesions_to_native_grid(probabilities, sample.lesions, meta, ANNOTATED)
    assert np.prod(found.truth.shape) < np.prod(geometry.native_shape)
    spacing = np.linalg.norm(affines[2][:3, :3], axis=0)
    assert found.spacing_mm == pytest.approx(spacing)
    for lesion in LESIONS:
        predicted, truth = found.extract_masks(lesion)
        bits = [lesion_mask(mask, lesion) for mask in (whole, true)]
        assert compare_lesion_masks(predicted, truth, found.spacing_mm) == compare_lesion_masks(
            bits[0], bits[1], spacing.tolist()
        )
        assert (predicted.sum(), truth.sum()) == (bits[0].sum(), bits[1].sum())


def test_of_two_lesions_far_apart_the_unsure_one_counts_too(sample: Sample) -> None:
    probabilities = np.zeros((N_LESIONS, *sample.lesions.shape), np.float32)
    probabilities[0, :4, :12, :12], probabilities[0, -4:, -12:, -12:] = 0.9, 0.55
    geometry = sample.meta.geometry
    native_affine = np.array(geometry.native_affine)
    whole = mask_to_native(
        probabilities, np.array(geometry.grid_affine), geometry.native_shape, native_affine
    )
    found = lesions_to_native_grid(
        probabilities, np.zeros_like(sample.lesions), sample.meta, ANNOTATED
    )
    assert np.count_nonzero(found.predicted) == np.count_nonzero(whole) > 0


def test_a_perfect_prediction_is_perfect_and_a_mirrored_one_is_not(sample: Sample) -> None:
    masks = unpack_lesions(sample.lesions).astype(np.float32)
    found, mirrored = (
        lesions_to_native_grid(one, sample.lesions, sample.meta, ANNOTATED)
        for one in (masks, masks[..., ::-1].copy())
    )
    sided = 0
    for lesion in LESIONS:
        predicted, truth = found.extract_masks(lesion)
        assert np.array_equal(predicted, truth)
        if truth.any():
            one = compare_lesion_masks(predicted, truth, found.spacing_mm)
            assert (one.hd95_mm, one.surface_dice, one.parts_matched) == (0.0, 1.0, one.parts_true)
            other = compare_lesion_masks(*mirrored.extract_masks(lesion), mirrored.spacing_mm)
            sided += 2 * other.both < 0.2 * (other.predicted + other.truth)
    assert sided


def test_volumes_on_the_native_grid_are_those_of_the_patient(sample: Sample) -> None:
    found = lesions_to_native_grid(soft(sample.lesions), sample.lesions, sample.meta, ANNOTATED)
    grid_ml = np.prod(sample.meta.spacing)
    for lesion in LESIONS:
        voxels = np.count_nonzero(lesion_mask(sample.lesions, lesion))
        if voxels > 20:
            native = found.extract_masks(lesion)[1].sum() * np.prod(found.spacing_mm)
            assert native == pytest.approx(voxels * grid_ml, rel=0.25)


def test_what_was_not_annotated_stays_out(sample: Sample) -> None:
    wanted = [lesion for lesion in LESIONS if lesion.key == "lung_nodule"]
    found = lesions_to_native_grid(
        np.ones((N_LESIONS, *sample.lesions.shape), np.float32), sample.lesions, sample.meta, wanted
    )
    assert set(np.unique(found.predicted)) <= {0, 16} and set(np.unique(found.truth)) <= {0, 16}
    assert found.predicted.any() and found.truth_sources == {"lung_nodule": "shard"}


def test_nothing_found_and_nothing_there(sample: Sample) -> None:
    empty = np.zeros_like(sample.lesions)
    found = lesions_to_native_grid(soft(empty) * 0, empty, sample.meta, ANNOTATED)
    assert not found.predicted.any() and not found.truth.any() and found.truth.size


def test_outlines_from_files_are_the_truth_where_they_are_at_hand(
    sample: Sample, tmp_path: Path
) -> None:
    phantom = make_phantom(SEED)
    present = present_lesions(phantom.lesions)
    one, other = present[:2]
    key = sample.meta.key
    (tmp_path / key).mkdir()
    mask = lesion_mask(phantom.lesions, one).astype(np.uint8)
    # The same voxels in a file whose axes run otherwise.
    flip = np.diag([-1.0, 1, 1, 1])
    flip[0, 3] = mask.shape[0] - 1
    write_nifti(
        np.ascontiguousarray(mask[::-1]),
        phantom.affine @ flip,
        tmp_path / key / f"{one.key}.nii.gz",
    )
    found = lesions_to_native_grid(
        soft(sample.lesions), sample.lesions, sample.meta, [one, other], tmp_path
    )
    assert found.truth_sources == {one.key: "file", other.key: "shard"}
    predicted, truth = found.extract_masks(one)
    assert truth.sum() == mask.sum()
    places = np.argwhere(mask).mean(axis=0) - np.argwhere(truth).mean(axis=0)
    assert np.allclose(places, np.rint(places)) and (places >= 0).all()  # the window's corner
    assert np.array_equal(found.extract_masks(other)[1].sum(), mask_to_native(
        sample.lesions, np.array(sample.meta.geometry.grid_affine), phantom.hu.shape, phantom.affine
    ).__rshift__(other.bit).__and__(1).sum())  # fmt: skip
    assert compare_lesion_masks(predicted, truth, found.spacing_mm).both > 0


@pytest.mark.parametrize(
    ("shift", "words"),
    [(3000, "does not lie on its volume"), (160, "hardly lies on its volume"), (None, "blank")],
)
def test_a_file_that_lies_elsewhere_or_nowhere_is_refused(
    sample: Sample, tmp_path: Path, shift: float | None, words: str
) -> None:
    phantom = make_phantom(SEED)
    affine = np.eye(4) if shift is None else phantom.affine.copy()
    affine[:3, 3] += shift or 0
    (tmp_path / sample.meta.key).mkdir()
    path = tmp_path / sample.meta.key / "lung_nodule.nii.gz"
    write_nifti((phantom.lesions >> 4 & 1).astype(np.uint8), affine, path)
    with pytest.raises(UserError, match=words):
        lesions_to_native_grid(
            soft(sample.lesions), sample.lesions, sample.meta, ANNOTATED, tmp_path
        )
