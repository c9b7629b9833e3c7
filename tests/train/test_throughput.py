"""Times that add up, and verl's figures from numbers that are worked out by hand."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rsagent_jax.config.schema import MeshConfig
from rsagent_jax.runtime import sharding
from rsagent_jax.train import throughput
from rsagent_jax.train.throughput import CompileCounter, StepClock, WorkCounter, sequence_lengths, verl_flops

# 2 layers: mlp 3 * 8 * 16, q and o 2 * 8 * 8, k and v 2 * 8 * 4 -> 576 each; embedding and head 2 * 10 * 8
TEXT = types.SimpleNamespace(
    hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=4,
    vocab_size=10,
)  # fmt: skip
FLOPS = 6 * (2 * 576 + 160) * 5 + 12 * (3**2 + 2**2) * 8 * 2  # of sequences of 3 and 2 tokens


def batch(*rows):
    return types.SimpleNamespace(segment_ids=np.array(rows, np.int32))


def test_the_parts_of_a_step_add_up_to_it(monkeypatch):
    now = iter([0.0, 10.0, 11.0, 15.0, 16.0, 18.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(now))
    clock = StepClock()
    clock.lap("batch", {"seconds/rollout": 6.0, "seconds/reward": 1.0, "loss": 5.0})
    clock.lap("reward")
    clock.lap("update")
    parts = {"rollout": 6.0, "reward": 2.0, "batch": 3.0, "update": 4.0, "other": 1.0}
    assert clock.read() == {"seconds": 16.0} | {f"seconds/{name}": s for name, s in parts.items()}
    assert clock.read() == {"seconds": 2.0, "seconds/other": 2.0}


def test_a_program_is_counted_once_for_each_shape():
    double, one, two = jax.jit(lambda x: 2 * x), jnp.zeros(3), jnp.zeros(4)
    compiles = CompileCounter()
    for x, count in ((one, 1), (one, 0), (two, 1), (one, 0)):
        double(x)
        assert compiles.read() == {"compiles": count}


def test_work_is_counted_as_verl_counts_it():
    batches = [batch([1, 1, 1, 2, 2, 0, 0]), batch([0, 0, 0, 0, 0, 0, 0])]
    assert sequence_lengths(batches).tolist() == [3, 2] and len(sequence_lengths([])) == 0
    assert verl_flops(TEXT, np.array([3, 2])) == FLOPS


def test_throughput_is_per_device_and_mfu_of_the_updates_time(monkeypatch):
    monkeypatch.setattr(throughput, "verl_flops", lambda config, lengths: 1e12)
    mesh = sharding.make_mesh(MeshConfig())
    work = WorkCounter(TEXT, mesh, peak=1e13)
    work.begin([batch([1, 1, 1, 2, 2, 0, 0])])
    seconds, n = {"seconds": 4.0, "seconds/update": 2.0}, mesh.devices.size
    assert work.figures(seconds, passes=3) == {
        "perf/total_num_tokens": 5.0,
        "perf/throughput": 5 / 4 / n,
        "perf/mfu/actor": pytest.approx(3e12 / 2 / (1e13 * n)),
    }
    played = work.figures(seconds | {"perf/total_num_tokens": 20.0}, passes=1)  # more than is trained on
    assert played["perf/throughput"] == 20 / 4 / n
    halves = WorkCounter(TEXT, mesh, 1e13, 2).figures(seconds | {"perf/total_num_tokens": 20.0}, passes=1)
    assert halves["perf/throughput"] == 20 / 4 / (n / 2)
    assert "perf/mfu/actor" not in WorkCounter(TEXT, mesh).figures(seconds, passes=1)  # an unknown device
