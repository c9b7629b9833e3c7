"""The environment as a pure state machine: text in, observation out. No model, no segmenter, no files.

    state = reset(image, query, config, limits)
    while state.status is None:
        text = policy(...)                            # sees opening_observation(state), then each turn's observation
        proposal = propose(state, text)               # parse, check, convert to original pixels
        reply = run_tool(segmenter, state, proposal)  # the only slow, only impure line; the driver runs it on a thread
        state = resolve(state, proposal, reply)
    mask, mask_id = final_mask(state)

A malformed call (no action can be read) and a refused one (the action cannot be done) are both answered with an error
observation. Only malformed calls in a row end a trajectory as INVALID.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np

from rsagent_jax.agent import prompts
from rsagent_jax.agent.overlay import draw_overlay
from rsagent_jax.agent.tools import call_json, parse
from rsagent_jax.agent.views import PixelLimits, View, fit
from rsagent_jax.config.schema import AgentConfig
from rsagent_jax.types import (
    DataError,
    Finish,
    MaskRecord,
    Observation,
    ParseError,
    ResetView,
    Rotate,
    Segment,
    Status,
    ToolCall,
    Turn,
    Zoom,
)
from sam_bridge.types import FailureKind, Segmenter, SegmenterError, SegmentReply, SegmentRequest


@dataclasses.dataclass(frozen=True)
class SegmentFailure:
    """A SegmenterError as a value."""

    kind: FailureKind
    detail: str
    seconds: float = 0.0  # spent on the call

    @property
    def callers_fault(self) -> bool:
        return SegmenterError(self.kind, self.detail).callers_fault


@dataclasses.dataclass(frozen=True)
class Proposal:
    """What a turn asks for, before any tool has run."""

    text: str
    call: ToolCall | None  # None when malformed
    error: ParseError | None  # malformed or refused
    request: SegmentRequest | None = None  # in original pixels; None when no tool is needed
    view: View | None = None  # the view to go to
    clipped: int = 0  # coordinates that were outside the view
    action: Any = None  # equal for equal actions, whatever view they were said in; None when malformed


@dataclasses.dataclass(frozen=True, eq=False)
class EnvState:
    """A trajectory so far. `status` is None while it goes on."""

    image: np.ndarray  # u8[h, w, 3]
    query: str
    config: AgentConfig
    limits: PixelLimits  # of this picture's views
    view: View
    turns: tuple[Turn, ...] = ()
    masks: tuple[MaskRecord, ...] = ()
    replies: tuple[SegmentReply | SegmentFailure | None, ...] = ()  # one per turn, kept for replay
    action: Any = None  # of the last turn
    repeats: int = 0  # how many turns in a row did `action`
    invalid: int = 0  # malformed turns in a row
    status: Status | None = None
    failure: SegmentFailure | None = None  # why ENV_FAILED
    last: bool = False  # the turn to come is the last one
    tool_seconds: float = 0.0


def reset(image: np.ndarray, query: str, config: AgentConfig, limits: PixelLimits, last: bool = False) -> EnvState:
    """The state before the first turn; `image` is u8[h, w, 3]. `limits` are the processor's, after config overrides.

    The state's own limits are those for its picture (views.fit). DataError for one that cannot be shown.
    last: the first turn is the only one, for reasons outside of the environment; it knows `max_turns` itself.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise DataError(f"image must be u8[h, w, 3], got {image.dtype}{list(image.shape)}")
    for name in ("max_turns", "max_invalid", "max_repeats", "history_size"):
        if getattr(config, name) < 1:
            raise DataError(f"agent.{name} must be at least 1, got {getattr(config, name)}")
    prompts.system_prompt(config.prompt)  # raises on an unknown style
    limits = fit(*image.shape[:2], limits)
    view = View.whole(*image.shape[:2], limits)
    return EnvState(image, query, config, limits, view, last=last or config.max_turns == 1)


def opening_observation(state: EnvState) -> Observation:
    """What the policy sees before its first turn: the question and the whole image. Call it before any turn."""
    text = prompts.user_text(state.query, state.view.size_view, state.config.prompt)
    return _announce(state, Observation(text, state.view.render(state.image)))


def propose(state: EnvState, text: str) -> Proposal:
    """Reads one assistant turn (without its terminator) and converts it to original pixels."""
    _check_open(state)
    call = parse(text)
    if isinstance(call, ParseError):
        return Proposal(text, None, call)
    match call:
        case Segment():
            proposal = _propose_segment(state, text, call)
        case Zoom(box):
            _, clipped = state.view.clip_box(box)
            proposal = _propose_view(text, call, state.view.zoom(box), clipped)
        case Rotate(quarter_turns):
            proposal = _propose_view(text, call, state.view.rotate(quarter_turns), 0)
        case ResetView():
            proposal = _propose_view(text, call, View.whole(*state.image.shape[:2], state.limits), 0)
        case Finish(mask_id):
            error = None if mask_id is None else _unknown_mask(state, mask_id)
            proposal = Proposal(text, call, error, action=("finish", mask_id))
    if proposal.request is not None and _repeats(state, proposal) >= state.config.max_repeats:
        return dataclasses.replace(proposal, request=None)  # it ends here; the tool would only say the same again
    return proposal


def refuse_view(proposal: Proposal) -> Proposal:
    """The proposal when whoever plays has no room for the view that it asks for."""
    error = ParseError("no_room", "there is no room left for another view; go on in this one, or finish.")
    return dataclasses.replace(proposal, view=None, error=error, action=("refused", call_json(proposal.call)))


def run_tool(segmenter: Segmenter, state: EnvState, proposal: Proposal) -> SegmentReply | SegmentFailure | None:
    """Runs the proposal's request, if it has one. A SegmenterError becomes a value; other exceptions are bugs."""
    if proposal.request is None:
        return None
    start = time.perf_counter()
    try:
        reply = segmenter.segment(state.image, proposal.request)
    except SegmenterError as e:
        return SegmentFailure(e.kind, e.detail, time.perf_counter() - start)
    if reply.mask.dtype != bool or reply.mask.shape != state.image.shape[:2] or not np.isfinite(reply.score):
        detail = f"reply with mask {reply.mask.dtype}{list(reply.mask.shape)}, score {reply.score}"
        return SegmentFailure(FailureKind.INTERNAL, detail, time.perf_counter() - start)
    return dataclasses.replace(reply, timings_s={**reply.timings_s, "call": time.perf_counter() - start})


def apply_reply(
    state: EnvState, proposal: Proposal, reply: SegmentReply | SegmentFailure | None, last: bool = False
) -> EnvState:
    """The state after the turn. `turns[-1].observation` is what the policy sees next; None when `status` is set.

    last: the next turn is the last one for reasons outside of the environment, such as a context that is nearly full.
    """
    _check_open(state)
    if (proposal.request is None) != (reply is None):
        raise ValueError("resolve: a reply belongs to a proposal with a request, and only to one")
    error, failure, masks, mask_id = proposal.error, None, state.masks, None
    if isinstance(reply, SegmentFailure):
        if reply.callers_fault:  # the kind's words are in REFUSALS; its detail is for people, not for the policy
            error = ParseError(reply.kind.value, "the tool refused this prompt; try another.")
        else:
            failure = reply
    elif reply is not None:
        mask_id = len(masks) + 1
        masks = (*masks, MaskRecord(mask_id, reply.mask, reply.score, reply.logits_id))
    repeats = _repeats(state, proposal)
    after = dataclasses.replace(
        state,
        view=proposal.view or state.view,
        masks=masks,
        replies=(*state.replies, reply),
        action=proposal.action,
        repeats=repeats,
        invalid=state.invalid + 1 if proposal.call is None else 0,
        failure=failure,
        last=last or len(state.turns) + 2 >= state.config.max_turns,
        tool_seconds=state.tool_seconds + _seconds(reply),
    )
    status = _ending(after, proposal, error)
    observation = _announce(after, _observe(after, proposal, error)) if status is None else None
    turn = Turn(proposal.text, proposal.call, error, observation, mask_id, proposal.clipped, repeats > 1, state.last)
    return dataclasses.replace(after, turns=(*state.turns, turn), status=status)


def abort(state: EnvState, status: Status) -> EnvState:
    """Ended from outside, e.g. MAX_CONTEXT when the next observation or turn does not fit."""
    _check_open(state)
    return dataclasses.replace(state, status=status)


def final_mask(state: EnvState) -> tuple[np.ndarray, int | None]:
    """bool[h, w] and its id: the committed mask, else the latest one, else empty with id None."""
    call = state.turns[-1].call if state.turns else None
    if state.status is Status.FINISHED and isinstance(call, Finish):
        if call.mask_id is not None:
            return state.masks[call.mask_id - 1].mask, call.mask_id
    elif state.masks:
        return state.masks[-1].mask, state.masks[-1].id
    return np.zeros(state.image.shape[:2], bool), None


def _propose_segment(state: EnvState, text: str, call: Segment) -> Proposal:
    view, clipped, box, points = state.view, 0, None, ()
    if call.box is not None:
        box_view, clipped = view.clip_box(call.box)
        box = view.box_to_original(box_view)
        if box_view[0] >= box_view[2] or box_view[1] >= box_view[3]:
            error = ParseError("empty_box", "the box has no area inside the view.")
            return Proposal(text, call, error, clipped=clipped, action=("refused", call_json(call)))
    if call.points:
        points_view, outside = view.clip_points(np.array(call.points))
        clipped += outside
        # an enlarged view has places outside the centres of the outermost original pixels, by less than half a pixel
        points_original = np.clip(view.to_original(points_view), 0, np.array(view.size_original) - 1.0)
        points = tuple((x, y) for x, y in points_original.tolist())
    logits_id = ""
    if call.refine is not None:
        error = _unknown_mask(state, call.refine)
        if error is None and not state.masks[call.refine - 1].logits_id:
            error = ParseError("no_logits", "this mask cannot be refined; give a new box or points.")
        if error is not None:
            return Proposal(text, call, error, clipped=clipped, action=("refused", call_json(call)))
        logits_id = state.masks[call.refine - 1].logits_id
    request = SegmentRequest(box, points, call.labels, logits_id)
    # Rounded, so that one place said in two views compares equal whatever the last bits of the affine are.
    action = ("segment", box and tuple(_round(box)), tuple(map(_round, points)), call.labels, call.refine)
    return Proposal(text, call, None, request, clipped=clipped, action=action)


def _propose_view(text: str, call: ToolCall, view: View | ParseError, clipped: int) -> Proposal:
    if isinstance(view, ParseError):
        return Proposal(text, call, view, clipped=clipped, action=("refused", call_json(call)))
    return Proposal(text, call, None, view=view, clipped=clipped, action=("view", view))


def _round(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(round(v, 2) for v in values)


def _unknown_mask(state: EnvState, mask_id: int) -> ParseError | None:
    if mask_id <= len(state.masks):
        return None
    have = f"masks: 1 to {len(state.masks)}." if state.masks else "no masks yet."
    return ParseError("unknown_mask", f"no mask {mask_id}; {have}")


def _repeats(state: EnvState, proposal: Proposal) -> int:
    """How many turns in a row, this one included, do the same action; 0 for a malformed turn."""
    if proposal.action is None:
        return 0
    return state.repeats + 1 if proposal.action == state.action else 1


def _ending(after: EnvState, proposal: Proposal, error: ParseError | None) -> Status | None:
    config = after.config
    if after.failure is not None:
        return Status.ENV_FAILED
    if isinstance(proposal.call, Finish) and error is None:
        return Status.FINISHED
    if after.invalid >= config.max_invalid:
        return Status.INVALID
    if after.repeats >= config.max_repeats:
        return Status.REPEATED
    return Status.MAX_TURNS if len(after.replies) >= config.max_turns else None


def _observe(after: EnvState, proposal: Proposal, error: ParseError | None) -> Observation:
    style = after.config.prompt
    if error is not None:
        return Observation(prompts.error_text(error, style))
    if proposal.view is not None:
        return Observation(prompts.view_text(after.view.size_view, style), after.view.render(after.image))
    record, request = after.masks[-1], proposal.request
    text = prompts.segment_text(record.id, record.score, float(record.mask.mean()), after.view.size_view, style)
    picture = draw_overlay(
        after.image, record.mask, after.config.history_size, request.points, request.labels, request.box
    )
    return Observation(text, picture)


def _announce(state: EnvState, observation: Observation) -> Observation:
    if not (state.last and state.config.announce_last):
        return observation
    best = max(state.masks, key=lambda record: (record.score, record.id), default=None)
    text = prompts.last_turn_text(best and best.id, state.config.prompt)
    return dataclasses.replace(observation, text=f"{observation.text} {text}")


def _seconds(reply: SegmentReply | SegmentFailure | None) -> float:
    if isinstance(reply, SegmentFailure):
        return reply.seconds
    return 0.0 if reply is None else reply.timings_s.get("call", 0.0)


def _check_open(state: EnvState) -> None:
    if state.status is not None:
        raise ValueError(f"the trajectory has ended: {state.status}")
