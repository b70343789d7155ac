"""The text of compiled modules is read whole and exactly; nothing is skipped."""

import re
import subprocess
import sys

import pytest
from hlo_texts import FOLDER, NAMES, module, module_of, text_of

from jax_sft.planning.hlo import parser


@pytest.mark.parametrize("name", NAMES)
def test_every_instruction_of_real_text_is_read(name):
    text = text_of(name)
    instructions = [i for c in module_of(name).computations.values() for i in c.instructions]
    read = [i for i in instructions if "#" not in i.name]  # the others have no line
    assert len(read) == len(re.findall(r"^  (?:ROOT )?%", text, re.MULTILINE)) > 0
    # Each line is there again: name, opcode, and the attributes with nothing between lost.
    for instruction in read:
        rebuilt = ", ".join(f"{key}={value}" for key, value in instruction.attributes.items())
        assert rebuilt == instruction.attributes_text
    assert module_of(name).is_scheduled == (not name.startswith("cpu_partitioned"))
    assert module_of(name).num_devices == (16 if name == "step_two_hosts" else 8)


@pytest.mark.parametrize(
    ("text", "bytes"),
    [
        ("f32[]", 4),
        ("bf16[3,5]{1,0}", 30),
        ("pred[7]{0}", 7),
        ("s4[3]{0:E(4)}", 2),
        ("f8e4m3fn[8,2]{1,0:T(8,128)(4,1)}", 16),
        ("c64[2]", 16),
        ("f32[<=8,2]{1,0}", 64),
        ("f32[0,4]{1,0}", 0),
        ("token[]", 0),
        ("()", 0),
        ("(f32[2]{0}, (s32[], u8[3]{0:S(5)}), ())", 15),
    ],
)
def test_the_size_of_a_shape(text, bytes):
    read = module(f"ROOT %x = {text} opaque()").computations["main"].root
    assert read.bytes == sum(shape.bytes for shape in read.shapes) == bytes


def test_shapes_keep_their_nesting_and_their_memory():
    inner, outer = parser.parse_type("((bf16[4]{0:S(5)}, s32[]), f32[2,3]{0,1})")
    assert [shape.on_host for shape in inner] == [True, False]
    assert outer == parser.Shape("f32", (2, 3), "0,1")
    for wrong in ("f32", "f32[2] x", "q7[2]", "(f32[2]"):
        with pytest.raises((ValueError, IndexError)):
            parser.parse_type(wrong)


def test_strings_and_brackets_hide_no_commas():
    read = module(
        r"""
        %a = f32[2]{0} constant({1, 2}), metadata={op_name="f(\"x, y=}\")/g" source_line=3}
        %b = c64[] constant((1, -2)), sharding={devices=[2,4]<=[4,2]T(1,0) last_tile_dims={manual}}
        %c = (f32[2]{0}, /*index=1*/c64[]) tuple(%a, %b), frontend_attributes={k="),{",mesh={a=[]}}
        ROOT %d = u8[] custom-call(%a), custom_call_target="(,", backend_config="{\"a\":\", }\"}"
        """
    ).computations["main"]
    a, b, c, d = read.instructions
    assert (a.literal, a.op_name, a.operands) == ("{1, 2}", 'f("x, y=}")/g', ())
    assert b.literal == "(1, -2)"
    assert b.attributes == {"sharding": "{devices=[2,4]<=[4,2]T(1,0) last_tile_dims={manual}}"}
    assert (c.operands, len(c.shapes)) == (("a", "b"), 2)
    assert c.attributes == {"frontend_attributes": '{k="),{",mesh={a=[]}}'}
    assert (d.config, list(d.attributes)) == (
        {"a": ", }"},
        ["custom_call_target", "backend_config"],
    )


def test_names_without_percent_and_operands_with_types_are_the_same_module():
    text = text_of("loops_and_scatter")
    # Everything but strings loses its percent signs.
    bare = "".join(
        p if p[0] == '"' else p.replace("%", "") for p in re.split(r'("[^"]*")', text) if p
    )
    for plain, ours in zip(
        parser.parse(bare).computations.values(),
        module_of("loops_and_scatter").computations.values(),
        strict=True,
    ):
        for one, other in zip(plain.instructions, ours.instructions, strict=True):
            assert (one.operands, one.callees) == (other.operands, other.callees)
            assert (one.name, one.type, one.opcode) == (other.name, other.type, other.opcode)
    typed = module(
        """
        p = (f32[2,2]{1,0}, s32[]) parameter(0)
        g = f32[2,2]{1,0} get-tuple-element((f32[2,2]{1,0}, s32[]) p), index=0
        ROOT d = f32[2,2]{1,0} dot(f32[2,2]{1,0} g, f32[2,2]{1,0} g), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}
        """
    )
    assert [i.operands for i in typed.computations["main"].instructions] == [(), ("p",), ("g", "g")]


def test_elements_of_the_compact_form_are_get_tuple_elements():
    entry = """
        %p = ((f32[2]{0}, s32[]), pred[3]{0}) parameter(0)
        %a = f32[2]{0} negate(%p#0#0)
        %b = s32[] add(%p#0#1, s32[] %p#0#1)
        ROOT %t = (f32[2]{0}, s32[], pred[3]{0}) tuple(%a, %b, p#1)
    """
    instructions = module(entry).computations["main"].instructions
    elements = {i.name: i for i in instructions if i.opcode == "get-tuple-element"}
    assert [(i.name, i.operands, i.attributes) for i in elements.values()] == [
        ("p#0", ("p",), {"index": "0"}),
        ("p#0#0", ("p#0",), {"index": "0"}),
        ("p#0#1", ("p#0",), {"index": "1"}),
        ("p#1", ("p",), {"index": "1"}),
    ]
    assert [i.type for i in elements.values()] == [
        (parser.Shape("f32", (2,), "0"), parser.Shape("s32", ())),
        parser.Shape("f32", (2,), "0"),
        parser.Shape("s32", ()),
        parser.Shape("pred", (3,), "0"),
    ]
    order = [i.name for i in instructions]
    assert order == ["p", "p#0", "p#0#0", "a", "p#0#1", "b", "p#1", "t"]
    for wrong in ("%p#2", "%p#0#0#0", "%p#x", "%p#"):
        with pytest.raises(ValueError, match="is not an element of a tuple"):
            module(entry.replace("%p#0#0", wrong))
    with pytest.raises(ValueError, match="a of main reads q#0, which is not there"):
        module(entry.replace("%p#0#0", "%q#0"))


def test_tables_of_source_lines_are_passed_over():
    text = """HloModule m

FileNames
1 "/a { b/%x = f32[] y(.py"

FunctionNames
1 "<module>"

FileLocations
1 {file_name_id=1 function_name_id=1 line=14 end_line=14 column=12 end_column=12}

StackFrames
1 {file_location_id=1 parent_frame_id=1}


ENTRY %main (p: f32[]) -> f32[] {
  ROOT %p = f32[] parameter(0)
}, execution_thread="main"
"""
    read = parser.parse(text)
    assert (read.name, list(read.computations), read.is_scheduled) == ("m", ["main"], False)
    assert read.num_devices == 1
    with pytest.raises(ValueError, match="line 3 of the HLO text is not understood: Novelties"):
        parser.parse(text.replace("FileNames", "Novelties"))


def test_text_that_is_cut_short_anywhere_raises():
    lines = text_of("branches").strip().splitlines()
    for end in range(len(lines)):
        with pytest.raises(ValueError):
            parser.parse("\n".join(lines[:end]))


def test_text_that_lacks_a_line_that_is_needed_raises():
    lines = text_of("branches").splitlines()
    read = 0
    for left_out in range(len(lines)):
        if not lines[left_out].strip():
            continue
        try:
            parser.parse("\n".join(lines[:left_out] + lines[left_out + 1 :]))
        except ValueError:
            continue
        # What nothing reads can be missed by nobody: a parameter, or a product's workspace.
        assert re.search(r"(parameter|get-tuple-element)\(", lines[left_out])
        read += 1
    assert read < 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ROOT %a = f32[2] all-gather", "line 5 of the HLO text is not an instruction"),
        ("ROOT %a = f32[2]{0} while(%b, condition=%c", "no end of operands"),
        ("ROOT %a = f32[2]{0} iota() dimension", "ends in an unknown way"),
        ("ROOT %a = f32[2]{0} negate(%b)", "a of main reads b, which is not there"),
        ("ROOT %a = f32[2]{0} call(), to_apply=%gone", "a calls gone, which is not in the text"),
        ("%a = f32[2]{0} iota()", "0 roots"),
        ("ROOT %a = x9[2]{0} iota()", "unknown HLO element type 'x9'"),
        ("ROOT %a = f32[2]{0} call(), what, to_apply=%f", "not an attribute"),
    ],
)
def test_what_is_not_understood_raises(line, message):
    with pytest.raises(ValueError, match=message):
        module(line)


def test_several_replicas_are_refused():
    with pytest.raises(ValueError, match="several replicas"):
        module("ROOT %a = f32[] constant(1)", header="replica_count=2")


def test_donated_arguments_are_read():
    header = "input_output_alias={ {0}: (1, {}, may-alias), {1,2}: (3, {4}, must-alias) }"
    read = module("ROOT %a = f32[] constant(1)", header=header)
    assert read.aliases == (
        parser.Alias((0,), 1, (), "may-alias"),
        parser.Alias((1, 2), 3, (4,), "must-alias"),
    )
    step = module_of("step_fsdp8")
    assert [alias.output for alias in step.aliases] == [(n,) for n in range(48)]
    assert len(step.computations["main.85_spmd"].parameters) == 48 + 5  # the state and a batch


def test_reading_needs_no_jax():
    names = "parser device_groups loops kernels collectives".split()
    code = "import sys; " + "; ".join(f"import jax_sft.planning.hlo.{name}" for name in names)
    code += "; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=FOLDER.parent.parent).returncode == 0
