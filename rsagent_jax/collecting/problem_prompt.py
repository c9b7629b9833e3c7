"""What a vision-language model is asked for when it writes problems: queries that mean one known object of a picture.

Its answer is text from outside: it is read strictly, and every query that cannot be used has a reason that can be
counted. The prompt is ours; the paper says that proprietary models wrote its problems, not how they were asked.
"""

from __future__ import annotations

import json
import re

import cv2
import numpy as np

from rsagent_jax.agent.overlay import draw_overlay
from rsagent_jax.agent.prompts import MAX_QUERY_CHARS, sanitize
from rsagent_jax.collecting.endpoint import message_part

_ASK = """The second image is the first one with one object marked: tinted blue, outlined in yellow. The data set \
calls it "{name}".

Write {count} queries that mean exactly this object and nothing else in the first image. Each must need reasoning: \
about what the object is for, what it does or what happens to it, how it relates to other things in the picture, or \
common knowledge. Do not call the object by its name or its usual synonyms. Do not speak of images, marks, tints, \
outlines or masks: whoever reads a query sees only the first image. Queries may be questions or instructions, must \
differ from each other, and have {low} to {high} words.

Answer with JSON alone: {{"queries": ["…", …]}}"""

# What tells of the mark, which nobody else can see.
_MARK = re.compile(
    r"\b(highlight\w*|outlin\w*|overla\w*|mask(ed|s)?|(un)?marked|tint\w*"
    r"|(first|second|other) (image|picture)|bounding box)\b",
    re.IGNORECASE,
)


class BadAnswer(ValueError):
    """The answer as a whole cannot be read."""


def problem_question(
    image: np.ndarray, mask: np.ndarray, name: str, count: int, words: tuple[int, int], size: int
) -> list[dict]:
    """Messages for an OpenAI-compatible endpoint. u8[h, w, 3], bool[h, w]; both pictures at most `size` pixels long."""
    text = _ASK.format(name=sanitize(name), count=count, low=words[0], high=words[1])
    longest = min(size, max(mask.shape))
    marked = draw_overlay(image, mask, longest)
    plain = cv2.resize(image, marked.shape[1::-1], interpolation=cv2.INTER_AREA)
    return [{"role": "user", "content": [message_part(part) for part in (plain, marked, text)]}]


def read_answer(text: str) -> list[str]:
    """The queries as they were written. BadAnswer where there is no JSON object with a list of texts."""
    start, end = text.find("{"), text.rfind("}")
    if start < 0 or end < start:
        raise BadAnswer("no JSON object")
    try:
        queries = json.loads(text[start : end + 1])["queries"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadAnswer(f"no JSON object with queries ({type(error).__name__})") from None
    if not isinstance(queries, list) or not queries or not all(isinstance(q, str) for q in queries):
        raise BadAnswer("queries is no list of texts")
    return queries


def fault(query: str, name: str, words: tuple[int, int]) -> str | None:
    """Why a query cannot be used, or None. `name` is the data set's own expression."""
    if sanitize(query) != " ".join(query.split()).strip() or len(query) > MAX_QUERY_CHARS:
        return "cannot stand in a prompt"
    if not words[0] <= len(query.split()) <= words[1]:
        return "too short or too long"
    if _MARK.search(query):
        return "speaks of the mark"
    return "the data set's own words" if normal(query) == normal(name) else None


def normal(query: str) -> str:
    """Equal for queries that differ in case, spaces and punctuation only."""
    return " ".join(re.findall(r"\w+", query.casefold()))
