"""The curve over turns of one run equals runs with so many turns, and the best mask so far by hand.

The policy is not told which turn is its last.
"""

import dataclasses

import pytest
from agent_fakes import DiscSegmenter

from rsagent_jax.config.schema import MetricConfig
from rsagent_jax.evals import metrics
from rsagent_jax.rollout.driver import Driver
from rsagent_jax.rollout.policy import TextPolicy
from rsagent_jax.types import Status
from sam_bridge.types import FailureKind
from tests.rollout import small

# The truth of every sample is a disc of radius 14 in the middle (56, 56).
SCRIPTS = {
    "s0": [small.click(80, 56), small.click(56, 56), small.click(30, 30), small.finish(2)],  # better, then worse
    "s1": [small.zoom(20, 20, 90, 80), "nonsense", small.click(50, 40), small.finish(1)],  # no mask for two turns
    "s2": [small.finish(None)],
    "s3": [small.click(56, 56), small.click(56, 50), small.finish(1)],  # its tool breaks in the second turn
}


def play(max_turns, rules=metrics.LISA):
    found = []
    for i, name in enumerate(SCRIPTS):
        fail = [None, FailureKind.INTERNAL] if name == "s3" else None
        agent = dataclasses.replace(small.AGENT, max_turns=max_turns, announce_last=False)
        policy = TextPolicy(small.scripted(SCRIPTS), small.processor())
        ((t, _),) = Driver(policy, DiscSegmenter(14.0, fail=fail), small.processor(), agent).run([small.task(i)])
        found.append((metrics.count(t, small.sample(i)), metrics.mask_pixels(t, small.sample(i))))
    return found


@pytest.mark.parametrize("rules", [metrics.LISA, MetricConfig(ending_policy="zero", failure_policy="dropped")])
def test_a_row_of_the_curve_is_a_run_with_so_many_turns(rules):
    rows = metrics.turn_curve(play(8), rules, 5)
    for row in rows:
        totals = metrics.total_results([metrics.judge(c, rules) for c, _ in play(row["turns"])])
        assert (row["giou"], row["ciou"], row["n"]) == (totals.giou, totals.ciou, totals.n)
    assert [row["turns"] for row in rows] == [1, 2, 3, 4, 5]
    assert len({row["giou"] for row in rows[:4]}) > 1 and rows[3]["giou"] == rows[4]["giou"]
    if rules.failure_policy == "dropped":
        assert [row["n"] for row in rows] == [4, 3, 3, 3, 3]  # a tool broke in the second turn
    assert [row["ended"] for row in rows] == [0.25, 0.5, 0.5, 1.0, 1.0]


def test_the_best_mask_so_far_is_an_oracles_choice():
    found = play(8)
    single = [found[0]]
    rows = metrics.turn_curve(single, metrics.LISA, 4)
    assert rows[1]["giou"] == rows[3]["giou"] == pytest.approx(1.0) and rows[2]["giou"] < 0.1
    assert [round(row["oracle_best_giou"], 6) for row in rows] == [round(rows[0]["giou"], 6), 1.0, 1.0, 1.0]
    counts, masks = found[3]
    assert metrics.end_after(counts, masks, 1).status is Status.MAX_TURNS and counts.status is Status.ENV_FAILED
    broken = metrics.turn_curve([found[3]], metrics.LISA, 2)
    assert broken[0]["giou"] > 0.9 and broken[1]["giou"] == broken[1]["oracle_best_giou"] == 0.0
