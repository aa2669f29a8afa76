"""The order of training samples: each once an epoch, on any number of ranks, from any point on."""

from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rectvlm.data.order import TrainOrder, repeat_rare_lesions


def global_order(
    samples: int, micro_batch: int, world: int, seed: int, seen: int, count: int
) -> list[int]:
    """The first `count` samples after `seen`, of all ranks together in their order."""
    steps = -(-count // (micro_batch * world))
    ranks = []
    for rank in range(world):
        ranks.append(
            islice(TrainOrder(range(samples), micro_batch, rank, world, seed, seen), steps)
        )
    numbers: list[int] = []
    for micro_batches in zip(*ranks, strict=True):
        for micro_batch_numbers in micro_batches:
            numbers += micro_batch_numbers
    return numbers[:count]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_an_epoch_holds_each_sample_once(world: int, micro_batch: int) -> None:
    order = global_order(7, micro_batch, world, seed=3, seen=0, count=3 * 7)
    epochs = [order[k : k + 7] for k in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert order != global_order(7, micro_batch, world, seed=4, seen=0, count=3 * 7)


@settings(max_examples=60, deadline=None)
@given(
    samples=st.integers(1, 20),
    seed=st.integers(0, 2**31),
    seen=st.integers(0, 60),
    before=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    after=st.tuples(st.integers(1, 4), st.integers(1, 3)),
)
def test_resume_goes_on_exactly_on_another_number_of_ranks(
    samples: int, seed: int, seen: int, before: tuple[int, int], after: tuple[int, int]
) -> None:
    unbroken = global_order(samples, before[1], before[0], seed, seen=0, count=seen + 30)
    resumed = global_order(samples, after[1], after[0], seed, seen=seen, count=30)
    assert resumed == unbroken[seen:]


def test_a_case_stands_as_often_as_its_rarest_outlined_lesion_asks() -> None:
    outlined: list[tuple[str, ...]] = [()] * 80
    outlined += [("lung_nodule",)] * 16
    outlined += [("lung_nodule", "consolidation")] * 4
    # √(0.16 / 0.04) = 2; nodules are outlined in 0.20 of the cases, which is not rare.
    assert repeat_rare_lesions(outlined, 0.16) == sorted([*range(100), *range(96, 100)])
    assert repeat_rare_lesions(outlined, 0.0) == list(range(100))


def test_fractions_of_repeats_add_up_from_case_to_case() -> None:
    outlined: list[tuple[str, ...]] = [("consolidation",)] * 40 + [()] * 60
    # √(0.9 / 0.4) = 1.5 of each.
    numbers = repeat_rare_lesions(outlined, 0.9)
    assert len(numbers) == 40 * 1.5 + 60
    assert set(numbers) == set(range(100)) and numbers.count(0) + numbers.count(1) == 3


def test_an_epoch_with_repeats_holds_each_number_as_often_as_it_stands() -> None:
    numbers = [0, 1, 1, 2, 5]
    order = islice(TrainOrder(numbers, 1, 0, 1, seed=3), 10)
    drawn = [number for micro_batch in order for number in micro_batch]
    assert sorted(drawn[:5]) == sorted(drawn[5:]) == numbers


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=20),
    seen=st.integers(0, 40),
    cut=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
)
def test_sorting_by_length_changes_no_global_batch(
    lengths: list[int], seen: int, cut: tuple[int, int, int]
) -> None:
    world, micro_batch, accumulation = cut

    def take_global_batches(sorted_by: list[int] | None) -> list[list[list[list[int]]]]:
        """For each of three global batches, each round's micro-batches of all ranks."""
        orders = []
        for rank in range(world):
            order = TrainOrder(
                range(len(lengths)), micro_batch, rank, world, 5, seen, accumulation, sorted_by
            )
            orders.append(islice(order, 3 * accumulation))
        rounds = [list(micro_batches) for micro_batches in zip(*orders, strict=True)]
        return [rounds[i : i + accumulation] for i in range(0, len(rounds), accumulation)]

    plain, bucketed = take_global_batches(None), take_global_batches(lengths)
    for plain_rounds, bucketed_rounds in zip(plain, bucketed, strict=True):
        plain_numbers = [n for ranks in plain_rounds for numbers in ranks for n in numbers]
        numbers = [n for ranks in bucketed_rounds for numbers in ranks for n in numbers]
        assert sorted(numbers) == sorted(plain_numbers)
        # Round by round, and within a round rank by rank, reports get longer.
        batch_lengths = [lengths[number] for number in numbers]
        assert batch_lengths == sorted(batch_lengths)
    longest = [
        sum(max(lengths[n] for numbers in ranks for n in numbers) for ranks in rounds)
        for batches in (plain, bucketed)
        for rounds in batches
    ]
    assert all(longest[3 + i] <= longest[i] for i in range(3))
