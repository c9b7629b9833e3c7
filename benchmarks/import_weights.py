"""Import of a Hugging Face checkpoint: seconds, bytes read and peak host memory, ours beside what a user would write.

  python benchmarks/import_weights.py [--gb=4] [--repeat=2]

Writes a random bf16 checkpoint of the 3B's shape with fewer layers (shards of 1 GB, an index) and loads it in fresh
processes on the CPU back end, where device memory is host memory too:

  one       rsagent_jax onto one device
  fsdp=8    rsagent_jax onto 8 simulated devices of one process
  4 x 2     rsagent_jax in 4 processes of 2 devices each (jax.distributed on loopback), fsdp=8; the worst of the four
  load_file safetensors.numpy.load_file, then jax.device_put, shard by shard; the hub's layout, nothing is stacked
  torch     transformers' from_pretrained in bf16, then one value of every page: its parameters stay in the memory map,
            where ours are stacked, transposed and on the device (left out where torch is not installed)

seconds  wall time, the best of --repeat runs; cpu_s is user and system time of the same run
read     the bytes of the slices that were read; of the last two, what the process asked the kernel for (rchar): nothing
         of a file that it maps
peak     VmHWM above the resident memory before the load; mapped pages count while they are resident
bits     the sum of all weights as 16-bit numbers: where it is not the same for all, the run fails. Layouts differ, so
         it does not say where a weight lies; tests/models/test_convert.py does
bound    the process's own shards + 2 x the largest tensor of the file; ours must stay below it

The files are read before each run, so they come from the page cache.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported; the runs inherit it

import numpy as np  # noqa: E402

from benchmarks._policy_step import import_torch, published  # noqa: E402

GB = 10**9
PROCESSES, DEVICES_EACH = 4, 2
COLUMNS = "seconds cpu_s read_gb peak_gb bound_gb".split()


############################## The checkpoint ##############################


def write_checkpoint(directory: pathlib.Path, gb: float) -> dict[str, Any]:
    """Random bf16 weights of about `gb` x 10^9 bytes; returns their sizes in bytes."""
    import jax

    from rsagent_jax.models.qwen25_vl import config, convert

    raw, sizes = published("3b"), []
    for layers in (1, 2):
        raw["num_hidden_layers"] = layers
        model = convert.abstract_model(config.Qwen25VLConfig.from_hf(raw))
        sizes.append(sum(2 * math.prod(shape) for *_, shape in convert.hub_slots(model).values()))
    layer = sizes[1] - sizes[0]
    raw["num_hidden_layers"] = max(1, round((gb * GB - sizes[0]) / layer) + 1)
    model = convert.abstract_model(config.Qwen25VLConfig.from_hf(raw))
    rng = np.random.default_rng(0)
    values = {path: jax.device_put(random_array(rng, leaf.shape)) for path, leaf in convert.flat_params(model).items()}
    convert.save_model(convert.with_params(model, values), directory, raw, GB)
    bytes_each = [2 * math.prod(shape) for *_, shape in convert.hub_slots(model).values()]
    files = len(list(directory.glob("*.safetensors")))
    return {"layers": raw["num_hidden_layers"], "bytes": sum(bytes_each), "largest": max(bytes_each), "files": files}


def random_array(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """bf16 of either sign and any mantissa between 2^-7 and 2^-6: as incompressible as weights, and quick to make."""
    import ml_dtypes

    bits = np.frombuffer(rng.bytes(2 * math.prod(shape)), np.uint16)
    return ((bits & np.uint16(0x807F)) | np.uint16(0x3C00)).view(ml_dtypes.bfloat16).reshape(shape)


############################## One measured load, in its own process ##############################


def status(field: str) -> int:
    """A memory field of /proc/self/status in bytes."""
    text = pathlib.Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(field + ":"))


def bytes_read() -> int:
    return int(pathlib.Path("/proc/self/io").read_text().split()[1])  # rchar


class Meter:
    """What happens within its `with`, in `values`: seconds, bytes read, the peak above what was there before."""

    def __enter__(self) -> Meter:
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        self.resident, self.read = status("VmRSS"), bytes_read()
        self.start, self.cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_) -> None:
        self.values = {
            "seconds": time.perf_counter() - self.start,
            "cpu_s": time.process_time() - self.cpu,
            "read_gb": (bytes_read() - self.read) / GB,
            "peak_gb": (status("VmHWM") - self.resident) / GB,
        }


def ours(directory: pathlib.Path, fsdp: int = 0, address: str = "", number: int = 0) -> dict[str, float]:
    import jax
    from flax import nnx

    from rsagent_jax.config.schema import MeshConfig
    from rsagent_jax.models.qwen25_vl import convert, tensor_files
    from rsagent_jax.models.qwen25_vl.config import load_config
    from rsagent_jax.runtime import sharding

    read, check_finite = [], tensor_files.check_finite
    tensor_files.check_finite = lambda block, tensor: (read.append(block.nbytes), check_finite(block, tensor))
    if address:
        jax.distributed.initialize(address, PROCESSES, number)
    config = load_config(directory)
    shardings = None
    if fsdp:
        mesh = sharding.make_mesh(MeshConfig(fsdp=fsdp))
        shardings = sharding.param_shardings(convert.abstract_model(config), mesh)
    jax.block_until_ready(jax.device_put(np.zeros(1), jax.local_devices()[0]))  # the back end is up
    with Meter() as meter:
        model = convert.load_model(directory, config, shardings, "bfloat16")
    held = bits = 0
    for array in jax.tree.leaves(nnx.state(model, nnx.Param)):
        held += sum({str(shard.index): shard.data.nbytes for shard in array.addressable_shards}.values())
        bits += sum(sum_bits(np.asarray(shard.data)) for shard in array.addressable_shards if not shard.replica_id)
    if address:
        jax.distributed.shutdown()
    return meter.values | {"held_gb": held / GB, "read_gb": sum(read) / GB, "bits": bits}


def sum_bits(weights: np.ndarray) -> int:
    return int(weights.view(np.uint16).sum(dtype=np.uint64))


def load_file(directory: pathlib.Path) -> dict[str, float]:
    import jax
    from safetensors.numpy import load_file

    jax.block_until_ready(jax.device_put(np.zeros(1)))
    arrays = {}
    with Meter() as meter:
        for file in sorted(directory.glob("*.safetensors")):
            tensors = load_file(file)
            while tensors:
                name, value = tensors.popitem()
                arrays[name] = jax.device_put(value)
                del value
        jax.block_until_ready(arrays)
    bits = sum(sum_bits(np.asarray(a)) for a in arrays.values())
    return meter.values | {"held_gb": sum(a.nbytes for a in arrays.values()) / GB, "bits": bits}


def from_pretrained(directory: pathlib.Path) -> dict[str, float]:
    torch = import_torch()
    from transformers import Qwen2_5_VLForConditionalGeneration

    with Meter() as meter:
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, dtype=torch.bfloat16)
        for parameter in model.parameters():  # they are pages of a memory map: nothing has been read so far
            parameter.detach().flatten()[::2048].sum()
    bits = sum(sum_bits(p.detach().view(torch.int16).numpy()) for p in model.parameters())
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    return meter.values | {"held_gb": held / GB, "bits": bits}


def measure(options: argparse.Namespace) -> None:
    """Runs one load in this process and prints what it took as the last line."""
    directory = pathlib.Path(options.dir)
    loads = {
        "one": lambda: ours(directory),
        "fsdp=8": lambda: ours(directory, 8),
        "4 x 2": lambda: ours(directory, 8, options.address, options.number),
        "load_file": lambda: load_file(directory),
        "torch": lambda: from_pretrained(directory),
    }
    print(json.dumps(loads[options.measure]()))


############################## The table ##############################


def run(name: str, directory: pathlib.Path, largest: int) -> dict[str, float]:
    """One row: the load in fresh processes, the worst of them per column."""
    subprocess.run(["cat", *directory.glob("*.safetensors")], stdout=subprocess.DEVNULL, check=True)
    several = name == "4 x 2"
    devices = {"fsdp=8": 8, "4 x 2": DEVICES_EACH}.get(name, 1)
    env = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, f"--measure={name}", f"--dir={directory}"]
    if several:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            command.append(f"--address=127.0.0.1:{probe.getsockname()[1]}")
    children = [
        subprocess.Popen(
            [*command, f"--number={i}"], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for i in range(PROCESSES if several else 1)
    ]
    try:
        answers = [child.communicate(timeout=1800) for child in children]
    finally:
        for child in children:
            child.kill()
    for child, (_, error) in zip(children, answers, strict=True):
        if child.returncode:
            raise SystemExit(f"{name} failed:\n{error[-3000:]}")
    results = [json.loads(out.strip().splitlines()[-1]) for out, _ in answers]
    for result in results:
        result["bound_gb"] = result["held_gb"] + 2 * largest / GB
        result["peak_over_bound"] = result["peak_gb"] / result["bound_gb"]
    bits = sum(result.pop("bits") for result in results)  # of several processes each has a part
    return {key: max(result[key] for result in results) for key in results[0]} | {"bits": bits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--gb", type=float, default=4.0, help="10^9 bytes of checkpoint (at least 2.2: the tower, embedding)"
    )
    parser.add_argument("--repeat", type=int, default=2, help="runs per row: the fastest counts, and the highest peak")
    for name in ("measure", "dir", "address"):
        parser.add_argument(f"--{name}", default="", help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(options)
    with tempfile.TemporaryDirectory() as folder:
        directory = pathlib.Path(folder)
        start = time.perf_counter()
        made = write_checkpoint(directory, options.gb)
        print(
            f"{made['bytes'] / GB:.2f} GB of bf16 in {made['files']} shards, {made['layers']} layers, largest tensor "
            f"{made['largest'] / GB:.2f} GB; written in {time.perf_counter() - start:.0f} s; {os.cpu_count()} cores\n"
        )
        print(f"{'':10}" + "".join(f"{column:>10}" for column in COLUMNS) + f"{'peak/bound':>12}")
        rows = {}
        has_torch = importlib.util.find_spec("torch") is not None
        for name in ("one", "fsdp=8", "4 x 2", "load_file", *["torch"] * has_torch):
            runs = [run(name, directory, made["largest"]) for _ in range(options.repeat)]
            fastest = min(runs, key=lambda values: values["seconds"])
            row = rows[name] = {key: max(values[key] for values in runs) for key in fastest}
            row |= {key: fastest[key] for key in ("seconds", "cpu_s")}
            print(
                f"{name:10}" + "".join(f"{row[c]:10.2f}" for c in COLUMNS) + f"{row['peak_over_bound']:12.2f}",
                flush=True,
            )
    if len({row["bits"] for row in rows.values()}) > 1:
        raise SystemExit(
            f"the loads do not give the same weights: { {name: row['bits'] for name, row in rows.items()} }"
        )
    summary = {
        "checkpoint_gb": made["bytes"] / GB,
        "peak_over_bound": max(rows[name]["peak_over_bound"] for name in ("one", "fsdp=8", "4 x 2")),
        "quarter_read_share": rows["4 x 2"]["read_gb"] * GB / made["bytes"],
        "vs_load_file": rows["load_file"]["seconds"] / rows["one"]["seconds"],
        "vs_torch": rows["torch"]["seconds"] / rows["one"]["seconds"] if "torch" in rows else None,
        "rows": rows,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
