"""The engine on a mesh of simulated devices, in a process of its own; started by test_mesh.py with its job as JSON.

`play` plays trajectories and lists what the devices send to each other; `weights` loads weights of training layouts.
"""

import collections
import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from rsagent_jax.aot.compiled import Program
from rsagent_jax.config.schema import MeshConfig
from rsagent_jax.rollout.engine import Engine
from rsagent_jax.rollout.weights import WeightLoader
from rsagent_jax.runtime import sharding
from tests.rollout import small
from tests.rollout.small import THREE_IMAGES, Task, click, finish, task, zoom

SHAPE = dict(hidden=64, heads=8, kv_heads=4)  # as in the 7B, four key-value heads with several queries each
SAMPLING = dataclasses.replace(small.SAMPLING, slots=16, context=448, chunk=4)
ONE_BLOCK = dict(context=240, prefill=16)  # half as many programs
SCRIPTS = {
    "s0": (zoom(10, 10, 60, 90), finish(None)),
    "s1": (finish(None),),
    "s2": THREE_IMAGES,
    "s3": (click(50, 50), "nonsense", finish(1)),
}


def work(most_turns: int) -> list[Task]:
    """A group of three that share an opening, and others of other lengths."""
    group = [Task(small.sample(0), 0, uid) for uid in (0, 10, 11)]
    tasks = [*group, task(1, h=56, w=84), task(2), task(3, h=84, w=140)]
    return [t for t in tasks if len(SCRIPTS[t.sample.id]) <= most_turns]


def make_engine(data: int, tensor: int, dtype: str = "float32", **sampling) -> Engine:
    """On data x tensor devices; on 1 x 1 without a mesh, as processes.local_mesh has it."""
    devices = np.array(jax.devices()[: data * tensor]).reshape(data, 1, tensor)
    mesh = None if devices.size == 1 else jax.sharding.Mesh(devices, sharding.AXES)
    settings = dataclasses.replace(SAMPLING, **sampling)
    terminator = small.processor().terminator_id
    return Engine(small.model(**SHAPE), settings, terminator, dtype, jax.random.key(0), mesh)


def sent(engine: Engine) -> dict[str, list]:
    """By program, the collectives: kind, operand on a device, devices, times, where in the program."""
    piece, images = engine._piece(), engine._images(engine.rungs[-1], [])
    lanes = engine.sampling.lanes
    slots = engine._put((np.zeros(lanes, np.int32), np.zeros(lanes, np.int32), np.zeros(lanes, bool)))
    programs, weights, blocks = engine.programs, engine.weights, engine.programs.buckets[-1]
    state, turns = engine.state, engine._turns()
    step = lambda piece: programs.step.lower(weights, state, engine.key, piece, turns, blocks=blocks)  # noqa: E731
    lowered = {
        "append": step(piece),
        "decode": step(None),
        "copy": programs.copy.lower(state, *slots, np.int32(1)),
        "encode": programs.encode.lower(weights, state, images),
    }
    out = {}
    for name, program in lowered.items():
        found = collections.Counter()
        for c in Program(program.compile().as_text()).collectives():
            found[c.kind, c.shape, c.group, "while/" in c.op_name] += c.executions
        out[name] = sorted([*key, n] for key, n in found.items())
    return out


def play(data: int, tensor: int, most_turns: int, warm: bool, **sampling) -> dict:
    engine = make_engine(data, tensor, **sampling)
    if warm:
        engine.warm_up()
    compiled = small.count_compiles()
    played = small.engine_trajectories(work(most_turns), SCRIPTS, eng=engine)
    out = {"compiled": len(compiled), "at_most": engine.programs_at_most, "copied": engine.stats["copied_tokens"]}
    used = (engine.programs.encode, engine.programs.copy, engine.programs.step)
    cache = engine.state.cache[0].keys
    return out | {
        "programs": sum(p._cache_size() for p in used),
        "tokens": [t.tokens.tolist() for t in played],
        "logprobs": [t.logprobs.tolist() for t in played],
        "cache": [cache.shape, cache.sharding.shard_shape(cache.shape)],
        "sent": sent(engine),
    }


def addresses(x: jax.Array) -> list[int]:
    return [shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards]


def live() -> int:
    """Bytes of all arrays on the devices, buffers that several share once."""
    shards = [s.data for x in jax.live_arrays() for s in x.addressable_shards]
    return sum({s.unsafe_buffer_pointer(): s.nbytes for s in shards}.values())


def load(train: dict, data: int, tensor: int, dtype: str) -> dict:
    """From a training mesh; the engine's own weights at first are others, so that nothing of them can be meant."""
    engine = make_engine(data, tensor, dtype)
    model = small.model(**SHAPE)
    params = jax.tree.map(lambda x: np.asarray(x) + 0.5, small.split(model)[1])
    theirs = dict(jax.tree_util.tree_leaves_with_path(engine.programs.split(params)))
    placed = jax.device_put(params, sharding.param_shardings(model, sharding.make_mesh(MeshConfig(**train))))
    engine.load(placed, engine.key)
    compiled = small.count_compiles()
    engine.release_memory()
    resting = live()
    engine.load(placed, engine.key)
    loaded, recompiled = live() - resting, len(compiled)
    flat = dict(jax.tree_util.tree_leaves_with_path(engine.weights))
    of_params = {address for x in jax.tree.leaves(placed) for address in addresses(x)}
    shared = {k: x for k, x in flat.items() if set(addresses(x)) & of_params}
    where = dict(jax.tree_util.tree_leaves_with_path(engine.loader.where))
    bytes_of = lambda x: len(x.addressable_shards) * x.addressable_shards[0].data.nbytes  # noqa: E731
    engine.release_memory()
    before, beside = live(), []

    def local(part):
        beside.append(live() - before)
        return jax.tree.map(jnp.copy, part)

    loader = WeightLoader(engine.programs, placed, engine.mesh, local)
    by_parts = dict(jax.tree_util.tree_leaves_with_path(loader.load(placed)))
    assert by_parts.keys() == flat.keys()
    return {
        "parts_equal": all(np.array_equal(x, flat[k]) and x.sharding == flat[k].sharding for k, x in by_parts.items()),
        "parts": len(beside),
        "beside": max(beside),  # when another part was asked for
        "made": sum(bytes_of(x) for x in by_parts.values()),
        "equal": all(np.array_equal(np.asarray(x), np.asarray(theirs[k])) for k, x in flat.items()),
        "placed": all(x.sharding == where[k] for k, x in flat.items()),
        "compiled": recompiled,
        "seconds": engine.seconds["weights"],
        "shared": len(shared),
        "shared_layers": sum(".layers" in jax.tree_util.keystr(k) for k in shared),
        "unstacked": sum(".unstacked" in jax.tree_util.keystr(k) for k in flat),
        "loaded": loaded,
        "new": sum(bytes_of(x) for k, x in flat.items() if k not in shared),
    }


def weights(cases: list[dict]) -> dict:
    return {"cases": [load(**case) for case in cases]}


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    print(json.dumps({"play": play, "weights": weights}[job.pop("what")](**job)))
