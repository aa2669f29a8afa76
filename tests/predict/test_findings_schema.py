"""The published schema of `findings.json` is that of the types, and holds files to it."""

import json
from dataclasses import asdict

import jsonschema
import numpy as np
import pytest

from rectvlm.predict.findings_schema import SCHEMA_FILE, SCHEMA_ID, make_findings_schema
from tests.predict.small_summary import make_summary
from tests.small_cases import AFFINE, body


def test_the_published_schema_is_that_of_the_types() -> None:
    schema = json.loads(SCHEMA_FILE.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema == make_findings_schema(), "run python -m rectvlm.predict.findings_schema"


def test_a_summary_validates_and_one_with_a_fault_does_not() -> None:
    hu, mask = body(1)
    summary = make_summary(mask << 4, hu, AFFINE)
    tree = json.loads(json.dumps({"$schema": SCHEMA_ID, **asdict(summary)}))
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA_FILE.read_text()))
    validator.validate(tree)
    assert tree["components"]
    for fault in (
        {"step": "60"},
        {"more": 1},
        {"$schema": "urn:other"},
        {"components": [{"lesion": "lung_nodule"}]},
    ):
        with pytest.raises(jsonschema.ValidationError):
            validator.validate(tree | fault)
    del tree["disclaimer"]
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(tree)


def test_every_field_is_described() -> None:
    schema = make_findings_schema()
    fields = {key: row for key, row in schema["properties"].items() if key != "$schema"}
    for part in ("LesionComponent", "LesionSummary", "FindingSummary", "ThresholdsSummary"):
        fields |= schema["$defs"][part]["properties"]
    assert len(fields) > 30
    assert not [key for key, row in fields.items() if "description" not in row]
    assert np.all([row["description"][:1].isupper() for row in fields.values()])
