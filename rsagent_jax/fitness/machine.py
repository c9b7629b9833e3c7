"""What there is: versions, devices and the mesh over them, room on the disk."""

from __future__ import annotations

import importlib.metadata
import pathlib
import platform
import re
import shutil

import jax

from rsagent_jax.aot.topology import GIB, parse_topology
from rsagent_jax.config.import_path import shipped
from rsagent_jax.config.schema import TrainConfig
from rsagent_jax.fitness.finding import Examined, Finding, Verdict, not_run
from rsagent_jax.fitness.speed import chip_of
from rsagent_jax.models.qwen25_vl import convert
from rsagent_jax.rollout.startup import SPACE
from rsagent_jax.runtime import processes, sharding
from rsagent_jax.train.startup import checkpoint_bytes

PACKAGES = "jax jaxlib libtpu flax optax orbax-checkpoint numpy transformers grpcio".split()
ACCELERATORS = ("accel[0-9]*", "vfio/[0-9]*", "nvidia[0-9]*")  # device files of TPUs and of NVIDIA's GPUs
DEV = pathlib.Path("/dev")


def check_versions(examined: Examined) -> list[Finding]:
    """Against the exact pins of requirements.txt; libtpu has none there."""
    del examined
    have = {name: version for name in PACKAGES if (version := _version(name))}
    file = pathlib.Path(shipped("requirements.txt"))
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", file.read_text(), re.MULTILINE)) if file.is_file() else {}
    other = [f"{name} {pins[name]}" for name in have if pins.get(name, have[name]) != have[name]]
    said = f"python {platform.python_version()}, " + ", ".join(f"{name} {have[name]}" for name in have)
    against = (
        f"requirements.txt has {', '.join(other)}" if other else f"{file.name}: the same" if pins else "no pins here"
    )
    remedy = "pip install -r requirements.txt, on every host"
    return [Finding.judged("versions", not other, Verdict.WRONG, said, against, remedy, alike=said)]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def check_devices(examined: Examined) -> list[Finding]:
    """Against the slice that the config names, and against the device files of this host."""
    devices, own = jax.devices(), jax.local_devices()
    kind, named = own[0].device_kind, getattr(examined.config, "slice", "")
    figure = f"{len(devices)} x {kind}, {len(own)} on each of {jax.process_count()} hosts"
    files = sorted(str(path) for pattern in ACCELERATORS for path in DEV.glob(pattern))
    if own[0].platform == "cpu" and files:
        remedy = (
            'pip install "jax[tpu]" or "jax[cuda12]"; unset JAX_PLATFORMS; see that no other process holds the devices'
        )
        return [Finding("devices", Verdict.WRONG, figure, f"this host has {files[0]}", remedy)]
    if not named:
        return [Finding("devices", Verdict.OK, figure, "the config names no slice", value=float(len(own)), alike=kind)]
    wanted, chip = parse_topology(named), chip_of(own[0])
    good = len(devices) == wanted.devices and chip is not None and chip.name == wanted.chip.name
    against = f"slice {named}: {wanted.devices} x {wanted.chip.name}"
    remedy = "give --config.slice of the slice that this is, and start the command on all of its hosts"
    return [Finding.judged("devices", good, Verdict.WRONG, figure, against, remedy, value=float(len(own)), alike=kind)]


def check_mesh(examined: Examined) -> list[Finding]:
    """Whether devices, rows and parameters divide as the config wants. A DataError says what does not."""
    config = examined.settled
    if not isinstance(config, TrainConfig):
        mesh = processes.local_mesh(config.sampling.tensor)
        shape = dict(mesh.shape) if mesh else {"devices": 1}
        return [Finding("mesh", Verdict.OK, f"{shape} on each host", "sampling.tensor divides a host's devices")]
    mesh = sharding.make_mesh(config.mesh)
    sharding.param_shardings(convert.abstract_model(examined.policy), mesh)
    share = processes.row_share(mesh)
    rows = {stage: getattr(config, stage).batch.rows for stage in config.stages}
    for stage, count in rows.items():
        share.of(count, f"{stage}.batch.rows")
    said = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return [Finding("mesh", Verdict.OK, said, f"rows of a micro-batch: {rows}; all parameters divide")]


def check_space(examined: Examined) -> list[Finding]:
    """Room for the checkpoints of all stages, as train.py wants it before it starts."""
    directory = examined.workdir
    if directory is None or "://" in str(directory):
        return not_run("disk", "no --workdir on a disk of this machine was given")
    config, needed = examined.settled, SPACE
    if isinstance(config, TrainConfig):
        model = convert.abstract_model(examined.policy)
        needed += sum(checkpoint_bytes(model, config, stage) for stage in config.stages)
    free = shutil.disk_usage(directory).free
    against = f"{needed / GIB:.2f} GiB for a checkpoint of each stage and what lies beside it"
    remedy = "make room, or give another --workdir"
    figure = f"{free / GIB:.2f} GiB free in {directory}"
    return [Finding.judged("disk", free >= needed, Verdict.WRONG, figure, against, remedy)]
