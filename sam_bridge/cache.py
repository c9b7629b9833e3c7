"""A least-recently-used store bounded by bytes, which makes each missing value once however many ask for it."""

import concurrent.futures
import operator
import threading
from collections.abc import Callable
from typing import Any

import cachetools


class ByteLRU:
    """Thread-safe. `used_bytes <= max_bytes` always; a value larger than the bound is handed out but not kept."""

    def __init__(self, max_bytes: int):
        self.made = 0  # values built by get_or_make
        self.evictions = 0
        self._kept = cachetools.LRUCache(max_bytes, getsizeof=operator.itemgetter(1))  # key -> (value, its bytes)
        self._making: dict[str, concurrent.futures.Future] = {}
        self._lock = threading.Lock()

    @property
    def used_bytes(self) -> int:
        """Of the values kept now."""
        return self._kept.currsize

    def __contains__(self, key: str) -> bool:
        return key in self._kept

    def get(self, key: str) -> Any | None:
        """The value, now the most recently used; None when it is not kept."""
        with self._lock:
            return self._kept.get(key, (None,))[0]

    def put(self, key: str, value: Any, nbytes: int) -> None:
        with self._lock:
            self._kept.pop(key, None)
            if nbytes <= self._kept.maxsize:
                count = len(self._kept) + 1
                self._kept[key] = value, nbytes
                self.evictions += count - len(self._kept)

    def get_or_make(self, key: str, make: Callable[[], tuple[Any, int]]) -> Any:
        """The value. `make()` -> (value, nbytes) runs outside the lock, once for all callers who ask meanwhile.

        If it fails, all of them get the error and nothing is remembered, so the next call tries again.
        """
        with self._lock:
            if key in self._kept:
                return self._kept[key][0]
            flight = self._making.get(key)
            if leads := flight is None:
                flight = self._making[key] = concurrent.futures.Future()
        if leads:
            try:
                value, nbytes = make()
                self.put(key, value, nbytes)
                flight.set_result(value)
            except BaseException as error:  # noqa: BLE001 (raised below, and by everybody who waits)
                flight.set_exception(error)
            with self._lock:  # kept by now, so nobody sees the key neither kept nor in the making
                self.made += flight.exception() is None
                del self._making[key]
        return flight.result()
