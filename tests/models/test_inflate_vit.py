"""Inflated weights give the features of the 2D ViT on a CT that repeats one slice."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from vit_models import compute_features, make_vit, save_as_timm

from rectvlm.config import load_config
from rectvlm.labels import N_REGIONS
from rectvlm.models.image_features import ImageFeatures, apply_windows
from rectvlm.models.inflate_vit import resample_kernel
from rectvlm.models.slice_region_encoder import SliceRegionEncoder
from rectvlm.pretrained.vit_file import read_vit_file
from rectvlm.types import UserError

GRID = (16, 48, 48)


def inflate(reference: Path, *overrides: str) -> tuple[SliceRegionEncoder, str]:
    config = load_config("tiny", [f"encoder.init={reference}", *overrides])
    torch.manual_seed(1)
    encoder = SliceRegionEncoder(config.encoder, config.data)
    return encoder, encoder.load_starting_weights(str(reference))


def repeat_slice(grid: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    ct_slice = torch.randint(-1000, 600, (2, 1, *grid[1:]), generator=generator)
    return ct_slice.expand(-1, grid[0], -1, -1).contiguous()


@torch.no_grad()
def encode(encoder: SliceRegionEncoder, ct: Tensor) -> ImageFeatures:
    """Encode two CTs, one with a region map and one without."""
    generator = torch.Generator().manual_seed(3)
    regions = torch.randint(0, N_REGIONS + 1, ct.shape, generator=generator, dtype=torch.uint8)
    return encoder.eval()(ct, regions, torch.tensor([True, False]))


def as_pixels(ct: Tensor, reference: Path, encoder: SliceRegionEncoder) -> Tensor:
    """The slice as the ViT reads it: windows as channels, normalized."""
    vit = read_vit_file(str(reference))
    mean, std = torch.tensor(vit.mean), torch.tensor(vit.std)
    return (apply_windows(ct, encoder.windows)[:, :, 0] - mean[:, None, None]) / std[:, None, None]


def assert_same_features(
    model: Any,
    reference: Path,
    grid: tuple[int, int, int] = GRID,
    tolerance: float = 1e-4,
    volume_every: int = 1,
) -> str:
    encoder, report = inflate(
        reference, f"data.grid={list(grid)}", f"encoder.volume_every={volume_every}"
    )
    ct = repeat_slice(grid)
    features = encode(encoder, ct)
    patches, class_token = compute_features(model, as_pixels(ct, reference, encoder))
    assert patches.std() > 0.5
    in_slices = features.patches.unflatten(1, (features.patch_grid[0], -1))
    wanted = patches[:, None].expand_as(in_slices)
    torch.testing.assert_close(in_slices, wanted, rtol=0, atol=tolerance)
    if class_token is not None:
        torch.testing.assert_close(features.global_token, class_token, rtol=0, atol=3 * tolerance)
    assert features.region_tokens.isfinite().all()
    return report


@pytest.mark.parametrize("volume_every", [1, 2])
@pytest.mark.parametrize("kind", ["vit", "vit-classifier", "mae", "dinov2"])
@pytest.mark.parametrize("grid", [GRID, (8, 64, 72), (4, 48, 48)])
def test_features_are_those_of_the_vit(
    kind: str, grid: tuple[int, int, int], volume_every: int, tmp_path: Path
) -> None:
    model = make_vit(kind)
    model.save_pretrained(tmp_path)
    report = assert_same_features(model, tmp_path, grid, volume_every=volume_every)
    assert "(Transformers)" in report
    assert ("positions interpolated from 6 × 6 to 8 × 9" in report) == (grid[1] == 64)


def test_siglip_has_no_class_token_and_its_gelu_is_an_approximation(tmp_path: Path) -> None:
    model = make_vit("siglip", hidden_act="gelu")
    model.save_pretrained(tmp_path / "exact")
    assert "no class token" in assert_same_features(model, tmp_path / "exact")
    assert model.config.hidden_act == "gelu"
    model = make_vit("siglip")
    assert model.config.hidden_act == "gelu_pytorch_tanh"
    model.save_pretrained(tmp_path / "own")
    assert_same_features(model, tmp_path / "own", tolerance=2e-3)


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
@pytest.mark.parametrize("prefix", ["", "visual.trunk."])
def test_features_are_those_of_a_file_of_timm(kind: str, prefix: str, tmp_path: Path) -> None:
    model = make_vit(kind)
    file = save_as_timm(model, tmp_path, prefix)
    report = assert_same_features(model, file)
    assert "(timm)" in report and "ls1" not in report
    unused = "mask_token" if kind == "dinov2" else "pooler"
    assert f"not used: {prefix}{unused}" in report


def test_queries_and_keys_without_a_bias(tmp_path: Path) -> None:
    model = make_vit("vit", qkv_bias=False)
    model.save_pretrained(tmp_path)
    assert_same_features(model, tmp_path)


def test_a_full_clip_model_gives_its_image_encoder(tmp_path: Path) -> None:
    """BiomedCLIP as OpenCLIP saves it: a trunk of timm, a projection and a text tower."""
    model = make_vit("vit")
    tensors = load_file(save_as_timm(model, tmp_path, "visual.trunk."))
    tensors["visual.head.proj.weight"] = torch.zeros(8, 48)
    tensors["text.transformer.embeddings.word_embeddings.weight"] = torch.zeros(9, 8)
    tensors["logit_scale"] = torch.ones(())
    save_file(tensors, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(
        '{"preprocess_cfg": {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}}'
    )
    report = assert_same_features(model, tmp_path)
    assert "logit_scale" in report and "visual.head.proj.weight" in report
    assert "mean and standard deviation of the input: the file's" in report
    assert read_vit_file(str(tmp_path)).std == (0.27, 0.26, 0.28)


def test_a_grey_vit_reads_the_mean_of_the_windows(tmp_path: Path) -> None:
    model = make_vit("vit", num_channels=1)
    model.save_pretrained(tmp_path)
    encoder, report = inflate(tmp_path)
    assert "1 channels of the kernel summed over 3 windows" in report
    ct = repeat_slice(GRID)
    vit = read_vit_file(str(tmp_path))
    grey = apply_windows(ct, encoder.windows)[:, :, 0].mean(1, keepdim=True)
    pixels = (grey - torch.tensor(vit.mean).mean()) / torch.tensor(vit.std).mean()
    patches, _ = compute_features(model, pixels)
    found = encode(encoder, ct).patches.unflatten(1, (4, -1))
    torch.testing.assert_close(found, patches[:, None].expand_as(found), rtol=0, atol=1e-4)


def test_one_window_reads_the_sum_of_the_colours(tmp_path: Path) -> None:
    model = make_vit("vit")
    model.save_pretrained(tmp_path)
    encoder, _ = inflate(tmp_path, "data.windows=[lung]")
    ct = repeat_slice(GRID)
    vit = read_vit_file(str(tmp_path))
    mean, std = torch.tensor(vit.mean), torch.tensor(vit.std)
    grey = apply_windows(ct, encoder.windows)[:, :, 0].expand(-1, 3, -1, -1)
    patches, _ = compute_features(model, (grey - mean[:, None, None]) / std[:, None, None])
    found = encode(encoder, ct).patches.unflatten(1, (4, -1))
    torch.testing.assert_close(found, patches[:, None].expand_as(found), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("old", "new"), [((14, 14), (16, 16)), ((6, 6), (8, 8))])
def test_a_resampled_kernel_gives_a_resized_patch_the_same_feature(
    old: tuple[int, int], new: tuple[int, int]
) -> None:
    """DINOv2's patches are 14 × 14."""
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(5, 3, *old, generator=generator)
    patch = torch.rand(4, 3, *old, generator=generator)
    resized = torch.nn.functional.interpolate(patch, new, mode="bicubic", antialias=True)
    torch.testing.assert_close(
        torch.einsum("bcyx,kcyx->bk", resized, resample_kernel(kernel, new)),
        torch.einsum("bcyx,kcyx->bk", patch, kernel),
        rtol=1e-4,
        atol=1e-4,
    )


def test_another_patch_size_is_said(tmp_path: Path) -> None:
    make_vit("dinov2", patch_size=6, image_size=36).save_pretrained(tmp_path)
    _, report = inflate(tmp_path)
    assert "patch kernel resampled from 6 × 6 to 8 × 8" in report


def test_gates_learn_to_let_region_tokens_in(tmp_path: Path) -> None:
    make_vit("vit").save_pretrained(tmp_path)
    encoder, _ = inflate(tmp_path)
    ct = repeat_slice(GRID)
    before = encode(encoder, ct)
    regions = torch.randint(0, N_REGIONS + 1, ct.shape, dtype=torch.uint8)
    encoder(ct, regions, torch.tensor([True, True])).patches.sin().sum().backward()
    for block in encoder.blocks:
        gradient = block.attention.gate.grad
        assert gradient is not None and (gradient.abs() > 1e-4).all()
        block.attention.gate.data[:, 1] = 0.5
    after = encode(encoder, ct)
    assert (before.patches - after.patches).abs().max() > 1e-2


def test_figures_show_the_attention_of_the_gated_class_token(tmp_path: Path) -> None:
    make_vit("vit").save_pretrained(tmp_path)
    encoder, _ = inflate(tmp_path)
    ct = repeat_slice(GRID)
    shares = encoder.attention_map(ct, torch.zeros_like(ct, dtype=torch.uint8), torch.zeros(2) > 0)
    assert shares.shape == (2, 3, 4, 6, 6)
    # Slices are alike, and as many keys are the class token's as there are slices.
    torch.testing.assert_close(shares, shares[:, :, :1].expand_as(shares), rtol=1e-3, atol=1e-5)
    single, _ = inflate(tmp_path, "data.grid=[4, 48, 48]")
    alone = single.attention_map(
        ct[:, :4], torch.zeros_like(ct[:, :4], dtype=torch.uint8), torch.zeros(2) > 0
    )
    torch.testing.assert_close(shares.sum(2), alone[:, :, 0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "changes", "feature"),
    [
        ("clip", {}, r"the activation 'quick_gelu'|a norm before its first block"),
        ("clip", {"hidden_act": "gelu"}, "a norm before its first block"),
        ("vit", {"hidden_act": "quick_gelu"}, "the activation 'quick_gelu'"),
        ("dinov2-swiglu", {}, r"a gated MLP \(SwiGLU\)"),
        ("dinov2-registers", {}, "register tokens"),
        ("dinov3", {"num_register_tokens": 4}, "register tokens and rotary positions"),
        ("dinov3", {}, "rotary positions"),
    ],
)
def test_a_vit_that_would_give_other_features_is_refused(
    kind: str, changes: dict[str, Any], feature: str, tmp_path: Path
) -> None:
    make_vit(kind, **changes).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=feature) as refusal:
        inflate(tmp_path)
    assert "features would differ" in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_size": 96, "num_attention_heads": 6},
            "encoder.width is 48 and must be 96, encoder.heads is 3 and must be 6",
        ),
        ({"num_hidden_layers": 3}, "encoder.depth is 2 and must be 3"),
        ({"num_attention_heads": 4}, "encoder.heads is 3 and must be 4"),
        ({"intermediate_size": 192}, r"its blocks.0.fc1.weight makes \(192, 48\)"),
    ],
)
def test_sizes_that_differ_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    make_vit("vit", **changes).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        inflate(tmp_path)


def test_common_heads_hold_where_no_file_names_them(tmp_path: Path) -> None:
    make_vit("vit", hidden_size=192, num_hidden_layers=1).save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"encoder\.heads is 4 and must be 3"):
        inflate(tmp_path, "encoder.width=192", "encoder.depth=1", "encoder.heads=4")


@pytest.mark.parametrize(
    "name",
    [
        "encoder.layer.1.attention.attention.key.bias",
        "encoder.layer.0.output.dense.weight",
        "embeddings.position_embeddings",
        "layernorm.bias",
    ],
)
def test_a_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    make_vit("vit").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    ours = {"key": "blocks.1.k.bias", "output": "blocks.0.fc2.weight", "layernorm": "norm.bias"}
    wanted = next((own for part, own in ours.items() if part in name), "no position embeddings")
    with pytest.raises(UserError, match=wanted):
        inflate(tmp_path)


def test_unknown_tensors_are_named(tmp_path: Path) -> None:
    make_vit("vit").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["encoder.layer.0.adapter.weight"] = torch.zeros(3)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"not known.*: encoder\.layer\.0\.adapter\.weight; give"):
        inflate(tmp_path)
