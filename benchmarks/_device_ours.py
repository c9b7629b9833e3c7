"""Our side of benchmarks/device.py, on one device: a function for each kind of row, which returns figures.

seconds    of one piece of the row's work; the median of calls after the first
compile_s  the first call less that
rate       what was done per second, in `unit`
flops      that the work needs (aot/flops.py); bytes: the fewest that it reads
peak_gb    of the device's memory; on a CPU of the process
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import re
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks._device_pieces import TOY, Piece
from benchmarks._policy_step import OurStep, check_losses, decode_macro_step, make_sequence
from rsagent_jax.aot.devices import chip_of
from rsagent_jax.aot.flops import Workload, model_flops
from rsagent_jax.config.schema import LoraConfig, MeshConfig, PolicyConfig, SamplingConfig
from rsagent_jax.fitness.kernels import kernel_differences, kernels_of
from rsagent_jax.fitness.made_up import random_policy
from rsagent_jax.fitness.parity import DTYPES, compare_logprobs, reduced
from rsagent_jax.fitness.speed import matmul_flops, memory_bandwidth
from rsagent_jax.models.qwen25_vl.config import Qwen25VLConfig
from rsagent_jax.models.qwen25_vl.positions import fill_patch_buffer
from rsagent_jax.rollout.engine import Engine
from rsagent_jax.rollout.programs import Images
from rsagent_jax.rollout.programs import Piece as PromptPiece
from rsagent_jax.runtime import sharding
from rsagent_jax.train.state import init_adapters, partition_params

CALLS = 4  # timed, after one that compiles and one more
KERNELS = 15  # named in the profile
# Planes and lines of a trace: a GPU's streams, a TPU's operations, a CPU's threads (loops count beside their content).
TRACED = {"gpu": ("/device:GPU", "(?i)stream"), "tpu": ("/device:TPU", "^XLA Ops"), "cpu": ("/host:CPU", "^tf_XLA")}
CHUNK = 16  # tokens sampled in a call


def limits(piece: Piece, profile: bool) -> dict[str, Any]:
    """What the machine is, and what it reaches (rsagent_jax/fitness/speed.py); nominal: of its data sheet."""
    del profile
    device, dtype = jax.devices()[0], dtype_of(piece)
    chip = chip_of(device)
    return {
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "runtime": device.client.platform_version.split("\n")[0],
        "dtype": dtype,
        "flops_per_s": matmul_flops(dtype)[0],
        "bytes_per_s": memory_bandwidth()[0],
        "nominal_flops_per_s": chip and chip.bf16_flops,
        "nominal_bytes_per_s": chip and chip.hbm_bandwidth,
    }


def train(piece: Piece, profile: bool) -> dict[str, Any]:
    """An SFT step with the vision tower's work: gradients, clipping, AdamW."""
    config, dtype = Qwen25VLConfig.from_hf(piece.raw), dtype_of(piece)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    lora = LoraConfig(rank=piece.lora)
    # What is trained is fp32 as in train.py; under adapters the rest is in the dtype of the activations.
    graphdef, params = random_policy(config, mesh, dtype if lora.rank else "float32")
    graphdef, trained, base = partition_params(graphdef, params, lora, ())
    del params
    if lora.rank:
        trained = init_adapters(graphdef, trained, base, jax.random.key(0), mesh)
    count = sum(x.size for x in jax.tree.leaves(trained))
    rng = np.random.default_rng(1)
    sequences = [make_sequence(rng, piece.raw, piece.tokens, (1, *piece.grid)) for _ in range(piece.rows)]
    attention = piece.attention if jax.default_backend() == "gpu" else "auto"
    policy = PolicyConfig(weights="", dtype=dtype, remat="full", attention=attention, lora=lora)
    step = OurStep(config, graphdef, trained, base, sequences, policy, mesh, 1e-5)
    losses: list[float] = []
    found = timed(lambda: losses.append(step()[0]), profile)
    check_losses(losses)
    whole = not lora.rank
    parts = dict(trained=whole, vision_trained=whole, adapters=0 if whole else count)
    work = Workload(piece.rows, piece.tokens, (piece.tokens,), (piece.grid,), **parts)
    tokens = piece.rows * piece.tokens
    found |= {"rate": tokens / found["seconds"], "unit": "tokens/s", "flops": model_flops(config, work).total}
    return found | {"losses": losses}


def decode(piece: Piece, profile: bool) -> dict[str, Any]:
    """A decode step of all slots, of calls that sample a chunk."""
    sizes = dict(slots=piece.slots, lanes=piece.slots // 4, context=512 if piece.size == TOY else 4096)
    engine = make_engine(piece, Qwen25VLConfig.from_hf(piece.raw), **sizes, weights_dtype=piece.weights_dtype)
    normal = jax.jit(lambda key, x: jax.random.normal(key, x.shape, x.dtype), donate_argnums=1)
    cache = jax.tree.map(lambda x: normal(jax.random.key(1), x), engine.state.cache)  # zeros would be read faster
    engine.state = dataclasses.replace(engine.state, cache=cache)
    found = timed(decode_macro_step(engine, min(piece.live, engine.context - CHUNK)), profile)
    found["seconds"] /= CHUNK
    unstacked = engine.weights.unstacked["decoder"]
    head = unstacked["lm_head" if "lm_head" in unstacked else "embed"]
    read = sum(x.nbytes for x in jax.tree.leaves((engine.weights.layers, head)))
    places = engine.programs.blocks * engine.programs.block
    found["bytes"] = read + engine.cache_bytes * piece.live // places
    return found | {"rate": piece.slots / found["seconds"], "unit": "tokens/s"}


def prefill(piece: Piece, profile: bool) -> dict[str, Any]:
    """A prompt of text in each lane, piece by piece, and nothing sampled."""
    config = Qwen25VLConfig.from_hf(piece.raw)
    engine = make_engine(piece, config, slots=piece.rows, lanes=piece.rows, context=piece.tokens + CHUNK)
    rng, lanes, size = np.random.default_rng(0), piece.rows, piece.piece
    zeros, many = np.zeros((lanes, size), np.int32), lambda n: np.full(lanes, n, np.int32)
    pieces = []
    for start in range(0, piece.tokens, size):
        tokens = rng.integers(7, 200, (lanes, size)).astype(np.int32)
        places = np.broadcast_to(np.arange(start, start + size, dtype=np.int32), (lanes, 3, size)).copy()
        pieces.append(PromptPiece(many(0), tokens, places, zeros, many(size), many(start)))
    turns = engine._turns()

    def run() -> None:
        for start, one in zip(range(0, piece.tokens, size), pieces, strict=True):
            call = dict(blocks=engine._blocks(start + size), steps=0)
            engine.state, _ = engine.programs.step(engine.weights, engine.state, engine.key, one, turns, **call)
        jax.block_until_ready(engine.state)

    found = timed(run, profile)
    flops = model_flops(config, Workload(lanes, piece.tokens, (piece.tokens,), trained=False, vision_trained=False))
    tokens = lanes * piece.tokens
    found |= {"rate": tokens / found["seconds"], "unit": "tokens/s"}
    return found | {"flops": flops.decoder_matmuls + flops.decoder_attention}


def tower(piece: Piece, profile: bool) -> dict[str, Any]:
    """A picture in each lane, as a rollout's engine encodes it; the decoder has one layer, which does nothing here."""
    config = Qwen25VLConfig.from_hf(piece.raw)
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, num_hidden_layers=1))
    engine = make_engine(piece, config, slots=piece.rows, lanes=piece.rows, context=128)
    count, grid = piece.grid[0] * piece.grid[1], (1, *piece.grid)
    patches = np.random.default_rng(0).standard_normal((count, config.vision.patch_dim), np.float32)
    row = fill_patch_buffer(patches, (grid,), np.ones(count // config.vision.merge_unit, bool), count, config.vision)
    arrays = [np.stack([x] * piece.rows) for x in (row.patches, row.segment_ids, row.positions)]
    images = Images(*arrays, np.arange(piece.rows, dtype=np.int32))

    def run() -> None:
        engine.state = engine.programs.encode(engine.weights, engine.state, images)
        jax.block_until_ready(engine.state)

    found = timed(run, profile)
    tokens = count // config.vision.merge_unit
    flops = model_flops(config, Workload(piece.rows, tokens, (), (piece.grid,), trained=False, vision_trained=False))
    whole = flops.patch_embedding + flops.vision_matmuls + flops.vision_window_attention + flops.vision_full_attention
    found |= {"rate": piece.rows / found["seconds"], "unit": "pictures/s"}
    return found | {"flops": whole + flops.merger}


def parity(piece: Piece, profile: bool) -> dict[str, Any]:
    """What doctor and tests/device compare as well, with few layers, so that the host's CPU computes it, too; and the
    attention kernels alone."""
    del profile
    config, platform = Qwen25VLConfig.from_hf(piece.raw), jax.default_backend()
    rows = [dataclasses.asdict(compared) for compared in compare_logprobs(reduced(config))]
    for dtype in DTYPES:
        for kind in kernels_of(platform, dtype):
            for name, found in kernel_differences(kind, dtype, config).items():
                title = f"{kind} and plain, {name}, values and gradients, {dtype}"
                rows.append({"name": title, "max": max(found), "mean": sum(found) / 2, "unit": "of the largest"})
    return {"rows": rows}


############################## What they share ##############################


def dtype_of(piece: Piece) -> str:
    """Of activations: products of a CPU are fp32."""
    return "float32" if piece.size == TOY else "bfloat16"


def make_engine(piece: Piece, config: Qwen25VLConfig, **sizes: int | str) -> Engine:
    """Of random weights; `sizes`: of SamplingConfig."""
    dtype, patches = dtype_of(piece), piece.grid[0] * piece.grid[1]
    sampling = SamplingConfig(**sizes, max_new_tokens=CHUNK, patches=patches, chunk=CHUNK, prefill=piece.piece)
    graphdef, params = random_policy(config, None, dtype)
    return Engine(nnx.merge(graphdef, params), sampling, 1 << 30, dtype, jax.random.key(0))


def timed(run: Callable[[], Any], profile: bool) -> dict[str, Any]:
    """Of calls that wait for their result."""
    times = []
    for _ in range(2 + CALLS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[2:])
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if peak is None else peak
    found = {"seconds": seconds, "times": times, "compile_s": times[0] - seconds, "peak_gb": peak / 1e9}
    if profile:
        try:
            found["kernels"] = kernels(run)
        except Exception as error:  # noqa: BLE001  what was timed stays
            found["kernels"] = {"busy_ms": 0.0, "span_ms": 0.0, "top": [], "error": repr(error)}
    return found


def kernels(run: Callable[[], Any]) -> dict[str, Any]:
    """Milliseconds and calls by kernel of one call of `run`, the dearest first; numbers in names become #.

    busy_ms: all kernels together; span_ms: from the first one's start to the last one's end, gaps included.
    """
    spent: collections.Counter = collections.Counter()
    calls: collections.Counter = collections.Counter()
    first, last = float("inf"), 0.0
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            run()
        (path, *_) = pathlib.Path(directory).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
        where, lines = TRACED[jax.default_backend()]
        for plane in data.planes:
            for line in plane.lines if plane.name.startswith(where) else ():
                for event in line.events if re.search(lines, line.name) else ():
                    name = re.sub(r"\d+", "#", event.name)[:90]
                    spent[name] += event.duration_ns
                    calls[name] += 1
                    first, last = min(first, event.start_ns), max(last, event.start_ns + event.duration_ns)
    top = [[name, ns / 1e6, calls[name]] for name, ns in spent.most_common(KERNELS)]
    return {"busy_ms": sum(spent.values()) / 1e6, "span_ms": max(0.0, last - first) / 1e6, "top": top}
