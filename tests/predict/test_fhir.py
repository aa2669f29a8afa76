"""The FHIR DiagnosticReport and the Markdown report say what the findings say, and name nobody."""

import base64
import json
from xml.etree import ElementTree

import numpy as np
import pytest

from rectvlm.predict.fhir import make_diagnostic_report
from rectvlm.predict.markdown_report import render_markdown
from tests.predict.small_summary import DISCLAIMER, make_summary
from tests.small_cases import AFFINE, body


@pytest.fixture(scope="module")
def summary():
    hu, mask = body(1)
    report = {"findings": "A <b>nodule</b> & | more.\x07", "impression": "One *nodule*."}
    return make_summary(mask << 4, hu, AFFINE, report)


def test_the_diagnostic_report_has_findings_lesions_and_the_report(summary) -> None:
    tree = make_diagnostic_report("ct-0123456789ab", summary)
    assert tree["resourceType"] == "DiagnosticReport" and tree["status"] == "preliminary"
    by_id = {row["id"]: row for row in tree["contained"]}
    assert [row["reference"] for row in tree["result"]] == [f"#{key}" for key in by_id]
    assert len(by_id) == 18 + len(summary.components)
    assert by_id["finding-1"]["code"]["text"] == "Medical material"
    assert by_id["finding-1"]["valueBoolean"] is summary.findings["Medical material"].present
    lesion = by_id["lesion-1"]
    assert lesion["code"]["coding"][0]["code"] == "786838002"
    volume = lesion["component"][0]["valueQuantity"]
    assert volume["value"] == summary.components[0].volume_ml and volume["code"] == "mL"
    assert tree["conclusion"] == f"{DISCLAIMER} One *nodule*."
    narrative = ElementTree.fromstring(tree["text"]["div"])
    assert "<b>nodule</b> & | more." in "".join(narrative.itertext())
    markdown = base64.b64decode(tree["presentedForm"][0]["data"]).decode()
    assert markdown == render_markdown("ct-0123456789ab", summary)


def test_the_diagnostic_report_names_neither_path_nor_patient(summary) -> None:
    tree = make_diagnostic_report("ct-0123456789ab", summary)
    assert "/secret/place" not in json.dumps(tree)
    assert tree["subject"] == {
        "identifier": {"system": "urn:rectvlm:case", "value": "ct-0123456789ab"}
    }
    assert "effectiveDateTime" not in tree


def test_the_diagnostic_report_is_valid_fhir(summary) -> None:
    resources = pytest.importorskip(
        "fhir.resources.R4B.diagnosticreport", reason="fhir.resources is not installed"
    )
    resources.DiagnosticReport.model_validate(make_diagnostic_report("ct-1", summary))


def test_the_markdown_report_has_both_tables_and_no_html(summary) -> None:
    text = render_markdown("<script>alert(1)</script>", summary)
    assert "<" not in text and DISCLAIMER in text
    assert "| Finding | Probability | Threshold | Call |" in text
    assert "| lung nodule 1 |" in text and "## Impression" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 18 + 2 + len(summary.components)
    assert {line.replace("\\|", "").count("|") for line in rows} == {5, 8}


def test_a_case_without_localizer_and_report_says_less() -> None:
    hu, _ = body(1)
    summary = make_summary(np.zeros(hu.shape, np.uint8), hu, AFFINE, report=None)
    assert "None." in render_markdown("ct", summary)
    assert make_diagnostic_report("ct", summary)["conclusion"] == DISCLAIMER
