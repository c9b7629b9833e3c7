"""Arrow 4: the tools a policy may call, their JSON schema, the strict parser and the canonical printer.

A turn is one think block and one call, nothing else:

    <think>The cup is left of the plate.</think>
    <tool_call>
    {"name": "segment", "arguments": {"points": [[45, 60]], "labels": [1]}}
    </tool_call>

White space between the parts is free. Whatever a policy writes, `parse` returns a value: a call, or a ParseError whose
reason can be counted. Details never quote the policy, so nothing it writes comes back to it as a special token.
"""

from __future__ import annotations

import json
import re
from typing import Any

from rsagent_jax.types import Finish, ParseError, ResetView, Rotate, Segment, ToolCall, Zoom

# Malformed text: it names no action. `Turn.call` is None.
REASONS = (
    "bad_text",  # control tokens such as <|im_end|>, or unpaired surrogates
    "no_call",
    "several_calls",
    "unclosed_call",  # most often the token budget ended the turn
    "bad_think",  # not exactly one closed think block
    "stray_text",  # before the think block, or between it and the call
    "trailing_text",
    "bad_json",
    "unknown_tool",
    "unknown_argument",
    "missing_argument",
    "bad_type",
    "bad_value",
)

# Well-formed calls that the environment refuses. `Turn.call` is kept.
REFUSALS = (
    "unknown_mask",  # finish or refine names a mask that does not exist
    "no_logits",  # refine names a mask whose logits the segmenter does not keep
    "empty_box",  # no area left inside the view
    "zoom_too_small",
    "zoom_too_thin",
    "no_room",  # the driver has no tokens left for another view
    "invalid_prompt",  # the segmenter's own refusals, see FailureKind
    "unknown_logits",
)

MAX_NUMBER = 1e6  # beyond any picture; keeps arithmetic finite
MAX_POINTS = 16
MAX_CALL_CHARS = 4000  # bounds the time spent on a runaway turn

_BOX = {
    "type": "array",
    "items": {"type": "number"},
    "minItems": 4,
    "maxItems": 4,
    "description": "[x1, y1, x2, y2] in pixels of the current view",
}


def _schema(name: str, description: str, properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOL_SCHEMAS: tuple[dict[str, Any], ...] = (
    _schema(
        "segment",
        "Make a mask from a box, points, or both; or correct an earlier mask. Returns its overlay, score and area.",
        {
            "box": _BOX,
            "points": {
                "type": "array",
                "items": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
                "maxItems": MAX_POINTS,
                "description": "[[x, y], ...] in pixels of the current view",
            },
            "labels": {
                "type": "array",
                "items": {"type": "integer", "enum": [0, 1]},
                "description": "one per point: 1 object, 0 background; default all 1",
            },
            "refine": {"type": "integer", "description": "id of the mask to start from"},
        },
        [],
    ),
    _schema("zoom", "Crop the current view to a box and enlarge it.", {"box": _BOX}, ["box"]),
    _schema(
        "rotate",
        "Turn the current view counter-clockwise by quarter turns.",
        {"quarter_turns": {"type": "integer", "enum": [1, 2, 3]}},
        ["quarter_turns"],
    ),
    _schema("reset_view", "Go back to the view of the whole image.", {}, []),
    _schema(
        "finish",
        "End with a mask as the answer; null when the target is not in the image.",
        {"mask_id": {"type": ["integer", "null"]}},
        ["mask_id"],
    ),
)

# tool -> (arguments it takes, arguments it needs), read off the schema so that the two cannot differ
_ARGUMENTS = {
    s["function"]["name"]: (
        tuple(s["function"]["parameters"]["properties"]),
        tuple(s["function"]["parameters"]["required"]),
    )
    for s in TOOL_SCHEMAS
}


class _Malformed(Exception):
    """Carries a ParseError out of the nested checks; never leaves this module."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason)
        self.error = ParseError(reason, detail)


def parse(text: str) -> ToolCall | ParseError:
    """The call in an assistant's turn (without its terminator), or why there is none. Never raises."""
    try:
        return _call(_load(_body(text)))
    except _Malformed as e:
        return e.error


def render_call(call: ToolCall, thought: str = "") -> str:
    """The canonical assistant turn; `parse` gives the same call back. `thought` must be free of tags."""
    return f"<think>{thought}</think>\n<tool_call>\n{call_json(call)}\n</tool_call>"


def call_json(call: ToolCall) -> str:
    """One line of JSON, the same for equal calls: whole numbers without a point, labels spelt out."""
    match call:
        case Segment(box, points, labels, refine):
            name, arguments = "segment", {}
            if box is not None:
                arguments["box"] = [_plain(v) for v in box]
            if points:
                arguments["points"] = [[_plain(x), _plain(y)] for x, y in points]
                arguments["labels"] = list(labels)
            if refine is not None:
                arguments["refine"] = refine
        case Zoom(box):
            name, arguments = "zoom", {"box": [_plain(v) for v in box]}
        case Rotate(quarter_turns):
            name, arguments = "rotate", {"quarter_turns": quarter_turns}
        case ResetView():
            name, arguments = "reset_view", {}
        case Finish(mask_id):
            name, arguments = "finish", {"mask_id": mask_id}
        case _:
            raise TypeError(f"not a tool call: {call!r}")
    return json.dumps({"name": name, "arguments": arguments})


def _plain(value: float) -> int | float:
    return int(value) if value == int(value) else float(value)


def _body(text: str) -> str:
    """The JSON between the tool_call tags, once the structure of the turn is right."""
    if re.search(r"<\|\w+\|>|[\ud800-\udfff]", text):
        raise _Malformed("bad_text", "special tokens are not allowed in a turn.")
    opened = text.count("<tool_call>")
    if opened == 0:
        raise _Malformed("no_call", "no <tool_call> found.")
    if opened > 1 or text.count("</tool_call>") > 1:
        raise _Malformed("several_calls", "only one <tool_call> per turn.")
    if "</tool_call>" not in text:
        raise _Malformed("unclosed_call", "</tool_call> is missing.")
    if text.count("<think>") != 1 or text.count("</think>") != 1:
        raise _Malformed("bad_think", "exactly one <think></think> is needed.")
    # No regular expression here: the four positions decide everything in linear time.
    think, think_end = text.index("<think>"), text.index("</think>")
    start, end = text.index("<tool_call>"), text.index("</tool_call>")
    if not think < think_end < start:
        raise _Malformed("bad_think", "<think></think> must come before <tool_call>.")
    if end < start:
        raise _Malformed("unclosed_call", "</tool_call> is missing.")
    if text[:think].strip() or text[think_end + len("</think>") : start].strip():
        raise _Malformed("stray_text", "text outside <think> and <tool_call>.")
    if text[end + len("</tool_call>") :].strip():
        raise _Malformed("trailing_text", "text after </tool_call>.")
    return text[start + len("<tool_call>") : end]


def _load(body: str) -> dict[str, Any]:
    if len(body) > MAX_CALL_CHARS:
        raise _Malformed("bad_json", "the call is too long.")
    try:
        value = json.loads(body, parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError):  # ValueError also covers integers too long to convert
        raise _Malformed("bad_json", "the call is not valid JSON.") from None
    if not isinstance(value, dict):
        raise _Malformed("bad_json", "the call must be a JSON object.")
    return value


def _no_constant(name: str) -> None:
    raise _Malformed("bad_json", "NaN and Infinity are not numbers.")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise _Malformed("bad_json", "a key appears twice.")
    return dict(pairs)


def _call(value: dict[str, Any]) -> ToolCall:
    for key in ("name", "arguments"):
        if key not in value:
            raise _Malformed("missing_argument", f'"{key}" is missing.')
    if len(value) > 2:
        raise _Malformed("unknown_argument", 'a call has only "name" and "arguments".')
    name, arguments = value["name"], value["arguments"]
    if not isinstance(name, str):
        raise _Malformed("bad_type", '"name" must be a string.')
    if name not in _ARGUMENTS:
        raise _Malformed("unknown_tool", f"tools: {', '.join(_ARGUMENTS)}.")
    if not isinstance(arguments, dict):
        raise _Malformed("bad_type", '"arguments" must be an object.')
    takes, needs = _ARGUMENTS[name]
    if set(arguments) - set(takes):
        raise _Malformed("unknown_argument", f"{name} takes {', '.join(takes) or 'no arguments'}.")
    for key in needs:
        if key not in arguments:
            raise _Malformed("missing_argument", f"{name} needs {key}.")
    match name:
        case "segment":
            return _segment(arguments)
        case "zoom":
            return Zoom(_numbers("box", arguments["box"], 4))
        case "rotate":
            return Rotate(_integer("quarter_turns", arguments["quarter_turns"], 1, 3))
        case "reset_view":
            return ResetView()
        case _:
            mask_id = arguments["mask_id"]
            return Finish(None if mask_id is None else _integer("mask_id", mask_id, 1, int(MAX_NUMBER)))


def _segment(arguments: dict[str, Any]) -> Segment:
    # null means the same as leaving an optional argument out: models write both
    given = {key: value for key, value in arguments.items() if value is not None}
    box = _numbers("box", given["box"], 4) if "box" in given else None
    points = tuple(_numbers("a point", p, 2) for p in _list("points", given.get("points", []), MAX_POINTS))
    labels = tuple(_integer("a label", v, 0, 1) for v in _list("labels", given.get("labels", []), MAX_POINTS))
    refine = _integer("refine", given["refine"], 1, int(MAX_NUMBER)) if "refine" in given else None
    if "labels" not in given:
        labels = (1,) * len(points)
    if len(labels) != len(points):
        raise _Malformed("bad_value", "one label per point.")
    if box is None and not points and refine is None:
        raise _Malformed("missing_argument", "segment needs a box, points or refine.")
    return Segment(box, points, labels, refine)


def _list(what: str, value: Any, most: int) -> list[Any]:
    if not isinstance(value, list):
        raise _Malformed("bad_type", f"{what} must be a list.")
    if len(value) > most:
        raise _Malformed("bad_value", f"at most {most} {what}.")
    return value


def _numbers(what: str, value: Any, count: int) -> tuple[float, ...]:
    if not isinstance(value, list) or any(isinstance(v, bool) or not isinstance(v, int | float) for v in value):
        raise _Malformed("bad_type", f"{what} must be {count} numbers.")
    if len(value) != count:
        raise _Malformed("bad_value", f"{what} must be {count} numbers.")
    # compared before float(), which a 400-digit integer overflows; 1e999 is read as inf and fails here too
    if any(abs(v) > MAX_NUMBER for v in value):
        raise _Malformed("bad_value", f"{what} has a number out of range.")
    return tuple(float(v) for v in value)


def _integer(what: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _Malformed("bad_type", f"{what} must be an integer.")
    if not low <= value <= high:
        raise _Malformed("bad_value", f"{what} is out of range.")
    return value
