"""The seam between the driver and whatever writes the assistant's turns: the engine, a teacher, a script."""

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


class Policy(Protocol):
    slots: int  # trajectories at a time
    context: int  # tokens a slot can hold
    max_new_tokens: int  # per turn
    patches: int  # patches of new images per slot and turn

    def begin(self) -> None:
        """Forgets all slots."""

    def turn(self, requests: Sequence[Request]) -> list[Completion]:
        """Appends each request's prompt to its slot and writes one assistant turn there."""


class TextPolicy:
    """Turns written by a function of (task, state): the oracle teacher, or a script in a test. Log-probs are 0."""

    def __init__(self, act, processor: Processor, *, slots: int = 64, context: int = 1 << 20):
        self.act, self.processor = act, processor
        self.slots, self.context, self.max_new_tokens, self.patches = slots, context, 4096, 1 << 30

    def begin(self) -> None:
        pass

    def turn(self, requests: Sequence[Request]) -> list[Completion]:
        return [self._complete(self.act(r.task, r.state)) for r in requests]

    def _complete(self, text: str) -> Completion:
        tokens = np.append(self.processor.encode(text), self.processor.terminator_id).astype(np.int32)
        return Completion(tokens, np.zeros(len(tokens), np.float32), True)
