"""Layers that keep only their input for the backward pass.

At full resolution one tensor of the U-Net is half a gigabyte. Between a normalization and the next
convolution autograd would keep two of them. These layers compute what is cheap again; their values
and gradients are those of the plain layers.

Shapes: B samples, c channels, N voxels, G groups.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

aten = torch.ops.aten


class NormGelu(nn.GroupNorm):
    """Group norm, then GELU. Keeps its input, and mean and standard deviation of each group."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, …), channels first in memory, to the same shape."""
        assert x.is_contiguous(), "the input must be contiguous, channels first"
        out: Tensor = _NormGeluFunction.apply(x, self.weight, self.bias, self.num_groups, self.eps)
        return out


def upsample_nearest(coarse: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """Copy each value to all voxels of its cell: (B, c, Z, Y, X) to (B, c, Z · stride, …)."""
    if coarse.is_cuda:
        out: Tensor = _UpsampleNearestFunction.apply(coarse, stride)
        return out
    return F.interpolate(coarse, scale_factor=tuple(map(float, stride)), mode="nearest")


class GeluSingleChannelConv(nn.Conv3d):
    """GELU, then a 1 × 1 × 1 convolution to one channel, as a matrix product.

    For so few channels the convolution of a library pads and copies its input.
    """

    def __init__(self, inputs: int) -> None:
        super().__init__(inputs, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, …) to (B, 1, …). Keeps `x`, not its GELU."""
        out: Tensor = _GeluSingleChannelFunction.apply(x.flatten(2), self.weight.flatten(1))
        return out.unflatten(2, x.shape[2:]) + self.bias


GroupNormShape = tuple[int, int, int, int]
"""B, c, N, G, as `native_group_norm` takes them."""


def _group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, shape: GroupNormShape, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalized x, and mean and 1 / standard deviation of each group (B, G), in the dtype of x.

    On a GPU torch's own kernel reads a group with one thread block: 54 ms for 16 channels of
    64 × 512 × 512 on an H100, where the sums take 0.4 ms (bfloat16, 4 groups).
    """
    if x.is_cuda:
        return _group_norm_by_sums(x, weight, bias, shape, eps)
    normalized: tuple[Tensor, Tensor, Tensor]
    normalized = aten.native_group_norm(x, weight, bias, *shape, eps)
    return normalized


def _group_norm_by_sums(
    x: Tensor, weight: Tensor, bias: Tensor, shape: GroupNormShape, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Results of `_group_norm` from sums over all voxels, in float32 at least."""
    b, c, _, groups = shape
    rows, dtype = x.view(b, groups, -1), torch.promote_types(x.dtype, torch.float32)
    mean = rows.sum(2, dtype=dtype) / rows.shape[2]
    mean_square = torch.linalg.vector_norm(rows, dim=2, dtype=dtype).square() / rows.shape[2]
    inverse_std = (mean_square - mean.square()).clamp_min(0).add(eps).rsqrt()

    scale = weight.to(dtype).view(groups, -1) * inverse_std[:, :, None]
    shift = bias.to(dtype).view(groups, -1) - mean[:, :, None] * scale
    per_channel = (b, c, *[1] * (x.ndim - 2))
    y = torch.empty_like(x)
    torch.addcmul(shift.view(per_channel), x, scale.view(per_channel), out=y)
    return y, mean.to(x.dtype), inverse_std.to(x.dtype)


class _NormGeluFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
    ) -> Tensor:
        shape = (len(x), x.shape[1], x[0, 0].numel(), groups)
        y, mean, inverse_std = _group_norm(x, weight, bias, shape, eps)
        ctx.save_for_backward(x, weight, bias, mean, inverse_std)
        ctx.shape, ctx.eps = shape, eps
        # Where torch 2.11 compiles a function whose result was changed in place, the gradient is 0
        # without a warning.
        return F.gelu(y) if torch.compiler.is_compiling() else aten.gelu_(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, inverse_std = ctx.saved_tensors
        y = _group_norm(x, weight, bias, ctx.shape, ctx.eps)[0]
        # The backward pass of the norm reads all its inputs in the layout of `x` without a check.
        grad = aten.gelu_backward(grads[0].contiguous(), y)
        del y
        wanted = [True, True, True]
        gradients = aten.native_group_norm_backward(
            grad, x, mean, inverse_std, weight, *ctx.shape, wanted
        )
        return *gradients, None, None


class _UpsampleNearestFunction(torch.autograd.Function):
    """`upsample_nearest` as a plain copy, which takes a GPU half the time of its own kernel. The
    backward pass is that of the kernel."""

    @staticmethod
    def forward(ctx: Any, coarse: Tensor, stride: tuple[int, int, int]) -> Tensor:
        z, y, x = coarse.shape[2:]
        sz, sy, sx = stride
        ctx.shape, ctx.stride = coarse.shape, stride
        cells = coarse[:, :, :, None, :, None, :, None].expand(-1, -1, z, sz, y, sy, x, sx)
        return cells.reshape(*coarse.shape[:2], z * sz, y * sy, x * sx)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        fine = [side * step for side, step in zip(ctx.shape[2:], ctx.stride, strict=True)]
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
        weight_grad = (grads[0] @ F.gelu(x).mT).sum(0)
        return aten.gelu_backward(weight.mT * grads[0], x), weight_grad
