"""Dense attention with whole bias matrices, beside the folded one: outputs and gradients of
both."""

import math

import torch
from torch import Tensor

from rectvlm.models.attention import (
    SliceRegionAttention,
    WithinSliceAttention,
    pooling_weights,
)
from rectvlm.models.tissue_patches import find_slice_places, pack_all


def attend_densely(
    module: SliceRegionAttention, inputs: dict[str, Tensor], slice_index: Tensor
) -> tuple[Tensor, Tensor]:
    """The module docstring's formula with whole bias matrices; everything in the dtype of the
    inputs."""
    tokens, regions, log_prior = inputs["tokens"], inputs["regions"], inputs["log_prior"]
    b, rows, width = tokens.shape
    n, r, heads = rows - 1, regions.shape[1], module.heads
    d = width // heads

    def split(x: Tensor) -> Tensor:
        return x.reshape(b, -1, heads, d).transpose(1, 2)

    both = torch.cat([tokens, regions], 1)
    q = split(tokens @ module.q.weight.T + module.q.bias)
    keys, values = (both @ module.kv.weight.T + module.kv.bias).chunk(2, -1)
    k, v = split(keys), split(values)
    bias = torch.zeros(b, heads, rows, rows + r, dtype=tokens.dtype, device=tokens.device)
    distance = slice_index[:, None] - slice_index[None, :]
    within_slice = isinstance(module, WithinSliceAttention)
    slices = int(slice_index.max()) + 1
    if within_slice:
        own = module.slice_bias[:, :, None].expand(-1, n, n)
        bias[:, :, 1:, 1:rows] = own.masked_fill(distance != 0, -torch.inf)
    else:
        bias[:, :, 1:, 1:rows] = module.slice_bias[:, distance + slices - 1]
    bias[:, :, 1:, rows:] = log_prior[:, None]
    counts = torch.ones(heads, rows, rows + r, dtype=tokens.dtype, device=tokens.device)
    if module.gate is not None:
        gate = module.gate.abs()
        gates = torch.cat([gate[:, :1], counts[:, 0, 1:rows], gate[:, 1:].expand(-1, r)], dim=1)
        is_gate = torch.ones(rows + r, dtype=torch.bool)
        is_gate[1:rows] = False
        # A patch that sees one slice counts a gate once.
        of_volume = torch.where(is_gate, gates * slices, gates)
        of_patch = gates if within_slice else of_volume
        counts = torch.cat([of_volume[:, None], of_patch[:, None].expand(-1, n, -1)], dim=1)
    weights = (q @ k.transpose(-1, -2) / math.sqrt(d) + bias).exp() * counts
    attended = (weights / weights.sum(-1, keepdim=True)) @ v
    share = log_prior.exp() / log_prior.exp().sum(1, keepdim=True)
    pooled = torch.einsum("bnr,bhnd->bhrd", share, v[:, :, 1 : 1 + n])

    def merge(x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(b, -1, width) @ module.out.weight.T + module.out.bias

    return merge(attended), merge(pooled)


def make_attention(
    grid: tuple[int, int, int],
    heads: int = 3,
    width: int = 24,
    regions: int = 20,
    gated: bool = False,
    within_slice: bool = False,
) -> tuple[SliceRegionAttention, dict[str, Tensor], Tensor]:
    """A module whose slice bias, and gates if any, are random, and inputs; float64."""
    torch.manual_seed(sum(grid))
    z, y, x = grid
    module = (
        WithinSliceAttention(width, heads, gated)
        if within_slice
        else SliceRegionAttention(width, heads, z, gated)
    ).double()
    torch.nn.init.normal_(module.slice_bias)
    if module.gate is not None:
        torch.nn.init.normal_(module.gate)
    inputs = {
        "tokens": torch.randn(2, 1 + z * y * x, width, dtype=torch.float64),
        "regions": torch.randn(2, regions, width, dtype=torch.float64),
        "log_prior": torch.randn(2, z * y * x, regions, dtype=torch.float64).log_softmax(-1),
    }
    return module, inputs, torch.arange(z).repeat_interleave(y * x)


def attend(
    module: SliceRegionAttention, inputs: dict[str, Tensor], slice_index: Tensor
) -> tuple[Tensor, Tensor]:
    shares = inputs["log_prior"].exp()
    weights = pooling_weights(
        shares, torch.ones(len(shares), dtype=torch.bool, device=shares.device)
    )
    b, rows, _ = inputs["tokens"].shape
    slices = int(slice_index.max()) + 1
    tissue = pack_all(inputs["tokens"][:, 1:])
    grid = (slices, 1, (rows - 1) // slices)
    places = find_slice_places(tissue, slice_index.expand(b, rows - 1), grid)
    return module(**inputs, slice_index=slice_index, weights=weights, slices=slices, places=places)


def compute_outputs_and_gradients(
    module: SliceRegionAttention, inputs: dict[str, Tensor], slice_index: Tensor, folded: bool
) -> tuple[list[Tensor], dict[str, Tensor]]:
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    module.zero_grad()
    out = (
        attend(module, leaves, slice_index)
        if folded
        else attend_densely(module, leaves, slice_index)
    )
    # A weighting that differs at every output, so that no gradient cancels.
    sum(
        (o * torch.linspace(-1, 1, o.numel(), dtype=o.dtype, device=o.device).view_as(o)).sum()
        for o in out
    ).backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items()}
    gradients |= {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    return [o.detach() for o in out], gradients
