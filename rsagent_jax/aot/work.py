"""Floating-point work that a compiled program does on one device: matrix products and kernels, loops multiplied out.

A multiply-add is 2 FLOPs. Everything element-wise is left out, as in flops.py, so that the two can be compared. What is
done twice counts twice: rematerialisation shows here and not in the model's FLOPs.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable

import numpy as np

from rsagent_jax.aot.hlo import Computation, Instruction, Program, leaves

PALLAS_TARGET = "tpu_custom_call"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Pallas kernel: the compiler does not look inside."""

    name: str
    executions: int  # on one device, in one run of the program
    flops: float | None  # of all executions; None: neither the kernel nor the caller gave an estimate


# (a kernel's name, its operands' shapes) -> FLOPs of one execution on one device, or None
KernelFlops = Callable[[str, tuple[tuple[int, ...], ...]], float | None]


def hlo_flops(program: Program, kernel_flops: KernelFlops | None = None) -> float:
    """FLOPs of one device in one run; kernels count where their FLOPs are known (see `kernels`)."""
    total = sum(product_flops(c, i) * runs for c, i, runs in program.instructions())
    return float(total + sum(kernel.flops or 0 for kernel in kernels(program, kernel_flops)))


def product_flops(computation: Computation, instruction: Instruction) -> int:
    """Of one execution of a dot or a convolution (what TPUs turn dots into), else 0."""
    if instruction.opcode == "dot":
        left = computation[instruction.operands[0]].shape
        contracted = math.prod(left.dims[i] for i in instruction.integers("lhs_contracting_dims"))
        return 2 * instruction.shape.elements * contracted
    if instruction.opcode == "convolution":
        return _convolution_flops(computation, instruction)
    return 0


def kernels(program: Program, kernel_flops: KernelFlops | None = None) -> list[Kernel]:
    """Pallas kernels by name. FLOPs come from `kernel_flops` where it knows the kernel, else from the cost estimate
    that the kernel's author gave to `pallas_call`."""
    executions, flops = collections.Counter(), collections.defaultdict(list)
    for computation, instruction, runs in program.instructions():
        if instruction.opcode != "custom-call" or instruction.target != PALLAS_TARGET:
            continue
        name = re.sub(r"(\.\d+|\.clone|\.remat\d*)+$", "", instruction.name)
        shapes = tuple(tuple(leaf.dims) for o in instruction.operands for leaf in leaves(computation[o].shape))
        given = kernel_flops(name, shapes) if kernel_flops else None
        estimate = instruction.config.get("custom_call_config", {}).get("cost_estimate", {}).get("flops")
        one = estimate if given is None else given
        executions[name] += runs
        flops[name].append(None if one is None else float(one) * runs)
    return [
        Kernel(name, executions[name], None if None in flops[name] else sum(flops[name])) for name in sorted(executions)
    ]


def _convolution_flops(computation: Computation, instruction: Instruction) -> int:
    """2 x batch x features in and out x places where the kernel meets data; padding and dilation holes are no work.

    The compiler writes the batch axes of a product as spatial ones, with strides and dilations under which each output
    meets one place of the kernel.
    """
    left, right = (computation[name].shape for name in instruction.operands[:2])
    labels = instruction.attribute("dim_labels")
    in_labels, kernel_labels, out_labels = re.match(r"([^_]+)_([^-]+)->(.+)", labels).groups()
    window = _window(instruction)
    places = 1
    for axis in sorted(set(in_labels) - {"b", "f"}):
        size = {
            "data": left.dims[in_labels.index(axis)],
            "kernel": right.dims[kernel_labels.index(axis)],
            "out": next(leaves(instruction.shape)).dims[out_labels.index(axis)],
        }
        step = {key: window[key][int(axis)] for key in window}
        places *= _places(**size, **step)
    batch = left.dims[in_labels.index("b")] // int(instruction.attribute("batch_group_count") or 1)
    # The kernel's input features are already those of one feature group.
    return 2 * batch * right.dims[kernel_labels.index("i")] * right.dims[kernel_labels.index("o")] * places


def _window(instruction: Instruction) -> dict[str, dict[int, int]]:
    """Per spatial axis: stride, low padding, dilation of data and kernel. What is not printed is its default."""
    text = (instruction.attribute("window") or "{}").strip("{}")
    fields = dict(part.split("=") for part in text.split())

    def values(key: str, default: int) -> dict[int, int]:
        parts = fields[key].split("x") if key in fields else []
        return collections.defaultdict(lambda: default, {i: int(part.split("_")[0]) for i, part in enumerate(parts)})

    return {
        "stride": values("stride", 1),
        "low": values("pad", 0),
        "data_dilation": values("lhs_dilate", 1),
        "kernel_dilation": values("rhs_dilate", 1),
    }


@functools.cache
def _places(data, kernel, out, stride, low, data_dilation, kernel_dilation) -> int:
    """Pairs of an output and a kernel place that meet on a datum, along one axis."""
    if out <= kernel:
        at = np.arange(kernel) * kernel_dilation - low
        steps = [i * stride for i in range(out)]
    else:
        at = np.arange(out) * stride - low
        steps = [i * kernel_dilation for i in range(kernel)]
    total = 0
    for step in steps:
        place = at + step
        total += int(((place >= 0) & (place % data_dilation == 0) & (place < data * data_dilation)).sum())
    return total
