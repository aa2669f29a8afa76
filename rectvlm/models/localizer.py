"""The localizer: five lesion masks in three steps.

Shapes: B samples, L lesions (5), N = z · y · x patches, Z × Y × X voxels, C encoder width,
D localizer width, K levels of encoder features, c channels of a U-Net level (level 0 is full
resolution).

1. Text: each lesion's prompt embedding becomes a lesion token.
2. Denoising transformer: lesion tokens and patch features attend to each other in one sequence. In
   training the patch features carry Gaussian noise of a random strength, and the transformer must
   give the clean ones back. It also marks the patches that hold each lesion, by the product of
   lesion token and patch.
3. Attention U-Net: a convolutional pathway reads the CT at full resolution. One decoder draws all
   lesions: it rises from the denoised patch grid, and at every level its features are matched with
   the lesion tokens, one map a lesion. The next level reads these maps, so its gate knows what is
   sought, and which detail of the CT may pass. The maps of the last level are the masks. They are
   added to the logits of the patches, interpolated to their resolution.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rectvlm.config import NORM_GROUPS, Checkpointing, DataConfig, EncoderConfig, LocalizerConfig
from rectvlm.labels import LESION_FINDING_INDEXES, N_FINDINGS, N_LESIONS
from rectvlm.models.image_features import ImageFeatures, apply_windows
from rectvlm.models.layers import Mlp, TransformerBlock, run_layer
from rectvlm.models.memory_efficient import (
    GeluSingleChannelConv,
    NormGelu,
    upsample_nearest,
)
from rectvlm.models.prompt_embeddings import PromptEmbeddings
from rectvlm.models.tissue_patches import TissuePatches, pack_all

AIR_LOGIT = -10.0
"""Logit of a lesion in a patch of air."""

Triple = tuple[int, int, int]
"""One number an axis, (z, y, x)."""


class LocalizerOutput(NamedTuple):
    """Predictions of the localizer for a batch. All logits are float32."""

    mask_logits: Tensor
    """(B, L, Z, Y, X), for each voxel."""
    half_mask_logits: Tensor
    """(B, L, …), for each voxel of level 1, for deep supervision."""
    patch_logits: Tensor
    """(B, L, z, y, x), for each patch: it holds the lesion."""
    alignment_logits: Tensor
    """(B, L), that the patches marked by `patch_logits` match the lesion's prompt."""
    denoising_loss: Tensor
    """Mean squared error of the denoised patch features, a scalar; 0 outside training."""
    finding_logits: Tensor | None = None
    """(B, 18), to be added to the classifier's logits; None without `volumes_to_findings`."""
    recompute: Checkpointing = False
    """Whether the loss of the logits is to be computed again in the backward pass, as the
    activations of the localizer are."""


class DenoiserOutput(NamedTuple):
    """Predictions of the denoising transformer for a batch."""

    patches: Tensor
    """(B, N, D), denoised."""
    lesion_tokens: Tensor
    """(B, L, D), each lesion's prompt plus the output of the transformer for it."""
    patch_logits: Tensor
    """(B, L, N)."""
    alignment_logits: Tensor
    """(B, L)."""
    denoising_loss: Tensor
    """Mean squared error of the denoised patch features, a scalar; 0 outside training."""


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


class PatchDenoiser(nn.Module):
    """Step 2: lesion tokens and patch features in one transformer."""

    def __init__(self, config: LocalizerConfig, image_width: int, levels: int) -> None:
        super().__init__()
        self.noise, self.recompute = config.noise, config.activation_checkpointing
        self.inputs = nn.Linear(image_width * levels, config.width)
        self.level = Mlp(1, config.width, out=config.width)
        self.blocks = nn.ModuleList(
            TransformerBlock(config.width, config.heads) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width)
        self.clean = nn.Linear(config.width, image_width)
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.full((N_LESIONS,), -2.0))

    def forward(
        self, levels: Tensor, patches: Tensor, text: Tensor, tissue: TissuePatches
    ) -> DenoiserOutput:
        """Denoise the patches and mark the lesions among them.

        Args:
            levels: (B, N, K · C), patches of several encoder levels.
            patches: (B, N, C), patches of the last level.
            text: (B, L, D), lesion tokens.
            tissue: patches to look at; the others come out as 0, without a lesion.
        """
        count = patches.shape[1]
        # Before packing, so that the noise of a case is the same whatever lies beside it.
        std = patches.detach().std(dim=(1, 2), keepdim=True)
        levels, patches = tissue.pack(levels), tissue.pack(patches)
        strength = torch.zeros(len(patches), 1, 1, device=patches.device, dtype=patches.dtype)
        noisy = levels
        if self.training:
            strength = torch.rand_like(strength) * self.noise
            noisy = levels + strength * std * torch.randn_like(levels)

        x = torch.cat([text, self.inputs(noisy) + self.level(strength)], dim=1)
        mask = None
        if tissue.has_filler:
            mask = F.pad(tissue.is_tissue, (text.shape[1], 0), value=True)[:, None, None]
        for block in self.blocks:
            x = run_layer(block, x, None, mask, recompute=self.recompute)
        tokens, x = self.norm(x).split([text.shape[1], patches.shape[1]], dim=1)

        lesion_tokens = tokens + text
        patch_logits = self._match_logits("bld,bnd->bln", tokens, x)
        is_filler = ~tissue.is_tissue[:, None]
        marked = patch_logits.masked_fill(is_filler, -torch.inf).softmax(-1) @ x.float()
        alignment_logits = self._match_logits("bld,bld->bl", lesion_tokens, marked)
        loss = patch_logits.new_zeros(())
        if self.training:
            error = (self.clean(x).float() - patches.detach().float()).square().mean(-1)
            # Of each sample first: the loss must not depend on how a step is cut.
            loss = ((error * tissue.is_tissue).sum(1) / tissue.is_tissue.sum(1).clamp_min(1)).mean()
        return DenoiserOutput(
            tissue.unpack(x, count),
            lesion_tokens,
            tissue.unpack(patch_logits.mT, count, AIR_LOGIT).mT,
            alignment_logits,
            loss,
        )

    def _match_logits(self, product: str, lesions: Tensor, image: Tensor) -> Tensor:
        """Float32 logits (B, L, …) of the match of lesions (B, L, D) and image features; `product`
        is the einsum of the two."""
        similarity = torch.einsum(product, lesions.float(), image.float()) / image.shape[-1] ** 0.5
        bias = self.bias.float().view(-1, *[1] * (similarity.ndim - 2))
        return self.scale.float() * similarity + bias


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


class VolumesToFindings(nn.Module):
    """Finding logits from the masks' volumes: an affine map of log(V + v₀), V the expected volume
    in ml.

    At the start each lesion raises the logit of its own finding alone.
    """

    VOLUME_FLOOR_ML = 0.3
    """v₀. It exceeds the smallest nodule that counts (8 mm have 0.27 ml), so that specks change the
    logits little."""

    def __init__(self, spacing: tuple[float, float, float]) -> None:
        super().__init__()
        self.voxel_ml = spacing[0] * spacing[1] * spacing[2] / 1000
        self.map = nn.Linear(N_LESIONS, N_FINDINGS)
        nn.init.zeros_(self.map.bias)
        nn.init.zeros_(self.map.weight)
        with torch.no_grad():
            self.map.weight[list(LESION_FINDING_INDEXES), range(N_LESIONS)] = 1.0

    def forward(self, mask_logits: Tensor) -> Tensor:
        """(B, L, Z, Y, X) to (B, 18) float32."""
        volume_ml = mask_logits.float().sigmoid().flatten(2).sum(2) * self.voxel_ml
        log_volume = (volume_ml + self.VOLUME_FLOOR_ML).log()
        return self.map(log_volume.to(self.map.weight.dtype)).float()


class LesionLocalizer(nn.Module):
    """Lesion prompts, denoising transformer, attention U-Net."""

    def __init__(
        self, config: LocalizerConfig, data: DataConfig, encoder: EncoderConfig, text_width: int
    ) -> None:
        super().__init__()
        strides = level_strides(encoder.patch)
        levels = range(len(strides))
        assert len(config.channels) == len(strides), (
            f"localizer.channels {config.channels} must have {len(strides)} entries for patch "
            f"{encoder.patch}"
        )
        self.patch, self.windows = encoder.patch, data.windows
        self.recompute = config.activation_checkpointing
        self.evidence = VolumesToFindings(data.spacing) if config.volumes_to_findings else None
        self.text = nn.Linear(text_width, config.width)
        self.text_offset = nn.Parameter(torch.zeros(N_LESIONS, text_width))
        self.denoiser = PatchDenoiser(config, encoder.width, 1 + len(encoder.tap_blocks))

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
        self, ct: Tensor, features: ImageFeatures, prompts: PromptEmbeddings
    ) -> LocalizerOutput:
        """Outline the lesions.

        Args:
            ct: (B, Z, Y, X) HU, any dtype.
            features: features of the same CT.
            prompts: prompt embeddings, of which those of the lesions are read.
        """
        self._check_inputs(ct, features, prompts)
        text = self.text(prompts.lesions.to(self.text.weight.dtype) + self.text_offset)
        text = text.expand(len(ct), -1, -1)
        tissue = pack_all(features.patches) if features.tissue is None else features.tissue
        denoised = self.denoiser(features.multilevel_patches, features.patches, text, tissue)
        bottom = denoised.patches.transpose(1, 2).unflatten(2, features.patch_grid)
        patch_logits = denoised.patch_logits.unflatten(2, features.patch_grid)

        skips = [run_layer(self._run_stem, ct, recompute=self.recompute)]
        for down in self.down:
            skips.append(run_layer(down, skips[-1], recompute=self.recompute))

        mask_logits, half_mask_logits = self._decode(
            bottom, patch_logits, denoised.lesion_tokens, skips
        )
        return LocalizerOutput(
            mask_logits=mask_logits,
            half_mask_logits=half_mask_logits,
            patch_logits=patch_logits,
            alignment_logits=denoised.alignment_logits,
            denoising_loss=denoised.denoising_loss,
            finding_logits=None if self.evidence is None else self.evidence(mask_logits),
            recompute=self.recompute,
        )

    def _check_inputs(self, ct: Tensor, features: ImageFeatures, prompts: PromptEmbeddings) -> None:
        assert ct.ndim == 4, f"a CT must be (B, Z, Y, X), not {tuple(ct.shape)}"
        z, y, x = features.patch_grid
        tiled = tuple(n * side for n, side in zip(features.patch_grid, self.patch, strict=True))
        assert tuple(ct.shape[1:]) == tiled, (
            f"features of {z} × {y} × {x} patches of {self.patch} belong to a CT of {tiled} "
            f"voxels, not of {tuple(ct.shape[1:])}"
        )
        patches, levels = features.patches, features.multilevel_patches
        rows = (len(ct), z * y * x)
        for name, tensor, shape in (
            ("features.patches", patches, (*rows, self.denoiser.clean.out_features)),
            ("features.multilevel_patches", levels, (*rows, self.denoiser.inputs.in_features)),
            ("lesion prompts", prompts.lesions, (N_LESIONS, self.text.in_features)),
        ):
            assert tensor.shape == shape, (
                f"{name} must be of shape {shape}, not {tuple(tensor.shape)}"
            )
        dtype, device = self.text.weight.dtype, self.text.weight.device
        assert levels.dtype == patches.dtype == dtype, (
            f"features must be {dtype} as the localizer is, not {patches.dtype}"
        )
        devices = {ct.device, patches.device, levels.device, prompts.lesions.device}
        assert devices == {device}, (
            f"CT, features, prompts and localizer must be on {device}, not on {devices}"
        )

    def _run_stem(self, ct: Tensor) -> Tensor:
        return self.stem(apply_windows(ct, self.windows).to(self.text.weight.dtype))

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
