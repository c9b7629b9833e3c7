"""Lane: what waits goes together, kinds take turns, a bad item fails alone."""

from __future__ import annotations

import concurrent.futures
import threading
import time

import pytest

from sam_bridge.batching import Lane


def held(release: threading.Event, seen: list):
    def work(items):
        seen.append(list(items))
        if items == ["first"]:
            assert release.wait(10)
        return [item.upper() for item in items]

    return work


def crowd(lane: Lane, pool, calls: list[tuple[str, str]]) -> list[concurrent.futures.Future]:
    """Submits them in order, behind a first one that holds the lane."""
    futures = []
    for n, (kind, item) in enumerate(calls, start=1):
        futures.append(pool.submit(lane.call, kind, item))
        deadline = time.monotonic() + 5
        # The first must be at work before the second comes, or they would go together.
        while (lane.load < n or not lane._busy) and time.monotonic() < deadline:
            time.sleep(0.001)
    return futures


def test_what_waits_goes_together_in_order_and_within_the_bound():
    seen, release = [], threading.Event()
    lane = Lane("t", {"a": (held(release, seen), 3)})
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        futures = crowd(lane, pool, [("a", "first"), *(("a", c) for c in "vwxyz")])
        release.set()
        assert [f.result(5) for f in futures] == ["FIRST", *"VWXYZ"]
    assert seen == [["first"], ["v", "w", "x"], ["y", "z"]]
    assert lane.batches["a"] == 3 and lane.items["a"] == 6
    lane.close()


def test_kinds_take_turns():
    order, release = [], threading.Event()
    work = held(release, order)
    lane = Lane("t", {"long": (work, 1), "short": (work, 2)})
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        calls = [("long", "first"), ("long", "l1"), ("long", "l2"), ("short", "s1"), ("short", "s2"), ("short", "s3")]
        futures = crowd(lane, pool, calls)
        release.set()
        for future in futures:
            future.result(5)
    assert order == [["first"], ["s1", "s2"], ["l1"], ["s3"], ["l2"]]
    lane.close()


def test_a_bad_item_fails_alone():
    release = threading.Event()

    def work(items):
        if items == [0]:
            assert release.wait(10)
        if 3 in items:
            raise ValueError("three")
        return [10 * item for item in items]

    lane = Lane("t", {"a": (work, 8)})
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        futures = crowd(lane, pool, [("a", n) for n in (0, 2, 3, 4)])
        release.set()
        assert [futures[k].result(5) for k in (0, 1, 3)] == [0, 20, 40]
        with pytest.raises(ValueError, match="three"):
            futures[2].result(5)
    lane.close()


def test_closing_fails_what_waits_and_refuses_more():
    seen, release = [], threading.Event()
    lane = Lane("t", {"a": (held(release, seen), 1)})
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        running, waiting = crowd(lane, pool, [("a", "first"), ("a", "later")])
        closing = pool.submit(lane.close)
        with pytest.raises(RuntimeError, match="closed"):
            waiting.result(5)
        release.set()
        assert running.result(5) == "FIRST"
        closing.result(5)
    with pytest.raises(RuntimeError, match="closed"):
        lane.call("a", "x")
