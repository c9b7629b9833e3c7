"""benchmarks/rollout.py's part `tail`: steps of rollouts whose turns, tools and numbers of turns are unequal."""

import collections
import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from benchmarks._rollout_policies import Around

FLAT = 0.25  # of the groups teach nothing, for the rounds of `refill`
SPREAD = 0.5  # of the logarithm of a turn's tokens within a trajectory, and of a tool's seconds


def draws(*numbers: int) -> np.random.Generator:
    return np.random.default_rng(numbers)


class Clock:
    """Time that passes where somebody says so. It stands in for the module `time` in the driver."""

    def __init__(self):
        self.now = 0.0
        self.tool_s = 0.0  # that the job being done takes

    def perf_counter(self) -> float:
        return self.now


@dataclasses.dataclass
class Programs:
    """Instead of an engine's programs: nothing is computed, and the clock goes on by what each call would take."""

    own: object  # RolloutPrograms
    clock: Clock
    patches: int  # of the largest buffer
    chunk: int
    decode_s: float  # a decode step of all slots
    piece_s: float  # what a piece of every lane's prompt adds
    tower_s: float  # the tower with the largest buffer in every lane

    @property
    def block(self) -> int:
        return self.own.block

    @property
    def buckets(self) -> list[int]:
        return self.own.buckets

    def copy(self, state, *copies):
        return state

    def encode(self, weights, state, images):
        self.clock.now += self.tower_s * images.patches.shape[1] / self.patches
        return state

    def step(self, weights, state, key, piece, turns, blocks=None, steps=None):
        from rsagent_jax.rollout.programs import Sampled

        left = np.where(turns.open, turns.budget - turns.done, 0) if steps is None else np.zeros_like(turns.budget)
        counts = np.minimum(self.chunk, left).astype(np.int32)
        ran = int(counts.max(initial=0))
        self.clock.now += self.decode_s * ran + self.piece_s * (piece is not None)
        tokens, never = np.zeros((len(counts), self.chunk), np.int32), np.zeros(len(counts), bool)
        return state, Sampled(tokens, tokens.astype(np.float32), counts, never, never, np.int32(ran))


class Jobs:
    """As rsagent_jax.rollout.jobs.Jobs with as many workers as there are jobs, by the clock."""

    def __init__(self, clock: Clock):
        self.clock, self.jobs = clock, {}  # by slot: when it is done, and its result

    def submit(self, slot: int, work: Callable) -> None:
        self.clock.tool_s = 0.0
        result = work()
        self.jobs[slot] = self.clock.now + self.clock.tool_s, result

    def running(self, slot: int) -> Callable:
        done, result = self.jobs[slot]

        def rest():
            self.clock.tool_s = max(0.0, done - self.clock.now)
            return result

        return rest

    def drop(self, *slots: int) -> None:
        for slot in slots:
            self.jobs.pop(slot, None)

    def take(self, *, wait: bool) -> list:
        if wait and self.jobs:
            self.clock.now = max(self.clock.now, min(done for done, _ in self.jobs.values()))
        return [(s, self.jobs.pop(s)[1]) for s, (done, _) in list(self.jobs.items()) if done <= self.clock.now]


class Unequal(Around):
    """Turns of lognormal length, `mean` tokens on average. `sigma`: of what a trajectory's turns have in common."""

    def __init__(self, policy, mean: float, sigma: float):
        super().__init__(policy)
        self.mean, self.sigma = mean, sigma

    def submit(self, request) -> None:
        uid, sigmas = request.task.uid, np.array([self.sigma, SPREAD])
        normal = draws(0, uid).normal(), draws(4, uid, request.turn).normal()
        length = self.mean * np.exp(sigmas @ normal - sigmas @ sigmas / 2)
        budget = int(np.clip(length, 1, request.budget or self.max_new_tokens))
        self.policy.submit(dataclasses.replace(request, budget=budget))


class Tools:
    """A disc after a lognormal time around `median_s`; calls run side by side, as on several side-cars."""

    def __init__(self, median_s: float, clock: Clock):
        self.median_s, self.clock, self.calls = median_s, clock, 0

    def segment(self, image, request):
        self.calls += 1
        self.clock.tool_s = seconds = self.median_s * draws(1, self.calls).lognormal(0.0, SPREAD)
        return disc(image, request, seconds)


def disc(image, request, seconds: float):
    """The reply of a segmenter that finds one around the click."""
    from sam_bridge.types import SegmentReply

    ys, xs = np.mgrid[: image.shape[0], : image.shape[1]]
    ((x, y),) = request.points
    return SegmentReply((xs - x) ** 2 + (ys - y) ** 2 <= 900, 0.9, "", {"total": seconds})


def turns_of(uid: int, most: int) -> int:
    """2 to `most`."""
    return int(draws(2, uid).integers(2, most + 1))


def compare(
    policy, make_driver: Callable, sample: Callable, clock: Clock, *, prompts: int, group: int, steps: int, surplus: int
) -> dict:
    """Rows by way of filling a step. The first of `steps` + 1 is not counted: there, more begins than ends."""
    from rsagent_jax.rollout.policy import Task
    from rsagent_jax.train.carry_over import InFlight

    def tasks(groups: range) -> list:
        return [Task(sample(g), g, g * group + k) for g in groups for k in range(group)]

    def wait(driver) -> Iterator[list[int]]:
        for step in range(steps + 1):
            played = driver.run(tasks(range(step * prompts, (step + 1) * prompts)))
            yield [int(t.loss_mask.sum()) for t, _ in played]

    def refill(driver) -> Iterator[list[int]]:
        first = 0
        for _ in range(steps + 1):
            lengths, missing = [], prompts
            while missing:
                groups = range(first, first + missing)
                lengths += [int(t.loss_mask.sum()) for t, _ in driver.run(tasks(groups))]
                keep(driver)
                first, missing = first + missing, sum(draws(3, g).random() < FLAT for g in groups)
            yield lengths

    def carry_over(driver) -> Iterator[list[int]]:
        flight, first = InFlight(driver, group, max_staleness=2), 0
        for _ in range(steps + 1):
            count = prompts + surplus - len(flight.groups)
            taken = flight.play([(g, sample(g)) for g in range(first, first + count)], prompts)
            first += count
            yield [int(t.loss_mask.sum()) for g in taken for t, _ in g.outcomes.values()]

    totals: collections.Counter = collections.Counter()

    def keep(driver) -> None:
        totals.update({name: policy.stats[name] for name in ("decode_tokens", "slot_steps", "prefill_tokens")})
        totals.update({"tool_wait": driver.stats.get("waiting", 0.0)})

    rows = {}
    for name, way in (("wait for all", wait), ("refill", refill), ("carry over", carry_over)):
        driver = make_driver()
        lengths, start = [], 0.0
        for step, played in enumerate(way(driver)):
            if step == 0:
                totals.clear()
                start = clock.now
                continue
            lengths += played
            if way is not refill:
                keep(driver)
        seconds = clock.now - start
        rows[name] = {
            "seconds": seconds,
            "trajectories": len(lengths),
            "trajectories_per_s": len(lengths) / seconds,
            "occupancy": totals["decode_tokens"] / totals["slot_steps"],
            "prefill_tokens": totals["prefill_tokens"],
            "tool_wait": totals["tool_wait"] / seconds,
            "longest_to_median": max(lengths) / float(np.median(lengths)),
        }
    return rows
