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

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rectvlm.config import NORM_GROUPS, DataConfig, EncoderConfig, LocalizerConfig
from rectvlm.labels import LESION_FINDING_INDEXES, N_FINDINGS, N_LESIONS
from rectvlm.models.encoder import ImageFeatures, apply_windows
from rectvlm.models.layers import Mlp, TransformerBlock
from rectvlm.models.memory_efficient import (
    GeluSingleChannelConv,
    NormGelu,
    SingleChannelConv,
    upsample_nearest,
)
from rectvlm.models.prompt_embeddings import PromptEmbeddings

Triple = tuple[int, int, int]


class LocalizerOutput(NamedTuple):
    """What the localizer says of a batch; all logits are float32."""

    mask_logits: Tensor
    """(B, L, Z, Y, X) logits."""
    half_mask_logits: Tensor
    """(B, L, …) logits of level 1, for deep supervision."""
    patch_logits: Tensor
    """(B, L, z, y, x) logits: does the patch hold the lesion?"""
    alignment_logits: Tensor
    """(B, L) logits: do the patches that `coarse` points at match the lesion's prompt?"""
    denoising_loss: Tensor
    """Scalar: mean squared error of the denoised patch features; 0 outside training."""
    finding_logits: Tensor | None = None
    """(B, 18) float32 to be added to the classifier's logits, where the configuration lets masks inform."""


class DenoiserOutput(NamedTuple):
    """What the denoising transformer says."""

    patches: Tensor
    """(B, N, D), denoised."""
    lesion_tokens: Tensor
    """(B, L, D): each lesion's prompt and what the transformer made of it."""
    patch_logits: Tensor
    """(B, L, N) logits."""
    alignment_logits: Tensor
    """(B, L) logits."""
    denoising_loss: Tensor
    """Scalar loss."""


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
        self.norm = NormGelu(min(NORM_GROUPS, outputs), outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, …) to (B, outputs, …), smaller by the stride."""
        # With few channels the convolution is twice as fast channels-last, the norm 20 times as fast channels-first.
        return self.norm(self.conv(x.contiguous(memory_format=torch.channels_last_3d)).contiguous())


class PatchDenoiser(nn.Module):
    """Stage 2: lesion tokens and patch features in one transformer."""

    def __init__(self, config: LocalizerConfig, image_width: int, levels: int) -> None:
        super().__init__()
        self.noise, self.checkpointing = config.noise, config.activation_checkpointing
        self.inputs = nn.Linear(image_width * levels, config.width)
        self.level = Mlp(1, config.width, out=config.width)
        self.blocks = nn.ModuleList(
            TransformerBlock(config.width, config.heads) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width)
        self.clean = nn.Linear(config.width, image_width)
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.full((N_LESIONS,), -2.0))

    def forward(self, levels: Tensor, patches: Tensor, text: Tensor) -> DenoiserOutput:
        """Read the patches.

        Args:
            levels: (B, N, K · C), patches of several encoder levels.
            patches: (B, N, C), those of the last.
            text: (B, L, D), the lesions' prompts.
        """
        strength = torch.zeros(len(patches), 1, 1, device=patches.device, dtype=patches.dtype)
        noisy = levels
        if self.training:
            strength = torch.rand_like(strength) * self.noise
            noisy = levels + strength * patches.detach().std(
                dim=(1, 2), keepdim=True
            ) * torch.randn_like(levels)
        x = torch.cat([text, self.inputs(noisy) + self.level(strength)], dim=1)
        for block in self.blocks:
            x = _run_recomputed(block, x) if self.checkpointing else block(x)
        tokens, x = self.norm(x).split([text.shape[1], patches.shape[1]], dim=1)
        lesions = tokens + text
        coarse = self._match_logits("bld,bnd->bln", tokens, x)
        pooled = coarse.softmax(-1) @ x.float()
        alignment = self._match_logits("bld,bld->bl", lesions, pooled)
        loss = coarse.new_zeros(())
        if self.training:
            loss = F.mse_loss(self.clean(x).float(), patches.detach().float())
        return DenoiserOutput(x, lesions, coarse, alignment, loss)

    def _match_logits(self, product: str, lesions: Tensor, image: Tensor) -> Tensor:
        """Logits (B, L, …) of lesions (B, L, D) and what they are compared with, in float32."""
        similarity = torch.einsum(product, lesions.float(), image.float()) / image.shape[-1] ** 0.5
        bias = self.bias.float().view(-1, *[1] * (similarity.ndim - 2))
        return self.scale.float() * similarity + bias


class AttentionGate(nn.Module):
    """Attention gate (Oktay et al., 2018) that also sees the lesion's text: one weight a voxel for the CT's detail."""

    def __init__(self, channels: int, text_width: int) -> None:
        super().__init__()
        self.skip, self.rising = nn.Conv3d(channels, channels, 1), nn.Conv3d(channels, channels, 1)
        self.text = nn.Linear(text_width, channels)
        self.weight = GeluSingleChannelConv(channels)

    def forward(self, skip: Tensor, rising: Tensor, text: Tensor, stride: Triple) -> Tensor:
        """Weights (B, 1, fine grid) in 0 to 1 for skip (B, c, fine grid), from it, what rises (B, c, coarse grid) and
        the lesion (B, D). A 1 × 1 × 1 convolution may as well come before the enlargement: there it has less to do."""
        rising = self.rising(rising) + self.text(text)[:, :, None, None, None]
        return self.weight(self.skip(skip) + upsample_nearest(rising, stride)).sigmoid()


class DecoderLevel(nn.Module):
    """One step up: enlarge, gate the CT's detail, merge."""

    def __init__(self, inputs: int, channels: int, text_width: int, stride: Triple) -> None:
        super().__init__()
        self.stride = stride
        self.reduce = nn.Conv3d(inputs, channels, 1)
        self.gate = AttentionGate(channels, text_width)
        self.merge = _ConvBlock(channels, channels)

    def forward(self, rising: Tensor, skip: Tensor, text: Tensor) -> Tensor:
        """(B, inputs, coarse grid) and skip (B, c, fine grid) to (B, c, fine grid)."""
        rising = self.reduce(rising)
        weight = self.gate(skip, rising, text, self.stride)
        merged = torch.addcmul(upsample_nearest(rising, self.stride), skip, weight)
        # Laid out as the convolution wants it before the call, since a caller keeps what it passes on alive.
        merged = merged.contiguous(memory_format=torch.channels_last_3d)
        return self.merge(merged)


def _run_recomputed(function: Callable[..., Any], *inputs: Any) -> Any:
    """Call a function of which the backward pass keeps the inputs alone. Nothing in it may be random."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class VolumesToFindings(nn.Module):
    """What the masks' volumes say of the findings: an affine map of log(V + v₀), V the expected volume in ml.

    It starts as what the definitions of the lesions say: each speaks for its own finding alone.
    """

    VOLUME_FLOOR_ML = 0.3
    """v₀: less than the smallest nodule that counts (8 mm have 0.27 ml), so that specks say next to nothing."""

    def __init__(self, spacing: tuple[float, float, float]) -> None:
        super().__init__()
        self.voxel_ml = spacing[0] * spacing[1] * spacing[2] / 1000
        self.map = nn.Linear(N_LESIONS, N_FINDINGS)
        nn.init.zeros_(self.map.bias)
        nn.init.zeros_(self.map.weight)
        with torch.no_grad():
            self.map.weight[list(LESION_FINDING_INDEXES), range(N_LESIONS)] = 1.0

    def forward(self, masks: Tensor) -> Tensor:
        """(B, 18) float32 from mask logits (B, L, Z, Y, X)."""
        volume = masks.float().sigmoid().flatten(2).sum(2) * self.voxel_ml
        return self.map((volume + self.VOLUME_FLOOR_ML).log().to(self.map.weight.dtype)).float()


class LesionLocalizer(nn.Module):
    """Text, denoising transformer, text-guided attention U-Net."""

    def __init__(
        self, config: LocalizerConfig, data: DataConfig, encoder: EncoderConfig, text_width: int
    ) -> None:
        super().__init__()
        strides = level_strides(encoder.patch)
        assert len(config.channels) == len(strides), (
            f"localizer.channels {config.channels} must have {len(strides)} entries for patch {encoder.patch}"
        )
        self.patch, self.windows, self.checkpointing = (
            encoder.patch,
            data.windows,
            config.activation_checkpointing,
        )
        self.evidence = VolumesToFindings(data.spacing) if config.volumes_to_findings else None
        self.text = nn.Linear(text_width, config.width)
        self.text_offset = nn.Parameter(torch.zeros(N_LESIONS, text_width))
        self.denoiser = PatchDenoiser(config, encoder.width, 1 + len(encoder.tap_blocks))

        channels = [*config.channels, config.width]
        self.stem = _ConvBlock(len(data.windows), channels[0])
        self.down = nn.ModuleList(
            _ConvBlock(channels[k], channels[k + 1], strides[k])
            for k in range(len(config.channels) - 1)
        )
        self.film = nn.Linear(config.width, 2 * config.width)
        self.up = nn.ModuleList(
            DecoderLevel(channels[k + 1], channels[k], config.width, strides[k])
            for k in range(len(config.channels))
        )
        self.head_half = SingleChannelConv(channels[1])
        self.head = SingleChannelConv(channels[0])
        for head in (self.head_half, self.head):
            nn.init.constant_(head.bias, -3.0)  # type: ignore[arg-type]  # lesions are rare: start near "none"

    def forward(
        self, ct: Tensor, features: ImageFeatures, prompts: PromptEmbeddings
    ) -> LocalizerOutput:
        """Outline the lesions.

        Args:
            ct: (B, Z, Y, X) HU, any dtype.
            features: of the same CT.
            prompts: the lesion prompts are read.
        """
        self._check_inputs(ct, features, prompts)
        text = self.text(prompts.lesions.to(self.text.weight.dtype) + self.text_offset).expand(
            len(ct), -1, -1
        )
        found = self.denoiser(features.multilevel_patches, features.patches, text)
        bottom = found.patches.transpose(1, 2).unflatten(2, features.patch_grid)
        coarse = found.patch_logits.unflatten(2, features.patch_grid)

        keep = _run_recomputed if self.checkpointing else _run_plain
        skips = [keep(self._run_stem, ct)]
        for down in self.down:
            skips.append(keep(down, skips[-1]))
        # One lesion at a time: the decoder's full-resolution activations exist once, not L times.
        drawn = [
            keep(self._decode_lesion, bottom, lesion, marked[:, None], skips)
            for lesion, marked in zip(found.lesion_tokens.unbind(1), coarse.unbind(1), strict=True)
        ]
        masks, halves = (torch.cat(parts, 1) for parts in zip(*drawn, strict=True))
        findings = None if self.evidence is None else self.evidence(masks)
        return LocalizerOutput(
            masks, halves, coarse, found.alignment_logits, found.denoising_loss, findings
        )

    def _check_inputs(self, ct: Tensor, features: ImageFeatures, prompts: PromptEmbeddings) -> None:
        assert ct.ndim == 4, f"a CT must be (B, Z, Y, X), not {tuple(ct.shape)}"
        z, y, x = features.patch_grid
        tiled = tuple(n * p for n, p in zip(features.patch_grid, self.patch, strict=True))
        assert tuple(ct.shape[1:]) == tiled, (
            f"features of {z} × {y} × {x} patches of {self.patch} belong to a CT of {tiled} voxels, not of "
            f"{tuple(ct.shape[1:])}"
        )
        for name, tensor, shape in (
            (
                "features.patches",
                features.patches,
                (len(ct), z * y * x, self.denoiser.clean.out_features),
            ),
            (
                "features.multilevel_patches",
                features.multilevel_patches,
                (len(ct), z * y * x, self.denoiser.inputs.in_features),
            ),
            ("lesion prompts", prompts.lesions, (N_LESIONS, self.text.in_features)),
        ):
            assert tensor.shape == shape, (
                f"{name} must be of shape {shape}, not {tuple(tensor.shape)}"
            )
        assert (
            features.multilevel_patches.dtype == features.patches.dtype == self.text.weight.dtype
        ), (
            f"features must be {self.text.weight.dtype} as the localizer is, not {features.patches.dtype}"
        )
        places = {
            ct.device,
            features.patches.device,
            features.multilevel_patches.device,
            prompts.lesions.device,
        }
        assert places == {self.text.weight.device}, (
            f"CT, features, prompts and localizer must be on {self.text.weight.device}, not on {places}"
        )

    def _run_stem(self, ct: Tensor) -> Tensor:
        return self.stem(apply_windows(ct, self.windows).to(self.text.weight.dtype))

    def _decode_lesion(
        self, bottom: Tensor, lesion: Tensor, marked: Tensor, skips: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Logits of one lesion, (B, 1, …) at full and at half resolution.

        The decoder's are added to those of the patches, (B, 1, z, y, x): it says where inside a marked patch the lesion
        is.
        """
        scale, shift = self.film(lesion)[..., None, None, None].chunk(2, dim=1)
        rising = bottom * (1 + scale) + shift
        found = {}
        for k in reversed(range(len(self.up))):
            rising = self.up[k](rising, skips[k], lesion)
            if k < 2:
                detail = (self.head, self.head_half)[k](rising)
                found[k] = detail.float() + F.interpolate(
                    marked, size=detail.shape[2:], mode="trilinear"
                )
        return found[0], found[1]


def _run_plain(function: Callable[..., Any], *inputs: Any) -> Any:
    return function(*inputs)
