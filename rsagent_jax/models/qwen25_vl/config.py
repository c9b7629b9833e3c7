"""The shape of a Qwen2.5-VL, read from Hugging Face's config.json (flat as on the hub, or nested)."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

from rsagent_jax.types import DataError
from sam_bridge.file_kinds import HEAD, kind_of

SIZES = pathlib.Path(__file__).parents[3] / "assets" / "configs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Defaults are those of transformers' Qwen2_5_VLVisionConfig, since files that it writes leave such values out:
    the hub's config.json of the 32B names neither depth nor heads."""

    hidden_size: int
    intermediate_size: int
    out_hidden_size: int
    depth: int = 32
    num_heads: int = 16
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    in_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    window_size: int = 112

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
    def from_hf(cls, raw: dict[str, Any], where: str = "config.json") -> Qwen25VLConfig:
        """Reads the dict of a config.json. DataError lists every field that is missing or not supported."""
        text_raw = raw.get("text_config") or raw
        vision_raw = raw.get("vision_config")
        problems = []
        if raw.get("model_type") != "qwen2_5_vl":
            problems.append(f'model_type is {raw.get("model_type")!r}, not "qwen2_5_vl"')
        if not isinstance(vision_raw, dict):
            raise DataError(f"{where}: this is not a Qwen2.5-VL: it has no vision_config ({'; '.join(problems)})")
        vision_rope = vision_raw.get("rope_parameters") or {}
        for key, source, allowed in (
            ("hidden_act", text_raw, ("silu",)),
            ("use_sliding_window", text_raw, (False, None)),
            ("hidden_act", vision_raw, ("silu",)),
            ("rope_theta", vision_rope, (10_000.0,)),
        ):
            if source.get(key, allowed[0]) not in allowed:
                problems.append(f"{key} = {source[key]!r} is not supported (only {allowed[0]!r})")
        rope = text_raw.get("rope_parameters") or text_raw.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type", "default")) not in ("default", "mrope"):
            problems.append(f"rope type {rope.get('rope_type', rope.get('type'))!r} is not supported")
        text = dict(
            rope_theta=float(rope.get("rope_theta", text_raw.get("rope_theta", 1_000_000.0))),
            mrope_section=tuple(rope.get("mrope_section", (16, 24, 24))),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings") or text_raw.get("tie_word_embeddings")),
            num_key_value_heads=text_raw.get("num_key_value_heads") or text_raw.get("num_attention_heads"),
        )
        text |= _take(TextConfig, text_raw, text, "", problems)
        if isinstance(vision_raw.get("fullatt_block_indexes"), list):
            vision_raw = {**vision_raw, "fullatt_block_indexes": tuple(vision_raw["fullatt_block_indexes"])}
        vision = _take(VisionConfig, vision_raw, {}, "vision_config.", problems)
        ids = _take(cls, raw, {"text", "vision", "eos_token_ids"}, "", problems)
        eos = next((s["eos_token_id"] for s in (text_raw, raw) if s.get("eos_token_id") not in (None, [])), None)
        ids["eos_token_ids"] = token_ids(eos)
        if eos is None:
            problems.append("eos_token_id is missing")
        elif not ids["eos_token_ids"]:
            problems.append(f"eos_token_id = {eos!r} is neither a token id nor a list of them")
        if problems:
            raise DataError(f"{where}: " + "; ".join(problems))
        config = cls(text=TextConfig(**text), vision=VisionConfig(**vision), **ids)
        config._check(where)
        return config

    def _check(self, where: str) -> None:
        text, vision = self.text, self.vision
        checks = (
            (
                sum(text.mrope_section) * 2 == text.head_dim,
                f"mrope_section {text.mrope_section} does not sum to head_dim / 2",
            ),
            (text.num_attention_heads % text.num_key_value_heads == 0, "heads are not a multiple of key/value heads"),
            (
                vision.out_hidden_size == text.hidden_size,
                "vision out_hidden_size differs from the decoder's hidden_size",
            ),
            (vision.hidden_size % (4 * vision.num_heads) == 0, "vision head_dim is not a multiple of 4"),
        )
        if wrong := [message for ok, message in checks if not ok]:
            raise DataError(f"{where}: " + "; ".join(wrong))


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
        data = path.read_bytes()
        value = json.loads(data.decode("utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; give a Hugging Face directory of Qwen2.5-VL weights") from error
    except (OSError, ValueError, RecursionError) as error:  # errors of UTF-8 and JSON are ValueErrors
        kind = data and kind_of(data[:HEAD])
        raise DataError(f"{path} {f'is {kind}' if kind else f'cannot be read as JSON: {error}'}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} must hold a JSON object, it holds a {type(value).__name__}")
    return value


def _take(cls: type, raw: dict, given: Any, prefix: str, problems: list[str]) -> dict[str, Any]:
    """The fields of dataclass `cls` that are not in `given`, from `raw`; notes the missing ones."""
    taken = {}
    for field in dataclasses.fields(cls):
        if field.name in given:
            continue
        if (value := raw.get(field.name)) is not None:
            taken[field.name] = value
            if field.type in ("int", "float") and (isinstance(value, bool) or not isinstance(value, (int, float))):
                problems.append(f"{prefix}{field.name} = {value!r} is not a number")
        elif field.default is dataclasses.MISSING:
            problems.append(f"{prefix}{field.name} is missing")
    return taken
