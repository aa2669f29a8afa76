"""Groups of cases: all cases once, in order, as many together as reports are written at once."""

import pytest

from rectvlm.evaluate.case_groups import MAX_GROUP_CASES, plan_groups


@pytest.mark.parametrize("n_cases", [1, 2, 7, 128, 129, 300])
@pytest.mark.parametrize("batch_size", [1, 3, 40])
@pytest.mark.parametrize("report_share", [0.0, 0.5, 1.0])
def test_each_case_is_in_one_group(n_cases: int, batch_size: int, report_share: float) -> None:
    n_reports = round(report_share * n_cases)
    groups = plan_groups("evaluate", n_cases, batch_size, n_reports)
    case_ids = [case_id for group in groups for case_id in group.case_ids]
    assert case_ids == [("evaluate", position) for position in range(n_cases)]
    batches = [batch for group in groups for batch in group.batches]
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    limit = max(batch_size, MAX_GROUP_CASES)
    assert all(len(group.positions) <= limit for group in groups)


def list_sizes(n_cases: int, batch_size: int, n_reports: int) -> list[int]:
    groups = plan_groups("evaluate", n_cases, batch_size, n_reports)
    return [len(group.positions) for group in groups]


def test_processes_share_few_cases_and_many_make_full_groups() -> None:
    assert list_sizes(1, 1, 1) == [1] and list_sizes(2, 1, 2) == [1, 1]
    assert list_sizes(16, 1, 16) == [4] * 4
    assert set(list_sizes(3039, 1, 3039)[:-1]) == {MAX_GROUP_CASES}
    assert list_sizes(16, 2, 0) == [2] * 8


def test_processes_share_the_cases_with_reports_where_not_all_have_one() -> None:
    assert list_sizes(48, 16, 24) == [16] * 3
    assert list_sizes(96, 4, 48) == [12] * 4 + [4] * 12
