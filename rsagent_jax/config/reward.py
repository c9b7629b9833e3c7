"""The reward's part of a config: groups of terms, and the default reward. rsagent_jax/rewards.py makes it a function.

On the command line groups, terms and arguments are reached, added and removed (None) by name; see docs/rewards.md.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from rsagent_jax.config.ranges import Arguments, Finite, Function, Positive, Text, Weight


@dataclasses.dataclass(frozen=True)
class RewardTerm:
    """One term of the reward: function(trajectory, sample, **arguments) -> float.

    Of scope "group": function(trajectories, sample, **arguments) -> as many floats. Either may be `async def`.
    """

    function: Function  # module:function or file.py:function
    weight: Weight = 1.0  # inside its group; negative for a cost
    arguments: Arguments = ()  # (name, value) pairs
    scope: Literal["trajectory", "group"] = "trajectory"  # group: it sees all judged trajectories of a sample at once
    deadline_s: Positive = 60.0  # of an async function: all of a step's values are there by then, or missing
    # Its name in the config. It is logged under its function's name, or this where two of a group share a function's.
    name: str = dataclasses.field(default="", compare=False)

    @property
    def short(self) -> str:
        return self.function.rpartition(":")[2]


@dataclasses.dataclass(frozen=True)
class RewardGroup:
    """Terms weighted and added up, clipped to a range, then weighted in the total."""

    name: Text
    weight: Weight  # in the total
    terms: tuple[RewardTerm, ...]
    clip: tuple[Finite, ...] = ()  # (low, high) of the sum of the terms; () = no clip

    def labels(self) -> tuple[str, ...]:
        """What each term is logged under."""
        shorts = [term.short for term in self.terms]
        return tuple(t.name or t.short if shorts.count(t.short) > 1 else t.short for t in self.terms)

    def conflicts(self) -> Iterator[str]:
        if not self.terms:
            yield "terms has no term; remove the group with =None, or add one"
        if len(set(self.labels())) < len(self.terms):
            yield f"terms has two terms of one name: {', '.join(sorted(self.labels()))}"
        if self.clip and not (len(self.clip) == 2 and self.clip[0] <= self.clip[1]):
            yield f"clip must be (low, high) with low <= high, or () for none; got {self.clip}"


DEFAULT_REWARD = (
    RewardGroup("final", 1.0, (RewardTerm("rsagent_jax.rewards:final_iou"),)),  # group weight: (paper)
    RewardGroup(
        "process",
        0.5,  # (paper); everything below in this group is ours
        (
            RewardTerm("rsagent_jax.rewards:iou_gain", 1.0),
            RewardTerm("rsagent_jax.rewards:call_cost", -0.02),
            RewardTerm("rsagent_jax.rewards:novel_action", 0.1),
            RewardTerm("rsagent_jax.rewards:point_excess", -0.02),
            RewardTerm("rsagent_jax.rewards:overshoot", -1.0),
        ),
        clip=(-1.0, 1.0),
    ),
    RewardGroup("format", 0.2, (RewardTerm("rsagent_jax.rewards:format_ok"),)),  # group weight: (paper)
)
