"""Patches of air outside the body: found, left out, and without influence on anything else."""

import pytest
import torch
from torch import Tensor

from rectvlm import pretrained
from rectvlm.config import Config
from rectvlm.models import RectVLM, slice_region_encoder
from rectvlm.models.attention_unet import OUTSIDE_LOGIT
from rectvlm.models.image_features import ImageFeatures
from rectvlm.models.localizer import LocalizerOutput
from rectvlm.models.prompt_embeddings import PromptEmbeddings
from rectvlm.models.slice_region_encoder import SliceRegionEncoder
from rectvlm.models.tissue_patches import (
    TissuePatches,
    assume_tissue_share,
    find_slice_places,
    find_tissue_boxes,
    find_tissue_patches,
    pack_all,
    pack_patches,
)

PATCH = (4, 8, 8)


@pytest.fixture(scope="module")
def prompts(tiny: Config) -> PromptEmbeddings:
    return PromptEmbeddings.from_text_encoder(
        pretrained.resolve_model(tiny.text.model), tiny.text.max_tokens
    )


def make_body(grid: tuple[int, int, int], margin: int, seed: int = 0) -> Tensor:
    """Noisy tissue (1, Z, Y, X) with `margin` voxels of air at each side of its slices."""
    generator = torch.Generator().manual_seed(seed)
    ct = torch.full((1, *grid), -1000.0)
    inside = ct[:, :, margin : grid[1] - margin, margin : grid[2] - margin]
    inside.copy_(torch.randint(-700, 200, inside.shape, generator=generator))
    return ct + 20 * torch.randn(ct.shape, generator=generator).clamp(-3, 3)


def marked(tissue: TissuePatches, count: int) -> Tensor:
    ones = torch.ones(*tissue.numbers.shape, 1)
    return tissue.unpack(ones, count)[..., 0] > 0


def test_air_that_reaches_the_border_is_outside_and_air_in_the_lungs_is_not() -> None:
    ct = make_body((8, 64, 64), margin=8)
    ct[:, :, 24:40, 24:40] = -1000  # a bulla of four patches
    found = marked(find_tissue_patches(ct, PATCH), 2 * 8 * 8).view(2, 8, 8)
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[1:7, 1:7] = True
    assert torch.equal(found, expected.expand(2, 8, 8))


def test_air_is_left_out_however_far_the_body_is_from_the_border() -> None:
    found = find_tissue_patches(make_body((4, 64, 64), margin=24), PATCH)
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[3:5, 3:5] = True
    assert torch.equal(marked(found, 64).view(8, 8), expected)


def test_air_does_not_leak_between_diagonal_neighbours() -> None:
    ct = torch.full((1, 4, 24, 24), 0.0)
    ct[:, :, :8, :8] = ct[:, :, 8:16, 8:16] = -1000
    found = marked(find_tissue_patches(ct, PATCH), 9).view(3, 3)
    assert not found[0, 0] and found[1, 1] and found.sum() == 8


def test_one_voxel_of_tissue_keeps_a_patch() -> None:
    ct = torch.full((1, 4, 16, 16), -1000.0)
    ct[0, 3, 15, 0] = -400
    assert marked(find_tissue_patches(ct, PATCH), 4).tolist() == [[False, False, True, False]]


def test_air_alone_and_tissue_alone_have_features_too(tiny: Config) -> None:
    encoder = SliceRegionEncoder(tiny.encoder, tiny.data).eval()
    known = torch.tensor([True, False])
    regions = torch.ones(2, *tiny.data.grid, dtype=torch.uint8)
    for value in (-1000, 40):
        features = encoder(torch.full((2, *tiny.data.grid), value), regions, known)
        assert all(torch.isfinite(tensor).all() for tensor in features[:3])


def test_packing_and_unpacking_is_the_identity_on_tissue() -> None:
    tissue = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) > 0.5
    tissue[1] = True
    packed = pack_patches(tissue)
    assert packed.has_filler and packed.numbers.shape == (3, 40)
    x = torch.randn(3, 40, 5)
    y = packed.unpack(packed.pack(x), 40, air=7.0)
    torch.testing.assert_close(y, torch.where(tissue[..., None], x, 7.0))


def encode(encoder: SliceRegionEncoder, ct: Tensor, known: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    regions = torch.randint(0, 21, ct.shape[1:], generator=generator).to(torch.uint8)
    features = encoder(ct, regions.expand(ct.shape), torch.full((len(ct),), known))
    return [features.global_token, features.patches, features.region_tokens]


def test_laying_out_by_slice_and_back_is_the_identity_on_tissue() -> None:
    slices, per_slice = 3, 40
    tissue = torch.rand(2, slices * per_slice, generator=torch.Generator().manual_seed(0)) > 0.6
    tissue[0, :per_slice] = False  # a slice of air
    packed = pack_patches(tissue)
    slice_index = packed.numbers // per_slice
    places = find_slice_places(packed, slice_index, (slices, 5, 8))
    marks = torch.cat([torch.full((2, 1), 8), slice_index, torch.full((2, 2), 9)], dim=1)
    rows = places.lay_out(marks[..., None], 1, 2)[..., 0].unflatten(0, (2, slices))
    assert (rows[..., 0] == 8).all() and (rows[..., -2:] == 9).all()
    rows = rows[..., 1:-2]
    for case in range(2):
        for number in range(slices):
            found = rows[case, number][~places.is_empty[case, number]]
            assert len(found) == tissue[case].view(slices, -1)[number].sum()
            assert (found == number).all()
    x = torch.randn(2, packed.numbers.shape[1], 7)
    back = places.collect(places.lay_out(x, 0, 0))
    assert torch.equal(back[packed.is_tissue], x[packed.is_tissue])


@pytest.fixture(params=[1, 2], ids=["volume", "slices and volume"])
def encoder(tiny: Config, request: pytest.FixtureRequest) -> SliceRegionEncoder:
    torch.manual_seed(0)
    config = tiny.encoder.model_copy(update={"volume_every": request.param})
    encoder = SliceRegionEncoder(config, tiny.data).eval()
    for block in encoder.blocks:
        torch.nn.init.normal_(block.attention.slice_bias)
    return encoder


@pytest.mark.parametrize("known", [True, False])
def test_leaving_air_out_equals_attending_to_everything_but_air(
    encoder: SliceRegionEncoder, tiny: Config, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ct = make_body(tiny.data.grid, margin=8)
    packed = encode(encoder, ct, known)

    def keep_all(ct: Tensor, patch: tuple[int, int, int]) -> TissuePatches:
        """All patches, those of air masked."""
        tissue = find_tissue_patches(ct, patch)
        count = 4 * 6 * 6
        everything = pack_all(torch.empty(1, count, 1))
        return TissuePatches(everything.numbers, marked(tissue, count), has_filler=True)

    monkeypatch.setattr(slice_region_encoder, "find_tissue_patches", keep_all)
    torch.testing.assert_close(packed, encode(encoder, ct, known), rtol=1e-4, atol=1e-5)
    assert packed[1].eq(0).all(-1).any() and not packed[1].eq(0).all(-1).all()


def test_a_case_has_the_same_features_beside_a_larger_patient(
    encoder: SliceRegionEncoder, tiny: Config
) -> None:
    thin, large = (make_body(tiny.data.grid, margin, seed) for margin, seed in ((16, 1), (0, 2)))
    alone = encode(encoder, thin)
    together = encode(encoder, torch.cat([thin, large]))
    torch.testing.assert_close(alone, [x[:1] for x in together], rtol=1e-4, atol=1e-5)


def test_the_masks_of_a_case_are_the_same_beside_a_larger_patient(
    tiny: Config, prompts: PromptEmbeddings
) -> None:
    torch.manual_seed(0)
    model = RectVLM(tiny, ("encoder", "classifier", "localizer"), prompts).eval()
    assert model.localizer is not None
    thin, large = (make_body(tiny.data.grid, margin, seed) for margin, seed in ((16, 1), (0, 2)))
    regions = torch.zeros(2, *tiny.data.grid, dtype=torch.uint8)
    known = torch.tensor([False, False])
    with torch.no_grad():
        both = torch.cat([thin, large])
        features = model.encoder(both, regions, known)
        together = model.localizer(both, features, prompts)
        alone = model.localizer(thin, model.encoder(thin, regions[:1], known[:1]), prompts)
    for name in ("mask_logits", "patch_logits", "alignment_logits"):
        torch.testing.assert_close(
            getattr(alone, name), getattr(together, name)[:1], rtol=1e-4, atol=1e-4
        )
    air = features.patches[0].eq(0).all(-1).view(4, 6, 6)
    assert air.any() and together.patch_logits[0][:, air].max() == -10
    # A mark interpolated from a neighbour may reach into air by one patch, not farther.
    assert together.mask_logits[0, :, :, :4].max() < -5


def test_boxes_are_those_of_each_sample() -> None:
    tissue = torch.zeros(3, 2, 5, 6, dtype=torch.bool)
    tissue[0, 1, 2, 3] = tissue[0, 1, 4, 1] = True
    tissue[1] = True
    packed = pack_patches(tissue.flatten(1))
    whole = (slice(0, 2), slice(0, 5), slice(0, 6))
    expected = [(slice(1, 2), slice(2, 5), slice(1, 4)), whole, whole]
    assert find_tissue_boxes(packed, (2, 5, 6)) == expected
    assert find_tissue_boxes(pack_all(torch.empty(2, 60, 1)), (2, 5, 6)) == [whole, whole]


def test_the_masks_are_those_of_the_ct_cut_to_the_body(
    tiny: Config, prompts: PromptEmbeddings
) -> None:
    """Logits and gradients; around the body there is nothing, whatever the air holds."""
    torch.manual_seed(0)
    model = RectVLM(tiny, ("encoder", "classifier", "localizer"), prompts).eval()
    localizer = model.localizer
    assert localizer is not None
    ct = make_body(tiny.data.grid, margin=16)
    regions = torch.zeros(1, *tiny.data.grid, dtype=torch.uint8)
    features = model.encoder(ct, regions, torch.tensor([False]))
    patches = features.patches.detach().unflatten(1, (4, 6, 6))[:, :, 2:4, 2:4].flatten(1, 3)
    cut = ImageFeatures(features.global_token, patches, features.region_tokens, (4, 2, 2), patches)
    inside = (slice(None), slice(None), slice(None), slice(16, 32), slice(16, 32))

    def draw(ct: Tensor, features: ImageFeatures) -> tuple[LocalizerOutput, Tensor]:
        localizer.zero_grad()
        output = localizer(ct, features, prompts)
        output.mask_logits.square().sum().backward(retain_graph=True)
        gradient = localizer.unet.stem.conv.weight.grad
        assert gradient is not None
        return output, gradient.clone()

    noisy_air = torch.where(ct < -900, ct + 40, ct)
    whole, gradient = draw(noisy_air, features)
    expected, expected_gradient = draw(noisy_air[:, :, 16:32, 16:32], cut)
    torch.testing.assert_close(
        whole.mask_logits[inside], expected.mask_logits, rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-4)
    outside = torch.ones_like(whole.mask_logits, dtype=torch.bool)
    outside[inside] = False
    assert (whole.mask_logits[outside] == OUTSIDE_LOGIT).all()
    half = whole.half_mask_logits
    assert half.shape[2:] == (16, 24, 24)
    body = half[:, :, :, 8:16, 8:16]
    torch.testing.assert_close(body, expected.half_mask_logits, rtol=1e-4, atol=1e-4)
    assert (half == OUTSIDE_LOGIT).sum() == half.numel() - body.numel()


def test_noise_and_its_loss_are_those_of_tissue(tiny: Config, prompts: PromptEmbeddings) -> None:
    """Denoising is not taught on air."""
    torch.manual_seed(0)
    model = RectVLM(tiny, ("encoder", "classifier", "localizer"), prompts).train()
    assert model.localizer is not None
    ct = make_body(tiny.data.grid, margin=16)
    regions = torch.zeros(1, *tiny.data.grid, dtype=torch.uint8)
    features = model.encoder(ct, regions, torch.tensor([False]))
    model.localizer.denoiser.clean.weight.data.zero_()
    model.localizer.denoiser.clean.bias.data.zero_()
    loss = model.localizer(ct, features, prompts).denoising_loss
    tissue = features.patches[0][~features.patches[0].eq(0).all(-1)]
    torch.testing.assert_close(loss, tissue.square().mean())


def test_without_values_there_is_tissue_alone_or_the_share_that_is_assumed() -> None:
    ct = torch.zeros(2, 8, 64, 64, device="meta")
    assert find_tissue_patches(ct, PATCH).numbers.shape == (2, 128)
    with assume_tissue_share(0.6):
        tissue = find_tissue_patches(ct, PATCH)
        assert tissue.numbers.shape == (2, 80)
        # 0.6 · 1.3 of the eight rows.
        assert find_tissue_boxes(tissue, (2, 8, 8))[1] == (slice(0, 2), slice(0, 6), slice(0, 8))
    assert find_tissue_patches(ct, PATCH).numbers.shape == (2, 128)
