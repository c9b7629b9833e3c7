"""One report per compiled program: does it fit, how much does it work and move, and what step time that projects.

The projection is a roofline: the largest of arithmetic at the chip's bf16 peak, HBM traffic at its bandwidth, and bytes
sent over the links at theirs, as if the three overlapped entirely and each ran at full speed. Beside it stands what the
program's own schedule gives (aot/schedule.py): operation after operation, with the collectives that it does not hide.
No device ran anything; a real step takes longer than either.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax

from rsagent_jax.aot import compiled as hlo
from rsagent_jax.aot.flops import Workload
from rsagent_jax.aot.schedule import Overlap, schedule_overlap
from rsagent_jax.aot.topology import GIB, Topology
from rsagent_jax.aot.traced import Kernel, KernelFlops, traced_work


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

    def compiled(self, peak: int, hbm: int, traffic: int, seconds: float | None) -> Self:
        """With what a compiled program tells; traffic and seconds are of one run."""
        fit = max(0, self.slots + (hbm - peak) // self.slot_bytes * (self.devices // self.tensor))
        if not (self.steps and seconds):
            return dataclasses.replace(self, slots_fit=fit)
        rate = self.slots * self.steps / seconds
        return dataclasses.replace(self, slots_fit=fit, step_bytes=traffic / self.steps, projected_tokens_per_s=rate)


@dataclasses.dataclass(frozen=True)
class Job:
    """One program, ready to be traced."""

    program: str
    trace: Callable[[], jax.stages.Traced]
    model_flops: float = 0.0  # of one run over all devices
    resident_bytes: int = 0  # per device: what train.py holds while the program runs and does not pass to it
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
    hlo_flops: float = 0.0  # what the program does: rematerialisation and padding too
    hlo_to_model_flops: float | None = None  # None without model_flops, or when some kernel's FLOPs are not known
    collective_bytes: dict[str, float] = dataclasses.field(default_factory=dict)  # sent by a device in a run, by kind
    hbm_traffic_bytes: int = 0
    projected_step_s: float | None = None
    projected_mfu: float | None = None  # model_flops over what the mesh could do in projected_step_s
    bound_by: str = "memory"  # compute, hbm or ici; memory when the program does not fit
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)  # the three terms of the projection
    overlap: Overlap | None = None  # what the schedule hides of seconds["ici"], and a step with what it does not
    quick: bool = False  # compiled with --aot_quick: HBM traffic and waits are more than the real program's
    argument_bytes: int = 0
    temp_bytes: int = 0
    resident_bytes: int = 0  # in HBM while the program runs, but no arguments of it
    collectives: int = 0  # executions in one run
    largest_collective: hlo.Collective | None = None  # by its result on a device: where to look when memory is short
    kernels: tuple[Kernel, ...] = ()
    unknown_trip_counts: tuple[str, ...] = ()  # loops that count as if they ran once
    largest_allocations: tuple[str, ...] = ()  # of a program that does not fit, where the compiler tells
    decoding: Decoding | None = None

    @property
    def kernels_without_flops(self) -> tuple[str, ...]:
        return tuple(kernel.name for kernel in self.kernels if kernel.flops is None)


def report_job(job: Job, topology: Topology, kernel_flops: KernelFlops | None = None) -> ProgramReport:
    """Compiles a program and reports on it, whether it fits or not. `kernel_flops`: as traced.traced_work takes it."""
    traced = job.trace()
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        return out_of_memory(error, job, topology)
    return analyse(traced, compiled, job, topology, kernel_flops)


def needed_bytes(job: Job, compiled: jax.stages.Compiled, platform: str) -> int:
    """On each device, with what train.py holds beside the program."""
    m = compiled.memory_analysis()
    whole = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
    # Of a TPU the compiler tells the true peak (`analyse`); elsewhere it leaves temporaries out of it.
    return job.resident_bytes + (m.peak_memory_in_bytes if platform == "tpu" else whole)


def analyse(
    traced: Any, compiled: Any, job: Job, topology: Topology, kernel_flops: KernelFlops | None = None
) -> ProgramReport:
    """Reads a `jax.stages.Compiled` for `topology`, of which it may use fewer devices, and what it was made from."""
    program, work = hlo.Program(compiled.as_text()), traced_work(traced, kernel_flops)
    memory, found = compiled.memory_analysis(), program.collectives()
    sent, traffic = hlo.collective_bytes(found), program.hbm_traffic_bytes()
    flops = work.product_flops + program.devices * sum(kernel.flops or 0 for kernel in work.kernels)
    chip, speed = topology.chip, program.devices * topology.chip.bf16_flops
    seconds = {
        "compute": flops / speed,
        "hbm": traffic / chip.hbm_bandwidth,
        "ici": sum(sent.values()) / topology.ici_bandwidth if topology.ici_bandwidth else 0.0,
    }
    bound_by = max(seconds, key=seconds.get)
    step = seconds[bound_by]
    # Not arguments + temporaries: the compiler accepts programs whose sum exceeds a device. Where it refuses one,
    # the size it names is this peak within a hundredth.
    peak = memory.peak_memory_in_bytes + job.resident_bytes
    known = job.model_flops and all(kernel.flops is not None for kernel in work.kernels)
    return ProgramReport(
        program=job.program,
        topology=topology.name,
        devices=program.devices,
        peak_hbm_bytes=peak,
        hbm_bytes=chip.hbm_bytes,
        fits=peak <= chip.hbm_bytes,
        model_flops=job.model_flops,
        hlo_flops=flops,
        hlo_to_model_flops=flops / job.model_flops if known else None,
        collective_bytes=sent,
        hbm_traffic_bytes=traffic,
        projected_step_s=step or None,
        projected_mfu=job.model_flops / (step * speed) if step else None,
        bound_by=bound_by,
        seconds=seconds,
        overlap=schedule_overlap(program, topology, kernel_flops),
        argument_bytes=memory.argument_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        resident_bytes=job.resident_bytes,
        collectives=sum(c.executions for c in found),
        largest_collective=max(found, key=lambda c: c.result_bytes, default=None),
        kernels=work.kernels,
        unknown_trip_counts=(*program.unknown_trip_counts, *work.unknown_trip_counts),
        decoding=job.decoding and job.decoding.compiled(peak, chip.hbm_bytes, traffic, step),
    )


def out_of_memory(error: BaseException, job: Job, topology: Topology) -> ProgramReport:
    """The report of a program that the compiler refused for its memory. Raises the error again when it says otherwise.

    The compiler's message is either `total memory required … (16.12G) exceeds available HBM (15.75G)` or the longer
    `Used 17.44G of 15.75G hbm. Exceeded hbm capacity by 1.69G. …` with a list of the largest allocations.
    """
    message, size = str(error), r"([\d.]+)([KMGT]?)"
    sizes = re.search(rf"required for .*?\({size}\) exceeds available HBM \({size}\)", message, re.S)
    sizes = sizes or re.search(rf"Used {size} of {size} hbm", message)
    if "RESOURCE_EXHAUSTED" not in message or sizes is None:
        raise error
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    used, limit = (int(float(sizes[i]) * units[sizes[i + 1]]) for i in (1, 3))
    peak, allocations = used + job.resident_bytes, []
    for block in re.split(r"\n\s*\d+\. Size: ", message)[1:]:
        shape, name = re.search(r"Shape: (\S+?)(?:\{|\s|$)", block), re.search(r'op_name="([^"]*)"', block)
        name = name or re.search(r"Operator: (.*)", block)
        allocations.append(" ".join([block.split()[0], *(match[1].strip() for match in (shape, name) if match)]))
    return ProgramReport(
        program=job.program,
        topology=topology.name,
        devices=topology.devices,
        peak_hbm_bytes=peak,
        hbm_bytes=limit,
        fits=False,
        model_flops=job.model_flops,
        resident_bytes=job.resident_bytes,
        largest_allocations=tuple(allocations),
        decoding=job.decoding and job.decoding.compiled(peak, limit, 0, None),
    )


def reports_to_json(reports: Sequence[ProgramReport]) -> str:
    """A list with an object per program, on one line."""
    return json.dumps([dataclasses.asdict(report) for report in reports])


def reports_table(reports: Sequence[ProgramReport]) -> str:
    """One line per program for a terminal, memory and traffic per device in GiB, then what the numbers leave out."""
    head = ("program", "on", "peak GiB", "of", "fits", "traffic GiB", "sent GiB", "model TF", "hlo/model", "step s",
            "MFU", "bound by", "sending s", "exposed s", "with it s")  # fmt: skip
    rows = [head]
    for r in reports:
        step, ratio, mfu = r.projected_step_s, r.hlo_to_model_flops, r.projected_mfu
        apart = (r.overlap.collective_s, r.overlap.exposed_s, r.overlap.step_s) if r.overlap else ()
        rows.append((
            r.program, f"{r.topology} ({r.devices})", f"{r.peak_hbm_bytes / GIB:.2f}", f"{r.hbm_bytes / GIB:.2f}",
            "yes" if r.fits else "NO", f"{r.hbm_traffic_bytes / GIB:.2f}" if step else "-",
            f"{sum(r.collective_bytes.values()) / GIB:.3f}" if step else "-", f"{r.model_flops / 1e12:.2f}",
            f"{ratio:.2f}" if ratio else "-", f"{step:.4f}" if step else "-", f"{mfu:.1%}" if mfu else "-", r.bound_by,
            *(f"{seconds:.4f}" for seconds in apart), *["-"] * (3 - len(apart)),
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for r in reports:
        if r.kernels_without_flops:
            lines.append(f"{r.program}: hlo FLOPs leave out {', '.join(r.kernels_without_flops)}")
        if r.unknown_trip_counts:
            lines.append(f"{r.program}: counted as run once, not known how often: {', '.join(r.unknown_trip_counts)}")
        if r.decoding:
            lines.append(f"{r.program}: {_decoding_line(r.decoding)}")
        lines += [f"{r.program}: holds {allocation}" for allocation in r.largest_allocations[:5]]
    return "\n".join(lines)


def _decoding_line(d: Decoding) -> str:
    fit = f"{d.slots} slots on {d.devices} devices, {d.tensor} to a slot; {d.slots_fit} fit"
    if d.step_bytes is None:
        return fit
    moved = f"{d.step_bytes / GIB:.2f} GiB, {d.step_bytes / d.needed_bytes:.2f} x weights and live cache"
    return f"{fit}; a decode step at {d.places} places moves {moved}; projected {d.projected_tokens_per_s:.0f} tokens/s"
