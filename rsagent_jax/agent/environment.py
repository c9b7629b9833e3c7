"""The environment as a pure state machine: text in, observation out. No model, no segmenter, no files.

    state = reset(image, query, config, limits)
    while state.status is None:
        text = policy(...)                            # sees opening_observation(state), then each turn's observation
        proposal = propose(state, text)               # parse, check, convert to original pixels
        reply = run_tool(segmenter, state, proposal)  # the only slow, only impure line; the driver runs it on a thread
        state = apply_reply(state, proposal, reply)
    mask, mask_id = final_mask(state)

A malformed call (no action can be read) and a refused one (the action cannot be done) are both answered with an error
observation. Only malformed calls in a row end a trajectory as INVALID.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from rsagent_jax.agent import prompts
from rsagent_jax.agent.overlay import draw_overlay
from rsagent_jax.agent.tools import parse
from rsagent_jax.agent.tools.base import Proposal, refuse_call
from rsagent_jax.agent.views import PixelLimits, View, fit
from rsagent_jax.config.schema import AgentConfig
from rsagent_jax.types import DataError, MaskRecord, Observation, ParseError, Status, Turn
from sam_bridge.types import FailureKind, Segmenter, SegmenterError, SegmentReply


@dataclasses.dataclass(frozen=True)
class SegmentFailure:
    """A SegmenterError as a value."""

    kind: FailureKind
    detail: str
    seconds: float = 0.0  # spent on the call


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

    @property
    def tool_seconds(self) -> float:
        """Spent on calls of the tool."""
        made = [reply for reply in self.replies if reply is not None]
        return sum((r.seconds if isinstance(r, SegmentFailure) else r.timings_s.get("call", 0.0) for r in made), 0.0)


def reset(image: np.ndarray, query: str, config: AgentConfig, limits: PixelLimits, last: bool = False) -> EnvState:
    """The state before the first turn; `image` is u8[h, w, 3]. `limits` are the processor's, after config overrides.

    The state's own limits are those for its picture (views.fit). DataError for one that cannot be shown.
    last: the first turn is the only one, for reasons outside of the environment; it knows `max_turns` itself.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise DataError(f"image must be u8[h, w, 3], got {image.dtype}{list(image.shape)}")
    limits = fit(*image.shape[:2], limits)
    view = View.whole(*image.shape[:2], limits)
    return EnvState(image, query, config, limits, view, last=last or config.max_turns == 1)


def opening_observation(state: EnvState) -> Observation:
    """What the policy sees before its first turn: the question and the whole image; of any state of its trajectory."""
    view = state.view.reset()
    text = prompts.user_text(state.query, view.size_view, state.config.prompt)
    last = state.turns[0].last if state.turns else state.last
    return _announce(Observation(text, view.render(state.image)), (), last, state.config)


def conversation(state: EnvState) -> list[prompts.Message]:
    """All that was said and shown so far, for those who read messages; `read_before` has it as the policy's text."""
    seen = opening_observation(state)
    messages = prompts.opening_messages(prompts.system_prompt(state.config.prompt), seen.text, seen.image)
    for turn in state.turns:
        messages.append(prompts.Message("assistant", (turn.text,)))
        if turn.observation is not None:
            messages.append(prompts.observation_message(turn.observation.text, turn.observation.image))
    return messages


def read_before(state: EnvState, turn: int) -> tuple[str, list[np.ndarray]]:
    """What is appended to the policy's context before that turn (0 = the first): the text and its images u8[h, w, 3].

    Behind a turn it begins with that turn's terminator, which the context has already where the policy sampled it.
    """
    if turn == 0:
        seen = opening_observation(state)
        text = prompts.opening(prompts.system_prompt(state.config.prompt), seen.text)
    else:
        seen = state.turns[turn - 1].observation
        text = prompts.TERMINATOR + prompts.observation_turn(seen.text, seen.image is not None)
    return text, [] if seen.image is None else [seen.image]


def propose(state: EnvState, text: str) -> Proposal:
    """Reads one assistant turn (without its terminator) and converts it to original pixels."""
    _check_open(state)
    call = parse(text)
    if isinstance(call, ParseError):
        return Proposal(None, call, text=text)
    proposal = dataclasses.replace(call.propose(state.view, state.masks), text=text)
    if proposal.request is not None and _repeats(state, proposal) >= state.config.max_repeats:
        return dataclasses.replace(proposal, request=None)  # it ends here; the tool would only say the same again
    return proposal


def refuse_view(proposal: Proposal) -> Proposal:
    """The proposal when whoever plays has no room for the view that it asks for."""
    error = ParseError("no_room", "there is no room left for another view; go on in this one, or finish.")
    return dataclasses.replace(refuse_call(proposal.call, error, proposal.clipped), text=proposal.text)


def run_tool(segmenter: Segmenter, state: EnvState, proposal: Proposal) -> SegmentReply | SegmentFailure | None:
    """Runs the proposal's request, if it has one. A SegmenterError becomes a value, and so does a segmenter's breaking
    its promise, by another exception or an improper reply: it fails the trajectory, not the run."""
    if proposal.request is None:
        return None
    start = time.perf_counter()
    try:
        reply = segmenter.segment(state.image, proposal.request)
        if reply.mask.dtype != bool or reply.mask.shape != state.image.shape[:2] or not np.isfinite(reply.score):
            raise ValueError(f"reply with mask {reply.mask.dtype}{list(reply.mask.shape)}, score {reply.score}")
    except Exception as error:  # noqa: BLE001
        typed = isinstance(error, SegmenterError)
        kind = error.kind if typed else FailureKind.INTERNAL
        detail = error.detail if typed else f"{type(error).__name__}: {error}"
        return SegmentFailure(kind, detail, time.perf_counter() - start)
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
        if reply.kind.callers_fault:  # the kind's words are in REFUSALS; its detail is for people, not for the policy
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
    )
    status = _ending(after, proposal, error)
    observation = None
    if status is None:
        observation = _announce(_observe(after, proposal, error), after.masks, after.last, after.config)
    turn = Turn(proposal.text, proposal.call, error, observation, mask_id, proposal.clipped, repeats > 1, state.last)
    return dataclasses.replace(after, turns=(*state.turns, turn), status=status)


def abort(state: EnvState, status: Status) -> EnvState:
    """Ended from outside, e.g. MAX_CONTEXT when the next observation or turn does not fit."""
    _check_open(state)
    return dataclasses.replace(state, status=status)


def final_mask(state: EnvState) -> tuple[np.ndarray, int | None]:
    """bool[h, w] and its id: the committed mask, else the latest one, else empty with id None."""
    call = state.turns[-1].call if state.turns else None
    committed = state.status is Status.FINISHED and call is not None and call.ends
    mask_id = call.mask_id if committed else len(state.masks) or None
    return (np.zeros(state.image.shape[:2], bool) if mask_id is None else state.masks[mask_id - 1].mask), mask_id


def _repeats(state: EnvState, proposal: Proposal) -> int:
    """How many turns in a row, this one included, do the same action; 0 for a malformed turn."""
    if proposal.action is None:
        return 0
    return state.repeats + 1 if proposal.action == state.action else 1


def _ending(after: EnvState, proposal: Proposal, error: ParseError | None) -> Status | None:
    config = after.config
    if after.failure is not None:
        return Status.ENV_FAILED
    if error is None and proposal.call is not None and proposal.call.ends:
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
    image = draw_overlay(
        after.image, record.mask, after.config.history_size, request.points, request.labels, request.box
    )
    return Observation(text, image)


def _announce(seen: Observation, masks: Sequence[MaskRecord], last: bool, config: AgentConfig) -> Observation:
    if not (last and config.announce_last):
        return seen
    best = max(masks, key=lambda record: (record.score, record.id), default=None)
    return dataclasses.replace(seen, text=f"{seen.text} {prompts.last_turn_text(best and best.id, config.prompt)}")


def _check_open(state: EnvState) -> None:
    if state.status is not None:
        raise ValueError(f"the trajectory has ended: {state.status}")
