"""A policy's shape, what it reads, and a training step on either side: for train_step.py, memory.py, device.py."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
B1, B2, EPS, CLIP = 0.9, 0.999, 1e-8, 1.0
IMAGE_TOKENS = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}
SPECIAL = IMAGE_TOKENS | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# A toy is not timed: the compiler may do less.
QUICK = "--xla_backend_optimization_level=0"  # jax 0.11 knows the other usual one no more
PATCH_DIM = 3 * 2 * 14 * 14
TEXT_BEFORE = 16  # tokens before the image


def raw_config(*, toy: bool = False) -> dict[str, Any]:
    """config.json of a small Qwen2.5-VL: 96M parameters, or a toy of the same make."""
    hidden, heads, layers, vocab = (64, 4, 2, 512) if toy else (512, 8, 12, 32_000)
    vision, depth = (32, 4) if toy else (320, 16)
    raw, half = published("3b"), hidden // heads // 2
    raw["vision_config"] |= {
        "hidden_size": vision,
        "intermediate_size": 4 * vision,
        "out_hidden_size": hidden,
        "depth": depth,
        "num_heads": 4,
        "fullatt_block_indexes": list(range(3, depth, 4)),
    }
    return raw | {
        "torch_dtype": "float32",
        **SPECIAL,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 9 * hidden // 2,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "rope_scaling": {"type": "mrope", "mrope_section": [half // 4, half * 3 // 8, half * 3 // 8]},
    }


def published(size: str) -> dict[str, Any]:
    """config.json of Qwen2.5-VL in that size."""
    return json.loads((ROOT / f"assets/configs/{size}.json").read_text())


def make_sequence(rng: np.random.Generator, raw: dict[str, Any], length: int, grid: tuple[int, int, int]) -> dict:
    """Text, one image, text: tokens i32[T], trained bool[T] after the image, patches f32[P, C], grids [1, 3].

    `raw`: config.json of the policy. SystemExit where the image leaves no room for text.
    """
    special = [raw[name] for name in IMAGE_TOKENS]
    image = [raw["vision_start_token_id"], *[raw["image_token_id"]] * (grid[1] * grid[2] // 4)]
    image.append(raw["vision_end_token_id"])
    after = length - TEXT_BEFORE - len(image)
    if after < 1:
        raise SystemExit(f"an image of {len(image)} tokens and {TEXT_BEFORE} of text do not fit {length} tokens")
    words = [rng.integers(7, raw["vocab_size"], n) for n in (TEXT_BEFORE, after)]
    words = [np.where(np.isin(w, special), 7, w) for w in words]
    patches = rng.standard_normal((grid[1] * grid[2], PATCH_DIM), np.float32)
    tokens = np.concatenate([words[0], image, words[1]]).astype(np.int32)
    return {"tokens": tokens, "trained": np.arange(length) >= length - after, "patches": patches, "grids": [grid]}


def to_items(sequences: list[dict[str, np.ndarray]], config) -> list:
    """The packing's own items."""
    from rsagent_jax.data.packing import Item
    from rsagent_jax.models.qwen25_vl.positions import mrope_positions

    items = []
    for s in sequences:
        grids = tuple(tuple(int(n) for n in grid) for grid in s["grids"])
        positions, _ = mrope_positions(s["tokens"], grids, config.image_token_id)
        logprobs = np.zeros(len(s["tokens"]), np.float32)
        items.append(Item(s["tokens"], positions, s["trained"], logprobs, s["patches"], grids))
    return items


class OurStep:
    """rsagent_jax's own programs as train.py calls them; a call is a step, and gives (loss, norm of the gradient).

    `params` are trained, `base` is only read (train/state.py, partition_params); `params` are donated.
    """

    def __init__(self, config, graphdef, params, base, sequences, policy, mesh, lr: float):
        from rsagent_jax.config.schema import BatchConfig, OptimConfig
        from rsagent_jax.data.packing import pack
        from rsagent_jax.models.qwen25_vl.compute import Compute
        from rsagent_jax.models.qwen25_vl.positions import padded_patches
        from rsagent_jax.train.state import make_optimizer
        from rsagent_jax.train.step import Stage, make_programs, sft_objective

        items = to_items(sequences, config)
        places = max(padded_patches(item.grids, config.vision) for item in items)
        sizes = BatchConfig(rows=len(items), tokens=len(items[0].tokens), patches=places)
        (self.batch,) = pack(items, sizes, config)
        tx, _ = make_optimizer(OptimConfig(lr=lr, b1=B1, b2=B2, eps=EPS, clip_norm=CLIP), 1)
        self.programs = make_programs(graphdef, tx, Stage(sft_objective), Compute.of(policy, mesh), params, base)
        self.state, self.base, self.mesh = self.programs.create_state(params), base, mesh

    def __call__(self) -> tuple[float, float]:
        import jax

        from rsagent_jax.runtime.processes import put_rows

        batch = self.programs.embed(self.base, put_rows(self.batch, self.mesh))
        zeros = put_rows(np.zeros(self.batch.tokens.shape, np.float32), self.mesh)
        self.state, metrics = self.programs.train_step(self.state, self.base, [batch], [zeros])
        jax.block_until_ready(self.state)
        return float(metrics["loss"]), float(metrics["l2_grads"])


def check_losses(losses: list[float]) -> None:
    """RuntimeError for a training that computes nonsense, whose time says nothing."""
    if not np.isfinite(losses).all():
        raise RuntimeError(f"losses {losses}")


def import_torch(device: str = "cpu"):
    """torch, on the cores that this process may use; before transformers is imported."""
    if device == "cpu":
        sys.modules["torchvision"] = None  # not needed here, and its operators may not load beside a CPU build of torch
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return torch


def torch_step(model, sequences: list[dict], raw: dict[str, Any], lr: float) -> Callable[[], tuple[float, float]]:
    """As OurStep, of a Qwen2_5_VLForConditionalGeneration with clip_grad_norm_ and torch.optim.AdamW (fused)."""
    import torch

    model.train()
    trained_parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained_parameters, lr, (B1, B2), EPS, weight_decay=0.0, fused=True)
    tokens = torch.from_numpy(np.stack([s["tokens"] for s in sequences]).astype(np.int64))
    trained = torch.from_numpy(np.stack([s["trained"] for s in sequences]))
    inputs = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),  # all ones: sdpa takes its causal path, without a mask
        "labels": torch.where(trained, tokens, -100),
        "pixel_values": torch.from_numpy(np.concatenate([s["patches"] for s in sequences])),
        "image_grid_thw": torch.from_numpy(np.concatenate([s["grids"] for s in sequences])),
        "mm_token_type_ids": (tokens == raw["image_token_id"]).int(),
    }
    inputs = {name: x.to(model.device) for name, x in inputs.items()}

    def step() -> tuple[float, float]:
        optimizer.zero_grad(set_to_none=True)
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained_parameters, CLIP)
        optimizer.step()
        return loss.item(), norm.item()

    return step


def decode_macro_step(engine, live: int) -> Callable[[], int]:
    """A call samples a chunk of tokens in all of the engine's slots, `live` of context in each; returns its steps."""
    import jax

    def all_slots(value: int) -> np.ndarray:
        return np.full(engine.slots, value, np.int32)

    call = dict(open=np.ones(engine.slots, bool), lengths=all_slots(live), budget=all_slots(1 << 20))
    turns = dataclasses.replace(engine._turns(), **call)
    blocks = engine._blocks(live + engine.sampling.chunk)

    def run() -> int:
        args = engine.weights, engine.state, engine.key, None, turns
        engine.state, out = engine.programs.step(*args, blocks=blocks)
        jax.block_until_ready(engine.state)
        return int(out.steps)

    return run
