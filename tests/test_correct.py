"""A user's segment call in a trajectory: where it goes, what the policy reads, what is refused."""

import itertools
import threading

import numpy as np
import pytest
from agent_fakes import DiscSegmenter, HangingSegmenter, make_image, same_states

from rsagent_jax.agent.correction import THOUGHT
from rsagent_jax.agent.replay import replay, state_to_json
from rsagent_jax.agent.tools import Segment, render_call
from rsagent_jax.api import Agent
from rsagent_jax.rollout.driver import Driver
from rsagent_jax.rollout.policy import TextPolicy
from rsagent_jax.types import Status
from tests.refusals import refused
from tests.rollout import small
from tests.rollout.small import click, finish, zoom

IMAGE = make_image(112, 112)  # shown as it is, so that the view's pixels are the picture's
ENDED = (click(30, 40), "no call", finish(1))
USERS = render_call(Segment(points=((60, 70),), labels=(0,), refine=1), THOUGHT)


def agent(*turns, segmenter=None, **options) -> Agent:
    """The turns in the order in which they are asked for, over all questions."""
    texts = iter(turns)
    policy = TextPolicy(lambda task, state: next(texts), small.processor(), slots=1)
    return Agent(policy, segmenter or DiscSegmenter(), small.processor(), small.AGENT, **options)


def test_the_context_is_that_of_a_policy_which_would_have_said_the_same():
    with agent(*ENDED, finish(2)) as made:
        first = made.segment(IMAGE, "it")
        stream = made.correct(first, points=[(60, 70)], labels=[0], refine=1)
        assert next(stream).text == USERS and len(stream.state.masks) == 2
        result = stream.result()
    with agent(click(30, 40), USERS, finish(2)) as made:
        unbroken = made.segment(IMAGE, "it")
    assert [t.text for t in result.state.turns] == [t.text for t in unbroken.state.turns]  # "no call" is gone, too
    got, wanted = result.trajectory, unbroken.trajectory
    for name in ("tokens", "positions", "patches", "final_mask"):
        np.testing.assert_array_equal(getattr(got, name), getattr(wanted, name))
    assert got.grids == wanted.grids and got.status is Status.FINISHED and got.final_mask_id == 2
    last = np.flatnonzero(wanted.loss_mask)[-len(small.processor().encode(finish(2))) - 1 :]
    np.testing.assert_array_equal(np.flatnonzero(got.loss_mask), last)
    assert not result.mask[70, 60] and result.mask[40, 30]
    same_states(replay(state_to_json(result.state), IMAGE), result.state)


def test_behind_an_empty_turn_the_images_stay_with_their_prompts(monkeypatch):
    """`_context` hands the policy each prompt with the patches of its own image."""
    asked, context = [], Driver._context
    monkeypatch.setattr(Driver, "_context", lambda self, run: asked.append(context(self, run)) or asked[-1])
    with agent("", click(30, 40), finish(1), finish(2)) as made:
        first = made.segment(IMAGE, "it")
        made.correct(first, points=[(60, 70)], labels=[0], refine=1).result()
    assert [len(turn.text) > 0 for turn in first.state.turns] == [False, True, True]
    token = small.processor().image_id
    shown = [(int((part.tokens == token).sum()), len(part.patches) // 4) for part in asked[0]]
    assert all(tokens == merged for tokens, merged in shown) and sum(n > 0 for n, _ in shown) >= 2


@pytest.mark.parametrize("size", [(112, 112), (448, 336), (37, 61)])
def test_places_are_pixels_of_the_picture_whatever_the_view(size):
    h, w = size
    tool = DiscSegmenter()
    with agent(click(30, 40), zoom(0, 0, 30, 30), *[finish(1)] * 3, segmenter=tool) as made:
        stream = made.stream(make_image(h, w), "it")
        next(stream), next(stream)
        stream.close()  # in the middle, in a view of a corner
        state = stream.state
        state = made.correct(state, points=np.array([[w - 1, h - 1], [0, 0]])).result().state  # labels: all 1
        np.testing.assert_allclose(tool.requests[-1].points, [(w - 1, h - 1), (0, 0)], atol=h / 112)
        assert tool.requests[-1].labels == (1, 1)
        made.correct(state, box=(1, 2, w, h)).result()
        np.testing.assert_allclose(tool.requests[-1].box, (1, 2, w, h), atol=h / 112)


def test_a_view_is_left_before_the_users_call():
    view_last = (click(30, 40), zoom(0, 0, 60, 60), click(20, 20), finish(1), finish(3))
    with agent(*view_last) as made:
        state = made.correct(made.segment(IMAGE, "it"), points=[(100, 100)], max_turns=1).result().state
    assert [turn.call.name for turn in state.turns] == ["segment", "zoom", "segment", "reset_view", "segment", "finish"]
    assert state.masks[-1].mask[100, 100] and [turn.last for turn in state.turns] == [False] * 5 + [True]


def test_without_a_mask_it_begins_with_the_user_and_turns_may_follow():
    with agent("no call", "no call", "no call", *[click(x, 50) for x in range(10, 90, 10)]) as made:
        ended = made.segment(IMAGE, "it")
        assert ended.trajectory.status is Status.INVALID
        state = made.correct(ended, points=[(60, 70)]).result().state
    assert len(state.turns) == 1 + small.AGENT.max_turns and state.status is Status.MAX_TURNS
    assert THOUGHT in state.turns[0].text and not any(THOUGHT in turn.text for turn in state.turns[1:])


def test_it_can_be_cancelled_and_frees_its_slot_although_the_users_tool_hangs():
    tool = HangingSegmenter(1)
    with agent(click(30, 40), finish(1), click(50, 50), finish(1), segmenter=tool, workers=2) as made:
        stream = made.correct(made.segment(IMAGE, "it"), points=[(60, 70)])
        threading.Timer(0.1, stream.close).start()
        assert stream.result().trajectory.status is Status.CANCELLED and len(stream.result().state.turns) == 1
        assert made.segment(IMAGE, "it").mask[50, 50]
    tool.woken.set()


def test_what_is_no_call_is_refused_before_anything_is_played():
    with agent(*itertools.islice(itertools.cycle([click(30, 40), finish(1)]), 4)) as made:
        result = made.segment(IMAGE, "it")
        refused("needs a box, points or refine", made.correct, result)
        refused("a point lies outside of the picture, which is 112 x 112", made.correct, result, points=[(112, 0)])
        refused("a point lies outside", made.correct, result, points=[(np.nan, 0)])
        refused("must have an area inside the picture", made.correct, result, box=(5, 5, 5, 9))
        refused("one label per point", made.correct, result, points=[(1, 1)], labels=[1, 0])
        refused("a point must be 2 numbers", made.correct, result, points=[1, 2])
        refused("no mask 2; masks: 1 to 1", made.correct, result, points=[(1, 1)], refine=2)
        refused("the question: max_turns", made.correct, result, points=[(1, 1)], max_turns=0)
    with agent(click(30, 40), finish(1), segmenter=DiscSegmenter(logits=False)) as made:
        result = made.segment(IMAGE, "it")
        refused("this mask cannot be refined", made.correct, result, points=[(1, 1)], refine=1)
