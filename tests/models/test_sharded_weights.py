"""Weights on 8 simulated devices: the plain load's values, and only what the devices hold."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from rsagent_jax.models.qwen25_vl import convert, tensor_files
from rsagent_jax.models.qwen25_vl.config import load_config
from rsagent_jax.models.qwen25_vl.load import load_policy
from tests.simulated import run_simulated

from . import tiny

pytestmark = pytest.mark.slow

SMALL = tiny.Case("small", ((1, 4, 6),), depth=2, fullatt=(0,), layers=3)
WIDE = tiny.Case("wide", (), hidden=64, heads=8, kv_heads=8, mrope_section=(1, 1, 2), layers=3, vision_hidden=64)


@pytest.mark.parametrize("target", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_values_are_widened_exactly_kept_or_rounded_to_nearest(dtype, target, tmp_path):
    tiny.write(SMALL, tmp_path, dtype=dtype)
    model = convert.load_model(tmp_path, load_config(tmp_path), dtype=target)
    loaded = tiny.to_hub(model, target)
    assert {str(value.dtype) for value in convert.flat_params(model).values()} == {target}
    for name, value in load_file(tmp_path / "model.safetensors").items():
        assert loaded[name].tobytes() == value.astype(np.float32).astype(target).tobytes(), name
    if dtype in (target, "bfloat16"):  # nothing was rounded
        convert.save_model(model, tmp_path / "again", tiny.read_raw(tmp_path))
        assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_no_more_than_a_parameters_shards_and_a_block_are_held(tmp_path, monkeypatch):
    """Blocks of one row: the largest read is the longest row of the checkpoint, not its largest tensor."""
    counted, real = [], tensor_files.check_finite
    monkeypatch.setattr(tensor_files, "BLOCK_ROWS", 1)
    monkeypatch.setattr(tensor_files, "check_finite", lambda b, t: (counted.append(b.nbytes), real(b, t)))
    tiny.write(SMALL, tmp_path, dtype="bfloat16")
    model = convert.load_model(tmp_path, load_config(tmp_path))
    shapes = [shape for *_, shape in convert.hub_slots(model).values()]
    assert max(counted) == max(2 * int(np.prod(s[1:])) for s in shapes)
    assert sum(counted) == 2 * sum(int(np.prod(s)) for s in shapes)  # every byte, once
    stored = load_file(tmp_path / "model.safetensors")
    for name, value in tiny.to_hub(model, "bfloat16").items():
        assert value.tobytes() == stored[name].tobytes(), name


# What every script begins with; `counts` has the bytes of every block of values that is read.
PREAMBLE = """
import json, pathlib, sys
from unittest import mock
import jax, numpy as np, optax
from flax import nnx
from rsagent_jax.config.schema import MeshConfig
from rsagent_jax.models.qwen25_vl import convert, tensor_files
from rsagent_jax.models.qwen25_vl.config import load_config
from rsagent_jax.models.qwen25_vl.load import load_policy
from rsagent_jax.runtime import processes, sharding
from rsagent_jax.train.checkpoint import Checkpoints
from rsagent_jax.train.state import create_state

directory = pathlib.Path(sys.argv[1])
counts, check_finite = [], tensor_files.check_finite
tensor_files.check_finite = lambda block, tensor: (counts.append(block.nbytes), check_finite(block, tensor))
def on_its_shards(value, wanted):
    shares = {s.data.shape for s in value.addressable_shards}
    return value.sharding.is_equivalent_to(wanted, value.ndim) and shares == {wanted.shard_shape(value.shape)}
"""


def run(script, directory, devices, count=1):
    run_simulated(["-c", PREAMBLE + script, str(directory)], devices, count)


def assert_exported_as_it_was(directory):
    before = load_file(directory / "model.safetensors")
    shards = list((directory / "out").glob("model-*-of-*.safetensors"))
    assert len(shards) > 3
    after = {name: value for path in shards for name, value in load_file(path).items()}
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)


ON_EIGHT = """
assert len(jax.devices()) == 8
config, model = load_config(directory), convert.abstract_model(load_config(directory))
plain = {n: np.asarray(v) for n, v in convert.flat_params(convert.load_model(directory, config)).items()}
everything = sum(v.size for v in plain.values()) * 2  # bf16 in the file

for mesh_config in (MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=8, fsdp=1),
                    MeshConfig(fsdp=1, tensor=8), MeshConfig(fsdp=4, tensor=2)):
    mesh = sharding.make_mesh(mesh_config)
    counts.clear()
    loaded = load_policy(str(directory), mesh)
    assert sum(counts) == everything, (mesh_config, sum(counts), everything)  # replicas are read once
    wanted = convert.flat_state(sharding.param_shardings(model, mesh))
    for name, value in convert.flat_params(loaded).items():
        assert on_its_shards(value, wanted[name]), name
        np.testing.assert_array_equal(np.asarray(value), plain[name], err_msg=name)
    # what is donated is not written into: replicas may share one host buffer
    state = nnx.state(loaded, nnx.Param)
    more = jax.jit(lambda s: jax.tree.map(lambda p: p + 1, s), donate_argnums=0)(state)
    for name, value in convert.flat_state(more).items():
        np.testing.assert_array_equal(np.asarray(value), plain[name] + 1, err_msg=name)

# In the engine's dtype: while it is loaded neither the host nor a device has more of an array than a device's share.
mesh, made = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), []
wanted = convert.flat_state(sharding.param_shardings(model, mesh))
def made_on_host(*args, real=convert._aligned_empty):
    made.append(real(*args).nbytes)
    return real(*args)
with mock.patch.object(convert, "_aligned_empty", made_on_host):
    loaded = load_policy(str(directory), mesh, "bfloat16")
largest = max(2 * int(np.prod(wanted[n].shard_shape(v.shape))) for n, v in plain.items())
assert max(made) == largest < 2 * max(v.size for v in plain.values())
for name, value in convert.flat_params(loaded).items():
    assert value.dtype == "bfloat16" and on_its_shards(value, wanted[name]), name
    np.testing.assert_array_equal(np.asarray(value, np.float32), plain[name], err_msg=name)  # those of the file

# Out of sharded arrays, in shards.
convert.save_model(loaded, directory / "out", json.loads((directory / "config.json").read_text()), 20_000)
"""


def test_eight_devices_hold_the_plain_loads_values_and_read_what_they_hold(tmp_path):
    tiny.write(WIDE, tmp_path, dtype="bfloat16")
    run(ON_EIGHT, tmp_path, devices=8)
    assert_exported_as_it_was(tmp_path)


TWO_PROCESSES = """
jax.config.update("jax_cpu_collectives_implementation", "gloo")
processes.initialize_distributed()
assert jax.device_count() == 4 and jax.local_device_count() == 2
model = load_policy(str(directory), sharding.make_mesh(MeshConfig(fsdp=4)))
params = convert.flat_params(model).values()
held = sum(sum(s.data.size for s in {str(s.index): s for s in p.addressable_shards}.values()) for p in params)
everything = sum(p.size for p in params)
assert sum(counts) == 2 * held, (sum(counts), held)
assert held < 0.6 * everything, (held, everything)  # the rest are norms and biases, which every device holds
convert.save_model(model, directory / "out", json.loads((directory / "config.json").read_text()), 20_000)
"""


def test_two_processes_read_half_each_and_gather_an_export(tmp_path):
    """Needs JAX's CPU collectives (gloo, part of jaxlib)."""
    tiny.write(WIDE, tmp_path, dtype="bfloat16")
    run(TWO_PROCESSES, tmp_path, devices=2, count=2)
    assert_exported_as_it_was(tmp_path)


STAGE = """
weights, stage = directory / "hf", directory / "checkpoints/sft"
model = load_policy(str(weights), sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
checkpoints = Checkpoints(stage, weights)
checkpoints.save(create_state(nnx.state(model, nnx.Param), optax.sgd(0.1)), {})
checkpoints.close()
plain = convert.flat_params(convert.load_model(weights, model.config))
for config in (MeshConfig(), MeshConfig(data=8, fsdp=1), MeshConfig(fsdp=2, tensor=4)):
    mesh = sharding.make_mesh(config)
    wanted = convert.flat_state(sharding.param_shardings(convert.abstract_model(model.config), mesh))
    for dtype in ("float32", "bfloat16"):
        for name, value in convert.flat_params(load_policy(str(stage), mesh, dtype)).items():
            assert on_its_shards(value, wanted[name]), name
            np.testing.assert_array_equal(np.asarray(value), np.asarray(plain[name].astype(dtype)), err_msg=name)
"""


def test_a_stage_that_eight_devices_saved_goes_to_any_mesh_and_to_one_device(tmp_path):
    model = tiny.write(WIDE, tmp_path / "hf")
    run(STAGE, tmp_path, devices=8)
    want = convert.flat_params(model)
    for name, value in convert.flat_params(load_policy(str(tmp_path / "checkpoints/sft"))).items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(want[name]), err_msg=name)
