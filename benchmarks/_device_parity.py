"""Numbers that have to agree, for benchmarks/device.py and tests/device: log-probs of one random policy on one batch.

of every attention kernel of the platform and the plain one; of the device and this host's CPU; of bf16 and fp32; of the
rollout engine and the trainer, on the tokens that the engine drew. And values and gradients of the kernels alone.
"""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks._policy_step import make_sequence, to_items
from rsagent_jax.config.schema import BatchConfig, MeshConfig, SamplingConfig
from rsagent_jax.data.packing import pack
from rsagent_jax.fitness import decoding, kernels
from rsagent_jax.fitness.made_up import random_policy
from rsagent_jax.models.qwen25_vl.compute import Compute
from rsagent_jax.models.qwen25_vl.config import Qwen25VLConfig
from rsagent_jax.models.qwen25_vl.positions import padded_patches
from rsagent_jax.rollout.engine import Engine
from rsagent_jax.runtime import processes, sharding
from rsagent_jax.train.step import batch_logprobs

DTYPES = ("float32", "bfloat16")
LENGTH = 640  # places of a row that kernels alone are compared on
HEADS = {"text": (4, 1, 128), "images": (2, 2, 80)}  # query heads, key heads, head dim: of the 7B, and fewer


def kernels_of(platform: str, dtype: str) -> list[str]:
    """Attention kernels that this platform has beside the plain one; cuDNN has none in fp32."""
    gpu = ["triton"] + ["cudnn", "cudnn_causal"] * (dtype == "bfloat16")
    return ["blocks", *{"tpu": ["splash"], "gpu": gpu}.get(platform, [])]


class Scored:
    """A policy and a batch whose log-probs can be computed in several ways. Weights: fp32, the same everywhere."""

    def __init__(self, config: Qwen25VLConfig, raw: dict[str, Any], rows: int, tokens: int, grid: tuple[int, int]):
        self.config, self.cpu = config, jax.devices("cpu")[0]
        self.graphdef, self.params = random_policy(config, self._mesh(self.cpu), "float32")
        rng = np.random.default_rng(1)
        items = to_items([make_sequence(rng, raw, tokens, (1, *grid)) for _ in range(rows)], config)
        places = padded_patches(items[0].grids, config.vision)
        (self.batch,) = pack(items, BatchConfig(rows=rows, tokens=tokens, patches=places), config)

    def _mesh(self, device) -> jax.sharding.Mesh:
        return sharding.make_mesh(MeshConfig(), [device])

    def logprobs(self, dtype: str, attention: str = "plain", device=None, *, exact: bool = False) -> np.ndarray:
        """f32[N] of the trained tokens. `exact`: fp32 products without TF32 or bf16 passes."""
        mesh = self._mesh(device or jax.devices()[0])
        compute = Compute(dtype, attention=attention, mesh=mesh)
        program = jax.jit(lambda params, batch: batch_logprobs(self.graphdef, params, batch, compute, 1.0))
        params = jax.device_put(self.params, sharding.replicated(mesh))
        with jax.default_matmul_precision("highest") if exact else contextlib.nullcontext():
            found = program(params, processes.put_rows(self.batch, mesh))
        return np.asarray(found)[self.batch.loss_mask]

    def engine_differences(self, dtype: str) -> np.ndarray:
        """|engine - trainer| in nats, of every token that the engine drew; both on the first device."""
        config, device = self.config, jax.devices()[0]
        params = jax.device_put(jax.tree.map(lambda x: x.astype(dtype), self.params), device)
        sizes = dict(slots=4, lanes=2, context=256, patches=config.vision.window_patches, max_new_tokens=16, prefill=64)
        model, ends, key = nnx.merge(self.graphdef, params), config.eos_token_ids[0], jax.random.key(0)
        engine = Engine(model, SamplingConfig(**sizes), ends, dtype, key)
        return decoding._differences(self.graphdef, params, decoding._play(engine), Compute(dtype), 1.0, engine)


def kernel_differences(kind: str, dtype: str) -> dict[str, tuple[float, float]]:
    """By shape of heads: the largest difference of values and of gradients from plain, over plain's largest."""
    return {name: kernels._differences(kind, dtype, name == "text", LENGTH, *heads) for name, heads in HEADS.items()}


def compare_all(config: Qwen25VLConfig, raw, rows: int, tokens: int, grid: tuple[int, int]) -> list[dict[str, Any]]:
    """Rows of what is compared, the largest difference and the mean one."""
    scored, platform, found = Scored(config, raw, rows, tokens, grid), jax.default_backend(), []

    def add(name: str, differences: np.ndarray, unit: str = "nats") -> None:
        found.append({"name": name, "max": float(differences.max()), "mean": float(differences.mean()), "unit": unit})

    plain = {dtype: scored.logprobs(dtype) for dtype in DTYPES}
    add("policy, bfloat16 and float32", np.abs(plain["bfloat16"] - plain["float32"]))
    if platform != "cpu":
        on_cpu = scored.logprobs("float32", device=scored.cpu)
        add(f"policy, {platform} and CPU, float32", np.abs(plain["float32"] - on_cpu))
        exact = scored.logprobs("float32", exact=True)
        add(f"policy, {platform} and CPU, float32, exact products", np.abs(exact - on_cpu))
        on_cpu = scored.logprobs("bfloat16", device=scored.cpu)
        add(f"policy, {platform} and CPU, bfloat16", np.abs(plain["bfloat16"] - on_cpu))
    for dtype in DTYPES:
        add(f"engine and trainer, {dtype}", scored.engine_differences(dtype))
        for kind in kernels_of(platform, dtype):
            add(f"policy, {kind} and plain, {dtype}", np.abs(scored.logprobs(dtype, kind) - plain[dtype]))
            for name, (values, grads) in kernel_differences(kind, dtype).items():
                add(
                    f"{kind} and plain, {name}, values and gradients, {dtype}",
                    np.array([values, grads]),
                    "of the largest",
                )
    return found
