"""A user's correction: a trajectory up to its latest mask, then a call of the user in place of a policy's."""

import dataclasses

import numpy as np

from rsagent_jax.agent.environment import EnvState, apply_reply, propose, refuse_view, reset
from rsagent_jax.agent.tools import ResetView, Segment, render_call
from rsagent_jax.types import DataError

THOUGHT = "The user corrects the mask."  # in place of a policy's


def correct(state: EnvState, call: Segment, max_turns: int) -> tuple[EnvState, str]:
    """The trajectory right after the turn that made its latest mask (before the first one where none did), open again,
    and the text of the user's turn. `max_turns` of the policy may follow. The segmenter is not asked again.

    call: in original pixels. Where the view is not the whole picture, a turn of the user goes back to it first.
    DataError for a place outside of the picture, a box without an area, or a mask that cannot be refined.
    """
    kept = kept_turns(state)
    config = dataclasses.replace(state.config, max_turns=kept + 1 + max_turns)
    again = reset(state.image, state.query, config, state.limits)
    for turn, reply in zip(state.turns[:kept], state.replies[:kept], strict=True):
        proposal = propose(again, turn.text)
        if turn.error is not None and turn.error.reason == "no_room":
            proposal = refuse_view(proposal)
        again = apply_reply(again, proposal, reply)
    whole = again.view.reset()
    if again.view != whole:
        again = dataclasses.replace(again, config=dataclasses.replace(config, max_turns=config.max_turns + 1))
        again = apply_reply(again, propose(again, render_call(ResetView(), THOUGHT)), None)
    call = _in_view(again, call)
    if (error := call.propose(whole, again.masks).error) is not None:
        raise DataError(f"the correction cannot be made: {error.detail}")
    return again, render_call(call, THOUGHT)


def kept_turns(state: EnvState) -> int:
    """How many turns of a trajectory a correction keeps: those up to its latest mask."""
    return max((i + 1 for i, turn in enumerate(state.turns) if turn.mask_id is not None), default=0)


def _in_view(state: EnvState, call: Segment) -> Segment:
    """Of a call in original pixels, to a tenth of the view's pixel: a click on a large picture that is shown small
    stays where it was."""
    h, w = state.image.shape[:2]
    points, box = np.reshape(call.points, (-1, 2)), call.box
    if not ((points >= 0) & (points <= (w - 1, h - 1))).all():  # NaN neither
        raise DataError(f"a point lies outside of the picture, which is {w} x {h} pixels: {points.tolist()}")
    if box is not None and not (0 <= box[0] < box[2] <= w and 0 <= box[1] < box[3] <= h):
        raise DataError(f"box [x1, y1, x2, y2] = {list(box)} must have an area inside the picture of {w} x {h} pixels")
    points = tuple(tuple(round(v, 1) for v in point) for point in state.view.to_view(points).tolist())
    return dataclasses.replace(call, points=points, box=box and tuple(round(v, 1) for v in state.view.box_to_view(box)))
