"""The seam between the driver and whatever writes the assistant's turns: the engine, a teacher, a script.

Another engine, in this process or behind a socket, is one more class with these five methods and four numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from rsagent_jax.agent.environment import EnvState
from rsagent_jax.types import Completion, Prompt, Sample


@dataclasses.dataclass(frozen=True, eq=False)
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


class PolicyFailure(Exception):
    """A turn that could not be had, such as one of an endpoint that is away: nobody's answer, so nobody's fault.

    kind: a word that failures are counted by, such as "endpoint, timeout".
    """

    def __init__(self, kind: str, detail: str):
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail


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

    def step(self) -> list[tuple[int, Completion | PolicyFailure]]:
        """Works for a while on the turns it has; returns those that ended, by slot. None under way: returns at once."""

    def release(self, slot: int) -> None:
        """The slot's trajectory is over; a turn under way is dropped."""
