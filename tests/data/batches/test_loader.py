"""The loader: whole examples in rows, and the same global batches on any mesh, host and resume."""

import time

import jax
import numpy as np
import pytest

from jax_sft import config
from jax_sft.batch import FIELDS, empty_rows, fields
from jax_sft.data.batches.examples import Encoded, Examples
from jax_sft.data.batches.loader import Loader, fill_row
from jax_sft.sharding import rules
from jax_sft.sharding.mesh import make_mesh
from tests import inputs

MESHES = [(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 2, 4), (2, 2, 2, 1), (1, 2, 2, 2)]
SEQ_LEN = 32


def make_examples(sizes: tuple[int, ...] = (20, 15, 10), longest: int = 24) -> Examples:
    """Sources a, b, ... whose every token names the example and the place in it."""
    rng = np.random.default_rng(0)
    encoded, number = {}, 0
    for name, size in zip("abcdef", sizes, strict=False):
        encoded[name] = []
        for _ in range(size):
            number += 1
            length = int(rng.integers(2, longest + 2))  # one more than the model's inputs
            ids = np.arange(1000 * number, 1000 * number + length, dtype=np.int32)
            encoded[name].append(Encoded(ids, rng.integers(0, 3, length).astype(np.float32)))
    return Examples.in_memory(encoded)


def make_loader(sizes=(8, 1, 1, 1), devices=None, examples=None, mix=None, **changes) -> Loader:
    """A loader of 16 rows in 2 micro-batches; `mix` is {source: options} of the sources."""
    cfg = config.default()
    cfg.data.seq_len, cfg.data.max_segments = changes.pop("seq_len", SEQ_LEN), 4
    cfg.data.packing = changes.pop("packing", "best_fit")
    mesh = make_mesh(dict(zip(rules.AXES, sizes, strict=True)), devices)
    sources = mix and {name: inputs.source("x.jsonl", **options) for name, options in mix.items()}
    options = {"rows": 16, "micro_rows": 8, "shuffle": True, "seed": 3, "mesh": mesh} | changes
    examples = make_examples() if examples is None else examples
    return Loader(examples, cfg.data, sources, **options)


def to_numpy(batches) -> list[dict[str, np.ndarray]]:
    return [{name: np.asarray(array) for name, array in batch.items()} for batch in batches]


def assert_equal(ours: list[dict], theirs: list[dict]) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name in mine:
            assert mine[name].dtype == other[name].dtype
            np.testing.assert_array_equal(mine[name], other[name], err_msg=name)


def examples_seen(batches: list[dict[str, np.ndarray]]) -> list[int]:
    """The examples of batches, in order, checking that each is whole."""
    examples, seen = make_examples(), []
    for batch in batches:
        tokens = batch["tokens"].shape[-1]
        for row in zip(*(batch[name].reshape(-1, tokens) for name in FIELDS), strict=True):
            row = dict(zip(FIELDS, row, strict=True))
            for segment in range(1, row["segment_ids"].max() + 1):
                part = row["segment_ids"] == segment
                number = int(row["tokens"][part][0]) // 1000 - 1
                for name in ("tokens", "targets", "weights"):
                    np.testing.assert_array_equal(row[name][part], getattr(examples[number], name))
                seen.append(number)
    return seen


# ---- rows ----------------------------------------------------------------------------------------


def build_row(examples: Examples, ids: list[int], num_tokens: int, per_source=False) -> dict:
    row = {name: rows[0] for name, rows in empty_rows(1, num_tokens, per_source).items()}
    fill_row(row, examples, np.array(ids, np.int64))
    return row


def test_a_row_holds_its_examples_end_to_end_and_then_padding():
    examples = make_examples()
    first, second = examples[40], examples[2]
    row = build_row(examples, [40, 2], 64)
    padding = [0] * (64 - len(first) - len(second))
    for name in ("tokens", "targets", "weights"):
        both = [*getattr(first, name), *getattr(second, name), *padding]
        np.testing.assert_array_equal(row[name], both)
    segments = [1] * len(first) + [2] * len(second) + padding
    positions = [*range(len(first)), *range(len(second)), *padding]
    np.testing.assert_array_equal(row["segment_ids"], segments)
    np.testing.assert_array_equal(row["positions"], positions)
    assert tuple(row) == FIELDS == fields(per_source=False)
    assert {name: array.dtype.name for name, array in row.items()} == {
        **dict.fromkeys(FIELDS, "int32"),
        "weights": "float32",
    }


def test_the_source_of_each_token_is_there_when_asked_for():
    examples = make_examples()
    row = build_row(examples, [44, 2, 20], 80, per_source=True)
    wanted = [2] * len(examples[44]) + [0] * len(examples[2]) + [1] * len(examples[20])
    np.testing.assert_array_equal(row["sources"], wanted + [0] * (80 - len(wanted)))
    assert row["sources"].dtype == np.int32 and tuple(row) == (*FIELDS, "sources")


def test_an_empty_row_is_padding_alone():
    assert not any(array.any() for array in build_row(make_examples(), [], 8).values())


def test_weights_of_any_dtype_become_float32():
    examples = make_examples()
    rounded = [(ids, weights.astype(np.uint8)) for ids, weights in examples.arrays]
    row = build_row(Examples(**vars(examples) | {"arrays": rounded}), [3, 30], 64)
    np.testing.assert_array_equal(row["weights"], build_row(examples, [3, 30], 64)["weights"])
    assert row["weights"].dtype == np.float32


# ---- epochs --------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("mix", [None, {"a": {}, "b": {}, "c": {}}])
def test_without_shuffling_and_packing_examples_come_in_the_order_of_the_files(mix):
    loader = make_loader(shuffle=False, packing="none", mix=mix)
    assert examples_seen(to_numpy(loader.batches(0, 3))) == list(range(45))


def test_without_shuffling_packed_rows_come_in_the_order_of_their_first_example():
    loader = make_loader(shuffle=False)
    rows = [loader.row(step, row) for step in range(loader.steps_per_epoch) for row in range(16)]
    first = [row["tokens"][0] for row in rows if row["tokens"][0]]
    assert len(first) == loader.num_rows and first == sorted(first)


def test_rows_past_the_end_of_an_epoch_are_empty():
    loader = make_loader(shuffle=False)
    last = to_numpy(loader.batches(loader.steps_per_epoch - 1, loader.steps_per_epoch))[0]
    left = loader.num_rows % 16
    full = last["segment_ids"].reshape(16, SEQ_LEN).any(axis=1)
    assert full.tolist() == [True] * left + [False] * (16 - left)
    for array in last.values():
        assert not array.reshape(16, SEQ_LEN)[left:].any()


def test_fewer_rows_than_a_batch_is_one_step_an_epoch():
    loader = make_loader(examples=make_examples((3,)))
    assert loader.steps_per_epoch == 1
    first, second = to_numpy(loader.batches(0, 2))
    assert sorted(examples_seen([first])) == sorted(examples_seen([second])) == [0, 1, 2]


@pytest.mark.parametrize("method", ["best_fit", "none"])
def test_no_examples_are_no_steps(method):
    none = np.zeros(0, np.int64)
    examples = Examples([], none, none, none, none, {}, {})
    loader = make_loader(examples=examples, packing=method)
    assert (loader.num_rows, loader.steps_per_epoch, loader.num_steps(2.5)) == (0, 0, 0)
    assert loader.fill == 0.0 and list(loader.batches(0, 0)) == []
    with pytest.raises(ValueError, match="no step 0: the data set has no examples"):
        loader.row(0, 0)


def test_a_mixture_takes_its_share_of_each_source():
    loader = make_loader(mix={"a": {"epochs": 2}, "b": {"epochs": 0.4}, "c": {}})
    per_epoch = [loader.num_steps(n) for n in range(5)]
    counts = np.zeros((4, 45), int)
    for epoch in range(4):
        seen = examples_seen(to_numpy(loader.batches(per_epoch[epoch], per_epoch[epoch + 1])))
        np.add.at(counts[epoch], seen, 1)
    assert (counts[:, :20] == 2).all() and (counts[:, 35:] == 1).all()
    assert counts[:, 20:35].sum(axis=1).tolist() == [6, 6, 6, 6]
    assert (counts[0] + counts[1])[20:35].max() == 1  # the second goes on where the first ended
    assert counts[:, 20:35].sum(axis=0).min() == 1


def irregular() -> Loader:
    """A loader whose epochs differ in their number of steps."""
    rng = np.random.default_rng(1)
    sizes = [*rng.integers(2, 5, 40).tolist(), *rng.integers(28, 33, 40).tolist()]
    encoded = [Encoded(np.arange(size, dtype=np.int32), np.ones(size)) for size in sizes]
    return make_loader(
        examples=Examples.in_memory({"a": encoded}),
        mix={"a": {"epochs": 0.5}},
        **{"rows": 4, "micro_rows": 4, "sizes": (1, 1, 1, 1), "shuffle": False},
        devices=jax.devices()[:1],
    )


def test_epochs_of_different_lengths_are_told_apart():
    loader = irregular()
    # 40 short ones, four to a row at most: 10 rows, 3 steps. 40 long ones: 40 rows, 10 steps.
    assert [loader.num_steps(n) for n in (0, 1, 2, 3, 4)] == [0, 3, 13, 16, 26]
    assert loader.steps_per_epoch == 3 and loader.num_rows == 10
    assert [loader.num_steps(n) for n in (0.01, 0.5, 1.1, 1.5, 1.51)] == [1, 2, 4, 8, 9]
    found = [loader.epoch_of(step) for step in (0, 1, 3, 4, 8, 13, 14, 16)]
    assert found == [0, 1 / 3, 1, 1.1, 1.5, 2, 2 + 1 / 3, 3]
    longest = [loader.row(step, 0)["positions"].max() for step in (2, 3, 12, 13)]
    assert [tokens > 3 for tokens in longest] == [False, True, True, False]


@pytest.mark.parametrize(("epochs", "steps"), [(0, 0), (1, 3), (1.1, 4), (0.3, 1), (2.4, 8)])
def test_a_part_of_a_step_counts_as_one(epochs, steps):
    loader = make_loader(packing="none")  # 45 rows in 3 steps
    assert loader.num_steps(epochs) == steps


def test_epochs_are_counted_in_the_decimals_of_the_config():
    loader = make_loader(examples=make_examples((400,)), packing="none")
    assert loader.steps_per_epoch == 25 and 0.28 * 25 > 7  # in binary
    assert loader.num_steps(0.28) == 7 and loader.epoch_of(7) == 0.28


@pytest.mark.parametrize("seq_len", [32, 512])
@pytest.mark.parametrize("method", ["best_fit", "none"])
def test_fill_is_the_share_of_tokens_that_are_not_padding(method, seq_len):
    examples = make_examples((45,), longest=min(seq_len, 300))
    loader = make_loader(examples=examples, packing=method, seq_len=seq_len)
    batches = to_numpy(loader.batches(0, loader.steps_per_epoch))
    real = sum((batch["segment_ids"] > 0).sum() for batch in batches)
    rows = [batch["segment_ids"].reshape(16, -1) for batch in batches]
    places = sum(row.size for batch in rows for row in batch if row.any())
    assert loader.fill == real / places


# ---- rows without packing: buckets ---------------------------------------------------------------


def unpacked(lengths: list[int], seq_len: int, **changes) -> Loader:
    encoded = [Encoded(np.arange(1, n + 2, dtype=np.int32), np.ones(n + 1)) for n in lengths]
    examples = Examples.in_memory({"a": encoded})
    changes = {"rows": 2, "micro_rows": 1, "sizes": (1, 1, 1, 1), "shuffle": False} | changes
    num = int(np.prod(changes["sizes"]))
    return make_loader(
        examples=examples, seq_len=seq_len, packing="none", devices=jax.devices()[:num], **changes
    )


@pytest.mark.parametrize(
    ("lengths", "seq_len", "sequence", "tokens"),
    [
        ([1, 128], 4096, 1, 128),
        ([129, 5], 4096, 1, 256),
        ([5, 1025], 4096, 4, 2048),
        ([2049, 1], 4096, 1, 4096),
        ([600, 1], 1000, 1, 1000),  # 1024 would be over seq_len
        ([5, 5], 100, 1, 100),
        ([5, 5], 768, 3, 768),  # 128, 256 and 512 cannot be split into 3
        ([5, 5], 1024, 8, 128),
    ],
)
def test_the_bucket_is_the_smallest_that_fits_the_longest_row(lengths, seq_len, sequence, tokens):
    loader = unpacked(lengths, seq_len, sizes=(1, 1, 1, sequence))
    (batch,) = loader.batches(0, 1)
    assert {array.shape for array in batch.values()} == {(2, 1, tokens)}


def test_all_rows_of_a_step_share_a_bucket_wherever_they_are_built():
    # The long example is in another micro-batch, and on other devices, than most rows.
    loader = unpacked([3, 3, 3, 300, 3, 3, 3, 3], 512, rows=4, micro_rows=2, sizes=(2, 1, 1, 1))
    first, second = loader.batches(0, 2)
    assert first["tokens"].shape == (2, 2, 512) and second["tokens"].shape == (2, 2, 128)
    assert [loader.row(0, row)["tokens"].shape for row in range(4)] == [(512,)] * 4


def test_few_shapes_are_compiled():
    rng = np.random.default_rng(0)
    loader = unpacked(rng.integers(1, 4097, 400).tolist(), 4096, shuffle=True)
    shapes = {batch["tokens"].shape for batch in loader.batches(0, 200)}
    assert 1 < len(shapes) <= 6  # 128, 256, ... 4096


# ---- the same global batches, however they are made ----------------------------------------------

KINDS = {
    "packed": {},
    "none": {"packing": "none", "seq_len": 512},
    "mixture": {"mix": {"a": {"epochs": 0.35}, "b": {"epochs": 2.2}, "c": {}}, "per_source": True},
    "weights": {"mix": {n: {"weight": w} for n, w in zip("abc", (3, 2, 1), strict=True)}},
    "unshuffled": {"shuffle": False, "mix": {"a": {"epochs": 0.35}, "b": {}, "c": {}}},
}
STOP = 8


def make_kind(kind: str, sizes=(8, 1, 1, 1), devices=None, **changes) -> Loader:
    changes = KINDS[kind] | changes
    if kind == "none":
        changes["examples"] = make_examples((20, 15, 10), longest=300)
    return make_loader(sizes, devices, **changes)


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, list[dict[str, np.ndarray]]]:
    """The batches of a run on one device, from step 0."""
    one = jax.devices()[:1]
    return {kind: to_numpy(make_kind(kind, (1, 1, 1, 1), one).batches(0, STOP)) for kind in KINDS}


def test_the_runs_compared_below_differ_from_step_to_step(uninterrupted):
    for kind, batches in uninterrupted.items():
        assert len({batch["tokens"].tobytes() for batch in batches}) == STOP, kind
    assert len({batch["tokens"].shape for batch in uninterrupted["none"]}) == 2
    assert STOP > max(make_kind(kind).steps_per_epoch for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", [0, 1, 3, 7])
def test_a_resumed_run_sees_bitwise_the_same_batches_on_any_number_of_devices(
    uninterrupted, kind, start
):
    for sizes in [(1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 2, 1), (2, 2, 1, 2)]:
        devices = jax.devices()[: int(np.prod(sizes))]
        batches = list(make_kind(kind, sizes, devices).batches(start, STOP))
        assert all(array.sharding.mesh.devices.shape == sizes for array in batches[0].values())
        assert_equal(to_numpy(batches), uninterrupted[kind][start:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", MESHES)
def test_the_global_batch_is_the_same_on_every_mesh(uninterrupted, kind, sizes):
    loader = make_kind(kind, sizes)
    assert loader.local_rows == list(range(16))
    assert_equal(to_numpy(loader.batches(0, 3)), uninterrupted[kind][:3])


@pytest.mark.parametrize("kind", KINDS)
def test_any_row_can_be_built_on_its_own(uninterrupted, kind):
    loader = make_kind(kind)
    for step, row in [(7, 3), (0, 15), (4, 8), (7, 0)]:
        wanted = {
            name: array.reshape(16, -1)[row] for name, array in uninterrupted[kind][step].items()
        }
        assert_equal([loader.row(step, row)], [wanted])


def test_the_end_of_the_run_changes_nothing_before_it(uninterrupted):
    assert_equal(to_numpy(make_kind("packed").batches(0, 2)), uninterrupted["packed"][:2])


def test_nothing_left_to_do_gives_no_batch():
    assert list(make_loader().batches(3, 3)) == []
    assert list(make_loader().batches(4, 3)) == []


def test_batches_can_be_iterated_twice_and_abandoned():
    loader = make_loader()
    next(iter(loader.batches(0, 5)))
    assert_equal(to_numpy(loader.batches(0, 5)), to_numpy(loader.batches(0, 5)))


def test_micro_batches_change_the_order_of_rows_alone(uninterrupted):
    whole = to_numpy(make_kind("packed", micro_rows=16).batches(0, 3))
    for batch, micro in zip(whole, uninterrupted["packed"], strict=False):
        for name in FIELDS:
            assert batch[name].shape == (1, 16, 32) and micro[name].shape == (2, 8, 32)
            rows = [np.sort(a[name].reshape(16, 32), axis=0) for a in (batch, micro)]
            np.testing.assert_array_equal(*rows)


def test_shuffled_rows_of_similar_work_share_a_micro_batch(uninterrupted):
    for batch in uninterrupted["packed"]:
        segments = batch["segment_ids"].reshape(16, 32)
        work = [sum(np.bincount(row)[1:] ** 2) for row in segments]
        assert min(work[:8]) >= max(work[8:])


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_hosts", [2, 4, 8])
@pytest.mark.parametrize("sizes", MESHES)
def test_hosts_together_make_the_global_batch(uninterrupted, monkeypatch, sizes, num_hosts, kind):
    devices = np.array(jax.devices()).reshape(num_hosts, -1)
    of_mesh = rules.sharding
    wanted = uninterrupted[kind][3:6]  # a resumed run
    rebuilt = [{name: np.zeros_like(a) for name, a in batch.items()} for batch in wanted]
    filled = [{name: np.zeros(a.shape, int) for name, a in batch.items()} for batch in wanted]
    for here in devices:
        monkeypatch.setattr(
            rules, "sharding", lambda mesh, *axes, here=here: Host(of_mesh(mesh, *axes), here)
        )
        monkeypatch.setattr(
            jax, "make_array_from_callback", lambda shape, host, block: host.blocks(shape, block)
        )
        loader = make_kind(kind, sizes)
        ranks = sizes[0] * sizes[1]
        assert len(loader.local_rows) == 16 * max(1, ranks // num_hosts) // ranks
        for step, batch in enumerate(loader.batches(3, 6)):
            for name, blocks in batch.items():
                for index, block in blocks:
                    assert block.shape == rebuilt[step][name][index].shape
                    rebuilt[step][name][index] = block
                    filled[step][name][index] += 1
        monkeypatch.undo()
    copies = sizes[2]  # only `tensor` neighbours hold the same block
    assert all((a == copies).all() for batch in filled for a in batch.values())
    assert_equal(rebuilt, wanted)


# ---- what it costs -------------------------------------------------------------------------------


def test_a_process_reads_only_the_rows_of_its_own_and_only_from_where_it_starts(monkeypatch):
    examples = make_examples((200,))
    read = []

    class Counting(np.ndarray):
        def __getitem__(self, part):
            read.append(part)
            return np.asarray(super().__getitem__(part))

    ids, weights = examples.arrays[0]
    counted = Examples(**vars(examples) | {"arrays": [(ids.view(Counting), weights)]})
    loader = make_loader(examples=counted, packing="none")
    assert read == []  # the plan needs no token
    loader.local_rows = loader.local_rows[:4]
    loader.build(9, loader.local_rows)
    assert len(read) == 2 * 4  # tokens and targets of four examples


def test_waiting_is_counted_from_the_first_batch_on_and_read_once(monkeypatch):
    loader = make_loader()
    build = loader.build

    def slowly(step, rows):
        time.sleep(0.3 if step == 0 else 0.1)
        return build(step, rows)

    monkeypatch.setattr(loader, "build", slowly)
    batches = iter(loader.batches(0, 8))
    next(batches)
    assert loader.wait_ms == 0.0
    for _ in range(6):
        next(batches)
    assert loader.wait_ms > 200  # two threads build a batch each in 100 ms
    assert loader.wait_ms == 0.0


def test_a_consumer_that_is_slower_than_the_loader_does_not_wait():
    loader = make_loader()
    for _ in loader.batches(0, 6):
        time.sleep(0.1)
    assert loader.wait_ms < 250  # a few ms; much less than the 500 ms spent elsewhere
