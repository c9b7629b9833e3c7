"""Bytes that a compiled program moves in and out of one device's HBM in one run: an estimate from its text.

Each instruction outside fusions reads its operands once and writes its result once. Slices of a stacked buffer count as
the slice: a scan over layers would otherwise count all layers' weights once per layer. Buffers in vector or scalar
memory are not HBM. A Pallas kernel counts its operands and results once, however often it comes back to them.
"""

from __future__ import annotations

from rsagent_jax.aot.collectives import in_chain, starts_chain
from rsagent_jax.aot.hlo import Computation, Instruction, Program, leaves

# No traffic of their own: names for other values, or the work of the computations they run.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all",
    "add-dependency", "optimization-barrier", "partition-id", "replica-id", "call-start", "async-start", "domain",
}  # fmt: skip
_FREE_CALLS = {"AllocateBuffer", "ConcatBitcast", "PrepareAsyncCallStart", "PrepareAsyncCallDone", "Sharding"}
_CHAIN_CALLS = {"AsyncCollectiveStart", "AsyncCollectiveDone"}
# Inside a fusion these hand on the elements they are asked for.
_ELEMENTWISE = {"bitcast", "convert", "copy", "reshape", "transpose", "negate"}


def hbm_traffic_bytes(program: Program) -> int:
    """Bytes read and written in HBM by one device in one run."""
    return sum(
        instruction_bytes(program, computation, instruction) * runs
        for computation, instruction, runs in program.instructions()
        if computation.name not in program.fused
    )


def instruction_bytes(program: Program, computation: Computation, instruction: Instruction) -> int:
    """Of one execution of one instruction outside fusions."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
        return 0
    if opcode == "custom-call" and instruction.target in _FREE_CALLS:
        return 0
    operands = [computation[name].shape for name in instruction.operands]
    results = list(leaves(instruction.shape))
    if opcode == "fusion":
        return _fusion_bytes(program, computation, instruction)
    if opcode == "copy-start":  # (destination, source, flag)
        return sum(leaf.hbm_bytes for part in instruction.shape[:2] for leaf in leaves(part))
    if opcode == "slice-start":  # ((source), destination, flag)
        return _share(operands[0], instruction.shape[1].elements) + instruction.shape[1].hbm_bytes
    if opcode.endswith("-start") and isinstance(instruction.shape, tuple) and opcode != "all-reduce-start":
        results = list(leaves(instruction.shape[1]))  # (operand, result, …)
    written = sum(leaf.hbm_bytes for leaf in results)
    if opcode in ("dynamic-slice", "slice"):
        return _share(operands[0], results[0].elements) + written
    if opcode == "gather":
        return _share(operands[0], results[0].elements) + _hbm(operands[1]) + written
    if opcode == "dynamic-update-slice":
        return _hbm(operands[1]) + _share(instruction.shape, operands[1].elements)
    if opcode == "scatter":  # reads what it adds to
        updates = operands[len(operands) // 2 + 1]
        return _hbm(operands[len(operands) // 2]) + _hbm(updates) + 2 * _share(operands[0], updates.elements)
    return sum(map(_hbm, operands)) + written


def _hbm(shape) -> int:
    return sum(leaf.hbm_bytes for leaf in leaves(shape))


def _share(shape, elements: int) -> int:
    """Bytes of some elements of a buffer."""
    return sum(leaf.hbm_bytes * min(elements, leaf.elements) // max(leaf.elements, 1) for leaf in leaves(shape))


def _fusion_bytes(program: Program, computation: Computation, instruction: Instruction) -> int:
    inner = program.computations[instruction.called[0]]
    calls = {i.target for i in inner.values() if i.opcode == "custom-call"}
    if "AsyncCollectiveDone" in calls:
        return 0
    if starts_chain(inner):  # (shard, gathered, flags): its operands and the second part
        return sum(_hbm(computation[name].shape) for name in instruction.operands) + _hbm(instruction.shape[1])
    total = 0
    for number, name in enumerate(instruction.operands):
        shape = computation[name].shape
        total += _share(shape, _elements_read(program, inner, inner.parameters[number].name))
    whole = instruction.shape if isinstance(instruction.shape, tuple) else (instruction.shape,)
    for shape, written in zip(whole, _elements_written(program, inner), strict=True):
        total += _share(shape, written)
    return total


def _elements_read(program: Program, inner: Computation, name: str) -> int:
    """Elements of a value that a fused computation needs: slices of it, or all."""
    size = sum(leaf.elements for leaf in leaves(inner[name].shape))
    total = 0
    for user in inner.users[name]:
        first = user.operands[0] == name and name not in user.operands[1:]
        if user.opcode in ("dynamic-slice", "slice", "gather") and first:
            total += next(leaves(user.shape)).elements
        elif (user.opcode == "dynamic-update-slice" and first) or (user.opcode == "tuple" and user.is_root):
            continue  # updated in place, or handed through
        elif user.opcode == "scatter" and first:
            total += sum(leaf.elements for leaf in leaves(inner[user.operands[-1]].shape))
        elif in_chain(user) or user.target in _CHAIN_CALLS:
            continue  # counted where the chain starts
        elif user.opcode in _ELEMENTWISE and not user.is_root:
            total += _elements_read(program, inner, user.name)
        elif user.opcode == "fusion":
            called = program.computations[user.called[0]]
            places = [i for i, operand in enumerate(user.operands) if operand == name]
            total += sum(_elements_read(program, called, called.parameters[i].name) for i in places)
        else:
            return size
    return min(total, size)


def _elements_written(program: Program, inner: Computation) -> list[int]:
    """Per part of a fusion's result, the elements it writes anew: of a buffer updated in place, only those updated."""
    root = inner.root
    parts = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(parts) == 1 and isinstance(parts[0].shape, tuple):  # a nested fusion or a kernel with several results
        if parts[0].opcode == "fusion":
            return _elements_written(program, program.computations[parts[0].called[0]])
        return [sum(leaf.elements for leaf in leaves(part)) for part in parts[0].shape]
    return [_written(program, inner, part) for part in parts]


def _written(program: Program, inner: Computation, part: Instruction) -> int:
    size = sum(leaf.elements for leaf in leaves(part.shape))
    while part.opcode in _ELEMENTWISE:
        source = inner[part.operands[0]]
        if source.opcode == "parameter" and part.opcode != "bitcast":
            return size
        part = source
    if part.opcode == "parameter" or in_chain(part):
        return 0
    if part.opcode == "dynamic-update-slice" and _in_place(inner, part):
        return min(size, inner[part.operands[1]].shape.elements)
    if part.opcode == "scatter" and _in_place(inner, part):
        return min(size, sum(leaf.elements for leaf in leaves(inner[part.operands[-1]].shape)))
    if part.opcode == "fusion" and not isinstance(part.shape, tuple):
        return min(size, _elements_written(program, program.computations[part.called[0]])[0])
    return size


def _in_place(inner: Computation, update: Instruction) -> bool:
    """The updated buffer comes from outside the fusion; one made inside is written as a whole."""
    source = inner[update.operands[0]]
    while source.opcode in _ELEMENTWISE:
        source = inner[source.operands[0]]
    return source.opcode == "parameter"
