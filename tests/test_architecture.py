"""The design's rules, read from the source: who may import whom, and what no one does."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
FILES = sorted((CHECKOUT / "rectvlm").rglob("*.py"))
SHARED = {
    "chest_geometry",
    "config",
    "file_search",
    "files",
    "finding_thresholds",
    "labels",
    "lesion_bits",
    "lesion_places",
    "types",
}
"""Modules that every room may import."""
MAY_IMPORT = {"data": SHARED, "models": SHARED | {"checkpoint", "machine", "pretrained"}}
"""What the two rooms at the bottom may import.

A model can read its own weights; data knows no model.
"""
HEAVY = {"accelerate", "deepspeed"}
READS_TENSORS_OF_PICKLES = "rectvlm.pretrained.text_classifier"
"""The one module that reads a `.pth`, and nothing but tensors of it."""


def name(path: Path) -> str:
    """Dotted name of a module."""
    parts = path.relative_to(CHECKOUT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    """First name below the package: `data`, `models`, `predict`, …"""
    return module.partition(".")[2].partition(".")[0]


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it.

    These are absolute dotted names, together with what is taken from each module.
    """
    package = name(path).split(".") if path.name == "__init__.py" else name(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            argument = node.args[0]
            assert isinstance(argument, ast.Constant), (
                f"{path}:{node.lineno} imports a name that cannot be read"
            )
            yield str(argument.value)


def _called(node: ast.Call) -> str:
    target = node.func
    return (
        target.attr
        if isinstance(target, ast.Attribute)
        else target.id
        if isinstance(target, ast.Name)
        else ""
    )


def ours(path: Path) -> set[str]:
    """Rooms of the package that a file imports."""
    return {room(module) for module in imports(path) if module.split(".")[0] == "rectvlm"}


def test_there_is_something_to_read() -> None:
    rooms = {room(name(path)) for path in FILES}
    assert {
        "data",
        "models",
        "train",
        "config",
        "labels",
        "types",
        "predict",
        "evaluate",
        "metrics",
    } <= rooms
    assert "data" in ours(CHECKOUT / "rectvlm/train/run.py")
    assert "types" in ours(CHECKOUT / "rectvlm/data/loader.py")


@pytest.mark.parametrize("importer", MAY_IMPORT)
def test_data_and_models_see_only_what_is_shared(importer: str) -> None:
    allowed = {importer} | MAY_IMPORT[importer]
    for path in FILES:
        if room(name(path)) == importer:
            assert ours(path) <= allowed, f"{name(path)} imports {ours(path) - allowed}"


def test_shared_modules_see_only_each_other() -> None:
    for path in FILES:
        if room(name(path)) in SHARED:
            assert ours(path) <= SHARED, f"{name(path)} imports {ours(path) - SHARED}"


def test_one_module_knows_the_launcher() -> None:
    those = {
        name(path)
        for path in FILES
        if any(module.split(".")[0] in HEAVY for module in imports(path))
    }
    assert those == {"rectvlm.train.engine.engine"}


def test_only_training_and_its_plan_see_training() -> None:
    for path in FILES:
        # The command line imports it inside the function of `rectvlm train`.
        if room(name(path)) not in ("train", "plan", "cli"):
            assert "train" not in ours(path), f"{name(path)} imports rectvlm.train"


def test_imports_between_rooms_have_no_circle() -> None:
    """Data flows one way: a room that imports another is never imported by it, directly or not."""
    imported_rooms: dict[str, set[str]] = {}
    for path in FILES:
        importer = room(name(path))
        if importer:  # `rectvlm` itself hands on what its rooms offer
            imported_rooms.setdefault(importer, set()).update(ours(path) - {importer, ""})
    while imported_rooms:
        lowest = {key for key, below in imported_rooms.items() if not below & imported_rooms.keys()}
        assert lowest, f"these rooms import each other: {sorted(imported_rooms)}"
        for key in lowest:
            del imported_rooms[key]


def test_a_class_name_exists_once() -> None:
    places: dict[str, list[str]] = {}
    for folder in ("rectvlm", "data_pipeline", "launch", "benchmarks"):
        for path in sorted((CHECKOUT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    places.setdefault(node.name, []).append(f"{path}:{node.lineno}")
    assert len(places) > 100
    twice = {key: where for key, where in places.items() if len(where) > 1}
    assert not twice, f"one name, one thing: {twice}"


def test_the_package_stands_alone() -> None:
    outside = {path.name for path in CHECKOUT.iterdir() if path.is_dir()} - {"rectvlm"}
    assert {"data_pipeline", "launch", "tests"} <= outside
    outside.add("benchmarks")
    for path in FILES:
        found = {module.split(".")[0] for module in imports(path)} & outside
        assert not found, f"{name(path)} imports {found}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_what_no_one_does(path: Path) -> None:
    for module in imports(path):
        first = module.split(".")[0]
        assert first not in ("pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"), (
            f"{path} imports {module}"
        )
        assert not module.startswith("sys.path")
    for node in ast.walk(ast.parse(path.read_text())):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            assert dotted != "sys.path", f"{where} touches sys.path"
            is_allowed = name(path) == READS_TENSORS_OF_PICKLES
            assert dotted != "torch.load" or is_allowed, f"{where} reads a pickle"
        if isinstance(node, ast.Call):
            assert not (isinstance(node.func, ast.Name) and node.func.id == "print"), (
                f"{where} prints"
            )
            for keyword in node.keywords:
                if keyword.arg in ("trust_remote_code", "allow_pickle"):
                    value = keyword.value
                    assert isinstance(value, ast.Constant), f"{where} leaves {keyword.arg} open"
                    assert value.value is False, f"{where} sets {keyword.arg}"
                if keyword.arg == "weights_only":
                    is_safe = ast.unparse(keyword.value) == "True"
                    is_allowed = name(path) == READS_TENSORS_OF_PICKLES
                    assert is_safe and is_allowed, f"{where} reads a pickle"
            if ast.unparse(node.func) == "torch.load":
                options = {keyword.arg for keyword in node.keywords}
                assert "weights_only" in options, f"{where} runs the code of a pickle"
            if re.fullmatch(r"AutoModel\w*\.from_pretrained", ast.unparse(node.func)):
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                is_safe = options.get("use_safetensors") == "True" or "gguf_file" in options
                assert is_safe, f"{where} accepts a pickle: pass use_safetensors=True"
