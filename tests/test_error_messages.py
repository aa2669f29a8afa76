"""The messages on the page of errors are those of the source, ours and the libraries'."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
PAGE = CHECKOUT / "docs/reference/errors.md"
LIBRARY_MODULES = (
    "accelerate.commands.launch",
    "bitsandbytes.backends.cpu.ops",
    "deepspeed.ops.op_builder.builder",
    "deepspeed.runtime.engine",
    "huggingface_hub.utils._http",
    "torch.distributed.distributed_c10d",
    "torch.nn.modules.module",
    "torch.utils.cpp_extension",
    "torch.utils.data.dataloader",
    "webdataset.shardlists",
)
"""Modules whose messages the page quotes."""
SHAPE_OF_NOTHING = "torch.Size([0])"
"""What torch writes for the shape of an empty tensor; in its source it is a variable."""


def read_messages(section: str) -> list[str]:
    """Lines of the blocks of a section."""
    text = PAGE.read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^```\n(.*?)^```$", text, flags=re.M | re.S)
    return [line for block in blocks for line in block.splitlines()]


def read_strings(path: Path) -> list[str]:
    """Strings of a module; what an f-string fills in is `…`."""
    strings: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            strings.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
            strings.append("".join(map(str, parts)))
    return strings


def is_said(message: str, strings: list[str]) -> bool:
    """Whether a string has the parts of a message in their order."""
    parts = re.split(r"…", message.replace(SHAPE_OF_NOTHING, "…"))
    pattern = ".*".join(re.escape(part) for part in parts)
    return any(re.search(pattern, string, flags=re.S) for string in strings)


@pytest.fixture(scope="module")
def own_strings() -> list[str]:
    return [
        string for path in (CHECKOUT / "rectvlm").rglob("*.py") for string in read_strings(path)
    ]


@pytest.mark.parametrize("message", read_messages("This suite"))
def test_messages_of_the_suite_are_in_its_source(message: str, own_strings: list[str]) -> None:
    assert is_said(message, own_strings)
    assert not is_said(message + " never", own_strings)


@pytest.fixture(scope="module")
def library_strings() -> list[str]:
    strings: list[str] = []
    for name in LIBRARY_MODULES:
        # A package's own code is not run: DeepSpeed's takes seconds.
        package, *parts = name.split(".")
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None
        path = Path(spec.origin).parent.joinpath(*parts)
        strings += read_strings(path.with_suffix(".py"))
    return strings


@pytest.mark.parametrize("message", read_messages("Libraries"))
def test_messages_of_libraries_are_in_what_is_installed(
    message: str, library_strings: list[str]
) -> None:
    assert is_said(message, library_strings)
    assert not is_said(message + " never", library_strings)
