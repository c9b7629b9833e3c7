"""benchmarks/rollout.py's part `tail`: steps of rollouts whose turns, tools and numbers of turns are unequal."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Iterator

import numpy as np

from benchmarks._rollout_policies import Around

SIGMA = 1.0  # of the logarithm of a turn's tokens; 0.5 of a tool's seconds
FLAT = 0.25  # of the groups teach nothing, for the rounds of `refill`


def draws(*numbers: int) -> np.random.Generator:
    return np.random.default_rng(numbers)


class Unequal(Around):
    """Turns of lognormal length around `median` tokens, by trajectory and turn."""

    def __init__(self, policy, median: float):
        super().__init__(policy)
        self.median = median

    def submit(self, request) -> None:
        length = self.median * draws(0, request.task.uid, request.turn).lognormal(0.0, SIGMA)
        budget = int(np.clip(length, 1, request.budget or self.max_new_tokens))
        self.policy.submit(dataclasses.replace(request, budget=budget))


class Tools:
    """A disc after a lognormal time around `median_s`; calls run side by side, as on several side-cars."""

    def __init__(self, median_s: float):
        self.median_s, self.calls = median_s, 0

    def segment(self, image, request):
        from sam_bridge.types import SegmentReply

        self.calls += 1
        seconds = self.median_s * draws(1, self.calls).lognormal(0.0, 0.5)
        time.sleep(seconds)
        ys, xs = np.mgrid[: image.shape[0], : image.shape[1]]
        ((x, y),) = request.points
        return SegmentReply((xs - x) ** 2 + (ys - y) ** 2 <= 900, 0.9, "", {"total": seconds})


def turns_of(uid: int, most: int) -> int:
    """2 to `most`."""
    return int(draws(2, uid).integers(2, most + 1))


def compare(policy, make_driver: Callable, sample: Callable, *, prompts: int, group: int, steps: int) -> dict:
    """Rows by way of filling a step. The first of `steps` + 1 is not counted: there, more begins than ends."""
    from rsagent_jax.rollout.policy import Task
    from rsagent_jax.train.carry_over import InFlight

    def tasks(groups: range) -> list:
        return [Task(sample(g), g, g * group + k) for g in groups for k in range(group)]

    def wait(driver) -> Iterator[int]:
        for step in range(steps + 1):
            yield len(driver.run(tasks(range(step * prompts, (step + 1) * prompts))))

    def refill(driver) -> Iterator[int]:
        first = 0
        for _ in range(steps + 1):
            played, missing = 0, prompts
            while missing:
                groups = range(first, first + missing)
                played += len(driver.run(tasks(groups)))
                keep(driver)
                first, missing = first + missing, sum(draws(3, g).random() < FLAT for g in groups)
            yield played

    def carry_over(driver) -> Iterator[int]:
        flight, first = InFlight(driver, group, max_staleness=2), 0
        for _ in range(steps + 1):
            count = 2 * prompts - len(flight.groups)
            taken = flight.play([(g, sample(g)) for g in range(first, first + count)], prompts)
            first += count
            yield sum(len(g.outcomes) for g in taken)

    totals: collections.Counter = collections.Counter()

    def keep(driver) -> None:
        totals.update({name: policy.stats[name] for name in ("decode_tokens", "slot_steps", "prefill_tokens")})
        totals.update({"tool_wait": driver.stats.get("waiting", 0.0)})

    rows = {}
    for name, way in (("wait for all", wait), ("refill", refill), ("carry over", carry_over)):
        driver = make_driver()
        played, start, count = way(driver), 0.0, 0
        for step, trajectories in enumerate(played):
            if step == 0:
                totals.clear()
                start = time.perf_counter()
                continue
            count += trajectories
            if way is not refill:
                keep(driver)
        seconds = time.perf_counter() - start
        rows[name] = {
            "seconds": seconds,
            "trajectories": count,
            "trajectories_per_s": count / seconds,
            "occupancy": totals["decode_tokens"] / totals["slot_steps"],
            "prefill_tokens": totals["prefill_tokens"],
            "tool_wait": totals["tool_wait"] / seconds,
        }
    return rows
