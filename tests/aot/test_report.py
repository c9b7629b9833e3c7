"""Reports of a real program for a TPU that is not there, and of programs that do not fit it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rsagent_jax.aot.compiled import Program
from rsagent_jax.aot.report import Job, analyse, out_of_memory, report_job, reports_table, reports_to_json
from rsagent_jax.aot.schedule import product_flops
from rsagent_jax.aot.topology import GIB, devices, parse_topology

DESIGN = (
    "program topology devices peak_hbm_bytes hbm_bytes fits model_flops hlo_flops collective_bytes projected_step_s"
    " projected_mfu bound_by"
).split()
TOPOLOGY = parse_topology("v5e:2x2")
DEVICES, LAYERS, ROWS, TOKENS, DIM, HIDDEN, HEADS = 4, 3, 4, 256, 256, 1024, 2  # a row per device
WEIGHTS = {"qkv": (DIM, 3 * DIM), "o": (DIM, DIM), "up": (DIM, HIDDEN), "down": (HIDDEN, DIM)}
COUNT = sum(a * b for a, b in WEIGHTS.values())  # of a layer
MODEL_FLOPS = 3 * 2 * ROWS * TOKENS * LAYERS * COUNT  # products with weights: forward, and twice that backward


def train_step():
    """Layers of x + attention(x), x + relu(x @ up) @ down under scan and remat, weights over 4 devices; traced."""
    mesh = Mesh(np.array(devices(TOPOLOGY)), ("fsdp",))
    rows = PartitionSpec("fsdp")
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((TOKENS, TOKENS))] * HEADS)
    kernel = splash_attention_kernel.make_splash_mha(mask, head_shards=1, q_seq_shards=1)
    attend = jax.shard_map(jax.vmap(kernel), mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)

    def layer(x, w):
        w = {name: value.astype(x.dtype) for name, value in w.items()}
        q, k, v = (a.reshape(ROWS, TOKENS, HEADS, -1).swapaxes(1, 2) for a in jnp.split(x @ w["qkv"], 3, -1))
        x = x + attend(q, k, v).swapaxes(1, 2).reshape(x.shape) @ w["o"]
        x = x + jax.nn.relu(x @ w["up"]) @ w["down"]
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, rows)), None

    def loss(weights, x):
        y, _ = jax.lax.scan(jax.checkpoint(layer), x.astype(jnp.bfloat16), weights)
        return jnp.mean(jnp.square(y.astype(jnp.float32)))

    def step(weights, x):
        value, gradients = jax.value_and_grad(loss)(weights, x)
        return jax.tree.map(lambda w, g: w - 1e-3 * g, weights, gradients), value

    def abstract(shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    weights = {name: abstract((LAYERS, *shape), PartitionSpec(None, "fsdp")) for name, shape in WEIGHTS.items()}
    return jax.jit(step, donate_argnums=0).trace(weights, abstract((ROWS, TOKENS, DIM), rows))


@pytest.fixture(scope="module")
def compiled():
    traced = train_step()
    return traced, traced.lower().compile()


@pytest.fixture(scope="module")
def analysed(compiled):
    def report(resident_bytes=0, kernel_flops=None):
        return analyse(*compiled, Job("train", train_step, MODEL_FLOPS, resident_bytes), TOPOLOGY, kernel_flops)

    return report


@pytest.fixture(scope="module")
def report(analysed):
    return analysed()


def test_flops_of_a_compiled_step(report, compiled):
    """Rematerialisation runs the forward pass again but for `down`, whose result nothing needs; the attention kernel's
    backward pass is given the inner products of its outputs and their gradients: exactly as many."""
    tokens = ROWS * TOKENS * LAYERS
    assert report.hlo_flops == MODEL_FLOPS + 2 * tokens * (COUNT - DIM * HIDDEN) + 2 * tokens * DIM
    # XLA's own number sees each loop's body once, on one device.
    assert compiled[1].cost_analysis()["flops"] < report.hlo_flops / DEVICES / 2


def test_collectives_of_a_compiled_step(report):
    """A layer's weights are gathered in bf16 forward and again backward, its gradients reduced and scattered once."""
    assert report.collective_bytes["all-gather"] == 2 * LAYERS * (COUNT * 2) * 3 / 4
    assert report.collective_bytes["reduce-scatter"] == LAYERS * (COUNT * 2) * 3 / 4
    assert report.collective_bytes["all-reduce"] == 2 * 3 / 4 * 4  # the loss, one float
    assert report.collectives == LAYERS * 2 * 4 + LAYERS + 1  # the gradients of a layer go together
    largest = report.largest_collective
    assert (largest.kind, largest.result_bytes) == ("all-gather", DIM * HIDDEN * 2) and "dot" in largest.op_name


def test_kernels_of_a_compiled_step(report, analysed):
    assert {k.name: k.executions for k in report.kernels} == {
        "splash_mha_fwd_residuals": 2 * LAYERS,  # once more in the backward pass
        "splash_mha_dq_no_residuals": LAYERS,
        "splash_mha_dkv_no_residuals": LAYERS,
    }
    assert set(report.kernels_without_flops) == {k.name for k in report.kernels} and report.hlo_to_model_flops is None
    told = analysed(kernel_flops=lambda name, shapes: 5 if name.startswith("splash_mha_fwd") else 1)
    assert told.hlo_flops - report.hlo_flops == DEVICES * LAYERS * (2 * 5 + 1 + 1)
    assert told.hlo_to_model_flops == told.hlo_flops / MODEL_FLOPS and not told.kernels_without_flops


def test_projection(report):
    assert report.unknown_trip_counts == () and report.devices == DEVICES
    assert report.seconds["compute"] == report.hlo_flops / (DEVICES * 197e12)
    assert report.seconds["hbm"] == report.hbm_traffic_bytes / 819e9
    assert report.seconds["ici"] == sum(report.collective_bytes.values()) / 90e9  # 2 x 2: one link each way
    assert report.projected_step_s == report.seconds[report.bound_by] == max(report.seconds.values())
    assert report.projected_mfu == pytest.approx(MODEL_FLOPS / (DEVICES * 197e12 * report.projected_step_s))
    # Weights and the row come from HBM, new weights go there.
    arguments = LAYERS * COUNT + ROWS * TOKENS * DIM
    assert report.argument_bytes == arguments * 4 / DEVICES
    assert report.hbm_traffic_bytes > (arguments + LAYERS * COUNT) * 4 / DEVICES


def test_overlap_of_a_compiled_step(report, compiled):
    """Weights are gathered beside products; the gradients are reduced and scattered at once, and waited for."""
    overlap, program = report.overlap, Program(compiled[1].as_text())
    assert overlap.asynchronous > 0 and overlap.asynchronous + overlap.synchronous == report.collectives
    assert overlap.collective_s == pytest.approx(report.seconds["ici"])
    assert 0 < overlap.hidden_s < overlap.collective_s and 0 < overlap.work_s < overlap.step_s
    assert any(w.collective.kind == "reduce-scatter" and w.synchronous for w in overlap.waits)
    assert overlap.exposed_s == pytest.approx(overlap.collective_s - overlap.hidden_s)
    # The products that the schedule counts are those of the traced program, but for the kernels' inner ones.
    shapes = lambda c, i: [c[o].arrays[0].dims for o in i.operands]  # noqa: E731
    found = ((program.computations[name], i, runs) for name, i, runs in program.instructions())
    products = sum(runs * product_flops(i, shapes(c, i)) for c, i, runs in found if i.opcode == "convolution")
    assert DEVICES * products == report.hlo_flops - 2 * ROWS * TOKENS * LAYERS * DIM


def test_residents_take_memory(report, analysed):
    assert report.fits and 0 < report.peak_hbm_bytes < report.hbm_bytes == int(15.75 * GIB)
    more = analysed(resident_bytes=report.hbm_bytes)
    assert more.peak_hbm_bytes == report.peak_hbm_bytes + report.hbm_bytes and not more.fits


def test_json_and_table(report):
    alone, again = json.loads(reports_to_json([report, report]))
    assert set(DESIGN) <= set(alone) and alone["fits"] is True and alone["collective_bytes"].keys() >= {"all-gather"}
    assert alone == again and "\n" not in reports_to_json([report])
    looped = dataclasses.replace(report, program="rollout", unknown_trip_counts=("while.1",))
    lines = reports_table([report, looped]).splitlines()
    assert lines[0].startswith("program") and lines[1].split()[:2] == ["train", "v5e:2x2"] and len({*lines[:3]}) == 3
    assert "rollout: counted as run once, not known how often: while.1" in lines
    assert any(line.startswith("train: hlo FLOPs leave out splash") for line in lines)


LONG = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.44G of 15.75G hbm. Exceeded hbm capacity by 1.69G.

Total hbm usage >= 17.70G:
    reserved        262.00M
    program          17.44G
    arguments            0B

  Largest program allocations in hbm:

  1. Size: 4.00G
     Operator: op_name="jit(step)/dot_general" source_file="a.py" source_line=1
     Shape: bf16[8,4096,65536]{2,1,0:T(8,128)(2,1)}
     Unpadded size: 4.00G
     ==========================

  2. Size: 512.0M
     Shape: f32[128,1048576]{1,0}
     ==========================
"""  # noqa: E501


def test_the_compilers_refusal():
    topology = parse_topology("v5e-16")
    mesh = Mesh(np.array(devices(topology)), ("all",))
    too_much = jax.ShapeDtypeStruct((64, 2**28), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    job = Job("train", lambda: jax.jit(lambda x: x + 1).trace(too_much), model_flops=1e12, resident_bytes=GIB)
    report = report_job(job, topology)
    assert not report.fits and report.bound_by == "memory" and report.projected_step_s is None
    # 64 GiB in, as much out, and the residents; the compiler rounds to 10 MiB.
    assert report.peak_hbm_bytes == pytest.approx(129 * GIB, rel=0.01)
    assert report.hbm_bytes == int(15.75 * GIB) and report.devices == 16 and report.model_flops == 1e12
    assert set(DESIGN) <= set(json.loads(reports_to_json([report]))[0])
    assert " NO " in reports_table([report])


def test_the_longer_refusal():
    report = out_of_memory(RuntimeError(LONG), Job("train", None), parse_topology("v5e-8"))
    assert (report.peak_hbm_bytes, report.hbm_bytes) == (int(17.44 * GIB), int(15.75 * GIB))
    assert report.largest_allocations == ("4.00G bf16[8,4096,65536] jit(step)/dot_general", "512.0M f32[128,1048576]")
    assert "train: holds 4.00G bf16[8,4096,65536] jit(step)/dot_general" in reports_table([report])


def test_another_error_is_not_swallowed():
    for error in (RuntimeError("INVALID_ARGUMENT: no"), RuntimeError("RESOURCE_EXHAUSTED: vmem")):
        with pytest.raises(RuntimeError, match=str(error)):
            out_of_memory(error, Job("train", None), parse_topology("v5e-8"))
