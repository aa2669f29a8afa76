"""The localizer: five lesion masks in three stages.

Shapes: B samples, L lesions (5), N = z · y · x patches, Z × Y × X voxels, C encoder width, D localizer width,
K levels of the U-Net (level 0 is full resolution).

1. Text: each lesion's prompt embedding becomes a lesion token.
2. Denoising transformer: lesion tokens and patch features attend to each other in one sequence. In training the patch
   features carry Gaussian noise of a random strength, and the transformer must give the clean ones back; it also marks
   the patches that hold each lesion, by the product of lesion token and patch.
3. Attention U-Net: a convolutional pathway reads the CT at full resolution; the decoder rises from the denoised patch
   grid, and at every level a gate that sees the lesion token decides which CT detail passes. One decoder serves all
   lesions; the token alone tells it which one to draw. Its logits refine those of the patches, which reach the masks
   by interpolation.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rectvlm.config import DataConfig, EncoderConfig, LocalizerConfig
from rectvlm.labels import N_LESIONS
from rectvlm.models.encoder import Features, apply_windows
from rectvlm.models.layers import Block, Mlp
from rectvlm.models.text import Prompts

Triple = tuple[int, int, int]


class Localization(NamedTuple):
    """What the localizer says of a batch; all logits are float32."""

    masks: Tensor
    """(B, L, Z, Y, X) logits."""
    half: Tensor
    """(B, L, …) logits of level 1, for deep supervision."""
    coarse: Tensor
    """(B, L, z, y, x) logits: does the patch hold the lesion?"""
    denoising: Tensor
    """Scalar: mean squared error of the denoised patch features; 0 outside training."""


def level_strides(patch: Triple) -> list[Triple]:
    """Strides from each level of the U-Net to the next, down to the patch grid: the longest axes are halved first.

    `(4, 8, 8)` gives `[(1, 2, 2), (2, 2, 2), (2, 2, 2)]`.
    """
    assert all(p & (p - 1) == 0 for p in patch), f"patch {patch} is not made of powers of 2"
    strides, left = [], list(patch)
    while max(left) > 1:
        stride = tuple(2 if side == max(left) else 1 for side in left)
        left = [side // s for side, s in zip(left, stride, strict=True)]
        strides.append(stride)
    return strides  # type: ignore[return-value]


class _ConvBlock(nn.Module):
    """3 × 3 × 3 convolution, group norm, GELU."""

    def __init__(self, inputs: int, outputs: int, stride: Triple = (1, 1, 1)) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, 3, stride=stride, padding=1)
        self.norm = nn.GroupNorm(min(4, outputs), outputs)

    def forward(self, x: Tensor) -> Tensor:
        # With few channels the convolution is twice as fast channels-last, the norm 20 times as fast channels-first.
        x = self.conv(x.contiguous(memory_format=torch.channels_last_3d))
        return F.gelu(self.norm(x.contiguous()))


class Denoiser(nn.Module):
    """Stage 2: lesion tokens and patch features in one transformer."""

    def __init__(self, config: LocalizerConfig, image_width: int, levels: int) -> None:
        super().__init__()
        self.noise = config.noise
        self.inputs = nn.Linear(image_width * levels, config.width)
        self.level = Mlp(1, config.width, out=config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.clean = nn.Linear(config.width, image_width)
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.full((N_LESIONS,), -2.0))

    def forward(self, levels: Tensor, patches: Tensor, lesions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Patches of several encoder levels (B, N, K · C), of the last (B, N, C), and lesion tokens (B, L, D) to
        denoised patches (B, N, D), tokens, coarse logits (B, L, N) and the denoising loss."""
        strength = torch.zeros(len(patches), 1, 1, device=patches.device, dtype=patches.dtype)
        noisy = levels
        if self.training:
            strength = torch.rand_like(strength) * self.noise
            noisy = levels + strength * patches.detach().std(dim=(1, 2), keepdim=True) * torch.randn_like(levels)
        x = torch.cat([lesions, self.inputs(noisy) + self.level(strength)], dim=1)
        for block in self.blocks:
            x = block(x)
        lesions, x = self.norm(x).split([lesions.shape[1], patches.shape[1]], dim=1)
        similarity = torch.einsum("bld,bnd->bln", lesions.float(), x.float()) / x.shape[-1] ** 0.5
        coarse = self.scale.float() * similarity + self.bias.float()[:, None]
        loss = coarse.new_zeros(())
        if self.training:
            loss = F.mse_loss(self.clean(x).float(), patches.detach().float())
        return x, lesions, coarse, loss


class Gate(nn.Module):
    """Attention gate (Oktay et al., 2018) that also sees the lesion's text: one weight a voxel for the CT's detail."""

    def __init__(self, channels: int, text_width: int) -> None:
        super().__init__()
        self.skip, self.rising = nn.Conv3d(channels, channels, 1), nn.Conv3d(channels, channels, 1)
        self.text = nn.Linear(text_width, channels)
        self.weight = nn.Conv3d(channels, 1, 1)

    def forward(self, skip: Tensor, seen: Tensor, rising: Tensor, text: Tensor) -> Tensor:
        """The skip connection, voxels weighted: (B, c, …) to (B, c, …). `seen` is `self.skip(skip)`: it is the same
        for every lesion, so the caller computes it once."""
        seen = seen + self.rising(rising) + self.text(text)[:, :, None, None, None]
        return skip * self.weight(F.gelu(seen)).sigmoid()


class Level(nn.Module):
    """One step up: enlarge, gate the CT's detail, merge."""

    def __init__(self, inputs: int, channels: int, text_width: int, stride: Triple) -> None:
        super().__init__()
        self.stride = stride
        self.reduce = nn.Conv3d(inputs, channels, 1)
        self.gate = Gate(channels, text_width)
        self.merge = _ConvBlock(channels, channels)

    def forward(self, rising: Tensor, skip: Tensor, seen: Tensor, text: Tensor) -> Tensor:
        """(B, inputs, coarse grid) and skip (B, c, fine grid) to (B, c, fine grid)."""
        scale = tuple(float(s) for s in self.stride)
        rising = F.interpolate(self.reduce(rising), scale_factor=scale, mode="nearest")
        return self.merge(rising + self.gate(skip, seen, rising, text))


class Localizer(nn.Module):
    """Text, denoising transformer, text-guided attention U-Net."""

    def __init__(self, config: LocalizerConfig, data: DataConfig, encoder: EncoderConfig, text_width: int) -> None:
        super().__init__()
        strides = level_strides(encoder.patch)
        assert len(config.channels) == len(strides), (
            f"localizer.channels {config.channels} must have {len(strides)} entries for patch {encoder.patch}"
        )
        self.windows, self.checkpointing = data.windows, config.checkpointing
        self.text = nn.Linear(text_width, config.width)
        self.text_offset = nn.Parameter(torch.zeros(N_LESIONS, text_width))
        self.denoiser = Denoiser(config, encoder.width, 1 + len(encoder.taps))

        channels = [*config.channels, config.width]
        self.stem = _ConvBlock(len(data.windows), channels[0])
        self.down = nn.ModuleList(
            _ConvBlock(channels[k], channels[k + 1], strides[k]) for k in range(len(config.channels) - 1)
        )
        self.film = nn.Linear(config.width, 2 * config.width)
        self.up = nn.ModuleList(
            Level(channels[k + 1], channels[k], config.width, strides[k]) for k in range(len(config.channels))
        )
        self.head_half = nn.Conv3d(channels[1], 1, 1)
        self.head = nn.Conv3d(channels[0], 1, 1)
        for head in (self.head_half, self.head):
            nn.init.constant_(head.bias, -3.0)  # type: ignore[arg-type]  # lesions are rare: start near "none"

    def forward(self, ct: Tensor, features: Features, prompts: Prompts) -> Localization:
        """Outline the lesions.

        Args:
            ct: (B, Z, Y, X) HU, any dtype.
            features: of the same CT.
            prompts: the lesion prompts are read.
        """
        dtype = self.text.weight.dtype
        text = self.text(prompts.lesions.to(dtype) + self.text_offset).expand(len(ct), -1, -1)
        patches, lesions, coarse, denoising = self.denoiser(features.levels, features.patches, text)
        lesions = lesions + text
        bottom = patches.transpose(1, 2).unflatten(2, features.grid)

        skips = [self.stem(apply_windows(ct, self.windows).to(dtype))]
        for down in self.down:
            skips.append(down(skips[-1]))
        seen = [self.up[k].gate.skip(skip) for k, skip in enumerate(skips)]  # type: ignore[union-attr, operator]

        masks, halves = [], []
        for lesion in lesions.unbind(1):
            # One lesion at a time: the decoder's full-resolution activations exist once, not L times.
            mask, half = (
                checkpoint(self._draw, bottom, lesion, skips, seen, use_reentrant=False)
                if self.checkpointing and torch.is_grad_enabled()
                else self._draw(bottom, lesion, skips, seen)
            )
            masks.append(mask)
            halves.append(half)
        coarse = coarse.unflatten(2, features.grid)
        return Localization(
            self._refine(torch.cat(masks, 1), coarse), self._refine(torch.cat(halves, 1), coarse), coarse, denoising
        )

    @staticmethod
    def _refine(detail: Tensor, coarse: Tensor) -> Tensor:
        """The decoder's logits, added to those of the patches: it says where inside a marked patch the lesion is."""
        return detail.float() + F.interpolate(coarse, size=detail.shape[2:], mode="trilinear")

    def _draw(self, bottom: Tensor, lesion: Tensor, skips: list[Tensor], seen: list[Tensor]) -> tuple[Tensor, Tensor]:
        scale, shift = self.film(lesion)[..., None, None, None].chunk(2, dim=1)
        rising = bottom * (1 + scale) + shift
        half = None
        for k in reversed(range(len(self.up))):
            rising = self.up[k](rising, skips[k], seen[k], lesion)
            if k == 1:
                half = self.head_half(rising)
        assert half is not None, "a U-Net of one level has no deep supervision"
        return self.head(rising), half
