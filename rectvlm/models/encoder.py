"""The shared 3D encoder: HU in, global, patch and region features out.

Shapes: B samples, Z × Y × X voxels, W windows, z × y × x patches, N = z · y · x, R regions (20), C width.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rectvlm.config import DataConfig, EncoderConfig
from rectvlm.labels import CT_WINDOWS, N_REGIONS
from rectvlm.models.attention import SliceRegionAttention, pooling_weights
from rectvlm.models.layers import Mlp, init_blocks

POSITION_STD = 0.3
"""Spread of each axis's position embeddings at the start; patch embeddings start with a spread of about 1."""
ATLAS_GAIN = 2.0
"""What is left of a CT after the atlas is small: this brings patches to the spread that positions expect."""
PRIOR_FLOOR = 1e-3
"""Smallest p(r | patch) in attention: a region that a patch does not touch is unlikely, not impossible."""


class ImageFeatures(NamedTuple):
    """What the encoder says of a batch.

    What modules hand on is a named tuple everywhere: ZeRO-3 hooks the tensors that it finds in tuples, and a module
    whose output it cannot see loses its own parameters before its backward pass.
    """

    global_token: Tensor
    """(B, C), the global token."""
    patches: Tensor
    """(B, N, C), slices outermost."""
    region_tokens: Tensor
    """(B, R, C)."""
    patch_grid: tuple[int, int, int]
    """Patches (z, y, x)."""
    multilevel_patches: Tensor
    """(B, N, K · C): patches after the blocks that `encoder.tap_blocks` names, each with mean 0 and spread 1, then those of
    the last block."""


def apply_windows(ct: Tensor, windows: tuple[str, ...]) -> Tensor:
    """HU (B, Z, Y, X) of any dtype to (B, W, Z, Y, X) float32 in [0, 1], one channel a window.

    Air is 0, so that what lies outside the body adds nothing to a patch.
    """
    hu = ct.float()
    channels = []
    for name in windows:
        centre, width = CT_WINDOWS[name]
        channels.append(((hu - centre) / width + 0.5).clamp(0, 1))
    return torch.stack(channels, dim=1)


def compute_region_shares(regions: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Exact share of each region in each patch.

    Args:
        regions: (B, Z, Y, X) uint8, ids 0 to 20.
        patch: voxels of a patch (z, y, x).

    Returns:
        (B, N, 21) float32; entry 0 is "no region"; every row sums to 1.
    """
    b, *shape = regions.shape
    (pz, py, px), (z, y, x) = patch, (s // p for s, p in zip(shape, patch, strict=True))
    # A GPU would have to be waited for; there `scatter_add_` itself stops at an id that is out of range.
    assert regions.is_meta or regions.is_cuda or int(regions.max()) <= N_REGIONS, (
        f"region ids must be 0 to {N_REGIONS}, found {int(regions.max())}"
    )
    voxels = (
        regions.view(b, z, pz, y, py, x, px).permute(0, 1, 3, 5, 2, 4, 6).reshape(b, z * y * x, -1)
    )
    mix = torch.zeros(b, z * y * x, N_REGIONS + 1, device=regions.device)
    share = torch.full((1, 1, 1), 1 / voxels.shape[-1], device=regions.device)
    return mix.scatter_add_(2, voxels.long(), share.expand(voxels.shape))


class PatchEmbedding(nn.Conv3d):
    """A convolution whose stride is its kernel, as a matrix product, which libraries do faster.

    (B, W, Z, Y, X) to (B, N, C), slices outermost.
    """

    def __init__(self, inputs: int, outputs: int, patch: tuple[int, int, int]) -> None:
        super().__init__(inputs, outputs, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """See above."""
        b, w, *shape = x.shape
        (pz, py, px), (z, y, x_) = (
            self.kernel_size,
            (s // p for s, p in zip(shape, self.kernel_size, strict=True)),
        )
        rows = (
            x.view(b, w, z, pz, y, py, x_, px)
            .permute(0, 2, 4, 6, 1, 3, 5, 7)
            .reshape(b, z * y * x_, -1)
        )
        return F.linear(rows, self.weight.flatten(1), self.bias)


class EncoderBlock(nn.Module):
    """Pre-norm attention and MLP; region tokens pass through the same weights."""

    def __init__(self, config: EncoderConfig, slices: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.attention = SliceRegionAttention(config.width, config.heads, slices)
        self.mlp = Mlp(config.width, config.mlp_ratio)

    def forward(self, tokens: Tensor, regions: Tensor, *shared: Any) -> tuple[Tensor, Tensor]:
        """(B, 1 + N, C) and (B, R, C) to the same shapes; the rest, which all blocks share, is
        `SliceRegionAttention`'s."""
        attended, pooled = self.attention(self.norm1(tokens), self.norm1(regions), *shared)
        tokens, regions = tokens + attended, regions + pooled
        both = torch.cat([tokens, regions], dim=1)
        both = both + self.mlp(self.norm2(both))
        return both[:, : tokens.shape[1]], both[:, tokens.shape[1] :]


class VolumeEncoder(nn.Module):
    """Patches, factorized positions, slice- and region-aware blocks."""

    atlas: Tensor | None

    def __init__(self, config: EncoderConfig, data: DataConfig) -> None:
        super().__init__()
        self.patch, self.windows, self.checkpointing = (
            config.patch,
            data.windows,
            config.activation_checkpointing,
        )
        self.taps = config.tap_blocks
        z, y, x = (g // p for g, p in zip(data.grid, config.patch, strict=True))
        self.patch_grid = (z, y, x)
        self.embed = PatchEmbedding(len(data.windows), config.width, config.patch)
        self.position_z = nn.Parameter(torch.randn(z, 1, 1, config.width) * POSITION_STD)
        self.position_y = nn.Parameter(torch.randn(1, y, 1, config.width) * POSITION_STD)
        self.position_x = nn.Parameter(torch.randn(1, 1, x, config.width) * POSITION_STD)
        self.whole = nn.Parameter(torch.randn(1, 1, config.width) * POSITION_STD)
        self.regions = nn.Parameter(torch.randn(1, N_REGIONS, config.width) * POSITION_STD)
        self.unknown_prior = nn.Parameter(torch.zeros(N_REGIONS))
        self.blocks = nn.ModuleList(EncoderBlock(config, z) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.register_buffer(
            "atlas", torch.zeros(len(data.windows), *data.grid) if config.atlas_cases else None
        )
        init_blocks(self.blocks)
        nn.init.normal_(
            self.embed.weight, std=2 / self.embed.weight[0].numel() ** 0.5
        )  # windows have a spread of ~0.5
        nn.init.zeros_(self.embed.bias)  # type: ignore[arg-type]

    def forward(self, ct: Tensor, regions: Tensor, regions_known: Tensor) -> ImageFeatures:
        """Encode.

        Args:
            ct: (B, Z, Y, X) HU, any dtype; any size that patches tile. On another grid than the configuration's the
                position embeddings are interpolated.
            regions: (B, Z, Y, X) uint8 ids.
            regions_known: (B,) bool; where False, `regions` is not read.
        """
        tokens, region_tokens = self._embed_tokens(ct, regions, regions_known)
        levels: list[Tensor] = []
        grid = self.compute_patch_grid(ct)
        shared = self._prepare_block_inputs(grid, regions, regions_known, tokens.dtype)
        for number, block in enumerate(self.blocks, start=1):
            tokens, region_tokens = (
                checkpoint(block, tokens, region_tokens, *shared, use_reentrant=False)
                if self.checkpointing and torch.is_grad_enabled()
                else block(tokens, region_tokens, *shared)
            )
            if number in self.taps:
                levels.append(F.layer_norm(tokens[:, 1:], tokens.shape[-1:]))
        tokens, region_tokens = self.norm(tokens), self.norm(region_tokens)
        patches = tokens[:, 1:]
        return ImageFeatures(
            tokens[:, 0], patches, region_tokens, grid, torch.cat([*levels, patches], dim=-1)
        )

    @torch.no_grad()
    def fit_atlas(self, volumes: Iterable[Tensor]) -> None:
        """Make the atlas the mean of some CTs, each (Z, Y, X) HU, window by window."""
        assert self.atlas is not None, "encoder.atlas is 0"
        mean = torch.stack([apply_windows(ct[None], self.windows)[0] for ct in volumes]).mean(0)
        self.atlas.copy_(mean)

    @torch.no_grad()
    def attention_map(
        self, ct: Tensor, regions: Tensor, regions_known: Tensor, block: int = -1
    ) -> Tensor:
        """Where the global token looks, for pictures: (B, H, z, y, x) shares of its attention, by head of one block.

        Args:
            ct: as in `forward`, like the next two.
            regions: see above.
            regions_known: see above.
            block: its number from 0, or from the end.
        """
        tokens, region_tokens = self._embed_tokens(ct, regions, regions_known)
        grid = self.compute_patch_grid(ct)
        shared = self._prepare_block_inputs(grid, regions, regions_known, tokens.dtype)
        chosen = range(len(self.blocks))[block]
        for earlier in self.blocks[:chosen]:
            tokens, region_tokens = earlier(tokens, region_tokens, *shared)
        last = self.blocks[chosen]
        assert isinstance(last, EncoderBlock)
        shares = last.attention.compute_attention_shares(
            last.norm1(tokens), last.norm1(region_tokens)
        )
        return shares[:, :, 1 : tokens.shape[1]].unflatten(2, grid)

    def compute_patch_grid(self, ct: Tensor) -> tuple[int, int, int]:
        """Patches (z, y, x) of a CT (B, Z, Y, X)."""
        z, y, x = (n // p for n, p in zip(ct.shape[1:], self.patch, strict=True))
        return z, y, x

    @staticmethod
    def patch_slice_indices(grid: tuple[int, int, int], device: torch.device) -> Tensor:
        """(N,) int64: the slice of each patch."""
        z, y, x = grid
        return torch.arange(z, device=device).repeat_interleave(y * x)

    def _prepare_block_inputs(
        self, grid: tuple[int, int, int], regions: Tensor, known: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """What every block is told of the volume: slice of each patch, region prior, its pooling weights, slices."""
        # What stands in a map that does not count may be anything.
        shares = compute_region_shares(
            regions.masked_fill(~known[:, None, None, None], 0), self.patch
        )[..., 1:]
        log_prior = self.region_log_prior(shares, known).to(dtype)
        return (
            self.patch_slice_indices(grid, regions.device),
            log_prior,
            pooling_weights(shares, known).to(dtype),
            grid[0],
        )

    def _embed_tokens(
        self, ct: Tensor, regions: Tensor, regions_known: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens (B, 1 + N, C) and region tokens (B, R, C) before the first block."""
        self._check_inputs(ct, regions, regions_known)
        channels = apply_windows(ct, self.windows)
        if self.atlas is not None:
            assert self.atlas.shape[1:] == ct.shape[1:], (
                f"the atlas is of {tuple(self.atlas.shape[1:])} voxels"
            )
            channels = (channels - self.atlas) * ATLAS_GAIN
        patches = self.embed(channels.to(self.embed.weight.dtype))
        tokens = torch.cat(
            [
                self.whole.expand(len(ct), -1, -1),
                patches + self._embed_positions(self.compute_patch_grid(ct)),
            ],
            dim=1,
        )
        return tokens, self.regions.expand(len(ct), -1, -1)

    def _check_inputs(self, ct: Tensor, regions: Tensor, known: Tensor) -> None:
        assert ct.ndim == 4, f"a CT must be (B, Z, Y, X), not {tuple(ct.shape)}"
        assert all(n > 0 and n % p == 0 for n, p in zip(ct.shape[1:], self.patch, strict=True)), (
            f"a CT of {tuple(ct.shape[1:])} voxels is not tiled by patches of {self.patch}"
        )
        assert regions.shape == ct.shape and regions.dtype == torch.uint8, (
            f"regions must be uint8 of the CT's shape {tuple(ct.shape)}, not {regions.dtype} {tuple(regions.shape)}"
        )
        assert known.shape == ct.shape[:1] and known.dtype == torch.bool, (
            f"regions_known must be bool of shape ({len(ct)},), not {known.dtype} {tuple(known.shape)}"
        )
        places = {ct.device, regions.device, known.device, self.embed.weight.device}
        assert len(places) == 1, f"CT, regions and encoder must be on one device, not on {places}"

    def _embed_positions(self, grid: tuple[int, int, int]) -> Tensor:
        """(N, C): the sum of one embedding an axis."""
        axes: list[Tensor] = []
        for axis, learned in enumerate((self.position_z, self.position_y, self.position_x)):
            embedding: Tensor = learned
            count = embedding.shape[axis]
            if grid[axis] != count:
                line = embedding.reshape(1, count, -1).transpose(1, 2)
                line = F.interpolate(
                    line.float(), grid[axis], mode="linear", align_corners=False
                ).to(embedding.dtype)
                shape = [1, 1, 1, embedding.shape[-1]]
                shape[axis] = grid[axis]
                embedding = line.transpose(1, 2).reshape(shape)
            axes.append(embedding)
        return (axes[0] + axes[1] + axes[2]).flatten(0, 2)

    def region_log_prior(self, shares: Tensor, known: Tensor) -> Tensor:
        """log p(r | patch), (B, N, R), of shares (B, N, R); the learned vector where a sample has no region map."""
        prior = shares.clamp_min(PRIOR_FLOOR).log()
        unknown = self.unknown_prior.float().log_softmax(0).expand_as(prior)
        return torch.where(known[:, None, None], prior, unknown)
