"""ConfigDicts to the frozen dataclasses of config.py and back; one error lists everything that is wrong."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from rsagent_jax.types import DataError

T = TypeVar("T")


def build(cls: type[T], values: Any, found: Sequence[str] = ()) -> T:
    """Turns a ConfigDict (or dict) into `cls`, or raises one DataError that lists everything that is wrong.

    `found`: problems that are known already, to be listed with the rest.
    """
    problems = list(found)
    result = _build(cls, dict(values), "", problems)
    if problems:
        if len(problems) == 1:
            raise DataError(f"config: {problems[0]}")
        raise DataError("\n  - ".join([f"config has {len(problems)} problems:", *problems]))
    return result


def to_dict(config: Any) -> Any:
    """The resolved config as plain JSON values, to be saved beside checkpoints and results."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, tuple | list):
        return [to_dict(v) for v in config]
    return config


def template(cls: type) -> ConfigDict:
    """A ConfigDict with every field of `cls` that has a default, so that a config file states only what differs and
    every field can be overridden on the command line. Reward groups and terms are reached by name:
    `--config.grpo.reward.final.terms.final_iou.function=module:function`.
    """
    hints = typing.get_type_hints(cls)
    out = ConfigDict()
    for field in dataclasses.fields(cls):
        if field.default == () and _holds_dataclasses(hints[field.name]):
            out[field.name] = ConfigDict()  # items by name, to be added
        elif field.default is not dataclasses.MISSING:
            out[field.name] = _plain(field.default)
        elif dataclasses.is_dataclass(hints[field.name]):
            out[field.name] = template(hints[field.name])
        else:
            out[field.name] = placeholder(hints[field.name])
    return out


def _plain(value: Any) -> Any:
    if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        return ConfigDict({_item_name(item): _plain(item) for item in value})
    if dataclasses.is_dataclass(value):
        hints = typing.get_type_hints(type(value))
        plain = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        empty = {name for name, given in plain.items() if given == () and _holds_dataclasses(hints[name])}
        return ConfigDict({name: ConfigDict() if name in empty else given for name, given in plain.items()})
    return value


def _holds_dataclasses(hint: Any) -> bool:
    return typing.get_origin(hint) is tuple and dataclasses.is_dataclass(typing.get_args(hint)[0])


def _item_name(item: Any) -> str:
    return item.name if hasattr(item, "name") else item.function.rpartition(":")[2]


def _build(cls: Any, values: dict, path: str, problems: list[str]) -> Any:
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {path}{close[0]}?" if close else f"; known fields: {', '.join(known)}"
            problems.append(f"unknown field {path}{key}{hint}")
    kwargs = {}
    for field in dataclasses.fields(cls):
        where = path + field.name
        if values.get(field.name) is not None:
            kwargs[field.name] = _convert(hints[field.name], values[field.name], where, problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"missing field {where} ({_type_name(hints[field.name])})")
    if problems:
        return None
    return cls(**kwargs)


def _convert(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    if dataclasses.is_dataclass(hint):
        if hasattr(value, "items"):
            return _build(hint, dict(value), where + ".", problems)
        if isinstance(value, hint):
            return value
        problems.append(f"{where} must be a group of fields ({hint.__name__}), got {value!r}")
        return None
    if typing.get_origin(hint) is tuple:
        if dataclasses.is_dataclass(typing.get_args(hint)[0]) and hasattr(value, "items"):
            return _named_items(typing.get_args(hint)[0], value, where, problems)
        if not isinstance(value, tuple | list):
            problems.append(f"{where} must be a list ({_type_name(hint)}), got {value!r}")
            return None
        item = typing.get_args(hint)[0]
        return tuple(_convert(item, v, f"{where}[{i}]", problems) for i, v in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    problems.append(f"{where} must be {_type_name(hint)}, got {value!r} ({type(value).__name__})")
    return None


def _named_items(cls: Any, values: Any, where: str, problems: list[str]) -> tuple:
    """A group of items by name, so that each can be reached from the command line; None removes an item."""
    named = any(f.name == "name" for f in dataclasses.fields(cls))
    items = []
    for key, value in values.items():
        if value is None:
            continue
        value = {"name": key, **dict(value)} if named and hasattr(value, "items") else value
        items.append(_convert(cls, value, f"{where}.{key}", problems))
    return tuple(items)


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not isinstance(hint, types.GenericAlias) else str(hint)
