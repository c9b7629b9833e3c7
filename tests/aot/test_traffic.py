"""Bytes in and out of HBM: by hand, instruction by instruction, and of a real scan over stacked weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rsagent_jax.aot.hlo import read_program
from rsagent_jax.aot.topology import devices, parse_topology
from rsagent_jax.aot.traffic import hbm_traffic_bytes, instruction_bytes
from tests.aot.test_collectives import CHAIN

TEXT = """HloModule m

%slices (w: f32[6,10], i: s32[]) -> bf16[10] {
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

ENTRY %e (w.1: f32[6,10], r.1: bf16[10], i.2: s32[], v: f32[10], ids: s32[3]) -> f32[6,10] {
  %w.1 = f32[6,10]{1,0} parameter(0)
  %r.1 = bf16[10]{0} parameter(1)
  %i.2 = s32[]{:S(6)} parameter(2)
  %v = f32[10]{0:S(1)} parameter(3)
  %ids = s32[3]{0} parameter(4)
  %sliced = bf16[10]{0} fusion(%w.1, %i.2), kind=kLoop, calls=%slices
  %updated = f32[6,10]{1,0} fusion(%w.1, %r.1, %i.2), kind=kLoop, calls=%updates
  %pair = (f32[10]{0}, f32[10]{0:S(1)}, f32[10]{0:S(1)}) fusion(%v, %v), kind=kLoop, calls=%two
  %copied = (f32[6,10]{1,0:S(1)}, f32[6,10]{1,0}, u32[]{:S(2)}) copy-start(%w.1)
  %copied.1 = f32[6,10]{1,0:S(1)} copy-done(%copied)
  %part = ((f32[6,10]{1,0}), f32[2,10]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%w.1), slice={[0:2], [0:10]}
  %rows = f32[3,10]{1,0} gather(%w.1, %ids), offset_dims={1}
  %in-place = f32[6,10]{1,0} dynamic-update-slice(%w.1, %rows, %i.2, %i.2)
  %room = f32[6,10]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %kernel = f32[6,10]{1,0} custom-call(%w.1, %v), custom_call_target="tpu_custom_call"
  ROOT %moved = f32[6,10]{1,0:S(5)} copy(%kernel)
}
"""


@pytest.mark.parametrize(
    ("name", "by_hand"),
    [
        ("w.1", 0),
        ("sliced", 10 * 4 + 10 * 2),  # one row read as float, written as half of it
        ("updated", 10 * 2 + 10 * 4),  # the row read, the row written; the buffer stays
        ("pair", 10 * 4),  # vector memory but for one result
        ("copied", 60 * 4),  # read; written to vector memory
        ("copied.1", 0),
        ("part", 20 * 4),
        ("rows", 30 * 4 + 3 * 4 + 30 * 4),
        ("in-place", 2 * 30 * 4),
        ("room", 0),
        ("kernel", 2 * 60 * 4),
        ("moved", 60 * 4),  # to the host
    ],
)
def test_one_instruction(name, by_hand):
    program = read_program(TEXT)
    entry = program.computations["e"]
    assert instruction_bytes(program, entry, entry[name]) == by_hand


def test_a_chain_of_fusions_moves_its_data_once():
    # The shard read and the whole written where it starts; beside it, 64 elements read and written; 2 bytes each.
    assert hbm_traffic_bytes(read_program(CHAIN)) == (8 + 32 + 64 + 64) * 2


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
    program = read_program(compiled.as_text())
    print(
        [
            (i.name, instruction_bytes(program, c, i) * n / 2**20)
            for c, i, n in program.instructions()
            if c.name not in program.fused and instruction_bytes(program, c, i) > 100000
        ]
    )
    by_hand = layers * dim * 2 * dim * 2 + 2 * rows * dim * 2
    assert hbm_traffic_bytes(program) == pytest.approx(by_hand, rel=0.02)
