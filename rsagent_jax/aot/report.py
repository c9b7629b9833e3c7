"""One report per compiled program: does it fit, how much does it work and move, and what step time that projects.

The projection is a roofline: the largest of arithmetic at the chip's bf16 peak, HBM traffic at its bandwidth, and bytes
sent over the links at theirs, as if the three overlapped entirely and each ran at full speed. No device ran anything; a
real step takes longer.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from rsagent_jax.aot import collectives as coll
from rsagent_jax.aot.flops import Workload
from rsagent_jax.aot.hlo import read_program
from rsagent_jax.aot.topology import GIB, Topology
from rsagent_jax.aot.traffic import hbm_traffic_bytes
from rsagent_jax.aot.work import Kernel, KernelFlops, hlo_flops, kernels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """A macro-step of the rollout engine on one host. Bytes are per device."""

    slots: int  # of the host
    devices: int
    tensor: int  # devices that share a slot
    places: int  # of its cache that a decode step reads
    steps: int  # of decoding in one run; 0: something else runs as well, and has no rate
    weight_bytes: int
    slot_bytes: int  # of a slot on each of its devices
    training_bytes: int  # what train.py holds meanwhile
    needed_bytes: int  # that a decode step reads at least: weights once, the cache of the places
    slots_fit: int | None = None  # by this program's peak, as if its temporaries did not grow with the slots
    step_bytes: float | None = None  # HBM traffic of a decode step
    projected_tokens_per_s: float | None = None  # of the host: slots over the projected time of a step

    def compiled(self, peak: int, hbm: int, traffic: int, seconds: float | None) -> Decoding:
        """With what a compiled program tells; traffic and seconds are of one run."""
        found = dict(slots_fit=max(0, self.slots + (hbm - peak) // self.slot_bytes * (self.devices // self.tensor)))
        if self.steps and seconds:
            found |= dict(step_bytes=traffic / self.steps, projected_tokens_per_s=self.slots * self.steps / seconds)
        return dataclasses.replace(self, **found)


@dataclasses.dataclass(frozen=True)
class Job:
    """One program, ready to be lowered."""

    program: str
    lower: Callable[[], Any]  # -> jax.stages.Lowered
    model_flops: float
    resident_bytes: int  # per device: what train.py holds while the program runs and does not pass to it
    work: Workload | None = None  # what the attention kernel sees, where it is not a micro-batch
    decoding: Decoding | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramReport:
    """Bytes are per device, FLOPs are of the whole mesh. Of a program that does not fit, only the sizes are known."""

    program: str
    topology: str
    devices: int
    peak_hbm_bytes: int  # at the fullest moment, residents included
    hbm_bytes: int  # what a device has
    fits: bool
    model_flops: float  # what the step needs, from its shape
    hlo_flops: float  # what the program does: rematerialisation and padding too
    hlo_to_model_flops: float | None  # None without model_flops, or when some kernel's FLOPs are not known
    collective_bytes: dict[str, float]  # sent by one device in one run, by kind
    hbm_traffic_bytes: int
    projected_step_s: float | None
    projected_mfu: float | None  # model_flops over what the mesh could do in projected_step_s
    bound_by: str  # compute, hbm or ici; memory when the program does not fit
    seconds: dict[str, float]  # the three terms of the projection
    quick: bool = False  # compiled with --aot_quick: peak and HBM traffic are higher than the real program's
    argument_bytes: int = 0
    temp_bytes: int = 0
    resident_bytes: int = 0  # in HBM while the program runs, but no arguments of it
    collectives: int = 0  # executions in one run
    largest_collective: coll.Collective | None = None  # by its result on a device
    kernels: tuple[Kernel, ...] = ()
    unknown_trip_counts: tuple[str, ...] = ()  # loops that count as if they ran once
    largest_allocations: tuple[str, ...] = ()  # of a program that does not fit, where the compiler tells
    decoding: Decoding | None = None

    @property
    def kernels_without_flops(self) -> tuple[str, ...]:
        return tuple(kernel.name for kernel in self.kernels if kernel.flops is None)


def analyse(
    compiled: Any,
    topology: Topology,
    *,
    program: str,
    model_flops: float,
    resident_bytes: int = 0,
    kernel_flops: KernelFlops | None = None,
    decoding: Decoding | None = None,
) -> ProgramReport:
    """Reads a `jax.stages.Compiled` for `topology`, of which it may use fewer devices.

    model_flops: of one run over all devices. resident_bytes: per device. kernel_flops: see work.KernelFlops; for
    kernels that carry no estimate.
    """
    hlo = read_program(compiled.as_text())
    memory = compiled.memory_analysis()
    found = coll.collectives(hlo)
    sent = coll.collective_bytes(found)
    flops, traffic = hlo_flops(hlo, kernel_flops), hbm_traffic_bytes(hlo)
    listed = tuple(kernels(hlo, kernel_flops))
    seconds = {
        "compute": flops / topology.flops,
        "hbm": traffic / topology.hbm_bandwidth,
        "ici": sum(sent.values()) / topology.ici_bandwidth if topology.ici_bandwidth else 0.0,
    }
    bound_by = max(seconds, key=seconds.get)
    step = seconds[bound_by]
    # Not arguments + temporaries: the compiler accepts programs whose sum exceeds a device. Where it refuses one,
    # the size it names is this peak within a hundredth.
    peak = memory.peak_memory_in_bytes + resident_bytes
    known = model_flops and all(kernel.flops is not None for kernel in listed)
    return ProgramReport(
        program=program,
        topology=topology.name,
        devices=hlo.devices,
        peak_hbm_bytes=peak,
        hbm_bytes=topology.hbm_bytes,
        fits=peak <= topology.hbm_bytes,
        model_flops=model_flops,
        hlo_flops=flops * hlo.devices,
        hlo_to_model_flops=flops * hlo.devices / model_flops if known else None,
        collective_bytes=sent,
        hbm_traffic_bytes=traffic,
        projected_step_s=step or None,
        projected_mfu=model_flops / (step * hlo.devices * topology.flops) if step else None,
        bound_by=bound_by,
        seconds=seconds,
        argument_bytes=memory.argument_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        resident_bytes=resident_bytes,
        collectives=sum(c.executions for c in found),
        largest_collective=coll.largest(found),
        kernels=listed,
        unknown_trip_counts=hlo.unknown_trip_counts,
        decoding=decoding and decoding.compiled(peak, topology.hbm_bytes, traffic, step),
    )


def out_of_memory(
    error: BaseException,
    topology: Topology,
    *,
    program: str,
    model_flops: float = 0.0,
    resident_bytes: int = 0,
    decoding: Decoding | None = None,
) -> ProgramReport:
    """The report of a program that the compiler refused for its memory. Raises the error again when it says otherwise.

    The compiler's message is either `total memory required … (16.12G) exceeds available HBM (15.75G)` or the longer
    `Used 17.44G of 15.75G hbm. Exceeded hbm capacity by 1.69G. …` with a list of the largest allocations.
    """
    message = str(error)
    sizes = re.search(
        r"required for .*?\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)", message, re.S
    )
    sizes = sizes or re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", message)
    if "RESOURCE_EXHAUSTED" not in message or sizes is None:
        raise error
    used, limit = _bytes(sizes[1], sizes[2]), _bytes(sizes[3], sizes[4])
    return ProgramReport(
        program=program,
        topology=topology.name,
        devices=topology.devices,
        peak_hbm_bytes=used + resident_bytes,
        hbm_bytes=limit,
        fits=False,
        model_flops=model_flops,
        hlo_flops=0.0,
        hlo_to_model_flops=None,
        collective_bytes={},
        hbm_traffic_bytes=0,
        projected_step_s=None,
        projected_mfu=None,
        bound_by="memory",
        seconds={},
        resident_bytes=resident_bytes,
        largest_allocations=_allocations(message),
        decoding=decoding and decoding.compiled(used + resident_bytes, limit, 0, None),
    )


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}[unit])


def _allocations(message: str) -> tuple[str, ...]:
    """`1.13G bf16[4,4096,37888] jit(step)/…` for each allocation that the message lists, in its order."""
    found = []
    for block in re.split(r"\n\s*\d+\. Size: ", message)[1:]:
        shape, name = re.search(r"Shape: (\S+?)(?:\{|\s|$)", block), re.search(r'op_name="([^"]*)"', block)
        name = name or re.search(r"Operator: (.*)", block)
        found.append(" ".join([block.split()[0], *(match[1].strip() for match in (shape, name) if match)]))
    return tuple(found)


def reports_to_json(reports: ProgramReport | Sequence[ProgramReport]) -> str:
    """One JSON object, or a list for several programs, on one line."""
    if isinstance(reports, ProgramReport):
        return json.dumps(dataclasses.asdict(reports))
    return json.dumps([dataclasses.asdict(report) for report in reports])


def reports_table(reports: Sequence[ProgramReport]) -> str:
    """One line per program for a terminal, memory and traffic per device in GiB, then what the numbers leave out."""
    head = ("program", "on", "peak GiB", "of", "fits", "traffic GiB", "sent GiB", "model TF", "hlo/model", "step s",
            "MFU", "bound by")  # fmt: skip
    rows = [head]
    for r in reports:
        step, ratio, mfu = r.projected_step_s, r.hlo_to_model_flops, r.projected_mfu
        rows.append((
            r.program, f"{r.topology} ({r.devices})", f"{r.peak_hbm_bytes / GIB:.2f}", f"{r.hbm_bytes / GIB:.2f}",
            "yes" if r.fits else "NO", f"{r.hbm_traffic_bytes / GIB:.2f}" if step else "-",
            f"{sum(r.collective_bytes.values()) / GIB:.3f}" if step else "-", f"{r.model_flops / 1e12:.2f}",
            f"{ratio:.2f}" if ratio else "-", f"{step:.4f}" if step else "-", f"{mfu:.1%}" if mfu else "-", r.bound_by,
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for r in reports:
        if r.kernels_without_flops:
            lines.append(f"{r.program}: hlo FLOPs leave out {', '.join(r.kernels_without_flops)}")
        if r.unknown_trip_counts:
            lines.append(f"{r.program}: counted as run once, not known how often: {', '.join(r.unknown_trip_counts)}")
        if r.decoding:
            lines.append(f"{r.program}: {_decoding(r.decoding)}")
        lines += [f"{r.program}: holds {allocation}" for allocation in r.largest_allocations[:5]]
    return "\n".join(lines)


def _decoding(d: Decoding) -> str:
    fit = f"{d.slots} slots on {d.devices} devices, {d.tensor} to a slot; {d.slots_fit} fit"
    if d.step_bytes is None:
        return fit
    moved = f"{d.step_bytes / GIB:.2f} GiB, {d.step_bytes / d.needed_bytes:.2f} x weights and live cache"
    rate = f"projected {d.projected_tokens_per_s:.0f} tokens/s"
    return f"{fit}; a decode step at {d.places} places moves {moved}; {rate}"
