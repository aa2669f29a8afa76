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


class GeluConv(nn.Conv3d):
    """GELU, then a 1 × 1 × 1 convolution; (B, c, …) to (B, outputs, …)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Keep `x`, not its GELU."""
        out: Tensor = _GeluConv.apply(x, self.weight, self.bias)
        return out


class _NormGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        shape = (len(x), x.shape[1], x[0, 0].numel(), groups)
        y, mean, spread = aten.native_group_norm(x, weight, bias, *shape, eps)
        ctx.save_for_backward(x, weight, bias, mean, spread)
        ctx.shape, ctx.eps = shape, eps
        return aten.gelu_(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, spread = ctx.saved_tensors
        y = aten.native_group_norm(x, weight, bias, *ctx.shape, ctx.eps)[0]
        # The norm's own backward reads all its inputs in the layout of `x`, without asking.
        grad = aten.gelu_backward(grads[0].contiguous(), y)
        del y
        found = aten.native_group_norm_backward(grad, x, mean, spread, weight, *ctx.shape, [True, True, True])
        return *found, None, None


class _GeluConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return F.conv3d(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        same: list[Any] = [[1, 1, 1], [0, 0, 0], [1, 1, 1], False, [0, 0, 0], 1]
        grad, of_weight, of_bias = aten.convolution_backward(
            grads[0], F.gelu(x), weight, list(bias.shape), *same, [True, True, True]
        )
        return aten.gelu_backward(grad, x), of_weight, of_bias
