"""Alarms in words: what is going wrong in a run, since when, and what to do about it.

Each is a line of LEVELS, or a pure function of what the stage has logged so far and of the bounds in the config
(config/alarms.py). It is said once per occurrence, with up to three trajectories of the step: on the terminal, and as a
line of <workdir>/alarms.jsonl (stage, step, alarm, since, sentence, examples). A run that goes on from a checkpoint
reads its own metrics.jsonl first, so that what is still going on is not said again.
"""

import dataclasses
import itertools
import json
import math
import numbers
import operator
import pathlib
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from rsagent_jax.config.alarms import AlarmsConfig
from rsagent_jax.runtime.json_lines import keep_lines
from rsagent_jax.runtime.paths import AppendFile, read_lines
from rsagent_jax.types import DataError

FILE = "alarms.jsonl"
SHOWN, WIDTH = 3, 300  # trajectories with an alarm; characters of each on the terminal
FEW = 10  # values of which a median says nothing yet
SURE = 3.0  # standard errors by which the means of two windows differ


@dataclasses.dataclass(frozen=True)
class Symptom:
    """What holds after the last step."""

    since: int  # step
    text: str  # what holds, and what to do


class History:
    """The finite values of every metric, with the steps that they were logged at."""

    def __init__(self):
        self.columns: dict[str, tuple[array, array]] = {}  # 16 bytes a value, of all steps of a stage

    def add(self, step: int, metrics: Mapping[str, float | None]) -> None:
        for name, value in metrics.items():
            if isinstance(value, numbers.Real | np.ndarray) and math.isfinite(value):  # f32[] as from a device, too
                steps, values = self.columns.setdefault(name, (array("q"), array("d")))
                steps.append(step)
                values.append(float(value))

    def series(self, name: str) -> tuple[Sequence[int], Sequence[float]]:
        return self.columns.get(name, ((), ()))

    def last(self, name: str) -> float:
        return self.series(name)[1][-1]

    def streak(self, name: str, holds: Callable[[float], bool], least: int) -> int | None:
        """The first step of the latest values in a row for which it holds; None for fewer than `least`."""
        steps, values = self.series(name)
        count = 0
        while count < len(values) and holds(values[-1 - count]):
            count += 1
        return steps[-count] if count >= least else None


# --- Alarms: each is (history, bounds) -> Symptom or None ---


def format_saturated(h: History, c: AlarmsConfig) -> Symptom | None:
    """The format reward is full over a window, and gIoU lies below its best window."""
    (_, full), (steps, giou) = h.series(f"reward/{c.format_part}"), h.series("giou")
    n = c.window
    if min(len(full), len(giou)) < n or np.mean(full[-n:]) < c.format_full:
        return None
    means = np.convolve(giou[:-n], np.full(n, 1 / n), "valid") if len(giou) >= 2 * n else np.zeros(0)
    if not len(means):
        return None
    best = int(np.argmax(means))
    before, now = np.array(giou[best : best + n]), np.array(giou[-n:])
    fall = before.mean() - now.mean()
    if fall < c.iou_fall or fall <= SURE * _error(before, now):
        return None
    return Symptom(
        steps[-n],
        f"the format reward is full ({np.mean(full[-n:]):.2f}) while gIoU has fallen from {before.mean():.3f} (steps"
        f" {steps[best]}-{steps[best + n - 1]}) to {now.mean():.3f}; lower the weight of reward group"
        f" {c.format_part.partition('/')[0]!r} or the learning rate, or go back to an earlier checkpoint",
    )


def ious_part(h: History, c: AlarmsConfig) -> Symptom | None:
    """Against the first window one of gIoU and cIoU has risen and the other has fallen."""
    (steps, giou), (_, ciou), n = h.series("giou"), h.series("ciou"), c.window
    if len(giou) != len(ciou) or len(giou) < 2 * n:
        return None
    (g, g_now), (i, i_now) = ((np.array(values[:n]), np.array(values[-n:])) for values in (giou, ciou))
    up_g, up_i = g_now.mean() - g.mean(), i_now.mean() - i.mean()
    apart, sure = abs(up_g - up_i), SURE * _error(g - i, g_now - i_now)
    if up_g * up_i >= 0 or apart < c.parting or apart <= sure:
        return None
    why = "large masks go wrong" if up_i < 0 else "small masks go wrong"
    return Symptom(
        steps[-n],
        f"gIoU has gone {up_g:+.3f} and cIoU {up_i:+.3f} since steps {steps[0]}-{steps[n - 1]}: {why}, as of a click"
        " that takes the background; look at the trajectories with the worst masks, and at reward terms that pay for"
        " stopping early",
    )


def gradient_explodes(h: History, c: AlarmsConfig) -> Symptom | None:
    """The gradient's norm, before it is clipped, against its own running median; steps without an update aside."""
    remedy = "lower the learning rate or optim.clip_norm, and look at the step's longest trajectory"
    return _explodes(h, c, "l2_grads", 0.0, "the gradient's norm is", remedy)


def kl_explodes(h: History, c: AlarmsConfig) -> Symptom | None:
    """The divergence from the reference against its own running median."""
    remedy = "lower the learning rate or raise grpo.kl"
    return _explodes(h, c, "kl_ref", c.kl_floor, "the KL from the reference is", remedy)


def engine_gap(h: History, c: AlarmsConfig) -> Symptom | None:
    """KL between the engine's and the trainer's distributions, as TIS measures it (grpo.tis_clip above 0).

    Nothing where older weights drew some of the tokens (grpo.surplus): it is theirs, too.
    """
    if any(h.series("staleness_max")[1][-1:]):
        return None
    if not c.gap or (since := h.streak("mismatch_kl", lambda v: v > c.gap, 1)) is None:
        return None
    return Symptom(
        since,
        f"engine and trainer are {h.last('mismatch_kl'):.3g} nats per token apart (alarms.gap = {c.gap:g}): the policy"
        " that is trained is not the one that plays; set grpo.sampling.kv_dtype and policy.dtype to float32 and"
        " grpo.sampling.weights_dtype to '' to see whether it is precision, and check that sampling has no top_k or"
        " top_p that training does not know of",
    )


# A figure that is beyond its bound, `steps` steps in a row: alarm, metric, how, bound (a field of the config, or a
# number), what it means and what to do. Of one alarm's lines the first counts that holds.
LEVELS: tuple[tuple[str, str, Callable[[float, float], bool], str | float, str], ...] = (
    ("flat_groups", "zero_variance", operator.ge, 1.0,
     ("in every group all rewards are the same, and nothing is learned; raise grpo.sampling.temperature or grpo.group,"
      " lower grpo.min_spread, or take samples that are neither too easy nor too hard")),
    *(("one_call", metric, operator.le, "one_call",
       (f"a trajectory has {{:.2f}} {unit}: no mask is looked at and corrected; lower the cost of a call (reward term"
        " call_cost), reward the gain of each turn, or show SFT more corrections"))
      for metric, unit in (("turns", "turns"), ("behaviour/calls", "segment calls"))),
    ("env_failures", "endings/env_failed", operator.gt, "env_failed",
     ("the segmenter ends {:.0%} of the trajectories; see the side-car's log and env_failed/* for the kind, and raise"
      " segmenter.timeout_s or the number of side-cars if it is timeout")),
    ("reward_failures", "reward_failed", operator.gt, "reward_failed",
     ("{:.0%} of the trajectories have no reward; the step's message names the term, and reward_error.json holds a"
      " trajectory. If it asks a server, see whether that answers within deadline_s")),
    ("truncation", "cut", operator.gt, "truncated",
     ("{:.0%} of the turns are cut off by their budget of tokens; raise grpo.sampling.max_new_tokens, or see whether"
      " the texts ramble")),
    ("truncation", "endings/max_context", operator.gt, "truncated",
     ("{:.0%} of the trajectories end by their budget of tokens; raise grpo.sampling.context, or see whether the texts"
      " ramble")),
    ("no_entropy", "entropy_sampled", operator.lt, "entropy",
     ("the entropy is {:.2g} nats per token: the policy always says the same; raise grpo.sampling.temperature or"
      " grpo.clip_high, lower the learning rate, or go back to an earlier checkpoint")),
    ("image_share", "image_tokens", operator.gt, "image_tokens",
     "images take {:.0%} of all tokens; lower agent.max_pixels or agent.history_size"),
)  # fmt: skip


def beyond_bounds(h: History, c: AlarmsConfig) -> dict[str, Symptom]:
    """What LEVELS says, by the alarm's name."""
    found = {}
    for name, metric, beyond, bound, text in LEVELS:
        limit = getattr(c, bound) if isinstance(bound, str) else bound
        since = h.streak(metric, lambda v, beyond=beyond, limit=limit: beyond(v, limit), c.steps)
        if since is not None and name not in found:
            found[name] = Symptom(since, text.format(h.last(metric)))
    return found


ALARMS = (format_saturated, ious_part, gradient_explodes, kl_explodes, engine_gap)


def _explodes(h: History, c: AlarmsConfig, name: str, floor: float, what: str, remedy: str) -> Symptom | None:
    steps, values = h.series(name)
    if not c.explode or not values or values[-1] <= floor:
        return None
    before = list(itertools.islice((v for v in reversed(values[:-1]) if v > 0), c.median))
    if len(before) < FEW or values[-1] <= c.explode * (middle := float(np.median(before))):
        return None
    return Symptom(
        steps[-1], f"{what} {values[-1]:.3g}, {values[-1] / middle:.0f} times its running median {middle:.3g}; {remedy}"
    )


def _error(a: np.ndarray, b: np.ndarray) -> float:
    """Standard error of the difference of two windows' means, from the spread of their steps."""
    return math.sqrt(a.var() / len(a) + b.var() / len(b))


# --- What is said ---


class Watch:
    """Which alarms of a stage go on, and which begin."""

    def __init__(self, bounds: AlarmsConfig):
        self.bounds, self.history = bounds, History()
        self.held: dict[str, int] = {}  # alarm -> step that it last held after

    def add(self, step: int, metrics: Mapping[str, float | None]) -> tuple[dict[str, Symptom], dict[str, Symptom]]:
        """What holds now, and what of it is a new occurrence, by the alarm's name."""
        self.history.add(step, metrics)
        holds = beyond_bounds(self.history, self.bounds)
        holds |= {alarm.__name__: f for alarm in ALARMS if (f := alarm(self.history, self.bounds))}
        new = {name: f for name, f in holds.items() if step - self.held.get(name, -math.inf) > self.bounds.again}
        self.held |= dict.fromkeys(holds, step)
        return holds, new


class Alarms:
    """Of a stage that goes on after step `done`; `directory` is where its metrics.jsonl is."""

    def __init__(self, bounds: AlarmsConfig, directory: pathlib.Path, stage: str, done: int = 0, *, lead: bool = True):
        """lead: says it on the terminal, too."""
        self.stage, self.lead, self.counts = stage, lead, Counter()
        self.watch, self.file = Watch(bounds), AppendFile(directory / FILE)
        keep_lines(directory / FILE, lambda row: row["stage"] != stage or row["step"] <= done)
        log = directory / "metrics.jsonl"
        for row in map(json.loads, read_lines(log).splitlines()) if log.exists() else ():
            if row["stage"] == stage and row["step"] <= done:
                self.watch.add(row["step"], row)

    def add(self, step: int, metrics: Mapping[str, float], examples: Mapping[str, Any]) -> None:
        """Says what begins after this step. `examples`: of the step, as rollouts.jsonl has them.

        DataError where engine and trainer are apart and alarms.stop_on_gap is set. That figure is of all processes, so
        all of them stop.
        """
        holds, new = self.watch.add(step, metrics)
        played = list(examples.get("trajectories", ()))[:SHOWN]
        for name, symptom in new.items():
            self.counts[name] += 1
            row = {"stage": self.stage, "step": step, "alarm": name, "since": symptom.since, "sentence": symptom.text}
            shown = {k: examples[k] for k in ("id", "query") if k in examples} | {"trajectories": played}
            self.file.add(json.dumps(row | {"examples": shown if played else None}) + "\n")
            if self.lead:
                tqdm.write(said(self.stage, step, name, symptom, played))
        if self.watch.bounds.stop_on_gap and (gap := holds.get(engine_gap.__name__)):
            raise DataError(
                f"{self.stage} step {step}: {gap.text}. The run stops here, by alarms.stop_on_gap; its last checkpoint"
                " is as it was"
            )

    def close(self) -> None:
        """Counts, on the terminal, what was said since the start."""
        self.file.close()
        if self.lead and self.counts:
            by_name = ", ".join(f"{name} {n}" for name, n in self.counts.items())
            print(f"{self.stage}: {self.counts.total()} alarms ({by_name}); see {self.file.path}")


def said(stage: str, step: int, name: str, symptom: Symptom, played: Sequence[Mapping[str, Any]]) -> str:
    """The sentence, and a line for each of the trajectories."""
    since = f"since step {symptom.since}" if symptom.since < step else "in this step"
    lines = [f"ALARM {name}, {stage} step {step}, {since}: {symptom.text}."]
    for t in played:
        reward = "none" if t["reward"] is None else f"{t['reward']['total']:.2f}"
        text = " | ".join(" ".join(turn.split()) for turn in t["turns"])
        lines.append(f"    {t['status']}, reward {reward}: {text[:WIDTH]}{'…' * (len(text) > WIDTH)}")
    return "\n".join(lines)
