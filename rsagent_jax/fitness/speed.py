"""How fast this process's devices multiply and read memory, measured here and now."""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from rsagent_jax.aot.devices import chip_of
from rsagent_jax.aot.topology import GIB
from rsagent_jax.fitness.finding import Examined, Finding, Verdict

REPEATS = 3  # the fastest counts: another process may have been at work in the others
LEAST = 0.6  # of the nominal figure; large products reach 0.7 (GPU, held back by its power) to 0.95 (TPU)


def fastest(run: Callable[[], Any]) -> float:
    """Seconds of the fastest of REPEATS calls, after one that compiles. `run` returns what there is to wait for."""
    jax.block_until_ready(run())
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return min(times)


@functools.cache
def matmul_flops(dtype: str) -> tuple[float, ...]:
    """FLOP/s of square products of this dtype, of each local device."""
    side, times = (1024, 8) if jax.default_backend() == "cpu" else (8192, 16)

    @jax.jit
    def products(a: jax.Array) -> jax.Array:  # a chain: none can be left out or shared
        b = jax.lax.fori_loop(0, times, lambda _, x: (x @ a) * jnp.asarray(side**-0.5, dtype), a)
        return a + 0 * b

    return tuple(2.0 * side**3 * times / s for s in _on_each_device(products, (side, side), dtype))


@functools.cache
def memory_bandwidth() -> tuple[float, ...]:
    """Bytes per second of passes over an array that no cache holds, read and written in place, of each local device."""
    size, times = (2**26, 4) if jax.default_backend() == "cpu" else (2**28, 16)
    once = jax.jit(lambda x: x * 1.0001 + 1e-6, donate_argnums=0)

    def passes(x: jax.Array) -> jax.Array:
        for _ in range(times):
            x = once(x)
        return x

    return tuple(2.0 * 4 * size * times / s for s in _on_each_device(passes, (size,), "float32"))


def _on_each_device(run: Callable[[jax.Array], jax.Array], shape: tuple[int, ...], dtype: str) -> Iterator[float]:
    make = jax.jit(lambda key: jnp.resize(jax.random.normal(key, (2**20,), dtype), shape))
    for device in jax.local_devices():
        x = make(jax.device_put(jax.random.key(0), device))

        def again() -> jax.Array:
            nonlocal x
            x = run(x)
            return x

        yield fastest(again)


def check_matmul(examined: Examined) -> list[Finding]:
    dtype, chip = examined.config.policy.dtype, chip_of(jax.local_devices()[0])
    nominal = chip.bf16_flops if chip and dtype == "bfloat16" else None
    return [_judged(f"products, {dtype}", matmul_flops(dtype), nominal, 1e12, "TFLOP/s")]


def check_bandwidth(examined: Examined) -> list[Finding]:
    del examined
    chip = chip_of(jax.local_devices()[0])
    return [_judged("memory bandwidth", memory_bandwidth(), chip and chip.hbm_bandwidth, GIB, "GiB/s")]


def _judged(name: str, rates: tuple[float, ...], nominal: float | None, unit: float, word: str) -> Finding:
    """Of a host's slowest device: all wait for it."""
    low, high = min(rates), max(rates)
    figure = f"{low / unit:.3g} {word}" + (f" to {high / unit:.3g} on {len(rates)} devices" if len(rates) > 1 else "")
    good = low >= LEAST * (nominal or 0.0) and low >= LEAST * high
    against = f"{nominal / unit:.4g} nominal" if nominal else "no nominal figure for this device"
    remedy = "end what else runs on this device; look at its power limit, clocks and temperature"
    return Finding.judged(name, good, Verdict.SLOW, figure, against, remedy, value=low)
