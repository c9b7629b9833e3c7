"""How much of a program's collectives its schedule hides, from the text of the compiled program.

The instructions of a compiled program stand in the order in which they run. An operation takes the time of its products
at the chip's peak, or of its HBM traffic at full bandwidth, whichever is longer. The links carry one collective after
the other at their speed. An asynchronous one goes on while the operations between its start and its done run; for what
is then left the device waits, as it does for all of a synchronous one. Copies between memories take no time here.
"""

import collections
import dataclasses
import functools
import math
import re
from typing import Self

import numpy as np

from rsagent_jax.aot.compiled import Collective, Computation, Instruction, Program
from rsagent_jax.aot.topology import Topology
from rsagent_jax.aot.traced import KernelFlops

LONGEST = 5  # waits that are named


@dataclasses.dataclass(frozen=True)
class Wait:
    """For one collective of the program's text, in all of its executions."""

    seconds: float
    synchronous: bool
    collective: Collective


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Of one run, on one device, with chip and links at their peaks."""

    work_s: float  # all operations, one after the other
    collective_s: float  # all collectives: hidden and exposed together
    hidden_s: float  # while operations ran between their start and their done
    exposed_s: float  # the device waits
    step_s: float  # work and what is exposed
    asynchronous: int  # executions with a start and a done
    synchronous: int
    waits: tuple[Wait, ...]  # the longest


def schedule_overlap(program: Program, topology: Topology, kernel_flops: KernelFlops | None = None) -> Overlap:
    """`kernel_flops`: as traced.traced_work takes it. A kernel that it does not know takes the time of its traffic."""
    walk = _Walk(program, topology, kernel_flops)
    spent, apart = walk.time(program.entry), walk.asynchronous
    waits = [Wait(seconds, name not in apart, walk.found[name]) for name, seconds in spent.waits.items() if seconds]
    exposed = sum(spent.waits.values())
    return Overlap(
        work_s=spent.work,
        collective_s=spent.hidden + exposed,
        hidden_s=spent.hidden,
        exposed_s=exposed,
        step_s=spent.work + exposed,
        asynchronous=sum(c.executions for c in walk.found.values() if c.name in apart),
        synchronous=sum(c.executions for c in walk.found.values() if c.name not in apart),
        waits=tuple(sorted(waits, key=lambda wait: -wait.seconds)[:LONGEST]),
    )


@dataclasses.dataclass
class _Spent:
    """Seconds of a computation."""

    work: float = 0.0
    hidden: float = 0.0
    waits: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # by the collective's name

    def add(self, other: Self, times: int) -> None:
        self.work += times * other.work
        self.hidden += times * other.hidden
        for name, seconds in other.waits.items():
            self.waits[name] += times * seconds


class _Walk:
    """Through the computations in the order in which they run."""

    def __init__(self, program: Program, topology: Topology, kernel_flops: KernelFlops | None):
        self.program, self.chip, self.kernel_flops = program, topology.chip, kernel_flops
        self.found = {c.name: c for c in program.collectives()}
        self.link_s = {c.name: c.sent_bytes / (topology.ici_bandwidth or math.inf) for c in self.found.values()}
        self.asynchronous: set[str] = set()
        self.time = functools.cache(self._time)

    def _time(self, name: str) -> _Spent:
        computation, spent = self.program.computations[name], _Spent()
        flight: dict[str, tuple[str, float]] = {}  # by channel or start: (collective, seconds of the links left)
        for instruction in computation.values():
            ends, whole, starts = self._collectives(computation, instruction)
            for key in ends:
                for first in [*flight] if key in flight else ():  # those before it have the links first
                    collective, left = flight.pop(first)
                    spent.waits[collective] += left
                    if first == key:
                        break
            for collective in whole:
                spent.waits[collective] += self.link_s[collective]
            for key, collective in starts.items():
                self.asynchronous.add(collective)
                flight[key] = collective, self.link_s[collective]
            if ends or whole or starts:
                continue
            seconds = self._seconds(name, instruction)
            spent.work += seconds
            for callee, times in self.program.calls.get(instruction.name, ()) if instruction.opcode != "fusion" else ():
                inner = self.time(callee)
                spent.add(inner, times)
                seconds += times * (inner.work - inner.hidden)  # its own collectives have the links first
            for key, (collective, left) in flight.items():
                gone = min(seconds, left)
                flight[key] = collective, left - gone
                seconds, spent.hidden = seconds - gone, spent.hidden + gone
        for collective, left in flight.values():  # nothing here ends it
            spent.waits[collective] += left
        return spent

    def _collectives(self, computation: Computation, i: Instruction) -> tuple[list[str], list[str], dict[str, str]]:
        """(keys of those that an instruction ends, synchronous ones, those that it starts by their keys)."""
        if i.opcode.endswith("-done"):
            start = computation[i.operands[0]]
            while start.opcode.endswith("-update"):
                start = computation[start.operands[0]]
            return [start.name], [], {}
        inner = [c for callee in i.called for c in self.program.computations[callee].values()]
        inner = inner if i.opcode in ("fusion", "call-start", "async-start") else []
        names = [c.name for c in (i, *inner) if c.name in self.found]
        if i.opcode.endswith("-start"):
            return [], [], {i.name: names[0]} if names else {}
        channels = {c.name: c.find(r"channel_id=(\d+)") for c in inner if c.in_chain}
        ends = [channels[o] for c in inner if c.target == "AsyncCollectiveDone" for o in c.operands if o in channels]
        return ends, [n for n in names if n not in channels], {channels[n]: n for n in names if n in channels}

    def _seconds(self, name: str, i: Instruction) -> float:
        """That an operation takes at least; copies beside the others take none."""
        if i.opcode.endswith(("-start", "-update")):
            return 0.0
        flops = self._flops(self.program.computations[name], i)
        return max(flops / self.chip.bf16_flops, self.program.moved(name, i) / self.chip.hbm_bandwidth)

    def _flops(self, computation: Computation, i: Instruction) -> float:
        """Of products and kernels, those in a fusion too, on one device."""
        if i.opcode == "fusion":
            inner = self.program.computations[i.called[0]]
            return sum(self._flops(inner, c) for c in inner.values())
        shapes = [computation[o].arrays[0].dims for o in i.operands if computation[o].arrays]
        if i.target == "tpu_custom_call":
            return (self.kernel_flops and self.kernel_flops(i.name, tuple(shapes))) or 0.0
        return product_flops(i, shapes)


def product_flops(i: Instruction, shapes: list[tuple[int, ...]]) -> float:
    """Of a dot or a convolution with operands of these shapes; 0 of anything else.

    The compiler writes batches of products as convolutions whose window slides over the batch. As in XLA's own count,
    only places of the window inside the operand and off its dilation's holes are products.
    """
    if i.opcode == "dot":
        contracted = [int(d) for d in i.find(r"lhs_contracting_dims={([\d,]*)}").split(",") if d]
        return 2.0 * i.arrays[0].elements * math.prod(shapes[0][d] for d in contracted)
    if i.opcode != "convolution":
        return 0.0
    left, right, out = re.split("_|->", i.find(r"dim_labels=(\w+->\w+)"))
    size = lambda labels, dims, label: dims[labels.index(label)]  # noqa: E731
    window = i.find(r"window={([^}]*)}")
    products = 2.0 * size(left, shapes[0], "b") * size(right, shapes[1], "i") * size(out, i.arrays[0].dims, "f")
    products /= int(i.find(r"batch_group_count=(\d+)") or 1)
    for k, label in enumerate(sorted(set(out) - {"b", "f"})):
        names = dict(stride=1, pad=0, lhs_dilate=1, rhs_dilate=1)  # of padding, what is before the operand
        given = {name: re.search(rf"(?:^| ){name}=(\S+)", window) for name in names}
        stride, low, lhs, rhs = (int(m[1].split("x")[k].split("_")[0]) if (m := given[n]) else names[n] for n in names)
        places = np.arange(size(out, i.arrays[0].dims, label))[:, None] * stride - low
        places = places + np.arange(size(right, shapes[1], label)) * rhs
        inside = (places >= 0) & (places <= (size(left, shapes[0], label) - 1) * lhs)
        products *= int((inside & (places % lhs == 0)).sum())
    return products
