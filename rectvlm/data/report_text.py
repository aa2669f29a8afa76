"""A report as text: its two sections joined for the language model, and found again in what one has written."""

import re
from itertools import islice

_HEADING_AT_LINE_START = re.compile(
    r"^[ \t*#]*(findings?|impressions?)[ \t*#]*:[ \t*]*", re.IGNORECASE | re.MULTILINE
)
_IMPRESSION_IN_LINE = re.compile(r"(?<=[.!?] )[*#]*(impressions?)[*#]*:[ *]*", re.IGNORECASE)


def join_report_sections(findings: str | None, impression: str | None) -> str | None:
    """Both sections as one text, `Findings: …` and `Impression: …` on lines of their own; None without either."""
    sections = [("Findings", findings), ("Impression", impression)]
    return (
        "\n".join(f"{title}: {text.strip()}" for title, text in sections if text and text.strip())
        or None
    )


def split_report_sections(text: str) -> tuple[str | None, str | None]:
    """Findings and impression of a report text, whichever of them are there.

    Undoes `report_text`. Generated text may lack a heading or put it inside a line: what stands before the first
    `Impression:` is the findings.
    """
    heads = list(_HEADING_AT_LINE_START.finditer(text))
    if not any(head[1].lower().startswith("impression") for head in heads):
        heads += islice(_IMPRESSION_IN_LINE.finditer(text), 1)
    cut = next((head for head in heads if head[1].lower().startswith("impression")), None)
    before, impression = (text, "") if cut is None else (text[: cut.start()], text[cut.end() :])
    first = next((head for head in heads if head[1].lower().startswith("finding")), None)
    if first is not None and first.end() <= len(before):
        before = before[first.end() :]
    return before.strip() or None, impression.strip() or None
