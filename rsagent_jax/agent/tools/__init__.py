"""Text -> call: the table of the tools a policy may call, and parser, printer and schemas by that table.

A tool is one file and one entry of TOOLS; docs/extend.md has the recipe.

A turn is one think block and one call, nothing else:

    <think>The cup is left of the plate.</think>
    <tool_call>
    {"name": "segment", "arguments": {"points": [[45, 60]], "labels": [1]}}
    </tool_call>

White space between the parts is free. Whatever a policy writes, `parse` returns a value: a call, or a ParseError whose
reason can be counted. Details never quote the policy, so nothing it writes comes back to it as a special token.
"""

import json
import re
from typing import Any

from rsagent_jax.agent.tools.base import Malformed, Tool
from rsagent_jax.agent.tools.finish import Finish
from rsagent_jax.agent.tools.reset_view import ResetView
from rsagent_jax.agent.tools.rotate import Rotate
from rsagent_jax.agent.tools.segment import Segment
from rsagent_jax.agent.tools.zoom import Zoom
from rsagent_jax.types import ParseError

# In the order in which the prompt lists them.
TOOLS: dict[str, type[Tool]] = {tool.name: tool for tool in (Segment, Zoom, Rotate, ResetView, Finish)}

# Malformed text: it names no action. `Turn.call` is None. bad_text: control tokens such as <|im_end|>, or unpaired
# surrogates; bad_think: not exactly one closed think block; stray_text: before it, or between it and the call;
# unclosed_call: most often the token budget ended the turn.
REASONS = tuple(
    "bad_text no_call several_calls unclosed_call bad_think stray_text trailing_text bad_json unknown_tool"
    " unknown_argument missing_argument bad_type bad_value".split()
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

MAX_CALL_CHARS = 4000  # bounds the time spent on a runaway turn


def tool_schemas() -> list[dict[str, Any]]:
    """Every tool in the form of OpenAI's function schemas, which Qwen's chat template prints."""

    def function(tool: type[Tool]) -> dict[str, Any]:
        parameters = {"type": "object", "properties": tool.properties, "required": list(tool.required)}
        return {"name": tool.name, "description": tool.description, "parameters": parameters}

    return [{"type": "function", "function": function(tool)} for tool in TOOLS.values()]


def parse(text: str) -> Tool | ParseError:
    """The call in an assistant's turn (without its terminator), or why there is none. Never raises."""
    try:
        return _call(_load(_body(text)))
    except Malformed as e:
        reason, detail = e.args
        return ParseError(reason, detail)


def render_call(call: Tool, thought: str = "") -> str:
    """The canonical assistant turn; `parse` gives the same call back. `thought` must be free of tags."""
    return f"<think>{thought}</think>\n<tool_call>\n{call_json(call)}\n</tool_call>"


def call_json(call: Tool) -> str:
    """One line of JSON, the same for equal calls: whole numbers without a point, labels spelt out."""
    return json.dumps({"name": call.name, "arguments": call.arguments()})


def _body(text: str) -> str:
    """The JSON between the tool_call tags, once the structure of the turn is right."""
    if re.search(r"<\|\w+\|>|[\ud800-\udfff]", text):
        raise Malformed("bad_text", "special tokens are not allowed in a turn.")
    opened = text.count("<tool_call>")
    if opened == 0:
        raise Malformed("no_call", "no <tool_call> found.")
    if opened > 1 or text.count("</tool_call>") > 1:
        raise Malformed("several_calls", "only one <tool_call> per turn.")
    if "</tool_call>" not in text:
        raise Malformed("unclosed_call", "</tool_call> is missing.")
    if text.count("<think>") != 1 or text.count("</think>") != 1:
        raise Malformed("bad_think", "exactly one <think></think> is needed.")
    # No regular expression here: the four positions decide everything in linear time.
    think, think_end = text.index("<think>"), text.index("</think>")
    start, end = text.index("<tool_call>"), text.index("</tool_call>")
    if not think < think_end < start:
        raise Malformed("bad_think", "<think></think> must come before <tool_call>.")
    if end < start:
        raise Malformed("unclosed_call", "</tool_call> is missing.")
    if text[:think].strip() or text[think_end + len("</think>") : start].strip():
        raise Malformed("stray_text", "text outside <think> and <tool_call>.")
    if text[end + len("</tool_call>") :].strip():
        raise Malformed("trailing_text", "text after </tool_call>.")
    return text[start + len("<tool_call>") : end]


def _load(body: str) -> dict[str, Any]:
    if len(body) > MAX_CALL_CHARS:
        raise Malformed("bad_json", "the call is too long.")
    try:
        value = json.loads(body, parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError):  # ValueError also covers integers too long to convert
        raise Malformed("bad_json", "the call is not valid JSON.") from None
    if not isinstance(value, dict):
        raise Malformed("bad_json", "the call must be a JSON object.")
    return value


def _no_constant(name: str) -> None:
    raise Malformed("bad_json", "NaN and Infinity are not numbers.")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise Malformed("bad_json", "a key appears twice.")
    return dict(pairs)


def _call(value: dict[str, Any]) -> Tool:
    for key in ("name", "arguments"):
        if key not in value:
            raise Malformed("missing_argument", f'"{key}" is missing.')
    if len(value) > 2:
        raise Malformed("unknown_argument", 'a call has only "name" and "arguments".')
    name, arguments = value["name"], value["arguments"]
    if not isinstance(name, str):
        raise Malformed("bad_type", '"name" must be a string.')
    if name not in TOOLS:
        raise Malformed("unknown_tool", f"tools: {', '.join(TOOLS)}.")
    if not isinstance(arguments, dict):
        raise Malformed("bad_type", '"arguments" must be an object.')
    tool = TOOLS[name]
    if set(arguments) - set(tool.properties):
        raise Malformed("unknown_argument", f"{name} takes {', '.join(tool.properties) or 'no arguments'}.")
    for key in tool.required:
        if key not in arguments:
            raise Malformed("missing_argument", f"{name} needs {key}.")
    return tool.read(arguments)
