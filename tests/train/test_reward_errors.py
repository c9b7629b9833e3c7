"""A trajectory without a reward, where the config says to drop it: no advantage, no mean, counted and said."""

import json

import pytest

from rsagent_jax.config.build import build_config, template
from rsagent_jax.config.reward import RewardGroup, RewardTerm
from rsagent_jax.config.schema import TrainConfig
from rsagent_jax.rewards import RewardError
from rsagent_jax.train import batch_source
from tests.refusals import refused
from tests.rollout.small import trajectory
from tests.train.played import iou, nothing_new, source, step_of, trained

OWN = """from rsagent_jax.rewards import final_iou
def large_only(trajectory, sample):
    if trajectory.final_mask.sum() < 200:
        raise RuntimeError("the judge is away")
    return final_iou(trajectory, sample)
def away(trajectory, sample): raise RuntimeError("the judge is away")
def rank(trajectories, sample):
    sizes = [int(t.final_mask.sum()) for t in trajectories]
    return [float(sorted(sizes).index(size)) for size in sizes]
"""


@pytest.fixture
def term(tmp_path, imports_restored):
    """Makes `grpo.reward` of one function of OWN."""
    (tmp_path / "away_rewards.py").write_text(OWN)
    return lambda name, **more: (RewardGroup("own", 1.0, (RewardTerm(f"{tmp_path}/away_rewards.py:{name}", **more),)),)


def test_it_is_dropped_from_its_group_as_one_of_a_broken_tool(term, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(batch_source, "state_to_json", lambda state, path: json.dumps({"path": path}))
    groups = [[trajectory(0, 20), trajectory(0, 5), trajectory(0, 10)]]  # discs; of radius 5 it has 81 pixels
    s = source(groups, reward=term("large_only"), on_reward_error="drop")
    s.workdir = tmp_path
    batches, metrics = s.next(nothing_new, None)
    half = round((1 - iou(10)) / 2, 5)  # of the two others
    assert trained(batches) == {11: [-half, half]}
    assert metrics["reward"] == pytest.approx((1 + iou(10)) / 2) and metrics["reward_failed"] == pytest.approx(1 / 3)
    assert metrics["giou"] == pytest.approx((1 + iou(10) + iou(5)) / 3)  # it was played and judged all the same
    assert [t["reward"] is None for t in s.examples["trajectories"]] == [False, True, False]
    said = capsys.readouterr().out
    assert "grpo: 1 of 3 trajectories have no reward, such as: reward term own/large_only" in said
    assert "raised RuntimeError for sample s0: " in said and "the judge is away" in said
    assert json.loads((tmp_path / "reward_error.json").read_text()) == {"path": ""}


def test_stop_is_the_default_and_a_sound_step_counts_none(term):
    groups = [[trajectory(0, 20), trajectory(0, 5)]]
    with pytest.raises(RewardError, match="own/large_only .* raised RuntimeError for sample s0"):
        step_of(groups, reward=term("large_only"))
    assert step_of([[trajectory(0, 20), trajectory(0, 10)]])[1]["reward_failed"] == 0.0


def test_a_step_without_any_reward_makes_no_update(term):
    batches, metrics = step_of([[trajectory(0, 20), trajectory(0, 9)]], reward=term("away"), on_reward_error="drop")
    assert batches == [] and metrics["no_update"] == metrics["reward_failed"] == 1.0 and "reward" not in metrics


def test_a_term_of_a_group_ranks_inside_each_sample(term):
    groups = [[trajectory(0, 20), trajectory(0, 10)], [trajectory(1, 14), trajectory(1, 18)]]
    batches, metrics = step_of(groups, reward=term("rank", scope="group"))
    assert trained(batches) == {11: [-0.5, 0.5], 12: [-0.5, 0.5]} and metrics["reward/own/rank"] == 0.5


def test_a_term_of_a_group_has_no_value_by_turn(term):
    config = template(TrainConfig)
    config.policy.weights = "w"
    config.grpo.turn_credit = ("process",)
    config.grpo.reward.process.terms.call_cost.scope = "group"
    refused(r"turn_credit: 'process' has .*call_cost of scope group, which has no value by turn", build_config,
            TrainConfig, config)  # fmt: skip
