"""JSON Schema of `findings.json`, made from the types and docstrings of `case_summary`.

`findings.schema.json` is the published copy. Write it anew after a change of the types:
`python -m rectvlm.predict.findings_schema`
"""

from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pydantic import ConfigDict, TypeAdapter

from rectvlm.files import write_json
from rectvlm.predict.case_summary import CaseSummary
from rectvlm.types import JsonObject

SCHEMA_ID = "urn:rectvlm:findings:1"
"""Identifier of the schema, which a `findings.json` names under `$schema`."""
SCHEMA_FILE = Path(__file__).with_name("findings.schema.json")
_CONFIG = ConfigDict(
    use_attribute_docstrings=True,
    extra="forbid",
    json_schema_serialization_defaults_required=True,
)


def make_findings_schema() -> JsonObject:
    """Make the schema: every field is required, with its docstring, and no other is allowed."""
    _configure(CaseSummary)
    schema = TypeAdapter(CaseSummary).json_schema(mode="serialization")
    schema["properties"] = {"$schema": {"const": SCHEMA_ID}, **schema["properties"]}
    schema["required"] = ["$schema", *schema["required"]]
    dialect = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": dialect, "$id": SCHEMA_ID, **_drop_titles(schema)}


def _configure(kind: Any) -> None:
    """Have pydantic read the docstrings of a dataclass and of those that it holds."""
    for argument in get_args(kind):
        _configure(argument)
    if is_dataclass(kind):
        kind.__pydantic_config__ = _CONFIG  # type: ignore[union-attr]
        for field_type in get_type_hints(kind).values():
            _configure(field_type)


def _drop_titles(tree: Any) -> Any:
    """A schema without the titles that pydantic derives from the names."""
    if isinstance(tree, dict):
        is_title = isinstance(tree.get("title"), str)
        kept = {key: value for key, value in tree.items() if not (is_title and key == "title")}
        return {key: _drop_titles(value) for key, value in kept.items()}
    return [_drop_titles(item) for item in tree] if isinstance(tree, list) else tree


if __name__ == "__main__":
    write_json(SCHEMA_FILE, make_findings_schema())
