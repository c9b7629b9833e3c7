"""Weights on 8 simulated devices: the plain load's values, and only the bytes that the devices hold."""

import os
import pathlib
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from rsagent_jax.models.qwen25_vl import convert, tensor_files
from rsagent_jax.models.qwen25_vl.config import load_config
from rsagent_jax.models.qwen25_vl.load import load_policy

from . import tiny

ROOT = pathlib.Path(__file__).parents[2]
SMALL = tiny.Case("small", ((1, 4, 6),), depth=2, fullatt=(0,), layers=3)


@pytest.fixture
def counted(monkeypatch):
    """The bytes of every block of values that is read."""
    reads, real = [], tensor_files.blocks

    def read(*args):
        for rows, block in real(*args):
            reads.append(block.nbytes)
            yield rows, block

    monkeypatch.setattr(tensor_files, "blocks", read)
    return reads


@pytest.mark.parametrize("target", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_values_are_widened_exactly_kept_or_rounded_to_nearest(dtype, target, tmp_path):
    tiny.write(SMALL, tmp_path, dtype=dtype)
    loaded = tiny.to_hub(convert.load_model(tmp_path, load_config(tmp_path), dtype=target), target)
    for name, value in load_file(tmp_path / "model.safetensors").items():
        assert loaded[name].tobytes() == value.astype(np.float32).astype(target).tobytes(), name


def test_no_more_than_a_parameters_shards_and_a_block_are_held(tmp_path, counted, monkeypatch):
    """Blocks of one row: the largest read is the longest row of the checkpoint, not its largest tensor."""
    monkeypatch.setattr(tensor_files, "BLOCK_ROWS", 1)
    tiny.write(SMALL, tmp_path, dtype="bfloat16")
    model = convert.load_model(tmp_path, load_config(tmp_path))
    shapes = [shape for *_, shape in convert.hub_slots(model).values()]
    assert max(counted) == max(2 * int(np.prod(s[1:])) for s in shapes)
    assert sum(counted) == 2 * sum(int(np.prod(s)) for s in shapes)  # every byte, once
    stored = load_file(tmp_path / "model.safetensors")
    for name, value in tiny.to_hub(model, "bfloat16").items():
        assert value.tobytes() == stored[name].tobytes(), name


def test_bfloat16_parameters_are_the_files_own_bits(tmp_path):
    tiny.write(SMALL, tmp_path, dtype="bfloat16")
    model = convert.load_model(tmp_path, load_config(tmp_path), dtype=ml_dtypes.bfloat16)
    assert {v.dtype for v in convert.flat_params(model).values()} == {np.dtype(ml_dtypes.bfloat16)}
    convert.save_model(model, tmp_path / "again", tiny.read_raw(tmp_path))
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


ON_EIGHT = """
import pathlib, sys
import jax, numpy as np
from flax import nnx
from rsagent_jax.runtime import sharding
from rsagent_jax.models.qwen25_vl.load import load_policy
from rsagent_jax.config.schema import MeshConfig
from rsagent_jax.models.qwen25_vl import convert, tensor_files
from rsagent_jax.models.qwen25_vl.config import load_config

assert len(jax.devices()) == 8
directory = pathlib.Path(sys.argv[1])
config, model = load_config(directory), convert.abstract_model(load_config(directory))
plain = {n: np.asarray(v) for n, v in convert.flat_params(convert.load_model(directory, config)).items()}
counts, real = [], tensor_files.blocks
def read(*args):
    for rows, block in real(*args):
        counts.append(block.nbytes)
        yield rows, block
tensor_files.blocks = read
everything = sum(v.size for v in plain.values()) * 2  # bf16 in the file

for mesh_config in (MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=8, fsdp=1),
                    MeshConfig(fsdp=1, tensor=8), MeshConfig(fsdp=4, tensor=2)):
    mesh = sharding.make_mesh(mesh_config)
    counts.clear()
    loaded = load_policy(str(directory), mesh)
    assert sum(counts) == everything, (mesh_config, sum(counts), everything)  # replicas are read once
    wanted = convert.flat_state(sharding.param_shardings(model, mesh))
    for name, value in convert.flat_params(loaded).items():
        assert value.sharding == wanted[name], name
        np.testing.assert_array_equal(np.asarray(value), plain[name], err_msg=name)
        assert {s.data.shape for s in value.addressable_shards} == {wanted[name].shard_shape(value.shape)}, name
    # what is donated is not written into: replicas may share one host buffer
    state = nnx.state(loaded, nnx.Param)
    more = jax.jit(lambda s: jax.tree.map(lambda p: p + 1, s), donate_argnums=0)(state)
    for name, value in convert.flat_state(more).items():
        np.testing.assert_array_equal(np.asarray(value), plain[name] + 1, err_msg=name)

# In the engine's dtype: while it is loaded neither the host nor a device has more of an array than a device's share.
from unittest import mock
mesh, made = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), []
def made_on_host(*args, real=convert._aligned_empty):
    made.append(real(*args).nbytes)
    return real(*args)
wanted = convert.flat_state(sharding.param_shardings(model, mesh))
largest = max(2 * int(np.prod(wanted[n].shard_shape(v.shape))) for n, v in plain.items())
with mock.patch.object(convert, "_aligned_empty", made_on_host):
    loaded = load_policy(str(directory), mesh, "bfloat16")
assert max(made) == largest < 2 * max(v.size for v in plain.values())
for name, value in convert.flat_params(loaded).items():
    assert value.dtype == "bfloat16" and value.sharding == wanted[name], name
    assert {s.data.shape for s in value.addressable_shards} == {wanted[name].shard_shape(value.shape)}, name
    np.testing.assert_array_equal(np.asarray(value, np.float32), plain[name], err_msg=name)  # those of the file

# Out of sharded arrays, in shards.
raw = __import__("json").loads((directory / "config.json").read_text())
loaded = load_policy(str(directory), sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
convert.save_model(loaded, directory / "out", raw, max_shard_bytes=20_000)
print("DONE", len(list((directory / "out").glob("model-*-of-*.safetensors"))))
"""


def test_eight_devices_hold_the_plain_loads_values_and_read_what_they_hold(tmp_path):
    case = tiny.Case("eight", (), hidden=64, heads=8, kv_heads=8, mrope_section=(1, 1, 2), layers=3, vision_hidden=64)
    tiny.write(case, tmp_path, dtype="bfloat16")
    done = subprocess.run(
        [sys.executable, "-c", ON_EIGHT, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=280,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    shards = int(done.stdout.split()[-1])
    assert shards > 3
    before = load_file(tmp_path / "model.safetensors")
    after = {k: v for p in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(p).items()}
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)


TWO_PROCESSES = """
import json, pathlib, sys
import jax, numpy as np
number, address, directory = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, 2, number)
from rsagent_jax.runtime import sharding
from rsagent_jax.models.qwen25_vl.load import load_policy
from rsagent_jax.config.schema import MeshConfig
from rsagent_jax.models.qwen25_vl import convert, tensor_files

assert jax.device_count() == 4 and jax.local_device_count() == 2
counts, real = [], tensor_files.blocks
def read(*args):
    for rows, block in real(*args):
        counts.append(block.nbytes)
        yield rows, block
tensor_files.blocks = read
model = load_policy(str(directory), sharding.make_mesh(MeshConfig(fsdp=4)))
params = convert.flat_params(model).values()
held = sum(sum(s.data.size for s in {str(s.index): s for s in p.addressable_shards}.values()) for p in params)
whole = sum(p.size for p in params)
assert sum(counts) == 2 * held, (sum(counts), held)
assert held < 0.6 * whole, (held, whole)  # the rest are norms and biases, which every device holds
convert.save_model(model, directory / "out", json.loads((directory / "config.json").read_text()), 20_000)
print("DONE", number, sum(counts), 2 * whole)
"""


def test_two_processes_read_half_each_and_gather_an_export(tmp_path):
    """Needs JAX's CPU collectives (gloo, part of jaxlib)."""
    import socket

    case = tiny.Case("two", (), hidden=64, heads=8, kv_heads=8, mrope_section=(1, 1, 2), layers=2, vision_hidden=64)
    tiny.write(case, tmp_path, dtype="bfloat16")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(i), address, str(tmp_path)],
            cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        answers = [p.communicate(timeout=240) for p in processes]
    finally:
        for p in processes:
            p.kill()
    for p, (out, err) in zip(processes, answers, strict=True):
        assert p.returncode == 0 and "DONE" in out, err[-3000:]
    before = load_file(tmp_path / "model.safetensors")
    after = {k: v for p in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(p).items()}
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)


STAGE = """
import json, pathlib, sys
import jax, numpy as np, optax
from flax import nnx
from rsagent_jax.runtime import sharding
from rsagent_jax.models.qwen25_vl.load import load_policy
from rsagent_jax.train.checkpoint import Checkpoints
from rsagent_jax.config.schema import MeshConfig
from rsagent_jax.models.qwen25_vl import convert
from rsagent_jax.train.state import create_state

weights, stage = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
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
            assert value.sharding.is_equivalent_to(wanted[name], value.ndim), name
            assert {s.data.shape for s in value.addressable_shards} == {wanted[name].shard_shape(value.shape)}, name
            np.testing.assert_array_equal(np.asarray(value), np.asarray(plain[name].astype(dtype)), err_msg=name)
"""


def test_a_stage_that_eight_devices_saved_goes_to_any_mesh_and_to_one_device(tmp_path):
    case = tiny.Case("stage", (), hidden=64, heads=8, kv_heads=8, mrope_section=(1, 1, 2), layers=2, vision_hidden=64)
    model = tiny.write(case, tmp_path / "hf")
    done = subprocess.run(
        [sys.executable, "-c", STAGE, str(tmp_path / "hf"), str(tmp_path / "checkpoints/sft")], cwd=ROOT,
        capture_output=True, text=True, timeout=280,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    want = convert.flat_params(model)
    for name, value in convert.flat_params(load_policy(str(tmp_path / "checkpoints/sft"))).items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(want[name]), err_msg=name)
