"""A policy whose turns are written by a function: the oracle, a remote model, a script in a test.

It goes through the same driver as the engine, so that a teacher's trajectory is played, timed, counted and stored as
the policy's own.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np

from rsagent_jax.agent.environment import EnvState
from rsagent_jax.agent.views import PixelLimits
from rsagent_jax.data.processor import Processor
from rsagent_jax.rollout.policy import PolicyFailure, Request, Task
from rsagent_jax.types import Completion, Prompt


class TextPolicy:
    """`act(task, state)` -> the turn's text, on `threads` threads at a time; log-probs are 0.

    A PolicyFailure that `act` raises ends its trajectory, any other exception ends the run.
    """

    def __init__(
        self,
        act: Callable[[Task, EnvState], str],
        processor: Processor | ByteProcessor,
        *,
        slots: int = 64,
        threads: int = 1,
        context: int = 1 << 20,
    ):
        self.act, self.processor, self.threads = act, processor, threads
        self.slots, self.context, self.max_new_tokens, self.patches = slots, context, 4096, 1 << 30
        self.pool = concurrent.futures.ThreadPoolExecutor(threads)
        self.turns: dict[int, concurrent.futures.Future] = {}
        self.begin()

    def begin(self) -> None:
        self.requests: dict[int, Request] = {}
        for slot in list(self.turns):  # of a run that was given up
            self.release(slot)

    def pick(self, task: Task, free: Sequence[int]) -> int:
        return min(free)

    def submit(self, request: Request) -> None:
        self.requests[request.slot] = request
        self.turns[request.slot] = self.pool.submit(self.act, request.task, request.state)

    def step(self) -> list[tuple[int, Completion | PolicyFailure]]:
        when = concurrent.futures.FIRST_COMPLETED if self.threads > 1 else concurrent.futures.ALL_COMPLETED
        concurrent.futures.wait(self.turns.values(), return_when=when)
        ended = [(self.requests.pop(slot), self.turns.pop(slot)) for slot, t in list(self.turns.items()) if t.done()]
        return [(request.slot, self._outcome(turn, request.budget)) for request, turn in ended]

    def release(self, slot: int) -> None:
        self.requests.pop(slot, None)
        if slot in self.turns:
            self.turns.pop(slot).cancel()

    def _outcome(self, turn: concurrent.futures.Future, budget: int) -> Completion | PolicyFailure:
        try:
            return self._complete(turn.result(), budget)
        except PolicyFailure as failure:
            return failure

    def _complete(self, text: str, budget: int) -> Completion:
        tokens = np.append(self.processor.encode(text), self.processor.terminator_id).astype(np.int32)
        cut = budget and len(tokens) > budget
        tokens = tokens[:budget] if cut else tokens
        return Completion(tokens, np.zeros(len(tokens), np.float32), not cut)


class ByteProcessor:
    """Stands in for the Processor where no weights are, so that there is no vocabulary: a token is a byte of UTF-8.

    Images are not encoded; nobody reads them. `limits`: of the views.
    """

    terminator_id = 256
    end_ids = (256,)

    def __init__(self, limits: PixelLimits):
        self.images = SimpleNamespace(limits=limits)
        self.config = SimpleNamespace(vision=None)  # asked for where a prompt has images

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return np.asarray(tokens, np.uint8).tobytes().decode(errors="replace")

    def prompt(self, text: str, images: list[np.ndarray], start: int = 0, limits=None) -> tuple[Prompt, int]:
        tokens = np.array(self.encode(text), np.int32)
        positions = np.broadcast_to(start + np.arange(len(tokens)), (3, len(tokens))).astype(np.int32)
        return Prompt(tokens, positions, self.no_patches(), ()), start + len(tokens)

    def no_patches(self) -> np.ndarray:
        return np.zeros((0, 0), np.float32)
