"""What a step is filled with: replaced groups, a curriculum, minibatches, advantages scaled over all of it."""

import numpy as np
import pytest

from rsagent_jax.train import batch_source
from rsagent_jax.train.rollouts import Rollouts
from tests.rollout.small import trajectory
from tests.train.played import Samples, iou, nothing_new, source, step_of, trained

FLAT, TEACHES = (15, 15), (20, 10)


def mixed(teach: set[int], count: int = 6):
    """Groups of which those numbered in `teach` have a spread."""
    return [[trajectory(i, r) for r in (TEACHES if i in teach else FLAT)] for i in range(count)]


def order_of(count: int, seen: int) -> list[int]:
    s = source(mixed(set(), count), prompts=seen)
    s.next(nothing_new, None)
    return [int(t.sample.id[1:]) for t in s.driver.tasks[::2]]


def test_groups_that_teach_nothing_are_replaced_until_enough_teach():
    a, b, c, d, _, f = order_of(6, 6)
    s = source(mixed({a, d, f}), prompts=2, refill=5)
    batches, metrics = s.next(nothing_new, None)
    assert sorted(trained(batches)) == sorted([11 + a, 11 + d])
    # b is replaced by c, c by d, which teaches; e and f are the next step's
    assert [int(t.sample.id[1:]) for t in s.driver.tasks[::2]] == [a, b, c, d] and s.state()["position"] == 4
    assert (metrics["rounds"], metrics["refilled"], metrics["trajectories"]) == (3.0, 2.0, 4.0)
    assert metrics["zero_variance"] == 0.5  # of all that was played
    # numbers as if all had been drawn at once, so a trajectory does not depend on the round that it is played in
    assert [t.uid for t in s.driver.tasks] == list(range(8))
    assert [t.group_id for t in s.driver.tasks] == [0, 0, 1, 1, 2, 2, 3, 3]
    resumed = source(mixed({a, d, f}), prompts=2, refill=5)
    resumed.restore(s.state())
    steps = [again.next(nothing_new, None) for again in (s, resumed)]
    assert trained(steps[0][0]) == trained(steps[1][0]) and len(trained(steps[0][0])) == 2
    numbers = [
        [(t.sample.id, t.group_id, t.uid) for t in tasks] for tasks in (s.driver.tasks[8:], resumed.driver.tasks)
    ]
    assert numbers[0] == numbers[1] and s.state() == resumed.state()


def test_a_replacement_that_cannot_be_read_is_replaced_as_well():
    a, b, c = order_of(3, 3)
    s = source(mixed({c}, 3), Samples(range(3), {b}), prompts=1, refill=2)
    batches, metrics = s.next(nothing_new, None)
    assert list(trained(batches)) == [11 + c] and [int(t.sample.id[1:]) for t in s.driver.tasks[::2]] == [a, c]
    assert (metrics["rounds"], metrics["refilled"], metrics["unreadable"]) == (3.0, 2.0, 1.0)
    assert [t.uid for t in s.driver.tasks] == [0, 1, 4, 5]  # the lost one's numbers stay unused


@pytest.mark.parametrize("drop", [True, False])
def test_what_is_left_after_the_last_round_follows_drop_zero_variance(drop):
    a, b, c, *_ = order_of(6, 6)
    s = source(mixed({a}), prompts=2, refill=1, drop_zero_variance=drop)
    batches, metrics = s.next(nothing_new, None)
    # b was replaced by c and is no part of the step any more
    assert sorted(trained(batches)) == sorted([11 + a] if drop else [11 + a, 11 + c])
    assert (metrics["rounds"], metrics["refilled"]) == (2.0, 1.0)
    full = source(mixed({a, b}), prompts=2, refill=1, drop_zero_variance=drop)
    batches, metrics = full.next(nothing_new, None)
    assert (metrics["rounds"], metrics["refilled"]) == (1.0, 0.0) and len(trained(batches)) == 2


def test_processes_agree_on_the_rounds_and_draw_equally_many(monkeypatch):
    """This one's first group teaches and is all that it needs; another still misses one: both draw again."""
    order = order_of(6, 6)
    teaching = iter([1, 2])  # over both processes, after each round
    s = source(mixed(set(order)), prompts=2, refill=5)
    s.share = s.pipeline.share = batch_source.Share(0, 2)
    total = lambda counts: [next(teaching)] if len(counts) == 1 else counts  # noqa: E731
    monkeypatch.setattr(batch_source, "allgather_sum", total)
    batches, metrics = s.next(nothing_new, None)
    assert [int(t.sample.id[1:]) for t in s.driver.tasks[::2]] == [order[0], order[2]]
    assert [t.uid for t in s.driver.tasks] == [0, 1, 4, 5] and s.state()["position"] == 4
    assert metrics["refilled"] == 2.0 and len(trained(batches)) == 2  # what teaches is never thrown away


def test_figures_of_several_rounds_add_up_or_weigh_by_their_time():
    out = Rollouts(2)
    for seconds, tokens, share in ((1.0, 10.0, 0.5), (3.0, 50.0, 0.1)):
        figures = {"rollout/seconds": seconds, "rollout/decode_tokens": tokens, "rollout/tool_wait": share}
        out.add([], [], 2, figures)
    assert out.metrics() == pytest.approx(
        {"rollout/seconds": 4.0, "rollout/decode_tokens": 60.0, "rollout/tool_wait": 0.2}
    )


def test_a_curriculum_learns_from_what_was_played_and_keeps_it(monkeypatch):
    s = source(mixed({0, 1, 2}, 3), Samples(range(3)), curriculum=0.5)
    _, metrics = s.next(nothing_new, None)
    half = round((iou(20) + iou(10)) / 2, 4)
    assert s.state()["success"] == {f"s{i}": pytest.approx(half, abs=1e-4) for i in range(3)}
    assert metrics["passed_over"] == 0.0
    monkeypatch.setattr(s.prompts, "success", {"s0": 1.0})
    for _ in range(5):
        _, metrics = s.next(nothing_new, None)
    assert metrics["passed_over"] > 0 and s.state()["passed_over"] == metrics["passed_over"]


def test_minibatches_have_equally_many_batches_and_are_alike_in_length():
    """Eight trajectories of 8, 10, … 22 sampled tokens in minibatches of four, of two, and of all."""
    groups = [[trajectory(i, 20, n=8 + 4 * i), trajectory(i, 10, n=10 + 4 * i)] for i in range(4)]
    whole, _ = step_of(groups)
    for count in (2, 4, 8):
        batches, _ = step_of(groups, minibatches=count)
        assert len(batches) % count == 0
        runs = [batches[i : i + len(batches) // count] for i in range(0, len(batches), len(batches) // count)]
        assert [trained_count(run) for run in runs] == [8 // count] * count and trained_count(whole) == 8
        if count == 2:  # dealt out by length: each longer one has the next shorter one over there
            tokens = [sum(int(b.loss_mask.sum()) for b in run) for run in runs]
            assert tokens == [22 + 18 + 14 + 10, 20 + 16 + 12 + 8]
    # too few for nine: one run, which every update takes
    batches, _ = step_of(groups, minibatches=9)
    assert len(batches) == len(whole) < 9
    for a, b in zip(batches, whole, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)


def trained_count(batches) -> int:
    return sum(int(b.segment_ids.max(axis=1).sum()) for b in batches)


def test_advantages_are_scaled_by_the_whole_step_and_over_all_processes(monkeypatch):
    groups = [[trajectory(0, 20), trajectory(0, 10)], [trajectory(1, 14), trajectory(1, 18)]]
    rewards = np.array([[iou(20), iou(10)], [iou(14), iou(18)]])
    centred = rewards - rewards.mean(1, keepdims=True)
    for scale, values in (("rewards", rewards), ("advantages", centred)):
        got = trained(step_of(groups, advantage_scale=scale)[0])
        want = np.sort(centred / np.std(values, ddof=1), axis=1)
        np.testing.assert_allclose([got[11], got[12]], want, atol=2e-5)
    # another process has rewards of 0 and 1 as well
    monkeypatch.setattr(batch_source, "exchange", lambda own: [own, [0.0, 1.0]])
    got = trained(step_of(groups, advantage_scale="rewards")[0])
    std = np.std([*rewards.reshape(-1), 0.0, 1.0], ddof=1)
    np.testing.assert_allclose([got[11], got[12]], np.sort(centred / std, axis=1), atol=2e-5)
