"""A rollout that a signal stops goes on from records as if it had not been stopped, in another driver."""

import itertools
import json

import numpy as np
import pytest
from agent_fakes import DiscSegmenter

from rsagent_jax.agent.replay import replay
from rsagent_jax.data.npz import read_arrays
from rsagent_jax.rollout.kept import ended_run, pack_run, record_about, take_up
from rsagent_jax.runtime import preemption
from sam_bridge.types import FailureKind, SegmenterError
from tests.rollout import small
from tests.rollout.test_carry_over import SCRIPTS, TASKS, assert_unbroken, driver, engine, whole


def scripted(segmenter) -> small.EchoDriver:
    agent = driver(engine()).agent
    return small.EchoDriver(engine(), segmenter, small.processor(), agent, script=small.scripted(SCRIPTS))


def stop_after(monkeypatch, looks: int) -> None:
    count = itertools.count(1)

    def check():
        if next(count) > looks:
            raise preemption.Preempted("SIGTERM")

    monkeypatch.setattr(preemption, "check", check)


def played_until(d, kept, ended):
    """The outcomes of all tasks; None where it was stopped, and then `kept` has the records."""
    runs = take_up(kept, TASKS, d)
    try:
        return dict(zip(TASKS, d.run(TASKS, runs, ended), strict=True))
    except preemption.Preempted:
        runs = [*(ended_run(task, *outcome) for task, outcome in ended.items()), *d.broken_off]
        records = [record for run in runs if (record := pack_run(run))]
        kept |= {record_about(record)["uid"]: record for record in records}
        return None


@pytest.mark.parametrize("looks", [(3,), (9, 4), (20,), (6, 6, 6)])
def test_tokens_masks_and_endings_are_those_of_an_unbroken_play(monkeypatch, looks):
    kept, before = {}, {}
    for stop in (*looks, 1 << 30):
        d = scripted(DiscSegmenter())
        stop_after(monkeypatch, stop)
        found = played_until(d, kept, {})
        drawn = {uid: record_about(record)["turns"] for uid, record in kept.items()}
        assert all(drawn.get(uid, 9) >= turns for uid, turns in before.items())  # nothing is lost again
        before = drawn
    assert kept == {} and set(found) == set(TASKS)
    for task, (t, state) in found.items():
        assert_unbroken(t, task.uid)
        assert len(state.turns) == len(t.turns)


def test_what_was_drawn_keeps_its_log_probs_to_the_bit_and_a_tool_that_died_as_well_is_asked_again(monkeypatch):
    class Dead(DiscSegmenter):
        def segment(self, image, request):
            raise SegmenterError(FailureKind.UNAVAILABLE, "stopped, too")

    kept, ended = {}, {}
    d = scripted(Dead())
    failed = lambda: any(t.status == "env_failed" for t, _ in ended.values())  # noqa: E731
    stop_after(monkeypatch, 0)
    stop = preemption.check
    monkeypatch.setattr(preemption, "check", lambda: failed() and stop())
    assert played_until(d, kept, ended) is None
    assert failed() and not [uid for uid in kept if record_about(kept[uid])["status"] == "env_failed"]
    monkeypatch.undo()
    d = scripted(DiscSegmenter())
    drawn = {task.uid: t for task, (t, _) in ended.items()}
    for task, t in zip(TASKS, (t for t, _ in d.run(TASKS, take_up(kept, TASKS, d))), strict=True):
        np.testing.assert_array_equal(t.tokens, whole()[task.uid].tokens)
        if task.uid in drawn:
            n = len(drawn[task.uid].tokens)
            np.testing.assert_array_equal(t.logprobs[:n], drawn[task.uid].logprobs)


def test_a_segmenter_that_was_started_anew_is_asked_for_the_masks_again_that_may_be_refined(monkeypatch):
    kept, asked, anew, turns = {}, [], DiscSegmenter(), []
    d = scripted(DiscSegmenter())
    d.on_turn = lambda task, state: turns.append(task)
    stop_after(monkeypatch, 0)
    stop = preemption.check
    monkeypatch.setattr(preemption, "check", lambda: turns and stop())
    played_until(d, kept, {})
    for record in (record for record in kept.values() if record_about(record)["status"] is None):
        about = json.loads(read_arrays(record)["header"].tobytes())
        replay(about["replay"], next(t.sample.image for t in TASKS if t.uid == about["uid"]), asked.append)
    stop_after(monkeypatch, 1 << 30)
    played_until(scripted(anew), kept, {})
    assert asked and all(request in anew.requests for request in asked)
