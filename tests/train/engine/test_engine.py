"""What the engine asks of the packages that it starts."""

import tomllib
from pathlib import Path

import pytest
from deepspeed.accelerator import get_accelerator
from deepspeed.comm.torch import build_shm_op
from torch import nn

from rectvlm import pretrained
from rectvlm.config import load_config
from rectvlm.models.language_model import load_language_model
from rectvlm.train.engine.engine import (
    MIN_DEEPSPEED_VERSION,
    _leave_out_inference_kernel,
    check_deepspeed_version,
)
from rectvlm.train.engine.leaf_modules import find_decoder_layer_class, find_leaf_modules
from rectvlm.types import UserError

CHECKOUT = Path(__file__).parents[3]


def test_a_deepspeed_that_rounds_rotary_frequencies_is_refused() -> None:
    for version in ((0, 18, 9), (0, 19, 0), (0, 19, 1)):
        with pytest.raises(UserError, match=rf"found 0\.{version[1]}\.{version[2]}, which rounds"):
            check_deepspeed_version(version)
    for version in ((0, 19, 2), (0, 20, 0), (1, 0, 0)):
        check_deepspeed_version(version)


def test_the_package_asks_for_the_deepspeed_that_training_asks_for() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    least = ".".join(map(str, MIN_DEEPSPEED_VERSION))
    assert f"deepspeed>={least}" in project["optional-dependencies"]["train"]


def test_the_layers_of_the_language_model_are_found_behind_its_adapters() -> None:
    settings = load_config("tiny").generator
    language = load_language_model(settings, pretrained.resolve_model(settings.model))
    encoder_blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))
    model = nn.ModuleDict({"encoder": encoder_blocks, "generator": language.model})
    leaves = find_leaf_modules(model)
    assert [name for name in leaves if name.startswith("encoder")] == [
        f"encoder.{number}" for number in range(9)
    ]
    decoder_layers = [m for name, m in leaves.items() if name.startswith("generator.")]
    assert {type(m).__name__ for m in decoder_layers} == {"LlamaDecoderLayer"}
    assert len(decoder_layers) == 2 and len(leaves) == 11
    layer_class = find_decoder_layer_class(model)
    assert layer_class is not None and layer_class.__name__ == "LlamaDecoderLayer"
    assert find_decoder_layer_class(encoder_blocks) is None


def test_deepspeed_compiles_nothing_when_it_starts_on_a_cpu() -> None:
    """It would compile a kernel of tensor-parallel inference, which takes a C++ compiler."""
    if get_accelerator().device_name() != "cpu":
        pytest.skip("only on a CPU does DeepSpeed have that kernel")
    _leave_out_inference_kernel()
    assert build_shm_op() is None
