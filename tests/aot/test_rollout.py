"""The engine's programs for a TPU: by hand what they hold and must read, and that the compiled ones keep to it."""

import dataclasses
import importlib
import itertools
import json
import subprocess

import pytest

from rsagent_jax.aot import rollout, scaling, stages
from rsagent_jax.aot.report import Decoding, report_job, reports_table, reports_to_json
from rsagent_jax.aot.topology import devices, parse_topology
from rsagent_jax.config.schema import MeshConfig, SamplingConfig
from rsagent_jax.models.qwen25_vl import convert
from rsagent_jax.models.qwen25_vl.config import size_config
from rsagent_jax.runtime import sharding
from tests.aot.test_stages import TINY

SLOTS, CONTEXT, CHUNK, PATCHES = 32, 4096, 4, 256
SAMPLING = SamplingConfig(slots=SLOTS, context=CONTEXT, chunk=CHUNK, patches=PATCHES, tensor=2)


def shape():
    """A 7B with two narrow layers: its cache and its head are large beside them, as at full depth."""
    full = size_config("7b")
    text = dict(num_hidden_layers=2, hidden_size=512, intermediate_size=1024, num_attention_heads=8, vocab_size=32768)
    text |= dict(num_key_value_heads=4, mrope_section=(8, 12, 12))  # heads of 64
    vision = dataclasses.replace(full.vision, depth=2, fullatt_block_indexes=(1,), out_hidden_size=512)
    return dataclasses.replace(full, text=dataclasses.replace(full.text, **text), vision=vision)


@pytest.fixture(scope="module")
def jobs():
    mesh = rollout.host_mesh(devices(parse_topology("v5e:2x2")), tensor=2)
    return {job.program: job for job in rollout.rollout_jobs(SAMPLING, shape(), "bfloat16", mesh, resident=1000)}


@pytest.fixture(scope="module")
def decode(jobs):
    return report_job(jobs["rollout decode"], parse_topology("v5e:2x2"))


LAYER = 512 * (512 + 256 + 256) + 512 + 2 * 256 + 512 * 512 + 3 * 512 * 1024  # q, k, v with biases, o, the MLP
HEAD = 32768 * 512


def test_what_a_decode_step_must_read_is_that_by_hand(jobs):
    """Two devices to a slot: half of every kernel and two of four heads each; 16 slots to a pair of devices."""
    d = jobs["rollout decode"].decoding
    assert list(jobs) == ["rollout weights", "rollout encode", "rollout append", "rollout decode"]
    assert (d.slots, d.devices, d.tensor, d.places, d.steps) == (32, 4, 2, CONTEXT, CHUNK)
    place = 2 * 2 * 2 * 64 * 2  # layers, keys and values, heads of a device, their width, bytes
    blocks = -(-(CONTEXT + SAMPLING.prefill) // 1024)
    rest = (512 + PATCHES // 4 * 512 // 4) * 2  # the hidden state, and a lane's images shared by four slots
    assert d.slot_bytes == blocks * 1024 * place + rest
    norms = 2 * 2 * 512 * 2 // 2  # whole on every device
    weights = 2 * (2 * LAYER + HEAD) // 2 + norms
    assert d.needed_bytes == pytest.approx(weights + 16 * CONTEXT * place, rel=1e-3)
    assert jobs["rollout append"].decoding.steps == 0  # a piece of a prompt takes its time as well: no rate


def test_flops_are_two_per_parameter_and_token_and_attention(jobs):
    kernels = 2 * (512 * 1024 + 512 * 512 + 3 * 512 * 1024)
    step = 2.0 * 32 * CHUNK * (kernels + HEAD + 2 * 2 * 512 * CONTEXT)
    assert jobs["rollout decode"].model_flops == pytest.approx(step)
    piece = 2.0 * 8 * SAMPLING.prefill * (kernels + 2 * 2 * 512 * 5 * 1024)  # eight lanes, all five blocks
    assert jobs["rollout append"].model_flops == pytest.approx(step + piece)


def test_weights_in_int8_are_half_but_for_embeddings_norms_and_scales(jobs):
    sampling = dataclasses.replace(SAMPLING, weights_dtype="int8")
    mesh = rollout.host_mesh(devices(parse_topology("v5e:2x2")), tensor=2)
    made = {j.program: j for j in rollout.rollout_jobs(sampling, shape(), "bfloat16", mesh, resident=1000)}
    d, whole = made["rollout decode"].decoding, jobs["rollout decode"].decoding
    numbers = 2 * (LAYER - 512 - 2 * 256) + HEAD  # kernels and head: a byte less each; biases stay
    # a scale per output: of q, k, v, gate and up half of them on each device, of o and down all
    scales = 4 * (2 * ((512 + 2 * 256 + 2 * 1024) // 2 + 2 * 512) + 32768 // 2)
    assert whole.weight_bytes - d.weight_bytes == numbers // 2 - scales


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5e:2x2", "tpu7x-8"])
def test_a_compiled_step_holds_no_second_copy_of_weights_or_cache(name):
    """Of int8 weights in bf16, nor, on TPU7x, of weights and keys in other tiles."""
    topology = parse_topology(name)
    mesh = rollout.host_mesh(devices(topology)[:4], tensor=2)
    for kind in ("", "int8"):
        sampling = dataclasses.replace(SAMPLING, weights_dtype=kind)
        made = {j.program: j for j in rollout.rollout_jobs(sampling, shape(), "bfloat16", mesh, resident=0)}
        found = report_job(made["rollout decode"], topology)
        d = found.decoding
        assert found.temp_bytes < 0.1 * SLOTS // 2 * d.slot_bytes and d.step_bytes / d.needed_bytes < 1.4


@pytest.mark.slow
def test_the_compiled_step_reads_weights_and_live_cache_once_and_holds_no_second_cache(decode):
    """Cut before the loop, the live cache was copied (a third of all memory); gathered for the whole row of logits, the
    head travelled in every step (4.1 x what must be read, at 7B)."""
    d = decode.decoding
    assert d.step_bytes / d.needed_bytes < 1.3  # narrow layers: activations count for more than at 7B
    assert decode.temp_bytes < 0.1 * SLOTS // 2 * d.slot_bytes
    assert sum(decode.collective_bytes.values()) < CHUNK * HEAD * 2 / 4
    assert not decode.unknown_trip_counts
    assert d.projected_tokens_per_s == pytest.approx(SLOTS * CHUNK / decode.projected_step_s)


def test_slots_that_fit_are_those_that_are_there_and_those_the_rest_of_the_memory_holds():
    """Rows of 2 devices, 4 of them: each takes another slot per 10 bytes that are left, or must give one up."""
    sizes = dict(weight_bytes=100, slot_bytes=10, training_bytes=0, needed_bytes=140)
    d = Decoding(slots=16, devices=8, tensor=2, places=8, steps=4, **sizes)
    assert d.compiled(peak=165, hbm=200, traffic=600, seconds=2.0).slots_fit == 16 + 3 * 4
    less = d.compiled(peak=205, hbm=200, traffic=600, seconds=2.0)
    assert (less.slots_fit, less.step_bytes, less.projected_tokens_per_s) == (12, 150, 32)
    refused = d.compiled(peak=300, hbm=200, traffic=0, seconds=None)
    assert (refused.slots_fit, refused.step_bytes, refused.projected_tokens_per_s) == (0, None, None)


@pytest.mark.slow
def test_what_a_program_does_not_read_stays_on_the_device(jobs, decode):
    """Arguments and residents together are weights, slots and training, whichever of them the program takes."""
    d, job = decode.decoding, jobs["rollout encode"]
    whole = 1000 + d.weight_bytes + d.slots // 2 * d.slot_bytes
    assert decode.argument_bytes + decode.resident_bytes == pytest.approx(whole, rel=0.01)
    memory = job.trace().lower().compile().memory_analysis()
    pixels = 4 * PATCHES * (1176 + 3) * 4  # of four lanes
    assert memory.argument_size_in_bytes + job.resident_bytes == pytest.approx(whole + pixels, rel=0.01)


@pytest.mark.slow
def test_the_report_says_slots_and_rate(decode):
    line = reports_table([decode]).splitlines()[-1]
    assert line.startswith("rollout decode: 32 slots on 4 devices, 2 to a slot;") and "tokens/s" in line
    assert '"slots_fit"' in reports_to_json([decode])


PLAYED = SamplingConfig(context=256, max_new_tokens=64, slots=8, patches=128)
TRAINED = dataclasses.replace(TINY, stages=("grpo",), grpo=dataclasses.replace(TINY.grpo, sampling=PLAYED))


def test_training_stays_on_the_device_and_the_policy_is_read_in_place_by_a_single_process():
    """fp32 parameters, two moments and a bf16 reference, split over the mesh; weights are made from the parameters
    themselves, or from a copy that every host has for itself."""
    policy = stages.policy_config(TRAINED.policy.weights)
    found = devices(parse_topology("v5e:2x2"))
    mesh = sharding.make_mesh(MeshConfig(), found)
    alone = {j.program: j for j in stages.stage_jobs(TRAINED, "grpo", policy, mesh, rollout.host_mesh(found, 1))}
    assert list(alone)[-4:] == ["rollout weights", "rollout encode", "rollout append", "rollout decode"]
    params = sum(v.size for v in convert.flat_params(convert.abstract_model(policy)).values())
    assert alone["rollout decode"].decoding.training_bytes == pytest.approx(params * (4 + 8 + 2) / 4, rel=0.05)
    one_of_four = params * 4 / 4
    held = alone["rollout decode"].decoding.training_bytes - alone["rollout weights"].resident_bytes
    assert held == pytest.approx(one_of_four, rel=0.05)
    host = rollout.host_mesh(devices(parse_topology("v5e:1x1")), 1)
    several = {j.program: j for j in stages.stage_jobs(TRAINED, "grpo", policy, mesh, host)}
    held, made = several["rollout decode"].decoding.training_bytes, several["rollout decode"].decoding.weight_bytes
    first, *_, last = (job.resident_bytes for name, job in several.items() if name.startswith("rollout weights "))
    assert first == held and 0.9 * made < last - held < made  # beside training, and what was made before


def test_the_page_has_a_row_for_a_host_and_its_slice():
    """128 slots of 0.25 GiB on pairs of 8 devices; a step moves 11 GiB where 10 must be; two hosts would be twice."""
    gib = 2**30
    decoding = dict(
        slots=128, devices=8, tensor=2, places=8192, steps=8, weight_bytes=8 * gib, slot_bytes=gib // 4,
        training_bytes=13 * gib, needed_bytes=10 * gib, slots_fit=140, step_bytes=11 * gib,
        projected_tokens_per_s=1000.0,
    )  # fmt: skip
    common = dict(hbm_bytes=31 * gib, fits=True, decoding=None)
    encode = dict(common, program="rollout encode", peak_hbm_bytes=30 * gib)
    decode = dict(common, program="rollout decode", peak_hbm_bytes=29 * gib, decoding=decoding)
    name = next(name for name, _ in scaling.calls() if name.startswith("7b:v6e-8:rollout:"))
    page = scaling.scaling_tables([{"name": name, "reports": [encode, decode]}])
    row = next(line for line in page.splitlines() if line.startswith("| v6e-8 | 2 |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2:7] == ["8,192", "128 (16)", "8.00", "8.00", "13.00"]
    assert cells[7:] == ["30.00 (encode)", "31.00", "yes", "11.00", "1.10", "1000", "1000"]


def test_of_what_was_compiled_fully_the_page_tells_what_the_schedule_does_not_hide():
    sizes = dict(peak_hbm_bytes=13 * 2**30, hbm_bytes=16 * 2**30, fits=True, collective_bytes={"all-gather": 2**30})
    times = dict(projected_step_s=1.33, projected_mfu=0.75, hlo_to_model_flops=1.32, bound_by="compute")
    report = sizes | times | {"overlap": dict(collective_s=0.24, exposed_s=0.0365, step_s=1.42)}
    name, old = "3b:v5e-8:sft:full", report | {"overlap": None}
    page = scaling.scaling_tables([{"name": f"{name}:fully", "reports": [report]}, {"name": name, "reports": [old]}])
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if "3B, v5e-8" in line]
    assert [row[1] for row in rows] == ["full, fully", "full, quick"]
    assert [row[7:] for row in rows] == [
        ["1.33", "75%", "compute", *apart] for apart in (["0.240", "0.036", "1.420"], ["-"] * 3)
    ]


def test_lines_of_another_length_or_other_arguments_are_compiled_again_and_replaced(tmp_path, monkeypatch):
    for name in ("sft_tpu", "grpo_tpu"):
        config = importlib.import_module(f"configs.{name}").get_config()
        assert config[name.removesuffix("_tpu")].batch.tokens == scaling.TOKENS
    assert config.grpo.sampling.context == scaling.TOKENS
    (first, todays), (second, _) = itertools.islice(scaling.calls(), 2)
    report = dict(peak_hbm_bytes=2**30)
    answer = subprocess.CompletedProcess([], 0, json.dumps([report]), "")
    monkeypatch.setattr(scaling.subprocess, "run", lambda command, **_: asked.append(command) or answer)
    asked, results = [], tmp_path / "lines.jsonl"
    old, other = ({"name": n, "arguments": todays, "reports": [report]} for n in (first, second))
    results.write_text("".join(json.dumps(line) + "\n" for line in (old, other | {"tokens": scaling.TOKENS})))
    assert f"`{first}`, `{second}`" in scaling.scaling_tables([])
    for _ in range(2):
        scaling.compile_missing(results, first)  # and the same fully
        scaling.compile_missing(results, second)
    lines = {line["name"]: line for line in map(json.loads, results.read_text().splitlines())}
    assert len(asked) == 3 and lines[first]["tokens"] == scaling.TOKENS
    assert lines[second]["arguments"] == dict(scaling.calls())[second] != todays
