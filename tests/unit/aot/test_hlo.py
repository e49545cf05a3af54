"""Reading a compiled program: shapes, memory spaces, trip counts, source lines, and what it costs."""

import re

import pytest

from MaxText.aot import cost, hlo, topologies
from MaxText.kernels import flash, flash_blocks

PROGRAM = """\
HloModule jit_step, is_scheduled=true

FileNames
1 "/project/MaxText/layers/mlp.py"
2 "/elsewhere/optax/update.py"

FunctionNames
1 "call"

FileLocations
1 {file_name_id=1 function_name_id=1 line=28 end_line=28 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=7 end_line=7 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%product (a: bf16[512,256], b: bf16[256,128]) -> bf16[512,128] {
  %a = bf16[512,256]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[256,128]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %dot = bf16[512,128]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}

%slice_of_stack (stack: f32[4,1000], i: s32[]) -> f32[1,1000] {
  %stack = f32[4,1000]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %ds = f32[1,1000]{1,0} dynamic-slice(%stack, %i), dynamic_slice_sizes={1,1000}
}

%body (state: (s32[], f32[4,1000])) -> (s32[], f32[4,1000]) {
  %state = (s32[], f32[4,1000]{1,0}) parameter(0)
  %count = s32[] get-tuple-element(%state), index=0
  %stacked = f32[4,1000]{1,0} get-tuple-element(%state), index=1
  %layer = f32[1,1000]{1,0} fusion(%stacked, %count), calls=%slice_of_stack, metadata={stack_frame_id=2} cycles 10
  %sum = f32[1000]{0:S(1)} all-reduce(%layer), replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %next = (s32[], f32[4,1000]{1,0}) tuple(%count, %stacked)
}

%condition (state: (s32[], f32[4,1000])) -> pred[] {
  %state.1 = (s32[], f32[4,1000]{1,0}) parameter(0)
  %count.1 = s32[] get-tuple-element(%state.1), index=0
  %limit = s32[] constant(6)
  ROOT %less = pred[] compare(%count.1, %limit), direction=LT
}

ENTRY %main (x: bf16[512,256], w: bf16[256,128], start: (s32[], f32[4,1000])) -> bf16[512,128] {
  %x = bf16[512,256]{1,0:T(8,128)(2,1)} parameter(0)
  %w = bf16[256,128]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %start = (s32[], f32[4,1000]{1,0}) parameter(2)
  %loop = (s32[], /*index=1*/f32[4,1000]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %out = bf16[512,128]{1,0} fusion(%x, %w), calls=%product, metadata={stack_frame_id=1} cycles 1000
}
"""
PROGRAM = re.sub(r" cycles (\d+)", r', backend_config={"estimated_cycles":"\1"}', PROGRAM)


def test_shapes_know_their_size_and_their_memory():
    (hbm, vmem) = hlo.shapes("(bf16[8,512]{1,0:T(8,128)(2,1)}, f32[]{:T(128)S(1)})")
    assert (hbm.bytes, hbm.in_hbm, vmem.bytes, vmem.in_hbm) == (8 * 512 * 2, True, 4, False)


def test_loops_are_walked_as_often_as_they_run():
    executed = [(i.name, times) for i, times in hlo.parse(PROGRAM).scheduled()]
    assert ("layer", 6) in executed
    assert ("out", 1) in executed


def test_source_lines_are_the_projects_own():
    module = hlo.parse(PROGRAM)
    assert module.source(module.instructions["out"], "/project") == "MaxText/layers/mlp.py:28"
    assert module.source(module.instructions["layer"], "/project") == "MaxText/layers/mlp.py:28"  # through Optax


def test_cost_counts_cycles_of_products_slices_of_stacks_and_collectives_by_axis():
    found = cost.account(hlo.parse(PROGRAM), "v5e", 1e9, {"data": 2, "fsdp": 2})
    assert found.plain_cycles == 6 * 10 + 1000
    assert found.matmul_seconds == pytest.approx(1000 / 1.5e9)
    # A layer is read from its stack and written: 2 x 4,000 bytes, six times; the step counter is in HBM too.
    assert found.memory_seconds == pytest.approx(6 * (2 * 4000 + 4) / 1e9)
    # x is in HBM and w is not.
    # Of the sum of layers, what is read is in HBM, and the result is not.
    assert found.hbm_bytes == 6 * (2 * 4000 + 4) + 6 * 4000 + 512 * 256 * 2 + 512 * 128 * 2
    collective = found.collectives["all-reduce", "fsdp"]
    assert (collective.count, collective.bytes) == (6, 6 * 4000)
    assert collective.seconds > 0
    assert collective.exposed_seconds == pytest.approx(collective.seconds)


def test_an_unreadable_trip_count_is_an_error():
    module = hlo.parse(PROGRAM.replace("constant(6)", "add(%count.1, %count.1)"))
    with pytest.raises(ValueError, match="trip count of loop cannot be read"):
        list(module.scheduled())


@pytest.mark.parametrize(
    ("name", "chips", "single"), [("v5e-8", 8, True), ("v6e-8-2hosts", 8, False), ("v5litepod-16", 16, False)]
)
def test_topologies_by_name(name, chips, single):
    found = topologies.parse(name)
    assert (found.chips, found.single_host) == (chips, single)


@pytest.mark.parametrize("name", ["v5e-3", "v4-8", "v5e", "v6e-16-2hosts"])
def test_unknown_topologies_are_named_with_what_is_known(name):
    with pytest.raises(ValueError, match=f"compile_topology='{name}' is not known; known are v5e-N"):
        topologies.parse(name)


FLASH = """\
ENTRY %main (q: bf16[2,6,2,4096,128]) -> bf16[2,6,4096,256] {
  %q = bf16[2,6,2,4096,128]{4,3,2,1,0} parameter(0)
  %k = bf16[2,2,2,4096,128]{4,3,2,1,0} parameter(1)
  %weight = f32[2,6,1,4096]{3,2,1,0} parameter(2)
  %v = bf16[2,2,4096,256]{3,2,1,0} parameter(3)
  %s = s32[2,1,4096]{2,1,0} parameter(4)
  ROOT %jvp_flash_2_forward_.1 = bf16[2,6,4096,256]{3,2,1,0} custom-call(%q, %q, %k, %k, %weight, %v, %s, %s), \
custom_call_target="tpu_custom_call"
}
"""


def test_our_kernels_take_the_simulators_cycles(monkeypatch):
    blocks = flash.Blocks(512, 512, 256)
    row = {"forward": (blocks, 7000), "backward": (blocks, 1)}
    monkeypatch.setattr(flash_blocks, "TABLE", {("TPU v5 lite", "bfloat16", 2, 128, 256): {2048: row}})
    module = hlo.parse(FLASH)
    cycles = 7000 * 2**2 * 2 * 6  # twice the length, two rows of the batch, six heads
    assert cost.kernel_cycles(module, module.instructions["jvp_flash_2_forward_.1"], "v5e") == cycles
    # On v5e the cycles are the longer, on v6e, which the table does not have, the bytes.
    for family, seconds, unknown in (("v5e", cycles / 1.5e9, 0), ("v6e", None, 1)):
        spent = cost.account(module, family, 1e15, {"data": 1})
        assert len(spent.pallas_unknown) == unknown
        assert spent.pallas_seconds == pytest.approx(seconds or spent.pallas_bytes / 1e15)


CHAIN = """\
%started (w: bf16[96,4096]) -> (bf16[96,4096]) {
  %w = bf16[96,4096]{1,0} parameter(0)
  %gather = bf16[768,4096]{1,0} all-gather(%w), channel_id=6, replica_groups=mesh['a'=8,'b'=1] {'a'}, dimensions={0}
  ROOT %begun = (bf16[96,4096]{1,0}) custom-call(%gather), custom_call_target="AsyncCollectiveStart"
}

%meanwhile (x: bf16[512,256], y: bf16[256,128], w.1: bf16[96,4096]) -> bf16[512,128] {
  %x = bf16[512,256]{1,0} parameter(0)
  %y = bf16[256,128]{1,0} parameter(1)
  %w.1 = bf16[96,4096]{1,0} parameter(2)
  %gather.1 = bf16[768,4096]{1,0} all-gather(%w.1), channel_id=6, replica_groups=mesh['a'=8,'b'=1] {'a'}, dimensions={0}
  ROOT %dot = bf16[512,128]{1,0} convolution(%x, %y), dim_labels=bf_io->bf
}

%ended (w.2: bf16[96,4096]) -> bf16[768,4096] {
  %w.2 = bf16[96,4096]{1,0} parameter(0)
  %gather.2 = bf16[768,4096]{1,0} all-gather(%w.2), channel_id=6, replica_groups=mesh['a'=8,'b'=1] {'a'}, dimensions={0}
  ROOT %over = bf16[768,4096]{1,0} custom-call(%w.2, %gather.2), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.1 (g: f32[768,64]) -> f32[96,64] {
  %g = f32[768,64]{1,0} parameter(0)
  %sum = f32[768,64]{1,0} all-reduce(%g), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %mine = f32[96,64]{1,0} dynamic-slice(%sum), dynamic_slice_sizes={96,64}
}

ENTRY %main (p: bf16[96,4096], q: bf16[512,256], r: bf16[256,128], s: f32[768,64]) -> bf16[768,4096] {
  %p = bf16[96,4096]{1,0} parameter(0)
  %q = bf16[512,256]{1,0} parameter(1)
  %r = bf16[256,128]{1,0} parameter(2)
  %s = f32[768,64]{1,0} parameter(3)
  %one = (bf16[96,4096]{1,0}) fusion(%p), calls=%started
  %two = bf16[512,128]{1,0} fusion(%q, %r, %p), calls=%meanwhile cycles 15000
  %three = f32[96,64]{1,0} fusion(%s), calls=%all-reduce-scatter.1
  ROOT %four = bf16[768,4096]{1,0} fusion(%p), calls=%ended
}
"""
CHAIN = re.sub(r" cycles (\d+)", r', backend_config={"estimated_cycles":"\1"}', CHAIN)


def test_a_collective_beside_a_product_is_hidden_as_long_as_the_product_takes():
    spent = cost.account(hlo.parse(CHAIN), "v5e", 1e15, {"data": 1, "fsdp": 8, "tensor": 1})
    assert spent.matmul_seconds == pytest.approx(15000 / 1.5e9)
    gather = spent.collectives["all-gather", "fsdp"]
    assert (gather.count, gather.bytes) == (1, 768 * 4096 * 2)
    assert gather.seconds == pytest.approx(768 * 4096 * 2 * 7 / 8 / 100e9)
    scatter = spent.collectives["reduce-scatter", "fsdp"]
    assert scatter.seconds == pytest.approx(96 * 64 * 4 * 7 / 100e9)
    assert spent.exposed_seconds == pytest.approx(gather.seconds + scatter.seconds - 15000 / 1.5e9)


def entry(*lines):
    """A program of these lines."""
    return hlo.parse("ENTRY %main (p: f32[]) -> f32[] {\n" + "".join(f"  {line}\n" for line in lines) + "}\n")


def account_of(*lines, slices=None):
    return cost.account(entry(*lines), "v5e", 1e9, {"data": 2, "fsdp": 2, "tensor": 1}, slices)


@pytest.mark.parametrize(
    ("pairs", "axes"),
    [
        ("{0,1},{2,3}", "fsdp"),
        ("{0,1},{1,0},{2,3},{3,2}", "fsdp"),
        ("{0,2},{1,3}", "data"),
        ("{0,1},{1,2},{2,3},{3,0}", "data+fsdp"),
    ],
)
def test_a_permute_runs_over_the_axes_that_its_pairs_join(pairs, axes):
    spent = account_of(
        "%p = f32[1000]{0} parameter(0)",
        f"%permute = f32[1000]{{0}} collective-permute(%p), channel_id=1, source_target_pairs={{{pairs}}}",
    )
    assert list(spent.collectives) == [("collective-permute", axes)]


def test_every_branch_of_a_conditional_is_walked():
    branch = """%{0} (q: f32[10]) -> f32[10] {{
  %q.{0} = f32[10]{{0}} parameter(0)
  ROOT %{0}.copy = f32[10]{{0}} copy(%q.{0})
}}
"""
    chosen = """ENTRY %main (i: s32[], p: f32[10]) -> f32[10] {
  %i = s32[] parameter(0)
  %p = f32[10]{0} parameter(1)
  ROOT %one = f32[10]{0} conditional(%i, %p, %p), branch_computations={%left, %right}
}
"""
    module = hlo.parse(branch.format("left") + branch.format("right") + chosen)
    assert {"left.copy", "right.copy"} <= {instruction.name for instruction, _ in module.scheduled()}
    assert cost.account(module, "v5e", 1e9, {"data": 1}).hbm_bytes == 2 * 2 * 40


def test_of_a_table_only_the_gathered_rows_are_read():
    spent = account_of(
        "%p = f32[50000,16]{1,0} parameter(0)",
        "%rows = s32[8]{0} parameter(1)",
        "%gather.1 = f32[8,16]{1,0} gather(%p, %rows), offset_dims={1}, slice_sizes={1,16}",
    )
    assert spent.hbm_bytes == 2 * 8 * 16 * 4 + 8 * 4


def test_collectives_share_the_links_behind_one_product():
    groups = "replica_groups={{0,1},{2,3}}, dimensions={0}"
    product = """%p = f32[500000]{0} parameter(0)
  %a = (f32[500000]{0}, f32[1000000]{0}) all-gather-start(%p), GROUPS
  %b = (f32[500000]{0}, f32[1000000]{0}) all-gather-start(%p), GROUPS
  %dot = f32[8]{0:S(1)} dot(%x, %x), backend_config={"estimated_cycles":"45000"}
  %x = f32[8]{0:S(1)} parameter(1)
  %a.done = f32[1000000]{0} all-gather-done(%a)
  %b.done = f32[1000000]{0} all-gather-done(%b)"""
    gather = account_of(product.replace("GROUPS", groups)).collectives["all-gather", "fsdp"]
    assert gather.seconds == pytest.approx(2 * 20e-6)  # 2 MB sent at 100 GB/s, twice
    assert gather.exposed_seconds == pytest.approx(gather.seconds - 45000 / 1.5e9)


HOST, CHIP = "bf16[24,1000]{1,0:S(5)}", "bf16[1,1000]{1,0}"
HOST_COPIES = {
    "a slice fetched": (
        f"%begin = (({HOST}, s32[]), {CHIP}, u32[]{{:S(2)}}) dynamic-slice-start(%stack, %i)",
        f"%end = {CHIP} dynamic-slice-done(%begin)",
    ),
    "a slice stored": (
        f"%begin = (({HOST}, {CHIP}, s32[]), {HOST}, u32[]{{:S(2)}}) dynamic-update-slice-start(%stack, %one, %i)",
        f"%end = {HOST} dynamic-update-slice-done(%begin)",
    ),
    "an array stored": (
        "%begin = (bf16[1,1000]{1,0:S(5)}, bf16[1,1000]{1,0}, u32[]{:S(2)}) copy-start(%one)",
        "%end = bf16[1,1000]{1,0:S(5)} copy-done(%begin)",
    ),
}
AROUND = (f"%stack = {HOST} parameter(0)", f"%one = {CHIP} parameter(1)", "%i = s32[] parameter(2)")
PRODUCT = (
    "%x = f32[8]{0:S(1)} parameter(3)",
    '%dot = f32[8]{0:S(1)} dot(%x, %x), backend_config={"estimated_cycles":"150"}',
)


@pytest.mark.parametrize("form", HOST_COPIES)
def test_a_copy_to_the_hosts_memory_or_from_it_is_exposed_where_nothing_runs_meanwhile(form):
    begin, end = HOST_COPIES[form]
    spent = account_of(*AROUND, begin, *PRODUCT, end)
    ((kind, sent),) = spent.collectives.items()
    assert kind == ("host copy", "PCIe")
    assert (sent.count, sent.bytes, spent.hbm_bytes) == (1, 2000, 2000)
    assert sent.seconds == pytest.approx(2000 / 16e9)
    assert sent.exposed_seconds == pytest.approx(sent.seconds - 150 / 1.5e9)


def test_a_copy_with_the_host_that_is_waited_for_and_copies_that_have_no_part_in_it():
    waited = account_of(*AROUND, "%whole = bf16[24,1000]{1,0} copy(%stack)").collectives["host copy", "PCIe"]
    assert waited.bytes == 48000 and waited.exposed_seconds == pytest.approx(48000 / 16e9)
    to_vmem = "%begin = (bf16[1,1000]{1,0:S(1)}, bf16[1,1000]{1,0}, u32[]{:S(2)}) copy-start(%one)"
    within_host = f"%there = ({HOST}, {HOST}, u32[]{{:S(2)}}) copy-start(%stack)"
    done = ("%end = bf16[1,1000]{1,0:S(1)} copy-done(%begin)", f"%is = {HOST} copy-done(%there)")
    assert not account_of(*AROUND, to_vmem, within_host, *done).collectives


def test_what_is_sent_between_slices_is_a_collective_of_its_own():
    about = (
        'channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.1_0",'
        '_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    spent = account_of(
        "%p = f32[1000]{0} parameter(0)",
        "%token = token[] after-all()",
        f"%send = (f32[1000]{{0}}, u32[], token[]) send(%p, %token), {about}",
        f"%recv = (f32[1000]{{0}}, u32[], token[]) recv(%token), {about}",
        "%send-done = token[] send-done(%send)",
        "%recv-done = (f32[1000]{0}, token[]) recv-done(%recv)",
        slices={"data": 2, "fsdp": 1, "tensor": 1},
    )
    ((kind, sent),) = spent.collectives.items()
    assert kind == ("dcn all-reduce", "data")
    assert (sent.count, sent.bytes) == (1, 4000)
    assert sent.seconds == pytest.approx(4000 / 3.125e9)
    assert sent.exposed_seconds == pytest.approx(sent.seconds)
    assert spent.memory_seconds == 0
    assert spent.hbm_bytes == 2 * 4000
