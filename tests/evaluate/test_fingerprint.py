"""The fingerprint of an evaluation covers what decides a case: code, by the imports, and the frozen language model."""

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from rectvlm.evaluate.options import (
    FINGERPRINTED_CODE,
    PACKAGE_FOLDER,
    SAMPLED_BLOCK_BYTES,
    SAMPLED_BLOCKS,
    identify_language_model,
)
from rectvlm.types import UserError

STARTS = ("evaluate/run.py",)
"""Code that has cases examined; it decides nothing itself."""
NOT_DECIDING = {
    "config.py": "its values are in the fingerprint",
    "evaluate/journal.py": "keeps what was found",
    "machine.py": "says where",
    "evaluate/options.py": "its values are in the fingerprint",
    "evaluate/plots.py": "makes figures of cases",
    "evaluate/process_ranks.py": "shares the cases",
    "evaluate/region_maps.py": "makes figures of cases",
    "evaluate/report_figures.py": "makes figures of cases",
    "evaluate/scans.py": "makes figures of cases",
    "evaluate/selection.py": "reads how a checkpoint was chosen",
    "evaluate/summary.py": "makes figures of cases",
    "evaluate/tables.py": "makes figures of cases",
    "evaluate/thresholds.py": "makes figures of cases",
    "metrics/__init__.py": "passes names on, which are followed",
    "metrics/findings.py": "makes figures of cases",
    "metrics/report_labeler/labeler.py": "makes figures of cases",
    "metrics/bootstrap.py": "makes figures of cases",
    "pretrained/__init__.py": "passes names on, which are followed",
    "pretrained/model_references.py": "the language model is in the fingerprint by its contents",
    "whole.py": "refuses damaged files",
}


def file_of(*parts: str) -> str | None:
    """The file of a module below the package."""
    path = PACKAGE_FOLDER.joinpath(*parts)
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate.relative_to(PACKAGE_FOLDER).as_posix()
    return None


def passed_on(package: str, name: str) -> str | None:
    """The file of this project that a name of a package comes from, where its `__init__` passes it on."""
    for node in ast.parse((PACKAGE_FOLDER / package).read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rectvlm"):
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    return file_of(*str(node.module).split(".")[1:])
    return None


def imports(file: str) -> Iterator[str]:
    """Files of this project that a file takes names from, wherever in it; names of packages are followed."""
    tree = ast.parse((PACKAGE_FOLDER / file).read_text())
    packages: dict[str, str] = {}
    for node in ast.walk(tree):
        assert not (
            isinstance(node, ast.Import)
            and any(one.name.startswith("rectvlm") for one in node.names)
        ), f"{file} line {node.lineno}: this test reads `from rectvlm… import` only"
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("rectvlm"):
            continue
        assert node.level == 0, f"{file} line {node.lineno}: this test reads absolute imports only"
        parts = str(node.module).split(".")[1:]
        source = file_of(*parts)
        assert source is not None, (file, node.module)
        for alias in node.names:
            module = file_of(*parts, alias.name)
            if module is not None:
                yield module
                if module.endswith("__init__.py"):
                    packages[alias.asname or alias.name] = module
            else:
                passed = passed_on(source, alias.name) if source.endswith("__init__.py") else None
                yield passed or source
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in packages
        ):
            package = packages[node.value.id]
            yield (
                passed_on(package, node.attr)
                or file_of(*Path(package).parts[:-1], node.attr)
                or package
            )


def covered(file: str) -> bool:
    return any(file == part or file.startswith(f"{part}/") for part in FINGERPRINTED_CODE)


def test_every_import_of_the_code_that_examines_a_case_is_in_the_fingerprint() -> None:
    seen: set[str] = set()
    named: set[str] = set()
    left = [
        *STARTS,
        *(
            path.relative_to(PACKAGE_FOLDER).as_posix()
            for part in FINGERPRINTED_CODE
            for path in files(PACKAGE_FOLDER / part)
        ),
    ]
    while left:
        file = left.pop()
        if file in seen:
            continue
        seen.add(file)
        for other in imports(file):
            assert covered(other) or other in NOT_DECIDING or other in STARTS, (
                f"{file} imports {other}: add it to DECIDING of rectvlm/evaluate/options.py, or here with a reason"
            )
            if covered(other):
                left.append(other)
            named.add(other)
    assert set(NOT_DECIDING) <= named, f"no longer imported: {set(NOT_DECIDING) - named}"
    assert {
        "labels.py",
        "lesion_places.py",
        "metrics/lesion_overlap.py",
        "models/report_generator.py",
        "data/loader.py",
    } <= seen


def files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def test_what_is_said_to_decide_or_not_is_there_and_no_more() -> None:
    assert all(files(PACKAGE_FOLDER / part) for part in FINGERPRINTED_CODE)
    assert all((PACKAGE_FOLDER / name).is_file() and not covered(name) for name in NOT_DECIDING)


def test_names_are_followed_through_packages() -> None:
    assert {"metrics/lesion_overlap.py", "metrics/lesions.py"} <= set(
        imports("evaluate/case_records.py")
    )
    assert "models/rectvlm.py" in set(imports("evaluate/case_records.py"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    rows = np.random.default_rng(0).integers(
        0, 255, 3 * SAMPLED_BLOCK_BYTES * SAMPLED_BLOCKS, dtype=np.uint8
    )
    save_file({"rows": rows, "norm": np.ones(8, np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_a_language_model_is_known_by_its_contents(model: Path, tmp_path: Path) -> None:
    first = identify_language_model(str(model))
    assert first["reference"] == str(model)
    # A copy elsewhere, with other times and another page of its owner's, is the same one.
    shutil.copytree(model, tmp_path / "copy", copy_function=shutil.copyfile)
    (tmp_path / "copy" / "README.md").write_text("hello")
    assert identify_language_model(str(tmp_path / "copy"))["contents"] == first["contents"]
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "copy" / name).write_text("[]")
        assert identify_language_model(str(tmp_path / "copy"))["contents"] != first["contents"], (
            name
        )
        (tmp_path / "copy" / name).write_text("{}")
    assert identify_language_model(str(tmp_path / "copy"))["contents"] == first["contents"]
    rows = np.random.default_rng(1).integers(
        0, 255, 3 * SAMPLED_BLOCK_BYTES * SAMPLED_BLOCKS, dtype=np.uint8
    )
    save_file(
        {"rows": rows, "norm": np.ones(8, np.float32)}, tmp_path / "copy" / "model.safetensors"
    )
    assert identify_language_model(str(tmp_path / "copy"))["contents"] != first["contents"]


@pytest.mark.parametrize("byte", [0, 100, -1])
def test_of_a_large_file_the_head_and_the_end_count(byte: int, model: Path) -> None:
    before = identify_language_model(str(model))
    file = model / "model.safetensors"
    data = bytearray(file.read_bytes())
    assert len(data) > SAMPLED_BLOCK_BYTES * SAMPLED_BLOCKS
    data[byte] ^= 1
    file.write_bytes(data)
    assert identify_language_model(str(model)) != before


def test_a_hub_id_stands_for_itself_and_a_lost_folder_is_an_error(tmp_path: Path) -> None:
    assert identify_language_model("owner/name") == {"reference": "owner/name", "contents": None}
    with pytest.raises(UserError, match="No model at"):
        identify_language_model(str(tmp_path / "none"))
