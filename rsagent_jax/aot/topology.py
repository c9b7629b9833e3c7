"""TPU chips and slices by name, and the devices of a slice that is only described.

Sources of the chip table: https://docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x} and
https://jax-ml.github.io/scaling-book/tpus. Memory per device is what libtpu's compiler itself enforces (it names its
limit when a program does not fit; tests/aot/test_topology.py asks it), a little below the nominal size.
"""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Self

from rsagent_jax.config.import_path import closest
from rsagent_jax.types import DataError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU. Figures are per JAX device: a chip of two cores, but on tpu7x, where each core is a device."""

    name: str
    bf16_flops: float  # per second
    hbm_bytes: int  # usable by one program
    hbm_bandwidth: float  # bytes per second
    ici_link_bandwidth: float  # bytes per second, one way over one link of the chip, shared by its devices
    dimensions: int  # of the torus that the links make: two links for each
    named_by: int = 1  # what the number in a slice's name counts: cores, two a chip, but chips on v5e and v6e
    devices_per_chip: int = 1


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, int(30.75 * GIB), 1200e9, 45e9, 3, named_by=2),
        Chip("v5e", 197e12, int(15.75 * GIB), 819e9, 45e9, 2),
        Chip("v5p", 459e12, int(95.74 * GIB), 2765e9, 90e9, 3, named_by=2),
        Chip("v6e", 918e12, int(31.25 * GIB), 1638e9, 90e9, 2),
        # The vendor gives 1200 GB/s both ways per chip and no figure per link: 600 one way over 6 links.
        Chip("tpu7x", 2307e12 / 2, int(94.75 * GIB), 7380e9 / 2, 100e9, 3, named_by=2, devices_per_chip=2),
    )
}

# The slices that the vendor sells, by their chips.
_SHAPES = {
    2: ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)),
    3: ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8)),
}
SLICES = {
    f"{chip.name}-{math.prod(shape) * chip.named_by}": (chip.name, shape)
    for chip in CHIPS.values()
    for shape in _SHAPES[chip.dimensions]
    if shape != (1, 1, 1) or chip.name == "tpu7x"
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: chips in a mesh or torus."""

    name: str  # what the user called it
    chip: Chip
    shape: tuple[int, ...]  # chips along each axis

    @property
    def compiler_name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def devices(self) -> int:
        return math.prod(self.shape) * self.chip.devices_per_chip

    @property
    def host(self) -> Self:
        """What one process drives: 2x2 chips, but all of a slice of at most eight chips of v5e or v6e."""
        if self.chip.dimensions == 2 and math.prod(self.shape) <= 8:
            return self
        return dataclasses.replace(self, shape=(*(min(2, n) for n in self.shape[:2]), 1)[: len(self.shape)])

    @property
    def hosts(self) -> int:
        """Processes that drive it together."""
        return self.devices // self.host.devices

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Which axes close into a ring: 16 long on v5e and v6e; all three of a slice made of whole 4x4x4 cubes."""
        if self.chip.dimensions == 2:
            return tuple(n == 16 for n in self.shape)
        return (all(n % 4 == 0 for n in self.shape),) * 3

    @property
    def ici_bandwidth(self) -> float:
        """Bytes per second that one device sends when a ring collective runs on every axis of the slice at once.

        An axis that closes into a ring gives two links, any other axis longer than 1 gives one: on a line the end chips
        have one neighbour, and the slowest chip sets the pace. A collective over fewer axes gets less than this.
        The two devices of a single tpu7x chip are joined by a link that the vendor's page calls six times as fast as
        one of these. 0 on one device.
        """
        if math.prod(self.shape) == 1:
            return 6 * self.chip.ici_link_bandwidth if self.devices > 1 else 0.0
        links = sum(2 if ring else 1 for n, ring in zip(self.shape, self.wrap, strict=True) if n > 1)
        return links * self.chip.ici_link_bandwidth / self.chip.devices_per_chip


def parse_topology(name: str) -> Topology:
    """`v5e:4x4`, `v5p:2x2x1` (the shape in chips) or `v5e-16`, `v5p-8` (a slice by its size), else one DataError."""
    plain = name.strip().lower().replace("v5litepod", "v5e")
    if not plain:
        raise DataError("--aot=SLICE, such as --aot=v5e-16, is missing: what to compile for")
    if plain in SLICES:
        chip, shape = SLICES[plain]
        return Topology(name, CHIPS[chip], shape)
    example = {c.name: f"{c.name}:{'2x2' if c.dimensions == 2 else '2x2x1'}" for c in CHIPS.values()}
    match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)+)", plain)
    if match and (chip := CHIPS.get(match[1])):
        shape = tuple(int(n) for n in match[2].split("x"))
        # hosts hold 2x2 chips
        if len(shape) == chip.dimensions and all(n == 1 or (n > 0 and n % 2 == 0) for n in shape):
            return Topology(name, chip, shape)
        raise DataError(
            f"topology {name!r}: {chip.name} takes {chip.dimensions} sizes, each 1 or even, as in {example[chip.name]}"
        )
    known = [*SLICES, *(Topology("", CHIPS[chip], shape).compiler_name for chip, shape in SLICES.values())]
    raise DataError(
        f"unknown TPU topology {name!r}{closest(plain, known, cutoff=0.5)}\n"
        f"known slices: {' '.join(SLICES)}\nor the shape in chips: {' '.join(example.values())}"
    )


def devices(topology: Topology) -> list:
    """JAX devices that can be compiled for and not run on. DataError without libtpu or for a slice it refuses.

    The shape of a host is the common one of 2x2 chips, fewer where the slice is smaller.
    """
    # Read when libtpu loads. Without the first it asks a metadata server that only a TPU VM has; without the second
    # two processes on one machine cannot compile at once; the others stand for that server's answers, for want of which
    # it complains on the terminal. The topology is the one asked for below, whatever they say.
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-4"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
    ):
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    bounds = (*(min(2, n) for n in topology.shape[:2]), 1)
    try:
        found = topologies.get_topology_desc(
            topology.compiler_name,
            "tpu",
            chip_config_name="megacore" if topology.chip.name in ("v4", "v5p") else "default",
            chips_per_host_bounds=bounds,
            num_slices=1,
            wrap=(*topology.wrap, *(False,) * (3 - len(topology.wrap))),
        ).devices
    except (RuntimeError, ValueError, OSError) as error:
        if not os.environ.get("TPU_LIBRARY_PATH") and importlib.util.find_spec("libtpu") is None:
            raise DataError(
                "compiling for a TPU that is not at hand needs libtpu, its compiler, which also runs on a machine"
                ' without a TPU: pip install "jax[tpu]"'
            ) from error
        raise DataError(f"libtpu does not take the topology {topology.name!r}: {error}") from error
    return list(found)
