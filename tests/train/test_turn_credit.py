"""Credit by turn against hand arithmetic."""

import dataclasses

import numpy as np

from rsagent_jax.agent.tools import Finish, Segment
from rsagent_jax.config.reward import DEFAULT_REWARD, RewardGroup, RewardTerm
from rsagent_jax.rewards import RewardError, make_scorer
from rsagent_jax.train.advantages import mean_only
from rsagent_jax.train.rollouts import Rollouts
from rsagent_jax.train.turn_credit import by_token, cut_after, earned_by_turn, rewards_to_go
from rsagent_jax.types import MaskRecord, Reward, Sample, Status, Turn
from tests.rollout.small import trajectory
from tests.train.played import nothing_new, sample, source

GT = np.zeros((2, 10), bool)
GT[:, :5] = True  # 10 pixels
SAMPLE = Sample("s0", np.zeros((2, 10, 3), np.uint8), "q", GT)
PROCESS = next(group for group in DEFAULT_REWARD if group.name == "process")


WAITS = """import asyncio

asked = []
async def waits(trajectory, sample):
    asked.append(trajectory)
    while len(asked) < 8:
        await asyncio.sleep(0.01)
    if trajectory.final_mask[0, 9]:
        raise ValueError("the rim")
    return float(trajectory.final_mask.sum())
"""


NO_VALUE = """
def no_value(trajectory, sample):
    if not trajectory.turns and trajectory.loss_mask.sum() == 9:
        raise ValueError("no turn")
    return float(trajectory.final_mask.sum())
"""


def columns(*numbers: int) -> np.ndarray:
    mask = np.zeros_like(GT)
    mask[:, list(numbers)] = True
    return mask


def two_masks():
    """IoU 0.4, then 0.8, then finish with the first one: 0.4."""
    call = Segment(points=((1.0, 1.0),), labels=(1,))
    masks = MaskRecord(1, columns(0, 1), 0.5, ""), MaskRecord(2, columns(0, 1, 2, 3), 0.5, "")
    other = Segment(points=((3.0, 1.0),), labels=(1,))
    turns = (
        Turn("", call, None, None, mask_id=1),
        Turn("", other, None, None, mask_id=2),
        Turn("", Finish(1), None, None),
    )
    whole = trajectory(0, 3)
    return dataclasses.replace(whole, turns=turns, masks=masks, final_mask=masks[0].mask, final_mask_id=1)


def test_what_each_turn_earned_of_the_default_process_group_by_hand():
    # iou_gain 0.4, then 0.4, then 0; a call costs 0.02, twice; the first call makes the share of news 1, worth 0.1;
    # overshoot: finishing with the worse mask loses 0.4. All times the group's 0.5.
    whole = two_masks()
    (earned,) = earned_by_turn(make_scorer([PROCESS]), [(whole, SAMPLE)])
    np.testing.assert_allclose(earned, 0.5 * np.array([0.4 - 0.02 + 0.1, 0.4 - 0.02, -0.4]), atol=1e-12)
    # a group's clip is that of its sum so far: 0.48 is cut to 0.4, the second call adds nothing, the third -0.0
    clipped = dataclasses.replace(PROCESS, clip=(-1.0, 0.4))
    (earned,) = earned_by_turn(make_scorer([clipped]), [(whole, SAMPLE)])
    np.testing.assert_allclose(earned, [0.2, 0.0, 0.0], atol=1e-12)


def test_the_parts_add_up_to_the_reward_and_shorter_ones_are_those_that_a_limit_would_have_left():
    whole, score = two_masks(), make_scorer([RewardGroup("x", 2.0, (RewardTerm("rsagent_jax.rewards:final_iou"),))])
    earned, of_none = earned_by_turn(score, [(whole, SAMPLE), (cut_after(whole, 0), SAMPLE)])
    np.testing.assert_allclose(earned, [0.8, 0.8, -0.8])  # 2 * (0.4, 0.8, 0.4)
    one = cut_after(whole, 1)
    assert (len(one.turns), [m.id for m in one.masks], one.status) == (1, [1], Status.MAX_TURNS)
    assert one.final_mask_id == 1 and not cut_after(whole, 0).final_mask.any()
    assert len(of_none) == 0


def test_terms_that_wait_do_so_side_by_side_and_an_error_is_its_trajectorys(tmp_path):
    """Two trajectories of three turns each: eight values, all of them asked for before the first is there."""
    (tmp_path / "waits_for_all.py").write_text(WAITS)
    term = RewardTerm(f"{tmp_path}/waits_for_all.py:waits", deadline_s=60.0)
    whole, other = two_masks(), dataclasses.replace(two_masks(), final_mask=columns(9))
    score = make_scorer([RewardGroup("x", 1.0, (term,))])
    earned, error = earned_by_turn(score, [(whole, SAMPLE), (other, SAMPLE)])
    assert earned.tolist() == [4.0, 4.0, -4.0]  # pixels
    assert isinstance(error, RewardError) and "the rim" in str(error)


def test_a_trajectory_that_has_no_value_of_a_turn_is_dropped(tmp_path):
    (tmp_path / "no_first_turn.py").write_text(NO_VALUE)
    group = RewardGroup("x", 1.0, (RewardTerm(f"{tmp_path}/no_first_turn.py:no_value"),))
    played = [trajectory(0, 20), trajectory(0, 10, n=9), trajectory(0, 14)]
    s = source([played], reward=(group,), turn_credit=("x",), on_reward_error="drop")
    _, metrics = s.next(nothing_new, None)
    assert metrics["reward_failed"] == 1 / 3 and [j.reward is None for j in s.judged] == [False, True, False]
    assert [len(j.advantage) for j in s.judged] == [len(t.tokens) for t in played] and s.judged[0].advantage[-1] > 0


def test_rewards_to_go_and_advantages_by_hand():
    """A group of three with whole rewards 3, 1, 2: of 3, 1 and 0 turns, of which some earned their part."""
    earned = [np.array([0.5, 1.0, 0.25]), np.array([0.5]), np.zeros(0)]
    values = rewards_to_go(np.array([[3.0, 1.0, 2.0]]), earned)
    # The second stopped after its turn: from turn 2 on it stands for what stopping was worth, 1 - 0.5.
    np.testing.assert_allclose(values[0], [[3.0, 2.5, 1.5], [1.0, 0.5, 0.5], [2.0, 2.0, 2.0]])
    valid = np.ones((1, 3), bool)
    advantages = np.stack([mean_only(values[..., t], valid) for t in range(3)], -1)
    np.testing.assert_allclose(advantages[0, 0], [1.0, 2.5 - 5 / 3, 1.5 - 4 / 3], rtol=1e-6)
    mask = np.array([0, 1, 1, 0, 0, 1, 0, 1, 1], bool)
    np.testing.assert_array_equal(by_token(np.float32([1, 2, 3]), mask), [0, 1, 1, 0, 0, 2, 0, 3, 3])
    np.testing.assert_array_equal(by_token(np.float32([4]), mask), 4.0 * mask)


def test_without_credit_by_turn_a_trajectory_has_one_value():
    assert rewards_to_go(np.array([[3.0, 1.0]]), [np.zeros(0)] * 2).tolist() == [[[3.0], [1.0]]]


def test_a_turn_without_spread_teaches_nothing_whatever_the_others_do():
    """Whole rewards apart by 0.001, what came after the first turn by 0.3: a z-score makes 0.7 of both."""
    pair = [dataclasses.replace(two_masks(), turns=two_masks().turns[:2])] * 2
    out = Rollouts(2, samples=[sample(0)], outcomes=[(t, None) for t in pair], replaced=np.zeros(1, bool))
    out.rewards = [Reward(0.5, {}), Reward(0.501, {})]
    out.earned = [np.array([0.3, 0.0]), np.array([0.001, 0.0])]  # V_1 = 0.2 and 0.5
    how = dict(advantage="zscore", min_spread=0.05, turn_credit=("final",))
    dropped, kept = source([pair], **how), source([pair], **how, drop_zero_variance=False)
    np.testing.assert_allclose(dropped._advantages(out), [[0, -0.7071], [0, 0.7071]], atol=1e-4)
    np.testing.assert_allclose(kept._advantages(out)[:, 0], [-0.7071, 0.7071], atol=1e-3)
    assert not dropped._flat(out).any()
