"""What is known of an array is never that of other pixels; and a mask is made into RLE once, wherever it goes."""

import dataclasses
import gc
import json

import numpy as np
import pytest
from pycocotools import mask as coco

from rsagent_jax.agent import environment, replay
from rsagent_jax.agent.views import PixelLimits
from rsagent_jax.config.schema import AgentConfig
from rsagent_jax.masks import encode_rle
from rsagent_jax.types import Sample
from sam_bridge import frozen, local, rle, wire
from sam_bridge.backends import PackedMask
from sam_bridge.frozen import freeze, remember
from sam_bridge.local import LocalSegmenter, image_hash
from tests.sam_bridge.fakes import BOX


@pytest.fixture
def count(monkeypatch):
    """count(module, name) -> a list that grows with every call of that function."""

    def counted(module, name: str) -> list:
        calls, work = [], getattr(module, name)
        monkeypatch.setattr(module, name, lambda *arguments: calls.append(1) or work(*arguments))
        return calls

    return counted


def test_a_frozen_array_cannot_be_changed_and_is_known_once(image, count):
    source = image.copy()
    kept, hashes = freeze(source), count(local, "_hash")
    source[:] = 0  # the caller's own stays the caller's
    np.testing.assert_array_equal(kept, image)
    assert freeze(kept) is kept
    assert [image_hash(kept) for _ in range(3)] == 3 * [image_hash(image)] and len(hashes) == 2
    for view in (kept, kept[:], kept.view(), np.frombuffer(kept.base, np.uint8)):
        with pytest.raises(ValueError, match="WRITEABLE"):
            view.flags.writeable = True
    np.testing.assert_array_equal(freeze(np.asfortranarray(image)), image)


def test_what_is_known_is_of_that_array_in_that_shape_alone(image):
    kept = freeze(image)
    assert image_hash(kept[::-1]) == image_hash(image[::-1].copy()) != image_hash(kept)
    readonly = image.copy()
    readonly.flags.writeable = False  # the flag is no promise
    before = image_hash(readonly)
    readonly.flags.writeable = True
    readonly[0, 0, 0] ^= 1
    assert image_hash(readonly) != before
    kept.shape = (image.shape[1], image.shape[0], 3)
    assert image_hash(kept) == image_hash(image.reshape(kept.shape)) != image_hash(image)


def test_nothing_is_known_of_the_dead():
    kept = freeze(np.zeros((4, 4), bool))
    name = id(kept)
    assert remember(kept, "n", np.size) == 16 and name in frozen._KNOWN
    del kept
    gc.collect()
    assert name not in frozen._KNOWN


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (480, 640), (333, 97)])
def test_masks_cross_as_bits_or_as_rle(shape):
    mask = np.random.default_rng(0).random(shape) > 0.5
    for packed in (False, True):
        data = wire.mask_to_bytes(mask, packed)
        assert wire.mask_to_bytes(PackedMask.of(mask), packed) == data
        back = wire.mask_from_bytes(data, shape, packed)
        np.testing.assert_array_equal(back, mask)
        assert back.dtype == bool and rle.encode_mask(back) == coco.encode(np.asfortranarray(mask, np.uint8))["counts"]
    with pytest.raises(ValueError, match="not the bits"):
        wire.mask_from_bytes(data + b"\0", shape, True)


@pytest.mark.parametrize("far", [False, True])
def test_from_the_back_end_to_the_record_rle_is_made_once_and_read_at_most_once(
    fake, serve, connect, image, count, far
):
    client = connect(serve(LocalSegmenter(fake())).address)
    client.slots[0].packed = not far  # as from another machine
    hashes, made, read = count(local, "_hash"), count(rle, "_encode"), count(wire, "decode_mask")
    sample = Sample("1", image, "the disc", np.zeros(image.shape[:2], bool))
    state = environment.reset(sample.image, sample.query, AgentConfig(), PixelLimits(56 * 56, 448 * 448))
    box = [int(v) for v in BOX.box]
    for more in (0, 1):
        call = {"name": "segment", "arguments": {"box": [*box[:3], box[3] + more]}}
        proposal = environment.propose(state, f"<think>.</think>\n<tool_call>{json.dumps(call)}</tool_call>")
        reply = environment.run_tool(client, state, proposal)
        state = environment.apply_reply(state, proposal, reply)
    masks = [record.mask for record in state.masks]
    assert len(masks) == 2 and len(made) == (2 if far else 0)
    record = json.loads(replay.state_to_json(dataclasses.replace(state)))
    final = encode_rle(environment.final_mask(state)[0])
    assert [turn["reply"]["mask"] for turn in record["turns"]][-1] == final
    np.testing.assert_array_equal(coco.decode(final | {"counts": final["counts"].encode()}), masks[-1])
    assert len(made) == 2 and len(read) == (2 if far else 0)
    assert len(hashes) == 2  # of the caller, and of the side-car that looks whether the picture is what it says
