"""The encoder: exact region shares, known and unknown region maps, windows, and that it reads the
image."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rectvlm.config import Config
from rectvlm.labels import CT_WINDOWS, N_REGIONS
from rectvlm.models.image_features import ImageFeatures, apply_windows
from rectvlm.models.slice_region_encoder import SliceRegionEncoder, compute_region_shares
from rectvlm.models.tissue_patches import find_tissue_patches, pack_all


@pytest.fixture
def encoder(tiny: Config) -> SliceRegionEncoder:
    torch.manual_seed(0)
    return SliceRegionEncoder(tiny.encoder, tiny.data)


@pytest.fixture
def inputs(tiny: Config) -> tuple[Tensor, Tensor]:
    """CT of noise, and regions in blocks that do not follow the patches, of two samples."""
    generator = torch.Generator().manual_seed(1)
    ct = torch.randint(-1024, 600, (2, *tiny.data.grid), generator=generator, dtype=torch.int16)
    blocks = torch.randint(0, N_REGIONS + 1, (2, 1, 4, 4, 4), generator=generator)
    regions = torch.nn.functional.interpolate(blocks.float(), tiny.data.grid, mode="nearest")[
        :, 0
    ].to(torch.uint8)
    return ct, regions


KNOWN = torch.tensor([True, True])


def differ(a: ImageFeatures, b: ImageFeatures) -> tuple[float, float, float]:
    return tuple((x - y).abs().max().item() for x, y in zip(a[:3], b[:3], strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("patch", [(2, 3, 2), (4, 4, 4), (1, 1, 1)])
def test_region_mix_equals_naive_loop(patch: tuple[int, int, int]) -> None:
    shape = tuple(side * count for side, count in zip(patch, (3, 2, 4), strict=True))
    regions = torch.randint(
        0, N_REGIONS + 1, (2, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    mix = compute_region_shares(regions, patch)
    assert mix.shape == (2, 3 * 2 * 4, N_REGIONS + 1)
    pz, py, px = patch
    for b in range(2):
        row = 0
        for z in range(3):
            for y in range(2):
                for x in range(4):
                    cube = regions[
                        b, z * pz : (z + 1) * pz, y * py : (y + 1) * py, x * px : (x + 1) * px
                    ].flatten()
                    wanted = torch.bincount(cube.long(), minlength=N_REGIONS + 1) / cube.numel()
                    torch.testing.assert_close(mix[b, row], wanted)
                    row += 1


def test_a_region_is_the_mean_over_its_voxels(encoder: SliceRegionEncoder) -> None:
    """A small organ is not drowned by the rest of the body; one that the map lacks is told nothing
    of it."""
    assert encoder.patch == (4, 8, 8)
    regions = torch.full((2, 8, 16, 16), 3, dtype=torch.uint8)
    regions[:, 3:5, 6:8, 7:10] = 9  # 12 voxels, in four patches
    known = torch.tensor([True, False])
    tissue = pack_all(torch.empty(2, 8, 1))
    weights = encoder._prepare_context(regions, known, tissue, torch.float32).weights
    values = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0))
    of_voxels = (
        values[0]
        .view(2, 2, 2, 5)
        .repeat_interleave(4, 0)
        .repeat_interleave(8, 1)
        .repeat_interleave(8, 2)
    )
    pooled = weights.mT @ values
    for region in (3, 9):
        torch.testing.assert_close(pooled[0, region - 1], of_voxels[regions[0] == region].mean(0))
    absent = [r for r in range(N_REGIONS) if r + 1 not in (3, 9)]
    assert (weights[0, :, 8] > 0).sum() == 4
    assert not pooled[0, absent].any()
    torch.testing.assert_close(pooled[1], values[1].mean(0).expand(N_REGIONS, -1))


def test_unknown_map_is_not_an_empty_map(
    encoder: SliceRegionEncoder, inputs: tuple[Tensor, Tensor]
) -> None:
    ct, regions = inputs
    empty = torch.zeros_like(regions)
    encoder = encoder.double()
    with torch.no_grad():
        unknown = encoder(ct, empty, torch.tensor([False, False]))
        none = encoder(ct, empty, KNOWN)
    global_token, patches, _ = differ(unknown, none)
    assert global_token > 1e-7  # through the patches, from the second block on
    assert patches > 1e-4


def test_an_unknown_map_is_not_read(
    encoder: SliceRegionEncoder, inputs: tuple[Tensor, Tensor]
) -> None:
    ct, regions = inputs
    known = torch.tensor([True, False])
    with torch.no_grad():
        changed = regions.flip(1)
        changed[1] = 255  # not an id
        first, second = encoder(ct, regions, known), encoder(ct, changed, known)
    assert torch.equal(first.patches[1], second.patches[1])
    assert not torch.allclose(first.patches[0], second.patches[0])


def test_unknown_prior_learns_from_unknown_maps_alone(
    encoder: SliceRegionEncoder, inputs: tuple[Tensor, Tensor]
) -> None:
    def gradient(known: list[bool]) -> Tensor:
        encoder.zero_grad()
        encoder(*inputs, torch.tensor(known)).global_token.square().sum().backward()
        assert encoder.unknown_prior.grad is not None
        return encoder.unknown_prior.grad.clone()

    assert gradient([True, False]).abs().max() > 0
    assert gradient([True, True]).abs().max() == 0


def test_regions_change_features(
    encoder: SliceRegionEncoder, inputs: tuple[Tensor, Tensor]
) -> None:
    ct, regions = inputs
    encoder = encoder.double()
    with torch.no_grad():
        global_token, patches, pooled = differ(
            encoder(ct, regions, KNOWN), encoder(ct, regions.flip(3), KNOWN)
        )
    assert global_token > 1e-7
    assert patches > 1e-4
    assert pooled > 1e-2


def test_another_image_changes_every_feature(
    encoder: SliceRegionEncoder, inputs: tuple[Tensor, Tensor]
) -> None:
    ct, regions = inputs
    with torch.no_grad():
        assert min(differ(encoder(ct, regions, KNOWN), encoder(ct.flip(0), regions, KNOWN))) > 1e-3


def test_samples_of_a_batch_do_not_mix(
    encoder: SliceRegionEncoder, inputs: tuple[Tensor, Tensor]
) -> None:
    ct, regions = inputs
    with torch.no_grad():
        both, alone = encoder(ct, regions, KNOWN), encoder(ct[1:], regions[1:], KNOWN[1:])
    for x, y in zip(both[:3], alone[:3], strict=True):
        torch.testing.assert_close(x[1:], y, rtol=1e-5, atol=1e-5)


def test_patches_see_each_other_across_the_volume(
    encoder: SliceRegionEncoder, inputs: tuple[Tensor, Tensor]
) -> None:
    ct, regions = inputs
    changed = ct.clone()
    changed[:, -4:, -8:, -8:] = 600  # the last patch
    with torch.no_grad():
        before, after = encoder(ct, regions, KNOWN), encoder(changed, regions, KNOWN)
    assert (
        before.patches[:, 0] - after.patches[:, 0]
    ).abs().max() > 1e-6  # the first patch, at the other end


def test_patch_order_is_slices_outermost(
    encoder: SliceRegionEncoder, inputs: tuple[Tensor, Tensor], tiny: Config
) -> None:
    z, y, x = encoder.patch_grid
    assert encoder.patch_slice_indices(encoder.patch_grid, torch.device("cpu")).tolist() == [
        k for k in range(z) for _ in range(y * x)
    ]
    ct, regions = inputs
    with torch.no_grad():
        cell = (1, 2, 3)
        changed = ct.clone()
        lows = [c * p for c, p in zip(cell, tiny.encoder.patch, strict=True)]
        changed[:, lows[0] : lows[0] + 4, lows[1] : lows[1] + 8, lows[2] : lows[2] + 8] += 400
        moved = (
            (encoder(ct, regions, KNOWN).patches - encoder(changed, regions, KNOWN).patches)
            .abs()
            .sum((0, 2))
        )
    assert moved.argmax().item() == (cell[0] * y + cell[1]) * x + cell[2]


def test_shapes_and_grid(
    encoder: SliceRegionEncoder, inputs: tuple[Tensor, Tensor], tiny: Config
) -> None:
    features = encoder(*inputs, KNOWN)
    assert features.patch_grid == (4, 6, 6)
    assert features.global_token.shape == (2, 48)
    assert features.patches.shape == (2, 4 * 6 * 6, 48)
    assert features.region_tokens.shape == (2, N_REGIONS, 48)


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (lambda ct, regions, known: (ct[:, :7], regions[:, :7], known), "not tiled by patches"),
        (lambda ct, regions, known: (ct[0], regions[0], known), "must be .B, Z, Y, X."),
        (
            lambda ct, regions, known: (ct, regions[:, :8], known),
            "regions must be uint8 of the CT's shape",
        ),
        (lambda ct, regions, known: (ct, regions.long(), known), "regions must be uint8"),
        (lambda ct, regions, known: (ct, regions, known[:1]), "regions_known must be bool"),
        (lambda ct, regions, known: (ct, regions, known.float()), "regions_known must be bool"),
        (
            lambda ct, regions, known: (ct, regions + 100, known),
            "region ids must be 0 to 20, found 1",
        ),
        (lambda ct, regions, known: (ct.to("meta"), regions, known), "on one device"),
    ],
)
def test_inputs_that_do_not_fit_are_named(
    encoder: SliceRegionEncoder,
    inputs: tuple[Tensor, Tensor],
    change: Callable[..., Any],
    fragment: str,
) -> None:
    with pytest.raises(AssertionError, match=fragment):
        encoder(*change(*inputs, KNOWN))


@pytest.mark.parametrize("grid", [(8, 24, 40), (16, 48, 48), (24, 64, 32)])
def test_other_grids(encoder: SliceRegionEncoder, grid: tuple[int, int, int]) -> None:
    """Fewer and more patches an axis than the configuration's; on its own grid nothing is
    interpolated."""
    torch.nn.init.normal_(encoder.blocks[0].attention.slice_bias)
    generator = torch.Generator().manual_seed(1)
    ct = torch.randint(-1024, 600, (1, *grid), generator=generator, dtype=torch.int16)
    regions = torch.randint(0, N_REGIONS + 1, (1, *grid), generator=generator, dtype=torch.uint8)
    features = encoder(ct, regions, torch.tensor([True]))
    z, y, x = (n // p for n, p in zip(grid, encoder.patch, strict=True))
    assert features.patch_grid == (z, y, x) and features.patches.shape == (1, z * y * x, 48)
    positions = encoder._embed_positions(features.patch_grid).view(z, y, x, -1)
    # Along each axis the interpolated embeddings begin and end near those that were learned.
    learned = encoder._embed_positions(encoder.patch_grid).view(*encoder.patch_grid, -1)
    if features.patch_grid == encoder.patch_grid:
        assert torch.equal(positions, learned)
    assert (positions[0, 0, 0] - learned[0, 0, 0]).norm() < 0.75 * learned[0, 0, 0].norm()
    features.global_token.square().sum().backward()
    assert all(
        p.grad is not None for p in (encoder.position_z, encoder.position_y, encoder.position_x)
    )


def test_levels_are_the_tapped_blocks_and_the_last(
    tiny: Config, inputs: tuple[Tensor, Tensor]
) -> None:
    torch.manual_seed(0)
    tapped = SliceRegionEncoder(tiny.encoder.model_copy(update={"tap_blocks": (1,)}), tiny.data)
    features = tapped(*inputs, KNOWN)
    first, last = features.multilevel_patches.split(48, dim=-1)
    assert torch.equal(last, features.patches)
    assert not torch.equal(first, last)  # near it, since blocks start near the identity
    torch.testing.assert_close(first.mean(-1), torch.zeros_like(first[..., 0]), rtol=0, atol=1e-5)


def test_attention_maps_are_shares(
    encoder: SliceRegionEncoder, inputs: tuple[Tensor, Tensor]
) -> None:
    for block in (0, 1, -1):
        shares = encoder.attention_map(*inputs, KNOWN, block=block)
        assert shares.shape == (2, 3, 4, 6, 6) and (shares > 0).all()
        assert (shares.sum((2, 3, 4)) < 1).all()  # the rest is the token's own and the regions'
    assert torch.equal(
        encoder.attention_map(*inputs, KNOWN, 1), encoder.attention_map(*inputs, KNOWN)
    )
    # The last block's query and keys decide it: a patch whose key is the query's own direction
    # draws it all.
    attention = encoder.blocks[0].attention
    tokens, regions = torch.randn(1, 5, 48), torch.randn(1, 20, 48)
    q = attention.q(tokens[:, :1]).unflatten(-1, (3, 16)).transpose(1, 2)
    k = (
        attention.kv(torch.cat([tokens, regions], 1))[..., :48]
        .unflatten(-1, (3, 16))
        .transpose(1, 2)
    )
    torch.testing.assert_close(
        attention.compute_attention_shares(tokens, regions), (q @ k.mT / 4).softmax(-1)[:, :, 0]
    )


def test_compiling_changes_nothing(
    encoder: SliceRegionEncoder, inputs: tuple[Tensor, Tensor]
) -> None:
    """Traced in one graph by the front end of torch.compile, forward and backward."""
    block = encoder.blocks[0]
    torch.nn.init.normal_(block.attention.slice_bias)
    tokens, regions = torch.randn(2, 145, 48, requires_grad=True), torch.randn(2, 20, 48)
    tissue = find_tissue_patches(inputs[0], encoder.patch)
    context = encoder._prepare_context(inputs[1], KNOWN, tissue, tokens.dtype)
    context = [x.detach() if isinstance(x, Tensor) else x for x in context]
    results = []
    for call in (block, torch.compile(block, backend="aot_eager", fullgraph=True)):
        encoder.zero_grad()
        out = call(tokens, regions, *context)
        (grad,) = torch.autograd.grad(sum(o.square().sum() for o in out), tokens, retain_graph=True)
        sum(o.square().sum() for o in out).backward()
        results.append([*out, grad, block.attention.slice_bias.grad.clone()])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


def test_windows_are_channels_in_order() -> None:
    names = ("lung", "mediastinal", "bone")
    for channel, name in enumerate(names):
        centre, width = CT_WINDOWS[name]
        hu = torch.tensor(
            [-5000.0, centre - width / 2, centre, centre + width / 4, centre + width / 2, 5000.0]
        )
        low, foot, middle, above, top, high = (
            apply_windows(hu.view(1, 1, 1, -1), names)[0, channel].flatten().tolist()
        )
        assert low == foot < high == top
        assert middle == pytest.approx((low + high) / 2)
        assert above == pytest.approx(low + 0.75 * (high - low))


def test_recomputing_changes_nothing(tiny: Config, inputs: tuple[Tensor, Tensor]) -> None:
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = SliceRegionEncoder(
            tiny.encoder.model_copy(update={"activation_checkpointing": checkpointing}), tiny.data
        )
        features = model(*inputs, torch.tensor([True, False]))
        sum(x.square().mean() for x in features[:3]).backward()
        results.append((features[:3], [p.grad for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
