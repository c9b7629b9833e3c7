"""A step's figures from trajectories that are worked out by hand; what no dump is, is refused."""

import dataclasses
import types

import numpy as np
import pytest

from rsagent_jax.config.schema import BatchConfig, GrpoConfig
from rsagent_jax.runtime.processes import Share
from rsagent_jax.train.judged import Judged, ReplaySource, rollout_figures
from rsagent_jax.types import Sample, Status, Turn
from tests.refusals import refused
from tests.rollout import small

TRUTH = np.arange(16).reshape(4, 4) < 8
SAMPLE = Sample("s0", np.zeros((4, 4, 3), np.uint8), "q", TRUTH)


def covering(pixels: int) -> types.SimpleNamespace:
    """The first so many pixels of the truth: IoU pixels / 8."""
    return types.SimpleNamespace(mask=np.arange(16).reshape(4, 4) < pixels)


def judged(masks: list[int], logprobs: list[float], forced: int, final=-1, status=Status.FINISHED) -> Judged:
    calls = [small.click(1, 1)] * len(masks) + [small.finish(1)]
    mask = np.concatenate([np.zeros(forced, bool), np.ones(len(logprobs), bool)])
    t = dataclasses.replace(
        small.trajectory(0, 1.0),
        status=status,
        turns=tuple(Turn(text, None, None, None) for text in calls),
        masks=tuple(covering(n) for n in masks),
        final_mask=covering(masks[final]).mask,
        tokens=np.zeros(len(mask), np.int32),
        loss_mask=mask,
        logprobs=np.concatenate([np.zeros(forced), logprobs]).astype(np.float32),
    )
    return Judged(SAMPLE, t, None, None, 0.0, True)


def test_figures_of_a_step():
    step = [
        judged([2, 8], [-1.0, -2.0], forced=4),  # first 0.25, recovered
        judged([8, 6], [-3.0, -4.0, -5.0], forced=5),  # 1.0, then 0.75 is committed
        judged([1], [-9.0], forced=9, status=Status.ENV_FAILED),  # measures nothing
    ]
    out = rollout_figures(step)
    assert out["behaviour/first_iou"] == pytest.approx((0.25 + 1.0) / 2, abs=1e-4)
    assert out["behaviour/recovery"] == 1.0 and out["behaviour/harm"] == 0.0 and out["behaviour/calls"] == 2.0
    assert out["best_iou_gap"] == pytest.approx((0.0 + 0.25) / 2, abs=1e-4)
    assert (out["length/mean"], out["length/max"], out["length/sampled"]) == (7.0, 8.0, 2.5)
    assert out["length/turn"] == 5 / 6 and out["entropy/drawn"] == pytest.approx(15 / 5)
    assert rollout_figures([step[2]]) == rollout_figures([]) == {}


def test_a_set_that_is_no_dump_or_teaches_nothing_is_refused(tmp_path):
    stored = small.store(tmp_path / "set", [small.task(0)], {"s0": (small.finish(None),)})
    config = GrpoConfig(batch=BatchConfig(rows=1, tokens=400, patches=128))
    source = ReplaySource(config, str(stored), small.processor(), Share())
    refused("record 0 has no log-probs and advantage; give a directory that grpo.dump_every wrote", source.next, *"ab")
    refused("holds no complete set", ReplaySource, config, str(tmp_path), small.processor(), Share())
