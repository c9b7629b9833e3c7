"""Every convention that differs between papers, by hand arithmetic on ten pixels."""

import json

import numpy as np
import pytest

from rsagent_jax.config.schema import MetricConfig
from rsagent_jax.evals.metrics import count, judge, other_conventions, summarize_results, turn_curve
from rsagent_jax.report.evaluation import what_failed
from rsagent_jax.types import Status
from tests.evals.test_metrics import sample, score, trajectory
from tests.refusals import refused


def pixels(*places, size=10):
    """bool[1, size], True at these places."""
    out = np.zeros((1, size), bool)
    out[0, list(places)] = True
    return out


def rules(**changes):
    return MetricConfig(**{"epsilon": 0.0, "failure_policy": "zero"} | changes)


TRUTH, IGNORED, SAID = pixels(0, 1, 2, 3), pixels(4, 5), pixels(2, 3, 4, 8)


@pytest.mark.parametrize(
    ("policy", "intersection", "union"),
    [
        ("excluded", 2, 5),  # truth 0123, prediction 238 without the ignored 4: both 23, either 01238
        ("target", 3, 7),  # truth 012345: both 234, either 0123458
        ("background", 2, 6),  # truth 0123, prediction 2348: both 23, either 012348
    ],
)
def test_ignored_pixels(policy, intersection, union):
    result = score(trajectory(SAID), sample(TRUTH, IGNORED), rules(ignore_policy=policy))
    assert (result.intersection, result.union) == (intersection, union)
    assert result.iou == intersection / union
    assert score(trajectory(SAID), sample(TRUTH), rules(ignore_policy=policy)).union == 6  # nothing is ignored


def test_empty_unions():
    nothing = pixels()
    for policy, iou, dropped in [("one", 1.0, None), ("zero", 0.0, None), ("dropped", 0.0, "empty")]:
        result = score(trajectory(nothing), sample(nothing), rules(empty_policy=policy))
        assert (result.iou, result.dropped, result.no_target, result.said_empty) == (iou, dropped, True, True)
        # a wrong mask where nothing is meant is 0 under all of them
        wrong = score(trajectory(SAID), sample(nothing), rules(empty_policy=policy))
        assert (wrong.iou, wrong.union, wrong.dropped, wrong.said_empty) == (0.0, 4, None, False)


def test_failures_and_endings():
    broken = trajectory(TRUTH, Status.ENV_FAILED)
    lost = score(broken, sample(TRUTH, pixels(3, 4)), rules())  # three of the truth are not ignored
    assert (lost.iou, lost.intersection, lost.union, lost.dropped) == (0.0, 0, 3, None)
    assert (lost.turns, lost.tool_errors) == (3, 1)
    assert score(broken, sample(TRUTH), rules(failure_policy="dropped")).dropped == "failure"
    for status in (Status.MAX_TURNS, Status.MAX_CONTEXT, Status.INVALID, Status.REPEATED):
        late = trajectory(TRUTH, status)
        assert score(late, sample(TRUTH), rules()).iou == 1.0
        unjudged = score(late, sample(TRUTH), rules(ending_policy="zero"))
        assert (unjudged.iou, unjudged.intersection, unjudged.union, unjudged.said_empty) == (0.0, 0, 4, False)
    assert score(trajectory(TRUTH), sample(TRUTH), rules(ending_policy="zero")).iou == 1.0
    lucky = trajectory(pixels(), Status.INVALID)  # an empty mask that nobody committed, where nothing is meant
    assert score(lucky, sample(pixels()), rules()).iou == 1.0
    assert score(lucky, sample(pixels()), rules(ending_policy="zero")).iou == 0.0


@pytest.mark.parametrize("status", [Status.ENV_FAILED, Status.POLICY_FAILED])
def test_a_failure_is_right_in_nothing_whatever_its_latest_mask(status):
    """Three samples: an absent target, failed before any mask; one that is there, failed with the right mask; one that
    is there and found."""
    nothing, some = pixels(), pixels(0, 1)
    cases = [("a", nothing, nothing, status), ("b", some, some, status), ("c", some, some, Status.FINISHED)]
    counts = [count(trajectory(said, s, i), sample(gt, id=i)) for i, gt, said, s in cases]
    results = [judge(c, rules()) for c in counts]
    assert [(r.iou, r.said_empty, r.intersection, r.union) for r in results[:2]] == [(0, False, 0, 0), (0, False, 0, 2)]
    zero = summarize_results(results, {}, benchmark="toy")
    assert (zero["giou"], zero["ciou"], zero["n_acc"], zero["t_acc"]) == (1 / 3, pytest.approx(2 / 4), 0, 1 / 2)
    assert what_failed(zero | {"segmenter_failures": {"its kind": 2}}) == "failed: its kind 2, tool errors 3"  # once
    dropped = [judge(c, rules(failure_policy="dropped")) for c in counts]
    summary = summarize_results(dropped, {}, benchmark="toy")
    assert (summary["n"], summary["giou"], summary["dropped"]["failure"]) == (1, 1.0, 2) and "n_acc" not in summary
    refusing = [judge(c, MetricConfig()) for c in counts]
    refused(f"2 of 3 samples are not measured .{status} 2", summarize_results, refusing, {}, benchmark="toy")
    right = [(counts[1], [(1, dict.fromkeys(counts[1].pixels, (2, 2, 2)))])]
    assert turn_curve(right, rules(), 3)[-1]["oracle_best_giou"] == 0.0


def test_epsilon_and_small_predictions():
    assert score(trajectory(SAID), sample(TRUTH)).iou == 2 / (6 + 1e-5)
    assert score(trajectory(SAID), sample(TRUTH), rules()).iou == 2 / 6
    assert score(trajectory(SAID), sample(TRUTH), rules(empty_below=4)).intersection == 2  # four are not fewer
    small = score(trajectory(SAID), sample(TRUTH), rules(empty_below=5))
    assert (small.intersection, small.union, small.said_empty) == (0, 4, True)
    assert score(trajectory(SAID), sample(pixels()), rules(empty_below=5)).iou == 1.0


def test_n_acc_and_t_acc():
    nothing, some = pixels(), pixels(0, 1)
    cases = [
        ("a", nothing, nothing, Status.FINISHED),  # absent, said so
        ("b", nothing, some, Status.FINISHED),  # absent, a mask all the same
        ("c", nothing, nothing, Status.ENV_FAILED),  # absent, failed
        ("d", some, some, Status.FINISHED),  # found
        ("e", some, nothing, Status.FINISHED),  # there, said absent
        ("f", some, pixels(1, 2), Status.FINISHED),  # there, IoU 1/3
        ("g", some, nothing, Status.ENV_FAILED),  # there, failed
    ]
    results = [score(trajectory(said, s, i), sample(gt, id=i), rules()) for i, gt, said, s in cases]
    summary = summarize_results(results, {}, benchmark="toy")
    assert summary["n_acc"] == 1 / 3 and summary["t_acc"] == 2 / 4
    assert summary["giou"] == pytest.approx((1 + 0 + 0 + 1 + 0 + 1 / 3 + 0) / 7)
    assert summary["giou_target"] == pytest.approx((1 + 0 + 1 / 3 + 0) / 4)
    # intersections 0 0 0 2 0 1 0; unions 0 2 0 2 2 3 2
    assert summary["ciou"] == pytest.approx(3 / 11)
    assert "n_acc" not in summarize_results(results[3:], {}, benchmark="toy")
    for policy in ("one", "zero", "dropped"):  # of IoU; who was right is the same
        other = rules(empty_policy=policy)
        results = [score(trajectory(said, s, i), sample(gt, id=i), other) for i, gt, said, s in cases]
        again = summarize_results(results, {}, benchmark="toy")
        assert all(again[key] == summary[key] for key in ("n_acc", "t_acc", "giou_target"))
    stuck = score(trajectory(some, Status.MAX_TURNS, "x"), sample(some, id="x"), rules(ending_policy="zero"))
    unjudged = summarize_results([stuck, results[0]], {}, benchmark="toy")  # what does not end answers nothing
    assert (unjudged["t_acc"], unjudged["giou_target"], unjudged["n_acc"]) == (0.0, 0.0, 1.0)


def test_what_is_dropped_is_counted_and_the_rules_are_saved():
    nothing, some = pixels(), pixels(0, 1)
    dropping = rules(empty_policy="dropped", failure_policy="dropped")
    cases = [("a", nothing, nothing, Status.FINISHED), ("b", some, some, Status.ENV_FAILED)]
    cases += [("c", some, some, Status.FINISHED), ("d", some, pixels(1, 2), Status.MAX_TURNS)]
    counts = [count(trajectory(said, s, i), sample(gt, id=i)) for i, gt, said, s in cases]
    summary = summarize_results([judge(c, dropping) for c in counts], {"metric": {"unit": "sentence"}}, benchmark="toy")
    assert summary["n"] == 2 and summary["dropped"] == {"failure": 1, "empty": 1}
    assert summary["giou"] == pytest.approx((1 + 1 / 3) / 2) and summary["failures"]["env_failed"] == 1
    saved = summary["settings"]["metric"]
    assert saved["unit"] == "sentence" and saved["empty_policy"] == "dropped" and saved["resolution"] == "original"
    others = other_conventions(counts)
    assert set(others) == {"lisa", "seg_zero", "lens"} and json.loads(json.dumps(others)) == others
    # LISA: (1 + 0 + 2/2.00001 + 1/3.00001) / 4; Seg-Zero: only c and d
    assert others["lisa"]["giou"] == pytest.approx((1 + 0 + 1 + 1 / 3) / 4, abs=1e-5)
    assert others["seg_zero"]["giou"] == pytest.approx((1 + 1 / 3) / 2) and others["seg_zero"]["n"] == 2
    lost = [judge(c, dropping) for c in counts[:2]]
    refused("the rules drop all of its 2 samples", summarize_results, lost, {}, benchmark="toy")
