"""The slice- and region-aware 3D encoder: HU in, global, patch and region features out.

Patches of air around the body cost nothing: the blocks do not see them, and their features are 0.

Shapes: B samples, Z × Y × X voxels, W windows, z × y × x patches, N = z · y · x, M of them packed
(`rectvlm.models.tissue_patches`), R regions (20), H heads, C width.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rectvlm.config import DataConfig, EncoderConfig
from rectvlm.labels import N_REGIONS
from rectvlm.models.attention import (
    SliceRegionAttention,
    WithinSliceAttention,
    pooling_weights,
)
from rectvlm.models.image_features import ImageFeatures, apply_windows
from rectvlm.models.layers import Mlp, init_blocks, run_layer
from rectvlm.models.tissue_patches import (
    SlicePlaces,
    TissuePatches,
    find_slice_places,
    find_tissue_patches,
)

POSITION_STD = 0.3
"""Standard deviation of each axis's position embeddings at the start; that of patch embeddings is
about 1."""
ATLAS_GAIN = 2.0
"""Factor on a CT minus the atlas: the difference is small, and this gives patches the standard
deviation that position embeddings expect."""
PRIOR_FLOOR = 1e-3
"""Smallest p(r | patch) in attention: a region that a patch does not touch is unlikely, not
impossible."""

DEFAULT_EPS = 1e-5
"""What layer norms add to a variance; PyTorch's own default."""
VIT_EPS = 1e-6
"""The same for weights of a ViT: that of timm, DINOv2 and SigLIP."""


def compute_region_shares(regions: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Exact share of each region in each patch.

    Args:
        regions: (B, Z, Y, X) uint8, ids 0 to 20.
        patch: voxels of a patch (z, y, x).

    Returns:
        (B, N, 21) float32; entry 0 is "no region"; every row sums to 1.
    """
    # A GPU would have to be waited for; there `scatter_add_` itself stops at an id out of range.
    assert regions.is_meta or regions.is_cuda or int(regions.max()) <= N_REGIONS, (
        f"region ids must be 0 to {N_REGIONS}, found {int(regions.max())}"
    )
    ids = _cut_into_patches(regions[:, None], patch)
    shares = torch.zeros(*ids.shape[:2], N_REGIONS + 1, device=regions.device)
    share_of_voxel = torch.full((1, 1, 1), 1 / ids.shape[-1], device=regions.device)
    return shares.scatter_add_(2, ids.long(), share_of_voxel.expand(ids.shape))


def _cut_into_patches(x: Tensor, patch: tuple[int, ...]) -> Tensor:
    """(B, W, Z, Y, X) to (B, N, W · voxels of a patch), slices outermost."""
    b, w, *shape = x.shape
    pz, py, px = patch
    grid_z, grid_y, grid_x = (voxels // side for voxels, side in zip(shape, patch, strict=True))
    cells = x.view(b, w, grid_z, pz, grid_y, py, grid_x, px)
    return cells.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, grid_z * grid_y * grid_x, -1)


class PatchEmbedding(nn.Conv3d):
    """A convolution whose stride is its kernel, as a matrix product, which libraries do faster."""

    def __init__(self, inputs: int, outputs: int, patch: tuple[int, int, int]) -> None:
        super().__init__(inputs, outputs, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """(B, W, Z, Y, X) to (B, N, C), slices outermost."""
        return F.linear(_cut_into_patches(x, self.kernel_size), self.weight.flatten(1), self.bias)


class BlockContext(NamedTuple):
    """Inputs of `SliceRegionAttention` that are the same in all blocks."""

    slice_index: Tensor
    """(B, M) int64, slice of each patch."""
    log_prior: Tensor
    """(B, M, R), log p(r | patch)."""
    weights: Tensor
    """(B, M, R), `pooling_weights`."""
    slices: int
    """Slices of patches in this volume."""
    filler: Tensor | None
    """(B, M) bool, patches that no one attends to; None without any."""
    places: SlicePlaces | None
    """Where each patch is in its slice; None where all blocks attend over the volume."""


def make_norm(config: EncoderConfig) -> nn.LayerNorm:
    """Layer norm of a block, or the last one."""
    return nn.LayerNorm(config.width, eps=DEFAULT_EPS if config.init is None else VIT_EPS)


class EncoderBlock(nn.Module):
    """Pre-norm attention and MLP. Region tokens pass through the same weights as the patches.

    Args:
        config: the encoder's.
        slices: slices of patches.
        within_slice: whether patches attend to their own slice alone, not to the volume.
    """

    def __init__(self, config: EncoderConfig, slices: int, within_slice: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = make_norm(config), make_norm(config)
        gated = config.init is not None
        self.attention = (
            WithinSliceAttention(config.width, config.heads, gated)
            if within_slice
            else SliceRegionAttention(config.width, config.heads, slices, gated)
        )
        self.mlp = Mlp(config.width, config.mlp_ratio)

    def forward(self, tokens: Tensor, regions: Tensor, *context: Any) -> tuple[Tensor, Tensor]:
        """Tokens (B, 1 + M, C) and region tokens (B, R, C) to the same shapes; `context` are the
        fields of `BlockContext`."""
        attended, pooled = self.attention(self.norm1(tokens), self.norm1(regions), *context)
        tokens, regions = tokens + attended, regions + pooled
        rows = torch.cat([tokens, regions], dim=1)
        rows = rows + self.mlp(self.norm2(rows))
        return rows[:, : tokens.shape[1]], rows[:, tokens.shape[1] :]


class SliceRegionEncoder(nn.Module):
    """Patches, positions, slice- and region-aware blocks.

    Positions are the sum of one embedding an axis. With `encoder.init` they are that of the slice
    and one for each place of the plane, as a ViT has them, and attention has gates.
    """

    atlas: Tensor | None

    def __init__(self, config: EncoderConfig, data: DataConfig) -> None:
        super().__init__()
        width = config.width
        self.patch, self.windows = config.patch, data.windows
        self.tap_blocks, self.recompute = config.tap_blocks, config.activation_checkpointing
        self.attends_within_slices = config.volume_every > 1
        z, y, x = (voxels // side for voxels, side in zip(data.grid, self.patch, strict=True))
        self.patch_grid = (z, y, x)

        self.embed = PatchEmbedding(len(data.windows), width, config.patch)
        self.position_z = nn.Parameter(torch.randn(z, 1, 1, width) * POSITION_STD)
        self.has_plane = config.init is not None
        if self.has_plane:
            self.position_plane = nn.Parameter(torch.randn(1, y, x, width) * POSITION_STD)
        else:
            self.position_y = nn.Parameter(torch.randn(1, y, 1, width) * POSITION_STD)
            self.position_x = nn.Parameter(torch.randn(1, 1, x, width) * POSITION_STD)
        self.whole = nn.Parameter(torch.randn(1, 1, width) * POSITION_STD)
        self.regions = nn.Parameter(torch.randn(1, N_REGIONS, width) * POSITION_STD)
        self.unknown_prior = nn.Parameter(torch.zeros(N_REGIONS))
        numbers = range(1, config.depth + 1)
        self.blocks = nn.ModuleList(
            EncoderBlock(config, z, within_slice=number % config.volume_every != 0)
            for number in numbers
        )
        self.norm = make_norm(config)
        atlas = torch.zeros(len(data.windows), *data.grid) if config.atlas_cases else None
        self.register_buffer("atlas", atlas)

        init_blocks(self.blocks)
        # Windows have a standard deviation of about 0.5.
        nn.init.normal_(self.embed.weight, std=2 / self.embed.weight[0].numel() ** 0.5)
        nn.init.zeros_(self.embed.bias)  # type: ignore[arg-type]

    def forward(self, ct: Tensor, regions: Tensor, regions_known: Tensor) -> ImageFeatures:
        """Encode.

        Args:
            ct: (B, Z, Y, X) HU, any dtype and any size that patches tile. On another grid than the
                configuration's the position embeddings are interpolated.
            regions: (B, Z, Y, X) uint8 ids.
            regions_known: (B,) bool; where False, `regions` is not read.
        """
        self._check_inputs(ct, regions, regions_known)
        tissue = find_tissue_patches(ct, self.patch)
        tokens, region_tokens = self._embed_tokens(ct, tissue)
        context = self._prepare_context(regions, regions_known, tissue, tokens.dtype)
        grid = self.compute_patch_grid(ct)
        count = grid[0] * grid[1] * grid[2]
        levels: list[Tensor] = []
        for number, block in enumerate(self.blocks, start=1):
            tokens, region_tokens = run_layer(
                block, tokens, region_tokens, *context, recompute=self.recompute
            )
            if number in self.tap_blocks:
                normalized = F.layer_norm(tokens[:, 1:], tokens.shape[-1:])
                levels.append(tissue.unpack(normalized, count))

        tokens, region_tokens = self.norm(tokens), self.norm(region_tokens)
        patches = tissue.unpack(tokens[:, 1:], count)
        return ImageFeatures(
            global_token=tokens[:, 0],
            patches=patches,
            region_tokens=region_tokens,
            patch_grid=grid,
            multilevel_patches=torch.cat([*levels, patches], dim=-1),
            tissue=tissue,
        )

    @torch.no_grad()
    def fit_atlas(self, volumes: Iterable[Tensor]) -> None:
        """Make the atlas the mean of some CTs, each (Z, Y, X) HU, window by window."""
        assert self.atlas is not None, "encoder.atlas_cases is 0"
        windowed = [apply_windows(ct[None], self.windows)[0] for ct in volumes]
        self.atlas.copy_(torch.stack(windowed).mean(0))

    def load_starting_weights(self, reference: str) -> str:
        """Take the weights of a 2D ViT, inflated over slices; see `rectvlm.models.inflate_vit`.

        On the meta device this checks that they fit and reads no weights.

        Args:
            reference: safetensors file, folder or hub id.

        Returns:
            One sentence a line: what was taken, what was left and what starts anew.

        Raises:
            UserError: there is no such file, it is no ViT whose features this encoder can give, or
                its shapes differ.
        """
        from rectvlm.models.inflate_vit import inflate_vit  # it imports this module

        return inflate_vit(self, reference)

    @torch.no_grad()
    def attention_map(
        self, ct: Tensor, regions: Tensor, regions_known: Tensor, block: int = -1
    ) -> Tensor:
        """Share of the global token's attention that each patch receives, for figures.

        Args:
            ct: as in `forward`, and so the next two.
            regions: see `forward`.
            regions_known: see `forward`.
            block: number of the block, from 0 or from the end.

        Returns:
            (B, H, z, y, x), by head of the block.
        """
        self._check_inputs(ct, regions, regions_known)
        tissue = find_tissue_patches(ct, self.patch)
        tokens, region_tokens = self._embed_tokens(ct, tissue)
        context = self._prepare_context(regions, regions_known, tissue, tokens.dtype)
        number = range(len(self.blocks))[block]
        for earlier in self.blocks[:number]:
            tokens, region_tokens = earlier(tokens, region_tokens, *context)

        last = self.blocks[number]
        assert isinstance(last, EncoderBlock)
        shares = last.attention.compute_attention_shares(
            last.norm1(tokens), last.norm1(region_tokens), context.slices, context.filler
        )
        z, y, x = self.compute_patch_grid(ct)
        patch_shares = tissue.unpack(shares[:, :, 1 : tokens.shape[1]].mT, z * y * x)
        return patch_shares.mT.unflatten(2, (z, y, x))

    def compute_patch_grid(self, volume: Tensor) -> tuple[int, int, int]:
        """Number of patches (z, y, x) of a CT or a region map (B, Z, Y, X)."""
        z, y, x = (
            voxels // side for voxels, side in zip(volume.shape[1:], self.patch, strict=True)
        )
        return z, y, x

    @staticmethod
    def patch_slice_indices(grid: tuple[int, int, int], device: torch.device) -> Tensor:
        """Slice of each patch, (N,) int64."""
        z, y, x = grid
        return torch.arange(z, device=device).repeat_interleave(y * x)

    def _prepare_context(
        self, regions: Tensor, known: Tensor, tissue: TissuePatches, dtype: torch.dtype
    ) -> BlockContext:
        grid = self.compute_patch_grid(regions)
        # A map that is not known may hold any number.
        regions = regions.masked_fill(~known[:, None, None, None], 0)
        shares = tissue.pack(compute_region_shares(regions, self.patch)[..., 1:])
        slice_index = self.patch_slice_indices(grid, regions.device)[tissue.numbers]
        within_slices = self.attends_within_slices
        return BlockContext(
            slice_index=slice_index,
            log_prior=self.region_log_prior(shares, known).to(dtype),
            weights=pooling_weights(shares, known, tissue.is_tissue).to(dtype),
            slices=grid[0],
            filler=~tissue.is_tissue if tissue.has_filler else None,
            places=find_slice_places(tissue, slice_index, grid) if within_slices else None,
        )

    def _embed_tokens(self, ct: Tensor, tissue: TissuePatches) -> tuple[Tensor, Tensor]:
        """Tokens (B, 1 + M, C) and region tokens (B, R, C) before the first block."""
        channels = apply_windows(ct, self.windows)
        if self.atlas is not None:
            assert self.atlas.shape[1:] == ct.shape[1:], (
                f"the atlas is of {tuple(self.atlas.shape[1:])} voxels"
            )
            channels = (channels - self.atlas) * ATLAS_GAIN
        patches = self.embed(channels.to(self.embed.weight.dtype))
        patches = patches + self._embed_positions(self.compute_patch_grid(ct))
        tokens = torch.cat([self.whole.expand(len(ct), -1, -1), tissue.pack(patches)], dim=1)
        return tokens, self.regions.expand(len(ct), -1, -1)

    def _check_inputs(self, ct: Tensor, regions: Tensor, known: Tensor) -> None:
        assert ct.ndim == 4, f"a CT must be (B, Z, Y, X), not {tuple(ct.shape)}"
        shape = tuple(ct.shape[1:])
        assert all(n > 0 and n % side == 0 for n, side in zip(shape, self.patch, strict=True)), (
            f"a CT of {shape} voxels is not tiled by patches of {self.patch}"
        )
        assert regions.shape == ct.shape and regions.dtype == torch.uint8, (
            f"regions must be uint8 of the CT's shape {tuple(ct.shape)}, "
            f"not {regions.dtype} {tuple(regions.shape)}"
        )
        assert known.shape == ct.shape[:1] and known.dtype == torch.bool, (
            f"regions_known must be bool of shape ({len(ct)},), "
            f"not {known.dtype} {tuple(known.shape)}"
        )
        devices = {ct.device, regions.device, known.device, self.embed.weight.device}
        assert len(devices) == 1, f"CT, regions and encoder must be on one device, not on {devices}"

    def _embed_positions(self, grid: tuple[int, int, int]) -> Tensor:
        """(N, C): the sum of one embedding an axis, or of the slice's and the plane's."""
        z = _resize_axis(self.position_z, 0, grid[0])
        if self.has_plane:
            return (z + resize_plane(self.position_plane, grid[1:])).flatten(0, 2)
        y = _resize_axis(self.position_y, 1, grid[1])
        x = _resize_axis(self.position_x, 2, grid[2])
        return (z + y + x).flatten(0, 2)

    def region_log_prior(self, shares: Tensor, known: Tensor) -> Tensor:
        """log p(r | patch), (B, N, R), from shares (B, N, R); a learned vector where a sample has
        no region map."""
        prior = shares.clamp_min(PRIOR_FLOOR).log()
        unknown = self.unknown_prior.float().log_softmax(0).expand_as(prior)
        return torch.where(known[:, None, None], prior, unknown)


def resize_plane(plane: Tensor, size: tuple[int, int], antialias: bool = False) -> Tensor:
    """Interpolate position embeddings (1, y, x, C) to a size (y, x), bicubically as ViTs do."""
    if tuple(plane.shape[1:3]) == size:
        return plane
    resized = F.interpolate(
        plane.movedim(3, 1).float(), size, mode="bicubic", align_corners=False, antialias=antialias
    )
    return resized.movedim(1, 3).to(plane.dtype)


def _resize_axis(embedding: Tensor, axis: int, count: int) -> Tensor:
    """Interpolate position embeddings, of size 1 on all axes but one and the last, to a count."""
    if embedding.shape[axis] == count:
        return embedding
    line = embedding.reshape(1, embedding.shape[axis], -1).transpose(1, 2)
    line = F.interpolate(line.float(), count, mode="linear", align_corners=False)
    shape = list(embedding.shape)
    shape[axis] = count
    return line.to(embedding.dtype).transpose(1, 2).reshape(shape)
