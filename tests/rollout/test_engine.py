"""The engine on a small random model: its log-probs are the trainer's, whatever the slot, neighbours or cache."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from rsagent_jax.config.schema import SamplingConfig
from rsagent_jax.data.packing import pack
from rsagent_jax.models.qwen25_vl import convert
from rsagent_jax.rollout.engine import Engine
from rsagent_jax.rollout.policy import Request
from rsagent_jax.train.step import batch_logprobs
from rsagent_jax.types import Status
from tests.refusals import refused
from tests.rollout import small
from tests.rollout.small import THREE_IMAGES, Task, click, engine_trajectories, finish, task, zoom

pytestmark = pytest.mark.slow

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
    logprobs = np.asarray(trainer(temperature)(params, batch))
    return [logprobs[small.places_of(batch, t)] for t in trajectories]


def assert_same(a, b):
    """To the last bit."""
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.logprobs, b.logprobs)


def turn_starts(trajectory):
    marks = np.concatenate([[0], trajectory.loss_mask.astype(int), [0]])
    return np.flatnonzero(np.diff(marks) == 1), np.flatnonzero(np.diff(marks) == -1)


def one_turn(engine, request):
    """The request's turn on an engine without anything else to do."""
    engine.begin()
    engine.submit(request)
    while not (ended := engine.step()):
        pass
    ((slot, completion),) = ended
    assert slot == request.slot
    return completion


def test_trainer_and_engine_agree_on_the_log_prob_of_every_sampled_token(trajectories):
    eos = small.processor().terminator_id
    assert [len(t.turns) for t in trajectories] == [4, 4, 2] and [len(t.grids) for t in trajectories] == [4, 3, 2]
    ended = [t.tokens[end - 1] == eos for t in trajectories for end in turn_starts(t)[1]]
    assert any(ended) and not all(ended)  # finished turns, and turns that the budget cut
    # the policy may even say the image token: to both it is a word then, and no image
    assert any((t.tokens[t.loss_mask] == small.processor().image_id).any() for t in trajectories)
    for t, theirs in zip(trajectories, trainer_logprobs(trajectories, small.eager_params()), strict=True):
        assert t.loss_mask.sum() >= 2 * len(t.turns) and (t.logprobs[t.loss_mask] < 0).all()
        np.testing.assert_allclose(theirs[t.loss_mask], t.logprobs[t.loss_mask], rtol=0, atol=1e-4)


def test_log_probs_are_those_of_the_distribution_at_the_sampling_temperature():
    t = engine_trajectories(TASKS[:1], SCRIPTS, temperature=0.5)[0]
    params = small.split(small.model())[1]
    cold, warm = trainer_logprobs([t], params, 0.5)[0], trainer_logprobs([t], params, 1.0)[0]
    np.testing.assert_allclose(cold[t.loss_mask], t.logprobs[t.loss_mask], rtol=0, atol=1e-4)
    assert np.abs(warm[t.loss_mask] - t.logprobs[t.loss_mask]).max() > 0.1


def test_slow_tools_and_other_neighbours_do_not_change_a_bit(engine, trajectories):
    """The tool of one trajectory is slow, and others come and go beside it: other slots, lanes idle, images differ."""
    more = [task(10 + i, h=56 + 28 * (i % 3), w=84) for i in range(6)]
    scripts = SCRIPTS | {t.sample.id: (click(20 + t.uid, 30), zoom(5, 5, 50, 50), finish(1)) for t in more}
    tasks = [more[0], TASKS[0], *more[1:4], TASKS[1], more[4], TASKS[2], more[5]]
    slow = small.SlowSegmenter(0.2, slow_shape=TASKS[1].sample.image.shape[:2])
    played = engine_trajectories(tasks, scripts, eng=engine, segmenter=slow)
    for a, b in zip([played[1], played[5], played[7]], trajectories, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize(
    "other", [{"slots": 8, "encode": 2}, {"slots": 4, "lanes": 2, "chunk": 3}, {"slots": 2, "prefill": 48}]
)
def test_other_numbers_of_slots_lanes_and_steps_give_the_same_ids(other, trajectories):
    engine = small.engine(**other)
    engine.load(small.eager_params(), engine.key)
    for a, b in zip(engine_trajectories(TASKS, SCRIPTS, eng=engine), trajectories, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        # Other shapes, other orders of sums: two fp32 roundings of one number near 6, each off by 1e-5 at most.
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kv_dtype", ["", "int8"])
def test_a_neighbour_that_needs_more_of_the_cache_changes_no_bit(kv_dtype, monkeypatch):
    engine = small.engine(kv_dtype=kv_dtype)
    want, needed = engine_trajectories(TASKS[:2], SCRIPTS, eng=engine), engine._blocks
    assert len(engine.programs.buckets) == 3
    for bucket in engine.programs.buckets[1:]:
        monkeypatch.setattr(engine, "_blocks", lambda places, most=bucket: max(most, needed(places)))
        for a, b in zip(engine_trajectories(TASKS[:2], SCRIPTS, eng=engine), want, strict=True):
            assert_same(a, b)


def test_the_members_of_a_group_read_its_opening_once_and_are_bit_for_bit_what_each_would_be_alone():
    engine = small.engine(slots=4, lanes=1)
    group = [Task(TASKS[0].sample, 0, uid) for uid in range(4)]
    together = engine_trajectories(group, SCRIPTS, eng=engine)
    opening = int(np.flatnonzero(together[0].loss_mask)[0])
    assert engine.stats["copied_tokens"] == 3 * (opening - 1)
    encoded = engine.stats["patches"]
    for mine, t in zip(group, together, strict=True):
        (alone,) = engine_trajectories([mine], SCRIPTS, eng=engine)
        assert_same(alone, t)
        assert engine.stats["copied_tokens"] == 0
        encoded -= engine.stats["patches"]
    assert encoded == -3 * int(np.prod(together[0].grids[0]))  # three openings' images more


def test_a_cache_of_int8_takes_a_third_of_the_bytes_and_changes_log_probs_little(trajectories):
    engine = small.engine(kv_dtype="int8")
    engine.load(small.eager_params(), engine.key)
    whole = small.engine()
    assert engine.cache_bytes < 0.35 * whole.cache_bytes  # of fp32: a quarter, and a scale per 16 numbers here
    first = [t.loss_mask.argmax() for t in trajectories]
    got = engine_trajectories(TASKS, SCRIPTS, eng=engine)
    for a, b, i in zip(got, trajectories, first, strict=True):
        assert 0 < abs(a.logprobs[i] - b.logprobs[i]) < 0.05


@pytest.mark.parametrize("tied", [False, True])
def test_an_engine_of_int8_weights_draws_from_the_policy_that_these_are_by_hand(tied):
    """The trainer with kernels and head rounded in numpy; embeddings that are the head, too, are looked up as ever."""
    model, terminator = small.model(), small.processor().terminator_id
    if tied:
        model.decoder.lm_head = None
    sampling = dataclasses.replace(small.SAMPLING, weights_dtype="int8")
    played = engine_trajectories(TASKS, SCRIPTS, eng=Engine(model, sampling, terminator, "float32", jax.random.key(0)))
    values = small.flat(nnx.state(model, nnx.Param))
    values["decoder.lm_head"] = head = values["decoder.embed" if tied else "decoder.lm_head"]

    def by_hand(name: str, x: np.ndarray) -> np.ndarray:
        if x is not head and not (name.startswith("decoder.layers") and name.endswith("kernel")):
            return x
        scale = np.abs(x).max(-1 if x is head else -2, keepdims=True) / 127
        return np.round(x / scale) * scale

    for rounded, near in ((True, 1e-4), (False, 0.2)):
        flat = {name: by_hand(name, x) if rounded and (name != "decoder.embed") else x for name, x in values.items()}
        params = small.split(convert.with_params(small.model(), flat))[1]
        pairs = zip(played, trainer_logprobs(played, params), strict=True)
        off = np.concatenate([np.abs(theirs - t.logprobs)[t.loss_mask] for t, theirs in pairs])
        assert off.max() < near and (rounded or off.max() > 1e-3)


def test_a_stop_id_ends_the_turn_and_stays_in_the_context(trajectories):
    stop = int(trajectories[0].tokens[turn_starts(trajectories[0])[0][0] + 1])  # the second token of the first turn
    engine = small.engine(stop_ids=(stop,))
    engine.load(small.eager_params(), engine.key)
    (t,) = engine_trajectories(TASKS[:1], SCRIPTS, eng=engine)
    starts, ends = turn_starts(t)
    assert ends[0] == starts[0] + 2 and t.tokens[ends[0] - 1] == stop
    assert t.tokens[ends[0]] == small.processor().terminator_id and not t.loss_mask[ends[0]]  # closed by a forced one
    theirs = trainer_logprobs([t], small.eager_params())[0]
    np.testing.assert_allclose(theirs[t.loss_mask], t.logprobs[t.loss_mask], rtol=0, atol=1e-4)


def test_randomness_follows_the_uid_and_the_key_and_nothing_else(engine, trajectories):
    twins = engine_trajectories([task(0, uid=7), task(0, uid=8), task(0, uid=7)], SCRIPTS, eng=engine)
    np.testing.assert_array_equal(twins[0].tokens, twins[2].tokens)
    assert not np.array_equal(twins[0].tokens, twins[1].tokens)
    assert not np.array_equal(twins[0].tokens, trajectories[0].tokens)  # uid 0
    params, key = small.eager_params(), engine.key
    engine.load(params, jax.random.key(99))
    other = engine_trajectories(TASKS, SCRIPTS, eng=engine)
    assert not np.array_equal(other[0].tokens, trajectories[0].tokens)
    engine.load(params, key)
    np.testing.assert_array_equal(engine_trajectories(TASKS, SCRIPTS, eng=engine)[0].tokens, trajectories[0].tokens)


def test_a_turn_is_drawn_with_its_own_randomness(engine):
    """Two turns of one trajectory must not repeat the same draws."""
    prompt, end = small.processor().prompt("abc", [])
    turns = [one_turn(engine, Request(0, prompt, end, None, task(0), turn)).tokens for turn in range(2)]
    assert not np.array_equal(*turns)


def test_greedy_does_not_depend_on_the_uid_or_the_key():
    greedy = small.engine(temperature=0.0)
    a = engine_trajectories([task(0, uid=3)], SCRIPTS, eng=greedy)[0]
    greedy.load(small.split(small.model())[1], jax.random.key(5))
    b = engine_trajectories([task(0, uid=4)], SCRIPTS, eng=greedy)[0]
    np.testing.assert_array_equal(a.tokens, b.tokens)


def test_after_the_warm_up_ragged_work_compiles_nothing(caplog):
    engine = small.engine(slots=4, lanes=2)
    assert (engine.rungs, engine.programs.buckets) == ([16, 32, 128], [1, 2, 3])
    engine.warm_up()
    compiled = [p._cache_size() for p in (engine.programs.encode, engine.programs.copy, engine.programs.step)]
    assert sum(compiled) == engine.programs_at_most == 13
    tasks = [task(i, uid=i, h=84 + 14 * (i % 3), w=100 + 9 * i) for i in range(7)]
    tasks = [tasks[4], Task(tasks[4].sample, 4, 9), *tasks[:4], *tasks[5:]]  # two of a group
    turns = [(click(30, 40 + i), "nonsense", zoom(5, 5, 60 + i, 70))[: i % 4] for i in range(7)]
    scripts = {f"s{i}": (*turns[i], finish(None)) for i in range(7)}
    with jax.log_compiles(), caplog.at_level("WARNING"):
        engine_trajectories(tasks, scripts, eng=engine)
    assert not [r.message for r in caplog.records if "Finished XLA compilation" in r.message]
    assert engine.stats["copied_tokens"] > 0


def test_bad_input_is_an_ending_of_its_own_trajectory_and_no_other_changes_a_bit():
    """Three slots: those whose trajectory ends early, in the midst of a prompt, a turn or a tool call, serve others."""
    engine = small.engine(patches=48)
    fine = [task(i, h=84, w=84) for i in (0, 7, 2)]
    scripts = SCRIPTS | {f"s{i}": (click(30, 40), zoom(10, 10, 60, 90), finish(1)) for i in range(3, 10)}
    want = engine_trajectories(fine, scripts, eng=engine)

    sizes = {3: (84, 112), 4: (112, 84), 5: (56, 84), 6: (84, 140)}  # 84 x 140: 60 patches, 64 places
    hangs, raises, garbage, large = (task(i, h=h, w=w) for i, (h, w) in sizes.items())
    long = Task(dataclasses.replace(task(8, h=84, w=84).sample, query="disc " * 400), 8, 8)
    dropped = task(9, h=84, w=84)
    tasks = [hangs, fine[0], raises, dropped, garbage, fine[1], large, long, fine[2]]
    broken = small.BrokenSegmenter({(84, 112): "hangs", (112, 84): "raises", (56, 84): "nothing"})
    stop = lambda task, state: driver.cancel(dropped) if task is dropped else None  # noqa: E731
    agent, script = dataclasses.replace(small.AGENT, tool_deadline_s=3.0), small.scripted(scripts)
    driver = small.EchoDriver(engine, broken, small.processor(), agent, on_turn=stop, script=script)
    got = [t for t, _ in driver.run(tasks)]
    broken.woken.set()
    away, done, full = Status.ENV_FAILED, Status.FINISHED, Status.MAX_CONTEXT
    assert [t.status for t in got] == [away, done, away, Status.CANCELLED, away, done, full, full, done]
    assert engine.used == {} and engine.queue == [] and engine.lanes == [None] * engine.sampling.lanes

    play = driver.play([dropped, *fine])  # an iteration that is given up after its first trajectory
    next(play)
    play.close()
    assert engine.used == {} and engine.queue == [] and engine.lanes == [None] * engine.sampling.lanes
    again = [t for t, _ in driver.run(fine)]
    for a, b, c in zip([got[1], got[5], got[8]], again, want, strict=True):
        assert_same(a, c)
        assert_same(b, c)


@pytest.mark.parametrize("wrong", [{"patches": 15}, {"patches": 40}, {"lanes": 2}])
def test_settings_that_cannot_work_are_one_data_error(wrong):
    settings = SamplingConfig(**{"max_new_tokens": 4, "context": 64, "slots": 1, "patches": 16} | wrong)
    refused(r"^sampling: ", Engine, small.model(), settings, 2, "float32", jax.random.key(0))
