"""Arrow 4: every call survives print and parse; every wrong text is a counted reason, never an exception."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsagent_jax.agent.tools import (
    REASONS,
    REFUSALS,
    Finish,
    ResetView,
    Rotate,
    Segment,
    Zoom,
    call_json,
    parse,
    render_call,
    tool_schemas,
)
from rsagent_jax.agent.tools.base import MAX_NUMBER
from rsagent_jax.types import ParseError
from sam_bridge.types import FailureKind

numbers = st.one_of(
    st.integers(-1000, 2000).map(float), st.floats(-MAX_NUMBER, MAX_NUMBER, allow_nan=False, allow_infinity=False)
)
boxes = st.tuples(numbers, numbers, numbers, numbers)
clicks = st.lists(st.tuples(st.tuples(numbers, numbers), st.integers(0, 1)), max_size=16)
ids = st.integers(1, 10_000)
calls = st.one_of(
    st.builds(
        lambda box, clicks, refine: Segment(box, tuple(p for p, _ in clicks), tuple(v for _, v in clicks), refine),
        st.none() | boxes, clicks, st.none() | ids,
    ).filter(lambda c: c.box is not None or c.points or c.refine is not None),
    st.builds(Zoom, boxes),
    st.builds(Rotate, st.integers(1, 3)),
    st.just(ResetView()),
    st.builds(Finish, st.none() | ids),
)  # fmt: skip


def turn(body: str, think: str = "<think>t</think>") -> str:
    return f"{think}\n<tool_call>\n{body}\n</tool_call>"


def segment(**arguments) -> str:
    return turn(json.dumps({"name": "segment", "arguments": arguments}))


@given(calls)
def test_every_call_survives_print_and_parse(call):
    assert parse(render_call(call, "I look.")) == call


def test_canonical_text():
    call = '{"name": "segment", "arguments": {"points": [[45, 60]], "labels": [1]}}'
    text = f"<think>hm</think>\n<tool_call>\n{call}\n</tool_call>"
    assert render_call(Segment(points=((45.0, 60.0),), labels=(1,)), "hm") == text
    assert call_json(ResetView()) == '{"name": "reset_view", "arguments": {}}'
    assert call_json(Finish(None)) == '{"name": "finish", "arguments": {"mask_id": null}}'


def test_tolerances():
    assert parse(segment(points=[[1, 2], [3, 4]])) == Segment(points=((1, 2), (3, 4)), labels=(1, 1))
    assert parse(segment(box=[1, 2, 3, 4], points=None, refine=None)) == Segment(box=(1, 2, 3, 4))
    assert parse(segment(refine=1)) == Segment(refine=1)
    assert parse(' \n<think></think><tool_call>{"name":"reset_view","arguments":{}}</tool_call>\n\n') == ResetView()


OK = '{"name": "reset_view", "arguments": {}}'
LONG = "1" + "0" * 400


def called(name: str, arguments: str) -> str:
    return turn(f'{{"name": "{name}", "arguments": {arguments}}}')


WRONG = {
    "bad_text": [turn(OK) + "<|im_end|>", turn(OK, "<think><|image_pad|></think>"), turn(OK, "<think>\ud800</think>")],
    "no_call": ["", "<think>only</think>"],
    "several_calls": [turn(OK) + turn(OK, "")],
    "unclosed_call": [
        "<think>t</think><tool_call>" + OK, "</tool_call><think>t</think><tool_call>" + OK,
    ],
    "bad_think": [
        *(turn(OK, think) for think in ("", "<think>t", "<think>a</think><think>b</think>", "</think><think>")),
        turn(OK, "") + "<think>late</think>",
    ],
    "stray_text": [turn(OK, "Well. <think>t</think>"), turn(OK, "<think>t</think> so:")],
    "trailing_text": [turn(OK) + " Done."],
    "bad_json": [
        *map(turn, ("", "[]", "{'name': 'reset_view'}", OK + OK, "[" * 3900, " " * 5000 + OK)),
        turn('{"a":' * 700 + "1" + "}" * 700),
        turn('{"name": "reset_view", "name": "reset_view", "arguments": {}}'),
        called("rotate", '{"quarter_turns": 1, "quarter_turns": 2}'),
        *(called("zoom", f'{{"box": [{x}, 0, 1, 1]}}') for x in ("NaN", "-Infinity", "1" + "0" * 5000)),
    ],
    "missing_argument": [
        turn('{"name": "reset_view"}'), turn('{"arguments": {}}'), segment(), segment(points=[]),
        called("zoom", "{}"), called("finish", "{}"),
    ],
    "unknown_argument": [
        turn('{"name": "reset_view", "arguments": {}, "id": 1}'), called("reset_view", '{"now": 1}'),
    ],
    "unknown_tool": [called("\\ud800", "{}"), called("click", "{}")],
    "bad_type": [
        turn('{"name": ["zoom"], "arguments": {}}'), called("zoom", '"{}"'), segment(box=[1, 2, 3, True]),
        segment(box="1 2 3 4"), segment(box=[1, 2, 3, "4"]), segment(points=[1, 2]), segment(points={"x": 1}),
        segment(points=[[1, 2]], labels=[True]), segment(points=[[1, 2]], labels=[1.0]), segment(refine="1"),
        called("rotate", '{"quarter_turns": 1.0}'), called("finish", '{"mask_id": true}'),
    ],
    "bad_value": [
        segment(box=[1, 2, 3]), segment(points=[[1, 2]] * 17), segment(points=[[1, 2]], labels=[1, 0]),
        segment(points=[[1, 2]], labels=[2]), segment(box=[1, 2, 3, 4], labels=[1]), segment(refine=0),
        *(called("zoom", f'{{"box": [{x}, 0, 1, 1]}}') for x in ("1e999", LONG)),
        called("rotate", '{"quarter_turns": 4}'), called("finish", '{"mask_id": -1}'),
    ],
}  # fmt: skip


@pytest.mark.parametrize("reason", REASONS)
def test_reasons(reason):
    for text in WRONG[reason]:
        error = parse(text)
        assert isinstance(error, ParseError) and error.reason == reason, text


def test_reasons_are_all_reached_and_are_no_refusals():
    assert WRONG.keys() == set(REASONS) and not set(REASONS) & set(REFUSALS)
    assert {kind.value for kind in FailureKind if kind.callers_fault} <= set(REFUSALS)


PIECES = ["<think>", "</think>", "<tool_call>", "</tool_call>", '{"name": "segment", "arguments": ',
          '{"points": [[1, 2]]}', "}", "[", "]", '"', "NaN", "1e400", "\ud800", "\u0000", "\\u", "<|im_end|>", "null",
          "true", " ", "\n"]  # fmt: skip


WORDS = st.sampled_from(["name", "arguments", "box", "points", "labels", "refine", "mask_id", "quarter_turns"])
LEAVES = st.none() | st.booleans() | st.integers() | st.integers(10**300, 10**320) | st.floats() | st.text()
VALUES = st.recursive(
    LEAVES, lambda v: st.lists(v, max_size=4) | st.dictionaries(WORDS | st.text(), v, max_size=4), max_leaves=12
)
BODIES = VALUES | st.builds(
    lambda name, arguments: {"name": name, "arguments": arguments},
    st.sampled_from(["segment", "zoom", "rotate", "reset_view", "finish"]) | VALUES,
    st.dictionaries(WORDS | st.text(), VALUES, max_size=4),
)


@st.composite
def mutated(draw):
    """A call's text with a piece put in, and some of it cut out."""
    text = render_call(draw(calls), "x")
    at, cut = draw(st.integers(0, len(text))), draw(st.integers(0, 5))
    return text[:at] + draw(st.text(max_size=3) | st.sampled_from(PIECES)) + text[at + cut :]


TEXTS = st.text() | st.lists(st.sampled_from(PIECES), max_size=30).map("".join) | mutated()
JSONS = st.builds(lambda body, ascii_only: turn(json.dumps(body, ensure_ascii=ascii_only)), BODIES, st.booleans())


@settings(max_examples=600)
@given(TEXTS | JSONS)
def test_any_text_gives_a_value_that_can_be_counted_stored_and_shown(text):
    result = parse(text)
    if isinstance(result, ParseError):
        assert result.reason in REASONS
        # what is answered never carries the policy's own text, so it cannot carry a tag or a token either
        assert "<|" not in result.detail and len(result.detail) < 100 and result.detail.isascii()
    else:
        hash(result)  # novel_action keeps calls in a set
        assert parse(render_call(result)) == result


def test_schema_agrees_with_the_parser():
    assert [s["function"]["name"] for s in tool_schemas()] == ["segment", "zoom", "rotate", "reset_view", "finish"]
    for schema in tool_schemas():
        parameters = schema["function"]["parameters"]
        body = json.dumps(
            {"name": schema["function"]["name"], "arguments": {key: {} for key in parameters["properties"]}}
        )
        error = parse(turn(body))  # every name is known, so only the types are wrong
        assert error == ResetView() or error.reason == "bad_type"
