"""Stored turns in place of an engine's, each after a lognormal time (`grpo.mock`): rollouts that cost no device.

For what is around the engine, at any size: tools, rewards, filling and packing of a step, the update, where the time
goes. The turns are those of stored trajectories, whatever the weights have become, so what is learned means nothing.
"""

import collections
import time
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from rsagent_jax.config.schema import MockConfig, SamplingConfig
from rsagent_jax.data import trajectories
from rsagent_jax.data.npz import read_arrays
from rsagent_jax.data.processor import Processor
from rsagent_jax.rollout.policy import Request, Task
from rsagent_jax.types import Completion, DataError

TICK = 0.05  # seconds at most that a step takes: tools are heard of in between

Turn = tuple[np.ndarray, np.ndarray]  # i32[n] ids, f32[n] log-probs


def stored_turns(record: bytes) -> list[Turn]:
    """Of each turn what was sampled; log-probs are 0 where the set has none."""
    arrays = read_arrays(record)
    tokens, sampled = arrays["tokens"], arrays["sampled"].astype(bool)
    logprobs = arrays.get("logprobs", np.zeros(len(tokens), np.float32))
    edges = np.flatnonzero(np.diff(sampled, prepend=False, append=False))  # something is forced between any two turns
    return [(tokens[a:b], logprobs[a:b]) for a, b in edges.reshape(-1, 2)]


class MockEngine:
    """A Policy (rollout/policy.py). A trajectory plays one of those stored of its sample, or any where there are none;
    after the last stored turn that one comes again. Which one, and how long a turn takes, follows from the task."""

    def __init__(self, config: MockConfig, sampling: SamplingConfig, processor: Processor):
        """DataError for a set that is not there, or in which nobody took a turn."""
        self.slots, self.context = sampling.slots, sampling.context
        self.max_new_tokens, self.patches = sampling.max_new_tokens, sampling.patches
        self.config, self.terminator_id = config, processor.terminator_id
        records = trajectories.open_records(config.trajectories)
        self.stored: dict[str, list[list[Turn]]] = collections.defaultdict(list)
        for record in (records[i] for i in range(len(records))):
            if turns := stored_turns(record):
                self.stored[trajectories.record_header(record).get("id", "")].append(turns)
        if not self.stored:
            raise DataError(f"grpo.mock.trajectories: no trajectory of {config.trajectories} took a turn")
        self.all = [turns for of_sample in self.stored.values() for turns in of_sample]
        self.begin()

    def load(self, params: nnx.State, key: jax.Array, *, greedy: bool = False) -> None:
        """As an Engine's; nothing is kept."""

    def release_memory(self) -> None:
        """As an Engine's."""

    def begin(self) -> None:
        self.due: dict[int, tuple[float, Completion]] = {}  # by slot: when its turn ends, and how

    def pick(self, task: Task, free: Sequence[int]) -> int:
        return min(free)

    def submit(self, request: Request) -> None:
        task, rng = request.task, np.random.default_rng((request.task.uid, request.turn))
        choices = self.stored.get(task.sample.id, self.all)
        turns = choices[task.uid % len(choices)]
        tokens, logprobs = turns[min(request.turn, len(turns) - 1)]
        n = min(len(tokens), request.budget or self.max_new_tokens, self.max_new_tokens)
        done = Completion(tokens[:n], logprobs[:n], int(tokens[n - 1]) == self.terminator_id)
        seconds = self.config.turn_s * rng.lognormal(0.0, self.config.sigma)
        self.due[request.slot] = time.perf_counter() + seconds, done

    def step(self) -> list[tuple[int, Completion]]:
        if not self.due:
            return []
        first = min(when for when, _ in self.due.values()) - time.perf_counter()
        time.sleep(min(max(first, 0.0), TICK))
        now = time.perf_counter()
        return [(slot, self.due.pop(slot)[1]) for slot, (when, _) in list(self.due.items()) if when <= now]

    def begun(self, slot: int) -> None:
        return None

    def release(self, slot: int) -> None:
        self.due.pop(slot, None)
