"""Hugging Face safetensors <-> our parameters: one table, strict both ways.

Hub checkpoints, and what transformers 5 saves, name the decoder `model.layers…` and the tower `visual…`; state dicts of
transformers' modules say `model.language_model…` and `model.visual…`. Both are read; the hub's names are written, since
every tool knows those.
"""

import contextlib
import itertools
import json
import math
import os
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from rsagent_jax.models.qwen25_vl import tensor_files
from rsagent_jax.models.qwen25_vl.config import Qwen25VLConfig
from rsagent_jax.models.qwen25_vl.model import Qwen25VL
from rsagent_jax.models.qwen25_vl.tensor_files import Tensor
from rsagent_jax.types import DataError

# What a new layer starts with that is to change nothing at first, and biases.
ZERO_ON_PURPOSE = re.compile(r"(\.bias|\.o_proj\.weight|\.down_proj\.weight|\.attn\.proj\.weight)$")
HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"

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


def abstract_model(config: Qwen25VLConfig) -> Qwen25VL:
    """The model with shapes instead of arrays."""
    return nnx.eval_shape(lambda: Qwen25VL(config, nnx.Rngs(0)))


def flat_params(model: Qwen25VL) -> dict[str, Any]:
    """Dotted path -> array (or shape)."""
    return flat_state(nnx.state(model, nnx.Param))


def flat_state(state: nnx.State) -> dict[str, Any]:
    """Dotted path -> what the state holds there: array, shape or sharding."""
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def hub_slots(model: Qwen25VL) -> dict[str, tuple[str, int | None, tuple[int, ...]]]:
    """Hub name -> (our path, layer, the hub's shape), layer by layer as the hub's own shards are."""
    slots, vision = {}, model.config.vision
    for path, leaf in flat_params(model).items():
        (hub, transposed), layered = TABLE[path], "*" in TABLE[path][0]
        shape = leaf.shape[layered:][:: -1 if transposed else 1]
        if path == "vision.patch_embed.kernel":
            shape = (shape[0], vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
        for layer in range(leaf.shape[0]) if layered else (None,):
            slots[hub.replace("*", str(layer))] = (path, layer, shape)
    return {hub: slots[hub] for hub in sorted(slots, key=_natural)}


def load_model(
    directory: str | pathlib.Path, config: Qwen25VLConfig, shardings: nnx.State | None = None, dtype: Any = np.float32
) -> Qwen25VL:
    """Reads a Hugging Face directory into a model with parameters of `dtype` (bf16 and fp16 widen to fp32 exactly).

    With `shardings` (a Sharding per parameter, as sharding.param_shardings makes them) this process reads only the
    shards on its own devices, one that several devices hold once. Without, everything goes to the default device. The
    host holds the shards of one parameter and a block of a file at a time; the CPU back end takes these shards over as
    its arrays.

    All headers are checked before any value is read: one DataError lists every unknown, missing, duplicate, misshapen
    or ill-typed tensor, every tensor that is not in the file which the index names, and every file whose end was never
    downloaded. A value that is not finite is an error of its own when it is read.
    """
    model = abstract_model(config)
    wanted = flat_params(model)
    sources, tied_head = _match(directory, model)
    places = flat_state(shardings) if shardings is not None else dict.fromkeys(wanted)

    def load(path: str, tensors: list[Tensor]) -> jax.Array:
        return _load_param(path, tensors, wanted[path].shape, places[path], np.dtype(dtype))

    values = {path: load(path, sources[path]) for path in wanted}
    if tied_head is not None and not jnp.array_equal(load("decoder.embed", [tied_head]), values["decoder.embed"]):
        raise _refusal(directory, ["lm_head.weight differs from the embedding, to which config.json ties it"])
    return with_params(model, values)


def check_files(directory: str | pathlib.Path, config: Qwen25VLConfig) -> None:
    """The DataError of `load_model` for what the headers of the files tell, without reading a value."""
    _match(directory, abstract_model(config))


def _match(directory: str | pathlib.Path, model: Qwen25VL) -> tuple[dict[str, list[Tensor]], Tensor | None]:
    """Our path -> its tensors in the files, layer by layer; and the head of a tied model, if the files have one."""
    slots, tied = hub_slots(model), model.config.text.tie_word_embeddings
    files, weight_map = tensor_files.find(directory)
    problems: list[str] = []
    seen: dict[str, Tensor] = {}
    repeated = set()
    headers = {file: tensor_files.safetensors_header(file) for file in files}
    problems += [problem for file, tensors in headers.items() if (problem := _unfinished(file, tensors))]
    for tensor in itertools.chain.from_iterable(headers.values()):
        name, file = _hub_name(tensor.name), tensor.file.name
        is_tied_head = name == HEAD and tied
        if name in seen:
            problems.append(f"duplicate {tensor.name} (in {file} and {seen[name].file.name})")
            repeated.add(name)
            continue
        seen[name] = tensor
        if not is_tied_head and name not in slots:
            problems.append(f"unknown {tensor.name} in {file}")
            continue
        shape = slots[EMBED if is_tied_head else name][2]
        if tensor.dtype not in tensor_files.DTYPES:
            readable = ", ".join(tensor_files.DTYPES)
            problems.append(f"dtype of {tensor.name}: {tensor.dtype}, only {readable} can be read")
        elif tensor.shape != shape:
            problems.append(f"misshapen {tensor.name}: {list(tensor.shape)}, the config wants {list(shape)}")
    problems += [f"missing {name}" for name in slots if name not in seen]
    for raw_name, file in weight_map.items():
        name = _hub_name(raw_name)
        if name in seen and name not in repeated and seen[name].file.name != file:
            problems.append(f"{raw_name} is in {seen[name].file.name}, the index says {file}")
    if problems:
        raise _refusal(directory, problems)
    sources: dict[str, list[Tensor]] = {}
    for hub, (path, _, _) in slots.items():  # in the order of the layers
        sources.setdefault(path, []).append(seen[hub])
    return sources, seen.get(HEAD) if tied else None


def _unfinished(file: pathlib.Path, tensors: list[Tensor]) -> str | None:
    """What is wrong with a file whose end was never downloaded: its size and header are right, its end is zeros.

    Weights can be zero on purpose by whole rows (padding of the vocabulary, pruned rows), as a bias, and as a whole
    matrix that writes into the residual stream (ZERO_ON_PURPOSE). So zeros at the end of a file mean that it is not
    finished if they cover any other tensor whole, or if they begin within a row and are at least 4096 bytes.
    """
    if not (tensors := [t for t in tensors if t.dtype in tensor_files.DTYPES and t.end > t.offset]):
        return None
    start, end = tensor_files.zero_tail(file, tensors), max(t.end for t in tensors)
    for tensor in sorted((t for t in tensors if t.end > start), key=lambda t: t.offset):
        if tensor.offset >= start:
            wrong = not ZERO_ON_PURPOSE.search(tensor.name)
        else:
            element = tensor_files.DTYPES[tensor.dtype].itemsize
            number = -(-(start - tensor.offset) // element)  # of the first zero
            wrong = number % math.prod(tensor.shape[1:]) > 0 and end - start >= 4096
        if wrong:
            zeros = f"{file.name} ends in {end - start} zero bytes, {tensor.name} among them"
            return f"{zeros}: its download was not finished; download it again"
    return None


def _refusal(directory: str | pathlib.Path, problems: list[str]) -> DataError:
    listed = "".join(f"\n  - {problem}" for problem in problems)
    return DataError(f"{directory}: the weights are not those of the model in its config.json:{listed}")


def _load_param(
    path: str,
    tensors: list[Tensor],
    shape: tuple[int, ...],
    sharding: jax.sharding.Sharding | None,
    dtype: np.dtype,
) -> jax.Array:
    """One parameter on its devices; what several of them hold is read once."""
    everything = (slice(None),) * len(shape)
    indices = [everything] if sharding is None else sharding.addressable_devices_indices_map(shape).values()
    boxes = {str(index): [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)] for index in indices}
    pieces = {key: _aligned_empty([stop - start for start, stop in box], dtype) for key, box in boxes.items()}
    for layer, tensor in enumerate(tensors):
        with tensor_files.opened(tensor) as read:
            for box, piece in zip(boxes.values(), pieces.values(), strict=True):
                if "*" in TABLE[path][0]:
                    (first, stop), *box = box
                    if not first <= layer < stop:
                        continue
                    piece = piece[layer - first]
                if len(box) == 1:  # a vector is a matrix of one column
                    piece, box = piece[:, None], [*box, (0, 1)]
                elif TABLE[path][1]:
                    piece, box = piece.T, box[::-1]
                for rows, block in read(*box):
                    piece[rows] = block.astype(dtype, copy=False)
    if sharding is None:
        return jax.block_until_ready(jax.device_put(pieces[str(everything)]))
    # The host's copies go before the next parameter's are made: wait until they have been sent.
    return jax.block_until_ready(jax.make_array_from_callback(shape, sharding, lambda index: pieces[str(index)]))


def _aligned_empty(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """Memory that JAX's CPU back end takes as it is; it copies what is not aligned to 64 bytes."""
    count = math.prod(shape) * dtype.itemsize
    data = np.empty(count + 64, np.uint8)
    start = -data.ctypes.data % 64
    return data[start : start + count].view(dtype).reshape(shape)


def with_params(model: Qwen25VL, values: dict[str, Any]) -> Qwen25VL:
    """The same model with its parameters replaced by dotted path."""
    graphdef, state = nnx.split(model, nnx.Param)
    return nnx.merge(graphdef, with_values(state, values))


def with_values(state: nnx.State, values: dict[str, Any]) -> nnx.State:
    """The same state with other values, by dotted path."""
    flat = [(path, leaf.replace(values[".".join(map(str, path))])) for path, leaf in nnx.to_flat_state(state)]
    return nnx.from_flat_state(flat)


def save_model(
    model: Qwen25VL, directory: str | pathlib.Path, raw_config: dict[str, Any], max_shard_bytes: int = 5 * 10**9
) -> None:
    """Writes config.json and the weights in the dtype that `raw_config` names (fp32 if none), atomically.

    More than `max_shard_bytes` of data go to model-0000i-of-0000N.safetensors and model.safetensors.index.json, less to
    model.safetensors. The host holds the tensors of one file. In a run of several processes all of them call this,
    since they gather each tensor together; process 0 writes.
    """
    dtype = raw_config.get("dtype") or raw_config.get("torch_dtype") or "float32"
    if dtype not in DTYPES:
        raise DataError(f"config.json: dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    from huggingface_hub import split_state_dict_into_shards_factory

    directory, params, slots = pathlib.Path(directory), flat_params(model), hub_slots(model)
    shards = split_state_dict_into_shards_factory(
        {hub: shape for hub, (_, _, shape) in slots.items()},
        get_storage_size=lambda shape: np.dtype(DTYPES[dtype]).itemsize * math.prod(shape),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    writes = jax.process_index() == 0
    with tensor_files.partial_directory(directory) if writes else contextlib.nullcontext() as partial:
        if writes:
            index = {"metadata": shards.metadata, "weight_map": {hub: shards.tensor_to_filename[hub] for hub in slots}}
            files = {"config.json": raw_config} | ({tensor_files.INDEX: index} if shards.is_sharded else {})
            for file, content in files.items():
                (partial / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for file, names in shards.filename_to_tensors.items():
            tensors = {}
            for name in names:
                path, layer, shape = slots[name]
                value = _on_host(params[path], layer, TABLE[path][1])
                if writes:
                    tensors[name] = value.astype(DTYPES[dtype], order="C").reshape(shape)
            if writes:
                tensor_files.write(partial / file, tensors)
        if writes:
            os.replace(partial / "config.json", directory / "config.json")
            tensor_files.publish(partial, directory, list(shards.filename_to_tensors))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"saved {directory}")  # nobody reads, or exits, before it is there


_layer_of = jax.jit(lambda stacked, layer: jax.lax.dynamic_index_in_dim(stacked, layer, keepdims=False))


def _on_host(leaf: Any, layer: int | None, transposed: bool) -> np.ndarray:
    """One layer of a parameter in the hub's orientation. All processes call it; each gets the whole."""
    part = leaf.copy() if layer is None else _layer_of(leaf, layer)  # not the leaf itself: it would keep its host copy
    if isinstance(part, jax.Array) and not part.is_fully_addressable:
        part = multihost_utils.process_allgather(part, tiled=True)
    value = np.asarray(part)
    return value.T if transposed else value


def _natural(name: str) -> list[Any]:
    """Sorts layer 2 before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _hub_name(name: str) -> str:
    """The hub's name of a tensor in either layout."""
    name = re.sub(r"^model\.visual\.", "visual.", name)
    return re.sub(r"^model\.language_model\.", "model.", name)
