"""The agent from Python: answers, streams, batches, threads, cancelling, and what it refuses."""

import contextlib
import dataclasses
import gc
import io
import json
import sys
import threading
import types
import weakref

import numpy as np
import PIL.Image
import pytest
from agent_fakes import DiscSegmenter, HangingSegmenter, make_image, same_states

import rsagent_jax
from rsagent_jax import api
from rsagent_jax.agent.replay import replay
from rsagent_jax.api import Agent, _segmenter_config
from rsagent_jax.config.schema import PolicyConfig, SegmentConfig, SegmenterConfig
from rsagent_jax.masks import decode_rle
from rsagent_jax.rollout.driver import Driver
from rsagent_jax.rollout.policy import Task, TextPolicy
from rsagent_jax.types import Sample, Status
from sam_bridge import spawn
from sam_bridge.types import FailureKind
from tests.refusals import refused
from tests.rollout import small
from tests.rollout.small import click, finish, zoom

IMAGE = make_image(112, 112)
TURNS = (click(30, 40), zoom(20, 20, 90, 80), click(50, 40), finish(2))


def agent(segmenter=None, turns=TURNS, slots=3, **options) -> Agent:
    """Every question gets the same turns."""
    policy = TextPolicy(lambda task, state: turns[len(state.turns)], small.processor(), slots=slots)
    return Agent(policy, segmenter or DiscSegmenter(logits=False), small.processor(), small.AGENT, **options)


def same(a, b) -> None:
    """Asserts that two states are equal but for the seconds that their tools took."""
    same_states(*(dataclasses.replace(s, replies=tuple(map(untimed, s.replies))) for s in (a, b)))


def untimed(reply):
    return reply and dataclasses.replace(reply, timings_s={})


############################## One answer ##############################


def test_the_answer_is_that_of_the_driver(tmp_path):
    with agent() as made:
        result = made.segment(IMAGE, " the disc ")
        policy, sample = made._driver.policy, Sample("image", IMAGE, "the disc", np.zeros((112, 112), bool))
    driver = Driver(policy, DiscSegmenter(logits=False), small.processor(), small.AGENT)
    ((wanted, state),) = driver.run([Task(sample, 0, 0)])
    same(result.state, state)
    np.testing.assert_array_equal(result.trajectory.tokens, wanted.tokens)
    assert result.mask.dtype == bool and result.mask.any() and result.failure == ""
    np.testing.assert_array_equal(result.mask, wanted.masks[1].mask)
    np.testing.assert_array_equal(decode_rle(json.loads(json.dumps(result.rle))), result.mask)
    assert repr(result).startswith("<Result 'the disc': ended: finished after 4 turns; mask 2: score 0.88, area ")
    result.save(tmp_path / "new" / "folder")
    files = {path.name: path for path in (tmp_path / "new/folder").iterdir()}
    assert files.keys() == {"mask.png", "overlay.png", "image.png", "trajectory.json"}
    np.testing.assert_array_equal(np.asarray(PIL.Image.open(files["mask.png"])) == 255, result.mask)
    np.testing.assert_array_equal(PIL.Image.open(files["overlay.png"]), result.overlay)
    same_states(replay(files["trajectory.json"].read_text()), result.state)


def test_a_file_an_opened_picture_and_its_pixels_are_one_picture(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be shown a quarter turn clockwise
    path = tmp_path / "photo.png"
    PIL.Image.fromarray(np.rot90(make_image(60, 90))).save(path, exif=exif)
    with agent() as made:
        results = made.segment_many([(x, "it") for x in (path, str(path), PIL.Image.open(path), make_image(60, 90))])
        clear = np.dstack([np.zeros((60, 90, 3), np.uint8), np.zeros((60, 90), np.uint8)])
        (white,) = made.segment_many([(PIL.Image.fromarray(clear), "it")])
    for result in results:
        np.testing.assert_array_equal(result.state.image, make_image(60, 90))
        same(result.state, results[0].state)
    assert (white.state.image == 255).all()


def test_a_result_shows_itself_in_a_notebook_and_outside(monkeypatch):
    with agent() as made:
        result = made.segment(IMAGE, "it")
    png = PIL.Image.open(io.BytesIO(result._repr_png_()))
    assert png.width > 4 * png.height / 2  # five pictures beside each other
    shown = []
    monkeypatch.setattr(PIL.Image.Image, "show", lambda image, title: shown.append((image.size, title)))
    result.show()
    display = types.SimpleNamespace(display=shown.append)
    shell = types.SimpleNamespace(kernel=None)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell, display=display))
    result.show()
    assert shown == [(png.size, "it"), result]


def test_options_are_those_of_a_question():
    with agent(turns=[click(30, 40)] + [click(50, 40), click(60, 40)] * 4) as made:
        short, one, usual = (made.segment(IMAGE, "it", max_turns=n) for n in (2, 1, None))
    assert [len(r.state.turns) for r in (short, one, usual)] == [2, 1, small.AGENT.max_turns]
    assert [turn.last for turn in short.state.turns] == [False, True] and one.state.turns[0].last
    assert "Last turn" in short.state.turns[0].observation.text


############################## Streams, batches, threads ##############################


def test_a_stream_gives_the_turns_and_then_the_answer():
    with agent() as made:
        wanted, stream, masks = made.segment(IMAGE, "it"), made.stream(IMAGE, "it"), []
        for turn in stream:
            assert turn is stream.state.turns[-1]
            masks.append(len(stream.state.masks))
        assert masks == [1, 1, 2, 2] and list(stream) == []
        same(stream.result().state, wanted.state)


def test_a_batch_is_answered_as_one_by_one_and_in_its_order():
    questions = [(make_image(60 + 10 * i, 90, seed=i), f"disc {i}") for i in range(5)]
    with agent(slots=2) as made:
        results = made.segment_many(questions)
        assert made.segment_many([]) == []
        for result, question in zip(results, questions, strict=True):
            same(result.state, made.segment(*question).state)


def test_questions_of_several_threads_are_played_together():
    """Each tool call waits for the other two: one after the other none would be answered."""

    class Together(DiscSegmenter):
        def segment(self, image, request):
            barrier.wait(60)
            return super().segment(image, request)

    results, barrier = [], threading.Barrier(3)
    with agent(Together(), workers=3) as made:
        ask = lambda i: results.append(made.segment(IMAGE, f"it {i}"))  # noqa: E731
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(r.state.query for r in results) == ["it 0", "it 1", "it 2"]
    assert {r.trajectory.status for r in results} == {Status.FINISHED}


@pytest.mark.parametrize("how", ["closed", "dropped", "left"])
def test_a_stream_that_is_given_up_frees_its_slot_although_its_tool_hangs(how):
    tool = HangingSegmenter(0)
    with agent(tool, turns=(zoom(0, 0, 60, 60), *TURNS), slots=1, workers=2) as made:
        stream = made.stream(IMAGE, "it")
        next(stream)
        if how == "closed":
            threading.Timer(0.1, stream.close).start()  # by another thread, while this one waits
            result = stream.result()
            assert result.trajectory.status is Status.CANCELLED and len(result.state.turns) == 1
            assert not result.mask.any() and result.failure == ""
        elif how == "dropped":
            del stream
        else:
            with stream, contextlib.suppress(KeyboardInterrupt):
                raise KeyboardInterrupt
        assert made.segment(IMAGE, "it").trajectory.status is Status.FINISHED
    tool.woken.set()


def test_closing_the_agent_ends_what_is_under_way_and_what_waits():
    tool, closed = HangingSegmenter(0), []
    resources = contextlib.ExitStack()
    resources.callback(closed.append, True)
    made = agent(tool, slots=1, resources=resources)
    streams = [made.stream(IMAGE, f"it {i}") for i in range(3)]
    made.close()
    made.close()
    tool.woken.set()
    assert [stream.result().trajectory.status for stream in streams] == [Status.CANCELLED] * 3 and closed == [True]
    refused("the agent is closed", made.segment, IMAGE, "it")


def test_an_agent_that_is_dropped_is_freed():
    closed, resources = [], contextlib.ExitStack()
    resources.callback(closed.append, True)
    made = agent(resources=resources)
    made.segment(IMAGE, "it")
    policy = weakref.ref(made._driver.policy)
    del made
    gc.collect()
    assert closed == [True] and policy() is None


############################## What goes wrong ##############################


def test_a_broken_tool_is_no_answer_and_leaves_the_others_alone(tmp_path):
    broken = small.BrokenSegmenter({(84, 84): "raises"})
    with agent(broken) as made:
        one, other = made.segment_many([(make_image(84, 84), "it"), (IMAGE, "it")])
    assert other.mask.any() and one.trajectory.status is Status.ENV_FAILED
    assert one.failure == "segmenter, internal: RuntimeError: out of cheese" and one.failure in repr(one)
    for name in ("mask", "overlay", "rle"):
        refused("out of cheese; there is no mask", lambda name=name: getattr(one, name))
    other.save(tmp_path)
    refused("there is no mask", one.save, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image.png", "trajectory.json"]
    with agent(DiscSegmenter(fail=[FailureKind.UNAVAILABLE])) as made:
        assert "unavailable" in made.segment(IMAGE, "it").failure
        assert made.segment(IMAGE, "it").mask.any()


def test_what_the_policy_raises_is_raised_to_those_who_wait_and_the_agent_goes_on():
    def act(task, state):
        if task.sample.query == "bad":
            raise RuntimeError("out of memory")
        return TURNS[len(state.turns)]

    policy = TextPolicy(act, small.processor(), slots=1)
    with Agent(policy, DiscSegmenter(), small.processor(), small.AGENT) as made:
        bad, good = made.stream(IMAGE, "bad"), made.stream(IMAGE, "good")
        for _ in range(2):
            with pytest.raises(RuntimeError, match="out of memory"):
                bad.result()
        assert good.result().mask.any() and made.segment(IMAGE, "good").mask.any()


def test_a_policy_that_cannot_begin_is_told_to_every_question(monkeypatch):
    def begin():
        raise RuntimeError("out of memory")

    with agent() as made:
        assert made.segment(IMAGE, "it", seed=None).mask.any()
        monkeypatch.setattr(made._driver.policy, "begin", begin)
        for stream in [made.stream(IMAGE, "it") for _ in range(3)]:
            with pytest.raises(RuntimeError, match="out of memory"):
                stream.result()


@pytest.mark.parametrize(
    ("image", "query", "options", "says"),
    [
        ("none.png", "it", {}, "none.png is missing: name a picture file"),
        (__file__, "it", {}, "is not a readable picture"),
        (IMAGE.astype(np.float32) / 255, "it", {}, r"uint8\[height, width, 3\] .* got float32\[112, 112, 3\]"),
        (IMAGE[..., 0], "it", {}, r"got uint8\[112, 112\]"),
        (IMAGE.transpose(2, 0, 1), "it", {}, r"got uint8\[3, 112, 112\]"),
        (None, "it", {}, "got NoneType"),
        (IMAGE[:0], "it", {}, "is empty"),
        (np.zeros((2, 500, 3), np.uint8), "it", {}, "200 times the shorter"),
        (PIL.Image.new("F", (8, 8)), "it", {}, "floating-point"),
        (IMAGE, "  ", {}, "the query is empty"),
        (IMAGE, None, {}, "the query is a NoneType"),
        (IMAGE, "it", {"max_turns": 0}, "max_turns must be at least 1, got 0"),
        (IMAGE, "it", {"max_turns": 2.5}, "max_turns must be int"),
        (IMAGE, "it", {"temperature": float("nan")}, "temperature must be at least 0"),
        (IMAGE, "it", {"seed": -1, "temperature": "hot"}, "(?s)2 problems.*temperature must be float.*seed must be"),
    ],
)
def test_wrong_questions_are_refused_before_anything_is_played(image, query, options, says):
    with agent() as made:
        refused(says, made.segment, image, query, **options)
        refused(says, made.segment_many, [(IMAGE, "it"), (image, query)], **options)
        assert made._thread is None and made.segment(IMAGE, "it").mask.any()


############################## What is loaded ##############################


@pytest.mark.parametrize(
    ("given", "values"),
    [
        ("grabcut", ("inprocess", "grabcut", "", ())),
        ("my_tools.py:factory", ("inprocess", "my_tools.py:factory", "", ())),
        ("127.0.0.1:50051", ("connect", "grabcut", "", ("127.0.0.1:50051",))),
        ("a:1,b.c:2", ("connect", "grabcut", "", ("a:1", "b.c:2"))),
        ("facebook/sam2.1-hiera-large", ("spawn", "sam2", "facebook/sam2.1-hiera-large", ())),
        (SegmenterConfig(mode="spawn"), ("spawn", "grabcut", "", ())),
    ],
)
def test_a_segmenter_is_named_in_a_word(given, values):
    config = _segmenter_config(given)
    assert (config.mode, config.backend, config.checkpoint, config.addresses) == values


def config() -> SegmentConfig:
    agent = dataclasses.replace(small.AGENT, max_turns=2)
    return SegmentConfig(
        policy=PolicyConfig(weights=str(small.weights()), dtype="float32"),
        agent=agent,
        sampling=dataclasses.replace(small.SAMPLING, temperature=0.0, max_new_tokens=40),
    )


def test_what_cannot_be_loaded_is_one_error(tmp_path, monkeypatch):
    refused("does not exist; give a Hugging Face directory", Agent.load, tmp_path / "none")
    refused("got 50051", Agent.load, config=config(), segmenter=50051)
    refused("segmenter.checkpoint: grabcutt does not exist", Agent.load, config=config(), segmenter="grabcutt")
    missing = dataclasses.replace(config(), segmenter=SegmenterConfig(backend="sam2", checkpoint="none.pt"))
    refused("segmenter.checkpoint: none.pt does not exist", Agent.load, config=missing)  # the config's own
    refused("slots must be at least 0", Agent.load, config=config(), slots=-1)
    refused("configs/sgement.py does not exist; did you mean", Agent.load, config="configs/sgement.py")
    monkeypatch.setattr(api, "LARGE", 32)  # the small policy counts as large: its own pictures are not
    refused("agent.max_pixels 1003520 must lie within the weights", Agent.load, small.weights())


def test_a_loaded_policy_plays_batches_as_one_by_one_and_draws_by_temperature_and_seed(monkeypatch):
    side_cars, connect = [], spawn.SideCar.connect
    monkeypatch.setattr(spawn.SideCar, "connect", lambda car, **how: side_cars.append(car) or connect(car, **how))
    with rsagent_jax.Agent.load(config=config(), slots=2) as made:
        questions = [(make_image(112, 112, seed=i), f"disc {i}") for i in range(3)]
        batch = made.segment_many(questions)
        alone = [made.segment(*question) for question in questions]
        drawn, again, other = (made.segment(*questions[0], temperature=1.0, seed=s) for s in (3, 3, 4))
        engine = made._driver.policy
        assert engine.weights is not None and side_cars[0]._child.poll() is None
    assert engine.weights is None and engine.state is None and side_cars[0]._child.poll() is not None
    tokens = [result.trajectory.tokens for result in (*batch, *alone, drawn, again, other)]
    for one, two in (*zip(batch, alone, strict=True), (drawn, again)):
        np.testing.assert_array_equal(one.trajectory.tokens, two.trajectory.tokens)
        np.testing.assert_allclose(one.trajectory.logprobs, two.trajectory.logprobs, atol=1e-5)
    assert len({t.tobytes() for t in tokens}) == 5  # three greedy, two drawn
