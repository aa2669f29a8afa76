"""Encoders from elsewhere: they equal the original networks, take their weights strictly, hold the
contract of `ImageFeatures`, train, predict and are planned."""

from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets.segresnet_ds import SegResEncoder
from narrow_encoders import NARROW, NARROW_ENCODERS, OVERRIDES, published_names
from safetensors.torch import save_file
from torch import Tensor

from rectvlm.config import Config, load_config
from rectvlm.data.loader import build_train_loader
from rectvlm.models import RectVLM
from rectvlm.models.ct_fm import BLOCKS_IN_STAGES, CtFmEncoder
from rectvlm.models.encoder import ENCODERS, build_encoder
from rectvlm.models.image_features import ImageFeatures
from rectvlm.models.prompt_embeddings import PromptEmbeddings
from rectvlm.models.staged_encoder import StagedEncoder
from rectvlm.models.video_resnet import (
    KINETICS_MEAN,
    KINETICS_STD,
    R2Plus1D18Encoder,
    R3D18Encoder,
)
from rectvlm.plan.planner import ResourcePlanner
from rectvlm.train.objectives import combine_losses, compute_losses
from rectvlm.train.phases import PHASES
from rectvlm.types import UserError

TORCHVISION_FEATURES = {
    "r3d-18": {
        "means": [2.26317, 7.92194, 5.39037, 4.49398],
        "values": [0.95464, 10.85309, 0.0, 0.0, 0.05411, 11.53223, 4.13779, 0.01952],
    },
    "r2plus1d-18": {
        "means": [0.14813, 1.87928, 1.99016, 2.13294],
        "values": [0.0, 8.84102, 1.55621, 0.24882, 0.07397, 0.0, 3.55074, 0.0],
    },
}
"""Output of torchvision 0.28.0's own networks for `wave_weights` and `wave_video`: the mean of each
stage, and every 257th entry of the last."""


@pytest.fixture(autouse=True)
def narrow_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name builds the narrow encoder; what the true one is, two tests of its weights show."""
    for name, narrow in NARROW_ENCODERS.items():
        monkeypatch.setitem(ENCODERS, name, narrow)


def make_encoder(name: str, *overrides: str) -> StagedEncoder:
    torch.manual_seed(0)
    config = load_config("tiny", [*OVERRIDES[name], NARROW, *overrides])
    encoder = build_encoder(config.encoder, config.data)
    assert isinstance(encoder, StagedEncoder)
    return encoder.eval()


def make_empty_encoder(encoder_class: type[StagedEncoder], name: str) -> StagedEncoder:
    """The true encoder without values: 33 million would be drawn for nothing."""
    config = load_config("tiny", OVERRIDES[name])
    with torch.device("meta"):
        encoder = encoder_class(config.encoder, config.data)
    return encoder.to_empty(device="cpu").eval()


def wave_weights(shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Weights of the size that keeps a network's values in range, the same on every machine."""
    tensors = {}
    for number, name in enumerate(sorted(shapes)):
        shape = shapes[name]
        if name.endswith("num_batches_tracked"):
            tensors[name] = torch.zeros(shape, dtype=torch.int64)
            continue
        steps = torch.arange(shape.numel(), dtype=torch.float64)
        wave = torch.sin(steps * 0.7 + number).float().view(shape)
        if name.endswith("running_var"):
            wave = 1 + 0.5 * wave
        elif len(shape) == 1 and name.endswith("weight"):
            wave = 1 + 0.2 * wave
        elif len(shape) > 1:
            wave = wave * (2 / shape[1:].numel()) ** 0.5
        else:
            wave = 0.1 * wave
        tensors[name] = wave
    return tensors


def wave_video() -> Tensor:
    """Eight frames of 32 × 32, (1, 3, 8, 32, 32)."""
    return torch.sin(torch.arange(3 * 8 * 32 * 32).double() * 0.05).float().view(1, 3, 8, 32, 32)


def write_video_weights(encoder: StagedEncoder, path: Path) -> Path:
    """A file of torchvision's layout with `wave_weights`, head included."""
    own_tensors = encoder.state_dict()
    shapes = {}
    for published in published_names(encoder):
        own_name = encoder.rename_tensor(published)
        head_shape = torch.Size([400, 512] if published == "fc.weight" else [400])
        shapes[published] = head_shape if own_name is None else own_tensors[own_name].shape
    save_file(wave_weights(shapes), path)
    return path


def encode(encoder: StagedEncoder, known: bool = True, seed: int = 0) -> ImageFeatures:
    generator = torch.Generator().manual_seed(seed)
    ct = torch.randint(-1024, 600, (2, 16, 48, 48), generator=generator, dtype=torch.int16)
    regions = torch.randint(0, 21, (2, 16, 48, 48), generator=generator, dtype=torch.uint8)
    with torch.no_grad():
        return encoder(ct, regions, torch.tensor([known, known]))


@pytest.mark.parametrize(
    ("encoder_class", "name"), [(R3D18Encoder, "r3d-18"), (R2Plus1D18Encoder, "r2plus1d-18")]
)
def test_a_video_resnet_with_loaded_weights_equals_torchvisions(
    encoder_class: type[StagedEncoder], name: str, tmp_path: Path
) -> None:
    encoder = make_empty_encoder(encoder_class, name)
    path = write_video_weights(encoder, tmp_path / "kinetics.safetensors")
    report = encoder.load_starting_weights(str(path))
    assert "not its fc.bias, fc.weight" in report
    with torch.no_grad():
        stages = encoder.compute_stages(wave_video())
    expected = TORCHVISION_FEATURES[name]
    means = [stage.mean().item() for stage in stages]
    assert means == pytest.approx(expected["means"], rel=1e-3)
    assert stages[-1].shape == (1, 512, 1, 2, 2)
    values = stages[-1].flatten()[::257].tolist()
    assert values == pytest.approx(expected["values"], rel=2e-3, abs=2e-3)


def test_windows_are_normalized_like_the_videos() -> None:
    air = make_encoder("r3d-18").prepare_images(torch.full((1, 16, 48, 48), -2000))
    expected = [-mean / std for mean, std in zip(KINETICS_MEAN, KINETICS_STD, strict=True)]
    assert air[0, :, 3, 4, 5].tolist() == pytest.approx(expected)


def test_ct_fm_has_the_layout_of_the_published_file() -> None:
    config = load_config("tiny", OVERRIDES["ct-fm"])
    with torch.device("meta"):
        encoder = CtFmEncoder(config.encoder, config.data)
        network = SegResEncoder(blocks_down=BLOCKS_IN_STAGES)
    published = {CtFmEncoder.rename_tensor(n): t.shape for n, t in network.state_dict().items()}
    own = {n: t.shape for n, t in encoder.state_dict().items() if not n.startswith("norm.")}
    assert published == own


def test_ct_fm_with_loaded_weights_equals_monais_network(tmp_path: Path) -> None:
    network = SegResEncoder(init_filters=4, blocks_down=BLOCKS_IN_STAGES).eval()
    weights = wave_weights({name: t.shape for name, t in network.state_dict().items()})
    network.load_state_dict(weights)
    save_file(weights, tmp_path / "model.safetensors")
    encoder = make_encoder("ct-fm", "data.spacing=[3.0,1.0,1.0]", "encoder.patch=[16,16,16]")
    encoder.load_starting_weights(str(tmp_path))

    ct = torch.randint(-1200, 2400, (1, 16, 48, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network(((ct.float() + 1024) / 3072).clamp(0, 1)[:, None])
        stages = encoder.compute_stages(encoder.prepare_images(ct))
        unknown = torch.tensor([False])
        features = encoder(ct, torch.zeros_like(ct, dtype=torch.uint8), unknown)
    for own_stage, stage in zip(stages, expected, strict=True):
        torch.testing.assert_close(own_stage, stage)
    patches = expected[-1].flatten(2).mT
    normalized = torch.nn.functional.layer_norm(patches, patches.shape[-1:])
    torch.testing.assert_close(features.patches, normalized)
    pooled = torch.nn.functional.layer_norm(patches.mean(1), patches.shape[-1:])
    torch.testing.assert_close(features.global_token, pooled)


def test_ct_fm_sees_its_own_spacing_whatever_that_of_the_shards_is() -> None:
    coarse = make_encoder("ct-fm", "data.spacing=[6.0,2.0,0.5]")
    images = coarse.prepare_images(torch.zeros(1, 16, 48, 48))
    assert images.shape == (1, 1, 32, 96, 24)
    assert encode(coarse).patches.shape == (2, 8 * 3 * 6, 64)


@pytest.mark.parametrize("name", NARROW_ENCODERS)
def test_the_contract_of_image_features_holds(name: str) -> None:
    config = load_config("tiny", OVERRIDES[name])
    encoder = make_encoder(name, "encoder.tap_blocks=[1,3]")
    features = encode(encoder)
    grid = tuple(n // side for n, side in zip(config.data.grid, config.encoder.patch, strict=True))
    count = grid[0] * grid[1] * grid[2]
    assert features.patch_grid == grid
    assert features.global_token.shape == (2, 64)
    assert features.patches.shape == (2, count, 64)
    assert features.region_tokens.shape == (2, 20, 64)
    assert features.multilevel_patches.shape == (2, count, 3 * 64)
    assert torch.equal(features.multilevel_patches[..., -64:], features.patches)


def test_a_region_map_that_is_not_known_is_not_read() -> None:
    encoder = make_encoder("r3d-18")
    known, unknown = encode(encoder), encode(encoder, known=False)
    assert torch.equal(known.patches, unknown.patches)
    assert not torch.allclose(known.region_tokens, unknown.region_tokens)
    torch.testing.assert_close(
        unknown.region_tokens, unknown.global_token[:, None].expand(-1, 20, -1)
    )


@pytest.mark.parametrize("name", ["r3d-18", "ct-fm"])
def test_a_configuration_that_does_not_fit_is_refused_in_one_sentence(name: str) -> None:
    config = load_config("tiny", [f"encoder.name={name}", "encoder.atlas_cases=2"])
    with pytest.raises(UserError) as error:
        build_encoder(config.encoder, config.data)
    text = str(error.value)
    assert "encoder.width must be 64, not 48" in text and "encoder.atlas_cases must be 0" in text
    assert ("encoder.patch must be [8, 16, 16]" in text) == (name == "r3d-18")


def test_a_video_resnet_needs_three_windows() -> None:
    with pytest.raises(UserError, match=r"number of data\.windows must be 3, not 2"):
        make_encoder("r3d-18", "data.windows=[lung, bone]")


def damage(weights: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    name = "layer2.0.conv1.0.weight"
    if how == "missing":
        return {key: tensor for key, tensor in weights.items() if key != name}
    if how == "of another shape":
        return weights | {name: weights[name][:, :-1].contiguous()}
    return weights | {"layer5.weight": torch.zeros(1)}


@pytest.mark.parametrize("how", ["missing", "of another shape", "unexpected"])
def test_weights_that_do_not_fit_are_refused_and_nothing_is_taken(how: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    encoder = make_encoder("r3d-18")
    path = write_video_weights(encoder, tmp_path / "kinetics.safetensors")
    save_file(damage(load_file(path), how), path)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    with pytest.raises(UserError, match=rf"kinetics\.safetensors.*{how}.*encoder\.name"):
        encoder.load_starting_weights(str(path))
    assert all(torch.equal(before[name], t) for name, t in encoder.state_dict().items())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.safetensors", None, "for encoder.init: give a safetensors file"),
        ("r3d_18-b3b3357e.pth", b"PK", "pickled weights run code"),
        ("broken.safetensors", b"no tensors", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    name: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} .*{message}"):
        make_encoder("ct-fm").load_starting_weights(str(tmp_path / name))


def build_model(config: Config, phase: int) -> RectVLM:
    torch.manual_seed(0)
    prompts = PromptEmbeddings(torch.randn(18, 16), torch.randn(18, 16), torch.randn(5, 16))
    return RectVLM(config, PHASES[phase].parts, prompts)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_whole_model_trains_on_it_and_predicts(phantom_shards: Path, recompute: bool) -> None:
    more: list[Any] = [
        f"data.shards={phantom_shards}",
        f"encoder.activation_checkpointing={recompute}",
        "encoder.tap_blocks=[2]",
    ]
    config = load_config("tiny", [*OVERRIDES["r3d-18"], NARROW, *more])
    model = build_model(config, 2)
    batch = next(iter(build_train_loader(config.data, 2, 0, 1, 0)))
    statistics = {name: buffer.clone() for name, buffer in model.encoder.named_buffers()}
    losses = compute_losses(
        model.train()(batch), batch, PHASES[2].tasks, config.train.localization_loss_weights
    )
    combine_losses(losses, config.train.loss_weights).backward()
    for name, parameter in model.encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    assert all(torch.equal(statistics[n], b) for n, b in model.encoder.named_buffers())
    prediction = model.eval().predict_batch(batch, generate=False)
    assert prediction.lesion_probabilities.shape == (2, 5, *config.data.grid)


@pytest.mark.parametrize("encoder_class", [R2Plus1D18Encoder, CtFmEncoder])
def test_it_is_planned_with_its_own_parameters(
    encoder_class: type[StagedEncoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "ct-fm" if encoder_class is CtFmEncoder else "r2plus1d-18"
    monkeypatch.setitem(ENCODERS, name, encoder_class)
    planner = ResourcePlanner(load_config("tiny", OVERRIDES[name]), 1, Path("ds_configs"))
    count = sum(parameter.numel() for parameter in planner.model.encoder.parameters())
    assert count > 30e6
    plan = planner.make_plan(1, 80.0)
    assert plan.parameters.encoder == count
    assert plan.activations_gb["encoder"] > 0
