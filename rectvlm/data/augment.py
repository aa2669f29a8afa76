"""Augmentation of a training batch, on the device of the batch.

CT, lesions and regions move together, through one sampling grid for each sample. Intensities change
in the CT alone. A mirror image takes its text and its region ids along (see `mirror`).

Parameters are drawn from torch's global generator on the CPU, which the training loop seeds at
every step, so a step repeats exactly on the same kind of device. Another kind of device differs in
rounding and in the noise of single voxels, which is made on the device from a seed drawn here.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from rectvlm.config import AugmentConfig
from rectvlm.data.mirror import mirror_samples
from rectvlm.data.warp import SpatialWarp, draw_warps
from rectvlm.labels import AIR_HU
from rectvlm.lesion_bits import lesion_mask, pack_lesion, present_lesions
from rectvlm.types import Batch


def augment_batch(batch: Batch, config: AugmentConfig) -> Batch:
    """Make a changed copy of a batch, with its CT as float32 HU.

    A sample that is not chosen keeps every bit.
    """
    count = len(batch.keys)
    chosen = torch.rand(count) < config.probability
    is_mirrored = chosen & (torch.rand(count) < config.mirror)
    shown = torch.rand(count) >= config.hide_regions
    intensity = torch.randn(count, 3).clamp(-2, 2) / 2
    intensity = intensity * torch.tensor([config.contrast, config.intensity, config.noise])
    seeds = torch.randint(1 << 62, (count,)).tolist()
    z, y, x = batch.ct.shape[1:]
    warps = draw_warps(count, (z, y, x), batch.spacing, config)

    known = batch.regions_known & shown.to(batch.regions_known.device)
    batch = replace(batch, regions_known=known)
    batch = mirror_samples(batch, torch.nonzero(is_mirrored).flatten().tolist())
    ct, lesions, regions = batch.ct.to(torch.float32, copy=True), batch.lesions, batch.regions
    for i in torch.nonzero(chosen).flatten().tolist():
        if not warps[i].is_identity:
            lesions = _clone_if_shared(lesions, batch.lesions)
            regions = _clone_if_shared(regions, batch.regions)
            ct[i], lesions[i], regions[i] = _warp_sample(
                ct[i], lesions[i], regions[i], batch.spacing, warps[i]
            )
        contrast, offset, noise = intensity[i].tolist()
        if contrast:
            ct[i] += contrast * ct[i].clamp_min(0)
        if offset:
            ct[i] += offset
        if noise:
            generator = torch.Generator(ct.device).manual_seed(seeds[i])
            ct[i] += abs(noise) * torch.randn(ct[i].shape, generator=generator, device=ct.device)
    return replace(batch, ct=ct, lesions=lesions, regions=regions)


def _clone_if_shared(tensor: Tensor, original: Tensor) -> Tensor:
    return tensor.clone() if tensor is original else tensor


def _warp_sample(
    ct: Tensor,
    bits: Tensor,
    regions: Tensor,
    spacing: tuple[float, float, float],
    warp: SpatialWarp,
) -> tuple[Tensor, Tensor, Tensor]:
    """Move one sample: CT, lesion bits and region ids, all (Z, Y, X).

    CT and lesions are interpolated linearly, regions taken from the nearest voxel. Outside the grid
    there is air without lesion or region. A lesion covers voxels that it fills by half at least;
    one too small for that keeps its fullest voxel, since its label still says that it is there.
    """
    z, y, x = ct.shape
    grid = warp.sampling_grid((z, y, x), spacing, ct.device)
    present = present_lesions(bits)
    masks = [lesion_mask(bits, lesion).float() for lesion in present]
    layers = torch.stack([ct - AIR_HU, *masks])
    layers = F.grid_sample(layers[None], grid, mode="bilinear", align_corners=False)[0]
    moved_bits = torch.zeros_like(bits)
    for lesion, share in zip(present, layers[1:], strict=True):
        enough = share.amax().clamp(max=0.5)
        moved_bits |= pack_lesion((share >= enough) & (share > 0), lesion)
    ids = regions[None, None].float()
    ids = F.grid_sample(ids, grid, mode="nearest", align_corners=False)[0, 0]
    return layers[0] + AIR_HU, moved_bits, ids.to(regions.dtype)
