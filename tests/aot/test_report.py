"""Reports of a real program for a TPU that is not there, and of programs that do not fit it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rsagent_jax.aot.report import Job, analyse, out_of_memory, report_job, reports_table, reports_to_json
from rsagent_jax.aot.topology import GIB, devices, parse_topology

DESIGN = (
    "program topology devices peak_hbm_bytes hbm_bytes fits model_flops hlo_flops collective_bytes projected_step_s"
    " projected_mfu bound_by"
).split()


@pytest.fixture(scope="module")
def model_flops(step):
    """Products with weights: forward, and twice that backward."""
    return 3 * 2 * step.rows * step.tokens * step.layers * step.weight_count


@pytest.fixture(scope="module")
def compiled(traced):
    return traced.lower().compile()


@pytest.fixture(scope="module")
def analysed(traced, compiled, topology, model_flops):
    def report(resident_bytes=0, kernel_flops=None):
        job = Job("train", lambda: traced, model_flops, resident_bytes)
        return analyse(traced, compiled, job, topology, kernel_flops)

    return report


@pytest.fixture(scope="module")
def report(analysed):
    return analysed()


def test_flops_of_a_compiled_step(report, compiled, step, model_flops):
    """Rematerialisation runs the forward pass again but for `down`, whose result nothing needs; the attention kernel's
    backward pass is given the inner products of its outputs and their gradients: exactly as many."""
    tokens = step.rows * step.tokens * step.layers
    again = 2 * tokens * (step.weight_count - step.dim * step.hidden)
    assert report.hlo_flops == model_flops + again + 2 * tokens * step.dim
    # XLA's own number sees each loop's body once, on one device.
    assert compiled.cost_analysis()["flops"] < report.hlo_flops / step.devices / 2


def test_collectives_of_a_compiled_step(report, step):
    """A layer's weights are gathered in bf16 forward and again backward, its gradients reduced and scattered once."""
    layer = step.weight_count * 2
    assert report.collective_bytes["all-gather"] == 2 * step.layers * layer * 3 / 4
    assert report.collective_bytes["reduce-scatter"] == step.layers * layer * 3 / 4
    assert report.collective_bytes["all-reduce"] == 2 * 3 / 4 * 4  # the loss, one float
    assert report.collectives == step.layers * 2 * 4 + step.layers + 1  # the gradients of a layer go together
    largest = report.largest_collective
    assert (
        largest.kind == "all-gather" and largest.result_bytes == step.dim * step.hidden * 2 and "dot" in largest.op_name
    )


def test_kernels_of_a_compiled_step(report, analysed, step, model_flops):
    assert {k.name: k.executions for k in report.kernels} == {
        "splash_mha_fwd_residuals": 2 * step.layers,  # once more in the backward pass
        "splash_mha_dq_no_residuals": step.layers,
        "splash_mha_dkv_no_residuals": step.layers,
    }
    assert set(report.kernels_without_flops) == {k.name for k in report.kernels} and report.hlo_to_model_flops is None
    told = analysed(kernel_flops=lambda name, shapes: 5 if name.startswith("splash_mha_fwd") else 1)
    assert told.hlo_flops - report.hlo_flops == step.devices * step.layers * (2 * 5 + 1 + 1)
    assert told.hlo_to_model_flops == told.hlo_flops / model_flops and not told.kernels_without_flops


def test_projection(report, model_flops, step):
    assert report.unknown_trip_counts == () and report.devices == 4
    assert report.seconds["compute"] == report.hlo_flops / 4 / 197e12
    assert report.seconds["hbm"] == report.hbm_traffic_bytes / 819e9
    assert report.seconds["ici"] == sum(report.collective_bytes.values()) / 90e9  # 2 x 2: one link each way
    assert report.projected_step_s == report.seconds[report.bound_by] == max(report.seconds.values())
    assert report.projected_mfu == pytest.approx(model_flops / (4 * 197e12 * report.projected_step_s))
    # Weights and the row come from HBM, new weights go there.
    arguments = step.layers * step.weight_count + step.rows * step.tokens * step.dim
    assert report.argument_bytes == arguments * 4 / step.devices
    assert report.hbm_traffic_bytes > (arguments + step.layers * step.weight_count) * 4 / step.devices


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
