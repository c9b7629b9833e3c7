"""What a trajectory says on the terminal while it is played: each turn, and how it ended."""

import json

import numpy as np

from rsagent_jax.agent.environment import EnvState
from rsagent_jax.report.page import thought_of
from rsagent_jax.types import Status

MAX_SHOWN = 300  # characters of a thought or a malformed turn


def describe_turn(state: EnvState, seconds: float) -> list[str]:
    """The newest turn as lines for the terminal."""
    turn, reply = state.turns[-1], state.replies[-1]
    lines = [f"turn {len(state.turns)}  ({seconds:.1f} s)"]
    if thought := thought_of(turn.text):
        lines.append(f"  thought  {_plain(thought)}")
    if turn.call is None:
        lines.append(f"  text     {_plain(turn.text) or '(nothing)'}")
        return [*lines, f"  result   malformed ({turn.error.reason}): {turn.error.detail}"]
    lines.append(f"  call     {turn.call.name} {json.dumps(turn.call.arguments())}")
    if state.failure is not None:
        result = f"the segmenter failed ({state.failure.kind}): {_plain(state.failure.detail)}"
    elif turn.error is not None:
        result = f"refused ({turn.error.reason}): {turn.error.detail}"
    elif turn.mask_id is not None:
        record = state.masks[turn.mask_id - 1]
        took = reply.timings_s.get("call", 0.0)
        result = f"mask {record.id}, score {record.score:.2f}, area {_area(record.mask)}, {took:.2f} s"
    elif turn.call.ends:
        result = "done"
    elif turn.repeated and state.status is Status.REPEATED:
        result = "the same again"
    else:
        result = "a view of {} x {} pixels".format(*state.view.size_view)
    return [*lines, f"  result   {result}"]


def describe_ending(state: EnvState, mask: np.ndarray, mask_id: int | None) -> str:
    """How it ended and which mask came of it, in one line."""
    count = len(state.turns)
    head = f"ended: {state.status.value} after {count} turn{'' if count == 1 else 's'}; "
    if mask_id is None:
        absent = "the policy says that the target is not in the picture, so " * (state.status is Status.FINISHED)
        return f"{head}{absent}the mask is empty"
    latest = ", the latest one" * (state.status is not Status.FINISHED)
    return f"{head}mask {mask_id}{latest}: score {state.masks[mask_id - 1].score:.2f}, area {_area(mask)}"


def _area(mask: np.ndarray) -> str:
    return f"{100 * float(mask.mean()):.1f} %"


def _plain(text: str) -> str:
    """One line of printable characters: what a policy writes must not steer a terminal."""
    text = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"
