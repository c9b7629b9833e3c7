"""Tiny random Qwen2.5-VLs, ours and Hugging Face's with the same weights, and the rows they read.

Torch and transformers are imported inside functions only, so that the tests which need neither run without them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rsagent_jax.models.qwen25_vl import convert, language, vision
from rsagent_jax.models.qwen25_vl.config import SIZES, Qwen25VLConfig, load_config
from rsagent_jax.models.qwen25_vl.logprobs import token_logprobs
from rsagent_jax.models.qwen25_vl.model import Qwen25VL
from rsagent_jax.models.qwen25_vl.positions import (
    Grid,
    fill_patch_buffer,
    merged_tokens,
    mrope_positions,
    padded_patches,
    patch_layout,
)
from rsagent_jax.types import Batch

# of VisionConfig
PATCHES = dict(in_channels=3, patch_size=14, temporal_patch_size=2, spatial_merge_size=2, window_size=112)

VOCAB, IMAGE, VIDEO, VISION_START, VISION_END, EOS = 96, 90, 91, 92, 93, 2
# Options of the pinned jaxlib that compile four times faster: these tests spend their time in the compiler.
QUICK = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):  # from which on there are no other emitters
    QUICK["xla_cpu_use_fusion_emitters"] = False
SPECIAL = (IMAGE, VIDEO, VISION_START, VISION_END)


@dataclasses.dataclass(frozen=True)
class Case:
    """One tiny architecture and the images of its row."""

    name: str
    grids: tuple[Grid, ...]
    seed: int = 0
    heads: int = 4
    kv_heads: int = 2
    tied: bool = False
    hidden: int = 32
    layers: int = 2
    mrope_section: tuple[int, ...] = (1, 1, 2)
    depth: int = 2
    fullatt: tuple[int, ...] = (1,)
    patch_size: int = 4
    window_size: int = 32  # 8 x 8 patches, as the real model has
    vision_hidden: int = 32
    vision_heads: int = 2
    gain: float = 1.0  # of the decoder's attention: what was read long ago decides the next token, not the last token

    def raw_config(self) -> dict[str, Any]:
        """config.json as the hub has it: that of the published 3B, in these sizes."""
        raw = json.loads((SIZES / "3b.json").read_text())
        del raw["torch_dtype"]
        raw["vision_config"] |= PATCHES | {
            "depth": self.depth,
            "hidden_size": self.vision_hidden,
            "intermediate_size": 40,
            "num_heads": self.vision_heads,
            "out_hidden_size": self.hidden,
            "fullatt_block_indexes": list(self.fullatt),
            "patch_size": self.patch_size,
            "window_size": self.window_size,
        }
        return raw | {
            "dtype": "float32",
            "tie_word_embeddings": self.tied,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "vision_start_token_id": VISION_START,
            "vision_end_token_id": VISION_END,
            "bos_token_id": 1,
            "eos_token_id": EOS,
            "vocab_size": VOCAB,
            "hidden_size": self.hidden,
            "intermediate_size": 48,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "rope_scaling": {"type": "mrope", "mrope_section": list(self.mrope_section)},
        }


CASES = (
    Case("square, no full attention", ((1, 16, 16),), seed=1, heads=2, mrope_section=(2, 3, 3), fullatt=()),
    Case("tall, left-over windows", ((1, 18, 4),), seed=2, kv_heads=1, tied=True, fullatt=(0,)),
    Case("wide, left-over windows", ((1, 4, 18),), seed=3, kv_heads=4, fullatt=(0, 2), depth=3, patch_size=14,
         window_size=112),
    Case("two images", ((1, 10, 6), (1, 12, 20)), seed=4, hidden=48, mrope_section=(2, 1, 3), fullatt=(2,), depth=3,
         layers=3),
    Case("four images, narrow windows", ((1, 4, 4), (1, 8, 8), (1, 10, 6), (1, 2, 14)), seed=5, kv_heads=1, tied=True,
         fullatt=(1, 2), depth=3, window_size=16, vision_hidden=48, vision_heads=3),
    Case("text only", (), seed=7),
)  # fmt: skip
CASE = {case.name: case for case in CASES}


@dataclasses.dataclass(frozen=True)
class Sequence:
    """Tokens with the processor's patches of their images."""

    tokens: np.ndarray  # i32[T]
    patches: np.ndarray  # f32[sum of grids, C]
    grids: tuple[Grid, ...]


def sequence(case: Case, seed: int, grids: tuple[Grid, ...] | None = None) -> Sequence:
    """Text, image, text, image, …, text with random ids and random pixels."""
    rng = np.random.default_rng(seed)
    grids = case.grids if grids is None else grids

    def words():
        return rng.integers(3, IMAGE, rng.integers(*((3, 9) if grids else (16, 24))))

    parts = [words()]
    for grid in grids:
        parts += [[VISION_START], [IMAGE] * merged_tokens(grid), [VISION_END], words()]
    dim = 3 * 2 * case.patch_size**2
    patches = rng.normal(size=(sum(int(np.prod(g)) for g in grids), dim)).astype(np.float32)
    return Sequence(np.concatenate(parts).astype(np.int32), patches, grids)


def pack(sequences: list[Sequence], config: Qwen25VLConfig, length: int = 0, capacity: int = 0) -> Batch:
    """Several sequences in one row, padded to at least `length` tokens and `capacity` patch places (text needs 0).

    The loss is on every token that has an earlier one in its sequence.
    """
    tokens = np.concatenate([s.tokens for s in sequences])
    grids = sum((s.grids for s in sequences), ())
    positions = np.concatenate([mrope_positions(s.tokens, s.grids, IMAGE)[0] for s in sequences], axis=1)
    segments = np.concatenate([np.full(len(s.tokens), i) for i, s in enumerate(sequences, start=1)])
    pad = max(length - len(tokens), 0)
    tokens, segments = np.pad(tokens, (0, pad)), np.pad(segments, (0, pad)).astype(np.int32)
    capacity = max(capacity, padded_patches(grids, config.vision))
    patches = np.concatenate([s.patches for s in sequences])
    buffer = fill_patch_buffer(patches, grids, tokens == IMAGE, capacity, config.vision)
    loss_mask = np.append(False, segments[1:] == segments[:-1]) & (segments > 0)
    rows = tokens, np.pad(positions, ((0, 0), (0, pad))), segments, loss_mask, None, None, *dataclasses.astuple(buffer)
    return Batch(*(None if row is None else row[None] for row in rows))


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same weights in both libraries."""

    case: Case
    config: Qwen25VLConfig
    ours: Qwen25VL
    hf: Any
    directory: pathlib.Path


@functools.cache
def pair(case: Case) -> Pair:
    """Hugging Face's model, saved by save_pretrained, and ours read from those files."""
    keep.append(folder := tempfile.TemporaryDirectory())
    hf = build_hf(case)
    hf.save_pretrained(folder.name)
    config = load_config(folder.name)
    return Pair(case, config, convert.load_model(folder.name, config), hf, pathlib.Path(folder.name))


keep: list[tempfile.TemporaryDirectory] = []  # removed when the process ends


def build_hf(case: Case):
    """A random fp32 model with eager attention; no norm weight is 1 and no bias 0, so nothing is right by luck."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.set_num_threads(1)
    config = Qwen2_5_VLConfig(**case.raw_config(), attn_implementation="eager")
    model = Qwen2_5_VLForConditionalGeneration(config).float().eval()
    generator = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("bias"):
                value.copy_(0.3 * noise)
            elif value.ndim == 1:
                value.copy_(1 + 0.3 * noise)
            elif "embed_tokens" in name:
                value.copy_(0.5 * noise)
            else:
                gain = case.gain if "self_attn" in name else 1
                value.copy_(0.7 * gain * noise / value[0].numel() ** 0.5)
    return model


def random_model(case: Case, seed: int = 0) -> Qwen25VL:
    """Ours alone, without torch: every parameter random."""
    config = Qwen25VLConfig.from_hf(case.raw_config())
    rng = np.random.default_rng(seed)
    model = convert.abstract_model(config)
    values = {
        path: jnp.asarray(rng.normal(size=leaf.shape).astype(np.float32) * 0.2)
        for path, leaf in convert.flat_params(model).items()
    }
    return convert.with_params(model, values)


def to_hub(model: Qwen25VL, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Hub names -> arrays of `dtype`, layers unstacked."""
    out, values = {}, {path: np.asarray(leaf) for path, leaf in convert.flat_params(model).items()}
    for hub, (path, layer, shape) in convert.hub_slots(model).items():
        one = values[path] if layer is None else values[path][layer]
        one = (one.T if convert.TABLE[path][1] else one).reshape(shape)
        out[hub] = np.ascontiguousarray(one.astype(convert.DTYPES[dtype]))
    return out


def write(case: Case, directory: pathlib.Path, seed: int = 0, dtype: str = "float32", limit: int = 10**9) -> Qwen25VL:
    """Saves random_model as a Hugging Face directory, in files of at most `limit` bytes."""
    model = random_model(case, seed)
    convert.save_model(model, directory, case.raw_config() | {"dtype": dtype}, limit)
    return model


def read_raw(directory: pathlib.Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def jitted(model: Qwen25VL, function):
    """function(model, *args) as a jitted function of args; compiled fast rather than well."""
    graphdef, state = nnx.split(model)
    program = jax.jit(lambda state, *args: function(nnx.merge(graphdef, state), *args), compiler_options=QUICK)
    return lambda *args: program(state, *args)


def logits(model: Qwen25VL, row: Batch) -> np.ndarray:
    """f32[T, V] of one packed row."""
    return np.asarray(jitted(model, lambda m, row: m.logits(m(row)))(row))[0]


@contextlib.contextmanager
def recorded(into: dict[str, list]):
    """Within, the scans over both towers' layers also note every layer's output: one array [layers, …] per scan."""

    def recorder(key):
        def scan(stacked, body, x, compute, *, start=0, stop=None):
            graphdef, state = nnx.split(stacked)

            def step(carry, layer):
                y = body(nnx.merge(graphdef, layer), carry)
                return y, y

            x, outputs = jax.lax.scan(step, x, jax.tree.map(lambda a: a[start:stop], state))
            into.setdefault(key, []).append(outputs)
            return x

        return scan

    originals = vision.scan_layers, language.scan_layers, vision.period
    try:
        vision.scan_layers, language.scan_layers = recorder("vision block"), recorder("decoder layer")
        vision.period = lambda config: None  # what stands inside a scan over groups cannot be handed out
        yield
    finally:
        vision.scan_layers, language.scan_layers, vision.period = originals


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one forward and backward pass of one sequence gave, in Hugging Face's order (window order, no padding)."""

    activations: dict[str, np.ndarray]  # every block's output, the merger's, the logits
    loss: float
    gradients: dict[str, np.ndarray | None]  # hub name -> gradient; None where torch never came


def sft_loss(model: Qwen25VL, hidden_BTD, batch: Batch):
    """Mean of -log p over the tokens that the batch's mask marks."""
    targets, wanted = (jnp.roll(a, -1, axis=1) for a in (batch.tokens, batch.loss_mask))
    logprobs = token_logprobs(hidden_BTD, model.decoder.head_VD, targets, piece=4096)
    return -jnp.sum(logprobs * wanted) / jnp.sum(wanted)


def hugging_face_order(grids: tuple[Grid, ...], config: Qwen25VLConfig) -> np.ndarray:
    """Our buffer's place of every patch in Hugging Face's order, where left-over windows stand where they lie."""
    utils = pytest.importorskip("transformers.vision_utils")
    import torch

    places, at, unit, vision = [np.empty(0, int)], 0, config.vision.merge_unit, config.vision
    for grid in grids:
        source, _, merged_place = patch_layout(grid, vision)
        index, _ = utils.get_vision_window_index(torch.tensor([grid]), 2, vision.window_size, vision.patch_size)
        places.append((merged_place[index.numpy()][:, None] * unit + np.arange(unit)).reshape(-1) + at)
        at += len(source)
    return np.concatenate(places)


def measure_ours(pair: Pair, seq: Sequence, prompt: int) -> Measured:
    """One program: activations, loss and gradients. The loss is on the tokens after the first `prompt` ones."""
    row = dataclasses.replace(pack([seq], pair.config), loss_mask=np.arange(len(seq.tokens))[None] > prompt)
    graphdef, state = nnx.split(pair.ours)

    def forward(state, row):
        model, records, mergers = nnx.merge(graphdef, state), {}, []
        place = model.place
        model.place = lambda tokens, merged, *rest: (mergers.append(merged), place(tokens, merged, *rest))[1]
        with recorded(records):
            hidden = model(row)
        return sft_loss(model, hidden, row), (records, mergers[0], model.logits(hidden))

    program = jax.jit(jax.value_and_grad(forward, has_aux=True), compiler_options=QUICK)
    (loss, (records, merged, logits)), grads = program(state, row)
    places, out = hugging_face_order(seq.grids, pair.config), {}
    unit = pair.config.vision.merge_unit
    for kind, scans in records.items():
        for i, x in enumerate(y for scan in scans for y in np.asarray(scan)):
            out[f"{kind} {i}"] = x.reshape(-1, x.shape[-1])[places if kind == "vision block" else slice(None)]
    out["merger"] = np.asarray(merged)[0][places[::unit] // unit]
    out["logits"] = np.asarray(logits)[0]
    if not seq.grids:
        out = {name: x for name, x in out.items() if len(x)}
    return Measured(out, float(loss), to_hub(nnx.merge(graphdef, grads), "float32"))


def measure_hf(pair: Pair, seq: Sequence, prompt: int) -> Measured:
    import torch

    hf, out, handles = pair.hf, {}, []

    def note(name):
        def hook(module, args, result):
            out[name] = result.detach().numpy().reshape(-1, result.shape[-1])

        return hook

    for kind, modules in (("vision block", hf.model.visual.blocks), ("decoder layer", hf.model.language_model.layers)):
        handles += [m.register_forward_hook(note(f"{kind} {i}")) for i, m in enumerate(modules)]
    handles.append(hf.model.visual.merger.register_forward_hook(note("merger")))
    hf.zero_grad(set_to_none=True)
    hf.model.rope_deltas = None
    logits = hf(**hf_inputs(seq)).logits[0]
    targets = torch.from_numpy(seq.tokens[1:].astype(np.int64))[:, None]
    loss = -logits[:-1].log_softmax(-1).gather(1, targets)[prompt:].mean()
    loss.backward()
    for handle in handles:
        handle.remove()
    params = dict(hf.named_parameters())
    grads = {hub: params[hf_name(hub)].grad for hub in to_hub(pair.ours, "float32")}
    assert len(grads) == len(params)
    out["logits"] = logits.detach().numpy()
    return Measured(out, loss.item(), {name: None if g is None else g.numpy() for name, g in grads.items()})


@functools.cache
def measured(case: Case) -> tuple[Measured, Measured]:
    """(ours, theirs) on the case's own row."""
    seq = sequence(case, seed=100 + case.seed)
    prompt = len(seq.tokens) // 2
    return measure_ours(pair(case), seq, prompt), measure_hf(pair(case), seq, prompt)


def hf_inputs(seq: Sequence) -> dict[str, Any]:
    """Keyword arguments of Hugging Face's forward."""
    import torch

    tokens = torch.from_numpy(seq.tokens.astype(np.int64))[None]
    out = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if seq.grids:
        out["pixel_values"] = torch.from_numpy(seq.patches)
        out["image_grid_thw"] = torch.tensor(seq.grids)
        out["mm_token_type_ids"] = (tokens == IMAGE).int()
    return out


def hf_logits(hf, seq: Sequence) -> np.ndarray:
    """f32[T, V] of one sequence."""
    import torch

    hf.model.rope_deltas = None
    with torch.no_grad():
        return hf(**hf_inputs(seq)).logits[0].numpy()


def hf_name(hub: str) -> str:
    """A hub name -> the name of the parameter in Hugging Face's module tree."""
    if hub.startswith("visual."):
        return f"model.{hub}"
    return hub.replace("model.", "model.language_model.", 1) if hub.startswith("model.") else hub
