"""Groups that take longer than a step: more are in flight than a step needs, and what is not done goes on in the next.

A step has what it needs as soon as so many groups are done. The others are broken off where they are
(rollout/driver.py) and finished under the next step's weights; each of their tokens keeps its log-prob and the version
of the weights that drew it, so the ratio stays one of what was played, and `grpo.tis_clip` bounds it. No group is
trained on that began more than `grpo.max_staleness` versions ago: one that would be is waited for. It begins when the
first of its trajectories gets a slot, not when its prompt is drawn. Nothing is thrown away, so short answers are not
preferred; which groups a step gets depends on which were fast.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from rsagent_jax.agent.environment import EnvState
from rsagent_jax.rollout.driver import Driver, Run
from rsagent_jax.rollout.policy import Task
from rsagent_jax.types import Sample, Trajectory


@dataclasses.dataclass
class Group:
    """A prompt and what has ended of its trajectories. `number` is unique in a run, over all processes."""

    number: int
    sample: Sample
    size: int
    began: int = 0  # version of the weights under which one of its trajectories first got a slot; 0: none has
    outcomes: dict[int, tuple[Trajectory, EnvState]] = dataclasses.field(default_factory=dict)  # by uid

    @property
    def done(self) -> bool:
        return len(self.outcomes) == self.size

    def in_order(self, group_id: int) -> list[tuple[Trajectory, EnvState]]:
        return [(dataclasses.replace(t, group_id=group_id), state) for _, (t, state) in sorted(self.outcomes.items())]


class InFlight:
    """This process's groups under way, or done and not trained on yet."""

    def __init__(self, driver: Driver, size: int, max_staleness: int):
        self.driver, self.size, self.max_staleness = driver, size, max_staleness
        self.groups: dict[int, Group] = {}  # by number
        self.waiting: Iterator[Task] = iter(())  # for a slot; what a step does not come to is the next one's

    def play(
        self,
        new: Sequence[tuple[int, Sample]],
        count: int,
        take_up: Callable[[Sequence[Task]], list[Run]] = lambda tasks: [],
    ) -> list[Group]:
        """Starts `new`, (number, sample), and plays until `count` groups are done, and all that may not wait any more.

        Returns so many that are done, the oldest first, or all of those that may not wait; they are in flight no more.
        take_up: of new tasks those that an earlier start of the command has begun, as far as they had come.
        """
        driver = self.driver
        driver.version += 1
        started = [Group(number, sample, self.size) for number, sample in new]
        self.groups |= {group.number: group for group in started}
        tasks = [Task(g.sample, g.number, g.number * self.size + k) for g in started for k in range(self.size)]
        begun = take_up(tasks)
        for run in begun:
            group, drawn_by = self.groups[run.task.group_id], [*(int(part[4].min()) for part in run.parts[1:])]
            group.began = min([group.began or driver.version, *drawn_by, *map(int, run.versions)])
        begun_tasks = {run.task for run in begun}
        self.waiting = iter([*self.waiting, *(task for task in tasks if task not in begun_tasks)])
        playing = driver.play(self._begin(self.waiting), [*driver.broken_off, *begun])
        try:
            for task, trajectory, state in playing:
                self.groups[task.group_id].outcomes[task.uid] = trajectory, state
                if self._enough(count):
                    break
        finally:
            playing.close()
        done = sorted((g for g in self.groups.values() if g.done), key=lambda g: (g.began, g.number))
        taken = done[: max(count, sum(self._must(group) for group in done))]
        for group in taken:
            del self.groups[group.number]
        return taken

    def ended(self) -> dict[Task, tuple[Trajectory, EnvState]]:
        """Of the groups in flight what has ended."""
        groups = self.groups.values()
        return {Task(g.sample, g.number, uid): outcome for g in groups for uid, outcome in g.outcomes.items()}

    def _begin(self, tasks: Iterator[Task]) -> Iterator[Task]:
        for task in tasks:
            group = self.groups[task.group_id]
            group.began = group.began or self.driver.version
            yield task

    def _enough(self, count: int) -> bool:
        groups = self.groups.values()
        return sum(g.done for g in groups) >= count and all(g.done for g in groups if self._must(g))

    def _must(self, group: Group) -> bool:
        return 0 < group.began <= self.driver.version - self.max_staleness
