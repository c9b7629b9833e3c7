"""Pixel limits of the config against those of the weights, through the driver."""

import dataclasses

import pytest
from agent_fakes import DiscSegmenter

from rsagent_jax.rollout.driver import Driver
from rsagent_jax.rollout.text_policy import TextPolicy
from rsagent_jax.types import DataError
from tests.rollout import small
from tests.rollout.small import AGENT, finish, scripted, task, zoom


def one(*turns, agent):
    policy = TextPolicy(scripted({"s0": turns}), small.processor())
    return Driver(policy, DiscSegmenter(), small.processor(), agent, workers=2).run([task(0)])[0]


def test_views_larger_than_the_weights_accept_are_refused_since_they_would_be_resized_twice():
    for limits in ({"max_pixels": 448 * 448}, {"min_pixels": 28 * 28}):
        with pytest.raises(DataError, match=next(iter(limits))):
            one(finish(None), agent=dataclasses.replace(AGENT, **limits))


def test_narrower_limits_make_smaller_views_with_matching_patches():
    trajectory, state = one(zoom(0, 0, 60, 60), finish(None), agent=dataclasses.replace(AGENT, max_pixels=84 * 84))
    assert state.view.size_view == (84, 84)
    assert trajectory.grids == ((1, 6, 6), (1, 6, 6))  # 84 / 14 patches a side
