"""The package as a wheel, in a folder without a checkout."""

import importlib.metadata
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import write_nifti
from packaging.requirements import Requirement

from rectvlm.phantom.phantom import PhantomCase

CHECKOUT = Path(__file__).parents[1]
BUILT_FROM = ("rectvlm", "ds_configs", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel_contents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel from a copy of the sources and unpack it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    copied = [str(CHECKOUT / name) for name in BUILT_FROM]
    subprocess.run(["cp", "-a", *copied, str(source)], check=True)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(folder), str(source)], check=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "installed")
    return folder / "installed"


BLOCKER = """
import sys

class SmallInstallation:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        is_hidden = name.partition(".")[0] in {names}
        return None if is_hidden else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(SmallInstallation, sys.meta_path)
"""
"""`sitecustomize` of an installation without the packages of the extra `train`."""


def list_training_modules(contents: Path) -> set[str]:
    """Modules of the packages that only `rectvlm[train]` installs, by the wheel's metadata."""
    (metadata,) = contents.glob("*.dist-info")
    lines = importlib.metadata.PathDistribution(metadata).requires or []
    packages = {
        Requirement(line).name.lower().replace("_", "-")
        for line in lines
        if line.endswith('extra == "train"')
    }
    modules: set[str] = set()
    for module, distributions in importlib.metadata.packages_distributions().items():
        names = {name.lower().replace("_", "-") for name in distributions}
        if names <= packages:
            modules.add(module)
    return modules


def run_installed(
    contents: Path, *arguments: str, search_path: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run `rectvlm` from the wheel in a folder that holds nothing else."""
    folder = contents.parent / "elsewhere"
    folder.mkdir(exist_ok=True)
    paths = os.pathsep.join(filter(None, [search_path, str(contents)]))
    environment = os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-m", "rectvlm", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_file_of_the_package_is_in_the_wheel(wheel_contents: Path) -> None:
    """Files that git ignores are left out; a DeepSpeed JSON is as much a file of it as a module."""
    listed = subprocess.run(
        ["git", "ls-files", "rectvlm", "ds_configs"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=True,
    )
    names = [name for name in listed.stdout.split() if name != "rectvlm/ds_configs"]
    missing: list[str] = []
    for name in names:
        installed = name if name.startswith("rectvlm/") else f"rectvlm/{name}"
        if not (wheel_contents / installed).is_file():
            missing.append(installed)
    assert len(names) > 100 and not missing


@pytest.mark.slow
def test_a_plan_needs_no_checkout(wheel_contents: Path) -> None:
    done = run_installed(wheel_contents, "plan", "--config", "tiny", "--phase", "1", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["zero_stage"] == 1 and plan["config"] == "tiny"


@pytest.mark.slow
def test_predict_needs_no_training_package_and_prints_no_librarys_warning(
    wheel_contents: Path,
    tiny_run: Callable[[int], Path],
    phantoms: Callable[[int], PhantomCase],
    tmp_path: Path,
) -> None:
    """A model with all parts and a language model in NF4, where the packages cannot be imported."""
    modules = list_training_modules(wheel_contents)
    assert {"deepspeed", "datasets", "wandb", "webdataset", "sklearn", "matplotlib"} <= modules
    (tmp_path / "sitecustomize.py").write_text(BLOCKER.replace("{names}", repr(modules)))
    blocked = subprocess.run(
        [sys.executable, "-c", "import deepspeed"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "No module named 'deepspeed'" in blocked.stderr

    ct = write_nifti(phantoms(1).hu, phantoms(1).affine, tmp_path / "chest.nii.gz")
    words = [str(ct), "--checkpoint", str(tiny_run(3)), "--out", str(tmp_path / "out")]
    done = run_installed(wheel_contents, "predict", *words, search_path=str(tmp_path))
    assert done.returncode == 0, done.stderr
    page = tmp_path / "out/chest/index.html"
    assert done.stdout == f"{page}\n" and page.is_file()
    assert (page.parent / "report.txt").is_file() and (page.parent / "lesions.csv").is_file()
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and "loading torch, transformers and the model" in lines[0], done.stderr
