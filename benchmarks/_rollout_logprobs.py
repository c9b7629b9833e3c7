"""What the engine's precision costs, for benchmarks/rollout.py: its log-probs beside the trainer's, in bf16, on what it
drew."""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import numpy as np
from flax import nnx

from rsagent_jax.agent.segmenter import open_segmenter
from rsagent_jax.config.build import build_config
from rsagent_jax.config.schema import BatchConfig, SamplingConfig, SegmenterConfig, TrainConfig
from rsagent_jax.data.packing import Item, pack
from rsagent_jax.data.processor import Processor
from rsagent_jax.models.qwen25_vl import convert
from rsagent_jax.models.qwen25_vl.compute import Compute
from rsagent_jax.rollout.driver import Driver
from rsagent_jax.rollout.engine import Engine
from rsagent_jax.rollout.policy import Task
from rsagent_jax.runtime.command import load_config_file
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


def compare(toy: bool) -> dict[str, dict[str, float]]:
    """By setting: nats between the two (mean, max, KL as alarms.gap bounds it), the effective sample size, tokens.

    assets/tiny-agent with the quickstart's settings plays scenes: whole trajectories, GrabCut answers.
    """
    config = build_config(TrainConfig, load_config_file(str(ROOT / "configs/quickstart.py")))
    processor, sampling = Processor.load(ROOT / "assets/tiny-agent"), config.grpo.sampling
    model, photos = convert.load_model(ROOT / "assets/tiny-agent", processor.config), scenes.load_photos()
    tasks = []
    for i in range(4 if toy else 24):
        scene, (reference, *_) = synthetic.scene_at(7, "test", i, 1, scenes.SceneConfig(), photos)
        absent = np.zeros(scene.image.shape[:2], bool)
        tasks.append(Task(Sample(f"s{i}", scene.image, reference.texts[0], absent), i, i))

    def play(engine: Engine) -> list[Item]:
        with open_segmenter(SegmenterConfig(mode="inprocess", backend="grabcut")) as segmenter:
            driver = Driver(engine, segmenter, processor, config.agent)
            played = [t for t, _ in driver.run(tasks)]
        return [Item(t.tokens, t.positions, t.loss_mask, t.logprobs, t.patches, t.grids) for t in played]

    ends = processor.with_ends(sampling)
    return _differences(model, ends, processor.terminator_id, play, config.grpo.batch)


def _differences(model, sampling: SamplingConfig, ends: int, play, rows: BatchConfig) -> dict[str, dict[str, float]]:
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
