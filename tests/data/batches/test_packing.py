"""The packing plan and the balanced order of rows, against brute force and hand-made rows."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_sft.data.batches import packing

quickly = settings(max_examples=100, deadline=None, derandomize=True)


@st.composite
def problems(draw) -> dict:
    """Keyword arguments of `packing.plan`; ids may be missing, out of order or repeated."""
    seq_len = draw(st.integers(1, 40))
    lengths = draw(st.lists(st.integers(1, seq_len), min_size=1, max_size=40))
    all_once = st.just(range(len(lengths)))
    ids = draw(st.one_of(all_once, st.lists(st.integers(0, len(lengths) - 1), max_size=60)))
    return {
        "lengths": np.array(lengths, np.int64),
        "ids": np.array(ids, np.int64),
        "seq_len": seq_len,
        "packing": draw(st.sampled_from(["best_fit", "best_fit", "none"])),
        "max_segments": draw(st.integers(1, 6)),
        "shuffle": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**40)),
        "epoch": draw(st.integers(0, 1000)),
    }


def rows_of(plan: packing.PackPlan) -> list[list[int]]:
    return [plan.row(index).tolist() for index in range(len(plan))]


# ---- the plan ------------------------------------------------------------------------------------


@quickly
@given(problems())
def test_every_id_is_placed_as_often_as_it_is_given(problem):
    rows = rows_of(packing.plan(**problem))
    assert Counter(sum(rows, [])) == Counter(problem["ids"].tolist())
    assert all(rows)


@quickly
@given(problems())
def test_no_row_is_over_seq_len_or_max_segments(problem):
    plan, lengths = packing.plan(**problem), problem["lengths"]
    most = 1 if problem["packing"] == "none" else problem["max_segments"]
    for row in rows_of(plan):
        assert lengths[row].sum() <= problem["seq_len"]
        assert len(row) <= most


def best_fit_decreasing(lengths: list[int], seq_len: int) -> int:
    """The number of rows, by the definition: one example at a time, all rows compared."""
    used: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [row for row, tokens in enumerate(used) if tokens + length <= seq_len]
        if fits:
            used[max(fits, key=used.__getitem__)] += length
        else:
            used.append(length)
    return len(used)


@quickly
@given(
    st.integers(50, 400), st.floats(0.1, 2.0), st.integers(1, 30), st.integers(0, 2**32), st.data()
)
def test_lengths_of_any_spread_fit(seq_len, spread, most, seed, data):
    typical = data.draw(st.integers(1, seq_len))
    lengths = np.random.default_rng(seed).lognormal(np.log(typical), spread, 200)
    lengths = np.sort(lengths.clip(1, seq_len).astype(np.int64))[::-1]
    rows = packing.pack(lengths, seq_len, most)
    assert np.bincount(rows, weights=lengths).max() <= seq_len
    assert 0 < np.bincount(rows).min() <= np.bincount(rows).max() <= most


@quickly
@given(problems())
def test_no_more_rows_than_best_fit_decreasing_makes(problem):
    problem |= {"packing": "best_fit", "max_segments": 100}
    wanted = best_fit_decreasing(problem["lengths"][problem["ids"]].tolist(), problem["seq_len"])
    assert len(packing.plan(**problem)) <= wanted


def test_the_better_of_two_rules_is_taken():
    longest_first = np.array([10, 9, 7, 7, 5])  # exact ends: 10 + 7, 9 + 7, 5
    assert packing.pack(longest_first, 20, 9).tolist() == [0, 0, 1, 1, 1]
    longest_first = np.array([11, 10, 6, 5, 4, 4])  # best-fit decreasing: 11 + 6, 10 + 5 + 4, 4
    rows = packing.pack(longest_first, 20, 9)
    assert np.bincount(rows, weights=longest_first).tolist() == [20, 20]


@quickly
@given(problems())
def test_no_two_rows_that_may_take_more_examples_would_fit_into_one(problem):
    problem |= {"packing": "best_fit"}
    plan, lengths = packing.plan(**problem), problem["lengths"]
    free = [row for row in rows_of(plan) if len(row) < problem["max_segments"]]
    used = sorted(lengths[row].sum() for row in free)
    assert len(used) < 2 or used[0] + used[1] > problem["seq_len"]


@quickly
@given(problems(), st.integers(0, 1000), st.integers(0, 1000))
def test_the_number_of_rows_depends_on_lengths_alone(problem, seed, epoch):
    other = problem | {"seed": seed, "epoch": epoch, "shuffle": not problem["shuffle"]}
    reverse = other | {"ids": problem["ids"][::-1]}
    num_rows = len(packing.plan(**problem))
    assert num_rows == len(packing.plan(**other)) == len(packing.plan(**reverse))


@quickly
@given(problems())
def test_without_shuffling_rows_come_in_the_order_of_their_first_example(problem):
    num = len(problem["lengths"])
    problem |= {"shuffle": False, "ids": np.arange(num)[::-1]}
    plan = packing.plan(**problem)
    places = [[num - 1 - example for example in row] for row in rows_of(plan)]
    assert [row[0] for row in places] == sorted(row[0] for row in places)
    assert all(row == sorted(row) for row in places)
    later = packing.plan(**problem | {"seed": 1, "epoch": 9})
    assert plan.example_ids.tolist() == later.example_ids.tolist()


@quickly
@given(problems())
def test_none_puts_one_example_in_a_row(problem):
    plan = packing.plan(**problem | {"packing": "none", "shuffle": False})
    assert rows_of(plan) == [[example] for example in problem["ids"].tolist()]


@quickly
@given(problems())
def test_sums_add_up_each_row(problem):
    plan = packing.plan(**problem)
    values = problem["lengths"] ** 2
    assert plan.sums(values).tolist() == [values[row].sum() for row in rows_of(plan)]


def plan_of(lengths, **changes):
    options = {"seq_len": 64, "packing": "best_fit", "max_segments": 8, "shuffle": True}
    options |= {"ids": np.arange(len(lengths)), "seed": 0, "epoch": 0}
    return packing.plan(np.asarray(lengths), **options | changes)


@pytest.mark.parametrize("method", ["best_fit", "none"])
def test_the_order_is_a_function_of_seed_and_epoch(method):
    lengths = np.random.default_rng(0).integers(1, 64, 200)
    orders = {
        (seed, epoch): plan_of(lengths, seed=seed, epoch=epoch, packing=method)
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    for (seed, epoch), plan in orders.items():
        again = plan_of(lengths, seed=seed, epoch=epoch, packing=method)
        np.testing.assert_array_equal(plan.example_ids, again.example_ids)
        np.testing.assert_array_equal(plan.row_starts, again.row_starts)
    assert len({plan.example_ids.tobytes() for plan in orders.values()}) == 4


def test_epochs_pair_different_examples():
    pairs = []
    for epoch in (0, 1):
        plan = plan_of(np.full(64, 32), epoch=epoch)
        pairs.append({tuple(sorted(row)) for row in rows_of(plan)})
    assert len(pairs[0]) == len(pairs[1]) == 32
    assert len(pairs[0] & pairs[1]) < 8


def test_long_and_short_rows_are_mixed_by_shuffling():
    # Best-fit decreasing opens the rows of long examples first: unshuffled rows would train the
    # long examples early.
    lengths = np.repeat([60, 5], [25, 100])
    plan = plan_of(lengths, max_segments=4)
    is_long = [lengths[row].max() == 60 for row in rows_of(plan)]
    assert len(is_long) == 50 and sum(is_long) == 25
    assert 6 < sum(is_long[:25]) < 19


def test_an_example_as_long_as_a_row_fills_it():
    assert rows_of(plan_of([64, 1, 64, 63], shuffle=False)) == [[0], [1, 3], [2]]


def test_the_tightest_row_is_taken():
    # 14 fits both rows, the second exactly.
    assert rows_of(plan_of([40, 50, 14], shuffle=False)) == [[0], [1, 2]]


def test_an_example_that_is_there_twice_may_share_a_row_with_itself():
    plan = plan_of([30, 50], ids=np.array([0, 1, 0]), shuffle=False)
    assert rows_of(plan) == [[0, 0], [1]]


def test_nothing_to_pack_is_a_plan_without_rows():
    for method in ("best_fit", "none"):
        plan = plan_of([5, 6], ids=np.zeros(0, np.int64), packing=method)
        assert len(plan) == 0 and len(plan.sums(np.array([5, 6]))) == 0


@pytest.mark.parametrize("seq_len", [2048, 4096])
@pytest.mark.parametrize("spread", [0.35, 0.8, 1.2])  # 0.35 is that of GSM8K
def test_rows_are_at_least_99_5_percent_full(seq_len, spread):
    lengths = np.random.default_rng(0).lognormal(5.2, spread, 7000).astype(np.int64)
    lengths = lengths.clip(1, seq_len)
    plan = plan_of(lengths, seq_len=seq_len, max_segments=256)
    assert lengths.sum() >= 0.995 * seq_len * len(plan)


# ---- equal work for all ranks --------------------------------------------------------------------


works = st.lists(st.integers(0, 10**7), min_size=1, max_size=48)


@quickly
@given(works, st.integers(1, 5))
def test_balance_keeps_every_row_and_groups_rows_of_similar_work(work, num_micro):
    work = np.array((work * num_micro)[: len(work) * num_micro])
    micro_rows = len(work) // num_micro
    order = packing.balance(work, micro_rows)
    assert sorted(order.tolist()) == list(range(len(work)))
    micro = work[order].reshape(num_micro, micro_rows)
    assert all((a.min() >= b.max()) for a, b in zip(micro, micro[1:], strict=False))


def test_ties_are_broken_by_the_order_of_the_rows():
    assert packing.balance(np.full(6, 7), 2).tolist() == [0, 1, 2, 3, 4, 5]
    assert packing.balance(np.array([3, 3, 9, 3, 3, 9]), 3).tolist() == [2, 5, 0, 1, 3, 4]
    assert packing.balance(np.zeros(4, np.int64), 4).tolist() == [0, 2, 1, 3]


def test_hand_made_rows_are_split_evenly_at_every_level():
    #                0  1  2  3  4  5  6  7
    work = np.array([8, 1, 7, 2, 6, 3, 5, 4])
    order = packing.balance(work, 8)
    ordered = work[order]
    for num_ranks in (1, 2, 4):
        assert packing.imbalance(ordered, num_ranks) == 1.0, ordered
    assert packing.imbalance(ordered, 8) == 8 / 4.5  # one row each: nothing to choose


def test_imbalance_is_the_highest_over_the_mean():
    assert packing.imbalance(np.array([1, 2, 3, 6]), 2) == 9 / 6
    assert packing.imbalance(np.array([1, 2, 3, 6]), 1) == 1.0
    assert packing.imbalance(np.zeros(4), 2) == 1.0
    # Ranks wait for each other after every micro-batch: 3 + 6 of 12, though both have 6 in all.
    assert packing.imbalance(np.array([[3, 1], [0, 6]]), 2) == 9 / 5


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 6, 8, 16, 32])
def test_ranks_get_nearly_equal_work_whatever_their_number(num_ranks):
    rng = np.random.default_rng(0)
    before, after = [], []
    for _ in range(10):
        work = rng.lognormal(12, 0.6, 96 * 4).astype(np.int64)
        before.append(packing.imbalance(work.reshape(4, 96), num_ranks))
        ordered = work[packing.balance(work, 96)]
        after.append(packing.imbalance(ordered.reshape(4, 96), num_ranks))
    assert np.mean(after) < 1 + 0.2 * (np.mean(before) - 1)


def test_rows_of_an_unfinished_batch_are_shared_by_all_ranks():
    work = np.array([5, 5, 5, 5, 5, 5, 5, 5, 0, 0, 0, 0, 0, 0, 0, 0])
    ordered = work[packing.balance(work, 16)]
    assert [packing.imbalance(ordered, num_ranks) for num_ranks in (2, 4, 8)] == [1.0] * 3
