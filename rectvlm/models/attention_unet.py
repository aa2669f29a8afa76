"""The attention U-Net of the localizer: masks at the CT's full resolution.

Shapes: B samples, L lesions (5), z · y · x patches, Z × Y × X voxels, D localizer width, c channels
of a level (level 0 is full resolution).
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rectvlm.config import NORM_GROUPS, DataConfig, EncoderConfig, LocalizerConfig
from rectvlm.labels import N_LESIONS
from rectvlm.models.image_features import apply_windows
from rectvlm.models.layers import run_layer
from rectvlm.models.memory_efficient import (
    GeluSingleChannelConv,
    NormGelu,
    upsample_nearest,
)
from rectvlm.models.tissue_patches import PatchBox

OUTSIDE_LOGIT = -20.0
"""Logit of a lesion in a voxel outside the body's box: in all voxels of a CT at `large`, 0.1
mm³."""

Triple = tuple[int, int, int]
"""One number an axis, (z, y, x)."""


def level_strides(patch: Triple) -> list[Triple]:
    """Strides from each level of the U-Net to the next, down to the patch grid.

    The longest axes are halved first: `(4, 8, 8)` gives `[(1, 2, 2), (2, 2, 2), (2, 2, 2)]`.
    """
    assert all(side & (side - 1) == 0 for side in patch), (
        f"patch {patch} is not made of powers of 2"
    )
    strides: list[Triple] = []
    z, y, x = patch
    while (longest := max(z, y, x)) > 1:
        stride = (1 + (z == longest), 1 + (y == longest), 1 + (x == longest))
        z, y, x = z // stride[0], y // stride[1], x // stride[2]
        strides.append(stride)
    return strides


class _ConvBlock(nn.Module):
    """3 × 3 × 3 convolution, group norm, GELU."""

    def __init__(self, inputs: int, outputs: int, stride: Triple = (1, 1, 1)) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, 3, stride=stride, padding=1)
        self.norm = NormGelu(min(NORM_GROUPS, outputs), outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, …) to (B, outputs, …), smaller by the stride."""
        # With few channels the convolution is twice as fast channels-last, the norm 20 times as
        # fast channels-first.
        return self.norm(self.conv(x.contiguous(memory_format=torch.channels_last_3d)).contiguous())


class LesionMatch(nn.Module):
    """Where an image matches each lesion's token: the inner product of feature and token."""

    def __init__(self, channels: int, text_width: int) -> None:
        super().__init__()
        self.query = nn.Linear(text_width, channels)

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Features (B, c, …) and tokens (B, L, D) to (B, L, …)."""
        query = self.query(tokens) / features.shape[1] ** 0.5
        return (query @ features.flatten(2)).unflatten(2, features.shape[2:])


class AttentionGate(nn.Module):
    """Attention gate (Oktay et al., 2018): one weight a voxel for the detail of the CT."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.skip, self.rising = nn.Conv3d(channels, channels, 1), nn.Conv3d(channels, channels, 1)
        self.weight = GeluSingleChannelConv(channels)

    def forward(self, skip: Tensor, rising: Tensor, stride: Triple) -> Tensor:
        """Weights (B, 1, fine grid) of the skip connection, 0 to 1.

        Args:
            skip: (B, c, fine grid), detail of the CT.
            rising: (B, c, coarse grid), from the level below. Its 1 × 1 × 1 convolution comes
                before the upsampling, where it has less to do and gives the same result.
            stride: fine voxels of a coarse one.
        """
        rising = upsample_nearest(self.rising(rising), stride)
        return self.weight(self.skip(skip) + rising).sigmoid()


class DecoderLevel(nn.Module):
    """One level of the decoder: upsample, gate the detail of the CT, merge, match the lesions."""

    def __init__(self, inputs: int, channels: int, text_width: int, stride: Triple) -> None:
        super().__init__()
        self.stride = stride
        self.reduce = nn.Conv3d(inputs + N_LESIONS, channels, 1)
        self.gate = AttentionGate(channels)
        self.merge = _ConvBlock(channels, channels)
        self.match = LesionMatch(channels, text_width)

    def forward(
        self, rising: Tensor, matches: Tensor, skip: Tensor, tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Features (B, c, fine grid) and their match with each lesion (B, L, fine grid).

        Args:
            rising: (B, inputs, coarse grid), features of the level below.
            matches: (B, L, coarse grid), their match with each lesion.
            skip: (B, c, fine grid), detail of the CT.
            tokens: (B, L, D), lesion tokens.
        """
        rising = self.reduce(torch.cat([rising, matches], 1))
        weight = self.gate(skip, rising, self.stride)
        merged = torch.addcmul(upsample_nearest(rising, self.stride), skip, weight)
        # In the layout of the convolution before the call: a caller keeps its arguments alive, and
        # a copy inside the call would come on top.
        features = self.merge(merged.contiguous(memory_format=torch.channels_last_3d))
        return features, self.match(features, tokens)


class AttentionUNet(nn.Module):
    """A pathway that reads the CT, and one decoder that draws all lesions.

    It sees the box of patches around the body, one sample at a time: the boxes differ in size. So
    ZeRO-3 gathers it whole. DeepSpeed reduces the gradients of a smaller block after each call.
    """

    is_gathered_whole: ClassVar[bool] = True
    """Whether it is one of the blocks of `rectvlm.train.engine.leaf_modules`."""

    def __init__(self, config: LocalizerConfig, data: DataConfig, encoder: EncoderConfig) -> None:
        super().__init__()
        strides = level_strides(encoder.patch)
        levels = range(len(strides))
        assert len(config.channels) == len(strides), (
            f"localizer.channels {config.channels} must have {len(strides)} entries for patch "
            f"{encoder.patch}"
        )
        self.patch, self.windows = encoder.patch, data.windows
        self.recompute = config.activation_checkpointing
        channels = [*config.channels, config.width]
        self.stem = _ConvBlock(len(data.windows), channels[0])
        self.down = nn.ModuleList(
            _ConvBlock(channels[k], channels[k + 1], strides[k]) for k in levels[:-1]
        )
        self.up = nn.ModuleList(
            DecoderLevel(channels[k + 1], channels[k], config.width, strides[k]) for k in levels
        )
        # Lesions are rare: start near "none".
        self.mask_bias = nn.Parameter(torch.full((2, N_LESIONS), -3.0))

    def forward(
        self,
        ct: Tensor,
        bottom: Tensor,
        patch_logits: Tensor,
        tokens: Tensor,
        boxes: Sequence[PatchBox],
    ) -> tuple[Tensor, Tensor]:
        """Float32 logits of all lesions, (B, L, …) at full and at half resolution.

        Args:
            ct: (B, Z, Y, X) HU.
            bottom: (B, D, z, y, x), denoised patches.
            patch_logits: (B, L, z, y, x).
            tokens: (B, L, D), lesion tokens.
            boxes: patches to look at, of each sample; around them logits are `OUTSIDE_LOGIT`.
        """
        drawn = []
        for number, box in enumerate(boxes):
            row = slice(number, number + 1)
            drawn.append(self._draw(ct[row], bottom[row], patch_logits[row], tokens[row], box))
        full, half = map(_concatenate, zip(*drawn, strict=True))
        return full, half

    def _draw(
        self, ct: Tensor, bottom: Tensor, patch_logits: Tensor, tokens: Tensor, box: PatchBox
    ) -> tuple[Tensor, Tensor]:
        """Float32 logits of all lesions of a sample, (1, L, …) at full and at half resolution.

        Args:
            ct: (1, Z, Y, X) HU.
            bottom: (1, D, z, y, x), denoised patches.
            patch_logits: (1, L, z, y, x).
            tokens: (1, L, D), lesion tokens.
            box: patches that the U-Net sees.
        """
        grid = bottom.shape[2:]
        every = slice(None)
        ct = ct[(every, *_scale_box(box, self.patch))]
        skips = [run_layer(self._run_stem, ct, recompute=self.recompute)]
        for down in self.down:
            skips.append(run_layer(down, skips[-1], recompute=self.recompute))
        inside = (every, every, *box)
        logits = self._decode(bottom[inside], patch_logits[inside], tokens, skips)
        full, half = (_pad_around(level_logits, box, grid) for level_logits in logits)
        return full, half

    def _run_stem(self, ct: Tensor) -> Tensor:
        return self.stem(apply_windows(ct, self.windows).to(self.mask_bias.dtype))

    def _decode(
        self, bottom: Tensor, patch_logits: Tensor, tokens: Tensor, skips: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Float32 logits of all lesions, (B, L, …) at full and at half resolution.

        The decoder says where a lesion is inside a marked patch, so its logits are added to those
        of the patches.

        Args:
            bottom: (B, D, z, y, x), denoised patches.
            patch_logits: (B, L, z, y, x).
            tokens: (B, L, D), lesion tokens.
            skips: features of the CT, (B, c, …) at each level.
        """
        rising, matches, logits = bottom, patch_logits.to(bottom.dtype), {}
        for level in reversed(range(len(self.up))):
            inputs = (rising, matches, skips[level], tokens)
            rising, matches = run_layer(self.up[level], *inputs, recompute=self.recompute)
            if level < len(self.mask_bias):
                marked = F.interpolate(patch_logits, size=matches.shape[2:], mode="trilinear")
                bias = self.mask_bias[level].float().view(-1, 1, 1, 1)
                logits[level] = marked + (matches.float() + bias)
        return logits[0], logits[1]


def _scale_box(box: PatchBox, patch: Triple) -> PatchBox:
    """The voxels of a box of patches."""
    z, y, x = (
        slice(places.start * side, places.stop * side)
        for places, side in zip(box, patch, strict=True)
    )
    return z, y, x


def _pad_around(logits: Tensor, box: PatchBox, grid: Sequence[int]) -> Tensor:
    """Logits (1, L, …) of a box of patches on the whole grid, `OUTSIDE_LOGIT` around it."""
    padding: list[int] = []
    for places, count, size in zip(box, grid, logits.shape[2:], strict=True):
        side = size // (places.stop - places.start)
        # The last axis comes first.
        padding = [places.start * side, (count - places.stop) * side, *padding]
    if not any(padding):
        return logits
    return F.pad(logits, padding, value=OUTSIDE_LOGIT)


def _concatenate(samples: Sequence[Tensor]) -> Tensor:
    return samples[0] if len(samples) == 1 else torch.cat(list(samples))
