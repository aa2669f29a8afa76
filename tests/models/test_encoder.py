"""The registry of encoders, and the encoder of docs/how-to/own-encoder.md in all that an encoder
must serve."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from rectvlm.config import Config, load_config
from rectvlm.data.loader import build_train_loader
from rectvlm.models import RectVLM
from rectvlm.models.encoder import ENCODERS, build_encoder
from rectvlm.models.prompt_embeddings import PromptEmbeddings
from rectvlm.models.slice_region_encoder import SliceRegionEncoder
from rectvlm.plan.planner import ResourcePlanner
from rectvlm.train.objectives import combine_losses, compute_losses
from rectvlm.train.optimizer import find_starts
from rectvlm.train.phases import PHASES
from rectvlm.train.starting_weights import check_encoder_init
from rectvlm.types import UserError

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "own-encoder.md"
OVERRIDES = re.findall(r"launch/phase1\.py (encoder.*)", PAGE.read_text())[0].split()
"""Changes of the configuration in the page's command."""
WEIGHTS = ("weight", "bias")


@pytest.fixture
def conv_encoder(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[nn.Module]]:
    """The encoder of the page, written and registered as the page says."""
    source, registration = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    module = ModuleType("rectvlm.models.conv_encoder")
    exec(compile(source, str(PAGE), "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    before = dict(ENCODERS)
    exec(registration, {"ENCODERS": ENCODERS})
    yield module.ConvEncoder
    ENCODERS.clear()
    ENCODERS.update(before)


def build_model(config: Config, phase: int) -> RectVLM:
    torch.manual_seed(0)
    prompts = PromptEmbeddings(torch.randn(18, 16), torch.randn(18, 16), torch.randn(5, 16))
    return RectVLM(config, PHASES[phase].parts, prompts)


def test_the_configuration_chooses_the_encoder(tiny: Config) -> None:
    assert isinstance(build_encoder(tiny.encoder, tiny.data), SliceRegionEncoder)


def test_an_unknown_name_is_answered_with_the_known_ones(tiny: Config) -> None:
    unknown = tiny.encoder.model_copy(update={"name": "resnet"})
    with pytest.raises(UserError, match=r"encoder\.name = 'resnet'.*slice-region.*ENCODERS"):
        build_encoder(unknown, tiny.data)


def test_the_command_of_the_page_suits_the_default_configuration(
    conv_encoder: type[nn.Module],
) -> None:
    config = load_config("demo", OVERRIDES)
    assert isinstance(build_encoder(config.encoder, config.data), conv_encoder)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_encoder_of_the_page_trains_and_predicts(
    conv_encoder: type[nn.Module], phantom_shards: Path, recompute: bool
) -> None:
    more = [f"data.shards={phantom_shards}", f"encoder.activation_checkpointing={recompute}"]
    config = load_config("tiny", [*OVERRIDES, *more])
    model = build_model(config, 2)
    assert isinstance(model.encoder, conv_encoder)
    batch = next(iter(build_train_loader(config.data, 2, 0, 1, 0)))
    losses = compute_losses(
        model.train()(batch), batch, PHASES[2].tasks, config.train.localization_loss_weights
    )
    combine_losses(losses, config.train.loss_weights).backward()
    for name, parameter in model.encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    prediction = model.eval().predict_batch(batch, generate=False)
    assert prediction.lesion_probabilities.shape == (2, 5, *config.data.grid)


def test_the_end_of_the_encoder_of_the_page_can_begin_late(
    conv_encoder: type[nn.Module],
) -> None:
    late = "train.phases.phase1.unfreeze=[{part: encoder, last_blocks: 1, start: 0.5}]"
    config = load_config("tiny", [*OVERRIDES, late])
    model = build_model(config, 1)
    starts = find_starts(model, config.train.phases["phase1"].unfreeze)
    last = config.encoder.depth - 1
    trained = {name for name, start in starts.items() if start == 0.5}
    blocks = {n for n, _ in model.named_parameters() if n.startswith(f"encoder.blocks.{last}.")}
    after_blocks = {f"encoder.{part}.{w}" for part in ("taps.1", "norm") for w in WEIGHTS}
    assert trained == blocks | after_blocks


def test_the_encoder_of_the_page_has_no_atlas(conv_encoder: type[nn.Module]) -> None:
    config = load_config("tiny", [*OVERRIDES, "encoder.atlas_cases=2"])
    with pytest.raises(UserError, match=r"encoder\.atlas_cases must be 0, not 2"):
        build_encoder(config.encoder, config.data)


def test_an_encoder_without_the_means_takes_no_weights_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(ENCODERS, "plain", lambda *_: nn.Identity())
    config = load_config("tiny", ["encoder.name=plain", "encoder.init=facebook/vit-mae-base"])
    with pytest.raises(UserError, match=r"the encoder plain cannot start.*encoder\.init=null"):
        check_encoder_init(config)


def test_the_encoder_of_the_page_is_planned(conv_encoder: type[nn.Module]) -> None:
    config = load_config("tiny", OVERRIDES)
    planner = ResourcePlanner(config, 2, Path("ds_configs"))
    encoder = conv_encoder(config.encoder, config.data)
    count = sum(parameter.numel() for parameter in encoder.parameters())
    assert sum(p.numel() for p in planner.model.encoder.parameters()) == count
    assert planner.dry_run(2).patches == 4 * 6 * 6 * 2
