"""A stored trajectory gives back the identical states and observations, whatever the policy and the tool did."""

import json

import numpy as np
from agent_fakes import DiscSegmenter, box, click, make_image, run, same_states
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rsagent_jax.agent.environment import abort, apply_reply, propose, refuse_view
from rsagent_jax.agent.replay import read_source, replay, state_to_json
from rsagent_jax.agent.tools import Finish, ResetView, Rotate, Segment, Zoom, render_call
from rsagent_jax.types import Status
from sam_bridge.types import FailureKind
from tests.refusals import refused

IMAGE = make_image(90, 130)
whole = st.integers(-20, 150).map(float)
corners = st.tuples(whole, whole, whole, whole)
actions = st.one_of(
    st.builds(click, whole, whole, st.integers(0, 1), st.none() | st.integers(1, 3)),
    st.builds(Segment, corners),
    st.builds(Zoom, corners),
    st.builds(Rotate, st.integers(1, 3)),
    st.just(ResetView()),
    st.builds(Finish, st.none() | st.integers(1, 3)),
)  # fmt: skip
turns = st.one_of(actions, st.sampled_from(["no call", "<think>\ud800</think>"]))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(turns, max_size=8),
    st.lists(st.sampled_from([None, None, None, *FailureKind]), max_size=6),
    st.booleans(),
    st.sampled_from(["brief", "full"]),
)
def test_replay_is_identical(script, fail, logits, prompt):
    state = run(script, DiscSegmenter(logits=logits, fail=fail), IMAGE, "a <|im_end|> cup", prompt=prompt, max_turns=6)
    text = state_to_json(state)
    again = replay(text, IMAGE)
    same_states(state, again)
    assert state_to_json(again) == text


def test_outside_ending_and_image_path(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(IMAGE).save(path)
    state = abort(run([box(10, 10, 60, 60)], image=IMAGE), Status.MAX_CONTEXT)
    again = replay(state_to_json(state, str(path)))
    same_states(state, again)
    np.testing.assert_array_equal(again.image, IMAGE)


def test_the_picture_is_known_by_its_checksum_however_it_is_turned(tmp_path):
    """The file lies on its side and says so by EXIF; records made on either form find theirs, and no other."""
    path, exif = tmp_path / "image.png", Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(IMAGE).save(path, exif=exif)
    for image in (IMAGE, np.rot90(IMAGE, -1)):
        text = state_to_json(run([box(10, 10, 60, 60)], image=image), str(path))
        np.testing.assert_array_equal(replay(text).image, image)
        np.testing.assert_array_equal(read_source(text, path), image)
    square = np.full((90, 90, 3), 7, np.uint8)
    for changed in (255 - IMAGE, IMAGE[:, :-1], np.rot90(IMAGE, 2), square):
        Image.fromarray(np.ascontiguousarray(changed)).save(path, exif=exif)
        refused(r"image\.png is not the picture that the record was made on", replay, text)
    path.unlink()
    refused(r"image\.png is missing", replay, text)


def test_a_last_turn_and_a_refused_view_that_came_from_outside_are_stored():
    state = run([box(10, 10, 60, 60)], image=IMAGE)
    state = apply_reply(state, refuse_view(propose(state, render_call(Zoom((0, 0, 50, 50))))), None, last=True)
    assert state.turns[-1].error.reason == "no_room" and state.turns[-1].observation.text.endswith("best mask 1.")
    same_states(state, replay(state_to_json(state), IMAGE))
    state = apply_reply(state, propose(state, "no call"), None)
    assert state.turns[-1].last and not state.last
    same_states(abort(state, Status.MAX_CONTEXT), replay(state_to_json(abort(state, Status.MAX_CONTEXT)), IMAGE))


def test_a_record_that_does_not_fit_is_a_data_error():
    text = state_to_json(run([box(10, 10, 60, 60), Finish(1)], image=IMAGE))
    record = json.loads(text)
    refused("image of", replay, text, make_image(91, 130))
    refused("has changed", replay, json.dumps({**record, "status": "max_turns"}), IMAGE)
    refused("version 9", replay, json.dumps({**record, "version": 9}), IMAGE)
    for bad in ("", "[]", "{}", json.dumps({**record, "turns": 3}), json.dumps({**record, "limits": {"x": 1}})):
        refused(".", replay, bad, IMAGE)
    record["turns"][0]["reply"]["score"] = None
    del record["turns"][0]["reply"]["mask"]
    refused("KeyError", replay, json.dumps(record), IMAGE)
    refused(".", replay, text)  # no path was stored
