"""Matrix products, bytes and buffers of compiled modules, against hand arithmetic."""

import pytest
from hlo_texts import NAMES, PER_LAYER, D, F, H, K, L, N, T, V, counts_of, module, module_of

from jax_sft.planning.hlo import kernels


def flops_of(name: str) -> float:
    return sum(gemm.step_flops for gemm in kernels.gemms(module_of(name), counts_of(name)))


LAYER = 2 * PER_LAYER * T  # one pass of a layer's matrices over a device's tokens
SCORES = 2 * 2 * T * T * N * H  # q k and p v of one layer, both halves of the causal square
HEAD = 2 * T * V * D


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        # Forward and twice as much backward; this step computes the logits again.
        ("step_no_remat", L * 3 * (LAYER + SCORES) + 4 * HEAD),
        # And forward again, but for the last product of a layer, which nothing needs.
        *(
            (name, L * 4 * (LAYER + SCORES) - L * 2 * D * F * T + 4 * HEAD)
            for name in NAMES
            if name.startswith("step_") and name != "step_no_remat"
        ),
    ],
)
def test_the_flops_of_a_step_are_those_of_the_model(name, flops):
    assert flops_of(name) == flops


def test_products_within_fusions_of_the_cpu_are_those_before_fusing():
    assert flops_of("cpu_compiled") == flops_of("cpu_partitioned") == 6 * 4 * 2 * 256 * 128 * 128
    compiled = module_of("cpu_compiled")
    products = kernels.gemms(compiled, counts_of("cpu_compiled"))
    assert len({product.computation for product in products} & compiled.fused) == 3


def test_products_are_read_exactly():
    read = kernels.gemms(module_of("products"), counts_of("products"))
    assert [(g.batch, g.m, g.n, g.k, g.is_float32, g.opcode) for g in read] == [
        (1, 128, 512, 256, True, "__cublas$lt$matmul"),
        (4, 256, 128, 256, True, "__cublas$lt$matmul"),
        (4, 128, 256, 256, True, "__cublas$lt$matmul"),
    ]
    [convolution] = kernels.gemms(module_of("convolution"), counts_of("convolution"))
    assert convolution.flops == 2 * (2 * 32 * 32) * 32 * (3 * 3 * 16)
    assert not convolution.is_float32
    # The gradient of this step's loss forms the head's products in float32.
    step = kernels.gemms(module_of("step_fsdp8"), counts_of("step_fsdp8"))
    large = {tuple(sorted((g.m, g.n, g.k))) for g in step if g.is_float32 and V in (g.m, g.n, g.k)}
    assert large == {(1024, D, V)}


def test_a_dot_of_any_order_of_dimensions():
    read = module(
        """
        %a = bf16[5,2,7,3]{3,2,1,0} parameter(0)
        %b = f8e4m3fn[3,11,7,2]{3,2,1,0} parameter(1)
        ROOT %d = f32[7,3,5,11]{3,2,1,0} dot(%a, %b), lhs_batch_dims={2,3}, rhs_batch_dims={2,0}, \
lhs_contracting_dims={1}, rhs_contracting_dims={3}, metadata={op_name="here"}
        """
    )
    [gemm] = kernels.gemms(read, {"main": 3.0})
    assert (gemm.batch, gemm.m, gemm.n, gemm.k) == (21, 5, 11, 2)
    assert (gemm.lhs, gemm.rhs, gemm.out, gemm.op_name) == ("bf16", "f8e4m3fn", "f32", "here")
    assert (gemm.flops, gemm.step_flops) == (2 * 21 * 5 * 11 * 2, 3 * 2 * 21 * 5 * 11 * 2)


def test_an_asynchronous_product_is_counted_once():
    read = module(
        """
        %a = f32[2,3]{1,0} parameter(0)
        %s = ((f32[2,3]{1,0}, f32[2,3]{1,0}), (f32[2,2]{1,0}, s8[64]{0}), u32[]) \
custom-call-start(%a, %a), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{\
"lhs_batch_dimensions":[],"rhs_batch_dimensions":[],\
"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]}}}
        ROOT %d = (f32[2,2]{1,0}, s8[64]{0}) custom-call-done(%s)
        """
    )
    [gemm] = kernels.gemms(read, {"main": 1.0})
    assert (gemm.m, gemm.n, gemm.k, gemm.out) == (2, 2, 3, "f32")
    assert kernels.opaque_calls(read, {"main": 1.0}) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('custom-call(%a, %a), custom_call_target="__cublas$lt$novel"', "calls __cublas.lt.novel"),
        ('custom-call(%a, %a), custom_call_target="__cudnn$convBackwardInput"', "calls __cudnn"),
        ("ragged-dot(%a, %a)", "is a ragged-dot"),
        ("dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={1}", "does not give"),
        ("dot(%a, %a), lhs_contracting_dims={0}, rhs_contracting_dims={1}", "do not contract"),
    ],
)
def test_a_product_of_no_known_form_raises(line, message):
    read = module(f"%a = f32[2,3]{{1,0}} parameter(0)\nROOT %d = f32[2,3]{{1,0}} {line}")
    with pytest.raises(ValueError, match=message):
        kernels.gemms(read, {"main": 1.0})


def test_calls_of_unknown_work_are_listed():
    read = module(
        """
        %q = bf16[1,8,2,64]{3,2,1,0} parameter(0)
        %buffer = f32[4]{0} custom-call(), custom_call_target="AllocateBuffer"
        ROOT %o = (bf16[1,8,2,64]{3,2,1,0}, u8[16]{0}) custom-call(%q, %q), \
custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="attention"}
        """
    )
    [call] = kernels.opaque_calls(read, {"main": 2.0})
    assert (call.target, call.count, call.op_name) == ("__cudnn$fmhaSoftmax", 2.0, "attention")
    assert [len(shapes) for shapes in (call.operands, call.results)] == [2, 2]
    for name in NAMES:
        assert kernels.opaque_calls(module_of(name), counts_of(name)) == []


def test_products_of_newer_text_are_those_of_the_program():
    products = 6 * 4 * 2 * 128 * 1024 * 1024
    assert flops_of("loops_and_scatter_jax_0_12") == products
    assert flops_of("cpu_partitioned_jax_0_12") == 6 * 4 * 2 * 128 * 128 * 128


# ---- bytes and buffers -------------------------------------------------------------------------


def test_fusions_move_what_they_slice_and_update_and_not_the_whole():
    read = module(
        """
        %w = f32[28,100]{1,0} parameter(0)
        %i = s32[] parameter(1)
        %f = f32[1,50]{1,0} fusion(%w, %i), kind=kLoop, calls=%part
        %u = (f32[28,100]{1,0}, f32[50]{0}) fusion(%w, %f, %i), kind=kLoop, calls=%update
        %c = f32[28,100]{1,0} copy(%w)
        %s = f32[3,100]{1,0} slice(%c), slice={[0:3], [0:100]}
        ROOT %t = (f32[28,100]{1,0}) tuple(%c)
        """,
        """%part {
  %a = f32[28,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %view = f32[28,2,50]{2,1,0} bitcast(%a)
  %d = f32[1,1,50]{2,1,0} dynamic-slice(%view, %i, %i, %i), dynamic_slice_sizes={1,1,50}
  ROOT %r = f32[1,50]{1,0} bitcast(%d)
}
%update {
  %a = f32[28,100]{1,0} parameter(0)
  %b = f32[1,50]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %n = f32[1,50]{1,0} negate(%b)
  %d = f32[28,100]{1,0} dynamic-update-slice(%a, %n, %i, %i)
  %e = f32[50]{0} bitcast(%n)
  ROOT %r = (f32[28,100]{1,0}, f32[50]{0}) tuple(%d, %e)
}
""",
    )
    main = read.computations["main"]
    bytes_of = {i.name: kernels.work(read, {}, main, i).bytes for i in main.instructions}
    assert bytes_of == {
        "w": 0,
        "i": 0,
        "f": 200 + 4 + 200,  # reads the slice and the index, writes the result
        "u": 0 + 200 + 4 + 200 + 200,  # updates in place
        "c": 2 * 11200,
        "s": 2 * 1200,
        "t": 0,
    }


def step_work(name: str) -> kernels.Work:
    """The work of a whole step."""
    module = module_of(name)
    return kernels.computation_work(module, counts_of(name), module.computations[module.entry])


def test_the_work_of_a_step_is_that_of_its_loops():
    for name in NAMES:
        total = step_work(name)
        assert total.flops == pytest.approx(flops_of(name), rel=1e-12)
    small = step_work("loops_and_scatter")
    assert small.bytes > 6 * 4 * 128 * 1024  # at the least each layer's part of the gradient


def test_buffers_are_what_kernels_write_and_arguments():
    found = kernels.buffers(module_of("step_fsdp8"), at_least_bytes=2**30)
    assert [buffer.bytes for buffer in found] == sorted((b.bytes for b in found), reverse=True)
    assert (found[0].dtype, found[0].dims, found[0].bytes) == ("f32", (V, D), 4 * V * D)
    assert len({(b.dtype, b.dims) for b in found}) == len(found)  # one entry per shape
    everything = kernels.buffers(module_of("step_fsdp8"))
    shard = next(b for b in everything if (b.dtype, b.dims) == ("f32", (V, D // 8)))
    assert shard.count > 6  # weight and two moments of two tables, and what is made of them
    assert {b.on_host for b in everything} == {False}


def test_a_buffer_with_two_dimensions_is_found_in_any_view():
    step = module_of("step_fsdp8")
    squares = kernels.with_dims(step, (T, T))  # reference attention has them
    assert squares and all(b.dims.count(T) >= 2 for b in squares)
    assert (1, K, N // K, T, T) in {b.dims for b in squares}
    assert kernels.with_dims(step, (T, V)) == []  # the loss works in chunks of 1024 tokens
    assert kernels.with_dims(step, (1024, V), at_least_bytes=4 * 1024 * V)
    assert kernels.with_dims(step, (V, D, D)) == []
    hidden = module(
        """
        %q = f32[4,8,16]{2,1,0} parameter(0)
        %v = f32[4,8,2,8]{3,2,1,0} bitcast(%q)
        ROOT %f = f32[] fusion(%q), kind=kLoop, calls=%inside
        """,
        "%inside {\n  %p = f32[4,8,16]{2,1,0} parameter(0)\n"
        "  %big = f32[999,999]{1,0} broadcast(%p)\n  ROOT %r = f32[] constant(0)\n}\n",
    )
    assert [b.opcode for b in kernels.with_dims(hidden, (8, 8))] == ["bitcast"]
    assert kernels.with_dims(hidden, (999, 999)) == []  # it never leaves the kernel
    assert [b.dims for b in kernels.buffers(hidden)] == [(4, 8, 16), ()]


def test_offloaded_buffers_are_told_from_those_of_the_device():
    found = kernels.buffers(module_of("offload"))
    assert {b.dims for b in found if b.on_host} == {(6, 256, 1024)}
    assert (6, 256, 1024) not in {b.dims for b in found if not b.on_host}


def test_an_asynchronous_kernel_moves_what_the_kernel_moves_and_a_collective_in_one_nothing():
    read, counts = module_of("loops_and_scatter_jax_0_12"), counts_of("loops_and_scatter_jax_0_12")
    body = read.computations["region_0.1_spmd"]
    moved = {
        instruction.name: kernels.work(read, counts, body, instruction).bytes
        for instruction in body.instructions
        if instruction.base == "fusion" and instruction.opcode != "fusion"
    }
    layer, index = 128 * 1024 * 4, 4
    assert moved == {
        "fusion-start.3": 2 * layer + index,  # reads one layer of a stack and writes it
        "fusion-start.4": 2 * layer + index,  # writes one into a stack
        "fusion-done.3": 0,
        "fusion-done.4": 0,
    }
    read, counts = module_of("part_of_an_axis_jax_0_12"), counts_of("part_of_an_axis_jax_0_12")
    entry = read.computations[read.entry]
    assert kernels.computation_work(read, counts, entry) == kernels.Work()
