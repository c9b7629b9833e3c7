"""What one device sends to others in one run of a compiled program, by kind of collective.

Bytes sent follow the ring algorithms: with n devices in a group and an operand of I bytes on each,
  all-gather (n - 1) I;  all-reduce 2 (n - 1) / n I;  reduce-scatter and all-to-all (n - 1) / n I;  permute I.
On a torus an all-to-all passes through other chips too, which is not counted.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re

from rsagent_jax.aot.hlo import Array, Computation, Instruction, Program

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_OPCODES = {
    **{kind: kind for kind in KINDS},
    **{f"{kind}-start": kind for kind in KINDS},
    "ragged-all-to-all": "all-to-all",
    "collective-broadcast": "collective-permute",
}


@dataclasses.dataclass(frozen=True)
class Collective:
    kind: str
    name: str
    op_name: str  # where in the traced program it comes from
    computation: str
    shape: str  # of the operands on one device
    result_bytes: int  # on one device
    group: int  # devices that take part together
    sent_bytes: float  # by one device in one execution
    executions: int  # in one run of the program


def collectives(program: Program) -> list[Collective]:
    """Every collective once, however it is written.

    Asynchronous pairs count where they start. A TPU program may also carry one collective through a chain of fusions
    that hide it behind products; each repeats it, and it counts in the one that starts the chain. An all-reduce inside
    an all-reduce-scatter computation, whose result is sliced at once, runs as a reduce-scatter.
    """
    found = []
    for computation, instruction, runs in program.instructions():
        kind = _OPCODES.get(instruction.opcode)
        if kind is None or is_echo(computation, instruction):
            continue
        if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        operands = computation.arrays(instruction)
        size, n = sum(a.bytes for a in operands), group_size(instruction, program.devices)
        sent = {
            "all-gather": (n - 1) * size,
            "all-reduce": 2 * (n - 1) / n * size,
            "collective-permute": size,
        }.get(kind, (n - 1) / n * size)
        result = {"all-gather": size * n, "reduce-scatter": size // n}.get(kind, size)
        found.append(
            Collective(
                kind, instruction.name, instruction.op_name, computation.name,
                ", ".join(_text(a) for a in operands), result, n, float(sent), runs,
            )
        )  # fmt: skip
    return found


def collective_bytes(found: list[Collective]) -> dict[str, float]:
    """Bytes that one device sends in one run, by kind; kinds that do not occur are absent."""
    total = collections.Counter()
    for collective in found:
        total[collective.kind] += collective.sent_bytes * collective.executions
    return {kind: total[kind] for kind in KINDS if kind in total}


def largest(found: list[Collective]) -> Collective | None:
    """The one with the largest result on a device: what to look at when memory is short."""
    return max(found, key=lambda c: c.result_bytes, default=None)


def in_chain(instruction: Instruction) -> bool:
    """One of the copies of a collective that a chain of asynchronous fusions carries."""
    return "async_collective_fusion_config" in instruction.config


def starts_chain(computation: Computation) -> bool:
    return any(i.target == "AsyncCollectiveStart" for i in computation.values() if i.opcode == "custom-call")


def is_echo(computation: Computation, instruction: Instruction) -> bool:
    return in_chain(instruction) and not starts_chain(computation)


def group_size(instruction: Instruction, devices: int) -> int:
    """Devices per group, from any way of writing them: `{{0,1},{2,3}}`, `[2,4]<=[8]T(…)`, `mesh['a'=2,'b'=4] {'b'}`."""
    text = instruction.attributes
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))?( \{[^}]*\})?", text):
        sizes = {name: int(n) for name, n in re.findall(r"'([^']*)'=(\d+)", match[1])}
        if match[2] is None:
            return math.prod(sizes.values())
        # 'a':(m)k is the part of size k of an axis that is split
        axes = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=", text):
        return int(match[1].split(",")[-1])
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return len(match[1].split(","))
    return devices


def _text(array: Array) -> str:
    return f"{array.dtype}[{','.join(map(str, array.dims))}]"
