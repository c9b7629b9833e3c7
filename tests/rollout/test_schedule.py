"""When the engine appends prompts and when it samples: counted step by step. What a slot samples is the same."""

import dataclasses

import jax
import numpy as np
import pytest

from rsagent_jax.data.processor import image_patches
from rsagent_jax.models.qwen25_vl.config import size_config
from rsagent_jax.rollout.engine import Engine, ladder
from rsagent_jax.rollout.policy import Request
from rsagent_jax.types import Prompt
from tests.rollout import small
from tests.rollout.small import task

PIECE, CHUNK, TURN = 8, 2, 6
LANES, SLOTS = 4, 16  # four neighbours share a lane


@pytest.fixture(scope="module")
def engine():
    settings = dict(slots=SLOTS, lanes=LANES, prefill=PIECE, chunk=CHUNK, max_new_tokens=TURN)
    no_terminator = 1 << 30  # every turn takes all its tokens
    sampling = dataclasses.replace(small.SAMPLING, **settings)
    return Engine(small.model(), sampling, no_terminator, "float32", jax.random.key(0))


def ask(engine, slot: int, tokens: int) -> None:
    """A prompt of words."""
    ids = np.random.default_rng(slot).integers(10, 200, tokens).astype(np.int32)
    positions = np.tile(np.arange(tokens, dtype=np.int32), (3, 1))
    prompt = Prompt(ids, positions, small.processor().no_patches(), ())
    engine.submit(Request(slot, prompt, tokens, None, task(slot), 0))


def step(engine) -> tuple[int, int, list[int]]:
    """(prompt tokens appended, decode steps, slots whose turn ended) of one macro-step."""
    before = engine.stats.copy()
    ended = [slot for slot, _ in engine.step()]
    return *(engine.stats[k] - before[k] for k in ("prefill_tokens", "decode_steps")), ended


def test_sampling_waits_until_no_prompt_is_left(engine):
    engine.begin()
    ask(engine, 0, PIECE - 1)
    ask(engine, 4, 3 * PIECE)
    assert step(engine) == (2 * PIECE - 1, 0, [])  # slot 0 could sample
    assert step(engine) == (PIECE, 0, [])
    tokens, steps, _ = step(engine)
    assert (tokens, steps) == (PIECE, CHUNK)  # the last piece and both slots' first tokens in one call


def test_slots_that_wait_for_their_lane_hold_sampling_back_too(engine):
    engine.begin()
    for slot in (0, 1, 2):
        ask(engine, slot, PIECE)
    assert [step(engine)[:2] for _ in range(3)] == [(PIECE, 0), (PIECE, 0), (PIECE, CHUNK)]


def test_a_few_prompts_wait_while_most_slots_sample(engine):
    engine.begin()
    for slot in (0, 4, 8):
        ask(engine, slot, PIECE)
    ended = step(engine)[2]
    ask(engine, 12, PIECE)
    while not ended:  # three of four sample, and one lane of four has work
        tokens, steps, ended = step(engine)
        assert (tokens, steps) == (0, CHUNK)
    for slot in ended:
        engine.release(slot)
    assert step(engine)[:2] == (PIECE, CHUNK)


def test_prompts_for_most_lanes_wait_for_nobody(engine):
    engine.begin()
    for slot in range(SLOTS):
        if slot % 4 != 3:
            ask(engine, slot, PIECE)
    assert [step(engine)[1] for _ in range(3)] == [0, 0, CHUNK]  # twelve sample
    for slot in (3, 7):
        ask(engine, slot, PIECE)
    assert step(engine)[:2] == (0, CHUNK)
    ask(engine, 11, PIECE)  # still twelve of fifteen sample, but three of four lanes have work
    assert step(engine)[:2] == (3 * PIECE, CHUNK)


def test_every_turn_ends_in_every_order_of_arrival(engine):
    engine.begin()
    rng = np.random.default_rng(0)
    left, ended = list(rng.permutation(SLOTS)), []
    while len(ended) < SLOTS:
        for _ in range(int(rng.integers(0, 4))):
            if left:
                ask(engine, int(left.pop()), int(rng.integers(1, 5 * PIECE)))
        ended += step(engine)[2]
    assert sorted(ended) == list(range(SLOTS)) and not engine.queue and engine.lanes == [None] * LANES


def test_the_ladder_has_a_rung_that_just_holds_an_overlay():
    vision = size_config("7b").vision
    assert ladder(6144, None, vision) == [384, 1536, 6144]
    assert ladder(6144, (1, 28, 28), vision) == [384, 832, 1536, 6144]  # 384 pixels: 784 patches in 13 bins of 64
    assert ladder(1024, (1, 12, 12), vision) == [64, 192, 256, 1024]
    assert ladder(128, (1, 16, 16), vision) == [64, 128]  # larger than a slot takes: no rung


@pytest.mark.parametrize("side", [20, 84, 90, 384])
def test_the_grid_of_a_square_is_that_of_its_patches(side):
    processor = small.processor()
    image = np.zeros((side, side, 3), np.uint8)
    assert processor.square(side) == image_patches(image, processor.images)[1]
