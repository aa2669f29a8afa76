"""A case as a FHIR DiagnosticReport, valid in R4 and R5.

It names no patient: the subject is the case's name, which is a pseudonym for DICOM. Whoever files
it sets the reference to the patient. Findings and lesions are contained Observations.
"""

import base64
from datetime import UTC, datetime
from html import escape
from typing import Any

from rectvlm.files import printable_text, remove_control_characters
from rectvlm.labels import LESION_BY_KEY
from rectvlm.lesion_places import describe_lobes
from rectvlm.predict.case_summary import CaseSummary, FindingSummary
from rectvlm.predict.lesion_codes import LESION_CODES, SnomedCode, site_code
from rectvlm.predict.lesion_table import LesionComponent
from rectvlm.predict.markdown_report import render_markdown
from rectvlm.types import JsonObject

_SNOMED, _LOINC = "http://snomed.info/sct", "http://loinc.org"
_UCUM = "http://unitsofmeasure.org"
_HL7 = "http://terminology.hl7.org/CodeSystem"


def make_diagnostic_report(name: str, summary: CaseSummary) -> JsonObject:
    """Make the DiagnosticReport of a case, which is preliminary and marked as research.

    Args:
        name: of the case.
        summary: of the case.
    """
    name = printable_text(name)
    observations = []
    for number, (finding, row) in enumerate(summary.findings.items(), start=1):
        observations.append(_observe_finding(f"finding-{number}", finding, row))
    for number, component in enumerate(summary.components or [], start=1):
        observations.append(_observe_lesion(f"lesion-{number}", component, summary.lobes_note))
    report = summary.report or {}
    conclusion = report.get("impression") or report.get("findings") or ""
    markdown = printable_text(render_markdown(name, summary))
    return {
        "resourceType": "DiagnosticReport",
        "meta": {"security": [_coding(f"{_HL7}/v3-ActReason", "HRESCH", "healthcare research")]},
        "language": "en",
        "text": {"status": "generated", "div": _render_div(name, summary)},
        "contained": observations,
        "status": "preliminary",
        "category": [{"coding": [_coding(f"{_HL7}/v2-0074", "RAD", "Radiology")]}],
        "code": {"coding": [_coding(_LOINC, "24627-2", "CT Chest")]},
        "subject": {"identifier": {"system": "urn:rectvlm:case", "value": name}},
        "issued": datetime.now(UTC).isoformat(timespec="seconds"),
        "performer": [{"display": f"rectvlm {summary.version}, {summary.config}"}],
        "result": [{"reference": f"#{observation['id']}"} for observation in observations],
        "conclusion": f"{summary.disclaimer} {remove_control_characters(conclusion)}".strip(),
        "presentedForm": [
            {
                "contentType": "text/markdown; charset=utf-8",
                "language": "en",
                "data": base64.b64encode(markdown.encode()).decode("ascii"),
                "title": "report.md",
            }
        ],
    }


def _observe_finding(identifier: str, finding: str, row: FindingSummary) -> JsonObject:
    return {
        "resourceType": "Observation",
        "id": identifier,
        "status": "preliminary",
        "category": _imaging_category(),
        "code": {"text": finding},
        "valueBoolean": row.present,
        "component": [
            _measure("probability", row.probability, "1"),
            _measure("threshold", row.threshold, "1"),
        ],
    }


def _observe_lesion(identifier: str, row: LesionComponent, lobes_note: str) -> JsonObject:
    lesion = LESION_BY_KEY[row.lesion]
    observation: JsonObject = {
        "resourceType": "Observation",
        "id": identifier,
        "status": "preliminary",
        "category": _imaging_category(),
        "code": {
            "coding": [_snomed_coding(LESION_CODES[row.lesion])],
            "text": f"{lesion.name} {row.number}",
        },
        "valueBoolean": True,
        "component": [
            _measure("volume", row.volume_ml, "mL"),
            _measure("longest axial diameter", row.longest_axial_diameter_mm, "mm"),
            _measure("mean attenuation", row.mean_hu, "[hnsf'U]"),
        ],
    }
    if row.place is not None:
        site: JsonObject = {"text": row.place}
        if row.plausible is not False:
            site["coding"] = [_snomed_coding(site_code(lesion))]
        observation["bodySite"] = site
    if row.approximate_lobes:
        words = f"Lobe, approximate: {describe_lobes(row.approximate_lobes)}. {lobes_note}"
        observation["note"] = [{"text": words}]
    return observation


def _imaging_category() -> list[JsonObject]:
    return [{"coding": [_coding(f"{_HL7}/observation-category", "imaging", "Imaging")]}]


def _measure(name: str, value: float, unit: str) -> JsonObject:
    quantity = {"value": value, "unit": unit, "system": _UCUM, "code": unit}
    return {"code": {"text": name}, "valueQuantity": quantity}


def _coding(system: str, code: str, display: str) -> dict[str, str]:
    return {"system": system, "code": code, "display": display}


def _snomed_coding(code: SnomedCode) -> dict[str, Any]:
    return _coding(_SNOMED, code.value, code.meaning)


def _render_div(name: str, summary: CaseSummary) -> str:
    """The narrative: disclaimer, called findings and report, as XHTML."""
    called = [finding for finding, row in summary.findings.items() if row.present]
    paragraphs = [f"Case {name}. {summary.disclaimer}", f"Called: {', '.join(called) or 'none'}."]
    paragraphs += [text for text in (summary.report or {}).values() if text]
    texts = [escape(remove_control_characters(text)) for text in paragraphs]
    body = "".join(f"<p>{text}</p>" for text in texts)
    return f'<div xmlns="http://www.w3.org/1999/xhtml">{body}</div>'
