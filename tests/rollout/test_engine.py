"""The engine on a small random model: its log-probs are the trainer's, whatever the slot, neighbours or cache."""

import functools

import jax
import numpy as np
import pytest

from rsagent_jax.config import SamplingConfig
from rsagent_jax.data.packing import pack
from rsagent_jax.rollout.engine import Engine
from rsagent_jax.rollout.policy import Request
from rsagent_jax.train.step import batch_logprobs
from rsagent_jax.types import DataError, Prompt, Status
from tests.rollout import small
from tests.rollout.small import THREE_IMAGES, click, engine_trajectories, finish, task, zoom

SCRIPTS = {
    "s0": THREE_IMAGES,
    "s1": (click(50, 50), "nonsense", click(20, 70), finish(1)),  # a text-only observation among images
    "s2": (zoom(10, 10, 60, 90), finish(None)),
}
TASKS = [task(0), task(1, h=84, w=140), task(2)]


@pytest.fixture(scope="module")
def engine():
    engine = small.engine()
    engine.load(small.eager_params(), engine.key)
    return engine


@pytest.fixture(scope="module")
def greedy():
    return small.engine(temperature=0.0)


@pytest.fixture(scope="module")
def trajectories(engine):
    return engine_trajectories(TASKS, SCRIPTS, eng=engine)


@functools.cache
def trainer(temperature):
    """The training forward pass, compiled once."""
    graphdef, _ = small.split(small.model())
    return jax.jit(lambda params, batch: batch_logprobs(graphdef, params, batch, small.COMPUTE, temperature))


def trainer_logprobs(trajectories, params, temperature=1.0):
    """Per trajectory f32[T] from packed rows."""
    (batch,) = pack([small.item(t) for t in trajectories], small.BATCH, small.processor().config)
    logprobs, out = np.asarray(trainer(temperature)(params, batch)), []
    for t in trajectories:
        found = [
            logprobs[r][batch.segment_ids[r] == s]
            for r in range(len(logprobs))
            for s in range(1, batch.segment_ids[r].max() + 1)
            if np.array_equal(batch.tokens[r][batch.segment_ids[r] == s], t.tokens)
        ]
        assert len(found) == 1
        out += found
    return out


def turn_starts(trajectory):
    marks = np.concatenate([[0], trajectory.sampled.astype(int), [0]])
    return np.flatnonzero(np.diff(marks) == 1), np.flatnonzero(np.diff(marks) == -1)


def test_trainer_and_engine_agree_on_the_log_prob_of_every_sampled_token(trajectories):
    eos = small.processor().terminator_id
    assert [len(t.turns) for t in trajectories] == [4, 4, 2] and [len(t.grids) for t in trajectories] == [4, 3, 2]
    ended = [t.tokens[end - 1] == eos for t in trajectories for end in turn_starts(t)[1]]
    assert any(ended) and not all(ended)  # finished turns, and turns that the budget cut
    # the policy may even say the image token: to both it is a word then, and no image
    assert any((t.tokens[t.sampled] == small.processor().image_id).any() for t in trajectories)
    for t, theirs in zip(trajectories, trainer_logprobs(trajectories, small.eager_params()), strict=True):
        assert t.sampled.sum() >= 2 * len(t.turns) and (t.logprobs[t.sampled] < 0).all()
        np.testing.assert_allclose(theirs[t.sampled], t.logprobs[t.sampled], rtol=0, atol=1e-4)


def test_log_probs_are_those_of_the_distribution_at_the_sampling_temperature():
    t = engine_trajectories(TASKS[:1], SCRIPTS, temperature=0.5)[0]
    params = small.split(small.model())[1]
    cold, warm = trainer_logprobs([t], params, 0.5)[0], trainer_logprobs([t], params, 1.0)[0]
    np.testing.assert_allclose(cold[t.sampled], t.logprobs[t.sampled], rtol=0, atol=1e-4)
    assert np.abs(warm[t.sampled] - t.logprobs[t.sampled]).max() > 0.1


def test_a_trajectory_does_not_depend_on_its_slot_or_on_its_neighbours(engine, trajectories):
    again = engine_trajectories([TASKS[1], TASKS[0]], SCRIPTS, eng=engine)  # other slots, one neighbour gone
    for a, b in ((again[0], trajectories[1]), (again[1], trajectories[0])):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=1e-5)


def test_randomness_follows_the_uid_and_the_key_and_nothing_else(engine, trajectories):
    twins = engine_trajectories([task(0, uid=7), task(0, uid=8), task(0, uid=7)], SCRIPTS, eng=engine)
    np.testing.assert_array_equal(twins[0].tokens, twins[2].tokens)
    assert not np.array_equal(twins[0].tokens, twins[1].tokens)
    assert not np.array_equal(twins[0].tokens, trajectories[0].tokens)  # uid 0
    params, key = engine.params, engine.key
    engine.load(params, jax.random.key(99))
    other = engine_trajectories(TASKS, SCRIPTS, eng=engine)
    assert not np.array_equal(other[0].tokens, trajectories[0].tokens)
    engine.load(params, key)
    np.testing.assert_array_equal(engine_trajectories(TASKS, SCRIPTS, eng=engine)[0].tokens, trajectories[0].tokens)


def test_a_turn_is_drawn_with_its_own_randomness(engine):
    """Two turns of one trajectory must not repeat the same draws."""
    prompt, end = small.processor().prompt("abc", [])
    turns = []
    for turn in range(2):
        engine.begin()
        turns.append(engine.turn([Request(0, prompt, end, None, task(0), turn)])[0].tokens)
    assert not np.array_equal(*turns)


def test_greedy_turns_from_the_cache_equal_those_after_reading_the_whole_context_again(greedy):
    (t,) = engine_trajectories(TASKS[:1], SCRIPTS, eng=greedy)
    assert t.status is Status.FINISHED
    starts, ends = turn_starts(t)
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        seen = int((t.tokens[:start] == small.processor().image_id).sum())
        grids, patches = t.grids[: i + 1], t.patches[: sum(int(np.prod(g)) for g in t.grids[: i + 1])]
        assert seen == sum(int(np.prod(g)) // 4 for g in grids)
        greedy.begin()
        prompt = Prompt(t.tokens[:start], t.positions[:, :start], patches, grids)
        position = int(t.positions[0, start])
        (again,) = greedy.turn([Request(2, prompt, position, None, TASKS[0], i)])
        np.testing.assert_array_equal(again.tokens, t.tokens[start:end])
        np.testing.assert_allclose(again.logprobs, t.logprobs[start:end], rtol=0, atol=1e-4)
        assert again.finished == (again.tokens[-1] == small.processor().terminator_id)
    theirs = trainer_logprobs([t], greedy.params)[0]
    np.testing.assert_allclose(theirs[t.sampled], t.logprobs[t.sampled], rtol=0, atol=1e-4)


def test_greedy_does_not_depend_on_the_uid_or_the_key(greedy):
    a = engine_trajectories([task(0, uid=3)], SCRIPTS, eng=greedy)[0]
    greedy.load(greedy.params, jax.random.key(5))
    b = engine_trajectories([task(0, uid=4)], SCRIPTS, eng=greedy)[0]
    np.testing.assert_array_equal(a.tokens, b.tokens)


def test_ragged_work_compiles_a_bounded_number_of_programs(engine, trajectories):
    scripts = {
        f"s{i}": tuple([click(10 + 9 * i, 20), zoom(5, 5, 60 + i, 70)][: i % 3]) + (finish(None),) for i in range(7)
    }
    tasks = [task(i, uid=50 + i, h=84 + 14 * (i % 3), w=100 + 9 * i) for i in range(7)]
    engine_trajectories(tasks, scripts, eng=engine)
    # decode: 128, 256, 512 places of the cache; prefill: tokens 64, 128, 256 by patches 16, 32, 64, 128 by the places
    before = engine._prefill._cache_size(), engine._decode._cache_size()
    assert before[0] <= 36 and before[1] <= 3
    engine_trajectories(tasks[::-1], scripts, eng=engine)
    assert (engine._prefill._cache_size(), engine._decode._cache_size()) == before


def test_begin_forgets_every_slot_without_compiling_again(engine, caplog):
    with jax.log_compiles(), caplog.at_level("WARNING"):
        engine.begin()
    assert not [r.message for r in caplog.records if "Finished XLA compilation" in r.message]
    assert (np.asarray(engine.cache.lengths) == 0).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"slots": 0},
        {"max_new_tokens": 0},
        {"max_new_tokens": 512, "context": 512},
        {"patches": 15},
    ],
)
def test_settings_that_cannot_work_are_one_data_error(wrong):
    settings = SamplingConfig(**{"max_new_tokens": 4, "context": 64, "slots": 1, "patches": 16} | wrong)
    with pytest.raises(DataError, match=r"^sampling: "):
        Engine(small.model(), settings, 2, "float32", jax.random.key(0))
