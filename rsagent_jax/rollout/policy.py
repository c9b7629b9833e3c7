"""The seam between the driver and whatever writes the assistant's turns: the engine, a teacher, a script.

Another engine, in this process or behind a socket, is one more class with these six methods and four numbers.
"""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Protocol

import numpy as np

from rsagent_jax.agent.environment import EnvState
from rsagent_jax.agent.views import PixelLimits
from rsagent_jax.data.processor import Processor
from rsagent_jax.types import Completion, Prompt, Sample


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """One trajectory to make. Randomness depends on `uid` and on nothing else; it is unique where draws must differ."""

    sample: Sample
    group_id: int
    uid: int
    max_turns: int = 0  # 0 = agent.max_turns
    temperature: float | None = None  # 0 = greedy; None = the policy's own, which must not be 0 for another to count


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
    # Of a trajectory that was broken off and goes on in a slot that does not know it: what the slot reads before the
    # prompt, and what the turn has so far.
    context: tuple[Prompt, ...] = ()
    begun: Completion | None = None


def join_texts(prompts: Sequence[Prompt], image_id: int) -> list[Prompt]:
    """Fewer prompts, where an engine reads each from a piece of its own: text goes together with what follows it. Not
    the first, an opening that other slots may copy; nor a turn in which the image token was sampled, which is text
    there alone."""
    out = list(prompts[:2])
    for prompt in prompts[2:]:
        before = out[-1]
        if before.grids or (before.tokens == image_id).any():
            out.append(prompt)
            continue
        tokens, positions = np.append(before.tokens, prompt.tokens), np.append(before.positions, prompt.positions, -1)
        out[-1] = dataclasses.replace(prompt, tokens=tokens, positions=positions)
    return out


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

    def begun(self, slot: int) -> Completion | None:
        """What the slot's turn under way has so far, for a request that goes on with it; None to begin it anew."""

    def release(self, slot: int) -> None:
        """The slot's trajectory is over; a turn under way is dropped."""


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


class TextPolicy:
    """Turns that a function writes: the oracle's, a remote teacher's, a test's, played and stored as the engine's are.

    `act(task, state)` -> the turn's text, on `threads` threads at a time; log-probs are 0. A PolicyFailure that `act`
    raises ends its trajectory, any other exception ends the run.
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
        self.turns: dict[int, tuple[Request, concurrent.futures.Future]] = {}  # under way, by slot

    def begin(self) -> None:
        for slot in list(self.turns):  # of a run that was given up
            self.release(slot)

    def pick(self, task: Task, free: Sequence[int]) -> int:
        return min(free)

    def submit(self, request: Request) -> None:
        self.turns[request.slot] = request, self.pool.submit(self._turn, request)

    def step(self) -> list[tuple[int, Completion | PolicyFailure]]:
        when = concurrent.futures.FIRST_COMPLETED if self.threads > 1 else concurrent.futures.ALL_COMPLETED
        concurrent.futures.wait([turn for _, turn in self.turns.values()], return_when=when)
        ended = [slot for slot, (_, turn) in self.turns.items() if turn.done()]
        return [(slot, self._outcome(self.turns.pop(slot)[1])) for slot in ended]

    def begun(self, slot: int) -> Completion | None:
        return None

    def release(self, slot: int) -> None:
        if slot in self.turns:
            self.turns.pop(slot)[1].cancel()

    def _outcome(self, turn: concurrent.futures.Future) -> Completion | PolicyFailure:
        try:
            return turn.result()
        except PolicyFailure as failure:
            return failure

    def _turn(self, request: Request) -> Completion:
        """On a thread of the pool."""
        return self._complete(self.act(request.task, request.state), request.budget)

    def _complete(self, text: str, budget: int, cut: bool = False) -> Completion:
        """`cut`: the text ends where its budget did, without a terminator."""
        end = () if cut else self.processor.terminator_id
        tokens = np.append(self.processor.encode(text), end).astype(np.int32)
        cut = cut or bool(budget and len(tokens) > budget)
        tokens = tokens[:budget] if cut and budget else tokens
        return Completion(tokens, np.zeros(len(tokens), np.float32), not cut)
