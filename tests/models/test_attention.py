"""The folded attention against a dense float64 oracle: the same outputs and the same gradients."""

import math

import pytest
import torch
from torch import Tensor

from rectvlm.models.attention import SliceRegionAttention, pooling_weights

GRIDS = [(1, 2, 3), (3, 2, 2), (5, 3, 1), (4, 4, 4)]


def dense(
    module: SliceRegionAttention, inputs: dict[str, Tensor], slice_index: Tensor
) -> tuple[Tensor, Tensor]:
    """The module docstring's formula with whole bias matrices; everything in the dtype of the inputs."""
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
    bias[:, :, 1:, 1:rows] = module.slice_bias[:, distance + module.slices - 1]
    bias[:, :, 1:, rows:] = log_prior[:, None]
    attended = (q @ k.transpose(-1, -2) / math.sqrt(d) + bias).softmax(-1) @ v
    share = log_prior.exp() / log_prior.exp().sum(1, keepdim=True)
    pooled = torch.einsum("bnr,bhnd->bhrd", share, v[:, :, 1 : 1 + n])

    def merge(x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(b, -1, width) @ module.out.weight.T + module.out.bias

    return merge(attended), merge(pooled)


def example(
    grid: tuple[int, int, int], heads: int = 3, width: int = 24, regions: int = 20
) -> tuple[SliceRegionAttention, dict[str, Tensor], Tensor]:
    """A module with a slice bias that is not zero, and inputs; float64."""
    torch.manual_seed(sum(grid))
    z, y, x = grid
    module = SliceRegionAttention(width, heads, z).double()
    torch.nn.init.normal_(module.slice_bias)
    inputs = {
        "tokens": torch.randn(2, 1 + z * y * x, width, dtype=torch.float64),
        "regions": torch.randn(2, regions, width, dtype=torch.float64),
        "log_prior": torch.randn(2, z * y * x, regions, dtype=torch.float64).log_softmax(-1),
    }
    return module, inputs, torch.arange(z).repeat_interleave(y * x)


def ours(
    module: SliceRegionAttention, inputs: dict[str, Tensor], slice_index: Tensor
) -> tuple[Tensor, Tensor]:
    shares = inputs["log_prior"].exp()
    weights = pooling_weights(
        shares, torch.ones(len(shares), dtype=torch.bool, device=shares.device)
    )
    return module(**inputs, slice_index=slice_index, weights=weights)


def outputs_and_gradients(
    module: SliceRegionAttention, inputs: dict[str, Tensor], slice_index: Tensor, folded: bool
) -> tuple[list[Tensor], dict[str, Tensor]]:
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    module.zero_grad()
    out = ours(module, leaves, slice_index) if folded else dense(module, leaves, slice_index)
    # A weighting that differs at every output, so that no gradient cancels.
    sum(
        (o * torch.linspace(-1, 1, o.numel(), dtype=o.dtype, device=o.device).view_as(o)).sum()
        for o in out
    ).backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items()}
    gradients |= {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    return [o.detach() for o in out], gradients


@pytest.mark.parametrize("grid", GRIDS)
def test_float32_equals_dense_oracle(grid: tuple[int, int, int]) -> None:
    module, inputs, index = example(grid)
    wanted, wanted_gradients = outputs_and_gradients(module, inputs, index, folded=False)
    found, gradients = outputs_and_gradients(
        module.float(), {name: value.float() for name, value in inputs.items()}, index, folded=True
    )
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == wanted_gradients.keys()
    for name, theirs in wanted_gradients.items():
        error = (gradients[name].double() - theirs).norm() / theirs.norm()
        assert error < 1e-4, f"gradient of {name} is off by {error:.1e} of its norm"


def test_float64_equals_dense_oracle_to_rounding() -> None:
    module, inputs, index = example((4, 3, 2))
    wanted, wanted_gradients = outputs_and_gradients(module, inputs, index, folded=False)
    found, gradients = outputs_and_gradients(module, inputs, index, folded=True)
    torch.testing.assert_close(
        found, wanted, rtol=1e-7, atol=1e-7
    )  # pooling weights are float32 by design
    torch.testing.assert_close(gradients, wanted_gradients, rtol=1e-6, atol=1e-6)


def test_bfloat16_stays_within_rounding() -> None:
    module, inputs, index = example((4, 4, 4))
    module = module.bfloat16()
    rounded = {name: value.bfloat16() for name, value in inputs.items()}
    with torch.no_grad():
        found = ours(module, rounded, index)
        wanted = dense(
            module.double(), {name: value.double() for name, value in rounded.items()}, index
        )
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine.double() - theirs).abs().max() < 0.02 * theirs.abs().max()


def test_slice_bias_acts_by_signed_distance() -> None:
    module, inputs, index = example((3, 1, 1))
    torch.nn.init.zeros_(module.slice_bias)
    plain = ours(module, inputs, index)[0]
    with torch.no_grad():
        module.slice_bias[:, 2 + 2] = (
            50.0  # a key two slices below (z_i − z_j = 2) drowns all others
        )
    biased = ours(module, inputs, index)[0]
    assert torch.equal(
        biased[:, :3], plain[:, :3]
    )  # the global token, slice 0 and slice 1 have no such key
    values = module.kv(inputs["tokens"]).chunk(2, -1)[1]
    torch.testing.assert_close(biased[:, 3], module.out(values[:, 1]), rtol=1e-6, atol=1e-6)


def test_width_must_divide_into_heads() -> None:
    with pytest.raises(AssertionError, match="multiple of heads"):
        SliceRegionAttention(10, 3, 4)
