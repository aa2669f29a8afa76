"""Groups of cases: all cases once, in order, as many together as reports are written at once."""

import pytest

from rectvlm.evaluate.case_groups import MAX_GROUP_CASES, plan_groups


@pytest.mark.parametrize("n_cases", [1, 2, 7, 128, 129, 300])
@pytest.mark.parametrize("batch_size", [1, 3, 40])
@pytest.mark.parametrize("has_reports", [True, False])
def test_each_case_is_in_one_group(n_cases: int, batch_size: int, has_reports: bool) -> None:
    groups = plan_groups("evaluate", n_cases, batch_size, has_reports)
    case_ids = [case_id for group in groups for case_id in group.case_ids]
    assert case_ids == [("evaluate", position) for position in range(n_cases)]
    batches = [batch for group in groups for batch in group.batches]
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    limit = max(batch_size, MAX_GROUP_CASES)
    assert all(len(group.positions) <= limit for group in groups)


def test_two_processes_share_few_cases_and_many_make_full_groups() -> None:
    sizes = {}
    for n_cases in (1, 2, 16, 3039):
        groups = plan_groups("evaluate", n_cases, 1, has_reports=True)
        sizes[n_cases] = [len(group.positions) for group in groups]
    assert sizes[1] == [1] and sizes[2] == [1, 1] and sizes[16] == [8, 8]
    assert set(sizes[3039][:-1]) == {MAX_GROUP_CASES}
    without = plan_groups("fit", 16, 2, has_reports=False)
    assert [len(group.positions) for group in without] == [2] * 8
