"""Which examples an epoch holds: whole passes, fractions, weights, sources that are used up."""

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_sft.data.batches import mixture
from tests import inputs

quickly = settings(max_examples=150, deadline=None, derandomize=True)


def sources_of(**options) -> dict:
    """{name: source} with `epochs=` or `weight=` as given in a dict."""
    return {name: inputs.source("x.jsonl", **changes) for name, changes in options.items()}


def ranges_of(**sizes: int) -> dict[str, range]:
    starts = np.cumsum([0, *sizes.values()]).tolist()
    return {
        name: range(start, start + size)
        for (name, size), start in zip(sizes.items(), starts, strict=False)
    }


def stream(size: int, count: int, epochs: int, shuffle=True, seed=0, name="a") -> list[list[int]]:
    """The examples of the first epochs of one source."""
    return [
        mixture.example_ids(
            {name: range(size)}, {name: count}, shuffle=shuffle, seed=seed, epoch=epoch
        ).tolist()
        for epoch in range(epochs)
    ]


# ---- how many ------------------------------------------------------------------------------------


def test_by_default_every_example_comes_once():
    sizes = {"a": 5, "b": 1, "c": 12}
    assert mixture.counts(sizes, sources_of(a={}, b={}, c={})) == sizes
    assert mixture.counts(sizes, None) == sizes


@pytest.mark.parametrize(
    ("epochs", "size", "count"),
    [(2, 7, 14), (0.5, 10, 5), (2.5, 4, 10), (0.3, 10, 3), (1.1, 10, 11), (0.34, 50, 17)],
)
def test_epochs_are_counted_in_the_decimals_of_the_config(epochs, size, count):
    # In binary, 0.3 x 10 and 1.1 x 10 are not 3 and 11.
    assert mixture.counts({"a": size}, sources_of(a={"epochs": epochs})) == {"a": count}


@pytest.mark.parametrize(
    ("sizes", "weights", "counts"),
    [
        ((100, 100), (1, 1), (100, 100)),
        ((100, 100), (3, 1), (100, 33)),
        ((10, 1000), (0.1, 0.3), (10, 30)),  # in binary, 0.3 / 0.1 is below 3
        ((1000, 10), (1, 2), (5, 10)),
        ((7, 9, 100), (2, 3, 5), (6, 9, 15)),
    ],
)
def test_with_weights_the_epoch_ends_where_the_first_source_is_used_up(sizes, weights, counts):
    names = "abc"[: len(sizes)]
    sources = sources_of(**{n: {"weight": w} for n, w in zip(names, weights, strict=True)})
    found = mixture.counts(dict(zip(names, sizes, strict=True)), sources)
    assert tuple(found.values()) == counts


@quickly
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 9)), min_size=1, max_size=5))
def test_no_longer_epoch_would_keep_the_shares_without_repeating(problem):
    sizes = {f"s{n}": size for n, (size, _) in enumerate(problem)}
    weights = {f"s{n}": weight for n, (_, weight) in enumerate(problem)}
    wanted = {
        name: min(weights[name] * sizes[other] // weights[other] for other in sizes)
        for name in sizes
    }
    sources = sources_of(**{name: {"weight": weight} for name, weight in weights.items()})
    if not all(wanted.values()):
        with pytest.raises(ValueError, match="gives none of them"):
            mixture.counts(sizes, sources)
        return
    found = mixture.counts(sizes, sources)
    assert found == wanted
    assert any(found[name] == sizes[name] for name in sizes)
    assert all(found[name] <= sizes[name] for name in sizes)


def test_a_source_that_would_give_nothing_is_named():
    with pytest.raises(ValueError, match=r"data\.train\.b has 3 examples.*raise its epochs"):
        mixture.counts({"a": 9, "b": 3}, sources_of(a={}, b={"epochs": 0.1}))
    with pytest.raises(ValueError, match=r"data\.train\.b has 300 examples.*raise its weight"):
        mixture.counts({"a": 9, "b": 300}, sources_of(a={"weight": 1}, b={"weight": 0.1}))
    with pytest.raises(ValueError, match=r"data\.train\.b has 0 examples"):
        mixture.counts({"a": 9, "b": 0}, sources_of(a={}, b={}))


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"a": {"weight": 2}, "b": {}}, ["(a)", "data.train.b.weight"]),
        (
            {"a": {"weight": 2.0, "epochs": 3.0}},
            ["data.train.a.weight = 2.0", "data.train.a.epochs = 3.0", "contradict"],
        ),
        ({"a": {"weight": -1.0}}, ["data.train.a.weight = -1.0"]),
        ({"a": {"weight": float("nan")}}, ["data.train.a.weight = nan"]),
        ({"a": {"epochs": 0.0}}, ["data.train.a.epochs = 0.0"]),
        ({"a": {"epochs": float("inf")}}, ["data.train.a.epochs = inf"]),
    ],
)
def test_what_contradicts_itself_is_refused_by_its_key(options, parts):
    sources = sources_of(**options)
    (problem,) = mixture.problems(sources)
    assert all(part in problem for part in parts)
    with pytest.raises(ValueError) as error:
        mixture.counts(dict.fromkeys(options, 10), sources)
    assert problem in str(error.value)


def test_what_is_allowed_has_no_problem():
    assert mixture.problems(sources_of(a={"epochs": 0.25}, b={}, c={"epochs": 3})) == []
    assert mixture.problems(sources_of(a={"weight": 0.25}, b={"weight": 3})) == []
    assert mixture.problems({}) == []


# ---- which ---------------------------------------------------------------------------------------


def test_without_shuffling_the_files_are_read_on_from_epoch_to_epoch():
    assert stream(5, 3, 4, shuffle=False) == [[0, 1, 2], [3, 4, 0], [1, 2, 3], [4, 0, 1]]
    assert stream(3, 7, 2, shuffle=False) == [[0, 1, 2, 0, 1, 2, 0], [1, 2, 0, 1, 2, 0, 1]]
    found = mixture.example_ids(
        ranges_of(b=2, a=3), {"b": 4, "a": 2}, shuffle=False, seed=0, epoch=1
    )
    assert found.tolist() == [0, 1, 0, 1, 4, 2]  # source after source, not by name


def test_without_shuffling_the_stream_is_the_file_over_and_over():
    for size in range(1, 9):
        for count in range(1, 20):
            found = sum(stream(size, count, 6, shuffle=False), [])
            assert found == [place % size for place in range(6 * count)]


@quickly
@given(st.integers(1, 30), st.integers(1, 70), st.integers(0, 2**40))
def test_every_pass_holds_every_example_once(size, count, seed):
    found = sum(stream(size, count, 6, seed=seed), [])
    for start in range(0, len(found) - size + 1, size):
        assert sorted(found[start : start + size]) == list(range(size))


@quickly
@given(st.integers(1, 30), st.integers(1, 70), st.integers(0, 2**40))
def test_within_an_epoch_uses_of_two_examples_differ_by_one_at_most(size, count, seed):
    for ids in stream(size, count, 6, seed=seed):
        uses = Counter(ids)
        assert set(uses.values()) <= {count // size, -(-count // size)}
        assert len(ids) == count


def test_what_an_epoch_leaves_out_comes_first_in_the_next():
    first, second, third = stream(10, 6, 3)
    assert set(second[:4]) == set(range(10)) - set(first)
    assert set(second[4:]).isdisjoint(second[:4] + third) and len(set(third)) == 6


def test_a_source_that_is_used_up_starts_over_in_a_new_order():
    passes = stream(50, 50, 3)
    assert len({tuple(one) for one in passes}) == 3
    assert all(one != sorted(one) for one in passes)


def test_orders_follow_from_seed_and_name_and_not_from_the_other_sources():
    def of(name, seed):
        return tuple(stream(50, 50, 1, seed=seed, name=name)[0])

    assert len({of("a", 0), of("a", 1), of("b", 0), of("b", 1)}) == 4
    both = mixture.example_ids(
        ranges_of(b=7, a=50), {"b": 7, "a": 50}, shuffle=True, seed=0, epoch=0
    )
    assert tuple(both[7:] - 7) == of("a", 0)


def test_the_order_is_the_same_in_every_process():
    # Python's hash of a string is not.
    code = (
        "from jax_sft.data.batches import mixture; print(mixture.example_ids("
        "{'mathematik': range(9)}, {'mathematik': 5}, shuffle=True, seed=3, epoch=2).tolist())"
    )
    found = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert found[0] == found[1] == f"{stream(9, 5, 3, seed=3, name='mathematik')[2]}\n"


@pytest.mark.parametrize(
    ("counts", "same"),
    [({"a": 4, "b": 6}, True), ({"a": 8, "b": 3}, True), ({"a": 4, "b": 4}, False)],
)
def test_epochs_are_the_same_only_in_whole_passes(counts, same):
    ranges = ranges_of(a=4, b=3)
    assert mixture.same_every_epoch(ranges, counts) == same
    epochs = [
        sorted(mixture.example_ids(ranges, counts, shuffle=True, seed=0, epoch=epoch).tolist())
        for epoch in range(3)
    ]
    assert (epochs[0] == epochs[1] == epochs[2]) == same


def test_no_sources_have_no_examples():
    found = mixture.example_ids({}, {}, shuffle=True, seed=0, epoch=3)
    assert found.dtype == np.int64 and len(found) == 0
