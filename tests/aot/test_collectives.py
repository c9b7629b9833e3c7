"""Bytes that a device sends, by hand, for every way the compiler writes a collective; test_report.py has real ones."""

import pytest

from rsagent_jax.aot.collectives import collective_bytes, collectives, group_size, largest
from rsagent_jax.aot.hlo import Instruction, read_program


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
    attributes = f", channel_id=1, replica_groups={groups}, dimensions={{0}}, use_global_device_ids=true"
    assert group_size(Instruction("x", "all-gather", (), (), "", attributes, {}, False), devices=16) == size


GROUPS = "replica_groups=[2,4]<=[8]"
KINDS = f"""HloModule m, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}}

%all-reduce-scatter.1 (p.1: bf16[16,8]) -> bf16[4,8] {{
  %p.1 = bf16[16,8] parameter(0)
  %ar = bf16[16,8] all-reduce(%p.1), channel_id=1, {GROUPS}, to_apply=%add
  %id = u32[] partition-id()
  %zero = u32[] constant(0)
  ROOT %ds = bf16[4,8] dynamic-slice(%ar, %id, %zero), dynamic_slice_sizes={{4,8}}
}}

%offloaded (p.2: f32[10]) -> f32[40] {{
  %p.2 = f32[10] parameter(0)
  ROOT %ag.1 = f32[40] all-gather(%p.2), channel_id=1, {GROUPS}, dimensions={{0}}
}}, execution_thread="sparsecore"

ENTRY %e (x: f32[10], y: bf16[16,8]) -> f32[10] {{
  %x = f32[10] parameter(0)
  %y = bf16[16,8] parameter(1)
  %ag = f32[40] all-gather(%x), channel_id=1, {GROUPS}, dimensions={{0}}
  %ags = (f32[10], f32[40]) all-gather-start(%x), channel_id=2, {GROUPS}, dimensions={{0}}
  %agd = f32[40] all-gather-done(%ags)
  %cs = ((f32[10]), f32[40]) call-start(%x), async_execution_thread="sparsecore", to_apply=%offloaded
  %cd = f32[40] call-done(%cs)
  %two = (f32[10], bf16[16,8]) all-reduce(%x, %y), channel_id=3, {GROUPS}, to_apply=%add
  %rs = bf16[4,8] fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
  %rs.1 = bf16[4,8] reduce-scatter(%y), channel_id=4, {GROUPS}, dimensions={{0}}, to_apply=%add
  %a2a = bf16[16,8] all-to-all(%y), channel_id=5, replica_groups={{{{0,1}},{{2,3}},{{4,5}},{{6,7}}}}, dimensions={{0}}
  %cps = (f32[10], f32[10], u32[], u32[]) collective-permute-start(%x), channel_id=6, source_target_pairs={{{{0,1}},{{1,0}}}}
  %cpd = f32[10] collective-permute-done(%cps)
  ROOT %alone = f32[10] all-reduce(%x), channel_id=7, replica_groups={{{{0}},{{1}}}}, to_apply=%add
}}
"""  # noqa: E501


def test_bytes_by_kind():
    found = collectives(read_program(KINDS))
    assert collective_bytes(found) == {
        "all-gather": 3 * (3 * 40),  # plain, started, offloaded: 3 others' 10 floats each
        "all-reduce": 2 * 3 / 4 * (40 + 256),  # both arrays of one; the other has nobody to talk to
        "reduce-scatter": 2 * (3 / 4 * 256),
        "all-to-all": 1 / 2 * 256,
        "collective-permute": 40,
    }
    assert len(found) == 9 and all(c.executions == 1 for c in found)
    assert {c.name for c in found if c.kind == "reduce-scatter"} == {"ar", "rs.1"}
    assert largest(found).name == "two" and largest(found).shape == "f32[10], bf16[16,8]"
    assert largest([]) is None


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


def test_a_chain_of_fusions_is_one_collective():
    """Three computations repeat the all-gather that starts in one, runs beside a product and ends in a third."""
    found = collectives(read_program(CHAIN))
    assert [(c.kind, c.name, c.sent_bytes, c.executions) for c in found] == [("all-gather", "ag.1", 3 * 16, 1)]
