"""Which prompts a step of GRPO plays: the shuffled samples one by one, less those that a curriculum passes over.

Every epoch is a shuffle of the whole set, so inside an epoch no prompt is drawn twice; a step that begins in one epoch
and ends in the next takes the rest of the old one and then begins the new.

With `grpo.curriculum` = c > 0 a sample that comes up again is passed over with the chance c * s, s being how well its
last group did: the mean IoU of its final masks. So it is drawn by 1 - c * s, as Kimi k1.5 draws problems by 1 -
success (arXiv 2501.12599). The chance is drawn from the seed and the place in the order, and every process knows what
all groups did, so all of them pass over the same samples, and a resumed run over the same ones as one that was never
stopped.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rsagent_jax.data.pipeline import Pipeline, Unreadable
from rsagent_jax.runtime.processes import exchange
from rsagent_jax.types import Sample


class Prompts:
    """`draw(n)` gives this process's part of the next `n` prompts."""

    def __init__(self, pipeline: Pipeline, curriculum: float = 0.0):
        self.pipeline, self.curriculum = pipeline, curriculum
        self.success: dict[str, float] = {}  # by id, of its last group
        self.passed_over = 0
        self.places: list[int] = []  # of the last draw in the endless order

    def draw(self, n: int, *, needed: bool = True) -> list[tuple[int, Sample]]:
        """(place among the `n`, sample) of each that can be read; DataError as from Pipeline.draw."""
        if self.curriculum:
            self.places = self._next(n)
            elements = self.pipeline.read_at(self.places, needed=needed)
        else:
            self.places = list(range(self.pipeline.position, self.pipeline.position + n))
            elements = self.pipeline.draw(n, needed=needed)
        return self._readable(elements, n)

    def draw_again(self, places: list[int]) -> list[tuple[int, Sample]]:
        """The same of what stands at these places."""
        self.places = places
        return self._readable(self.pipeline.read_at(places, needed=False), len(places))

    def _readable(self, elements: Sequence[Any], n: int) -> list[tuple[int, Sample]]:
        mine = range(self.pipeline.share.index, n, self.pipeline.share.count)
        return [(i, s) for i, s in zip(mine, elements, strict=True) if not isinstance(s, Unreadable)]

    def learn(self, success: Mapping[str, float]) -> None:
        """How well this process's groups did, by sample id; all processes tell each other."""
        own = {id: round(float(value), 4) for id, value in success.items()}
        for said in exchange(own):
            self.success |= said

    def _next(self, n: int) -> list[int]:
        """Places of the next `n` in the endless order, from the pipeline's position on; it moves behind the last."""
        found, ids = [], self.pipeline.source.ids
        while len(found) < n:
            place = self.pipeline.position
            chance = self.curriculum * self.success.get(ids[self.pipeline.index_at(place)], 0.0)
            if chance and np.random.default_rng((self.pipeline.seed, place)).random() < chance:
                self.passed_over += 1
            else:
                found.append(place)
            self.pipeline.position += 1
        return found

    def state(self) -> dict[str, Any]:
        more = {"success": dict(self.success), "passed_over": self.passed_over} if self.curriculum else {}
        return self.pipeline.state() | more

    def restore(self, state: dict[str, Any]) -> None:
        self.pipeline.restore(state)
        self.success, self.passed_over = dict(state.get("success", {})), state.get("passed_over", 0)
