"""The localizer: five lesion masks in three steps.

Shapes: B samples, L lesions (5), N = z · y · x patches, Z × Y × X voxels, C encoder width,
D localizer width, K levels of encoder features.

1. Text: each lesion's prompt embedding becomes a lesion token.
2. Denoising transformer: lesion tokens and patch features attend to each other in one sequence. In
   training the patch features carry Gaussian noise of a random strength, and the transformer must
   give the clean ones back. It also marks the patches that hold each lesion, by the product of
   lesion token and patch.
3. Attention U-Net: a convolutional pathway reads the CT at full resolution. One decoder draws all
   lesions: it rises from the denoised patch grid, and at every level its features are matched with
   the lesion tokens, one map a lesion. The next level reads these maps, so its gate knows what is
   sought, and which detail of the CT may pass. The maps of the last level are the masks. They are
   added to the logits of the patches, interpolated to their resolution. The U-Net sees the box of
   patches around the body, one sample at a time: their boxes differ in size.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rectvlm.config import Checkpointing, DataConfig, EncoderConfig, LocalizerConfig
from rectvlm.labels import LESION_FINDING_INDEXES, N_FINDINGS, N_LESIONS
from rectvlm.models.attention_unet import AttentionUNet
from rectvlm.models.image_features import ImageFeatures
from rectvlm.models.layers import Mlp, TransformerBlock, run_layer
from rectvlm.models.prompt_embeddings import PromptEmbeddings
from rectvlm.models.tissue_patches import TissuePatches, find_tissue_boxes, pack_all

AIR_LOGIT = -10.0
"""Logit of a lesion in a patch of air."""


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
        self.patch = encoder.patch
        self.recompute = config.activation_checkpointing
        self.evidence = VolumesToFindings(data.spacing) if config.volumes_to_findings else None
        self.text = nn.Linear(text_width, config.width)
        self.text_offset = nn.Parameter(torch.zeros(N_LESIONS, text_width))
        self.denoiser = PatchDenoiser(config, encoder.width, 1 + len(encoder.tap_blocks))

        self.unet = AttentionUNet(config, data, encoder)

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

        boxes = find_tissue_boxes(tissue, features.patch_grid)
        mask_logits, half_mask_logits = self.unet(
            ct, bottom, patch_logits, denoised.lesion_tokens, boxes
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
