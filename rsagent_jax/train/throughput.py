"""Where a step's time goes, and how much work was done in it, under the names and definitions of verl.

    perf/total_num_tokens   tokens of the step's trajectories: prompts, pictures, observations and turns
    perf/throughput         of them per second of the whole step and chip
    perf/mfu/actor          FLOPs of the update over what the devices promise in its time

Source: verl (volcengine/verl), trainer/ppo/metric_utils.py and utils/flops_counter.py. Its FLOPs are 6 per parameter
and token, the embedding counted like the head, and 12 s^2 per layer and head for attention, causal or not; the vision
tower counts nothing. aot/flops.py counts what is really multiplied.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rsagent_jax.models.qwen25_vl.config import TextConfig
from rsagent_jax.runtime import processes
from rsagent_jax.types import Batch

PREFIX = "seconds/"


class StepClock:
    """`lap(part)` gives the time since the last lap to a part; `read` begins the next step. So the parts of all steps
    add up to the time of the run."""

    def __init__(self):
        self.started = self.last = time.perf_counter()
        self.parts: Counter[str] = Counter()

    def lap(self, part: str, inside: Mapping[str, float] | None = None) -> float:
        """Seconds since the last lap. inside: metrics whose `seconds/…` are parts of their own within this lap."""
        now = time.perf_counter()
        spent, self.last = now - self.last, now
        own = {k.removeprefix(PREFIX): v for k, v in (inside or {}).items() if k.startswith(PREFIX)}
        self.parts.update(own | {part: max(0.0, spent - sum(own.values())) + own.get(part, 0.0)})
        return spent

    def read(self) -> dict[str, float]:
        """`seconds` of the step and `seconds/PART`, which add up to it; what no lap took is `seconds/other`."""
        self.lap("other")
        seconds = {"seconds": self.last - self.started} | {PREFIX + part: s for part, s in self.parts.items()}
        self.started, self.parts = self.last, Counter()
        return seconds


class CompileCounter:
    """`compiles`: programs that were compiled, or read from the cache of compiled ones, since the last `read`."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_scalar_listener(self._hear)

    def _hear(self, event: str, *_: Any, **__: Any) -> None:
        """Told by jax when it begins to."""
        self.count += event == "/jax/core/compile/backend_compile_duration"

    def read(self) -> dict[str, float]:
        count, self.count = self.count, 0
        return {"compiles": float(count)}


def sequence_lengths(batches: Sequence[Batch]) -> np.ndarray:
    """i64[N]: tokens of every trajectory in these host batches."""
    rows = [np.bincount(row)[1:] for batch in batches for row in np.asarray(batch.segment_ids)]
    lengths = np.concatenate(rows) if rows else np.zeros(0, np.int64)
    return lengths[lengths > 0]


def verl_flops(config: TextConfig, lengths: np.ndarray) -> float:
    """FLOPs of forward and backward pass on sequences of these lengths, as verl counts them."""
    d, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = 3 * d * config.intermediate_size + d * (2 * heads + 2 * kv)
    dense = layer * config.num_hidden_layers + 2 * config.vocab_size * d
    squares = float(np.sum(np.square(lengths.astype(np.float64))))
    return 6.0 * dense * float(lengths.sum()) + 12.0 * squares * heads * config.num_hidden_layers


class WorkCounter:
    """verl's figures of a step, over all processes."""

    def __init__(self, config: TextConfig, mesh: Mesh, peak: float | None = None, devices_per_chip: int = 1):
        """peak: FLOP/s that a device promises; None where that is not known, and then there is no MFU."""
        self.config, self.devices, self.peak = config, mesh.devices.size, peak
        self.chips = self.devices / devices_per_chip
        # Processes of one tensor group hold the same rows.
        self.copies = jax.process_count() // processes.row_share(mesh).count
        self.lengths = np.zeros(0, np.int64)

    def begin(self, batches: Sequence[Batch]) -> None:
        """What the step's update reads: the host batches of this process."""
        self.lengths = sequence_lengths(batches)

    def figures(self, metrics: Mapping[str, float], passes: int) -> dict[str, float]:
        """metrics: of the step, with its times; and with `perf/total_num_tokens` of this process's share where more
        was played than is trained on. passes: how often the update reads the batches."""
        tokens = int(metrics.get("perf/total_num_tokens", self.lengths.sum()))
        giga = int(verl_flops(self.config, self.lengths) * passes / 1e9)
        tokens, giga = (n / self.copies for n in processes.allgather_sum([tokens, giga]))
        out = {"perf/total_num_tokens": tokens, "perf/throughput": tokens / metrics["seconds"] / self.chips}
        if self.peak and giga:
            out["perf/mfu/actor"] = giga * 1e9 / metrics["seconds/update"] / (self.peak * self.devices)
        return out
