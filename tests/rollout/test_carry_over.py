"""A trajectory that is broken off goes on as if it had not been: in another slot, and under new weights."""

import dataclasses
import functools
import itertools
import threading

import jax
import numpy as np
import pytest
from agent_fakes import DiscSegmenter

from rsagent_jax.data.packing import pack
from rsagent_jax.rollout.driver import Driver
from rsagent_jax.rollout.jobs import Jobs
from rsagent_jax.rollout.policy import TextPolicy, join_texts
from rsagent_jax.train.carry_over import InFlight
from rsagent_jax.train.step import batch_logprobs
from rsagent_jax.types import Prompt
from tests.rollout import small

SCRIPTS = {
    "s0": (small.click(40, 40), small.finish(1)),
    "s1": small.THREE_IMAGES,
    "s2": (small.click(30, 40), "nonsense", small.click(60, 60), small.finish(2)),
    "s3": (small.zoom(10, 10, 60, 90), small.finish(None)),
    "s4": (small.finish(None),),
}
TASKS = [small.task(i, uid=10 + i) for i in range(5)]


@functools.cache
def engine():
    """Samples the image token now and then, in turns that are longer than a call of the engine."""
    made = small.engine(chunk=2, prefill=16, slots=3, max_new_tokens=9)
    made.load(small.eager_params(), made.key)
    return made


def driver(eng) -> small.EchoDriver:
    agent = dataclasses.replace(small.AGENT, announce_last=False)
    how = dict(workers=2, script=small.scripted(SCRIPTS))
    return small.EchoDriver(eng, DiscSegmenter(), small.processor(), agent, **how)


def play_in_parts(d: Driver, cuts, between=lambda: None):
    """Trajectories by uid, broken off after so many have ended, and `between` done then."""
    out, tasks = {}, iter(TASKS)
    for count in (*cuts, len(TASKS)):
        play = d.play(tasks, d.broken_off)
        out |= {task.uid: t for task, t, _ in itertools.islice(play, count)}
        play.close()
        if count < len(TASKS):
            between()
    return out


@functools.cache
def whole():
    return play_in_parts(driver(engine()), ())


def assert_unbroken(t, uid: int) -> None:
    """All is as in an unbroken play, but for the rounding of contexts that were read in other pieces."""
    want = whole()[uid]
    for name in ("tokens", "positions", "patches", "final_mask"):
        np.testing.assert_array_equal(getattr(t, name), getattr(want, name), err_msg=name)
    assert (t.grids, t.status, len(t.turns)) == (want.grids, want.status, len(want.turns))
    np.testing.assert_allclose(t.logprobs, want.logprobs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("cuts", [(1,), (2, 1), (1, 1, 1)])
def test_under_the_same_weights_nothing_changes(cuts):
    """Its turns under way, running tools and openings are taken up again: the tokens are those of an unbroken play."""
    d = driver(engine())
    found = play_in_parts(d, cuts)
    assert found.keys() == whole().keys() and d.broken_off == []
    for uid, t in found.items():
        assert_unbroken(t, uid)
    assert any((t.tokens[t.loss_mask] == small.processor().image_id).any() for t in found.values())


class AtOnce(Jobs):
    """Work that is done where it is submitted: what is under way when a play is broken off hangs on no thread."""

    def _start(self):
        for job in self.jobs.values():
            job.future.done() or job.run()


def test_tokens_keep_the_log_probs_and_the_version_of_the_weights_that_drew_them(monkeypatch):
    """Three versions; the trainer says what each of them would have said of every token."""
    monkeypatch.setattr("rsagent_jax.rollout.driver.Jobs", AtOnce)
    eng, start = engine(), small.eager_params()
    versions = [start, *(jax.tree.map(lambda x, s=s: x * s, start) for s in (1.02, 0.97))]
    d, graphdef = driver(eng), small.split(small.model())[0]

    def update():
        d.version += 1
        eng.release_memory()
        eng.load(versions[d.version], jax.random.key(d.version))

    try:
        found = list(play_in_parts(d, (1, 1), update).values())
    finally:
        eng.load(start, jax.random.key(0))
    batch = pack([small.item(t) for t in found], dataclasses.replace(small.BATCH, rows=4), small.processor().config)
    assert len(batch) == 1
    program = jax.jit(lambda params: batch_logprobs(graphdef, params, batch[0], small.COMPUTE, 1.0))
    says, seen, within = [np.asarray(program(params)) for params in versions], set(), False
    for t in found:
        here = small.places_of(batch[0], t)
        by_version = np.stack([logprobs[here] for logprobs in says])
        sampled = np.flatnonzero(t.loss_mask)
        own = by_version[t.versions[sampled], sampled]
        np.testing.assert_allclose(t.logprobs[sampled], own, rtol=0, atol=2e-4)
        other = by_version[(t.versions[sampled] + 1) % 3, sampled]
        assert np.abs(t.logprobs[sampled] - other).max() > 1e-3
        assert (np.diff(t.versions[sampled]) >= 0).all()
        seen |= set(t.versions[sampled])
        ends = np.flatnonzero(np.diff(t.versions[sampled]))
        within |= any(sampled[i + 1] == sampled[i] + 1 for i in ends)
    assert seen == {0, 1, 2} and within  # also inside of a turn


def test_a_policy_without_tokens_begins_its_turn_anew():
    policy = TextPolicy(small.scripted(SCRIPTS), small.processor(), slots=2)
    agent = dataclasses.replace(small.AGENT, announce_last=False)
    plays = [Driver(policy, DiscSegmenter(), small.processor(), agent) for _ in range(2)]
    want, got = play_in_parts(plays[0], ()), play_in_parts(plays[1], (1, 1))
    for uid, t in got.items():
        np.testing.assert_array_equal(t.tokens, want[uid].tokens)


def test_what_had_no_slot_when_a_step_was_done_gets_one_in_the_next_and_is_not_stale_for_that():
    """Two slots and groups of two: one that only waited does not count as begun, so no step has to wait for it."""
    policy = TextPolicy(small.scripted(SCRIPTS), small.processor(), slots=2)
    agent = dataclasses.replace(small.AGENT, announce_last=False)
    flight = InFlight(Driver(policy, DiscSegmenter(), small.processor(), agent), 2, max_staleness=1)
    new = [(number, small.task(number, uid=0).sample) for number in range(5)]
    taken = []
    for version, begun in enumerate((new[:4], new[4:], [], [], []), 1):
        groups = flight.play(begun, 1)
        assert all(version - 1 <= g.began <= version for g in groups)
        taken.append([g.number for g in groups])
    assert sorted(itertools.chain(*taken)) == [0, 1, 2, 3, 4] and not flight.groups
    assert len(taken[0]) == 1 and max(map(len, taken)) <= 2  # counted from the draw, three had to be in the second


def test_a_tool_call_that_was_running_is_not_made_again():
    """Broken off while one call runs and others wait for a thread: each is made once."""
    running, go_on = threading.Event(), threading.Event()

    class Slow(DiscSegmenter):
        def segment(self, image, request):
            running.set()
            assert go_on.wait(60)
            return super().segment(image, request)

    class AllFive(TextPolicy):  # have their first turn at once
        def step(self):
            return super().step() if running.is_set() or len(self.turns) == 5 else []

    agent = dataclasses.replace(small.AGENT, announce_last=False)
    policy, segmenter = AllFive(small.scripted(SCRIPTS), small.processor(), slots=5), Slow()
    d = Driver(policy, segmenter, small.processor(), agent, workers=2)
    play = d.play(TASKS[::-1])
    assert next(play)[0].uid == 14  # it finishes at once
    assert running.wait(60)
    play.close()
    assert not policy.turns  # every slot is given back
    go_on.set()
    found = [t for _, t, _ in d.play([], d.broken_off)]
    assert len(found) == 4 and len(segmenter.requests) == sum(len(t.masks) for t in found)


def test_a_context_is_read_in_few_prompts():
    """An opening; a turn and the observation after it; one with the image token (9), which is text there alone."""

    def prompt(*tokens, grids=()):
        patches = np.zeros((16 * len(grids), 4), np.float32)
        ids = np.array(tokens, np.int32)
        return Prompt(ids, np.broadcast_to(ids, (3, len(ids))), patches, grids)

    overlay = ((1, 4, 4),)
    context = [prompt(1, 9, grids=overlay), prompt(2, 3), prompt(4, 9, grids=overlay), prompt(5, 9, 5)]
    got = join_texts([*context, prompt(6), prompt(7)], 9)
    assert [p.tokens.tolist() for p in got] == [[1, 9], [2, 3, 4, 9], [5, 9, 5], [6, 7]]
    assert [p.positions[2].tolist() for p in got] == [p.tokens.tolist() for p in got]
    assert [p.grids for p in got] == [overlay, overlay, (), ()] and len(got[1].patches) == 16
