"""What the text of a compiled program (`compiled.as_text()`) tells and XLA's own analyses do not.

XLA's cost analysis counts the body of a loop once, and memory inside the chip like HBM. Here a computation runs as
often as the loops around it say, and only HBM counts.

Bytes sent follow the ring algorithms: with n devices in a group and an operand of I bytes on each,
  all-gather (n - 1) I;  all-reduce 2 (n - 1) / n I;  reduce-scatter and all-to-all (n - 1) / n I;  permute I.
On a torus an all-to-all passes through other chips too, which is not counted.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_KIND = {"ragged-all-to-all": "all-to-all", "collective-broadcast": "collective-permute"} | {k: k for k in KINDS}
# No traffic of their own: names for other values, or the work of the computations they run.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all",
    "add-dependency", "optimization-barrier", "partition-id", "replica-id", "call-start", "async-start", "domain",
    "AllocateBuffer", "ConcatBitcast", "PrepareAsyncCallStart", "PrepareAsyncCallDone", "Sharding",
}  # fmt: skip
# Inside a fusion these hand on the elements they are asked for.
_ELEMENTWISE = {"bitcast", "convert", "copy", "copy-start", "copy-done", "reshape", "transpose", "negate"}
_INTEGER = r"^(-?\d+)\)"  # a constant's
_OP_NAME = r'op_name="([^"]*)"'


@dataclasses.dataclass(frozen=True)
class Shape:
    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool = True  # else in vector or scalar memory, or the host's

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Without the padding of tiled layouts."""
        digits = re.search(r"\d+", "pred8" if self.dtype == "pred" else self.dtype)  # s32, bf16, f8e4m3fn; token: none
        return -(-self.elements * int(digits[0] if digits else 0) // 8)

    def hbm_bytes(self, elements: float = math.inf) -> int:
        """Of at most so many of its elements."""
        return self.in_hbm * self.bytes * min(elements, self.elements) // max(self.elements, 1)


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    arrays: tuple[Shape, ...]  # of the result; tuples are flat
    operands: tuple[str, ...]  # names in the same computation
    text: str  # what follows the opcode

    def find(self, pattern: str) -> str:
        """The group of a pattern in the arguments and attributes, else nothing."""
        match = re.search(pattern, self.text)
        return match[1] if match else ""

    @functools.cached_property
    def target(self) -> str:
        """Of a custom call."""
        return self.find(r'custom_call_target="([^"]*)"')

    @functools.cached_property
    def called(self) -> list[str]:
        """Computations that this instruction runs, but for the scalar functions of reductions, sorts and scatters."""
        if self.opcode not in ("while", "conditional", "fusion", "call", "call-start", "async-start"):
            return []
        keys = "condition|body|branch_computations|true_computation|false_computation|calls|to_apply"
        found = re.findall(rf"[ ,](?:{keys})=(\{{[^}}]*\}}|[^\s,]+)", self.text)
        return [name for names in found for name in re.findall(r"[\w.\-]+", names)]

    @property
    def in_chain(self) -> bool:
        """One of the copies of a collective that a chain of fusions carries, to hide it behind products."""
        return "async_collective_fusion_config" in self.text or self.target.startswith("AsyncCollective")


class Computation(dict[str, Instruction]):
    """Instructions by name; the last is the result."""

    def __init__(self, body: str):
        super().__init__()
        for text in re.split(r"\n(?=  (?:ROOT )?%?[\w.\-]+ = )", "\n" + body)[1:]:  # attributes may hold line breaks
            match = re.match(r"  (?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)", text, re.S)
            if match is None:
                raise ValueError(f"cannot read the instruction {text[:200]!r}")
            name, shape, opcode, rest = match.groups()
            arrays = tuple(
                Shape(dtype, tuple(int(n) for n in dims.split(",") if n), "S(" not in layout)
                for dtype, dims, layout in re.findall(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?", shape)
            )
            operands = tuple(re.findall(r"%([\w.\-]+)", rest.split(")")[0]))
            self[name] = Instruction(name, opcode, arrays, operands, rest)
        self.root = list(self.values())[-1]
        self.targets = {i.target for i in self.values()}
        self.users = collections.defaultdict(list)  # by name of a value: (who reads it, as which operand)
        for instruction in self.values():
            for k, operand in enumerate(instruction.operands):
                self.users[operand].append((instruction, k))

    def parameter(self, number: int) -> str:
        return next(n for n, i in self.items() if i.opcode == "parameter" and i.text.startswith(f"{number})"))

    def source(self, name: str) -> Instruction:
        """Where a value comes from, looked at through what only hands it on."""
        while self[name].opcode in _ELEMENTWISE:
            name = self[name].operands[0]
        return self[name]

    def integers(self, opcode: str, pattern: str = _INTEGER) -> list[int]:
        """The numbers that its constants hold, or other instructions in an attribute."""
        return [int(found) for i in self.values() if i.opcode == opcode and (found := i.find(pattern))]


@dataclasses.dataclass(frozen=True)
class Collective:
    kind: str
    name: str
    op_name: str  # where in the traced program it comes from
    shape: str  # of the operands on one device
    result_bytes: int  # on one device
    group: int  # devices that take part together
    sent_bytes: float  # by one device in one execution
    executions: int  # in one run of the program


class Program:
    """The text, read. ValueError when it is no HLO."""

    def __init__(self, text: str):
        header = text.split("\n", 1)[0]
        self.devices = math.prod(int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", header))
        blocks = re.findall(r"^(ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}(?=\s*$|, execution)", text, re.M | re.S)
        self.computations = {name: Computation(body) for _, name, body in blocks}
        self.entry = next((name for entry, name, _ in blocks if entry), "")
        if not self.entry:
            raise ValueError("no ENTRY computation in the text of the program")
        self.runs = collections.Counter([self.entry])  # in one run of the program
        self.fused: set[str] = set()  # computations inside fusions: their values stay out of memory
        self.calls: dict[str, list[tuple[str, int]]] = {}  # by instruction: (computation, runs in one execution)
        self.unknown_trip_counts: list[str] = []  # loops that count as if they ran once
        for name in reversed(self.computations):  # callers before callees
            for instruction in self.computations[name].values() if self.runs[name] else ():
                called = instruction.called
                if instruction.opcode == "conditional":  # the largest branch counts
                    called = [max(called, key=self._made)]
                times = self._trips(self.computations[name], instruction) if instruction.opcode == "while" else 1
                if called:
                    self.calls[instruction.name] = [(callee, times) for callee in called]
                for callee in called:
                    self.runs[callee] += self.runs[name] * times
                if instruction.opcode == "fusion" or name in self.fused:
                    self.fused.update(called)

    def _made(self, name: str) -> int:
        """Bytes of all values that a computation makes, a loop's body once: tells branches of one kind apart."""
        made = self.computations[name].values()
        return sum(sum(a.bytes for a in i.arrays) + sum(map(self._made, i.called)) for i in made)

    def _trips(self, computation: Computation, loop: Instruction) -> int:
        """From the counter's first value to the constant in the condition, by the body's step.

        A first value that an outer loop carries is 0, as jax's loops have it.
        """
        if stated := loop.find(r'known_trip_count":\{"n":"(\d+)'):
            return int(stated)
        condition, body = (self.computations[loop.find(rf"{key}=%?([\w.\-]+)")] for key in ("condition", "body"))
        ends, counters = condition.integers("constant"), condition.integers("get-tuple-element", r"index=(\d+)")
        state = computation[loop.operands[0]]
        if len(ends) == len(counters) == 1 and "direction=LT" in condition.root.text and state.opcode == "tuple":
            first, after = computation.source(state.operands[counters[0]]), body[body.root.operands[counters[0]]]
            steps = [int(body[o].find(_INTEGER)) for o in after.operands if body[o].opcode == "constant"]
            if first.opcode in ("constant", "get-tuple-element") and after.opcode == "add" and sum(steps) > 0:
                return max(0, -(-(ends[0] - int(first.find(_INTEGER) or 0)) // sum(steps)))
        self.unknown_trip_counts.append(f"{loop.name} ({loop.find(_OP_NAME)})".replace(" ()", ""))
        return 1

    def instructions(self) -> Iterator[tuple[str, Instruction, int]]:
        """(computation, instruction, runs) of all that runs, inside fusions too."""
        for name, runs in self.runs.items():
            for instruction in self.computations[name].values():
                yield name, instruction, runs

    def collectives(self) -> list[Collective]:
        """Every collective once, however it is written.

        Asynchronous pairs count where they start, and a chain of fusions in the one that starts it. An all-reduce in
        an all-reduce-scatter computation, whose result is sliced at once, runs as a reduce-scatter.
        """
        found = []
        for name, instruction, runs in self.instructions():
            kind, computation = _KIND.get(instruction.opcode.removesuffix("-start")), self.computations[name]
            if kind is None or (instruction.in_chain and "AsyncCollectiveStart" not in computation.targets):
                continue
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            operands = [a for operand in instruction.operands for a in computation[operand].arrays]
            size, n = sum(a.bytes for a in operands), group_size(instruction.text, self.devices)
            share = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n, "collective-permute": 1}.get(kind, (n - 1) / n)
            result = {"all-gather": size * n, "reduce-scatter": size // n}.get(kind, size)
            shape = ", ".join(f"{a.dtype}[{','.join(map(str, a.dims))}]" for a in operands)
            origin = instruction.find(_OP_NAME)
            found.append(Collective(kind, instruction.name, origin, shape, result, n, float(share * size), runs))
        return found

    def hbm_traffic_bytes(self) -> int:
        """Bytes that one device reads and writes in HBM in one run: an estimate.

        Each instruction outside fusions reads its operands once and writes its result once; of a stacked buffer only
        the slice that is read or updated. A Pallas kernel counts its operands and results once.
        """
        return sum(self.moved(name, i) * runs for name, i, runs in self.instructions() if name not in self.fused)

    def moved(self, name: str, instruction: Instruction) -> int:
        """Bytes in HBM that one execution of an instruction outside fusions reads and writes."""
        opcode, computation = instruction.opcode, self.computations[name]
        if opcode in _FREE or instruction.target in _FREE or opcode.endswith(("-done", "-update")):
            return 0
        if opcode == "slice-start":  # ((source), destination, flag)
            return sum(a.hbm_bytes(instruction.arrays[1].elements) for a in instruction.arrays[:2])
        if opcode.endswith("-start") and opcode != "all-reduce-start":  # (source, destination, …)
            return sum(a.hbm_bytes() for a in instruction.arrays[:2])
        targets = self.computations[instruction.called[0]].targets if opcode == "fusion" else ()
        if "AsyncCollectiveDone" in targets:
            return 0
        reads = [(a, k) for k, operand in enumerate(instruction.operands) for a in computation[operand].arrays]
        if "AsyncCollectiveStart" in targets:  # (shard, gathered, flags)
            return sum(a.hbm_bytes() for a, _ in reads) + instruction.arrays[1].hbm_bytes()
        read = sum(a.hbm_bytes(self._needed(computation, instruction, k)) for a, k in reads)
        written = self._written(computation, instruction)
        return read + sum(a.hbm_bytes(n) for a, n in zip(instruction.arrays, written, strict=True))

    def _needed(self, computation: Computation, user: Instruction, k: int) -> float:
        """Elements of its operand k that an instruction reads."""
        if user.opcode in ("dynamic-slice", "slice", "gather") and k == 0:
            return user.arrays[0].elements
        if user.opcode == "dynamic-update-slice" and k == 0:
            return 0  # updated in place
        if user.opcode == "scatter" and k == 0:  # reads what it adds to
            return computation[user.operands[-1]].arrays[0].elements
        if user.opcode == "fusion":
            inner = self.computations[user.called[0]]
            return self._read(inner, inner.parameter(k))
        return math.inf

    def _read(self, inner: Computation, name: str) -> float:
        """Elements of a value that a fused computation reads."""
        total = 0
        for user, k in inner.users[name]:
            if user.in_chain or (user.opcode == "tuple" and user is inner.root):
                continue  # counted where the chain starts, or handed through
            through = user is not inner.root and self._hands_on(user)
            total += self._read(inner, user.name) if through else self._needed(inner, user, k)
        return total

    def _hands_on(self, user: Instruction) -> bool:
        """Whether an instruction inside a fusion, or all of a fusion in it, only hands on what it is asked for."""
        if user.opcode == "fusion":
            return all(i.opcode == "parameter" or self._hands_on(i) for i in self.computations[user.called[0]].values())
        return user.opcode in _ELEMENTWISE

    def _written(self, computation: Computation, instruction: Instruction, fused: bool = False) -> list[float]:
        """Per array of the result, the elements written anew: of a buffer updated in place, those updated."""
        source = computation.source(instruction.name) if fused else instruction
        if source.opcode == "fusion":
            inner = self.computations[source.called[0]]
            parts = [inner[n] for n in inner.root.operands] if inner.root.opcode == "tuple" else [inner.root]
            return [n for part in parts for n in self._written(inner, part, fused=True)]
        if source.in_chain or (source.opcode == "parameter" and instruction.opcode in ("parameter", "bitcast")):
            return [0]
        update = {"dynamic-update-slice": source.operands[1:2], "scatter": source.operands[-1:]}.get(source.opcode)
        if update and (not fused or computation.source(source.operands[0]).opcode == "parameter"):
            return [computation[update[0]].arrays[0].elements]
        return [math.inf] * len(instruction.arrays)


def collective_bytes(found: list[Collective]) -> dict[str, float]:
    """Bytes that one device sends in one run, by kind; kinds that do not occur are absent."""
    total = collections.Counter()
    for collective in found:
        total[collective.kind] += collective.sent_bytes * collective.executions
    return {kind: total[kind] for kind in KINDS if kind in total}


def group_size(text: str, devices: int) -> int:
    """Devices per group, from any way of writing them: `{{0,1},{2,3}}`, `[2,4]<=[8]T(…)`, `mesh['a'=2,'b'=4] {'b'}`."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))?( \{[^}]*\})?", text):
        sizes = {name: int(n) for name, n in re.findall(r"'([^']*)'=(\d+)", match[1])}
        # 'a':(m)k is the part of size k of an axis that is split
        axes = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", match[2] or match[1])
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    match = re.search(r"replica_groups=(?:\[[\d,]*?(\d+)\]<=|\{\{([\d,]+)\})", text)
    if match is None:
        return devices
    return int(match[1]) if match[1] else len(match[2].split(","))
