"""The text of compiled programs: how often a loop's body runs, bytes sent and bytes moved in HBM, by hand;
test_report.py has a real program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rsagent_jax.aot.compiled import Program, Shape, collective_bytes, group_size
from rsagent_jax.aot.topology import devices, parse_topology


def loop(
    name="l", start="constant(0)", bound="constant(7)", direction="LT", update="add(%i, %one)", config="", body=""
):
    """(A loop's computations, the lines that run it.)"""
    computations = f"""%{name}_body (s: (s32[])) -> (s32[]) {{
  %s = (s32[]) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%s), index=0
  %one = s32[] constant(1)
  %three = s32[] constant(3)
  %minus = s32[] constant(-2)
{body}  %next = s32[] {update}
  ROOT %out = (s32[]) tuple(%next)
}}

%{name}_test (s: (s32[])) -> pred[] {{
  %s = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %bound = s32[] {bound}
  ROOT %lt = pred[] compare(%i, %bound), direction={direction}
}}

"""
    run = f"""  %{name}_start = s32[] {start}
  %{name}_copy = s32[]{{:S(6)}} copy(%{name}_start)
  %{name}_first = (s32[]) tuple(%{name}_copy)
  %{name} = (s32[]) while(%{name}_first), condition=%{name}_test, body=%{name}_body{config}, metadata={{op_name="w"}}
"""
    return computations, run


def program(*parts: str, entry: str) -> Program:
    return Program("HloModule m, num_partitions=4\n\n" + "".join(parts) + f"ENTRY %main () -> s32[] {{\n{entry}}}\n")


@pytest.mark.parametrize(
    ("given", "runs", "unknown"),
    [
        ({}, 7, []),
        ({"start": "constant(2)"}, 5, []),
        ({"start": "constant(9)"}, 0, []),
        ({"update": "add(%i, %three)"}, 3, []),  # 0, 3, 6: the compiler unrolls
        ({"start": "constant(1)", "update": "add(%three, %i)"}, 2, []),
        ({"start": "parameter(0)", "config": ', backend_config={"known_trip_count":{"n":"11"}}'}, 11, []),
        # not known: reported, and counted once
        ({"start": "parameter(0)"}, 1, ["l (w)"]),  # an argument
        ({"bound": "get-tuple-element(%s), index=1"}, 1, ["l (w)"]),  # carried
        ({"update": "multiply(%i, %i)"}, 1, ["l (w)"]),
        ({"update": "add(%i, %minus)"}, 1, ["l (w)"]),  # never ends
        ({"direction": "NE"}, 1, ["l (w)"]),
    ],
)
def test_trip_counts(given, runs, unknown):
    computations, run = loop(**given)
    found = program(computations, entry=run)
    assert found.runs["l_body"] == runs and found.unknown_trip_counts == unknown and found.devices == 4


def test_nested_loops_multiply():
    """The inner loop's first value may stand in the outer loop's state."""
    inner, run_inner = loop("inner", start="get-tuple-element(%s), index=1", bound="constant(5)")
    outer, run_outer = loop("outer", bound="constant(3)", body=run_inner)
    found = program(inner, outer, entry=run_outer)
    assert found.runs["outer_body"] == 3 and found.runs["inner_body"] == 15 and not found.unknown_trip_counts


def test_of_a_conditional_the_largest_branch_counts():
    branch = """%b{n} (x{n}: f32[8]) -> f32[] {{
  %x{n} = f32[8]{{0}} parameter(0)
  %long{n} = f32[{n},8]{{1,0}} broadcast(%x{n}), dimensions={{1}}
  ROOT %z{n} = f32[] custom-call(%long{n}), custom_call_target="f"
}}

"""
    choose = "  ROOT %y = f32[] conditional(%i, %x, %x, %x), branch_computations={%b3, %b9, %b5}\n"
    entry = "  %i = s32[] parameter(0)\n  %x = f32[8]{0} parameter(1)\n" + choose
    assert program(*(branch.format(n=n) for n in (3, 9, 5)), entry=entry).runs == {"main": 1, "b9": 1}


def test_what_stands_in_an_instruction():
    """Layouts with memory spaces, attributes over several lines, parentheses in strings, and a thread's name."""
    text = """HloModule m, replica_count=2, num_partitions=4

%called (p: bf16[4,8], t: token[]) -> bf16[16,8] {
  %t = token[] parameter(1)
  %p = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %ag = bf16[16,8]{1,0} all-gather(%p), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (p.1: bf16[4,8]) -> bf16[16,8] {
  %p.1 = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} parameter(0), metadata={op_name="f(x[0]) \\"quoted\\""}
  %kernel.1 = (f32[2,3]{1,0}, /*index=1*/s4[10]{0:S(5)}) custom-call(%p.1), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"block": "(1, 2"
}}, metadata={op_name="jit(f)/k"}, backend_config={"custom_call_config":{"body":"a}b)","cost_estimate":{"flops":"7"}}}
  %start = ((bf16[4,8], token[]), bf16[16,8]) call-start(%p.1), async_execution_thread="sparsecore", to_apply=%called
  ROOT %done = bf16[16,8] call-done(%start)
}
"""  # noqa: E501
    found = Program(text)
    assert found.devices == 8 and found.runs == {"main": 1, "called": 1}
    main = found.computations["main"]
    assert main["p.1"].arrays == (Shape("bf16", (4, 8), in_hbm=False),)
    assert (main["p.1"].arrays[0].bytes, main["p.1"].arrays[0].hbm_bytes()) == (64, 0)  # vector memory
    kernel = main["kernel.1"]
    assert kernel.arrays == (Shape("f32", (2, 3)), Shape("s4", (10,), in_hbm=False))
    assert [a.bytes for a in kernel.arrays] == [24, 5]
    assert (kernel.operands, kernel.target) == (("p.1",), "tpu_custom_call")
    assert main["start"].called == ["called"] and main.root.name == "done"
    with pytest.raises(ValueError, match="no ENTRY"):
        Program("HloModule nothing\n")


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2,3}}", 4),
        ("{{0,1},{2,3},{4,5}}", 2),
        ("{}", 16),  # all devices
        ("[2,8]<=[16]", 8),
        ("[4,4]<=[4,2,2]T(1,0,2)", 4),
        ("mesh['axis_0'=4,'axis_1'=1] {'axis_0'}", 4),
        ("mesh['a'=2,'b'=4,'c'=2] {'a','c'}", 4),
        ("mesh['a'=2,'b'=4,'c'=2], device_ids=([2,4,2]T(0,2,1)) {'b'}", 4),
        ("mesh['a'=8,'b'=2] {'a':(2)4,'b'}", 8),  # four of the eight
        ("mesh['a'=8]", 8),
    ],
)
def test_group_sizes(groups, size):
    text = f"%x), channel_id=1, replica_groups={groups}, dimensions={{0}}, use_global_device_ids=true"
    assert group_size(text, devices=16) == size


SENDERS = """%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (p.1: bf16[16,8]) -> bf16[4,8] {
  %p.1 = bf16[16,8] parameter(0)
  %ar = bf16[16,8] all-reduce(%p.1), channel_id=1, replica_groups=[1,4]<=[4], to_apply=%add
  %id = u32[] partition-id()
  %zero = u32[] constant(0)
  ROOT %ds = bf16[4,8] dynamic-slice(%ar, %id, %zero), dynamic_slice_sizes={4,8}
}

%offloaded (p.2: f32[10]) -> f32[40] {
  %p.2 = f32[10] parameter(0)
  ROOT %ag.1 = f32[40] all-gather(%p.2), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
}, execution_thread="sparsecore"

"""


@pytest.mark.parametrize(
    ("instruction", "kind", "sent"),
    [
        ("f32[40] all-gather(%x), dimensions={0}", "all-gather", 3 * 40),  # 3 others' 10 floats each
        ("(f32[10], f32[40]) all-gather-start(%x), dimensions={0}", "all-gather", 3 * 40),
        ("((f32[10]), f32[40]) call-start(%x), to_apply=%offloaded", "all-gather", 3 * 40),
        ("(f32[10], bf16[16,8]) all-reduce(%x, %y), to_apply=%add", "all-reduce", 2 * 3 / 4 * (40 + 256)),
        ("f32[10] all-reduce(%x), replica_groups={{0},{1}}, to_apply=%add", "all-reduce", 0),  # alone
        ("bf16[4,8] fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1", "reduce-scatter", 3 / 4 * 256),
        ("bf16[4,8] reduce-scatter(%y), dimensions={0}, to_apply=%add", "reduce-scatter", 3 / 4 * 256),
        ("bf16[16,8] all-to-all(%y), replica_groups={{0,1},{2,3}}, dimensions={0}", "all-to-all", 1 / 2 * 256),
        ("(f32[10], f32[10]) collective-permute-start(%x), source_target_pairs={{0,1}}", "collective-permute", 40),
    ],
)
def test_bytes_by_kind(instruction, kind, sent):
    entry = f"  %x = f32[10] parameter(0)\n  %y = bf16[16,8] parameter(1)\n  ROOT %r = {instruction}\n"
    found = program(SENDERS, entry=entry).collectives()
    assert collective_bytes(found) == {kind: sent} and [c.executions for c in found] == [1]


# Three computations repeat the all-gather that starts in one, runs beside a product and ends in a third.
CHAIN = """HloModule m, num_partitions=4

%start (s: bf16[8]) -> (bf16[8], bf16[32], u32[]) {
  %s = bf16[8]{0} parameter(0)
  %ag.1 = bf16[32]{0} all-gather(%s), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}
  ROOT %c.1 = (bf16[8]{0}, bf16[32]{0}, u32[]{:S(2)}) custom-call(%ag.1), custom_call_target="AsyncCollectiveStart"
}

%beside (s.1: bf16[8], g.1: bf16[32], f.1: u32[], x.1: bf16[64]) -> (bf16[64], bf16[8], bf16[32], bf16[32]) {
  %s.1 = bf16[8]{0} parameter(0)
  %g.1 = bf16[32]{0} parameter(1)
  %f.1 = u32[]{:S(2)} parameter(2)
  %x.1 = bf16[64]{0} parameter(3)
  %y.1 = bf16[64]{0} multiply(%x.1, %x.1)
  %ag.2 = bf16[32]{0} all-gather(%s.1), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
  ROOT %t.1 = (bf16[64]{0}, bf16[8]{0}, bf16[32]{0}, bf16[32]{0}) tuple(%y.1, %s.1, %g.1, %ag.2)
}

%done (s.2: bf16[8], g.2: bf16[32], f.2: u32[]) -> bf16[32] {
  %s.2 = bf16[8]{0} parameter(0)
  %g.2 = bf16[32]{0} parameter(1)
  %f.2 = u32[]{:S(2)} parameter(2)
  %ag.3 = bf16[32]{0} all-gather(%s.2), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"4"}}
  ROOT %c.2 = bf16[32]{0} custom-call(%s.2, %g.2, %ag.3, %f.2), custom_call_target="AsyncCollectiveDone"
}

ENTRY %e (s.3: bf16[8], x.3: bf16[64]) -> bf16[32] {
  %s.3 = bf16[8]{0} parameter(0)
  %x.3 = bf16[64]{0} parameter(1)
  %st = (bf16[8]{0}, bf16[32]{0}, u32[]{:S(2)}) fusion(%s.3), kind=kCustom, calls=%start
  %a = bf16[8]{0} get-tuple-element(%st), index=0
  %b = bf16[32]{0} get-tuple-element(%st), index=1
  %c = u32[]{:S(2)} get-tuple-element(%st), index=2
  %be = (bf16[64]{0}, bf16[8]{0}, bf16[32]{0}, bf16[32]{0}) fusion(%a, %b, %c, %x.3), kind=kOutput, calls=%beside
  %d = bf16[8]{0} get-tuple-element(%be), index=1
  %f = bf16[32]{0} get-tuple-element(%be), index=2
  ROOT %dn = bf16[32]{0} fusion(%d, %f, %c), kind=kCustom, calls=%done
}
"""  # noqa: E501


def test_a_fusion_that_only_hands_on_reads_what_it_is_asked_for():
    """As the compiler writes into a cache of int8: relaid inside the fusion, of which 16 numbers are read."""
    text = """HloModule m

%relaid (x: s8[64,128]) -> s8[64,128] {
  %x = s8[64,128]{1,0:T(32,128)(4,1)} parameter(0)
  ROOT %c = s8[64,128]{1,0:T(8,128)(4,1)} OPCODE(%x)
}

%some (y: s8[64,128], i: s32[]) -> s8[1,16] {
  %y = s8[64,128]{1,0:T(32,128)(4,1)} parameter(0)
  %i = s32[] parameter(1)
  %f = s8[64,128]{1,0:T(8,128)(4,1)} fusion(%y), kind=kLoop, calls=%relaid
  ROOT %d = s8[1,16]{1,0:T(8,128)(4,1)} dynamic-slice(%f, %i, %i), dynamic_slice_sizes={1,16}
}

ENTRY %e (z: s8[64,128], j: s32[]) -> s8[1,16] {
  %z = s8[64,128]{1,0:T(32,128)(4,1)} parameter(0)
  %j = s32[] parameter(1)
  ROOT %g = s8[1,16]{1,0:T(8,128)(4,1)} fusion(%z, %j), kind=kLoop, calls=%some
}
"""
    assert Program(text.replace("OPCODE", "copy")).hbm_traffic_bytes() == 2 * 16 + 4
    assert Program(text.replace("OPCODE", "cosine")).hbm_traffic_bytes() == 64 * 128 + 16 + 4


def test_a_chain_of_fusions_is_one_collective_that_moves_its_data_once():
    found = Program(CHAIN)
    sent = [(c.kind, c.name, c.sent_bytes, c.executions) for c in found.collectives()]
    assert sent == [("all-gather", "ag.1", 3 * 16, 1)]
    # The shard read and the whole written where it starts; beside it, 64 elements read and written; 2 bytes each.
    assert found.hbm_traffic_bytes() == (8 + 32 + 64 + 64) * 2


FUSED = """%slices (w: f32[6,10], i: s32[]) -> bf16[10] {
  %w = f32[6,10] parameter(0)
  %i = s32[] parameter(1)
  %c = bf16[6,10] convert(%w)
  %zero = s32[] constant(0)
  %ds = bf16[1,10] dynamic-slice(%c, %i, %zero), dynamic_slice_sizes={1,10}
  ROOT %b = bf16[10] bitcast(%ds)
}

%updates (buffer: f32[6,10], row: bf16[10], i.1: s32[]) -> f32[6,10] {
  %buffer = f32[6,10] parameter(0)
  %row = bf16[10] parameter(1)
  %i.1 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  %c.1 = f32[10] convert(%row)
  %b.1 = f32[1,10] bitcast(%c.1)
  ROOT %dus = f32[6,10] dynamic-update-slice(%buffer, %b.1, %i.1, %zero.1)
}

%two (x: f32[10], y: f32[10]) -> (f32[10], f32[10], f32[10]) {
  %x = f32[10] parameter(0)
  %y = f32[10] parameter(1)
  %s = f32[10] add(%x, %x)
  ROOT %t = (f32[10], f32[10], f32[10]) tuple(%s, %s, %y)
}

"""
GIVEN = """  %w = f32[6,10]{1,0} parameter(0)
  %row = bf16[10]{0} parameter(1)
  %i = s32[]{:S(6)} parameter(2)
  %v = f32[10]{0:S(1)} parameter(3)
  %ids = s32[3]{0} parameter(4)
  %rows = f32[3,10]{1,0} parameter(5)
  %started = (f32[6,10]{1,0:S(1)}, f32[6,10]{1,0}, u32[]{:S(2)}) copy-start(%w)
"""


@pytest.mark.parametrize(
    ("instruction", "by_hand"),
    [
        ("f32[6,10]{1,0} parameter(6)", 0),
        # One row read as float, written as half of it.
        ("bf16[10]{0} fusion(%w, %i), kind=kLoop, calls=%slices", 10 * 4 + 10 * 2),
        # The row read, the row written; the buffer stays.
        ("f32[6,10]{1,0} fusion(%w, %row, %i), kind=kLoop, calls=%updates", 10 * 2 + 10 * 4),
        # Vector memory but for one result.
        ("(f32[10]{0}, f32[10]{0:S(1)}, f32[10]{0:S(1)}) fusion(%v, %v), kind=kLoop, calls=%two", 10 * 4),
        ("(f32[6,10]{1,0:S(1)}, f32[6,10]{1,0}, u32[]{:S(2)}) copy-start(%w)", 60 * 4),  # read; to vector memory
        ("f32[6,10]{1,0:S(1)} copy-done(%started)", 0),
        ("((f32[6,10]{1,0}), f32[2,10]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%w), slice={[0:2], [0:10]}", 20 * 4),
        ("f32[3,10]{1,0} gather(%w, %ids), offset_dims={1}", 30 * 4 + 3 * 4 + 30 * 4),
        ("f32[6,10]{1,0} dynamic-update-slice(%w, %rows, %i, %i)", 2 * 30 * 4),
        ('f32[6,10]{1,0} custom-call(), custom_call_target="AllocateBuffer"', 0),
        ('f32[6,10]{1,0} custom-call(%w, %v), custom_call_target="tpu_custom_call"', 2 * 60 * 4),
        ("f32[6,10]{1,0:S(5)} copy(%w)", 60 * 4),  # to the host
    ],
)
def test_bytes_that_one_instruction_moves(instruction, by_hand):
    found = program(FUSED, entry=f"{GIVEN}  ROOT %r = {instruction}\n")
    assert found.moved("main", found.computations["main"].root) == by_hand


def test_a_scan_reads_each_weight_once():
    """Five layers of two products on one described chip, 16 MiB of weights a layer.

    By hand: all weights once, 80 MiB in bf16, 1 MiB in and 1 MiB out; in between, activations stay in vector memory.
    """
    layers, rows, dim = 5, 256, 2048
    mesh = Mesh(np.array(devices(parse_topology("v5e-1"))), ("one",))

    def abstract(shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))

    def forward(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w[:, :dim]) @ w[:, dim:].T, None), x, w)[0]

    compiled = jax.jit(forward).lower(abstract((rows, dim)), abstract((layers, dim, 2 * dim))).compile()
    by_hand = layers * dim * 2 * dim * 2 + 2 * rows * dim * 2
    assert Program(compiled.as_text()).hbm_traffic_bytes() == pytest.approx(by_hand, rel=0.02)
