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
        out: Tensor = _NormGelu.apply(x, self.weight, self.bias, self.num_groups, self.eps)
        return out


class ToOne(nn.Conv3d):
    """1 × 1 × 1 convolution to one channel, as a matrix product: for so few channels a library's convolution pads and
    copies its input. (B, c, …) to (B, 1, …)."""

    def __init__(self, inputs: int) -> None:
        super().__init__(inputs, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Keep `x`."""
        return (self.weight.flatten(1) @ x.flatten(2)).unflatten(2, x.shape[2:]) + self.bias


class GeluToOne(ToOne):
    """GELU before it."""

    def forward(self, x: Tensor) -> Tensor:
        """Keep `x`, not its GELU."""
        out: Tensor = _GeluToOne.apply(x.flatten(2), self.weight.flatten(1))
        return out.unflatten(2, x.shape[2:]) + self.bias


class _NormGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        shape = (len(x), x.shape[1], x[0, 0].numel(), groups)
        y, mean, spread = aten.native_group_norm(x, weight, bias, *shape, eps)
        ctx.save_for_backward(x, weight, bias, mean, spread)
        ctx.shape, ctx.eps = shape, eps
        # Where torch 2.11 compiles a function whose result was changed in place, its gradient is 0, without a word.
        return F.gelu(y) if torch.compiler.is_compiling() else aten.gelu_(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, spread = ctx.saved_tensors
        y = aten.native_group_norm(x, weight, bias, *ctx.shape, ctx.eps)[0]
        # The norm's own backward reads all its inputs in the layout of `x`, without asking.
        grad = aten.gelu_backward(grads[0].contiguous(), y)
        del y
        found = aten.native_group_norm_backward(grad, x, mean, spread, weight, *ctx.shape, [True, True, True])
        return *found, None, None


class _GeluToOne(torch.autograd.Function):
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
