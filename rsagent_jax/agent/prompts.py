"""Every string a policy reads, and the chat layout around it. tests/agent/golden_prompts.txt freezes them.

The layout is Qwen2.5-VL's chat template written out, with one <|image_pad|> where an image goes; data/processor widens
it to the image's tokens. An assistant turn ends with the sampled <|im_end|>; the "\\n" after it is forced, so it stands
at the head of the observation that follows.

Text from outside (queries) goes through `sanitize`, so that it cannot open a role, an image or a tag. Text from a
policy is never repeated to it. Both prompt styles are ours, not the paper's.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence

from rsagent_jax.agent.tools import TOOL_SCHEMAS
from rsagent_jax.types import DataError, ParseError

STYLES = ("full", "brief")
TERMINATOR = "<|im_end|>"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
BASE_SYSTEM = "You are a helpful assistant."  # Qwen's own default, used with the grounding prompts
MAX_QUERY_CHARS = 500

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

_BRIEF = (
    "Segment the object. Each turn: <think>thought</think> and one <tool_call> of segment(box, points, labels, "
    "refine), zoom(box), rotate(quarter_turns), reset_view() or finish(mask_id)."
)


def system_prompt(style: str) -> str:
    """`full` carries the JSON schema of every tool; `brief` is for tiny policies, which pay for every token."""
    _check(style)
    if style == "brief":
        return _BRIEF
    return _FULL + "\n\n" + _TOOLS.format(tools="\n".join(json.dumps(schema) for schema in TOOL_SCHEMAS))


def user_text(query: str, size_view: tuple[int, int], style: str) -> str:
    """The question; `size_view` is (w', h'). The image stands before it, see `opening`."""
    _check(style)
    w, h = size_view
    if style == "brief":
        return f'Segment "{sanitize(query)}" in this {w}x{h} image.'
    return f'Segment "{sanitize(query)}". The image is a view of {w}x{h} pixels.'


def segment_text(mask_id: int, score: float, area: float, size_view: tuple[int, int], style: str) -> str:
    """What comes with a mask's overlay; `area` is its share of the whole image, 0..1."""
    _check(style)
    text = f"Mask {mask_id}: score {min(max(score, 0.0), 1.0):.2f}, area {_percent(area)}."
    if style == "brief":
        return text
    w, h = size_view
    return f"{text} Coordinates still refer to the {w}x{h} view. Correct the mask or finish."


def view_text(size_view: tuple[int, int], style: str) -> str:
    """What comes with a new view of (w', h') pixels."""
    _check(style)
    w, h = size_view
    if style == "brief":
        return f"View {w}x{h}."
    return f"The current view has {w}x{h} pixels. Coordinates now refer to it."


def last_turn_text(best_mask: int | None, style: str) -> str:
    """Stands at the end of what comes before the last turn; `best_mask` is the id with the highest score so far."""
    _check(style)
    if best_mask is None:
        return "Last turn." if style == "brief" else "This is your last turn."
    if style == "brief":
        return f"Last turn: finish, best mask {best_mask}."
    return f"This is your last turn: call finish, with mask {best_mask} if you have no better one."


def error_text(error: ParseError, style: str) -> str:
    """The answer to a malformed or refused call."""
    _check(style)
    if style == "brief":
        return f"Error: {error.detail}"
    return (
        f"Error ({error.reason}): {error.detail} Answer with <think></think> and exactly one <tool_call></tool_call>."
    )


def opening(system: str, user: str) -> str:
    """The context before the first assistant turn: one image, then the user's text."""
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{IMAGE}{user}<|im_end|>\n<|im_start|>assistant\n"


def observation_turn(text: str, has_image: bool) -> str:
    """Everything forced between an assistant's <|im_end|> and its next turn."""
    image = IMAGE if has_image else ""
    return f"\n<|im_start|>user\n<tool_response>\n{text}{image}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"


def ground_box_question(query: str) -> str:
    """Qwen2.5-VL's own grounding question; pre-trains the tiny base."""
    return f'Locate "{sanitize(query)}", output its bbox coordinates in JSON format.'


def ground_point_question(query: str) -> str:
    return f'Locate "{sanitize(query)}", output its point coordinates in JSON format.'


def ground_box_answer(boxes_view: Sequence[Sequence[float]], labels: Sequence[str]) -> str:
    """Boxes [x1, y1, x2, y2] in view pixels, rounded to integers, in Qwen2.5-VL's own layout."""
    return _ground_answer("bbox_2d", boxes_view, labels)


def ground_point_answer(points_view: Sequence[Sequence[float]], labels: Sequence[str]) -> str:
    """Points [x, y] in view pixels, rounded to integers."""
    return _ground_answer("point_2d", points_view, labels)


def sanitize(text: str) -> str:
    """One line of at most MAX_QUERY_CHARS that cannot form a special token, nor end the quotes it stands in.

    Every special token of Qwen starts with "<" and then "|", "/" or a letter. Such a "<" becomes "(": a swap of one
    character for one, so nothing that is left can join into a new token. "a < b" is untouched.
    """
    text = "".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in text)
    text = " ".join(text.split())[:MAX_QUERY_CHARS].strip()
    return re.sub(r"<(?=[|/A-Za-z])", "(", text).replace('"', "'")


def _ground_answer(key: str, rows: Sequence[Sequence[float]], labels: Sequence[str]) -> str:
    if len(rows) != len(labels):
        raise DataError(f"{len(rows)} {key} for {len(labels)} labels")
    lines = [
        f'\t{{"{key}": {[round(float(v)) for v in row]}, "label": {json.dumps(sanitize(label), ensure_ascii=False)}}}'
        for row, label in zip(rows, labels, strict=True)
    ]
    return "```json\n[\n" + ",\n".join(lines) + "\n]\n```"


def _percent(share: float) -> str:
    percent = 100.0 * share
    return f"{percent:.0f}%" if percent >= 1 or percent == 0 else f"{percent:.1f}%"


def _check(style: str) -> None:
    if style not in STYLES:
        raise DataError(f"agent.prompt must be one of {', '.join(STYLES)}, got {style!r}")
