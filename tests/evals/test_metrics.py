"""LISA's metrics by hand, failures, exact merging and bootstrap intervals."""

import json

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from rsagent_jax.evals import metrics
from rsagent_jax.evals.metrics import SampleResult, bootstrap_ci, count, judge, summarize_results, total_results
from rsagent_jax.types import ParseError, Sample, Status, Trajectory, Turn
from tests.refusals import refused


def row(n, size=10):
    """bool[1, size], the first n pixels set."""
    return np.arange(size)[None] < n


def sample(gt, ignore=None, id="s"):
    return Sample(id, np.zeros((*gt.shape, 3), np.uint8), "the row", gt, ignore)


def trajectory(final, status=Status.FINISHED, id="s", turns=3, errors=1):
    turns = tuple(Turn("", None, ParseError("bad_json", "…") if i < errors else None, None) for i in range(turns))
    return Trajectory(id, 0, "the row", turns, (), final, None, status, *(np.zeros(0),) * 5, ())


def score(played, truth, rules=metrics.LISA):
    return judge(count(played, truth), rules)


def result(id, intersection, union, status=Status.FINISHED, turns=1, tool_errors=0):
    return SampleResult(id, intersection, union, status, turns, tool_errors)


def lisa(pairs):
    """LISA's `intersectionAndUnionGPU` and `validate`, transcribed to numpy. Pairs of output 0/1, target 0/1/255."""
    inter_sum, union_sum, acc_iou = np.zeros(2), np.zeros(2), np.zeros(2)
    for output, target in pairs:
        output, target = output.reshape(-1).astype(np.int64), target.reshape(-1).astype(np.int64)
        output[target == 255] = 255
        histogram = lambda x: np.histogram(x, bins=[0, 1, 2])[0] if len(x) else np.zeros(2)  # noqa: E731
        # numpy's last bin is closed, torch.histc(min=0, max=1) too: 255 is outside both.
        intersection = histogram(output[output == target])
        union = histogram(output) + histogram(target) - intersection
        inter_sum, union_sum = inter_sum + intersection, union_sum + union
        iou = intersection / (union + 1e-5)
        iou[union == 0] += 1.0
        acc_iou += iou
    return (acc_iou / len(pairs))[1], (inter_sum / (union_sum + 1e-10))[1]


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_equal_to_lisa(seed):
    rng = np.random.default_rng(seed)
    results, pairs = [], []
    for _ in range(6):
        shape = tuple(rng.integers(1, 7, 2))
        density = rng.choice([0.0, 0.5, 1.0], 3, p=[0.3, 0.5, 0.2])
        predicted, gt, ignore = (rng.random(shape) < d for d in density)
        results.append(score(trajectory(predicted), sample(gt, ignore)))
        pairs.append((predicted, np.where(ignore, 255, gt)))
    totals = total_results(results)
    np.testing.assert_allclose((totals.giou, totals.ciou), lisa(pairs), atol=1e-12)


def test_wrong_pairings_are_refused():
    with pytest.raises(ValueError, match="scored against sample other"):
        score(trajectory(row(1)), sample(row(1), id="other"))
    with pytest.raises(ValueError, match="masks must be"):
        score(trajectory(row(1, size=9)), sample(row(1)))
    with pytest.raises(ValueError, match="impossible counts"):
        result("a", 3, 2)


def test_summary_by_hand():
    results = [
        result("c", 90, 100, turns=2),
        result("a", 1, 2, Status.MAX_TURNS, turns=8, tool_errors=3),
        result("b", 0, 10, Status.ENV_FAILED, turns=0),
        result("d", 0, 0, turns=2),
    ]
    summary = summarize_results(results, {"weights": "w"}, benchmark="toy")
    # gIoU: (0.9 + 0.5 + 0 + 1) / 4 = 0.6, less the 1e-5; cIoU: 91 / 112.
    assert summary["giou"] == pytest.approx((90 / 100.00001 + 1 / 2.00001 + 0 + 1) / 4, abs=1e-12)
    assert summary["ciou"] == pytest.approx(91 / 112)
    others = ("max_context", "invalid", "repeated", "policy_failed", "cancelled")
    assert summary["failures"] == dict.fromkeys(others, 0) | {"max_turns": 1, "env_failed": 1}
    # 12 turns over 4 samples, 3 of them with an error.
    assert (summary["n"], summary["mean_turns"], summary["tool_error_rate"]) == (4, 3.0, 0.25)
    assert summary["benchmark"] == "toy"
    assert summary["settings"]["weights"] == "w" and summary["settings"]["metric"]["ignore_policy"] == "excluded"
    low, high = summary["giou_ci95"]
    assert 0 <= low < summary["giou"] < high <= 1
    assert json.loads(json.dumps(summary)) == summary
    assert summarize_results(results[::-1], {"weights": "w"}, benchmark="toy") == summary


def test_bad_results():
    refused("no results", summarize_results, [], {}, benchmark="toy")
    refused("'a' has more than one result", summarize_results, [result("a", 1, 2)] * 2, {}, benchmark="toy")


results_strategy = st.lists(
    st.tuples(st.integers(0, 10**9), st.integers(0, 10**9), st.sampled_from(Status), st.integers(0, 8)), max_size=12
).map(lambda xs: [result(str(i), a, a + b, status, turns) for i, (a, b, status, turns) in enumerate(xs)])


@given(results_strategy, st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_totals_are_exact_in_any_order(results, random):
    whole = total_results(results)
    if results:
        assert whole.giou == pytest.approx(np.mean([r.iou for r in results]), abs=1e-12)
    random.shuffle(results)
    assert total_results(results) == whole and whole.n == len(results)


def test_bootstrap_is_seeded_and_has_the_width_of_the_normal_interval():
    values = np.random.default_rng(0).normal(0.6, 0.3, 400)
    low, high = bootstrap_ci(values)
    assert (low, high) == bootstrap_ci(list(values)) != bootstrap_ci(values, seed=1)
    # 2 * 1.96 * 0.3 / sqrt(400) = 0.0588; a bootstrap of 2000 is within a tenth of that.
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert low < values.mean() < high
    assert bootstrap_ci([0.5]) == (0.5, 0.5)
    refused("no results", bootstrap_ci, [])


@pytest.mark.parametrize("sentences", [1, 3])
def test_intervals_of_ratios_are_scipys_and_a_picture_comes_with_all_of_its_sentences(sentences):
    rng = np.random.default_rng(0)
    rows = rng.integers(1, 50, (60, 2)).repeat(sentences, axis=0) + rng.random((60 * sentences, 2))
    names = [f"p{i // sentences:02d}" for i in range(len(rows))]
    sums = rows.reshape(60, sentences, 2).sum(axis=1)
    settings = dict(paired=True, n_resamples=4000, method="percentile", rng=1)
    wanted = scipy.stats.bootstrap(tuple(sums.T), lambda a, b, axis: a.sum(axis) / b.sum(axis), **settings)
    found = metrics.cluster_bootstrap_ci(rows, lambda sums: sums[:, 0] / sums[:, 1], names, n=4000)
    assert found == pytest.approx(tuple(wanted.confidence_interval), abs=0.02)  # they lie 0.4 apart
    # three equal sentences say no more than one, and the order does not matter
    once = bootstrap_ci(sums[:, 0], names[::sentences])
    assert bootstrap_ci(sums[:, 0].repeat(sentences), names) == pytest.approx(once, abs=1e-12)
    assert bootstrap_ci(sums[:, 0]) == pytest.approx(once, abs=1e-12)
    shuffled = rng.permutation(60)
    again = bootstrap_ci(sums[shuffled, 0], [names[::sentences][i] for i in shuffled])
    assert again == pytest.approx(once, abs=1e-12)


def test_results_say_what_they_were_resampled_by():
    results = [result(str(i), i % 7, 7) for i in range(12)]
    by_image = summarize_results(results, {}, benchmark="toy", images={str(i): f"p{i // 3}" for i in range(12)})
    assert (by_image["ci_unit"], by_image["pictures"]) == ("picture", 4)
    alone = summarize_results(results, {}, benchmark="toy")
    assert (alone["ci_unit"], alone["pictures"]) == ("sample", None) and alone["giou"] == by_image["giou"]
