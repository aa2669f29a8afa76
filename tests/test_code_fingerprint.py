import sys
from pathlib import Path

import pytest

from rectvlm.code_fingerprint import find_imported_modules, hash_modules


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two packages: `ours.start` imports `ours.tools.near`, which imports `ours.tools.far`."""
    sources = {
        "ours_cf/__init__.py": "",
        "ours_cf/start.py": "def f():\n    from ours_cf.tools import near\n    import other_cf.x\n",
        "ours_cf/tools/__init__.py": "",
        "ours_cf/tools/near.py": "import ours_cf.tools.far\nfrom ours_cf.tools.far import Thing\n",
        "ours_cf/tools/far.py": "import json\nfrom ours_cf import start\nclass Thing: ...\n",
        "ours_cf/unused.py": "raise AssertionError('source is read, not imported')\n",
        "other_cf/__init__.py": "",
        "other_cf/x.py": "",
    }
    for name, source in sources.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in list(sys.modules):
        if name.partition(".")[0] in ("ours_cf", "other_cf"):
            monkeypatch.delitem(sys.modules, name)
    hash_modules.cache_clear()
    return tmp_path


def test_imports_are_followed_inside_the_packages_and_in_circles(packages: Path) -> None:
    modules = find_imported_modules(["ours_cf.start"], ["ours_cf"])
    assert modules == (
        "ours_cf",
        "ours_cf.start",
        "ours_cf.tools",
        "ours_cf.tools.far",
        "ours_cf.tools.near",
    )
    followed = find_imported_modules(["ours_cf.start"], ["ours_cf", "other_cf"])
    assert set(followed) - set(modules) == {"other_cf.x"}


def test_the_checksum_changes_with_any_source(packages: Path) -> None:
    modules = find_imported_modules(["ours_cf.start"], ["ours_cf"])
    before = hash_modules(modules)
    (packages / "ours_cf/tools/far.py").write_text("class Thing: ...\n")
    hash_modules.cache_clear()
    assert hash_modules(modules) != before
