"""Names of slices, and what the compiler makes of them: libtpu needs no TPU to say how many devices a slice has."""

import importlib.util
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rsagent_jax.aot.devices import chip_of
from rsagent_jax.aot.topology import CHIPS, GIB, SLICES, devices, parse_topology
from rsagent_jax.types import DataError
from tests.refusals import refused


@pytest.mark.parametrize(
    ("name", "compiler_name", "count", "of_host"),
    [
        ("v5e:4x4", "v5e:4x4", 16, 4),
        ("v6e:2x4", "v6e:2x4", 8, 8),
        ("v5p:2x2x1", "v5p:2x2x1", 4, 4),
        ("tpu7x:2x2x1", "tpu7x:2x2x1", 8, 8),  # two devices a chip
        ("v5e-1", "v5e:1x1", 1, 1),
        ("v5e-8", "v5e:2x4", 8, 8),
        ("v5e-16", "v5e:4x4", 16, 4),
        ("v5litepod-16", "v5e:4x4", 16, 4),  # what the vendor's tools call it
        ("v5e-256", "v5e:16x16", 256, 4),
        ("v6e-8", "v6e:2x4", 8, 8),
        ("v6e-256", "v6e:16x16", 256, 4),
        ("v4-16", "v4:2x2x2", 8, 4),  # counts cores, a device is a chip of two
        ("v5p-8", "v5p:2x2x1", 4, 4),
        ("v5p-64", "v5p:2x4x4", 32, 4),
        ("v5p-256", "v5p:4x4x8", 128, 4),
        ("tpu7x-2", "tpu7x:1x1x1", 2, 2),
        ("tpu7x-8", "tpu7x:2x2x1", 8, 8),  # counts devices
        ("TPU7x-16", "tpu7x:2x2x2", 16, 8),
    ],
)
def test_names(name, compiler_name, count, of_host):
    """A host has four chips, or is the whole of a slice of up to eight of v5e or v6e."""
    topology = parse_topology(name)
    assert (topology.name, topology.compiler_name, topology.devices) == (name, compiler_name, count)
    assert topology.host.devices == of_host and topology.hosts == count // of_host


def test_the_compiler_lays_every_slice_out_as_many_devices():
    for name in SLICES:
        topology = parse_topology(name)
        assert len(devices(topology)) == topology.devices, name


def test_unknown_names_are_one_message():
    with pytest.raises(DataError) as error:
        parse_topology("v7e-8")
    message = str(error.value)
    assert "'v7e-8'" in message and "did you mean v6e-8?" in message
    assert all(f" {name} " in message.replace("\n", " ") + " " for name in SLICES)
    for wrong, says in (("v5e:3x3", "each 1 or even"), ("v5e:2x2x2", "takes 2 sizes"), ("v5p-9", "v5p-8"), ("", "v5e")):
        refused(says, parse_topology, wrong)


@pytest.mark.parametrize(
    ("name", "wrap", "gigabytes"),
    [
        ("v5e-1", (False, False), 0),  # nobody to send to
        ("v5e-16", (False, False), 2 * 45),  # two lines: one link each
        ("v5e-128", (False, True), 3 * 45),  # 8 x 16: the axis of 16 is a ring, two links
        ("v6e-256", (True, True), 4 * 90),
        ("v5p-8", (False,) * 3, 2 * 90),  # 2 x 2 x 1: no third axis
        ("v5p-64", (False,) * 3, 3 * 90),  # 2 x 4 x 4 is not made of whole cubes
        ("v5p-256", (True,) * 3, 6 * 90),
        ("tpu7x-128", (True,) * 3, 6 * 100 / 2),  # shared by the two devices of a chip
    ],
)
def test_links_that_a_device_has(name, wrap, gigabytes):
    topology = parse_topology(name)
    assert topology.wrap == wrap
    assert topology.ici_bandwidth == gigabytes * 1e9


def test_gpus_are_known_by_whole_words():
    kinds = ("NVIDIA H200", "NVIDIA H200 NVL", "NVIDIA H100 80GB HBM3", "NVIDIA GH200 480GB", "TPU v5 lite", "cpu")
    found = [chip_of(types.SimpleNamespace(device_kind=kind)) for kind in kinds]
    assert [chip and chip.name for chip in found] == ["H200", "H200 NVL", "H100", None, "v5e", None]


@pytest.mark.parametrize("chip", CHIPS)
def test_memory_is_what_the_compiler_enforces(chip):
    """It refuses 256 GiB of arguments and says what it has, in GiB with two decimals."""
    topology = parse_topology(f"{chip}:{'2x2' if CHIPS[chip].dimensions == 2 else '2x2x1'}")
    mesh = Mesh(np.array(devices(topology)), ("all",))
    too_much = jax.ShapeDtypeStruct((256, 2**28), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED") as error:
        jax.jit(lambda x: x + 1).lower(too_much).compile()
    limit = re.search(r"exceeds available HBM \(([\d.]+)G\)|of ([\d.]+)G hbm", str(error.value))
    assert float(limit[1] or limit[2]) == pytest.approx(topology.chip.hbm_bytes / GIB, abs=0.006)


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    def not_there(*_, **__):
        raise RuntimeError("JAX TPU support not installed")

    monkeypatch.setattr(topologies, "get_topology_desc", not_there)
    monkeypatch.setitem(sys.modules, "libtpu", None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    assert importlib.util.find_spec("libtpu") is None
    refused(re.escape('pip install "jax[tpu]"'), devices, parse_topology("v5e-4"))
