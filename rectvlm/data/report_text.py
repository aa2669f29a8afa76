"""The text of a report: its two sections joined for the language model, and found in its output."""

import re

_HEADING_AT_LINE_START = re.compile(
    r"^[ \t*#]*(findings?|impressions?)[ \t*#]*:[ \t*]*", re.IGNORECASE | re.MULTILINE
)
_IMPRESSION_IN_LINE = re.compile(r"(?<=[.!?] )[*#]*(impressions?)[*#]*:[ *]*", re.IGNORECASE)


def join_report_sections(findings: str | None, impression: str | None) -> str | None:
    """Join sections as lines `Findings: …` and `Impression: …`; None without any text."""
    lines = []
    for title, text in (("Findings", findings), ("Impression", impression)):
        if text and text.strip():
            lines.append(f"{title}: {text.strip()}")
    return "\n".join(lines) or None


def split_report_sections(text: str) -> tuple[str | None, str | None]:
    """Split a report into findings and impression, None for a missing one.

    Undoes `join_report_sections`. Generated text may lack a heading or put it inside a line: the
    text before the first `Impression:` is the findings.
    """
    findings_heading = impression_heading = None
    for heading in _HEADING_AT_LINE_START.finditer(text):
        if heading[1].lower().startswith("impression"):
            impression_heading = impression_heading or heading
        else:
            findings_heading = findings_heading or heading
    impression_heading = impression_heading or _IMPRESSION_IN_LINE.search(text)

    findings, impression = text, ""
    if impression_heading is not None:
        findings = text[: impression_heading.start()]
        impression = text[impression_heading.end() :]
    if findings_heading is not None and findings_heading.end() <= len(findings):
        findings = findings[findings_heading.end() :]
    return findings.strip() or None, impression.strip() or None
