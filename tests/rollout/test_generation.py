"""Greedy turns of the engine over four turns that add images, token for token those of transformers' generate."""

import jax
import numpy as np
import pytest

from rsagent_jax.config.schema import SamplingConfig
from rsagent_jax.models.qwen25_vl.positions import mrope_positions
from rsagent_jax.rollout import programs
from rsagent_jax.rollout.engine import Engine
from rsagent_jax.rollout.policy import Request, Task
from rsagent_jax.types import Prompt
from tests.models import tiny
from tests.models.tiny import EOS, IMAGE, SPECIAL

NEW = 7  # tokens sampled a turn
NEVER = [*SPECIAL, EOS]  # a sampled image token would have no image; a turn has NEW tokens
SAMPLING = SamplingConfig(
    temperature=0.0, max_new_tokens=NEW, context=300, slots=4, lanes=2, patches=192, chunk=4, prefill=16
)
UNTIED = tiny.Case("untied", (), seed=14, kv_heads=2, layers=3, mrope_section=(1, 1, 2), fullatt=(1,), gain=3.0)
TIED = tiny.Case("tied", (), seed=15, kv_heads=1, tied=True, fullatt=(0,), gain=3.0)
# images that each turn adds, per slot: contexts of different lengths; slot 1 begins with text only; slot 2 skips turn 1
TURNS = (
    (((1, 8, 8),), (), ((1, 4, 10), (1, 6, 4))),
    (((1, 4, 18),), ((1, 10, 6),), None),
    (((1, 2, 2), (1, 6, 6)), ((1, 6, 8),), ((1, 12, 4),)),
    ((), ((1, 8, 4),), ((1, 4, 4), (1, 2, 6))),
)


def piece(case, turn, slot, grids):
    return tiny.sequence(case, 1000 * case.seed + 10 * turn + slot, grids)


def joined(parts):
    return tiny.Sequence(
        np.concatenate([p.tokens for p in parts]).astype(np.int32),
        np.concatenate([p.patches for p in parts]),
        sum((p.grids for p in parts), ()),
    )


def hf_generate(hf, seq, use_cache=True):
    import torch

    hf.model.rope_deltas = None
    settings = dict(do_sample=False, max_new_tokens=NEW, suppress_tokens=NEVER, pad_token_id=0)
    with torch.no_grad():
        out = hf.generate(**tiny.hf_inputs(seq), use_cache=use_cache, **settings)
    return out[0, len(seq.tokens) :].numpy()


@pytest.fixture
def never(monkeypatch):
    """The engine does not draw NEVER either; it has no such setting."""
    draw = programs.sample_tokens

    def without(logits, *rest):
        return draw(logits.at[:, np.array(NEVER)].set(-1e30), *rest)

    monkeypatch.setattr(programs, "sample_tokens", without)


@pytest.mark.slow
@pytest.mark.parametrize("case", [UNTIED, TIED], ids=lambda case: case.name)
def test_four_turns_that_add_images_are_token_for_token_those_of_transformers(case, never):
    pytest.importorskip("torch")
    pair = tiny.pair(case)
    engine = Engine(pair.ours, SAMPLING, 1 << 20, "float32", jax.random.key(0))
    context, positions = [[] for _ in range(3)], np.zeros(3, int)
    for turn, images in enumerate(TURNS):
        for slot, grids in enumerate(images):
            if grids is None:
                continue
            seq = piece(case, turn, slot, grids)
            context[slot].append(seq)
            place, positions[slot] = mrope_positions(seq.tokens, seq.grids, IMAGE, int(positions[slot]))
            prompt = Prompt(seq.tokens, place, seq.patches, seq.grids)
            engine.submit(Request(slot, prompt, int(positions[slot]), None, Task(None, slot, slot), turn))
        ended = {}
        while len(ended) < sum(grids is not None for grids in images):
            ended |= dict(engine.step())
        for slot, done in ended.items():
            whole = joined(context[slot])
            assert np.array_equal(done.tokens, hf_generate(pair.hf, whole)), (turn, slot)
            context[slot].append(tiny.Sequence(done.tokens, whole.patches[:0], ()))
            positions[slot] += NEW
            logits = tiny.hf_logits(pair.hf, joined(context[slot]))[-NEW - 1 : -1].astype(np.float64)
            logits[:, NEVER] = -np.inf  # out of what both draw from
            margins = np.diff(np.sort(logits, -1)[:, -2:])
            assert margins.min() > 1e-4, "two tokens are nearly tied: take another seed, this one would prove nothing"
            logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            assert np.abs(logp[np.arange(NEW), done.tokens] - done.logprobs).max() <= 1e-4
    assert [engine.used[s].length for s in range(3)] == [sum(len(p.tokens) for p in parts) for parts in context]
