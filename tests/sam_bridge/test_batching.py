"""Lane: what waits goes together, kinds take turns, a bad item fails alone."""

import concurrent.futures
import contextlib
import threading

import pytest

from sam_bridge.batching import Lane
from tests.sam_bridge.fakes import until


@contextlib.contextmanager
def crowd(work, calls, **largest):
    """(lane, futures of the calls (kind, item), what releases the first); they come in order behind the first, which
    holds the lane; `work` gets each batch, `largest` is the bound of each kind."""
    release = threading.Event()

    def held(items):
        if items == [calls[0][1]]:
            assert release.wait(60)
        return work(items)

    lane = Lane("t", {kind: (held, size) for kind, size in largest.items()})
    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        futures = []
        for n, (kind, item) in enumerate(calls, start=1):
            futures.append(pool.submit(lane.call, kind, item))
            # The first must be at work before the second comes, or they would go together.
            until(lambda n=n: lane.load >= n and lane._busy)
        yield lane, futures, release
        lane.close()


def noted(seen: list):
    return lambda items: (seen.append(list(items)), [item.upper() for item in items])[1]


def test_what_waits_goes_together_in_order_and_within_the_bound():
    seen = []
    with crowd(noted(seen), [("a", "first"), *(("a", c) for c in "vwxyz")], a=3) as (lane, futures, release):
        release.set()
        assert [f.result(60) for f in futures] == ["FIRST", *"VWXYZ"]
        assert lane.batches["a"] == 3 and lane.items["a"] == 6
    assert seen == [["first"], ["v", "w", "x"], ["y", "z"]]


def test_kinds_take_turns():
    seen = []
    calls = [("long", "first"), ("long", "l1"), ("long", "l2"), ("short", "s1"), ("short", "s2"), ("short", "s3")]
    with crowd(noted(seen), calls, long=1, short=2) as (_, futures, release):
        release.set()
        concurrent.futures.wait(futures, 60)
    assert seen == [["first"], ["s1", "s2"], ["l1"], ["s3"], ["l2"]]


def test_a_bad_item_fails_alone():
    def work(items):
        if 3 in items:
            raise ValueError("three")
        return [10 * item for item in items]

    with crowd(work, [("a", n) for n in (0, 2, 3, 4)], a=8) as (_, futures, release):
        release.set()
        assert [futures[k].result(60) for k in (0, 1, 3)] == [0, 20, 40]
        with pytest.raises(ValueError, match="three"):
            futures[2].result(60)


def test_closing_fails_what_waits_and_refuses_more():
    with crowd(noted([]), [("a", "first"), ("a", "later")], a=1) as (lane, (running, waiting), release):
        closing = threading.Thread(target=lane.close)
        closing.start()
        with pytest.raises(RuntimeError, match="closed"):
            waiting.result(60)
        release.set()
        assert running.result(60) == "FIRST"
        closing.join(60)
        with pytest.raises(RuntimeError, match="closed"):
            lane.call("a", "x")
