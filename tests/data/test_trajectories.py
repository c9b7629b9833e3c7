"""Stored trajectories come back as the driver made them, and damaged sets are said to be damaged."""

import dataclasses
import functools
import json

import numpy as np
import pytest
from agent_fakes import DiscSegmenter
from hypothesis import given, settings
from hypothesis import strategies as st

from rsagent_jax.agent.environment import opening_observation, reset
from rsagent_jax.agent.views import PixelLimits
from rsagent_jax.config.schema import AgentConfig
from rsagent_jax.data import trajectories
from rsagent_jax.data.npz import pack_record, read_arrays
from rsagent_jax.data.processor import Processor
from rsagent_jax.rollout.driver import Driver
from rsagent_jax.rollout.policy import TextPolicy
from rsagent_jax.types import DataError
from tests.refusals import refused
from tests.rollout import small


@functools.cache
def played():
    """(trajectory, its final state) with a text-only observation among the images."""
    turns = (small.click(30, 40), "nonsense", small.zoom(20, 20, 90, 80), small.finish(1))
    policy = TextPolicy(small.scripted({"s0": turns}), small.processor())
    task = small.task(0, h=96, w=120)  # resized to 84 x 112
    (outcome,) = Driver(policy, DiscSegmenter(), small.processor(), small.AGENT).run([task])
    return outcome


@functools.cache
def record() -> bytes:
    return packed({"id": "s0", "iou": 0.5, "query": "größe"})


def packed(header: dict) -> bytes:
    """Its picture is no file."""
    t, state = played()
    return trajectories.encode_by_reference(state, "", header, t)


def assert_same(item, t):
    for name in ("tokens", "positions", "loss_mask", "patches"):
        np.testing.assert_array_equal(getattr(item, name), getattr(t, name), err_msg=name)
        assert getattr(item, name).dtype == getattr(t, name).dtype, name
    assert item.grids == t.grids and item.advantage == 0.0


def processor(**limits) -> Processor:
    p = small.processor()
    images = dataclasses.replace(p.images, limits=dataclasses.replace(p.images.limits, **limits))
    return Processor(p.tokenizer, images, p.config)


def test_a_record_gives_back_ids_positions_marks_and_bit_equal_patches():
    t, state = played()
    item = trajectories.decode_record(record(), small.processor())
    first = opening_observation(reset(state.image, state.query, state.config, state.limits)).image
    seen = [first] + [x.observation.image for x in t.turns if x.observation and x.observation.image is not None]
    np.testing.assert_equal(trajectories.shown_images(state), seen)
    assert len(seen) == len(t.grids) == 3
    assert_same(item, t)
    np.testing.assert_array_equal(item.logprobs, np.zeros(len(t.tokens), np.float32))
    header = {"id": "s0", "iou": 0.5, "query": "größe"}
    assert trajectories.record_header(record()).items() >= header.items()


@pytest.mark.parametrize(("h", "w"), [(29, 5700), (1400, 7), (40, 100), (96, 120)])
@pytest.mark.parametrize("lowest", [3136, 12544])
def test_a_picture_of_any_shape_is_played_stored_and_read_with_the_same_grids(h, w, lowest):
    """`lowest` 12544 leaves room for squares alone, as the tiny base's limits do."""
    p, turns = processor(min_pixels=lowest), (small.click(w / 2, h / 2), small.zoom(0, 0, 30, 30), small.finish(1))
    policy = TextPolicy(small.scripted({"s0": turns}), p)
    ((t, state),) = Driver(policy, DiscSegmenter(), p, small.AGENT).run([small.task(0, h=h, w=w)])
    assert t.status.value == "finished"
    shown = trajectories.shown_images(state)
    rows, columns = t.grids[0][1:]
    assert shown[0].shape == (14 * rows, 14 * columns, 3)  # the model was given the view, pixel for pixel
    assert_same(trajectories.decode_record(trajectories.encode_by_reference(state, "", {}, t), p), t)


@settings(max_examples=60)
@given(st.floats(0, 1, exclude_max=True))
def test_a_record_cut_anywhere_is_one_data_error(share):
    cut = record()[: int(share * len(record()))]
    refused("cannot be read", trajectories.record_header, cut)
    refused("cannot be read", trajectories.decode_record, cut, small.processor())


@settings(max_examples=100)
@given(st.integers(0, 10**9), st.integers(1, 255))
def test_a_flipped_byte_is_a_data_error_or_harmless(where, change):
    broken = bytearray(record())
    broken[where % len(broken)] ^= change
    try:
        item = trajectories.decode_record(bytes(broken), small.processor())
    except DataError:
        return
    np.testing.assert_array_equal(item.tokens, played()[0].tokens)
    np.testing.assert_array_equal(item.patches, played()[0].patches)


def test_a_record_without_one_of_its_arrays_is_a_data_error():
    whole = read_arrays(record())
    for name in ("tokens", "positions", "sampled", "source"):
        rest = pack_record({}, {key: value for key, value in whole.items() if key != name})
        refused("cannot be read|image tokens", trajectories.decode_record, rest, small.processor())


def test_a_set_made_with_other_image_settings_or_another_vocabulary_is_a_data_error():
    refused("image tokens", trajectories.decode_record, record(), processor(max_pixels=56 * 84))
    config = small.processor().config
    fewer = dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=300))
    small_vocabulary = Processor(small.tokenizer(), small.processor().images, fewer)
    refused("vocabulary", trajectories.decode_record, record(), small_vocabulary)


def write(directory, n=3):
    writer = trajectories.RecordWriter(directory)
    for i in range(n):
        writer.write(packed({"id": f"s{i}"}))
    writer.close({"verdicts": {"kept": n}})


def test_a_written_set_is_read_back_record_by_record(tmp_path):
    write(tmp_path)
    records = trajectories.open_records(tmp_path)
    assert [trajectories.record_header(records[i])["id"] for i in (2, 0, 1)] == ["s2", "s0", "s1"]
    stamp = json.loads((tmp_path / "collect.json").read_text())
    assert stamp == {"records": 3, "verdicts": {"kept": 3}}


COLLECTED = {"agent": {"prompt": "full", "history_size": 384, "max_turns": 8}}
LIMITS = {"factor": 28, "min_pixels": 100, "max_pixels": 9000}


@pytest.mark.parametrize(
    ("agent", "limits", "problem"),
    [
        ({}, {}, None),
        ({"max_turns": 4}, {}, None),  # decides when it ends, not what is shown
        ({"prompt": "brief"}, {}, "agent.prompt: 'full' there, 'brief' here"),
        ({"history_size": 112}, {}, "agent.history_size: 384 there, 112 here"),
        ({}, {"max_pixels": 8000}, "max_pixels: 9000 there, 8000 here"),
        ({}, {"min_pixels": 200}, "min_pixels: 100 there, 200 here"),
    ],
)
def test_a_set_is_refused_where_it_was_collected_with_another_prompt_or_other_sizes(tmp_path, agent, limits, problem):
    """`limits` are those of the weights under the config, on both sides."""
    stamp = {"records": 1, "config": COLLECTED | {"pixel_limits": LIMITS}}
    (tmp_path / "collect.json").write_text(json.dumps(stamp))
    here = (AgentConfig(**agent), PixelLimits(**LIMITS | limits))
    if problem is None:
        trajectories.check_collected(tmp_path, *here)
    else:
        message = refused("was collected with other settings", trajectories.check_collected, tmp_path, *here)
        assert problem in message and str(tmp_path) in message


@pytest.mark.parametrize("stamp", [{}, {"config": {}}, {"config": COLLECTED}])
def test_a_set_that_does_not_say_how_it_was_collected_is_noted(tmp_path, stamp, capsys):
    (tmp_path / "collect.json").write_text(json.dumps(stamp))
    trajectories.check_collected(tmp_path, AgentConfig(), small.processor().images.limits)
    assert f"note: {tmp_path}/collect.json does not say" in capsys.readouterr().out


def test_a_set_that_is_not_complete_is_not_taken_for_one(tmp_path):
    refused("no complete set", trajectories.open_records, tmp_path / "nowhere")
    write(tmp_path)
    writer = trajectories.RecordWriter(tmp_path)  # a second collection into the same place begins, and is interrupted
    writer.write(record())
    writer.writer.close()
    refused(r"collect\.json is missing", trajectories.open_records, tmp_path)


@pytest.mark.parametrize("stamp", ['{"records": 4}', '{"records": 0}', "{", "{}", "[]"])
def test_a_stamp_that_does_not_match_is_a_data_error(tmp_path, stamp):
    write(tmp_path)
    (tmp_path / "collect.json").write_text(stamp)
    refused("collect the set again", trajectories.open_records, tmp_path)


def test_an_empty_set_and_lost_or_cut_shards_are_data_errors(tmp_path):
    write(tmp_path, 0)
    refused("collect the set again", trajectories.open_records, tmp_path)
    write(tmp_path)
    (shard,) = tmp_path.glob("*.array_record")
    content = shard.read_bytes()
    half = content[: len(content) // 2]
    for damaged, says in (half, "cut short"), (b"", "an empty file"), (b"<html>", "an HTML page"):
        shard.write_bytes(damaged)
        says = rf"{shard.name} is not a readable ArrayRecord file: .*{says}.*collect the set"
        refused(says, trajectories.open_records, tmp_path)
    middle = len(content) // 12  # of the first of three records
    shard.write_bytes(content[:middle] + bytes(b ^ 255 for b in content[middle : middle + 8]) + content[middle + 8 :])
    refused("record 0 is damaged", trajectories.open_records(tmp_path).__getitem__, 0)
    shard.unlink()
    refused("collect the set again", trajectories.open_records, tmp_path)
