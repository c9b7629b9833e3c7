"""The rollout engine: its log-probs against the trainer's on the tokens that it drew, and how well it reads memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rsagent_jax.aot.rollout import decode_reads
from rsagent_jax.aot.topology import GIB
from rsagent_jax.fitness.finding import Examined, Finding, Verdict, device_memory, not_run
from rsagent_jax.fitness.made_up import random_policy
from rsagent_jax.fitness.parity import ROUNDED, engine_differences, nats_bound
from rsagent_jax.fitness.speed import fastest, memory_bandwidth
from rsagent_jax.models.qwen25_vl.compute import Compute
from rsagent_jax.rollout.engine import Engine
from rsagent_jax.rollout.programs import Turns
from rsagent_jax.runtime import processes

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
    laid_out = 1 if sampling.weights_dtype else size  # int8
    needed, have = (size + laid_out) * examined.numbers // sampling.tensor + cache // local, device_memory()
    if have is not None and needed > have:
        figure, against = f"weights and cache need {needed / GIB:.2f} GiB on each device", f"there are {have / GIB:.2f}"
        remedy = "fewer sampling.slots, a larger sampling.tensor, or another slice (docs/scaling.md)"
        return [Finding("engine", Verdict.WRONG, figure, against, remedy)]
    mesh = processes.local_mesh(sampling.tensor, sampling.slots)
    graphdef, params = random_policy(examined.policy, mesh, settings.dtype)
    sampling = dataclasses.replace(sampling, temperature=sampling.temperature or 1.0)
    ends, key = examined.policy.eos_token_ids[0], jax.random.key(0)
    engine = Engine(nnx.merge(graphdef, params), sampling, ends, settings.dtype, key, mesh)
    off = engine_differences(engine, graphdef, params, Compute.of(settings, mesh), sampling.temperature)
    rounded = sampling.kv_dtype or sampling.weights_dtype
    bound = ROUNDED if rounded else nats_bound(settings.dtype, jax.default_backend())
    figure = f"{off.max():.1e} nats at most, {off.mean():.1e} in the mean, over {off.size} sampled tokens"
    remedy = "do not train GRPO here; try --config.policy.attention=blocks, another jax or driver"
    good = bool(off.max() <= bound)  # not so for NaN
    agree = Finding.judged("engine, log-probs", good, Verdict.WRONG, figure, f"{bound:g} from the trainer's", remedy)
    return [agree, _decoding(engine)]


def _decoding(engine: Engine) -> Finding:
    """Steps of all slots at once, with as much context as aot/rollout.py compiles them for."""
    engine.begin()
    s, programs = engine.sampling, engine.programs
    blocks, read = decode_reads(programs, engine.weights, engine.state.cache)
    places, many = max(1, blocks * programs.block - s.chunk), lambda value: np.full(s.slots, value, np.int32)
    numbers = (many(places), many(places), many(0), many(s.context), many(0), many(0))
    turns = Turns(np.ones(s.slots, bool), *numbers, np.full(s.slots, s.temperature, np.float32))
    turns = engine._put(turns)

    def run():
        call = dict(blocks=blocks, steps=s.chunk)
        engine.state, drawn = programs.step(engine.weights, engine.state, engine.key, None, turns, **call)
        return drawn

    seconds = fastest(run) / s.chunk
    share, on_cpu = read / seconds / min(memory_bandwidth()), jax.default_backend() == "cpu"
    figure = f"{1e3 * seconds:.2f} ms a step of {s.slots} slots at {places} places ({s.slots / seconds:.0f} tokens/s)"
    figure += f", {share:.0%} of the bandwidth measured"
    against = f"{PROJECTED:.0%} projected" + (" for a TPU; not judged on a CPU" if on_cpu else "")
    remedy = "more sampling.slots; trace a step (--config.profiler_port, docs/tpu.md)"
    good = on_cpu or share >= LEAST_SHARE
    return Finding.judged("engine, decoding", good, Verdict.SLOW, figure, against, remedy, value=1 / seconds)
