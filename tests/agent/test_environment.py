"""Scripted policies against a disc segmenter: every ending, every refusal, every counter."""

import dataclasses

import numpy as np
import pytest
from agent_fakes import LIMITS, DiscSegmenter, box, click, disc, make_image, run

from rsagent_jax.agent.environment import (
    SegmentFailure,
    abort,
    apply_reply,
    final_mask,
    opening_observation,
    propose,
    reset,
    run_tool,
)
from rsagent_jax.agent.tools import REFUSALS, Finish, ResetView, Rotate, Zoom, render_call
from rsagent_jax.config.schema import AgentConfig
from rsagent_jax.types import Status
from sam_bridge.types import FailureKind, SegmentReply
from tests.refusals import refused

BAD = "I think it is on the left."
GO, AGAIN, OTHER = click(5, 5), click(5, 5), click(6, 5)
IN, DEEPER = Zoom((0, 0, 112, 112)), Zoom((20, 20, 80, 80))


def test_two_turns_and_finished():
    segmenter = DiscSegmenter(radius=10)
    state = run([click(40, 50), Finish(1)], segmenter)
    assert state.status is Status.FINISHED and len(state.turns) == 2
    first, last = state.turns
    assert first.mask_id == 1 and first.error is None and last.observation is None
    # 317 of 12544 pixels is 2.5 %, printed as 3 %
    assert disc(112, 112, 40, 50, 10).sum() == 317
    assert first.observation.text == "Mask 1: score 0.88, area 3%."
    assert first.observation.image.shape == (384, 384, 3)
    np.testing.assert_array_equal(final_mask(state)[0], disc(112, 112, 40, 50, 10))
    assert final_mask(state)[1] == 1 and state.tool_seconds > 0
    assert segmenter.requests[0].points == ((40.0, 50.0),)


def test_opening_shows_question_and_view_whatever_came_after():
    state = reset(make_image(100, 100), "the disc", AgentConfig(prompt="brief"), LIMITS)
    for later in (state, run([Zoom((0, 0, 56, 56)), BAD], image=state.image, max_turns=3)):
        seen = opening_observation(later)
        assert seen.text == 'Segment "the disc" in this 112x112 image.' and seen.image.shape == (112, 112, 3)


def test_coordinates_reach_the_tool_in_original_pixels():
    segmenter, image = DiscSegmenter(), make_image(224, 224)
    # crop 56..168 x 56..112 at its own size, then turned: view (10, 20) is crop (112 - 1 - 20, 10), original (147, 66)
    run([Zoom((56, 56, 168, 112)), Rotate(1), click(10, 20)], segmenter, image)
    np.testing.assert_allclose(segmenter.requests[0].points, [(147, 66)], atol=1e-9)
    # the same place seen whole: boxes in any order of corners
    run([box(168, 112, 56, 56)], segmenter, image)
    assert segmenter.requests[1].box == (56, 56, 168, 112)


def test_points_stay_on_the_image_in_an_enlarged_view():
    segmenter = DiscSegmenter()
    run([click(0, 0), click(111, 111)], segmenter, make_image(56, 56)[:40, :40])
    assert [request.points for request in segmenter.requests] == [((0, 0),), ((39, 39),)]


def test_views_change_and_say_their_size():
    image = make_image(224, 224)
    seen = [t.observation for t in run([Zoom((0, 0, 112, 56)), Rotate(3), ResetView()], image=image).turns]
    assert [o.text for o in seen] == ["View 112x56.", "View 56x112.", "View 224x224."]
    for o, pixels in zip(seen, (image[:56, :112], np.rot90(image[:56, :112], 3), image), strict=True):
        np.testing.assert_array_equal(o.image, pixels)


class Scores(DiscSegmenter):
    """Answers with one score after the other."""

    def __init__(self, *scores):
        super().__init__()
        self.scores = iter(scores)

    def segment(self, image, request):
        return dataclasses.replace(super().segment(image, request), score=next(self.scores))


def test_the_last_turn_is_announced_with_the_best_mask_whatever_came_before_it():
    calls = [click(10, 50), click(40, 50), click(70, 50)]
    state = run(calls, Scores(0.5, 0.9, 0.7), max_turns=4)
    ends = [turn.observation.text.partition(". ")[2] for turn in state.turns]
    assert ends == ["", "", "Last turn: finish, best mask 2."]
    assert state.last and [turn.last for turn in state.turns] == [False, False, False]
    assert run([*calls, Finish(2)], max_turns=4).turns[-1].last
    for turn in (BAD, Zoom((0, 0, 56, 56))):
        assert run([turn], max_turns=2).turns[0].observation.text.endswith(" Last turn.")  # no mask to name
    full = run(calls[:2], Scores(0.5, 0.5), max_turns=3, prompt="full").turns[1].observation.text
    assert full.endswith("This is your last turn: call finish, with mask 2 if you have no better one.")
    only = run([], max_turns=1, prompt="full")
    assert opening_observation(only).text.endswith(" This is your last turn.") and only.last
    assert opening_observation(run([GO], max_turns=1, prompt="full")).text == opening_observation(only).text
    off = run([click(10, 50)], max_turns=2, announce_last=False)
    assert off.turns[0].observation.text == "Mask 1: score 0.88, area 3%." and off.last


@pytest.mark.parametrize(
    ("turns", "config", "status", "played", "mask_id"),
    [
        ([click(10 + 10 * i, 50) for i in range(9)], {}, Status.MAX_TURNS, 8, 8),  # the latest mask is kept
        ([GO, Finish(1)], {"max_turns": 2}, Status.FINISHED, 2, 1),
        ([GO, OTHER, Finish(1)], {}, Status.FINISHED, 3, 1),
        ([GO, Finish(None)], {}, Status.FINISHED, 2, None),
        ([], {}, None, 0, None),
        ([BAD, BAD, GO, BAD, BAD, BAD, OTHER], {}, Status.INVALID, 6, 1),
        ([BAD, BAD, Finish(7), BAD, BAD], {}, None, 5, None),  # a refused call is not malformed
        ([GO, AGAIN, OTHER, GO, AGAIN, GO], {}, Status.REPEATED, 6, 5),
        ([GO, AGAIN, BAD, GO, AGAIN], {}, None, 5, 4),  # malformed turns break a row
        # repeats are compared in original pixels: other words for the same place are the same action
        ([box(10, 10, 50, 50), box(50, 50, 10, 10), box(10, 50, 50, 10)], {}, Status.REPEATED, 3, 2),
        # zooming again to the same words goes deeper, and turning again turns further
        ([IN, DEEPER, DEEPER, DEEPER], {}, None, 4, None),
        ([Rotate(1)] * 4, {}, None, 4, None),
        ([ResetView()] * 3, {}, Status.REPEATED, 3, None),
        ([Finish(3)] * 3, {}, Status.REPEATED, 3, None),
    ],
)
def test_endings_and_the_final_mask(turns, config, status, played, mask_id):
    state = run(turns, image=make_image(224, 224), **config)
    assert (state.status, len(state.turns)) == (status, played)
    assert (state.turns[-1].observation is None) == (status is not None) if turns else True
    assert all(turn.observation is not None for turn in state.turns[:-1])
    mask, chosen = final_mask(state)
    assert chosen == mask_id and mask.any() == (mask_id is not None)


def test_malformed_and_repeated_turns_are_counted_and_a_repeat_spares_the_tool():
    state = run([BAD, BAD, GO, BAD, BAD, BAD])
    assert state.invalid == 3 and [t.call is None for t in state.turns] == [True, True, False, True, True, True]
    assert state.turns[0].error.reason == "no_call" and state.turns[0].observation.image is None
    assert state.turns[0].observation.text == "Error: no <tool_call> found."
    assert run([BAD, BAD, Finish(7), BAD, BAD]).invalid == 2 and run([GO, AGAIN, BAD, GO, AGAIN]).repeats == 2
    segmenter = DiscSegmenter()
    state = run([GO, AGAIN, OTHER, GO, AGAIN, GO], segmenter)
    assert [turn.repeated for turn in state.turns] == [False, True, False, False, True, True]
    assert len(segmenter.requests) == 5  # the third of a row only ends it
    assert not run([GO, IN, GO], image=make_image(224, 224)).turns[2].repeated  # the same words in another view


BROKEN = "unavailable timeout exhausted internal invalid_image".split()


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_tool_ends_the_trajectory(kind):
    state = run([GO, click(9, 9)], DiscSegmenter(fail=[None, FailureKind(kind)]))
    assert state.status is Status.ENV_FAILED and state.failure.kind == kind
    assert state.turns[-1].error is None and state.turns[-1].observation is None
    assert final_mask(state)[1] == 1


@pytest.mark.parametrize("kind", sorted(set(FailureKind) - set(BROKEN)))
def test_a_refused_prompt_goes_on(kind):
    state = run([GO, click(9, 9)], DiscSegmenter(fail=[kind]))
    assert state.status is None and state.failure is None and state.invalid == 0
    turn = state.turns[0]
    assert turn.error.reason == kind and turn.error.reason in REFUSALS
    assert turn.call is not None and turn.mask_id is None and turn.observation.image is None
    assert state.turns[1].mask_id == 1


class Answers:
    """A segmenter that returns what it was given, or raises it."""

    def __init__(self, answer):
        self.answer = answer

    def segment(self, image, request):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("mask", "score"), [(np.zeros((5, 5), bool), 0.5), (np.zeros((112, 112), np.uint8), 0.5),
                        (np.zeros((112, 112), bool), float("nan"))],
)  # fmt: skip
def test_a_reply_that_cannot_be_and_any_other_exception_are_a_broken_tool(mask, score):
    assert run([GO], Answers(SegmentReply(mask, score))).failure.kind is FailureKind.INTERNAL
    broken = run([GO], Answers(KeyError("bug"))).failure
    assert (broken.kind, broken.detail) == (FailureKind.INTERNAL, "KeyError: 'bug'")


def test_refusals_run_no_tool():
    segmenter = DiscSegmenter(logits=False)
    state = run(
        [Finish(1), click(5, 5, refine=1), GO, click(9, 9, refine=1), box(8, 8, 8, 50), box(200, 0, 300, 50),
         Zoom((0, 0, 5, 5))],
        segmenter,
    )  # fmt: skip
    reasons = [turn.error.reason if turn.error else None for turn in state.turns]
    assert reasons == ["unknown_mask", "unknown_mask", None, "no_logits", "empty_box", "empty_box", "zoom_too_small"]
    assert len(segmenter.requests) == 1 and state.status is None
    assert state.turns[0].observation.text == "Error: no mask 1; no masks yet."
    assert {r for r in reasons if r} <= set(REFUSALS)


def test_refine_starts_from_the_named_mask():
    segmenter = DiscSegmenter(radius=10)
    state = run([click(30, 30), click(80, 80), click(50, 30, refine=1), Finish(3)], segmenter)
    assert segmenter.requests[2].refine_logits_id == state.masks[0].logits_id == "logits-1"
    expected = disc(112, 112, 30, 30, 10) | disc(112, 112, 50, 30, 10)
    np.testing.assert_array_equal(final_mask(state)[0], expected)


def test_clipped_coordinates_are_counted():
    segmenter = DiscSegmenter()
    state = run([box(-5, 10, 500, 60), click(112, -3), click(111, 0), Zoom((-1, 0, 60, 60))], segmenter)
    assert [turn.clipped for turn in state.turns] == [2, 2, 0, 1]
    assert segmenter.requests[0].box == (0, 10, 112, 60) and segmenter.requests[1].points == ((111, 0),)
    assert state.turns[2].repeated  # clipped onto the same pixel: the same action


def test_abort_and_misuse():
    state = abort(run([GO]), Status.MAX_CONTEXT)
    assert state.status is Status.MAX_CONTEXT and final_mask(state)[1] == 1
    for call in (lambda: abort(state, Status.MAX_TURNS), lambda: propose(state, BAD)):
        with pytest.raises(ValueError, match="has ended"):
            call()
    going = run([])
    for text, reply in ((render_call(GO), None), (BAD, SegmentFailure(FailureKind.TIMEOUT, ""))):
        with pytest.raises(ValueError, match="reply"):
            apply_reply(going, propose(going, text), reply)
    assert run_tool(DiscSegmenter(), going, propose(going, BAD)) is None


def test_reset_checks_its_input():
    refused("u8", reset, np.zeros((5, 5)), "q", AgentConfig(), LIMITS)
