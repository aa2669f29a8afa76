"""The shared 3D encoder: HU in, global, patch and region features out.

Shapes: B samples, Z × Y × X voxels, W windows, z × y × x patches, N = z · y · x, R regions (20), C width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rectvlm.config import DataConfig, EncoderConfig
from rectvlm.labels import N_REGIONS, WINDOWS
from rectvlm.models.attention import SliceRegionAttention
from rectvlm.models.layers import Mlp, init_blocks

POSITION_STD = 0.3
"""Spread of each axis's position embeddings at the start; patch embeddings start with a spread of about 1."""
PRIOR_FLOOR = 1e-3
"""Smallest p(r | patch): a region that a patch does not touch is unlikely, not impossible."""


class Features(NamedTuple):
    """What the encoder says of a batch.

    What modules hand on is a named tuple everywhere: ZeRO-3 hooks the tensors that it finds in tuples, and a module
    whose output it cannot see loses its own parameters before its backward pass.
    """

    whole: Tensor
    """(B, C), the global token."""
    patches: Tensor
    """(B, N, C), slices outermost."""
    regions: Tensor
    """(B, R, C)."""
    grid: tuple[int, int, int]
    """Patches (z, y, x)."""


def apply_windows(ct: Tensor, windows: tuple[str, ...]) -> Tensor:
    """HU (B, Z, Y, X) of any dtype to (B, W, Z, Y, X) float32 in [0, 1], one channel a window.

    Air is 0, so that what lies outside the body adds nothing to a patch.
    """
    hu = ct.float()
    channels = []
    for name in windows:
        centre, width = WINDOWS[name]
        channels.append(((hu - centre) / width + 0.5).clamp(0, 1))
    return torch.stack(channels, dim=1)


def region_mix(regions: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Exact share of each region in each patch.

    Args:
        regions: (B, Z, Y, X) uint8, ids 0 to 20.
        patch: voxels of a patch (z, y, x).

    Returns:
        (B, N, 21) float32; entry 0 is "no region"; every row sums to 1.
    """
    b, *shape = regions.shape
    (pz, py, px), (z, y, x) = patch, (s // p for s, p in zip(shape, patch, strict=True))
    voxels = regions.view(b, z, pz, y, py, x, px).permute(0, 1, 3, 5, 2, 4, 6).reshape(b, z * y * x, -1)
    mix = torch.zeros(b, z * y * x, N_REGIONS + 1, device=regions.device)
    share = torch.full((1, 1, 1), 1 / voxels.shape[-1], device=regions.device)
    return mix.scatter_add_(2, voxels.long(), share.expand(voxels.shape))


class EncoderBlock(nn.Module):
    """Pre-norm attention and MLP; region tokens pass through the same weights."""

    def __init__(self, config: EncoderConfig, slices: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.attention = SliceRegionAttention(config.width, config.heads, slices)
        self.mlp = Mlp(config.width, config.mlp_ratio)

    def forward(self, tokens: Tensor, regions: Tensor, slice_index: Tensor, log_prior: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1 + N, C) and (B, R, C) to the same shapes."""
        attended, pooled = self.attention(self.norm1(tokens), self.norm1(regions), slice_index, log_prior)
        tokens, regions = tokens + attended, regions + pooled
        both = torch.cat([tokens, regions], dim=1)
        both = both + self.mlp(self.norm2(both))
        return both[:, : tokens.shape[1]], both[:, tokens.shape[1] :]


class Encoder(nn.Module):
    """Patches, factorized positions, slice- and region-aware blocks."""

    def __init__(self, config: EncoderConfig, data: DataConfig) -> None:
        super().__init__()
        self.patch, self.windows, self.checkpointing = config.patch, data.windows, config.checkpointing
        z, y, x = (g // p for g, p in zip(data.grid, config.patch, strict=True))
        self.grid = (z, y, x)
        self.embed = nn.Conv3d(len(data.windows), config.width, config.patch, stride=config.patch)
        self.position_z = nn.Parameter(torch.randn(z, 1, 1, config.width) * POSITION_STD)
        self.position_y = nn.Parameter(torch.randn(1, y, 1, config.width) * POSITION_STD)
        self.position_x = nn.Parameter(torch.randn(1, 1, x, config.width) * POSITION_STD)
        self.whole = nn.Parameter(torch.randn(1, 1, config.width) * POSITION_STD)
        self.regions = nn.Parameter(torch.randn(1, N_REGIONS, config.width) * POSITION_STD)
        self.unknown_prior = nn.Parameter(torch.zeros(N_REGIONS))
        self.blocks = nn.ModuleList(EncoderBlock(config, z) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        init_blocks(self.blocks)
        nn.init.normal_(self.embed.weight, std=2 / self.embed.weight[0].numel() ** 0.5)  # windows have a spread of ~0.5
        nn.init.zeros_(self.embed.bias)  # type: ignore[arg-type]
        self.register_buffer("slice_index", torch.arange(z).repeat_interleave(y * x), persistent=False)

    def forward(self, ct: Tensor, regions: Tensor, regions_known: Tensor) -> Features:
        """Encode.

        Args:
            ct: (B, Z, Y, X) HU, any dtype.
            regions: (B, Z, Y, X) uint8 ids.
            regions_known: (B,) bool; where False, `regions` is not read.
        """
        expected = tuple(g * p for g, p in zip(self.grid, self.patch, strict=True))
        assert tuple(ct.shape[1:]) == expected, f"CT of {tuple(ct.shape[1:])} voxels on a grid of {expected}"
        channels = apply_windows(ct, self.windows).to(self.embed.weight.dtype)
        patches = self.embed(channels).flatten(2).transpose(1, 2)
        position = (self.position_z + self.position_y + self.position_x).flatten(0, 2)
        tokens = torch.cat([self.whole.expand(len(ct), -1, -1), patches + position], dim=1)
        region_tokens = self.regions.expand(len(ct), -1, -1)
        log_prior = self.log_prior(regions, regions_known).to(tokens.dtype)
        for block in self.blocks:
            inputs = (tokens, region_tokens, self.slice_index, log_prior)
            tokens, region_tokens = (
                checkpoint(block, *inputs, use_reentrant=False)
                if self.checkpointing and torch.is_grad_enabled()
                else block(*inputs)
            )
        tokens, region_tokens = self.norm(tokens), self.norm(region_tokens)
        return Features(tokens[:, 0], tokens[:, 1:], region_tokens, self.grid)

    def log_prior(self, regions: Tensor, known: Tensor) -> Tensor:
        """log p(r | patch), (B, N, R); the learned vector where a sample has no region map."""
        mix = region_mix(regions, self.patch)[..., 1:].clamp_min(PRIOR_FLOOR).log()
        unknown = self.unknown_prior.float().log_softmax(0).expand_as(mix)
        return torch.where(known[:, None, None], mix, unknown)
