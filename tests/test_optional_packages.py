"""Commands whose packages are in an extra that is not installed say so before they do anything."""

import os
import subprocess
import sys
from pathlib import Path

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
