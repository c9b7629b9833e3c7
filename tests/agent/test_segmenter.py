"""The config's segmenter: opened, counted, and refused in one line."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from rsagent_jax.agent import segmenter
from rsagent_jax.agent.segmenter import counters, open_segmenter
from rsagent_jax.config.schema import SegmenterConfig
from rsagent_jax.types import DataError
from sam_bridge.types import SegmentRequest

IMAGE = np.zeros((20, 30, 3), np.uint8)
IMAGE[5:15, 5:15] = (200, 30, 30)
BOX = SegmentRequest(box=(5.0, 5.0, 15.0, 15.0))


def test_all_modes_give_the_same_mask_and_count():
    masks = {}
    with open_segmenter(SegmenterConfig(mode="inprocess")) as own:
        masks["inprocess"] = own.segment(IMAGE, BOX).mask
        assert counters(own)["segmenter/encodes"] == 1
    with open_segmenter(SegmenterConfig(mode="spawn")) as spawned:
        masks["spawn"] = spawned.segment(IMAGE, BOX).mask
        address = spawned.slots[0].address
        assert counters(spawned)["segmenter/calls"] == 1 and counters(spawned)["segmenter/restarts"] == 0
        with open_segmenter(SegmenterConfig(mode="connect", addresses=(address,))) as connected:
            masks["connect"] = connected.segment(IMAGE, BOX).mask
    for mask in masks.values():
        np.testing.assert_array_equal(mask, masks["inprocess"])
    assert counters(object()) == {} == counters(None)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(mode="inprocess", backend="sam2"), "sam2 needs --checkpoint"),
        (dict(mode="inprocess", checkpoint="x.pt"), "checkpoint: only the sam2 back end"),
        (dict(mode="connect", addresses=("127.0.0.1:9",), token_file="/nowhere/token"), "token cannot be read"),
        (dict(mode="connect", addresses=("nowhere",)), "is not host:port"),
    ],
)
def test_what_cannot_be_meant_is_one_line(changes, says):
    config = dataclasses.replace(SegmenterConfig(), **changes)
    with pytest.raises(DataError, match=says) as caught, open_segmenter(config):
        pass
    assert "\n" not in str(caught.value)


def test_a_side_car_that_is_away_is_told_while_it_is_waited_for(capsys, monkeypatch):
    monkeypatch.setattr(segmenter, "PATIENCE_S", 0.01)
    config = SegmenterConfig(mode="connect", addresses=("127.0.0.1:9",), wait_s=1.0)
    with pytest.raises(DataError) as caught, open_segmenter(config):
        pass
    assert capsys.readouterr().out == "waiting up to 1 s for the side-car at 127.0.0.1:9\n"
    said = str(caught.value)
    assert said.startswith("segmenter (connect): unavailable") and "start one: python -m sam_bridge" in said
    assert "grabcut" not in said  # of the config, which does not know what runs there
    assert float(said.rpartition("gave up after ")[2].split()[0]) < 2.0  # wait_s, and one try that was under way
