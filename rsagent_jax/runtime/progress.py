"""Where the main thread is, and whether it still gets on: what the watchdog (runtime/watchdog.py) tells and judges by.

Every host goes through the same phases in one order; which parts they have, and how often, is its own.
"""

import time
from typing import Any

TIMES = 10  # so many times the longest so far a part may take


class _Progress:
    def __init__(self):
        self.number, self.phase, self.step, self.part = 0, "start", 0, ""
        self.moved = time.monotonic()
        self.longest: dict[str, float] = {}  # seconds that a part took between two signs of getting on
        self.first = True  # what is done now was not done before, or is compiled
        self.first_s = self.least_s = 0.0
        self.hears_jax = False

    def limit(self, first_s: float, answer_s: float) -> None:
        """first_s: seconds that anything may take the first time, or while it is compiled; 0 = no limit. Later it may
        take a tenth of them, or TIMES the longest so far if that is more, but no more than first_s; and answer_s on
        top, for an answer that somebody else limits."""
        self.first_s, self.least_s = first_s + answer_s, first_s / 10 + answer_s
        self.moved, self.first = time.monotonic(), True
        if first_s and not self.hears_jax:
            import jax

            jax.monitoring.register_scalar_listener(self._compiles)
            self.hears_jax = True

    def enter(self, phase: str, step: int = 0) -> None:
        """What is done from now on; all hosts in the same order."""
        self._go_on(phase, step, "")

    def enter_part(self, part: str, slow: bool = False) -> None:
        """The same of a part of the phase. slow: it may always take as long as the first time."""
        self._go_on(self.phase, self.step, part)
        self.first |= slow

    def get_on(self) -> None:
        """A sign of life within a part that takes long."""
        self._go_on(self.phase, self.step, self.part)

    def _go_on(self, phase: str, step: int, part: str) -> None:
        now, name = time.monotonic(), self.part or self.phase
        self.longest[name] = max(self.longest.get(name, 0.0), 0.0 if self.first else now - self.moved)
        self.number += (phase, step) != (self.phase, self.step)
        self.phase, self.step, self.part, self.moved = phase, step, part, now
        self.first = (part or phase) not in self.longest

    def _compiles(self, event: str, *_: Any, **__: Any) -> None:
        """Told by jax when it begins to."""
        self.first |= event.startswith("/jax/core/compile")

    def told(self) -> dict[str, Any]:
        """For other hosts: the phase's `number`, `where` in words, seconds `idle` and their `limit`, whether `late`."""
        usual = max(self.least_s, TIMES * self.longest.get(self.part or self.phase, 0.0))
        limit = self.first_s if self.first else min(self.first_s, usual)
        idle = time.monotonic() - self.moved
        where = self.phase + (f" of step {self.step}" if self.step else "") + (f" ({self.part})" if self.part else "")
        return {"number": self.number, "where": where, "idle": idle, "limit": limit, "late": 0 < limit < idle}


PROGRESS = _Progress()  # of this process
