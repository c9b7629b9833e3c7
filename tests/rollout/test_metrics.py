"""What a rollout says about itself, beside what is counted by hand from its trajectories."""

import time

import numpy as np
import pytest
from agent_fakes import DiscSegmenter

from tests.rollout import small
from tests.rollout.small import AGENT, THREE_IMAGES, EchoDriver, IdleSegmenter, Task, click, finish, scripted, task

SCRIPTS = {"s0": THREE_IMAGES, "s1": (click(30, 40), "nonsense", finish(1))}
SLOTS, CHUNK = 4, 2


@pytest.fixture(scope="module")
def engine():
    return small.engine(slots=SLOTS, lanes=1, chunk=CHUNK)


def play(engine, tasks, segmenter=None):
    """(trajectories, the rollout's metrics without their common prefix, seconds measured from outside)."""
    driver = EchoDriver(engine, segmenter or DiscSegmenter(), small.processor(), AGENT, script=scripted(SCRIPTS))
    start = time.perf_counter()
    played = [t for t, _ in driver.run(tasks)]
    seconds = time.perf_counter() - start
    return played, {name.removeprefix("rollout/"): value for name, value in driver.metrics().items()}, seconds


def appended(t) -> int:
    """Prompt tokens that the cache took: the forced ones, and terminators of turns that another one followed.

    A sampled terminator is drawn but not fed back; it is read as the first token of what follows.
    """
    ends = np.flatnonzero(np.diff(t.loss_mask.astype(int)) == -1)
    return int((~t.loss_mask).sum() + (t.tokens[ends] == small.processor().terminator_id).sum())


@pytest.mark.slow
def test_one_trajectory_on_four_slots_by_hand(engine):
    (t,), got, seconds = play(engine, [task(0)])
    tokens = int(t.loss_mask.sum())
    assert tokens > len(t.turns) == 4
    assert got["decode_tokens"] == tokens and got["occupancy"] == 1 / SLOTS  # a step for every token, three slots idle
    assert got["prefill_tokens"] == appended(t) and got["copied_tokens"] == 0
    assert got["tokens_per_s"] * got["seconds"] == pytest.approx(tokens) and got["seconds"] < seconds
    # two layers' keys and values of two heads of 16 numbers in fp32; 512 places, and a piece of 64, are three blocks
    assert got["kv_mib"] == 2 * 2 * SLOTS * 2 * 16 * 4 * 3 * 256 / 2**20
    assert got["weights_seconds"] == engine.seconds["weights"] > 0


def test_a_group_reads_its_opening_once_and_fills_more_slots(engine):
    played, got, _ = play(engine, [Task(small.sample(i), i, uid) for i, uid in ((0, 0), (0, 1), (1, 2))])
    opening = int(played[0].loss_mask.argmax())
    assert got["copied_tokens"] == opening - 1  # its last token is read again, for the first sampled one
    assert got["prefill_tokens"] + got["copied_tokens"] == sum(map(appended, played))
    assert got["decode_tokens"] == sum(int(t.loss_mask.sum()) for t in played)
    steps = engine.stats["decode_steps"]
    assert got["occupancy"] == got["decode_tokens"] / (steps * SLOTS) > 1 / SLOTS
    assert max(int(t.loss_mask.sum()) for t in played) <= steps < got["decode_tokens"]


def test_the_time_is_split_into_tools_prompts_and_sampling(engine, monkeypatch):
    play(engine, [task(1)])  # compiled before
    slow = IdleSegmenter(0.4, slow_shape=(112, 112))
    monkeypatch.setattr("rsagent_jax.rollout.driver.Jobs", slow.jobs)
    (t,), got, _ = play(engine, [task(1)], slow)
    assert t.seconds["tool"] >= 0.4 and got["tool_wait"] * got["seconds"] >= 0.4  # one click, and nobody else to serve
    assert got["prefill"] > 0 and got["decode"] > 0  # pieces of prompts, then turns of more than a chunk
    assert got["prefill"] + got["decode"] <= got["device"] <= 1 - got["tool_wait"]


def test_waiting_for_the_first_prompts_is_not_waiting_for_tools(engine, monkeypatch):
    class Late(EchoDriver):
        def _opening(self, state):
            self.segmenter.idle.wait(60)
            time.sleep(0.5)
            return super()._opening(state)

    segmenter = IdleSegmenter(0.0, slow_shape=(112, 112))
    monkeypatch.setattr("rsagent_jax.rollout.driver.Jobs", segmenter.jobs)
    driver = Late(engine, segmenter, small.processor(), AGENT, script=lambda task, state: finish(None))
    driver.run([task(1)])
    assert driver.stats["host"] >= 0.5  # which no time is that is in "waiting"


def test_a_policy_that_counts_nothing_has_the_driver_s_numbers():
    scripts = scripted({"s0": (click(30, 40), finish(1))})
    driver = small.Driver(small.TextPolicy(scripts, small.processor()), DiscSegmenter(), small.processor(), AGENT)
    ((t, _),) = driver.run([task(0)])
    got = driver.metrics()
    assert got["rollout/tokens_per_s"] * got["rollout/seconds"] == pytest.approx(int(t.loss_mask.sum()))
    assert got.keys() == {f"rollout/{name}" for name in ("seconds", "tokens_per_s", "tool_wait", "device")}
