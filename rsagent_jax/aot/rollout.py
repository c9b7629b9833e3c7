"""The rollout engine's programs, for one host of a slice that is not there.

Every process runs an engine of its own on its own devices, so the mesh is one host's. The work fills the engine: every
slot has a context as long as it may get, every lane appends a piece of a prompt.
"""

from __future__ import annotations

import dataclasses
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
from rsagent_jax.runtime import processes, sharding


def host_mesh(devices: list, tensor: int) -> Mesh:
    """processes.local_mesh of a host with these devices, be it a single one: the mesh says for which chip."""
    return Mesh(np.array(devices).reshape(-1, 1, tensor), sharding.AXES)


def rollout_jobs(
    sampling: SamplingConfig, policy: Qwen25VLConfig, dtype: str, mesh: Mesh, resident: int, given: Any = None
) -> Iterator[Job]:
    """Weights from the policy, the tower on its longest buffer, a macro-step with and without a piece of a prompt.

    resident: bytes per device that training holds meanwhile. given: the policy's parameters where the engine reads
    them in place; None where it gets a local copy.
    """
    engine = AbstractEngine(sampling, policy, dtype, mesh)
    programs, s, weights, slots = engine.programs, engine.sampling, engine.weights(), engine.slots()
    held = resident - (device_bytes(given) if given is not None else 0)
    given = engine.local_copy() if given is None else given
    split = jax.jit(programs.split, out_shardings=engine.where)
    yield Job("rollout weights", lambda: split.lower(given), 0.0, held)

    side = 8 * max(w for w in range(1, math.isqrt(s.patches) // 8 + 1) if s.patches % (8 * w) == 0)
    view = Workload(s.lanes, s.patches // policy.vision.merge_unit, (), ((s.patches // side, side),), False, False)
    text = dataclasses.replace(view, images=())
    seen = model_flops(policy, view).total - model_flops(policy, text).total
    # What a program does not read is no argument of the compiled one, and stays on the device all the same.
    tower = device_bytes(weights.unstacked["vision"])
    beside = resident + device_bytes(weights) - tower
    yield Job("rollout encode", lambda: programs.encode.lower(weights, slots, engine.images()), seen, beside, view)

    whole = programs.blocks
    blocks = max(n for n in programs.buckets if n == 1 or n * programs.block <= s.context)
    live = device_bytes(slots.cache) * blocks // whole
    head = weights.unstacked["decoder"]["lm_head" if "lm_head" in weights.unstacked["decoder"] else "embed"]
    decoding = Decoding(
        slots=s.slots,
        devices=mesh.size,
        tensor=mesh.shape["tensor"],
        places=blocks * programs.block,
        steps=s.chunk,
        weight_bytes=device_bytes(weights),
        slot_bytes=device_bytes(slots) * sharding.parts("rows", mesh) // s.slots,
        training_bytes=resident,
        needed_bytes=device_bytes(weights.layers) + device_bytes(head) + live,
    )
    step = decode_flops(policy.text, s.slots, s.chunk, decoding.places, logits=True)
    more = decode_flops(policy.text, s.lanes, s.prefill, whole * programs.block, logits=False)

    def lower(piece, blocks):
        return programs.step.lower(weights, slots, engine.key(), piece, engine.turns(), blocks=blocks, steps=s.chunk)

    yield Job(
        "rollout append",
        lambda: lower(engine.piece(), whole),
        step + more,
        resident + tower,
        decoding=dataclasses.replace(decoding, steps=0),
    )
    yield Job("rollout decode", lambda: lower(None, blocks), step, resident + tower, decoding=decoding)


def decode_flops(text: TextConfig, rows: int, tokens: int, places: int, *, logits: bool) -> float:
    """Of `tokens` new tokens in each of `rows` slots that see `places` places, through the decoder and its head."""
    d, h = text.hidden_size, text.head_dim
    heads, kv_heads = text.num_attention_heads * h, text.num_key_value_heads * h
    layer = 2 * d * (heads + kv_heads) + 3 * d * text.intermediate_size + 2 * heads * places
    return 2.0 * rows * tokens * (layer * text.num_hidden_layers + logits * d * text.vocab_size)


class AbstractEngine:
    """What an engine holds and what its programs take: shapes with their places on the mesh instead of arrays."""

    def __init__(self, sampling: SamplingConfig, policy: Qwen25VLConfig, dtype: str, mesh: Mesh):
        rows = sharding.parts("rows", mesh)
        self.sampling = fill_sampling_defaults(sampling, policy.vision.window_patches, rows)
        self.policy, self.mesh = policy, mesh
        model = convert.abstract_model(policy)
        self.params = nnx.state(model, nnx.Param)
        self.programs = RolloutPrograms(model, self.sampling, 0, Compute(dtype, mesh=mesh))
        self.where = weight_shardings(self.programs, self.params, mesh)

    def weights(self) -> Weights:
        return _placed(jax.eval_shape(self.programs.split, self.params), self.where)

    def local_copy(self) -> nnx.State:
        """What processes.local_copy hands to Engine.load."""
        chips = Mesh(self.mesh.devices.reshape(-1), ("chip",))

        def one(x):
            where = NamedSharding(chips, processes.split_once(x.shape, chips.size))
            return jax.ShapeDtypeStruct(x.shape, self.programs.compute.dtype, sharding=where)

        return jax.tree.map(one, self.params)

    def slots(self) -> Slots:
        slots, rows = jax.eval_shape(self.programs.empty), sharding.rows(self.mesh)

        def place(x):
            return NamedSharding(self.mesh, sharding.spec_of(x.shape, kv.NAMES[: x.ndim], self.mesh))

        return _placed(slots, Slots(jax.tree.map(place, slots.cache), rows, rows))

    def key(self) -> jax.ShapeDtypeStruct:
        key = jax.eval_shape(lambda: jax.random.key(0))
        return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(self.mesh))

    def images(self) -> Images:
        p, n = self.sampling.lanes, self.sampling.patches
        patches = self._host(p, n, self.policy.vision.patch_dim, dtype=jnp.float32)
        return Images(patches, self._host(p, n), self._host(p, n, 2), self._host(p, dtype=jnp.bool_))

    def piece(self) -> Piece:
        p, t = self.sampling.lanes, self.sampling.prefill
        shapes = ((p,), (p, t), (p, 3, t), (p, t), (p,), (p,))
        return Piece(*(self._host(*shape) for shape in shapes))

    def turns(self) -> Turns:
        s = self.sampling.slots
        return Turns(self._host(s, dtype=jnp.bool_), *(self._host(s) for _ in range(6)))

    def _host(self, *shape: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
        """An array that the host puts over the rows."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.rows(self.mesh))


def device_bytes(tree: Any) -> int:
    """Of one device's HBM."""
    here = [x for x in jax.tree.leaves(tree) if x.sharding.memory_kind != "pinned_host"]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize for x in here)


def _placed(shapes: Any, where: Any) -> Any:
    whole = jax.tree.broadcast(where, shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, whole)
