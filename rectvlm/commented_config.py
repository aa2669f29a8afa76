"""A shipped configuration as a file to edit: one value a line, each field explained once.

    rectvlm init my.yaml --from small

The comments are the first sentences of the field docstrings in `rectvlm.config`.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from rectvlm.config import Config, load_config
from rectvlm.files import atomic_file, explain_write_error
from rectvlm.types import UserError

_INDENT = "  "


def write_commented_config(name: str, path: Path) -> None:
    """Write a shipped configuration with comments to a new file.

    Args:
        name: name of a shipped configuration, or the path of a YAML file.
        path: YAML file to write.

    Raises:
        UserError: there is no such configuration, or the file exists, has no suffix of YAML, or
            cannot be written.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"Expected a file name that ends with .yaml, found {path}: rename it.")
    config = load_config(name)
    if path.exists():
        raise UserError(f"{path} exists: give another name, or remove it first.")
    try:
        with atomic_file(path) as file:
            file.write(format_commented_config(config, f"{name}, with its comments.").encode())
    except OSError as error:
        raise UserError(explain_write_error(path, error)) from error


def format_commented_config(config: Config, title: str) -> str:
    """A configuration as YAML: one value a line, a comment above the first line of each field.

    Args:
        config: the configuration.
        title: first line of the file, without its `#`.
    """
    explained: set[tuple[type[BaseModel], str]] = set()
    lines = [f"# {title}", *_format_section(config, "", explained)]
    return "\n".join(lines) + "\n"


def _format_section(
    section: BaseModel, indent: str, explained: set[tuple[type[BaseModel], str]]
) -> Iterator[str]:
    values = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        description = field.description or (type(value).__doc__ if _is_section(value) else None)
        if description and (type(section), name) not in explained:
            explained.add((type(section), name))
            yield f"{indent}# {_first_sentence(description)}"
        if _is_section(value):
            yield f"{indent}{name}:"
            yield from _format_section(value, indent + _INDENT, explained)
        elif isinstance(value, dict) and any(map(_is_section, value.values())):
            yield f"{indent}{name}:"
            for key, entry in value.items():
                yield f"{indent}{_INDENT}{key}:"
                yield from _format_section(entry, indent + 2 * _INDENT, explained)
        else:
            yield f"{indent}{name}: {_format_value(values[name])}"


def _is_section(value: Any) -> bool:
    return isinstance(value, BaseModel)


def _first_sentence(docstring: str) -> str:
    """The first sentence of a docstring, on one line."""
    return re.split(r"(?<=\.)\s", " ".join(docstring.split()), maxsplit=1)[0]


def _format_value(value: Any) -> str:
    """A value as YAML on one line."""
    text: str = yaml.safe_dump([value], default_flow_style=True, width=10_000, sort_keys=False)
    return text.strip().removeprefix("[").removesuffix("]")
