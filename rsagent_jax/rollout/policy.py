"""The seam between the driver and whatever writes the assistant's turns: the engine, a teacher, a script.

Another engine, in this process or behind a socket, is one more class with these four methods and four numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from rsagent_jax.agent.environment import EnvState
from rsagent_jax.data.processor import Processor
from rsagent_jax.types import Completion, Prompt, Sample


@dataclasses.dataclass(frozen=True)
class Task:
    """One trajectory to make. `uid` is unique in a run: randomness depends on it and on nothing else."""

    sample: Sample
    group_id: int
    uid: int


@dataclasses.dataclass(frozen=True)
class Request:
    """One trajectory waiting for its next turn: what to append to slot `slot`, and the state for those who look."""

    slot: int
    prompt: Prompt
    position: int  # of the first token to come
    state: EnvState
    task: Task
    turn: int
    budget: int = 0  # tokens that the turn may have, at most max_new_tokens; 0 = max_new_tokens


class Policy(Protocol):
    slots: int  # trajectories at a time
    context: int  # tokens a slot can hold
    max_new_tokens: int  # per turn
    patches: int  # patches of new images per slot and turn

    def begin(self) -> None:
        """Forgets all slots."""

    def pick(self, task: Task, free: Sequence[int]) -> int:
        """Which of the free slots suits the task."""

    def submit(self, request: Request) -> None:
        """Takes on a turn: appends the prompt to the slot and writes one assistant turn there, in the steps to come."""

    def step(self) -> list[tuple[int, Completion]]:
        """Works for a while on the turns it has; returns those that ended, by slot. None under way: returns at once."""

    def release(self, slot: int) -> None:
        """The slot's trajectory is over; a turn under way is dropped."""


class TextPolicy:
    """Turns written by a function of (task, state): the oracle teacher, or a script in a test. Log-probs are 0."""

    def __init__(self, act, processor: Processor, *, slots: int = 64, context: int = 1 << 20):
        self.act, self.processor = act, processor
        self.slots, self.context, self.max_new_tokens, self.patches = slots, context, 4096, 1 << 30
        self.begin()

    def begin(self) -> None:
        self.requests: dict[int, Request] = {}

    def pick(self, task: Task, free: Sequence[int]) -> int:
        return min(free)

    def submit(self, request: Request) -> None:
        self.requests[request.slot] = request

    def step(self) -> list[tuple[int, Completion]]:
        requests, self.requests = self.requests, {}
        return [(slot, self._complete(self.act(r.task, r.state), r.budget)) for slot, r in requests.items()]

    def release(self, slot: int) -> None:
        self.requests.pop(slot, None)

    def _complete(self, text: str, budget: int) -> Completion:
        tokens = np.append(self.processor.encode(text), self.processor.terminator_id).astype(np.int32)
        cut = budget and len(tokens) > budget
        tokens = tokens[:budget] if cut else tokens
        return Completion(tokens, np.zeros(len(tokens), np.float32), not cut)
