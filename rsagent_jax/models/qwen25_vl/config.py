"""The shape of a Qwen2.5-VL, as transformers reads Hugging Face's config.json (flat as on the hub, or nested)."""

import copy
import dataclasses
import importlib
import json
import os
import pathlib
import sys
from typing import Any, Self

from rsagent_jax.runtime.paths import is_remote, read_bytes, storage_kind
from rsagent_jax.types import DataError
from sam_bridge.file_kinds import HEAD, kind_of

SIZES = pathlib.Path(__file__).parents[3] / "assets" / "configs"
# What a config.json must say itself; for the rest transformers fills in the value of one size of the model.
REQUIRED = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads rms_norm_eps
    image_token_id video_token_id vision_start_token_id vision_end_token_id eos_token_id""".split()
REQUIRED_VISION = "hidden_size intermediate_size out_hidden_size".split()


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    hidden_size: int
    intermediate_size: int
    out_hidden_size: int
    depth: int
    num_heads: int
    fullatt_block_indexes: tuple[int, ...]
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    window_size: int

    @property
    def patch_dim(self) -> int:
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches that become one token of the decoder."""
        return self.spatial_merge_size**2

    @property
    def window_side(self) -> int:
        """Side of a window in merged tokens."""
        return self.window_size // self.patch_size // self.spatial_merge_size

    @property
    def window_patches(self) -> int:
        """Patches of a full window, the places of a bin (positions.py)."""
        return self.window_side**2 * self.merge_unit


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, ...]  # frequencies of the temporal, height and width axes; sums to head_dim / 2
    tie_word_embeddings: bool

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen25VLConfig:
    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_hf(cls, raw: dict[str, Any], where: str = "config.json") -> Self:
        """Reads the dict of a config.json. DataError lists every field that is missing or not supported."""
        problems = []
        if raw.get("model_type") != "qwen2_5_vl":
            problems.append(f'model_type is {raw.get("model_type")!r}, not "qwen2_5_vl"')
        if not isinstance(raw.get("vision_config"), dict):
            raise DataError(f"{where}: this is not a Qwen2.5-VL: it has no vision_config ({'; '.join(problems)})")
        nested = raw["text_config"] if isinstance(raw.get("text_config"), dict) else {}
        flat = raw | {name: value for name, value in nested.items() if value not in (None, [])}
        for prefix, values, names in (("", flat, REQUIRED), ("vision_config.", raw["vision_config"], REQUIRED_VISION)):
            problems += [f"{prefix}{name} is missing" for name in names if values.get(name) in (None, [])]
        eos = token_ids(flat.get("eos_token_id"))
        if not eos and "eos_token_id is missing" not in problems:
            problems.append(f"eos_token_id = {flat['eos_token_id']!r} is neither a token id nor a list of them")
        if problems:
            raise DataError(f"{where}: " + "; ".join(problems))
        try:
            theirs = hugging_face("Qwen2_5_VLConfig").from_dict(copy.deepcopy(raw)).to_dict()
        except Exception as error:  # whatever its checks of types and of rotary settings raise
            raise DataError(f"{where}: transformers refuses it: {' '.join(str(error).split())}") from error
        tied = bool(theirs["tie_word_embeddings"] or flat.get("tie_word_embeddings"))
        text, vision = theirs["text_config"], theirs["vision_config"]
        text |= {"mrope_section": (16, 24, 24), "tie_word_embeddings": tied} | text["rope_parameters"]
        for source, name, only in (
            (text, "hidden_act", "silu"),
            (text, "use_sliding_window", False),
            (text, "rope_type", "default"),
            (vision, "hidden_act", "silu"),
            (vision["rope_parameters"], "rope_theta", 10_000.0),
        ):
            if source[name] not in (only, None):
                problems.append(f"{name} = {source[name]!r} is not supported (only {only!r})")
        if problems:  # before arithmetic with what they say
            raise DataError(f"{where}: " + "; ".join(problems))
        parts = {"text": _pick(TextConfig, text), "vision": _pick(VisionConfig, vision), "eos_token_ids": eos}
        config = _pick(cls, theirs | parts)
        text, vision = config.text, config.vision
        if sum(text.mrope_section) * 2 != text.head_dim:
            problems.append(f"mrope_section {text.mrope_section} does not sum to head_dim / 2")
        if text.num_attention_heads % text.num_key_value_heads:
            problems.append("heads are not a multiple of key/value heads")
        if vision.out_hidden_size != text.hidden_size:
            problems.append("vision out_hidden_size differs from the decoder's hidden_size")
        if vision.hidden_size % (4 * vision.num_heads):
            problems.append("vision head_dim is not a multiple of 4")
        if problems:
            raise DataError(f"{where}: " + "; ".join(problems))
        return config


LARGE = 1024  # the decoder's width from which on a policy has configs/segment.py:full; that of Qwen2.5-VL-3B is 2048


def load_config(directory: str | pathlib.Path) -> Qwen25VLConfig:
    path = pathlib.Path(directory) / "config.json"
    return Qwen25VLConfig.from_hf(read_json(path), str(path))


def size_config(name: str) -> Qwen25VLConfig:
    """The published model of a size: 3b, 7b, 32b or 72b. The shape only; assets/configs holds no weights."""
    known = sorted(path.stem for path in SIZES.glob("*.json"))
    if name not in known:
        raise DataError(f"no Qwen2.5-VL of size {name!r} is known; there are: {', '.join(known) or f'none in {SIZES}'}")
    path = SIZES / f"{name}.json"
    return Qwen25VLConfig.from_hf(read_json(path), str(path))


def token_ids(value: Any) -> tuple[int, ...]:
    """What a file names as an id or as a list of ids; () for anything else."""
    ids = value if isinstance(value, list) else [value]
    return tuple(ids) if all(type(i) is int and i >= 0 for i in ids) else ()


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file, or one DataError."""
    data = b""
    try:
        data = read_bytes(path)
        value = json.loads(data.decode("utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; give a Hugging Face directory of Qwen2.5-VL weights") from error
    except (OSError, ValueError, RecursionError) as error:  # errors of UTF-8 and JSON are ValueErrors
        kind = data and kind_of(data[:HEAD])
        wrong = storage_kind(error) if isinstance(error, OSError) and is_remote(path) else DataError
        raise wrong(f"{path} {f'is {kind}' if kind else f'cannot be read as JSON: {error}'}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} must hold a JSON object, it holds a {type(value).__name__}")
    return value


def _pick(cls: type, values: dict[str, Any]) -> Any:
    """A dataclass from those of the values that it has fields for; lists become tuples."""
    picked = {field.name: values[field.name] for field in dataclasses.fields(cls)}
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in picked.items()})


def hugging_face(name: str) -> Any:
    """A class of transformers, which is imported at the first call: one second.

    It would import torch and torchvision wherever they are installed, for nothing that is used here. So they are hidden
    meanwhile, unless the process has them already; from then on transformers has no models in this process.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would warn that torch is missing, and of small models
    hidden = () if "torch" in sys.modules else ("torch", "torchvision")
    sys.modules.update(dict.fromkeys(hidden))  # None: to import it is an ImportError
    try:
        return getattr(importlib.import_module("transformers"), name)
    finally:
        for module in hidden:
            if sys.modules.get(module, module) is None:
                del sys.modules[module]
