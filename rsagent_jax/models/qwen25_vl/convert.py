"""Hugging Face safetensors <-> our parameters: one table, strict both ways.

Hub checkpoints, and what transformers 5 saves, name the decoder `model.layers…` and the tower `visual…`; state dicts of
transformers' modules say `model.language_model…` and `model.visual…`. Both are read; the hub's names are written, since
every tool knows those.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rsagent_jax.models.qwen25_vl.config import Qwen25VLConfig, read_json
from rsagent_jax.models.qwen25_vl.model import Qwen25VL
from rsagent_jax.types import DataError

# our path -> (hub name, transposed?). "*" stands for the layer number; our arrays stack layers on axis 0.
TABLE: dict[str, tuple[str, bool]] = {
    "decoder.embed": ("model.embed_tokens.weight", False),
    "decoder.lm_head": ("lm_head.weight", False),
    "decoder.norm.scale": ("model.norm.weight", False),
    "decoder.layers.norm1.scale": ("model.layers.*.input_layernorm.weight", False),
    "decoder.layers.norm2.scale": ("model.layers.*.post_attention_layernorm.weight", False),
    "decoder.layers.o.kernel": ("model.layers.*.self_attn.o_proj.weight", True),
    "vision.patch_embed.kernel": ("visual.patch_embed.proj.weight", True),
    "vision.blocks.norm1.scale": ("visual.blocks.*.norm1.weight", False),
    "vision.blocks.norm2.scale": ("visual.blocks.*.norm2.weight", False),
    "vision.merger_norm.scale": ("visual.merger.ln_q.weight", False),
}
for _ours, _hub in (
    ("decoder.layers.q", "model.layers.*.self_attn.q_proj"),
    ("decoder.layers.k", "model.layers.*.self_attn.k_proj"),
    ("decoder.layers.v", "model.layers.*.self_attn.v_proj"),
    ("vision.blocks.qkv", "visual.blocks.*.attn.qkv"),
    ("vision.blocks.proj", "visual.blocks.*.attn.proj"),
    ("vision.blocks.mlp.gate", "visual.blocks.*.mlp.gate_proj"),
    ("vision.blocks.mlp.up", "visual.blocks.*.mlp.up_proj"),
    ("vision.blocks.mlp.down", "visual.blocks.*.mlp.down_proj"),
    ("vision.merger_in", "visual.merger.mlp.0"),
    ("vision.merger_out", "visual.merger.mlp.2"),
):
    TABLE[f"{_ours}.kernel"] = (f"{_hub}.weight", True)
    TABLE[f"{_ours}.bias"] = (f"{_hub}.bias", False)
for _name in ("gate", "up", "down"):
    TABLE[f"decoder.layers.mlp.{_name}.kernel"] = (f"model.layers.*.mlp.{_name}_proj.weight", True)

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
FILE_DTYPES = ("F32", "F16", "BF16")  # the same, as safetensors names them


def abstract_model(config: Qwen25VLConfig) -> Qwen25VL:
    """The model with shapes instead of arrays."""
    return nnx.eval_shape(lambda: Qwen25VL(config, nnx.Rngs(0)))


def flat_params(model: Qwen25VL) -> dict[str, Any]:
    """Dotted path -> array (or shape)."""
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def load_model(directory: str | pathlib.Path, config: Qwen25VLConfig) -> Qwen25VL:
    """Reads a Hugging Face directory into a model with fp32 parameters, bf16 and fp16 widened exactly.

    One DataError lists every unknown, missing, duplicate, misshapen or ill-typed tensor.
    """
    model = abstract_model(config)
    wanted = flat_params(model)
    slots = {hub: (path, layer) for path in wanted for hub, layer in _hub_names(path, wanted[path].shape)}
    out = {path: np.empty(leaf.shape, np.float32) for path, leaf in wanted.items()}
    problems: list[str] = []
    seen: dict[str, str] = {}
    tied_head: np.ndarray | None = None  # compared last: it may stand before the embedding, or in another shard
    for file in tensor_files(directory):
        for raw_name, dtype, value in _tensors(file):
            name = _hub_name(raw_name)
            if name in seen:
                problems.append(f"duplicate {raw_name} (in {file.name} and {seen[name]})")
                continue
            seen[name] = file.name
            is_tied_head = name == "lm_head.weight" and config.text.tie_word_embeddings
            if not is_tied_head and name not in slots:
                problems.append(f"unknown {raw_name} in {file.name}")
                continue
            path, layer = slots["model.embed_tokens.weight" if is_tied_head else name]
            target = out[path] if layer is None else out[path][layer]
            shape = _hub_shape(path, target.shape, config)
            if value is None:
                problems.append(f"dtype of {raw_name}: {dtype}, only {', '.join(FILE_DTYPES)} can be read")
            elif value.shape != shape:
                problems.append(f"misshapen {raw_name}: {list(value.shape)}, the config wants {list(shape)}")
            elif is_tied_head:
                tied_head = value.astype(np.float32)
            else:
                target[...] = _from_hub(path, value)
    problems += [f"missing {name}" for name in slots if name not in seen]
    if tied_head is not None and not problems and not np.array_equal(tied_head, out["decoder.embed"]):
        problems.append("lm_head.weight differs from the embedding, to which config.json ties it")
    if problems:
        raise DataError(
            f"{directory}: the weights are not those of the model in its config.json:\n  - " + "\n  - ".join(problems)
        )
    return with_params(model, {path: jnp.asarray(value) for path, value in out.items()})


def with_params(model: Qwen25VL, values: dict[str, Any]) -> Qwen25VL:
    """The same model with its parameters replaced by dotted path."""
    graphdef, state = nnx.split(model, nnx.Param)
    flat = [(path, leaf.replace(values[".".join(map(str, path))])) for path, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def to_hub(model: Qwen25VL, dtype: str) -> dict[str, np.ndarray]:
    """Hub names -> arrays of `dtype`, layers unstacked."""
    out = {}
    for path, leaf in flat_params(model).items():
        value = np.asarray(leaf)
        for hub, layer in _hub_names(path, value.shape):
            one = value if layer is None else value[layer]
            shape = _hub_shape(path, one.shape, model.config)
            one = (one.T if TABLE[path][1] else one).reshape(shape)
            out[hub] = np.ascontiguousarray(one.astype(DTYPES[dtype]))
    return out


def save_model(model: Qwen25VL, directory: str | pathlib.Path, raw_config: dict[str, Any]) -> None:
    """Writes config.json and model.safetensors; the dtype is the one that `raw_config` names (fp32 if none)."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    dtype = raw_config.get("dtype") or raw_config.get("torch_dtype") or "float32"
    if dtype not in DTYPES:
        raise DataError(f"config.json: dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    (directory / "config.json").write_text(json.dumps(raw_config, indent=2) + "\n", encoding="utf-8")
    file = directory / "model.safetensors"
    partial = file.with_suffix(".partial")  # an interrupted export leaves the old file whole
    save_file(to_hub(model, dtype), partial, metadata={"format": "pt"})
    os.replace(partial, file)


def tensor_files(directory: str | pathlib.Path) -> list[pathlib.Path]:
    """model.safetensors, else the shards that model.safetensors.index.json names, as transformers looks for them."""
    directory = pathlib.Path(directory)
    index = directory / "model.safetensors.index.json"
    files = [directory / "model.safetensors"]
    if not files[0].exists() and index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise DataError(f"{index} has no weight_map of tensor names to file names")
        names = sorted(set(weight_map.values()))
        if bad := [name for name in names if pathlib.PurePath(name).name != name or name in ("", "..")]:
            raise DataError(f"{index} names files outside its directory: {bad}")
        files = [directory / name for name in names]
    if missing := [f.name for f in files if not f.exists()]:
        raise DataError(f"{directory} lacks {', '.join(missing)}; give a Hugging Face directory of Qwen2.5-VL weights")
    return files


def _tensors(file: pathlib.Path) -> Iterator[tuple[str, str, np.ndarray | None]]:
    """(name, dtype, array) of each tensor; None for a dtype that is none of ours. A name written twice comes twice."""
    try:
        with safe_open(file, framework="np") as handle:
            for name in _header_names(file):
                dtype = handle.get_slice(name).get_dtype()
                yield name, dtype, handle.get_tensor(name) if dtype in FILE_DTYPES else None
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file} is not a readable safetensors file: {error}") from error


def _header_names(file: pathlib.Path) -> list[str]:
    """Tensor names as the header, known to be valid, lists them; safetensors' own keys() drops repeated ones."""
    with file.open("rb") as stream:
        header = stream.read(int.from_bytes(stream.read(8), "little"))
    return [name for name, _ in json.loads(header, object_pairs_hook=list) if name != "__metadata__"]


def _hub_name(name: str) -> str:
    """The hub's name of a tensor in either layout."""
    name = re.sub(r"^model\.visual\.", "visual.", name)
    return re.sub(r"^model\.language_model\.", "model.", name)


def _hub_names(path: str, shape: tuple[int, ...]) -> list[tuple[str, int | None]]:
    hub = TABLE[path][0]
    return [(hub.replace("*", str(i)), i) for i in range(shape[0])] if "*" in hub else [(hub, None)]


def _hub_shape(path: str, shape: tuple[int, ...], config: Qwen25VLConfig) -> tuple[int, ...]:
    """The shape that the hub's tensor has when one layer of ours has `shape`."""
    if path == "vision.patch_embed.kernel":
        v = config.vision
        return (shape[1], v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
    return shape[::-1] if TABLE[path][1] else shape


def _from_hub(path: str, value: np.ndarray) -> np.ndarray:
    if path == "vision.patch_embed.kernel":
        value = value.reshape(value.shape[0], -1)
    return (value.T if TABLE[path][1] else value).astype(np.float32)
