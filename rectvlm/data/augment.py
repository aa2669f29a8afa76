"""Random changes of a training batch, on the device of the batch.

CT, lesions and regions move together; intensities change in the CT alone. Nothing is ever mirrored: the report's sides
and the ids of the regions would have to be rewritten with the image. Draws come from torch's global generator, which
the training loop seeds at every step.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from rectvlm.config import AugmentConfig
from rectvlm.labels import AIR_HU, N_LESIONS
from rectvlm.types import Batch


def augment(batch: Batch, config: AugmentConfig) -> Batch:
    """A changed copy of a batch; its CT becomes float32 HU."""
    chosen = torch.rand(len(batch.keys)) < config.probability
    theta = _affines(len(batch.keys), batch.spacing, tuple(batch.ct.shape[1:]), config)
    intensity = torch.randn(len(batch.keys), 2)
    ct, lesions, regions = batch.ct.to(torch.float32, copy=True), batch.lesions, batch.regions
    for i in torch.nonzero(chosen).flatten().tolist():  # a sample that is not chosen stays exactly as it was
        grid = F.affine_grid(theta[i : i + 1].to(ct.device), [1, 1, *ct.shape[1:]], align_corners=False)
        moved = F.grid_sample(ct[i][None, None] - AIR_HU, grid, mode="bilinear", align_corners=False)[0, 0] + AIR_HU
        offset = (intensity[i, 0].clamp(-2, 2) / 2 * config.intensity).item()
        spread = (intensity[i, 1].abs().clamp(max=2) / 2 * config.noise).item()
        ct[i] = moved + offset + spread * torch.randn_like(moved)
        lesions, regions = _own(lesions, batch.lesions), _own(regions, batch.regions)
        lesions[i] = _move_bits(lesions[i], grid)
        regions[i] = F.grid_sample(regions[i][None, None].float(), grid, mode="nearest", align_corners=False)[0, 0].to(
            regions.dtype
        )
    shown = torch.rand(len(batch.keys)) >= config.hide_regions
    known = batch.regions_known & shown.to(batch.regions_known.device)
    return replace(batch, ct=ct, lesions=lesions, regions=regions, regions_known=known)


def _own(tensor: Tensor, original: Tensor) -> Tensor:
    return tensor.clone() if tensor is original else tensor


def _affines(count: int, spacing: tuple[float, ...], shape: tuple[int, ...], config: AugmentConfig) -> Tensor:
    """(B, 3, 4) for `affine_grid`, whose axes are (x, y, z) from −1 to 1: rotation about z, scale, shift.

    The in-plane rotation is made in millimetres, so that it stays one where rows and columns differ.
    """
    angle = (torch.rand(count) * 2 - 1) * math.radians(config.rotate)
    scale = 1 + (torch.rand(count, 1, 1) * 2 - 1) * config.scale
    shift = (torch.rand(count, 3) * 2 - 1) * config.shift * 2
    height, width = shape[1] * spacing[1], shape[2] * spacing[2]
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros(count), torch.ones(count)
    rows = [
        torch.stack([cos, -sin * height / width, zero], 1),
        torch.stack([sin * width / height, cos, zero], 1),
        torch.stack([zero, zero, one], 1),
    ]
    return torch.cat([torch.stack(rows, 1) * scale, shift[:, :, None]], 2)


def _move_bits(bits: Tensor, grid: Tensor) -> Tensor:
    """Each lesion moved by linear interpolation and cut at one half; (Z, Y, X) uint8."""
    present = [k for k in range(N_LESIONS) if bool((bits >> k & 1).any())]
    out = torch.zeros_like(bits)
    for k in present:
        share = F.grid_sample((bits >> k & 1).float()[None, None], grid, mode="bilinear", align_corners=False)[0, 0]
        out |= (share >= 0.5).to(bits.dtype) << k
    return out
