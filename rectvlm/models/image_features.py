"""The contract between an image encoder and the parts that read its features.

Shapes: B samples, Z × Y × X voxels, W windows, z × y × x patches, N = z · y · x, R regions (20),
C width of the encoder, K levels (tapped blocks and the last block).
"""

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from rectvlm.labels import CT_WINDOWS
from rectvlm.models.tissue_patches import TissuePatches


class ImageFeatures(NamedTuple):
    """Features of a batch.

    Modules pass named tuples to each other everywhere: ZeRO-3 hooks the tensors that it finds in
    tuples, and a module whose output it cannot see loses its own parameters before its backward
    pass.
    """

    global_token: Tensor
    """(B, C), a summary of the whole volume."""
    patches: Tensor
    """(B, N, C), slices outermost."""
    region_tokens: Tensor
    """(B, R, C), one token a region."""
    patch_grid: tuple[int, int, int]
    """Number of patches (z, y, x)."""
    multilevel_patches: Tensor
    """(B, N, K · C): patches after each block of `encoder.tap_blocks`, normalized to mean 0 and
    standard deviation 1, then those of the last block."""
    tissue: TissuePatches | None = None
    """The patches that the encoder looked at; the features of all others are 0. None: all."""

    def all_tokens(self) -> Tensor:
        """(B, 1 + R + N, C): global token, region tokens, patches."""
        return torch.cat([self.global_token[:, None], self.region_tokens, self.patches], dim=1)


class ImageEncoder(Protocol):
    """An `nn.Module`, made from an `EncoderConfig` and a `DataConfig`, that encodes CTs."""

    blocks: nn.ModuleList
    """Blocks in order. `unfreeze.last_blocks` counts from the end of this list. Parameters that are
    registered after it belong to the last block, those before it to none."""

    def __call__(self, ct: Tensor, regions: Tensor, regions_known: Tensor) -> ImageFeatures:
        """Encode.

        Args:
            ct: (B, Z, Y, X) HU, any dtype.
            regions: (B, Z, Y, X) uint8, region ids 0 to 20.
            regions_known: (B,) bool; where False, `regions` must not be read.
        """

    def fit_atlas(self, volumes: Iterable[Tensor]) -> None:
        """Take the mean of some CTs, each (Z, Y, X) HU, as the atlas that is subtracted from every
        CT. It is called before the first step where `encoder.atlas_cases` is above 0."""


def apply_windows(ct: Tensor, windows: tuple[str, ...]) -> Tensor:
    """HU (B, Z, Y, X) of any dtype to (B, W, Z, Y, X) float32 in [0, 1], one channel a window.

    Air is 0, so that voxels outside the body add nothing to a patch.
    """
    hu = ct.float()
    channels = []
    for name in windows:
        centre, width = CT_WINDOWS[name]
        channels.append(((hu - centre) / width + 0.5).clamp(0, 1))
    return torch.stack(channels, dim=1)
