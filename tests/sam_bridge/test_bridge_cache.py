"""ByteLRU: the bound, the order, one flight for many callers."""

import concurrent.futures
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sam_bridge.cache import ByteLRU
from tests.sam_bridge.fakes import until, waiting


def test_least_recently_used_goes_first():
    cache = ByteLRU(100)
    for key in "abc":
        cache.put(key, key.upper(), 30)
    assert cache.get("a") == "A"
    cache.put("d", "D", 30)  # 120 bytes: b is the one not touched since
    assert [key in cache for key in "abcd"] == [True, False, True, True]
    assert cache.used_bytes == 90 and cache.evictions == 1


def test_replacing_counts_bytes_once_and_oversize_is_not_kept():
    cache = ByteLRU(100)
    cache.put("a", 1, 60)
    cache.put("a", 2, 70)
    assert cache.used_bytes == 70 and cache.get("a") == 2
    assert cache.get_or_make("big", lambda: ("big", 101)) == "big" and cache.made == 1
    assert "big" not in cache and cache.get("a") == 2


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 60))))
def test_bound_holds_after_every_put(puts):
    cache = ByteLRU(100)
    sizes = {}
    for key, nbytes in puts:
        cache.put(key, key, nbytes)
        sizes[key] = nbytes
        assert cache.used_bytes == sum(sizes[k] for k in sizes if k in cache) <= 100
        assert key in cache


@pytest.mark.parametrize("fails", [False, True])
def test_single_flight_makes_once_for_all_waiters_and_forgets_a_failure(fails):
    cache, started, release = ByteLRU(100), threading.Event(), threading.Event()
    calls = []

    def make():
        calls.append(1)
        started.set()
        assert release.wait(60)
        if fails:
            raise OSError("broken")
        return "value", 1

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        flights = [pool.submit(cache.get_or_make, "k", make)]
        assert started.wait(60)
        flights += [pool.submit(cache.get_or_make, "k", make) for _ in range(7)]
        until(lambda: waiting(cache) == 7)
        release.set()
        for flight in flights:
            if fails:
                with pytest.raises(OSError, match="broken"):
                    flight.result(60)
            else:
                assert flight.result(60) == "value"
    assert len(calls) == 1 and cache.made == (not fails)
    assert cache.get_or_make("k", lambda: ("fine", 1)) == ("fine" if fails else "value")
