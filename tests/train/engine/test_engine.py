"""What the engine asks of the packages that it starts."""

import tomllib
from pathlib import Path

import pytest

from rectvlm.train.engine.engine import MIN_DEEPSPEED_VERSION, check_deepspeed_version
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
    assert f"deepspeed>={least}" in project["dependencies"]
