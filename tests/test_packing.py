"""The packing plan and the loader: every example once, any row anywhere, the same on every mesh."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_sft import config, parallel
from jax_sft.data import packing
from jax_sft.data.loader import FIELDS, Loader, build_row
from jax_sft.data.prepare import Examples

MESHES = [(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 2, 4), (2, 2, 2, 1), (1, 2, 2, 2)]


@st.composite
def problems(draw) -> dict:
    """Keyword arguments of `packing.plan`."""
    seq_len = draw(st.integers(1, 40))
    lengths = draw(st.lists(st.integers(1, seq_len), min_size=1, max_size=40))
    return {
        "lengths": np.array(lengths, np.int64),
        "seq_len": seq_len,
        "packing": draw(st.sampled_from(["best_fit", "best_fit", "none"])),
        "max_segments": draw(st.integers(1, 6)),
        "shuffle": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**40)),
        "epoch": draw(st.integers(0, 1000)),
    }


quickly = settings(max_examples=100, deadline=None, derandomize=True)


# ---- the plan ----------------------------------------------------------------------------------


@quickly
@given(problems())
def test_every_example_is_in_exactly_one_row(problem):
    plan = packing.plan(**problem)
    rows = [plan.row(index).tolist() for index in range(len(plan))]
    assert sorted(sum(rows, [])) == list(range(len(problem["lengths"])))
    assert all(rows)


@quickly
@given(problems())
def test_no_row_is_over_seq_len_or_max_segments(problem):
    plan, lengths = packing.plan(**problem), problem["lengths"]
    most = 1 if problem["packing"] == "none" else problem["max_segments"]
    for index in range(len(plan)):
        assert lengths[plan.row(index)].sum() <= problem["seq_len"]
        assert len(plan.row(index)) <= most


@quickly
@given(problems())
def test_no_two_rows_would_fit_into_one(problem):
    problem |= {"packing": "best_fit", "max_segments": len(problem["lengths"])}
    plan = packing.plan(**problem)
    used = sorted(problem["lengths"][plan.row(index)].sum() for index in range(len(plan)))
    assert len(used) < 2 or used[0] + used[1] > problem["seq_len"]


@quickly
@given(problems(), st.integers(0, 1000), st.integers(0, 1000))
def test_the_number_of_rows_depends_on_lengths_alone(problem, seed, epoch):
    other = problem | {"seed": seed, "epoch": epoch, "shuffle": not problem["shuffle"]}
    reverse = other | {"lengths": problem["lengths"][::-1]}
    num_rows = len(packing.plan(**problem))
    assert num_rows == len(packing.plan(**other)) == len(packing.plan(**reverse))


@quickly
@given(problems())
def test_without_shuffling_rows_come_in_the_order_of_their_first_example(problem):
    plan = packing.plan(**problem | {"shuffle": False})
    rows = [plan.row(index).tolist() for index in range(len(plan))]
    assert [min(row) for row in rows] == sorted(min(row) for row in rows)
    assert all(row == sorted(row) for row in rows)
    later = packing.plan(**problem | {"shuffle": False, "seed": 1, "epoch": 9})
    assert plan.example_ids.tolist() == later.example_ids.tolist()


@quickly
@given(problems())
def test_none_puts_one_example_in_a_row(problem):
    plan = packing.plan(**problem | {"packing": "none", "shuffle": False})
    assert plan.example_ids.tolist() == list(range(len(problem["lengths"])))
    assert np.diff(plan.row_starts).tolist() == [1] * len(problem["lengths"])


def plan_of(lengths, **changes):
    options = {"seq_len": 64, "packing": "best_fit", "max_segments": 8, "shuffle": True}
    return packing.plan(np.asarray(lengths), **options | {"seed": 0, "epoch": 0} | changes)


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
    lengths = np.full(64, 32)
    pairs = []
    for epoch in (0, 1):
        plan = plan_of(lengths, epoch=epoch)
        pairs.append({tuple(sorted(plan.row(index).tolist())) for index in range(len(plan))})
    assert len(pairs[0]) == len(pairs[1]) == 32
    assert len(pairs[0] & pairs[1]) < 8


def test_long_and_short_rows_are_mixed_by_shuffling():
    # Best-fit decreasing opens the rows of long examples first: unshuffled rows would train the
    # long examples early.
    lengths = np.repeat([60, 5], [25, 100])
    plan = plan_of(lengths, max_segments=4)
    is_long = [lengths[plan.row(index)].max() == 60 for index in range(len(plan))]
    assert len(is_long) == 50 and sum(is_long) == 25
    assert 6 < sum(is_long[:25]) < 19


def test_an_example_as_long_as_a_row_fills_it():
    plan = plan_of([64, 1, 64, 63], shuffle=False)
    assert [plan.row(index).tolist() for index in range(len(plan))] == [[0], [1, 3], [2]]


def test_the_tightest_row_is_taken():
    plan = plan_of([40, 50, 14], shuffle=False)  # 14 fits both rows, the second exactly
    assert [plan.row(index).tolist() for index in range(len(plan))] == [[0], [1, 2]]


# ---- rows and batches ----------------------------------------------------------------------------


def make_examples(num: int = 45, longest: int = 24, seed: int = 0) -> Examples:
    """Examples whose every token names the example and the place in it."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest, num)
    tokens = np.concatenate([1000 * (i + 1) + np.arange(n) for i, n in enumerate(lengths)])
    return Examples(
        tokens=tokens.astype(np.int32),
        targets=(tokens + 1).astype(np.int32),
        weights=rng.integers(0, 2, len(tokens)).astype(np.float32),
        starts=np.cumsum([0, *lengths]),
        report={},
    )


def make_loader(sizes=(8, 1, 1, 1), devices=None, examples=None, **changes) -> Loader:
    cfg = config.default()
    cfg.data.seq_len, cfg.data.max_segments = 32, 4
    cfg.data.packing = changes.pop("packing", "best_fit")
    mesh = parallel.make_mesh(dict(zip(parallel.AXES, sizes, strict=True)), devices)
    options = {"rows": 16, "micro_rows": 8, "shuffle": True, "seed": 3, "mesh": mesh} | changes
    return Loader(examples or make_examples(), cfg.data, **options)


def to_numpy(batches) -> list[dict[str, np.ndarray]]:
    return [{name: np.asarray(array) for name, array in batch.items()} for batch in batches]


def assert_equal(ours: list[dict], theirs: list[dict]) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name in mine:
            assert mine[name].dtype == other[name].dtype
            np.testing.assert_array_equal(mine[name], other[name], err_msg=name)


def test_a_row_holds_its_examples_end_to_end_and_then_padding():
    examples = make_examples()
    ids = np.array([7, 2])
    first, second = examples[7], examples[2]
    row = build_row(examples, ids, 64)
    used, padding = len(first) + len(second), 64 - len(first) - len(second)
    for name in ("tokens", "targets", "weights"):
        both = [*getattr(first, name), *getattr(second, name), *[0] * padding]
        np.testing.assert_array_equal(row[name], both)
    segments = [1] * len(first) + [2] * len(second) + [0] * padding
    positions = [*range(len(first)), *range(len(second)), *[0] * padding]
    np.testing.assert_array_equal(row["segment_ids"], segments)
    np.testing.assert_array_equal(row["positions"], positions)
    assert not row["weights"][used:].any()
    assert set(row) == set(FIELDS)


def test_an_empty_row_is_padding_alone():
    row = build_row(make_examples(), np.array([], np.int64), 8)
    assert not any(array.any() for array in row.values())


def examples_seen(batches: list[dict[str, np.ndarray]]) -> list[int]:
    """The examples of batches, in order, checking that each is whole."""
    examples = make_examples()
    seen = []
    for batch in batches:
        for fields in zip(*(batch[name].reshape(-1, 32) for name in FIELDS), strict=True):
            row = dict(zip(FIELDS, fields, strict=True))
            for segment in range(1, row["segment_ids"].max() + 1):
                part = row["segment_ids"] == segment
                number = int(row["tokens"][part][0]) // 1000 - 1
                for name in ("tokens", "targets", "weights"):
                    np.testing.assert_array_equal(row[name][part], getattr(examples[number], name))
                seen.append(number)
    return seen


@pytest.mark.parametrize("method", ["best_fit", "none"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_each_epoch_shows_every_example_once_and_shares_no_batch(shuffle, method):
    loader = make_loader(shuffle=shuffle, packing=method)
    per_epoch = loader.steps_per_epoch
    assert per_epoch * 16 > loader.num_rows > (per_epoch - 1) * 16  # the last batch is not full
    epochs = []
    for epoch in range(3):
        batches = to_numpy(loader.batches(epoch * per_epoch, (epoch + 1) * per_epoch))
        assert len(batches) == per_epoch
        epochs.append(examples_seen(batches))
        assert sorted(epochs[-1]) == list(range(45))
    assert (epochs[0] != epochs[1]) == shuffle and (epochs[1] != epochs[2]) == shuffle


def test_rows_past_the_end_of_an_epoch_are_empty():
    loader = make_loader()
    last = to_numpy(loader.batches(loader.steps_per_epoch - 1, loader.steps_per_epoch))[0]
    left = loader.num_rows % 16
    full = last["segment_ids"].reshape(16, 32).any(axis=1)
    assert full.tolist() == [True] * left + [False] * (16 - left)
    for array in last.values():
        assert not array.reshape(16, 32)[left:].any()


def test_fewer_rows_than_a_batch_is_one_step_an_epoch():
    loader = make_loader(examples=make_examples(num=3))
    assert loader.steps_per_epoch == 1
    first, second = to_numpy(loader.batches(0, 2))
    assert sorted(first["tokens"][first["positions"] == 0]) == sorted(
        second["tokens"][second["positions"] == 0]
    )


def test_fill_is_the_share_of_tokens_that_are_not_padding():
    loader = make_loader()
    batches = to_numpy(loader.batches(0, loader.steps_per_epoch))
    real = sum((batch["segment_ids"] > 0).sum() for batch in batches)
    assert loader.fill == real / (loader.num_rows * 32)


def test_starting_in_the_middle_gives_the_same_batches_bitwise():
    stop = 2 * make_loader().steps_per_epoch + 1
    uninterrupted = to_numpy(make_loader().batches(0, stop))
    for start in range(stop):
        assert_equal(to_numpy(make_loader().batches(start, stop)), uninterrupted[start:])
    # The end of the run changes nothing before it either.
    assert_equal(to_numpy(make_loader().batches(0, 2)), uninterrupted[:2])


def test_nothing_left_to_do_gives_no_batch():
    assert list(make_loader().batches(3, 3)) == []
    assert list(make_loader().batches(4, 3)) == []


def test_batches_can_be_iterated_twice_and_abandoned():
    loader = make_loader()
    next(iter(loader.batches(0, 5)))
    assert_equal(to_numpy(loader.batches(0, 5)), to_numpy(loader.batches(0, 5)))


@pytest.fixture(scope="module")
def eight_ways() -> list[dict[str, np.ndarray]]:
    return to_numpy(make_loader((8, 1, 1, 1)).batches(0, 4))


@pytest.mark.parametrize("sizes", MESHES)
def test_the_global_batch_is_the_same_on_every_mesh(eight_ways, sizes):
    loader = make_loader(sizes)
    assert loader.local_rows == list(range(16))
    batches = list(loader.batches(0, 4))
    assert all(array.sharding.mesh.devices.shape == sizes for array in batches[0].values())
    assert_equal(to_numpy(batches), eight_ways)


def test_micro_batches_change_the_shape_alone(eight_ways):
    whole = to_numpy(make_loader(micro_rows=16).batches(0, 4))
    for batch, micro in zip(whole, eight_ways, strict=True):
        for name in FIELDS:
            assert batch[name].shape == (1, 16, 32) and micro[name].shape == (2, 8, 32)
            np.testing.assert_array_equal(batch[name].reshape(16, 32), micro[name].reshape(16, 32))


class Host:
    """A sharding as one of several processes sees it: only its own devices are addressable."""

    def __init__(self, sharding, devices):
        self._sharding, self._devices = sharding, devices

    def addressable_devices_indices_map(self, shape):
        blocks = self._sharding.devices_indices_map(shape)
        return {device: blocks[device] for device in self._devices}

    def blocks(self, shape, callback):
        """What jax.make_array_from_callback would ask this process for."""
        blocks = self.addressable_devices_indices_map(shape)
        return [(index, callback(index)) for index in blocks.values()]


@pytest.mark.parametrize("num_hosts", [2, 4, 8])
@pytest.mark.parametrize("sizes", MESHES)
def test_hosts_together_make_the_global_batch(eight_ways, monkeypatch, sizes, num_hosts):
    devices = np.array(jax.devices()).reshape(num_hosts, -1)
    of_mesh = parallel.sharding
    wanted = eight_ways[1:]  # a resumed run
    rebuilt = [{name: np.zeros_like(a) for name, a in batch.items()} for batch in wanted]
    filled = [{name: np.zeros(a.shape, int) for name, a in batch.items()} for batch in wanted]
    for here in devices:
        monkeypatch.setattr(
            parallel, "sharding", lambda mesh, *axes, here=here: Host(of_mesh(mesh, *axes), here)
        )
        monkeypatch.setattr(
            jax, "make_array_from_callback", lambda shape, host, block: host.blocks(shape, block)
        )
        loader = make_loader(sizes)
        ranks = sizes[0] * sizes[1]
        assert len(loader.local_rows) == 16 * max(1, ranks // num_hosts) // ranks
        for step, batch in enumerate(loader.batches(1, 4)):
            for name, blocks in batch.items():
                for index, block in blocks:
                    assert block.shape == rebuilt[step][name][index].shape
                    rebuilt[step][name][index] = block
                    filled[step][name][index] += 1
        monkeypatch.undo()
    copies = sizes[2]  # only `tensor` neighbours hold the same block
    assert all((a == copies).all() for batch in filled for a in batch.values())
    assert_equal(rebuilt, wanted)
