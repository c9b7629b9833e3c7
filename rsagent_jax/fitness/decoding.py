"""The rollout engine: its log-probs against the trainer's on the tokens that it drew, and how well it reads memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rsagent_jax.aot.rollout import device_bytes
from rsagent_jax.aot.topology import GIB
from rsagent_jax.config.schema import BatchConfig
from rsagent_jax.data.packing import Item, pack
from rsagent_jax.fitness.finding import Examined, Finding, Verdict, device_memory, not_run
from rsagent_jax.fitness.made_up import random_policy, random_prompt
from rsagent_jax.fitness.speed import fastest, memory_bandwidth
from rsagent_jax.models.qwen25_vl.compute import Compute
from rsagent_jax.rollout.engine import Engine
from rsagent_jax.rollout.policy import Request, Task
from rsagent_jax.rollout.programs import Turns
from rsagent_jax.runtime import processes, sharding
from rsagent_jax.train.step import batch_logprobs

PLAYED, WORDS, DRAWN = 4, 24, 16  # trajectories; text tokens about an image of one window; tokens drawn in each
EXACT, ROUNDED = 1e-3, 0.15  # nats: fp32 on a CPU, and where products round to bf16
LEAST_SHARE = 0.4  # of the bandwidth measured
PROJECTED = 1 / 1.15  # docs/scaling.md: what a decode step moves over what it must read


def check_engine(examined: Examined) -> list[Finding]:
    """On this process's devices, with a policy of random weights."""
    if (sampling := examined.sampling) is None:
        return not_run("engine", "this config plays no rollouts")
    settings, text = examined.settled.policy, examined.policy.text
    size, local = jnp.dtype(settings.dtype).itemsize, len(jax.local_devices())
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * sampling.context * sampling.slots
    cache *= jnp.dtype(sampling.kv_dtype or settings.dtype).itemsize
    # Every row of devices holds the weights, as given and laid out for decoding; together they hold the slots.
    needed, have = size * 2 * examined.numbers // sampling.tensor + cache // local, device_memory()
    if have is not None and needed > have:
        figure, against = f"weights and cache need {needed / GIB:.2f} GiB on each device", f"there are {have / GIB:.2f}"
        remedy = "fewer sampling.slots, a larger sampling.tensor, or another slice (docs/scaling.md)"
        return [Finding("engine", Verdict.WRONG, figure, against, remedy)]
    mesh = processes.local_mesh(sampling.tensor, sampling.slots)
    graphdef, params = random_policy(examined.policy, mesh, settings.dtype)
    sampling = dataclasses.replace(sampling, temperature=sampling.temperature or 1.0)
    ends, key = examined.policy.eos_token_ids[0], jax.random.key(0)
    engine = Engine(nnx.merge(graphdef, params), sampling, ends, settings.dtype, key, mesh)
    items, compute = _play(engine), Compute.of(settings, mesh)
    off = _differences(graphdef, params, items, compute, sampling.temperature, engine)
    exact = (
        settings.dtype == "float32"
        and jax.default_backend() == "cpu"
        and not (sampling.kv_dtype or sampling.weights_dtype)
    )
    bound = EXACT if exact else ROUNDED
    figure = f"{off.max():.1e} nats at most, {off.mean():.1e} in the mean, over {off.size} sampled tokens"
    remedy = "do not train GRPO here; try --config.policy.attention=blocks, another jax or driver"
    good = bool(off.max() <= bound)  # not so for NaN
    agree = Finding.judged("engine, log-probs", good, Verdict.WRONG, figure, f"{bound:g} from the trainer's", remedy)
    return [agree, _decoding(engine)]


def _play(engine: Engine) -> list[Item]:
    """A turn of a few trajectories."""
    rng, prompts, items = np.random.default_rng(0), {}, []
    side = engine.config.vision.window_size // engine.config.vision.patch_size
    for slot in range(min(PLAYED, engine.slots)):
        prompts[slot] = prompt, end = random_prompt(engine.config, ((1, side, side),), WORDS, rng)
        engine.submit(Request(slot, prompt, end, None, Task(None, slot, slot), 0, DRAWN))
    while len(items) < len(prompts):
        for slot, drawn in engine.step():
            prompt, end = prompts[slot]
            n, forced = len(drawn.tokens), len(prompt.tokens)
            tokens = np.concatenate([prompt.tokens, drawn.tokens])
            later = np.broadcast_to(end + np.arange(n), (3, n))
            positions = np.concatenate([prompt.positions, later], axis=1, dtype=np.int32)
            logprobs = np.concatenate([np.zeros(forced, np.float32), drawn.logprobs])
            sampled = np.arange(forced + n) >= forced
            items.append(Item(tokens, positions, sampled, logprobs, prompt.patches, prompt.grids))
    return items


def _differences(graphdef, params, items: list[Item], compute: Compute, temperature, engine: Engine) -> np.ndarray:
    """Of every sampled token, in packed rows as training has them."""
    parts = sharding.parts("rows", compute.mesh)
    rows, longest = -(-len(items) // parts) * parts, max(len(item.tokens) for item in items)
    patches = engine.config.vision.window_patches
    (batch,) = pack(items, BatchConfig(rows=rows, tokens=longest, patches=patches), engine.config)
    program = jax.jit(lambda params, batch: batch_logprobs(graphdef, params, batch, compute, temperature))
    placed = batch if compute.mesh is None else jax.device_put(batch, sharding.rows(compute.mesh))
    return np.abs(np.asarray(program(params, placed)) - batch.old_logprobs)[batch.loss_mask]


def _decoding(engine: Engine) -> Finding:
    """Steps of all slots at once, with as much context as aot/rollout.py compiles them for."""
    engine.begin()
    s, programs = engine.sampling, engine.programs
    blocks = max(n for n in programs.buckets if n == 1 or n * programs.block <= s.context)
    places, many = max(1, blocks * programs.block - s.chunk), lambda value: np.full(s.slots, value, np.int32)
    numbers = (many(places), many(places), many(0), many(s.context), many(0), many(0))
    turns = Turns(np.ones(s.slots, bool), *numbers, np.full(s.slots, s.temperature, np.float32))
    turns = engine._put(turns)

    def run():
        call = dict(blocks=blocks, steps=s.chunk)
        engine.state, drawn = programs.step(engine.weights, engine.state, engine.key, None, turns, **call)
        return drawn

    seconds = fastest(run) / s.chunk
    head = engine.weights.unstacked["decoder"]
    read = device_bytes(engine.weights.layers) + device_bytes(head["lm_head" if "lm_head" in head else "embed"])
    read += device_bytes(engine.state.cache) * blocks // programs.blocks
    share, on_cpu = read / seconds / min(memory_bandwidth()), jax.default_backend() == "cpu"
    figure = f"{1e3 * seconds:.2f} ms a step of {s.slots} slots at {places} places ({s.slots / seconds:.0f} tokens/s)"
    figure += f", {share:.0%} of the bandwidth measured"
    against = f"{PROJECTED:.0%} projected" + (" for a TPU; not judged on a CPU" if on_cpu else "")
    remedy = "more sampling.slots; trace a step (--config.profiler_port, docs/tpu.md)"
    good = on_cpu or share >= LEAST_SHARE
    return Finding.judged("engine, decoding", good, Verdict.SLOW, figure, against, remedy, value=1 / seconds)
