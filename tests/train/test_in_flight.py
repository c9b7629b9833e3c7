"""Groups that take longer than a step, over a driver whose trajectories take as many ticks as they are told."""

import dataclasses

from rsagent_jax.train import batch_source
from rsagent_jax.train.batch_source import GrpoSource
from rsagent_jax.train.carry_over import InFlight
from rsagent_jax.types import DataError
from tests.refusals import refused
from tests.rollout.small import trajectory
from tests.train.played import nothing_new, sample, source, state_of


@dataclasses.dataclass
class Under:
    task: object
    left: int


class Ticks:
    """`ticks`: uid -> how long its trajectory takes. All that is under way goes on at the same pace."""

    segmenter = None

    def __init__(self, ticks, teach=None):
        self.ticks, self.teach = ticks, teach
        self.version, self.broken_off, self.begun, self.time = 0, [], [], 0
        self.policy = self

    def play(self, tasks, unfinished=()):
        tasks = list(tasks)
        self.begun += [task.uid for task in tasks]
        runs = [*unfinished, *(Under(task, self.ticks(task.uid)) for task in tasks)]
        self.broken_off = []
        try:
            while runs:
                next_one = min(runs, key=lambda run: (run.left, run.task.uid))
                self.time += next_one.left
                for run in runs:
                    run.left -= next_one.left if run is not next_one else 0
                runs.remove(next_one)
                number = int(next_one.task.sample.id[1:])
                t = trajectory(number, 10 + next_one.task.uid % 2 * 10)
                t = dataclasses.replace(t, group_id=next_one.task.group_id, versions=0 * t.tokens + self.version)
                yield next_one.task, t, state_of(t)
        except GeneratorExit:
            self.broken_off = runs
            raise

    def metrics(self):
        return {"rollout/seconds": 1.0}

    def load(self, params, key):
        pass

    def release_memory(self):
        pass


def numbers(groups) -> list[int]:
    return [group.number for group in groups]


def test_a_step_takes_the_first_that_are_done_and_the_others_go_on():
    # Groups of two; group 1 has a member of 100 ticks, the others take 1 to 6.
    driver = Ticks(lambda uid: 100 if uid == 3 else uid // 2 + 1)
    flight = InFlight(driver, 2, max_staleness=9)
    new = lambda *places: [(n, sample(n)) for n in places]  # noqa: E731
    assert numbers(flight.play(new(0, 1, 2, 3), 2)) == [0, 2] and driver.time == 3
    assert sorted(flight.groups) == [1, 3] and [run.task.uid for run in driver.broken_off] == [3, 6, 7]
    assert numbers(flight.play(new(4, 5), 2)) == [3, 4]
    assert [g.began for g in flight.groups.values()] == [1, 2]
    # every task was begun once, and a group's trajectories stand in the order of their numbers
    assert driver.begun == list(range(12))
    (rest,) = [g for g in flight.play([], 2) if g.number == 1]
    assert [t.group_id for t, _ in rest.in_order(7)] == [7, 7]
    assert driver.time == 100 and not flight.groups


def test_what_began_too_long_ago_is_waited_for():
    """Group 0 takes 100 ticks, others 1: with a staleness of s it is waited for in step 1 + s, and is done there."""
    for limit in (1, 2, 3):
        driver = Ticks(lambda uid: 100 if uid < 2 else 1)
        flight, step = InFlight(driver, 2, max_staleness=limit), 1
        assert numbers(flight.play([(n, sample(n)) for n in range(2)], 1)) == [1]
        while 0 in flight.groups:
            assert driver.time < 100
            step += 1
            flight.play([(step, sample(0))], 1)
        assert (step, driver.time) == (1 + limit, 100)
    # of more than a step needs, all that may not wait are taken
    driver = Ticks(lambda uid: 5)
    flight = InFlight(driver, 2, max_staleness=1)
    flight.play([(n, sample(n)) for n in range(4)], 1)
    assert len(flight.groups) == 3 and numbers(flight.play([(9, sample(9))], 1)) == [1, 2, 3]


def over_ticks(ticks, count: int = 6, **config) -> GrpoSource:
    groups = [[trajectory(i, 20), trajectory(i, 10)] for i in range(count)]
    made = source(groups, prompts=2, surplus=2, max_staleness=2, **config)
    driver = Ticks(ticks)
    made.driver, made.in_flight = driver, InFlight(driver, 2, 2)
    return made


def test_a_source_begins_as_many_as_are_missing_and_begins_those_in_flight_anew_after_a_stop():
    s = over_ticks(lambda uid: 50 if uid in (0, 1) else 1)
    batches, metrics = s.next(nothing_new, None)
    assert len(batches) and (metrics["in_flight"], metrics["staleness"], metrics["trajectories"]) == (2.0, 0.0, 4.0)
    assert s.driver.begun == list(range(8))  # two prompts and two more
    _, metrics = s.next(nothing_new, None)
    assert s.driver.begun == list(range(12)) and metrics["staleness_max"] <= 1.0
    state = s.state()
    assert state["position"] == 6 and 0 in state["in_flight"] and len(state["in_flight"]) == 2
    again = over_ticks(lambda uid: 1)
    again.restore(state)
    assert again.state() == state  # nothing is lost if it is stopped once more
    again.next(nothing_new, None)
    want = sorted([*state["in_flight"], 6, 7])
    assert sorted({uid // 2 for uid in again.driver.begun}) == want  # under the same numbers, and two new prompts
    assert len(again.state()["in_flight"]) == 2


def test_a_prompt_that_cannot_be_read_when_it_is_begun_anew_ends_all_processes(monkeypatch):
    """One that refuses alone would leave the others in a collective."""
    agreed = []

    def all_or_none(check):
        try:
            return check()
        except DataError as error:
            agreed.append(str(error))
            raise

    def unreadable(places):
        raise DataError(f"cannot be read: {places}")

    s = over_ticks(lambda uid: 1)
    s.again = [0]
    monkeypatch.setattr(batch_source, "all_or_none", all_or_none)
    monkeypatch.setattr(s.prompts, "draw_again", unreadable)
    refused(r"cannot be read: \[0\]", s.next, nothing_new, None)
    assert agreed == ["cannot be read: [0]"]
