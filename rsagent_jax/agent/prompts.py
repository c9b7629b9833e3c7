"""Every string a policy reads, and the chat layout around it. tests/agent/golden_prompts.txt freezes them.

The layout is Qwen2.5-VL's chat template written out, with one <|image_pad|> where an image goes; data/processor widens
it to the image's tokens. An assistant turn ends with the sampled <|im_end|>; the "\\n" after it is forced, so it stands
at the head of the observation that follows.

Text from outside (queries) goes through `sanitize`, so that it cannot open a role, an image or a tag. Text from a
policy is never repeated to it. Both prompt styles are ours, not the paper's.
"""

import json
import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rsagent_jax.agent.tools import TOOLS, tool_schemas
from rsagent_jax.types import DataError, ParseError

TERMINATOR = "<|im_end|>"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
BASE_SYSTEM = "You are a helpful assistant."  # Qwen's own default, used with the grounding prompts
MAX_QUERY_CHARS = 500
_READABLE = {"Cf": ""} | dict.fromkeys(("Cc", "Cs", "Zl", "Zp"), " ")  # in place of a character of this category
_JOINERS = "\u200c\u200d"  # by which words are spelt (Persian), and emoji joined

_FULL = """You segment the object that the user describes, by calling tools on the image.

In every turn write a short thought in <think></think>, then exactly one tool call, and nothing else.
Coordinates are absolute pixels of the current view, x to the right and y down. The first image is the current view \
until zoom, rotate or reset_view shows another one. Overlays of masks always show the whole image: look at them, do \
not measure in them.
Check each mask. If it is wrong, correct it with points (label 1 on what is missing, 0 on what does not belong) and \
refine, or start again. When it is right, call finish with its id; if the target is not in the image, finish with \
null."""

# Qwen2.5's own wording, so that pretrained weights recognise it
_TOOLS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""

_BRIEF = "Segment the object. Each turn: <think>thought</think> and one <tool_call> of {tools}."

_TEXTS = {
    "full": {
        "user": 'Segment "{query}". The image is a view of {w}x{h} pixels.',
        "mask": "Mask {id}: score {score:.2f}, area {area}. Coordinates still refer to the {w}x{h} view."
        " Correct the mask or finish.",
        "view": "The current view has {w}x{h} pixels. Coordinates now refer to it.",
        "last": "This is your last turn.",
        "last with a mask": "This is your last turn: call finish, with mask {id} if you have no better one.",
        "error": "Error ({reason}): {detail} Answer with <think></think> and exactly one <tool_call></tool_call>.",
    },
    "brief": {
        "user": 'Segment "{query}" in this {w}x{h} image.',
        "mask": "Mask {id}: score {score:.2f}, area {area}.",
        "view": "View {w}x{h}.",
        "last": "Last turn.",
        "last with a mask": "Last turn: finish, best mask {id}.",
        "error": "Error: {detail}",
    },
}
STYLES = tuple(_TEXTS)


def system_prompt(style: str) -> str:
    """`full` carries the JSON schema of every tool; `brief` is for tiny policies, which pay for every token."""
    if style == "brief":
        *calls, last = (f"{tool.name}({', '.join(tool.properties)})" for tool in TOOLS.values())
        return _BRIEF.format(tools=f"{', '.join(calls)} or {last}")
    return _FULL + "\n\n" + _TOOLS.format(tools="\n".join(map(json.dumps, tool_schemas())))


def user_text(query: str, size_view: tuple[int, int], style: str) -> str:
    """The question; `size_view` is (w', h'). The image stands before it, see `opening`."""
    return _text(style, "user", size_view, query=sanitize(query))


def segment_text(mask_id: int, score: float, area: float, size_view: tuple[int, int], style: str) -> str:
    """What comes with a mask's overlay; `area` is its share of the whole image, 0..1."""
    return _text(style, "mask", size_view, id=mask_id, score=min(max(score, 0.0), 1.0), area=_percent(area))


def view_text(size_view: tuple[int, int], style: str) -> str:
    """What comes with a new view of (w', h') pixels."""
    return _text(style, "view", size_view)


def last_turn_text(best_mask: int | None, style: str) -> str:
    """Stands at the end of what comes before the last turn; `best_mask` is the id with the highest score so far."""
    return _text(style, "last" if best_mask is None else "last with a mask", id=best_mask)


def error_text(error: ParseError, style: str) -> str:
    """The answer to a malformed or refused call."""
    return _text(style, "error", reason=error.reason, detail=error.detail)


def _text(style: str, name: str, size_view: tuple[int, int] = (0, 0), **values) -> str:
    return _TEXTS[style][name].format(w=size_view[0], h=size_view[1], **values)


class Message(NamedTuple):
    """Of a conversation; in place of an image u8[h, w, 3] its mark in the text may stand, IMAGE."""

    role: str
    parts: tuple[str | np.ndarray, ...]


def opening_messages(system: str, user: str, image: str | np.ndarray) -> list[Message]:
    """The conversation before the first assistant turn: one image, then the user's text."""
    return [Message("system", (system,)), Message("user", (image, user))]


def observation_message(text: str, image: str | np.ndarray | None) -> Message:
    """What the environment answers a turn with."""
    return Message("user", (f"<tool_response>\n{text}", *(() if image is None else (image,)), "\n</tool_response>"))


def opening(system: str, user: str) -> str:
    """The context before the first assistant turn."""
    return _laid_out(opening_messages(system, user, IMAGE))


def observation_turn(text: str, has_image: bool) -> str:
    """Everything forced between an assistant's <|im_end|> and its next turn."""
    return "\n" + _laid_out([observation_message(text, IMAGE if has_image else None)])


def _laid_out(messages: Sequence[Message]) -> str:
    turns = [f"<|im_start|>{role}\n{''.join(parts)}<|im_end|>\n" for role, parts in messages]
    return "".join(turns) + "<|im_start|>assistant\n"


def ground_question(key: str, query: str) -> str:
    """Qwen2.5-VL's own grounding question, for `bbox_2d` or `point_2d`; pre-trains the tiny base."""
    return f'Locate "{sanitize(query)}", output its {key.removesuffix("_2d")} coordinates in JSON format.'


def ground_answer(key: str, rows: Sequence[Sequence[float]], labels: Sequence[str]) -> str:
    """Boxes [x1, y1, x2, y2] or points [x, y] in view pixels, rounded to integers, in Qwen2.5-VL's own layout."""
    lines = [
        f'\t{{"{key}": {[round(float(v)) for v in row]}, "label": {json.dumps(sanitize(label), ensure_ascii=False)}}}'
        for row, label in zip(rows, labels, strict=True)
    ]
    return "```json\n[\n" + ",\n".join(lines) + "\n]\n```"


def check_query(query: str) -> None:
    """DataError for one that asks nothing, or more than a prompt takes: the policy would answer another question."""
    shown = _readable(query)
    if not shown:
        raise DataError("the query is empty; say what to segment, such as 'the red circle'")
    if len(shown) > MAX_QUERY_CHARS:
        raise DataError(f"the query has {len(shown)} characters, and a prompt takes {MAX_QUERY_CHARS}; shorten it")


def sanitize(text: str) -> str:
    """One line of at most MAX_QUERY_CHARS that cannot form a special token, nor end the quotes it stands in.

    Every special token of Qwen starts with "<" and then "|", "/" or a letter. Such a "<" becomes "(": a swap of one
    character for one, so nothing that is left can join into a new token. "a < b" is untouched.
    """
    text = _readable(text)[:MAX_QUERY_CHARS].strip()
    return re.sub(r"<(?=[|/A-Za-z])", "(", text).replace('"', "'")


def _readable(text: str) -> str:
    text = "".join(_READABLE.get(unicodedata.category(c), c) if c not in _JOINERS else c for c in text)
    return " ".join(text.split())


def _percent(share: float) -> str:
    percent = 100.0 * share
    return f"{percent:.0f}%" if percent >= 1 or percent == 0 else f"{percent:.1f}%"
