"""policy.remat = "auto": the fastest policy with which every stage's gradients fit a device, found by compiling them.

Each of KINDS keeps all that the ones after it keep. What train.py holds beside the program counts as well.
"""

import dataclasses
import math

import jax
from jax.sharding import Mesh

from rsagent_jax.aot.report import needed_bytes
from rsagent_jax.aot.stages import fill_topology_defaults, policy_config, stage_jobs
from rsagent_jax.aot.topology import GIB, Topology, devices
from rsagent_jax.config.schema import TrainConfig
from rsagent_jax.models.qwen25_vl.config import Qwen25VLConfig
from rsagent_jax.runtime import processes, sharding

AUTO = "auto"
KINDS = ("none", "dots", "selective", "attention", "full")  # from the fastest to the leanest
SPARE = 0.05  # of a device's memory that stays free: for fragments, and for what else the process has there


def settle_remat(config: TrainConfig, policy: Qwen25VLConfig, before: str) -> TrainConfig:
    """The config with "auto" replaced, on all processes alike: by the leanest that one of them asks for. `before`: what
    the last start of the same run took; "" where there is none. Says which, and why."""
    if config.policy.remat != AUTO:
        return config

    def choose() -> tuple[str, str]:
        if before in KINDS:
            return before, "as at this run's last start"
        return choose_remat(config, policy, sharding.make_mesh(config.mesh), device_limit())

    kind, why = processes.all_or_none(choose)
    kind = max(processes.exchange(kind), key=KINDS.index)
    print(f"policy.remat = {AUTO}: {kind}; {why}")
    return _with_remat(config, kind)


def remat_for_topology(config: TrainConfig, topology: Topology) -> tuple[TrainConfig, str]:
    """For --aot: (the config with "auto" replaced for this slice, why)."""
    if config.policy.remat != AUTO:
        return config, ""
    policy = policy_config(config.policy.weights)
    filled = fill_topology_defaults(config, topology, policy)
    mesh = sharding.make_mesh(filled.mesh, devices(topology))
    kind, why = choose_remat(filled, policy, mesh, topology.chip.hbm_bytes)
    return _with_remat(config, kind), f"policy.remat = {AUTO} for {topology.name}: {kind}; {why}"


def choose_remat(config: TrainConfig, policy: Qwen25VLConfig, mesh: Mesh, limit: int | None) -> tuple[str, str]:
    """(one of KINDS, why). `limit`: bytes that a device has; None where nobody tells, as on a CPU."""
    if limit is None:
        return KINDS[-1], "this platform does not tell how much memory a device has"
    tried, room = [], f"of {limit / GIB:.2f} GiB on a device, {SPARE:.0%} of it to spare"
    for kind in KINDS:
        needed = max(gradient_bytes(_with_remat(config, kind), stage, policy, mesh) for stage in config.stages)
        tried.append(f"{kind} {needed / GIB:.2f}" if math.isfinite(needed) else f"{kind} refused by the compiler")
        if needed <= limit * (1 - SPARE):
            return kind, f"{', '.join(tried)} {room}"
    return KINDS[-1], f"which does not fit either: {', '.join(tried)} {room}"


def gradient_bytes(config: TrainConfig, stage: str, policy: Qwen25VLConfig, mesh: Mesh) -> float:
    """On the fullest device while a micro-batch's gradients are computed; infinite where the compiler refuses it."""
    job = next(job for job in stage_jobs(config, stage, policy, mesh) if job.program == f"{stage} gradients")
    try:
        return needed_bytes(job, job.trace().lower().compile(), mesh.devices.flat[0].platform)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return math.inf


def device_limit() -> int | None:
    """Bytes that a program may use on each of this process's devices, where the platform tells."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
    return None if None in limits else min(limits)


def _with_remat(config: TrainConfig, kind: str) -> TrainConfig:
    return dataclasses.replace(config, policy=dataclasses.replace(config.policy, remat=kind))
