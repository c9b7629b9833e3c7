"""Scripted policies against a disc segmenter: every ending, every refusal, every counter."""

import dataclasses

import numpy as np
import pytest
from agent_fakes import LIMITS, DiscSegmenter, disc, picture, run

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
from rsagent_jax.agent.tools import REFUSALS, Finish, ResetView, Rotate, Segment, Zoom, render_call
from rsagent_jax.config.schema import AgentConfig
from rsagent_jax.types import DataError, Status
from sam_bridge.types import FailureKind, SegmentReply

BAD = "I think it is on the left."


def click(x, y, label=1, **more):
    return render_call(Segment(points=((x, y),), labels=(label,), **more))


def box(*corners):
    return render_call(Segment(box=corners))


def finish(mask_id):
    return render_call(Finish(mask_id))


def test_two_turns_and_finished():
    segmenter = DiscSegmenter(radius=10)
    state = run([click(40, 50), finish(1)], segmenter)
    assert state.status is Status.FINISHED and len(state.turns) == 2
    first, last = state.turns
    assert first.mask_id == 1 and first.error is None and last.observation is None
    # 317 of 12544 pixels is 2.5 %, printed as 3 %
    assert disc(112, 112, 40, 50, 10).sum() == 317
    assert first.observation.text == "Mask 1: score 0.88, area 3%."
    assert first.observation.image.shape == (384, 384, 3)
    mask, mask_id = final_mask(state)
    np.testing.assert_array_equal(mask, disc(112, 112, 40, 50, 10))
    assert mask_id == 1 and state.tool_seconds > 0
    assert segmenter.requests[0].points == ((40.0, 50.0),)


def test_opening_shows_question_and_view():
    state = reset(picture(100, 100), "the disc", AgentConfig(prompt="brief"), LIMITS)
    seen = opening_observation(state)
    assert seen.text == 'Segment "the disc" in this 112x112 image.' and seen.image.shape == (112, 112, 3)


def test_coordinates_reach_the_tool_in_original_pixels():
    segmenter = DiscSegmenter()
    image = picture(224, 224)
    # crop 56..168 x 56..112 at its own size, then turned: view (10, 20) is crop (112 - 1 - 20, 10), original (147, 66)
    run([render_call(Zoom((56, 56, 168, 112))), render_call(Rotate(1)), click(10, 20)], segmenter, image)
    np.testing.assert_allclose(segmenter.requests[0].points, [(147, 66)], atol=1e-9)
    # the same place seen whole: boxes in any order of corners
    run([box(168, 112, 56, 56)], segmenter, image)
    assert segmenter.requests[1].box == (56, 56, 168, 112)


def test_points_stay_on_the_image_in_an_enlarged_view():
    segmenter = DiscSegmenter()
    run([click(0, 0), click(111, 111)], segmenter, picture(56, 56).repeat(1, 0)[:40, :40])
    (first,), (second,) = segmenter.requests[0].points, segmenter.requests[1].points
    assert first == (0, 0) and second == (39, 39)


def test_views_change_and_say_their_size():
    image = picture(224, 224)
    state = run([render_call(Zoom((0, 0, 112, 56))), render_call(Rotate(3)), render_call(ResetView())], image=image)
    texts = [turn.observation.text for turn in state.turns]
    assert texts == ["View 112x56.", "View 56x112.", "View 224x224."]
    np.testing.assert_array_equal(state.turns[0].observation.image, image[:56, :112])
    np.testing.assert_array_equal(state.turns[1].observation.image, np.rot90(image[:56, :112], 3))
    np.testing.assert_array_equal(state.turns[2].observation.image, image)


def test_max_turns_keeps_the_latest_mask():
    texts = [click(10 + 10 * i, 50) for i in range(9)]
    state = run(texts)
    assert state.status is Status.MAX_TURNS and len(state.turns) == 8
    assert final_mask(state)[1] == 8
    assert state.turns[-1].observation is None and state.turns[-2].observation is not None


class Scores(DiscSegmenter):
    """Answers with one score after the other."""

    def __init__(self, *scores):
        super().__init__()
        self.scores = iter(scores)

    def segment(self, image, request):
        return dataclasses.replace(super().segment(image, request), score=next(self.scores))


def test_the_last_turn_is_announced_with_the_best_mask_whatever_came_before_it():
    texts = [click(10, 50), click(40, 50), click(70, 50)]
    state = run(texts, Scores(0.5, 0.9, 0.7), max_turns=4)
    assert [turn.observation.text.partition(". ")[2] for turn in state.turns] == [
        "",
        "",
        "Last turn: finish, best mask 2.",
    ]
    assert state.last and [turn.last for turn in state.turns] == [False, False, False]
    assert run([*texts, finish(2)], max_turns=4).turns[-1].last
    for text in (BAD, render_call(Zoom((0, 0, 56, 56)))):
        state = run([text], max_turns=2)
        assert state.turns[0].observation.text.endswith(" Last turn.")  # no mask to name
    full = run([click(10, 50), click(40, 50)], Scores(0.5, 0.5), max_turns=3, prompt="full").turns[1].observation.text
    assert full.endswith("This is your last turn: call finish, with mask 2 if you have no better one.")
    only = reset(picture(100, 100), "the disc", AgentConfig(prompt="full", max_turns=1), LIMITS)
    assert opening_observation(only).text.endswith(" This is your last turn.") and only.last


def test_the_announcement_can_be_switched_off():
    state = run([click(10, 50)], max_turns=2, announce_last=False)
    assert state.turns[0].observation.text == "Mask 1: score 0.88, area 3%." and state.last


def test_finish_on_the_last_turn_is_finished():
    assert run([click(9, 9), finish(1)], max_turns=2).status is Status.FINISHED


def test_invalid_needs_a_row():
    state = run([BAD, BAD, click(5, 5), BAD, BAD, BAD, click(6, 6)])
    assert state.status is Status.INVALID and len(state.turns) == 6 and state.invalid == 3
    assert [turn.call is None for turn in state.turns] == [True, True, False, True, True, True]
    assert state.turns[0].error.reason == "no_call"
    assert (
        state.turns[0].observation.text == "Error: no <tool_call> found." and state.turns[0].observation.image is None
    )
    assert final_mask(state)[1] == 1


def test_a_refused_call_is_not_malformed():
    state = run([BAD, BAD, finish(7), BAD, BAD])
    assert state.status is None and state.invalid == 2


def test_repeated_needs_a_row_and_spares_the_tool():
    segmenter = DiscSegmenter()
    state = run([click(5, 5), click(5, 5), click(6, 5), click(5, 5), click(5, 5), click(5, 5)], segmenter)
    assert state.status is Status.REPEATED and len(state.turns) == 6
    assert [turn.repeated for turn in state.turns] == [False, True, False, False, True, True]
    assert len(segmenter.requests) == 5  # the third of a row only ends it
    assert final_mask(state)[1] == 5


def test_malformed_turns_break_a_row():
    state = run([click(5, 5), click(5, 5), BAD, click(5, 5), click(5, 5)])
    assert state.status is None and state.repeats == 2


def test_repeats_are_compared_in_original_pixels():
    """The same words in another view are another action; other words for the same place are the same action."""
    image = picture(224, 224)
    state = run([click(5, 5), render_call(Zoom((0, 0, 112, 112))), click(5, 5)], image=image)
    assert state.turns[2].repeated is False
    texts = [box(10, 10, 50, 50), box(50, 50, 10, 10), render_call(Segment(box=(10, 50, 50, 10)))]
    assert run(texts, image=image).status is Status.REPEATED
    # zooming again to the same words goes deeper, and turning again turns further
    assert (
        run([render_call(Zoom((0, 0, 112, 112)))] + [render_call(Zoom((20, 20, 80, 80)))] * 3, image=image).status
        is None
    )
    assert run([render_call(Rotate(1))] * 4, image=image).status is None
    assert run([render_call(ResetView())] * 3, image=image).status is Status.REPEATED
    assert run([finish(3)] * 3).status is Status.REPEATED


@pytest.mark.parametrize(
    "kind", [FailureKind.UNAVAILABLE, FailureKind.TIMEOUT, FailureKind.EXHAUSTED, FailureKind.INTERNAL,
             FailureKind.INVALID_IMAGE]
)  # fmt: skip
def test_a_broken_tool_ends_the_trajectory(kind):
    state = run([click(5, 5), click(9, 9)], DiscSegmenter(fail=[None, kind]))
    assert state.status is Status.ENV_FAILED and state.failure.kind is kind
    assert state.turns[-1].error is None and state.turns[-1].observation is None
    assert final_mask(state)[1] == 1


@pytest.mark.parametrize("kind", [FailureKind.INVALID_PROMPT, FailureKind.UNKNOWN_LOGITS])
def test_a_refused_prompt_goes_on(kind):
    state = run([click(5, 5), click(9, 9)], DiscSegmenter(fail=[kind]))
    assert state.status is None and state.failure is None and state.invalid == 0
    turn = state.turns[0]
    assert turn.error.reason == kind and turn.error.reason in REFUSALS
    assert turn.call is not None and turn.mask_id is None and turn.observation.image is None
    assert state.turns[1].mask_id == 1


@pytest.mark.parametrize(
    "reply",
    [SegmentReply(np.zeros((5, 5), bool), 0.5), SegmentReply(np.zeros((112, 112), np.uint8), 0.5),
     SegmentReply(np.zeros((112, 112), bool), float("nan"))],
)  # fmt: skip
def test_a_reply_that_cannot_be_is_a_broken_tool(reply):
    class Broken:
        def segment(self, image, request):
            return reply

    assert run([click(5, 5)], Broken()).failure.kind is FailureKind.INTERNAL


def test_other_exceptions_are_bugs_and_propagate():
    class Bug:
        def segment(self, image, request):
            raise KeyError("bug")

    with pytest.raises(KeyError):
        run([click(5, 5)], Bug())


def test_refusals_run_no_tool():
    segmenter = DiscSegmenter(logits=False)
    state = run(
        [finish(1), click(5, 5, refine=1), click(5, 5), click(9, 9, refine=1), box(8, 8, 8, 50), box(200, 0, 300, 50),
         render_call(Zoom((0, 0, 5, 5)))],
        segmenter,
    )  # fmt: skip
    reasons = [turn.error.reason if turn.error else None for turn in state.turns]
    assert reasons == ["unknown_mask", "unknown_mask", None, "no_logits", "empty_box", "empty_box", "zoom_too_small"]
    assert len(segmenter.requests) == 1 and state.status is None
    assert state.turns[0].observation.text == "Error: no mask 1; no masks yet."
    assert {r for r in reasons if r} <= set(REFUSALS)


def test_refine_starts_from_the_named_mask():
    segmenter = DiscSegmenter(radius=10)
    state = run([click(30, 30), click(80, 80), click(50, 30, refine=1), finish(3)], segmenter)
    assert segmenter.requests[2].refine_logits_id == state.masks[0].logits_id == "logits-1"
    expected = disc(112, 112, 30, 30, 10) | disc(112, 112, 50, 30, 10)
    np.testing.assert_array_equal(final_mask(state)[0], expected)


def test_clipped_coordinates_are_counted():
    segmenter = DiscSegmenter()
    state = run([box(-5, 10, 500, 60), click(112, -3), click(111, 0), render_call(Zoom((-1, 0, 60, 60)))], segmenter)
    assert [turn.clipped for turn in state.turns] == [2, 2, 0, 1]
    assert segmenter.requests[0].box == (0, 10, 112, 60) and segmenter.requests[1].points == ((111, 0),)
    assert state.turns[2].repeated  # clipped onto the same pixel: the same action


def test_final_mask_rules():
    assert final_mask(run([]))[1] is None and not final_mask(run([]))[0].any()
    absent = run([click(30, 30), finish(None)])
    assert absent.status is Status.FINISHED
    mask, mask_id = final_mask(absent)
    assert mask_id is None and not mask.any()
    assert final_mask(run([click(30, 30), click(80, 80), finish(1)]))[1] == 1


def test_abort_and_misuse():
    state = abort(run([click(30, 30)]), Status.MAX_CONTEXT)
    assert state.status is Status.MAX_CONTEXT and final_mask(state)[1] == 1
    for call in (lambda: abort(state, Status.MAX_TURNS), lambda: propose(state, BAD)):
        with pytest.raises(ValueError, match="has ended"):
            call()
    going = run([])
    with pytest.raises(ValueError, match="reply"):
        apply_reply(going, propose(going, click(1, 1)), None)
    with pytest.raises(ValueError, match="reply"):
        apply_reply(going, propose(going, BAD), SegmentFailure(FailureKind.TIMEOUT, ""))
    assert run_tool(DiscSegmenter(), going, propose(going, BAD)) is None


def test_states_are_not_changed_by_later_turns():
    before = run([click(30, 30)])
    kept = dataclasses.replace(before)
    proposal = propose(before, click(60, 60))
    after = apply_reply(before, proposal, run_tool(DiscSegmenter(), before, proposal))
    assert len(before.turns) == 1 and len(after.turns) == 2
    assert all(getattr(before, f.name) is getattr(kept, f.name) for f in dataclasses.fields(before))


@pytest.mark.parametrize("field", ["max_turns", "max_invalid", "max_repeats", "history_size"])
def test_reset_checks_its_input(field):
    with pytest.raises(DataError, match=field):
        reset(picture(56, 56), "q", AgentConfig(**{field: 0}), LIMITS)
    with pytest.raises(DataError, match="u8"):
        reset(np.zeros((5, 5)), "q", AgentConfig(), LIMITS)
    with pytest.raises(DataError, match="agent.prompt"):
        reset(picture(56, 56), "q", AgentConfig(prompt="?"), LIMITS)
