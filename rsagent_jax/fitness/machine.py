"""What there is: versions, devices and the mesh over them, room on the disk."""

import importlib.metadata
import importlib.util
import pathlib
import platform
import re
import shutil

import jax

from rsagent_jax.aot.devices import chip_of
from rsagent_jax.aot.topology import GIB, parse_topology
from rsagent_jax.config.import_path import shipped
from rsagent_jax.config.schema import TrainConfig
from rsagent_jax.fitness.finding import Examined, Finding, Verdict, not_run
from rsagent_jax.models.qwen25_vl import convert
from rsagent_jax.rollout.startup import SPACE
from rsagent_jax.runtime import processes, sharding
from rsagent_jax.train.startup import checkpoint_bytes

PACKAGES = "jax jaxlib flax optax orbax-checkpoint numpy transformers grpcio".split()
ACCELERATORS = ("accel[0-9]*", "vfio/[0-9]*", "nvidia[0-9]*")  # device files of TPUs and of NVIDIA's GPUs
DEV = pathlib.Path("/dev")


def check_versions(examined: Examined) -> list[Finding]:
    """Against the pins of requirements.txt; an installed package has none beside it."""
    del examined
    packages = PACKAGES + ["libtpu"] * (importlib.util.find_spec("libtpu") is not None)
    have = {name: importlib.metadata.version(name) for name in packages}
    file = pathlib.Path(shipped("requirements.txt"))
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", file.read_text(), re.MULTILINE)) if file.is_file() else {}
    other = [f"{name} {pins[name]}" for name in have if pins.get(name, have[name]) != have[name]]
    figure = ", ".join([f"python {platform.python_version()}", *map(" ".join, have.items())])
    against = f"{file}: {', '.join(other) or 'the same'}" if pins else "the package comes without a list of pins"
    remedy = "pip install -r requirements.txt, on every host"
    return [Finding.judged("versions", not other, Verdict.WRONG, figure, against, remedy, alike=figure)]


def check_devices(examined: Examined) -> list[Finding]:
    """Against the slice that the config names, and against the device files of this host."""
    devices, own, named = jax.devices(), jax.local_devices(), getattr(examined.config, "slice", "")
    chip, kind = chip_of(own[0]), own[0].device_kind
    figure = f"{len(devices)} x {kind}, {len(own)} on each of {jax.process_count()} hosts"
    files = sorted(str(path) for pattern in ACCELERATORS for path in DEV.glob(pattern))
    good, against, remedy = True, "the config names no slice", ""
    if own[0].platform == "cpu" and files:
        good, against = False, f"this host has {files[0]}"
        remedy = 'pip install "jax[tpu]" or "jax[cuda12]"; unset JAX_PLATFORMS; end other processes with the devices'
    elif named:
        slice = parse_topology(named)
        good = chip is not None and (len(devices), chip.name) == (slice.devices, slice.chip.name)
        against = f"slice {named}: {slice.devices} x {slice.chip.name}"
        remedy = "give the --config.slice that this is, and start the command on all of its hosts"
    more = dict(value=float(len(own)), alike=kind)
    return [Finding.judged("devices", good, Verdict.WRONG, figure, against, remedy, **more)]


def check_mesh(examined: Examined) -> list[Finding]:
    """Whether devices, rows and parameters divide as the config wants; a DataError says what does not."""
    config = examined.settled
    if not isinstance(config, TrainConfig):
        mesh = processes.local_mesh(examined.sampling.tensor, examined.sampling.slots)
        return [Finding("mesh", Verdict.OK, f"{dict(mesh.shape) if mesh else 'one device'} on each host")]
    mesh = sharding.make_mesh(config.mesh)
    sharding.param_shardings(convert.abstract_model(examined.policy), mesh)
    rows = {stage: getattr(config, stage).batch.rows for stage in config.stages}
    for stage, count in rows.items():
        processes.row_share(mesh).of(count, f"{stage}.batch.rows")
    return [Finding("mesh", Verdict.OK, f"{dict(mesh.shape)}, rows {rows}", "rows and parameters divide")]


def check_space(examined: Examined) -> list[Finding]:
    """Room for the checkpoints of all stages, as train.py wants it before it starts."""
    config, directory, needed = examined.settled, examined.workdir, SPACE
    if directory is None or not directory.is_dir():
        return not_run("disk", "no --workdir on a disk of this machine was given")
    if isinstance(config, TrainConfig):
        model = convert.abstract_model(examined.policy)
        needed += sum(checkpoint_bytes(model, config, stage) for stage in config.stages)
    free = shutil.disk_usage(directory).free
    figure, against = f"{free / GIB:.2f} GiB free in {directory}", f"{needed / GIB:.2f} GiB for checkpoints and logs"
    remedy = "make room, or give another --workdir"
    return [Finding.judged("disk", free >= needed, Verdict.WRONG, figure, against, remedy)]
