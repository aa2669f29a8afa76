"""Layers that several parts share: MLP, attention, transformer block, recomputation."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rectvlm.config import Checkpointing

LINEAR_STD = 0.02
"""Standard deviation of linear weights in transformer blocks at the start, as in ViT."""


def run_layer(layer: Callable[..., Any], *inputs: Any, recompute: Checkpointing) -> Any:
    """Call a layer, with or without activation checkpointing.

    Args:
        layer: module or function without randomness.
        inputs: its inputs.
        recompute: whether the backward pass keeps the inputs alone and computes the layer again;
            `auto` counts as true.
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
    return layer(*inputs)


def init_blocks(blocks: nn.ModuleList) -> None:
    """Start a stack of transformer blocks near the identity.

    Weights are small, biases are 0, and the layers that add to the residual stream are scaled down
    with the depth of the stack. With PyTorch's own default the blocks add vectors that all tokens
    and all patients share, larger than the patch embeddings themselves: 93% of a patch feature was
    such a constant, and training did not overfit eight patients.
    """
    for block in blocks:
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                adds_to_stream = name.endswith(("out", "mlp.2"))
                scale = (2 * len(blocks)) ** (0.5 * adds_to_stream)
                nn.init.trunc_normal_(module.weight, std=LINEAR_STD / scale)
                nn.init.zeros_(module.bias)


class Mlp(nn.Sequential):
    """Linear, GELU, linear."""

    def __init__(self, width: int, ratio: float, out: int | None = None) -> None:
        hidden = int(width * ratio)
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out or width))


class MultiHeadAttention(nn.Module):
    """Multi-head attention of queries to a context of the same width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        assert width % heads == 0, f"width {width} is not a multiple of heads {heads}"
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, queries: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, M, C) and context (B, N, C) to (B, M, C); `mask` (B, 1, 1, N) bool is False where no
        query may attend."""
        keys, values = self.kv(context).chunk(2, dim=-1)
        q, k, v = map(self._split_heads, (self.q(queries), keys, values))
        return self.out(
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        )

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class TransformerBlock(nn.Module):
    """Pre-norm attention and MLP: self-attention, or cross-attention when a context is given."""

    def __init__(self, width: int, heads: int, ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = MultiHeadAttention(width, heads)
        self.mlp = Mlp(width, ratio)

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """(B, M, C) to (B, M, C); `mask` as in `MultiHeadAttention`."""
        queries = self.norm1(x)
        x = x + self.attention(queries, queries if context is None else context, mask)
        return x + self.mlp(self.norm2(x))
