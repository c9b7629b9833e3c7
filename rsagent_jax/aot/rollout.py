"""The rollout engine's programs, for one host of a slice that is not there.

Every process runs an engine of its own on its own devices, so the mesh is one host's. The work fills the engine: every
slot has a context as long as it may get, every lane appends a piece of a prompt.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from rsagent_jax.aot.flops import Workload, model_flops
from rsagent_jax.aot.report import Decoding, Job
from rsagent_jax.config.schema import SamplingConfig
from rsagent_jax.models.qwen25_vl import convert
from rsagent_jax.models.qwen25_vl.compute import Compute
from rsagent_jax.models.qwen25_vl.config import Qwen25VLConfig, TextConfig
from rsagent_jax.rollout import kv_cache as kv
from rsagent_jax.rollout.engine import fill_sampling_defaults
from rsagent_jax.rollout.programs import Images, Piece, RolloutPrograms, Slots, Turns, Weights, weight_shardings
from rsagent_jax.rollout.weights import weight_parts
from rsagent_jax.runtime import processes, sharding


def host_mesh(devices: list, tensor: int) -> Mesh:
    """processes.local_mesh of a host with these devices, be it a single one: the mesh says for which chip."""
    return Mesh(np.array(devices).reshape(-1, 1, tensor), sharding.AXES)


def rollout_jobs(
    sampling: SamplingConfig,
    policy: Qwen25VLConfig,
    dtype: str,
    mesh: Mesh,
    resident: int,
    given: Any = None,
    several: bool = False,
) -> Iterator[Job]:
    """Weights from the policy, the tower on its longest buffer, a macro-step with and without a piece of a prompt.

    resident: bytes per device that training holds meanwhile. given: the policy's parameters where the engine reads
    them in place; None where it gets a copy. several: hosts train it, so that the copy is made part after part.
    """
    s = fill_sampling_defaults(sampling, policy, mesh, "grpo.sampling" if resident else "sampling")
    model, rows = convert.abstract_model(policy), sharding.rows(mesh)
    params, programs = nnx.state(model, nnx.Param), RolloutPrograms(model, s, 0, Compute(dtype, mesh=mesh))
    whole = weight_shardings(programs, params, mesh)
    weights, slots = place_shapes(jax.eval_shape(programs.split, params), whole), abstract_slots(programs, mesh)

    def host(*shape: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
        """An array that the host puts over the rows."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

    held = resident - (device_bytes(given) if given is not None else 0)
    given = local_shapes(params, dtype, mesh) if given is None else given
    for name, part in (weight_parts(programs, given) if several else {"": given}).items():
        target = weight_shardings(programs, part, mesh)
        made = functools.partial(jax.jit(programs.split, out_shardings=target).trace, part)
        yield Job(f"rollout weights {name}".rstrip(), made, 0.0, held)
        held += device_bytes(place_shapes(jax.eval_shape(programs.split, part), target))

    p, n, t = s.lanes, s.patches, s.prefill
    side = 8 * max(w for w in range(1, math.isqrt(n) // 8 + 1) if n % (8 * w) == 0)
    view = Workload(p, n // policy.vision.merge_unit, (), ((n // side, side),), False, False)
    seen = model_flops(policy, view).total - model_flops(policy, dataclasses.replace(view, images=())).total
    blocks, needed = decode_reads(programs, weights, slots.cache)
    decoding = Decoding(
        slots=s.slots,
        devices=mesh.size,
        tensor=mesh.shape["tensor"],
        places=blocks * programs.block,
        steps=s.chunk,
        weight_bytes=device_bytes(weights),
        slot_bytes=device_bytes(slots) * sharding.parts("rows", mesh) // s.slots,
        training_bytes=resident,
        needed_bytes=needed,
    )
    both = dataclasses.replace(decoding, steps=0)

    patches = host(p, n, policy.vision.patch_dim, dtype=jnp.float32)
    images = Images(patches, host(p, n), host(p, n, 2), host(p))
    # What a program does not read is no argument of the compiled one, and stays on the device all the same.
    tower = device_bytes(weights.unstacked["vision"])
    beside = resident + device_bytes(weights) - tower
    yield Job("rollout encode", lambda: programs.encode.trace(weights, slots, images), seen, beside, view, both)

    key = place_shapes(jax.eval_shape(lambda: jax.random.key(0)), sharding.replicated(mesh))
    numbers = (host(s.slots) for _ in range(6))
    turns = Turns(host(s.slots, dtype=jnp.bool_), *numbers, host(s.slots, dtype=jnp.float32))
    piece = Piece(host(p), host(p, t), host(p, 3, t), host(p, t), host(p), host(p))

    def step(piece: Piece | None, blocks: int) -> jax.stages.Traced:
        return programs.step.trace(weights, slots, key, piece, turns, blocks=blocks, steps=s.chunk)

    flops = decode_flops(policy.text, s.slots, s.chunk, decoding.places, logits=True)
    more = decode_flops(policy.text, p, t, programs.blocks * programs.block, logits=False)
    yield Job("rollout append", lambda: step(piece, programs.blocks), flops + more, resident + tower, decoding=both)
    yield Job("rollout decode", lambda: step(None, blocks), flops, resident + tower, decoding=decoding)


def decode_reads(programs: RolloutPrograms, weights: Weights, cache: Any) -> tuple[int, int]:
    """(blocks of each slot that a decode step reads where contexts are full, bytes that it must read on a device)."""
    blocks = max(n for n in programs.buckets if n == 1 or n * programs.block <= programs.sampling.context)
    decoder = weights.unstacked["decoder"]
    head = decoder["lm_head" if "lm_head" in decoder else "embed"]
    return blocks, device_bytes((weights.layers, head)) + device_bytes(cache) * blocks // programs.blocks


def decode_flops(text: TextConfig, rows: int, tokens: int, places: int, *, logits: bool) -> float:
    """Of `tokens` new tokens in each of `rows` slots that see `places` places, through the decoder and its head."""
    d, h = text.hidden_size, text.head_dim
    heads, kv_heads = text.num_attention_heads * h, text.num_key_value_heads * h
    layer = 2 * d * (heads + kv_heads) + 3 * d * text.intermediate_size + 2 * heads * places
    return 2.0 * rows * tokens * (layer * text.num_hidden_layers + logits * d * text.vocab_size)


def local_shapes(params: nnx.State, dtype: str, mesh: Mesh) -> nnx.State:
    """What processes.local_copy hands to Engine.load."""
    chips = Mesh(mesh.devices.reshape(-1), ("chip",))
    where = jax.tree.map(lambda x: NamedSharding(chips, processes.split_once(x.shape, chips.size)), params)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s), params, where)


def abstract_slots(programs: RolloutPrograms, mesh: Mesh) -> Slots:
    """The engine's slots: rows of the mesh hold lanes, its tensor axis heads."""
    slots, rows = jax.eval_shape(programs.empty), sharding.rows(mesh)
    spec = lambda x: NamedSharding(mesh, sharding.spec_of(x.shape, kv.NAMES[: x.ndim], mesh))  # noqa: E731
    return place_shapes(slots, Slots(jax.tree.map(spec, slots.cache), rows, rows))


def device_bytes(tree: Any) -> int:
    """Of one device's HBM."""
    here = [x for x in jax.tree.leaves(tree) if x.sharding.memory_kind != "pinned_host"]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize for x in here)


def place_shapes(shapes: Any, where: Any) -> Any:
    """Shapes with their shardings; `where` may be a prefix of the tree."""
    whole = jax.tree.broadcast(where, shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, whole)
