"""ConfigDicts to the frozen dataclasses of config.py and back; one error lists everything that is wrong."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from rsagent_jax.config.import_path import closest
from rsagent_jax.config.ranges import Arguments
from rsagent_jax.types import DataError

T = TypeVar("T")


def build_config(cls: type[T], values: Any, found: Sequence[str] = ()) -> T:
    """Turns a ConfigDict (or dict) into `cls`, or raises one DataError that lists everything that is wrong.

    That is: unknown, missing and ill-typed fields, values outside of what a field's type allows
    (rsagent_jax/config/ranges.py), and, once each field is right by itself, what fields ask of each other (a class's
    `conflicts`). `found`: problems that are known already, to be listed with the rest.
    """
    problems = list(found)
    result = build_fields(cls, dict(values), "", problems)
    refuse("config", problems or list(_conflicts(result, "")))
    return result


def refuse(what: str, problems: Sequence[str]) -> None:
    """One DataError that lists the problems, if there are any."""
    if len(problems) == 1:
        raise DataError(f"{what}: {problems[0]}")
    if problems:
        raise DataError("\n  - ".join([f"{what} has {len(problems)} problems:", *problems]))


def to_dict(config: Any) -> Any:
    """The resolved config as plain JSON values, to be saved beside checkpoints and results."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, tuple | list):
        return [to_dict(v) for v in config]
    return config


def template(cls: type) -> ConfigDict:
    """A ConfigDict with every field of `cls` that has a default, so that a config file states only what differs and
    every field can be overridden on the command line. Reward groups, their terms and arguments, and the parts of a mix
    are reached by name: `--config.grpo.reward.final.terms.final_iou.function=module:function`.
    """
    types_ = hints(cls)
    out = ConfigDict()
    for field in dataclasses.fields(cls):
        hint = types_[field.name]
        if field.default == () and (item_class(hint) or hint == Arguments):
            out[field.name] = ConfigDict()  # items by name, to be added
        elif field.default is not dataclasses.MISSING:
            out[field.name] = _plain(field.default)
        elif dataclasses.is_dataclass(hint):
            out[field.name] = template(hint)
        else:
            out[field.name] = placeholder(plain_type(hint))
    return out


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields, with the checks of config/ranges.py."""
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


def _plain(value: Any) -> Any:
    if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        return ConfigDict({item_name(item): _plain(item) for item in value})
    if dataclasses.is_dataclass(value):
        types_ = hints(type(value))
        plain = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.name != "name"}
        by_name = {name for name, hint in types_.items() if item_class(hint) or hint == Arguments}
        return ConfigDict({name: ConfigDict() if v == () and name in by_name else v for name, v in plain.items()})
    return value


def item_name(item: Any) -> str:
    return item.name or item.function.rpartition(":")[2]


def _conflicts(config: Any, path: str) -> Iterator[str]:
    if not dataclasses.is_dataclass(config):
        return
    yield from (f"{path}{text}" for text in getattr(config, "conflicts", tuple)())
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        yield from _conflicts(value, f"{path}{field.name}.")
        if item_class(hints(type(config))[field.name]):
            for item in value:
                yield from _conflicts(item, f"{path}{field.name}.{item_name(item)}.")


def build_fields(cls: Any, values: dict, path: str, problems: list[str], others: Iterable[str] = ()) -> Any:
    """A `cls` of the values, or None with what is wrong added to `problems`; `path` goes before a field's name there.

    others: names of items beside this one, for somebody who misspelt one and so made another.
    """
    types_, before = hints(cls), len(problems)
    known = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            hint = closest(str(key), known, path + "{}") or f"; known fields: {', '.join(known)}"
            problems.append(f"unknown field {path}{key}{hint}")
    kwargs = {}
    for field in dataclasses.fields(cls):
        where = path + field.name
        if values.get(field.name) is not None:
            kwargs[field.name] = _convert(types_[field.name], values[field.name], where, problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            parent, _, own = path.rstrip(".").rpartition(".")
            hint = closest(own, others, parent + ".{}") if others else ""
            problems.append(
                f"missing {'flag' if path == '--' else 'field'} {where} ({_type_name(types_[field.name])}){hint}"
            )
    return cls(**kwargs) if len(problems) == before else None


def _convert(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    if hint == Arguments:
        return _arguments(value, where, problems)
    if dataclasses.is_dataclass(hint):
        if hasattr(value, "items"):
            return build_fields(hint, dict(value), where + ".", problems)
        if isinstance(value, hint):
            return value
        problems.append(f"{where} must be a group of fields ({hint.__name__}), got {value!r}")
        return None
    if typing.get_origin(hint) is tuple:
        if (item := item_class(hint)) and hasattr(value, "items"):
            return _named_items(item, value, where, problems)
        if not isinstance(value, tuple | list):
            problems.append(f"{where} must be a list ({_type_name(hint)}), got {value!r}{_as_list(value)}")
            return None
        item = typing.get_args(hint)[0]
        return tuple(_convert(item, v, f"{where}[{i}]", problems) for i, v in enumerate(value))
    return _leaf(hint, value, where, problems)


def _leaf(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    kind, before = plain_type(hint), len(problems)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        problems.append(f"{where} must be {kind.__name__}, got {value!r} ({type(value).__name__})")
    elif typing.get_origin(hint) is typing.Literal:
        words = typing.get_args(hint)
        if value not in words:
            said = ", ".join(word or '""' for word in words)
            problems.append(f"{where} must be one of {said}, got {value!r}{closest(value, words)}")
    elif typing.get_origin(hint) is typing.Annotated:
        problems += [f"{where} must be {check}, got {value!r}" for check in hint.__metadata__ if value not in check]
    elif kind is float and not math.isfinite(value):
        problems.append(f"{where} must be a finite number, got {value!r}")
    return value if len(problems) == before else None


def _arguments(values: Any, where: str, problems: list[str]) -> tuple[tuple[str, Any], ...]:
    """Keyword arguments by name (a dict), or their (name, value) pairs as `to_dict` writes them; None takes one out."""
    pairs = list(values.items()) if hasattr(values, "items") else values
    if not isinstance(pairs, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
        problems.append(f"{where} are given by name, as in {where}.NAME=value, got {values!r}")
        return ()
    kept = []
    for name, value in pairs:
        if value is None:
            continue
        if not str(name).isidentifier():
            problems.append(f"{where}: {name!r} cannot be an argument's name")
        if isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{where}.{name} must be a finite number, got {value!r}")
        value = tuple(value) if isinstance(value, list | tuple) else value
        if not all(isinstance(v, bool | int | float | str) for v in (value if isinstance(value, tuple) else (value,))):
            problems.append(f"{where}.{name} must be a number, text, bool or a list of them, got {value!r}")
        kept.append((str(name), value))
    return tuple(sorted(kept))


def _as_list(value: Any) -> str:
    return f"; write ('{value}',)" if isinstance(value, str) and value.isidentifier() else ""


def _named_items(cls: Any, values: Any, where: str, problems: list[str]) -> tuple:
    """A group of items by name, so that each can be reached from the command line; None removes an item."""
    items = []
    for key, value in values.items():
        if value is None:
            continue
        if not hasattr(value, "items"):
            items.append(_convert(cls, value, f"{where}.{key}", problems))
            continue
        others = [name for name in values if name != key]
        items.append(build_fields(cls, {"name": key, **dict(value)}, f"{where}.{key}.", problems, others))
    return tuple(items)


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        return f"tuple[{_type_name(typing.get_args(hint)[0])}, ...]"
    hint = plain_type(hint)
    return hint.__name__ if isinstance(hint, type) and not isinstance(hint, types.GenericAlias) else str(hint)
