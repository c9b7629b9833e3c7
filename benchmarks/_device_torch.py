"""The other side of benchmarks/device.py: transformers, torch with sdpa, peft for adapters; figures as ours has them.

Loads no jax, which would take the device's memory.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks._device_pieces import TOY, Piece
from benchmarks._policy_step import PATCH_DIM, check_losses, import_torch, make_sequence, torch_step

STEPS = 16  # tokens between the two lengths whose difference is a decode step
TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"


def train(piece: Piece) -> dict[str, Any]:
    """Weights, gradients and moments in bf16, gradient checkpointing: ours has them in fp32."""
    _, device = torch_of(piece)
    if piece.lora:
        import peft  # before the model is made, where there is none
    model = make_model(piece, device)
    if piece.lora:
        config = peft.LoraConfig(r=piece.lora, lora_alpha=32, lora_dropout=0.0, target_modules=TARGETS)
        model = peft.get_peft_model(model, config)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    rng = np.random.default_rng(1)
    sequences = [make_sequence(rng, piece.raw, piece.tokens, (1, *piece.grid)) for _ in range(piece.rows)]
    step, losses = torch_step(model, sequences, piece.raw, 1e-5), []
    found = timed(lambda: losses.append(step()[0]), device, 2)
    check_losses(losses)
    return found | {"rate": piece.rows * piece.tokens / found["seconds"], "unit": "tokens/s", "losses": losses}


def decode(piece: Piece) -> dict[str, Any]:
    """generate() with its cache: STEPS + 1 tokens less one token."""
    torch, device = torch_of(piece)
    model = make_model(piece, device).eval()
    model.generation_config.eos_token_id = None
    ids = torch.randint(7, 200, (piece.slots, piece.live - STEPS // 2), device=device)

    def run(count: int) -> None:
        sizes = dict(max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
        with torch.inference_mode():
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **sizes)

    many, one = timed(lambda: run(1 + STEPS), device, 3), timed(lambda: run(1), device, 3, warm=0)
    seconds = (many["seconds"] - one["seconds"]) / STEPS
    if seconds <= 0:
        raise RuntimeError(f"{STEPS} more tokens took no longer: {many['times']} and {one['times']} s")
    return many | {"seconds": seconds, "rate": piece.slots / seconds, "unit": "tokens/s"}


def prefill(piece: Piece) -> dict[str, Any]:
    """A forward pass that fills a cache; logits of the last token alone."""
    torch, device = torch_of(piece)
    model = make_model(piece, device).eval()
    ids = torch.randint(7, 200, (piece.rows, piece.tokens), device=device)

    @torch.inference_mode()
    def run() -> None:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1)

    found = timed(run, device, 4)
    return found | {"rate": piece.rows * piece.tokens / found["seconds"], "unit": "tokens/s"}


def tower(piece: Piece) -> dict[str, Any]:
    torch, device = torch_of(piece)
    model = make_model(piece, device, layers=1).eval().model.visual
    count = piece.grid[0] * piece.grid[1]
    patches = torch.randn(piece.rows * count, PATCH_DIM, dtype=model.dtype, device=device)
    grids = torch.tensor([[1, *piece.grid]] * piece.rows, device=device)

    @torch.inference_mode()
    def run() -> None:
        model(patches, grid_thw=grids)

    found = timed(run, device, 4)
    return found | {"rate": piece.rows / found["seconds"], "unit": "pictures/s"}


############################## What they share ##############################


def torch_of(piece: Piece) -> tuple[Any, str]:
    """(torch, the device). RuntimeError for a row at real size where torch has no GPU."""
    device = "cpu" if piece.size == TOY else "cuda"
    torch = import_torch(device)
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} sees no GPU")
    return torch, device


def make_model(piece: Piece, device: str, layers: int = 0):
    """Of random weights, made on the device. `layers`: of the decoder; 0 = as the size has."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config, dtype = Qwen2_5_VLConfig(**piece.raw), torch.float32 if device == "cpu" else torch.bfloat16
    if layers:
        config.text_config.num_hidden_layers = layers
        config.text_config.layer_types = config.text_config.layer_types[:layers]
    with torch.device(device):
        kind = dict(dtype=dtype, attn_implementation="sdpa")
        return Qwen2_5_VLForConditionalGeneration._from_config(config, **kind)


def timed(run: Callable[[], Any], device: str, calls: int, warm: int = 1) -> dict[str, Any]:
    """The median of calls after the first `warm`, each with all that it started on the device."""
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = []
    for _ in range(warm + calls):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else peak
    return {"seconds": statistics.median(times[warm:]), "times": times, "peak_gb": peak / 1e9}
