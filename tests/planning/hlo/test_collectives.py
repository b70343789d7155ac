"""Every collective of a compiled module is counted once, with its bytes, axes and overlap."""

import math
import re
from dataclasses import replace
from typing import Any

import pytest
from hlo_texts import NAMES, PER_LAYER, D, F, H, K, L, N, V, counts_of, module, module_of, text_of

from jax_sft.planning.hlo import collectives, device_groups, loops, parser
from jax_sft.planning.hlo.collectives import Collective
from jax_sft.planning.hlo.kernels import Work

MESH = {
    "step_fsdp8": {"data": 1, "fsdp": 8, "tensor": 1, "sequence": 1},
    "step_no_remat": {"data": 1, "fsdp": 8, "tensor": 1, "sequence": 1},
    "step_data2_fsdp4": {"data": 2, "fsdp": 4, "tensor": 1, "sequence": 1},
    "step_fsdp2_tensor2_sequence2": {"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2},
    "step_two_hosts": {"data": 2, "fsdp": 8, "tensor": 1, "sequence": 1},
}
ADD = """%add {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %r = f32[] add(%a, %b)
}
"""


def found_in(name: str) -> list[Collective]:
    return collectives.collectives(module_of(name), counts_of(name))


def large(name: str, kind: str, axes: tuple[str, ...], least: int = 2**20) -> list[Collective]:
    """Those of a kind and of axes that send at least `least` bytes."""
    return [
        collective
        for collective in found_in(name)
        if collective.kind == kind
        and device_groups.axis_of(collective.groups, MESH[name]) == axes
        and collective.wire_bytes >= least
    ]


def step_bytes(found: list[Collective]) -> float:
    return sum(collective.step_wire_bytes for collective in found)


# ---- real modules ------------------------------------------------------------------------------


def test_each_kind_of_collective_sends_what_its_ring_sends():
    array, half = 512 * 512 * 2, 256 * 512 * 2  # bytes of bf16[512,512] and of a device's part
    found = {(c.kind, c.op_name.split("/")[-1]): c for c in found_in("collectives_2x2x2")}
    sent = {key: (c.wire_bytes, c.groups[0], c.count) for key, c in found.items()}
    assert sent == {
        ("all-gather", "all_gather"): (array / 2, (0, 2), 1),
        ("all-reduce", "pmax"): (2 * half / 2, (0, 2), 1),
        ("all-reduce", "psum"): (2 * half * 3 / 4, (0, 4, 1, 5), 1),
        ("collective-permute", "ppermute"): (half, (0, 1), 1),
        ("reduce-scatter", "reduce_scatter"): (array * 3 / 4, (0, 1, 4, 5), 1),
        ("all-to-all", "all_to_all"): (array * 3 / 4, (0, 1, 2, 3), 1),
    }
    axes = {"a": 2, "b": 2, "c": 2}
    assert {key[1]: device_groups.axis_of(c.groups, axes) for key, c in found.items()} == {
        "all_gather": ("b",),
        "pmax": ("b",),
        "psum": ("a", "c"),
        "ppermute": ("c",),
        "reduce_scatter": ("a", "c"),
        "all_to_all": ("b", "c"),
    }
    assert found["collective-permute", "ppermute"].pairs[:2] == ((0, 1), (1, 0))
    assert {c.dtypes for c in found.values()} == {("bf16",)}
    # XLA says of these three that nothing runs beside them; of the others something does.
    assert {key[1] for key, c in found.items() if c.blocking} == {
        "psum",
        "ppermute",
        "reduce_scatter",
    }
    assert all(c.exposed == c.blocking for c in found.values())


@pytest.mark.parametrize("name", ["step_fsdp8", "step_no_remat"])
def test_the_gathers_and_scatters_of_fsdp_are_those_of_its_shapes(name):
    table = V * D * 2 * 7 / 8  # a table of the vocabulary in bf16, seven of eight parts
    layers = L * PER_LAYER * 2 * 7 / 8
    gathers = large(name, "all-gather", ("fsdp",))
    # Each layer's matrices forward and backward; the head; the embedding, in float32.
    assert step_bytes(gathers) == 2 * layers + table + 2 * table
    assert [g.arrays[0].dims for g in gathers if g.dtypes == ("f32",)] == [(V, D)]
    assert step_bytes(large(name, "reduce-scatter", ("fsdp",))) == layers + 2 * table
    assert large(name, "all-reduce", ("fsdp",)) == []
    assert {c.count for c in gathers if c.arrays[0].dims[0] != V} == {L}


def test_over_hosts_only_the_data_axis_is_slow():
    name = "step_two_hosts"
    assert step_bytes(large(name, "all-gather", ("fsdp",))) == pytest.approx(
        2 * L * PER_LAYER * 2 * 7 / 8 + 3 * V * D * 2 * 7 / 8, rel=1e-12
    )
    over_data = large(name, "all-reduce", ("data",))
    shards = (L * PER_LAYER + V * D) * 2 / 8  # of the layers and of the embedding, in bf16
    assert step_bytes(over_data) == pytest.approx(2 * shards / 2 + 0, rel=1e-12)
    for collective in found_in(name):
        axes = device_groups.axis_of(collective.groups, MESH[name])
        expected = {("data",): 1.0, ("fsdp",): 0.0, ("data", "fsdp"): 2 / 16}[axes]
        assert collective.slow_share(devices_per_host=8) == expected
        assert device_groups.crosses(collective.groups, 8) == ("data" in axes)


def test_a_sequence_axis_gathers_keys_and_values():
    name = "step_fsdp2_tensor2_sequence2"
    rows, tokens = 4, 4096
    keys = rows * tokens * (K // 2) * H * 2  # bytes of the keys of a device's heads, whole rows
    segment_ids = rows * tokens * 2 * 4  # of queries and keys, gathered again behind a remat
    gathers = large(name, "all-gather", ("sequence",))
    assert [g.wire_bytes for g in gathers] == [2 * keys / 2, (2 * keys + segment_ids) / 2]
    assert [g.dtypes for g in gathers] == [("bf16",), ("bf16", "s32")]
    [scatter] = large(name, "reduce-scatter", ("sequence",))
    assert (scatter.wire_bytes, scatter.count) == (2 * keys / 2, L)


def test_activations_are_all_reduced_over_the_tensor_axis():
    name = "step_fsdp2_tensor2_sequence2"
    hidden = 4 * 2048 * D * 2
    reductions = [c for c in large(name, "all-reduce", ("tensor",)) if c.wire_bytes == hidden]
    # Attention and mlp, forward, again for the backward pass (attention only) and backward; and the
    # embedding.
    assert sum(c.count for c in reductions) == L * (2 + 1 + 2) + 1


def test_all_reduces_of_gradients_are_found_and_no_others():
    def of(name, **changes):
        args: dict[str, Any] = {"at_least_elements": 2**20} | changes
        found = collectives.gradient_all_reduces(found_in(name), MESH[name], **args)
        return [(c.arrays[0].dims, device_groups.axis_of(c.groups, MESH[name])) for c in found]

    assert of("step_fsdp8") == of("step_no_remat") == []
    assert of("step_data2_fsdp4") == [((V, D), ("data", "fsdp"))]  # the head, not the shards
    assert of("step_two_hosts") == [((V, D), ("data", "fsdp"))]
    assert len(of("step_two_hosts", at_least_elements=V * D)) == 1
    assert of("step_two_hosts", at_least_elements=V * D + 1) == []
    assert len(of("step_two_hosts", allowed=())) > 1
    tensor = of("step_fsdp2_tensor2_sequence2", allowed=[("data",), ("tensor",)])
    assert tensor == [
        ((F // 2, D // 2), ("sequence",)),
        ((D // 2, F // 2), ("sequence",)),
        (((N + 2 * K + N) // 2 * H * D // 2,), ("sequence",)),  # attention's, in one
        ((D // 2, F // 2), ("sequence",)),
        ((V // 2, D), ("fsdp", "sequence")),
        ((V // 2, D), ("fsdp", "sequence")),
    ]


def test_what_hides_a_gather_is_what_stands_between_its_start_and_its_done():
    mlp = 2 * 4096 * D * F
    found = found_in("step_fsdp8")
    gathers = [c for c in found if c.kind == "all-gather" and (D, F) in {a.dims for a in c.arrays}]
    attention = 2 * 2 * 4096 * 4096 * N * H // 2 + 2 * 4096 * D * D  # p v and the output matrix
    assert [g.overlap.flops for g in gathers] == [attention, mlp, attention, mlp]
    for collective in found:
        if collective.window:
            first, last = collective.window
            instructions = module_of("step_fsdp8").computations[collective.computation].instructions
            assert instructions[first].name == collective.name
            assert instructions[last].operands == (collective.name,)
    over_a_loop = max(found_in("step_two_hosts"), key=lambda c: c.overlap.flops)
    assert over_a_loop.overlap.flops == 4 * 2 * 1024 * V * D  # the loss: a loop of four trips


def test_a_scatter_hides_behind_the_next_product():
    found = {c.kind: c for c in found_in("loops_and_scatter")}
    assert found["reduce-scatter"].count == 6
    assert found["reduce-scatter"].overlap.flops == 2 * 256 * 1024 * 1024
    assert found["reduce-scatter"].wire_bytes == 1024 * 1024 * 2 * 7 / 8


def test_modules_of_the_cpu():
    partitioned, compiled = found_in("cpu_partitioned"), found_in("cpu_compiled")
    assert [(c.kind, c.dtypes, c.blocking, c.sliced) for c in partitioned] == [
        ("all-gather", ("bf16",), None, False),
        ("all-gather", ("bf16",), None, False),
        ("all-reduce", ("bf16",), None, True),  # becomes a reduce-scatter on a GPU
    ]
    assert [(c.kind, c.dtypes, c.blocking, c.sliced) for c in compiled] == [
        ("all-gather", ("f32",), True, False),
        ("all-gather", ("f32",), True, False),
        ("all-reduce", ("f32",), True, False),
    ]
    assert [c.exposed for c in partitioned + compiled] == [None] * 3 + [True] * 3
    assert [c.count for c in partitioned + compiled] == [6] * 6
    assert [c.wire_bytes for c in partitioned] == [n * 128 * 128 * 2 * 7 / 8 for n in (1, 1, 2)]
    assert [c.wire_bytes for c in compiled] == [n * 128 * 128 * 4 * 7 / 8 for n in (1, 1, 2)]


def test_the_compact_form_of_a_loop_has_the_trips_and_collectives_of_the_long_form():
    assert [
        (c.kind, c.dtypes, c.count, c.sliced, c.group_size, c.wire_bytes)
        for c in found_in("cpu_partitioned_jax_0_12")
    ] == [
        ("all-gather", ("f32",), 6, False, 8, 128 * 128 * 4 * 7 / 8),
        ("all-gather", ("f32",), 6, False, 8, 128 * 128 * 4 * 7 / 8),
        ("all-reduce", ("f32",), 6, True, 8, 2 * 128 * 128 * 4 * 7 / 8),
    ]


def test_a_collective_in_an_asynchronous_kernel_is_between_the_start_and_the_done_of_that():
    reduce, gather = found_in("part_of_an_axis_jax_0_12")
    entry = module_of("part_of_an_axis_jax_0_12").computations["main.0_spmd"]
    assert (reduce.kind, reduce.computation) == ("all-reduce", entry.name)
    assert (reduce.blocking, reduce.exposed, reduce.overlap) == (False, True, Work())
    assert (reduce.group_size, reduce.wire_bytes) == (4, 2 * 512 * 4 * 3 / 4)
    assert reduce.window is not None
    opcodes = [entry.instructions[place].opcode for place in reduce.window]
    assert opcodes == ["fusion-start", "fusion-done"]
    assert (gather.kind, gather.blocking, gather.group_size) == ("all-gather", True, 2)


@pytest.mark.parametrize("name", NAMES)
def test_no_collective_of_the_text_is_left_out(name):
    kinds = "|".join(parser.COLLECTIVES)
    lines = re.findall(rf" (?:{kinds})(?:-start)?\(", text_of(name))
    found = found_in(name)
    assert len(found) == len(lines)
    assert all(c.op_name for c in found)
    assert all(c.wire_bytes > 0 and math.isfinite(c.step_wire_bytes) for c in found)


# ---- written by hand ---------------------------------------------------------------------------


def one(entry: str, before: str = "", **changes) -> Collective:
    read = module(entry, before, **changes)
    [found] = collectives.collectives(read, loops.executions(read))
    return found


GATHER = "all-gather-start(%p), replica_groups=[2,4]<=[8], dimensions={0}"


def test_an_asynchronous_computation_is_one_collective_with_its_overlap():
    found = one(
        """
        %p = f32[32,4]{1,0} parameter(0)
        %s = ((f32[32,4]{1,0}), f32[32,4]{1,0}, u32[]) async-start(%p), calls=%wrapped
        %u = ((f32[32,4]{1,0}), f32[32,4]{1,0}, u32[]) async-update(%s), calls=%wrapped
        %d = f32[4,4]{1,0} dot(%p, %p), lhs_contracting_dims={0}, rhs_contracting_dims={0}
        %e = f32[32,4]{1,0} async-done(%u), calls=%wrapped
        ROOT %t = (f32[4,4]{1,0}, f32[32,4]{1,0}) tuple(%d, %e)
        """,
        """%wrapped {
  %q = f32[32,4]{1,0} parameter(0)
  ROOT %a = f32[32,4]{1,0} all-to-all(%q), replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
}
""",
    )
    assert (found.kind, found.name, found.computation) == ("all-to-all", "s", "main")
    assert (found.count, found.group_size, found.wire_bytes) == (1, 4, 32 * 4 * 4 * 3 / 4)
    assert found.blocking is False and found.overlap == Work(flops=2 * 4 * 4 * 32)


def test_a_loop_between_start_and_done_counts_by_its_trips():
    entry = f"""
        %p = f32[4]{{0}} parameter(0)
        %s = (f32[4]{{0}}, f32[16]{{0}}) {GATHER}, use_global_device_ids=true, channel_id=1
        %w = f32[4]{{0}} while(%p), condition=%cond, body=%body, \
backend_config={{"known_trip_count":{{"n":"5"}}}}
        %c = f32[4]{{0}} conditional(%p, %p, %p), branch_computations={{%left, %right}}
        ROOT %d = f32[16]{{0}} all-gather-done(%s)
    """
    dot = """%NAME {
  %x = f32[4]{0} parameter(0)
  %d = f32[] dot(%x, %x), lhs_contracting_dims={0}, rhs_contracting_dims={0}
  ROOT %n = f32[4]{0} negate(%x)
}
"""
    test = """%cond {
  %x = f32[4]{0} parameter(0)
  ROOT %c = pred[] constant(true)
}
"""
    before = test + "".join(dot.replace("NAME", name) for name in ("body", "left", "right"))
    found = one(entry, before)
    assert found.overlap == Work(flops=(5 + 2) * 8, bytes=(5 + 2) * 32)  # both branches: a bound
    assert found.wire_bytes == 16 * 4 * 3 / 4
    with pytest.raises(ValueError, match="w shares body with another instruction"):
        one(entry.replace("%left", "%body"), before)


def test_starts_within_one_another_each_have_their_own_window():
    read = module(
        """
        %p = f32[4]{0} parameter(0)
        %s1 = (f32[4]{0}, f32[16]{0}) all-gather-start(%p), replica_groups=[2,4]<=[8], \
dimensions={0}, use_global_device_ids=true
        %n1 = f32[4]{0} negate(%p)
        %s2 = (f32[4]{0}, f32[16]{0}) all-gather-start(%p), replica_groups=[2,4]<=[8], \
dimensions={0}, use_global_device_ids=true, \
backend_config={"collective_backend_config":{"is_sync":true}}
        %d2 = f32[16]{0} all-gather-done(%s2)
        %n2 = f32[4]{0} negate(%p)
        %d1 = f32[16]{0} all-gather-done(%s1)
        ROOT %t = (f32[4]{0}, f32[4]{0}, f32[16]{0}, f32[16]{0}) tuple(%n1, %n2, %d1, %d2)
        """
    )
    outer, inner = collectives.collectives(read, loops.executions(read))
    assert (outer.overlap, outer.window, outer.blocking) == (Work(bytes=2 * 32), (1, 6), False)
    assert (inner.overlap, inner.window, inner.blocking) == (Work(), (3, 4), True)


def test_combined_arrays_of_several_types_add():
    found = one(
        """
        %p = f32[4]{0} parameter(0)
        %q = bf16[2,3]{1,0} parameter(1)
        ROOT %r = (f32[4]{0}, bf16[2,3]{1,0}) all-reduce(%p, %q), replica_groups=[1,8]<=[8], \
channel_id=1, use_global_device_ids=true, to_apply=%add
        """,
        ADD,
    )
    assert (found.dtypes, found.result_bytes, found.blocking) == (("f32", "bf16"), 28, True)
    assert found.wire_bytes == 2 * 28 * 7 / 8


@pytest.mark.parametrize(
    ("attributes", "groups"),
    [
        ("channel_id=1, use_global_device_ids=true, replica_groups={{0,1},{2,3},{4,5},{6,7}}", 4),
        ("channel_id=1, use_global_device_ids=true, replica_groups={}", 1),
        ("channel_id=1, replica_groups={{0}}", 1),  # replica 0, all of its partitions
        ("replica_groups={{0}}", 8),  # replicas, of which there is one
    ],
)
def test_groups_mean_what_two_attributes_say(attributes, groups):
    entry = f"""
        %p = f32[4]{{0}} parameter(0)
        ROOT %r = f32[4]{{0}} all-reduce(%p), {attributes}, to_apply=%add
    """
    found = one(entry, ADD)
    assert (len(found.groups), found.group_size) == (groups, 8 // groups)
    assert (found.wire_bytes > 0) == (groups < 8)


def test_a_permute_sends_its_array_once():
    entry = """
        %p = f32[4]{0} parameter(0)
        ROOT %r = f32[4]{0} collective-permute(%p), channel_id=1, source_target_pairs={{0,8},{8,0}}
    """
    found = one(entry.replace("0,8},{8,0", "0,1},{1,0},{2,6},{6,2}"))
    assert (found.wire_bytes, found.groups) == (16, ((0, 1), (2, 6)))
    assert (found.slow_share(8), found.slow_share(4), found.slow_share(1)) == (0, 0.5, 1)
    at_home = one(entry.replace("0,8},{8,0", "0,0},{1,1"))
    assert (at_home.wire_bytes, at_home.slow_share(1)) == (0, 0)
    nowhere = one(entry.replace("{{0,8},{8,0}}", "{}"))
    assert (nowhere.wire_bytes, nowhere.slow_share(1)) == (0, 0)


def test_an_all_to_all_over_hosts_sends_most_of_it_there():
    gather = found_in("collectives_2x2x2")[0]
    exchange = replace(gather, kind="all-to-all", groups=(tuple(range(16)),), pairs=())
    assert exchange.slow_share(8) == 8 / 15
    assert replace(exchange, kind="all-gather").slow_share(8) == 2 / 16


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            f"%p = f32[4]{{0}} parameter(0)\nROOT %s = (f32[4]{{0}}, f32[16]{{0}}) {GATHER}",
            "s of main has no done of its own there",
        ),
        (
            "%p = f32[4]{0} parameter(0)\nROOT %s = f32[16]{0} all-gather(%p), channel_id=1, "
            "use_global_device_ids=true, replica_groups={{0,1,2},{3,4}}, dimensions={0}",
            "are not of one size",
        ),
        (
            "%p = f32[4]{0} parameter(0)\nROOT %s = f32[16]{0} all-gather(%p), channel_id=1, "
            "use_global_device_ids=true, replica_groups={{0,8}}, dimensions={0}",
            "over the module's 8 devices",
        ),
        (
            "%p = f32[4]{0} parameter(0)\nROOT %s = f32[16]{0} all-gather(%p), channel_id=1, "
            "use_global_device_ids=true, replica_groups=everyone, dimensions={0}",
            "replica groups of an unknown form",
        ),
        (
            "%p = f32[4]{0} parameter(0)\n%t = token[] after-all()\n"
            "ROOT %s = (f32[4]{0}, u32[], token[]) send(%p, %t), channel_id=1",
            "s is a send",
        ),
    ],
)
def test_a_collective_that_cannot_be_counted_raises(entry, message):
    read = module(entry)
    with pytest.raises(ValueError, match=message):
        collectives.collectives(read, loops.executions(read))


def test_a_collective_that_nothing_runs_raises_and_copies_to_the_host_do_not():
    dead = """%dead {
  %p = f32[4]{0} parameter(0)
  ROOT %s = f32[4]{0} all-gather(%p), replica_groups={}, dimensions={0}
}
"""
    read = module("ROOT %p = f32[4]{0} parameter(0)", dead)
    with pytest.raises(ValueError, match="s is in dead, which nothing runs"):
        collectives.collectives(read, loops.executions(read))
    to_host = module(
        """
        %p = f32[4]{0} parameter(0)
        %t = token[] after-all()
        ROOT %s = (f32[4]{0}, u32[], token[]) send(%p, %t), channel_id=1, is_host_transfer=true
        """
    )
    assert collectives.collectives(to_host, loops.executions(to_host)) == []
