"""A least-recently-used store bounded by bytes, which makes each missing value once however many ask for it."""

from __future__ import annotations

import collections
import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any


class ByteLRU:
    """Thread-safe. `used_bytes <= max_bytes` always; a value larger than the bound is handed out but not kept."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self.made = 0  # values built by get_or_make
        self.evictions = 0
        self._values: collections.OrderedDict[str, tuple[Any, int]] = collections.OrderedDict()
        self._making: dict[str, concurrent.futures.Future] = {}
        self._lock = threading.Lock()

    def __contains__(self, key: str) -> bool:
        with self._lock:
            return key in self._values

    def get(self, key: str) -> Any | None:
        """The value, now the most recently used; None when it is not kept."""
        with self._lock:
            return self._touch(key)

    def put(self, key: str, value: Any, nbytes: int) -> None:
        with self._lock:
            self._store(key, value, nbytes)

    def get_or_make(self, key: str, make: Callable[[], tuple[Any, int]]) -> tuple[Any, bool]:
        """(value, whether this very call made it). `make()` -> (value, nbytes) runs outside the lock.

        Callers that arrive while another makes the value wait for that one. If making fails, every waiter gets the
        error and nothing is remembered, so the next call tries again.
        """
        with self._lock:
            value = self._touch(key)
            if value is not None:
                return value, False
            flight = self._making.get(key)
            leader = flight is None
            if leader:
                flight = self._making[key] = concurrent.futures.Future()
        if not leader:
            return flight.result(), False
        try:
            value, nbytes = make()
        except BaseException as error:
            with self._lock:
                del self._making[key]
            flight.set_exception(error)
            raise
        with self._lock:  # one critical section: nobody sees the key neither kept nor in the making
            self._store(key, value, nbytes)
            self.made += 1
            del self._making[key]
        flight.set_result(value)
        return value, True

    def _touch(self, key: str) -> Any | None:
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key][0]

    def _store(self, key: str, value: Any, nbytes: int) -> None:
        if key in self._values:
            self.used_bytes -= self._values.pop(key)[1]
        if nbytes > self.max_bytes:
            return
        self._values[key] = (value, nbytes)
        self.used_bytes += nbytes
        while self.used_bytes > self.max_bytes:
            _, (_, freed) = self._values.popitem(last=False)
            self.used_bytes -= freed
            self.evictions += 1
