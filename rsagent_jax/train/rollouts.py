"""What this process has played in a step, round by round, with its rewards."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from rsagent_jax.agent.environment import EnvState
from rsagent_jax.array_types import Bool, Float32
from rsagent_jax.masks import mask_iou
from rsagent_jax.runtime.processes import allgather_max
from rsagent_jax.train.turn_credit import rewards_to_go
from rsagent_jax.types import Reward, Sample, Status, Trajectory

SUMS = ("rollout/seconds", "rollout/prefill_tokens", "rollout/copied_tokens", "rollout/decode_tokens")


@dataclasses.dataclass
class Rollouts:
    """Groups in the order in which they were drawn, each with `group` trajectories; `group_id` is its place here."""

    group: int
    drawn: int = 0  # prompts, over all processes
    samples: list[Sample] = dataclasses.field(default_factory=list)  # of each group
    outcomes: list[tuple[Trajectory, EnvState]] = dataclasses.field(default_factory=list)
    rewards: list[Reward | None] = dataclasses.field(default_factory=list)  # None: not judged, or no reward came
    reward_errors: list[str] = dataclasses.field(default_factory=list)  # of those with grpo.on_reward_error = drop
    earned: list[np.ndarray] = dataclasses.field(default_factory=list)  # by turn; none without grpo.turn_credit
    figures: list[dict[str, float]] = dataclasses.field(default_factory=list)  # the driver's, of each round
    seconds: float = 0.0  # from a round's beginning to the end of its last trajectory, added up
    replaced: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, bool))  # groups, by others

    def add(
        self,
        samples: Sequence[Sample],
        outcomes: Sequence[tuple[Trajectory, EnvState]],
        drawn: int,
        figures: dict[str, Any],
    ) -> None:
        """A round. `drawn`: prompts, over all processes."""
        self.samples += samples
        self.outcomes += outcomes
        self.drawn += drawn
        self.figures.append(figures)
        self.replaced = np.append(self.replaced, np.zeros(len(samples), bool))

    @property
    def trajectories(self) -> list[Trajectory]:
        return [trajectory for trajectory, _ in self.outcomes]

    @property
    def valid(self) -> Bool[np.ndarray, "n G"]:
        """Those that have a reward."""
        return self.by_group(np.array([reward is not None for reward in self.rewards]))

    @property
    def overlong(self) -> Bool[np.ndarray, " trajectories"]:
        return np.array([t.status is Status.MAX_CONTEXT for t in self.trajectories])

    def by_group(self, values: np.ndarray) -> np.ndarray:
        return values.reshape(-1, self.group)

    def values(self) -> Float32[np.ndarray, "n G K"]:
        """Rewards-to-go of every turn; the whole rewards alone where no group of them is credited by turn."""
        totals = self.by_group(np.array([0.0 if r is None else r.total for r in self.rewards], np.float32))
        return rewards_to_go(totals, self.earned).astype(np.float32)

    def success(self) -> dict[str, float]:
        """Sample id -> mean IoU of its group's final masks; without those of whose group nothing is judged."""
        ious: dict[str, list[float]] = {}
        for trajectory, reward in zip(self.trajectories, self.rewards, strict=True):
            if reward is not None:
                sample = self.samples[trajectory.group_id]
                ious.setdefault(sample.id, []).append(mask_iou(trajectory.final_mask, sample))
        return {id: float(np.mean(values)) for id, values in ious.items()}

    def staleness(self, version: int) -> dict[str, float]:
        """How many versions ago the weights were current that drew a sampled token: mean, and largest of all processes.
        They call it together."""
        ages = [version - t.versions[t.loss_mask] for t in self.trajectories]
        found = np.concatenate([*ages, np.zeros(0, int)])
        largest = allgather_max(int(found.max(initial=0)))
        return {"staleness": float(found.mean()) if len(found) else 0.0, "staleness_max": float(largest)}

    def metrics(self) -> dict[str, float]:
        """The driver's figures over all rounds: counts and seconds add up, shares and rates weigh by a round's time."""
        if len(self.figures) == 1:
            return self.figures[0]
        seconds = [figures["rollout/seconds"] for figures in self.figures]
        out = {}
        for name in self.figures[0]:
            values = [figures[name] for figures in self.figures]
            out[name] = float(np.sum(values) if name in SUMS else np.average(values, weights=seconds))
        return out
