"""One way to a policy, for evaluate.py and segment, and to an engine, for train.py and collect as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
from flax import nnx

from rsagent_jax.config import slices
from rsagent_jax.config.schema import AgentConfig, PolicyConfig, SamplingConfig
from rsagent_jax.data.processor import Processor
from rsagent_jax.models.qwen25_vl.config import Qwen25VLConfig, load_config
from rsagent_jax.models.qwen25_vl.load import load_policy, policy_directory
from rsagent_jax.models.qwen25_vl.model import Qwen25VL
from rsagent_jax.rollout.engine import Engine
from rsagent_jax.runtime import processes

if TYPE_CHECKING:  # openai is not for those who do not ask it
    from rsagent_jax.rollout.served import ServedPolicy


def engine_layout(sampling: SamplingConfig, policy: Qwen25VLConfig) -> tuple[SamplingConfig, jax.sharding.Mesh | None]:
    """With slots and tensor filled in where they are 0, and the mesh of this process's devices for that."""
    sampling = slices.fill_engine_defaults(sampling, policy.text.hidden_size, jax.local_devices())
    return sampling, processes.local_mesh(sampling.tensor, sampling.slots)


def open_engine(
    weights: str | Qwen25VL,
    processor: Processor,
    sampling: SamplingConfig,
    agent: AgentConfig,
    dtype: str,
    key: int | jax.Array,
    local: Callable[[nnx.State], nnx.State] | None = None,
) -> Engine:
    """An engine on this process's devices, `sampling.tensor` of them together. What `sampling` leaves open (0) is
    filled in for an engine that has the devices to itself.

    weights: a Hugging Face directory or checkpoints/<stage>, read onto the mesh in `dtype`, so that no device and no
    host array holds more than its share; or a model that is there. key: seed of what is sampled. local: for a model
    whose parameters are a slice's, as Engine takes it.
    """
    shape = load_config(policy_directory(weights)) if isinstance(weights, str) else weights.config
    sampling, mesh = engine_layout(sampling, shape)
    model = load_policy(weights, mesh, dtype) if isinstance(weights, str) else weights
    key = jax.random.key(key) if isinstance(key, int) else key
    overlay = processor.square(agent.history_size)
    return Engine(model, processor.with_ends(sampling), processor.terminator_id, dtype, key, mesh, overlay, local)


def open_policy(
    policy: PolicyConfig, processor: Processor, sampling: SamplingConfig, agent: AgentConfig, seed: int
) -> Engine | ServedPolicy:
    """Who writes the turns: an engine with the weights, or the endpoint behind which they are served."""
    if policy.backend == "openai":
        from rsagent_jax.rollout.served import ServedPolicy

        return ServedPolicy(policy, processor, sampling, seed)
    return open_engine(policy.weights, processor, sampling, agent, policy.dtype, seed)
