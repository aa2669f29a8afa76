"""The folded attention against a dense float64 oracle: the same outputs and the same gradients."""

import pytest
import torch
from attention_oracle import (
    attend,
    attend_densely,
    compute_outputs_and_gradients,
    make_attention,
)

from rectvlm.models.attention import SliceRegionAttention

GRIDS = [(1, 2, 3), (3, 2, 2), (5, 3, 1), (4, 4, 4)]


@pytest.mark.parametrize("grid", GRIDS)
def test_float32_equals_dense_oracle(grid: tuple[int, int, int]) -> None:
    module, inputs, index = make_attention(grid)
    expected, expected_gradients = compute_outputs_and_gradients(
        module, inputs, index, folded=False
    )
    outputs, gradients = compute_outputs_and_gradients(
        module.float(), {name: value.float() for name, value in inputs.items()}, index, folded=True
    )
    for mine, theirs in zip(outputs, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, theirs in expected_gradients.items():
        error = (gradients[name].double() - theirs).norm() / theirs.norm()
        assert error < 1e-4, f"gradient of {name} is off by {error:.1e} of its norm"


def test_float64_equals_dense_oracle_to_rounding() -> None:
    module, inputs, index = make_attention((4, 3, 2))
    expected, expected_gradients = compute_outputs_and_gradients(
        module, inputs, index, folded=False
    )
    outputs, gradients = compute_outputs_and_gradients(module, inputs, index, folded=True)
    # Pooling weights are float32 by design.
    torch.testing.assert_close(outputs, expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("grid", GRIDS)
def test_gates_count_keys_as_the_dense_oracle_does(grid: tuple[int, int, int]) -> None:
    module, inputs, index = make_attention(grid, gated=True)
    expected, expected_gradients = compute_outputs_and_gradients(
        module, inputs, index, folded=False
    )
    outputs, gradients = compute_outputs_and_gradients(module, inputs, index, folded=True)
    torch.testing.assert_close(outputs, expected, rtol=1e-7, atol=1e-7)
    assert gradients["gate"].abs().min() > 0
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_attention_within_slices_equals_dense_oracle(
    grid: tuple[int, int, int], gated: bool
) -> None:
    module, inputs, index = make_attention(grid, gated=gated, within_slice=True)
    expected, expected_gradients = compute_outputs_and_gradients(
        module, inputs, index, folded=False
    )
    outputs, gradients = compute_outputs_and_gradients(module, inputs, index, folded=True)
    torch.testing.assert_close(outputs, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [9, 24])
def test_gates_have_the_channels_that_they_need_in_one_slice(width: int) -> None:
    """With one slice and 3 channels a head, biases alone leave too few."""
    module, inputs, index = make_attention((1, 2, 2), width=width, gated=True)
    with torch.no_grad():
        outputs = attend(module, inputs, index)
        expected = attend_densely(module, inputs, index)
    torch.testing.assert_close(outputs, expected, rtol=1e-7, atol=1e-7)


def test_bfloat16_stays_within_rounding() -> None:
    module, inputs, index = make_attention((4, 4, 4))
    module = module.bfloat16()
    rounded = {name: value.bfloat16() for name, value in inputs.items()}
    with torch.no_grad():
        outputs = attend(module, rounded, index)
        expected = attend_densely(
            module.double(), {name: value.double() for name, value in rounded.items()}, index
        )
    for mine, theirs in zip(outputs, expected, strict=True):
        assert (mine.double() - theirs).abs().max() < 0.02 * theirs.abs().max()


@pytest.mark.parametrize("gated", [False, True])
def test_fillers_have_no_share_of_the_attention(gated: bool) -> None:
    module, inputs, _ = make_attention((3, 2, 2), gated=gated)
    tokens, regions = inputs["tokens"], inputs["regions"]
    filler = torch.zeros(2, 12, dtype=torch.bool)
    filler[0, 8:] = filler[1, ::3] = True
    shares = module.compute_attention_shares(tokens, regions, filler=filler)
    kept = torch.cat([torch.ones(2, 1), ~filler, torch.ones(2, 20)], dim=1) > 0
    assert torch.equal(shares > 0, kept[:, None].expand_as(shares))
    for case in range(2):
        rows = tokens[case : case + 1, kept[case, :13]]
        alone = module.compute_attention_shares(rows, regions[case : case + 1])
        torch.testing.assert_close(shares[case][:, kept[case]], alone[0])


def test_slice_bias_acts_by_signed_distance() -> None:
    module, inputs, index = make_attention((3, 1, 1))
    torch.nn.init.zeros_(module.slice_bias)
    plain = attend(module, inputs, index)[0]
    with torch.no_grad():
        # A key two slices below (z_i − z_j = 2) drowns all others.
        module.slice_bias[:, 2 + 2] = 50.0
    biased = attend(module, inputs, index)[0]
    # The global token, slice 0 and slice 1 have no such key.
    assert torch.equal(biased[:, :3], plain[:, :3])
    values = module.kv(inputs["tokens"]).chunk(2, -1)[1]
    torch.testing.assert_close(biased[:, 3], module.out(values[:, 1]), rtol=1e-6, atol=1e-6)


def test_width_must_divide_into_heads() -> None:
    with pytest.raises(AssertionError, match="multiple of heads"):
        SliceRegionAttention(10, 3, 4)
