"""Processes of their own with simulated devices, whose number is set before jax starts."""

import contextlib
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

from rsagent_jax.runtime.listening import free_port

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
ROOT = pathlib.Path(__file__).parents[1]


def free_pair() -> int:
    """A port that is free, as the one behind it is: rsagent_jax.reproduce takes both."""
    while True:
        with contextlib.suppress(OSError):
            return free_port(free_port() + 1) - 1


def run_simulated(arguments: list[str], devices: int, count: int = 1, flags: str = "", **env: str) -> str:
    """What the first of `count` processes prints; as run_all_simulated in all else."""
    return run_all_simulated(arguments, devices, count, flags, **env)[0]


def run_all_simulated(
    arguments: list[str], devices: int, count: int, flags: str = "", statuses: tuple[int, ...] = (), **env: str
) -> list[str]:
    """What each of the processes of start_simulated prints. What one says on stderr is shown if it fails: ends
    otherwise than with its status, 0 unless others are given."""
    running = start_simulated(arguments, devices, count, flags, **env)
    try:
        said = [process.communicate(timeout=800) for process in running]
    finally:
        for process in running:
            process.kill()
    ended = tuple(process.returncode for process in running)
    assert ended == (statuses or (0,) * count), "\n".join([f"{ended}", *(error[-3000:] for _, error in said)])
    return [out for out, _ in said]


def start_simulated(
    arguments: list[str],
    devices: int,
    count: int,
    flags: str = "",
    reach: Callable[[int, str], str] = lambda i, address: address,
    **env: str,
) -> list[subprocess.Popen]:
    """`count` processes that run python with these arguments, on `devices` devices each.

    Several find each other by processes.initialize_distributed. reach: by which address process i reaches the first.
    """
    address = f"127.0.0.1:{free_pair()}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flags} --xla_force_host_platform_device_count={devices}"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "agent")])
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path} | env
    running = []
    for i in range(count):
        who = dict(zip(VARIABLES, (reach(i, address), str(count), str(i)), strict=True)) if count > 1 else {}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        running.append(subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=env | who, **pipes))
    return running
