"""Trajectory -> reward. Every term is a `module:function` with a weight in the config, logged on its own.

From the paper (arXiv 2512.24023): R = 1.0 * R_final + 0.5 * R_process + 0.2 * R_format, the final term being the IoU
of the final mask, and the names of what R_process holds (step-wise IoU improvement, tool cost, novelty, point
sparsity). Ours: the definition of every other term, every coefficient inside R_process, and its clip range.

A researcher's own term is a function in a file or in any importable module (docs/rewards.md):

    def small_mask(trajectory: Trajectory, sample: Sample) -> float:
        return float(trajectory.final_mask.mean() < 0.5)
"""

import asyncio
import dataclasses
import inspect
import numbers
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import numpy as np

from rsagent_jax.config.import_path import first_line, import_path, place
from rsagent_jax.config.reward import RewardGroup, RewardTerm
from rsagent_jax.masks import mask_iou
from rsagent_jax.types import DataError, Reward, Sample, Status, Trajectory

LARGEST = 1e6  # a term's value; beyond, sums and their float32 are not exact any more


def _ious(trajectory: Trajectory, sample: Sample) -> list[float]:
    """IoU of the empty mask, with which every trajectory starts, then of each mask in the order it was made."""
    empty = np.zeros_like(sample.gt_mask)
    return [mask_iou(mask, sample) for mask in (empty, *(record.mask for record in trajectory.masks))]


# --- Terms: each is (trajectory, sample) -> float ---


def final_iou(trajectory: Trajectory, sample: Sample) -> float:
    """IoU of the final mask, in [0, 1]. The paper's R_final.

    Silence is no answer (ours): without `finish` an empty mask earns 0, also where the target is absent and the empty
    mask is right. Else a policy would be paid for broken turns on every absent target.
    """
    if trajectory.status is not Status.FINISHED and not trajectory.final_mask.any():
        return 0.0
    return mask_iou(trajectory.final_mask, sample)


def iou_gain(trajectory: Trajectory, sample: Sample) -> float:
    """Sum over turns of max(0, IoU_t - best IoU before t), in [0, 1].

    Against the best so far and not the turn before, so that worsening a mask and mending it is not paid twice. The
    empty mask comes first: an absent target starts at 1 and has nothing to gain. The sum telescopes to the best IoU
    minus that start, so at equal weights `iou_gain - overshoot` is the final IoU minus it: between them the two
    weights say how much of the gain must be kept.
    """
    ious = _ious(trajectory, sample)
    return max(ious) - ious[0]


def overshoot(trajectory: Trajectory, sample: Sample) -> float:
    """Best IoU of any mask minus the final IoU, in [0, 1]: what was lost by not stopping. After MedSAM-Agent."""
    return max(_ious(trajectory, sample)) - final_iou(trajectory, sample)


def call_cost(trajectory: Trajectory, sample: Sample) -> float:
    """Number of tool calls made, refused ones included. `finish` is free: stopping must never cost."""
    return float(sum(turn.call is not None and not turn.call.ends for turn in trajectory.turns))


def novel_action(trajectory: Trajectory, sample: Sample) -> float:
    """Share in [0, 1] of effective actions that are not repeats; 0 where there is none.

    Effective: well-formed, not refused, not `finish`. A repeat is what the environment marked so, or an earlier call
    made again in the same view (the same view changes since the last reset), so that A, B, A, B does not pass for
    news. A share and not a count, so that it cannot be raised by acting more.
    """
    seen, views, effective, novel = set(), (), 0, 0
    for turn in trajectory.turns:
        call = turn.call
        if call is None or turn.error is not None or call.ends:
            continue
        effective += 1
        novel += not (turn.repeated or (call, views) in seen)
        seen.add((call, views))
        if call.changes_view:
            views = () if call.resets_view else (*views, call)
    return novel / effective if effective else 0.0


def point_excess(trajectory: Trajectory, sample: Sample, budget: int = 4) -> float:
    """Number of points above `budget` in a segment call, summed over the calls. The budget is ours."""
    return float(sum(max(0, len(getattr(t.call, "points", ())) - budget) for t in trajectory.turns))


def format_ok(trajectory: Trajectory, sample: Sample) -> float:
    """Share in [0, 1] of well-formed turns; 0 unless the policy ended the trajectory itself (FINISHED)."""
    if trajectory.status is not Status.FINISHED or not trajectory.turns:
        return 0.0
    return sum(turn.call is not None for turn in trajectory.turns) / len(trajectory.turns)


def overlong(trajectory: Trajectory, sample: Sample, limit: int, window: int) -> float:
    """How far the trajectory's tokens, images included, are into the last `window` before `limit`, in [0, 1]; 1 where
    they are over it, or the budget ended the trajectory.

    With weight -1 it is DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13) with limit = L_max and window =
    L_cache. Ours: L_max is a whole trajectory's `grpo.sampling.context`, where DAPO's is an answer's.
    """
    return 1.0 if trajectory.status is Status.MAX_CONTEXT else _into(len(trajectory.tokens), limit, window)


def many_turns(trajectory: Trajectory, sample: Sample, limit: int = 8, window: int = 2) -> float:
    """The same of turns, with the limit `agent.max_turns`. Ours."""
    return _into(len(trajectory.turns), limit, window)


def _into(length: int, limit: int, window: int) -> float:
    return min(max((length - (limit - window)) / window, 0.0), 1.0) if window else float(length > limit)


# --- Composition ---


class RewardError(DataError):
    """A term raised, or returned what is no reward; the message names the term, the sample and the user's line."""


def make_scorer(
    groups: Sequence[RewardGroup],
) -> Callable[[Sequence[Sequence[Trajectory]], Sequence[Sample]], list[Reward | RewardError]]:
    """The reward that `grpo.reward` of the config describes, of the judged trajectories of each sample, in their order.

    total = sum over groups of weight * clip(sum over terms of weight * term).

    Functions are resolved here, once, so that a misspelt path, or one that cannot be called as it will be, fails before
    the first rollout. `Reward.parts` holds each term unweighted under `group/function` and each clipped group, before
    its weight, under `group`. Terms get arrays that they cannot write into. Those that are `async def` run side by
    side, and beside the others. A trajectory has a RewardError in place of a reward where a term raised, was late, or
    returned anything but a number of at most LARGEST; of scope "group", one for each trajectory.

    Raises:
      DataError: here, for a path that does not resolve.
      ValueError: from the scorer, for an ENV_FAILED trajectory (a broken tool is never scored; drop it from its
        group), or for a sample that is not the trajectory's own.
    """
    terms = [[Term(term, f"{g.name}/{label}") for term, label in zip(g.terms, g.labels(), strict=True)] for g in groups]
    waiting = EventLoop()

    def score(played: Sequence[Sequence[Trajectory]], samples: Sequence[Sample]) -> list[Reward | RewardError]:
        for trajectories, sample in zip(played, samples, strict=True):
            for trajectory in trajectories:
                _check_scored(trajectory, sample)
        shown = [(tuple(map(read_only, ts)), read_only(s)) for ts, s in zip(played, samples, strict=True) if ts]
        every = [term for group in terms for term in group]
        started = {term: waiting.start(term.gather(shown), term.config.deadline_s) for term in every if term.waits}
        values = {term: term.values(shown) for term in every if not term.waits}
        values |= {term: term.checked(shown, result()) for term, result in started.items()}
        return [_compose(groups, terms, {term: found[i] for term, found in values.items()})
                for i in range(sum(map(len, played)))]  # fmt: skip

    return score


def _check_scored(trajectory: Trajectory, sample: Sample) -> None:
    if not trajectory.status.judged:
        raise ValueError(f"sample {trajectory.sample_id}: a trajectory {trajectory.status} has no reward; drop it")
    if trajectory.sample_id != sample.id:
        raise ValueError(f"trajectory of sample {trajectory.sample_id} scored against sample {sample.id}")


def _compose(groups, terms: Sequence[Sequence["Term"]], values: dict["Term", "Value"]) -> Reward | RewardError:
    """Of one trajectory: the reward, or the error of the first term that has one."""
    total, parts = 0.0, {}
    for group, own in zip(groups, terms, strict=True):
        sum_of_terms = 0.0
        for term in own:
            if isinstance(value := values[term], RewardError):
                return value
            parts[term.label] = value
            sum_of_terms += term.config.weight * value
        if group.clip:
            sum_of_terms = min(max(sum_of_terms, group.clip[0]), group.clip[1])
        parts[group.name] = sum_of_terms
        total += group.weight * sum_of_terms
    return Reward(total=total, parts=parts)


def read_only(value: Any) -> Any:
    """The same with every array, of nested dataclasses and tuples as well, as a view that cannot be written into."""
    if isinstance(value, np.ndarray):
        if not value.flags.writeable:  # what is known of a frozen picture is of that array alone
            return value
        view = value.view()
        view.flags.writeable = False
        return view
    if isinstance(value, tuple):
        return type(value)(map(read_only, value)) if type(value) is tuple else value
    if dataclasses.is_dataclass(value):
        fields = {field.name: read_only(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


# --- One term, of all trajectories of a step ---

Value = float | RewardError
Shown = Sequence[tuple[tuple[Trajectory, ...], Sample]]  # the judged trajectories of each sample, one at least
LATE_S = 2.0  # after its deadline a coroutine has been told so, or does not listen


class Term:
    """What the config says of a term, and the function."""

    def __init__(self, config: RewardTerm, label: str):
        """DataError where the function cannot be called as it will be, or its own `check_arguments` refuses them."""
        self.config, self.label, self.arguments = config, label, dict(config.arguments)
        self.grouped = config.scope == "group"
        given = ("trajectories" if self.grouped else "trajectory", "sample")
        self.function = import_path(config.function, given, self.arguments)
        self.waits = any(map(inspect.iscoroutinefunction, (self.function, type(self.function).__call__)))
        self.what = f"reward term {label} ({config.function})"
        try:
            getattr(self.function, "check_arguments", lambda **_: None)(**self.arguments)
        except (TypeError, ValueError) as error:  # a DataError is one of these
            raise DataError(f"{self.what}: {error}") from None

    def calls(self, shown: Shown) -> list[tuple[Any, Sample]]:
        """What the function is called with, one call after the other."""
        if self.grouped:
            return list(shown)
        return [(trajectory, sample) for trajectories, sample in shown for trajectory in trajectories]

    def values(self, shown: Shown) -> list[Value]:
        """Of every trajectory."""
        out = []
        for call in self.calls(shown):
            try:
                out.append(self.function(*call, **self.arguments))
            except Exception as error:  # noqa: BLE001 - whatever the user's function raises is the user's to mend
                out.append(error)
        return self.checked(shown, out)

    async def gather(self, shown: Shown) -> list[Any]:
        """What an async function returned, or the error that it raised, of each call."""

        async def one(call):
            try:
                async with asyncio.timeout(self.config.deadline_s) as deadline:
                    return await self.function(*call, **self.arguments)
            except Exception as error:  # noqa: BLE001 - as in `values`
                return _Late() if deadline.expired() else error

        return await asyncio.gather(*map(one, self.calls(shown)))

    def checked(self, shown: Shown, results: Sequence[Any] | None) -> list[Value]:
        """Of every trajectory, from what was returned or raised by each call; None: nothing was, until too late."""
        calls = self.calls(shown)
        out = []
        for (of, sample), result in zip(calls, results or [_Late()] * len(calls), strict=True):
            if not self.grouped:
                out.append(self._check(result, sample))
            elif isinstance(result, Exception):
                out += [self._check(result, sample)] * len(of)
            elif not isinstance(result, Sequence | np.ndarray) or len(result) != len(of):
                said = f"{len(result)} values" if hasattr(result, "__len__") else repr(result)[:80]
                text = f"{self.what} returned {said} for the {len(of)} trajectories of sample {sample.id}; one each"
                out += [RewardError(text)] * len(of)
            else:
                out += [self._check(value, sample) for value in result]
        return out

    def _check(self, value: Any, sample: Sample) -> Value:
        if isinstance(value, _Late):
            late = f"within {self.config.deadline_s:g} s, its deadline_s"
            return RewardError(f"{self.what} gave no value for sample {sample.id} {late}")
        if isinstance(value, Exception):
            frames = traceback.extract_tb(value.__traceback__)  # ours, then the user's
            at = place(value, frames[1].filename if len(frames) > 1 else self.config.function)
            raised = f"{self.what} raised {type(value).__name__} for sample {sample.id}"
            error = RewardError(f"{raised}: {at}: {first_line(value)}")
            error.__cause__ = value
            return error
        # A bool is refused: `iou > 0.5` is a Python or a numpy bool by accident, and only one of them is a number.
        if not isinstance(value, numbers.Real) or isinstance(value, bool) or not abs(value) <= LARGEST:
            return RewardError(
                f"{self.what} returned {repr(value)[:80]} for sample {sample.id};"
                f" it must be a float between {-LARGEST:.0f} and {LARGEST:.0f} (of an array: float(…))"
            )
        return float(value)


class _Late(Exception):
    """No value until the deadline."""


class EventLoop:
    """Runs coroutines on a thread of its own, so that one that never gives way holds nobody up."""

    def __init__(self):
        self.loop: asyncio.AbstractEventLoop | None = None

    def start(self, coroutine: Coroutine[Any, Any, list[Any]], deadline_s: float) -> Callable[[], list[Any] | None]:
        """What waits for its result; None if there is none soon after the deadline, and the thread is left behind."""
        if self.loop is None:
            self.loop = asyncio.new_event_loop()
            threading.Thread(target=self.loop.run_forever, daemon=True).start()
        future, until = asyncio.run_coroutine_threadsafe(coroutine, self.loop), time.monotonic() + deadline_s + LATE_S

        def result() -> list[Any] | None:
            try:
                return future.result(max(0.0, until - time.monotonic()))
            except TimeoutError:
                self.loop = None
                return None

        return result
