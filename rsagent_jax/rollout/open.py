"""One way to an engine, for train.py, evaluate.py, collect and segment."""

from __future__ import annotations

import jax
from jax.sharding import Mesh

from rsagent_jax.config.schema import AgentConfig, SamplingConfig
from rsagent_jax.data.processor import Processor
from rsagent_jax.models.qwen25_vl.load import load_policy
from rsagent_jax.models.qwen25_vl.model import Qwen25VL
from rsagent_jax.rollout.engine import Engine
from rsagent_jax.runtime import processes


def open_engine(
    weights: str | Qwen25VL,
    processor: Processor,
    sampling: SamplingConfig,
    agent: AgentConfig,
    dtype: str,
    key: int | jax.Array,
    mesh: Mesh | None = None,
) -> Engine:
    """An engine on this process's devices, `sampling.tensor` of them together, or on `mesh`.

    weights: a Hugging Face directory or checkpoints/<stage>, read onto the mesh in `dtype`, so that no device and no
    host array holds more than its share; or a model that is there. key: seed of what is sampled.
    """
    mesh = processes.local_mesh(sampling.tensor) if mesh is None else mesh
    model = load_policy(weights, mesh, dtype) if isinstance(weights, str) else weights
    key = jax.random.key(key) if isinstance(key, int) else key
    overlay = processor.square(agent.history_size)
    return Engine(model, processor.with_ends(sampling), processor.terminator_id, dtype, key, mesh, overlay)
