"""Stored turns in place of an engine's: the driver plays them as they are, each in its time."""

import dataclasses
import time

import numpy as np
import pytest
from agent_fakes import DiscSegmenter

from rsagent_jax.config.schema import MockConfig
from rsagent_jax.data import trajectories
from rsagent_jax.rollout.driver import Driver
from rsagent_jax.rollout.mock import MockEngine
from rsagent_jax.rollout.policy import TextPolicy
from tests.refusals import refused
from tests.rollout import small

SCRIPTS = {"s0": (small.click(40, 40), small.finish(1)), "s1": (small.finish(None),)}
SAMPLING = dataclasses.replace(small.SAMPLING, max_new_tokens=64, context=2048)
AGENT = dataclasses.replace(small.AGENT, announce_last=False)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """As grpo.dump_every keeps them: with ids and log-probs."""
    directory = tmp_path_factory.mktemp("dump")
    policy = TextPolicy(small.scripted(SCRIPTS), small.processor())
    writer, played = trajectories.RecordWriter(directory), {}
    for task, t, state in Driver(policy, DiscSegmenter(), small.processor(), AGENT).play(
        [small.task(0), small.task(1)]
    ):
        logprobs = -np.arange(len(t.tokens), dtype=np.float32) * t.loss_mask
        played[task.sample.id] = dataclasses.replace(t, logprobs=logprobs)
        writer.write(trajectories.encode_by_reference(state, "", {"id": t.sample_id}, t, {"logprobs": logprobs}))
    writer.close({})
    return directory, played


def play(directory, tasks, **mock):
    policy = MockEngine(MockConfig(trajectories=str(directory), **mock), SAMPLING, small.processor())
    driver = Driver(policy, DiscSegmenter(), small.processor(), AGENT)
    start = time.perf_counter()
    return driver.run(tasks), time.perf_counter() - start


def test_a_sample_plays_what_is_stored_of_it_and_others_anything(stored):
    directory, want = stored
    tasks = [small.task(0, uid=7), small.task(1, uid=8), small.task(2, uid=9)]
    (first, second, other), _ = play(directory, tasks)
    for (got, _), was in ((first, want["s0"]), (second, want["s1"])):
        np.testing.assert_array_equal(got.tokens, was.tokens)
        np.testing.assert_array_equal(got.logprobs, was.logprobs)
        assert got.status == was.status
    assert len(first[0].masks) == 1  # the tool was really called
    assert other[0].tokens[other[0].loss_mask].tolist() in [t.tokens[t.loss_mask].tolist() for t in want.values()]


def test_turns_take_their_time(stored):
    """Two turns of 0.3 s one after the other, and the one of the other trajectory beside them."""
    _, seconds = play(stored[0], [small.task(0), small.task(1)], turn_s=0.3, sigma=0.0)
    assert seconds >= 0.6


def test_a_set_that_is_not_there(tmp_path):
    refused("holds no complete set", play, tmp_path, [])
