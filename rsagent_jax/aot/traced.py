"""Floating-point work of a traced program (`jax.jit(f).trace(…)`): matrix products and kernels, loops multiplied out.

A multiply-add is 2 FLOPs. Everything element-wise is left out, as in flops.py, so that the two can be compared. What is
done twice counts twice: rematerialisation shows here and not in the model's FLOPs. Our programs have no convolutions.
"""

import collections
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

# (a kernel's name, its operands' shapes) -> FLOPs of one execution on one device, or None
KernelFlops = Callable[[str, tuple[tuple[int, ...], ...]], float | None]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Pallas kernel: the compiler does not look inside."""

    name: str
    executions: int  # on one device, in one run of the program
    flops: float | None  # of all executions; None: neither the kernel nor the caller gave an estimate


@dataclasses.dataclass(frozen=True)
class Work:
    product_flops: float  # of one run over the whole mesh
    kernels: tuple[Kernel, ...]  # by name
    unknown_trip_counts: tuple[str, ...]  # loops that count as if they ran once


def traced_work(traced: jax.stages.Traced, kernel_flops: KernelFlops | None = None) -> Work:
    """Of one run. A kernel's FLOPs come from `kernel_flops` where it knows the kernel, else from the cost estimate that
    its author gave to `pallas_call`."""
    jaxpr, products, loops = traced.jaxpr.jaxpr, 0.0, []
    executions, flops = collections.Counter(), collections.defaultdict(list)
    for eqn, runs, devices in _equations(jaxpr, [True] * len(jaxpr.outvars), 1, 1):
        if eqn.primitive.name == "dot_general":
            products += _product_flops(eqn) * runs * devices
        elif eqn.primitive.name == "while":
            loops.append(f"{eqn.source_info.name_stack}/while".lstrip("/"))
        else:
            name, estimate = eqn.params["name"], eqn.params["cost_estimate"]
            one = kernel_flops(name, tuple(v.aval.shape for v in eqn.invars)) if kernel_flops else None
            one = estimate.flops if one is None and estimate else one
            executions[name] += runs
            flops[name].append(None if one is None else float(one) * runs)
    kernels = (Kernel(n, executions[n], None if None in flops[n] else sum(flops[n])) for n in sorted(executions))
    return Work(products, tuple(kernels), tuple(loops))


def _equations(jaxpr: Any, used: list[bool], runs: int, devices: int) -> list[tuple[Any, int, int]]:
    """(product, kernel or unbounded loop; how often it runs; on how many devices, where that is written out), but only
    what the `used` results need: the compiler drops what a rematerialised layer would compute again for nothing."""
    found, live = [], {id(v) for v, use in zip(jaxpr.outvars, used, strict=True) if use}
    for eqn in reversed(jaxpr.eqns):
        name, params, use = eqn.primitive.name, eqn.params, [id(v) in live for v in eqn.outvars]
        if not any(use) and not eqn.effects:
            continue
        live |= {id(v) for v in eqn.invars}
        if name in ("dot_general", "pallas_call", "while"):
            found.append((eqn, runs, devices))
        if name == "pallas_call":
            continue
        times = runs * (params["length"] if name == "scan" else 1)
        over = params["mesh"].size if name == "shard_map" else devices
        carries = params["num_carry"] if name == "scan" else 0
        use = [True] * carries + use[carries:]
        values = [v for value in params.values() for v in (value if isinstance(value, tuple | list) else (value,))]
        inner = [j for v in values if hasattr(j := getattr(v, "jaxpr", v), "eqns")]
        whole = [use if len(use) == len(j.outvars) else [True] * len(j.outvars) for j in inner]
        inner = [_equations(j, u, times, over) for j, u in zip(inner, whole, strict=True)]
        inner = [max(inner, key=_total)] if name == "cond" else inner  # the largest branch counts
        found += [one for equations in inner for one in equations]
    return found


def _total(found: list[tuple[Any, int, int]]) -> int:
    return sum(_product_flops(eqn) * runs for eqn, runs, _ in found if eqn.primitive.name == "dot_general")


def _product_flops(eqn: Any) -> int:
    """Of one execution of a dot_general."""
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
