"""A trajectory as JSON, and back: the same states and observations without a model or a segmenter.

Only what cannot be computed is stored: the policy's texts, the segmenter's replies, which turn was the last one, which
view was refused for want of room, and an ending that came from outside. Everything else (calls, errors, views,
overlays, counters, endings) is done again by the environment, and the ending must come out the same.
"""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from rsagent_jax.agent.environment import EnvState, SegmentFailure, abort, apply_reply, propose, refuse_view, reset
from rsagent_jax.agent.views import PixelLimits
from rsagent_jax.config.build import build_config, to_dict
from rsagent_jax.config.schema import AgentConfig
from rsagent_jax.masks import decode_rle, encode_rle
from rsagent_jax.runtime.image_files import checksum, image_by_checksum
from rsagent_jax.types import DataError, Status, Turn
from sam_bridge.types import FailureKind, SegmentReply, SegmentRequest

VERSION = 1


def state_to_json(state: EnvState, image_path: str = "") -> str:
    """One line of JSON; masks are COCO RLE. The image is not inside, only its path (if given), size and checksum."""
    h, w = state.image.shape[:2]
    return json.dumps(
        {
            "version": VERSION,
            "image": {"path": image_path, "width": w, "height": h, "sha256": checksum(state.image)},
            "query": state.query,
            "config": to_dict(state.config),
            "limits": dataclasses.asdict(state.limits),
            "turns": [_turn_to_json(turn, reply) for turn, reply in zip(state.turns, state.replies, strict=True)],
            "last": state.last,
            "status": state.status,
        }
    )


def replay(
    text: str, image: np.ndarray | None = None, asked: Callable[[SegmentRequest], None] = lambda request: None
) -> EnvState:
    """The state that `to_json` was given; `image` u8[h, w, 3] by `read_source` when None. `asked` gets what the
    segmenter was asked, call by call."""
    with _data_errors():
        record = json.loads(text)
        if record["version"] != VERSION:
            raise DataError(f"trajectory: version {record['version']} cannot be read, only {VERSION}")
        if image is None:
            image = read_source(text)
        size = (record["image"]["height"], record["image"]["width"])
        if image.shape[:2] != size:
            raise DataError(f"trajectory: made on an image of {size} pixels (h, w), given one of {image.shape[:2]}")
        config = build_config(AgentConfig, record["config"])
        turns = record["turns"]
        lasts = [turn.get("last", False) for turn in turns] + [record.get("last", False)]
        state = reset(image, record["query"], config, PixelLimits(**record["limits"]), lasts[0])
        for turn, last in zip(turns, lasts[1:], strict=True):
            proposal = propose(state, turn["text"])
            proposal = refuse_view(proposal) if turn.get("no_room") else proposal
            if proposal.request is not None:
                asked(proposal.request)
            state = apply_reply(state, proposal, _reply_from_json(turn["reply"]), last)
        status = None if record["status"] is None else Status(record["status"])
        if state.status is None and status is not None:
            state = abort(state, status)
    if state.status != status:
        raise DataError(f"trajectory: ended as {status}, replayed to {state.status}; the environment has changed")
    return state


@contextlib.contextmanager
def _data_errors() -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as e:
        raise DataError(f"trajectory: not a record of replay.state_to_json ({type(e).__name__}: {e})") from e


def _turn_to_json(turn: Turn, reply: SegmentReply | SegmentFailure | None) -> dict[str, Any]:
    marks = {"last": turn.last, "no_room": turn.error is not None and turn.error.reason == "no_room"}
    return {"text": turn.text, "reply": _reply_to_json(reply), **{name: True for name, on in marks.items() if on}}


def read_source(
    text: str, path: str | pathlib.Path | None = None, remedy: str = "a trajectory was made on it: put it back"
) -> np.ndarray:
    """The picture u8[h, w, 3] that the record was made on, turned as it was then; `path` is its place by now.

    DataError, with the remedy, if it is gone or has changed.
    """
    with _data_errors():
        image = json.loads(text)["image"]
        path, size, wanted = path or image["path"], (image["height"], image["width"]), image["sha256"]
    return image_by_checksum(path, wanted, size, remedy)


def _reply_to_json(reply: SegmentReply | SegmentFailure | None) -> dict[str, Any] | None:
    if reply is None:
        return None
    if isinstance(reply, SegmentFailure):
        return {"failure": reply.kind.value, "detail": reply.detail, "seconds": reply.seconds}
    kept = {"logits_id": reply.logits_id, "timings_s": reply.timings_s}
    return {"mask": encode_rle(reply.mask), "score": float(reply.score), **kept}


def _reply_from_json(value: dict[str, Any] | None) -> SegmentReply | SegmentFailure | None:
    if value is None:
        return None
    if "failure" in value:
        return SegmentFailure(FailureKind(value["failure"]), value["detail"], value["seconds"])
    return SegmentReply(decode_rle(value["mask"]), value["score"], value["logits_id"], value["timings_s"])
