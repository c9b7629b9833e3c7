"""The text of a compiled program (`compiled.as_text()`): instructions, computations, and how often each one runs.

XLA's own cost analysis counts the body of a loop once, whatever its trip count; here every computation has a number of
runs. TPU programs do not state trip counts: they follow from the loop's first value, its step and its condition.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([^\]]*)\](\{[^}]*\})?")
_START = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_HEADER = re.compile(r"(ENTRY\s+)?%?([\w.\-]+)\s*(\(.*)?\{\s*$")


@dataclasses.dataclass(frozen=True)
class Array:
    dtype: str
    dims: tuple[int, ...]
    space: int = 0  # 0 HBM, 1 vector memory, 2 flags, 5 host, 6 scalar memory

    @functools.cached_property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bits(self) -> int:
        """Of one element; the padding of tiled layouts is left out throughout."""
        if self.dtype in _BITS:
            return _BITS[self.dtype]
        digits = re.match(r"[a-z]+(\d+)", self.dtype)  # s32, u8, f32, f8e4m3fn
        if digits is None:
            raise ValueError(f"element type {self.dtype!r} is not known")
        return int(digits[1])

    @property
    def bytes(self) -> int:
        return -(-self.elements * self.bits // 8)

    @property
    def hbm_bytes(self) -> int:
        return self.bytes if self.space == 0 else 0


Shape = Array | tuple  # a tuple of Shapes


def leaves(shape: Shape) -> Iterator[Array]:
    if isinstance(shape, Array):
        yield shape
    else:
        for part in shape:
            yield from leaves(part)


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    shape: Shape
    operands: tuple[str, ...]  # names in the same computation
    argument: str  # what stands between the parentheses: a literal, a parameter's number, or the operands
    attributes: str  # what follows them, but for backend_config
    config: dict  # backend_config
    is_root: bool

    def attribute(self, key: str) -> str | None:
        """The word or {...} after `key=`."""
        match = re.search(rf"(?<![\w-]){key}=(\{{[^{{}}]*\}}|[^\s,{{}}]+)", self.attributes)
        return match and match[1]

    def integers(self, key: str) -> tuple[int, ...]:
        return tuple(int(n) for n in re.findall(r"\d+", self.attribute(key) or ""))

    @property
    def op_name(self) -> str:
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @property
    def target(self) -> str:
        """Of a custom call."""
        match = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @property
    def called(self) -> tuple[str, ...]:
        """Computations that this instruction runs, but for the scalar functions of reductions, sorts and scatters."""
        if self.opcode == "while":
            keys = ("condition", "body")
        elif self.opcode == "conditional":
            keys = ("branch_computations", "true_computation", "false_computation")
        elif self.opcode in ("fusion", "call", "call-start", "async-start"):
            keys = ("calls", "to_apply")
        else:
            return ()
        return tuple(name for key in keys for name in re.findall(r"[\w.\-]+", self.attribute(key) or ""))


class Computation(dict[str, Instruction]):
    """Instructions by name."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    @functools.cached_property
    def root(self) -> Instruction:
        return next((i for i in self.values() if i.is_root), None) or list(self.values())[-1]

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(i.argument): i for i in self.values() if i.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        found = collections.defaultdict(list)
        for instruction in self.values():
            for operand in dict.fromkeys(instruction.operands):
                found[operand].append(instruction)
        return found

    def arrays(self, instruction: Instruction) -> list[Array]:
        """Of its operands."""
        return [leaf for operand in instruction.operands for leaf in leaves(self[operand].shape)]


@dataclasses.dataclass(frozen=True)
class Program:
    computations: dict[str, Computation]
    devices: int  # that run this program together
    runs: dict[str, int]  # per computation that is reached from the entry: how often it runs in one run of the program
    fused: frozenset[str]  # computations inside fusions: their values stay out of memory
    unknown_trip_counts: tuple[str, ...]  # loops whose bodies count once because nothing tells how often they run

    def instructions(self) -> Iterator[tuple[Computation, Instruction, int]]:
        """(computation, instruction, runs) of all that runs, inside fusions too."""
        for name, runs in self.runs.items():
            for instruction in self.computations[name].values():
                yield self.computations[name], instruction, runs


def read_program(text: str) -> Program:
    """Parses the text. Of a conditional only the largest branch counts as run. ValueError when it is no HLO."""
    computations, entry = _computations(text)
    if entry is None:
        raise ValueError("no ENTRY computation in the text of the program")
    header = text.split("\n", 1)[0]
    devices = math.prod(int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", header))
    runs, unknown = _runs(computations, entry)
    fused = set()
    for name in reversed(computations):  # callers before callees
        for instruction in computations[name].values():
            if instruction.opcode == "fusion" or name in fused:
                fused.update(instruction.called)
    return Program(computations, devices, runs, frozenset(fused), tuple(unknown))


def _computations(text: str) -> tuple[dict[str, Computation], str | None]:
    found, entry, current, pending = {}, None, None, []

    def finish() -> None:
        if pending:
            instruction = _instruction(" ".join(pending))
            current[instruction.name] = instruction
            pending.clear()

    for line in text.splitlines():
        if current is None:
            if not line.startswith("HloModule") and (match := _HEADER.match(line)):
                current = found[match[2]] = Computation(match[2])
                entry = match[2] if match[1] else entry
        elif re.match(r"\}(, execution_thread=|\s*$)", line):
            finish()
            current = None
        elif _START.match(line):
            finish()
            pending.append(line)
        elif pending:  # attributes may hold line breaks
            pending.append(line)
    return found, entry


def _instruction(line: str) -> Instruction:
    line = re.sub(r"/\*index=\d+\*/", "", line)
    start = _START.match(line)
    shape, at = _shape(line, start.end())
    match = re.compile(r"\s*([a-z][\w\-]*)\(").match(line, at)
    if match is None:
        raise ValueError(f"cannot read the instruction {line[:200]!r}")
    end = _closing(line, match.end())
    argument, rest, config = line[match.end() : end], line[end + 1 :], {}
    if (at := rest.find("backend_config={")) >= 0:
        try:
            config, length = json.JSONDecoder(strict=False).raw_decode(rest[at + len("backend_config=") :])
            rest = rest[:at] + rest[at + len("backend_config=") + length :]
        except json.JSONDecodeError:  # another back end's own syntax
            config = {}
    opcode = match[1]
    operands = () if opcode in ("constant", "parameter", "iota") else tuple(_operands(argument))
    return Instruction(start[2], opcode, shape, operands, argument, rest, config, bool(start[1]))


def _shape(text: str, at: int) -> tuple[Shape, int]:
    """The shape at `at`, and where it ends."""
    if text[at] != "(":
        match = _ARRAY.match(text, at)
        if match is None:
            raise ValueError(f"cannot read the shape {text[at : at + 80]!r}")
        dims = tuple(int(n.strip("<= ")) for n in match[2].split(",") if n.strip())
        space = re.search(r"S\((\d+)\)", match[3] or "")
        return Array(match[1], dims, int(space[1]) if space else 0), match.end()
    parts, at = [], at + 1
    while True:
        while text[at] in ", ":
            at += 1
        if text[at] == ")":
            return tuple(parts), at + 1
        part, at = _shape(text, at)
        parts.append(part)


def _closing(text: str, at: int) -> int:
    """Where the parenthesis opened before `at` closes; strings may hold others."""
    depth, quoted = 1, False
    for match in re.compile(r'\\.|["()]').finditer(text, at):
        if match[0] == '"':
            quoted = not quoted
        elif not quoted and match[0] in "()":
            depth += 1 if match[0] == "(" else -1
            if not depth:
                return match.start()
    raise ValueError(f"parentheses do not close in {text[:200]!r}")


def _operands(argument: str) -> list[str]:
    if "%" in argument:
        return re.findall(r"%([\w.\-]+)", argument)
    return [part.split()[-1] for part in argument.split(",") if part.strip()]  # printed without percent signs


# --- How often a computation runs ---


@dataclasses.dataclass(frozen=True)
class _Carried:
    """Element `index` of a loop's state at the start of an iteration, plus `offset`."""

    index: int
    offset: int = 0


# What is known of a value: an int, a _Carried, a tuple of such, or None for nothing.
_PASS = {"copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "optimization-barrier"}


def _runs(computations: dict[str, Computation], entry: str) -> tuple[dict[str, int], list[str]]:
    """Runs of each computation, callers first, and the names of loops with an unknown trip count."""
    runs, unknown, known = collections.Counter({entry: 1}), [], {}
    for name in reversed(computations):  # a program lists callees before their callers
        if not runs[name]:
            continue
        computation = computations[name]
        for instruction in computation.values():
            times = 1
            if instruction.opcode == "while":
                times, state = _trips(computations, computation, instruction, known.get(name, ()))
                for callee in instruction.called:
                    known[callee] = (state,)
                if times is None:
                    unknown.append(f"{instruction.name} ({instruction.op_name})".replace(" ()", ""))
                    times = 1
            for callee in (called := instruction.called):
                if callee not in computations:
                    raise ValueError(f"{instruction.name} calls {callee}, which the program does not hold")
            if instruction.opcode == "conditional":
                called = (max(called, key=lambda name: _made(computations, name)),)
            for callee in called:
                runs[callee] += runs[name] * times
    return {name: n for name, n in runs.items() if n}, unknown


def _made(computations, name: str) -> int:
    """Bytes of all values that a computation makes, a loop's body once: enough to tell branches of one kind apart."""
    made = 0
    for instruction in computations[name].values():
        made += sum(leaf.bytes for leaf in leaves(instruction.shape))
        made += sum(_made(computations, callee) for callee in instruction.called)
    return made


def _trips(computations, computation: Computation, loop: Instruction, known: tuple):
    """(trip count or None, what is known of the loop's state inside an iteration)."""
    condition, body = (computations[loop.attribute(key).lstrip("%")] for key in ("condition", "body"))
    first = _value(computations, computation, loop.operands[0], known)
    width = len(loop.shape) if isinstance(loop.shape, tuple) else 1
    first = first if isinstance(first, tuple) else (None,) * width
    carried = tuple(_Carried(i) for i in range(width))
    after = _value(computations, body, body.root.name, (carried,))
    after = after if isinstance(after, tuple) else (None,) * width
    state = tuple(first[i] if after[i] == carried[i] else carried[i] for i in range(width))
    if stated := loop.config.get("known_trip_count", {}).get("n"):
        return int(stated), state
    left, right, direction = _comparison(computations, condition, condition.root.name, (state,))
    if isinstance(left, int) and isinstance(right, _Carried):
        left, right = right, left
        direction = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction, direction)
    if not (isinstance(left, _Carried) and isinstance(right, int)):
        return None, state
    start, end = first[left.index], after[left.index]
    if not isinstance(start, int) or not isinstance(end, _Carried) or end.index != left.index or not end.offset:
        return None, state
    span = right - (start + left.offset) + {"LE": 1, "GE": -1}.get(direction, 0)
    if direction == "NE":
        return (span // end.offset if span % end.offset == 0 and span // end.offset >= 0 else None), state
    if (end.offset > 0 and direction in ("LT", "LE")) or (end.offset < 0 and direction in ("GT", "GE")):
        return max(0, -(-span // end.offset)), state
    return None, state


def _value(computations, computation: Computation, name: str, known: tuple):
    """What is known of a value, given what is known of the computation's parameters."""
    instruction = computation[name]

    def operand(i: int):
        return _value(computations, computation, instruction.operands[i], known)

    opcode, shape = instruction.opcode, instruction.shape
    if opcode == "parameter":
        number = int(instruction.argument)
        return known[number] if number < len(known) else None
    if opcode == "get-tuple-element":
        whole = operand(0)
        return whole[instruction.integers("index")[0]] if isinstance(whole, tuple) else None
    if opcode == "tuple":
        return tuple(operand(i) for i in range(len(instruction.operands)))
    if opcode in ("fusion", "call"):
        # Only what may count iterations is followed: integers, which keeps this from walking through a whole network.
        if any(leaf.dtype[0] in "su" and not leaf.dims for leaf in leaves(shape)):
            inner = computations[instruction.called[0]]
            return _value(
                computations, inner, inner.root.name, tuple(operand(i) for i in range(len(instruction.operands)))
            )
        return None
    if opcode == "optimization-barrier" and isinstance(shape, tuple):
        return operand(0)
    if any(leaf.dims for leaf in leaves(shape)):
        return None
    if opcode == "constant":
        return int(instruction.argument) if re.fullmatch(r"-?\d+", instruction.argument.strip()) else None
    if opcode in _PASS:
        return operand(0)
    if opcode in ("add", "subtract"):
        left, right = operand(0), operand(1)
        sign = 1 if opcode == "add" else -1
        if isinstance(left, int) and isinstance(right, _Carried) and sign == 1:
            left, right = right, left
        if isinstance(left, _Carried) and isinstance(right, int):
            return _Carried(left.index, left.offset + sign * right)
        if isinstance(left, int) and isinstance(right, int):
            return left + sign * right
    return None


def _comparison(computations, computation: Computation, name: str, known: tuple):
    """(left, right, direction) of the comparison that ends a loop's condition; (None, None, "") when it is another."""
    instruction = computation[name]
    if instruction.opcode == "compare":
        left, right = (_value(computations, computation, operand, known) for operand in instruction.operands)
        return left, right, instruction.attribute("direction")
    if instruction.opcode == "fusion":
        inner = computations[instruction.called[0]]
        values = tuple(_value(computations, computation, operand, known) for operand in instruction.operands)
        return _comparison(computations, inner, inner.root.name, values)
    if instruction.opcode in _PASS:
        return _comparison(computations, computation, instruction.operands[0], known)
    return None, None, ""
