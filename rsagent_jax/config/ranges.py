"""What a field of a config may hold, declared as the field's type: `lr: Positive = 1e-6`. config/build.py checks it.

A check answers `value in check` and says in words what is right; words of a fixed set are a plain `Literal`.
"""

import dataclasses
import functools
import math
import re
import typing
from typing import Annotated, Any, Literal

from sam_bridge.backends import NAMES


@dataclasses.dataclass(frozen=True)
class Range:
    """Finite numbers with low <= x <= high and above < x < below; and `also`, which mean something of their own."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    also: tuple[float, ...] = ()

    def __contains__(self, value: float) -> bool:
        try:
            value = float(value)
        except OverflowError:  # of a whole number with hundreds of digits
            return False
        inside = self.low <= value <= self.high and self.above < value < self.below
        return value in self.also or (math.isfinite(value) and inside)

    def __str__(self) -> str:
        bounds = (("at least", self.low), ("above", self.above), ("at most", self.high), ("below", self.below))
        said = " and ".join(f"{word} {bound}" for word, bound in bounds if math.isfinite(bound))
        return " or ".join([*map(str, self.also), said or "a finite number"])


@dataclasses.dataclass(frozen=True)
class Form:
    """Text that matches `pattern` as a whole, or is one of `words`; `said` tells people what that is."""

    pattern: str
    said: str
    words: tuple[str, ...] = ()

    def __contains__(self, value: str) -> bool:
        return value in self.words or re.fullmatch(self.pattern, value) is not None

    def __str__(self) -> str:
        return self.said


Finite = Annotated[float, Range()]
Weight = Annotated[float, Range(low=-1e6, high=1e6)]  # products of a few of them stay finite in float32
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(low=0)]
Fraction = Annotated[float, Range(low=0, high=1)]
BelowOne = Annotated[float, Range(low=0, below=1)]
Mass = Annotated[float, Range(above=0, high=1)]  # of probability, or another share
Count = Annotated[int, Range(low=1)]
CountOrZero = Annotated[int, Range(low=0)]
Seed = Annotated[int, Range(low=0, high=2**32 - 1)]  # what grain's shuffle and jax's keys both take
Port = Annotated[int, Range(low=0, high=65535)]

REFER = ("refcoco", "refcoco+", "refcocog", "grefcoco")  # their splits are by an author: unc, umd, …

Text = Annotated[str, Form(r"(?s).*\S.*", "a text that is not empty")]
FUNCTION = r"[\w.]+:\w+|.+\.py:\w+"
Function = Annotated[str, Form(FUNCTION, "module:function or file.py:function, such as rsagent_jax.rewards:final_iou")]
BackendName = Annotated[str, Form(f"{'|'.join(NAMES)}|{FUNCTION}", f"{', '.join(NAMES)} or module:factory of your own")]
# Data sets by name: what data/sets/open.py calls for each.
DATASETS = {
    **dict.fromkeys(REFER, "rsagent_jax.data.sets.refcoco:load_refcoco"),
    "reasonseg": "rsagent_jax.data.sets.reasonseg:load_reasonseg",
    "refcoco_m": "rsagent_jax.data.sets.coco_questions:load_refcoco_m",
    **dict.fromkeys(("muse", "mmr"), "rsagent_jax.data.sets.coco_questions:load_multi_target"),
    "gseval": "rsagent_jax.data.sets.coco_questions:load_gseval",
    "folder": "rsagent_jax.data.sets.folder:load_folder",
}
Dataset = Annotated[
    str, Form(FUNCTION, f"one of {', '.join(DATASETS)}, or module:function of your own", tuple(DATASETS))
]
_DEVICE = r"(cpu|cuda(:\d+)?)"
Devices = Annotated[str, Form(rf"{_DEVICE}(,\s*{_DEVICE})*", "cpu, cuda, cuda:1, or several with commas")]
MeshAxis = Annotated[int, Range(low=1, also=(-1,))]
Activations = Literal["float32", "bfloat16"]
_KEPT = ("qkv", "attention", "attention_out", "mlp_gate", "mlp_up")  # models/qwen25_vl/compute.py names them
_NAMES = rf"\s*({'|'.join(_KEPT)})\s*"
Remat = Annotated[
    str,
    Form(
        rf"|auto|none|full|attention|selective|dots|(save|offload):{_NAMES}(,{_NAMES})*",
        f"auto, none, full, attention, selective, dots, save:NAMES or offload:NAMES with names of {','.join(_KEPT)}",
    ),
]
Arguments = tuple[tuple[str, Any], ...]  # keyword arguments of a user's function: (name, value) pairs


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields, with their checks."""
    return typing.get_type_hints(cls, include_extras=True)


def item_class(hint: Any) -> type | None:
    """The dataclass that a field holds many of, by name; None for any other field."""
    item = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else None
    return item if dataclasses.is_dataclass(item) else None


def plain_type(hint: Any) -> Any:
    """The type without its checks: int, float, str, bool, or tuple[…]."""
    if typing.get_origin(hint) is typing.Annotated:
        return typing.get_args(hint)[0]
    return str if typing.get_origin(hint) is typing.Literal else hint


def field_type(cls: type, name: str) -> Any:
    """The type of the field, item or argument of this dotted name; None where there is none."""
    hint: Any = cls
    for part in name.split("."):
        if item := item_class(hint):
            hint = item
        elif hint == Arguments:
            hint = Any
        else:
            hint = hints(hint).get(part) if dataclasses.is_dataclass(hint) else None
    return hint
