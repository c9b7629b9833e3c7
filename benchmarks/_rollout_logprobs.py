"""What the engine's precision costs, for benchmarks/rollout.py: its log-probs beside the trainer's, in bf16, on what it
drew."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import numpy as np
from flax import nnx

from rsagent_jax.agent.segmenter import open_segmenter
from rsagent_jax.config.build import build_config, load_config_file
from rsagent_jax.config.schema import BatchConfig, SamplingConfig, SegmenterConfig, TrainConfig
from rsagent_jax.data.packing import Item, pack
from rsagent_jax.data.processor import Processor
from rsagent_jax.fitness.made_up import random_policy, random_prompt
from rsagent_jax.models.qwen25_vl import convert
from rsagent_jax.models.qwen25_vl.compute import Compute
from rsagent_jax.models.qwen25_vl.config import Qwen25VLConfig
from rsagent_jax.rollout.driver import Driver
from rsagent_jax.rollout.engine import Engine
from rsagent_jax.rollout.policy import Request, Task
from rsagent_jax.tiny import scenes, synthetic
from rsagent_jax.train.step import batch_logprobs
from rsagent_jax.types import Sample

ROOT = pathlib.Path(__file__).resolve().parents[1]
DTYPE = "bfloat16"
SETTINGS = {
    "bf16": {},
    "int8 cache": dict(kv_dtype="int8"),
    "int8 weights": dict(weights_dtype="int8"),
    "int8 both": dict(kv_dtype="int8", weights_dtype="int8"),
}
CAP = 2.0  # grpo.tis_clip


def compare(toy: bool) -> dict[str, dict[str, dict[str, float]]]:
    """By policy and setting: nats between the two (mean, max, KL), the effective sample size, tokens."""
    return {"tiny agent, its scenes": learned(4 if toy else 48), "random, a narrow 3B": made_up(4 if toy else 32, toy)}


def learned(count: int) -> dict[str, dict[str, float]]:
    """assets/tiny-agent with the quickstart's settings: whole trajectories, GrabCut answers."""
    config = build_config(TrainConfig, load_config_file(str(ROOT / "configs/quickstart.py")))
    processor, sampling = Processor.load(ROOT / "assets/tiny-agent"), config.grpo.sampling
    model, photos = convert.load_model(ROOT / "assets/tiny-agent", processor.config), scenes.load_photos()
    tasks = []
    for i in range(count):
        scene, (reference, *_) = synthetic.scene_at(7, "test", i, 1, scenes.SceneConfig(), photos)
        absent = np.zeros(scene.image.shape[:2], bool)
        tasks.append(Task(Sample(f"s{i}", scene.image, reference.texts[0], absent), i, i))

    def play(engine: Engine) -> list[Item]:
        with open_segmenter(SegmenterConfig(mode="inprocess", backend="grabcut")) as segmenter:
            driver = Driver(engine, segmenter, processor, config.agent)
            played = [t for t, _ in driver.run(tasks)]
        return [Item(t.tokens, t.positions, t.loss_mask, t.logprobs, t.patches, t.grids) for t in played]

    ends = processor.with_ends(sampling)
    return differences(model, ends, processor.terminator_id, play, config.grpo.batch)


def made_up(count: int, toy: bool) -> dict[str, dict[str, float]]:
    """A quarter of the 3B's width and layers, its heads' size and ratios; a picture and 200 words, 64 tokens drawn."""
    full, drawn, words = Qwen25VLConfig.from_hf(json.loads((ROOT / "assets/configs/3b.json").read_text())), 64, 200
    sizes = dict(hidden_size=512, intermediate_size=2752, num_attention_heads=4, num_key_value_heads=2)
    text = dataclasses.replace(full.text, **sizes, num_hidden_layers=2 if toy else 9)
    vision = dataclasses.replace(full.vision, depth=2, fullatt_block_indexes=(1,), out_hidden_size=512)
    config = dataclasses.replace(full, text=text, vision=vision)
    model, rng = nnx.merge(*random_policy(config, None, "float32")), np.random.default_rng(0)
    prompts = [random_prompt(config, ((1, 8, 8),), words, rng) for _ in range(count)]

    def play(engine: Engine) -> list[Item]:
        for slot, (prompt, end) in enumerate(prompts):
            engine.submit(Request(slot, prompt, end, None, Task(None, slot, slot), 0, drawn))
        items = []
        while len(items) < count:
            for slot, done in engine.step():
                (prompt, end), n = prompts[slot], len(done.tokens)
                tokens = np.concatenate([prompt.tokens, done.tokens])
                turn = np.broadcast_to(end + np.arange(n), (3, n))
                positions = np.concatenate([prompt.positions, turn], axis=1, dtype=np.int32)
                logprobs = np.concatenate([np.zeros(len(prompt.tokens), np.float32), done.logprobs])
                mask = np.arange(len(tokens)) >= len(prompt.tokens)
                items.append(Item(tokens, positions, mask, logprobs, prompt.patches, prompt.grids))
        return items

    sampling = SamplingConfig(slots=count, max_new_tokens=drawn, context=512, patches=64)
    return differences(model, sampling, 1 << 30, play, BatchConfig(rows=4, tokens=512, patches=128))


def differences(model, sampling: SamplingConfig, ends: int, play, rows: BatchConfig) -> dict[str, dict[str, float]]:
    """By setting; `play` gives the items that an engine drew. KL: grpo's estimate, as alarms.gap bounds it."""
    graphdef, params = nnx.split(model, nnx.Param)
    warmth = sampling.temperature
    program = jax.jit(lambda params, batch: batch_logprobs(graphdef, params, batch, Compute(DTYPE), warmth))
    found = {}
    for name, setting in SETTINGS.items():
        engine = Engine(model, dataclasses.replace(sampling, **setting), ends, DTYPE, jax.random.key(0))
        ours, theirs = [], []
        for batch in pack(play(engine), rows, model.config):
            theirs.append(np.asarray(program(params, batch))[batch.loss_mask])
            ours.append(batch.old_logprobs[batch.loss_mask])
        theirs, ours = np.concatenate(theirs), np.concatenate(ours)
        off, weights = theirs - ours, np.minimum(np.exp(theirs - ours), CAP)
        ess, kl = weights.sum() ** 2 / (len(off) * (weights**2).sum()), np.mean(np.exp(off) - 1 - off)
        figures = dict(mean=np.abs(off).mean(), max=np.abs(off).max(), kl=kl, ess=ess, tokens=len(off))
        found[name] = {figure: float(value) for figure, value in figures.items()}
    return found
