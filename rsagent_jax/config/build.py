"""ConfigDicts to the frozen dataclasses of config.py and back; one error lists everything that is wrong."""

import collections
import dataclasses
import difflib
import math
import pathlib
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from rsagent_jax.config.import_path import closest, first_line, load_file, place, shipped
from rsagent_jax.config.overrides import GivenText, is_given, read_text
from rsagent_jax.config.ranges import Arguments, hints, item_class, plain_type
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
    refuse_config("config", problems or list(_conflicts(result, "")))
    return result


def refuse_config(what: str, problems: Sequence[str]) -> None:
    """One DataError that lists the problems, if there are any."""
    if len(problems) == 1:
        raise DataError(f"{what}: {problems[0]}")
    if problems:
        raise DataError("\n  - ".join([f"{what} has {len(problems)} problems:", *problems]))


def load_config_file(path: str) -> ConfigDict:
    """What `get_config()` of a file returns; `file.py:word` calls get_config(word). DataError with file and line."""
    file, colon, word = path.partition(":")
    file = shipped(file)
    if not pathlib.Path(file).is_file():
        folder = pathlib.Path(file).parent
        siblings = sorted(str(folder / p.name) for p in pathlib.Path(shipped(str(folder))).glob("*.py"))
        raise DataError(f"config file {file} does not exist{closest(file, siblings)}")
    if not file.endswith(".py"):
        raise DataError(f"config file {file} is not a Python file (.py)")
    try:
        get_config = getattr(load_file(pathlib.Path(file).resolve()), "get_config", None)
        config = get_config and (get_config(word) if colon else get_config())
    except Exception as error:  # whatever the user's file raises is the user's to mend
        raise DataError(f"{place(error, file)}: {type(error).__name__}: {first_line(error)}") from error
    if get_config is None:
        raise DataError(f"config file {file} has no function get_config()")
    if not isinstance(config, ConfigDict):
        raise DataError(f"{file}: get_config() must return a ConfigDict, got {type(config).__name__}")
    return config


def to_dict(config: Any) -> Any:
    """The resolved config as plain JSON values, to be saved beside checkpoints and results."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, tuple | list):
        return [to_dict(v) for v in config]
    return config


def template(cls: type, values: Any = None) -> ConfigDict:
    """A ConfigDict with every field of `cls` that has a default, so that a config file states only what differs and
    every field can be overridden on the command line. Reward groups, their terms and arguments, and the parts of a mix
    are reached by name: `--config.grpo.reward.final.terms.final_iou.function=module:function`.

    values: a `cls` whose values take the place of the defaults.
    """
    out = ConfigDict()
    for field in dataclasses.fields(cls):
        hint, value = hints(cls)[field.name], field.default if values is None else getattr(values, field.name)
        if item_class(hint):
            out[field.name] = ConfigDict({item_name(item): template(type(item), item) for item in value})
        elif hint == Arguments:
            out[field.name] = ConfigDict(dict(value))
        elif dataclasses.is_dataclass(hint):
            out[field.name] = template(hint, None if value is dataclasses.MISSING else value)
        elif value is dataclasses.MISSING:
            out[field.name] = placeholder(plain_type(hint))
        elif values is None or field.name != "name":  # an item's name is its key
            out[field.name] = value
    return out


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
    before = len(problems)
    known = {f.name: f for f in dataclasses.fields(cls)}
    problems += [_unknown(cls, key, value, path) for key, value in values.items() if key not in known]
    kwargs = {}
    for name, field in known.items():
        value, hint = values.get(name), hints(cls)[name]
        if value is not None and not (isinstance(value, GivenText) and value == "None"):
            kwargs[name] = _convert(hint, value, path + name, problems)
        elif field.default is dataclasses.MISSING:
            parent, _, own = path.rstrip(".").rpartition(".")
            kind, near = "flag" if path == "--" else "field", closest(own, others, parent + ".{}") if others else ""
            problems.append(f"missing {kind} {path}{name} ({_type_name(hint)}){near}")
    return cls(**kwargs) if len(problems) == before else None


def _unknown(cls: type, key: str, value: Any, path: str) -> str:
    """The closest field, failing that those inside whose last part is closest (`lr` for `sft.optim.lr`)."""
    where = f"--config.{path}" if path != "--" and is_given(value) else path
    rest, last = "", key
    while is_given(value) and isinstance(value, dict):
        last, value = next(iter(value.items()))
        rest += f".{last}"
    names = sorted(f.name for f in dataclasses.fields(cls))
    tails = collections.defaultdict(list)
    for leaf in _leaves(cls):
        tails[leaf.rpartition(".")[2]].append(where + leaf)
    hint = closest(key, names, where + "{}" + rest)
    if not hint and (match := difflib.get_close_matches(last, tails, n=1)):
        hint = f"; did you mean {' or '.join(tails[match[0]][:3])}?"
    kind = "flag" if path == "--" else "field"
    return f"unknown {kind} {where}{key}{rest}{hint or f'; known {kind}s: ' + ', '.join(names)}"


def _leaves(cls: type) -> Iterator[str]:
    for name, hint in hints(cls).items():
        yield name
        if dataclasses.is_dataclass(hint):
            yield from (f"{name}.{leaf}" for leaf in _leaves(hint))


def _convert(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    if isinstance(value, GivenText):
        try:
            value = read_text(hint, value)
        except ValueError as error:
            flag = where if where.startswith("--") else f"--config.{where}"
            problems.append(f"{flag}={value}: {where.lstrip('-')} must be {error}, got {value!r}")
            return None
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
            form = f"; write ('{value}',)" if isinstance(value, str) and value.isidentifier() else ""
            problems.append(f"{where} must be a list ({_type_name(hint)}), got {value!r}{form}")
            return None
        item = typing.get_args(hint)[0]
        return tuple(_convert(item, v, f"{where}[{i}]", problems) for i, v in enumerate(value))
    return _leaf(hint, value, where, problems)


def _leaf(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    kind, before = plain_type(hint), len(problems)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, pathlib.PurePath if kind is pathlib.Path else kind) or (
        kind is int and isinstance(value, bool)
    ):
        problems.append(f"{where} must be {kind.__name__}, got {value!r} ({type(value).__name__})")
    elif typing.get_origin(hint) is typing.Literal:
        words = typing.get_args(hint)
        if value not in words:
            said = ", ".join(word or '""' for word in words)
            problems.append(f"{where} must be one of {said}, got {value!r}{closest(value, words)}")
    elif typing.get_origin(hint) is typing.Annotated:
        problems += [
            f"{where} must be {check}, got {value!r}{closest(str(value), getattr(check, 'words', ()))}"
            for check in hint.__metadata__
            if value not in check
        ]
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
        value = read_text(Any, value) if isinstance(value, GivenText) else value
        value = tuple(value) if isinstance(value, list | tuple) else value
        if not all(isinstance(v, bool | int | float | str) for v in (value if isinstance(value, tuple) else (value,))):
            problems.append(f"{where}.{name} must be a number, text, bool or a list of them, got {value!r}")
        kept.append((str(name), value))
    return tuple(sorted(kept))


def _named_items(cls: Any, values: Any, where: str, problems: list[str]) -> tuple:
    """A group of items by name, so that each can be reached from the command line; None removes an item."""
    items = []
    for key, value in values.items():
        if value is None:
            continue
        if isinstance(value, GivenText) and value == "None":  # it would take out what is not there
            near = closest(key, [name for name in values if name != key], f"--config.{where}.{{}}")
            problems.append(f"unknown field --config.{where}.{key}{near}")
        elif not hasattr(value, "items"):
            items.append(_convert(cls, value, f"{where}.{key}", problems))
        else:
            others = [name for name in values if name != key]
            items.append(build_fields(cls, {"name": key, **dict(value)}, f"{where}.{key}.", problems, others))
    return tuple(items)


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        return f"tuple[{_type_name(typing.get_args(hint)[0])}, ...]"
    hint = plain_type(hint)
    return hint.__name__ if isinstance(hint, type) and not isinstance(hint, types.GenericAlias) else str(hint)
