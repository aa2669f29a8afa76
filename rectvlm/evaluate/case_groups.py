"""Groups of cases: what a process takes at once, and what is lost when it is killed.

The reports of a group are written together, which takes a language model little longer than one
report. The groups are the same on any number of processes, since the numbers depend on them.
"""

import itertools
import math
from dataclasses import dataclass

from rectvlm.evaluate.case_records import CasePurpose

MAX_GROUP_CASES = 64
"""Cases of a group at most: with the reports of its control, 128 reports."""
MIN_GROUPS = 4
"""Groups with reports at least, where the batches suffice: processes share few cases too."""


@dataclass(frozen=True)
class CaseGroup:
    """Cases of one purpose whose reports are written together."""

    purpose: CasePurpose
    batches: list[list[int]]
    """Numbers in the split of the cases that are predicted together."""

    @property
    def positions(self) -> list[int]:
        """Numbers of the cases in their split."""
        return list(itertools.chain.from_iterable(self.batches))

    @property
    def case_ids(self) -> list[tuple[CasePurpose, int]]:
        """Cases of the group as the journal names them."""
        return [(self.purpose, position) for position in self.positions]


def plan_groups(
    purpose: CasePurpose, n_cases: int, batch_size: int, n_reports: int
) -> list[CaseGroup]:
    """Put the first cases of a split into groups.

    Args:
        purpose: purpose of the cases.
        n_cases: number of cases.
        batch_size: number of cases that are predicted together.
        n_reports: number of first cases whose reports are written; a group of others is a batch.
    """
    starts = range(0, n_cases, batch_size)
    batches = [list(range(start, min(start + batch_size, n_cases))) for start in starts]
    n_report_batches = math.ceil(n_reports / batch_size)
    group_size = min(MAX_GROUP_CASES // batch_size, math.ceil(n_report_batches / MIN_GROUPS))
    size = max(1, group_size)
    groups = [
        CaseGroup(purpose, batches[first : min(first + size, n_report_batches)])
        for first in range(0, n_report_batches, size)
    ]
    return groups + [CaseGroup(purpose, [batch]) for batch in batches[n_report_batches:]]
