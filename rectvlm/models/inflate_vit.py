"""The encoder's start from a 2D vision transformer, inflated over slices.

On a CT that repeats one slice, and while the attention gates are where they start, patch features
are those of the ViT on that slice:

- The kernel is divided by the slices of a patch and repeated (I3D, Carreira and Zisserman, 2017).
  The mean and standard deviation that the ViT expects are folded into it.
- Positions are interpolated to the patches of a slice and are the same in every slice; those of
  slices start at 0.
- The class token becomes the global token. The attention gates let it count as one key a slice.
- Layer scale is folded into the output projections; missing biases are 0.

Region tokens start as the class token, each with an offset of its own.

Shapes: C width, W windows, z × y × x patches of the grid, pz × py × px voxels of a patch.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rectvlm.models.attention import CLOSED_GATE
from rectvlm.models.slice_region_encoder import (
    POSITION_STD,
    EncoderBlock,
    SliceRegionEncoder,
    resize_plane,
)
from rectvlm.pretrained.vit_file import VitFile, read_vit_file, square_side
from rectvlm.pretrained.vit_layouts import join_names
from rectvlm.types import UserError

COMMON_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16}
"""Heads of published ViTs by width, where no file beside the weights says them."""


@torch.no_grad()
def inflate_vit(encoder: SliceRegionEncoder, reference: str) -> str:
    """Give an encoder the weights of a ViT.

    Args:
        encoder: built with `encoder.init`; on the meta device the fit is checked alone.
        reference: safetensors file, folder or hub id.

    Returns:
        What was taken, what of the file was left, and what starts anew.

    Raises:
        UserError: the file holds no ViT that fits.
    """
    device = "meta" if encoder.norm.weight.is_meta else "cpu"
    vit = read_vit_file(reference, device)
    _check_architecture(vit, encoder)
    remaining = dict(vit.tensors)
    notes = _load_patch_kernel(encoder, vit, remaining)
    notes += _load_tokens(encoder, vit, remaining)
    for number, block in enumerate(encoder.blocks):
        assert isinstance(block, EncoderBlock)
        _load_block(block, f"blocks.{number}", vit, remaining)
    _take(encoder.norm.weight, "norm.weight", vit, remaining)
    _take(encoder.norm.bias, "norm.bias", vit, remaining)
    assert not remaining, f"tensors that were translated and not taken: {sorted(remaining)}"
    return _describe(vit, notes)


def _check_architecture(vit: VitFile, encoder: SliceRegionEncoder) -> None:
    block = encoder.blocks[0]
    assert isinstance(block, EncoderBlock)
    width, heads = encoder.norm.weight.shape[0], block.attention.heads
    kernel = vit.tensors["patch.weight"]
    wanted_heads = vit.heads or COMMON_HEADS.get(width, heads)
    sizes = {
        "width": (kernel.shape[0], width),
        "depth": (vit.depth, len(encoder.blocks)),
        "heads": (wanted_heads, heads),
    }
    faults = [
        f"encoder.{name} is {here} and must be {there}"
        for name, (there, here) in sizes.items()
        if there != here
    ]
    if faults:
        raise UserError(f"{vit.where} does not fit the configuration: {', '.join(faults)}.")


def _take(
    target: Tensor,
    name: str,
    vit: VitFile,
    remaining: dict[str, Tensor],
    convert: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> None:
    """Copy a tensor of the file, converted, into a parameter."""
    if name not in remaining:
        raise _lacks(name, vit)
    tensor = convert(remaining.pop(name))
    if tensor.shape != target.shape:
        raise UserError(
            f"{vit.where} does not fit the configuration: its {name} makes "
            f"{tuple(tensor.shape)}, but the encoder has {tuple(target.shape)}; set encoder.width, "
            "encoder.mlp_ratio and the other sizes to the ViT's."
        )
    target.copy_(tensor)


def _load_patch_kernel(
    encoder: SliceRegionEncoder, vit: VitFile, remaining: dict[str, Tensor]
) -> list[str]:
    kernel = remaining["patch.weight"]  # (C, channels, y, x)
    notes = []
    (slices, *sides), windows = encoder.patch, len(encoder.windows)
    if list(kernel.shape[2:]) != sides:
        notes.append(
            f"patch kernel resampled from {kernel.shape[2]} × {kernel.shape[3]} to "
            f"{sides[0]} × {sides[1]}"
        )
    mean, std = (torch.tensor(values, device=kernel.device) for values in (vit.mean, vit.std))
    if len(mean) != kernel.shape[1]:
        # A ViT of grey images, or of more channels than the layout's own.
        mean, std = mean.mean().expand(kernel.shape[1]), std.mean().expand(kernel.shape[1])
    kernel = kernel / std[:, None, None]
    offset = -(kernel * mean[:, None, None]).sum(dim=(1, 2, 3))
    kernel = resample_kernel(kernel, (sides[0], sides[1]))
    if kernel.shape[1] != windows:
        notes.append(f"{kernel.shape[1]} channels of the kernel summed over {windows} windows")
        kernel = kernel.sum(dim=1, keepdim=True).expand(-1, windows, -1, -1) / windows
    inflated = (kernel / slices)[:, :, None].expand(-1, -1, slices, -1, -1)
    _take(encoder.embed.weight, "patch.weight", vit, remaining, lambda _: inflated)
    assert encoder.embed.bias is not None
    remaining.setdefault("patch.bias", torch.zeros_like(offset))
    _take(encoder.embed.bias, "patch.bias", vit, remaining, lambda bias: bias + offset)
    source = "the file's" if vit.states_normalization else f"those that {vit.layout.name} uses"
    notes.append(f"mean and standard deviation of the input: {source}")
    return notes


def resample_kernel(kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """Kernel (…, y, x) of another size that gives a resized patch the same feature.

    With B the matrix that resizes a patch, the kernel w becomes pinv(Bᵀ) w (FlexiViT, Beyer et al.,
    2023). It is exact where the patch grows.
    """
    old_size = (kernel.shape[-2], kernel.shape[-1])
    if old_size == size:
        return kernel
    count = old_size[0] * old_size[1]
    patches = torch.eye(count, dtype=torch.float64).view(count, 1, *old_size)
    resized = F.interpolate(patches, size, mode="bicubic", antialias=True, align_corners=False)
    matrix = torch.linalg.pinv(resized.flatten(1))  # Bᵀ is (old, new)
    matrix = matrix.to(kernel.device, kernel.dtype)
    return (kernel.flatten(-2) @ matrix.mT).unflatten(-1, size)


def _load_tokens(
    encoder: SliceRegionEncoder, vit: VitFile, remaining: dict[str, Tensor]
) -> list[str]:
    """Positions, class token and region tokens."""
    notes = []
    width = encoder.norm.weight.shape[0]
    if "positions" not in remaining:
        raise UserError(
            f"{vit.where} has no position embeddings, so the ViT has positions of another kind, "
            "which the encoder slice-region has not: give a plain ViT."
        )
    positions = remaining["positions"].reshape(-1, width)
    class_token = remaining.pop("cls").reshape(width) if "cls" in remaining else None
    if class_token is not None and square_side(len(positions)) is None:
        class_token, positions = class_token + positions[0], positions[1:]
    side = square_side(len(positions))
    if side is None:
        raise UserError(
            f"{vit.where} has {len(positions)} positions, which make no square: give a ViT of "
            "square images."
        )

    plane = positions.view(1, side, side, width)
    y, x = encoder.patch_grid[1:]
    if (side, side) != (y, x):
        notes.append(f"positions interpolated from {side} × {side} to {y} × {x}")
    resized = resize_plane(plane, (y, x), vit.layout.resizes_with_antialias)
    _take(encoder.position_plane, "positions", vit, remaining, lambda _: resized)
    encoder.position_z.zero_()
    if class_token is None:
        notes.append("no class token: global token and region tokens start at random")
        for block in encoder.blocks:
            assert isinstance(block, EncoderBlock) and block.attention.gate is not None
            block.attention.gate.fill_(CLOSED_GATE)
    else:
        encoder.whole.copy_(class_token.expand_as(encoder.whole))
        # As far apart as positions of the ViT are.
        encoder.regions.mul_(plane.std() / POSITION_STD).add_(class_token)
    return notes


def _load_block(
    block: EncoderBlock, prefix: str, vit: VitFile, remaining: dict[str, Tensor]
) -> None:
    for name in ("norm1", "norm2"):
        norm = getattr(block, name)
        _take(norm.weight, f"{prefix}.{name}.weight", vit, remaining)
        _take(norm.bias, f"{prefix}.{name}.bias", vit, remaining)
    _join_queries_keys_values(prefix, vit, remaining)
    attention = block.attention
    _take_linear(attention.q, f"{prefix}.q", vit, remaining)
    _take_linear(attention.kv, f"{prefix}.kv", vit, remaining)
    _take_linear(attention.out, f"{prefix}.out", vit, remaining, f"{prefix}.scale1")
    inner, outer = block.mlp[0], block.mlp[2]
    assert isinstance(inner, nn.Linear) and isinstance(outer, nn.Linear)
    _take_linear(inner, f"{prefix}.fc1", vit, remaining)
    _take_linear(outer, f"{prefix}.fc2", vit, remaining, f"{prefix}.scale2")


def _join_queries_keys_values(prefix: str, vit: VitFile, remaining: dict[str, Tensor]) -> None:
    """Make `q` and `kv` of the file's `qkv`, or of its `q`, `k` and `v`."""
    for kind in ("weight", "bias"):
        names = ["qkv"] if f"{prefix}.qkv.weight" in vit.tensors else ["q", "k", "v"]
        parts = [_pop_or_zero(f"{prefix}.{name}.{kind}", vit, remaining) for name in names]
        q, k, v = torch.cat(parts).chunk(3)
        remaining[f"{prefix}.q.{kind}"] = q
        remaining[f"{prefix}.kv.{kind}"] = torch.cat([k, v])


def _pop_or_zero(name: str, vit: VitFile, remaining: dict[str, Tensor]) -> Tensor:
    """Take a tensor out; a bias that no block of the file has is 0."""
    if name in remaining:
        return remaining.pop(name)
    ending = name.split(".", 2)[2]
    is_in_no_block = not any(other.endswith(f".{ending}") for other in vit.tensors)
    if not (ending.endswith(".bias") and is_in_no_block):
        raise _lacks(name, vit)
    weight = vit.tensors[f"{name.removesuffix('bias')}weight"]
    return torch.zeros_like(weight[:, 0])


def _take_linear(
    linear: nn.Linear,
    name: str,
    vit: VitFile,
    remaining: dict[str, Tensor],
    scale_name: str | None = None,
) -> None:
    """Copy a linear layer, multiplied with the layer scale that follows it, if there is one."""
    scale = remaining.pop(scale_name, None) if scale_name else None
    if scale is None:
        scale = torch.ones((), device=linear.weight.device)
    _take(
        linear.weight,
        f"{name}.weight",
        vit,
        remaining,
        lambda weight: weight * scale.reshape(-1, 1),
    )
    _take(linear.bias, f"{name}.bias", vit, remaining, lambda bias: bias * scale)


def _lacks(name: str, vit: VitFile) -> UserError:
    return UserError(
        f"{vit.where} lacks {name} of the layout of {vit.layout.name}: fetch it again, or give a "
        "whole ViT."
    )


def _describe(vit: VitFile, notes: list[str]) -> str:
    lines = [
        f"encoder from {vit.where} ({vit.layout.name}): taken are {len(vit.tensors)} tensors",
        *notes,
        f"not used: {join_names(vit.unused)}",
        "new in the encoder: position_z, regions, unknown_prior, and slice_bias and gate of blocks",
    ]
    return "; ".join(lines)
