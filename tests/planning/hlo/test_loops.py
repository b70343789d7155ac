"""How often each computation of a compiled module runs."""

import dataclasses
import itertools
import re

import pytest
from hlo_texts import NAMES, module, module_of

from jax_sft.planning.hlo import loops, parser


def loops_of(name: str) -> list[tuple[parser.Computation, parser.Instruction]]:
    computations = module_of(name).computations.values()
    return [(c, i) for c in computations for i in c.instructions if i.opcode == "while"]


@pytest.mark.parametrize("name", [name for name in NAMES if loops_of(name)])
def test_trip_counts_from_the_condition_equal_those_that_xla_states(name):
    partitioned = {"cpu_partitioned": {6}, "cpu_partitioned_jax_0_12": {6}}
    expected = {"dynamic_loop": {None}, **partitioned}
    for computation, loop in loops_of(name):
        stated = loop.config.get("known_trip_count", {}).get("n")
        silent = re.sub(r", backend_config=\{.*\}", "", loop.attributes_text)
        counted = loops.trip_count(
            module_of(name), computation, dataclasses.replace(loop, attributes_text=silent)
        )
        assert "known_trip_count" not in silent
        if name in expected:
            assert stated is None and {counted} == expected[name]
        else:
            assert counted == int(stated) > 0


def loop_module(start="0", step="add(%i, %one)", test="compare(%j, %n), direction=LT", n="10"):
    return module(
        f"""
        %start = s32[] constant({start})
        %x = f32[4]{{0}} parameter(0)
        %state = (s32[], f32[4]{{0}}) tuple(%start, %x)
        ROOT %loop = (s32[], f32[4]{{0}}) while(%state), condition=%test, body=%body
        """,
        f"""%body {{
  %p = (s32[], f32[4]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %y = f32[4]{{0}} get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %three = s32[] constant(3)
  %six = s32[] add(%three, %three)
  %less = s32[] subtract(%three, %six)
  %next = s32[] {step}
  ROOT %t = (s32[], f32[4]{{0}}) tuple(%next, %y)
}}

%test {{
  %q = (s32[], f32[4]{{0}}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %n = s32[] constant({n})
  ROOT %c = pred[] {test}
}}
""",
    )


def test_trip_counts_equal_those_of_python():
    compare = {
        "LT": lambda a, b: a < b,
        "LE": lambda a, b: a <= b,
        "GT": lambda a, b: a > b,
        "GE": lambda a, b: a >= b,
        "NE": lambda a, b: a != b,
    }
    steps = {"add(%i, %one)": 1, "add(%three, %i)": 3, "add(%i, %less)": -3}
    for direction, start, n, step in itertools.product(compare, (0, 4, 10, -2), (10, 1), steps):
        i, trips = start, 0
        while compare[direction](i, n) and trips < 100:
            i, trips = i + steps[step], trips + 1
        read = loop_module(str(start), step, f"compare(%j, %n), direction={direction}", str(n))
        main = read.computations["main"]
        counted = loops.trip_count(read, main, main.root)
        assert counted == (None if trips == 100 else trips), (direction, start, n, step)


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "multiply(%i, %three)"},
        {"step": "subtract(%one, %i)"},
        {"test": "compare(%n, %j), direction=GT"},
        {"test": "compare(%j, %n), direction=EQ"},
        {"n": "nan"},
    ],
)
def test_a_loop_of_another_form_has_no_trip_count(changes):
    read = loop_module(**changes)
    main = read.computations["main"]
    assert loops.trip_count(read, main, main.root) is None


def test_a_loop_that_only_data_ends_needs_an_expectation():
    read = module_of("dynamic_loop")
    with pytest.raises(ValueError, match=r"trip count of while\.8 \(jit\(dyn\)/while\) depends on"):
        loops.executions(read)
    counts = loops.executions(read, dynamic=lambda loop: 2.5 if loop.name == "while.8" else 99)
    [(_, loop)] = loops_of("dynamic_loop")
    assert counts[loop.callee("body")] == 2.5 and counts[loop.callee("condition")] == 3.5


def test_loops_within_loops_multiply_and_every_call_adds():
    read = module(
        """
        %s = (s32[]) parameter(0)
        %w = (s32[]) while(%s), condition=%c, body=%outer, \
backend_config={"known_trip_count":{"n":"3"}}
        %f = f32[] fusion(), kind=kLoop, calls=%shared
        ROOT %g = f32[] call(), to_apply=%shared
        """,
        """%c {
  %p = (s32[]) parameter(0)
  ROOT %r = pred[] constant(true)
}
%add {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %r = f32[] add(%a, %b)
}
%shared {
  %k = f32[] constant(0)
  ROOT %r = f32[] reduce(%k, %k), dimensions={}, to_apply=%add
}
%inner {
  %p = (s32[]) parameter(0)
  %f = f32[] fusion(), kind=kLoop, calls=%shared
  ROOT %r = (s32[]) tuple(%f)
}
%outer {
  %p = (s32[]) parameter(0)
  ROOT %w = (s32[]) while(%p), condition=%c, body=%inner, \
backend_config={"known_trip_count":{"n":"7"}}
}
%dead {
  ROOT %r = f32[] call(), to_apply=%shared
}
""",
    )
    assert loops.executions(read) == {
        "main": 1,
        "outer": 3,
        "inner": 21,
        "c": 4 + 3 * 8,  # a condition runs once more than its body
        "shared": 21 + 2,
    }


def test_each_branch_counts_once_unless_told():
    read = module_of("branches")
    branches = ("region_0.0_spmd", "region_1.0_spmd")
    counts = loops.executions(read)
    assert [counts[name] for name in branches] == [1, 1]
    counts = loops.executions(read, branches=lambda conditional: [0.25, 0.75])
    assert [counts[name] for name in branches] == [0.25, 0.75]
    with pytest.raises(ValueError):
        loops.executions(read, branches=lambda conditional: [1.0])
