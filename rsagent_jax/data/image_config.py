"""How a weights directory wants pictures prepared: what transformers 4 and 5 save of its image processor."""

import dataclasses
import math
import pathlib
from typing import Any, Self

from PIL import Image

from rsagent_jax.agent.views import PixelLimits
from rsagent_jax.models.qwen25_vl.config import VisionConfig, read_json
from rsagent_jax.types import DataError

# Fields of an image processor that would change the pixels, and the only value that `image_patches` implements.
FIXED = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "resample": int(Image.Resampling.BICUBIC),
    "rescale_factor": 1 / 255,
}
# Name of a size, and transformers' default where the file leaves it out -> its name in config.json's vision_config.
SIZES = {
    ("patch_size", 14): "patch_size",
    ("temporal_patch_size", 2): "temporal_patch_size",
    ("merge_size", 2): "spatial_merge_size",
}


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """A weights directory's image processor: sizes in pixels, mean and std per channel of 0..1 values."""

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    limits: PixelLimits
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def load(cls, directory: str | pathlib.Path, vision: VisionConfig | None = None) -> Self:
        """As transformers 4 and 5 save it (`image_processor_settings`).

        One DataError lists what is missing or no number of its kind, what contradicts `vision`, and what would change
        the pixels in a way that is not implemented here.
        """
        path, raw = image_processor_settings(directory)
        problems: list[str] = []
        sizes = {}
        for (name, default), theirs in SIZES.items():
            sizes[name] = _whole(raw.get(name, default), name, problems)
            if vision is not None and sizes[name] and sizes[name] != (wanted := getattr(vision, theirs)):
                problems.append(f"{name} is {sizes[name]}, config.json's vision_config.{theirs} is {wanted}")
        edges = (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))
        low, high = (_pixels(raw, *names, problems) for names in edges)
        mean, std = (_channels(raw, name, problems) for name in ("image_mean", "image_std"))
        if not all(value > 0 for value in std):
            problems.append(f"image_std is {list(std)}, it must be above 0")
        for name, wanted in FIXED.items():
            value = raw.get(name, wanted)
            if value != wanted and not (name == "rescale_factor" and _is_number(value) and abs(value * 255 - 1) < 1e-6):
                problems.append(f"{name} is {value!r}, only {wanted!r} is implemented")
        try:
            if not problems:
                limits = PixelLimits(sizes["patch_size"] * sizes["merge_size"], low, high)
                return cls(**sizes, limits=limits, mean=mean, std=std)
        except DataError as error:
            problems.append(str(error))
        raise DataError(f"{path}: " + "; ".join(dict.fromkeys(problems)))


def image_processor_settings(directory: str | pathlib.Path) -> tuple[pathlib.Path, dict[str, Any]]:
    """(file, its settings): `image_processor` in processor_config.json if it is there (transformers 5), else
    preprocessor_config.json; where a directory has both, transformers 5 reads the first."""
    new, old = (pathlib.Path(directory) / name for name in ("processor_config.json", "preprocessor_config.json"))
    if new.exists() and (nested := read_json(new).get("image_processor")) is not None:
        if not isinstance(nested, dict):
            raise DataError(f"{new}: image_processor must be a JSON object, it is a {type(nested).__name__}")
        return new, nested
    return old, read_json(old)


def _pixels(raw: dict[str, Any], name: str, edge: str, problems: list[str]) -> int:
    """A limit. `name` itself goes before what `size` says, as in transformers; null counts as left out."""
    if raw.get(name) is not None:
        return _whole(raw[name], name, problems)
    size = {} if raw.get("size") is None else raw["size"]
    if not isinstance(size, dict):
        problems.append(f"size is {size!r}, it must be {{shortest_edge: pixels, longest_edge: pixels}}")
        return 0
    found = {key: size[key] for key in (edge, name) if size.get(key) is not None}
    if len(found) == 1:
        ((key, value),) = found.items()
        return _whole(value, f"size.{key}", problems)
    problems.append(f"has both size.{edge} and size.{name}" if found else f"lacks {name} (or size.{edge})")
    return 0


def _whole(value: Any, name: str, problems: list[str]) -> int:
    """A whole number of at least 1, also written as 3136.0; else a problem, and 0."""
    if _is_number(value) and value >= 1 and value == value // 1 and value < 2**53:
        return int(value)
    problems.append(f"{name} is {value!r}, it must be a whole number of at least 1")
    return 0


def _channels(raw: dict[str, Any], name: str, problems: list[str]) -> tuple[float, ...]:
    value = raw.get(name)
    if isinstance(value, list) and len(value) == 3 and all(_is_number(v) and math.isfinite(v) for v in value):
        return tuple(map(float, value))
    problems.append(f"{name} is {value!r}, it must be three numbers" if name in raw else f"lacks {name}")
    return ()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
