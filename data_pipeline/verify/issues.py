"""Faults and notes that verification records.

A fault is something that a reader of the shards would fail on or learn wrongly from. A note is
something worth a look, such as a lesion outlined in a case whose report denies it.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class VerificationIssue:
    """One fault or note."""

    file_name: str
    """File in the folder of shards."""
    sample_key: str | None
    """Key of the sample; None for an issue of the file."""
    expected: str
    found: str

    def __str__(self) -> str:
        """The issue in one line."""
        place = self.file_name
        if self.sample_key is not None:
            place += f", sample {self.sample_key}"
        return " ".join(f"{place}: expected {self.expected}, found {self.found}".split())


@dataclass
class VerificationIssues:
    """All faults and notes so far."""

    faults: list[VerificationIssue] = field(default_factory=list)
    notes: list[VerificationIssue] = field(default_factory=list)

    def extend(self, issues: "VerificationIssues") -> None:
        """Add the issues of another check."""
        self.faults += issues.faults
        self.notes += issues.notes


@dataclass
class IssueRecorder:
    """Records the issues of one file or sample."""

    issues: VerificationIssues
    file_name: str
    sample_key: str | None = None

    def record_fault(self, expected: str, found: object) -> None:
        """Record a fault."""
        self.issues.faults.append(self._make_issue(expected, found))

    def expect_or_fault(self, holds: bool, expected: str, found: object) -> bool:
        """Record a fault unless `holds`, which is returned."""
        if not holds:
            self.record_fault(expected, found)
        return holds

    def expect_or_note(self, holds: bool, expected: str, found: object) -> bool:
        """Record a note unless `holds`, which is returned."""
        if not holds:
            self.issues.notes.append(self._make_issue(expected, found))
        return holds

    def _make_issue(self, expected: str, found: object) -> VerificationIssue:
        return VerificationIssue(self.file_name, self.sample_key, expected, str(found))
