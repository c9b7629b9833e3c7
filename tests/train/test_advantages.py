"""Group advantages against hand arithmetic, with failed members and groups that carry no signal."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsagent_jax.config.schema import ADVANTAGES
from rsagent_jax.train.advantages import (
    advantage_function,
    group_zscore,
    leave_one_out,
    mean_only,
    scale_by_batch,
    zero_variance,
)

EVERY = {name: advantage_function(name) for name in ADVANTAGES} | {"zscore_ddof0": advantage_function("zscore", 0)}
ALL = np.ones((1, 4), bool)
REWARDS = np.array([[0.0, 1.0, 2.0, 3.0]], np.float32)  # mean 1.5, deviations -1.5 -0.5 0.5 1.5, sum of squares 5


def test_zscore_with_either_ddof():
    # ddof 1: std = sqrt(5 / 3) = 1.290994; ddof 0: sqrt(5 / 4) = 1.118034
    np.testing.assert_allclose(group_zscore(REWARDS, ALL, eps=0.0)[0, 3], 1.5 / 1.290994, rtol=1e-6)
    np.testing.assert_allclose(group_zscore(REWARDS, ALL, ddof=0, eps=0.0)[0, 0], -1.5 / 1.118034, rtol=1e-6)
    # eps is added to the std, not to the variance: 0.5 / (1.118034 + 1)
    np.testing.assert_allclose(EVERY["zscore_ddof0"](REWARDS, ALL)[0, 2], 0.5 / 1.118035, rtol=1e-6)
    np.testing.assert_allclose(group_zscore(REWARDS, ALL, ddof=0, eps=1.0)[0, 2], 0.5 / 2.118034, rtol=1e-6)


def test_mean_only_and_leave_one_out():
    np.testing.assert_allclose(mean_only(REWARDS, ALL), [[-1.5, -0.5, 0.5, 1.5]])
    # Mean of the others: 2, 5/3, 4/3, 1.
    np.testing.assert_allclose(leave_one_out(REWARDS, ALL), [[-2.0, 1 - 5 / 3, 2 - 4 / 3, 2.0]], rtol=1e-6)


def test_the_scale_of_a_whole_step():
    # Rewards 0, 2 and 4, 8, 9 with one that failed. Less their groups' means: -1, 1 and -3, 1, 2 (mean 7).
    rewards = np.array([[0.0, 2.0, np.nan], [4.0, 8.0, 9.0]], np.float32)
    valid = np.array([[True, True, False], [True, True, True]])
    centred = mean_only(rewards, valid)
    # Of the rewards, mean 4.6: deviations -4.6 -2.6 -0.6 3.4 4.4, squares 59.2; ddof 1: sqrt(14.8) = 3.847077.
    # TRL's scale_rewards="batch" adds 1e-4.
    by_rewards = scale_by_batch(centred, rewards[valid], eps=1e-4)
    np.testing.assert_allclose(by_rewards, centred / 3.847177, rtol=1e-6)
    assert by_rewards.dtype == np.float32 and by_rewards[0, 2] == 0
    # Of the advantages, mean 0: squares 16, ddof 0: sqrt(16 / 5) = 1.788854
    by_advantages = scale_by_batch(centred, centred[valid], ddof=0, eps=0.0)
    np.testing.assert_allclose(by_advantages[1], np.array([-3.0, 1.0, 2.0]) / 1.788854, rtol=1e-6)
    assert not scale_by_batch(np.zeros((1, 2), np.float32), np.zeros(0)).any()  # nothing was valid anywhere


@pytest.mark.parametrize("name", EVERY)
def test_a_failed_member_enters_no_statistic(name):
    # Without the failed one: rewards 1, 3, deviations -1, 1. z-score: std sqrt(2) with ddof 1, and 1 with ddof 0.
    # Leave-one-out: 1 - 3 = -2.
    rewards = np.array([[1.0, np.nan, 3.0]], np.float32)
    valid = np.array([[True, False, True]])
    size = {"zscore": 1 / np.sqrt(2), "zscore_ddof0": 1.0, "mean": 1.0, "loo": 2.0}[name]
    result = EVERY[name](rewards, valid)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, [[-size, 0.0, size]], rtol=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_groups_without_signal_are_zero_and_are_named(name):
    # 0.7 has no exact binary form: a mean in fp32 differs from it, and a z-score of that would be of order 1.
    rewards = np.array([[0.7, 0.7, 0.7], [0.7, np.nan, 0.7], [1, 2, 3], [5, 0, 0], [9, 9, 9], [0, 0, 1e-3]], np.float32)
    valid = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]], bool)
    useless = [True, True, False, True, True, False]
    np.testing.assert_array_equal(zero_variance(rewards, valid), useless)
    np.testing.assert_array_equal(zero_variance(rewards, valid, 0.01), [*useless[:5], True])
    np.testing.assert_array_equal(zero_variance(rewards, valid, 2.5), [True] * 6)
    result = EVERY[name](rewards, valid)
    np.testing.assert_array_equal(result[useless], 0.0)
    assert np.all(result[5] != 0)


groups = st.lists(st.floats(-4, 4, width=32), min_size=2, max_size=8)


@given(groups, st.randoms(use_true_random=False), st.floats(-3, 3), st.sampled_from(sorted(EVERY)))
@settings(max_examples=100, deadline=None)
def test_invariances(rewards, random, shift, name):
    rewards = np.array([rewards], np.float64)
    valid = np.array([[random.random() < 0.8 for _ in range(rewards.shape[1])]])
    result = EVERY[name](rewards, valid)
    order = list(range(rewards.shape[1]))
    random.shuffle(order)
    np.testing.assert_allclose(EVERY[name](rewards[:, order], valid[:, order]), result[:, order], atol=1e-6)
    assert abs(result.sum()) < 1e-4
    np.testing.assert_array_equal(result[~valid], 0.0)
    # Whatever a failed member's reward would have been
    np.testing.assert_array_equal(EVERY[name](np.where(valid, rewards, 1e6), valid), result)
    if not zero_variance(rewards, valid).any() and np.ptp(rewards[valid]) > 1e-3:
        np.testing.assert_allclose(EVERY[name](rewards + shift, valid), result, rtol=1e-4, atol=1e-5)
        if name.startswith("zscore"):
            np.testing.assert_allclose(EVERY[name](rewards * 10, valid), result, rtol=1e-2, atol=1e-5)
