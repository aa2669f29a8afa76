"""Citation, issue forms and the workflow of CI say what GitHub accepts and what exists here."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from rectvlm.cli import main

CHECKOUT = Path(__file__).parents[1]
FORMS = sorted((CHECKOUT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
FIELD_KINDS = {"markdown", "textarea", "input", "dropdown", "checkboxes"}


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def test_the_citation_agrees_with_the_package() -> None:
    citation = read_yaml(CHECKOUT / "CITATION.cff")
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys(), "what CFF 1.2.0 requires"
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]


@pytest.mark.parametrize("path", [path for path in FORMS if path.stem != "config"], ids=str)
def test_issue_forms_have_what_github_requires(path: Path) -> None:
    form = read_yaml(path)
    assert {"name", "description", "body"} <= form.keys()
    names = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert len(names) == len(set(names)) > 0
    for field in form["body"]:
        assert field["type"] in FIELD_KINDS
        needed = "value" if field["type"] == "markdown" else "label"
        assert needed in field["attributes"]


def test_a_bug_report_asks_for_commands_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    text = (CHECKOUT / ".github/ISSUE_TEMPLATE/bug.yml").read_text()
    commands = set(re.findall(r"`rectvlm (\w+)`", text))
    assert commands == {"doctor", "version"}
    for command in commands:
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0
    assert (CHECKOUT / "docs/reference/errors.md").is_file() and "docs/reference/errors.md" in text


def read_runs() -> list[str]:
    """Every command of the workflow."""
    jobs = read_yaml(CHECKOUT / ".github/workflows/ci.yml")["jobs"]
    return [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]


def test_the_workflow_runs_targets_and_files_that_exist() -> None:
    makefile = (CHECKOUT / "Makefile").read_text()
    runs = read_runs()
    assert ".ci/run" in runs and (CHECKOUT / ".ci/run").is_file()
    targets = {words[1] for words in map(str.split, runs) if words[0] == "make"}
    assert targets == {"setup", "test", "docs"}
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.M)


def test_the_workflow_tests_each_python_with_each_torch() -> None:
    jobs = read_yaml(CHECKOUT / ".github/workflows/ci.yml")["jobs"]
    pairs = {
        (entry["python"], entry["settings"])
        for entry in jobs["quick-tests"]["strategy"]["matrix"]["include"]
    }
    torch = (CHECKOUT / "Makefile").read_text()
    assert "torch==2.13.0" in torch, "the version that .ci/run installs"
    pairs.add(("3.11", "TORCH=torch==2.13.0"))
    wanted = {
        (python, f"TORCH=torch=={version}")
        for python in ("3.11", "3.12")
        for version in ("2.11.0", "2.13.0")
    }
    assert wanted <= pairs
    assert ("3.12", "LATEST=1") in pairs
