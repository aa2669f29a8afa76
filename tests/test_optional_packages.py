"""Commands whose packages are in an extra that is not installed say so before they do anything."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import launches
import pytest

from rectvlm.optional_packages import missing_packages, require_extra
from rectvlm.types import UserError

CHECKOUT = Path(__file__).parents[1]
METADATA = """Metadata-Version: 2.4
Name: rectvlm
Version: 0.1.0
Provides-Extra: train
Provides-Extra: serve
Requires-Dist: numpy>=1
Requires-Dist: no-such-base>=1
Requires-Dist: scipy>=1; extra == "train"
Requires-Dist: no-such-trainer>=1; extra == "train"
Requires-Dist: no-such-server>=1; extra == "serve"
"""
WITHOUT_DEEPSPEED = """
import sys


class WithoutDeepSpeed:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] != "deepspeed":
            return self.finder.find_spec(name, path, target)

    def find_distributions(self, context):
        if context.name != "deepspeed":
            yield from getattr(self.finder, "find_distributions", lambda _: ())(context)


sys.meta_path[:] = map(WithoutDeepSpeed, sys.meta_path)
"""
"""A `sitecustomize.py`: every Python that finds it has no DeepSpeed, as after a plain install."""


@pytest.fixture
def small_install(tmp_path: Path) -> Path:
    """Metadata of a distribution that has all but one package of the extra `train`."""
    folder = tmp_path / "rectvlm-0.1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(METADATA)
    return tmp_path


def test_what_is_missing_of_an_extra_is_named(small_install, monkeypatch):
    monkeypatch.syspath_prepend(str(small_install))
    assert missing_packages("train") == ["no-such-trainer"]
    with pytest.raises(UserError, match=r'\(no-such-server\): pip install "rectvlm\[serve\]"'):
        require_extra("serve")


@pytest.mark.parametrize(
    "words",
    [
        "train 1 --config tiny",
        "preprocess --config tiny",
        "evaluate --checkpoint gone",
        "probe gone.npz",
        "runs plot gone",
    ],
)
def test_a_command_that_needs_the_training_packages_says_how_to_get_them(words, small_install):
    search_path = os.pathsep.join([str(small_install), str(CHECKOUT)])
    done = subprocess.run(
        [sys.executable, "-m", "rectvlm", *words.split()],
        cwd=small_install,
        env=os.environ | {"PYTHONPATH": search_path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert 'no-such-trainer): pip install "rectvlm[train]"' in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        [*launches.LAUNCH, "launch/phase1.py", "--config", "tiny"],
        [sys.executable, "launch/phase3.py", "--config", "tiny"],
        [sys.executable, "-m", "rectvlm", "train", "2", "--config", "tiny"],
        [sys.executable, "-m", "launch.demo", "--config", "tiny"],
        [sys.executable, "-m", "data_pipeline.preprocess", "--config", "tiny"],
        [sys.executable, "-m", "data_pipeline.verify", "--stats", "out"],
    ],
    ids=lambda command: command[2],
)
def test_every_way_to_train_names_the_missing_package_in_one_sentence(
    command: list[str], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_DEEPSPEED)
    environment = launches.environment(tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(CHECKOUT)])
    done = subprocess.run(
        command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0 and done.stdout == ""
    text = " ".join(done.stderr.split())
    assert text.count('(deepspeed): pip install "rectvlm[train') == 1, done.stderr
    assert "ModuleNotFoundError" not in text
    # Accelerate adds a traceback of its own about the exit status of the process.
    assert ("Traceback" in text) == ("CalledProcessError" in text)


def test_a_checkout_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_nothing(name: str) -> list[str]:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("rectvlm.optional_packages.requires", find_nothing)
    with pytest.raises(UserError, match=r"is not installed.*pip install -e \."):
        require_extra("train")
