"""Layers that keep only their input for the backward pass.

At full resolution one tensor of the U-Net is half a gigabyte. Between a normalization and the next convolution autograd
would keep two of them; here what is cheap is computed again. Values and gradients are those of the plain layers.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

aten = torch.ops.aten


class NormGelu(nn.GroupNorm):
    """Group norm, then GELU; (B, c, …) to the same shape."""

    def forward(self, x: Tensor) -> Tensor:
        """Keep `x`, channels first in memory, with a mean and a spread for each group."""
        assert x.is_contiguous()
        out: Tensor = _NormGeluFunction.apply(x, self.weight, self.bias, self.num_groups, self.eps)
        return out


def upsample_nearest(coarse: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """Each value to all voxels of its cell: (B, c, Z, Y, X) to (B, c, Z · stride, …)."""
    if coarse.is_cuda:
        out: Tensor = _UpsampleNearestFunction.apply(coarse, stride)
        return out
    return F.interpolate(coarse, scale_factor=tuple(float(s) for s in stride), mode="nearest")


class SingleChannelConv(nn.Conv3d):
    """1 × 1 × 1 convolution to one channel, as a matrix product: for so few channels a library's convolution pads and
    copies its input. (B, c, …) to (B, 1, …)."""

    def __init__(self, inputs: int) -> None:
        super().__init__(inputs, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Keep `x`."""
        return (self.weight.flatten(1) @ x.flatten(2)).unflatten(2, x.shape[2:]) + self.bias


class GeluSingleChannelConv(SingleChannelConv):
    """GELU before it."""

    def forward(self, x: Tensor) -> Tensor:
        """Keep `x`, not its GELU."""
        out: Tensor = _GeluSingleChannelFunction.apply(x.flatten(2), self.weight.flatten(1))
        return out.unflatten(2, x.shape[2:]) + self.bias


GroupNormShape = tuple[int, int, int, int]
"""Samples, channels, voxels, groups."""


def _group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, shape: GroupNormShape, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalized x, and mean and 1 / spread of each group (B, G), in the dtype of x.

    On a GPU torch's own kernel reads a group with one thread block: 54 ms for 16 channels of 64 × 512 × 512 on an
    H100, where the sums take 0.4 ms (bfloat16, 4 groups).
    """
    if x.is_cuda:
        return _group_norm_by_sums(x, weight, bias, shape, eps)
    found: tuple[Tensor, Tensor, Tensor] = aten.native_group_norm(x, weight, bias, *shape, eps)
    return found


def _group_norm_by_sums(
    x: Tensor, weight: Tensor, bias: Tensor, shape: GroupNormShape, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by sums over all voxels, in float32 at least."""
    b, c, _, groups = shape
    rows, dtype = x.view(b, groups, -1), torch.promote_types(x.dtype, torch.float32)
    mean = rows.sum(2, dtype=dtype) / rows.shape[2]
    square = torch.linalg.vector_norm(rows, dim=2, dtype=dtype).square() / rows.shape[2]
    spread = (square - mean.square()).clamp_min(0).add(eps).rsqrt()
    scale = weight.to(dtype).view(groups, -1) * spread[:, :, None]
    shift = bias.to(dtype).view(groups, -1) - mean[:, :, None] * scale
    per_channel = (b, c, *[1] * (x.ndim - 2))
    y = torch.empty_like(x)
    torch.addcmul(shift.view(per_channel), x, scale.view(per_channel), out=y)
    return y, mean.to(x.dtype), spread.to(x.dtype)


class _NormGeluFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
    ) -> Tensor:
        shape = (len(x), x.shape[1], x[0, 0].numel(), groups)
        y, mean, spread = _group_norm(x, weight, bias, shape, eps)
        ctx.save_for_backward(x, weight, bias, mean, spread)
        ctx.shape, ctx.eps = shape, eps
        # Where torch 2.11 compiles a function whose result was changed in place, its gradient is 0, without a word.
        return F.gelu(y) if torch.compiler.is_compiling() else aten.gelu_(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, spread = ctx.saved_tensors
        y = _group_norm(x, weight, bias, ctx.shape, ctx.eps)[0]
        # The norm's own backward reads all its inputs in the layout of `x`, without asking.
        grad = aten.gelu_backward(grads[0].contiguous(), y)
        del y
        found = aten.native_group_norm_backward(
            grad, x, mean, spread, weight, *ctx.shape, [True, True, True]
        )
        return *found, None, None


class _UpsampleNearestFunction(torch.autograd.Function):
    """By a plain copy, which a GPU does in half the time of its kernel for this; that kernel's backward is kept."""

    @staticmethod
    def forward(ctx: Any, coarse: Tensor, stride: tuple[int, int, int]) -> Tensor:
        z, y, x = coarse.shape[2:]
        sz, sy, sx = stride
        ctx.shape, ctx.stride = coarse.shape, stride
        cells = coarse[:, :, :, None, :, None, :, None].expand(-1, -1, z, sz, y, sy, x, sx)
        return cells.reshape(*coarse.shape[:2], z * sz, y * sy, x * sx)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        fine = [n * s for n, s in zip(ctx.shape[2:], ctx.stride, strict=True)]
        return aten.upsample_nearest3d_backward(grads[0].contiguous(), fine, ctx.shape), None


class _GeluSingleChannelFunction(torch.autograd.Function):
    """(B, c, N) and weights (1, c) to (B, 1, N)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return weight @ F.gelu(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        of_weight = (grads[0] @ F.gelu(x).mT).sum(0)
        return aten.gelu_backward(weight.mT * grads[0], x), of_weight
