"""Self-attention with biases for slices and regions, exact, without an N × N matrix.

Shapes: B samples, N patches, Z slices of patches, R regions (20), H heads, D channels of a head,
C = H · D.

Patch i attends to the global token, to every patch j and to every region token r with the logits

    i → j:  q_i · k_j / √D + T[h, z_i − z_j]       T: learned bias for each head and slice distance
    i → r:  q_i · k_r / √D + log p(r | i)          p: share of the patch's voxels in region r

The global token attends to all of them without a bias. Both biases have low rank: T depends on the
two slice numbers only, log p on the patch and one region. So they fold exactly into the dot
product: q_i is followed by [T[h, z_i − 0], …, T[h, z_i − (Z−1)], log p(· | i)] · √D, and k_j by the
one-hot code of z_j, k_r by that of r. One fused call then computes it all in memory linear in N
(the idea of FlashBias, NeurIPS 2025).

Region tokens do not attend. Each takes the mean of the values of its patches, weighted with
p(r | i), which is the mean over the region's voxels. It costs R × N.

Attention within slices (`WithinSliceAttention`) has the logits i → j of patches of one slice alone,
with one T[h] for all of them; the global token attends to all patches as before.

With gates the global token counts as Z · g₀ keys and each region token as Z · g₁, so that weights
of a 2D ViT start with the ViT's own attention: there every slice has a class token of its own
(g₀ = 1) and no region tokens (g₁ ≈ 0). Channels of the values that the fused call leaves empty
carry the attention w of those keys, from which the gated mean follows exactly:

    (Σ_j w_j v_j + Z · Σ_e g_e w_e v_e) / (Σ_j w_j + Z · Σ_e g_e w_e)     j: patches, e: the others
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rectvlm.models.tissue_patches import SlicePlaces


def pooling_weights(shares: Tensor, known: Tensor, counted: Tensor | None = None) -> Tensor:
    """Weight of each patch in the mean of each region, (B, N, R); columns sum to 1.

    A region that the map does not show has a column of zeros: its token receives no image features.
    Without a map all patches that count have the same weight.

    Args:
        shares: (B, N, R), p(r | i), 0 where a patch does not touch a region.
        known: (B,) bool, whether a sample has a region map.
        counted: (B, N) bool, patches that count; None: all.
    """
    if counted is None:
        counted = torch.ones_like(shares[..., 0], dtype=torch.bool)
    is_counted = counted[..., None].to(shares.dtype)
    by_voxels = _divide_by_sums(shares * is_counted)
    return torch.where(known[:, None, None], by_voxels, _divide_by_sums(is_counted))


def _divide_by_sums(rows: Tensor) -> Tensor:
    """Divide (B, N, R) by the sums over N, where these are not 0."""
    total = rows.sum(dim=1, keepdim=True)
    return rows / total.masked_fill(total == 0, 1)


NEVER = -1e4
"""Logit of a key that no one attends to. Its share is 0 in every dtype, and no sum overflows."""
CLOSED_GATE = 1e-5
"""Gate of a token that counts as no key at the start. At exactly 0 its gradient would be 0."""


class SliceRegionAttention(nn.Module):
    """Attention of the global token and the patches to themselves and the region tokens.

    Args:
        width: channels of a token.
        heads: number of heads.
        slices: slices of patches.
        gated: whether a learned gate of each head says how many keys of a slice the global token
            (column 0) and a region token (column 1) count as; without gates each counts as one
            key of the volume.
    """

    def __init__(self, width: int, heads: int, slices: int, gated: bool = False) -> None:
        super().__init__()
        assert width % heads == 0, f"width {width} is not a multiple of heads {heads}"
        self.heads, self.slices = heads, slices
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.slice_bias = nn.Parameter(torch.zeros(heads, 2 * slices - 1))
        self.gate: nn.Parameter | None = None
        if gated:
            self.gate = nn.Parameter(torch.tensor([1.0, CLOSED_GATE]).repeat(heads, 1))

    def forward(
        self,
        tokens: Tensor,
        regions: Tensor,
        slice_index: Tensor,
        log_prior: Tensor,
        weights: Tensor,
        slices: int | None = None,
        filler: Tensor | None = None,
        places: SlicePlaces | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            tokens: (B, 1 + N, C), the global token first.
            regions: (B, R, C), the region tokens.
            slice_index: (N,) or (B, N) int64, slice of each patch, from 0.
            log_prior: (B, N, R), log p(r | i). It must be finite: a region that no voxel of a patch
                shows may be unlikely, not impossible.
            weights: (B, N, R), `pooling_weights`.
            slices: slices of this volume, where this is not the number that the module was made
                for. Distances beyond the learned ones count as the largest learned one.
            filler: (B, N) bool, patches that no one attends to. Their own rows mean nothing.
            places: where each patch is in its slice; `WithinSliceAttention` alone reads it.

        Returns:
            (B, 1 + N, C) and (B, R, C), both after the output projection.
        """
        rows = tokens.shape[1]
        q = self._split_heads(self.q(tokens))
        keys, values = self.kv(torch.cat([tokens, regions], dim=1)).chunk(2, dim=-1)
        k, v = self._split_heads(keys), self._split_heads(values)
        attended = self._attend_with_biases(
            q, k, v, slice_index, log_prior.to(q.dtype), slices or self.slices, filler
        )
        pooled = self._pool_values(v[:, :, 1:rows], weights)
        return self.out(self._merge_heads(attended)), self.out(pooled)

    def compute_attention_shares(
        self,
        tokens: Tensor,
        regions: Tensor,
        slices: int | None = None,
        filler: Tensor | None = None,
    ) -> Tensor:
        """Attention of the global token to itself, the patches and the region tokens.

        Args:
            tokens: as in `forward`, and so the next two.
            regions: see `forward`.
            slices: see `forward`.
            filler: see `forward`.

        Returns:
            (B, H, 1 + N + R); rows sum to 1.
        """
        keys, _ = self.kv(torch.cat([tokens, regions], dim=1)).chunk(2, dim=-1)
        q, k = self._split_heads(self.q(tokens[:, :1])), self._split_heads(keys)
        return self._share_among_keys(q, k, tokens.shape[1], slices or self.slices, filler)

    def _share_among_keys(
        self, q: Tensor, k: Tensor, rows: int, slices: int, filler: Tensor | None
    ) -> Tensor:
        """Attention (B, H, 1 + N + R) of one query (B, H, 1, D), that of the global token, to all
        keys, of which the first `rows` are not region tokens."""
        logits = (q @ k.mT / q.shape[-1] ** 0.5)[:, :, 0].float()
        if filler is not None:
            skipped = F.pad(filler, (1, k.shape[2] - rows))[:, None]
            logits = logits.masked_fill(skipped, -torch.inf)
        shares = logits.softmax(-1)
        if self.gate is None:
            return shares
        counts = self._count_keys(slices, k, rows).float()
        ones = counts.new_ones(len(counts), rows - 1)
        shares = shares * torch.cat([counts[:, :1], ones, counts[:, 1:]], dim=1)
        return shares / shares.sum(dim=-1, keepdim=True)

    def _attend_with_biases(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slice_index: Tensor,
        log_prior: Tensor,
        slices: int,
        filler: Tensor | None = None,
    ) -> Tensor:
        """Fused attention with both biases as extra channels of queries and keys.

        Args:
            q: (B, H, 1 + N, D).
            k: (B, H, 1 + N + R, D), and `v` likewise.
            v: see `k`.
            slice_index: as in `forward`, and so the next two.
            log_prior: see `forward`.
            slices: see `forward`.
            filler: see `forward`.
        """
        scale = q.shape[-1] ** -0.5
        q, k = self.fold_biases(q, k, slice_index, log_prior, slices, filler)
        if self.gate is not None:
            return self._attend_gated(q, k, v, scale, self._count_keys(slices, k, q.shape[2]))
        return self._attend(q, k, v, scale)

    @staticmethod
    def _attend(q: Tensor, k: Tensor, values: Tensor, scale: float) -> Tensor:
        """Fused attention of queries and keys (…, D + E) to values of as many channels or fewer."""
        channels = values.shape[-1]
        values = F.pad(values, (0, q.shape[-1] - channels))
        return F.scaled_dot_product_attention(q, k, values, scale=scale)[..., :channels]

    def _attend_gated(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, counts: Tensor
    ) -> Tensor:
        """Attention where the global token and the region tokens count as `counts` (H, 1 + R) keys;
        see the module's formula."""
        rows, extra_keys = q.shape[2], counts.shape[1]
        extra_values = torch.cat([v[:, :, :1], v[:, :, rows:]], dim=2)
        # One channel for each extra key, and one for all patches together.
        codes = torch.zeros(v.shape[2], extra_keys + 1, device=v.device, dtype=v.dtype)
        codes[0, 0] = 1
        codes[1:rows, extra_keys] = 1
        codes[rows:, 1:extra_keys] = torch.eye(extra_keys - 1, device=v.device, dtype=v.dtype)

        patch_values = v * codes[:, extra_keys:]
        values = torch.cat([patch_values, codes.expand(*v.shape[:2], -1, -1)], dim=-1)
        from_patches, shares, patch_share = self._attend(q, k, values, scale).split(
            [v.shape[-1], extra_keys, 1], dim=-1
        )
        shares = shares * counts[:, None]
        total = patch_share + shares.sum(dim=-1, keepdim=True)
        return (from_patches + shares @ extra_values) / total

    def _count_keys(self, slices: int, k: Tensor, rows: int) -> Tensor:
        """Keys that the global token and each region token count as, (H, 1 + R)."""
        assert self.gate is not None
        counts = self.gate.abs().to(k.dtype) * slices
        return torch.cat([counts[:, :1], counts[:, 1:].expand(-1, k.shape[2] - rows)], dim=1)

    def fold_biases(
        self,
        q: Tensor,
        k: Tensor,
        slice_index: Tensor,
        log_prior: Tensor,
        slices: int,
        filler: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Queries (B, H, 1 + N, D + E) and keys (B, H, 1 + N + R, D + E) whose products hold both
        biases, times √D.

        E is Z + R, at least 2 + R for the gates and one more for fillers, rounded up so that D + E
        is a multiple of 8, which fused kernels want.
        """
        b, h, _, d = q.shape
        n, r = log_prior.shape[1:]
        biases = slices + r
        extra = max(biases + (filler is not None), 2 + r)
        extra += -(d + extra) % 8

        farthest, numbers = self.slices - 1, torch.arange(slices, device=q.device)
        distance = (numbers[:, None] - numbers).clamp(-farthest, farthest) + farthest
        slice_codes = F.one_hot(slice_index, slices).to(q.dtype)
        # The product with one-hot codes picks rows of a small table. The gradient of indexing would
        # add N rows one by one.
        slice_part = slice_codes.unsqueeze(-3) @ self.slice_bias.to(q.dtype)[:, distance]
        slice_part = slice_part.expand(b, h, n, slices)
        region_part = log_prior[:, None].expand(b, h, n, r)
        queries = torch.cat([slice_part, region_part], dim=-1)
        queries = F.pad(queries, (0, extra - biases, 1, 0))

        keys = torch.zeros(b, 1, 1 + n + r, extra, device=q.device, dtype=q.dtype)
        keys[:, 0, 1 : 1 + n, :slices] = slice_codes
        keys[:, 0, 1 + n :, slices:biases] = torch.eye(r, device=q.device, dtype=q.dtype)
        if filler is not None:
            queries[..., biases] = 1
            keys[:, 0, 1 : 1 + n, biases] = filler * NEVER
        return torch.cat([q, queries * d**0.5], -1), torch.cat([k, keys.expand(b, h, -1, -1)], -1)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _pool_values(self, v: Tensor, weights: Tensor) -> Tensor:
        """Means of the patches' values (B, H, N, D) over the regions, (B, R, C)."""
        return self._merge_heads(torch.einsum("bnr,bhnd->bhrd", weights.to(v.dtype), v))

    @staticmethod
    def _merge_heads(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)


class WithinSliceAttention(SliceRegionAttention):
    """Attention of a patch to the global token, the patches of its own slice and the region tokens.

    Its time grows with the number of slices, not with the square of it. Global token and region
    tokens read the whole volume, as in `SliceRegionAttention`.

    Args:
        width: channels of a token.
        heads: number of heads.
        gated: as in `SliceRegionAttention`; in a slice each gate counts once.
    """

    def __init__(self, width: int, heads: int, gated: bool = False) -> None:
        super().__init__(width, heads, slices=1, gated=gated)

    def forward(
        self,
        tokens: Tensor,
        regions: Tensor,
        slice_index: Tensor,
        log_prior: Tensor,
        weights: Tensor,
        slices: int | None = None,
        filler: Tensor | None = None,
        places: SlicePlaces | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend; arguments and returned values are those of `SliceRegionAttention.forward`."""
        assert slices is not None and places is not None, (
            "attention within slices needs the places of the patches"
        )
        rows, region_count = tokens.shape[1], regions.shape[1]
        q, kv = self.q(tokens), self.kv(torch.cat([tokens, regions], dim=1))
        k, v = (self._split_heads(part) for part in kv.chunk(2, dim=-1))
        shares = self._share_among_keys(self._split_heads(q[:, :1]), k, rows, slices, filler)
        of_volume = self._merge_heads(shares.to(v.dtype)[:, :, None] @ v)

        # The global token is in every slice, as a key; its own row there is not used.
        slice_keys, slice_values = places.lay_out(kv, 1, region_count).chunk(2, dim=-1)
        of_slices = self._attend_with_biases(
            self._split_heads(places.lay_out(q, 1, 0)),
            self._split_heads(slice_keys),
            self._split_heads(slice_values),
            torch.zeros(places.patch.shape[2], dtype=torch.int64, device=q.device),
            places.lay_out(log_prior.to(q.dtype), 0, 0),
            1,
            places.is_empty.flatten(0, 1),
        )
        patches = places.collect(self._merge_heads(of_slices[:, :, 1:]))
        pooled = self._pool_values(v[:, :, 1:rows], weights)
        return self.out(torch.cat([of_volume, patches], dim=1)), self.out(pooled)
